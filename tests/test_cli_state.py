"""``natsrt state``, ``natsrt agents where`` and ``rebalance``, and what other commands say of keyed agents."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import nats
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
from nats.aio.msg import Msg

from natsrt import KeyedOptions, NatsAgentRuntime, Options, StateConflict, keyed
from natsrt.embedded import EmbeddedServer
from natsrt.jetstream.agent_bucket import AGENTS_BUCKET
from natsrt.jetstream.agent_records import AgentRecords
from natsrt.jetstream.record import RECORD
from natsrt.transport.connection import Connection
from natsrt.wire.subjects import Subjects
from tests.support.cli import NATSRT, Ended, natsrt
from tests.support.clients import settled
from tests.support.processes import Process, Processes, eventually

Run = Callable[..., Awaitable[Ended]]

MANY = 10_000
LARGE = {"text": "x" * 5_000_000}


@keyed
class Counting(RoutedAgent):
    """Adds up."""

    def __init__(self) -> None:
        super().__init__("adds up")
        self.state: dict[str, Any] = {"value": 0}

    async def save_state(self) -> Mapping[str, Any]:
        return self.state

    async def load_state(self, state: Mapping[str, Any]) -> None:
        if "value" not in state:
            raise ValueError("a state needs a value")
        self.state = dict(state)

    @message_handler
    async def add(self, message: int, ctx: MessageContext) -> int:
        self.state = {**self.state, "value": self.state["value"] + message}
        return self.state["value"]


class Plain(RoutedAgent):
    """Not keyed."""

    def __init__(self) -> None:
        super().__init__("answers")

    @message_handler
    async def add(self, message: int, ctx: MessageContext) -> int:
        return message


@pytest.fixture
def run(server: EmbeddedServer, namespace: str) -> Run:
    """Run a command against the shared server, in this test's namespace."""

    async def run(*arguments: str, **how: Any) -> Ended:
        return await natsrt(*arguments, "--server", server.url, "--namespace", namespace, **how)

    return run


@pytest.fixture
async def records(server: EmbeddedServer, namespace: str) -> AsyncIterator[AgentRecords]:
    """What is stored, past all workers and commands."""
    options = Options(servers=(server.url,), namespace=namespace)
    connection = Connection(options, client_name="test")
    await connection.open()
    yield AgentRecords(connection, Subjects(namespace), options)
    await connection.close()


