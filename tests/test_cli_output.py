"""What the command line prints: full disks, closed pipes, suggestions, and the log of each process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from autogen_core import AgentId

from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from tests.support.cli import NATSRT, natsrt
from tests.support.processes import Processes, eventually

NOWHERE = ("--server", "nats://127.0.0.1:1", "--timeout", "300ms")
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def ended(arguments: Sequence[str], *, stdout: int | Path, stderr: int | Path = subprocess.PIPE) -> tuple[int, str]:
    """Run a command whose outputs go to these files; exit code and what came to standard error."""
    opened = [path.open("wb") if isinstance(path, Path) else path for path in (stdout, stderr)]
    try:
        done = subprocess.run([NATSRT, *arguments], stdout=opened[0], stderr=opened[1], timeout=40, check=False)
    finally:
        for file in opened:
            if not isinstance(file, int):
                file.close()
    return done.returncode, (done.stderr or b"").decode()


# -- closed streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("--help", 0),
        ("agents ls", 0),
        ("doctor", 0),
        ("state export -", 0),
        ("send nobody/x <&-", 4),
        (f"doctor {' '.join(NOWHERE)}", 7),
    ],
)
def test_a_closed_standard_output_changes_nothing(
    server: EmbeddedServer, namespace: str, command: str, code: int
) -> None:
    line = f"exec {NATSRT} {command} >&-"
    login = {"NATS_URL": server.url, "NATSRT_NAMESPACE": namespace}
    done = subprocess.run(["sh", "-c", line], capture_output=True, env={**os.environ, **login}, timeout=40, check=False)
    assert (done.returncode, done.stdout, b"Traceback" in done.stderr) == (code, b"", False), done
    silent = subprocess.run(["sh", "-c", f"{line} 2>&-"], env={**os.environ, **login}, timeout=40, check=False)
    assert silent.returncode == code


# -- output that cannot be written -------------------------------------------------------------------------------


@needs_full
@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["agents", "--help"], ["agents", "ls", "--help"], ["demo"]]
)
def test_a_full_disk_is_one_line_and_exit_code_1(arguments: list[str]) -> None:
    code, error = ended(arguments, stdout=FULL)
    assert code == 1
    assert re.fullmatch(r"natsrt: [\w ]+ cannot be written: No space left on device\n", error), error


@needs_full
@pytest.mark.parametrize(
    "arguments", [["agents", "ls", "--json"], ["agents", "ping", "--json"], ["state", "ls", "--json"], ["doctor"]]
)
def test_a_full_disk_fails_every_command_that_prints(server: EmbeddedServer, arguments: list[str]) -> None:
    code, error = ended([*arguments, "--server", server.url], stdout=FULL)
    assert (code, error) == (1, "natsrt: standard output cannot be written: No space left on device\n")


@needs_full
@pytest.mark.parametrize("arguments", [["agents", "ls", *NOWHERE], ["nothing"], ["agents", "ls", "--creds", "/no"]])
def test_a_full_disk_for_errors_keeps_the_exit_code(arguments: list[str]) -> None:
    expected, text = ended(arguments, stdout=subprocess.DEVNULL)
    assert expected and text
    assert ended(arguments, stdout=subprocess.DEVNULL, stderr=FULL)[0] == expected
    assert ended(arguments, stdout=FULL, stderr=FULL)[0] == expected


@needs_full
def test_notes_that_cannot_be_written_fail_a_command_that_did_its_work(server: EmbeddedServer, namespace: str) -> None:
    where = ["--server", server.url, "--namespace", namespace]
    assert ended(["publish", "news", "{}", *where], stdout=subprocess.DEVNULL)[0] == 0
    assert ended(["publish", "news", "{}", *where], stdout=subprocess.DEVNULL, stderr=FULL)[0] == 1


@pytest.mark.parametrize("arguments", [["--help"], ["agents", "ls", "--help"], ["demo"]])
def test_a_closed_pipe_ends_a_command_quietly(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        code, error = ended(arguments, stdout=writing)
    finally:
        os.close(writing)
    assert (code in (0, 1), error) == (True, "")


@needs_full
async def test_a_worker_whose_output_is_full_goes_on_and_says_so_at_its_end(
    server: EmbeddedServer, namespace: str, tmp_path: Path
) -> None:
    where = ("--server", server.url, "--namespace", namespace)
    with FULL.open("wb") as full, (tmp_path / "stderr").open("wb") as stderr:
        arguments = (NATSRT, "worker", "natsrt_cli.demo_agents:Upper", "--type", "upper", *where)
        worker = subprocess.Popen(arguments, stdout=full, stderr=stderr)
        try:
            assert (await natsrt("agents", "wait", "upper", *where, "--timeout", "20")).code == 0
            assert (await natsrt("send", "upper", '{"text": "hi"}', *where)).json == {"text": "HI"}
            worker.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(worker.wait, 20) == 1
        finally:
            worker.kill()
            worker.wait()
    assert "natsrt: standard output cannot be written: No space left on device" in (tmp_path / "stderr").read_text()


async def test_a_supervisor_that_nobody_reads_replaces_its_workers(server: EmbeddedServer, namespace: str) -> None:
    where = ("--server", server.url, "--namespace", namespace)
    arguments = (NATSRT, "worker", "natsrt_cli.demo_agents:Upper", "--type", "upper", "--processes", "2", *where)
    supervisor = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
            view = runtime.running.registry.view
            await eventually(lambda: len(view.workers_hosting("upper")) == 2, 20)
            assert supervisor.stdout is not None and supervisor.stderr is not None
            supervisor.stdout.close()
            supervisor.stderr.close()
            killed = next(iter(view.workers.values()))
            os.kill(killed.pid, signal.SIGKILL)

            def replaced() -> bool:
                now = runtime.running.registry.view
                return killed.worker_id not in now.workers and len(now.workers_hosting("upper")) == 2

            await eventually(replaced, 30)
            assert supervisor.poll() is None
            supervisor.terminate()
            await asyncio.to_thread(supervisor.wait, 20)
            await eventually(lambda: not runtime.running.registry.view.workers, 10)
    finally:
        supervisor.kill()
        supervisor.wait()


# -- suggestions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["agent", "ls"], "'natsrt agents'"),
        (["workers"], "'natsrt worker'"),
        (["Doctor"], "'natsrt doctor'"),
        (["agents", "lss"], "'natsrt agents ls'"),
        (["agents", "list"], "'natsrt agents ls'"),
        (["state", "exprot"], "'natsrt state export'"),
        (["ping"], "'natsrt agents ping'"),
        (["ls"], "'natsrt agents ls' or 'natsrt dlq ls'"),
        (["agents", "ls", "--sevrer", "x"], "'--server'"),
        (["send", "a", "b", "--typename", "x"], "'--type-name'"),
        (["--server", "x", "agents", "ls"], "natsrt COMMAND --server"),
        (["agents", "--json", "ls"], "natsrt agents COMMAND --json"),
    ],
)
async def test_what_is_mistyped_gets_a_suggestion(arguments: list[str], meant: str) -> None:
    shown = await natsrt(*arguments)
    assert (shown.code, shown.stdout) == (2, "")
    assert meant in shown.stderr


async def test_what_is_like_nothing_gets_none() -> None:
    shown = await natsrt("xyzzy")
    assert shown.code == 2
    assert shown.stderr.splitlines()[-1] == "Error: No such command 'xyzzy'."


@pytest.mark.parametrize(
    ("variable", "meant"), [("NATSRT_NAMSPACE", "NATSRT_NAMESPACE"), ("NATSRT_LOG_FROMAT", "NATSRT_LOG_FORMAT")]
)
async def test_a_mistyped_variable_gets_a_suggestion(variable: str, meant: str) -> None:
    shown = await natsrt("agents", "ls", *NOWHERE, env={variable: "x"})
    assert (shown.code, f"did you mean {meant}?" in shown.stderr) == (2, True)


# -- logs --------------------------------------------------------------------------------------------------------


def objects(text: str) -> list[dict[str, object]]:
    """The lines of a log in JSON. Fails if one is anything else."""
    return [json.loads(line) for line in text.splitlines()]


AGENT = """
import logging, threading, warnings
from autogen_core import MessageContext, RoutedAgent, rpc


