"""One run with streams: what is streamed, and what goes wrong meanwhile. A plan made from a seed, without I/O."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum


class End(Enum):
    """The two ends of a stream."""

    WORKER = "worker"
    CALLER = "caller"


class Kind(Enum):
    """One kind of fault. The value is its name in figures."""

    CUT = "links cut"
    FREEZE = "processes frozen"
    KILL = "processes killed"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of one end: ``at`` seconds after the beginning, for ``seconds``. Nothing ends a `Kind.KILL`."""

    at: float
    end: End
    kind: Kind
    seconds: float


@dataclass(frozen=True, slots=True)
class Streamed:
    """One stream.

    ``count`` items with texts of ``size`` characters are sent, each after ``pause`` seconds, and read with
    ``read_pause`` seconds between two of them. ``take``: after so many the stream is left; None: it is read to its end.
    """

    count: int
    size: int
    pause: float
    read_pause: float
    window: int
    keyed: bool
    take: int | None


@dataclass(frozen=True, slots=True)
class Run:
    """Streams that are read at the same time, and the faults meanwhile, in order.

    ``gentle``: all faults are so short that every stream must be complete.
    """

    streams: tuple[Streamed, ...]
    faults: tuple[Fault, ...]
    gentle: bool


_WHILE = 2.0
"""Seconds after the beginning in which faults begin. A stream takes about as long."""
_SHAPES = (
    (50_000, 0, 0.0, 0.0),
    (1_200, 100, 0.0, 0.001),
    (1_200, 100, 0.001, 0.0),
    (150, 2_000, 0.01, 0.0),
    (30, 100, 0.0, 0.05),
    (300, 20_000, 0.0, 0.005),
    (8, 1_500_000, 0.1, 0.0),
)
"""Number of items, their size, the pause before each is sent, and that after each is read. The last are sent by
reference."""
_SHORT, _LONG = (0.0, 0.15), (0.3, 8.0)
"""Seconds of short and of long faults. The long ones include those after which an end is given up."""


def plan(seed: int, number: int) -> Run:
    """Return the ``number``-th run of a seed. The same arguments give the same run."""
    rng = random.Random(f"{seed}/{number}")
    streams = tuple(_stream(rng) for _ in range(rng.choice((1, 1, 2, 4))))
    gentle = rng.random() < 0.5
    faults = _gentle(rng) if gentle else _harsh(rng)
    return Run(streams, tuple(sorted(faults, key=lambda fault: fault.at)), gentle)


def _stream(rng: random.Random) -> Streamed:
    count, size, pause, read_pause = rng.choice(_SHAPES)
    window = rng.choice((1, 2, 10, 256, 256, 4_096))
    if window < 10:
        count = min(count, 1_000)  # each item waits for a round trip
    take = rng.randint(1, count) if rng.random() < 0.15 else None
    return Streamed(count, size, pause, read_pause, window, rng.random() < 0.4, take)


def _gentle(rng: random.Random) -> list[Fault]:
    faults = []
    for _ in range(rng.randint(1, 5)):
        at, kind = rng.uniform(0, _WHILE), rng.choice((Kind.CUT, Kind.CUT, Kind.FREEZE))
        for end in rng.choice(((End.WORKER,), (End.CALLER,), tuple(End))):
            faults.append(Fault(at, end, kind, rng.uniform(*_SHORT)))
    return faults


def _harsh(rng: random.Random) -> list[Fault]:
    faults = []
    for kind in rng.choices((Kind.CUT, Kind.FREEZE, Kind.KILL), weights=(3, 3, 4), k=rng.randint(1, 3)):
        seconds = rng.uniform(*rng.choice((_SHORT, _LONG)))
        faults.append(Fault(rng.uniform(0, _WHILE), rng.choice(tuple(End)), kind, seconds))
    return faults
