"""``natsrt submit`` and ``natsrt tasks``."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from autogen_core import MessageContext, RoutedAgent, rpc

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.task_types import TaskId
from tests.support.cli import NATSRT, Ended
from tests.support.cli import natsrt as command_line
from tests.support.processes import Processes, eventually
from tests.test_tasks import KEYED, LONG, PLAIN, TYPES, Make, Seen, make

__all__ = ["make"]

Command = Callable[..., Coroutine[Any, Any, Ended]]
WORK = '{"name": "a"}'


class Slow(RoutedAgent):
    """Says how far it is, and waits. Then it fails, if that is the message."""

    def __init__(self, free: asyncio.Event) -> None:
        super().__init__("takes its time")
        self._free = free

    @rpc
    async def on_text(self, message: str, ctx: MessageContext) -> str:
        natsrt.progress(0.4, f"reading\n\x07{message}")
        await self._free.wait()
        if message == "fail":
            self._free.clear()
            raise ValueError(message)
        return "done"


@pytest.fixture
def run(server: EmbeddedServer, namespace: str) -> Command:
    """Runs a command in the test's namespace."""

    async def command(*arguments: str, stdin: str | None = None) -> Ended:
        return await command_line(*arguments, "--server", server.url, "--namespace", namespace, stdin=stdin)

    return command


async def submit(run: Command, *arguments: str) -> str:
    """Submit a task, and return its id."""
    ended = await run("submit", *arguments)
    assert ended.code == 0, ended
    return ended.stdout.strip()


async def is_in(run: Command, task_id: str, state: str) -> bool:
    found = (await run("tasks", "show", task_id, "--json")).json
    return bool(found["state"] == state)


# -- submit ----------------------------------------------------------------------------------------------------------


@TYPES
async def test_submit_prints_the_id_and_result_what_the_handler_returned(
    make: Make, run: Command, agent_type: str
) -> None:
    task_id = await submit(run, f"{agent_type}/ada", WORK)
    assert TaskId.parse(task_id).agent.key == "ada"
    queued = await run("tasks", "result", task_id)
    assert (queued.code, queued.stdout) == (5, "")
    assert queued.stderr == f"natsrt: {task_id} has no result yet: it is queued; --wait waits for it\n"
    await make(Seen())
    result = await run("tasks", "result", task_id, "--wait")
    assert (result.code, result.json) == (0, {"name": "a", "count": 1, "text": ""})
    again = await run("tasks", "result", task_id)
    assert (again.code, again.stdout, again.stderr) == (0, result.stdout, "")
    called = await run("send", f"{agent_type}/other", WORK)
    assert called.stdout == result.stdout


async def test_submit_reads_bodies_and_keys_as_send_does(make: Make, run: Command) -> None:
    seen = Seen()
    await make(seen)
    piped = await run("submit", PLAIN, "-", "--wait", stdin='{"name": "from a pipe"}')
    assert (piped.code, piped.json["name"]) == (0, "from a pipe")
    assert TaskId.parse(piped.stderr.splitlines()[0]).agent.key == "default"
    assert (await run("submit", PLAIN, "--wait", stdin=WORK)).json["name"] == "a"
    assert (await run("submit", PLAIN, WORK, "--type-name", "Work", "--wait")).json["name"] == "a"
    large = json.dumps({"name": "large", "text": "x" * 2_000_000})
    assert (await run("submit", PLAIN, "--wait", stdin=large)).json["text"] == "x" * 2_000_000


async def test_submit_tells_that_no_worker_is_there(make: Make, run: Command) -> None:
    assert (await run("submit", PLAIN, WORK)).stderr == f"no live worker hosts {PLAIN!r} now; the task waits for one\n"
    await make(Seen())
    assert (await run("submit", PLAIN, WORK)).stderr == ""


async def test_submit_and_wait_shows_the_progress(
    make: Make, run: Command, processes: Processes, server: EmbeddedServer, namespace: str
) -> None:
    worker, free = await make(retry_delay=1.0, retry_delay_max=1.0), asyncio.Event()
    await natsrt.register(worker, Slow, "slow", lambda: Slow(free))
    where = ("--server", server.url, "--namespace", namespace)
    waiting = processes.natsrt("submit", "slow", '"a"', "--wait", *where)
    await waiting.wait_for_line("running: 40% reading \\x07a")  # one line, and no control characters
    free.set()
    assert await waiting.wait(LONG) == 0
    assert waiting.stdout == '"done"\n'
    again = processes.natsrt("submit", "slow", '"fail"', "--wait", "--retries", "1", *where)
    await again.wait_for_line("waiting, due ")
    await again.wait_for_line("running, attempt 2: 40% reading")
    free.set()
    assert await again.wait(LONG) == 6


