"""One process of a peer: ``python -m benchmarks.process MODULE ROLE LOOP``, driven by lines of JSON.

The first line on standard input is the place and the setup, each further one a command; each is answered by one line
on standard output. The process ends when its standard input does, so none outlives the driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import sys
import traceback
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.roles import Role
from benchmarks.setup import Place, Setup

_STOP_SECONDS = 5.0


async def serve(make: Callable[[Place, Setup], Role], answers: int) -> None:
    """Start the role, carry out the commands that come in, and stop it at their end."""
    commands = asyncio.StreamReader(limit=2**20)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)

    def answer(content: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
            os.write(answers, json.dumps(content).encode() + b"\n")

    given = json.loads(await commands.readline())
    options = tuple(tuple(pair) for pair in given["setup"].pop("options"))
    setup = Setup(**given["setup"], options=options)
    if setup.trace_memory:
        tracemalloc.start()
    role = make(Place(**given["place"]), setup)

    async def carry_out(work: Awaitable[Any]) -> None:
        try:
            answer({"result": await work})
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})

    async def start() -> str:
        await role.start()
        return role.address

    # One at a time, but apart from the reading, which sees the end of the driver in the midst of a command.
    running = asyncio.create_task(carry_out(start()))
    try:
        while line := await commands.readline():
            command = json.loads(line)
            running = asyncio.create_task(carry_out(getattr(role, command["command"])(**command["arguments"])))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        async with asyncio.timeout(_STOP_SECONDS):
            await role.stop()


def main(module: str, role: str, loop: str) -> None:
    # What a peer prints or logs must neither mix with the answers nor cost it time.
    answers = os.dup(1)
    os.dup2(2, 1)
    logging.disable(logging.INFO)
    loop_factory = importlib.import_module("uvloop").new_event_loop if loop == "uvloop" else None
    make = importlib.import_module(module).ROLES[role]
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(serve(make, answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
