"""JetStream has limits: what reaches one fails at once as what it is, and what frees room works at all times."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import nats.js.errors
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
from nats.js import JetStreamContext

import natsrt
from natsrt import NatsAgentRuntime, keyed
from natsrt.embedded import EmbeddedServer
from natsrt.jetstream.agent_records import AgentRecords, Record, RecordChanged
from natsrt.jetstream.limits import limit_reached
from natsrt.jetstream.record_writes import Refused
from tests.support import cli
from tests.support.processes import eventually

AT_ONCE = 5.0
"""Seconds within which a limit is reported: no request is repeated because of it."""
MUCH = 20_000
"""Bytes of a state in the record."""
IN_PARTS = 1_500_000
"""Bytes of a state in three parts."""
LIMITS = {
    "account": "accounts { A { jetstream: { max_file: %d, max_mem: 1MB }, users: [{ user: a, password: a }] } }\n"
    "no_auth_user: a\njetstream { store_dir: '%s' }\n",
    "server": "jetstream { max_file_store: %d, store_dir: '%s' }\n",
}
"""Configurations of servers with a limit in bytes."""
NAMES = {"account": "max_file", "server": "max_file_store", "bucket": "max_bytes"}


@dataclass
class Grow:
    size: int


@dataclass
class Ask:
    pass


@keyed
class Growing(RoutedAgent):
    """Its state is as large as it is told."""

    def __init__(self) -> None:
        super().__init__("grows")
        self.state = ""

    @message_handler
    async def on_grow(self, message: Grow, ctx: MessageContext) -> int:
        self.state = message.size * "x"
        return len(self.state)

    @message_handler
    async def on_ask(self, message: Ask, ctx: MessageContext) -> int:
        return len(self.state)

    async def save_state(self) -> Mapping[str, Any]:
        return {"state": self.state}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.state = state["state"]


class Storage:
    """A server of a limited size, and the runtimes of one namespace."""

    def __init__(self, path: Path, kind: str, namespace: str, stack: AsyncExitStack) -> None:
        self._path, self._kind, self.namespace, self._stack = path, kind, namespace, stack
        self.server: EmbeddedServer
        self.js: JetStreamContext

    async def start(self, size: int) -> None:
        self._configure(size)
        self.server = await self._stack.enter_async_context(
            EmbeddedServer(config=self._path / "nats.conf", port=-1, http_port=-1)
        )
        client = await nats.connect(self.server.url, max_reconnect_attempts=-1, reconnect_time_wait=0.1)
        self._stack.push_async_callback(client.close)
        self.js = client.jetstream()

    def _configure(self, size: int) -> None:
        text = LIMITS.get(self._kind, LIMITS["account"])
        (self._path / "nats.conf").write_text(text % (size, self._path / "js"))

    async def resize(self, size: int) -> None:
        """Restart the server with another limit."""
        self._configure(size)
        await self.server.restart()

    def monitored(self, page: str) -> dict[str, Any]:
        """A page of the server's HTTP monitoring."""
        with urllib.request.urlopen(f"{self.server.monitor_url}/{page}", timeout=5) as answer:
            shown: dict[str, Any] = json.load(answer)
        return shown

    @property
    def agents(self) -> str:
        return f"KV_{self.namespace}_natsrt_agents"

    @property
    def registry(self) -> str:
        return f"KV_{self.namespace}_natsrt_registry"

    async def limit_bucket(self, stream: str, **limits: int) -> None:
        config = (await self.js.stream_info(stream)).config
        await self.js.update_stream(config.evolve(**limits))

    def runtime(self, name: str, **settings: Any) -> NatsAgentRuntime:
        return NatsAgentRuntime(self.server.url, namespace=self.namespace, name=name, **settings)

    async def worker(self, name: str = "worker") -> NatsAgentRuntime:
        runtime = self.runtime(name)
        await natsrt.register(runtime, Growing, "growing", Growing)
        return await self._stack.enter_async_context(runtime)

    async def caller(self) -> NatsAgentRuntime:
        return await self._stack.enter_async_context(self.runtime("caller"))

    async def fill(self, caller: NatsAgentRuntime, size: int = MUCH) -> tuple[int, Exception]:
        """Store states until none fits. Returns how many there are, and the error of the next one."""
        for number in range(400):
            try:
                async with asyncio.timeout(AT_ONCE):
                    await caller.send_message(Grow(size), AgentId("growing", str(number)))
            except natsrt.NatsrtError as error:
                return number, error
        raise AssertionError("it is never full")

    async def fill_up(self) -> None:
        """Another program stores in a stream of its own until not even a byte fits."""
        await self.js.add_stream(name=f"{self.namespace}_other", subjects=[f"{self.namespace}.other"])
        for size in (100_000, 10_000, 1_000, 100, 10, 1, 0):
            for _ in range(400):
                try:
                    await self.js.publish(f"{self.namespace}.other", bytes(size))
                except nats.js.errors.APIError:
                    break


