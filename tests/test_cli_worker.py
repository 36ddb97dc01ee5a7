"""``natsrt worker`` with real processes: what it loads, how it ends, how workers are kept running."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Set
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from autogen_core import AgentId, TopicId

from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from tests.support.cli import natsrt
from tests.support.processes import Process, Processes, eventually

AGENTS = """
import asyncio, os, time
from autogen_core import MessageContext, RoutedAgent, event, rpc, type_subscription, TypeSubscription

import natsrt

VERSION = "one"


@type_subscription("news")
class Echo(RoutedAgent):
    def __init__(self):
        super().__init__("Echoes")

    @rpc
    async def echo(self, message: str, ctx: MessageContext) -> str:
        if message.startswith("wait"):
            print("waiting in", os.getpid(), flush=True)
            await asyncio.sleep(float(message.split()[1]))
        if message == "die":
            os._exit(9)
        if message == "block":
            print("blocking", flush=True)
            time.sleep(1000)
        return f"{VERSION} {self.id} {os.getpid()} {message}"

    @event
    async def read(self, message: dict, ctx: MessageContext) -> None:
        print(f"news for {self.id}: {message}", flush=True)


@type_subscription("news")
class Named(Echo):
    def __init__(self, name):
        super().__init__()


def named():
    return Named("n")


async def later():
    await asyncio.sleep(0)
    return Named("n")


class Office:
    @staticmethod
    async def open(runtime):
        await natsrt.register(runtime, Echo, "first", Echo)
        await natsrt.register(runtime, Echo, "second", Echo)


def sync(runtime):
    return Office.open(runtime)


def with_default(runtime=None):
    return Office.open(runtime)
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A directory with the module ``office``."""
    directory = tmp_path / "app"
    directory.mkdir()
    (directory / "office.py").write_text(AGENTS)
    return directory


@pytest.fixture
async def client(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        yield runtime


Start = Callable[..., Process]


@pytest.fixture
def start(server: EmbeddedServer, namespace: str, processes: Processes, app: Path) -> Start:
    """Start a worker in ``app``, on the shared server and in this test's namespace."""

    def start(*arguments: str, **how: object) -> Process:
        where = ("--server", server.url, "--namespace", namespace)
        return processes.natsrt("worker", *where, *arguments, **{"name": "worker", "cwd": app, **how})  # type: ignore[arg-type]

    return start


async def pid_of(client: NatsAgentRuntime, agent_type: str = "echo") -> int:
    """The process that answers."""
    reply = await client.send_message("who", AgentId(agent_type, "k"))
    return int(reply.split()[2])