@pytest.fixture
async def worker(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    """A worker with the keyed agent type ``counter``."""
    async with NatsAgentRuntime(server.url, namespace=namespace, name="desk") as runtime:
        await runtime.register_factory("counter", Counting, expected_class=Counting)
        yield runtime


@pytest.fixture
def start_worker(server: EmbeddedServer, namespace: str, processes: Processes) -> Callable[..., Awaitable[Process]]:
    """Start a worker process with the type ``counter``, ready.

    One whose heartbeat is ``lasting`` stays in the registry for minutes when it is frozen.
    """

    async def start(*, lasting: bool = False) -> Process:
        target = ("tests.test_cli_state:Counting", "--type", "counter", "--app-dir", str(Path(__file__).parents[1]))
        where = ("--server", server.url, "--namespace", namespace)
        env = {"NATSRT_HEARTBEAT_TTL": "5m"} if lasting else {}
        process = processes.natsrt("worker", *target, "--name", "desk", *where, env=env)
        await process.wait_for_line("ready")
        return process

    return start


@pytest.fixture
async def caller(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    """A runtime that hosts nothing."""
    async with NatsAgentRuntime(server.url, namespace=namespace, name="caller") as runtime:
        yield runtime


def agent(key: str) -> AgentId:
    return AgentId("counter", key)


def encoded(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


async def store(records: AgentRecords, key: str, value: Any) -> None:
    await records.write_state(agent(key), encoded(value), expected=None)


async def state_in(records: AgentRecords, key: str) -> Any:
    """The stored state; None for none."""
    record = await records.read(agent(key))
    content = None if record is None else await records.state(record)
    return None if content is None else json.loads(content)


async def damage(records: AgentRecords, namespace: str, key: str) -> None:
    """Make a record unreadable."""
    connection = records._connection
    await connection.publish(f"$KV.{namespace}_natsrt_agents.a.counter.{key}", b"{}", headers={RECORD: "nonsense"})
    await connection.barrier()


# -- ls, get -----------------------------------------------------------------------------------------------------


async def test_ls_shows_what_is_stored_and_who_owns_it(
    run: Run, records: AgentRecords, worker: NatsAgentRuntime
) -> None:
    await store(records, "b", {"value": 2})
    await worker.send_message(1, agent("a"))
    await records.write_state(AgentId("other", "x"), b"{}", expected=None)
    rows = (await run("state", "ls", "counter", "--json")).json
    assert [(row["key"], row["size_bytes"], row["owner"]) for row in rows] == [
        ("a", len(b'{"value":1}'), worker.worker_id),
        ("b", len(b'{"value":2}'), None),
    ]
    table = (await run("state", "ls")).stdout
    assert re.search(r"counter/b +11 .* -$", table, re.M)
    assert "other/x" in table


async def test_ls_of_nothing_is_an_empty_list(run: Run) -> None:
    ended = await run("state", "ls", "--json")
    assert (ended.code, ended.json) == (0, [])
    assert "no state is stored" in (await run("state", "ls")).stderr


async def test_get_prints_exactly_what_is_stored(run: Run, records: AgentRecords) -> None:
    await store(records, "k.with /everything*", {"value": 1, "name": "ünï"})
    ended = await run("state", "get", "counter/k.with /everything*")
    assert ended.stdout == json.dumps({"value": 1, "name": "ünï"}, separators=(",", ":")) + "\n"


async def test_get_of_nothing_is_exit_code_4_and_makes_nothing(run: Run, worker: NatsAgentRuntime) -> None:
    ended = await run("state", "get", "counter/nobody")
    assert (ended.code, ended.stdout) == (4, "")
    assert ended.stderr == "natsrt: no state of counter/nobody is stored\n"
    assert await worker.running.records.read(agent("nobody")) is None


async def test_get_live_asks_the_owner(run: Run, server: EmbeddedServer, namespace: str, records: AgentRecords) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace, name="desk") as worker:
        options = KeyedOptions(save="manual")
        await worker.register_factory("counter", Counting, expected_class=Counting, keyed=options)
        await store(records, "k", {"value": 5})
        assert (await run("state", "get", "counter/k", "--live")).code == 4
        await worker.send_message(1, agent("k"))
        assert (await run("state", "get", "counter/k")).json == {"value": 5}
        assert (await run("state", "get", "counter/k", "--live")).json == {"value": 6}


@pytest.mark.parametrize("command", ["get", "rm"])
async def test_an_agent_needs_a_type_and_a_key(run: Run, command: str) -> None:
    for name in ("counter", "a b/c"):
        ended = await run("state", command, name)
        assert ended.code == 2
        assert "is not an agent" in ended.stderr


# -- set ---------------------------------------------------------------------------------------------------------


async def test_set_stores_the_state_of_an_agent_that_nobody_has(
    run: Run, records: AgentRecords, tmp_path: Path
) -> None:
    (tmp_path / "state.json").write_text('{ "value" : 7 }')
    ended = await run("state", "set", "counter/k", str(tmp_path / "state.json"))
    assert (ended.code, ended.stderr) == (0, "stored 11 bytes as the state of counter/k\n")
    assert await state_in(records, "k") == {"value": 7}
    assert (await run("state", "set", "counter/k", "-", stdin='{"value": 8}')).code == 0
    assert await state_in(records, "k") == {"value": 8}


async def test_a_live_agent_gets_its_state_through_its_owner(
    run: Run, records: AgentRecords, worker: NatsAgentRuntime
) -> None:
    await worker.send_message(1, agent("k"))
    ended = await run("state", "set", "counter/k", "-", stdin='{"value": 70}')
    assert f"through its owner {worker.worker_id}" in ended.stderr
    assert await state_in(records, "k") == {"value": 70}
    assert await worker.send_message(1, agent("k")) == 71


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1]", "JSON object"),
        ("{", "Expecting property name"),
        ('{"value": NaN}', "NaN"),
        ('{"value": 123456789012345678901234567890}', "64-bit"),
        ("[" * 100_000, "deeply"),
    ],
)
async def test_what_is_no_state_is_refused(run: Run, text: str, problem: str) -> None:
    ended = await run("state", "set", "counter/k", "-", stdin=text)
    assert ended.code == 2
    assert problem in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


async def test_a_missing_file_is_exit_code_2(run: Run) -> None:
    assert (await run("state", "set", "counter/k", "/no/such/file")).code == 2


async def test_what_the_agent_refuses_is_stored_by_force_only(
    run: Run, records: AgentRecords, worker: NatsAgentRuntime
) -> None:
    await worker.send_message(1, agent("k"))
    ended = await run("state", "set", "counter/k", "-", stdin='{"other": 1}')
    assert ended.code == 6
    assert "a state needs a value" in ended.stderr
    assert await state_in(records, "k") == {"value": 1}
    ended = await run("state", "set", "counter/k", "-", "--force", stdin='{"value": 9, "other": 1}')
    assert "through its owner" in ended.stderr, "force asks the owner first"
    ended = await run("state", "set", "counter/k", "-", "--force", stdin='{"other": 1}')
    assert ended.code == 0
    assert "the owner of counter/k did not store it: " in ended.stderr
    assert await state_in(records, "k") == {"other": 1}


@pytest.mark.slow
async def test_a_frozen_owner_is_passed_by_force_only_and_loses(
    run: Run, records: AgentRecords, caller: NatsAgentRuntime, start_worker: Callable[..., Awaitable[Process]]
) -> None:
    frozen = await start_worker(lasting=True)
    await caller.send_message(1, agent("k"))
    frozen.pause()
    ended = await run("state", "set", "counter/k", "-", stdin='{"value": 70}')
    assert ended.code == 5
    assert "does not answer" in ended.stderr
    assert await state_in(records, "k") == {"value": 1}
    assert (await run("state", "set", "counter/k", "-", "--force", stdin='{"value": 70}')).code == 0
    assert await state_in(records, "k") == {"value": 70}
    frozen.resume()

    async def continues() -> bool:
        try:
            return await caller.send_message(1, agent("k")) == 71
        except StateConflict:
            return False

    await eventually(continues, 30)


