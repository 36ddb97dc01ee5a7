"""Reading and writing stored states: through the owner where there is one, and again where a record has changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import click
import orjson
from autogen_core import AgentId

from natsrt.agents.control import LOAD_STATE
from natsrt.errors import CannotDecode, NatsrtError
from natsrt.jetstream.agent_records import AgentRecords, Record, RecordChanged, RecordTaken

from .exits import CommandFailed, Exit, is_remote
from .output import note
from .owner_finder import Found, OwnerFinder, Standing

TRIES = 20
"""Attempts before giving up on a record that each time was changed by another writer in between."""
_AT_ONCE = 64
"""States that are worked on at the same time: enough that the round trips overlap."""
_BYTES_AT_ONCE = 16 * 1024 * 1024
"""Bytes of states that are worked on at the same time: it limits the memory that a command needs."""

T = TypeVar("T")

force_option = click.option("--force", is_flag=True, help="Store it even if the owner does not answer or refuses.")


def encoded(value: Any) -> bytes:
    """A state as natsrt stores it. Raises ValueError if it is not a JSON object or cannot be stored exactly."""
    if not isinstance(value, dict):
        raise ValueError("a state must be a JSON object")
    try:
        return orjson.dumps(value)
    except TypeError as error:
        raise ValueError(f"the state cannot be stored exactly: {error}") from None


def parsed(text: bytes) -> Any:
    """The JSON value in ``text``. Integers may have any size. Raises ValueError if it is not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


async def stored_states(records: AgentRecords, agent_type: str | None) -> tuple[list[Record], list[CannotDecode]]:
    """The records that have a state, sorted by type and key, and the errors of those that cannot be read."""
    damaged: list[CannotDecode] = []
    stored = [record async for record in records.records(agent_type, damaged=damaged.append) if record.has_state]
    return sorted(stored, key=lambda record: (record.agent.type, record.agent.key)), damaged


async def state_of(records: AgentRecords, record: Record) -> bytes | None:
    """The present state; None if it was deleted meanwhile. Raises `CannotDecode` if it is damaged."""
    found = await present_state(records, record)
    return None if found is None else found[1]


async def present_state(records: AgentRecords, record: Record) -> tuple[Record, bytes] | None:
    """The present record and its state; None if it was deleted meanwhile. Raises `CannotDecode` if it is damaged."""
    present: Record | None = record
    for _ in range(TRIES):
        if present is None:
            return None
        try:
            content = await records.state(present)
            return None if content is None else (present, content)
        except RecordChanged as changed:
            present = changed.present or await records.read(record.agent)
    refuse_restless(record.agent)


async def find(owners: OwnerFinder, agent: AgentId, *, force: bool) -> Found:
    """As `OwnerFinder.find`. A record that cannot be read raises CommandFailed, unless ``force`` is given."""
    try:
        return await owners.find(agent, damaged=force)
    except CannotDecode as error:
        raise CommandFailed(f"{error}; --force replaces or removes it") from error


async def put(
    records: AgentRecords,
    owners: OwnerFinder,
    agent: AgentId,
    content: bytes,
    *,
    force: bool,
    handled: Mapping[str, int] | None = None,
) -> str | None:
    """Store a state through the agent's owner, and return the owner's id. Without an owner, write the record: None.

    With ``force`` the record is also written if the owner does not answer or refuses. ``handled`` are the sequences of
    the last events that count in the state; None: those that are stored stay. An owner keeps its own, so it is not
    asked to store a state with others.
    """
    for _ in range(TRIES):
        found = await find(owners, agent, force=force)
        if not force:
            refuse_silence(found, "--force stores it without the owner")
        held = found.record if found.standing is Standing.HOLDS else None
        if held is not None and held.owner is not None:
            if handled is None or handled == held.handled:
                try:
                    await owners.ask(agent, held.owner, LOAD_STATE, orjson.Fragment(content))
                    return held.owner
                except Exception as error:
                    if not force or not is_expected(error):
                        raise
                    note(f"natsrt: the owner of {agent} did not store it: {error}")
            elif not force:
                raise CommandFailed(
                    f"worker {held.owner} has {agent}, whose state contains other events of streams than this one: "
                    "stop the worker first, or use --force"
                )
        try:
            await records.write_state(agent, content, expected=found.record, handled=handled)
            return None
        except (RecordChanged, RecordTaken):
            continue
    refuse_restless(agent)


def is_expected(error: BaseException) -> bool:
    """True for an expected error, which is shown to the user as text. Others are bugs."""
    return isinstance(error, CommandFailed | NatsrtError) or is_remote(error)


def refuse_nothing(agent: AgentId) -> NoReturn:
    """Raise CommandFailed: no state of the agent is stored."""
    raise CommandFailed(f"no state of {agent} is stored", Exit.UNKNOWN_AGENT)


def refuse_restless(agent: AgentId) -> NoReturn:
    """Raise CommandFailed: the agent's record was changed by another writer before each attempt."""
    raise CommandFailed(f"the record of {agent} keeps changing: try again")


def refuse_silence(found: Found, advice: str) -> None:
    """Raise CommandFailed if the owner does not answer."""
    if found.record is not None and found.standing is Standing.SILENT:
        raise CommandFailed(
            f"worker {found.record.owner}, which owns {found.record.agent}, does not answer: if it is dead, the "
            f"registry removes it within some seconds; {advice}",
            Exit.TIMEOUT,
        )


def in_batches(items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Batches to be worked on at the same time. A batch ends at `_AT_ONCE` items or `_BYTES_AT_ONCE` bytes."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if len(batch) >= _AT_ONCE or size >= _BYTES_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
