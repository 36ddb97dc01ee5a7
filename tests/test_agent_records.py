"""The records of keyed agents: one owner, no lost update, states of any size, and what happens to lost answers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from autogen_core import AgentId
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from benchmarks.chaos.proxy import Proxy
from natsrt.embedded import EmbeddedServer
from natsrt.errors import CannotDecode, CannotSerialize, NatsrtError, PermissionDenied
from natsrt.jetstream.agent_records import AgentRecords, Record, RecordChanged, RecordTaken
from natsrt.jetstream.record import parts_key, record_key
from natsrt.jetstream.state_parts import MAX_BODY_BYTES
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire.subjects import Subjects
from tests.support.processes import eventually

AGENT = AgentId("counter", "one")
STATE = b'{"count":1}'


class Store:
    """A worker's access to the records, and plain access to the bucket's stream."""

    def __init__(self, url: str, namespace: str, **settings: object) -> None:
        options = Options(servers=(url,), namespace=namespace, **settings)
        self.connection = Connection(options, client_name="test")
        self.records = AgentRecords(self.connection, Subjects(namespace), options)
        self.stream = f"KV_{namespace}_natsrt_agents"
        self.prefix = f"$KV.{namespace}_natsrt_agents."

    @property
    def js(self) -> JetStreamContext:
        return self.connection.jetstream

    async def keys(self) -> dict[str, int]:
        """Every key in the stream, tombstones included, with the number of its messages."""
        info = await self.js.stream_info(self.stream, subjects_filter=">")
        return {subject.removeprefix(self.prefix): count for subject, count in (info.state.subjects or {}).items()}

    async def parts(self) -> list[str]:
        return [key for key in await self.keys() if key.startswith("c.")]

    async def come_to_parts(self, count: int) -> None:
        """Parts that nothing refers to are deleted, but nobody waits for that."""

        async def right() -> bool:
            return len(await self.parts()) == count

        await eventually(right, 5, f"there are {count} parts")

    async def put(self, key: str, body: bytes, **headers: str) -> int:
        """Write past natsrt. Names of headers with ``_`` for ``-``."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return (await self.js.publish(self.prefix + key, body, headers=named or None)).seq


Opener = Callable[..., Awaitable[Store]]


@pytest.fixture
async def stores() -> AsyncIterator[Opener]:
    async with AsyncExitStack() as stack:

        async def open_store(url: str, namespace: str, **settings: object) -> Store:
            store = Store(url, namespace, **settings)
            await store.connection.open()
            stack.push_async_callback(store.connection.close)
            return store

        yield open_store


@pytest.fixture
async def store(server: EmbeddedServer, namespace: str, stores: Opener) -> Store:
    return await stores(server.url, namespace)


@pytest.fixture
async def other(server: EmbeddedServer, namespace: str, stores: Opener) -> Store:
    return await stores(server.url, namespace)


# ---------------------------------------------------------------------------------------------------------------------
# Ownership


async def test_a_claimed_agent_is_taken_and_a_released_one_without_state_is_free_again(
    store: Store, other: Store
) -> None:
    record = await store.records.claim(AGENT, "w-1")
    assert (record.agent, record.owner, record.size, record.has_state, record.saved_at) == (
        AGENT,
        "w-1",
        0,
        False,
        None,
    )
    with pytest.raises(RecordTaken) as taken:
        await other.records.claim(AGENT, "w-2")
    assert taken.value.record == record == await other.records.read(AGENT)
    assert await other.records.state(record) is None

    await store.records.release(record)
    assert await other.records.read(AGENT) is None
    again = await other.records.claim(AGENT, "w-2")
    assert again.revision > record.revision
    with pytest.raises(RecordChanged) as changed:
        await store.records.release(record)
    assert changed.value.present == again