def children_of(pid: int) -> list[int]:
    """The processes that ``pid`` has started and that run."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [int(child) for child, parent, state in rows if int(parent) == pid and not state.startswith("Z")]


async def _busy(supervisor: Process) -> int:
    """The worker process that has said that it waits."""
    line = await supervisor.wait_for_line(re.compile(r"^waiting in \d+"))
    return int(line.split()[2])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@asynccontextmanager
async def _running(call: Awaitable[str]) -> AsyncIterator[asyncio.Future[str]]:
    """A call under way, which does not outlive the block."""
    task = asyncio.ensure_future(call)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# -- what it loads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "types"),
    [
        (("office:Office.open",), "first, second"),
        (("office:sync",), "first, second"),
        (("office:with_default",), "first, second"),
        (("office:Echo",), "Echo"),
        (("office:Echo", "--type", "my.echo"), "my.echo"),
        (("office:named",), "named"),
        (("office:later", "--type", "x"), "x"),
    ],
)
async def test_a_worker_hosts_what_its_target_makes(
    start: Start, client: NatsAgentRuntime, target: tuple[str, ...], types: str
) -> None:
    worker = start(*target)
    line = await worker.wait_for_line(" ready: types ")
    assert line.endswith(f" ready: types {types}")
    assert line.startswith("worker ")
    for agent_type in types.split(", "):
        for key in ("default", "k"):
            reply = await client.send_message("hi", AgentId(agent_type, key))
            assert reply == f"one {agent_type}/{key} {worker.pid} hi"
        await client.publish_message({"headline": "42"}, TopicId("news", "default"))
        await worker.wait_for_line(f"news for {agent_type}/default: ")
        await client.publish_message({"headline": "43"}, TopicId(f"{agent_type}:", "direct"))
        await worker.wait_for_line(f"news for {agent_type}/direct: ")


async def test_the_agent_that_is_made_at_the_start_is_the_default_one(
    start: Start, client: NatsAgentRuntime, app: Path
) -> None:
    (app / "counted.py").write_text(
        "from office import Echo\n"
        "made = []\n"
        "def factory():\n"
        "    agent = Echo()\n"
        "    made.append(agent)\n"
        "    print(f'made {len(made)}: {agent.id}', flush=True)\n"
        "    return agent\n"
    )
    worker = start("counted:factory", "--type", "echo")
    await worker.wait_for_line("ready")
    await client.send_message("hi", AgentId("echo", "default"))
    await client.send_message("hi", AgentId("echo", "other"))
    assert re.findall(r"made .*", worker.stdout) == ["made 1: echo/default", "made 2: echo/other"]


async def test_another_directory_is_importable_and_only_that(start: Start, app: Path, tmp_path: Path) -> None:
    worker = start("office:Echo", "--app-dir", str(app), cwd=tmp_path)
    await worker.wait_for_line("ready: types Echo")
    without = start("office:Echo", cwd=tmp_path)
    assert await without.wait() == 2


async def test_a_factory_may_start_the_runtime_to_send_messages(start: Start, app: Path) -> None:
    (app / "sending.py").write_text(
        "import natsrt\nfrom autogen_core import AgentId\nfrom office import Echo\n"
        "async def factory(runtime):\n"
        "    await natsrt.register(runtime, Echo, 'echo', Echo)\n"
        "    await runtime.start()\n"
        "    print(await runtime.send_message('hello', AgentId('echo', 'k')), flush=True)\n"
    )
    worker = start("sending:factory")
    await worker.wait_for_line("one echo/k")
    await worker.wait_for_line("ready: types echo")


# -- what cannot be loaded ---------------------------------------------------------------------------------------

BROKEN = {
    "no_such_module:factory": (2, "there is no module 'no_such_module'"),
    "office.part:factory": (2, "there is no module 'office.part'"),
    "office": (2, "must be MODULE:NAME"),
    "office.py:Echo": (2, "must be the name of a module, not a path: office:Echo"),
    "office:Ecko": (2, "'office' has no name 'Ecko'; it has Echo"),
    "office:Office.opne": (2, "'office.Office' has no name 'opne'; it has open"),
    "office:VERSION": (2, "office:VERSION is str, not a factory"),
    "office:Named": (2, "the agent class office:Named needs arguments (name)"),
    "office:Office": (2, "is a class, but not one of agents"),
    "broken:factory": (2, "broken.py, line 3, in <module>\n    ratio = 1 / 0"),
    "imports_missing:factory": (2, "No module named 'missing_dependency'"),
    "no_python:factory": (2, "SyntaxError"),
    "leaves:factory": (2, "the module 'leaves' cannot be imported: SystemExit: 3"),
    "raising:takes_runtime": (1, "raising:takes_runtime raised: ValueError: bad luck"),
    "raising:makes_agent": (1, 'raising.py, line 9, in helper\n    raise ValueError("bad luck")'),
    "raising:Agent": (1, "raising:Agent raised: KeyError: 'API_KEY'"),
    "raising:makes_nothing": (2, "raising:makes_nothing returned NoneType, not an agent"),
    "raising:takes_two": (2, "raising:takes_two takes 2 arguments (a, b)"),
    "raising:registers_twice": (1, "Agent with type echo already exists."),
    "raising:registers_as_autogen": (1, "natsrt.register(runtime, Echo, …) does\n"),
}

MODULES = {
    "broken.py": "def factory(runtime): ...\n\nratio = 1 / 0\n",
    "imports_missing.py": "import missing_dependency\n",
    "no_python.py": "def factory(:\n",
    "leaves.py": "import sys\nsys.exit(3)\n",
    "raising.py": """
import os
from autogen_core import RoutedAgent
from office import Echo
import natsrt


def helper():
    raise ValueError("bad luck")

async def takes_runtime(runtime):
    helper()

def makes_agent():
    helper()

class Agent(RoutedAgent):
    def __init__(self):
        super().__init__(os.environ["API_KEY"])

def makes_nothing():
    pass

def takes_two(a, b):
    pass

async def registers_twice(runtime):
    await natsrt.register(runtime, Echo, "echo", Echo)
    await natsrt.register(runtime, Echo, "echo", Echo)

