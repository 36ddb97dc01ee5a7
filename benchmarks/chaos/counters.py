"""Processes that host keyed agents which record every call, and processes that call them."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import nats
from autogen_core import (
    AgentId,
    MessageContext,
    RoutedAgent,
    TopicId,
    message_handler,
    rpc,
)

import natsrt
from benchmarks.chaos import roles
from benchmarks.roles import Role
from natsrt import NatsAgentRuntime, keyed

COUNTER = "counter"
TOPIC = "dictation"


def agent_of(key: str) -> str:
    """Return the agent id of the counter with this key as text, as `roles.Caller.call` takes it."""
    return f"{COUNTER}/{key}"


@dataclass
class Increment:
    """A call. ``call`` is its name, unique among all callers. ``seconds`` is how long the handler runs."""

    call: str
    seconds: float = 0.0


@dataclass
class Counted:
    """The reply: the ``value`` of the counter after the call, and the worker and instance that handled it."""

    call: str
    value: int
    worker: str
    instance: str


@dataclass
class Line:
    """A message to a scribe, sent as a call or as an event."""

    number: int


@keyed
class Counter(RoutedAgent):
    """Keeps the names of all calls that it handled, in order, as its state."""

    made: ClassVar[list[str]] = []
    """The keys of the instances that were created in this process."""
    closed: ClassVar[list[str]] = []
    """The keys of the instances that were closed in this process."""

    def __init__(self) -> None:
        super().__init__("counts calls")
        self.made.append(self.id.key)
        self._instance = f"{os.getpid()}/{len(self.made)}"
        self._calls: list[str] = []

    async def close(self) -> None:
        self.closed.append(self.id.key)

    async def save_state(self) -> Mapping[str, Any]:
        return {"calls": self._calls}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self._calls = list(state["calls"])

    @rpc
    async def on_increment(self, message: Increment, ctx: MessageContext) -> Counted:
        return await self.count(message)

    async def count(self, message: Increment) -> Counted:
        """Handle one call."""
        self._calls.append(message.call)
        value = len(self._calls)
        if message.seconds:
            await asyncio.sleep(message.seconds)
        return Counted(message.call, value, getattr(self.runtime, "worker_id", None) or "", self._instance)


@keyed
class Scribe(RoutedAgent):
    """Records the numbers that it receives, in the order in which the handlers start."""

    written: ClassVar[dict[str, list[int]]] = defaultdict(list)

    def __init__(self) -> None:
        super().__init__("writes down")

    @message_handler
    async def on_line(self, message: Line, ctx: MessageContext) -> None:
        self.written[str(self.id)].append(message.number)


@keyed(concurrency="concurrent")
class ConcurrentScribe(Scribe):
    """A scribe with several handlers at a time, which start in order."""


SCRIBES: dict[str, type[Scribe]] = {"scribe": Scribe, "concurrent_scribe": ConcurrentScribe}
"""The scribes by agent type. Each type is subscribed to `TOPIC`."""


class Worker(roles.Worker):
    """Hosts counters and scribes. Stops gracefully at SIGTERM."""

    counter: ClassVar[type[Counter]] = Counter
    """The class of the counters."""

    async def start(self) -> None:
        options = dict(self.setup.options)
        self.runtime = NatsAgentRuntime(self.place.address, namespace=self.place.namespace, **options)
        await natsrt.register(self.runtime, self.counter, COUNTER, self.counter)
        for agent_type, scribe in SCRIBES.items():
            await natsrt.register(self.runtime, scribe, agent_type, scribe)
            await self.subscribe(TOPIC, agent_type)
        await self.runtime.start()
        self._leaving = asyncio.create_task(self._leave())

    async def _leave(self) -> None:
        await self.runtime.stop_when_signal([signal.SIGTERM])
        raise SystemExit

    async def stop(self) -> None:
        self._leaving.cancel()
        await super().stop()

    async def instances(self) -> dict[str, Any]:
        """Return the keys of the counters created and closed here, and the numbers of live ones and state conflicts."""
        conflicts = self.runtime.health().state_conflicts
        live = self.runtime.health().agents[COUNTER]
        return {"made": Counter.made, "closed": Counter.closed, "live": live, "conflicts": conflicts}

    async def written(self) -> dict[str, list[int]]:
        """Return the numbers that each scribe in this process recorded."""
        return dict(Scribe.written)


class Caller(roles.Caller):
    """Increments counters. For each reply, the ledger keeps a list of the fields of `Counted`."""

    handled_seconds = 0.0
    """Seconds for which the handler of each new call runs."""

    def question(self, number: int, recipient: AgentId) -> Any:
        return Increment(f"{os.getpid()}-{number}", self.handled_seconds)

    def kept(self, reply: Any) -> Any:
        return [reply.call, reply.value, reply.worker, reply.instance]

    async def first_calls(self, keys: Sequence[str], moment: float) -> None:
        """Call each of these counters once, all at the same time, at ``moment`` of the monotonic clock."""
        await asyncio.sleep(moment - time.monotonic())
        await asyncio.gather(*(self._call_once(AgentId(COUNTER, key)) for key in keys))

    async def call_one(self, key: str, handled_seconds: float = 0.0) -> None:
        """Begin one call whose handler runs for ``handled_seconds``, and return at once."""
        self.handled_seconds = handled_seconds
        self._load.append(asyncio.create_task(self._call_once(AgentId(COUNTER, key))))
        await asyncio.sleep(0)  # the call begins before handled_seconds changes
        self.handled_seconds = 0.0

    async def ended(self, count: int, seconds: float) -> float | None:
        """Wait until ``count`` calls have ended. Returns the moment; None if it takes longer than ``seconds``."""
        return await roles.until(lambda: len(self._ledger.entries) >= count, seconds)

    async def stored(self, keys: Sequence[str]) -> dict[str, list[str]]:
        """Return the names of the calls in the stored state of each counter, by key."""
        records = self.runtime.running.records

        async def calls_of(key: str) -> list[str]:
            record = await records.read(AgentId(COUNTER, key))
            state = None if record is None else await records.state(record)
            return [] if state is None else list(json.loads(state)["calls"])

        return dict(zip(keys, await asyncio.gather(*map(calls_of, keys)), strict=True))

    async def dictate(self, keys: Sequence[str], count: int) -> dict[str, Any]:
        """Send ``count`` numbers to the scribes with these keys, as calls and events, without waiting between them.

        Returns the numbers that each scribe should record, in order, and the number of failed sends by error class.
        """
        expected: dict[str, list[int]] = defaultdict(list)
        calls: list[asyncio.Future[Any]] = []
        scribes, by_event = itertools.cycle(SCRIBES), itertools.cycle([True, False, False, True, True, False, True])
        turns = itertools.cycle(keys)
        for number in range(count):
            key = next(turns)
            if next(by_event):
                for agent_type in SCRIBES:
                    expected[f"{agent_type}/{key}"].append(number)
                calls.append(asyncio.ensure_future(self.runtime.publish_message(Line(number), TopicId(TOPIC, key))))
            else:
                recipient = AgentId(next(scribes), key)
                expected[str(recipient)].append(number)
                calls.append(asyncio.ensure_future(self.runtime.send_message(Line(number), recipient)))
            if number % 50 == 0:
                await asyncio.sleep(0)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        errors: dict[str, int] = defaultdict(int)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                errors[type(outcome).__name__] += 1
        return {"expected": expected, "errors": errors}


class Tap(Role):
    """Subscribes to every subject, as ``nats sub '>'`` does, which suppresses "no responders" for all clients."""

    async def start(self) -> None:
        async def discard(_: Any) -> None:
            pass

        self._client = await nats.connect(self.place.address)
        await self._client.subscribe(">", cb=discard)
        await asyncio.sleep(0)  # so that the subscription is written before the ping of the flush
        await self._client.flush()

    async def stop(self) -> None:
        await self._client.close()


ROLES: dict[str, type[Role]] = {"worker": Worker, "caller": Caller, "tap": Tap}