async def test_the_options_of_submit_are_those_of_submit_message(make: Make, run: Command) -> None:
    seen = Seen(fails=Counter(often=2, once=1))
    await make(seen)
    often = await run("submit", PLAIN, '{"name": "often"}', "--retries", "1", "--wait")
    assert (often.code, seen.begun) == (6, ["often", "often"])
    once = await submit(run, PLAIN, '{"name": "once"}', "--retries", "0", "--message-id", "7/8", "--result-ttl", "1h")
    assert (await run("tasks", "result", once, "--wait")).code == 6
    assert await submit(run, PLAIN, '{"name": "another"}', "--message-id", "7/8") == once
    assert seen.begun == ["often", "often", "once"]
    shown = (await run("tasks", "show", once, "--json")).json
    assert shown["expires"][:13] != shown["since"][:13] and shown["expires"][13:] == shown["since"][13:]
    for option, value, due in (("--delay", "24h", None), ("--at", "2100-01-01T09:00:00Z", "2100-01-01T09:00:00.000Z")):
        row = (await run("tasks", "show", await submit(run, PLAIN, WORK, option, value), "--json")).json
        assert row["state"] == "scheduled" and row["due"] > row["since"]
        assert due is None or row["due"] == due
    at_once = await run("submit", PLAIN, WORK, "--at", "2020-01-01T09:00:00Z", "--wait")
    assert at_once.code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no type!", WORK), "is not an agent"),
        ((PLAIN, WORK, "--delay", "1h", "--at", "2100-01-01T09:00:00Z"), "give --delay or --at, not both"),
        ((PLAIN, WORK, "--delay", "soon"), "is not a duration"),
        ((PLAIN, WORK, "--at", "2100-01-01T09:00:00"), "has no time zone"),
        ((PLAIN, WORK, "--retries", "-1"), "-1 is not in the range"),
        ((PLAIN, WORK, "--result-ttl", "500ms"), "result_ttl must be a number of seconds from 1 to"),
        ((PLAIN, WORK, "--message-id", ""), "must be a text of 1 to 200 bytes"),
    ],
)
async def test_what_no_task_can_have_is_refused(run: Command, arguments: tuple[str, ...], said: str) -> None:
    refused = await run("submit", *arguments)
    assert (refused.code, refused.stdout) == (2, "")
    assert said in refused.stderr
    assert (await run("topics", "ls", "--json")).json == []  # nothing was made for it


async def test_a_body_that_is_not_json_has_no_type(run: Command) -> None:
    refused = await run("submit", PLAIN, "not JSON", "--type-name", "Work")
    assert (refused.code, refused.stdout) == (2, "")
    assert "the body is not JSON" in refused.stderr
    assert (await run("tasks", "ls", "--json")).json == []


# -- failures --------------------------------------------------------------------------------------------------------


@TYPES
async def test_a_failure_is_told_as_send_tells_it(make: Make, run: Command, agent_type: str) -> None:
    seen = Seen(fails=Counter(a=100))
    await make(seen)
    where = f"{agent_type}/k"
    called, waited = await run("send", where, WORK), await run("submit", where, WORK, "--wait")
    assert (waited.code, waited.stdout) == (called.code, "") == (6, "")
    told = called.stderr.strip().removesuffix(")")  # a plain call is not told which worker answered
    assert waited.stderr.splitlines()[-1].startswith(f"{told} on worker w-")
    [row] = (await run("tasks", "ls", "--json")).json
    assert (row["state"], row["attempt"], row["due"]) == ("failed", 3, None)
    result = await run("tasks", "result", row["id"])
    assert result.code == 6 and result.stderr.strip() == waited.stderr.splitlines()[-1]
    shown = (await run("tasks", "show", row["id"])).stdout
    assert "state: failed\nattempt: 3\n" in shown
    assert "error: tests.programs.task_worker.Broken: " in shown and "raise Broken(name, 7)" in shown
    whole = (await run("tasks", "show", row["id"], "--json")).json
    assert whole.items() >= row.items() and whole["error"] in shown and "Traceback" in whole["traceback"]