async def test_a_released_agent_with_state_keeps_it_and_belongs_to_nobody_until_it_is_taken(
    store: Store, other: Store
) -> None:
    record = await store.records.save(await store.records.claim(AGENT, "w-1"), STATE)
    await store.records.release(record)
    with pytest.raises(RecordTaken) as taken:
        await other.records.claim(AGENT, "w-2")
    free = taken.value.record
    assert (free.owner, free.size, free.saved_at) == (None, len(STATE), record.saved_at)
    owned = await other.records.take(free, "w-2")
    assert (owned.owner, await other.records.state(owned)) == ("w-2", STATE)
    with pytest.raises(RecordChanged):
        await store.records.take(free, "w-1")


async def test_of_claims_for_100_agents_over_three_connections_one_wins_each(
    server: EmbeddedServer, namespace: str, stores: Opener
) -> None:
    workers = [await stores(server.url, namespace) for _ in range(3)]
    agents = [AgentId("counter", str(number)) for number in range(100)]

    async def claim(number: int, agent: AgentId) -> str:
        try:
            record = await workers[number].records.claim(agent, f"w-{number}")
        except RecordTaken as taken:
            return f"lost to {taken.record.owner}"
        assert record.owner is not None
        return record.owner

    outcomes = await asyncio.gather(*(claim(number, agent) for agent in agents for number in range(3)))
    for agent, *three in zip(agents, outcomes[::3], outcomes[1::3], outcomes[2::3], strict=True):
        winners = [outcome for outcome in three if not outcome.startswith("lost")]
        assert len(winners) == 1, agent
        assert [outcome for outcome in three if outcome.startswith("lost")] == [f"lost to {winners[0]}"] * 2


async def test_of_20_concurrent_updates_one_wins(server: EmbeddedServer, namespace: str, stores: Opener) -> None:
    workers = [await stores(server.url, namespace) for _ in range(4)]
    record = await workers[0].records.claim(AGENT, "w")
    states = [b'{"count":%d}' % number for number in range(20)]
    outcomes = await asyncio.gather(
        *(workers[number % 4].records.save(record, state) for number, state in enumerate(states)),
        return_exceptions=True,
    )
    [(winner, saved)] = [(n, outcome) for n, outcome in enumerate(outcomes) if isinstance(outcome, Record)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, RecordChanged)]
    assert len(refused) == 19
    assert {error.present for error in refused} == {saved}
    assert await workers[1].records.state(saved) == states[winner]


async def test_the_save_of_a_worker_that_lost_the_agent_is_refused(store: Store, other: Store) -> None:
    mine = await store.records.save(await store.records.claim(AGENT, "w-1"), STATE)
    taken = await other.records.take(mine, "w-2")
    for _ in range(2):
        with pytest.raises(RecordChanged) as changed:
            await store.records.save(mine, b'{"count":2}')
        assert changed.value.present == taken
    with pytest.raises(RecordChanged):
        await store.records.save(mine, secrets.token_bytes(2 * MAX_BODY_BYTES))
    await store.come_to_parts(0)  # it takes along what it had written
    with pytest.raises(RecordChanged):
        await store.records.release(mine)
    with pytest.raises(RecordChanged):
        await store.records.remove(mine)
    assert await other.records.state(await other.records.save(taken, b'{"count":3}')) == b'{"count":3}'


async def test_agents_are_claimed_in_place_of_every_kind_of_tombstone(store: Store, other: Store) -> None:
    await store.records.open()
    key = record_key(AGENT)
    await store.put(key, b"", KV_Operation="DEL")
    record = await store.records.claim(AGENT, "w-1")
    await store.put(key, b"", KV_Operation="PURGE", Nats_Rollup="sub")
    assert await store.records.read(AGENT) is None
    with pytest.raises(RecordChanged) as changed:
        await store.records.save(record, STATE)
    assert changed.value.present is None
    record = await other.records.claim(AGENT, "w-2")
    await other.js.purge_stream(other.stream, subject=other.prefix + key)
    with pytest.raises(RecordChanged):
        await other.records.save(record, STATE)
    assert (await store.records.claim(AGENT, "w-3")).owner == "w-3"


