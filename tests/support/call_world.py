"""A registry and workers without sockets, for `Calls` and `CallWatch` in virtual time.

`Network` stands for the connection (see `tests.support.network`), `Workers` for the directory. They behave as the real
ones do where calls can tell: one worker of the queue group gets a call, questions arrive in order with the calls before
them, a dead worker stays in the directory for a while, and messages take time or are lost with the connection.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import orjson
from autogen_core import AgentId
from nats.aio.msg import Msg

from natsrt.agents.inbound import Answer, LoggedCall
from natsrt.errors import NatsrtError, NoLiveWorker
from natsrt.hosting.call_log import CallLog
from natsrt.options import Options
from natsrt.transport.call_watch import CallWatch
from natsrt.transport.calls import Calls
from natsrt.transport.inbox import Inbox
from natsrt.transport.probe import Probe
from natsrt.wire import envelope
from natsrt.wire.envelope import SUPERSEDES_HEADER
from natsrt.wire.failures import BUSY, SERVICE_ERROR_CODE
from natsrt.wire.ids import former_copies
from tests.support.network import Link, Message, Server, Subscription

AGENT = AgentId("chat", "a")
CALLS = "agent.chat"
"""The subject on which the agent is called."""
_ALWAYS = 1e9


class Network(Link):
    """The connection of the calling runtime, and the server behind it."""

    def __init__(self, rng: random.Random, *, tapped: bool = False) -> None:
        super().__init__(Server(rng, tapped=tapped))
        self.workers: Workers
        self.plain: Callable[[str], None] | None = None
        """Answers calls as a plain responder, given their reply subjects; None: there is none."""
        self.accept_to = ""
        """Where workers accept the runtime's calls."""
        self.network.clients.append(_Plain(self))

    @property
    def tapped(self) -> bool:
        """Whether a subscription to everything hides "no responders"."""
        return self.network.tapped

    @property
    def loss(self) -> float:
        """The part of all messages that is lost."""
        return self.network.loss

    @loss.setter
    def loss(self, part: float) -> None:
        self.network.loss = part

    def to_runtime(self, subject: str, payload: bytes, headers: dict[str, str] | None = None) -> None:
        """Send a message to the runtime."""
        self.network.take(Message(subject, payload, "", headers))


class _Plain:
    """The plain responder of a network, as a client of the server."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def matching(self, subject: str) -> Iterable[Subscription]:
        answer = self._network.plain
        if answer is not None and subject == CALLS:
            yield Subscription(CALLS, "", lambda message: answer(message.reply))


class _Replies:
    """The connection of a worker, for its call log."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def publish(self, subject: str, payload: bytes, *, headers: dict[str, str] | None = None) -> Awaitable[None]:
        self._worker.do(lambda: self._worker.network.to_runtime(subject, payload, headers))
        return asyncio.sleep(0)


