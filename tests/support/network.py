"""A NATS server without sockets, and the connections of runtimes to it, in virtual time.

`Server` gives each message to the subscriptions on its subject: to one member of each queue group, and to all others.
It says "no responders", and reports to whom it would deliver a message (message tracing). `Link` is used in place of a
`Connection`. What is sent arrives in order, after some time, or is lost with the connection. A link can stall: what is
sent then waits, and may arrive after the runtime has connected again and has sent it once more.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import nats.errors
import orjson
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from natsrt.errors import CannotDecode, PermissionDenied, ServerUnreachable
from natsrt.transport.client import Ordered, Sink
from natsrt.transport.headers import header_block
from natsrt.transport.interests import Interest
from natsrt.transport.probe import TRACE_ONLY
from natsrt.transport.round_trip_time import RoundTripTime

T = TypeVar("T")

NOBODY = {"Status": "503"}
REPLACED_AFTER = 4.0
"""Seconds after which a runtime replaces a connection that stalls."""
_SETTLED = 4.0
"""Seconds after a reconnect in which other runtimes may still reconnect."""


class Message(NamedTuple):
    subject: str
    payload: bytes
    reply: str = ""
    headers: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Subscription:
    """A subscription of a client, as the server has it. ``deliver`` lets a message go to the client."""

    subject: str
    queue: str
    deliver: Callable[[Message], None]


class Client(Protocol):
    """A client of a server."""

    def matching(self, subject: str) -> Iterable[Subscription]:
        """The subscriptions to a subject that the server has of this client."""


class Service(Protocol):
    """A part of a server that takes messages itself, as JetStream does."""

    def takes_subject(self, subject: str) -> bool:
        """Whether messages on this subject are for this part."""

    def take(self, message: Message) -> None:
        """Take in a message."""


class Server:
    """A server, and all that is connected to it. Times are in seconds."""

    def __init__(self, rng: random.Random, *, tapped: bool = False) -> None:
        self.rng = rng
        self.tapped = tapped
        """Whether a subscription to everything hides "no responders"."""
        self.loss = 0.0
        """The part of all messages that is lost."""
        self.travel = 0.002
        """How long a message takes at most."""
        self.spared: tuple[str, ...] = ()
        """The starts of the subjects whose messages are never lost."""
        self.clients: list[Client] = []
        self.services: list[Service] = []

    def delay(self) -> float:
        return self.rng.uniform(0, self.travel)

    def take(self, message: Message, *, answers: bool = True) -> None:
        """Pass a message on. ``answers``: whether the server's own answers reach the sender. They do not over a former
        connection."""
        for service in self.services:
            if service.takes_subject(message.subject):
                service.take(message)
                return
        found = [one for client in self.clients for one in client.matching(message.subject)]
        if message.headers is not None and TRACE_ONLY in message.headers:
            if answers:
                reports = [{"type": "eg", "kind": 0, "sub": one.subject, "queue": one.queue} for one in found]
                self.take(Message(message.reply, orjson.dumps({"events": reports})))
            return
        if self.rng.random() < self.loss and not message.subject.startswith(self.spared):
            return
        groups: dict[str, list[Subscription]] = {}
        for one in found:
            if one.queue:
                groups.setdefault(one.queue, []).append(one)
            else:
                one.deliver(message)
        for members in groups.values():
            self.rng.choice(members).deliver(message)
        if not found and message.reply and not self.tapped and answers:
            self.take(Message(message.reply, b"", "", NOBODY))


class Link:
    """The connection of one runtime to a server, as the parts of the runtime use it. See `Connection`."""

    def __init__(self, server: Server, name: str = "", *, up: bool = True) -> None:
        self.loop = asyncio.get_running_loop()
        self.network = server
        self.up = up
        self.cut = False
        """Whether nothing passes any more, because the process is dead."""
        self.published: list[tuple[str, bytes]] = []
        """The subjects and bodies of everything that arrived at the server, questions to the server left out."""
        self.rtt = RoundTripTime()
        self.traces = True
        self.reconnects = 0
        self.max_payload = 8 * 1024 * 1024
        self.refused = False
        self.why_refused = ""
        self.refusals: list[PermissionDenied] = []
        self.server_error = None
        self.server = "virtual:4222"
        self.undecodable = 0
        self.ended_subscriptions = 0
        self.client = _Client(self, name)
        self.jetstream = JetStreamContext(cast(Any, self.client), timeout=2.0)
        self._settled_at = 0.0
        self._listeners: list[Any] = []
        self._denied: list[Callable[[PermissionDenied], object]] = []
        self._interests: dict[Interest, None] = {}
        self._subscribed: dict[Interest, Subscription] = {}
        """The subscriptions that the server has."""
        self._closed = False
        self._generation = 0
        self._arriving: deque[Callable[[], None]] = deque()
        self._last_arrival = 0.0
        self._held: int | None = None
        """How many arrivals a stall holds back; None while there is none."""
        self._unsent: list[Message] = []
        self._stalled: list[Callable[[bool], None]] | None = None
        """What waits on the way to the server; None while it arrives."""
        self._changed = asyncio.Event()
        server.clients.append(self)

    # -- what the parts of the runtime use -----------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self.up

    @property
    def settled(self) -> bool:
        return self.loop.time() >= self._settled_at

    def add_listener(self, listener: Any) -> None:
        self._listeners.append(listener)

    def on_denied(self, callback: Callable[[PermissionDenied], object]) -> None:
        self._denied.append(callback)

    def off_denied(self, callback: Callable[[PermissionDenied], object]) -> None:
        self._denied.remove(callback)

    def unreachable(self, seconds: float, reason: str | None = None) -> ServerUnreachable:
        return ServerUnreachable(["nats://virtual"], seconds, reason)

    def unreadable(self, error: CannotDecode) -> None:
        self.undecodable += 1

    def check(self) -> None:
        pass

    def check_size(self, payload: bytes, headers: dict[str, str] | None = None) -> int:
        return len(payload)

    def check_length(self, size: int) -> None:
        pass

    def check_stored(self, body: int, headers: int) -> None:
        pass

    async def open(self) -> None:
        self._come_up()

    async def close(self) -> None:
        self._closed = True
        self._go_down()
        self._interests.clear()

    async def wait_connected(self, timeout: float | None, begun: float | None = None) -> None:
        begun = self.loop.time() if begun is None else begun
        try:
            async with asyncio.timeout_at(None if timeout is None else begun + timeout):
                while not self.up:
                    if self._closed:
                        raise self.unreachable(0.0, "the connection is closed")
                    await self._changed.wait()
        except TimeoutError:
            raise self.unreachable(timeout or 0.0) from None

    async def subscribe(self, subject: str, sink: Sink, *, queue: str = "", optional: bool = False) -> Interest:
        interest = Interest(subject, queue, Ordered(sink, self.unreadable), optional)
        self._interests[interest] = None
        if self.up:
            self._transmit(lambda present: self._subscribe(interest) if present else None)
        return interest

    async def unsubscribe(self, interest: Interest) -> None:
        """End an interest, after all that the server sent for it has arrived."""
        if interest in self._interests:
            try:
                if self.up:
                    await self.ask(lambda: self._subscribed.pop(interest, None))
            except ServerUnreachable:
                pass
            finally:
                self._interests.pop(interest, None)
                self.ended_subscriptions += 1

    def holds(self, interest: Interest) -> bool:
        return interest in self._interests

    def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> Awaitable[None]:
        self.send(Message(subject, payload, reply, dict(headers) if headers else None))
        return asyncio.sleep(0)

    async def barrier(self, timeout: float = 10.0) -> None:
        await self.ask(lambda: None, timeout)

    async def round_trip(self, timeout: float | None) -> None:
        while True:
            await self.wait_connected(timeout)
            try:
                return await self.barrier()
            except ServerUnreachable:
                await asyncio.sleep(0.05)

    async def ask(self, question: Callable[[], T], timeout: float = 10.0) -> T:
        """What ``question`` returns at the server, once all that was sent before is there. Raises as `barrier`."""
        if not self.up:
            raise self.unreachable(0.0)
        answer: asyncio.Future[T] = self.loop.create_future()

        def arrive(present: bool) -> None:
            found = question()
            if present:
                self.hand_over(lambda: None if answer.done() else answer.set_result(found))

        generation = self._generation
        self._transmit(arrive)
        until = self.loop.time() + timeout
        while not answer.done() and self.up and generation == self._generation and self.loop.time() < until:
            await asyncio.wait({answer}, timeout=min(0.5, until - self.loop.time()))
        if answer.done():
            return answer.result()
        if self.up and generation == self._generation:
            self.replace()
        raise self.unreachable(timeout)

    # -- what tests do -------------------------------------------------------------------------------------------

    def lose(self) -> None:
        self._subscribed.clear()
        self._in_process(self._lose)

    def _lose(self) -> None:
        if self.up:
            self._go_down()
            for listener in self._listeners:
                listener.connection_lost()

    def come_back(self, settles_after: float = _SETTLED) -> None:
        self._in_process(lambda: self._come_back(settles_after))

    def _come_back(self, settles_after: float) -> None:
        if self.cut or self._closed or self.up:
            return
        self._settled_at = self.loop.time() + settles_after
        self.reconnects += 1
        self._come_up()

    def stall(self, *, arrivals: bool = False) -> Callable[[], None]:
        """Let nothing that is sent from now on arrive, until the connection is replaced. Returns a function that lets
        it arrive after all. ``arrivals``: nothing arrives from the server either."""
        stalled = self._stalled = self._stalled or []
        if arrivals and self._held is None:
            self._held = 0
        generation = self._generation
        self.loop.call_at(self.loop.time() + REPLACED_AFTER, self._replace_stalled, generation)

        def thaw() -> None:
            present = self._stalled is stalled
            if present:
                self._stalled = None
                self._release()
            for arrive in stalled:
                arrive(present)
            stalled.clear()

        return thaw

    def replace(self) -> None:
        """Have another connection, as the runtime has when the present one stalls."""
        self._in_process(self._replace)

    def _replace(self) -> None:
        if self.up:
            self._lose()
            self._come_back(_SETTLED)

    def _in_process(self, work: Callable[[], None]) -> None:
        """Do something in the process of the runtime, after its thaw if it is frozen."""
        if asyncio.get_running_loop() is self.loop:
            work()
        else:
            self.loop.call_at(self.loop.time(), work)

    def kill(self) -> None:
        """Let nothing pass any more in either direction. The server keeps the subscriptions until it `forget`\\ s."""
        self.cut, self.up = True, False
        self._generation += 1
        self._arriving.clear()
        self._unsent.clear()

    def forget(self) -> None:
        """Let the server notice that the connection has ended."""
        self._subscribed.clear()

    def deny(self, subject: str) -> None:
        for callback in self._denied:
            callback(PermissionDenied("publish to", subject))

    # -- sending -------------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Send a message, or keep it until there is a connection."""
        if self.up:
            self._transmit(lambda present: self._pass_on(message, present))
        elif not self.cut:
            self._unsent.append(message)

    def _transmit(self, arrive: Callable[[bool], None]) -> None:
        """Let something arrive at the server. ``arrive`` gets False if that is over a former connection."""
        if self.cut:
            return
        if self._stalled is not None:
            self._stalled.append(arrive)
        else:
            arrive(True)

    def _pass_on(self, message: Message, present: bool) -> None:
        if message.headers is None or TRACE_ONLY not in message.headers:
            self.published.append((message.subject, message.payload))
        self.network.take(message, answers=present)

    def _replace_stalled(self, generation: int) -> None:
        if self._stalled is not None and self._generation == generation:
            self.replace()

    def _go_down(self) -> None:
        self.up = False
        self._generation += 1
        self._stalled = self._held = None
        self._arriving.clear()
        self._subscribed.clear()
        self._change()

    def _come_up(self) -> None:
        self.up = True
        for interest in self._interests:
            self._subscribe(interest)
        unsent, self._unsent = self._unsent, []
        for message in unsent:
            self.send(message)
        self._change()
        for listener in self._listeners:
            listener.connection_made()

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # -- receiving -----------------------------------------------------------------------------------------------

    def matching(self, subject: str) -> Iterable[Subscription]:
        return [one for one in self._subscribed.values() if matches(one.subject, subject)]

    def _subscribe(self, interest: Interest) -> None:
        def deliver(message: Message) -> None:
            def arrive() -> None:
                if interest in self._interests:
                    subject, payload, reply, headers = message
                    copied = dict(headers) if headers else None
                    interest.future.set_result(Msg(cast(Any, None), subject, reply, payload, copied))

            self.hand_over(arrive)

        self._subscribed[interest] = Subscription(interest.subject, interest.queue, deliver)

    def hand_over(self, arrive: Callable[[], None]) -> None:
        """Let something arrive from the server, after all that the server sent before, unless the connection is lost by
        then."""
        if self.up:
            self._arriving.append(arrive)
            self._last_arrival = max(self._last_arrival, self.loop.time() + self.network.delay())
            self.loop.call_at(self._last_arrival, self._arrive, self._generation)

    def _arrive(self, generation: int) -> None:
        if generation != self._generation:
            return
        if self._held is not None:
            self._held += 1
        else:
            self._arriving.popleft()()

    def _release(self) -> None:
        held, self._held = self._held or 0, None
        for _ in range(held):
            self.loop.call_at(self.loop.time(), self._arrive, self._generation)


