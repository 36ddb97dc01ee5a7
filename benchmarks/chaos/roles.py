"""The roles of the processes of a scenario. Each public coroutine method is a command: see `benchmarks.roles`.

A scenario that needs other agents or calls subclasses `Worker` and `Caller` in its own module, lists them in ``ROLES``
there, and creates its `benchmarks.chaos.crew.Crew` with the name of that module.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, event, rpc

import natsrt
from benchmarks.chaos.ledger import ACKNOWLEDGED, PENDING, Entry, Ledger
from benchmarks.roles import Role
from natsrt import NatsAgentRuntime

_POLL_SECONDS = 0.005
_LATEST = 100
"""Number of latest calls that are searched for a recent one."""
_BLOCKED_SECONDS = 0.5
_LARGE = "." * 900_000


@dataclass
class Question:
    """A call."""

    number: int


@dataclass
class Answer:
    """The reply. ``worker`` is the id of the worker that handled the call."""

    number: int
    worker: str


@dataclass
class Note:
    """An event. ``published`` is a time of the monotonic clock."""

    published: float


class Clerk(RoutedAgent):
    """Answers questions, and records when the events that it receives were published."""

    heard: ClassVar[dict[str, float]] = {}
    """By topic type: the time when the last event that this process received was published."""

    def __init__(self) -> None:
        super().__init__("answers")
        self.asked = 0

    @rpc
    async def on_question(self, message: Question, ctx: MessageContext) -> Answer:
        self.asked += 1
        return Answer(message.number, getattr(self.runtime, "worker_id", None) or "")

    @event
    async def on_note(self, message: Note, ctx: MessageContext) -> None:
        assert ctx.topic_id is not None
        self.heard[ctx.topic_id.type] = message.published


class Bookkeeper(Clerk):
    """A clerk with a state, which every question changes."""

    async def save_state(self) -> Mapping[str, Any]:
        return {"asked": self.asked}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.asked = state["asked"]


_CLASSES = {cls.__name__: cls for cls in (Clerk, Bookkeeper)}


async def until(condition: Callable[[], Any], seconds: float) -> float | None:
    """Wait until ``condition`` is true. Returns that moment; None if it is still false after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return None
        await asyncio.sleep(_POLL_SECONDS)
    return time.monotonic()


class Worker(Role):
    """A process with one runtime. ``Setup.options`` are settings of the runtime.

    Commands that wait take a time limit ``seconds``. They return the moment at which the condition became true, or None
    if it did not in time. Moments are times of the monotonic clock.
    """

    async def start(self) -> None:
        options = dict(self.setup.options)
        self.runtime = NatsAgentRuntime(self.place.address, namespace=self.place.namespace, **options)
        await self.runtime.start()

    async def stop(self) -> None:
        await self.runtime.close()

    async def host(self, agent_type: str, topic: str | None = None, agent: str = Clerk.__name__) -> None:
        """Host an agent type. The runtime's setting ``keyed`` names the types that are keyed.

        Args:
            agent_type: The agent type.
            topic: Topic type that the agent type is subscribed to. None: no subscription.
            agent: Name of the agents' class.
        """
        await natsrt.register(self.runtime, _CLASSES[agent], agent_type, _CLASSES[agent])
        if topic is not None:
            await self.subscribe(topic, agent_type)

    async def subscribe(self, topic: str, agent_type: str) -> None:
        """Subscribe an agent type to a topic type. Any worker may host the agent type."""
        await self.runtime.add_subscription(TypeSubscription(topic, agent_type))

    async def health(self) -> dict[str, Any]:
        """Return the runtime's health."""
        return asdict(self.runtime.health())

    async def host_at_last(self, agent_type: str, seconds: float) -> float | None:
        """Try to host an agent type until it is registered. Returns None if that takes longer than ``seconds``."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                await self.host(agent_type)
                return time.monotonic()
            except natsrt.NatsrtError:
                await asyncio.sleep(_POLL_SECONDS)
        return None

    async def connected(self, reconnects: int, seconds: float) -> float | None:
        """Wait until the runtime is connected and has reconnected more than ``reconnects`` times."""

        def is_connected() -> bool:
            health = self.runtime.health()
            return health.connected and health.reconnects > reconnects

        return await until(is_connected, seconds)

    async def back(self, reconnects: int, seconds: float) -> float | None:
        """Wait until the runtime is ready and has reconnected more than ``reconnects`` times."""

        def is_back() -> bool:
            return self.runtime.ready and self.runtime.health().reconnects > reconnects

        return await until(is_back, seconds)

    async def sees(self, agent_type: str, seconds: float) -> float | None:
        """Wait until the runtime's view of the registry lists a live worker of the type."""
        return await until(lambda: self.runtime.running.registry.view.workers_hosting(agent_type), seconds)

    async def note(self, topic: str) -> None:
        """Publish one event."""
        await self.runtime.publish_message(Note(time.monotonic()), TopicId(topic, "all"))

    async def flood(self, size: int) -> int:
        """Begin to publish ``size`` bytes. Returns the number of bytes published when the server accepts no more.

        Raises:
            RuntimeError: The server accepted all bytes.
        """
        published = 0

        async def publish() -> None:
            nonlocal published
            while published < size:
                await self.runtime.publish_message(_LARGE, TopicId("flood", "all"))
                published += len(_LARGE)

        self._flood = asyncio.create_task(publish())
        before = -1
        while published > before:
            before = published
            await asyncio.sleep(_BLOCKED_SECONDS)
        if self._flood.done():
            raise RuntimeError("the server took all of the flood")
        return published

    async def hears(self, topic: str, published_after: float, seconds: float) -> float | None:
        """Wait until an agent in this process has received an event published after ``published_after``."""
        return await until(lambda: Clerk.heard.get(topic, 0.0) > published_after, seconds)


