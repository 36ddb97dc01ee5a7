"""The promises of durable topics while workers and servers are killed, frozen and far away: the scenarios of
`benchmarks.chaos`, smaller, and what is not worth a scenario."""

from __future__ import annotations

import asyncio
import time

import pytest
from autogen_core import TopicId, TypeSubscription

import natsrt
from benchmarks.chaos import many_types
from benchmarks.chaos.durable import KEYED, PLAIN
from benchmarks.chaos.proxy import Proxy
from benchmarks.chaos.scenario import broken
from benchmarks.chaos.scenarios import confirmation, durable_events, long_handlers, past_and_present, poison, tasks
from benchmarks.chaos.scenarios import many_types as many_types_scenario
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer

# -- events while everything is killed -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("agent_type", "every"), [(PLAIN, 1.0), (KEYED, 4.0)])  # a keyed type needs a new feeder first
async def test_every_confirmed_event_is_handled_while_workers_and_servers_are_killed(
    agent_type: str, every: float
) -> None:
    figures = await durable_events.measure(agent_type, events=600, sources=25, every=every, pause=0.1, work=0.2)
    assert broken(figures) == []


# -- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("agent_type", "every"), [(PLAIN, 0.5), (KEYED, 4.0)])
async def test_another_process_gets_every_result_although_submitter_workers_and_server_are_killed(
    agent_type: str, every: float
) -> None:
    assert broken(await tasks.measure(agent_type, count=300, every=every)) == []


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("agent_type", [PLAIN, KEYED])
async def test_tasks_that_are_due_at_once_are_all_handled(agent_type: str) -> None:
    count = 10_000 if agent_type == PLAIN else 2_000
    assert broken(await tasks.due_at_once(agent_type, count)) == []


# -- poison ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kill", [False, True], ids=["", "killed before it terminates"])
@pytest.mark.parametrize("agent_type", [PLAIN, KEYED])
async def test_poison_is_one_dead_letter_and_handled_when_it_is_redriven(agent_type: str, kill: bool) -> None:
    assert broken(await poison.measure(agent_type, kill=kill)) == []


# -- handlers that take long -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize("freeze", [False, True], ids=["alive", "frozen"])
@pytest.mark.parametrize("agent_type", [PLAIN, KEYED])
async def test_a_long_handler_has_its_event_alone_unless_its_worker_is_frozen(agent_type: str, freeze: bool) -> None:
    assert broken(await long_handlers.measure(agent_type, freeze=freeze)) == []


# -- the past and the present ----------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_type_and_tail_go_on_from_the_past_without_gap_or_double() -> None:
    assert broken(await past_and_present.measure(stored=1_000, live=1_000)) == []


# -- what a publisher is told ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("failure", "under_way"), [("server down", 300), ("server hung", 1_100), ("leader killed", 300)]
)
async def test_a_publisher_is_told_in_time_or_its_event_is_stored_once(failure: str, under_way: int) -> None:
    assert broken(await confirmation.measure(failure, under_way=under_way, timeout=2.5)) == []


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_single_publisher_is_told_that_the_leader_is_gone() -> None:
    assert broken(await confirmation.measure("leader killed", under_way=1, timeout=2.5)) == []


async def test_many_events_at_once_may_take_longer_than_publish_timeout(
    server: EmbeddedServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("natsrt.sending.durable.WINDOW", 32)
    async with Proxy(server.url) as far:
        settings = {"namespace": namespace, "durable": ["work."], "publish_timeout": 5.0}
        async with NatsAgentRuntime(far.url, **settings) as runtime:
            far.delay = 0.5
            began = time.monotonic()
            topic = TopicId("work.jobs", "default")
            await asyncio.gather(*(runtime.publish_message(number, topic) for number in range(7 * 32)))
            assert time.monotonic() - began > 5.0, "the last ones waited for longer than publish_timeout"


# -- many agent types ------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_many_types_get_their_events_over_two_workers_and_keep_their_consumers() -> None:
    assert broken(await many_types_scenario.measure(types=60)) == []


async def test_consumers_of_many_types_are_made_at_the_same_time(server: EmbeddedServer, namespace: str) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace, durable=[many_types.TOPICS]), Proxy(server.url) as far:
        far.delay = 0.05
        worker = NatsAgentRuntime(far.url, namespace=namespace)
        for number in range(100):
            await natsrt.register(worker, many_types.Taker, f"taker{number}", many_types.Taker)
            await worker.add_subscription(TypeSubscription(f"{many_types.TOPICS}{number}", f"taker{number}"))
        began = time.monotonic()
        async with worker:
            took = time.monotonic() - began
    assert took < 100 * 2 * far.delay, "each type's consumer takes a round trip at least"