async def registers_as_autogen(runtime):
    await Echo.register(runtime, "echo", Echo)
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("target", BROKEN)
async def test_what_cannot_be_loaded_is_told_without_a_traceback(start: Start, app: Path, target: str) -> None:
    code, expected = BROKEN[target]
    for name, text in MODULES.items():
        (app / name).write_text(text)
    worker = start(target, "--log-level", "warning")
    assert await worker.wait(20) == code, worker.describe()
    assert worker.stderr.startswith("natsrt: ")
    assert expected in worker.stderr
    assert target.partition(":")[0] in worker.stderr
    assert "Traceback" not in worker.stderr
    assert "natsrt/" not in worker.stderr
    assert worker.stdout == ""


async def test_a_type_for_a_callable_that_registers_by_itself_is_refused(start: Start) -> None:
    worker = start("office:sync", "--type", "x")
    assert await worker.wait() == 2
    assert "--type cannot be used with office:sync" in worker.stderr


async def test_a_type_that_autogen_refuses_is_refused(start: Start) -> None:
    worker = start("office:Echo", "--type", "two words")
    assert await worker.wait() == 2
    assert "'two words' is not a valid agent type" in worker.stderr


async def test_a_factory_that_raises_leaves_nothing_registered(
    start: Start, app: Path, client: NatsAgentRuntime
) -> None:
    (app / "half.py").write_text(
        "import natsrt\nfrom office import Echo\n"
        "async def factory(runtime):\n"
        "    await natsrt.register(runtime, Echo, 'echo', Echo)\n"
        "    raise RuntimeError('halfway')\n"
    )
    worker = start("half:factory")
    assert await worker.wait() == 1
    view = client.running.registry.view
    await eventually(lambda: not view.workers_hosting("echo") and not view.workers, message="an empty registry")


# -- how it ends -------------------------------------------------------------------------------------------------


STUCK = """
import asyncio, threading, time
from autogen_core import MessageContext, RoutedAgent, rpc
import natsrt


class Stuck(RoutedAgent):
    def __init__(self):
        super().__init__("never ends")

    @rpc
    async def work(self, message: str, ctx: MessageContext) -> str:
        print("waiting", flush=True)
        if message == "thread":
            await asyncio.to_thread(time.sleep, 60)
        elif message == "own thread":
            threading.Thread(target=time.sleep, args=(60,), name="my-thread").start()
        else:
            self.task = asyncio.create_task(stubborn(), name="my-task")
            if message == "handler":
                await stubborn()
        return "done"


class Closing(RoutedAgent):
    def __init__(self):
        super().__init__("does not close")

    @rpc
    async def work(self, message: str, ctx: MessageContext) -> str:
        return message

    async def close(self):
        await stubborn()


async def register_agents(runtime):
    print("registering", flush=True)
    await stubborn()


async def stubborn():
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass
"""


@pytest.mark.parametrize(
    ("message", "named"),
    [("thread", "thread "), ("own thread", "thread my-thread"), ("task", "task my-task"), ("handler", "task")],
)
async def test_a_worker_ends_after_its_stop_whatever_goes_on_in_it(
    start: Start, client: NatsAgentRuntime, app: Path, message: str, named: str
) -> None:
    (app / "stuck.py").write_text(STUCK)
    worker = start("stuck:Stuck", "--type", "stuck", env={"NATSRT_DRAIN_TIMEOUT": "0.5"})
    await worker.wait_for_line("ready")
    async with _running(client.send_message(message, AgentId("stuck", "k"))):
        await worker.wait_for_line("waiting")
        worker.terminate()
        assert await worker.wait(15) == 9
    (line,) = (line for line in worker.stderr.splitlines() if "still running 3 s after the stop: " in line)
    assert named in line and "shutdown" not in line


async def test_a_worker_ends_although_an_agent_does_not_close(
    start: Start, client: NatsAgentRuntime, app: Path
) -> None:
    (app / "stuck.py").write_text(STUCK)
    worker = start("stuck:Closing", "--type", "stuck", env={"NATSRT_DRAIN_TIMEOUT": "0.5"})
    await worker.wait_for_line("ready")
    assert await client.send_message("hello", AgentId("stuck", "k")) == "hello"
    worker.terminate()
    assert await worker.wait(15) == 9
    assert "still running 3.5 s after the stop: task Task-1 at stuck.py:" in worker.stderr


async def test_a_worker_ends_although_its_target_never_ends_registering(start: Start, app: Path) -> None:
    (app / "stuck.py").write_text(STUCK)
    worker = start("stuck:register_agents")
    await worker.wait_for_line("registering")
    worker.terminate()
    assert await worker.wait(15) == 9
    assert "still running 3 s after the stop: " in worker.stderr and " at stuck.py:" in worker.stderr


