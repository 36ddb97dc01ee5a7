"""``natsrt dlq``: dead letters, which are events of durable topics that could not be handled."""

from __future__ import annotations

import asyncio
import base64
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import click
import orjson

from natsrt.errors import NatsrtError
from natsrt.jetstream.dead_letter_box import DeadLetter
from natsrt.runtime import NatsAgentRuntime

from .connecting import Connecting, connects
from .exits import CommandFailed, Exit
from .moments import Moment, iso, shown
from .naming import AGENT_TYPE
from .output import as_json as print_json
from .output import json_option, line, note, printable, table
from .suggesting import Commands
from .writing import writing

_AT_ONCE = 64
"""Dead letters that are worked on at the same time: enough that the round trips overlap."""
_TOLD_EVERY = 2.0
"""Seconds between two notes about the progress."""
_PROBLEMS_SHOWN = 20
"""Failures that are listed one by one."""
_SHOWN = 60
"""Characters of a reason in a table."""


@click.group(cls=Commands)
def dlq() -> None:
    """Show dead letters, and give them to their agent types again.

    A dead letter is an event of a durable topic that an agent type could not handle. It stays for thirty days.
    """


@dataclass(frozen=True, slots=True)
class _Filter:
    """Which dead letters a command is about; None: any."""

    agent_type: str | None
    reason: str | None
    older_than: float | None
    newer_than: float | None

    def takes(self, letter: DeadLetter) -> bool:
        """Whether it is one of them. The agent type and ``newer_than`` are left to the server."""
        if self.older_than is not None and letter.kept_at >= self.older_than:
            return False
        words = (self.reason or "").lower()
        return words in f"{letter.reason}\n{letter.error_type}\n{letter.error}".lower()

    async def read(self, runtime: NatsAgentRuntime) -> AsyncIterator[DeadLetter]:
        async for letter in runtime.running.dead_letters.read(self.agent_type, self.newer_than):
            if self.takes(letter):
                yield letter


