"""Agents that do as they are told, misbehaving included, and the messages that tell them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, message_handler

import natsrt

TOPIC = TopicId("labor", "site")


@dataclass
class Work:
    """``do`` names a method of `Laborer`; ``via`` are the agent types that pass the work on, one after the other."""

    do: str
    note: str = ""
    seconds: float = 0.0
    size: int = 0
    via: list[str] = field(default_factory=list)
    by_event: bool = False


@dataclass
class Done:
    note: str
    worker: str


@dataclass
class Stray:
    """No agent handles it."""

    note: str


class Sabotage(Exception):
    """What a handler raises, with a field of its own."""

    def __init__(self, note: str, grade: int) -> None:
        super().__init__(note, grade)
        self.grade = grade


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")

    def __repr__(self) -> str:
        raise ValueError("no text")


class _UnprintableField(Exception):
    def __init__(self) -> None:
        super().__init__()
        self.field = _Unprintable()


class Laborer(RoutedAgent):
    """Carries out `Work`, and tells on standard output what it begins and when it is cancelled."""

    def __init__(self) -> None:
        super().__init__("does as it is told")
        self._lock = asyncio.Lock()
        self.kept: list[MessageContext] = []

    @message_handler
    async def on_work(self, message: Work, ctx: MessageContext) -> Any:
        ctx.cancellation_token.add_callback(lambda: tell("cancelled", message.note))
        tell("begins", message.note)
        if message.via:
            onward = Work(message.do, message.note, message.seconds, message.size, message.via[1:])
            if message.by_event:
                await self.publish_message(onward, TOPIC, cancellation_token=ctx.cancellation_token)
                return None
            agent = AgentId(message.via[0], "default")
            return await self.send_message(onward, agent, cancellation_token=ctx.cancellation_token)
        return await getattr(self, message.do)(message, ctx)

    def _done(self, message: Work) -> Done:
        return Done(message.note, getattr(self.runtime, "worker_id", None) or "")

    async def echo(self, message: Work, ctx: MessageContext) -> Any:
        return self._done(message)

    async def answer(self, message: Work, ctx: MessageContext) -> Any:
        """Replies with plain values, by name."""
        values = {"none": None, "text": "wörld", "number": 7, "real": 0.5, "yes": True, "bytes": b"\0\xff", "list": [1]}
        return values[message.note]

    async def sleep(self, message: Work, ctx: MessageContext) -> Any:
        await asyncio.sleep(message.seconds)
        return self._done(message)

    async def labor(self, message: Work, ctx: MessageContext) -> Any:
        """Work that holds the event loop for 1.8 s at a time."""
        until = time.monotonic() + message.seconds
        while time.monotonic() < until:
            time.sleep(1.8)
            await asyncio.sleep(0)
        return self._done(message)

    async def block(self, message: Work, ctx: MessageContext) -> Any:
        time.sleep(message.seconds)
        return self._done(message)

    async def queue(self, message: Work, ctx: MessageContext) -> Any:
        async with self._lock:
            await asyncio.sleep(message.seconds)
        return self._done(message)

    async def until_cancelled(self, message: Work, ctx: MessageContext) -> Any:
        cancelled = asyncio.get_running_loop().create_future()
        ctx.cancellation_token.link_future(cancelled)
        await asyncio.wait([cancelled])
        return self._done(message)

    async def keep(self, message: Work, ctx: MessageContext) -> Any:
        """Ends at once and keeps the token."""
        self.kept.append(ctx)
        return self._done(message)

    async def large(self, message: Work, ctx: MessageContext) -> Any:
        return "x" * message.size

    async def unserializable(self, message: Work, ctx: MessageContext) -> Any:
        return object()

    async def sabotage(self, message: Work, ctx: MessageContext) -> Any:
        raise Sabotage(message.note, 3)

    async def look_up(self, message: Work, ctx: MessageContext) -> Any:
        raise LookupError(message.note)

    async def large_error(self, message: Work, ctx: MessageContext) -> Any:
        raise ValueError("x" * message.size)

    async def surrogate_error(self, message: Work, ctx: MessageContext) -> Any:
        raise ValueError("\ud800")

    async def unprintable_error(self, message: Work, ctx: MessageContext) -> Any:
        raise _Unprintable

    async def unprintable_field(self, message: Work, ctx: MessageContext) -> Any:
        raise _UnprintableField

    async def leave(self, message: Work, ctx: MessageContext) -> Any:
        raise SystemExit(3)

    async def interrupt(self, message: Work, ctx: MessageContext) -> Any:
        raise KeyboardInterrupt

    async def cancel_itself(self, message: Work, ctx: MessageContext) -> Any:
        raise asyncio.CancelledError

    async def busy(self, message: Work, ctx: MessageContext) -> Any:
        """Raises what a worker answers by itself when it is full."""
        raise natsrt.WorkerBusy(str(self.id), "another", 1)

    async def stop_iteration(self, message: Work, ctx: MessageContext) -> Any:
        return next(iter(()))


def tell(verb: str, note: str) -> None:
    """One line on standard output, for the test that waits for it."""
    print(f"{verb} {note[:100]}.", flush=True)  # noqa: T201


async def slow_laborer(seconds: float) -> Laborer:
    """A factory that takes its time."""
    tell("makes", "slow")
    await asyncio.sleep(seconds)
    return Laborer()


def no_laborer() -> Laborer:
    raise Sabotage("no laborer today", 1)


async def host(runtime: natsrt.NatsAgentRuntime, *agent_types: str, factory_seconds: float = 10.0) -> None:
    """Register agent types: ``slow…`` with a slow factory, ``broken…`` with one that raises, all others plain.

    A type ``listening…`` also subscribes to `TOPIC`.
    """
    for agent_type in agent_types:
        if agent_type.startswith("slow"):
            await runtime.register_factory(agent_type, lambda: slow_laborer(factory_seconds), expected_class=Laborer)
        elif agent_type.startswith("broken"):
            await runtime.register_factory(agent_type, no_laborer, expected_class=Laborer)
        else:
            await natsrt.register(runtime, Laborer, agent_type, Laborer)
            if agent_type.startswith("listening"):
                await runtime.add_subscription(TypeSubscription(TOPIC.type, agent_type))
