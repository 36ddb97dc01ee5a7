"""``natsrt replay``: gives stored events to one agent type again."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import click

from natsrt.jetstream.dead_letter_box import event_topic
from natsrt.jetstream.stream_reader import StoredMessage
from natsrt.runtime import NatsAgentRuntime
from natsrt.wire.subjects import encode_token

from .chosen_events import Wanted, wanted
from .connecting import Connecting, connects
from .exits import CommandFailed, Exit
from .moments import Moment
from .naming import agent_type as checked_type
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
@click.option("--to", "agent_type", required=True, metavar="TYPE", help="The agent type that gets the events.")
@click.option("--since", type=Moment(), required=True, help="The first moment: 1h30m, 7d, or a time.")
@click.option("--until", type=Moment(), help="The last moment; without it, until now.")
@click.option("--speed", type=_Speed(), metavar="FACTOR", help="Keep the distances in time, divided by this: 1x, 10x.")
@connects()
def replay(
    connecting: Connecting, topics: str, agent_type: str, since: float, until: float | None, speed: float | None
) -> None:
    """Give stored events of durable topics to one agent type again.

    Only events that a subscription of the type takes are given to it. Their message ids stay, so a handler can tell
    that it has had one; other agent types do not get them. They are stored once more, and handled like new events.

    Without --speed, they are given as fast as they can be stored.
    """
    asyncio.run(_replay(connecting, topics, checked_type(agent_type), since, until, speed))


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


async def _replay(
    connecting: Connecting, topics: str, agent_type: str, since: float, until: float | None, speed: float | None
) -> None:
    async with connecting.runtime() as runtime:
        chosen = wanted(topics, runtime.running.network.subjects)
        name, again = secrets.token_hex(4), runtime.running.sender.again
        until = time.time() if until is None else until
        pace = None if speed is None else _Pace(speed)
        count, told_at, batch = 0, time.monotonic(), list[StoredMessage]()

        async def give() -> None:
            nonlocal count, told_at
            await asyncio.gather(*(again.replay(event, agent_type, name) for event in batch))
            count += len(batch)
            batch.clear()
            if time.monotonic() - told_at >= _TOLD_EVERY:
                told_at = time.monotonic()
                note(f"replayed: {count:,} …")

        for stream in await _streams(runtime, agent_type):
            async for event in _events(runtime, stream, chosen, agent_type, since, until):
                if pace is not None and (seconds := pace.wait(event.stored_at)) > 0:
                    await give()
                    await asyncio.sleep(seconds)
                batch.append(event)
                if len(batch) >= _AT_ONCE:
                    await give()
        await give()
    note(f"replayed: {count:,} events to {agent_type}")


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
    runtime: NatsAgentRuntime, stream: str, chosen: Wanted, agent_type: str, since: float, until: float
) -> AsyncIterator[StoredMessage]:
    """The events of a stream that are chosen, and that the agent type takes."""
    running = runtime.running
    subjects, rules = running.network.subjects, running.registry.view.rules(agent_type)
    async for event in running.network.reader.read(stream, chosen.subject(subjects), since=since):
        if event.stored_at > until:
            return
        topic = event_topic(subjects, event.subject, event.data)
        taken = topic is None or any(rule.matches(topic.type) for rule in rules)
        if taken and chosen.includes(event.subject, topic):
            yield event