class Worker:
    """A worker as its callers see it. It handles calls; what it keeps of them is a real `CallLog`."""

    def __init__(self, network: Network, worker_id: str, takes: Callable[[], float]) -> None:
        self.worker_id = worker_id
        self.subject = f"worker.{worker_id}"
        self.network = network
        self.alive = True
        self.listens = True
        """Whether the server has its subscriptions: also for a while after it died."""
        self.serves = True
        """Whether it has subscribed to calls, too."""
        self.frozen = False
        self.busy = False
        self.accepts = True
        self.old = False
        """Whether it is of a version that makes no promises."""
        self.handled: Counter[bytes] = Counter()
        """How often it began to handle each call body."""
        self.asked = 0
        self.log = self._new_log()
        self._takes = takes
        self._arrived: list[Callable[[], None]] = []
        self._last_arrival = 0.0

    def _new_log(self) -> CallLog:
        return CallLog(cast(Any, _Replies(self)), Options(namespace="t"), self.worker_id)

    @property
    def running(self) -> Collection[str]:
        return self.log._running

    def matching(self, subject: str) -> Iterable[Subscription]:
        if self.listens and (subject == self.subject or (subject == CALLS and self.serves)):
            yield Subscription(subject, CALLS, lambda message: self.post(*message, self.network.network.delay()))

    def post(self, subject: str, payload: bytes, reply: str, headers: dict[str, str] | None, delay: float) -> None:
        """Deliver a message, in order with all others."""
        work = partial(self._call, payload, reply, headers) if subject == CALLS else partial(self._ask, payload, reply)
        loop = asyncio.get_running_loop()
        self._last_arrival = max(self._last_arrival, loop.time() + delay)
        loop.call_at(self._last_arrival, self.do, work)

    def do(self, work: Callable[[], None]) -> None:
        """Do something now, or after the thaw; never if it is dead."""
        if self.alive:
            self._arrived.append(work)
            self._go_on()

    def _go_on(self) -> None:
        while self._arrived and not self.frozen:
            self._arrived.pop(0)()

    def kill(self) -> None:
        self.alive = False
        self._arrived.clear()

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False
        self._go_on()

    def forget(self) -> None:
        """Lose the log, running handlers included. A real worker loses at most the replies that it keeps."""
        promises, self.log = self.log.withdrawn, self._new_log()
        self.log.withdrawn = promises
        self.log._last.forgot = asyncio.get_running_loop().time()

    def learn(self, other: Worker) -> None:
        """Make the promises of another worker."""
        now = asyncio.get_running_loop().time()
        self.log.withdrawn.learn(other.log.withdrawn.ages(now, 5000, 1_000_000), now)

    def _call(self, payload: bytes, reply: str, headers: dict[str, str] | None) -> None:
        if self.busy:
            self.network.to_runtime(reply, b"", {SERVICE_ERROR_CODE: str(BUSY)})
            return
        loop, log = asyncio.get_running_loop(), self.log
        call = log.begin(reply, loop.time())
        if call is None:
            return
        if not self.old:
            call.supersedes = former_copies((headers or {}).get(SUPERSEDES_HEADER, ""), reply, forwarded=False)
        if call.supersedes and log.join(call):
            return
        if self.accepts:
            call.accept_to = self.network.accept_to
        self.handled[payload] += 1
        loop.call_later(self._takes(), self.do, lambda: self._finish(log, call, payload))

    def _finish(self, log: CallLog, call: LoggedCall, payload: bytes) -> None:
        if log is self.log:
            log.end(call, Answer(payload))
            for reply in (call.call_id, *call.also):
                self.network.to_runtime(reply, payload)

    def _ask(self, payload: bytes, reply: str) -> None:
        self.asked += 1
        body = envelope.decode(payload)
        assert body is not None
        data = cast(Any, body.json())
        if self.old:
            self._ask_old(data["calls"], reply)
        else:
            self.log.asked(data["calls"], reply, data.get("withdraw", ()))

    def _ask_old(self, calls: Sequence[str], reply: str) -> None:
        answer = {
            "running": [call for call in calls if call in self.running],
            "unknown": [call for call in calls if call not in self.running],
            "remembers": _ALWAYS,
        }
        body = envelope.encode(envelope.REPLY, '"id":"fate-r","source":"/"', orjson.dumps(answer))
        self.network.to_runtime(reply, body)


