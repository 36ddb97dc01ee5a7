"""What ``natsrt agents ls`` shows of keyed agents: how many records there are, and how many agents each worker owns."""

from __future__ import annotations

import asyncio
from typing import Any

from natsrt.errors import PermissionDenied, StateUnavailable
from natsrt.runtime import NatsAgentRuntime

from .output import line, note, table
from .owner_finder import Survey
from .storing import in_batches

LIVE = "live"
_GONE = "gone"
_STYLES = {LIVE: "green", _GONE: "yellow"}


async def add_keyed(runtime: NatsAgentRuntime, rows: list[dict[str, Any]], *, owners: bool) -> None:
    """Add ``records`` and ``owned`` to the rows of agent types.

    ``records`` is the number of records of a keyed type, counted by the server. ``owned`` says how many agents each
    worker owns; for this, every record is read, so it is done with ``owners`` only. Where a value does not apply, was
    not asked for or cannot be read, it is None.
    """
    for row in rows:
        row.update(records=None, owned=None)
    runtime.running.records.only_read()
    keyed = [row for row in rows if row["type"] in runtime.running.registry.view.keyed]
    try:
        for batch in in_batches(keyed, lambda _: 1):
            counts = await asyncio.gather(*(runtime.running.records.count(row["type"]) for row in batch))
            for row, count in zip(batch, counts, strict=True):
                row["records"] = count
        if owners and keyed:
            await _add_owners(runtime, keyed)
    except (PermissionDenied, StateUnavailable) as error:
        note(f"natsrt: the owners of keyed agents cannot be read: {error}")


async def _add_owners(runtime: NatsAgentRuntime, keyed: list[dict[str, Any]]) -> None:
    view = runtime.running.registry.view
    survey = await Survey.of(runtime.running.records, keyed[0]["type"] if len(keyed) == 1 else None)
    if survey.damaged:
        note(f"natsrt: {len(survey.damaged)} records of keyed agents cannot be read: see `natsrt doctor`")
    for row in keyed:
        agents = dict.fromkeys(view.workers_hosting(row["type"]), 0) | survey.owned.get(row["type"], {})
        row["owned"] = [
            {"worker_id": worker_id, "live": worker_id in view.workers, "agents": count}
            for worker_id, count in sorted(agents.items())
        ]


def print_keyed(rows: list[dict[str, Any]]) -> None:
    """Print the tables of keyed types below that of all types; none if there is no keyed type."""
    counted = [(row["type"], row["records"]) for row in rows if row["records"] is not None]
    if counted:
        line()
        table(("KEYED TYPE", "RECORDS"), counted)
    owned = [
        (row["type"], owner["worker_id"], LIVE if owner["live"] else _GONE, owner["agents"])
        for row in rows
        for owner in row["owned"] or ()
    ]
    if owned:
        line()
        table(("KEYED TYPE", "OWNER", "STATE", "AGENTS"), owned, _STYLES)


async def instance_rows(runtime: NatsAgentRuntime, agent_type: str | None) -> list[dict[str, Any]]:
    """The keyed agents that live workers own, and the registered instances."""
    view = runtime.running.registry.view
    found = [
        {"type": hosted, "key": key, "kind": "instance", "worker_id": holder}
        for hosted, keys in view.instances.items()
        for key in keys
        for holder in view.instance_holders(hosted, key)
        if agent_type in (None, hosted)
    ]
    if view.keyed:
        runtime.running.records.only_read()
        async for record in runtime.running.records.records(agent_type):
            if record.owner is not None and record.owner in view.workers:
                agent = record.agent
                found.append({"type": agent.type, "key": agent.key, "kind": "keyed", "worker_id": record.owner})
    return sorted(found, key=lambda row: (row["type"], row["key"], row["worker_id"]))
