"""``natsrt agents where`` and ``rebalance``: which worker has an agent, and spreading agents over workers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import click
from autogen_core import AgentId

from natsrt.agents.control import GIVE_AWAY
from natsrt.errors import NatsrtError, NoLiveWorker
from natsrt.jetstream.registry.view import View

from .connecting import Connecting, connects
from .exits import CommandFailed, Exit, is_remote
from .naming import agent_id, refuse_unknown
from .output import as_json as print_json
from .output import json_option, line, table
from .owner_finder import Found, OwnerFinder, Standing, Survey, saved_at

# -- where -------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("agent", metavar="TYPE/KEY")
@json_option
@connects()
def where(connecting: Connecting, agent: str, as_json: bool) -> None:
    """Show which worker has an agent.

    Changes nothing: an agent that no worker has is not created. Exits with 4 if the agent is unknown.
    """
    shown, text = asyncio.run(_where(connecting, agent_id(agent)))
    if as_json:
        print_json(shown)
    else:
        line(text)


async def _where(connecting: Connecting, agent: AgentId) -> tuple[dict[str, Any], str]:
    """Which worker has an agent, as JSON values and as a sentence."""
    async with connecting.runtime() as runtime:
        registry, view = runtime.running.registry, runtime.running.registry.view
        live = sorted(view.workers_hosting(agent.type))
        shown: dict[str, Any] = {"type": agent.type, "key": agent.key, "kind": "plain", "worker_id": None}
        if holders := view.instance_holders(agent.type, agent.key):
            shown |= {"kind": "instance", "worker_id": holders[0]}
            return shown, f"{agent} is a registered instance on {_worker(view, holders[0])}"
        if live and not registry.is_keyed(agent.type):
            if (failure := await registry.verify(agent)) is not None:
                raise failure
            makes = f"{len(live)} worker{'s create one each' if len(live) > 1 else ' creates it'} when called"
            return shown | {"workers": live}, f"{agent} is not keyed: {makes}: {', '.join(live)}"
        found = await OwnerFinder(runtime).find(agent)
        if not live and found.record is None:
            raise await registry.verify(agent) or NoLiveWorker(str(agent), agent.type)
        record, owner = found.record, None if found.record is None else found.record.owner
        shown |= {
            "kind": "keyed",
            "worker_id": None if found.is_free else owner,
            "standing": found.standing.value,
            "last_owner": owner,
            "state_bytes": record.size if record is not None and record.has_state else None,
            "saved_at": None if record is None else saved_at(record),
            "workers": live,
        }
        return shown, _sentence(agent, found, view, len(live))


def _sentence(agent: AgentId, found: Found, view: View, workers: int) -> str:
    record = found.record
    kept = "; no state is stored"
    if record is not None and record.has_state:
        kept = f"; {record.size:,} bytes of state are stored, saved at {saved_at(record)}"
    owner = "" if record is None or record.owner is None else record.owner
    if found.standing is Standing.HOLDS:
        return f"{agent} is on {_worker(view, owner)}{kept}"
    if found.standing is Standing.SILENT:
        return f"{agent} is owned by {_worker(view, owner)}, which does not answer{kept}"
    place = f"was owned by worker {owner}, which no longer has it" if owner else "is on no worker now"
    next_place = "no worker that hosts its type is alive"
    if workers:
        next_place = f"its next message creates it, on any worker of its type ({workers} live)"
    return f"{agent} {place}: {next_place}{kept}"


def _worker(view: View, worker_id: str) -> str:
    worker = view.workers.get(worker_id)
    process = f" (process {worker.pid} on {worker.hostname})" if worker is not None else ""
    return f"worker {worker_id}{process}"


# -- rebalance ---------------------------------------------------------------------------------------------------


@click.command()
@click.argument("agent_type", metavar="TYPE")
@json_option
@connects()
def rebalance(connecting: Connecting, agent_type: str, as_json: bool) -> int:
    """Spread the agents of a keyed type evenly over its workers.

    Asks each worker to give away idle agents, as many as it owns more than the worker that owns least. The state of
    such an agent is stored, and its next message creates the agent again, on a random worker of the type. Agents in use
    stay; run the command again later for those.

    Exits with 5 if a worker does not answer.
    """
    rows = asyncio.run(_rebalance(connecting, agent_type))
    if as_json:
        print_json(rows)
    else:
        shown = [(r["worker_id"], r["owned"], r["asked_for"], r["problem"] or r["given_away"]) for r in rows]
        table(("WORKER", "OWNED", "ASKED FOR", "GIVEN AWAY"), shown)
    return Exit.TIMEOUT if any(row["problem"] for row in rows) else Exit.OK


async def _rebalance(connecting: Connecting, agent_type: str) -> list[dict[str, Any]]:
    async with connecting.runtime(call_timeout=connecting.timeout) as runtime:
        registry = runtime.running.registry
        await refuse_unknown(registry, agent_type)
        workers = sorted(registry.view.workers_hosting(agent_type))
        if not workers:
            raise NoLiveWorker(agent_type, agent_type)
        if not registry.is_keyed(agent_type):
            raise CommandFailed(
                f"agent type {agent_type!r} is not keyed: each call goes to any of its workers", Exit.USAGE
            )
        survey = await Survey.of(runtime.running.records, agent_type)
        owned: Mapping[str, int] = survey.owned.get(agent_type, {})
        fewest = min(owned.get(worker_id, 0) for worker_id in workers)
        owners = OwnerFinder(runtime)

        async def ask(worker_id: str) -> dict[str, Any]:
            has = owned.get(worker_id, 0)
            row = {"worker_id": worker_id, "owned": has, "asked_for": has - fewest, "given_away": 0, "problem": None}
            try:
                if has > fewest:
                    any_agent = AgentId(agent_type, "-")
                    row["given_away"] = await owners.ask(any_agent, worker_id, GIVE_AWAY, has - fewest)
            except Exception as error:
                if not (isinstance(error, NatsrtError) or is_remote(error)):
                    raise
                row["problem"] = str(error)
            return row

        return list(await asyncio.gather(*map(ask, workers)))
