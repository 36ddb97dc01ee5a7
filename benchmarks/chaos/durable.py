"""Processes that host agents subscribed to a durable topic, which write down what they handle, and their publishers."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import nats.js.errors
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, event, rpc

import natsrt
from benchmarks.chaos import roles
from benchmarks.chaos.counters import Tap
from benchmarks.chaos.journal import Journal
from benchmarks.roles import Role
from natsrt import NatsAgentRuntime
from natsrt.hosting.durable_settlement import DurableSettlement
from natsrt.hosting.feeder import Feeder
from natsrt.jetstream.streams import DEAD, EVENTS
from natsrt.wire.subjects import Subjects

T = TypeVar("T")

TOPIC = "facts"
PLAIN, KEYED = "plain", "keyed"
"""The agent types. Each run has one of them."""
BEGUN, HANDLED, AGAIN, FAILED = "begun", "handled", "again", "failed"
"""Words of the journal: a handler began, an event was handled, it had been delivered before, its handler raised."""
_STEP = 0.1
"""Seconds between two moments at which a handler lets others run."""
WORK = 0.03
"""Seconds for which each handler runs, so that workers that are killed have events."""
_PAUSE = 0.1
"""Seconds between two attempts to publish, and between two looks at a consumer."""


@dataclass
class Fact:
    """An event. ``number`` counts those of its source, from 0. ``poison``: its handler raises until it is mended.
    ``seconds``: how long its handler runs."""

    source: str
    number: int
    poison: bool = False
    seconds: float = WORK

    @property
    def name(self) -> str:
        """Unique among all events."""
        return f"{self.source}/{self.number}"


@dataclass
class Ask:
    """A call for what a keyed agent has handled."""


@dataclass
class Numbers:
    """The reply: the ``numbers`` in the order in which they were handled."""

    numbers: list[int]


class Plain(RoutedAgent):
    """Writes down each event that it handles."""

    journal: ClassVar[Journal]
    mended: ClassVar[bool] = False
    """True: poison is handled as other events."""

    def __init__(self) -> None:
        super().__init__("writes down")

    @event
    async def on_fact(self, message: Fact, ctx: MessageContext) -> None:
        await self.work(message)

    async def work(self, message: Fact) -> None:
        """Work, then write one line, and another one if the event was delivered before."""
        self.journal.write(BEGUN, message.name)
        steps = max(1, round(message.seconds / _STEP))
        for _ in range(steps):  # a process that was frozen reads what has come meanwhile before the handler ends
            await asyncio.sleep(message.seconds / steps)
        if message.poison and not self.mended:
            self.journal.write(FAILED, message.name)
            raise ValueError(f"{message.name} is poison")
        delivery = natsrt.current_delivery()
        if delivery is None or delivery.attempt > 1:
            self.journal.write(AGAIN, message.name)
        self.journal.write(HANDLED, message.name)


@natsrt.keyed
class Keyed(Plain):
    """Also keeps the numbers of its events as its state, in the order in which it handled them."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: list[int] = []

    @event
    async def on_fact(self, message: Fact, ctx: MessageContext) -> None:  # type: ignore[override]
        await self.work(message)
        self._numbers.append(message.number)

    @rpc
    async def on_ask(self, message: Ask, ctx: MessageContext) -> Numbers:
        return Numbers(self._numbers)

    async def save_state(self) -> Mapping[str, Any]:
        return {"numbers": self._numbers}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self._numbers = list(state["numbers"])


_CLASSES: dict[str, type[Plain]] = {PLAIN: Plain, KEYED: Keyed}


class Worker(roles.Worker):
    """Hosts one agent type: its setting ``hosts``. Its setting ``journal`` is the directory of the journals."""

    async def start(self) -> None:
        options = dict(self.setup.options)
        Plain.journal = Journal(options.pop("journal"))
        agent_type = options.pop("hosts")
        self.setup = replace(self.setup, options=tuple(options.items()))
        await super().start()
        await natsrt.register(self.runtime, _CLASSES[agent_type], agent_type, _CLASSES[agent_type])
        await self.subscribe(TOPIC, agent_type)

    async def mend(self) -> None:
        """Handle poison as other events from now on."""
        Plain.mended = True

    async def die_at_dead_letter(self) -> None:
        """Have this process killed when it has stored a dead letter, and is about to terminate its event."""
        for puller in self.runtime.running.incoming.durable.settlements:
            assert isinstance(puller, DurableSettlement | Feeder)
            puller.pull.terminate = lambda delivery, reason: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]


