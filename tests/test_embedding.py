"""A runtime inside somebody else's program: its event loop, its signals, its requests, its health check."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, message_handler

from natsrt import NatsAgentRuntime, NatsrtError, ServerUnreachable
from natsrt.embedded import EmbeddedServer
from tests.support.processes import Processes, eventually


@dataclass
class Text:
    text: str


class Shouter(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("shouts")

    @message_handler
    async def shout(self, message: Text, ctx: MessageContext) -> Text:
        if message.text == "wait":
            await asyncio.Event().wait()
        return Text(message.text.upper())


SHOUTER = AgentId("shouter", "default")


class WebService:
    """A service as one writes it with any asyncio framework: two paths, a health check and a call."""

    def __init__(self, runtime: NatsAgentRuntime) -> None:
        self.runtime = runtime
        self.port = 0
        self.requests: set[asyncio.Task[Any]] = set()

    async def respond(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.requests.add(task)
        try:
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode().strip("/")
            status, answer = await self.result(path)
            payload = json.dumps(answer).encode()
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(payload)}\r\n\r\n".encode() + payload)
            await writer.drain()
        finally:
            self.requests.discard(task)
            writer.close()

    async def result(self, path: str) -> tuple[int, str]:
        if path == "health":
            return (200, "ready") if self.runtime.ready else (503, "not ready")
        try:
            return 200, (await self.runtime.send_message(Text(path), SHOUTER)).text
        except NatsrtError as error:
            return error.code, type(error).__name__


@asynccontextmanager
async def serving(runtime: NatsAgentRuntime) -> AsyncIterator[WebService]:
    service = WebService(runtime)
    async with await asyncio.start_server(service.respond, "127.0.0.1", 0) as server:
        service.port = server.sockets[0].getsockname()[1]
        yield service


async def get(port: int, path: str) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET /{path} HTTP/1.1\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)
    finally:
        writer.close()


async def test_many_requests_at_once_each_get_their_own_answer(server: EmbeddedServer, namespace: str) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as worker:
        await Shouter.register(worker, "shouter", Shouter)
        async with NatsAgentRuntime(server.url, namespace=namespace) as runtime, serving(runtime) as service:
            answers = await asyncio.gather(*(get(service.port, f"text{number}") for number in range(100)))
            assert answers == [(200, f"TEXT{number}") for number in range(100)]


async def test_a_request_that_is_abandoned_takes_nothing_else_along(server: EmbeddedServer, namespace: str) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace, drain_timeout=0.2) as runtime:
        await Shouter.register(runtime, "shouter", Shouter)
        async with serving(runtime) as service:
            hanging = asyncio.ensure_future(get(service.port, "wait"))
            await eventually(lambda: runtime.running.calls.pending)
            for request in list(service.requests):  # as frameworks do when the browser is gone
                request.cancel()
            await eventually(lambda: not runtime.running.calls.pending)
            hanging.cancel()
            assert await get(service.port, "still") == (200, "STILL")


@pytest.mark.slow
async def test_a_health_check_follows_the_server_and_requests_fail_with_a_type(own_server: EmbeddedServer) -> None:
    async with NatsAgentRuntime(own_server.url, offline_timeout=1.0) as runtime:
        await Shouter.register(runtime, "shouter", Shouter)
        async with serving(runtime) as service:
            assert await get(service.port, "health") == (200, "ready")
            await own_server.stop()
            await eventually(lambda: not runtime.ready)
            assert await get(service.port, "health") == (503, "not ready")
            assert await get(service.port, "hello") == (503, "ServerUnreachable")
            await own_server.start()
            await eventually(lambda: runtime.ready, timeout=10)
            assert await get(service.port, "hello") == (200, "HELLO")


async def test_a_start_without_a_server_fails_in_time_and_can_be_tried_again(own_server: EmbeddedServer) -> None:
    runtime = NatsAgentRuntime(own_server.url, connect_timeout=0.5)
    await own_server.stop()
    with pytest.raises(ServerUnreachable, match="connect|refused|answer"):
        await runtime.start()
    assert not runtime.ready
    await own_server.start()
    async with runtime:
        await Shouter.register(runtime, "shouter", Shouter)
        assert await runtime.send_message(Text("a"), SHOUTER) == Text("A")


async def test_nothing_is_left_in_the_event_loop_after_closing(server: EmbeddedServer, namespace: str) -> None:
    before = asyncio.all_tasks()
    for _ in range(2):
        async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
            await Shouter.register(runtime, "shouter", Shouter)
            await runtime.send_message(Text("a"), SHOUTER)
    await eventually(lambda: asyncio.all_tasks() == before)


async def test_a_runtime_touches_no_signal_unless_asked(server: EmbeddedServer, namespace: str) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        waiting = asyncio.ensure_future(runtime.stop_when_signal([signal.SIGUSR1]))
        await eventually(lambda: signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL)
        signal.raise_signal(signal.SIGUSR1)
        await waiting
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


async def converse(url: str, namespace: str) -> str:
    async with (
        NatsAgentRuntime(url, namespace=namespace) as worker,
        NatsAgentRuntime(url, namespace=namespace) as caller,
    ):
        await Shouter.register(worker, "shouter", Shouter)
        return (await caller.send_message(Text("a"), SHOUTER)).text  # type: ignore[no-any-return]


def in_a_thread(work: Callable[[], Coroutine[Any, Any, str]], results: list[str]) -> threading.Thread:
    thread = threading.Thread(target=lambda: results.append(asyncio.run(work())))
    thread.start()
    return thread


async def test_runtimes_in_the_loops_of_several_threads_do_not_meet(server: EmbeddedServer, namespace: str) -> None:
    results: list[str] = []
    threads = [in_a_thread(lambda n=n: converse(server.url, f"{namespace}-{n}"), results) for n in range(3)]  # type: ignore[misc]
    await eventually(lambda: not any(thread.is_alive() for thread in threads), timeout=20)
    assert results == ["A"] * 3


UVLOOP = """
import asyncio, sys, uvloop
from tests.test_embedding import converse
print(uvloop.run(converse(sys.argv[1], sys.argv[2])))
"""


async def test_it_runs_on_uvloop(server: EmbeddedServer, namespace: str, processes: Processes) -> None:
    pytest.importorskip("uvloop")
    program = processes.python(UVLOOP, server.url, namespace)
    assert await program.wait(30) == 0, program.describe()
    assert program.stdout == "A\n"


async def test_a_program_that_does_not_await_the_start_works_too(server: EmbeddedServer, namespace: str) -> None:
    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    runtime.start()
    await Shouter.register(runtime, "shouter", Shouter)
    assert await runtime.send_message(Text("a"), SHOUTER) == Text("A")
    await runtime.stop_when_idle()
    await runtime.close()


USES: dict[str, Callable[[NatsAgentRuntime], Awaitable[Any]]] = {
    "send_message": lambda runtime: runtime.send_message(Text("a"), SHOUTER),
    "publish_message": lambda runtime: runtime.publish_message(Text("a"), TopicId("topic", "k")),
    "add_subscription": lambda runtime: runtime.add_subscription(TypeSubscription("topic", "shouter")),
    "register_factory": lambda runtime: runtime.register_factory("other", Shouter),
    "get": lambda runtime: runtime.get("shouter", lazy=False),
    "agent_save_state": lambda runtime: runtime.agent_save_state(SHOUTER),
    "save_state": lambda runtime: runtime.save_state(),
    "stop": lambda runtime: runtime.stop(),
    "stop_when_idle": lambda runtime: runtime.stop_when_idle(),
    "close": lambda runtime: runtime.close(),
    "start": lambda runtime: runtime.start(),
}


def in_another_loop(use: Callable[[NatsAgentRuntime], Awaitable[Any]], runtime: NatsAgentRuntime) -> None:
    async def go() -> None:
        await asyncio.wait_for(use(runtime), 2)

    asyncio.run(go())


@pytest.mark.parametrize("use", USES)
async def test_a_use_from_another_event_loop_is_refused_at_once_and_changes_nothing(
    server: EmbeddedServer, namespace: str, use: str
) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        await Shouter.register(runtime, "shouter", Shouter)
        with pytest.raises(RuntimeError, match="asyncio.run_coroutine_threadsafe"):
            await asyncio.to_thread(in_another_loop, USES[use], runtime)
        assert await runtime.send_message(Text("a"), SHOUTER) == Text("A")
        assert runtime.ready


async def test_a_runtime_of_an_event_loop_that_has_ended_says_so(server: EmbeddedServer, namespace: str) -> None:
    def in_two_loops() -> str:
        async def started() -> NatsAgentRuntime:
            runtime = NatsAgentRuntime(server.url, namespace=namespace)
            await runtime.start()
            return runtime

        try:
            in_another_loop(USES["send_message"], asyncio.run(started()))
        except RuntimeError as error:
            return str(error)
        return "no error"

    assert "is closed, as after asyncio.run: start a new runtime" in await asyncio.to_thread(in_two_loops)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # about the connection that the first loop left open
        gc.collect()