async def test_a_body_that_fits_no_type_says_which_option_names_one(make: Make, run: Command) -> None:
    await make(Seen())
    unfit = await run("submit", PLAIN, '{"nam": "a"}', "--wait")
    assert unfit.code == 6
    assert "'nam' is not a field of it, did you mean 'name'?; name the type with --type-name" in unfit.stderr


async def test_a_wait_ends_at_its_timeout_and_the_task_goes_on(make: Make, run: Command) -> None:
    waited = await run("submit", PLAIN, WORK, "--wait", "--timeout", "2")
    task_id = waited.stderr.splitlines()[1]
    assert waited.code == 5
    assert waited.stderr.endswith(f"natsrt: {task_id} goes on: it has no result within --timeout = 2 s\n")
    assert (await run("tasks", "result", task_id, "--wait", "--timeout", "1")).code == 5
    await make(Seen())
    assert (await run("tasks", "result", task_id, "--wait", "--timeout", "20")).code == 0


async def test_ctrl_c_ends_the_wait_and_the_task_goes_on(
    make: Make, run: Command, processes: Processes, server: EmbeddedServer, namespace: str
) -> None:
    where = ("--server", server.url, "--namespace", namespace)
    waiting = processes.natsrt("submit", PLAIN, WORK, "--wait", *where)
    await waiting.wait_for_line("queued")
    task_id = waiting.stderr.splitlines()[1]
    waiting.interrupt()
    assert await waiting.wait() == 130
    assert f"{task_id} goes on; to wait again: natsrt tasks result {task_id} --wait" in waiting.stderr
    assert "Traceback" not in waiting.stderr and waiting.stdout == ""
    await make(Seen())
    assert (await run("tasks", "result", task_id, "--wait")).json["name"] == "a"


@pytest.mark.parametrize("command", [("show",), ("result",), ("result", "--wait"), ("cancel",), ("retry",)])
async def test_an_unknown_task_is_exit_code_4_and_a_wrong_id_2(make: Make, run: Command, command: Any) -> None:
    name, *options = command
    for _ in range(2):
        unknown = await run("tasks", name, f"{PLAIN}/k/never", *options)
        assert (unknown.code, unknown.stdout) == (4, "")
        assert unknown.stderr.startswith(f"natsrt: there is no task {PLAIN}/k/never: ")
        await submit(run, PLAIN, WORK)  # now there is a stream
    wrong = await run("tasks", name, "never", *options)
    assert (wrong.code, wrong.stderr) == (
        2,
        "natsrt: 'never' is not the id of a task: it must be <agent type>/<agent key>/<message id>\n",
    )


# -- ls --------------------------------------------------------------------------------------------------------------


async def test_ls_lists_tasks_by_type_and_state(make: Make, run: Command) -> None:
    none = await run("tasks", "ls")
    assert (none.code, none.stdout, none.stderr) == (0, "", "there are no tasks\n")
    later = await submit(run, f"{KEYED}/k", WORK, "--delay", "1h")
    assert (await run("tasks", "ls", PLAIN)).stderr == "there are no such tasks\n"
    worker, free = await make(Seen(fails=Counter(bad=1))), asyncio.Event()
    await natsrt.register(worker, Slow, "slow", lambda: Slow(free))
    done = await submit(run, f"{PLAIN}/k", WORK)
    assert (await run("tasks", "result", done, "--wait")).code == 0
    bad = await submit(run, f"{PLAIN}/k", '{"name": "bad"}', "--retries", "0")
    assert (await run("tasks", "result", bad, "--wait")).code == 6
    running = await submit(run, "slow/k", '"a"')
    await eventually(lambda: is_in(run, running, "running"))

    async def ids(*arguments: str) -> list[str]:
        return [row["id"] for row in (await run("tasks", "ls", "--json", *arguments)).json]

    assert await ids() == [later, done, bad, running]
    assert await ids(PLAIN) == [done, bad]
    assert await ids("--limit", "2") == [bad, running]
    assert await ids("--state", "done", "--state", "failed") == [done, bad]
    assert await ids(KEYED, "--state", "done") == []
    assert await ids("--state", "failed", "--limit", "1") == [bad]
    assert (await run("tasks", "ls", "--state", "finished")).code == 2
    lines = (await run("tasks", "ls")).stdout.splitlines()
    assert lines[0].split() == ["TASK", "STATE", "ATTEMPT", "PROGRESS", "WORKER", "SINCE", "DUE"]
    assert [text.split()[:3] for text in lines[2:5]] == [
        [later, "scheduled", "-"],
        [done, "done", "1"],
        [bad, "failed", "1"],
    ]
    assert lines[5].split()[:5] == [running, "running", "1", "40%", "reading"]
    row = (await run("tasks", "ls", "--json", "--limit", "1")).json[0]
    assert row["worker_id"].startswith("w-") and row["attempt"] == 1 and row["fraction"] == 0.4
    free.set()
    assert (await run("tasks", "result", running, "--wait")).stdout == '"done"\n'