async def test_a_second_signal_ends_a_start_at_once(start: Start, app: Path) -> None:
    (app / "stuck.py").write_text(STUCK)
    worker = start("stuck:register_agents", env={"NATSRT_DRAIN_TIMEOUT": "60"})
    await worker.wait_for_line("registering")
    worker.terminate()
    await asyncio.sleep(0.6)  # signals within half a second are one
    worker.terminate()
    assert await worker.wait(15) == 9
    assert "still running 0 s after the stop: " in worker.stderr


async def test_a_supervisor_ends_as_its_workers_end(start: Start, client: NatsAgentRuntime, app: Path) -> None:
    (app / "stuck.py").write_text(STUCK)
    worker = start("stuck:Stuck", "--type", "stuck", "--processes", "2", env={"NATSRT_DRAIN_TIMEOUT": "0.5"})
    await client.wait_for("stuck", timeout=30)
    async with _running(client.send_message("handler", AgentId("stuck", "k"))):
        await worker.wait_for_line("waiting")
        worker.terminate()
        assert await worker.wait(30) == 9


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_ends_a_worker_with_exit_code_0(start: Start, client: NatsAgentRuntime, signum: int) -> None:
    worker = start("office:Echo", "--type", "echo")
    await worker.wait_for_line("ready")
    worker.send_signal(signum)
    assert await worker.wait() == 0
    assert "Traceback" not in worker.stderr
    await eventually(lambda: not client.running.registry.view.workers, message="it left the registry")


async def test_two_signals_at_once_are_one(start: Start, client: NatsAgentRuntime) -> None:
    worker = start("office:Echo", "--type", "echo")
    await worker.wait_for_line("ready")
    async with _running(client.send_message("wait 1.5", AgentId("echo", "k"))) as reply:
        await worker.wait_for_line("waiting")
        worker.interrupt()
        await worker.wait_for_line("finishing 1 handlers")
        worker.terminate()
        assert (await reply).endswith("wait 1.5")
    assert await worker.wait() == 0


@pytest.mark.slow
async def test_a_worker_finishes_what_it_does_and_a_second_signal_ends_it(
    start: Start, client: NatsAgentRuntime
) -> None:
    worker = start("office:Echo", "--type", "echo")
    await worker.wait_for_line("ready")
    call = client.send_message("wait 1", AgentId("echo", "k"))
    async with _running(call) as reply:
        await worker.wait_for_line("waiting")
        worker.terminate()
        assert (await reply).endswith("wait 1")
    assert await worker.wait() == 0

    worker = start("office:Echo", "--type", "echo")
    await worker.wait_for_line("ready")
    async with _running(client.send_message("wait 60", AgentId("echo", "k"))) as reply:
        await worker.wait_for_line("waiting")
        worker.terminate()
        await worker.wait_for_line("finishing 1 handlers")
        await asyncio.sleep(0.6)  # signals within half a second are one
        worker.terminate()
        assert await worker.wait() == 8
        with pytest.raises(Exception, match="stopped before its handler"):
            await reply


