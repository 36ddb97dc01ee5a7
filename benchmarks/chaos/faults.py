"""What goes wrong in a soak, and when: a plan made from a seed. Pure values: no I/O."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """One kind of fault. The value is its name in figures."""

    KILL_WORKER = "workers killed"
    STOP_WORKER = "workers stopped"
    FREEZE_WORKER = "workers frozen"
    FREEZE_CALLER = "callers frozen"
    STALL_LINK = "links stalled"
    CUT_LINK = "links cut"
    KILL_SERVER = "servers killed"
    FREEZE_SERVER = "servers frozen"
    PURGE_REGISTRY = "registries purged"
    SHIFT_CLOCK = "clocks shifted"


_EXCLUSIVE = (
    frozenset((Kind.KILL_SERVER, Kind.FREEZE_SERVER, Kind.PURGE_REGISTRY)),
    frozenset((Kind.KILL_WORKER, Kind.STOP_WORKER, Kind.FREEZE_WORKER)),
)
"""Of the faults of one group, one begins when the one before it is over: a cluster without a majority stores nothing,
and agents without a worker answer nothing."""
_SECONDS = {
    Kind.KILL_WORKER: (0.5, 3.0),
    Kind.STOP_WORKER: (0.5, 3.0),
    Kind.FREEZE_WORKER: (0.5, 9.0),
    Kind.FREEZE_CALLER: (0.5, 5.0),
    Kind.STALL_LINK: (0.5, 9.0),
    Kind.CUT_LINK: (0.1, 4.0),
    Kind.KILL_SERVER: (0.5, 5.0),
    Kind.FREEZE_SERVER: (0.5, 9.0),
    Kind.PURGE_REGISTRY: (0.0, 0.0),
    Kind.SHIFT_CLOCK: (-86_400.0, 86_400.0),
}
"""The shortest and the longest fault, in seconds. For `SHIFT_CLOCK`, the seconds by which the clock jumps."""
_SERVER_REST = 6.0
"""Seconds after a fault of a server until the next one may begin: the cluster has elected its leaders by then."""
_PAUSE = 1.5
"""Seconds between the beginnings of two faults, in the mean."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: ``at`` seconds after the beginning, for ``seconds``. It hits the ``target``-th process or server."""

    at: float
    kind: Kind
    target: int
    seconds: float

    @property
    def until(self) -> float:
        """When it is over, in seconds after the beginning."""
        return self.at if self.kind is Kind.SHIFT_CLOCK else self.at + self.seconds


def plan(seed: int, seconds: float, kinds: Sequence[Kind] = tuple(Kind)) -> list[Fault]:
    """Return the faults of a soak of this many seconds, in order. The same arguments give the same faults.

    All are over at the end.
    """
    rng = random.Random(seed)
    faults: list[Fault] = []
    free = dict.fromkeys(_EXCLUSIVE, 0.0)
    at = 0.0
    while True:
        at += rng.expovariate(1 / _PAUSE)
        kind, target = rng.choice(kinds), rng.randrange(1 << 16)
        fault = Fault(at, kind, target, rng.uniform(*_SECONDS[kind]))
        if at >= seconds:
            return faults
        group = next((group for group in _EXCLUSIVE if kind in group), None)
        if fault.until > seconds or (group is not None and at < free[group]):
            continue
        faults.append(fault)
        if group is not None:
            free[group] = fault.until + (_SERVER_REST if group is _EXCLUSIVE[0] else 0.0)
