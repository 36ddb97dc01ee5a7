"""Payloads of 2 to 200 MB in each kind of message: how fast, how much memory they take, and what is left of them.

The messages of a turn are sent one after the other. A turn fails if the stream of payloads is not empty afterwards
where it should be: after calls, replies, tasks and states. Run it with the max_payload that nats-server has by default:

    echo 'jetstream { store_dir: "large" }' >large.conf
    python -m benchmarks --server-config large.conf 'large-*'
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import nats
import nats.js.errors
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, event, rpc

from benchmarks.harness import LESS, Measure, Sample, Scenario, Variant
from benchmarks.peers import Peer
from benchmarks.roles import ForgetfulRole, Role
from benchmarks.teams import Member, Team
from benchmarks.work import Counter
from natsrt import DurableTopics, NatsAgentRuntime

MB = 1_000_000
CALL, REPLY, CORE, DURABLE, STATE = "call", "reply", "core event", "durable event", "state of a keyed agent"
TASK, RESULT = "task", "result of a task"
KINDS = (CALL, REPLY, CORE, DURABLE, TASK, RESULT, STATE)
LOADED = "state, loaded by another worker"
_TOPICS = {CORE: TopicId("news", "0"), DURABLE: TopicId("work", "0")}
_PLAIN, _KEYED = AgentId("plain", "0"), AgentId("kept", "0")
_KEEP = 60.0
"""Seconds for which payloads of events are kept at least."""
_GIVE_UP = 120.0
"""Time limit of one turn in seconds."""
_EMPTY_WITHIN = 10.0


@dataclass
class Large:
    content: str


@dataclass
class Wanted:
    """Asks for a reply, or a state, of ``size`` characters."""

    size: int


@dataclass
class Count:
    """A number of characters; or of events that are to be waited for, and counted anew after that."""

    number: int


class Plain(RoutedAgent):
    """Takes and gives large messages."""

    def __init__(self) -> None:
        super().__init__("takes and gives")
        self._events = Counter()

    @rpc
    async def on_large(self, message: Large, ctx: MessageContext) -> Count:
        return Count(len(message.content))

    @rpc
    async def on_wanted(self, message: Wanted, ctx: MessageContext) -> Large:
        return Large("x" * message.size)

    @event
    async def on_event(self, message: Large, ctx: MessageContext) -> None:
        self._events.add()

    @rpc
    async def on_count(self, message: Count, ctx: MessageContext) -> Count:
        await self._events.reach(message.number)
        return message


class Kept(RoutedAgent):
    """Has a state of the size that it was asked for last, stored before the reply."""

    def __init__(self) -> None:
        super().__init__("has a state")
        self._state: dict[str, Any] = {}

    @rpc
    async def on_wanted(self, message: Wanted, ctx: MessageContext) -> Count:
        if message.size:
            number = self._state.get("number", 0) + 1  # so that each state is another one
            self._state = {"content": "x" * message.size, "number": number}
        return Count(len(self._state.get("content", "")))

    async def save_state(self) -> Mapping[str, Any]:
        return self._state

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self._state = dict(state)


class _Runs(ForgetfulRole):
    _runtime: NatsAgentRuntime

    def make(self) -> NatsAgentRuntime:
        return NatsAgentRuntime(
            self.place.address,
            namespace=self.place.namespace,
            durable=[DurableTopics("work", max_age=_KEEP)],
            blob_ttl=_KEEP,
        )

    async def stop(self) -> None:
        await self._runtime.close()


class Hosts(_Runs):
    """Hosts the agents."""

    async def start(self) -> None:
        self._runtime = self.make()
        await self._runtime.register_factory(_PLAIN.type, Plain, expected_class=Plain)
        await self._runtime.register_factory(_KEYED.type, Kept, expected_class=Kept, keyed=True)
        for topic in _TOPICS.values():
            await self._runtime.add_subscription(TypeSubscription(topic.type, _PLAIN.type))
        await self._runtime.start()


class Sends(_Runs):
    """Calls and publishes."""

    async def start(self) -> None:
        self._runtime = self.make()
        await self._runtime.start()
        self._client = await nats.connect(self.place.address)

    async def stop(self) -> None:
        await self._client.close()
        await super().stop()

    async def send(self, kind: str, size: int, count: int) -> float:
        """Send ``count`` messages of a kind, with ``size`` characters, one after the other. Returns the seconds until
        they are handled, and fails if payloads are left that should not be."""
        message = Large("x" * size) if kind in (CALL, CORE, DURABLE, TASK) else None
        gc.collect()
        began = time.perf_counter()
        async with asyncio.timeout(_GIVE_UP):
            for _ in range(count):
                await self._send(kind, size, message)
        took = time.perf_counter() - began
        if kind not in (CORE, DURABLE, RESULT):
            await self._check_empty()
        await self.clear()
        return took

    async def _send(self, kind: str, size: int, message: Large | None) -> None:
        if kind in _TOPICS:
            await self._runtime.publish_message(message, _TOPICS[kind])
            await self._runtime.send_message(Count(1), _PLAIN)
            return
        if kind == CALL:
            got = (await self._runtime.send_message(message, _PLAIN)).number
        elif kind == TASK:
            got = (await (await self._runtime.submit_message(message, _PLAIN)).result(reply_type=Count)).number
        elif kind == RESULT:
            ticket = await self._runtime.submit_message(Wanted(size), _PLAIN)
            got = len((await ticket.result(reply_type=Large)).content)
        elif kind == REPLY:
            got = len((await self._runtime.send_message(Wanted(size), _PLAIN, reply_type=Large)).content)
        else:
            got = (await self._runtime.send_message(Wanted(size), _KEYED)).number
        if got != size:
            raise RuntimeError(f"{got} of {size} characters arrived")

    async def load(self, size: int) -> float:
        """Call the keyed agent on a worker that must load its state first. Returns the seconds."""
        began = time.perf_counter()
        got = (await self._runtime.send_message(Wanted(0), _KEYED)).number
        if got != size:
            raise RuntimeError(f"a state of {got} of {size} characters was loaded")
        return time.perf_counter() - began

    async def _check_empty(self) -> None:
        until = time.perf_counter() + _EMPTY_WITHIN
        while (stored := await self._stored()) > 0:
            if time.perf_counter() > until:
                raise RuntimeError(f"{stored} chunks of payloads are left")
            await asyncio.sleep(0.05)

    async def _stored(self) -> int:
        try:
            return (await self._client.jetstream().stream_info(f"{self.place.namespace}_natsrt_blobs")).state.messages
        except nats.js.errors.NotFoundError:
            return 0

    async def clear(self) -> None:
        """Delete the payloads of events."""
        if await self._stored():
            await self._client.jetstream().purge_stream(f"{self.place.namespace}_natsrt_blobs")


ROLES: dict[str, type[Role]] = {"worker": Hosts, "caller": Sends}
TWO_PROCESSES = Peer(name="large", title="two processes", module=__name__)


def scenarios(short: bool) -> Iterator[Scenario]:
    for size in (2 * MB,) if short else (2 * MB, 50 * MB, 200 * MB):
        yield Scenario(
            name=f"large-{size // MB}",
            title=f"Payloads of {size // MB} MB, one at a time",
            unit="MB/s",
            most=20,
            first=1,
            rounds=3,
            variants=[
                *(Variant(name=kind, peer=TWO_PROCESSES, measure=_sent(kind, size)) for kind in KINDS),
                Variant(name=LOADED, peer=TWO_PROCESSES, measure=_loaded(size)),
            ],
        )
        yield Scenario(
            name=f"large-memory-{size // MB}",
            title=f"Peak memory for one payload of {size // MB} MB, beyond what the process had, as a multiple",
            unit="x",
            better=LESS,
            fresh=True,
            rounds=1,
            variants=[
                *(
                    Variant(
                        name=f"{kind}, {'receiver' if receives else 'sender'}",
                        peer=TWO_PROCESSES,
                        measure=_peak(kind, size, (kind in (REPLY, RESULT)) != receives),
                    )
                    for kind in KINDS[:-1]
                    for receives in (False, True)
                ),
                Variant(name=f"{STATE}, owner", peer=TWO_PROCESSES, measure=_peak(STATE, size, True)),
                Variant(name=LOADED, peer=TWO_PROCESSES, measure=_peak_of_loading(size)),
            ],
        )


def _sent(kind: str, size: int) -> Measure:
    async def measure(team: Team, count: int) -> Sample:
        seconds = await team.caller.ask("send", kind=kind, size=size, count=count)
        return Sample(value=size * count / MB / seconds, seconds=seconds)

    return measure


def _loaded(size: int) -> Measure:
    async def measure(team: Team, count: int) -> Sample:
        seconds = 0.0
        for _ in range(count):
            await _move(team, size)
            seconds += await team.caller.ask("load", size=size)
        return Sample(value=size * count / MB / seconds, seconds=seconds)

    return measure


async def _move(team: Team, size: int) -> Member:
    """Store a state of ``size`` characters, and have it given to a new worker. Returns this one."""
    await team.caller.ask("send", kind=STATE, size=size, count=1)
    old, new = team.workers[0], await team.start_worker()
    await team.stop_worker(old)
    return new


def _peak(kind: str, size: int, in_worker: bool) -> Measure:
    """Measure the peak memory of one process for one message, beyond what it had before, as a multiple of ``size``.

    It includes the message as an object, which its sender makes, and its handler or caller keeps until it returns.
    """

    async def measure(team: Team, count: int) -> Sample:
        member = team.workers[0] if in_worker else team.caller
        await team.caller.ask("send", kind=kind, size=100, count=1)
        before = await member.ask("forget_peak")
        await team.caller.ask("send", kind=kind, size=size, count=1)
        return Sample(value=(await member.ask("peak_memory") - before) / size)

    return measure


def _peak_of_loading(size: int) -> Measure:
    async def measure(team: Team, count: int) -> Sample:
        new = await _move(team, size)
        before = await new.ask("forget_peak")
        await team.caller.ask("load", size=size)
        return Sample(value=(await new.ask("peak_memory") - before) / size)

    return measure
