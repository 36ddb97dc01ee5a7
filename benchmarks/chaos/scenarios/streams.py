"""Streams while either end is cut off, frozen and killed: each is complete and in order, or ends with a typed error."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from benchmarks import report
from benchmarks.chaos import journal, streams
from benchmarks.chaos.crew import Crew, Hand
from benchmarks.chaos.journal import Book
from benchmarks.chaos.proxy import Proxy
from benchmarks.chaos.scenario import Figure, Repeated
from benchmarks.chaos.stream_plan import End, Fault, Kind, Run, plan
from benchmarks.teams import ProcessFailed
from natsrt import errors
from natsrt.embedded import EmbeddedServer

_HEARD_WITHIN = 4.0
_LOST_AFTER = 4.0
_IDLE = 5.0
SETTINGS: dict[str, dict[str, Any]] = {
    "worker": {"heartbeat_interval": 0.5, "heartbeat_ttl": _HEARD_WITHIN, "stream_idle_timeout": _IDLE},
    "caller": {"lost_after": _LOST_AFTER, "offline_timeout": 12.0},
}
_KILLED_WITHIN = 5.0
"""Seconds after the death of its worker within which a stream ends, if nothing else happens."""
_ENDS_WITHIN = 3 * _LOST_AFTER + 5.0
"""Seconds after the last fault within which a stream ends with an error, if it does not go on."""
_GIVE_UP = 120.0
"""Seconds after which a stream counts as hung."""
_AT_REST_WITHIN = _IDLE + 5.0
"""Seconds after the end of its streams after which an end keeps nothing of them."""
_READY_WITHIN = 60.0


@dataclass
class Result:
    """What came of a run. Moments are times of the monotonic clock."""

    run: Run
    name: str
    """``SEED/NUMBER``, which repeats it."""
    streams: list[dict[str, Any]] = field(default_factory=list)
    """How each stream ended; empty if the caller was killed."""
    killed: dict[End, float] = field(default_factory=dict)
    """The ends that were killed, and when."""
    quiet: float = 0.0
    """When the last fault was over."""
    restless: list[End] = field(default_factory=list)
    """The ends that kept something of the streams."""


class Lane:
    """A worker and a caller, each behind a proxy, with which runs are carried out one after the other.

    Use it with ``async with``.
    """

    def __init__(self, url: str, directory: str) -> None:
        self._url, self._directory = url, directory
        self._stack = AsyncExitStack()
        self._hands: dict[End, Hand] = {}
        self._proxies: dict[End, Proxy] = {}

    async def __aenter__(self) -> Lane:
        try:
            for end in End:  # the proxies end after the processes that use them
                self._proxies[end] = await self._stack.enter_async_context(Proxy(self._url))
            self._crew = await self._stack.enter_async_context(Crew(streams.__name__))
            for end in End:
                await self._start(end)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _start(self, end: End) -> None:
        more = {"journal": self._directory} if end is End.WORKER else {}
        settings = SETTINGS[end.value] | more | {"reconnect_wait": 0.05}
        self._hands[end] = await self._crew.start(end.value, self._proxies[end].url, **settings)

    async def carry_out(self, name: str, run: Run) -> Result:
        """Read the streams of a run while its faults happen. Returns when both ends are at rest again."""
        result = Result(run, name)
        caller = self._hands[End.CALLER]
        if await caller.ask("ready", seconds=_READY_WITHIN) is None:
            raise RuntimeError(f"run {name}: the worker did not answer within {_READY_WITHIN:g} s")
        wanted = [asdict(stream) | {"name": f"{name}/{n}"} for n, stream in enumerate(run.streams)]
        reading = asyncio.ensure_future(caller.ask("read", streams=wanted, seconds=_GIVE_UP))
        try:
            await asyncio.gather(*(self._happen(end, run.faults, result) for end in End))
            result.quiet = time.monotonic()
            with suppress(ProcessFailed):
                result.streams = await reading
            if not result.streams and End.CALLER not in result.killed:
                await reading  # it failed, although nothing killed it
        finally:
            reading.cancel()
        for end in End:
            if end in result.killed:
                continue
            if await self._hands[end].ask("at_rest", seconds=_AT_REST_WITHIN) is None:
                result.restless.append(end)
        for end in result.killed:
            await self._start(end)
        return result

    async def _happen(self, end: End, faults: Sequence[Fault], result: Result) -> None:
        """Let the faults of one end happen, one after the other."""
        began, hand, proxy = time.monotonic(), self._hands[end], self._proxies[end]
        for fault in faults:
            if fault.end is not end or end in result.killed:
                continue
            await asyncio.sleep(began + fault.at - time.monotonic())
            if fault.kind is Kind.KILL:
                await hand.kill()
                result.killed[end] = time.monotonic()
            elif fault.kind is Kind.FREEZE:
                hand.freeze()
                try:
                    await asyncio.sleep(fault.seconds)
                finally:
                    hand.resume()
            else:
                proxy.cut()
                try:
                    await asyncio.sleep(fault.seconds)
                finally:
                    await proxy.restore()


async def measure(runs: int = 200, seed: int = 1, lanes: int = 3) -> list[Figure]:
    """Carry out ``runs`` runs.

    Args:
        runs: Number of runs.
        seed: Decides what is streamed, and what goes wrong.
        lanes: Number of runs at the same time.
    """
    results: list[Result] = []
    numbers = itertools.takewhile(lambda number: number < runs, itertools.count())
    with tempfile.TemporaryDirectory(prefix="natsrt-streams-") as directory:
        async with EmbeddedServer(port=-1) as server:

            async def work() -> None:
                async with Lane(server.url, directory) as lane:
                    for number in numbers:
                        result = await lane.carry_out(f"{seed}/{number}", plan(seed, number))
                        results.append(result)
                        report.say(f"run {result.name}: {_told(result)}")

            async with asyncio.TaskGroup() as group:
                for _ in range(min(lanes, runs)):
                    group.create_task(work())
        return judged(results, journal.read(directory))


def _told(result: Result) -> str:
    outcomes = Counter(stream["outcome"] for stream in result.streams) or Counter(("caller killed",))
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))


def judged(results: Sequence[Result], written: Book) -> list[Figure]:
    """Return the figures of these runs. ``written`` is what their handlers have noted."""
    pairs = [(result, stream) for result in results for stream in result.streams]
    began, ended, stopped = (written.get(word, {}) for word in (streams.BEGAN, streams.ENDED, streams.STOPPED))
    whole = (streams.COMPLETE, streams.LEFT)
    killed = {name for r in results if End.WORKER in r.killed for name in _names(r)}
    return [
        Figure(name="runs", value=len(results)),
        Figure(name="faults", value=Counter(fault.kind.value for result in results for fault in result.run.faults)),
        Figure(name="streams", value=sum(len(result.run.streams) for result in results)),
        Figure(name="how they ended", value=Counter(stream["outcome"] for _, stream in pairs)),
        _none("streams with an item that was lost, doubled or not in order", (s for _, s in pairs if s["wrong"])),
        _none(
            "streams that ended without all items, and without an error",
            (
                s
                for r, s in pairs
                if s["outcome"] == streams.COMPLETE and s["received"] != r.run.streams[_place(s["name"])].count
            ),
        ),
        _none("streams that hung", (s for _, s in pairs if s["outcome"] == streams.HUNG)),
        _none(
            "streams that ended with an untyped error",
            (s for _, s in pairs if s["outcome"] not in (*whole, streams.HUNG, *errors.__all__)),
        ),
        _none(
            "streams that ended with an error although all faults were short",
            (s for r, s in pairs if r.run.gentle and s["outcome"] not in whole),
        ),
        _none("streams whose handler was started twice", (name for name, lines in began.items() if len(lines) > 1)),
        _none(
            "complete streams whose handler did not end",
            (s for _, s in pairs if s["outcome"] == streams.COMPLETE and s["name"] not in ended),
        ),
        _none(
            "handlers that did not end",
            (name for name in began if name not in ended and name not in stopped and name not in killed),
        ),
        _none(
            "ends that kept something of their streams",
            (f"{r.name} {end.value}" for r in results for end in r.restless),
        ),
        _slowest(
            "until a stream ended after its worker was killed, and nothing else happened",
            [
                s["ended"] - r.killed[End.WORKER]
                for r, s in pairs
                if len(r.run.faults) == 1 and End.WORKER in r.killed and s["outcome"] not in whole
            ],
            _KILLED_WITHIN,
        ),
        _slowest(
            "until a stream ended with an error after the last fault was over",
            [s["ended"] - r.quiet for r, s in pairs if s["outcome"] not in whole],
            _ENDS_WITHIN,
        ),
    ]


def _names(result: Result) -> list[str]:
    return [f"{result.name}/{number}" for number in range(len(result.run.streams))]


def _place(name: str) -> int:
    return int(name.rpartition("/")[2])


def _none(name: str, found: Any) -> Figure:
    """A figure that must be 0. What was ``found`` is printed, to be looked for in the plan."""
    all_found = list(found)
    for one in all_found:
        report.say(f"{name}: {one}")
    return Figure(name=name, value=len(all_found), at_most=0)


def _slowest(name: str, seconds: Sequence[float], at_most: float) -> Figure:
    return Figure(name=name, value=max(seconds, default=0.0), unit="s", at_most=at_most)


async def _all(short: bool) -> list[Figure]:
    return await measure(20) if short else await measure()


SCENARIO = Repeated(title="Streams while either end is cut off, frozen and killed", measure=_all, measure_runs=measure)