Starter = Callable[..., Any]


@pytest.fixture
async def start(tmp_path: Path, namespace: str) -> AsyncIterator[Starter]:
    async with AsyncExitStack() as stack:

        async def begin(kind: str, size: int) -> Storage:
            storage = Storage(tmp_path, kind, namespace, stack)
            await storage.start(size)
            return storage

        yield begin


async def limited(start: Starter, kind: str) -> tuple[Storage, NatsAgentRuntime]:
    """A storage of 2 MB with a worker, and a caller."""
    storage: Storage = await start(kind, 100_000_000 if kind == "bucket" else 2_000_000)
    await storage.worker()
    caller = await storage.caller()
    if kind == "bucket":
        await caller.send_message(Ask(), AgentId("growing", "first"))
        await storage.limit_bucket(storage.agents, max_bytes=1_000_000)
    return storage, caller


@pytest.mark.parametrize("kind", ["account", "server", "bucket"])
async def test_a_state_that_finds_no_room_fails_at_once_and_names_the_limit(start: Starter, kind: str) -> None:
    storage, caller = await limited(start, kind)
    stored, error = await storage.fill(caller)
    assert stored > 20
    assert isinstance(error, natsrt.StateNotSaved | natsrt.JetStreamFull)
    assert f"raise {'its ' if kind == 'bucket' else ''}{NAMES[kind]}" in str(error)
    for number in range(stored):  # what is stored stays
        assert await caller.send_message(Ask(), AgentId("growing", str(number))) == MUCH


@pytest.mark.parametrize("kind", ["account", "server"])
async def test_a_claim_that_finds_no_room_is_one_typed_failure_at_once(start: Starter, kind: str) -> None:
    storage, caller = await limited(start, kind)
    await storage.fill_up()
    begun = time.monotonic()
    calls = (caller.send_message(Ask(), AgentId("growing", f"new{n}")) for n in range(5))
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert time.monotonic() - begun < AT_ONCE
    for error in errors:
        assert isinstance(error, natsrt.JetStreamFull)
        assert error.limit == NAMES[kind]
        assert error.bucket == f"{storage.namespace}_natsrt_agents"


@pytest.mark.parametrize("kind", ["account", "server", "bucket"])
async def test_a_limit_that_is_raised_is_noticed_at_once(start: Starter, kind: str) -> None:
    storage, caller = await limited(start, kind)
    _, error = await storage.fill(caller)
    assert isinstance(error, natsrt.StateNotSaved | natsrt.JetStreamFull)
    if kind == "bucket":
        await storage.limit_bucket(storage.agents, max_bytes=2_000_000)
    else:
        await storage.resize(4_000_000)
        await eventually(lambda: caller.health().ready, 20.0)
    assert await caller.send_message(Grow(MUCH), AgentId("growing", "late")) == MUCH


async def test_parts_of_a_state_that_finds_no_room_are_deleted(start: Starter) -> None:
    storage, caller = await limited(start, "account")
    for _ in range(3):
        with pytest.raises(natsrt.StateNotSaved):
            await caller.send_message(Grow(3_000_000), AgentId("growing", "large"))
    assert (await storage.js.account_info()).storage < 600_000
    assert await caller.send_message(Grow(MUCH), AgentId("growing", "small")) == MUCH