async def test_a_live_agent_gets_a_state_of_any_size_up_to_max_blob_size(
    run: Run, records: AgentRecords, worker: NatsAgentRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.send_message(1, agent("k"))
    (tmp_path / "state.json").write_text(json.dumps({"value": 70, "text": "x" * 9_000_000}))
    ended = await run("state", "set", "counter/k", str(tmp_path / "state.json"))
    assert ended.code == 0, ended.stderr
    assert (await state_in(records, "k") or {})["value"] == 70
    (tmp_path / "state.json").write_text(json.dumps({"value": 71, "text": "x" * 9_000_000}))
    monkeypatch.setenv("NATSRT_MAX_BLOB_SIZE", "8500000")
    ended = await run("state", "set", "counter/k", str(tmp_path / "state.json"))
    assert ended.code == 1
    assert "max_blob_size" in ended.stderr
    assert (await state_in(records, "k") or {})["value"] == 70


# -- rm ----------------------------------------------------------------------------------------------------------


async def test_rm_deletes_what_is_stored(run: Run, records: AgentRecords) -> None:
    await store(records, "k", {"value": 7})
    ended = await run("state", "rm", "counter/k")
    assert (ended.code, ended.stderr) == (0, "deleted the stored state of counter/k: 11 bytes\n")
    assert await records.read(agent("k")) is None
    assert (await run("state", "rm", "counter/k")).code == 4


async def test_rm_of_an_agent_that_a_worker_has_needs_force(
    run: Run, records: AgentRecords, worker: NatsAgentRuntime
) -> None:
    await worker.send_message(1, agent("k"))
    ended = await run("state", "rm", "counter/k")
    assert ended.code == 1
    assert f"worker {worker.worker_id} has counter/k" in ended.stderr
    assert (await run("state", "rm", "counter/k", "--force")).code == 0
    assert await records.read(agent("k")) is None
    with pytest.raises(StateConflict):
        await worker.send_message(1, agent("k"))
    assert await worker.send_message(1, agent("k")) == 1


@pytest.mark.slow
async def test_rm_of_what_a_dead_worker_owned_needs_no_force_once_the_registry_knows(
    run: Run, records: AgentRecords, caller: NatsAgentRuntime, start_worker: Callable[..., Awaitable[Process]]
) -> None:
    dead = await start_worker()
    await caller.send_message(1, agent("k"))
    dead.kill()
    await eventually(lambda: not caller.running.registry.view.workers, 30)
    assert "was owned by worker desk-" in (await run("agents", "where", "counter/k")).stdout
    assert (await run("state", "rm", "counter/k")).code == 0


# -- damaged records ---------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_damaged_record_is_told_left_out_and_replaced_or_removed_by_force(
    run: Run, records: AgentRecords, namespace: str
) -> None:
    await store(records, "good", {"value": 1})
    for key in ("bad", "worse"):
        await store(records, key, {"value": 1})
        await damage(records, namespace, key)
    for command in (("ls", "--json"), ("export",)):
        ended = await run("state", *command)
        assert ended.code == 7
        assert "good" in ended.stdout and "bad" not in ended.stdout
        assert "cannot decode the record 'a.counter.bad'" in ended.stderr
    for command in (("get", "counter/bad"), ("rm", "counter/bad"), ("set", "counter/bad", "-")):
        ended = await run("state", *command, stdin="{}")
        assert ended.code == 1
        assert "cannot decode the record 'a.counter.bad'" in ended.stderr
    assert (await run("state", "set", "counter/bad", "-", "--force", stdin='{"value": 2}')).code == 0
    assert await state_in(records, "bad") == {"value": 2}
    assert (await run("state", "rm", "counter/worse", "--force")).code == 0
    assert (await run("state", "ls")).code == 0


async def test_doctor_finds_damaged_records_and_owners_that_are_gone(
    run: Run, records: AgentRecords, worker: NatsAgentRuntime, namespace: str
) -> None:
    await worker.send_message(1, agent("k"))
    findings = await keyed_findings(run)
    assert findings == {"ok": "records: 1; states: 1 of 11 bytes in all"}
    await records.claim(agent("orphan"), "worker-that-is-gone")
    await damage(records, namespace, "bad")
    findings = await keyed_findings(run)
    assert "owned by workers that are gone: worker-that-is-gone (1)" in findings["warning"]
    assert "damaged: 1: cannot decode the record 'a.counter.bad'" in findings["problem"]


async def test_doctor_says_nothing_of_keyed_agents_where_there_never_were_any(run: Run, namespace: str) -> None:
    assert await keyed_findings(run) == {}


async def keyed_findings(run: Run) -> dict[str, str]:
    """What the doctor says of keyed agents, by level. A problem is its exit code 7."""
    ended = await run("doctor", "--json")
    assert ended.code == (7 if any(found["level"] == "problem" for found in ended.json) else 0)
    return {found["level"]: found["text"] for found in ended.json if found["check"] == "keyed agents"}


