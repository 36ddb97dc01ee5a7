"""``natsrt state export`` and ``import``: all stored states as JSON Lines."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import click
import orjson
from autogen_core import AgentId

from natsrt.errors import CannotDecode
from natsrt.jetstream.agent_records import AgentRecords, Record, RecordChanged, RecordTaken
from natsrt.jetstream.record import advanced, encode_head
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
    is_expected,
    parsed,
    present_state,
    put,
    refuse_restless,
    refuse_silence,
    state_of,
    stored_states,
)
from .writing import writing

_PROBLEMS_SHOWN = 20
"""Lines with problems that are listed one by one; more would hide the first ones."""
_STORED, _REPLACED, _UNCHANGED = "stored", "replaced", "unchanged"

# -- export ------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("file", metavar="[FILE|-]", default="-")
@click.option("--type", "agent_type", metavar="TYPE", help="Only the agents of this type.")
@connects()
def export(connecting: Connecting, file: str, agent_type: str | None) -> int:
    """Write all stored states as JSON Lines.

    Each line has type, key, saved_at, handled (the last events of streams that count in the state) and state; the lines
    are sorted by type and key. They go to standard output, or to
    a file that appears when it is complete. A live agent may have a newer state than the stored one.

    Exits with 7 if a state cannot be read; such states are named on standard error and left out.
    """
    with writing(file) as write:
        count, size, damaged = asyncio.run(_export(connecting, agent_type, write))
    note(f"exported states: {count:,} of {size:,} bytes in all")
    for damage in damaged:
        note(f"natsrt: left out: {damage}")
    return Exit.PROBLEMS if damaged else Exit.OK


async def _export(
    connecting: Connecting, agent_type: str | None, write: Callable[[bytes], Any]
) -> tuple[int, int, list[CannotDecode]]:
    """Write the states. Returns their number, their size in bytes, and what could not be read."""
    count = size = 0
    async with connecting.runtime() as runtime:
        records = runtime.running.records
        records.only_read()
        stored, damaged = await stored_states(records, agent_type)
        async for record, content in _contents(records, stored):
            if isinstance(content, CannotDecode):
                damaged.append(content)
            elif content is not None:
                write(_exported(record, content))
                count, size = count + 1, size + len(content)
    return count, size, damaged


async def _contents(
    records: AgentRecords, stored: Sequence[Record]
) -> AsyncIterator[tuple[Record, bytes | CannotDecode | None]]:
    """The states in order, read in batches. None: the state was deleted meanwhile; an error: it is damaged."""

    async def read(record: Record) -> tuple[Record, bytes | CannotDecode | None]:
        try:
            found = await present_state(records, record)
            if found is not None:
                orjson.loads(found[1])
            return found or (record, None)
        except CannotDecode as error:
            return record, error
        except orjson.JSONDecodeError as error:
            return record, CannotDecode(f"the state of {record.agent}", str(error))

    for batch in in_batches(stored, lambda record: record.size):
        for found in await asyncio.gather(*map(read, batch)):
            yield found


def _exported(record: Record, content: bytes) -> bytes:
    content = content.replace(b"\r", b" ").replace(b"\n", b" ")  # white space only: JSON strings do not contain them
    row = {"type": record.agent.type, "key": record.agent.key, "saved_at": saved_at(record)}
    return orjson.dumps({**row, "handled": dict(record.handled), "state": orjson.Fragment(content)})


# -- import ------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """``handled`` are the sequences of the last events that count in the state; None: the line does not say that."""

    agent: AgentId
    content: bytes
    handled: Mapping[str, int] | None


@click.command("import")
@click.argument("file", metavar="FILE|-", type=click.File("rb"))
@click.option(
    "--replace", is_flag=True, help="Replace another stored state, or the state of an agent that a worker has."
)
@force_option
@click.option("--dry-run", is_flag=True, help="Show what would be done, and change nothing.")
@json_option
@connects()
def import_(connecting: Connecting, file: IO[bytes], replace: bool, force: bool, dry_run: bool, as_json: bool) -> int:
    """Store states from JSON Lines, as `natsrt state export` writes them.

    All lines are checked before anything is stored. An agent with another stored state, or one that a worker has, is a
    conflict and is not changed, unless --replace or --force is given: then its state is replaced as by `natsrt state
    set`. --force includes --replace. States that are already stored are skipped, so an interrupted import can be run
    again.

    A line with handled also replaces the last events of streams that count as handled, so that exactly the later ones
    are handled when they come. Without it, those that are stored stay. A worker that has the agent keeps its own: such
    a line is a conflict then, unless --force is given.

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
                "behind": done.behind,
                "conflicts": [
                    {"type": agent.type, "key": agent.key, "problem": problem} for agent, problem in done.conflicts
                ],
            }
        )
    else:
        if done.behind:
            note(
                f"natsrt: {done.behind:,} of the imported states contain fewer events of streams than those that they "
                "replaced: the events that are missing were acknowledged, and come again only if they are replayed"
            )
        if done.conflicts:
            table(("CONFLICT", "PROBLEM"), [(str(agent), problem) for agent, problem in done.conflicts])
            line()
        line(f"{'would be ' if dry_run else ''}{done}")
    return Exit.PROBLEMS if done.conflicts else Exit.OK


