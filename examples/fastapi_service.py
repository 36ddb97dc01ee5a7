"""Embedding in FastAPI: one runtime for the application, which starts and ends with it.

Start it like any other application, beside a worker that hosts the agents: uvicorn fastapi_service:app. The settings
come from the environment, as for every runtime: NATS_URL and others.

Run it, with requests of its own: python examples/fastapi_service.py (needs fastapi, uvicorn and httpx:
pip install 'natsrt[examples]')
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

import httpx
import uvicorn
from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from local_server import local_server

from natsrt import NatsAgentRuntime, NatsrtError


@dataclass
class Text:
    text: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with NatsAgentRuntime() as runtime:
        app.state.runtime = runtime
        yield  # the application serves requests; when it has finished them, the runtime is closed


def application_runtime(request: Request) -> NatsAgentRuntime:
    return request.app.state.runtime


Runtime = Annotated[NatsAgentRuntime, Depends(application_runtime)]

app = FastAPI(lifespan=lifespan)


@app.get("/shout/{text}")
async def shout(text: str, runtime: Runtime) -> Text:
    return await runtime.send_message(Text(text), AgentId("shouter", "default"), timeout=10)


@app.get("/ask/{agent_type}")
async def ask(agent_type: str, runtime: Runtime) -> Text:
    return await runtime.send_message(Text("?"), AgentId(agent_type, "default"), timeout=10)


@app.get("/readyz")
async def ready(runtime: Runtime, response: Response) -> dict[str, object]:
    health = runtime.health()
    response.status_code = 200 if health.ready else 503
    return {"ready": health.ready, "reasons": health.reasons}


@app.exception_handler(NatsrtError)
async def failed(request: Request, error: NatsrtError) -> JSONResponse:
    return JSONResponse({"error": type(error).__name__}, status_code=error.code)


class Shouter(RoutedAgent):
    @message_handler
    async def shout(self, message: Text, ctx: MessageContext) -> Text:
        return Text(message.text.upper())


@asynccontextmanager
async def served() -> AsyncIterator[str]:
    """Runs the application as the command uvicorn does. Yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    listening = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


async def main() -> None:
    async with local_server() as url, NatsAgentRuntime(url) as worker:
        await Shouter.register(worker, "shouter", lambda: Shouter("shouts"))
        os.environ["NATS_URL"] = url
        async with served() as base, httpx.AsyncClient(base_url=base) as client:
            for path in ("/shout/hello", "/ask/nobody", "/readyz"):
                answer = await client.get(path)
                print(f"GET {path}: {answer.status_code} {answer.text}")
        assert not app.state.runtime.health().live  # it was closed with the application


if __name__ == "__main__":
    asyncio.run(main())