# -- cancel and retry ------------------------------------------------------------------------------------------------


@TYPES
async def test_cancel_ends_tasks_that_wait_and_those_that_run(make: Make, run: Command, agent_type: str) -> None:
    seen = Seen()
    worker = await make(seen)
    running = await submit(run, f"{agent_type}/k", '{"name": "a", "what": "wait"}')
    queued = await submit(run, "nobody/k", WORK)
    scheduled = await submit(run, f"{agent_type}/k", WORK, "--delay", "1h")
    await eventually(lambda: seen.begun == ["a"])
    cancelled = await run("tasks", "cancel", running, queued, scheduled, queued)
    assert (cancelled.code, cancelled.stdout) == (0, "")
    assert cancelled.stderr.splitlines() == [f"cancelled: {task_id}" for task_id in (running, queued, scheduled)]
    assert {row["state"] for row in (await run("tasks", "ls", "--json")).json} == {"cancelled"}
    for task_id in (running, queued, scheduled):
        result = await run("tasks", "result", task_id)
        assert (result.code, result.stderr) == (1, f"natsrt: the task {task_id} was cancelled\n")
    again = await run("tasks", "cancel", queued)
    assert (again.code, again.stderr) == (1, f"natsrt: {queued} has a result already: it is cancelled\n")
    mixed = await run("tasks", "cancel", queued, f"{agent_type}/k/never", await submit(run, "nobody/k", WORK))
    assert mixed.code == 7
    assert [text.partition(":")[0] for text in mixed.stderr.splitlines()] == ["natsrt", "natsrt", "cancelled"]
    await eventually(lambda: worker.health().handlers_running == 0)  # the handler has heard of it


@TYPES
async def test_retry_tries_failed_tasks_again_under_their_ids(make: Make, run: Command, agent_type: str) -> None:
    seen = Seen(fails=Counter(a=1, b=1))
    await make(seen)
    ids = [await submit(run, f"{agent_type}/k", f'{{"name": "{name}"}}', "--retries", "0") for name in "ab"]
    for task_id in ids:
        assert (await run("tasks", "result", task_id, "--wait")).code == 6
    retried = await run("tasks", "retry", *ids)
    assert (retried.code, retried.stderr.splitlines()) == (0, [f"tried again: {task_id}" for task_id in ids])
    for number, task_id in enumerate(ids, 1):
        assert (await run("tasks", "result", task_id, "--wait")).json["count"] == number
    done = await run("tasks", "retry", ids[0])
    assert (done.code, done.stderr) == (1, f"natsrt: {ids[0]} cannot be tried again: it is done\n")
    queued = await submit(run, "nobody/k", WORK)
    assert (await run("tasks", "retry", queued)).stderr.endswith("cannot be tried again: it is queued\n")


async def test_without_its_dead_letter_a_task_is_not_tried_again(make: Make, run: Command) -> None:
    await make(Seen(fails=Counter(a=1)))
    task_id = await submit(run, PLAIN, WORK, "--retries", "0")
    assert (await run("tasks", "result", task_id, "--wait")).code == 6
    assert (await run("dlq", "rm", "--all", "--yes")).code == 0
    refused = await run("tasks", "retry", task_id)
    assert (refused.code, refused.stderr) == (
        1,
        f"natsrt: {task_id} cannot be tried again: its dead letter is gone\n",
    )
    assert (await run("tasks", "result", task_id)).code == 6  # its failure is still known


