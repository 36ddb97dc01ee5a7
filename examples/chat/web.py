"""The web server: the page, and for each room its events to the browsers and what people say and decide.

The browsers get events by server-sent events, and send requests. It is started with the descriptor of a socket that
listens. So the socket outlives this process, and browsers wait while it is started again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi import Path as InPath
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, StringConstraints

from examples.chat.failures import Refused
from examples.chat.messages import Verdict, let_read
from examples.chat.rooms import Rooms
from natsrt import NatsAgentRuntime

PAGE = Path(__file__).parent / "page"

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=40)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4000)]
RoomName = Annotated[str, InPath(pattern="^[A-Za-z0-9_-]{1,40}$")]


class Said(BaseModel):
    """What a person says."""

    name: Name
    text: Text


class Decided(BaseModel):
    """What a person answers to a question."""

    name: Name
    approved: bool


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with NatsAgentRuntime(name="web") as runtime, Rooms(runtime) as rooms:
        let_read(runtime)
        app.state.rooms = rooms
        yield


async def rooms_of(request: Request) -> Rooms:
    rooms: Rooms = request.app.state.rooms
    return rooms


OpenRooms = Annotated[Rooms, Depends(rooms_of)]

app = FastAPI(lifespan=lifespan, openapi_url=None)
app.mount("/page", StaticFiles(directory=PAGE))


@app.middleware("http")
async def own_resources_only(request: Request, call_next: Any) -> Response:
    response: Response = await call_next(request)
    response.headers["Content-Security-Policy"] = "default-src 'self'; frame-ancestors 'none'"
    response.headers["Cache-Control"] = "no-store"
    return response


@app.get("/")
async def to_the_first_room() -> RedirectResponse:
    return RedirectResponse("/rooms/lobby")


@app.get("/rooms/{room}")
async def page(room: RoomName) -> FileResponse:
    return FileResponse(PAGE / "index.html")


@app.get("/rooms/{room}/events")
async def events(room: RoomName, rooms: OpenRooms, name: Annotated[str, Query(max_length=40)] = "") -> Response:
    rooms.open(room)  # raises before the response begins

    async def stream() -> AsyncIterator[str]:
        yield "retry: 1000\n\n"  # milliseconds until the browser connects again
        async with aclosing(rooms.open(room).board.watch(name.strip(), rooms.status)) as watched:
            async for event in watched:
                yield f"data: {json.dumps(event)}\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream")


@app.post("/rooms/{room}/messages", status_code=204)
async def say(room: RoomName, said: Said, rooms: OpenRooms) -> None:
    rooms.open(room).say(said.name, said.text)


@app.post("/rooms/{room}/questions/{question}", status_code=204)
async def decide(room: RoomName, question: str, decided: Decided, rooms: OpenRooms) -> None:
    rooms.open(room).decide(question, Verdict(decided.approved, decided.name))


@app.exception_handler(Refused)
async def refused(request: Request, error: Refused) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, error.status)


class Server(uvicorn.Server):
    """Ends the events of the browsers when it is asked to stop: it would wait for them."""

    loop: asyncio.AbstractEventLoop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.loop.call_soon_threadsafe(app.state.rooms.end_watching)


async def serve(listening: socket.socket) -> None:
    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    server.loop = asyncio.get_running_loop()
    await server.serve(sockets=[listening])


if __name__ == "__main__":
    logging.basicConfig(format="web server: %(message)s", level=logging.WARNING)
    asyncio.run(serve(socket.socket(fileno=int(sys.argv[1]))))