async def messages_in(runtime: NatsAgentRuntime, streams: Sequence[str]) -> dict[str, int]:
    """Return how many messages natsrt's streams have. Their names are without the namespace."""
    network = runtime.running.network
    js, subjects = network.connection.jetstream, network.subjects
    return {stream: (await js.stream_info(subjects.bucket(stream))).state.messages for stream in streams}


async def handled_by(runtime: NatsAgentRuntime, keys: Sequence[str], reply_type: type[T]) -> list[T]:
    """Return what the keyed agents with these keys reply to `Ask`."""
    agents = [AgentId(KEYED, key) for key in keys]
    return await asyncio.gather(*(runtime.send_message(Ask(), agent, reply_type=reply_type) for agent in agents))


class Publisher(roles.Caller):
    """Publishes facts, each until it is confirmed."""

    async def start(self) -> None:
        await super().start()
        self._failed: Counter[str] = Counter()
        self._confirmed = 0
        self._slowest = 0.0
        self._publishing: list[asyncio.Task[None]] = []

    async def begin(self, sources: int, each: int, pause: float, seconds: float = WORK) -> None:
        """Begin to publish ``each`` facts of each source, and return at once.

        Those of one source follow one another, ``pause`` seconds after the confirmation of the one before. Each is
        handled for ``seconds``.
        """
        for number in range(sources):
            self._publishing.append(asyncio.create_task(self._publish_all(f"s{number}", each, pause, seconds)))

    async def _publish_all(self, source: str, count: int, pause: float, seconds: float) -> None:
        for number in range(count):
            await self._publish(Fact(source, number, seconds=seconds))
            await asyncio.sleep(pause)

    async def _publish(self, fact: Fact) -> None:
        topic = TopicId(TOPIC, fact.source)
        while True:
            began = time.monotonic()
            try:
                await self.runtime.publish_message(fact, topic, message_id=f"{os.getpid()}-{fact.name}")
            except natsrt.NatsrtError as error:
                self._failed[type(error).__name__] += 1
                await asyncio.sleep(_PAUSE)
            else:
                self._confirmed += 1
                return
            finally:
                self._slowest = max(self._slowest, time.monotonic() - began)

    async def confirmed(self, count: int, seconds: float) -> int:
        """Wait until ``count`` facts are confirmed, or ``seconds`` have passed. Returns how many are."""
        await roles.until(lambda: self._confirmed >= count, seconds)
        return self._confirmed

    async def published(self, seconds: float) -> dict[str, Any]:
        """Wait until all facts are confirmed. Returns how many are, the failed attempts by error, and the slowest."""
        async with asyncio.timeout(seconds):
            await asyncio.gather(*self._publishing)
        return {"confirmed": self._confirmed, "failed": self._failed, "slowest": self._slowest}

    async def publish_these(self, facts: Sequence[Sequence[Any]]) -> None:
        """Publish facts, given as their fields, one after the other. Returns when they are confirmed."""
        for fields in facts:
            await self._publish(Fact(*fields))

    async def letters(self) -> list[dict[str, Any]]:
        """Return what the dead letters say."""
        return [
            {"attempts": letter.attempts, "error": letter.error, "traceback": letter.traceback, "reason": letter.reason}
            async for letter in self.runtime.dead_letters()
        ]

    async def redrive(self) -> None:
        """Redrive all dead letters."""
        async for letter in self.runtime.dead_letters():
            await self.runtime.redrive(letter)

    async def settled(self, agent_type: str, seconds: float) -> float | None:
        """Wait until the agent type has nothing left to handle. Returns the moment; None after ``seconds``."""
        deadline = time.monotonic() + seconds
        stream = Subjects(self.place.namespace).bucket(EVENTS)
        while time.monotonic() < deadline:
            try:
                info = await self.runtime.running.connection.jetstream.consumer_info(stream, agent_type)
                if not info.num_pending and not info.num_ack_pending:
                    return time.monotonic()
            except (nats.js.errors.Error, TimeoutError):
                pass
            await asyncio.sleep(_PAUSE)
        return None

    async def stored(self) -> dict[str, int]:
        """Return how many events are stored, and how many dead letters."""
        return await messages_in(self.runtime, (EVENTS, DEAD))

    async def numbers(self, sources: int) -> list[list[int]]:
        """Return the numbers that the keyed agent of each source has handled, in their order."""
        replies = await handled_by(self.runtime, [f"s{number}" for number in range(sources)], Numbers)
        return [reply.numbers for reply in replies]


ROLES: dict[str, type[Role]] = {"worker": Worker, "caller": Publisher, "tap": Tap}