# -- where it does not work ------------------------------------------------------------------------------------------

COMMANDS = (
    ("submit", PLAIN, WORK),
    ("tasks", "ls"),
    ("tasks", "show", f"{PLAIN}/k/x"),
    ("tasks", "result", f"{PLAIN}/k/x", "--wait"),
    ("tasks", "cancel", f"{PLAIN}/k/x"),
    ("tasks", "retry", f"{PLAIN}/k/x"),
)


async def test_without_jetstream_every_command_says_so(tmp_path: Path) -> None:
    config = tmp_path / "server.conf"
    config.write_text("listen: 127.0.0.1:-1\n")
    async with EmbeddedServer(config=config) as bare:
        for command in COMMANDS:
            ended = await command_line(*command, "--server", bare.url)
            assert (ended.code, ended.stdout) == (3, ""), ended
            assert "JetStream" in ended.stderr and "Traceback" not in ended.stderr


USERS = """
listen: 127.0.0.1:-1
jetstream {{ store_dir: "{store}" }}
authorization {{ users: [
  {{ user: all, password: secret }}
  {{ user: some, password: secret, permissions: {{ publish: {{ deny: [{denied}] }} }} }}
] }}
"""


@pytest.mark.parametrize(
    ("denied", "command"),
    [
        ('"topic.>"', ("submit", PLAIN, WORK)),
        ('"$JS.API.CONSUMER.CREATE.natsrt_results.>"', ("tasks", "ls")),
        ('"$JS.API.CONSUMER.CREATE.natsrt_events_tasks.>"', ("tasks", "ls")),
        ('"$JS.API.DIRECT.GET.natsrt_results"', ("tasks", "ls")),
        ('"$JS.API.DIRECT.GET.natsrt_results.>"', ("tasks", "show", "ID")),
        ('"$JS.API.DIRECT.GET.natsrt_results.>"', ("tasks", "result", "ID")),
        ('"$JS.API.DIRECT.GET.natsrt_results.>"', ("tasks", "result", "ID", "--wait")),
        ('"natsrt.task.>"', ("tasks", "cancel", "ID")),
        ('"$JS.API.STREAM.MSG.DELETE.natsrt_events_tasks"', ("tasks", "cancel", "ID")),
    ],
)
async def test_what_is_denied_is_named(tmp_path: Path, denied: str, command: tuple[str, ...]) -> None:
    config = tmp_path / "server.conf"
    config.write_text(USERS.format(store=tmp_path / "data", denied=denied))
    async with EmbeddedServer(config=config) as server:
        async with NatsAgentRuntime(server.url, user="all", password="secret") as runtime:
            await runtime.submit_message("a", TaskId.parse(f"{PLAIN}/k/id").agent, message_id="id")
        named = [f"{PLAIN}/k/id" if argument == "ID" else argument for argument in command]
        ended = await command_line(*named, "--server", server.url, "--user", "some", "--password", "secret")
        assert (ended.code, ended.stdout) == (3, ""), ended
        assert denied.strip('"').removesuffix(".>") in ended.stderr and "Traceback" not in ended.stderr


async def test_a_closed_output_changes_nothing(server: EmbeddedServer, namespace: str, make: Make) -> None:
    await make(seen := Seen())
    login = {**os.environ, "NATS_URL": server.url, "NATSRT_NAMESPACE": namespace}
    for arguments in (f"submit {PLAIN} '{WORK}'", f"submit {PLAIN} '{WORK}' --wait", "tasks ls"):
        line = f"exec {NATSRT} {arguments} >&-"
        done = await asyncio.to_thread(
            subprocess.run, ["sh", "-c", line], capture_output=True, env=login, timeout=40, check=False
        )
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done
        read, write = os.pipe()
        os.close(read)
        try:
            broken = await asyncio.to_thread(
                subprocess.run, ["sh", "-c", line[:-4]], stdout=write, stderr=subprocess.PIPE, env=login, timeout=40
            )
        finally:
            os.close(write)
        assert (broken.returncode, b"Traceback" in broken.stderr) == (0, False), broken
    await eventually(lambda: len(seen.ended) == 4)
