"""``natsrt agents forget``: removes what is kept of an agent type that no worker hosts any more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import click

from natsrt.errors import PermissionDenied, StateUnavailable, UnknownAgentType
from natsrt.jetstream.agent_records import AgentRecords, Record, RecordChanged
from natsrt.jetstream.registry.leftovers import Leftovers

from .connecting import Connecting, connects
from .exits import CommandFailed
from .naming import agent_type as checked_type
from .output import note
from .storing import TRIES, in_batches, refuse_restless


@click.command()
@click.argument("agent_type", metavar="TYPE")
@click.option("--records", is_flag=True, help="Also delete the records of its keyed agents, with their stored states.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed, and change nothing.")
@connects()
def forget(connecting: Connecting, agent_type: str, records: bool, dry_run: bool) -> None:
    """Remove what the registry keeps of an agent type that no live worker hosts.

    That is: what the type handles, which is kept for up to a day and a half after its last worker; entries of workers
    that are gone; and all its subscriptions, also those that other programs have added. The type is then unknown.

    The records of keyed agents, with their stored states, stay unless --records is given.

    Refuses while a live worker hosts the type. Exits with 4 if nothing is kept of it.
    """
    note(asyncio.run(_forget(connecting, checked_type(agent_type), records, dry_run)))


async def _forget(connecting: Connecting, agent_type: str, with_records: bool, dry_run: bool) -> str:
    async with connecting.runtime() as runtime:
        registry = runtime.running.registry
        left = await registry.leftovers(agent_type)
        _refuse_served(left)
        present = await _present(runtime.running.records, agent_type, required=with_records)
        if not left and not present:
            raise UnknownAgentType(agent_type, agent_type, await registry.some_known())
        if not dry_run:
            if with_records:
                await _remove_all(runtime.running.records, present)
            await registry.forget(left)
    count = len(present)
    kept = [*_kinds(left), *([_counted(count, "record")] if with_records and count else [])]
    done = "would forget" if dry_run else "forgot"
    text = f"{done} agent type {agent_type!r}: {', '.join(kept) or 'nothing in the registry'}"
    if count and not with_records:
        text += (
            f"; of keyed agents, {_counted(count, 'record')} stay{'s' if count == 1 else ''}: --records deletes them"
        )
    return text


def _refuse_served(left: Leftovers) -> None:
    if left.workers:
        many = len(left.workers) > 1
        raise CommandFailed(
            f"agent type {left.agent_type!r} is hosted by the live worker{'s' if many else ''} "
            f"{', '.join(left.workers)}: stop {'them' if many else 'it'} first"
        )


async def _present(records: AgentRecords, agent_type: str, *, required: bool) -> list[Record]:
    """The records of keyed agents of a type. None are returned if they cannot be read, unless that is ``required``."""
    try:
        return [record async for record in records.records(agent_type)]
    except (PermissionDenied, StateUnavailable) as error:
        if required:
            raise
        note(f"natsrt: the records of keyed agents cannot be read: {error}", "warning")
        return []


async def _remove_all(records: AgentRecords, present: list[Record]) -> None:
    for batch in in_batches(present, lambda _: 1):
        await asyncio.gather(*(_remove(records, record) for record in batch))


async def _remove(records: AgentRecords, record: Record | None) -> None:
    for _ in range(TRIES):
        if record is None:
            return
        agent = record.agent
        try:
            await records.remove(record)
            return
        except RecordChanged:
            record = await records.read(agent)
    refuse_restless(agent)


def _kinds(left: Leftovers) -> Iterator[str]:
    """What the registry keeps, in words."""
    if left.known is not None:
        yield "what it handles"
    if left.subscriptions:
        yield _counted(len(left.subscriptions), "subscription")
    if left.hosts:
        yield f"{_counted(len(left.hosts), 'entry', 'entries')} of workers that are gone"
    if left.instances:
        yield f"{_counted(len(left.instances), 'instance')} of workers that are gone"


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"
