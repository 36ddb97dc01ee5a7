"""What handlers did, written to files at once, so that a killed process loses nothing of it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class Journal:
    """The file of one process. A line is a word, the id of a message, and the moment by the monotonic clock."""

    def __init__(self, directory: str) -> None:
        self._file = os.open(
            Path(directory) / f"{os.getpid()}-{os.urandom(4).hex()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND
        )

    def write(self, word: str, of: str) -> None:
        """Write one line. It is there when this returns, also if the process is killed then."""
        os.write(self._file, f"{word} {of} {time.monotonic()!r}\n".encode())

    def close(self) -> None:
        """Write no more."""
        os.close(self._file)


@dataclass(frozen=True, slots=True)
class Written:
    """One line: the process that wrote it, and the moment by the monotonic clock."""

    pid: int
    moment: float


Book = Mapping[str, Mapping[str, Sequence[Written]]]
"""What was written about each message: lines by word and by the id of the message."""


def read(directory: str) -> Book:
    """Return what all processes have written."""
    book: dict[str, dict[str, list[Written]]] = {}
    for path in Path(directory).iterdir():
        pid = int(path.name.partition("-")[0])
        for line in path.read_text().splitlines():
            word, of, moment = line.split(" ")
            book.setdefault(word, {}).setdefault(of, []).append(Written(pid, float(moment)))
    return book
