"""``natsrt replay``: gives stored events to one agent type again."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import click
from autogen_core import TopicId

from natsrt.jetstream.dead_letter_box import event_topic
from natsrt.jetstream.recorded_stream import records
from natsrt.jetstream.stream_reader import StoredMessage
from natsrt.runtime import NatsAgentRuntime
from natsrt.wire.envelope import MESSAGE_ID_HEADER
from natsrt.wire.subjects import encode_token

from .chosen_events import wanted
from .connecting import Connecting, connects
from .exits import CommandFailed, Exit
from .moments import Moment
from .naming import AGENT_TYPE
from .output import note

_AT_ONCE = 256
"""Events that are stored at the same time."""
_TOLD_EVERY = 2.0
"""Seconds between two notes about the progress."""
_SPEED = re.compile(r"(\d+(?:\.\d+)?)x?")


class _Speed(click.ParamType[float]):
    """How many times as fast as the events were published: ``10x``."""

    name = "FACTOR"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = _SPEED.fullmatch(str(value))
        if found is None or not float(found[1]):
            self.fail(f"{value!r} is not a speed such as 1x or 10x", param, ctx)
        return float(found[1])


@click.command()
@click.argument("topics", metavar="PREFIX|TOPIC/SOURCE|SUBJECT")
@click.option("--to", "agent_type", required=True, type=AGENT_TYPE, help="The agent type that gets the events.")
@click.option("--from", "recorded", metavar="STREAM", help="Events that `natsrt record --to STREAM` has recorded.")
@click.option("--since", type=Moment(), help="The first moment: 1h30m, 7d, or a time. With --from: all, without it.")
@click.option("--until", type=Moment(), help="The last moment; without it, until now.")
@click.option("--speed", type=_Speed(), metavar="FACTOR", help="Keep the distances in time, divided by this: 1x, 10x.")
@connects()
def replay(
    connecting: Connecting,
    topics: str,
    agent_type: str,
    recorded: str | None,
    since: float | None,
    until: float | None,
    speed: float | None,
) -> None:
    """Give stored events of durable topics, or recorded events, to one agent type again.

    Only events that a subscription of the type takes are given to it. Their message ids stay, so a handler can tell
    that it has had one; other agent types do not get them. They are stored once more, and handled like new events.

    With --from, these are events of any topics, as they were recorded. The type must handle events of a durable topic,
    because they are stored in its stream.

    Without --speed, they are given as fast as they can be stored.
    """
    if since is None and recorded is None:
        raise click.UsageError("--since is missing: without --from, it says where to begin")
    chosen = _Chosen(topics, agent_type, recorded, since or 0.0, time.time() if until is None else until)
    asyncio.run(_replay(connecting, chosen, speed))


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What is replayed, and to whom. ``recorded`` is a stream of records; None: the streams of durable topics."""

    topics: str
    agent_type: str
    recorded: str | None
    since: float
    until: float


@dataclass(slots=True)
class _Pace:
    """When an event is due: as long after the first one as it was published, divided by the speed."""

    speed: float
    begun: float = 0.0
    first: float = 0.0

    def wait(self, stored_at: float) -> float:
        """The seconds until an event that was stored at this time is due."""
        now = time.monotonic()
        if not self.begun:
            self.begun, self.first = now, stored_at
        return self.begun + (stored_at - self.first) / self.speed - now


async def _replay(connecting: Connecting, chosen: _Chosen, speed: float | None) -> None:
    async with connecting.runtime() as runtime:
        name, again = secrets.token_hex(4), runtime.running.outgoing.again
        pace = None if speed is None else _Pace(speed)
        count, told_at, batch = 0, time.monotonic(), list[tuple[StoredMessage, str]]()

        async def give() -> None:
            nonlocal count, told_at
            await asyncio.gather(*(again.replay(event, chosen.agent_type, name, into) for event, into in batch))
            count += len(batch)
            batch.clear()
            if time.monotonic() - told_at >= _TOLD_EVERY:
                told_at = time.monotonic()
                note(f"replayed: {count:,} …")

        streams = await _streams(runtime, chosen.agent_type)
        async for event, into in _events(runtime, streams, chosen):
            if pace is not None and (seconds := pace.wait(event.stored_at)) > 0:
                await give()
                await asyncio.sleep(seconds)
            batch.append((event, into))
            if len(batch) >= _AT_ONCE:
                await give()
        await give()
    note(f"replayed: {count:,} events to {chosen.agent_type}")


async def _streams(runtime: NatsAgentRuntime, agent_type: str) -> list[str]:
    """The streams whose events the agent type handles."""
    reader, token = runtime.running.network.reader, encode_token(agent_type)
    found = [
        stream
        for stream in sorted(runtime.running.registry.view.durable)
        if any(consumer.get("name") == token for consumer in await reader.consumers(stream))
    ]
    if not found:
        problem = f"agent type {agent_type!r} handles no events of durable topics: no worker has subscribed it to any"
        raise CommandFailed(problem, Exit.UNKNOWN_AGENT)
    return found


async def _events(
    runtime: NatsAgentRuntime, streams: list[str], chosen: _Chosen
) -> AsyncIterator[tuple[StoredMessage, str]]:
    """The events that are chosen, and that the agent type takes, each with the stream in which it is stored again."""
    running = runtime.running
    subjects, view = running.network.subjects, running.registry.view
    rules, these = view.rules(chosen.agent_type), wanted(chosen.topics, subjects)

    def taken(event: StoredMessage, topic: TopicId | None) -> bool:
        takes = topic is None or any(rule.matches(topic.type) for rule in rules)
        return takes and these.includes(event.subject, topic)

    if chosen.recorded is not None:
        async for event in _recorded(runtime, chosen.recorded, chosen.since):
            topic = event_topic(subjects, event.subject, event.data)
            if chosen.since <= event.stored_at <= chosen.until and taken(event, topic):
                own = None if topic is None else view.durable_stream(topic.type)
                yield event, own if own in streams else streams[0]
        return
    for stream in streams:
        async for event in running.network.reader.read(stream, these.subject(subjects), since=chosen.since):
            if event.stored_at > chosen.until:
                break
            if taken(event, event_topic(subjects, event.subject, event.data)):
                yield event, stream


async def _recorded(runtime: NatsAgentRuntime, stream: str, since: float) -> AsyncIterator[StoredMessage]:
    """The events that a stream of records has, as if they were stored when they passed.

    One that several recorders have stored comes once, if it has a message id.
    """
    network, seen = runtime.running.network, set[tuple[str, str]]()
    async for stored, record in records(network.reader, network.subjects, stream, since or None, "event.>"):
        if record.id:
            if (record.subject, record.id) in seen:
                continue
            seen.add((record.subject, record.id))
        headers = {**record.headers, MESSAGE_ID_HEADER: record.id} if record.id else record.headers
        yield replace(stored, stored_at=record.at, subject=record.subject, headers=headers)