async def test_a_record_that_expired_and_a_tombstone_that_expired_are_no_records(store: Store) -> None:
    """The server puts a marker of its own in the place of what expired."""
    await store.records.open()
    expiring = [AgentId("counter", "expired"), AgentId("counter", "deleted")]
    for agent, headers in zip(expiring, ({}, {"KV_Operation": "DEL"}), strict=True):
        await store.put(record_key(agent), b"", Nats_TTL="1", **headers)

    async def last(agent: AgentId) -> dict[str, str]:
        try:
            message = await store.js.get_last_msg(store.stream, store.prefix + record_key(agent))
        except NotFoundError:
            return {"Nats-Marker-Reason": "none"}
        return message.headers or {}

    for agent in expiring:

        async def expired(agent: AgentId = agent) -> bool:
            return "Nats-Marker-Reason" in await last(agent)

        await eventually(expired, 10, "it expired")
        assert await store.records.read(agent) is None
        assert [record async for record in store.records.records() if record.agent == agent] == []
        assert (await store.records.claim(agent, "w")).owner == "w"


@pytest.mark.parametrize(
    "agent",
    [
        AgentId("counter", "with.dots and spaces * >"),
        AgentId("zähler", "schlüssel ✓ 𝄞"),
        AgentId("counter", ""),
        AgentId("counter", 'line\r\nbreak\x7f\u2028 "quoted" \\ ,'),
        AgentId("counter", "x" * 201),
        AgentId("counter", "ü✓𝄞" * 1000),
    ],
    ids=["dots and spaces", "unicode", "empty", "control characters", "over 200 bytes", "far over 200 bytes"],
)
async def test_any_agent_id_has_a_record(store: Store, agent: AgentId) -> None:
    record = await store.records.save(await store.records.claim(agent, "w"), STATE)
    for found in (await store.records.read(agent), *[record async for record in store.records.records(agent.type)]):
        assert found == record
        assert await store.records.state(record) == STATE
    big = await store.records.save(record, STATE * 10_000)
    assert await store.records.state(big) == STATE * 10_000
    await store.records.remove(big)
    assert [record async for record in store.records.records(agent.type)] == []


async def test_names_that_do_not_fit_into_a_record_are_refused(store: Store) -> None:
    with pytest.raises(CannotSerialize, match="may take 32,768 bytes"):
        await store.records.claim(AgentId("counter", "x" * 40_000), "w")


async def test_a_state_is_stored_however_long_the_ids_of_lost_copies_are(store: Store) -> None:
    record = await store.records.claim(AgentId("counter", "x" * 32_000), "w")
    ids = [f"{number}{'ü' * 500}" for number in range(40)]
    saved = await store.records.save(record, STATE, ids)
    assert saved.superseded and saved.superseded == tuple(ids[-len(saved.superseded) :])
    assert await store.records.read(record.agent) == saved
    short = [f"_INBOX.a.{number}" for number in range(40)]
    assert (await store.records.save(saved, STATE, short)).superseded == tuple(short[-32:])


# ---------------------------------------------------------------------------------------------------------------------
# State


@pytest.mark.parametrize(
    "size",
    [0, 1, MAX_BODY_BYTES, MAX_BODY_BYTES + 1, 512 * 1024, 512 * 1024 + 1, 5_000_000],
    ids=lambda size: f"{size:,} bytes",
)
async def test_states_of_any_size_survive_saving_taking_and_releasing(store: Store, other: Store, size: int) -> None:
    state = secrets.token_bytes(size)
    record = await store.records.save(await store.records.claim(AGENT, "w-1"), state)
    assert (record.has_state, record.size) == (True, size)
    assert bool(await store.parts()) == (size > MAX_BODY_BYTES)
    assert await store.records.state(record) == state
    await store.records.release(await store.records.take(record, "w-2"))
    present = await other.records.read(AGENT)
    assert present is not None and (present.owner, present.size, present.saved_at) == (None, size, record.saved_at)
    assert await other.records.state(present) == state
    [listed] = [record async for record in other.records.records()]
    assert listed == present and listed.body is None
    assert await other.records.state(listed) == state