class _Client:
    """The client of a `Link`, as far as it is used for JetStream."""

    has_jetstream = True
    jetstream_domain = ""

    def __init__(self, link: Link, name: str) -> None:
        self._link = link
        self._inbox = f"_REQUESTS.{name or 'runtime'}"
        self._answers: dict[str, asyncio.Future[Msg]] = {}
        self._number = 0
        self._interest: Interest | None = None

    def post(self, subject: str, payload: bytes, reply: str, head: bytes = b"") -> bool:
        lines = (line.partition(": ") for line in head.decode().split("\r\n")[1:] if line)
        self._link.send(Message(subject, payload, reply, {name: value for name, _, value in lines} or None))
        return True

    async def publish(
        self, subject: str, payload: bytes, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        self.post(subject, payload, reply, header_block(headers) if headers else b"")

    async def request(self, subject: str, payload: bytes, timeout: float) -> Msg:
        if self._interest is None or not self._link.holds(self._interest):
            self._interest = await self._link.subscribe(f"{self._inbox}.*", self._on_answer)
        self._number += 1
        reply = f"{self._inbox}.{self._number}"
        answer = self._answers[reply] = self._link.loop.create_future()
        self.post(subject, payload, reply)
        try:
            message = await asyncio.wait_for(answer, timeout)
        except TimeoutError:
            raise nats.errors.TimeoutError from None
        finally:
            del self._answers[reply]
        if message.headers is not None and message.headers.get("Status") == NOBODY["Status"]:
            raise nats.errors.NoRespondersError
        return message

    def _on_answer(self, message: Msg) -> None:
        answer = self._answers.get(message.subject)
        if answer is not None and not answer.done():
            answer.set_result(message)


def matches(pattern: str, subject: str) -> bool:
    """Whether a subscription's subject, which may have wildcards, includes a subject."""
    if "*" not in pattern and ">" not in pattern:
        return pattern == subject
    wanted: Sequence[str] = pattern.split(".")
    tokens = subject.split(".")
    if wanted[-1] == ">":
        wanted = wanted[:-1]
        if len(tokens) <= len(wanted):
            return False
    elif len(wanted) != len(tokens):
        return False
    return all(want in ("*", token) for want, token in zip(wanted, tokens, strict=False))
