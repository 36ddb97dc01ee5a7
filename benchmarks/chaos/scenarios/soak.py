"""All faults at once, for as long as asked; at the end the ledger: what was lost, doubled, hung, untyped or leaked."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.chaos import journal
from benchmarks.chaos.faults import Kind, plan
from benchmarks.chaos.history import History
from benchmarks.chaos.journal import Book
from benchmarks.chaos.ledger import Ledger
from benchmarks.chaos.scenario import Figure, Timed, broken, under
from benchmarks.chaos.soak import Soak
from natsrt import errors

_WARM_SECONDS = 4.0
"""Load without faults, before and after them."""
_ENDS_WITHIN = 60.0
"""Seconds within which every call must end: some faults of up to 9 s, one after the other."""
_RECOVERED_WITHIN = 30.0
"""Seconds after the last fault within which everything must work again."""
_LOOK_EVERY = 3.0
_LOOKS = 15
"""Looks at what is taken, after the load, some seconds apart: a cancellation is announced for 10 s, and the server
keeps a consumer of a reader that was killed or cut off for 30 s."""
_WITH_PAUSES = ": longest time without any reply"
"""Figures of ledgers that mean nothing here, because there is no load for a while before the faults."""
_KEYS = 12
_KEYS_FOR = 60.0
_MORE_AT_MOST = {"tasks": 15, "descriptors": 8, "subscriptions": 8, "pending calls": 0, "megabytes": 150}
"""How much more a process may take at the end than at the beginning, both times without load. Kept replies take memory
up to their limit."""


async def measure(seconds: float = 180.0, seed: int = 1, kinds: Sequence[Kind] = tuple(Kind)) -> list[Figure]:
    """Let everything go wrong for ``seconds``.

    Args:
        seconds: Time with faults.
        seed: Decides which faults there are, and when.
        kinds: The kinds of faults.
    """
    async with Soak() as soak:
        await _load(soak, seed)
        warm = await _finish(soak)
        before = await _usage_at_rest(soak)
        await _load(soak, seed)
        await asyncio.sleep(_WARM_SECONDS)
        began = time.monotonic()
        await soak.carry_out(plan(seed, seconds, kinds))
        quiet = time.monotonic()
        await soak.cluster.until_healthy()
        recovered = await soak.ask(soak.callers, "probe", seconds=_RECOVERED_WITHIN)
        loaded = await soak.ask(soak.callers, "finish")
        await _load(soak, seed)
        calm = [*warm, *await _finish(soak)]
        after = await _usage_at_rest(soak, before)
        keys = sorted({row[0].partition("/")[2] for one in (*loaded, *calm) for row in one["counters"]})
        running = await soak.ask(soak.members, "tasks")
        stored = await soak.callers[0].hand.ask("stored", keys=keys)
        written = journal.read(soak.journals)
    waited = [moment - quiet for moment in recovered if moment is not None]
    figures = [
        Figure(name="seed", value=str(seed)),
        Figure(name="faults", value=soak.done),
        Figure(name="starts of workers that failed, by error", value=soak.failed_starts),
        Figure(
            name="starts of workers that failed with an untyped error",
            value=sum(count for name, count in soak.failed_starts.items() if name not in errors.__all__),
            at_most=0,
        ),
        Figure(
            name="until everything works again",
            value=max(waited) if len(waited) == len(recovered) else None,
            unit="s",
            at_most=_RECOVERED_WITHIN,
        ),
        *_of_calls([*loaded, *calm], written),
        *under("counters", History(_ledgers([*loaded, *calm], "counters"), stored).figures()),
        *_of_events(loaded, calm, written),
        *under("without faults", _of_calm(calm)),
        *_of_leaks(before, after),
        Figure(name="tasks at the end, of the process that has the most", value=max(running, key=_total)),
        *_of_gaps(loaded, began),
        Figure(name="what was handled or heard twice", value=_twice([*loaded, *calm], stored, written, began)),
    ]
    return [figure for figure in figures if not figure.name.endswith(_WITH_PAUSES)]


async def _load(soak: Soak, seed: int) -> None:
    for number, caller in enumerate(soak.callers):
        await caller.hand.ask("load", seed=seed + number, keys=_KEYS, keys_for=_KEYS_FOR)


async def _finish(soak: Soak) -> list[dict[str, Any]]:
    """End a time of load without faults."""
    await asyncio.sleep(_WARM_SECONDS)
    return await soak.ask(soak.callers, "finish")


def _ledgers(loaded: Sequence[Mapping[str, Any]], kind: str) -> list[Ledger]:
    return [Ledger.from_json(one[kind]) for one in loaded]


def _of_calls(loaded: Sequence[Mapping[str, Any]], written: Book) -> list[Figure]:
    plain, cancelled = (Ledger.together(_ledgers(loaded, kind)) for kind in ("plain", "cancelled"))
    handled = written.get("handled", {})
    asked_to_end = {entry.reply for entry in cancelled.entries}
    return [
        *plain.figures("plain"),
        *cancelled.figures("cancelled"),
        Figure(name="calls that were handled twice", value=sum(len(n) > 1 for n in handled.values()), at_most=0),
        Figure(
            name="calls that were answered, and not handled",
            value=sum(entry.acknowledged and entry.reply not in handled for entry in plain.entries),
            at_most=0,
        ),
        Figure(
            name="handlers that were cancelled, although nobody asked for it",
            value=len(written.get("cancelled", {}).keys() - asked_to_end),
            at_most=0,
        ),
        Figure(name="handlers that were cancelled", value=len(written.get("cancelled", ()))),
    ]


def _of_events(loaded: Sequence[Mapping[str, Any]], calm: Sequence[Mapping[str, Any]], written: Book) -> list[Figure]:
    """Core NATS loses events that are on their way when a link, a server or a worker fails."""
    heard = written.get("heard", {})

    def published(some: Sequence[Mapping[str, Any]]) -> list[str]:
        return [name for one in some for name, _ in one["ticks"]]

    return [
        Figure(name="events published", value=len(published([*loaded, *calm]))),
        Figure(name="events lost during faults", value=sum(name not in heard for name in published(loaded))),
        Figure(name="events lost without faults", value=sum(name not in heard for name in published(calm)), at_most=0),
        Figure(name="events that were heard twice", value=sum(len(n) > 1 for n in heard.values()), at_most=0),
    ]


def _of_calm(calm: Sequence[Mapping[str, Any]]) -> list[Figure]:
    ledger = Ledger.together(one for kind in ("plain", "counters", "cancelled") for one in _ledgers(calm, kind))
    return [
        Figure(name="calls", value=len(ledger.entries), at_least=1),
        Figure(name="calls that failed", value=len(ledger.entries) - ledger.acknowledged, at_most=0),
    ]


def _twice(
    loaded: Sequence[Mapping[str, Any]], stored: Mapping[str, Sequence[str]], written: Book, began: float
) -> str:
    """Each message that was handled more than once: when, since the beginning of the faults, and by which processes.

    A counter may handle a call again whose first change was lost with its worker, so what is stored decides there.
    """
    calls = {
        entry.reply[0] if kind == "counters" else entry.reply: entry
        for kind in ("plain", "cancelled", "counters")
        for one in _ledgers(loaded, kind)
        for entry in one.entries
        if entry.reply is not None
    }
    counts = Counter(name for names in stored.values() for name in names)
    told = []
    for word in ("handled", "heard", "counted"):
        for name, lines in written.get(word, {}).items():
            twice = len(lines) > 1 and (word != "counted" or counts[name] > 1)
            if twice:
                told.append(
                    f"{name} {word} {', '.join(f'{line.moment - began:.2f} s by {line.pid}' for line in lines)}"
                )
                if (call := calls.get(name)) is not None:
                    told[-1] += f" (sent {call.sent - began:.2f} s, {call.outcome} {call.ended - began:.2f} s)"
    return "; ".join(told) or "nothing"


def _total(counts: Mapping[str, int]) -> int:
    return sum(counts.values())


def _of_gaps(loaded: Sequence[Mapping[str, Any]], began: float) -> list[Figure]:
    """How long no call at all was answered, and when that began, to find the fault in the plan."""
    everything = Ledger.together(one for kind in ("plain", "counters") for one in _ledgers(loaded, kind))
    moments = sorted(entry.ended - began for entry in everything.entries if entry.acknowledged)
    gap, start = max((later - earlier, earlier) for earlier, later in zip(moments, moments[1:], strict=False))
    return [
        Figure(name="longest time without a reply to anybody", value=gap, unit="s"),
        Figure(name="which began, after the beginning of the faults", value=start, unit="s"),
        Figure(name="slowest call", value=everything.slowest, unit="s", at_most=_ENDS_WITHIN),
    ]


async def _usage_at_rest(soak: Soak, before: Mapping[str, int] | None = None) -> dict[str, int]:
    """What is taken when it is no more than ``before``, with what is allowed, or after some time."""
    usage = await _usage(soak)
    for _ in range(_LOOKS if before is not None else _LOOKS // 3):
        if before is not None and not broken(_of_leaks(before, usage)):
            break
        await asyncio.sleep(_LOOK_EVERY)
        usage = await _usage(soak)
    return usage


async def _usage(soak: Soak) -> dict[str, int]:
    """What the processes take that take the most, and the servers."""
    usages = await soak.ask(soak.members, "usage")
    return {name: max(usage[name] for usage in usages) for name in usages[0]} | await soak.cluster.totals()


def _of_leaks(before: Mapping[str, int], after: Mapping[str, int]) -> list[Figure]:
    return [
        Figure(
            name=f"{name} at the end, more than at the beginning",
            value=after[name] - before[name],
            at_most=_MORE_AT_MOST.get(name, 0),
        )
        for name in after
    ]


async def _all(short: bool) -> list[Figure]:
    return await measure(60.0) if short else await measure()


SCENARIO = Timed(title="Everything goes wrong at once, for as long as asked", measure=_all, measure_for=measure)