async def test_a_state_that_is_read_by_an_old_record_is_never_another_one(store: Store, other: Store) -> None:
    for number, state in enumerate((STATE, secrets.token_bytes(100_000))):
        agent = AgentId("counter", str(number))
        saved = await store.records.save(await store.records.claim(agent, "w-1"), state)
        [listed] = [record async for record in other.records.records() if record.agent == agent]
        await store.records.save(saved, b'{"count":2}')
        await store.come_to_parts(0)
        with pytest.raises(RecordChanged):
            await other.records.state(listed)


async def test_a_state_fits_whatever_the_server_takes_at_most(tmp_path: Path, namespace: str, stores: Opener) -> None:
    config = tmp_path / "server.conf"
    config.write_text(
        f"listen: 127.0.0.1:-1\nserver_name: small\nmax_payload: 2048\njetstream {{ store_dir: {tmp_path / 'data'} }}\n"
    )
    async with EmbeddedServer(config=config) as server:
        store = await stores(server.url, namespace)
        for size in (10, 1000, 1500, 2048, 100_000):
            agent = AgentId("counter", "k" * (size % 190))
            state = secrets.token_bytes(size)
            record = await store.records.save(await store.records.claim(agent, "w"), state)
            assert await store.records.state(record) == state
        with pytest.raises(NatsrtError, match="the server accepts at most 2,048"):
            await store.records.claim(AgentId("counter", "x" * 3000), "w")
        assert store.connection.reconnects == 0
        await store.connection.close()


async def test_the_parts_of_replaced_and_removed_states_are_deleted(store: Store) -> None:
    def big() -> bytes:
        return secrets.token_bytes(600 * 1024)

    record = await store.records.save(await store.records.claim(AGENT, "w"), big())
    assert len(await store.parts()) == 2
    state = big()
    record = await store.records.save(record, state)
    await store.come_to_parts(2)
    assert await store.records.state(record) == state
    record = await store.records.save(record, STATE)
    await store.come_to_parts(0)
    record = await store.records.save(record, big())
    await store.records.remove(record)
    assert await store.parts() == []
    neighbour = await store.records.save(await store.records.claim(AgentId("counter", "two"), "w"), state)
    await store.records.save(await store.records.save(await store.records.claim(AGENT, "w"), big()), STATE)
    assert await store.records.state(neighbour) == state


async def test_an_operator_writes_a_state_while_nobody_owns_the_agent(store: Store, other: Store) -> None:
    fresh = await store.records.write_state(AGENT, STATE, expected=None)
    assert (fresh.owner, await store.records.state(fresh)) == (None, STATE)
    with pytest.raises(RecordTaken):
        await store.records.write_state(AGENT, STATE, expected=None)
    changed = await store.records.write_state(AGENT, b"{}", expected=fresh)
    with pytest.raises(RecordChanged):
        await store.records.write_state(AGENT, STATE, expected=fresh)
    emptied = await store.records.write_state(AGENT, None, expected=changed)
    assert (emptied.has_state, await store.records.state(emptied)) == (False, None)
    owned = await other.records.take(emptied, "w")
    replaced = await store.records.write_state(AGENT, STATE, expected=owned)
    with pytest.raises(RecordChanged) as lost:
        await other.records.save(owned, b"{}")
    assert lost.value.present == replaced


