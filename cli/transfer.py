"""``natsrt state export`` and ``import``: all stored states as JSON Lines."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import click
import orjson
from autogen_core import AgentId

from natsrt.errors import CannotDecode
from natsrt.jetstream.agent_records import AgentRecords, Record, RecordChanged, RecordTaken
from natsrt.jetstream.record import encode_head
from natsrt.runtime import NatsAgentRuntime

from .connecting import Connecting, connects
from .exits import CommandFailed, Exit, exit_code
from .output import as_json as print_json
from .output import json_option, line, note, table
from .owner_finder import OwnerFinder, saved_at
from .storing import (
    TRIES,
    encoded,
    find,
    force_option,
    in_batches,
    is_told,
    parsed,
    put,
    refuse_restless,
    refuse_silence,
    state_of,
    stored_states,
)

_PROBLEMS_SHOWN = 20
_STORED, _REPLACED, _UNCHANGED = "stored", "replaced", "unchanged"

# -- export ------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("file", metavar="[FILE|-]", default="-")
@click.option("--type", "agent_type", metavar="TYPE", help="Only the agents of this type.")
@connects()
def export(connecting: Connecting, file: str, agent_type: str | None) -> int:
    """Write all stored states as JSON Lines.

    A line has type, key, saved_at and state; lines are sorted by type and key. They go to standard output, or to a file
    that is there once it is complete. Of a live agent it is what is stored.

    Exits with 7 if something cannot be read: that is named and left out.
    """
    try:
        with _writing(file) as write:
            return asyncio.run(_export(connecting, agent_type, write))
    except OSError as error:
        if is_told(error):  # natsrt's own are among them
            raise
        raise CommandFailed(f"{file}: {error.strerror}") from error


async def _export(connecting: Connecting, agent_type: str | None, write: Callable[[bytes], Any]) -> Exit:
    count = size = 0
    async with connecting.runtime() as runtime:
        records = runtime.running.records
        stored, damaged = await stored_states(records, agent_type)
        async for record, content in _contents(records, stored):
            if isinstance(content, CannotDecode):
                damaged.append(content)
            elif content is not None:
                write(_exported(record, content))
                count, size = count + 1, size + len(content)
    note(f"exported states: {count:,} of {size:,} bytes in all")
    for error in damaged:
        note(f"natsrt: left out: {error}")
    return Exit.PROBLEMS if damaged else Exit.OK


async def _contents(
    records: AgentRecords, stored: Sequence[Record]
) -> AsyncIterator[tuple[Record, bytes | CannotDecode | None]]:
    """The states in order, some of them read at once. None: there is none any more; an error: it is damaged."""

    async def read(record: Record) -> bytes | CannotDecode | None:
        try:
            content = await state_of(records, record)
            if content is not None:
                orjson.loads(content)
            return content
        except CannotDecode as error:
            return error
        except orjson.JSONDecodeError as error:
            return CannotDecode(f"the state of {record.agent}", str(error))

    for batch in in_batches(stored, lambda record: record.size):
        for record, content in zip(batch, await asyncio.gather(*map(read, batch)), strict=True):
            yield record, content


def _exported(record: Record, content: bytes) -> bytes:
    content = content.replace(b"\r", b" ").replace(b"\n", b" ")  # white space: in JSON no string has them
    row = {"type": record.agent.type, "key": record.agent.key, "saved_at": saved_at(record)}
    return orjson.dumps({**row, "state": orjson.Fragment(content)})


@contextmanager
def _writing(file: str) -> Iterator[Callable[[bytes], Any]]:
    """Writes lines: to standard output, to a device or pipe, or to a file that appears, or is replaced, at the end."""
    if file == "-":
        yield lambda text: line(text.decode())
        return
    path = Path(file)
    in_place = path.exists() and not path.is_file()
    target = path if in_place else path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with target.open("wb") as stream:
            yield lambda text: stream.write(text + b"\n")
        if not in_place:
            target.replace(path)
    finally:
        if not in_place:
            target.unlink(missing_ok=True)


# -- import ------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    agent: AgentId
    content: bytes


@click.command("import")
@click.argument("file", metavar="FILE|-", type=click.File("rb"))
@click.option("--replace", is_flag=True, help="Also where another state is stored, or a worker has the agent.")
@force_option
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@json_option
@connects()
def import_(connecting: Connecting, file: IO[bytes], replace: bool, force: bool, dry_run: bool, as_json: bool) -> int:
    """Store states from JSON Lines, as `natsrt state export` writes them.

    All lines are checked before anything is stored. An agent that has another state, or that a worker has, is a
    conflict and stays as it is, unless --replace is given, or --force, which says that and more: then it goes as with
    `natsrt state set`. What is stored already is left alone, so an import that was interrupted can be run again.

    Exits with 7 if there were conflicts.
    """
    with tempfile.TemporaryFile() if not file.seekable() else file as lines:
        if lines is not file:
            shutil.copyfileobj(file, lines)
            lines.seek(0)
        start = lines.tell()
        _check(lines)
        lines.seek(start)
        done = asyncio.run(_import(connecting, lines, replace=replace or force, force=force, dry_run=dry_run))
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                **{outcome: done.outcomes[outcome] for outcome in (_STORED, _REPLACED, _UNCHANGED)},
                "conflicts": [
                    {"type": agent.type, "key": agent.key, "problem": problem} for agent, problem in done.conflicts
                ],
            }
        )
    else:
        if done.conflicts:
            table(("CONFLICT", "PROBLEM"), [(str(agent), problem) for agent, problem in done.conflicts])
            line()
        line(f"{'would be ' if dry_run else ''}{done}")
    return Exit.PROBLEMS if done.conflicts else Exit.OK


def _rows(lines: IO[bytes]) -> Iterator[tuple[int, _Row | ValueError]]:
    """What the lines say, by number; an error for one that is wrong."""
    for number, text in enumerate(lines, 1):
        if text.strip():
            try:
                yield number, _row(parsed(text))
            except ValueError as error:
                yield number, error


def _row(value: Any) -> _Row:
    """Raises ValueError."""
    if not isinstance(value, dict) or not {"type", "key", "state"} <= value.keys():
        raise ValueError("it must be a JSON object with type, key and state")
    if not isinstance(value["type"], str) or not isinstance(value["key"], str):
        raise ValueError("type and key must be text")
    agent = AgentId(value["type"], value["key"])
    encode_head(agent, None, "", None)
    return _Row(agent, encoded(value["state"]))


def _check(lines: IO[bytes]) -> None:
    """Raise CommandFailed where a line is wrong, or two are for one agent."""
    problems: list[str] = []
    seen: dict[AgentId, int] = {}
    for number, row in _rows(lines):
        if isinstance(row, ValueError):
            problems.append(f"line {number}: {row}")
        elif seen.setdefault(row.agent, number) != number:
            problems.append(f"line {number}: {row.agent} is in line {seen[row.agent]} already")
    if problems:
        more = len(problems) - _PROBLEMS_SHOWN
        shown = problems[:_PROBLEMS_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise CommandFailed("nothing is imported:\n" + "\n".join(shown), Exit.USAGE)


async def _import(connecting: Connecting, lines: IO[bytes], *, replace: bool, force: bool, dry_run: bool) -> _Importing:
    async with connecting.runtime(call_timeout=connecting.timeout) as runtime:
        importing = _Importing(runtime, replace=replace, force=force, dry_run=dry_run)
        try:
            for batch in in_batches(_good(lines), lambda row: len(row.content)):
                outcomes = await asyncio.gather(*map(importing.take, batch), return_exceptions=True)
                if (failure := next((one for one in outcomes if one is not None), None)) is not None:
                    raise failure
        except BaseException:
            note(f"natsrt: interrupted, after {importing}; it can be run again")
            raise
    return importing


def _good(lines: IO[bytes]) -> Iterator[_Row]:
    """The lines, which were found to be right."""
    for number, row in _rows(lines):
        if isinstance(row, ValueError):
            raise CommandFailed(f"the file was changed meanwhile, in line {number}: {row}")
        yield row


class _Importing:
    """An import under way. ``outcomes`` counts agents by what became of them."""

    def __init__(self, runtime: NatsAgentRuntime, *, replace: bool, force: bool, dry_run: bool) -> None:
        self._records = runtime.running.records
        self._owners = OwnerFinder(runtime)
        self._replace = replace
        self._force = force
        self._dry_run = dry_run
        self.outcomes: Counter[str] = Counter()
        self.conflicts: list[tuple[AgentId, str]] = []

    def __str__(self) -> str:
        counts = [f"{outcome} {self.outcomes[outcome]:,}" for outcome in (_STORED, _REPLACED, _UNCHANGED)]
        return ", ".join([*counts, f"conflicts {len(self.conflicts):,}"])

    async def take(self, row: _Row) -> None:
        """Store one state, or note why not. Raises what ends the import."""
        try:
            self.outcomes[await self._take(row)] += 1
        except Exception as error:
            if not is_told(error) or exit_code(error) is Exit.NOT_CONNECTED:
                raise
            self.conflicts.append((row.agent, str(error)))

    async def _take(self, row: _Row) -> str:
        for _ in range(TRIES):
            found = await find(self._owners, row.agent, force=self._force)
            record = found.record
            if record is not None and await self._is_there(record, row.content):
                return _UNCHANGED
            if record is not None and (record.has_state or not found.is_free):
                if not self._replace:
                    raise CommandFailed("another state is stored" if found.is_free else f"worker {record.owner} has it")
                if not self._force:
                    refuse_silence(found, "--force stores it without the owner")
                if not self._dry_run:
                    await put(self._records, self._owners, row.agent, row.content, force=self._force)
                return _REPLACED
            try:
                if not self._dry_run:
                    await self._records.write_state(row.agent, row.content, expected=record)
                return _STORED
            except (RecordChanged, RecordTaken):
                continue
        refuse_restless(row.agent)

    async def _is_there(self, record: Record, content: bytes) -> bool:
        """Whether just this state is stored, and undamaged."""
        if record.size != len(content):
            return False
        try:
            return await state_of(self._records, record) == content
        except CannotDecode:
            return False