class Teller(RoutedAgent):
    def __init__(self):
        super().__init__("tells")

    @rpc
    async def tell(self, message: str, ctx: MessageContext) -> str:
        logging.getLogger("teller").warning("told\\n%s", "twice")
        warnings.warn("old")
        logging.getLogger("teller").info("one %s", "two", "three")
        threading.Thread(target=lambda: 1 / 0).start()
        try:
            raise LookupError("gone")
        except LookupError:
            logging.getLogger("teller").exception("failed")
        return message
"""


@pytest.mark.parametrize("how", ["option", "variable"])
async def test_a_log_in_json_is_one_object_for_each_line(
    processes: Processes, server: EmbeddedServer, namespace: str, tmp_path: Path, how: str
) -> None:
    (tmp_path / "teller.py").write_text(AGENT)
    where = ("--server", server.url, "--namespace", namespace)
    as_json = ("--log-format", "json") if how == "option" else ()
    env = {} if how == "option" else {"NATSRT_LOG_FORMAT": "json"}
    worker = processes.natsrt("worker", "teller:Teller", "--type", "teller", *where, *as_json, env=env, cwd=tmp_path)
    ready = await worker.wait_for_line("ready: types")
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        assert await runtime.send_message("secret", AgentId("teller", "x")) == "secret"
    await worker.wait_for_line("ZeroDivisionError")
    worker.terminate()
    assert await worker.wait() == 0
    log = objects(worker.stderr)
    assert "secret" not in worker.stderr
    told = next(line for line in log if line["message"] == "told\ntwice")
    assert (told["level"], told["logger"], told["process"]) == ("WARNING", "teller", worker.pid)
    assert str(told["worker_id"]) == ready.split()[1]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", str(told["time"]))
    failed = next(line for line in log if line["message"] == "failed")
    assert str(failed["exception"]).endswith("LookupError: gone")
    assert any(line["logger"] == "py.warnings" for line in log)
    assert any(line["message"] == "one %s (its arguments do not fit)" for line in log)
    assert any("ZeroDivisionError" in str(line.get("exception")) for line in log)


async def test_errors_and_notes_are_json_too(server: EmbeddedServer, namespace: str) -> None:
    failed = await natsrt("agents", "ls", *NOWHERE, "--log-format", "json")
    (line,) = objects(failed.stderr)
    assert (failed.code, line["level"], str(line["message"])[:23]) == (3, "ERROR", "natsrt: no NATS server ")
    noted = await natsrt(
        "publish", "news", "{}", "--server", server.url, "--namespace", namespace, "--log-format", "json"
    )
    (line,) = objects(noted.stderr)
    assert (line["level"], str(line["message"])[:9]) == ("INFO", "published")


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_each_line_of_several_processes_names_its_process(
    processes: Processes, server: EmbeddedServer, namespace: str, log_format: str
) -> None:
    where = ("--server", server.url, "--namespace", namespace, "--log-format", log_format)
    supervisor = processes.natsrt(
        "worker", "natsrt_cli.demo_agents:Upper", "--type", "upper", "--processes", "2", *where
    )
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:

        def pids() -> set[int]:
            return {worker.pid for worker in runtime.running.registry.view.workers.values()}

        await eventually(lambda: len(pids()) == 2, 20)
        first = pids()
        os.kill(min(first), signal.SIGKILL)
        await supervisor.wait_for_line("was ended by SIGKILL")
        await eventually(lambda: len(pids()) == 2 and pids() != first, 20)
        seen = first | pids()
        supervisor.terminate()
        assert await supervisor.wait(20) == 0
    if log_format == "json":
        lines = objects(supervisor.stderr)
        assert {line["process"] for line in lines} == {supervisor.pid, *seen}
        assert {(line.get("worker") is None) for line in lines if line["process"] == supervisor.pid} == {True}
        assert {line["worker"] for line in lines if line["process"] in seen} == {1, 2}
    else:
        place = re.compile(r"^(?:[\d-]+ [\d:,]+ )?\[(supervisor|worker [12]), process (\d+)\] ")
        found = [place.match(line) for line in supervisor.stderr.splitlines()]
        assert all(found), supervisor.stderr
        assert {int(match[2]) for match in found if match} == {supervisor.pid, *seen}


async def test_the_log_of_the_server_is_json_too(processes: Processes) -> None:
    server = processes.natsrt("server", "--port", "-1", "--verbose", "--log-format", "json")
    await server.wait_for_line("server ready")
    await server.wait_for_line("Server is ready")
    server.terminate()
    assert await server.wait() == 0
    lines = objects(server.stderr)
    assert {line["logger"] for line in lines} == {"nats-server"}
    assert "Initiating Shutdown..." in {line["message"] for line in lines}
    assert server.pid not in {line["process"] for line in lines}