async def test_damaged_records_and_states_are_told_apart_from_missing_ones(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    await store.records.open()
    key = record_key(AGENT)
    await store.put(key, b"something else")
    for reading in (store.records.read(AGENT), store.records.claim(AGENT, "w")):
        with pytest.raises(CannotDecode, match=r"a\.counter\.one.*no header Natsrt-Record"):
            await reading
    await store.put(key, b"", Natsrt_Record='{"type":"counter"}')
    with pytest.raises(CannotDecode, match=r"a\.counter\.one"):
        await store.records.read(AGENT)
    await store.put(key, b"", Natsrt_Record='{"type":"counter","key":"two","owner":null,"write":"x"}')
    with pytest.raises(CannotDecode, match=r"belong under 'a\.counter\.two'"):
        await store.records.read(AGENT)
    assert [record async for record in store.records.records()] == []
    assert "belong under" in caplog.text

    async def stored_head(agent: AgentId) -> str:
        message = await store.js.get_last_msg(store.stream, store.prefix + record_key(agent))
        return (message.headers or {})["Natsrt-Record"]

    small = AgentId("counter", "small")
    await store.records.save(await store.records.claim(small, "w"), STATE)
    for damaged, problem in ((b'{"count":2}', "SHA-256"), (b"", "0 bytes are stored, and it has 11")):
        await store.put(record_key(small), damaged, Natsrt_Record=await stored_head(small))
        present = await store.records.read(small)
        assert present is not None
        with pytest.raises(CannotDecode, match=f"the state of counter/small: .*{problem}"):
            await store.records.state(present)

    large = AgentId("counter", "large")
    record = await store.records.save(await store.records.claim(large, "w"), secrets.token_bytes(600 * 1024))
    assert record.stored is not None
    part = f"{parts_key(large, record.stored.saved_by)}.1"
    await store.put(part, b"not what it was")
    with pytest.raises(CannotDecode, match="the state of counter/large: .*bytes are stored"):
        await store.records.state(record)
    await store.js.purge_stream(store.stream, subject=store.prefix + part)
    with pytest.raises(CannotDecode, match="the state of counter/large: of its 2 parts some are missing"):
        await store.records.state(record)


# ---------------------------------------------------------------------------------------------------------------------
# Lists


@pytest.mark.slow
async def test_10_000_records_are_listed_each_once_while_they_change(store: Store, other: Store) -> None:
    agents = [AgentId("counter", str(number)) for number in range(10_000)]
    for start in range(0, len(agents), 1000):
        await asyncio.gather(*(store.records.claim(agent, "w") for agent in agents[start : start + 1000]))
    await store.records.save(await store.records.claim(AgentId("large", "one"), "w"), secrets.token_bytes(1_000_000))
    hot = [await store.records.claim(AgentId("hot", str(number)), "w") for number in range(5)]
    changing = True

    async def change(record: Record) -> int:
        count = 0
        while changing:
            record = await other.records.save(record, STATE)
            count += 1
        return count

    changes = [asyncio.create_task(change(record)) for record in hot]
    for _ in range(2):
        listed = [record.agent.key async for record in store.records.records("counter")]
        assert sorted(listed, key=int) == [agent.key for agent in agents]
        everything = [record.agent async for record in store.records.records()]
        assert len(everything) == 10_006
        assert len({str(agent) for agent in everything}) == 10_006
    changing = False
    assert min(await asyncio.gather(*changes)) > 0
    assert [record async for record in store.records.records("unknown")] == []


# ---------------------------------------------------------------------------------------------------------------------
# Lost answers and lost servers


async def test_a_write_whose_answer_was_lost_is_recognised(
    server: EmbeddedServer, namespace: str, stores: Opener
) -> None:
    watcher = await stores(server.url, namespace)
    async with Proxy(server.url) as proxy:
        store = await stores(proxy.url, namespace)
        records = store.records
        agent, record = AGENT, await records.claim(AGENT, "w-1")
        steps: list[tuple[str, Callable[[], Awaitable[Record | None]]]] = [
            ("save", lambda: records.save(record, STATE)),
            ("take", lambda: records.take(record, "w-1")),
            ("save in parts", lambda: records.save(record, secrets.token_bytes(100_000))),
            ("release", lambda: records.release(record)),
            ("claim", lambda: records.claim(agent, "w-1")),
            ("delete", lambda: records.release(record)),
        ]
        for step, start in steps:
            if step == "claim":
                agent = AgentId("counter", "two")
            await records.open()  # after a reconnect it asks whether the bucket is still there
            before = await watcher.records.read(agent)
            proxy.mute()
            write = asyncio.ensure_future(start())

            async def changed(agent: AgentId = agent, before: Record | None = before) -> bool:
                return await watcher.records.read(agent) != before

            if step == "save in parts":
                await eventually(watcher.parts, 5, "a part arrived")  # the record waits for its answer
            else:
                await eventually(changed, 5, f"the {step} arrived")
            assert not write.done(), step
            proxy.cut()
            await proxy.restore()
            written, present = await write, await watcher.records.read(agent)
            if step == "release":
                assert present is not None and present.owner is None
                await watcher.records.remove(present)
            else:
                assert written == present, step
            if written is not None:
                record = written
        await store.come_to_parts(0)
        await store.connection.close()


async def test_a_write_that_was_given_up_and_arrived_nevertheless_is_followed_by_the_next(
    server: EmbeddedServer, namespace: str, stores: Opener
) -> None:
    watcher = await stores(server.url, namespace)
    async with Proxy(server.url) as proxy:
        store = await stores(proxy.url, namespace)
        record = await store.records.claim(AGENT, "w-1")

        async def give_up(state: bytes) -> Record:
            before = await watcher.records.read(AGENT)
            await store.records.open()
            proxy.mute()
            write = asyncio.create_task(store.records.save(record, state))

            async def arrived() -> Record | None:
                present = await watcher.records.read(AGENT)
                return present if present != before else None

            present: Record = await eventually(arrived, 5, "the write arrived")
            write.cancel()
            await asyncio.gather(write, return_exceptions=True)
            proxy.cut()
            await proxy.restore()
            await eventually(lambda: store.connection.connected)
            return present

        given_up = await give_up(b'{"count":1}')
        assert given_up.revision != record.revision
        assert store.records.follows(given_up, record) and not watcher.records.follows(given_up, record)
        record = await store.records.save(record, b'{"count":2}')
        assert await watcher.records.state(await watcher.records.read(AGENT) or record) == b'{"count":2}'

        # Whoever took the agent over in between keeps it.
        given_up = await give_up(b'{"count":3}')
        taken = await watcher.records.take(given_up, "w-2")
        assert not store.records.follows(taken, record)
        with pytest.raises(RecordChanged):
            await store.records.save(record, b'{"count":4}')
        assert await watcher.records.state(taken) == b'{"count":3}'

        # A claim that was given up is found again by the next claim of the same worker.
        agent = AgentId("counter", "two")
        await store.records.open()
        proxy.mute()
        claim = asyncio.create_task(store.records.claim(agent, "w-1"))
        await eventually(lambda: watcher.records.read(agent), 5, "the claim arrived")
        claim.cancel()
        await asyncio.gather(claim, return_exceptions=True)
        proxy.cut()
        await proxy.restore()
        record = await store.records.claim(agent, "w-1")
        assert record == await watcher.records.read(agent)
        await store.connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True], ids=["restarted", "killed"])
