"""Tries inputs on a reader, and keeps what breaks it."""

from __future__ import annotations

import hashlib
import time
import traceback
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.fuzz.mutations import Mutator
from tests.fuzz.readers import Reader, found

_SECONDS_AT_MOST: Final = 1.0
"""CPU time that any input may take: about 100 times what is seen, for slow machines."""
_SECONDS_FOR_EACH: Final = 10e-6
"""CPU time that an input may take besides, for each of its bytes: five times the most that is seen."""
_BYTES_AT_MOST = 32 * 2**20
"""Memory that any input may take."""
_BYTES_FOR_EACH = 100
"""Bytes of memory that an input may take besides, for each of its own bytes."""
_MEASURED_EVERY = 500
"""Memory is measured for one input of this many, and for each long one, because measuring takes ten times as long."""
_LONG = 50_000
_TRIES = 3
"""How often an input must take too much time, so that it is no other work of the machine."""


@dataclass
class Outcome:
    """What became of the inputs of one reader."""

    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    """CPU seconds of the slowest input, and its size in bytes."""
    slowest_size: int = 0
    findings: dict[str, bytes] = field(default_factory=dict)
    """The shortest input for each way in which the reader broke, by a description."""

    @property
    def tried(self) -> int:
        return self.read + self.refused

    def keep(self, problem: str, given: bytes) -> None:
        """Keep an input that broke the reader, unless a shorter one did so in the same way."""
        present = self.findings.get(problem)
        if present is None or len(given) < len(present):
            self.findings[problem] = given


def attempt(reader: Reader, given: bytes) -> tuple[bool, str | None]:
    """Read one input. Returns whether it was accepted, and what is wrong with the reader; None if nothing is."""
    try:
        reader.read(given)
        return True, None
    except reader.raises:
        return False, None
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return False, f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:100]}"


def _seconds(reader: Reader, given: bytes) -> float:
    start = time.thread_time()
    attempt(reader, given)
    return time.thread_time() - start


def _peak(reader: Reader, given: bytes) -> int:
    tracemalloc.start()
    try:
        attempt(reader, given)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def try_input(reader: Reader, given: bytes, outcome: Outcome, *, with_memory: bool = False) -> None:
    """Read one input, and keep it in the outcome if the reader breaks, or takes too much time or memory."""
    start = time.thread_time()
    accepted, problem = attempt(reader, given)
    seconds = time.thread_time() - start
    outcome.read += accepted
    outcome.refused += not accepted
    if problem is not None:
        outcome.keep(problem, given)
    most = _SECONDS_AT_MOST + _SECONDS_FOR_EACH * len(given)
    if seconds > most:
        seconds = min(seconds, *(_seconds(reader, given) for _ in range(_TRIES - 1)))
        if seconds > most:
            outcome.keep("it takes too long", given)
    if seconds > outcome.slowest:
        outcome.slowest, outcome.slowest_size = seconds, len(given)
    if with_memory and _peak(reader, given) > _BYTES_AT_MOST + _BYTES_FOR_EACH * len(given):
        outcome.keep("it takes too much memory", given)


def run(reader: Reader, count: int, seed: int, going_on: Callable[[], bool] = lambda: True) -> Outcome:
    """Try the corpus, the former findings, and ``count`` inputs made from them. The same seed tries the same inputs."""
    outcome = Outcome()
    start = [*reader.corpus, *found(reader.name)]
    for given in start:
        try_input(reader, given, outcome, with_memory=True)
    mutator = Mutator(f"{reader.name} {seed}", start, reader.words)
    for number in range(count):
        if not going_on():
            break
        given = mutator.input()
        try_input(reader, given, outcome, with_memory=number % _MEASURED_EVERY == 0 or len(given) > _LONG)
    return outcome


def shortened(reader: Reader, given: bytes, problem: str) -> bytes:
    """Return a shorter input that breaks the reader in the same way, or ``given``."""
    size = len(given) // 2
    while size:
        at = 0
        while at < len(given):
            shorter = given[:at] + given[at + size :]
            if attempt(reader, shorter)[1] == problem:
                given = shorter
            else:
                at += size
        size //= 2
    return given


def save(reader: Reader, given: bytes, directory: Path) -> Path:
    """Write an input to the findings of a reader, so that later runs start with it."""
    path = directory / reader.name / hashlib.sha256(given).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(given)
    return path
