"""Changes good inputs into others: bytes are cut, repeated and exchanged, and parts of JSON become something else."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

LONGEST: Final = 1_100_000
"""Maximum length of an input in bytes: a little more than the usual ``max_payload``."""
_LARGE_EVERY = 2000
"""One input of this many is made large, in the mean."""
_CHANGES_AT_MOST = 6
_LONGEST_JSON = 20_000
"""JSON of more bytes is changed as bytes, because copies of its parts may grow without end."""

WORDS: Final[tuple[bytes, ...]] = (
    b"",
    b"\x00",
    b"\r\n",
    b"\r\nPUB agent.admin 0\r\n",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    "٣é😀".encode(),
    b"\\ud800",
    b"\\u0000",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b" ",
    b"*",
    b">",
    b".",
    b"..",
    b"=",
    b"=zz",
    b"=C3=28",
    b"=2E",
    b"=H" + b"0" * 64,
    b"$JS.API.INFO",
    b"null",
    b"true",
    b"NaN",
    b"1e999",
    b"-1e999",
    b"1" * 400,
    b"-0",
    b"1.5",
    b'"data":',
    b',"data":',
    b'"data_base64":"!!!"',
    b'"specversion":"1.0",',
    b'{"specversion":"1.0"',
    b'"$type":"repr"',
    b"natsrt.",
)
"""Pieces that are inserted: what ends, escapes and separates in subjects, header blocks and JSON."""

VALUES: Final[tuple[Any, ...]] = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    2**31,
    2**63,
    2**64,
    1e308,
    float("inf"),
    10**400,
    "",
    " ",
    "x",
    "\ud800",
    "\0",
    "a b",
    "\r\n",
    "=zz",
    "=H" + "0" * 64,
    "*",
    ">",
    "x" * 1500,
    "é" * 400,
    [],
    {},
    [[]],
    [None],
    ["x", "x"],
    {"": ""},
    {"$type": "repr", "value": "x"},
    {"$type": "bytes", "value": "=="},
    {"$type": "Nothing"},
    "__class__",
    "__dict__",
    "args",
    "natsrt_remote",
)
"""Values that take the place of a part of JSON."""


class Mutator:
    """Makes inputs. The same seed gives the same inputs in the same order.

    Args:
        seed: Any text.
        corpus: Inputs to start from; at least one.
        words: More pieces for these inputs, such as the names of classes.
    """

    def __init__(self, seed: str, corpus: Sequence[bytes], words: Sequence[str] = ()) -> None:
        self._random = random.Random(seed)
        self._corpus = corpus
        self._words = (*WORDS, *(word.encode() for word in words))
        self._values = (*VALUES, *words)
        self._changes: tuple[Callable[[bytes], bytes], ...] = (
            self._cut,
            self._drop,
            self._insert,
            self._insert,
            self._exchange,
            self._repeat,
            self._splice,
            self._change_json,
            self._change_json,
            self._change_json,
        )

    def input(self) -> bytes:
        """Return the next input."""
        rng = self._random
        made = rng.choice(self._corpus)
        for _ in range(min(1 + int(rng.expovariate(0.7)), _CHANGES_AT_MOST)):
            made = rng.choice(self._changes)(made)
        if rng.random() < 1 / _LARGE_EVERY:
            made = self._enlarge(made)
        return made[:LONGEST]

    def _span(self, data: bytes) -> tuple[int, int]:
        start = self._random.randint(0, len(data))
        return start, min(len(data), start + int(self._random.expovariate(0.1)))

    def _cut(self, data: bytes) -> bytes:
        return data[: self._random.randint(0, len(data))]

    def _drop(self, data: bytes) -> bytes:
        start, end = self._span(data)
        return data[:start] + data[end:]

    def _insert(self, data: bytes) -> bytes:
        at = self._random.randint(0, len(data))
        return data[:at] + self._random.choice(self._words) + data[at:]

    def _exchange(self, data: bytes) -> bytes:
        start, end = self._span(data)
        return data[:start] + self._random.randbytes(end - start) + data[end:]

    def _repeat(self, data: bytes) -> bytes:
        start, end = self._span(data)
        return data[:end] + data[start:end] * self._random.randint(1, 20) + data[end:]

    def _splice(self, data: bytes) -> bytes:
        other = self._random.choice(self._corpus)
        return data[: self._span(data)[0]] + other[self._span(other)[0] :]

    def _enlarge(self, data: bytes) -> bytes:
        start, end = self._span(data)
        piece = data[start:end] or self._random.choice((b"[", b'{"a":', b"=", b"9", b"x", b"\\u0000", b" "))
        return data[:start] + piece * (self._random.choice((2_000, 100_000, LONGEST)) // len(piece)) + data[end:]

    def _change_json(self, data: bytes) -> bytes:
        """Change one part of the JSON in ``data``, which begins at its first brace; other bytes if there is none."""
        start = data.find(b"{")
        try:
            tree = json.loads(data[start:]) if start >= 0 and len(data) < _LONGEST_JSON else None
        except (ValueError, RecursionError):
            tree = None
        if not isinstance(tree, dict) or not tree:
            return self._exchange(data)
        for _ in range(self._random.choice((1, 1, 1, 2, 3))):
            self._change_part(tree)
        spaces = self._random.choice(((",", ":"), (",", ":"), (", ", ": ")))
        return data[:start] + json.dumps(tree, separators=spaces).encode()

    def _change_part(self, tree: dict[str, Any]) -> None:
        rng = self._random
        node: Any = tree
        while True:
            keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                return
            key = rng.choice(keys)
            if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.3:
                break
            node = node[key]
        match rng.randrange(6):
            case 0:
                del node[key]
            case 1:
                node[key] = [copy.deepcopy(node[key]) for _ in range(rng.choice((1, 2, 10)))]
            case 2:
                node[key] = {rng.choice(self._words).decode(errors="replace"): node[key]}
            case 3 if isinstance(node, dict):
                node[rng.choice(self._words).decode(errors="replace")] = node.pop(key)
            case 4 if isinstance(node, dict):
                node[key] = copy.deepcopy(node[rng.choice(keys)])
            case _:
                node[key] = copy.deepcopy(rng.choice(self._values))