def _filters(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose dead letters. The command gets a `_Filter` as ``chosen``."""

    @click.option("--type", "agent_type", type=AGENT_TYPE, help="Only those of this agent type.")
    @click.option("--reason", metavar="TEXT", help="Only those whose reason or error has this text, in any case.")
    @click.option("--older-than", type=Moment(), metavar="DURATION|TIME", help="Only those from before: 1h30m, 7d.")
    @click.option("--newer-than", type=Moment(), metavar="DURATION|TIME", help="Only those from then on.")
    @functools.wraps(command)
    def run(
        *arguments: Any,
        agent_type: str | None,
        reason: str | None,
        older_than: float | None,
        newer_than: float | None,
        **parameters: Any,
    ) -> Any:
        return command(*arguments, chosen=_Filter(agent_type, reason, older_than, newer_than), **parameters)

    return run


# -- ls and show -------------------------------------------------------------------------------------------------


@dlq.command()
@_filters
@click.option("--count", is_flag=True, help="Show their number by agent type and reason only.")
@json_option
@connects()
def ls(connecting: Connecting, chosen: _Filter, count: bool, as_json: bool) -> None:
    """List dead letters, the oldest first."""

    async def read() -> list[DeadLetter]:
        async with connecting.runtime() as runtime:
            return [letter async for letter in chosen.read(runtime)]

    found = asyncio.run(read())
    if count:
        _print_counts(found, as_json)
    elif as_json:
        print_json([_row(letter) for letter in found])
    elif not found:
        note("there are no dead letters")
    else:
        rows = [
            (
                letter.sequence,
                letter.agent_type,
                _topic(letter),
                letter.attempts,
                shown(letter.failed_at),
                _short(letter),
            )
            for letter in found
        ]
        table(("ID", "TYPE", "TOPIC", "ATTEMPTS", "FAILED", "REASON"), rows)


def _print_counts(found: list[DeadLetter], as_json: bool) -> None:
    counts: dict[tuple[str, str], int] = {}
    for letter in found:
        kind = (letter.agent_type, letter.error_type)
        counts[kind] = counts.get(kind, 0) + 1
    rows = sorted((*kind, number) for kind, number in counts.items())
    if as_json:
        print_json([{"agent_type": name, "error_type": error, "dead_letters": number} for name, error, number in rows])
    elif not rows:
        note("there are no dead letters")
    else:
        table(("TYPE", "ERROR", "DEAD LETTERS"), rows)


def _short(letter: DeadLetter) -> str:
    return letter.reason if len(letter.reason) <= _SHOWN else f"{letter.reason[: _SHOWN - 1]}…"


def _topic(letter: DeadLetter) -> str:
    return letter.subject if letter.topic is None else f"{letter.topic.type}/{letter.topic.source}"


def _row(letter: DeadLetter) -> dict[str, Any]:
    """What is listed of a dead letter."""
    topic = {} if letter.topic is None else {"topic_type": letter.topic.type, "topic_source": letter.topic.source}
    return {
        "id": letter.sequence,
        "agent_type": letter.agent_type,
        **topic,
        "subject": letter.subject,
        "message_id": letter.message_id,
        "reason": letter.reason,
        "error_type": letter.error_type,
        "error": letter.error,
        "attempts": letter.attempts,
        "stream": letter.stream,
        "sequence": letter.event_sequence,
        "stored_at": iso(letter.stored_at),
        "failed_at": iso(letter.failed_at),
        "size_bytes": None if letter.data is None else len(letter.data),
    }


def _whole(letter: DeadLetter) -> dict[str, Any]:
    """All of a dead letter. The body of its event is ``data`` if it is JSON, else ``data_base64``."""
    row = {**_row(letter), "traceback": letter.traceback, "headers": dict(letter.headers)}
    if letter.data is not None:
        try:
            row["data"] = orjson.loads(letter.data)
        except orjson.JSONDecodeError:
            row["data_base64"] = base64.b64encode(letter.data).decode()
    return row


@dlq.command()
@click.argument("sequence", metavar="ID", type=click.IntRange(min=1))
@json_option
@connects()
def show(connecting: Connecting, sequence: int, as_json: bool) -> None:
    """Show one dead letter, with its traceback and the event. Exits with 4 if there is none with this id."""

    async def read() -> DeadLetter:
        async with connecting.runtime() as runtime:
            return await _get(runtime, sequence)

    letter = asyncio.run(read())
    if as_json:
        print_json(_whole(letter))
        return
    for name, value in _row(letter).items():
        line(printable(f"{name}: {value}"))
    line("event: " + ("not kept, because it is too large" if letter.data is None else _text(letter.data)))
    if letter.traceback:
        line(printable(letter.traceback.rstrip()))


def _text(data: bytes) -> str:
    return printable(data.decode("utf-8", "backslashreplace"))


async def _get(runtime: NatsAgentRuntime, sequence: int) -> DeadLetter:
    letter = await runtime.running.dead_letters.get(sequence)
    if letter is None:
        raise CommandFailed(f"there is no dead letter {sequence}", Exit.UNKNOWN_AGENT)
    return letter


# -- redrive and rm ----------------------------------------------------------------------------------------------


def _chooses(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the ids, the filters and ``--all`` of a command that changes dead letters."""
    command = click.option("--all", "every", is_flag=True, help="All that the filters leave.")(_filters(command))
    return click.argument("sequences", metavar="[ID]...", type=click.IntRange(min=1), nargs=-1)(command)


@dlq.command()
@_chooses
@connects()
def redrive(connecting: Connecting, sequences: tuple[int, ...], chosen: _Filter, every: bool) -> int:
    """Give dead letters to their agent types again, and remove them.

    Names them by their ids, or by filters, or all with --all. Their events keep their message ids, and their attempts
    begin with 1. Interrupted, and run again, it hands no event over twice.

    Exits with 7 if some could not be redriven; they stay.
    """

    async def work(runtime: NatsAgentRuntime, letter: DeadLetter) -> None:
        await runtime.redrive(letter)

    return asyncio.run(_each(connecting, sequences, chosen, every, work, "redriven"))


@dlq.command()
@_chooses
@click.option("--yes", is_flag=True, help="Do not ask.")
@connects()
def rm(connecting: Connecting, sequences: tuple[int, ...], chosen: _Filter, every: bool, yes: bool) -> int:
    """Remove dead letters for good. Names them as `natsrt dlq redrive` does."""
    _require_choice(sequences, chosen, every)
    if not yes and not sequences:
        click.confirm("Remove these dead letters for good?", abort=True, err=True)

    async def work(runtime: NatsAgentRuntime, letter: DeadLetter) -> None:
        await runtime.discard(letter)

    return asyncio.run(_each(connecting, sequences, chosen, every, work, "removed"))


def _require_choice(sequences: tuple[int, ...], chosen: _Filter, every: bool) -> None:
    """Refuse a command that names no dead letters, so that none is changed by mistake."""
    filtered = chosen != _Filter(None, None, None, None)
    if not sequences and not every and not filtered:
        raise CommandFailed("name dead letters by their ids, or by filters; --all is for all of them", Exit.USAGE)
    if sequences and (every or filtered):
        raise CommandFailed("ids cannot be combined with filters or --all", Exit.USAGE)


async def _each(
    connecting: Connecting,
    sequences: tuple[int, ...],
    chosen: _Filter,
    every: bool,
    work: Callable[[NatsAgentRuntime, DeadLetter], Awaitable[None]],
    done: str,
) -> int:
    """Do ``work`` with each dead letter that is named. Returns the exit code."""
    _require_choice(sequences, chosen, every)
    async with connecting.runtime() as runtime:
        progress = _Progress(done)

        async def one(letter: DeadLetter) -> None:
            try:
                await work(runtime, letter)
                progress.succeeded()
            except NatsrtError as error:
                progress.failed(letter, error)

        batch: list[DeadLetter] = []
        async for letter in _named(runtime, sequences) if sequences else chosen.read(runtime):
            batch.append(letter)
            if len(batch) >= _AT_ONCE:
                await asyncio.gather(*map(one, batch))
                batch.clear()
        await asyncio.gather(*map(one, batch))
        return progress.end()


async def _named(runtime: NatsAgentRuntime, sequences: tuple[int, ...]) -> AsyncIterator[DeadLetter]:
    for sequence in dict.fromkeys(sequences):
        yield await _get(runtime, sequence)


class _Progress:
    """Tells how far a command is, and what failed."""

    def __init__(self, done: str) -> None:
        self._done = done
        self._count = 0
        self._problems: list[str] = []
        self._told_at = time.monotonic()

    def succeeded(self) -> None:
        self._count += 1
        if time.monotonic() - self._told_at >= _TOLD_EVERY:
            self._told_at = time.monotonic()
            note(f"{self._done}: {self._count:,} …")

    def failed(self, letter: DeadLetter, error: NatsrtError) -> None:
        self._problems.append(f"dead letter {letter.sequence} of {letter.agent_type}: {error}")

    def end(self) -> int:
        """Tell the result. Returns the exit code."""
        for problem in self._problems[:_PROBLEMS_SHOWN]:
            note(f"natsrt: {problem}", "error")
        if (more := len(self._problems) - _PROBLEMS_SHOWN) > 0:
            note(f"natsrt: and {more:,} more", "error")
        failed = f", failed: {len(self._problems):,}" if self._problems else ""
        note(f"{self._done}: {self._count:,}{failed}")
        return Exit.PROBLEMS if self._problems else Exit.OK


# -- export ------------------------------------------------------------------------------------------------------


@dlq.command()
@click.argument("file", metavar="[FILE|-]", default="-")
@_filters
@connects()
def export(connecting: Connecting, file: str, chosen: _Filter) -> None:
    """Write dead letters as JSON Lines, with their events and tracebacks. They stay.

    They go to standard output, or to a file that appears when it is complete.
    """

    async def write_all(write: Callable[[bytes], Any]) -> int:
        number = 0
        async with connecting.runtime() as runtime:
            async for letter in chosen.read(runtime):
                write(orjson.dumps(_whole(letter)))
                number += 1
        return number

    with writing(file) as write:
        number = asyncio.run(write_all(write))
    note(f"exported dead letters: {number:,}")