@pytest.mark.parametrize("kind", ["account", "server"])
async def test_a_worker_registers_renews_and_leaves_where_nothing_fits(start: Starter, kind: str) -> None:
    storage, caller = await limited(start, kind)
    await storage.fill_up()
    begun = time.monotonic()
    async with storage.runtime("second", heartbeat_interval=0.2, heartbeat_ttl=1.0) as second:
        await natsrt.register(second, Growing, "other", Growing)
        worker_id = second.health().worker_id
        view = caller.running.registry.view
        await eventually(lambda: worker_id in view.workers_hosting("other"))
        await eventually(lambda: _beats_again(storage, str(worker_id)))
    assert time.monotonic() - begun < 2 * AT_ONCE
    await eventually(lambda: worker_id not in caller.running.registry.view.workers)


async def _beats_again(storage: Storage, worker_id: str) -> bool:
    """True when a heartbeat of the worker is newer than the first one."""
    subject = f"$KV.{storage.registry.removeprefix('KV_')}.hb.{worker_id}"
    seen = (await storage.js.get_last_msg(storage.registry, subject)).seq

    async def renewed() -> bool:
        return (await storage.js.get_last_msg(storage.registry, subject)).seq != seen

    return await eventually(renewed)


async def test_a_worker_leaves_even_if_the_reserve_is_used_up(start: Starter) -> None:
    storage, caller = await limited(start, "account")
    async with storage.runtime("second") as second:
        await natsrt.register(second, Growing, "other", Growing)
        worker_id = second.health().worker_id
        await storage.js.purge_stream(storage.registry, subject=f"$KV.{storage.registry.removeprefix('KV_')}.reserve.>")
        await storage.fill_up()
    await eventually(lambda: worker_id not in caller.running.registry.view.workers)


async def test_the_reserve_is_stored_again_when_there_is_room(start: Starter) -> None:
    storage, _ = await limited(start, "account")
    registry = storage.registry.removeprefix("KV_")

    async def parts() -> int:
        info = await storage.js.stream_info(storage.registry, subjects_filter=f"$KV.{registry}.reserve.*")
        return len(info.state.subjects or {})

    whole = await parts()
    assert whole == 8
    await storage.js.purge_stream(storage.registry, subject=f"$KV.{registry}.reserve.3")
    await storage.worker("second")
    assert await parts() == whole


async def test_the_reserve_takes_no_more_than_an_eighth(start: Starter) -> None:
    storage: Storage = await start("account", 400_000)
    await storage.worker()
    assert (await storage.js.account_info()).storage < 60_000


@pytest.mark.parametrize("size", [MUCH, IN_PARTS], ids=["in the record", "in parts"])
@pytest.mark.parametrize("kind", ["account", "server"])
async def test_a_stored_state_is_deleted_where_nothing_fits(start: Starter, kind: str, size: int) -> None:
    storage: Storage = await start(kind, 4_000_000)
    worker = await storage.worker()
    caller = await storage.caller()
    await caller.send_message(Grow(size), AgentId("growing", "a"))
    await worker.stop()
    await storage.fill_up()
    connect = ("--server", storage.server.url, "--namespace", storage.namespace)
    ended = await cli.natsrt("state", "rm", "growing/a", *connect)
    assert ended.code == 0
    assert ended.stderr.endswith(f"deleted the stored state of growing/a: {size + 12:,} bytes\n")
    assert (await cli.natsrt("state", "get", "growing/a", *connect)).code == 4
    info = await storage.js.stream_info(storage.agents, subjects_filter=">")
    subjects = list(info.state.subjects or {})
    tombstone = [f"$KV.{storage.agents.removeprefix('KV_')}.a.growing.a"]
    assert subjects == tombstone or (kind == "server" and subjects == [] and "no room for the mark" in ended.stderr)


async def records_of(runtime: NatsAgentRuntime, name: str) -> tuple[AgentRecords, Record]:
    records = runtime.running.records
    record = await records.read(AgentId("growing", name))
    assert record is not None
    return records, record


async def test_a_deletion_without_room_is_fenced(start: Starter) -> None:
    storage, caller = await limited(start, "account")
    agent = AgentId("growing", "a")
    await caller.send_message(Grow(1), agent)
    records, stale = await records_of(caller, "a")
    await caller.send_message(Grow(2), agent)
    _, newer = await records_of(caller, "a")
    await storage.fill_up()
    with pytest.raises(RecordChanged) as changed:
        await records.remove(stale)
    assert changed.value.present == newer
    with pytest.raises(Refused) as refused:  # as where the record changes after the tombstone found no room
        await records._purge(stale)
    assert refused.value.found is not None and refused.value.found.revision == newer.revision
    assert await caller.send_message(Ask(), agent) == 2
    await records.remove(newer)
    with pytest.raises(natsrt.NatsrtError):  # the owner does not store it again
        await caller.send_message(Grow(3), agent)
    assert await records.read(agent) is None


