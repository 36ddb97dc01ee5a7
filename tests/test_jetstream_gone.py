"""JetStream loses what it stored, while the agents live on: their workers store it again."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import orjson
import pytest
from autogen_core import AgentId, MessageContext, message_handler
from nats.js import JetStreamContext, api

import natsrt
from benchmarks.chaos.proxy import Proxy
from natsrt import KeyedOptions, NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.jetstream.agent_records import AgentRecords, Record, RecordChanged
from natsrt.keyed import ownership
from tests.support.processes import eventually
from tests.test_keyed import Add, Counting, Hold, Place, Total, agent

LARGE = "x" * 10_000
"""Too large to be kept in memory with the record."""
IN_PARTS = "x" * 1_000_000
"""Too large for one message."""


class Storage:
    """What an operator, or an accident, does to the records of one namespace."""

    def __init__(self, server: EmbeddedServer, data_dir: Path, namespace: str, js: JetStreamContext) -> None:
        self.server, self.data_dir, self.js = server, data_dir, js
        self.bucket = f"{namespace}_natsrt_agents"
        self.stream = f"KV_{self.bucket}"

    async def wipe(self) -> None:
        """The server is restarted, and its JetStream is empty."""
        await self.server.stop()
        shutil.rmtree(self.data_dir / "jetstream")
        await self.server.start()

    async def delete_bucket(self) -> None:
        await self.js.delete_stream(self.stream)

    async def purge_bucket(self) -> None:
        await self.js.purge_stream(self.stream)

    async def purge_records(self) -> None:
        bucket = await self.js.key_value(self.bucket)
        for key in await bucket.keys():
            await bucket.purge(key)

    async def delete_records(self) -> None:
        bucket = await self.js.key_value(self.bucket)
        for key in await bucket.keys():
            await bucket.delete(key)


LOSSES: dict[str, Callable[[Storage], Awaitable[None]]] = {
    "wiped": Storage.wipe,
    "bucket deleted": Storage.delete_bucket,
    "bucket purged": Storage.purge_bucket,
    "records purged": Storage.purge_records,
    "records deleted": Storage.delete_records,
}


@pytest.fixture
async def own(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    async with EmbeddedServer(data_dir=tmp_path / "server") as server:
        yield server


@pytest.fixture
async def storage(own: EmbeddedServer, tmp_path: Path, namespace: str) -> AsyncIterator[Storage]:
    client = await nats.connect(own.url, max_reconnect_attempts=-1, reconnect_time_wait=0.1)
    try:
        yield Storage(own, tmp_path / "server", namespace, client.jetstream())
    finally:
        await client.close()


@pytest.fixture
async def place(own: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(own.url, namespace, stack)


@dataclass
class Half:
    """Half of the change is made, then the gate is waited for."""


class Bulky(Counting):
    """Has a state of any size."""

    bulk = ""

    @message_handler
    async def on_half(self, message: Half, ctx: MessageContext) -> int:
        self.value += 1
        self.life.gate("half").set()
        await self.life.gate("other half").wait()
        self.value += 1
        return self.value

    async def save_state(self) -> Mapping[str, Any]:
        return {"value": self.value, "bulk": self.bulk}


async def bulky(place: Place, name: str, bulk: str, options: KeyedOptions | None = None) -> NatsAgentRuntime:
    def make() -> Bulky:
        made = Bulky(place.life, name)
        made.bulk = bulk
        return made

    runtime = await place.caller()
    await runtime.register_factory("counting", make, expected_class=Bulky, keyed=options)
    return runtime


async def record_of(runtime: NatsAgentRuntime, key: str) -> Record | None:
    return await runtime.running.records.read(agent(key))


def conflicts(*runtimes: NatsAgentRuntime) -> int:
    return sum(runtime.health().state_conflicts for runtime in runtimes)


@pytest.mark.parametrize("bulk", ["", LARGE, IN_PARTS], ids=["small", "large", "in parts"])
@pytest.mark.parametrize("loss", LOSSES)
async def test_a_living_agent_keeps_its_state_and_stores_it_again(
    place: Place, storage: Storage, caplog: pytest.LogCaptureFixture, loss: str, bulk: str
) -> None:
    worker = await bulky(place, "w1", bulk)
    caller = await place.caller()
    assert (await caller.send_message(Add(5), agent("k"))).value == 5
    before = await record_of(worker, "k")
    await LOSSES[loss](storage)
    assert (await caller.send_message(Add(1), agent("k"))).value == 6
    after = await record_of(worker, "k")
    assert before is not None and after is not None
    assert after.revision > before.revision
    await eventually(lambda: "are stored again" in caplog.text)
    assert "counting/k" in caplog.text and "taken over" not in caplog.text and "taken it over" not in caplog.text
    assert len(place.life.made) == 1
    assert conflicts(worker) == 0
    await worker.stop()
    await bulky(place, "w2", bulk)
    assert (await caller.send_message(Add(1), agent("k"))).value == 7


@pytest.mark.parametrize("loss", ["wiped", "bucket deleted"])
async def test_an_agent_whose_state_does_not_change_is_stored_again_too(
    place: Place, storage: Storage, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "_LOOK_EVERY", 0.2)
    worker = await place.worker("w1")
    for key in ("a", "b", "c"):
        await worker.send_message(Add(5), agent(key))
    await LOSSES[loss](storage)

    async def all_stored() -> bool:
        if not worker.running.connection.connected:
            return False
        records = [await record_of(worker, key) for key in ("a", "b", "c")]
        return all(record is not None and record.has_state for record in records)

    await eventually(all_stored, timeout=15)
    assert conflicts(worker) == 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bulk", ["", LARGE], ids=["small", "large"])
async def test_an_agent_that_is_busy_meanwhile_stores_what_its_handler_leaves(
    place: Place, storage: Storage, loss: str, bulk: str
) -> None:
    worker = await bulky(place, "w1", bulk)
    caller = await place.caller()
    await caller.send_message(Add(5), agent("k"))
    held = asyncio.ensure_future(caller.send_message(Hold("gate"), agent("k")))
    await place.life.gate("gate began").wait()
    await LOSSES[loss](storage)
    await eventually(lambda: worker.running.connection.connected, timeout=10)
    place.life.gate("gate").set()
    assert (await held).value == 5
    assert (await caller.send_message(Add(1), agent("k"))).value == 6
    record = await record_of(worker, "k")
    assert record is not None and record.has_state
    assert len(place.life.made) == 1 and conflicts(worker) == 0


@pytest.mark.parametrize("bulk", ["", LARGE], ids=["small", "large"])
async def test_half_of_a_change_is_never_stored(place: Place, storage: Storage, bulk: str) -> None:
    worker = await bulky(place, "w1", bulk)
    caller = await place.caller()
    await caller.send_message(Add(5), agent("k"))
    held = asyncio.ensure_future(caller.send_message(Half(), agent("k")))
    await place.life.gate("half").wait()
    await storage.wipe()
    record = await eventually(lambda: restored(worker, "k"), timeout=10)
    assert record.owner == worker.running.worker_id
    state = await worker.running.records.state(record)
    assert state is None or orjson.loads(state)["value"] == 5
    place.life.gate("other half").set()
    assert await held == 7
    record = await restored(worker, "k")
    assert record is not None
    state = await worker.running.records.state(record)
    assert state is not None and orjson.loads(state)["value"] == 7


async def restored(runtime: NatsAgentRuntime, key: str) -> Record | None:
    """The record, once the runtime is connected."""
    return await record_of(runtime, key) if runtime.running.connection.connected else None


@pytest.mark.parametrize("bulk", ["", LARGE], ids=["small", "large"])
@pytest.mark.parametrize("loss", ["bucket deleted", "bucket purged", "records purged"])
async def test_an_agent_that_is_released_takes_its_state_along(
    place: Place, storage: Storage, loss: str, bulk: str
) -> None:
    first = await bulky(place, "w1", bulk)
    caller = await place.caller()
    await caller.send_message(Add(5), agent("k"))
    await LOSSES[loss](storage)
    await first.stop()
    await bulky(place, "w2", bulk)
    assert (await caller.send_message(Add(1), agent("k"))).value == 6


@pytest.mark.parametrize("save", ["interval", "manual"])
@pytest.mark.parametrize("bulk", ["", LARGE], ids=["small", "large"])
async def test_what_is_stored_at_other_times_is_stored_again_too(
    place: Place, storage: Storage, save: Any, bulk: str
) -> None:
    worker = await bulky(place, "w1", bulk, KeyedOptions(save=save, save_interval=0.1))
    caller = await place.caller()
    await caller.send_message(Add(5), agent("k"))
    await worker.store_state(agent("k"))
    await storage.wipe()
    assert (await caller.send_message(Add(1), agent("k"))).value == 6
    record = await record_of(worker, "k")
    assert record is not None and record.has_state
    assert conflicts(worker) == 0


@pytest.mark.parametrize("loss", LOSSES)
async def test_of_two_workers_the_one_that_has_the_agent_keeps_it(place: Place, storage: Storage, loss: str) -> None:
    first = await place.worker("w1")
    caller = await place.caller()
    await caller.send_message(Add(5), agent("k"))
    second = await place.worker("w2")
    await LOSSES[loss](storage)
    await eventually(lambda: second.running.connection.connected and second.ready, timeout=15)
    hosted = second._catalog.find("counting")
    assert hosted is not None
    location = await second.running.ownership.locate(hosted, "k", ())  # as for a caller that does not know the owner
    assert location.worker_id == first.running.worker_id
    record = await record_of(second, "k")
    assert record is not None and record.owner == first.running.worker_id and record.has_state
    assert (await caller.send_message(Add(1), agent("k"))).value == 6
    assert [worker for _, worker in place.life.made] == ["w1"]
    record = await record_of(second, "k")
    assert record is not None and record.owner == first.running.worker_id
    assert conflicts(first, second) == 0


async def test_a_worker_that_reconnects_later_than_others_keeps_its_agents(
    place: Place, storage: Storage, own: EmbeddedServer, namespace: str
) -> None:
    async with Proxy(own.url) as proxy, AsyncExitStack() as stack:
        behind = Place(proxy.url, namespace, stack)
        behind.life = place.life
        first = await behind.worker("w1")
        await first.send_message(Add(5), agent("k"))
        second = await place.worker("w2")
        proxy.cut()
        await storage.wipe()
        await eventually(lambda: second.ready, timeout=15)
        hosted = second._catalog.find("counting")
        assert hosted is not None
        locating = asyncio.ensure_future(second.running.ownership.locate(hosted, "k", ()))
        await asyncio.wait({locating}, timeout=1.0)
        await proxy.restore()
        assert (await locating).worker_id == first.running.worker_id
        assert (await second.send_message(Add(1), agent("k"))).value == 6
        assert conflicts(first, second) == 0


async def test_a_worker_that_is_silent_while_its_record_is_gone_loses_the_agent_to_one_that_claims_it(
    place: Place, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    """Never two: what the first one has is not stored over what the second one stored."""
    first = await place.worker("w1")
    second = await place.worker("w2", lost_after=1.0)
    await first.send_message(Add(5), agent("k"))
    owner, other = (first, second) if place.life.made[0][1] == "w1" else (second, first)
    await storage.purge_records()
    claimed = await other.running.records.claim(agent("k"), other.running.worker_id)
    await other.running.records.save(claimed, b'{"value":100}')
    try:
        total = await owner.send_message(Add(1), agent("k"))
    except natsrt.StateConflict:  # if its event loop stalled a short time ago, it verifies the record first instead
        assert f"worker {other.running.worker_id} has taken it over" in caplog.text
        assert conflicts(owner) == 1
        total = await owner.send_message(Add(1), agent("k"))
    assert total.value == 101


async def test_a_record_that_an_operator_deleted_is_not_stored_again(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await place.worker("w1")
    await worker.send_message(Add(5), agent("k"))
    record = await record_of(worker, "k")
    assert record is not None
    await worker.running.records.remove(record)
    with pytest.raises(natsrt.StateConflict):
        await worker.send_message(Add(1), agent("k"))
    assert "its record was deleted" in caplog.text and "taken" not in caplog.text
    assert (await worker.send_message(Add(1), agent("k"))).value == 1


async def test_a_write_that_follows_a_revision_of_a_lost_bucket_is_refused(place: Place, storage: Storage) -> None:
    """A worker that still believes in the old bucket may not write over a record of the new one."""
    worker, other = await place.worker("w1"), await place.caller()
    records: AgentRecords = other.running.records
    old = await records.save(await records.claim(agent("k"), "frozen"), b'{"value":1}')
    await storage.delete_bucket()
    for number in range(3):  # an old epoch must not come again, however many records follow
        await worker.send_message(Add(number), agent(f"n{number}"))
    fresh = await worker.running.records.claim(agent("k"), worker.running.worker_id)
    assert fresh.revision > old.revision
    with pytest.raises(RecordChanged):
        await records.save(old, b'{"value":2}')


BY_HAND: dict[str, Callable[[api.StreamConfig], api.StreamConfig]] = {
    "made anew and is only at revision": lambda config: config.evolve(first_seq=None),
    "max_age is 5s and must be 0": lambda config: config.evolve(max_age=5, duplicate_window=1),
    "allow_msg_ttl is false": lambda config: config.evolve(allow_msg_ttl=None, subject_delete_marker_ttl=None),
    "discard is old and must be new": lambda config: config.evolve(discard=api.DiscardPolicy.OLD, max_msgs=1),
    "subjects is .*foo": lambda config: config.evolve(subjects=["foo.>"]),
}
"""What is said of a bucket that something else made, and how it is made."""


@pytest.mark.parametrize("said", BY_HAND)
async def test_a_bucket_that_something_else_made_wrongly_is_refused_and_the_agents_stay(
    place: Place, storage: Storage, caplog: pytest.LogCaptureFixture, said: str
) -> None:
    worker = await place.worker("w1")
    for key in ("k", "idle"):
        await worker.send_message(Add(5), agent(key))
    config = (await storage.js.stream_info(storage.stream)).config
    highest = (config.first_seq or 0) + 1_000_000_000  # as if it had been made later
    await storage.delete_bucket()
    await storage.js.add_stream(BY_HAND[said](config.evolve(first_seq=highest)))
    async with asyncio.timeout(5):  # not after requests that are repeated in vain
        with pytest.raises(natsrt.StateNotSaved, match=said):
            await worker.send_message(Add(1), agent("k"))
        with pytest.raises(natsrt.StateUnavailable, match=said):
            await worker.send_message(Add(1), agent("new"))
    health = worker.health()
    assert not health.ready and re.search(said, " ".join(health.reasons))
    assert health.state_conflicts == 0 and "was gone" not in caplog.text
    await storage.delete_bucket()
    await worker.send_message(Add(0), agent("k"))
    assert (await worker.send_message(Add(0), agent("idle"))).value == 5
    assert (await worker.send_message(Add(0), agent("k"))).value == 6
    assert worker.health().ready and len(place.life.made) == 2
    assert (found := await record_of(worker, "k")) is not None and found.body == b'{"value":6}'


async def test_a_bucket_that_is_gone_is_made_again_at_once_and_said_to_be_gone(
    place: Place, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await place.worker("w1")
    await worker.send_message(Add(5), agent("k"))
    await storage.delete_bucket()
    caplog.set_level(logging.DEBUG, "natsrt")
    async with asyncio.timeout(5):
        assert (await worker.send_message(Add(1), agent("new"))).value == 1
        assert (await worker.send_message(Add(1), agent("k"))).value == 6
    assert f"the bucket {storage.bucket} was gone" in caplog.text
    assert "does not answer" not in caplog.text


async def test_events_and_calls_at_once_lose_nothing_while_the_bucket_is_deleted_again_and_again(
    place: Place, storage: Storage
) -> None:
    workers = [await place.worker(name) for name in ("w1", "w2")]
    caller = await place.caller()
    keys = [f"k{number}" for number in range(5)]
    for key in keys:
        await caller.send_message(Add(1), agent(key))

    ended = asyncio.Event()

    async def count(key: str) -> tuple[int, int]:
        """How often it was counted, and the total."""
        calls, last = 1, Total(1, "")
        while not ended.is_set():
            last = await caller.send_message(Add(1), agent(key))
            calls += 1
        return calls, last.value

    counting = [asyncio.ensure_future(count(key)) for key in keys]
    for _ in range(5):
        await storage.delete_bucket()
        await eventually(lambda: exists(storage))
    ended.set()
    assert all(total == calls > 1 for calls, total in await asyncio.gather(*counting))
    assert len(place.life.made) == len(keys)
    assert conflicts(*workers) == 0


async def exists(storage: Storage) -> bool:
    try:
        await storage.js.stream_info(storage.stream)
    except nats.js.errors.NotFoundError:
        return False
    return True


async def test_an_agent_without_a_stored_state_stays_with_its_worker(place: Place, storage: Storage) -> None:
    worker = await place.worker("w1")
    await worker.send_message(Add(0), AgentId("counting", "k"))
    await storage.wipe()
    assert (await worker.send_message(Add(1), agent("k"))).value == 1
    assert len(place.life.made) == 1 and conflicts(worker) == 0
