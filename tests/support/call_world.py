"""A server, a registry and workers without sockets, for `Calls` and `CallWatch` in virtual time.

`Network` stands for the connection, `Workers` for the directory. They behave as the real ones do where calls can tell:
one worker of the queue group gets a call, questions arrive in order with the calls before them, a dead worker stays in
the directory for a while, and messages take time or are lost with the connection.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import orjson
from autogen_core import AgentId
from nats.aio.msg import Msg

from natsrt.errors import NatsrtError, NoLiveWorker, PermissionDenied, ServerUnreachable
from natsrt.options import Options
from natsrt.transport.call_watch import CallWatch
from natsrt.transport.calls import Calls
from natsrt.transport.inbox import Inbox
from natsrt.transport.probe import TRACE_ONLY, Probe
from natsrt.wire import envelope
from natsrt.wire.failures import BUSY, SERVICE_ERROR_CODE

AGENT = AgentId("chat", "a")
CALLS = "agent.chat"
"""The subject on which the agent is called."""
_NOBODY = {"Status": "503"}
_ALWAYS = 1e9


class Network:
    """The connection of the calling runtime, and the server behind it. Times are in seconds."""

    def __init__(self, rng: random.Random, *, tapped: bool = False) -> None:
        self.rng = rng
        self.tapped = tapped
        """Whether a subscription to everything hides "no responders"."""
        self.up = True
        self.settled = True
        self.loss = 0.0
        """The part of all messages that is lost."""
        self.travel = 0.002
        """How long a message takes at most."""
        self.workers: Workers
        self.plain: Callable[[str], None] | None = None
        """Answers calls as a plain responder, given their reply subjects; None: there is none."""
        self.published: list[tuple[str, bytes]] = []
        """The subjects and bodies of everything that the runtime sent, questions to the server left out."""
        self._sink: Callable[[Msg], None] | None = None
        self._listener: Any = None
        self._denied: Callable[[PermissionDenied], None] | None = None
        self._unsent: list[tuple[str, bytes, str, dict[str, str] | None]] = []

    # what the parts of the runtime use

    def add_listener(self, listener: Any) -> None:
        self._listener = listener

    def on_denied(self, callback: Callable[[PermissionDenied], None]) -> None:
        self._denied = callback

    def unreachable(self, seconds: float, reason: str | None = None) -> ServerUnreachable:
        return ServerUnreachable(["nats://virtual"], seconds, reason)

    async def subscribe(self, subject: str, sink: Callable[[Msg], None]) -> str:
        self._sink = sink
        return subject

    async def unsubscribe(self, interest: str) -> None:
        self._sink = None

    def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> Awaitable[None]:
        if self.up:
            self._send(subject, payload, reply, headers)
        else:
            self._unsent.append((subject, payload, reply, headers))
        return asyncio.sleep(0)

    # what tests do

    def lose(self) -> None:
        self.up = False
        self._listener.connection_lost()

    def come_back(self, settles_after: float = 4.0) -> None:
        self.up, self.settled = True, False
        self._later(settles_after, lambda: setattr(self, "settled", True))
        unsent, self._unsent = self._unsent, []
        for message in unsent:
            self._send(*message)
        self._listener.connection_made()

    def deny(self, subject: str) -> None:
        assert self._denied is not None
        self._denied(PermissionDenied("publish to", subject))

    # the server

    def _later(self, seconds: float, action: Callable[[], object]) -> None:
        asyncio.get_running_loop().call_later(seconds, action)

    def _delay(self) -> float:
        return self.rng.uniform(0, self.travel)

    def _send(self, subject: str, payload: bytes, reply: str, headers: dict[str, str] | None) -> None:
        listening = [worker for worker in self.workers.all if worker.listens and subject in (CALLS, worker.subject)]
        if headers is not None and TRACE_ONLY in headers:
            found = [{"type": "eg", "kind": 0, "sub": subject}] if listening or self._is_plain(subject) else []
            self.to_runtime(reply, orjson.dumps({"events": found}))
            return
        self.published.append((subject, payload))
        if self.rng.random() < self.loss:
            return
        if listening:
            self.rng.choice(listening).post(subject, payload, reply, self._delay())
        elif self._is_plain(subject):
            assert self.plain is not None
            self.plain(reply)
        elif not self.tapped:
            self.to_runtime(reply, b"", _NOBODY)

    def _is_plain(self, subject: str) -> bool:
        return self.plain is not None and subject == CALLS

    def to_runtime(self, subject: str, payload: bytes, headers: dict[str, str] | None = None) -> None:
        """Deliver a message to the runtime, unless it is lost, or the connection is down by then."""

        def deliver() -> None:
            if self.up and self._sink is not None:
                self._sink(Msg(cast(Any, None), subject, "", payload, headers))

        if self.rng.random() >= self.loss:
            self._later(self._delay(), deliver)


class Worker:
    """A worker as its callers see it: it handles calls, accepts those that take long, and answers questions."""

    def __init__(self, network: Network, worker_id: str, takes: Callable[[], float]) -> None:
        self.worker_id = worker_id
        self.subject = f"worker.{worker_id}"
        self.alive = True
        self.listens = True
        """Whether the server has its subscriptions: also for a while after it died."""
        self.frozen = False
        self.busy = False
        self.accepts = True
        self.forgot = float("-inf")
        """The time before which its log may lack calls."""
        self.running: set[str] = set()
        self.handled: Counter[bytes] = Counter()
        """How often it began to handle each call body."""
        self.asked = 0
        self._network = network
        self._takes = takes
        self._finished: dict[str, bytes] = {}
        self._arrived: list[Callable[[], None]] = []
        self._last_arrival = 0.0

    def post(self, subject: str, payload: bytes, reply: str, delay: float) -> None:
        """Deliver a message, in order with all others."""
        work = (lambda: self._call(payload, reply)) if subject == CALLS else (lambda: self._question(payload, reply))
        loop = asyncio.get_running_loop()
        self._last_arrival = max(self._last_arrival, loop.time() + delay)
        loop.call_at(self._last_arrival, self._take, work)

    def _take(self, work: Callable[[], None]) -> None:
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
        self.forgot = asyncio.get_running_loop().time()
        self.running.clear()
        self._finished.clear()

    def _do(self, work: Callable[[], None]) -> None:
        """Do something now, or after the thaw."""
        self._take(work)

    def _call(self, payload: bytes, reply: str) -> None:
        if self.busy:
            self._network.to_runtime(reply, b"", {SERVICE_ERROR_CODE: str(BUSY)})
            return
        self.handled[payload] += 1
        self.running.add(reply)
        loop, takes = asyncio.get_running_loop(), self._takes()
        loop.call_later(takes, self._do, lambda: self._finish(payload, reply))
        if takes > 0.15 and self.accepts:
            loop.call_later(0.15, self._do, lambda: self._accept(reply))

    def _accept(self, reply: str) -> None:
        data = orjson.dumps({"worker": self.worker_id, "calls": [reply]})
        body = envelope.encode(envelope.ACCEPTED, '"id":"accepted","source":"/"', data)
        self._network.to_runtime(f"{reply.rpartition('.')[0]}.accept", body)

    def _finish(self, payload: bytes, reply: str) -> None:
        if reply in self.running:
            self.running.discard(reply)
            self._finished[reply] = payload
            self._network.to_runtime(reply, payload)

    def _question(self, payload: bytes, reply: str) -> None:
        self.asked += 1
        body = envelope.decode(payload)
        assert body is not None
        calls = cast(Any, body.json())["calls"]
        for call in calls:
            if call in self._finished:
                self._network.to_runtime(call, self._finished[call])
        known = {*self.running, *self._finished}
        answer = {
            "worker": self.worker_id,
            "running": [call for call in calls if call in self.running],
            "unknown": [call for call in calls if call not in known],
            "remembers": min(asyncio.get_running_loop().time() - self.forgot, _ALWAYS),
        }
        data = orjson.dumps(answer)
        self._network.to_runtime(reply, envelope.encode(envelope.REPLY, '"id":"fate-r","source":"/"', data))


class Workers:
    """All workers, and the directory of them."""

    def __init__(self, network: Network) -> None:
        self.all: list[Worker] = []
        self.registered: list[str] = []
        """The registry: a worker is in it before it listens."""
        self.listed: list[str] = []
        """The caller's view of the registry, which may lack new workers for a moment."""
        self.suspected: Counter[str] = Counter()
        self.unreachable: NatsrtError | None = None
        """What reading the directory raises; None: it can be read."""
        self.read_takes = 0.01
        """Seconds that reading the directory takes."""
        self._network = network
        self._left_at = float("-inf")
        network.workers = self

    def start(self, takes: Callable[[], float] = lambda: 0.0, *, listed_after: float = 0.0) -> Worker:
        worker = Worker(self._network, f"w{len(self.all)}", takes)
        self.all.append(worker)
        self.registered.append(worker.worker_id)
        if listed_after:
            asyncio.get_running_loop().call_later(listed_after, self._update)
        else:
            self._update()
        return worker

    def _update(self) -> None:
        self.listed = list(self.registered)

    def leave(self, worker: Worker) -> None:
        """Take a worker out of the directory. Harmless when it is not there."""
        if worker.worker_id in self.registered:
            self.registered.remove(worker.worker_id)
            self._update()
            self._left_at = asyncio.get_running_loop().time()

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

    async def verify(self, recipient: AgentId) -> NatsrtError | None:
        await asyncio.sleep(self.read_takes)
        if self.unreachable is not None:
            raise self.unreachable
        self._update()
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
        try:
            yield self
        finally:
            await self.calls.stop()
            await self.inbox.stop()