async def test_no_update_is_lost_or_refused_while_the_server_restarts(
    own_server: EmbeddedServer, namespace: str, stores: Opener, kill: bool
) -> None:
    store = await stores(own_server.url, namespace)
    records = list(await asyncio.gather(*(store.records.claim(AgentId("counter", str(n)), "w") for n in range(20))))
    counts = [0] * 20
    running = True

    async def count_up(number: int) -> None:
        while running:
            state = b'{"count":%d}' % (counts[number] + 1)
            records[number] = await store.records.save(records[number], state)
            counts[number] += 1

    counting = [asyncio.create_task(count_up(number)) for number in range(20)]
    for _ in range(3):
        before = list(counts)
        await eventually(lambda before=before: all(n > b + 5 for n, b in zip(counts, before, strict=True)), 20)
        await own_server.restart(kill=kill)
    before = list(counts)
    await eventually(lambda: all(n > b + 5 for n, b in zip(counts, before, strict=True)), 20)
    running = False
    await asyncio.gather(*counting)
    for number in range(20):
        present = await store.records.read(AgentId("counter", str(number)))
        assert present == records[number]
        assert await store.records.state(present) == b'{"count":%d}' % counts[number]
    await store.connection.close()


@pytest.mark.slow
async def test_a_write_ends_in_a_typed_error_where_the_server_stays_away(
    own_server: EmbeddedServer, namespace: str, stores: Opener
) -> None:
    store = await stores(own_server.url, namespace)
    record = await store.records.claim(AGENT, "w")
    await own_server.kill()
    async with asyncio.timeout(20):
        outcomes = await asyncio.gather(
            store.records.save(record, STATE),
            store.records.claim(AgentId("counter", "two"), "w"),
            return_exceptions=True,
        )
    assert all(isinstance(outcome, NatsrtError) for outcome in outcomes), outcomes
    await own_server.start()
    await eventually(lambda: store.connection.connected, 10)
    assert await store.records.state(await store.records.save(record, STATE)) == STATE
    await store.connection.close()


