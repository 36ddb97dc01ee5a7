"""Health: what a runtime says of itself, and what probes over HTTP are told, with servers and loops that stop."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
import yaml
from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
from natsrt_cli.health import PATIENCE

import natsrt
from benchmarks.chaos.proxy import Proxy
from natsrt import Health, NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from tests.support.calls import known, running
from tests.support.cli import natsrt as command
from tests.support.documents import blocks
from tests.support.processes import Process, Processes, eventually

NOTICED = 15.0
"""Seconds within which a runtime notices that its server hangs, and that it is back, on a slow machine."""

AGENTS = """
import asyncio, os, time
from autogen_core import MessageContext, RoutedAgent, rpc

class Sleeper(RoutedAgent):
    def __init__(self):
        super().__init__("sleeps")

    @rpc
    async def sleep(self, message: str, ctx: MessageContext) -> str:
        how, what = message.split()
        print(f"begins {how}", flush=True)
        if how == "block":
            os.close(os.open(what, os.O_RDONLY))  # of a pipe that nobody has opened for writing yet
        elif how == "labor":
            until = time.monotonic() + float(what)
            while time.monotonic() < until:
                time.sleep(1.8)
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(float(what))
        return message
"""
SLEEPER = AgentId("sleeper", "default")


# -- what a runtime says ---------------------------------------------------------------------------------------------


class Counter(RoutedAgent):
    def __init__(self, go_on: asyncio.Event) -> None:
        super().__init__("counts")
        self._go_on = go_on

    @message_handler
    async def count(self, message: int, ctx: MessageContext) -> int:
        await self._go_on.wait()
        return message + 1


def says(health: Health, *reasons: str) -> None:
    """The runtime is not ready, for reasons that contain these texts."""
    assert not health.ready
    assert len(health.reasons) == len(reasons), health
    for reason, text in zip(health.reasons, reasons, strict=True):
        assert text in reason and reason.endswith((".", "keeps trying.")), health


async def test_a_runtime_that_is_not_started_is_neither_live_nor_ready(server: EmbeddedServer, namespace: str) -> None:
    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    assert runtime.health() == Health(live=False, ready=False, reasons=("It was not started.",))
    starting = runtime.start()
    assert runtime.health().live
    assert runtime.health().reasons[0] == "Its start is not complete."
    await starting
    assert runtime.health().ready
    await runtime.stop()
    assert runtime.health() == Health(live=False, ready=False, reasons=("It was stopped.",))
    await runtime.start()
    assert runtime.health().ready
    await runtime.close()


async def test_a_start_that_failed_tells_why() -> None:
    runtime = NatsAgentRuntime("nats://user:secret@127.0.0.1:1", connect_timeout=0.3)
    with pytest.raises(natsrt.ServerUnreachable):
        await runtime.start()
    health = runtime.health()
    assert not health.live
    says(health, "Its start failed: no NATS server answered")
    assert "secret" not in str(health)


async def test_a_ready_runtime_shows_its_figures(server: EmbeddedServer, namespace: str) -> None:
    go_on = asyncio.Event()
    async with running(server.url, namespace, name="figures") as runtime:
        await natsrt.register(runtime, Counter, "counter", lambda: Counter(go_on))
        calls = [asyncio.ensure_future(runtime.send_message(n, AgentId("counter", f"k{n % 2}"))) for n in range(3)]
        await eventually(lambda: runtime.health().handlers_running == 3)
        health = runtime.health()
        assert (health.live, health.ready, health.reasons, health.draining) == (True, True, (), False)
        assert health.worker_id == runtime.worker_id and health.uptime_seconds > 0
        assert f"nats://{health.server}" == server.url
        assert (health.connected, health.in_step, health.workers, health.reconnects) == (True, True, 1, 0)
        assert health.agents == {"counter": 2}
        assert (health.calls_pending, health.sends_under_way) == (3, 3)
        assert health.max_pending_bytes == runtime.options.max_pending_bytes
        go_on.set()
        assert sorted(await asyncio.gather(*calls)) == [1, 2, 3]
        await eventually(lambda: runtime.health().messages_handled == 3)
        health = runtime.health()
        assert (health.calls_pending, health.sends_under_way, health.pending_bytes) == (0, 0, 0)
        assert (health.messages_failed, health.undecodable, health.dropped_events) == (0, 0, 0)


async def test_what_could_not_be_read_is_counted(server: EmbeddedServer, namespace: str) -> None:
    async with running(server.url, namespace, "laborer") as runtime:
        await runtime.running.connection.publish(
            f"{namespace}.agent.laborer", b'{"specversion":"1.0","type":"natsrt.?"}'
        )
        await eventually(lambda: runtime.health().undecodable == 1)
        assert runtime.health().messages_failed == 1
        assert runtime.health().ready
    stopped = runtime.health()
    assert not stopped.live and (stopped.undecodable, stopped.messages_failed) == (1, 1)


async def test_a_draining_runtime_says_so(server: EmbeddedServer, namespace: str) -> None:
    go_on = asyncio.Event()
    async with running(server.url, namespace) as runtime, running(server.url, namespace) as caller:
        await natsrt.register(runtime, Counter, "counter", lambda: Counter(go_on))
        await known(caller, "counter")
        call = asyncio.ensure_future(caller.send_message(1, AgentId("counter", "k")))
        await eventually(lambda: runtime.health().handlers_running)
        stopping = asyncio.ensure_future(runtime.stop())
        await eventually(lambda: runtime.health().draining)
        assert runtime.health().live
        says(runtime.health(), "It is draining")
        go_on.set()
        assert await call == 2
        await stopping
        assert not runtime.health().live


async def test_a_runtime_whose_link_is_cut_is_not_ready_until_it_is_back(
    own_server: EmbeddedServer, namespace: str
) -> None:
    async with Proxy(own_server.url) as proxy, running(proxy.url, namespace, "laborer") as runtime:
        assert runtime.health().ready
        proxy.cut()
        await eventually(lambda: not runtime.health().connected)
        health = runtime.health()
        assert health.live and health.server is None and not health.in_step
        says(health, f"It is not connected to {proxy.url}; it keeps trying.")
        await proxy.restore()
        await eventually(lambda: runtime.health().ready, NOTICED)
        assert runtime.health().reconnects == 1
        assert runtime.health().agents == {"laborer": 0}


@pytest.mark.slow
async def test_a_runtime_is_not_ready_while_its_server_is_dead(own_server: EmbeddedServer, namespace: str) -> None:
    async with running(own_server.url, namespace, "laborer") as runtime:
        await own_server.kill()
        await eventually(lambda: not runtime.health().ready)
        says(runtime.health(), "It is not connected")
        await own_server.start()
        await eventually(lambda: runtime.health().ready, NOTICED)
        assert runtime.health().in_step and runtime.health().workers == 1


async def test_ready_and_the_reasons_never_contradict_each_other(own_server: EmbeddedServer, namespace: str) -> None:
    runtime = NatsAgentRuntime(own_server.url, namespace=namespace)
    contradictions, looks = [], 0
    done = asyncio.Event()

    async def look() -> None:
        nonlocal looks
        while not done.is_set():
            health = runtime.health()
            looks += 1
            if not (health.ready == runtime.ready == (not health.reasons)) or (health.ready and not health.live):
                contradictions.append(health)
            await asyncio.sleep(0)

    looking = asyncio.ensure_future(look())
    await runtime.start()
    await own_server.restart(kill=True)
    await eventually(lambda: runtime.ready, NOTICED)
    await runtime.close()
    done.set()
    await looking
    assert looks > 100 and not contradictions


def test_every_figure_is_explained() -> None:
    source = Path(natsrt.observe.health.__file__).read_text("utf-8")  # type: ignore[attr-defined]
    for figure in fields(Health):
        assert re.search(rf'^    {figure.name}: .*\n    """[A-Z].*\."""$', source, re.M), figure.name


# -- what probes are told --------------------------------------------------------------------------------------------


class Told(NamedTuple):
    status: int
    body: dict[str, Any]

    @property
    def reasons(self) -> str:
        return " ".join(self.body["reasons"])


class Probe:
    """A worker process and its endpoint."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.url = ""

    async def listening(self) -> Probe:
        """Wait until it says where it listens."""
        self.url = (await self.process.wait_for_line("health: http", timeout=20.0)).removeprefix("health: ")
        return self

    async def ready(self) -> Probe:
        """Wait until it says that it is ready."""
        await self.listening()
        await self.process.wait_for_line(" ready: types ", timeout=20.0)
        return self

    async def get(self, path: str) -> Told:
        return await get(self.url, path)

    async def status(self, path: str) -> int:
        return (await self.get(path)).status


