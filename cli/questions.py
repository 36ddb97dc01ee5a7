"""Answers the questions of a handler with lines of standard input, which a person types or a program writes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import termios
from typing import Any, NoReturn

from autogen_core import AgentId

from natsrt.errors import NobodyToAsk
from natsrt.wire.serialization import Encoded

from .output import note, printable, prompt

_AT_ONCE = 65536
"""Bytes that are read at once."""
_LIKE_JSON = ("{", "[", '"')
"""How a line begins that is meant as JSON."""


class AnswersFromInput:
    """Answers the questions of one call, one after the other."""

    def __init__(self, agent: AgentId) -> None:
        self._agent = agent
        self._input = _Lines(sys.stdin.fileno())
        self._turn = asyncio.Lock()

    async def answer(self, question: Encoded) -> Any:
        """Print a question, and return the next line of the input as JSON values. A line that cannot be an answer is
        followed by another try.

        Raises `NobodyToAsk` at the end of the input.
        """
        async with self._turn:
            payload = question.payload.decode("utf-8", "backslashreplace")
            note(printable(f"question {question.type_name}: {payload}"))
            try:
                return await self._answer()
            except asyncio.CancelledError:
                note("nobody waits for the answer any more")
                raise

    async def _answer(self) -> Any:
        self._input.forget_typed()
        while True:
            if self._input.is_terminal:
                prompt("answer: ")
            answer = await self._input.next()
            if answer is None:
                note("natsrt: the question is not answered: standard input has no more lines", "warning")
                raise NobodyToAsk(str(self._agent), "standard input of natsrt send has no answer")
            try:
                return read_answer(answer)
            except ValueError as error:
                note(f"this cannot be an answer: {error}")


def read_answer(line: bytes) -> Any:
    """The values of a line of JSON, or the line itself if it does not begin like JSON. Raises ValueError."""
    try:
        text = line.decode().strip()
    except UnicodeDecodeError:
        raise ValueError("it is no text in UTF-8") from None
    if not text:
        raise ValueError('the line is empty; write "" for an empty text')
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        if text.startswith(_LIKE_JSON):
            raise ValueError(f"it begins like JSON, but is not: {error.msg}, at character {error.pos + 1}") from None
        return text
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def _set(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)


class _Lines:
    """The lines of a file, read without blocking the event loop."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._read = b""
        self.is_terminal: bool = os.isatty(file)

    def forget_typed(self) -> None:
        """Forget what was typed at a terminal until now: it was no answer to what is asked from now on."""
        if self.is_terminal:
            self._read = b""
            termios.tcflush(self._file, termios.TCIFLUSH)

    async def next(self) -> bytes | None:
        """The next line; None at the end."""
        while b"\n" not in self._read:
            data = await self._more()
            if not data and not self._read:
                return None
            self._read += data or b"\n"
        first, _, self._read = self._read.partition(b"\n")
        return first

    async def _more(self) -> bytes:
        """What can be read next; nothing at the end."""
        loop = asyncio.get_running_loop()
        readable: asyncio.Future[None] = loop.create_future()
        try:
            loop.add_reader(self._file, _set, readable)
        except PermissionError:  # it is an ordinary file, which never makes its reader wait
            return os.read(self._file, _AT_ONCE)
        try:
            await readable
        finally:
            loop.remove_reader(self._file)
        return os.read(self._file, _AT_ONCE)
