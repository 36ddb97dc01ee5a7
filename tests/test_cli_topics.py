"""``natsrt topics``, ``natsrt tail --since`` and ``natsrt replay``."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from typing import Any

import pytest
from autogen_core import TopicId, TypePrefixSubscription
from natsrt_cli.replay import _Pace

import natsrt
from natsrt import DurableTopics, NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from tests.support.processes import Processes, eventually
from tests.test_dead_letters import TOPIC, Desk, Job, Place, Works, place

__all__ = ["place"]


async def info(place: Place, name: str = "work.jobs") -> Any:
    return (await place.run("topics", "info", name, "--json")).json


# -- ls, info and rm -------------------------------------------------------------------------------------------------


async def test_topics_ls_lists_streams_with_their_events(place: Place) -> None:
    assert (await place.run("topics", "ls")).stderr.endswith("no topic is durable\n")
    desk = Desk(broken=False)
    topics = ["work.", "audit.log", DurableTopics("metrics.", name="short", max_age=3600, max_messages=10)]
    runtime = NatsAgentRuntime(place.server.url, namespace=place.namespace, durable=topics)
    await place.stack.enter_async_context(runtime)
    for number in range(3):
        await runtime.publish_message(Job(number), TOPIC)
    rows = (await place.run("topics", "ls", "--json")).json
    name = f"{place.namespace}_natsrt_events"
    assert [(row["stream"], row["patterns"], row["events"]) for row in rows] == [
        (name, ["work.", "audit.log"], 3),
        (f"{name}_short", ["metrics."], 0),
    ]
    table = (await place.run("topics", "ls")).stdout
    assert "30d" in table
    assert "1h, 10 events, discard new" in table
    assert not desk.handled


async def test_topics_info_shows_how_far_each_type_is_behind(place: Place) -> None:
    desk = Desk(broken=False)
    worker = await place.worker(desk, "jobs", "other")
    publisher = await place.worker(Desk())
    await publisher.publish_message(Job(0), TOPIC)
    await eventually(lambda: len(desk.handled) == 2)
    await worker.unregister("other", keep_subscriptions=True)
    for number in (1, 2):
        await publisher.publish_message(Job(number), TOPIC)
    await eventually(lambda: len(desk.handled) == 4)

    async def lags() -> dict[str, int]:
        return {row["agent_type"]: row["lag"] for row in (await info(place))["agent_types"]}

    async def settled() -> bool:
        return await lags() == {"jobs": 0, "other": 2}

    await eventually(settled)
    rows = {row["agent_type"]: row for row in (await info(place))["agent_types"]}
    assert (rows["jobs"]["workers"], rows["other"]["workers"]) == (1, 0)
    assert rows["jobs"]["acknowledged_up_to"] == 3
    for name in ("work.", "work.jobs/shop", f"{place.namespace}_natsrt_events"):
        assert (await info(place, name))["stream"] == f"{place.namespace}_natsrt_events"
    shown = (await place.run("topics", "info", "work.jobs")).stdout
    assert "no worker" in shown
    missing = await place.run("topics", "info", "news.tech")
    assert (missing.code, missing.stderr.strip()) == (
        4,
        "natsrt: there is no stream, and no durable topic, 'news.tech'; durable are: work.",
    )


async def test_a_removed_pattern_is_on_core_nats_and_its_unhandled_events_are_still_handled(place: Place) -> None:
    desk = Desk(broken=False)
    publisher = NatsAgentRuntime(place.server.url, namespace=place.namespace, durable=["work.", "audit."])
    await place.stack.enter_async_context(publisher)
    worker = NatsAgentRuntime(place.server.url, namespace=place.namespace)
    await natsrt.register(worker, Works, "jobs", lambda: Works(desk))
    for prefix in ("work.", "audit."):
        await worker.add_subscription(TypePrefixSubscription(prefix, "jobs"))
    async with worker:
        await worker.publish_message(Job(1), TOPIC)
        await eventually(lambda: desk.numbers == Counter([1]))
    await publisher.publish_message(Job(2), TOPIC)  # nobody handles it yet

    assert (await place.run("topics", "rm", "news.")).code == 4
    refused = await place.run("topics", "rm", "work.", stdin="n\n")
    assert refused.code != 0
    assert "2 events on work. stay" in refused.stderr
    removed = await place.run("topics", "rm", "work.", "--yes")
    assert (removed.code, "agent types still get those not handled yet" in removed.stderr) == (0, True)
    assert [row["patterns"] for row in (await place.run("topics", "ls", "--json")).json] == [["audit."]]

    again = NatsAgentRuntime(place.server.url, namespace=place.namespace)
    await natsrt.register(again, Works, "jobs", lambda: Works(desk))
    for prefix in ("work.", "audit."):
        await again.add_subscription(TypePrefixSubscription(prefix, "jobs"))
    await place.stack.enter_async_context(again)
    await eventually(lambda: desk.numbers == Counter([1, 2]))
    await again.publish_message(Job(3), TOPIC)
    await again.publish_message(Job(4), TopicId("audit.log", "shop"))
    await eventually(lambda: desk.numbers == Counter([1, 2, 3, 4]))
    assert (await info(place, "audit."))["events"] == 3


async def test_the_last_pattern_is_removed_with_its_entry(place: Place) -> None:
    await place.worker(Desk())
    assert (await place.run("topics", "rm", "work.", "--yes")).code == 0
    assert (await place.run("topics", "ls", "--json")).json == []


# -- tail --since ----------------------------------------------------------------------------------------------------


async def test_tail_shows_what_is_stored_and_then_what_is_published(place: Place) -> None:
    runtime = await place.worker(Desk())
    for number in range(3):
        await runtime.publish_message(Job(number), TOPIC)
    shown = await place.run("tail", "work.", "--since", "1h", "--count", "3", "--json")
    rows = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [(row["sequence"], row["data"]["number"]) for row in rows] == [(1, 0), (2, 1), (3, 2)]
    assert rows[0]["stream"] == f"{place.namespace}_natsrt_events"
    tail = asyncio.ensure_future(place.run("tail", "--since", "0s", "--count", "2", "--json"))
    number = 100
    while not tail.done():  # until it listens, and shows the first two since then
        number += 1
        await runtime.publish_message(Job(number), TOPIC)
        await asyncio.wait({tail}, timeout=0.1)
    first, second = [json.loads(line)["data"]["number"] for line in (await tail).stdout.splitlines()]
    assert (first >= 101, second) == (True, first + 1)


async def test_tail_shows_of_a_payload_by_reference_where_it_is_and_its_size(place: Place) -> None:
    runtime = await place.worker(Desk(), blob_threshold=1000)
    await runtime.publish_message("x" * 5000, TOPIC)
    await runtime.publish_message(Job(2), TOPIC)
    shown = await place.run("tail", "work.", "--since", "1h", "--count", "2", "--json")
    large, small = (json.loads(line) for line in shown.stdout.splitlines())
    assert re.fullmatch("natsrt:[A-Za-z0-9_-]{16,64}", large["dataref"])
    assert 5000 < large["blob_size_bytes"] < 5100 and large["message_type"] == "str"
    assert not {"data", "data_base64"} & large.keys()
    assert not {"dataref", "blob_size_bytes"} & small.keys() and small["data"]["number"] == 2
    text = await place.run("tail", "work.", "--since", "1h", "--count", "2")
    assert f"str  ({large['blob_size_bytes']:,} bytes by reference, {large['dataref']})" in text.stdout


async def test_tail_has_no_gap_and_no_double_at_the_seam_under_load(place: Place) -> None:
    runtime = await place.worker(Desk())
    await asyncio.gather(*(runtime.publish_message(Job(number), TOPIC) for number in range(500)))
    tail = asyncio.ensure_future(place.run("tail", "work.", "--since", "1h", "--count", "1500", "--json"))
    number = 500
    while not tail.done():
        await asyncio.gather(*(runtime.publish_message(Job(number + more), TOPIC) for more in range(20)))
        number += 20
        await asyncio.wait({tail}, timeout=0.01)
    rows = [json.loads(line) for line in (await tail).stdout.splitlines()]
    assert [row["sequence"] for row in rows] == list(range(1, 1501))
    assert Counter(row["data"]["number"] for row in rows) == Counter(range(1500))


async def test_tail_since_shows_topics_that_are_not_durable_from_now_on(place: Place) -> None:
    runtime = await place.worker(Desk())
    await runtime.publish_message(Job(1), TOPIC)
    tail = asyncio.ensure_future(place.run("tail", "--since", "1h", "--count", "2", "--json"))
    while not tail.done():
        await runtime.publish_message(Job(2), TopicId("news", "shop"))
        await asyncio.wait({tail}, timeout=0.1)
    assert [json.loads(line)["data"]["number"] for line in (await tail).stdout.splitlines()] in ([1, 2], [2, 1])


@pytest.mark.slow  # a server is restarted
async def test_tail_goes_on_where_it_was_after_the_server_was_restarted(
    own_server: EmbeddedServer, processes: Processes
) -> None:
    async with NatsAgentRuntime(own_server.url, durable=["work."]) as runtime:
        for number in range(3):
            await runtime.publish_message(Job(number), TOPIC)
        tail = processes.natsrt("tail", "work.", "--since", "1h", "--count", "6", "--json", "--server", own_server.url)
        await tail.wait_for_line('"sequence":3,')
        await own_server.restart()
        for number in range(3, 6):
            await runtime.publish_message(Job(number), TOPIC, message_id=f"id-{number}")
        assert await tail.wait(20) == 0, tail.describe()
    rows = [json.loads(line) for line in tail.stdout.splitlines()]
    assert [(row["sequence"], row["data"]["number"]) for row in rows] == [(n + 1, n) for n in range(6)]


@pytest.mark.parametrize("since", ["yesterday", "10 minutes", ""])
async def test_a_moment_that_is_none_is_refused(place: Place, since: str) -> None:
    ended = await place.run("tail", "--since", since)
    assert (ended.code, "is neither a duration such as 1h30m" in ended.stderr) == (2, True)


# -- replay ----------------------------------------------------------------------------------------------------------


async def test_replay_gives_events_to_one_type_with_their_message_ids(place: Place) -> None:
    desk = Desk(broken=False)
    runtime = await place.worker(desk, "jobs", "other")
    for number in range(3):
        await runtime.publish_message(Job(number), TOPIC, message_id=f"id-{number}")
    await runtime.publish_message(Job(9), TopicId("work.more", "shop"), message_id="id-9")
    await eventually(lambda: len(desk.handled) == 8)
    desk.handled.clear()
    ended = await place.run("replay", "work.jobs/shop", "--since", "1h", "--to", "other")
    assert (ended.code, ended.stderr) == (0, "replayed: 3 events to other\n")
    await eventually(lambda: len(desk.handled) >= 3)
    await runtime.publish_message(Job(10), TOPIC, message_id="id-10")  # what came before it has been handled when it is
    await eventually(lambda: len(desk.handled) >= 5)
    expected = [("jobs", 10, "id-10"), ("other", 10, "id-10"), *(("other", n, f"id-{n}") for n in range(3))]
    assert Counter(desk.handled) == Counter(expected)
    assert (await place.run("replay", "work.", "--since", "1h", "--until", "30m", "--to", "other")).stderr.endswith(
        "replayed: 0 events to other\n"
    )
    missing = await place.run("replay", "work.", "--since", "1h", "--to", "nobody")
    assert (missing.code, "handles no events of durable topics" in missing.stderr) == (4, True)


async def test_replay_leaves_out_what_no_subscription_of_the_type_takes(place: Place) -> None:
    desk = Desk(broken=False)
    publisher = await place.worker(Desk())
    await publisher.publish_message(Job(1), TOPIC)
    await publisher.publish_message(Job(2), TopicId("work.more", "shop"))
    runtime = NatsAgentRuntime(place.server.url, namespace=place.namespace)
    await natsrt.register(runtime, Works, "narrow", lambda: Works(desk))
    await runtime.add_subscription(TypePrefixSubscription("work.jobs", "narrow"))
    await place.stack.enter_async_context(runtime)
    ended = await place.run("replay", "work.", "--since", "1h", "--to", "narrow")
    assert ended.stderr == "replayed: 1 events to narrow\n"
    await eventually(lambda: desk.numbers == Counter([1]))


async def test_replay_of_an_event_without_an_id_has_the_same_id_again(place: Place) -> None:
    desk = Desk(broken=False)
    runtime = await place.worker(desk, "jobs")
    subject = runtime.running.network.subjects.topic(TOPIC.type, TOPIC.source)
    await runtime.running.connection.jetstream.publish(subject, b'{"number":1}', headers={"Natsrt-Type": "Job"})
    await eventually(lambda: len(desk.handled) == 1)
    for count in (2, 3):
        await place.run("replay", "work.", "--since", "1h", "--to", "jobs")
        await eventually(lambda count=count: len(desk.handled) == count)  # type: ignore[misc]
    assert len(set(desk.handled)) == 1


async def test_replay_keeps_the_distances_in_time(place: Place) -> None:
    pace = _Pace(10.0)
    assert pace.wait(100.0) <= 0
    assert 1.0 < pace.wait(120.0) <= 2.0
    for speed in ("0x", "fast", "-1"):
        ended = await place.run("replay", "work.", "--since", "1h", "--to", "jobs", f"--speed={speed}")
        assert (ended.code, "is not a speed such as 1x" in ended.stderr) == (2, True)


@pytest.mark.slow  # ten thousand events are stored, and handled, twice
async def test_ten_thousand_events_are_replayed_once_each(place: Place) -> None:
    desk = Desk(broken=False)
    runtime = await place.worker(desk, "jobs")
    for start in range(0, 10_000, 1_000):
        await asyncio.gather(
            *(runtime.publish_message(Job(n), TOPIC, message_id=f"id-{n}") for n in range(start, start + 1_000))
        )
    await eventually(lambda: len(desk.handled) == 10_000, 60.0)
    ended = await place.run("replay", "work.", "--since", "1h", "--to", "jobs")
    assert ended.stderr.splitlines()[-1] == "replayed: 10,000 events to jobs"
    await eventually(lambda: len(desk.handled) >= 20_000, 60.0)
    assert desk.numbers == Counter(dict.fromkeys(range(10_000), 2))
    assert all(f"id-{number}" == message_id for _, number, message_id in desk.handled)


async def test_recorded_events_of_any_topic_are_replayed_to_one_type(place: Place, processes: Processes) -> None:
    desk, stream = Desk(broken=False), f"rec_{place.namespace}"
    runtime = await place.worker(desk, "jobs", "other")
    for name in ("jobs", "other"):
        await runtime.add_subscription(TypePrefixSubscription("news.", name))
    where = ("--to", stream, "--server", place.server.url, "--namespace", place.namespace)
    recorders = [processes.natsrt("record", *where) for _ in range(2)]  # two of them store each event twice
    for recorder in recorders:
        await recorder.wait_for_line("recording to", 30.0)
    for number in range(3):
        await runtime.publish_message(Job(number), TopicId("news.tech", "a b"), message_id=f"id-{number}")
    await runtime.publish_message(Job(3), TOPIC, message_id="id-3")
    await runtime.publish_message(Job(4), TopicId("elsewhere", "x"), message_id="id-4")
    await eventually(lambda: len(desk.handled) == 8)
    await runtime.running.connection.barrier()
    for recorder in recorders:
        recorder.interrupt()
        await recorder.wait(30.0)
        assert "5 events; missed: nothing known" in recorder.stderr
    desk.handled.clear()

    ended = await place.run("replay", "news.", "--from", stream, "--to", "other")
    assert (ended.code, ended.stderr) == (0, "replayed: 3 events to other\n")
    await eventually(lambda: len(desk.handled) >= 3)
    every = await place.run("replay", "topic.>", "--from", stream, "--since", "1h", "--to", "other")
    assert every.stderr == "replayed: 4 events to other\n"
    await eventually(lambda: len(desk.handled) >= 7)
    twice = Counter({("other", number, f"id-{number}"): 2 for number in range(3)})
    assert Counter(desk.handled) == twice + Counter([("other", 3, "id-3")])

    before = await place.run("replay", "news.", "--from", stream, "--until", "1h", "--to", "other")
    assert before.stderr == "replayed: 0 events to other\n"
    gone = await place.run("replay", "news.", "--from", "nowhere", "--to", "other")
    assert (gone.code != 0, "there is no such stream" in gone.stderr) == (True, True)
    open_ = await place.run("replay", "news.", "--to", "other")
    assert (open_.code, "--since is missing" in open_.stderr) == (2, True)
    await runtime.running.connection.jetstream.delete_stream(stream)