async def get(url: str, path: str) -> Told:
    def request() -> Told:
        place = urlsplit(url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=PATIENCE + 20)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.headers["Content-Type"] == "application/json"
            return Told(answer.status, json.loads(answer.read()))
        finally:
            connection.close()

    return await asyncio.to_thread(request)


Start = Callable[..., Probe]


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A directory with the module ``bedroom``."""
    directory = tmp_path / "app"
    directory.mkdir()
    (directory / "bedroom.py").write_text(AGENTS)
    return directory


@pytest.fixture
def start(server: EmbeddedServer, namespace: str, processes: Processes, app: Path) -> Start:
    """Start a worker with sleepers and an endpoint on a free port."""

    def start(*arguments: str, url: str = server.url, target: str = "bedroom:Sleeper", **how: Any) -> Probe:
        where = ("--server", url, "--namespace", namespace, *(arguments or ("--health-port", "-1")))
        return Probe(
            processes.natsrt("worker", target, "--type", "sleeper", *where, **{"name": "worker", "cwd": app, **how})
        )

    return start


@pytest.fixture
async def caller(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    async with running(server.url, namespace) as runtime:
        yield runtime


def free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that are free."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            try:
                for number in range(port + 1, port + count):
                    socket.create_server(("127.0.0.1", number)).close()
            except (OSError, OverflowError):
                continue
            return port


async def test_a_ready_worker_answers_all_three_paths_with_its_health(start: Start) -> None:
    worker = await start().ready()
    for path in ("/livez", "/readyz", "/healthz", "/healthz?verbose"):
        told = await worker.get(path)
        assert told.status == 200
        assert told.body.keys() == asdict(Health.stopped("", {})).keys()
        assert (told.body["live"], told.body["ready"], told.body["reasons"]) == (True, True, [])
        assert told.body["agents"] == {"sleeper": 0}
        assert f"worker {told.body['worker_id']} ready" in worker.process.stdout
    told = await worker.get("/metrics")
    assert (told.status, told.body) == (404, {"error": "the paths are /livez, /readyz, /healthz"})
    worker.process.terminate()
    assert await worker.process.wait() == 0
    assert "Traceback" not in worker.process.stderr


async def test_without_the_option_nothing_listens(start: Start) -> None:
    worker = start("--health-host", "127.0.0.1")
    await worker.process.wait_for_line(" ready: types ")
    assert "health" not in worker.process.stdout


async def test_a_worker_that_is_about_to_start_is_live_and_not_ready(start: Start, app: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    (app / "slow.py").write_text(
        "import os, time\nfrom bedroom import Sleeper\n"
        f"while not os.path.exists({str(gate)!r}):\n    time.sleep(0.01)\n"
    )
    worker = await start(target="slow:Sleeper").listening()
    assert await worker.status("/livez") == 200
    told = await worker.get("/readyz")
    assert (told.status, told.reasons) == (503, "The worker is about to start.")
    gate.touch()
    await eventually(lambda: _is(worker, "/readyz", 200), 20)


async def _is(worker: Probe, path: str, status: int) -> bool:
    return await worker.status(path) == status


async def test_a_port_in_use_ends_the_worker_before_it_begins(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        worker = start("--health-port", str(port), target="no_such_module:Agent")
        assert await worker.process.wait(20) == 1
    assert worker.process.stderr == (
        f"natsrt: --health-port: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--health-port", "70000"), 2, "--health-port"),
        (("--health-port", "-1", "--health-host", "192.0.2.1"), 1, "cannot listen on 192.0.2.1:0: Cannot assign"),
    ],
)
async def test_an_address_that_cannot_be_is_refused(
    start: Start, arguments: tuple[str, ...], code: int, text: str
) -> None:
    worker = start(*arguments)
    assert await worker.process.wait(20) == code
    assert text in worker.process.stderr
    assert "Traceback" not in worker.process.stderr


async def test_port_and_host_may_come_from_the_environment(start: Start, app: Path) -> None:
    # A runtime that the module makes for itself refuses unknown variables: these are none of its own.
    (app / "two.py").write_text("import natsrt\nnatsrt.NatsAgentRuntime()\nfrom bedroom import Sleeper\n")
    port = str(free_ports(1))
    env = {"NATSRT_HEALTH_PORT": port, "NATSRT_HEALTH_HOST": "localhost"}
    worker = await start("--log-level", "warning", target="two:Sleeper", env=env).ready()
    assert worker.url == f"http://127.0.0.1:{port}"
    assert await worker.status("/readyz") == 200


async def test_a_client_that_says_nothing_keeps_nobody_from_asking(start: Start) -> None:
    worker = await start().ready()
    place = urlsplit(worker.url)
    with socket.create_connection((place.hostname or "", place.port or 0)):
        assert await worker.status("/livez") == 200
    worker.process.terminate()
    assert await worker.process.wait() == 0


@pytest.mark.slow
async def test_a_draining_worker_is_live_and_not_ready_until_it_has_ended(
    start: Start, caller: NatsAgentRuntime
) -> None:
    worker = await start().ready()
    await known(caller, "sleeper")
    call = asyncio.ensure_future(caller.send_message("wait 3", SLEEPER))
    await worker.process.wait_for_line("begins wait")
    worker.process.terminate()
    await eventually(lambda: _is(worker, "/readyz", 503))
    told = await worker.get("/healthz")
    assert told.status == 503 and told.body["draining"] and "It is draining" in told.reasons
    told = await worker.get("/livez")
    while told.body["handlers_running"]:
        assert told.status == 200
        try:
            told = await worker.get("/livez")
        except (OSError, http.client.HTTPException):  # its process has ended
            break
    assert await call == "wait 3"
    assert await worker.process.wait() == 0


@pytest.mark.slow
async def test_a_worker_whose_handler_blocks_its_event_loop_is_not_live_until_it_ends(
    start: Start, caller: NatsAgentRuntime, tmp_path: Path
) -> None:
    worker = await start().ready()
    await known(caller, "sleeper")
    os.mkfifo(tmp_path / "gate")
    call = asyncio.ensure_future(caller.send_message(f"block {tmp_path / 'gate'}", SLEEPER))
    await worker.process.wait_for_line("begins block")
    told, at_the_same_time = await asyncio.gather(worker.get("/livez"), worker.get("/readyz"))
    assert (told.status, at_the_same_time.status) == (503, 503)
    assert (told.body["live"], told.body["ready"]) == (False, False)
    assert "The event loop has not answered for 5." in told.reasons
    assert "it is in bedroom.py, line 14, in sleep" in told.reasons
    assert told.body["worker_id"] in worker.process.stdout
    loop = asyncio.get_running_loop()
    before = loop.time()
    assert await worker.status("/livez") == 503
    assert loop.time() - before < PATIENCE  # nobody waits once the loop is known to hang
    doctor = await command("doctor", "--json", "--server", caller.options.server_list[0], "--health-url", worker.url)
    (finding,) = [finding for finding in doctor.json if finding["check"] == "health"]
    assert (doctor.code, finding["level"]) == (7, "problem")
    assert "hangs. The event loop has not answered" in finding["text"]
    os.close(os.open(tmp_path / "gate", os.O_WRONLY | os.O_NONBLOCK))
    await asyncio.gather(call, return_exceptions=True)
    await eventually(lambda: _is(worker, "/livez", 200), NOTICED)
    await eventually(lambda: _is(worker, "/readyz", 200), NOTICED)
    assert worker.process.stderr.count("It is blocked here:") == 1
    assert "os.close(os.open(what, os.O_RDONLY))" in worker.process.stderr


@pytest.mark.slow
async def test_a_worker_that_labors_honestly_stays_live(start: Start, caller: NatsAgentRuntime) -> None:
    worker = await start().ready()
    await known(caller, "sleeper")
    call = asyncio.ensure_future(caller.send_message("labor 8", SLEEPER))
    await worker.process.wait_for_line("begins labor")
    probes = 0
    while not call.done():
        told = await worker.get("/livez")
        assert told.status == 200, told
        probes += 1
        await asyncio.wait({call}, timeout=0.2)
    assert await call == "labor 8"
    assert probes > 1


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True], ids=["hung", "killed"])
async def test_a_worker_without_a_server_stays_live_and_becomes_ready_again(
    start: Start, own_server: EmbeddedServer, killed: bool
) -> None:
    worker = await start(url=own_server.url).ready()
    before = (await worker.get("/healthz")).body["worker_id"]
    if killed:
        await own_server.kill()
    else:
        own_server.pause()
    await eventually(lambda: _is(worker, "/readyz", 503), NOTICED)
    told = await worker.get("/livez")
    assert told.status == 200
    assert f"It is not connected to {own_server.url}" in told.reasons
    if killed:
        await own_server.start()
    else:
        own_server.resume()
    await eventually(lambda: _is(worker, "/readyz", 200), NOTICED)
    told = await worker.get("/healthz")
    assert told.body["worker_id"] == before
    assert told.body["reconnects"] >= 1
    assert told.body["in_step"]


@pytest.mark.slow
async def test_each_of_several_worker_processes_has_a_port_of_its_own(start: Start, caller: NatsAgentRuntime) -> None:
    port = free_ports(2)
    supervisor = start("--health-port", str(port), "--processes", "2")
    urls = [f"http://127.0.0.1:{number}" for number in (port, port + 1)]

    async def worker_ids() -> set[str]:
        try:
            told = [await get(url, "/readyz") for url in urls]
        except OSError:
            return set()
        return {one.body["worker_id"] for one in told if one.status == 200}

    async def both() -> set[str]:
        found = await worker_ids()
        return found if len(found) == 2 else set()

    before = await eventually(both, 30)
    await eventually(lambda: before <= caller.running.registry.view.workers.keys())
    victim = (await get(urls[1], "/healthz")).body["worker_id"]
    os.kill(caller.running.registry.view.workers[victim].pid, signal.SIGKILL)

    async def replaced() -> bool:
        after = await both()
        return bool(after) and victim not in after and len(after & before) == 1

    await eventually(replaced, 30)
    supervisor.process.terminate()
    assert await supervisor.process.wait(20) == 0


async def test_a_port_in_use_for_one_of_several_processes_ends_all_before_they_begin(start: Start) -> None:
    port = free_ports(2)
    with socket.create_server(("127.0.0.1", port + 1)):
        supervisor = start("--health-port", str(port), "--processes", "2", target="no_such_module:Agent")
        assert await supervisor.process.wait(20) == 1
    expected = f"natsrt: --health-port: cannot listen on 127.0.0.1:{port + 1}: Address already in use\n"
    assert supervisor.process.stderr == expected


# -- doctor, and the page --------------------------------------------------------------------------------------------


async def test_doctor_shows_the_health_of_workers(start: Start, server: EmbeddedServer, namespace: str) -> None:
    worker = await start().ready()
    where = ("--server", server.url, "--namespace", namespace)
    doctor = await command(
        "doctor", "--json", *where, "--health-url", worker.url, "--health-url", f"{server.monitor_url}"
    )
    ours, other = [finding for finding in doctor.json if finding["check"] == "health"]
    assert ours["level"] == "ok"
    assert f"at {worker.url}/healthz is ready: 0 live agents" in ours["text"]
    assert other["level"] == "problem" and "does not report the health of a worker" in other["text"]
    assert doctor.code == 7


async def test_doctor_tells_what_a_worker_lost_and_why_it_is_not_ready(
    start: Start, own_server: EmbeddedServer, namespace: str
) -> None:
    worker = await start(url=own_server.url).ready()
    async with running(own_server.url, namespace) as caller:
        await caller.running.connection.publish(
            f"{namespace}.agent.sleeper", b'{"specversion":"1.0","type":"natsrt.?"}'
        )
        await eventually(lambda: _counts(worker, "undecodable", 1))
    await own_server.kill()
    await eventually(lambda: _is(worker, "/readyz", 503), NOTICED)
    where = ("--server", own_server.url, "--timeout", "500ms", "--health-url", f"{worker.url}/")
    doctor = await command("doctor", "--json", *where)
    not_ready, lost, connection = doctor.json
    assert (not_ready["check"], not_ready["level"]) == ("health", "warning")
    assert "is not ready. It is not connected to" in not_ready["text"]
    assert lost["level"] == "warning" and "counts 1 messages that could not be read" in lost["text"]
    assert connection["level"] == "problem"


async def _counts(worker: Probe, figure: str, count: int) -> bool:
    return bool((await worker.get("/healthz")).body[figure] == count)


def test_the_deployment_of_the_page_probes_what_the_worker_serves() -> None:
    (block,) = [block for block in blocks("yaml") if block.remark == "deployment.yaml"]
    deployment = yaml.safe_load(block.text)
    pod = deployment["spec"]["template"]["spec"]
    assert deployment["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]
    (container,) = pod["containers"]
    arguments = container["command"]
    (port,) = container["ports"]
    assert arguments[arguments.index("--health-port") + 1] == str(port["containerPort"])
    assert arguments[arguments.index("--health-host") + 1] == "0.0.0.0"
    probes = {name: container[name] for name in ("livenessProbe", "readinessProbe")}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "livenessProbe": "/livez",
        "readinessProbe": "/readyz",
    }
    for probe in probes.values():
        assert probe["httpGet"]["port"] == port["name"]
        assert probe["timeoutSeconds"] > PATIENCE, "the answer 503 comes after that"
    assert pod["terminationGracePeriodSeconds"] > natsrt.Options().drain_timeout