class Caller(Worker):
    """Calls and publishes until it gets the command `end`, and records its calls in a ledger."""

    async def start(self) -> None:
        await super().start()
        self._ledger = Ledger()
        self._going_on = False
        self._load: list[asyncio.Task[None]] = []
        self._numbers = itertools.count(1)

    def question(self, number: int, recipient: AgentId) -> Any:
        """Return the message of a call. ``number`` counts the calls of this process."""
        return Question(number)

    def kept(self, reply: Any) -> Any:
        """Return the part of a reply that the ledger keeps, as JSON values."""
        return reply.worker

    async def call(self, recipients: Sequence[str], concurrency: int = 8, pause: float = 0.01) -> None:
        """Begin to call the recipients in turn, and return at once.

        Args:
            recipients: Agent ids as text, ``type/key``.
            concurrency: Number of callers. Each waits for its reply and then for ``pause`` before its next call.
            pause: In seconds.
        """
        self._going_on = True
        turns = itertools.cycle([AgentId.from_str(recipient) for recipient in recipients])

        async def keep_calling() -> None:
            while self._going_on:
                await self._call_once(next(turns))
                await asyncio.sleep(pause)

        self._load += [asyncio.create_task(keep_calling()) for _ in range(concurrency)]

    async def publish(self, topic: str, pause: float = 0.02) -> None:
        """Begin to publish events one after the other, ``pause`` seconds apart, and return at once.

        The ledger does not contain events.
        """
        self._going_on = True

        async def keep_publishing() -> None:
            while self._going_on:
                try:
                    await self.note(topic)
                except natsrt.NatsrtError:
                    pass  # the subscribers check whether events arrive
                await asyncio.sleep(pause)

        self._load.append(asyncio.create_task(keep_publishing()))

    async def answered(self, sent_after: float, seconds: float, recipient: str | None = None) -> float | None:
        """Wait for the reply to a call sent after ``sent_after``. If ``recipient`` is None, any recipient counts."""

        def is_answered() -> bool:
            return any(
                entry.acknowledged and entry.sent > sent_after and recipient in (None, entry.recipient)
                for entry in self._ledger.entries[-_LATEST:]
            )

        return await until(is_answered, seconds)

    async def end(self, seconds: float = 60.0) -> list[list[Any]]:
        """Stop calling and publishing. Calls have ``seconds`` to end. Returns the ledger for `Ledger.from_json`."""
        self._going_on = False
        if self._load:
            _, hanging = await asyncio.wait(self._load, timeout=seconds)
            for task in hanging:
                task.cancel()
            await asyncio.gather(*self._load, return_exceptions=True)
            self._load.clear()
        ledger, self._ledger = self._ledger, Ledger()
        return ledger.to_json()

    async def _call_once(self, recipient: AgentId) -> None:
        sent = time.monotonic()
        outcome, reply = PENDING, None
        try:
            reply = self.kept(await self.runtime.send_message(self.question(next(self._numbers), recipient), recipient))
            outcome = ACKNOWLEDGED
        except Exception as error:
            outcome, reply = type(error).__name__, str(error)
        finally:  # a cancelled call is recorded as pending
            self._ledger.entries.append(Entry(str(recipient), sent, time.monotonic(), outcome, reply))


ROLES: dict[str, type[Role]] = {"worker": Worker, "caller": Caller}