# -- export, import ----------------------------------------------------------------------------------------------


async def test_what_was_exported_can_be_imported_elsewhere(
    run: Run, records: AgentRecords, server: EmbeddedServer, namespace: str, tmp_path: Path
) -> None:
    states = {"a": {"value": 1}, "k.with /everything*": {"name": "ünï", "empty": {}}, "x" * 300: {"value": 1.5}}
    for key, value in states.items():
        await store(records, key, value)
    await records.write_state(AgentId("other", "a"), b"{}", expected=None)
    file = tmp_path / "states.jsonl"
    ended = await run("state", "export", str(file), "--type", "counter")
    assert ended.stdout == ""
    assert ended.stderr.startswith("exported states: 3 of ")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["key"]: row["state"] for row in rows} == states
    assert all(row["type"] == "counter" and row["saved_at"].endswith("+00:00") for row in rows)
    assert list(tmp_path.iterdir()) == [file]
    assert len((await run("state", "export")).stdout.splitlines()) == 4

    there = ("--server", server.url, "--namespace", f"{namespace}b")
    ended = await natsrt("state", "import", str(file), *there)
    assert (ended.code, ended.stdout) == (0, "stored 3, replaced 0, unchanged 0, conflicts 0\n")
    ended = await natsrt("state", "import", "-", *there, stdin=file.read_text())
    assert (ended.code, ended.stdout) == (0, "stored 0, replaced 0, unchanged 3, conflicts 0\n")
    again = await natsrt("state", "export", *there)
    assert [json.loads(line)["state"] for line in again.stdout.splitlines()] == [row["state"] for row in rows]


async def test_an_import_reports_conflicts_and_replaces_only_when_told(
    run: Run, records: AgentRecords, worker: NatsAgentRuntime, tmp_path: Path
) -> None:
    await store(records, "same", {"value": 1})
    await store(records, "other", {"value": 2})
    await worker.send_message(3, agent("live"))
    file = tmp_path / "states.jsonl"
    new = {"same": {"value": 1}, "other": {"value": 20}, "live": {"value": 30}, "new": {"value": 40}}
    lines = (json.dumps({"type": "counter", "key": key, "state": value}) for key, value in new.items())
    file.write_text("\n\n".join(lines))

    before = {key: await state_in(records, key) for key in new}
    for option, counts in (((), (1, 0, 1)), (("--replace",), (1, 2, 1))):
        tried = await run("state", "import", str(file), "--dry-run", "--json", *option)
        assert tried.json["dry_run"]
        assert (tried.json["stored"], tried.json["replaced"], tried.json["unchanged"]) == counts
        assert {key: await state_in(records, key) for key in new} == before

    ended = await run("state", "import", str(file), "--json")
    assert ended.code == 7
    assert {row["key"]: row["problem"] for row in ended.json["conflicts"]} == {
        "other": "another state is stored",
        "live": f"worker {worker.worker_id} has it",
    }
    assert {key: await state_in(records, key) for key in new} == {**before, "new": {"value": 40}}
    ended = await run("state", "import", str(file))
    assert "another state is stored" in ended.stdout
    assert ended.stdout.endswith("stored 0, replaced 0, unchanged 2, conflicts 2\n")

    ended = await run("state", "import", str(file), "--replace")
    assert (ended.code, ended.stdout) == (0, "stored 0, replaced 2, unchanged 2, conflicts 0\n")
    assert {key: await state_in(records, key) for key in new} == new
    assert await worker.send_message(1, agent("live")) == 31


async def test_an_import_restores_the_sequences_of_the_events_that_the_state_contains(
    run: Run, records: AgentRecords, worker: NatsAgentRuntime, tmp_path: Path
) -> None:
    async def handled(key: str) -> Mapping[str, int] | None:
        record = await records.read(agent(key))
        return None if record is None else record.handled

    for key in ("free", "old"):
        await records.write_state(agent(key), encoded({"value": 5}), expected=None, handled={"s@1": 5})
    exported = await run("state", "export")
    assert [json.loads(row)["handled"] for row in exported.stdout.splitlines()] == [{"s@1": 5}] * 2
    for key in ("free", "old"):
        record = await records.read(agent(key))
        await records.write_state(agent(key), encoded({"value": 7}), expected=record, handled={"s@1": 7, "s@2": 1})

    ended = await run("state", "set", "counter/old", "-", stdin='{"value": 8}')
    assert (ended.code, await handled("old")) == (0, {"s@1": 7, "s@2": 1}), "a corrected state contains the same events"
    without = json.dumps({"type": "counter", "key": "old", "state": {"value": 9}})
    ended = await run("state", "import", "-", "--replace", stdin=without)
    assert (ended.code, await handled("old")) == (0, {"s@1": 7, "s@2": 1})

    ended = await run("state", "import", "-", "--replace", stdin=exported.stdout)
    assert (ended.code, ended.stdout) == (0, "stored 0, replaced 2, unchanged 0, conflicts 0\n")
    assert "2 of the imported states contain fewer events of streams" in ended.stderr
    assert (await handled("free"), await handled("old")) == ({"s@1": 5}, {"s@1": 5})
    assert (await run("state", "import", "-", stdin=exported.stdout)).stdout.startswith(
        "stored 0, replaced 0, unchanged 2"
    )

    record = await records.read(agent("free"))
    await records.write_state(agent("free"), encoded({"value": 5}), expected=record, handled={"s@1": 6})
    ended = await run("state", "import", "-", stdin=exported.stdout)
    assert ended.code == 7, "the same state with other sequences is another one"

    await worker.send_message(1, agent("free"))
    ended = await run("state", "import", "-", "--replace", stdin=exported.stdout)
    assert ended.code == 7
    assert "whose state contains other events of streams than this one: stop the worker first" in ended.stdout
    assert await worker.send_message(0, agent("free")) == 6
    ended = await run("state", "import", "-", "--force", stdin=exported.stdout)
    assert (ended.code, await handled("free"), await state_in(records, "free")) == (0, {"s@1": 5}, {"value": 5})