async def test_a_type_is_forgotten_where_nothing_fits(start: Starter) -> None:
    storage, caller = await limited(start, "account")
    async with storage.runtime("second") as second:
        await natsrt.register(second, Growing, "other", Growing)
        await caller.send_message(Ask(), AgentId("other", "a"))
    await storage.fill_up()
    ended = await cli.natsrt(
        "agents", "forget", "other", "--server", storage.server.url, "--namespace", storage.namespace
    )
    assert ended.code == 0, ended.stderr


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ("max_streams: 1", "max_streams"),
        ("max_bytes_required: true", "max_bytes_required"),
        ("max_file: 1MB, max_mem: 1MB, max_consumers: 1", "max_consumers"),
    ],
)
async def test_a_limit_at_the_start_is_named(tmp_path: Path, namespace: str, limits: str, named: str) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(
        f"accounts {{ A {{ jetstream: {{ {limits} }}, users: [{{ user: a, password: a }}] }} }}\n"
        f"no_auth_user: a\njetstream {{ store_dir: '{tmp_path / 'js'}' }}\n"
    )
    async with EmbeddedServer(config=config, port=-1) as server:
        client = await nats.connect(server.url)
        js = client.jetstream()
        if named == "max_streams":
            await js.add_stream(name="other", subjects=["other"])
        elif named == "max_consumers":
            bucket = f"{namespace}_natsrt_registry"
            async with NatsAgentRuntime(server.url, namespace=namespace):
                pass
            await js.add_consumer(f"KV_{bucket}", name="other", durable_name="other")
        await client.close()
        runtime = NatsAgentRuntime(server.url, namespace=namespace)
        with pytest.raises(natsrt.JetStreamFull, match=named) as raised:
            async with asyncio.timeout(3 * AT_ONCE):
                await runtime.start()
        assert raised.value.limit == named


async def test_callers_that_come_and_go_leave_nothing(start: Starter) -> None:
    storage: Storage = await start("account", 4_000_000)
    await storage.worker()

    async def come_and_go() -> None:
        async with storage.runtime("short") as runtime:
            assert await runtime.send_message(Ask(), AgentId("growing", "a")) == 0
            assert [record async for record in runtime.running.records.records()]

    async def left() -> dict[str, Any]:
        streams = [await storage.js.stream_info(stream) for stream in await _streams(storage)]
        return {
            "streams": {info.config.name: info.state.messages for info in streams},
            "consumers": sum(info.state.consumer_count for info in streams),
            "connections": storage.monitored("varz")["connections"],
            "subscriptions": storage.monitored("subsz")["num_subscriptions"],
        }

    await come_and_go()  # the first one makes the agent's record

    async def none_is_left() -> dict[str, Any]:
        now = await left()
        return now if now["consumers"] == 0 and now["connections"] == 2 else {}

    before = await eventually(none_is_left, timeout=2.0)  # the server itself deletes consumers after 30 s
    for _ in range(10):
        await asyncio.gather(*(come_and_go() for _ in range(20)))

    async def as_before() -> bool:
        return await left() == before

    await eventually(as_before, timeout=5.0)


async def _streams(storage: Storage) -> list[str]:
    return [str(info.config.name) for info in await storage.js.streams_info()]


async def test_a_list_that_is_not_read_to_its_end_leaves_no_consumer(start: Starter) -> None:
    storage, caller = await limited(start, "account")
    for name in "abc":
        await caller.send_message(Grow(1), AgentId("growing", name))
    listing = caller.running.records.records()
    await anext(listing)
    assert (await storage.js.stream_info(storage.agents)).state.consumer_count == 1
    await listing.aclose()

    async def none_left() -> bool:
        return (await storage.js.stream_info(storage.agents)).state.consumer_count == 0

    await eventually(none_left, timeout=2.0)


async def test_a_registry_that_is_gone_is_called_so(start: Starter) -> None:
    storage, caller = await limited(start, "account")
    await storage.js.delete_stream(storage.registry)
    with pytest.raises(natsrt.RegistryUnavailable, match="there is no bucket .*_natsrt_registry"):
        await caller.running.registry.known()


