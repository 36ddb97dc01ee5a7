"""One process of a peer: ``python -m benchmarks.process MODULE ROLE LOOP``, controlled by lines of JSON.

The first line on standard input contains the place and the setup. Each following line is a command. The process answers
each line with one line on standard output. It ends when its standard input is closed, so it cannot outlive the driver.
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
    """Start the role, run the commands from standard input, and stop the role when standard input is closed.

    Args:
        make: Creates the role.
        answers: File descriptor for the answers.
    """
    commands = asyncio.StreamReader(limit=2**20)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)

    def answer(content: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the driver has ended
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

    # A command runs in a separate task, so that the end of the driver is noticed while a command runs.
    # The driver sends one command at a time.
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
    # Output of a peer must not mix with the answers, and logging must not cost it time.
    answers = os.dup(1)
    os.dup2(2, 1)
    logging.disable(logging.INFO)
    loop_factory = importlib.import_module("uvloop").new_event_loop if loop == "uvloop" else None
    make = importlib.import_module(module).ROLES[role]
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(serve(make, answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