@pytest.mark.parametrize("wrong", [[], {"s": 0}, {"s": -1}, {"s": "1"}, {"s": True}, {"s": 1.0}, {"s": 2**63}])
async def test_sequences_that_are_none_import_nothing(run: Run, wrong: Any) -> None:
    row = json.dumps({"type": "counter", "key": "k", "handled": wrong, "state": {"value": 9}})
    ended = await run("state", "import", "-", stdin=row)
    assert ended.code == 2
    assert "handled must be a JSON object with sequences" in ended.stderr


@pytest.mark.slow
async def test_an_import_past_a_frozen_owner_is_a_conflict_unless_it_is_forced(
    run: Run, records: AgentRecords, caller: NatsAgentRuntime, start_worker: Callable[..., Awaitable[Process]]
) -> None:
    frozen = await start_worker(lasting=True)
    await caller.send_message(1, agent("k"))
    frozen.pause()
    text = json.dumps({"type": "counter", "key": "k", "state": {"value": 7}})
    ended = await run("state", "import", "-", "--replace", stdin=text)
    assert ended.code == 7
    assert "does not answer" in ended.stdout
    ended = await run("state", "import", "-", "--force", stdin=text)
    assert (ended.code, ended.stdout) == (0, "stored 0, replaced 1, unchanged 0, conflicts 0\n")
    assert await state_in(records, "k") == {"value": 7}


async def test_a_file_with_a_wrong_line_imports_nothing(run: Run, records: AgentRecords, tmp_path: Path) -> None:
    good = {"type": "counter", "key": "k", "state": {"value": 1}}
    wrong: list[Any] = [
        good,
        {**good, "key": "l", "state": [1]},
        {**good, "key": 5},
        {**good, "type": "a b"},
        {"type": "counter", "key": "m"},
        {**good, "key": "m" * 40_000},
        good,
    ]
    text = "\n".join([*(json.dumps(row) for row in wrong), "{", *["[]"] * 30])
    ended = await run("state", "import", "-", stdin=text)
    assert ended.code == 2
    shown = ended.stderr.splitlines()
    assert shown[0] == "natsrt: nothing was imported:"
    assert [line.split(":")[0] for line in shown[1:8]] == [f"line {number}" for number in range(2, 9)]
    assert shown[6] == "line 7: counter/k is already in line 1"
    assert shown[-1] == "and 17 more"
    assert [record async for record in records.records()] == []


async def test_an_export_that_fails_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "states.jsonl"
    file.write_text("old")
    ended = await natsrt("state", "export", str(file), "--server", "nats://127.0.0.1:1", "--timeout", "200ms")
    assert ended.code == 3
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("states.jsonl", "old")]
    ended = await natsrt("state", "export", "/no/such/directory/file")
    assert ended.code == 1
    assert ended.stderr == "natsrt: /no/such/directory/file: No such file or directory\n"


async def test_an_export_that_cannot_be_written_to_the_end_is_no_success(run: Run, records: AgentRecords) -> None:
    await store(records, "k", {"text": "x"})
    ended = await run("state", "export", "/dev/full")
    assert (ended.code, ended.stderr) == (1, "natsrt: /dev/full: No space left on device\n")


async def test_json_in_the_place_of_a_file_is_told_where_it_belongs() -> None:
    ended = await natsrt("state", "set", "counter/A", '{"total":3}')
    assert ended.code == 2
    assert "give a file, or - and the JSON on standard input" in ended.stderr


