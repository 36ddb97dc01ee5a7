"""A FastAPI application as docs/embedding.md describes it, with an endpoint that runs in a thread.

tests/test_fastapi.py runs it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from anyio.from_thread import run
from autogen_core import AgentId
from fastapi import Depends, FastAPI, Request

from natsrt import NatsAgentRuntime

SHOUTER = AgentId("shouter", "default")


@dataclass
class Text:
    text: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with NatsAgentRuntime() as runtime:
        app.state.runtime = runtime
        yield


def application_runtime(request: Request) -> NatsAgentRuntime:
    runtime: NatsAgentRuntime = request.app.state.runtime
    return runtime


Runtime = Annotated[NatsAgentRuntime, Depends(application_runtime)]

app = FastAPI(lifespan=lifespan)


@app.get("/twice/{text}")
async def twice(text: str, runtime: Runtime) -> Text:
    """Makes its second call when the first one has ended."""
    once: Text = await runtime.send_message(Text(text), SHOUTER)
    answer: Text = await runtime.send_message(once, SHOUTER)
    return answer


@app.get("/in-a-thread/{text}")
def in_a_thread(text: str, runtime: Runtime) -> Text:
    answer: Text = run(runtime.send_message, Text(text), SHOUTER)
    return answer
