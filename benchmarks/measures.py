"""How scenarios measure: what their variants have as ``measure``."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Measure, Sample
from benchmarks.teams import Team

SIZE = 100
"""Bytes of payload where a scenario is not about sizes."""


def calls(concurrency: int, size: int = SIZE) -> Measure:
    """Calls per second by ``concurrency`` callers, each of which makes one after the other."""
    return _by_callers("calls", concurrency, size)


def first_calls(concurrency: int, size: int = SIZE) -> Measure:
    """The same, with a new agent for every call."""
    return _by_callers("first_calls", concurrency, size)


def events(size: int = SIZE) -> Measure:
    """Events handled per second, by all subscribers together."""

    async def measure(team: Team, count: int) -> Sample:
        return await _timed(team, count, count * team.setup.subscribers, "events", size=size)

    return measure


def latency(size: int = SIZE) -> Measure:
    """Milliseconds of a single call, the median."""

    async def measure(team: Team, count: int) -> Sample:
        before = team.cpu()
        seconds = await team.caller.ask("latency", count=count, size=size)
        return Sample(value=seconds * 1e3, seconds=seconds * count, cpu=team.cpu().per_message(before, count))

    return measure


def in_worker(command: str, *, scale: float = 1.0, **arguments: Any) -> Measure:
    """What a command of the first worker (of the caller, where that hosts the agents) returns, times ``scale``."""

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
