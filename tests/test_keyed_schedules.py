"""Keyed agents in random schedules without sockets: see `tests.support.keyed_schedules`."""

from __future__ import annotations

import asyncio
import random

import pytest
from nats.js.errors import NotFoundError

from natsrt.jetstream.acks import Acks, WrongRevision
from tests.support.jetstream import JetStream
from tests.support.keyed_schedules import run
from tests.support.network import Link, Server
from tests.support.virtual_time import Processes, result_of


@pytest.mark.parametrize("seed", range(8))
def test_in_every_schedule_each_increment_counts_once(seed: int) -> None:
    run(seed)


def test_where_the_bucket_does_not_check_revisions_the_schedules_find_increments_that_are_lost() -> None:
    with pytest.raises(AssertionError, match=r"is lost|not fenced|counted twice|are counted as"):
        for seed in range(50):
            run(seed, without=["fence"])


def test_where_neither_workers_nor_records_know_of_lost_copies_the_schedules_find_increments_that_count_twice() -> None:
    with pytest.raises(AssertionError, match="counted twice"):
        for seed in range(100):
            run(seed, stalls=0.8, without=["promises", "copies"])


@pytest.mark.parametrize("seed", range(4))
def test_where_workers_promise_nothing_records_know_the_lost_copies(seed: int) -> None:
    run(seed, stalls=0.8, without=["promises"])


def test_where_records_have_no_sequences_the_schedules_find_events_that_count_twice() -> None:
    with pytest.raises(AssertionError, match="counted twice|are counted as"):
        for seed in range(20):
            run(seed, without=["sequences"])


# -- what the schedules run on -----------------------------------------------------------------------------------------


def test_a_frozen_process_does_nothing_and_catches_up_after_its_thaw() -> None:
    processes = Processes()
    process = processes.start()
    done: list[float] = []

    async def work() -> str:
        await asyncio.sleep(1.0)
        done.append(processes.now)
        return "done"

    async def main() -> None:
        begun = processes.now
        working = process.begin(work())
        await asyncio.sleep(0.5)
        process.freeze()
        await asyncio.sleep(4.5)
        assert not done
        process.thaw()
        assert await result_of(working) == "done"
        assert done == [begun + 5.0]

    processes.run(main())


def test_a_write_whose_acknowledgement_is_lost_is_stored_and_one_that_follows_another_revision_is_not() -> None:
    async def main() -> None:
        server = Server(random.Random(0))
        jetstream, link = JetStream(server, random.Random(0)), Link(server)
        stream = jetstream.add_bucket("b", 100)
        acks = Acks(link, "_INBOX")  # type: ignore[arg-type]
        await acks.subscribe()
        first = {"Nats-Expected-Last-Subject-Sequence": "0"}
        jetstream.answer_loss = 1.0
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(acks.publish("$KV.b.k", b"1", first), 5.0)
        jetstream.answer_loss = 0.0
        with pytest.raises(WrongRevision):
            await acks.publish("$KV.b.k", b"2", first)
        assert await acks.publish("$KV.b.k", b"3", {"Nats-Expected-Last-Subject-Sequence": "100"}) == 101
        found = await link.jetstream.get_last_msg(stream.name, "$KV.b.k")
        assert (found.seq, found.data) == (101, b"3")
        with pytest.raises(NotFoundError):
            await link.jetstream.get_last_msg(stream.name, "$KV.b.other")

    Processes().run(main())


def test_what_a_stalled_link_holds_arrives_after_the_thaw_also_if_the_link_was_replaced() -> None:
    async def main() -> None:
        server = Server(random.Random(0))
        sender, receiver = Link(server), Link(server)
        heard: list[bytes] = []
        await receiver.subscribe("a.*", lambda message: heard.append(message.data))
        thaw = sender.stall()
        await sender.publish("a.b", b"first")
        sender.replace()
        await sender.publish("a.b", b"second")
        await asyncio.sleep(1.0)
        assert heard == [b"second"]
        thaw()
        await asyncio.sleep(1.0)
        assert heard == [b"second", b"first"]
        assert sender.reconnects == 1

    Processes().run(main())
