"""One supervised connection to NATS.

Rules:

1. Every message is passed to the sink of its subscription synchronously and in wire order. For this, a sink is passed
   to nats-py as a ``future``, whose ``set_result`` nats-py calls in its read loop. With callbacks, the order across
   subscriptions would be lost, because nats-py runs them in one task per subscription. A sink must not block, and may
   raise only `CannotDecode`, for a message that it cannot read; such messages are logged and counted here. Any other
   exception would end nats-py's read loop, so `Ordered` catches and logs it.
2. The connection never gives up. nats-py reconnects automatically, except in three cases: it has closed permanently; if
   its read loop has ended, it stays "connected" and receives nothing; if a server hangs while data is unsent, it does
   not reconnect. In these cases the supervisor connects a new client and repeats every subscription. What is published
   meanwhile is kept and sent in its order, as by a client that reconnects (decision 56).
3. After a stall of the event loop, the client writes nothing before the server has answered, because the server may
   have closed the connection meanwhile. What waits is sent after a reconnect, also by a new client.
4. `barrier` returns only after the server has processed everything that was sent before. nats-py's own ``flush`` does
   not ensure that: it may write its PING ahead of commands that are still queued.
5. The server decides whether an error ends the connection. What it says is kept, and logged once. A subscription that
   it refuses is known as soon as a `barrier` after it returns: see `Interest.check`. The supervisor tries it again.

`natsrt.transport.connector` connects and closes clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Generator
from typing import Protocol, cast

import nats.errors
from nats.js import JetStreamContext

from natsrt.background import end_tasks
from natsrt.errors import CannotDecode, MessageTooLarge, PermissionDenied, ServerUnreachable, SubscriptionRefused
from natsrt.options import Options
from natsrt.transport.client import NatsClient, Ordered, Sink, retrieve
from natsrt.transport.connector import Connector, abandon, close_quietly
from natsrt.transport.headers import MAX_STORED_HEADERS, headers_size
from natsrt.transport.interests import Interest, Interests, Refusal, ServerLog
from natsrt.transport.keeping_client import KeepingClient
from natsrt.transport.refusals import ServerError
from natsrt.transport.round_trip_time import RoundTripTime
from natsrt.transport.stall_watch import StallWatch
from natsrt.transport.tls import TlsFailure

__all__ = ["Connection", "Interest", "Listener", "Refusal"]

logger: logging.Logger = logging.getLogger("natsrt.connection")

_WATCH_INTERVAL = 1.0
"""Seconds between two checks whether the server still answers."""
_ONE_REQUEST = 2.0
"""Timeout of one request to JetStream in seconds. It is short, because a request that arrives while a cluster elects a
leader is never answered."""
_SLICE = 0.5
"""Length of one slice of a wait for the server, in seconds. A wait is divided into slices, so that a time in which the
event loop was blocked counts as one slice only."""
_PATIENCE = 6
"""Number of slices without any data from the server (3 s) after which a client is replaced."""
_STALL = 1.0
"""Seconds for which the event loop must stand still before the connection is in doubt. A server closes a connection
whose client answers no pings after some seconds at the earliest. A doubt costs one round trip."""
_LONG_STALL = 2.0
"""Seconds of a stall from which it is logged as a warning. Handlers must return to the event loop more often."""
_BETWEEN_TRIPS = 0.05
"""Seconds between two attempts of a round trip."""
_SETTLED = 4.0
"""Seconds after a reconnect during which other runtimes may still be reconnecting, those with far links too: connecting
takes two to three round trips."""
_TRACES_SINCE = (2, 11)
"""The first version of nats-server that traces messages."""


class _Queued:
    """The awaitable for a message that is already queued. Awaiting it does not suspend."""

    def __await__(self) -> Generator[None, None, None]:
        return _NO_WAIT


_NO_WAIT = cast(Generator[None, None, None], iter(()))
_QUEUED = _Queued()


class Listener(Protocol):
    """Is notified when the connection is lost or made. Neither method may raise or block."""

    def connection_lost(self) -> None: ...
    def connection_made(self) -> None: ...


class Connection:
    """The connection of one runtime. It is created closed. `open` may be called again after `close`."""

    def __init__(self, options: Options, *, client_name: str) -> None:
        self._options = options
        self._stall_watch = StallWatch(_STALL, self._stalled)
        self._connector = Connector(options, client_name, self._stall_watch)
        self._client: NatsClient | None = None
        self._outgoing: NatsClient | None = None
        """Takes what is published: the client or, while it is replaced, one that keeps it; None while closed."""
        self._jetstream: tuple[NatsClient, JetStreamContext] | None = None
        """The client and its JetStream context, which is made once per client."""
        self._interests = Interests()
        self._listeners: list[Listener] = []
        self._denied: list[Callable[[Refusal], bool | None]] = []
        self._server_log = ServerLog()
        self._up = asyncio.Event()
        self._waiting: set[asyncio.Future[None]] = set()
        self._closing = True
        self._supervisor: asyncio.Task[None] | None = None
        self._replace = asyncio.Event()
        self.reconnects: int = 0
        self.rtt: RoundTripTime = RoundTripTime()
        """The measured round trip time to the server. Every wait for an answer follows it."""
        self._reconnected_at = -math.inf
        self.max_payload: int = 0
        """Maximum size of a message in bytes, including headers, of the current or last server; 0 before the first."""
        self._payload_limit: int | None = None
        """Messages may be smaller than this many bytes. The server does not announce the limit of an account; None as
        long as no message exceeded it."""
        self.server_error: str | None = None
        """The last error that the server sent, as its text; None if there was none since it was last connected."""
        self.undecodable: int = 0
        """Number of messages that could not be read and were not for a handler, or for which none could be found."""

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """True if the client's state is "connected". Only a round trip proves that it is connected: see `barrier`."""
        client = self._client
        return client is not None and client.is_connected and self._up.is_set()

    @property
    def settled(self) -> bool:
        """True if enough time has passed since the last reconnect for all other runtimes to have reconnected too.

        A worker without a subscription is then gone, and not just reconnecting.
        """
        return asyncio.get_running_loop().time() - self._reconnected_at > _SETTLED + self.rtt.allowance

    @property
    def traces(self) -> bool:
        """True if the connected server can report to whom it delivers a message (message tracing)."""
        if self._client is None:
            return False
        version = self._client.connected_server_version
        return (version.major, version.minor) >= _TRACES_SINCE

    @property
    def client(self) -> NatsClient:
        """The current client. Do not keep it, because it may be replaced. Raises `ServerUnreachable` if not open."""
        if self._client is None:
            raise self.unreachable(0.0, "the connection is not open")
        return self._client

    @property
    def jetstream(self) -> JetStreamContext:
        """A JetStream context with a short timeout, for requests that are repeated if they are not answered."""
        client = self.client
        if self._jetstream is None or self._jetstream[0] is not client:
            domain = self._options.jetstream_domain
            self._jetstream = client, client.jetstream(**({"domain": domain} if domain else {}))
        context = self._jetstream[1]
        context._timeout = min(_ONE_REQUEST, self._options.connect_timeout) + self.rtt.allowance
        return context

    @property
    def server(self) -> str:
        """Host and port of the connected server, for log messages; while disconnected, the configured servers."""
        url = self._client.connected_url if self._client is not None else None
        return f"{url.hostname}:{url.port}" if url is not None else ", ".join(self._options.safe_servers)

    def add_listener(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def remove_listener(self, listener: Listener) -> None:
        """Undo `add_listener`."""
        self._listeners.remove(listener)

    @property
    def refusals(self) -> list[Refusal]:
        """The errors of the subscriptions that the server refuses now, except optional ones."""
        return self._interests.refusals

    @property
    def ended_subscriptions(self) -> int:
        """Number of subscriptions that were ended, so that the server has room for others."""
        return self._interests.ended

    @property
    def refused(self) -> bool:
        """True if the server was reached, and does not accept the connection, or TLS fails."""
        return not self.connected and self._connector.refusal is not None

    @property
    def why_refused(self) -> str:
        """Why the server does not accept the connection, as a sentence; empty unless `refused`."""
        refusal = self._connector.refusal
        if self.connected or refusal is None:
            return ""
        return (
            f"TLS fails: {refusal.text}." if isinstance(refusal, TlsFailure) else f"The server says {refusal.text!r}."
        )

    def check(self) -> None:
        """Raise the error of a subscription that the server refuses, if there is one that is not optional."""
        for refusal in self.refusals:
            raise refusal

    def unreachable(self, seconds: float, reason: str | None = None) -> ServerUnreachable | PermissionDenied:
        """The error for an operation that had no connection for ``seconds`` seconds.

        ``reason`` is for a server that cannot be reached; None for the last error. If a server answers and refuses the
        connection, the error says what the server says.
        """
        return self._connector.unreachable(seconds, reason)

    def on_denied(self, callback: Callable[[Refusal], bool | None]) -> None:
        """Call ``callback`` for every publish or subscribe that the server refuses.

        It returns True if it has the error raised. Then the error is not logged too.

        `publish` and `subscribe` cannot raise this error, because it arrives later and contains only the subject.
        """
        self._denied.append(callback)

    def off_denied(self, callback: Callable[[Refusal], bool | None]) -> None:
        """Undo `on_denied`."""
        self._denied.remove(callback)

    # -- opening and closing -------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect.

        Raises `ServerUnreachable` after ``connect_timeout`` seconds. Raises `PermissionDenied` at once if the server
        refuses the credentials, and `TlsFailed` if TLS fails.
        """
        self._closing = False
        self._connector.reset()
        self.server_error = None
        self._payload_limit = None
        try:
            self._client = await self._connector.connect(self, self._options.connect_timeout)
        except BaseException:
            self._closing = True
            raise
        self._outgoing = self._client
        self._made()
        self._stall_watch.start()
        self._supervisor = asyncio.create_task(self._supervise(), name="natsrt connection supervisor")

    async def close(self) -> None:
        """Send the queued data, then close. One line says how many messages could not be sent. Has no effect if closed.

        Data that was kept back after a stall of the event loop is waited for, for ``connect_timeout`` seconds.
        """
        if self._client is not None and self._client.keeps_back:
            await self._send_rest()
        self._closing = True
        self._stall_watch.stop()
        self._up.clear()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(self._closed_error())
        if self._supervisor is not None:
            await end_tasks(self._supervisor)
            self._supervisor = None
        client, self._client = self._client, None
        outgoing, self._outgoing = self._outgoing, None
        if client is not None:
            await close_quietly(client)
        if lost := sum(len(one.take_unsent()) for one in (client, outgoing) if one is not None):
            messages = "a message that was" if lost == 1 else f"{lost} messages that were"
            logger.warning("the server does not answer: %s sent last will not arrive", messages)
        self._interests.clear()

    async def wait_connected(self, timeout: float | None, begun: float | None = None) -> None:
        """Wait until connected.

        Raises `ServerUnreachable` after ``timeout`` seconds, counted from ``begun``, and if the connection is closed.
        If ``timeout`` is None, there is no limit. ``begun`` is a time of the event loop's clock; None means now.
        """
        if self.connected:
            return
        if self._closing:
            raise self._closed_error()
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiting.add(waiter)
        begun = loop.time() if begun is None else begun
        try:
            async with asyncio.timeout_at(None if timeout is None else begun + timeout):
                await waiter
        except TimeoutError:
            raise self.unreachable(timeout or 0.0) from None
        finally:
            self._waiting.discard(waiter)

    async def _send_rest(self) -> None:
        """Wait until the data that was kept back is sent, also if this needs a new connection."""
        with contextlib.suppress(ServerUnreachable, TimeoutError):
            async with asyncio.timeout(self._options.connect_timeout):
                await self.round_trip(None)

    def _closed_error(self) -> ServerUnreachable:
        return ServerUnreachable(self._options.safe_servers, 0.0, "the connection is closed")

    # -- what the client reports ---------------------------------------------------------------------------------

    async def client_error(self, error: Exception) -> None:
        """Log an error of a client, and report what the server refused. Part of `ClientOwner`."""
        error = self._connector.note_error(error)
        if isinstance(error, ServerError):
            self._server_said(error)
        elif isinstance(error, TlsFailure):
            if self._supervisor is not None:  # before that, `open` raises it
                self._server_log.log(error, f"no TLS connection to {self.server}: {error.text}")
        elif self._up.is_set():
            logger.warning("connection to %s: %s", self.server, self._connector.last_error)
        else:
            logger.debug("connecting to %s: %s", ", ".join(self._options.safe_servers), self._connector.last_error)

    def _server_said(self, error: ServerError) -> None:
        self.server_error = error.text
        if error.too_large and self._client is not None:
            self._payload_limit = min(self._payload_limit or self._client.largest, self._client.largest)
        if (violation := error.violation) is not None:
            denied = PermissionDenied(violation.operation, violation.subject)
            if denied.operation == "subscribe to":
                place = violation.subject, violation.queue
                refused = [interest for interest in self._interests if (interest.subject, interest.queue) == place]
                self._interests.refuse(refused, lambda _: denied)
            if not self._tell_denied(denied):
                self._server_log.log(error, str(denied))
        else:
            self._server_log.log(error, f"the server {self.server} says: {error.text}")

    def subscriptions_refused(self, client: NatsClient, subjects: dict[int, str]) -> None:
        """Part of `ClientOwner`."""
        if self._client is client:
            reason = self.server_error or "maximum subscriptions exceeded"
            refused = [i for i in self._interests if i.current is not None and i.current._id in subjects]
            self._interests.refuse(refused, lambda interest: SubscriptionRefused(interest.subject, reason))
            for subject in subjects.values():
                self._tell_denied(SubscriptionRefused(subject, reason))

    def answered(self, seconds: float, *, first: bool) -> None:
        """Part of `ClientOwner`."""
        if first:
            self.rtt.begin(seconds)
        else:
            self.rtt.measured(seconds)

    def _tell_denied(self, denied: Refusal) -> bool:
        """Returns True if somebody raises the error."""
        raised = False
        for callback in list(self._denied):
            raised |= callback(denied) is True
        return raised

    def unreadable(self, error: CannotDecode) -> None:
        """Count and log a message that could not be read. Part of `ClientOwner`."""
        self.undecodable += 1
        logger.warning("%s", error)

    def client_disconnected(self, client: NatsClient) -> None:
        """Part of `ClientOwner`."""
        if self._is_present(client):
            self._lost()

    def client_reconnected(self, client: NatsClient) -> None:
        """Part of `ClientOwner`."""
        if self._is_present(client):
            self._made_again()

    def client_closed(self, client: NatsClient) -> None:
        """Have a client replaced that has closed permanently. Part of `ClientOwner`."""
        if self._is_present(client):
            self._lost()
            self._replace.set()

    def _is_present(self, client: NatsClient) -> bool:
        """False for a client that was replaced. Its reports are ignored."""
        return self._client is client and not self._closing

    def _lost(self) -> None:
        if self._up.is_set():
            logger.warning("lost the connection to %s", self.server)
            self._up.clear()
            self._interests.accept_all()  # they are all sent again on the next connection
            for listener in list(self._listeners):
                listener.connection_lost()

    def _made_again(self) -> None:
        self.reconnects += 1
        self._reconnected_at = asyncio.get_running_loop().time()
        self._made()

    def _made(self) -> None:
        self.max_payload = self.client.limit_payload(self._payload_limit)
        self._connector.refusal = None
        if not self._interests.refused:
            self.server_error = None
        self._up.set()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        logger.info("connected to %s", self.server)
        for listener in list(self._listeners):
            listener.connection_made()

    def _stalled(self) -> None:
        """The event loop did not run for some time."""
        if self._client is not None:
            self._client.doubt()
        seconds = self._stall_watch.seconds
        logger.log(
            logging.WARNING if seconds > _LONG_STALL else logging.DEBUG,
            "the event loop did not run for %.1f s: something blocked it, as input() and time.sleep() do, or the "
            "process was suspended; what is sent now waits until the server has answered. Run blocking code with "
            "asyncio.to_thread",
            seconds,
        )

    # -- supervision ---------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Replace a client that has closed, receives nothing any more, or hangs."""
        while True:
            try:
                async with asyncio.timeout(_WATCH_INTERVAL):
                    await self._replace.wait()
            except TimeoutError:
                if await self._answers():
                    await self._try_refused()
                    continue
            self._replace.clear()
            self._lost()
            await self._renew()

    async def _answers(self) -> bool:
        """True if the server answers the client, or if the client is reconnecting."""
        client = self._client
        if client is None or client.is_closed:
            return False
        reconnects = self.reconnects
        if not client.is_connected:
            return await self._begins_to_reconnect(client)
        ping = client.ping()
        # Any message that arrives shows that the connection works. The PONG may be behind many of them.
        silent, heard = 0, client.stats["in_msgs"]
        while silent < _PATIENCE + self.rtt.allowance / _SLICE:
            await asyncio.wait({ping}, timeout=_SLICE)
            if ping.done():
                return ping.cancelled() or ping.exception() is None or not client.is_connected
            if reconnects != self.reconnects:
                return True  # the ping was sent on a connection that is gone; the next check decides
            silent = silent + 1 if client.stats["in_msgs"] == heard else 0
            heard = client.stats["in_msgs"]
        return False

    async def _try_refused(self) -> None:
        """Try the subscriptions again that the server has refused, once in some seconds."""
        client = self._client
        if client is None or not self.connected or not (tried := self._interests.take_due()):
            return
        try:
            for interest in tried:
                if interest.current is not None:
                    client._remove_sub(interest.current._id)
                interest.current = await client.listen(interest.subject, interest.queue, interest.future)
            await client.flush(_ONE_REQUEST + self.rtt.allowance)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            logger.debug("trying refused subscriptions again: %s", error)
        accepted = sum(interest.refusal is None for interest in tried)
        if accepted:
            logger.info("the server %s accepts %d subscriptions that it had refused", self.server, accepted)

    async def _begins_to_reconnect(self, client: NatsClient) -> bool:
        """True if a disconnected client reports its disconnection in time.

        nats-py never does so if a server hangs while data for it is unsent.
        """
        for _ in range(_PATIENCE):
            if not self._up.is_set() or client.is_connected:
                return True
            await asyncio.sleep(_SLICE)
        return False

    async def _renew(self) -> None:
        """Connect new clients until one succeeds, and repeat every subscription on it."""
        old, self._client = self._client, None
        kept = self._keep()
        if old is not None:
            self._connector.discover(old)
            kept.keep(old.take_unsent())
            abandon(old)
        while True:
            try:
                client = self._client = await self._connector.connect(self, self._options.connect_timeout)
                for interest in self._interests:
                    if interest in self._interests:
                        interest.current = await client.listen(interest.subject, interest.queue, interest.future)
                await client.send_again(kept.take_unsent())
                await client.flush()
                self._outgoing = client
                await client.send_again(kept.take_unsent())
            except Exception as error:  # the connection must be restored, whatever the error
                self._connector.last_error = str(error) or type(error).__name__
                logger.debug("a new client could not connect: %s", self._connector.last_error)
                kept = self._keep()
                if self._client is not None:
                    kept.keep(self._client.take_unsent())
                    abandon(self._client)
                self._client = None
                await asyncio.sleep(self._options.reconnect_wait)
                continue
            self._made_again()
            return

    def _keep(self) -> KeepingClient:
        """From now on, keep what is published until a new client is connected."""
        if not isinstance(self._outgoing, KeepingClient):
            self._outgoing = KeepingClient(self, self._stall_watch, self.max_payload)
        return self._outgoing

    # -- sending and subscribing ---------------------------------------------------------------------------------

    @property
    def limit_is_guessed(self) -> bool:
        """True if a smaller limit than `max_payload` may be in force: a message was refused that the server announced
        to accept. It is the limit of the account.
        """
        return self._payload_limit is not None

    def check_size(self, payload: bytes, headers: dict[str, str] | None = None) -> int:
        """Return the size of a message in bytes, with its headers.

        Raises `MessageTooLarge` if the server would close the connection for that size.
        """
        size = len(payload)
        if headers:
            size += headers_size(headers)
        self.check_length(size)
        return size

    def check_length(self, size: int) -> None:
        """Raise `MessageTooLarge` if the server would close the connection for a message of ``size`` bytes."""
        if size > self.max_payload:
            raise MessageTooLarge(size, self.max_payload)

    def check_stored(self, body: int, headers: int) -> None:
        """Raise `MessageTooLarge` if no stream would store a message of so many bytes, with a header block of so many.

        Everything that goes to a stream is checked by this before it is sent.
        """
        self.check_length(body + headers)
        if headers > MAX_STORED_HEADERS:
            raise MessageTooLarge(
                headers,
                MAX_STORED_HEADERS,
                f"without its body, but a stream accepts at most {MAX_STORED_HEADERS:,} bytes of headers: choose a "
                "shorter message id, key or topic",
            )

    def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> Awaitable[None]:
        """Queue a message for the server. Await the result at once, because the client's buffer may be full.

        ``subject`` and ``reply`` must be valid subjects. They are not checked, because they are encoded names or came
        from the server. Raises `MessageTooLarge`, and `ServerUnreachable` if the client's buffer is full while it
        reconnects or is replaced, and if the connection is closed.
        """
        client = self._outgoing
        if client is not None and headers is None and client.post(subject, payload, reply):
            return _QUEUED
        return self._publish_with_care(subject, payload, reply, headers)

    async def _publish_with_care(
        self, subject: str, payload: bytes, reply: str, headers: dict[str, str] | None
    ) -> None:
        if (client := self._outgoing) is None:
            raise self._closed_error()
        if client.is_closed:  # for good: the supervisor is about to replace it
            client = self._keep()
        client.largest = max(client.largest, self.check_size(payload, headers))
        try:
            await client.publish(subject, payload, reply, headers)
        except nats.errors.MaxPayloadError:
            raise MessageTooLarge(len(payload), self.max_payload) from None
        except (nats.errors.OutboundBufferLimitError, nats.errors.ConnectionClosedError) as error:
            raise self.unreachable(0.0, str(error)) from error

    async def subscribe(self, subject: str, sink: Sink, *, queue: str = "", optional: bool = False) -> Interest:
        """Pass every message on ``subject`` to ``sink``, also after reconnects.

        ``queue`` is the queue group; empty for none. ``optional``: the runtime works without it, so it is ready even if
        the server refuses it. After a `barrier` the subscription is in effect, unless `Interest.check` raises.
        """
        interest = Interest(subject, queue, Ordered(sink, self.unreadable), optional)
        self._interests.add(interest)
        if self._client is not None and not self._client.is_closed:
            interest.current = await self._client.listen(subject, queue, interest.future)
        return interest

    async def unsubscribe(self, interest: Interest) -> None:
        """End ``interest`` after every message that the server sent for it has been passed to its sink.

        Has no effect if it has ended.
        """
        if not self._interests.remove(interest):
            return
        current, interest.current = interest.current, None
        if current is None or self._client is None:
            return
        try:
            if self._client.is_connected:
                await current.drain()  # type: ignore[no-untyped-call]
            else:
                await current.unsubscribe()
        except (nats.errors.Error, OSError, TimeoutError) as error:
            logger.debug("unsubscribing %s: %s", interest.subject, error)

    def holds(self, interest: Interest) -> bool:
        """True if ``interest`` has not been ended by `unsubscribe` or `close`."""
        return interest in self._interests

    async def barrier(self, timeout: float = 10.0) -> None:
        """Wait until the server has processed everything that was sent before.

        Raises `ServerUnreachable` after ``timeout`` seconds, or if the connection is lost.
        """
        reconnects = self.reconnects
        flushing = asyncio.ensure_future(self.client.flush(cast(int, timeout)))
        flushing.add_done_callback(retrieve)
        try:
            while not flushing.done() and self.connected and reconnects == self.reconnects:
                await asyncio.wait({flushing}, timeout=_SLICE)
        finally:
            flushing.cancel()
        if not self.connected or reconnects != self.reconnects:
            raise self.unreachable(0.0, "the connection was lost while waiting")
        try:
            flushing.result()
        except (nats.errors.Error, OSError, TimeoutError) as error:
            self._replace.set()
            raise ServerUnreachable(self._options.safe_servers, timeout, str(error) or "no answer") from error

    async def round_trip(self, timeout: float | None) -> None:
        """Wait for a `barrier`, however often the connection is lost meanwhile.

        Raises `ServerUnreachable` if there is no connection for ``timeout`` seconds, and if the connection is closed.
        If ``timeout`` is None, there is no limit.
        """
        while True:
            await self.wait_connected(timeout)
            try:
                return await self.barrier()
            except ServerUnreachable:
                await asyncio.sleep(_BETWEEN_TRIPS)
