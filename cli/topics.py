"""``natsrt topics``: durable topics, their streams, and how far agent types are behind."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import click
from nats.js import api

from natsrt.jetstream.registry.entries import DurableEntry
from natsrt.jetstream.streams import topic_filter
from natsrt.runtime import NatsAgentRuntime
from natsrt.wire.subjects import decode_token

from .connecting import Connecting, connects
from .exits import CommandFailed, Exit
from .moments import span
from .output import as_json as print_json
from .output import json_option, line, note, table
from .suggesting import Commands

_MISSING = "missing"
_STYLES = {_MISSING: "bold red", "no worker": "yellow"}


@click.group(cls=Commands)
def topics() -> None:
    """Show durable topics: their streams, and how far agent types are behind."""


@dataclass(frozen=True, slots=True)
class _Stream:
    """A stream of durable topics, as the registry and JetStream have it. ``info`` None: it does not exist."""

    entry: DurableEntry
    info: api.StreamInfo | None
    consumers: list[dict[str, Any]]
    waiting: dict[str, int]
    """How many events wait for a later attempt, by consumer."""

    @classmethod
    async def read(cls, runtime: NatsAgentRuntime, entry: DurableEntry) -> _Stream:
        reader, later = runtime.running.network.reader, runtime.running.network.later
        info, consumers, waiting = await asyncio.gather(
            reader.info(entry.stream), reader.consumers(entry.stream), later.count(entry.stream)
        )
        return cls(entry, info, consumers, waiting)

    def row(self) -> dict[str, Any]:
        """What is listed of it."""
        entry, state = self.entry, self.info.state if self.info is not None else None
        return {
            "stream": entry.stream,
            "patterns": list(entry.patterns),
            "max_age_seconds": entry.max_age,
            "max_bytes": entry.max_bytes,
            "max_messages": entry.max_messages,
            "discard": entry.discard,
            "storage": entry.storage,
            "events": None if state is None else state.messages,
            "size_bytes": None if state is None else state.bytes,
            "agent_types": len(self.consumers),
            "lag": sum(map(lag_of, self.consumers)) + sum(self.waiting.values()),
        }

    def types(self, runtime: NatsAgentRuntime) -> list[dict[str, Any]]:
        """One row for each agent type that has handled events of it."""
        rows = [
            {
                "agent_type": (name := type_of(consumer)),
                "workers": len(runtime.running.registry.view.workers_hosting(name)),
                "pending": consumer.get("num_pending", 0),
                "unacknowledged": consumer.get("num_ack_pending", 0),
                "waiting": (waiting := self.waiting.get(str(consumer.get("name", "")), 0)),
                "lag": lag_of(consumer) + waiting,
                "redelivered": consumer.get("num_redelivered", 0),
                "acknowledged_up_to": consumer.get("ack_floor", {}).get("stream_seq", 0),
            }
            for consumer in self.consumers
        ]
        return sorted(rows, key=lambda row: str(row["agent_type"]))


def lag_of(consumer: dict[str, Any]) -> int:
    """How many events the agent type has not settled yet, without those that wait in a schedule for a later attempt.
    ``consumer`` is JetStream's description."""
    return int(consumer.get("num_pending", 0)) + int(consumer.get("num_ack_pending", 0))


def type_of(consumer: dict[str, Any]) -> str:
    name = str(consumer.get("name", ""))
    try:
        return decode_token(name)
    except ValueError:  # a hash, of a type with a very long name
        return name


# -- ls and info -------------------------------------------------------------------------------------------------


@topics.command()
@json_option
@connects()
def ls(connecting: Connecting, as_json: bool) -> None:
    """List durable topics by stream.

    LAG counts the events that agent types have not settled yet, over all types.
    """

    async def read() -> list[dict[str, Any]]:
        async with connecting.runtime() as runtime:
            durable = runtime.running.registry.view.durable
            found = await asyncio.gather(*(_Stream.read(runtime, durable[stream]) for stream in sorted(durable)))
            return [stream.row() for stream in found]

    rows = asyncio.run(read())
    if as_json:
        print_json(rows)
    elif not rows:
        note("no topic is durable")
    else:
        cells = [
            (
                row["stream"],
                ", ".join(row["patterns"]),
                _retention(row),
                _MISSING if row["events"] is None else row["events"],
                "" if row["size_bytes"] is None else row["size_bytes"],
                row["agent_types"],
                row["lag"],
            )
            for row in rows
        ]
        table(("STREAM", "TOPICS", "KEPT FOR", "EVENTS", "BYTES", "TYPES", "LAG"), cells, _STYLES)


