"""``natsrt agents``: agent types, the workers that host them, and what these workers report."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

import click
import orjson

from natsrt.errors import NoLiveWorker
from natsrt.jetstream.registry.entries import KnownEntry, TypeEntry
from natsrt.jetstream.registry.registry import Registry
from natsrt.runtime import NatsAgentRuntime
from natsrt.wire.subjects import Subjects

from .asking import WorkerAnswer, gather_answers
from .connecting import Connecting, connects
from .exits import Exit
from .forgetting import forget
from .keyed_counts import LIVE, add_keyed, instance_rows, print_keyed
from .naming import agent_id, refuse_unknown
from .output import as_json as print_json
from .output import begin_again, json_option, line, note, table
from .placement import rebalance, where
from .suggesting import Commands
from .waiting import wait
from .watch import watch_rows

_NOT_LIVE = "no worker"
_STYLES = {LIVE: "green", _NOT_LIVE: "yellow", "no answer": "red"}


@click.group(cls=Commands)
def agents() -> None:
    """Show agent types and the workers that host them."""


agents.add_command(forget)
agents.add_command(where)
agents.add_command(rebalance)
agents.add_command(wait)

# -- ls ----------------------------------------------------------------------------------------------------------


@agents.command()
@click.argument("agent_type", metavar="[TYPE]", required=False)
@click.option("--owners", is_flag=True, help="Count the agents of each worker for every keyed type.")
@click.option("--instances", is_flag=True, help="List live instances and their workers, instead of types.")
@click.option("--watch", is_flag=True, help="Show the list again each time that it changes, until Ctrl-C.")
@json_option
@connects()
def ls(
    connecting: Connecting, agent_type: str | None, owners: bool, instances: bool, watch: bool, as_json: bool
) -> None:
    """List the agent types that live workers host, and those that workers hosted within the last day.

    For keyed types, also show the number of records: of agents that a worker owns, that have a stored state, or that
    were released without one within the last two minutes. With TYPE or --owners, show how many agents each worker owns.

    With --instances, list the agents that have one worker each, keyed or registered as an instance, one per line.

    The server counts the records. TYPE, --owners and --instances read each record, which takes long if there are very
    many.

    With --watch, a terminal shows the current list; into a pipe, each list follows the one before, with --json as one
    line. Changes in the registry are shown at once, those of keyed agents within some seconds.
    """

    async def rows(runtime: NatsAgentRuntime) -> list[dict[str, Any]]:
        registry = runtime.running.registry
        if agent_type is not None and not watch:
            await refuse_unknown(registry, agent_type)
        if instances:
            return await instance_rows(runtime, agent_type)
        found = await type_rows(registry, agent_type)
        await add_keyed(runtime, found, owners=owners or agent_type is not None)
        return found

    def show(found: list[dict[str, Any]], first: bool) -> None:
        if as_json:
            line(orjson.dumps(found).decode())
        else:
            begin_again(first)
            _print_list(found, instances, as_json)

    async def once() -> list[dict[str, Any]]:
        async with connecting.runtime() as runtime:
            return await rows(runtime)

    if watch:
        asyncio.run(watch_rows(connecting, rows, show))
    else:
        _print_list(asyncio.run(once()), instances, as_json)


def _print_list(rows: list[dict[str, Any]], instances: bool, as_json: bool) -> None:
    """Print the list of ``agents ls``."""
    if as_json:
        print_json(rows)
    elif not rows:
        note("there are no live instances" if instances else "no agent type is registered")
    elif instances:
        table(("AGENT", "KIND", "WORKER"), [(f"{r['type']}/{r['key']}", r["kind"], r["worker_id"]) for r in rows])
    else:
        print_types(rows)
        print_keyed(rows)


async def type_rows(registry: Registry, only: str | None = None) -> list[dict[str, Any]]:
    """The rows of ``agents ls``, one for each agent type; only that of one type if it is given."""
    known = await registry.known(only)
    view = registry.view
    rows = []
    for agent_type in sorted({*view.hosts, *known}) if only is None else [only]:
        workers = view.workers_hosting(agent_type)
        hosting = [view.hosts[agent_type][worker_id] for worker_id in workers]
        entries: list[TypeEntry | KnownEntry] = [*hosting]
        if not hosting and agent_type in known:
            entries.append(known[agent_type])
        rows.append(
            {
                "type": agent_type,
                "live": bool(workers),
                "workers": sorted(workers),
                "instances": len(view.instances.get(agent_type, ())) if any(e.instances for e in hosting) else None,
                "keyed": any(e.keyed for e in hosting),
                "handles": sorted({name for entry in entries for name in entry.handles}),
                "produces": sorted({name for entry in entries for name in entry.produces}),
                "subscriptions": len(view.rules(agent_type)),
            }
        )
    return rows


def print_types(rows: list[dict[str, Any]]) -> None:
    """Print the table of ``agents ls``."""
    table(
        ("TYPE", "WORKERS", "STATE", "HANDLES", "SUBSCRIPTIONS"),
        [
            (
                row["type"],
                len(row["workers"]),
                LIVE if row["live"] else _NOT_LIVE,
                ", ".join(row["handles"]),
                row["subscriptions"],
            )
            for row in rows
        ],
        _STYLES,
    )


# -- info --------------------------------------------------------------------------------------------------------


@agents.command()
@click.argument("agent", metavar="TYPE[/KEY]")
@json_option
@connects()
def info(connecting: Connecting, agent: str, as_json: bool) -> None:
    """Show an agent type: workers, messages and subscriptions; with a key, the metadata of that agent.

    With a key, the agent is created if it does not exist yet.
    """
    one = agent_id(agent) if "/" in agent else None

    async def run() -> dict[str, Any]:
        async with connecting.runtime() as runtime:
            if one is not None:
                return dict(await runtime.agent_metadata(one))
            return await _type_info(runtime, agent)

    shown = asyncio.run(run())
    if as_json:
        print_json(shown)
    elif one is not None:
        table(("FIELD", "VALUE"), list(shown.items()))
    else:
        _print_info(shown)


async def _type_info(runtime: NatsAgentRuntime, agent_type: str) -> dict[str, Any]:
    registry = runtime.running.registry
    await refuse_unknown(registry, agent_type)
    (row,) = await type_rows(registry, agent_type)
    view = registry.view
    workers = [view.workers[worker_id] for worker_id in row["workers"]]
    row["workers"] = [
        {
            "worker_id": worker.worker_id,
            "name": worker.name,
            "hostname": worker.hostname,
            "pid": worker.pid,
            "started": datetime.fromtimestamp(worker.started, UTC).isoformat(),
            "version": worker.version,
        }
        for worker in workers
    ]
    row["instances"] = sorted(view.instances.get(agent_type, ()))
    row["subscriptions"] = [
        {
            "kind": entry.kind,
            "pattern": entry.pattern,
            "id": subscription_id,
            "declared_by": None if entry.is_shared else entry.declarer,
        }
        for entry in sorted(view.subscriptions(), key=lambda entry: (entry.kind, entry.pattern, entry.declarer))
        if entry.agent_type == agent_type and (entry.is_shared or entry.declarer in view.workers)
        for subscription_id in entry.declared.values()
    ]
    return row


def _print_info(shown: Mapping[str, Any]) -> None:
    line(f"Agent type {shown['type']}: {LIVE if shown['live'] else _NOT_LIVE}")
    line(f"Handles:   {', '.join(shown['handles']) or '-'}")
    line(f"Produces:  {', '.join(shown['produces']) or '-'}")
    if shown["instances"]:
        line(f"Instances: {', '.join(shown['instances'])}")
    if shown["workers"]:
        line()
        table(
            ("WORKER", "HOST", "PID", "STARTED", "VERSION"),
            [(w["worker_id"], w["hostname"], w["pid"], w["started"], w["version"]) for w in shown["workers"]],
        )
    if shown["subscriptions"]:
        line()
        table(
            ("SUBSCRIPTION", "TOPICS", "DECLARED BY"),
            [(s["kind"], s["pattern"], s["declared_by"] or "-") for s in shown["subscriptions"]],
        )


# -- ping --------------------------------------------------------------------------------------------------------


@agents.command()
@click.argument("agent_type", metavar="[TYPE]", required=False)
@json_option
@connects()
def ping(connecting: Connecting, agent_type: str | None, as_json: bool) -> int:
    """Measure the round trip to every worker, or to those of one agent type.

    Exits with 4 if there is no live worker, and with 5 if a worker does not answer.
    """

    async def run() -> list[dict[str, Any]]:
        async with connecting.runtime() as runtime:
            expected = await _expected(runtime, agent_type)
            answers = await _answers(runtime, "PING", expected)
            workers = runtime.running.registry.view.workers
            return [
                {
                    "worker_id": worker_id,
                    "name": workers[worker_id].name if worker_id in workers else None,
                    "answered": worker_id in answers,
                    "round_trip_ms": answers[worker_id].round_trip_ms if worker_id in answers else None,
                }
                for worker_id in sorted(expected)
            ]

    rows = asyncio.run(run())
    if as_json:
        print_json(rows)
    elif rows:
        shown = [(r["worker_id"], r["round_trip_ms"] if r["answered"] else "no answer") for r in rows]
        table(("WORKER", "ROUND TRIP (ms)"), shown, _STYLES)
    if not rows:
        note("there is no live worker")
        return Exit.UNKNOWN_AGENT
    return Exit.OK if all(row["answered"] for row in rows) else Exit.TIMEOUT


async def _expected(runtime: NatsAgentRuntime, agent_type: str | None) -> set[str]:
    """Ids of the live workers, or of those that host one type."""
    registry = runtime.running.registry
    if agent_type is None:
        return set(registry.view.workers)
    await refuse_unknown(registry, agent_type)
    workers = registry.view.workers_hosting(agent_type)
    if not workers:
        raise NoLiveWorker(agent_type, agent_type)
    return set(workers)


async def _answers(runtime: NatsAgentRuntime, verb: str, expected: Collection[str]) -> dict[str, WorkerAnswer]:
    options = runtime.options
    return await gather_answers(runtime.running.connection, Subjects(options.namespace), options, verb, expected)


# -- stats -------------------------------------------------------------------------------------------------------


@agents.command()
@click.argument("agent_type", metavar="[TYPE]", required=False)
@json_option
@connects()
def stats(connecting: Connecting, agent_type: str | None, as_json: bool) -> int:
    """Show the counts of messages and errors, and processing times, by agent type, since each worker started.

    Exits with 5 if a worker does not answer.
    """

    async def run() -> tuple[list[dict[str, Any]], set[str], set[str]]:
        async with connecting.runtime() as runtime:
            expected = await _expected(runtime, agent_type)
            answers = await _answers(runtime, "STATS", expected)
            names = _types_by_subject(runtime)
            rows = [
                {
                    "type": names.get(endpoint.get("subject", ""), endpoint.get("name", "-")),
                    "worker_id": worker_id,
                    "requests": endpoint.get("num_requests") or 0,
                    "errors": endpoint.get("num_errors") or 0,
                    "last_error": endpoint.get("last_error") or "",
                    "processing_time_ns": endpoint.get("processing_time") or 0,
                    "average_processing_time_ns": endpoint.get("average_processing_time") or 0,
                }
                for worker_id, answer in answers.items()
                for endpoint in answer.endpoints
            ]
            wanted = [row for row in rows if agent_type is None or row["type"] == agent_type]
            uncounted = {worker_id for worker_id, answer in answers.items() if not answer.is_service}
            return sorted(wanted, key=lambda row: (row["type"], row["worker_id"])), expected - set(answers), uncounted

    rows, silent, uncounted = asyncio.run(run())
    if as_json:
        print_json(rows)
    elif rows:
        table(
            ("TYPE", "WORKER", "MESSAGES", "ERRORS", "AVERAGE (ms)", "LAST ERROR"),
            [
                (
                    row["type"],
                    row["worker_id"],
                    row["requests"],
                    row["errors"],
                    row["average_processing_time_ns"] / 1e6,
                    row["last_error"],
                )
                for row in rows
            ],
        )
    else:
        note("there is nothing to show")
    for worker_id in sorted(uncounted):
        note(f"worker {worker_id} has no statistics: it is not a NATS service")
    for worker_id in sorted(silent):
        note(f"worker {worker_id} did not answer")
    return Exit.TIMEOUT if silent else Exit.OK


def _types_by_subject(runtime: NatsAgentRuntime) -> dict[str, str]:
    """Agent types by the subject of their calls. The name of an endpoint may differ from its agent type."""
    subjects = Subjects(runtime.options.namespace)
    return {subjects.agent(agent_type): agent_type for agent_type in runtime.running.registry.view.hosts}