async def test_a_signal_before_there_is_a_connection_ends_it_too(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        url = f"nats://127.0.0.1:{silent.getsockname()[1]}"
        worker = start("office:Echo", "--timeout", "1m", "--server", url)
        silent.settimeout(20)
        connection, _ = await asyncio.to_thread(silent.accept)
        with connection:
            worker.terminate()
            assert await worker.wait() == 0


async def test_no_server_is_exit_code_3(start: Start) -> None:
    worker = start("office:Echo", "--server", "nats://127.0.0.1:1", "--timeout", "500ms")
    assert await worker.wait() == 3
    assert "no NATS server answered" in worker.stderr


@pytest.mark.slow
async def test_an_embedded_server_is_started_only_where_none_answers(processes: Processes, app: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"nats://127.0.0.1:{free.getsockname()[1]}"
    first = processes.natsrt("worker", "office:Echo", "--embedded", "--server", url, name="first", cwd=app)
    await first.wait_for_line(f"no server answered: started one at {url}")
    await first.wait_for_line("ready")
    second = processes.natsrt("worker", "office:named", "--embedded", "--server", url, name="second", cwd=app)
    await second.wait_for_line("ready")
    assert "started one" not in second.stderr
    rows = (await natsrt("agents", "ls", "--json", "--server", url)).json
    assert [row["type"] for row in rows] == ["Echo", "named"]
    second.terminate()
    assert await second.wait() == 0
    first.terminate()
    assert await first.wait() == 0
    assert (await natsrt("agents", "ls", "--server", url, "--timeout", "500ms")).code == 3


async def test_an_embedded_server_elsewhere_is_refused(start: Start) -> None:
    worker = start("office:Echo", "--embedded", "--server", "nats://192.0.2.1:4222")
    assert await worker.wait(20) == 3
    assert "on this machine only" in worker.stderr


# -- several processes -------------------------------------------------------------------------------------------


async def workers_of(client: NatsAgentRuntime, count: int, without: Set[int] = frozenset()) -> dict[int, str]:
    """Wait until ``count`` live workers host ``echo``: their ids by process id, none of which is in ``without``."""

    def hosting() -> dict[int, str]:
        view = client.running.registry.view
        found = {view.workers[w].pid: w for w in view.workers_hosting("echo")}
        return found if len(found) == count and not without & {*found} else {}

    return await eventually(hosting, 30, f"{count} workers")


async def ready(supervisor: Process, count: int) -> None:
    """Wait until ``count`` workers are ready: a moment after they are registered, and only then can they hang."""
    await eventually(lambda: supervisor.stdout.count("ready: types") == count, 30, f"{count} workers that are ready")


@pytest.mark.slow
async def test_a_killed_worker_process_is_replaced(start: Start, client: NatsAgentRuntime) -> None:
    supervisor = start("office:Echo", "--type", "echo", "--processes", "2")
    before = await workers_of(client, 2)
    assert supervisor.pid not in before
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    await supervisor.wait_for_line(f"worker process {victim} was ended by SIGKILL; another one starts in 0.2 s")
    after = await workers_of(client, 2, without={victim})
    assert len({*before} & {*after}) == 1
    assert await pid_of(client) in after
    supervisor.terminate()
    assert await supervisor.wait(20) == 0
    assert not any(is_alive(pid) for pid in after)


@pytest.mark.slow
async def test_pauses_grow_from_one_quick_death_to_the_next(start: Start, app: Path) -> None:
    (app / "dying.py").write_text(
        "import os, threading\nimport natsrt\nfrom office import Echo\n"
        "async def factory(runtime):\n"
        "    await natsrt.register(runtime, Echo, 'echo', Echo)\n"
        "    threading.Timer(0.3, lambda: os._exit(9)).start()\n"
    )
    supervisor = start("dying:factory", "--processes", "1", "--reload")
    for pause in ("0.2", "0.4", "0.8"):
        await supervisor.wait_for_line(f"ended with exit code 9; another one starts in {pause} s", 30)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_to_the_supervisor_stops_all_in_order(
    start: Start, client: NatsAgentRuntime, signum: int
) -> None:
    supervisor = start("office:Echo", "--type", "echo", "--processes", "2")
    pids = {*await workers_of(client, 2)}
    async with _running(client.send_message("wait 1", AgentId("echo", "k"))) as reply:
        await supervisor.wait_for_line("waiting")
        supervisor.send_signal(signum)
        assert (await reply).endswith("wait 1")
    assert await supervisor.wait(20) == 0
    assert not any(is_alive(pid) for pid in pids)
    assert not client.running.registry.view.workers


@pytest.mark.slow
async def test_a_second_signal_to_the_supervisor_stops_all_at_once(start: Start, client: NatsAgentRuntime) -> None:
    supervisor = start("office:Echo", "--type", "echo", "--processes", "2")
    pids = {*await workers_of(client, 2)}
    async with _running(client.send_message("wait 60", AgentId("echo", "k"))):
        await supervisor.wait_for_line("waiting")
        supervisor.terminate()
        await supervisor.wait_for_line("finishing 1 handlers")
        await asyncio.sleep(0.6)  # signals within half a second are one
        supervisor.terminate()
        assert await supervisor.wait(20) == 8
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.slow
async def test_a_worker_that_hangs_does_not_hold_up_the_stop_and_the_exit_code_says_so(
    start: Start, client: NatsAgentRuntime
) -> None:
    options = ("--processes", "2", "--hang-timeout", "5")
    supervisor = start("office:Echo", "--type", "echo", *options, env={"NATSRT_DRAIN_TIMEOUT": "6"})
    await ready(supervisor, 2)
    pids = {*await workers_of(client, 2)}
    async with _running(client.send_message("block", AgentId("echo", "k"))):
        await supervisor.wait_for_line("blocking")
        supervisor.terminate()
        await supervisor.wait_for_line("hangs: its event loop has not run for", 20)
        assert await supervisor.wait(20) == 8
    assert "killing it" in supervisor.stderr
    assert "did not stop in time" not in supervisor.stderr
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.slow
async def test_a_worker_that_is_killed_at_a_stop_before_it_is_ready_is_told_in_the_exit_code(
    start: Start, app: Path
) -> None:
    (app / "deaf.py").write_text("import time\nasync def factory(runtime):\n    print('deaf')\n    time.sleep(60)\n")
    supervisor = start("deaf:factory", "--processes", "2", env={"NATSRT_DRAIN_TIMEOUT": "0.1"})
    await supervisor.wait_for_line("deaf", 30)
    supervisor.terminate()
    assert await supervisor.wait(30) == 8
    assert "did not stop in time: killing it" in supervisor.stderr


@pytest.mark.slow
async def test_a_worker_that_is_killed_while_it_finishes_its_handlers_counts_as_cut_short(
    start: Start, client: NatsAgentRuntime
) -> None:
    supervisor = start("office:Echo", "--type", "echo", "--processes", "2")
    await workers_of(client, 2)
    async with _running(client.send_message("wait 60", AgentId("echo", "k"))):
        await supervisor.wait_for_line("waiting")
        busy = await asyncio.wait_for(_busy(supervisor), 5)
        supervisor.terminate()
        await supervisor.wait_for_line("finishing 1 handlers")
        os.kill(busy, signal.SIGKILL)  # as the system does when memory is short
        assert await supervisor.wait(20) == 8


@pytest.mark.slow
async def test_no_worker_outlives_a_killed_supervisor(start: Start, client: NatsAgentRuntime) -> None:
    supervisor = start("office:Echo", "--type", "echo", "--processes", "2")
    pids = {*await workers_of(client, 2)}
    supervisor.kill()
    await eventually(lambda: not any(is_alive(pid) for pid in pids), 15, "the end of the workers")


@pytest.mark.slow
async def test_a_worker_finishes_what_it_does_when_its_supervisor_and_the_guard_were_killed(
    start: Start, client: NatsAgentRuntime
) -> None:
    supervisor = start("office:Echo", "--type", "echo", "--processes", "2")
    pids = {*await workers_of(client, 2)}
    async with _running(client.send_message("wait 1", AgentId("echo", "k"))) as reply:
        await supervisor.wait_for_line("waiting")
        (guard,) = {*children_of(supervisor.pid)} - pids
        os.kill(guard, signal.SIGKILL)
        supervisor.kill()
        assert (await reply).endswith("wait 1")
    await eventually(
        lambda: not any(is_alive(pid) for pid in pids), 4, "the end of the workers, before they are killed"
    )
    assert "the supervisor has ended: stopping" in supervisor.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["its guard was killed too", "the worker has left its group"])
async def test_a_worker_that_hangs_does_not_outlive_a_killed_supervisor(
    start: Start, client: NatsAgentRuntime, app: Path, how: str
) -> None:
    if how == "the worker has left its group":
        (app / "office.py").write_text(AGENTS + "\nos.setpgid(0, 0)\n")
    supervisor = start("office:Echo", "--type", "echo", "--processes", "2")
    pids = {*await workers_of(client, 2)}
    async with _running(client.send_message("block", AgentId("echo", "k"))):
        await supervisor.wait_for_line("blocking")
        if how == "its guard was killed too":
            (guard,) = {*children_of(supervisor.pid)} - pids
            os.kill(guard, signal.SIGKILL)
        supervisor.kill()
        await eventually(lambda: not any(is_alive(pid) for pid in pids), 15, "the end of the workers")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--processes", "--reload"])
@pytest.mark.parametrize("frozen", [False, True])
async def test_a_worker_that_hangs_is_replaced(start: Start, client: NatsAgentRuntime, how: str, frozen: bool) -> None:
    options = ("--processes", "2") if how == "--processes" else ("--reload",)
    supervisor = start("office:Echo", "--type", "echo", *options, "--hang-timeout", "5")
    count = 2 if how == "--processes" else 1
    await ready(supervisor, count)
    before = {*await workers_of(client, count)}
    victim = await pid_of(client)
    # With a frozen worker, the call must not block the other one, which may get it.
    async with _running(client.send_message("hello" if frozen else "block", AgentId("echo", "k"))) as call:
        if frozen:
            os.kill(victim, signal.SIGSTOP)
        else:
            await supervisor.wait_for_line("blocking")
        hangs = await supervisor.wait_for_line("hangs: its event loop has not run for", 20)
        victim = int(re.findall(r"worker process (\d+) hangs", hangs)[0])
        assert victim in before
        await supervisor.wait_for_line(f"worker process {victim} was ended by SIGKILL; another one starts in", 5)
        after = await workers_of(client, count, without={victim})
        assert len(before & {*after}) == count - 1
        await asyncio.wait({call}, timeout=20)
    assert supervisor.stderr.count("hangs") == 1
    supervisor.terminate()
    assert await supervisor.wait(20) == 0
    assert not any(is_alive(pid) for pid in {*before, *after})


@pytest.mark.slow
async def test_a_worker_that_works_and_a_factory_that_blocks_do_not_hang(
    start: Start, client: NatsAgentRuntime, app: Path
) -> None:
    (app / "slow.py").write_text(
        "import time\nimport natsrt\nfrom office import Echo\n"
        "async def factory(runtime):\n"
        "    time.sleep(7)\n"
        "    await natsrt.register(runtime, Echo, 'echo', Echo)\n"
    )
    supervisor = start("slow:factory", "--processes", "2", "--hang-timeout", "5")
    await workers_of(client, 2)
    assert (await client.send_message("wait 7", AgentId("echo", "k"))).endswith("wait 7")
    assert "hangs" not in supervisor.stderr
    supervisor.terminate()
    assert await supervisor.wait(20) == 0


FAILING = """
import asyncio, os, sys
import natsrt_cli
from natsrt_cli import supervisor, watching

start = asyncio.create_subprocess_exec

async def fail(*arguments, **how):
    asyncio.create_subprocess_exec = start
    raise BlockingIOError(11, "Resource temporarily unavailable")

async def watch(self, stop):
    while not os.path.exists("no more"):
        await asyncio.sleep(0.1)
    raise OSError("no more files can be watched")
    yield

what = sys.argv.pop(1)
if what == "any exception":
    supervisor._how = lambda code: 1 / 0
elif what == "no process":
    asyncio.create_subprocess_exec = fail
elif what == "no watch":
    watching.Watched.changes = watch
natsrt_cli.main()
"""
"""``natsrt``, in which one thing fails."""


@pytest.fixture
def failing(server: EmbeddedServer, namespace: str, processes: Processes, app: Path) -> Start:
    def start(what: str, *arguments: str) -> Process:
        target = ("worker", "office:Echo", "--type", "echo", "--server", server.url, "--namespace", namespace)
        return processes.python(FAILING, what, *target, *arguments, name="supervisor", cwd=app)

    return start


@pytest.mark.slow
async def test_no_worker_outlives_a_supervisor_that_an_exception_ends(failing: Start, client: NatsAgentRuntime) -> None:
    supervisor = failing("any exception", "--processes", "3")
    pids = {*await workers_of(client, 3)}
    async with _running(client.send_message("wait 1", AgentId("echo", "k"))) as reply:
        await supervisor.wait_for_line("waiting")
        busy = await asyncio.wait_for(_busy(supervisor), 5)
        os.kill(min(pids - {busy}), signal.SIGKILL)
        assert (await reply).endswith("wait 1")  # the others end in order
    assert await supervisor.wait(20) == 1
    assert "the supervisor has failed: stopping all workers" in supervisor.stderr
    assert "ZeroDivisionError" in supervisor.stderr
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.slow
async def test_a_worker_that_the_system_cannot_start_is_tried_again(failing: Start, client: NatsAgentRuntime) -> None:
    supervisor = failing("no process", "--processes", "2")
    await workers_of(client, 2)
    line = "a worker process cannot be started: Resource temporarily unavailable; another one starts in 0.2 s"
    assert line in supervisor.stderr
    supervisor.terminate()
    assert await supervisor.wait(20) == 0


@pytest.mark.slow
async def test_files_that_cannot_be_watched_any_more_end_the_supervisor(
    failing: Start, client: NatsAgentRuntime, app: Path
) -> None:
    supervisor = failing("no watch", "--reload")
    (pid,) = await workers_of(client, 1)
    (app / "no more").touch()
    assert await supervisor.wait(30) == 1
    assert "files can no longer be watched: no more files can be watched; stopping all workers" in supervisor.stderr
    assert not is_alive(pid)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "code"), [("broken:factory", 2), ("raising:takes_runtime", 1), ("no_such_module:x", 2)]
)
async def test_workers_that_cannot_be_started_are_not_tried_for_ever(
    start: Start, app: Path, target: str, code: int
) -> None:
    for name, text in MODULES.items():
        (app / name).write_text(text)
    supervisor = start(target, "--processes", "2")
    assert await supervisor.wait(30) == code
    assert "a worker cannot be started: stopping all workers" in supervisor.stderr
    assert target.partition(":")[0] in supervisor.stderr


