"""Functions that return the ``measure`` of a variant."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Measure, Sample
from benchmarks.teams import Team

SIZE = 100
"""Payload in bytes, except in scenarios that compare sizes."""


def calls(concurrency: int, size: int = SIZE) -> Measure:
    """Measure calls per second, by ``concurrency`` callers that each make one call after the other."""
    return _by_callers("calls", concurrency, size)


def first_calls(concurrency: int, size: int = SIZE) -> Measure:
    """Measure calls per second, as `calls` does, with a new agent for every call."""
    return _by_callers("first_calls", concurrency, size)


def events(size: int = SIZE) -> Measure:
    """Measure events handled per second, by all subscribers together."""

    async def measure(team: Team, count: int) -> Sample:
        return await _timed(team, count, count * team.setup.subscribers, "events", size=size)

    return measure


def latency(size: int = SIZE) -> Measure:
    """Measure the median duration of a single call, in milliseconds."""

    async def measure(team: Team, count: int) -> Sample:
        before = team.cpu()
        seconds = await team.caller.ask("latency", count=count, size=size)
        return Sample(value=seconds * 1e3, seconds=seconds * count, cpu=team.cpu().per_message(before, count))

    return measure


def in_worker(command: str, *, scale: float = 1.0, **arguments: Any) -> Measure:
    """Measure the result of a command, times ``scale``.

    The first worker runs the command, or the caller if the peer has no workers.
    """

    async def measure(team: Team, count: int) -> Sample:
        member = team.workers[0] if team.workers else team.caller
        return Sample(value=await member.ask(command, **arguments) * scale)

    return measure


def _by_callers(command: str, concurrency: int, size: int) -> Measure:
    async def measure(team: Team, count: int) -> Sample:
        return await _timed(team, count, count, command, concurrency=concurrency, size=size)

    return measure


async def _timed(team: Team, count: int, messages: int, command: str, **arguments: Any) -> Sample:
    before = team.cpu()
    seconds = await team.caller.ask(command, count=count, **arguments)
    return Sample(value=messages / seconds, seconds=seconds, cpu=team.cpu().per_message(before, messages))
