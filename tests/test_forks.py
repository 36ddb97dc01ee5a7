"""Handlers that fork: their children share neither the signals nor the connection of the worker."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from autogen_core import AgentId

from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import WorkerLost
from natsrt.forks import Inherited, drop_in_children, keep_in_children
from natsrt.signals import StopSignals
from tests.support.processes import Process, Processes, eventually

AGENTS = """
import asyncio, multiprocessing, os, signal, time
from concurrent.futures import ProcessPoolExecutor
from autogen_core import MessageContext, RoutedAgent, rpc

forking = multiprocessing.get_context("fork")
kept = []


def ended(end):
    child = forking.Process(target=time.sleep, args=(30,))
    child.start()
    end(child)
    child.join(5)
    code = child.exitcode
    child.kill()
    return code


def pooled():
    with forking.Pool(2) as pool:
        answer = pool.map(abs, [-1, -2])
        pool.map_async(time.sleep, [30, 30])
    return answer


def raw():
    pid = os.fork()
    if pid == 0:
        signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def keep():
    pool = ProcessPoolExecutor(2, mp_context=forking)
    kept.append(pool)
    return [pool.submit(os.getpid).result() for _ in range(2)]


WORK = {
    "terminate": lambda: ended(lambda child: child.terminate()),
    "interrupt": lambda: ended(lambda child: os.kill(child.pid, signal.SIGINT)),
    "hang up": lambda: ended(lambda child: os.kill(child.pid, signal.SIGHUP)),
    "pool": pooled,
    "raw": raw,
    "keep": keep,
    "pid": os.getpid,
}


class Forking(RoutedAgent):
    def __init__(self):
        super().__init__("forks")

    @rpc
    async def work(self, message: str, ctx: MessageContext) -> str:
        if message == "wait":
            print("waiting", flush=True)
            await asyncio.sleep(60)
        in_thread = message.startswith("thread: ")
        work = WORK[message.removeprefix("thread: ")]
        return str(await asyncio.to_thread(work) if in_thread else work())
"""

AGENT = AgentId("forks", "k")
StartWorker = Callable[..., Process]


@pytest.fixture
def start(server: EmbeddedServer, namespace: str, processes: Processes, tmp_path: Path) -> StartWorker:
    (tmp_path / "forking.py").write_text(AGENTS)

    def start(name: str) -> Process:
        where = ("--server", server.url, "--namespace", namespace)
        arguments = ("worker", *where, "forking:Forking", "--type", "forks")
        return processes.natsrt(*arguments, name=name, cwd=tmp_path)

    return start


@pytest.mark.parametrize("thread", ["", "thread: "])
@pytest.mark.parametrize(
    ("work", "expected"),
    [
        ("terminate", {str(-signal.SIGTERM)}),
        ("interrupt", {"1", str(-signal.SIGINT)}),  # 1: by KeyboardInterrupt, if the child had begun to run
        ("hang up", {str(-signal.SIGHUP)}),
        ("pool", {"[1, 2]"}),
        ("raw", {str(-signal.SIGTERM)}),
    ],
)
async def test_a_signal_for_a_child_ends_the_child_and_not_the_worker(
    server: EmbeddedServer, namespace: str, start: StartWorker, thread: str, work: str, expected: set[str]
) -> None:
    worker = start("worker")
    await worker.wait_for_line("ready")
    async with NatsAgentRuntime(server.url, namespace=namespace) as caller:
        for _ in range(3):
            assert await caller.send_message(thread + work, AGENT) in expected
        assert int(await caller.send_message("pid", AGENT)) == worker.pid
    assert worker.running and "finishing" not in worker.stderr
    worker.terminate()
    assert await worker.wait() == 0


async def test_a_killed_worker_is_gone_although_its_children_live(
    server: EmbeddedServer, namespace: str, start: StartWorker
) -> None:
    first = start("first")
    await first.wait_for_line("ready")
    async with NatsAgentRuntime(server.url, namespace=namespace) as caller:
        children = [int(pid) for pid in (await caller.send_message("keep", AGENT)).strip("[]").split(",")]
        lost = asyncio.ensure_future(caller.send_message("wait", AGENT))
        await first.wait_for_line("waiting")
        second = start("second")
        await second.wait_for_line("ready")
        first.kill()
        assert any(_lives(pid) for pid in children), "children must live on for this test to mean something"
        answers = await asyncio.wait_for(asyncio.gather(*(caller.send_message("pid", AGENT) for _ in range(20))), 5)
        assert {int(pid) for pid in answers} == {second.pid}
        with pytest.raises(WorkerLost):
            await asyncio.wait_for(lost, 5)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_child_of_an_embedding_program_gets_the_handlers_that_it_had_before(
    server: EmbeddedServer, namespace: str
) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        serving = asyncio.ensure_future(runtime.stop_when_signal([signal.SIGUSR1]))
        await eventually(lambda: signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL)
        pid = os.fork()
        if pid == 0:
            os._exit(0 if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        await runtime.running.connection.barrier()  # the connection works on
        signal.raise_signal(signal.SIGUSR1)
        await asyncio.wait_for(serving, 10)


async def test_a_signal_that_came_just_before_the_inner_block_reaches_it() -> None:
    """The event loop has read the signal, and calls its handler in its next steps."""
    with StopSignals([signal.SIGUSR2]) as outer:
        signal.raise_signal(signal.SIGUSR2)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not outer.received.is_set()
        with StopSignals([signal.SIGUSR2]) as inner:
            await asyncio.wait_for(inner.received.wait(), 5)
        assert not outer.received.is_set()


async def test_nested_signal_handlers_leave_children_what_was_there_before_the_outermost() -> None:
    with StopSignals([signal.SIGUSR2]) as outer, StopSignals([signal.SIGUSR2]) as inner:
        pid = os.fork()
        if pid == 0:
            os._exit(0 if signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        signal.raise_signal(signal.SIGUSR2)
        await asyncio.wait_for(inner.received.wait(), 5)
        assert not outer.received.is_set()
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


class Faulty(Inherited):
    def drop_in_child(self) -> None:
        raise OSError("as it should")


async def test_what_cannot_be_dropped_keeps_nothing_else_in_the_child() -> None:
    faulty = [Faulty() for _ in range(16)]
    for one in faulty:
        drop_in_children(one)
    try:
        with StopSignals([signal.SIGUSR2]):
            pid = os.fork()
            if pid == 0:
                os._exit(0 if signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        for one in faulty:
            keep_in_children(one)


async def test_the_outer_handler_gets_its_signals_back() -> None:
    with StopSignals([signal.SIGUSR2]) as outer:
        with StopSignals([signal.SIGUSR2]):
            pass
        signal.raise_signal(signal.SIGUSR2)
        await asyncio.wait_for(outer.received.wait(), 5)


async def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with StopSignals([signal.SIGUSR2]) as stop:
            signal.raise_signal(signal.SIGUSR2)
            await asyncio.sleep(0.05)
            assert not stop.received.is_set()
    finally:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)


async def test_signals_within_half_a_second_are_one_and_a_later_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    again: list[float] = []
    loop = asyncio.get_running_loop()
    now = loop.time()
    monkeypatch.setattr(loop, "time", lambda: now)
    with StopSignals([signal.SIGUSR2], again=lambda: again.append(now)) as stop:
        stop.receive()
        now += 0.4
        stop.receive()
        assert stop.received.is_set() and not again
        now += 0.2  # measured from the first one, so that who keeps Ctrl-C pressed is heard
        stop.receive()
        assert len(again) == 1
        now += 0.4
        stop.receive()
        assert len(again) == 1
