"""Hosts many agent types, each with a durable subscription, in one worker and over two."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.chaos import many_types
from benchmarks.chaos.crew import Crew, Hand, ask_all
from benchmarks.chaos.scenario import Figure, Scenario, under
from natsrt.embedded import EmbeddedServer

_SETTINGS = {"durable": [many_types.TOPICS]}
_GIVE_UP = 240.0
_POLL = 0.1


async def measure(*, types: int = 1_000, starts_within: float | None = None) -> list[Figure]:
    """Start a worker with all agent types, then a second one, stop both, and start one again.

    Args:
        types: Number of agent types. Each has a topic and a consumer of its own.
        starts_within: Seconds within which the first worker must start; None: it is only measured.
    """
    async with EmbeddedServer() as server, Crew(many_types.__name__) as crew:
        caller = await crew.start("caller", server.url, **_SETTINGS)
        empty = _megabytes(server)
        one, two, again = await crew.start_all("worker", [server.url] * 3, **_SETTINGS)
        figures = [Figure(name="agent types", value=types)]
        first = await one.ask("begin", types=types)
        figures += [
            Figure(name="start of the first worker, which makes the consumers", value=first, unit="s"),
            Figure(name="memory of the server before", value=empty, unit="MB"),
            Figure(name="memory of the server with one worker", value=_megabytes(server), unit="MB"),
            Figure(name="consumers", value=await caller.ask("consumers"), at_least=types, at_most=types),
        ]
        figures += under("one worker", await _one_event_each(caller, [one], types, 1))
        figures.append(Figure(name="start of the second worker", value=await two.ask("begin", types=types), unit="s"))
        figures.append(Figure(name="memory of the server with two workers", value=_megabytes(server), unit="MB"))
        figures += under("two workers", await _one_event_each(caller, [one, two], types, 2))
        figures += [
            Figure(name="stop of the first worker", value=await one.ask("end"), unit="s"),
            Figure(name="stop of the second worker", value=await two.ask("end"), unit="s"),
            Figure(name="consumers afterwards", value=await caller.ask("consumers"), at_least=types, at_most=types),
            Figure(name="memory of the server afterwards", value=_megabytes(server), unit="MB"),
        ]
        await caller.ask("publish_each", types=types)
        figures.append(Figure(name="start of a third worker", value=await again.ask("begin", types=types), unit="s"))
        figures += under("while none ran", await _all_handled([one, two, again], types, 3, time.monotonic()))
        if starts_within is not None:
            figures.append(Figure(name="the first start, bounded", value=first, unit="s", at_most=starts_within))
        return figures


async def _one_event_each(caller: Hand, workers: Sequence[Hand], types: int, rounds: int) -> list[Figure]:
    began = time.monotonic()
    await caller.ask("publish_each", types=types)
    return await _all_handled(workers, types, rounds, began)


async def _all_handled(workers: Sequence[Hand], types: int, rounds: int, began: float) -> list[Figure]:
    """Wait until every topic's events of ``rounds`` rounds are handled."""
    deadline = began + _GIVE_UP
    while True:
        handled = sum(await ask_all(workers, "handled"))
        if handled >= types * rounds or time.monotonic() > deadline:
            break
        await asyncio.sleep(_POLL)
    return [
        Figure(name="events handled until now", value=handled, at_least=types * rounds, at_most=types * rounds),
        Figure(name="until all were handled", value=time.monotonic() - began, unit="s"),
    ]


def _megabytes(server: EmbeddedServer) -> int:
    """The resident memory of the server."""
    pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


async def _all(short: bool) -> list[Figure]:
    return await measure(types=100 if short else 1_000)


SCENARIO = Scenario(title="Many agent types with durable subscriptions start and stop", measure=_all)
