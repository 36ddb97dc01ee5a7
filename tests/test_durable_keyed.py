"""Events of durable topics for keyed agents: in order, and each applied once to the agent's state."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import nats.js.errors
import pytest
from autogen_core import AgentId, TopicId
from nats.aio.msg import Msg
from nats.js.api import RawStreamMsg

from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.hosting.feeder import Feeder
from natsrt.hosting.pinned_consumer import PINNED_FOR
from natsrt.jetstream.attempts import Attempts, Counted
from natsrt.jetstream.consumers import Consumers
from natsrt.jetstream.delivery import Delivery
from natsrt.jetstream.domains import Domain
from tests.programs import durable_ledger
from tests.programs.durable_ledger import SETTINGS, Ask, Entries, Entry, host
from tests.support.processes import Process, Processes, eventually

PROGRAM = Path(durable_ledger.__file__)
Make = Callable[..., Any]


@pytest.fixture
async def make(server: EmbeddedServer, namespace: str) -> AsyncIterator[Make]:
    """Starts runtimes: with ``hosts``, workers of the type ``ledger``."""
    async with AsyncExitStack() as stack:

        async def runtime(
            name: str = "", *, url: str = server.url, hosts: bool = True, start: bool = True, **more: Any
        ) -> NatsAgentRuntime:
            made = NatsAgentRuntime(url, namespace=namespace, name=name or "p", **SETTINGS | more)
            if hosts:
                await host(made)
            return await stack.enter_async_context(made) if start else made

        yield runtime


@pytest.fixture
async def start_worker(server: EmbeddedServer, namespace: str, processes: Processes) -> Callable[..., Any]:
    async def start(name: str, ack_wait: float = 2.0, max_deliver: int = 5) -> Process:
        arguments = (server.url, namespace, name, str(ack_wait), str(max_deliver))
        process = processes.python(PROGRAM, *arguments, name=name)
        await process.wait_for_line("ready", 30.0)
        return process

    return start


async def publish(runtime: NatsAgentRuntime, key: str, *entries: Entry) -> None:
    for entry in entries:
        await runtime.publish_message(entry, TopicId("work.entries", key))


async def entries(runtime: NatsAgentRuntime, key: str) -> list[int]:
    answer: Entries = await runtime.send_message(Ask(), AgentId("ledger", key))
    return answer.numbers


def stream_of(runtime: NatsAgentRuntime) -> str:
    return f"{runtime.options.namespace}_natsrt_events"


async def all_settled(runtime: NatsAgentRuntime, timeout: float = 60.0) -> None:
    async def nothing_left() -> bool:
        info = await runtime.running.connection.jetstream.consumer_info(stream_of(runtime), "ledger")
        return not (info.num_pending or info.num_ack_pending)

    await eventually(nothing_left, timeout, "all events settled")


async def dead_letters(runtime: NatsAgentRuntime) -> list[Msg]:
    js, stream = runtime.running.connection.jetstream, f"{runtime.options.namespace}_natsrt_dead"
    try:
        info = await js.stream_info(stream)
    except nats.js.errors.NotFoundError:
        return []
    stored = range(info.state.first_seq, info.state.last_seq + 1) if info.state.messages else ()
    return [await js.get_msg(stream, sequence) for sequence in stored]


def feeds(runtime: NatsAgentRuntime) -> bool:
    pullers = runtime.running.incoming.durable.settlements
    return any(isinstance(puller, Feeder) and puller.feeds for puller in pullers)


async def publish_many(runtimes: list[NatsAgentRuntime], count: int, keys: int, what: str = "") -> dict[str, list[int]]:
    """Publish ``count`` events to ``keys`` agents, each key from one of the runtimes. Returns the numbers of each."""
    sent: dict[str, list[int]] = {f"k{key}": [] for key in range(keys)}

    async def of_key(runtime: NatsAgentRuntime, key: str, numbers: range) -> None:
        for number in numbers:
            await runtime.publish_message(Entry(number, what), TopicId("work.entries", key))
            sent[key].append(number)

    await asyncio.gather(
        *(of_key(runtimes[n % len(runtimes)], key, range(n, count, keys)) for n, key in enumerate(sent))
    )
    return sent


async def check(runtime: NatsAgentRuntime, sent: dict[str, list[int]]) -> None:
    for key, numbers in sent.items():
        assert await entries(runtime, key) == numbers, key


async def test_events_of_a_key_are_handled_in_order_by_the_agents_owner(make: Make) -> None:
    worker, publisher = await make("a"), await make(hosts=False)
    await publish(publisher, "x", *(Entry(number) for number in range(20)))
    await all_settled(worker)
    assert await entries(publisher, "x") == list(range(20))
    assert feeds(worker)


async def test_many_events_over_three_workers_are_applied_once_and_in_order(make: Make) -> None:
    workers = [await make(name) for name in "abc"]
    publishers = [await make(hosts=False) for _ in range(2)]
    sent = await publish_many(publishers, 2000, 50)
    await all_settled(workers[0])
    await check(publishers[0], sent)
    assert sum(feeds(worker) for worker in workers) == 1


async def test_a_poison_event_holds_up_its_key_alone_and_then_is_a_dead_letter(make: Make) -> None:
    worker = await make("a", max_deliver=3)
    await publish(worker, "bad", Entry(1), Entry(2, "fail"), Entry(3), Entry(4, "reject"), Entry(5, "retry"))
    await publish(worker, "good", *(Entry(number) for number in range(10)))
    await all_settled(worker)
    assert await entries(worker, "good") == list(range(10))
    assert await entries(worker, "bad") == [1, 3, 5]
    letters = await dead_letters(worker)
    found = [(m.headers["Natsrt-Dead-Sequence"], m.headers["Natsrt-Dead-Attempts"]) for m in letters if m.headers]
    assert found == [("2", "3"), ("4", "1")]
    assert letters[0].headers and "entry 2" in letters[0].headers["Natsrt-Dead-Error"]
    assert worker.health().dead_letters == 2


async def test_a_plain_client_may_publish_and_the_publishers_own_agent_is_skipped(make: Make) -> None:
    worker = await make("a")
    subject = worker.running.network.subjects.topic("work.entries", "x")
    js = worker.running.connection.jetstream
    await js.publish(subject, b'{"number": 1}', headers={"Natsrt-Type": "Entry"})
    await js.publish(subject, b'{"number": 2}')
    await js.publish(subject, b'{"specversion": "1.0", "type": "natsrt.event"}')
    await worker.publish_message(Entry(3), TopicId("work.entries", "x"), sender=AgentId("ledger", "x"))
    await worker.publish_message(Entry(4), TopicId("work.entries", "x"), sender=AgentId("ledger", "y"))
    await all_settled(worker)
    assert await entries(worker, "x") == [1, 2, 4]
    (letter,) = await dead_letters(worker)
    assert letter.headers and letter.headers["Natsrt-Dead-Sequence"] == "3"


@pytest.mark.timeout(150)
@pytest.mark.slow  # starts processes, and waits until the server ends the pins of those that were killed
async def test_events_are_applied_once_and_in_order_while_feeders_and_owners_are_killed(
    make: Make, start_worker: Any
) -> None:
    processes = {name: await start_worker(name) for name in "abc"}
    publisher = await make(hosts=False)
    publishing = asyncio.create_task(publish_many([publisher], 600, 20, "slow"))
    for name in ("a", "b"):
        process = processes[name]
        await eventually(lambda process=process: process.stdout.count("begun") > 20, 30.0)
        process.kill()
        processes[name + "2"] = await start_worker(name + "2")
    sent = await publishing
    await all_settled(publisher, 90.0)
    await check(publisher, sent)
    assert await dead_letters(publisher) == []


@pytest.mark.slow  # waits until the registry and the server have noticed that the feeder is gone
async def test_a_feeder_that_is_killed_has_a_successor_within_seconds(make: Make, start_worker: Any) -> None:
    process = await start_worker("a", 60.0)
    publisher = await make(hosts=False)
    await publish(publisher, "x", *(Entry(number, "slow") for number in range(50)))
    await process.wait_for_line("begun 3", 20.0)
    worker = await make("b", ack_wait=60.0)
    assert not feeds(worker)
    process.kill()
    await eventually(lambda: feeds(worker), 20.0)
    await all_settled(worker, 40.0)
    assert await entries(worker, "x") == list(range(50))


async def test_a_worker_that_stops_leaves_the_feeding_to_another_at_once(make: Make) -> None:
    first, second = await make("a", ack_wait=60.0), await make("b", ack_wait=60.0)
    publisher = await make(hosts=False)
    await publish(publisher, "x", Entry(0))
    await all_settled(publisher)
    feeder, other = (first, second) if feeds(first) else (second, first)
    await publish(publisher, "x", *(Entry(number, "slow") for number in range(1, 30)))
    with_events = asyncio.create_task(feeder.stop())
    await all_settled(publisher, 30.0)
    await with_events
    assert await entries(publisher, "x") == list(range(30))
    assert feeds(other)


async def test_a_feeder_that_stops_ends_its_pin(make: Make) -> None:
    async with await make("a", start=False) as worker:
        await publish(worker, "x", Entry(1))
        await all_settled(worker)
    publisher = await make(hosts=False)
    info = await Consumers(publisher.running.connection, Domain(None), stream_of(publisher)).info("ledger")
    assert info is not None and not any(group.get("pinned_client_id") for group in info["priority_groups"])


async def test_retry_gives_the_delay(make: Make) -> None:
    worker = await make("a", retry_delay=60.0, retry_delay_max=60.0)
    await publish(worker, "x", Entry(1, "retry"), Entry(2))
    await all_settled(worker, 20.0)
    assert await entries(worker, "x") == [1, 2]


@pytest.mark.slow  # the server ends a pin some seconds after the last pull
async def test_a_feeder_that_was_frozen_breaks_no_order_when_it_goes_on(make: Make, start_worker: Any) -> None:
    process = await start_worker("frozen")
    publisher = await make(hosts=False)
    await publish_many([publisher], 20, 5)
    await all_settled(publisher)
    worker = await make("b", ack_wait=2.0)
    publishing = asyncio.create_task(publish_many([publisher], 400, 5, "slow"))
    await process.wait_for_line("begun", 20.0)
    process.pause()
    await eventually(lambda: feeds(worker), 30.0)
    process.resume()
    sent = await publishing
    await all_settled(publisher)
    for key, numbers in sent.items():
        assert await entries(publisher, key) == [*(n for n in numbers if n < 20), *numbers], key


@pytest.mark.slow  # the server ends a pin some seconds after the last pull
async def test_a_worker_that_starts_after_the_last_one_was_killed_handles_what_that_had(
    make: Make, start_worker: Any
) -> None:
    process = await start_worker("killed", 60.0)
    publisher = await make(hosts=False)
    await publish(publisher, "x", *(Entry(number, "slow") for number in range(20)))
    await process.wait_for_line("begun 3", 20.0)
    process.kill()
    worker = await make("b", ack_wait=60.0)
    await all_settled(worker, 40.0)
    assert await entries(worker, "x") == list(range(20))


@pytest.mark.slow  # workers die, and others must notice it
async def test_an_event_that_ends_its_owner_becomes_a_dead_letter(make: Make, start_worker: Any) -> None:
    publisher = await make(hosts=False)
    processes = [await start_worker(name, max_deliver=1) for name in "abc"]
    await publish(publisher, "x", Entry(1), Entry(2, "die"), Entry(3))
    await all_settled(publisher, 50.0)
    assert await entries(publisher, "x") == [1, 3]
    (letter,) = await dead_letters(publisher)
    assert letter.headers and letter.headers["Natsrt-Dead-Sequence"] == "2"
    assert any(process.running for process in processes)


@pytest.mark.slow  # workers die, and the server ends the pins of those that fed
async def test_an_event_that_ends_its_feeder_and_its_owner_at_once_becomes_a_dead_letter(
    make: Make, server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    """Its successors have all that it had. Only what is written down says which event is the cause."""
    await (await make("first")).stop()  # the type begins with the next event
    publisher = await make(hosts=False)
    await publish(publisher, "x", Entry(1), Entry(2, "die"), Entry(3))

    def start(number: int) -> Process:
        arguments = (server.url, namespace, f"w{number}", "1.0", "2")
        return processes.python(PROGRAM, *arguments, name=f"w{number}")

    for number in range(3):  # the first death is not counted: that would be a write for each event
        await start(number).wait(30.0)
    survivor = start(3)

    async def is_buried() -> bool:
        assert survivor.running, "it died of the event, too"
        return len(await dead_letters(publisher)) == 1

    await eventually(is_buried, 30.0)
    await all_settled(publisher)
    [letter] = await dead_letters(publisher)
    found = [(letter.headers or {})[f"Natsrt-Dead-{name}"] for name in ("Sequence", "Attempts")]
    assert found == ["2", "2"]
    assert "NotSettled" in (letter.headers or {})["Natsrt-Dead-Error"]
    assert await entries(publisher, "x") == [1, 3]


@pytest.mark.slow  # a worker is killed, and another must notice it
async def test_what_was_given_up_or_has_failed_is_known_to_the_next_feeder(make: Make, start_worker: Any) -> None:
    process = await start_worker("a", 1.0)
    publisher = await make(hosts=False)
    await publish(publisher, "slow", Entry(1, "later"))  # it is not acknowledged, so all others come again
    await publish(publisher, "x", Entry(2, "reject"), Entry(3, "fail"))
    await process.wait_for_line("later 1")
    await eventually(dead_letters_are(publisher, 2), 20.0)
    process.kill()
    successor = await start_worker("b", 1.0)
    await all_settled(publisher, 40.0)
    assert await entries(publisher, "slow") == [1]
    assert await entries(publisher, "x") == []
    assert successor.stdout.splitlines() == ["ready"]  # the first attempt of 1 counts, and 2 is not tried again
    assert len(await dead_letters(publisher)) == 2


@pytest.mark.slow  # workers are killed, and others must notice it
@pytest.mark.parametrize("looking", [False, True], ids=["", "killed while it looks"])
async def test_an_event_that_was_handled_uses_up_no_attempt_when_it_comes_again(
    make: Make, start_worker: Any, looking: bool
) -> None:
    """``looking``: each feeder is killed when it has written down that an attempt begins, and before it knows more."""
    process = await start_worker("a", 1.0, 1)
    publisher = await make(hosts=False)
    attempts = Attempts(publisher.running.connection, publisher.running.network.subjects)
    await publish(publisher, "h", Entry(1, "hang"))  # it is not acknowledged, so all others come again
    await publish(publisher, "x", Entry(2), Entry(3))
    for successor in ("b", "c"):
        await process.wait_for_line("hangs 1", 30.0)
        await eventually(entries_are(publisher, "x", [2, 3]), 20.0)
        process.kill()
        for sequence in (2, 3) if looking else ():
            stored = await publisher.running.connection.jetstream.get_msg(stream_of(publisher), sequence)
            assert await attempts.begin("ledger", stream_of(publisher), sequence, _stored_at(stored)) is not None
        process = await start_worker(successor, 1.0, 1)
    await all_settled(publisher, 40.0)
    found = [(letter.headers or {})["Natsrt-Dead-Sequence"] for letter in await dead_letters(publisher)]
    assert found == ["1"]
    assert await entries(publisher, "x") == [2, 3]


def entries_are(runtime: NatsAgentRuntime, key: str, numbers: list[int]) -> Callable[[], Any]:
    async def are() -> bool:
        return await entries(runtime, key) == numbers

    return are


async def test_a_stream_that_was_made_anew_does_not_inherit_what_was_counted(make: Make) -> None:
    worker = await make("a", ack_wait=60.0)
    await publish(worker, "x", Entry(1, "reject"))
    await all_settled(worker)
    await worker.stop()
    publisher = await make(hosts=False)
    js = publisher.running.connection.jetstream
    config = (await js.stream_info(stream_of(publisher))).config
    await js.delete_stream(stream_of(publisher))
    await js.add_stream(config)
    again = await make("b", ack_wait=60.0)
    await publish(again, "x", Entry(2))
    feeder = await feeder_of(again)
    await all_settled(again)
    made = await js.get_msg(stream_of(publisher), 1)
    counted = await feeder._parts.attempts.begin("ledger", feeder.stream, 1, _stored_at(made))
    assert counted == Counted()
    assert await entries(again, "x") == [2]


def _stored_at(message: RawStreamMsg) -> float:
    assert message.time is not None
    return message.time.timestamp()


def dead_letters_are(runtime: NatsAgentRuntime, number: int) -> Callable[[], Any]:
    async def are() -> bool:
        return len(await dead_letters(runtime)) == number

    return are


async def test_a_quiet_feeder_pulls_again_before_the_server_ends_its_pin(make: Make) -> None:
    worker = await make("a")
    await publish(worker, "x", Entry(1))
    await all_settled(worker)
    await feeder_of(worker)
    pulls: list[tuple[float, dict[str, Any]]] = []
    loop = asyncio.get_running_loop()

    async def note(message: Msg) -> None:
        pulls.append((loop.time(), json.loads(message.data)))

    watcher = await make(hosts=False)
    client = watcher.running.connection.client
    await client.subscribe(f"$JS.API.CONSUMER.MSG.NEXT.{stream_of(worker)}.ledger", cb=note)
    await eventually(lambda: len(pulls) >= 3, 2 * PINNED_FOR)
    assert all(pull["group"] == "feeder" and pull["id"] for _, pull in pulls)
    assert all(later - earlier < PINNED_FOR / 2 for (earlier, _), (later, _) in pairwise(pulls))
    assert feeds(worker)


@pytest.mark.parametrize("old", [0, 300])
async def test_a_feeder_that_begins_with_new_events_does_not_read_those_before(make: Make, old: int) -> None:
    publisher = await make(hosts=False)
    await publish(publisher, "x", *(Entry(number) for number in range(old)))
    worker = await make("a")
    await publish(publisher, "x", Entry(old))
    await all_settled(worker)
    feeder = await feeder_of(worker)
    assert await entries(worker, "x") == [old]
    assert feeder.pull._plan.received <= 2  # it came with the pin, and once more after the feeder had started over


@pytest.mark.parametrize("kill", [False, True])
async def test_a_restart_of_the_server_breaks_no_order(own_server: EmbeddedServer, make: Make, kill: bool) -> None:
    workers = [await make(name, url=own_server.url, ack_wait=2.0) for name in "ab"]
    publisher = await make(url=own_server.url, hosts=False)
    publishing = asyncio.create_task(publish_many([publisher], 1000, 20))
    for _ in range(2):
        await asyncio.sleep(0.2)
        await own_server.restart(kill=kill)
    sent = await publishing
    await all_settled(workers[0])
    await check(publisher, sent)


async def test_events_are_applied_once_while_agents_are_released(make: Make) -> None:
    workers = [await make(name) for name in "ab"]
    publishing = asyncio.create_task(publish_many([workers[0]], 600, 10))
    while not publishing.done():
        for worker in workers:
            await worker.running.incoming.ownership.release_some("ledger", 3)
            await asyncio.sleep(0.02)
    await all_settled(workers[0])
    await check(workers[0], await publishing)


async def feeder_of(*workers: NatsAgentRuntime) -> Feeder:
    """The feeder of one of these workers, when the server has pinned it."""

    def found() -> list[Feeder]:
        pullers = [puller for worker in workers for puller in worker.running.incoming.durable.settlements]
        return [puller for puller in pullers if isinstance(puller, Feeder) and puller.feeds]

    return (await eventually(found, 10.0))[0]  # type: ignore[no-any-return]


async def test_a_delivery_that_is_lost_is_made_up_for_before_later_events_are_handled(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await make("a", ack_wait=60.0)
    await publish(worker, "x", Entry(0))
    feeder = await feeder_of(worker)
    take_in, taken = feeder.pull._on_message, 0

    def lose_one(delivery: Delivery) -> None:
        nonlocal taken
        taken += 1
        if taken != 3:
            take_in(delivery)

    monkeypatch.setattr(feeder.pull, "_on_message", lose_one)
    await publish(worker, "x", *(Entry(number) for number in range(1, 20)))
    await all_settled(worker, 20.0)
    assert taken > 20
    assert await entries(worker, "x") == list(range(20))


async def test_a_feeder_starts_over_when_somebody_resets_the_consumer(make: Make) -> None:
    worker = await make("a", ack_wait=60.0)
    publisher = await make(hosts=False)
    publishing = asyncio.create_task(publish_many([publisher], 400, 8))
    feeder = await feeder_of(worker)
    for _ in range(3):
        await Consumers(publisher.running.connection, Domain(None), feeder.stream).reset("ledger", 1)
        await asyncio.sleep(0.1)
    sent = await publishing
    await all_settled(worker, 20.0)
    await check(publisher, sent)


async def test_events_that_find_no_room_in_memory_are_read_again_in_their_turn(make: Make) -> None:
    worker = await make("a", max_pending_bytes=100_000)
    await publish(worker, "x", Entry(1, "fail"), *(Entry(number, "-" * 5000) for number in range(2, 40)))
    await all_settled(worker)
    assert await entries(worker, "x") == list(range(2, 40))


async def test_an_event_that_is_stored_once_more_is_handled_in_its_new_place(make: Make) -> None:
    worker = await make("a")
    await publish(worker, "x", Entry(1))
    subjects = worker.running.network.subjects
    headers = {"Natsrt-Subject": subjects.topic("work.entries", "x"), "Natsrt-Type": "Entry"}
    js = worker.running.connection.jetstream
    await js.publish(f"{subjects.again(stream_of(worker))}.ledger", b'{"number": 2}', headers=headers)
    await all_settled(worker)
    assert await entries(worker, "x") == [1, 2]


async def test_the_server_is_told_of_events_that_are_held(make: Make) -> None:
    worker = await make("a", ack_wait=0.5)
    await publish(worker, "x", Entry(1, "long"), Entry(2))
    await all_settled(worker)
    info = await worker.running.connection.jetstream.consumer_info(stream_of(worker), "ledger")
    assert info.delivered is not None and info.delivered.consumer_seq == 2
    assert await entries(worker, "x") == [1, 2]


async def test_a_runtime_is_idle_when_its_keyed_agents_have_handled_all_events(make: Make) -> None:
    worker = await make("a")
    await publish(worker, "x", *(Entry(number) for number in range(10)))
    await worker.stop_when_idle()
    again = await make("a")
    assert await entries(again, "x") == list(range(10))
