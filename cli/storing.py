"""Reading and writing stored states as commands do it: until it works, past nobody who has the agent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
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
"""How often to begin again where the record changed meanwhile."""
_AT_ONCE = 64
_BYTES_AT_ONCE = 16 * 1024 * 1024

T = TypeVar("T")

force_option = click.option("--force", is_flag=True, help="Also where the owner does not answer or refuses.")


def encoded(value: Any) -> bytes:
    """A state as natsrt stores it. Raises ValueError where ``value`` is no JSON object, or cannot be kept exactly."""
    if not isinstance(value, dict):
        raise ValueError("a state is a JSON object")
    try:
        return orjson.dumps(value)
    except TypeError as error:
        raise ValueError(f"a state that cannot be kept exactly: {error}") from None


def parsed(text: bytes) -> Any:
    """JSON values, whole numbers of any size included. Raises ValueError."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


async def stored_states(records: AgentRecords, agent_type: str | None) -> tuple[list[Record], list[CannotDecode]]:
    """The records with a state, sorted, and what is wrong with those that cannot be read."""
    damaged: list[CannotDecode] = []
    stored = [record async for record in records.records(agent_type, damaged=damaged.append) if record.has_state]
    return sorted(stored, key=lambda record: (record.agent.type, record.agent.key)), damaged


async def state_of(records: AgentRecords, record: Record) -> bytes | None:
    """The state as it is by now; None where there is none any more. Raises `CannotDecode` where it is damaged."""
    present: Record | None = record
    for _ in range(TRIES):
        if present is None:
            return None
        try:
            return await records.state(present)
        except RecordChanged as changed:
            present = changed.present or await records.read(record.agent)
    refuse_restless(record.agent)


async def find(owners: OwnerFinder, agent: AgentId, *, force: bool) -> Found:
    """`OwnerFinder.find`; a record that cannot be read is refused unless ``force`` is given."""
    try:
        return await owners.find(agent, damaged=force)
    except CannotDecode as error:
        raise CommandFailed(f"{error}; --force replaces or removes it") from error


async def put(records: AgentRecords, owners: OwnerFinder, agent: AgentId, content: bytes, *, force: bool) -> str | None:
    """Store a state through the agent's owner, whose id is returned; or in the record, where there is none: None.

    With ``force`` it is stored in the record also where that does not work through the owner.
    """
    for _ in range(TRIES):
        found = await find(owners, agent, force=force)
        if not force:
            refuse_silence(found, "--force stores it without the owner")
        if found.standing is Standing.HOLDS and found.record is not None and found.record.owner is not None:
            try:
                await owners.ask(agent, found.record.owner, LOAD_STATE, orjson.Fragment(content))
                return found.record.owner
            except Exception as error:
                if not force or not is_told(error):
                    raise
                note(f"natsrt: not through the owner of {agent}: {error}")
        try:
            await records.write_state(agent, content, expected=found.record)
            return None
        except (RecordChanged, RecordTaken):
            continue
    refuse_restless(agent)


def is_told(error: BaseException) -> bool:
    """Whether an error is one that a user can meet."""
    return isinstance(error, CommandFailed | NatsrtError) or is_remote(error)


def refuse_nothing(agent: AgentId) -> NoReturn:
    """Nothing is stored of the agent."""
    raise CommandFailed(f"nothing is stored of {agent}", Exit.UNKNOWN_AGENT)


def refuse_restless(agent: AgentId) -> NoReturn:
    """The agent's record was another one each time."""
    raise CommandFailed(f"the record of {agent} changes all the time: try again")


def refuse_silence(found: Found, advice: str) -> None:
    """Raise CommandFailed where the owner does not answer."""
    if found.record is not None and found.standing is Standing.SILENT:
        raise CommandFailed(
            f"worker {found.record.owner}, which owns {found.record.agent}, does not answer: if it is dead, the "
            f"registry drops it within some seconds; {advice}",
            Exit.TIMEOUT,
        )


def in_batches(items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Some items at a time, to be worked on at once: some dozens, and some megabytes of states unless one is larger."""
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