async def findings(storage: Storage, *more: str) -> list[tuple[str, str]]:
    """The level and the text of what the doctor says of limits."""
    where = ("--server", storage.server.url, "--namespace", storage.namespace)
    ended = await cli.natsrt("doctor", "--json", *where, *more)
    found = [(one["level"], one["text"]) for one in ended.json if one["check"] in ("limits", "health")]
    assert ended.code == (7 if any(level == "problem" for level, _ in found) else 0), ended.stdout
    return found


async def test_the_doctor_and_the_health_tell_of_a_limit_before_and_when_it_is_reached(start: Starter) -> None:
    storage, caller = await limited(start, "bucket")
    await storage.resize(2_000_000)
    await eventually(lambda: caller.health().ready, 20.0)
    bucket = storage.agents.removeprefix("KV_")
    assert await findings(storage) == []
    records = caller.running.records
    for number in range(42):  # 840,000 of 1,000,000 bytes in the bucket, and less than 80 % of 2,000,000 in the account
        await caller.send_message(Grow(MUCH), AgentId("growing", str(number)))
    ((level, text),) = await findings(storage)
    assert (level, f"nearly reached: {bucket}: " in text, "of max_bytes" in text) == ("warning", True, True), text
    await storage.fill(caller)
    ((level, text),) = await findings(storage)
    assert (level, f"the limit is reached: {bucket}: " in text) == ("problem", True), text
    await records.look()
    used, limit = caller.health().jetstream_usage[f"{bucket}: max_bytes"]
    assert limit == 1_000_000 and used > 950_000


async def test_the_health_of_a_worker_tells_of_the_account_and_of_a_refusal(start: Starter) -> None:
    storage: Storage = await start("account", 2_000_000)
    worker, caller = await storage.worker(), await storage.caller()
    assert worker.health().jetstream_full is None
    used, limit = worker.health().jetstream_usage["account: max_file"]
    assert limit == 2_000_000 and used < 400_000
    await storage.fill(caller)
    assert "raise max_file" in str(worker.health().jetstream_full)
    assert worker.health().ready  # it serves what needs no room


async def test_the_doctor_reads_the_limit_of_the_server_from_its_monitoring_pages(start: Starter) -> None:
    storage: Storage = await start("server", 2_000_000)
    await storage.worker()
    caller = await storage.caller()
    assert await findings(storage, "--monitor-url", str(storage.server.monitor_url)) == []
    await storage.fill(caller)
    found = await findings(storage, "--monitor-url", str(storage.server.monitor_url))
    assert [(level, "server: " in text and "max_file_store" in text) for level, text in found] == [("problem", True)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


async def test_a_full_disk_is_named(small_disk: Path, namespace: str) -> None:
    async with AsyncExitStack() as stack:
        storage = Storage(small_disk, "server", namespace, stack)
        await storage.start(1_000_000_000)
        await storage.worker()
        caller = await storage.caller()
        _, error = await storage.fill(caller, 60_000)
        assert "restart the server" in str(error)
        begun = time.monotonic()
        with pytest.raises(natsrt.JetStreamFull) as raised:
            await caller.send_message(Ask(), AgentId("growing", "new"))
        assert raised.value.limit == "disk"
        assert time.monotonic() - begun < 2 * AT_ONCE
        assert ("problem", True) in [(level, "no space left" in text) for level, text in await findings(storage)]
        subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
        await storage.server.restart()
        await eventually(lambda: caller.health().ready, 20.0)
        assert await caller.send_message(Grow(1), AgentId("growing", "new")) == 1


@pytest.mark.parametrize(
    ("code", "text", "limit"),
    [
        (10077, "maximum bytes exceeded", "max_bytes"),
        (10077, "maximum messages exceeded", "max_msgs"),
        (10051, "write /data/js/1.blk: no space left on device", "disk"),
        (10005, "no suitable peers for placement, insufficient storage", "max_file_store"),
        (10077, "something else", None),
        (10059, "stream not found", None),
        (None, None, None),
    ],
)
def test_limits_are_known_by_code_or_by_words(code: int | None, text: str | None, limit: str | None) -> None:
    found = limit_reached(nats.js.errors.APIError(code=500, description=text, err_code=code))
    assert (found.name if found is not None else None) == limit