async def test_the_bucket_is_made_again_when_it_is_gone(store: Store) -> None:
    record = await store.records.claim(AGENT, "w")
    await store.js.delete_stream(store.stream)
    with pytest.raises(RecordChanged):
        await store.records.save(record, STATE)
    assert (await store.records.claim(AGENT, "w")).owner == "w"
    await store.js.delete_stream(store.stream)
    assert await store.records.read(AGENT) is None
    assert (await store.js.stream_info(store.stream)).config.first_seq > record.revision


PERMISSIONS = """
listen: 127.0.0.1:-1
server_name: guarded
jetstream {{ store_dir: {data} }}
authorization {{
  users: [
    {{ user: worker, password: pass, permissions: {{
      publish: [
        "$KV.natsrt_agents.>", "$JS.API.INFO"
        "$JS.API.STREAM.CREATE.KV_natsrt_agents", "$JS.API.STREAM.INFO.KV_natsrt_agents"
        "$JS.API.STREAM.PURGE.KV_natsrt_agents", "$JS.API.STREAM.MSG.GET.KV_natsrt_agents"
        "$JS.API.DIRECT.GET.KV_natsrt_agents.>", "$JS.API.CONSUMER.CREATE.KV_natsrt_agents.>"
        "$JS.API.CONSUMER.INFO.KV_natsrt_agents.>", "$JS.API.CONSUMER.MSG.NEXT.KV_natsrt_agents.>"
        "$JS.API.CONSUMER.DELETE.KV_natsrt_agents.>"
      ]
      subscribe: ["_INBOX.>"]
    }} }}
    {{ user: reader, password: pass, permissions: {{
      publish: ["$JS.API.STREAM.INFO.KV_natsrt_agents", "$JS.API.STREAM.MSG.GET.KV_natsrt_agents"
                "$KV.natsrt_agents.a.open.>"]
      subscribe: ["_INBOX.>"]
    }} }}
  ]
}}
"""


async def test_a_user_needs_these_permissions_and_is_told_of_those_that_lack(tmp_path: Path, stores: Opener) -> None:
    config = tmp_path / "server.conf"
    config.write_text(PERMISSIONS.format(data=tmp_path / "data"))
    async with EmbeddedServer(config=config) as server:
        worker = await stores(server.url, "", user="worker", password="pass")
        reader = await stores(server.url, "", user="reader", password="pass")
        record = await worker.records.save(await worker.records.claim(AGENT, "w"), secrets.token_bytes(100_000))
        record = await worker.records.take(await worker.records.save(record, STATE), "w-2")
        assert [record async for record in worker.records.records()] == [record]
        assert await reader.records.read(AGENT) == record

        opened = AgentId("open", "one")
        outcomes = await asyncio.gather(
            reader.records.save(record, STATE), reader.records.claim(opened, "r"), return_exceptions=True
        )
        assert isinstance(outcomes[0], PermissionDenied) and "a.counter.one" in str(outcomes[0])
        assert isinstance(outcomes[1], Record)  # what another write may not do is none of its business
        with pytest.raises(PermissionDenied, match=r"(?i)consumer\.create"):
            [record async for record in reader.records.records()]
        await worker.records.remove(record)
        for store in (worker, reader):
            await store.connection.close()