class Workers:
    """All workers, and the directory of them."""

    def __init__(self, network: Network) -> None:
        self.all: list[Worker] = []
        self.registered: list[str] = []
        """The registry: a worker is in it before it listens."""
        self.listed: list[str] = []
        """The caller's view of the registry, which may lack new workers for a moment."""
        self.old = False
        """Whether workers that are started are of a version that makes no promises."""
        self.promises_kept = True
        """False once a worker has started when no other one answered, so that it could not learn promises."""
        self.suspected: Counter[str] = Counter()
        self.unreachable: NatsrtError | None = None
        """What reading the directory raises; None: it can be read."""
        self.read_takes = 0.01
        """Seconds that reading the directory takes."""
        self._network = network
        self._left_at = float("-inf")
        network.workers = self

    def start(
        self, takes: Callable[[], float] = lambda: 0.0, *, listed_after: float = 0.0, serves_after: float = 0.0
    ) -> Worker:
        """Start a worker. It is registered, then learns the promises of the others, and then gets calls."""
        worker = Worker(self._network, f"w{len(self.all)}", takes)
        others = [other for other in self.all if other.worker_id in self.registered]
        self.all.append(worker)
        self._network.network.clients.append(worker)
        self.registered.append(worker.worker_id)
        worker.old = self.old
        worker.serves = False
        if serves_after:
            asyncio.get_running_loop().call_later(serves_after, self._serve, worker, others)
        else:
            self._serve(worker, others)
        if listed_after:
            asyncio.get_running_loop().call_later(listed_after, self._update)
        else:
            self._update()
        return worker

    def _serve(self, worker: Worker, others: Sequence[Worker]) -> None:
        self._learn(worker, others)
        worker.serves = True

    def _learn(self, worker: Worker, others: Sequence[Worker]) -> None:
        answering = [other for other in others if other.alive and not other.frozen]
        for other in answering:
            worker.learn(other)
        if not answering and len(self.all) > 1:
            self.promises_kept = False

    def _update(self) -> None:
        self.listed = list(self.registered)

    def leave(self, worker: Worker, *, in_order: bool = False) -> None:
        """Take a worker out of the directory. Harmless when it is not there.

        One that leaves ``in_order`` has answered every call that it received.
        """
        if worker.worker_id in self.registered:
            self.registered.remove(worker.worker_id)
            self._update()
            if not in_order:
                self._left_at = asyncio.get_running_loop().time()

    def join_again(self, worker: Worker) -> None:
        """Put a worker that is alive after all into the directory again. It learns the promises of the others, and then
        gets calls, as one that starts."""
        if worker.alive and worker.worker_id not in self.registered:
            self.registered.append(worker.worker_id)
            self._update()
            others = [other for other in self.all if other.worker_id in self.registered and other is not worker]
            self._learn(worker, others)
        worker.listens = worker.alive

    @property
    def handled(self) -> Counter[bytes]:
        """How often each call body was begun to be handled, by all workers together."""
        return sum((worker.handled for worker in self.all), Counter())

    # what the parts of the runtime use

    def subject_of(self, recipient: AgentId) -> str:
        return CALLS

    def worker_subject(self, worker_id: str) -> str:
        return f"worker.{worker_id}"

    def workers_of(self, recipient: AgentId) -> Sequence[str]:
        return tuple(self.listed)

    async def catch_up(self) -> None:
        await asyncio.sleep(self.read_takes)
        if self.unreachable is not None:
            raise self.unreachable
        self._update()

    async def verify(self, recipient: AgentId) -> NatsrtError | None:
        await self.catch_up()
        return None if self.listed else NoLiveWorker(str(recipient), recipient.type)

    def suspect(self, worker_id: str) -> None:
        self.suspected[worker_id] += 1

    def all_stayed(self, since: float) -> bool:
        return self._left_at < since


class World:
    """A calling runtime with its network and its workers."""

    def __init__(self, seed: int = 0, *, tapped: bool = False, **settings: Any) -> None:
        options = Options(namespace="t", **settings)
        self.network = Network(random.Random(seed), tapped=tapped)
        self.workers = Workers(self.network)
        network, workers = cast(Any, self.network), self.workers
        self.inbox = Inbox(network, options)
        self.watch = CallWatch(network, self.inbox, Probe(network, self.inbox), options, workers)
        self.calls = Calls(network, self.inbox, self.watch, options, workers)

    def call(self, body: bytes = b"1", **arguments: Any) -> asyncio.Task[Msg]:
        return asyncio.ensure_future(self.calls.call(AGENT, body, **arguments))

    @asynccontextmanager
    async def started(self) -> AsyncIterator[World]:
        await self.inbox.start()
        await self.calls.start()
        self.network.accept_to = self.calls.accept_to
        try:
            yield self
        finally:
            await self.calls.stop()
            await self.inbox.stop()
