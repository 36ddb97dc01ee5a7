"""The processes of a soak: workers that write down what they handle, and callers with all kinds of load."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from autogen_core import AgentId, CancellationToken, MessageContext, RoutedAgent, TopicId, event, rpc

import natsrt
from benchmarks.chaos import counters
from benchmarks.chaos.journal import Journal
from benchmarks.chaos.ledger import ACKNOWLEDGED, PENDING, Entry, Ledger
from benchmarks.roles import Role
from natsrt.jetstream.registry.store import BUCKET
from natsrt.transport.client import NatsClient
from natsrt.wire.subjects import Subjects

PLAIN = "plain"
LISTENER = "listener"
TICKS = "ticks"
_CANCELLED = "cancelled"
_LOOK = 0.02
"""Seconds between two looks of a handler whether it was cancelled."""
_WORK = 4.0
"""Seconds for which the handler of a call runs that is to be cancelled."""
_FD = Path("/proc/self/fd")
_STATM = Path("/proc/self/statm")


@dataclass
class Ask:
    """A call. ``name`` is unique; the handler runs for ``seconds``, or until it is cancelled."""

    name: str
    seconds: float = 0.0


@dataclass
class Tick:
    """An event with a unique ``name``."""

    name: str


class Plain(RoutedAgent):
    """Writes down each call that it handles, and whether it was cancelled."""

    journal: ClassVar[Journal]

    def __init__(self) -> None:
        super().__init__("answers")

    @rpc
    async def on_ask(self, message: Ask, ctx: MessageContext) -> str:
        self.journal.write("handled", message.name)
        until = time.monotonic() + message.seconds
        while time.monotonic() < until:
            if ctx.cancellation_token.is_cancelled():
                self.journal.write(_CANCELLED, message.name)
                break
            await asyncio.sleep(_LOOK)
        return message.name


class Listener(RoutedAgent):
    """Writes down each event that it handles."""

    def __init__(self) -> None:
        super().__init__("listens")

    @event
    async def on_tick(self, message: Tick, ctx: MessageContext) -> None:
        Plain.journal.write("heard", message.name)


@natsrt.keyed
class WritingCounter(counters.Counter):
    """A counter that also writes down each call that it handles."""

    @rpc
    async def on_increment(  # type: ignore[override]
        self, message: counters.Increment, ctx: MessageContext
    ) -> counters.Counted:
        Plain.journal.write("counted", message.call)
        return await self.count(message)


class Usage(Role):
    """What a process takes, and its clock."""

    runtime: natsrt.NatsAgentRuntime

    async def usage(self) -> dict[str, int]:
        """Return the number of tasks, descriptors and subscriptions, without those of live agents, and the memory."""
        gc.collect()
        health = self.runtime.health()
        client = self.runtime.running.connection.client
        assert isinstance(client, NatsClient)
        keyed = sum(count for agent_type, count in health.agents.items() if agent_type in (counters.COUNTER,))
        return {
            "tasks": len(asyncio.all_tasks()),
            "descriptors": _descriptors(),
            "subscriptions": len(client._subs) - 2 * keyed,
            "pending calls": self.runtime.running.calls.pending,
            "megabytes": _megabytes(),
        }

    async def tasks(self) -> dict[str, int]:
        """Return the number of tasks by what they run, to find out what has leaked."""
        return Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())

    async def shift_clock(self, seconds: float) -> None:
        """Let the wall clock of this process jump. The monotonic clock goes on."""
        _Clock.shift += seconds


def _descriptors() -> int:
    return len(list(_FD.iterdir()))


def _megabytes() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20


class _Clock:
    """A wall clock that is wrong by ``shift`` seconds."""

    shift = 0.0
    _time, _time_ns = staticmethod(time.time), staticmethod(time.time_ns)

    @classmethod
    def install(cls) -> None:
        """Let this process read it."""
        time.time = lambda: cls._time() + cls.shift
        time.time_ns = lambda: cls._time_ns() + int(cls.shift * 1e9)


class Worker(Usage, counters.Worker):
    """Hosts the agents. Its setting ``journal`` is the directory of the journals."""

    counter = WritingCounter

    async def start(self) -> None:
        options = dict(self.setup.options)
        Plain.journal = Journal(options.pop("journal"))
        self.setup = replace(self.setup, options=tuple(options.items()))
        _Clock.install()
        await super().start()
        await natsrt.register(self.runtime, Plain, PLAIN, Plain)
        await natsrt.register(self.runtime, Listener, LISTENER, Listener)
        await self.subscribe(TICKS, LISTENER)


class Caller(Usage, counters.Caller):
    """Calls plain agents and counters, cancels calls and publishes, until it gets the command `finish`."""

    async def start(self) -> None:
        _Clock.install()
        await super().start()
        self._plain, self._cancelled = Ledger(), Ledger()
        self._ticks: list[tuple[str, float]] = []
        self._names = itertools.count(1)
        self._epoch = time.monotonic()

    async def load(self, seed: int, keys: int, keys_for: float) -> None:
        """Begin, and return at once.

        Args:
            seed: Decides when calls are cancelled.
            keys: Number of counters that are called at a time.
            keys_for: Seconds after which other counters are called, so that no state grows without end.
        """
        self._going_on = True
        rng = random.Random(seed)
        turns = itertools.count(rng.randrange(keys))

        async def call() -> None:
            await self._ask(self._plain, Ask(self._name()))

        async def increment() -> None:
            period = int((time.monotonic() - self._epoch) / keys_for)
            await self._call_once(AgentId(counters.COUNTER, f"{next(turns) % keys}-{period}"))

        async def cancel() -> None:
            token = CancellationToken()
            asyncio.get_running_loop().call_later(rng.uniform(0.0, 1.5), token.cancel)
            await self._ask(self._cancelled, Ask(self._name(), _WORK), token)

        async def publish() -> None:
            name = self._name()
            try:
                await self.runtime.publish_message(Tick(name), TopicId(TICKS, "all"))
            except natsrt.NatsrtError:
                return
            self._ticks.append((name, time.monotonic()))

        for work, pause, count in ((call, 0.05, 4), (increment, 0.05, 4), (cancel, 0.2, 2), (publish, 0.05, 1)):
            for _ in range(count):
                self._load.append(asyncio.create_task(self._repeat(work, pause)))

    async def _repeat(self, work: Callable[[], Awaitable[None]], pause: float) -> None:
        while self._going_on:
            await work()
            await asyncio.sleep(pause)

    def _name(self) -> str:
        return f"{os.getpid()}-{next(self._names)}"

    async def _ask(self, ledger: Ledger, message: Ask, token: CancellationToken | None = None) -> None:
        """Make one call, and record it. A call that the token has cancelled counts as acknowledged."""
        sent, outcome = time.monotonic(), PENDING
        recipient = AgentId(PLAIN, "k")
        try:
            await self.runtime.send_message(message, recipient, cancellation_token=token)
            outcome = ACKNOWLEDGED
        except asyncio.CancelledError:
            if token is None or not token.is_cancelled():
                raise
            outcome = ACKNOWLEDGED
        except Exception as error:
            outcome = type(error).__name__
        finally:
            ledger.entries.append(Entry(str(recipient), sent, time.monotonic(), outcome, message.name))

    async def probe(self, seconds: float) -> float | None:
        """Call until a plain agent and a counter have answered. Returns the moment; None if that takes longer."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                    await self.runtime.send_message(Ask(self._name()), AgentId(PLAIN, "k"))
                    recipient = AgentId(counters.COUNTER, "probe")
                    await self.runtime.send_message(counters.Increment(self._name()), recipient)
                return time.monotonic()
            except (natsrt.NatsrtError, TimeoutError):
                await asyncio.sleep(_LOOK)
        return None

    async def finish(self, seconds: float = 60.0) -> dict[str, Any]:
        """Stop the load. Calls have ``seconds`` to end. Returns the ledgers, and the events with their times."""
        counted = await self.end(seconds)
        result = {
            "counters": counted,
            "plain": self._plain.to_json(),
            "cancelled": self._cancelled.to_json(),
            "ticks": self._ticks,
        }
        self._plain, self._cancelled, self._ticks = Ledger(), Ledger(), []
        return result

    async def purge_registry(self) -> None:
        """Remove everything from the registry, as an operator may."""
        stream = f"KV_{Subjects(self.place.namespace).bucket(BUCKET)}"
        await self.runtime.running.connection.jetstream.purge_stream(stream)


ROLES: dict[str, type[Role]] = {"worker": Worker, "caller": Caller}