@pytest.mark.slow
async def test_workers_without_a_server_end_with_exit_code_3(start: Start) -> None:
    supervisor = start("office:Echo", "--processes", "2", "--server", "nats://127.0.0.1:1", "--timeout", "500ms")
    assert await supervisor.wait(30) == 3


@pytest.mark.slow
async def test_workers_of_one_embedded_server(processes: Processes, app: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"nats://127.0.0.1:{free.getsockname()[1]}"
    target = ("office:Echo", "--type", "echo", "--processes", "2", "--embedded", "--server", url)
    supervisor = processes.natsrt("worker", *target, cwd=app)
    await supervisor.wait_for_line("started one")
    async with NatsAgentRuntime(url) as client:
        await workers_of(client, 2)
    supervisor.terminate()
    assert await supervisor.wait(20) == 0


# -- reloading ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_changed_file_is_picked_up(start: Start, client: NatsAgentRuntime, app: Path) -> None:
    supervisor = start("office:Echo", "--type", "echo", "--reload")
    before = {*await workers_of(client, 1)}
    assert (await client.send_message("hi", AgentId("echo", "k"))).startswith("one ")
    (app / "office.py").write_text(AGENTS.replace('"one"', '"two"'))
    await supervisor.wait_for_line("changed: office.py; restarting the workers")
    await workers_of(client, 1, without=before)
    assert (await client.send_message("hi", AgentId("echo", "k"))).startswith("two ")
    supervisor.terminate()
    assert await supervisor.wait(20) == 0


@pytest.mark.slow
async def test_a_broken_file_is_waited_for(start: Start, client: NatsAgentRuntime, app: Path) -> None:
    (app / "office.py").write_text("def broken(:\n")
    supervisor = start("office:Echo", "--type", "echo", "--reload")
    await supervisor.wait_for_line("waiting for a file to change", 20)
    assert "SyntaxError" in supervisor.stderr
    (app / "office.py").write_text(AGENTS)
    await workers_of(client, 1)
    supervisor.interrupt()
    assert await supervisor.wait(20) == 0


@pytest.mark.slow
async def test_reload_include_restarts_for_other_files_too(start: Start, app: Path) -> None:
    (app / "prompts" / "deep").mkdir(parents=True)
    patterns = ("--reload-include", "*.yaml", "--reload-include", "./prompts/")
    supervisor = start("office:Echo", "--type", "echo", "--reload", *patterns)
    for number, name in enumerate(("settings.yaml", "prompts/deep/one.txt", "more.py"), 1):
        await eventually(lambda count=number: supervisor.stdout.count("ready: types") == count, 20)
        (app / "ignored.txt").write_text(name)
        (app / name).write_text("# changed")
        await supervisor.wait_for_line(f"changed: {Path(name).name}; restarting")
    assert "ignored.txt" not in supervisor.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--reload-include", "*.yaml"), "--reload-include has no effect without --reload"),
        (("--reload", "--reload-include", "/etc/*"), "'/etc/*' must be a pattern for files below --app-dir"),
        (("--reload", "--reload-include", "../x"), "'../x' must be a pattern for files below --app-dir"),
        (("--reload", "--reload-include", ""), "'' must be a pattern for files below --app-dir"),
    ],
)
async def test_a_pattern_that_no_file_can_match_is_refused(start: Start, arguments: tuple[str, ...], text: str) -> None:
    supervisor = start("office:Echo", "--type", "echo", *arguments)
    assert await supervisor.wait() == 2
    assert text in supervisor.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--hang-timeout", "60"), "--hang-timeout has no effect without --processes or --reload"),
        (("--hang-timeout", "1", "--reload"), "is not a duration such as 60, 90s or 5m, a number of seconds from 5 to"),
    ],
)
async def test_a_hang_timeout_that_cannot_work_is_refused(start: Start, arguments: tuple[str, ...], text: str) -> None:
    worker = start("office:Echo", "--type", "echo", *arguments)
    assert await worker.wait() == 2
    assert text in worker.stderr


async def test_without_watchfiles_reload_names_the_extra(start: Start, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "watchfiles.py").write_text("raise ImportError('as if it were not installed')\n")
    supervisor = start("office:Echo", "--reload", env={"PYTHONPATH": str(hidden)})
    assert await supervisor.wait() == 2
    assert "pip install 'natsrt[reload]'" in supervisor.stderr