def _retention(row: dict[str, Any]) -> str:
    """For how long the events of a stream are kept, in words."""
    limits = [] if row["max_age_seconds"] is None else [span(row["max_age_seconds"])]
    sizes = [f"{row[key]:,} {unit}" for key, unit in (("max_messages", "events"), ("max_bytes", "bytes")) if row[key]]
    return ", ".join([*limits, *sizes, *([f"discard {row['discard']}"] if sizes else ())]) or "ever"


@topics.command()
@click.argument("name", metavar="TOPIC|STREAM")
@json_option
@connects()
def info(connecting: Connecting, name: str, as_json: bool) -> None:
    """Show a stream of durable topics, and how far each agent type is behind.

    WAITING counts the events that are tried again more than a minute after they failed.

    Names it by a topic type, a pattern, or the stream's own name. Exits with 4 if the topic is not durable.
    """

    async def read() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        async with connecting.runtime() as runtime:
            stream = await _Stream.read(runtime, _entry(runtime, name))
            return stream.row(), stream.types(runtime)

    row, types = asyncio.run(read())
    if as_json:
        print_json({**row, "agent_types": types})
        return
    for key, value in row.items():
        if key != "agent_types":
            line(f"{key}: {_text(value)}")
    if types:
        cells = [
            (
                one["agent_type"],
                one["workers"] or "no worker",
                one["pending"],
                one["unacknowledged"],
                one["waiting"],
                one["redelivered"],
                one["acknowledged_up_to"],
            )
            for one in types
        ]
        line()
        columns = ("TYPE", "WORKERS", "PENDING", "UNACKNOWLEDGED", "WAITING", "REDELIVERED", "HANDLED UP TO")
        table(columns, cells, _STYLES)


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _entry(runtime: NatsAgentRuntime, name: str) -> DurableEntry:
    """The stream that has a topic type, a pattern, or this name."""
    view = runtime.running.registry.view
    topic_type = name.partition("/")[0]
    stream = name if name in view.durable else view.durable_stream(topic_type)
    for entry in view.durable.values():
        if entry.stream == stream or name in entry.patterns:
            return entry
    known = _patterns(runtime)
    raise CommandFailed(f"there is no stream, and no durable topic, {name!r}; durable are: {known}", Exit.UNKNOWN_AGENT)


def _patterns(runtime: NatsAgentRuntime) -> str:
    """All patterns of durable topics."""
    durable = runtime.running.registry.view.durable
    return ", ".join(pattern for entry in durable.values() for pattern in entry.patterns) or "none"


# -- rm ----------------------------------------------------------------------------------------------------------


@topics.command()
@click.argument("pattern")
@click.option("--yes", is_flag=True, help="Do not ask.")
@connects()
def rm(connecting: Connecting, pattern: str, yes: bool) -> None:
    """Make the topics of PATTERN not durable any more.

    Remove the pattern from the setting `durable` of all runtimes first: one that still has it makes the topics durable
    again when it starts or reconnects.

    Events that are stored stay in the stream until their age limit. Agent types still get those that they have not
    handled, unless no other pattern is left in the stream.
    """
    asyncio.run(_rm(connecting, pattern, yes))


async def _rm(connecting: Connecting, pattern: str, yes: bool) -> None:
    async with connecting.runtime() as runtime:
        registry, network = runtime.running.registry, runtime.running.network
        entry = next((one for one in registry.view.durable.values() if pattern in one.patterns), None)
        if entry is None:
            patterns = ", ".join(one for other in registry.view.durable.values() for one in other.patterns) or "none"
            raise CommandFailed(
                f"{pattern!r} is no pattern of durable topics; there are: {patterns}", Exit.UNKNOWN_AGENT
            )
        subject = topic_filter(network.subjects, pattern)
        stored = await _stored(runtime, entry.stream, subject)
        last = entry.patterns == (pattern,)
        fate = "agent types get none of them any more" if last else "agent types still get those not handled yet"
        text = f"{stored:,} events on {pattern} stay in {entry.stream} until their age limit; {fate}"
        if not yes:
            note(text)
            await asyncio.to_thread(click.confirm, f"Make {pattern} not durable?", abort=True, err=True)
        await registry.remove_durable(entry.stream, pattern)
        await network.streams.release(entry.stream, subject)
    note(f"{pattern} is not durable any more; {text}")


async def _stored(runtime: NatsAgentRuntime, stream: str, subject: str) -> int:
    info = await runtime.running.network.reader.info(stream, subject)
    return sum((info.state.subjects or {}).values()) if info is not None else 0