def _rows(lines: IO[bytes]) -> Iterator[tuple[int, _Row | ValueError]]:
    """The lines and their numbers; an error in place of a wrong line."""
    for number, text in enumerate(lines, 1):
        if text.strip():
            try:
                yield number, _row(parsed(text))
            except ValueError as error:
                yield number, error


def _row(value: Any) -> _Row:
    """An agent and its state. Raises ValueError if the line does not have them."""
    if not isinstance(value, dict) or not {"type", "key", "state"} <= value.keys():
        raise ValueError("must be a JSON object with type, key and state")
    if not isinstance(value["type"], str) or not isinstance(value["key"], str):
        raise ValueError("type and key must be text")
    agent = AgentId(value["type"], value["key"])
    encode_head(agent, None, "", None)
    return _Row(agent, encoded(value["state"]), _handled(value.get("handled")))


def _handled(value: Any) -> Mapping[str, int] | None:
    """The sequences of a line. Raises ValueError if they are none."""
    if value is None:
        return None
    if not isinstance(value, dict) or not all(type(last) is int and 0 < last < 2**63 for last in value.values()):
        raise ValueError("handled must be a JSON object with sequences: numbers from 1")
    return advanced({}, value)


def _check(lines: IO[bytes]) -> None:
    """Raise CommandFailed if a line is wrong, or two lines are for the same agent."""
    problems: list[str] = []
    seen: dict[AgentId, int] = {}
    for number, row in _rows(lines):
        if isinstance(row, ValueError):
            problems.append(f"line {number}: {row}")
        elif seen.setdefault(row.agent, number) != number:
            problems.append(f"line {number}: {row.agent} is already in line {seen[row.agent]}")
    if problems:
        more = len(problems) - _PROBLEMS_SHOWN
        shown = problems[:_PROBLEMS_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise CommandFailed("nothing was imported:\n" + "\n".join(shown), Exit.USAGE)


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
    """The lines, after `_check` accepted them."""
    for number, row in _rows(lines):
        if isinstance(row, ValueError):
            raise CommandFailed(f"line {number} of the file was changed during the import: {row}")
        yield row


class _Importing:
    """An import that is running. ``outcomes`` counts the agents that were stored, replaced or unchanged."""

    def __init__(self, runtime: NatsAgentRuntime, *, replace: bool, force: bool, dry_run: bool) -> None:
        self._records = runtime.running.records
        self._owners = OwnerFinder(runtime)
        self._replace = replace
        self._force = force
        self._dry_run = dry_run
        self.outcomes: Counter[str] = Counter()
        self.conflicts: list[tuple[AgentId, str]] = []
        self.behind = 0
        """Number of states that contain fewer events of streams than those that they replaced."""

    def __str__(self) -> str:
        counts = [f"{outcome} {self.outcomes[outcome]:,}" for outcome in (_STORED, _REPLACED, _UNCHANGED)]
        return ", ".join([*counts, f"conflicts {len(self.conflicts):,}"])

    async def take(self, row: _Row) -> None:
        """Store one state, or record the conflict. Raises errors that end the import."""
        try:
            self.outcomes[await self._take(row)] += 1
        except Exception as error:
            if not is_expected(error) or exit_code(error) is Exit.NOT_CONNECTED:
                raise
            self.conflicts.append((row.agent, str(error)))

    async def _take(self, row: _Row) -> str:
        for _ in range(TRIES):
            found = await find(self._owners, row.agent, force=self._force)
            record = found.record
            is_same = record is not None and row.handled in (None, record.handled)
            if record is not None and is_same and await self._is_there(record, row.content):
                return _UNCHANGED
            if record is not None and (record.has_state or not found.is_free):
                if not self._replace:
                    raise CommandFailed("another state is stored" if found.is_free else f"worker {record.owner} has it")
                if not self._force:
                    refuse_silence(found, "--force stores it without the owner")
                if not self._dry_run:
                    await put(
                        self._records, self._owners, row.agent, row.content, force=self._force, handled=row.handled
                    )
                if row.handled is not None:
                    self.behind += any(last > row.handled.get(one, 0) for one, last in record.handled.items())
                return _REPLACED
            try:
                if not self._dry_run:
                    await self._records.write_state(row.agent, row.content, expected=record, handled=row.handled)
                return _STORED
            except (RecordChanged, RecordTaken):
                continue
        refuse_restless(row.agent)

    async def _is_there(self, record: Record, content: bytes) -> bool:
        """True if exactly this state is stored, undamaged."""
        if record.size != len(content):
            return False
        try:
            return await state_of(self._records, record) == content
        except CannotDecode:
            return False
