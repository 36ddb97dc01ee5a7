"""Consumers of durable topics that are reset while several workers pull."""

from __future__ import annotations

import asyncio

from natsrt import NatsAgentRuntime
from natsrt.jetstream.consumers import Consumers
from natsrt.jetstream.domains import Domain
from tests.programs.durable_worker import Job
from tests.support.processes import eventually
from tests.test_durable_handling import JOBS, TOPIC, Make, Seen, all_settled, consumer, make

__all__ = ["make"]


async def publish(runtime: NatsAgentRuntime, numbers: range, what: str = "") -> None:
    await asyncio.gather(*(runtime.publish_message(Job(number, what), TOPIC) for number in numbers))


async def test_a_reset_while_several_workers_pull_loses_no_event(make: Make) -> None:
    seen, count = Seen(), 1_500
    workers = [await make(seen, JOBS, name=f"w{number}") for number in range(3)]
    publishing = asyncio.create_task(publish(workers[0], range(count)))
    stream = f"{workers[0].options.namespace}_natsrt_events"
    consumers = Consumers(workers[0].running.connection, Domain(None), stream)
    for part in (200, 500, 800):
        await eventually(lambda part=part: len(seen.numbers) > part, 30.0)
        await consumers.reset("jobs", 1)
    await publishing
    await eventually(lambda: seen.numbers.keys() == set(range(count)), 30.0)
    await all_settled(workers[0])
    info = await consumer(workers[0])
    assert info.ack_floor is not None and info.ack_floor.stream_seq == count
    assert sum(worker.health().dead_letters for worker in workers) == 0


async def test_an_acknowledgement_from_before_a_reset_does_not_settle_what_is_delivered_after_it(make: Make) -> None:
    seen = Seen()
    worker = await make(seen, JOBS)
    await publish(worker, range(3), "wait")
    await eventually(lambda: len(seen.begun) == 3)
    stream = f"{worker.options.namespace}_natsrt_events"
    await Consumers(worker.running.connection, Domain(None), stream).reset("jobs", 1)
    seen.free.set()
    await eventually(lambda: seen.numbers.keys() == {0, 1, 2})
    await publish(worker, range(3, 6))
    await all_settled(worker)
    assert seen.numbers.keys() == set(range(6))