async def test_an_export_may_go_to_a_device_and_to_a_reader_that_ends_early(
    run: Run, records: AgentRecords, server: EmbeddedServer, namespace: str
) -> None:
    for number in range(3):
        await store(records, f"k{number}", {"text": "x" * 100_000})
    assert (await run("state", "export", os.devnull)).code == 0
    where = f"--server {server.url} --namespace {namespace}"
    process = await asyncio.create_subprocess_shell(
        f"set -o pipefail; {NATSRT} state export {where} | head -c 10",
        executable="/bin/bash",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert (process.returncode, out) == (0, b'{"type":"c')
    assert b"Traceback" not in err


async def test_states_of_5_mb_travel(run: Run, records: AgentRecords, namespace: str, tmp_path: Path) -> None:
    for number in range(4):
        await store(records, f"k{number}", {"number": number, **LARGE})
    file = tmp_path / "states.jsonl"
    assert (await run("state", "export", str(file))).code == 0
    assert file.stat().st_size > 20_000_000
    await records.remove(await record_of(records, "k1"))
    await records.write_state(agent("k2"), b"{}", expected=await record_of(records, "k2"))
    ended = await run("state", "import", str(file), "--replace")
    assert ended.stdout == "stored 1, replaced 1, unchanged 2, conflicts 0\n"
    assert [await state_in(records, f"k{number}") for number in range(4)] == [
        {"number": number, **LARGE} for number in range(4)
    ]
    assert json.loads((await run("state", "get", "counter/k3")).stdout) == {"number": 3, **LARGE}


async def record_of(records: AgentRecords, key: str) -> Any:
    record = await records.read(agent(key))
    assert record is not None
    return record


async def test_a_state_whose_parts_are_damaged_is_told_and_repaired_by_an_import(
    run: Run, records: AgentRecords, namespace: str, tmp_path: Path
) -> None:
    await store(records, "good", {"value": 1})
    await store(records, "torn", LARGE)
    file = tmp_path / "states.jsonl"
    assert (await run("state", "export", str(file))).code == 0
    stream = f"KV_{namespace}_natsrt_agents"
    await records._connection.jetstream.purge_stream(stream, subject=f"$KV.{namespace}_natsrt_agents.c.>", keep=3)
    ended = await run("state", "export")
    assert ended.code == 7
    assert "left out: cannot decode the state of counter/torn" in ended.stderr
    assert len(ended.stdout.splitlines()) == 1
    assert "some are missing" in (await run("state", "get", "counter/torn")).stderr
    ended = await run("state", "import", str(file), "--replace")
    assert ended.stdout == "stored 0, replaced 1, unchanged 1, conflicts 0\n"
    assert await state_in(records, "torn") == LARGE


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_ten_thousand_states_travel(
    run: Run, server: EmbeddedServer, namespace: str, records: AgentRecords, tmp_path: Path
) -> None:
    file = tmp_path / "states.jsonl"
    with file.open("w") as stream:
        for number in range(MANY):
            row = {"type": "counter", "key": f"k{number:05}", "state": {"value": number}}
            stream.write(json.dumps(row) + "\n")
    ended = await run("state", "import", str(file), timeout=120)
    assert (ended.code, ended.stdout) == (0, "stored 10,000, replaced 0, unchanged 0, conflicts 0\n")
    ended = await run("state", "export", str(tmp_path / "again.jsonl"), timeout=120)
    assert ended.code == 0, ended.stderr
    with (tmp_path / "again.jsonl").open() as stream:
        assert [json.loads(line)["state"]["value"] for line in stream] == list(range(MANY))
    assert len((await run("state", "ls", "--json", timeout=120)).json) == MANY
    assert len((await run("state", "ls", timeout=120)).stdout.splitlines()) > MANY


@pytest.mark.slow
async def test_an_import_that_is_interrupted_can_be_run_again(
    server: EmbeddedServer, namespace: str, run: Run, processes: Processes, records: AgentRecords, tmp_path: Path
) -> None:
    file = tmp_path / "states.jsonl"
    with file.open("w") as stream:
        for number in range(MANY):
            row = {"type": "counter", "key": f"k{number:05}", "state": {"value": number}}
            stream.write(json.dumps(row) + "\n")
    where = ("--server", server.url, "--namespace", namespace)
    started: list[Process] = []

    async def interrupt(message: Msg) -> None:
        if message.subject.endswith(".k00100"):
            started[0].send_signal(signal.SIGINT)

    # A subscriber sees each record when it is written. A read of a record might wait until all are.
    async with await nats.connect(server.url) as client:
        await client.subscribe(f"$KV.{Subjects(namespace).bucket(AGENTS_BUCKET)}.>", cb=interrupt)
        await settled(client)
        started.append(processes.natsrt("state", "import", str(file), *where))
        assert await started[0].wait(30) == 130
    there = len((await run("state", "ls", "--json")).json)
    assert 0 < there < MANY
    ended = await run("state", "import", str(file), timeout=120)
    assert ended.stdout == f"stored {MANY - there:,}, replaced 0, unchanged {there:,}, conflicts 0\n"


# -- agents ------------------------------------------------------------------------------------------------------


async def test_agents_ls_shows_how_many_keyed_agents_each_worker_owns(
    run: Run, records: AgentRecords, worker: NatsAgentRuntime
) -> None:
    await worker.register_factory("plain", Plain)
    await worker.register_agent_instance(Plain(), AgentId("single", "one"))
    for key in ("a", "b"):
        await worker.send_message(1, agent(key))
    await records.claim(agent("orphan"), "gone-1")
    rows = {row["type"]: row for row in (await run("agents", "ls", "--json")).json}
    assert rows["counter"]["keyed"]
    assert (rows["counter"]["records"], rows["counter"]["owned"]) == (3, None)
    assert (rows["plain"]["records"], rows["plain"]["owned"]) == (None, None)
    table = (await run("agents", "ls")).stdout
    assert re.search(r"counter +3$", table, re.M)
    assert worker.worker_id not in table
    rows = {row["type"]: row for row in (await run("agents", "ls", "--owners", "--json")).json}
    assert rows["counter"]["records"] == 3
    assert rows["counter"]["owned"] == [
        {"worker_id": worker.worker_id, "live": True, "agents": 2},
        {"worker_id": "gone-1", "live": False, "agents": 1},
    ]
    assert not rows["plain"]["keyed"]
    assert rows["plain"]["owned"] is None
    for arguments in (("--owners",), ("counter",)):
        table = (await run("agents", "ls", *arguments)).stdout
        assert re.search(rf"counter +{worker.worker_id} +live +2$", table, re.M)
        assert re.search(r"counter +gone-1 +gone +1$", table, re.M)

    rows = (await run("agents", "ls", "--instances", "--json")).json
    assert [(row["type"], row["key"], row["kind"], row["worker_id"]) for row in rows] == [
        ("counter", "a", "keyed", worker.worker_id),
        ("counter", "b", "keyed", worker.worker_id),
        ("single", "one", "instance", worker.worker_id),
    ]
    assert "counter/a" in (await run("agents", "ls", "counter", "--instances")).stdout
    assert [row["type"] for row in (await run("agents", "ls", "plain", "--json")).json] == ["plain"]
    assert (await run("agents", "ls", "nobody")).code == 4


async def test_agents_ls_reads_no_record_and_counts_each_type_for_itself(
    run: Run, records: AgentRecords, worker: NatsAgentRuntime, server: EmbeddedServer
) -> None:
    await worker.register_factory("counter.more", Counting, expected_class=Counting)
    await worker.register_factory("none", Counting, expected_class=Counting)
    for number in range(30):
        await records.claim(agent(f"k{number}"), "gone-1")
        if number % 3 == 0:
            await records.claim(AgentId("counter.more", f"k *.{number}"), "gone-1")
    large = await records.claim(agent("large"), "gone-1")
    await records.save(large, json.dumps(LARGE).encode())  # its parts are keys, too, and no records
    client, seen = await nats.connect(server.url), []

    async def see(message: Msg) -> None:
        seen.append(message.subject)

    try:
        await client.subscribe("$JS.API.>", cb=see)
        await settled(client)
        rows = {row["type"]: row["records"] for row in (await run("agents", "ls", "--json")).json}
        await settled(client)
    finally:
        await client.close()
    assert rows == {"counter": 31, "counter.more": 10, "none": 0}
    stream = f"KV_{Subjects(worker.options.namespace).bucket(AGENTS_BUCKET)}"
    asked = {subject.removesuffix(f".{stream}") for subject in seen if stream in subject}
    assert asked == {"$JS.API.STREAM.INFO"}


PERMISSIONS = """
listen: 127.0.0.1:-1
server_name: guarded
jetstream {{ store_dir: {data} }}
authorization {{
  users: [
    {{ user: worker, password: pass }}
    {{ user: guest, password: pass, permissions: {{ publish: {{ deny: ["$JS.API.*.*.KV_natsrt_agents"] }} }} }}
  ]
}}
"""


async def test_who_may_not_read_the_records_sees_the_types_all_the_same(tmp_path: Path) -> None:
    config = tmp_path / "server.conf"
    config.write_text(PERMISSIONS.format(data=tmp_path / "data"))
    async with EmbeddedServer(config=config) as server:
        worker = NatsAgentRuntime(server.url, user="worker", password="pass")
        await worker.register_factory("counter", Counting, expected_class=Counting)
        async with worker:
            guest = ("--server", server.url, "--user", "guest", "--password", "pass")
            ended = await natsrt("agents", "ls", "--json", *guest)
            assert [(row["type"], row["keyed"], row["owned"]) for row in ended.json] == [("counter", True, None)]
            assert "the owners of keyed agents cannot be read" in ended.stderr
            ended = await natsrt("state", "ls", *guest)
            assert ended.code == 3
            assert "'$JS.API.STREAM.INFO.KV_natsrt_agents'" in ended.stderr
            ended = await natsrt("doctor", "--json", *guest)
            (found,) = [found for found in ended.json if found["check"] == "keyed agents"]
            assert found["level"] == "skipped"
            assert "$JS.API.STREAM.INFO.KV_natsrt_agents" in found["advice"]


async def test_where_tells_the_owner_without_claiming_anything(
    run: Run, records: AgentRecords, worker: NatsAgentRuntime
) -> None:
    await worker.send_message(1, agent("k"))
    shown = (await run("agents", "where", "counter/k", "--json")).json
    assert (shown["kind"], shown["worker_id"], shown["standing"]) == ("keyed", worker.worker_id, "holds")
    assert shown["state_bytes"] == len(b'{"value":1}')
    text = (await run("agents", "where", "counter/k")).stdout
    assert text.startswith(f"counter/k is on worker {worker.worker_id} (process {os.getpid()} on ")

    shown = (await run("agents", "where", "counter/nowhere", "--json")).json
    assert (shown["worker_id"], shown["standing"], shown["workers"]) == (None, "nobody", [worker.worker_id])
    text = (await run("agents", "where", "counter/nowhere")).stdout
    assert text == (
        "counter/nowhere is on no worker now: its next message creates it, on any worker of its type (1 live); "
        "no state is stored\n"
    )
    assert await records.read(agent("nowhere")) is None


@pytest.mark.slow
async def test_where_tells_a_frozen_owner_from_one_that_answers(
    run: Run, caller: NatsAgentRuntime, start_worker: Callable[..., Awaitable[Process]]
) -> None:
    frozen = await start_worker(lasting=True)
    await caller.send_message(1, agent("k"))
    frozen.pause()
    assert "which does not answer" in (await run("agents", "where", "counter/k")).stdout
    assert (await run("state", "rm", "counter/k")).code == 5
    assert (await run("state", "get", "counter/k", "--live")).code == 5


async def test_where_tells_what_is_true_of_instances_and_of_types_that_are_not_keyed(
    run: Run, worker: NatsAgentRuntime, server: EmbeddedServer, namespace: str
) -> None:
    await worker.register_factory("plain", Plain)
    await worker.register_agent_instance(Plain(), AgentId("single", "one"))
    shown = (await run("agents", "where", "single/one", "--json")).json
    assert (shown["kind"], shown["worker_id"]) == ("instance", worker.worker_id)
    assert "registered instance on worker" in (await run("agents", "where", "single/one")).stdout
    assert (await run("agents", "where", "single/two")).code == 4
    assert (await run("agents", "where", "unheard/of")).code == 4
    text = (await run("agents", "where", "plain/k")).stdout
    assert text == f"plain/k is not keyed: 1 worker creates it when called: {worker.worker_id}\n"
    async with NatsAgentRuntime(server.url, namespace=namespace) as other:
        await other.register_factory("plain", Plain)
        shown = (await run("agents", "where", "plain/k", "--json")).json
        assert (shown["kind"], shown["workers"]) == ("plain", sorted([worker.worker_id or "", other.worker_id or ""]))
        assert "2 workers create one each" in (await run("agents", "where", "plain/k")).stdout


async def test_where_of_a_type_that_lost_its_workers_tells_what_is_stored(
    run: Run, records: AgentRecords, server: EmbeddedServer, namespace: str
) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as worker:
        await worker.register_factory("counter", Counting, expected_class=Counting)
        await worker.send_message(1, agent("k"))
    text = (await run("agents", "where", "counter/k")).stdout
    assert text.startswith(
        "counter/k is on no worker now: no worker that hosts its type is alive; 11 bytes of state are stored"
    )
    assert (await run("agents", "where", "counter/never")).code == 4


async def test_rebalance_asks_for_what_is_beyond_the_fewest_and_leaves_what_is_in_use(
    run: Run, worker: NatsAgentRuntime, server: EmbeddedServer, namespace: str
) -> None:
    for number in range(6):
        await worker.send_message(1, agent(f"k{number}"))
    async with NatsAgentRuntime(server.url, namespace=namespace, name="empty") as other:
        await other.register_factory("counter", Counting, expected_class=Counting)
        rows = {row["worker_id"]: row for row in (await run("agents", "rebalance", "counter", "--json")).json}
        assert (rows[worker.worker_id]["owned"], rows[worker.worker_id]["asked_for"]) == (6, 6)
        assert rows[worker.worker_id]["given_away"] == 0, "they were just used"
        assert (rows[other.worker_id]["owned"], rows[other.worker_id]["asked_for"]) == (0, 0)
    await worker.register_factory("plain", Plain)
    assert "is not keyed" in (await run("agents", "rebalance", "plain")).stderr
    assert (await run("agents", "rebalance", "nobody")).code == 4


@pytest.mark.slow
async def test_rebalance_spreads_idle_agents(
    run: Run, worker: NatsAgentRuntime, caller: NatsAgentRuntime, server: EmbeddedServer, namespace: str
) -> None:
    keys = [f"k{number}" for number in range(100)]
    for key in keys:
        await caller.send_message(1, agent(key))
    async with NatsAgentRuntime(server.url, namespace=namespace, name="new") as other:
        await other.register_factory("counter", Counting, expected_class=Counting)
        given = 0

        async def all_were_given_away() -> bool:
            nonlocal given
            (row,) = [
                row
                for row in (await run("agents", "rebalance", "counter", "--json")).json
                if row["worker_id"] == worker.worker_id
            ]
            given += row["given_away"]
            return given == len(keys)

        await eventually(all_were_given_away, 60)  # they count as idle some 20 s after their last message
        assert [await caller.send_message(1, agent(key)) for key in keys] == [2] * len(keys)
        (row,) = (await run("agents", "ls", "counter", "--json")).json
        owned = {owner["worker_id"]: owner["agents"] for owner in row["owned"]}
        assert sum(owned.values()) == len(keys)
        assert min(owned.values()) > 20, "evenly but for chance"
