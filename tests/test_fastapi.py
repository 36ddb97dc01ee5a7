"""A runtime inside a FastAPI application: it serves requests until the last one has ended. See docs/embedding.md."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

import pytest
from autogen_core import MessageContext, RoutedAgent, message_handler

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from tests.support.processes import Process, Processes

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'natsrt[examples]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'natsrt[examples]'")
httpx = pytest.importorskip("httpx", reason="httpx is not installed: pip install 'natsrt[examples]'")

SERVE = "import uvicorn; uvicorn.run('tests.programs.fastapi_app:app', port=0)"


@dataclass
class Text:
    text: str


class Shouter(RoutedAgent):
    """Answers when it may."""

    def __init__(self, called: asyncio.Event, may_answer: asyncio.Event) -> None:
        super().__init__("shouts")
        self.called = called
        self.may_answer = may_answer

    @message_handler
    async def shout(self, message: Text, ctx: MessageContext) -> Text:
        self.called.set()
        await self.may_answer.wait()
        return Text(message.text.upper() + "!")


async def started(processes: Processes, server: EmbeddedServer, namespace: str) -> tuple[Process, str]:
    """The application as a process, and its URL."""
    environment = {"NATS_URL": server.url, "NATSRT_NAMESPACE": namespace}
    process = processes.python(SERVE, name="application", env=environment)
    line = await process.wait_for_line("Uvicorn running on", timeout=20)
    found = re.search(r"http://[\d.:]+", line)
    assert found is not None, line
    return process, found[0]


async def test_requests_that_run_at_a_signal_still_make_calls_and_are_answered(
    server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    called, may_answer = asyncio.Event(), asyncio.Event()
    async with NatsAgentRuntime(server.url, namespace=namespace) as worker:
        await natsrt.register(worker, Shouter, "shouter", lambda: Shouter(called, may_answer))
        process, url = await started(processes, server, namespace)
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            request = asyncio.create_task(client.get("/twice/hi"))
            await called.wait()
            process.terminate()
            await process.wait_for_line("Shutting down")
            may_answer.set()
            assert (await request).json() == {"text": "HI!!"}
        await process.wait(20)
        assert "Application shutdown complete" in process.stderr
        assert "Traceback" not in process.stderr


async def test_endpoints_in_threads_use_the_runtime_through_its_event_loop(
    server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    may_answer = asyncio.Event()
    may_answer.set()
    async with NatsAgentRuntime(server.url, namespace=namespace) as worker:
        await natsrt.register(worker, Shouter, "shouter", lambda: Shouter(asyncio.Event(), may_answer))
        _, url = await started(processes, server, namespace)
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            answers = await asyncio.gather(*(client.get(f"/in-a-thread/{n}") for n in range(20)))
            assert [answer.json() for answer in answers] == [{"text": f"{n}!"} for n in range(20)]


async def test_an_application_without_a_server_does_not_start_and_says_why(processes: Processes) -> None:
    environment = {"NATS_URL": "nats://127.0.0.1:1", "NATSRT_CONNECT_TIMEOUT": "0.5"}
    process = processes.python(SERVE, name="application", env=environment)
    assert await process.wait(20) == 3  # uvicorn's code for an application that did not start
    assert "ServerUnreachable: no NATS server answered at nats://127.0.0.1:1" in process.stderr
