"""Events on durable topics: published to a stream, and confirmed by it.

Rules:

1. Events are sent in the order in which they were published, and at most `WINDOW` of them are under way. A publisher
   that finds no room waits, with the turn of the send queue, so that later messages wait behind it.
2. An event is sent again, with the same id, when the connection was lost or the stream has been silent. Only the stream
   itself, or the end of ``publish_timeout``, decides how a publish ends.
3. After a reconnect, all events that are not confirmed are sent again in their order, before later ones. What the
   client had not written by then is withdrawn from its buffer, where it would overtake them.

An acknowledgement counts only if it names the stream: any subscriber of the topic can answer the message. A
``duplicate`` is a success: an earlier attempt was stored.

An event that is to be published later is stored as a schedule, from which the server publishes it on its topic. The
server forgets its id then, so two things make events with the same id one event: the id of the schedule, for as long as
the id of any event; and that a schedule is stored only where there is none, for as long as it waits.

The order in the stream can differ from that of publishing where a stream has no leader for a moment, since it then
stores none of the events under way, and perhaps later ones. Whoever needs the order even then awaits each publish.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial

import nats.errors
import nats.js.errors
from autogen_core import TopicId
from nats.aio.msg import Msg
from nats.js import api

from natsrt.background import BackgroundTasks
from natsrt.errors import CannotDecode, CannotSchedule, EventNotStored, JetStreamFull, NatsrtError
from natsrt.jetstream.acks import Acks, WrongRevision, read_ack
from natsrt.jetstream.durable import DurableStreams
from natsrt.jetstream.limits import explained, limit_reached
from natsrt.options import Options
from natsrt.sending.patience import Patience
from natsrt.sending.send_queue import SendQueue
from natsrt.task_types import is_task
from natsrt.transport.connection import Connection, Refusal
from natsrt.transport.headers import header_block
from natsrt.wire.schedules import is_due, once
from natsrt.wire.subjects import Subjects, encode_text

logger: logging.Logger = logging.getLogger("natsrt.sending")

WINDOW = 1024
"""Events that are under way at most."""
_WINDOW_BYTES = 16 * 1024 * 1024
"""Bytes of the events that are under way, at most, if they are several. They are kept to be sent again."""
_SILENT = 2.0
"""Seconds, beside the round trip, after which an event that was not confirmed is sent again. A message that arrives
while a cluster elects a leader is never answered."""
_AGAIN = 0.25
"""Seconds after which an event is sent again that was refused for a reason that may pass."""
_IDLE_AFTER = 1.0
"""Seconds after the end of the last event after which nothing is known of its stream any more."""
_LOOK_EVERY = 0.1
"""Seconds between two looks for events that are late."""
_FINISH_WITHIN = 1.0
"""Seconds for which a stop waits for the events that are under way."""
_OTHER_STREAM = 10060
"""JetStream's error code of a stream that is not the expected one."""
_NO_SCHEDULE = {
    10188: "the stream {stream} has no message schedules: run `nats stream edit {stream} --allow-schedules`",
    10189: "{Nats-Schedule!r} is not a schedule that the server knows",
    10223: "{Nats-Schedule-Time-Zone!r} is not a time zone that the server knows",
}
"""What is wrong with a schedule, by JetStream's error codes."""
_EXPECTED_LAST = api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value
_MSG_ID = api.Header.MSG_ID.value
EXPECTED_STREAM = api.Header.EXPECTED_STREAM.value
_NOBODY = "no stream captures its subject, or its stream has no leader now"


def event_headers(message_id: str, subject: str, stream: str) -> dict[str, str]:
    """The headers of an event that a stream is to store once, among those on its subject that have the same id."""
    return {_MSG_ID: f"{encode_text(message_id)}@{subject}", EXPECTED_STREAM: stream}


def delayed_headers(subject: str, due: datetime.datetime) -> dict[str, str]:
    """The further headers of an event on ``subject`` that the stream publishes when it is ``due``."""
    return once(due).headers(subject) | {_EXPECTED_LAST: "0"}


class _Event:
    """One event under way. A `Receiver`."""

    __slots__ = (
        "begun",
        "body",
        "head",
        "headers",
        "problem",
        "publisher",
        "refused",
        "reply",
        "sent",
        "sent_at",
        "sent_in",
        "size",
        "stream",
        "subject",
        "topic",
        "until",
        "waiter",
    )

    def __init__(
        self,
        publisher: DurablePublisher,
        subject: str,
        topic: TopicId,
        stream: str,
        body: bytes,
        headers: dict[str, str],
        begun: float,
    ) -> None:
        self.publisher: DurablePublisher = publisher
        self.subject: str = subject
        self.topic: TopicId = topic
        self.stream: str = stream
        self.body: bytes = body
        self.headers: dict[str, str] = headers
        self.head: bytes = header_block(headers)
        self.size: int = len(self.head) + len(body)
        self.begun: float = begun
        """When its publisher began to wait, by the event loop's clock."""
        self.until: float = math.inf
        """When its publisher stops waiting, by the event loop's clock."""
        self.waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.reply: str = ""
        self.sent_in: int | None = None
        """The connection's number of reconnects when it was last sent; None: it is to be sent."""
        self.sent_at: float = 0.0
        self.sent: int = 0
        """How often it was sent."""
        self.refused: int = 0
        """How often it is certain that what was sent was not stored."""
        self.problem: str = ""
        """Why it is not stored yet, as far as that is known."""

    def receive(self, message: Msg) -> None:
        """Part of `Receiver`."""
        self.publisher.on_answer(self, message)

    def end(self, error: Exception | None = None) -> None:
        """End the wait of its publisher. Has no effect if it has ended."""
        if self.waiter.done():
            return
        if error is None:
            self.waiter.set_result(None)
        else:
            self.waiter.set_exception(error)
            self.waiter.exception()  # its publisher may have been cancelled

    def fail(self, reason: str) -> None:
        """End the wait with `EventNotStored`."""
        may_be_stored = self.sent > self.refused
        self.end(EventNotStored(str(self.topic), self.stream, reason, may_be_stored=may_be_stored))


class DurablePublisher:
    """Publishes the events of one runtime to streams. A connection `Listener`."""

    def __init__(
        self,
        connection: Connection,
        subjects: Subjects,
        options: Options,
        queue: SendQueue,
        streams: DurableStreams,
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._queue = queue
        self._streams = streams
        self._timeout = options.publish_timeout
        self._silent_since = -math.inf
        """Since when no event that was under way was confirmed, by the event loop's clock."""
        self._idle_since = -math.inf
        """When the last event ended, in whatever way, if nothing is under way."""
        self._lost_at = -math.inf
        """When the connection was lost last."""
        self._acks = Acks(connection, options.inbox_prefix)
        self._under_way: dict[_Event, None] = {}
        self._bytes = 0
        self._room: list[asyncio.Future[None]] = []
        """The publishers that wait until an event ends."""
        self._looking: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None
        self._finding_out: asyncio.Task[None] | None = None
        self._tasks = BackgroundTasks(logger, "sending events on durable topics failed")
        connection.on_denied(self._on_denied)
        connection.add_listener(self)

    def publish(
        self,
        subject: str,
        topic: TopicId,
        stream: str,
        message_id: str,
        body: bytes,
        sent: Callable[[], None] | None,
        due: datetime.datetime | None = None,
        headers: Mapping[str, str] | None = None,
        unused: Callable[[], None] | None = None,
        begun: float | None = None,
    ) -> Awaitable[None]:
        """Publish an event. Await the result at once: it waits until the event's stream has stored it.

        ``begun`` is when its publisher began to wait, by the event loop's clock; None: now.
        ``due``: when the stream publishes it; in the past, or None: now. ``headers``: those of an event without an
        envelope; None: no others than each event has.
        ``sent`` is called when later messages may be sent; None: no function is called. ``unused`` is called if it is
        certain in the end that no attempt was stored: the event has failed, or another one with its id was there
        before.

        Raises `EventNotStored`, `JetStreamFull`, `PermissionDenied`, `SubscriptionRefused`, `MessageTooLarge` and
        `CannotSchedule`.
        """
        if is_task(topic.type):  # submitted again, it is the same one as long as it or its result is stored
            of_event = event_headers(f"{message_id}/{secrets.token_hex(12)}", subject, stream)
            of_event[_EXPECTED_LAST] = "0"
        else:
            of_event = event_headers(message_id, subject, stream)
        if headers is not None:
            of_event |= headers
        if due is not None and not is_due(due):
            of_event |= delayed_headers(subject, due)
            subject = self._subjects.delayed(stream, message_id, subject)
        return self.store(subject, topic, stream, body, of_event, sent, unused, begun)

    async def store(
        self,
        subject: str,
        topic: TopicId,
        stream: str,
        body: bytes,
        headers: dict[str, str],
        sent: Callable[[], None] | None,
        unused: Callable[[], None] | None = None,
        begun: float | None = None,
    ) -> None:
        """Publish a message, and wait until its stream has stored it. ``topic`` is for errors. Raises as `publish`."""
        now = asyncio.get_running_loop().time()
        event = _Event(self, subject, topic, stream, body, headers, now if begun is None else begun)
        try:
            self._connection.check_stored(len(body), len(event.head))
            self._acks.check()
            if self._acks.open and self._has_room(event):
                self._begin(event, now)
            elif self._queue.waiting:  # the present message has the turn
                await self._begin_when_possible(event)
            else:
                async with self._queue.turn(None):
                    await self._begin_when_possible(event)
            if sent is not None:
                sent()
            await event.waiter
        finally:
            if event in self._under_way:
                self._end(event)
            if unused is not None and event.sent <= event.refused:
                unused()

    def patience(self, begun: float, limited: bool) -> Patience:
        """The wait of a publisher that cannot send yet, and began to wait at ``begun``.

        ``limited``: False for what is not an event on a durable topic.
        """
        return Patience(partial(self._until_sent, begun) if limited else None, self._connection)

    def _until_sent(self, begun: float) -> float:
        """When a publisher stops waiting that cannot send because the connection is lost."""
        is_idle = self._is_idle(asyncio.get_running_loop().time())
        return self._until(max(begun, self._lost_at) if is_idle else begun)

    def _is_idle(self, now: float) -> bool:
        """True if nothing is under way, and nothing was a moment ago."""
        return not self._under_way and now > self._idle_since + _IDLE_AFTER

    def _until(self, begun: float) -> float:
        """When a publisher that began to wait at ``begun`` stops waiting, by the event loop's clock.

        The time in which others were confirmed before it does not count: many events at once may take longer.
        """
        return max(begun, self._silent_since) + self._timeout

    def _until_confirmed(self, begun: float, now: float) -> float:
        """The same for an event that can be sent. The time in which nothing was under way does not count either."""
        if self._is_idle(now):
            self._silent_since = now
        return self._until(begun)

    def _has_room(self, event: _Event) -> bool:
        return not self._under_way or (len(self._under_way) < WINDOW and self._bytes + event.size <= _WINDOW_BYTES)

    async def _begin_when_possible(self, event: _Event) -> None:
        if not self._acks.open:
            await self._acks.subscribe()
        while not self._has_room(event):
            room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._room.append(room)
            try:
                now = asyncio.get_running_loop().time()
                async with asyncio.timeout_at(self._until_confirmed(event.begun, now)):
                    await room
            except TimeoutError:
                if self._until(event.begun) > asyncio.get_running_loop().time():
                    continue  # others were confirmed meanwhile
                event.fail(
                    f"{len(self._under_way)} events wait for their confirmation, for {self._timeout:g} s already"
                )
                return
            finally:
                if room in self._room:
                    self._room.remove(room)
        self._begin(event, asyncio.get_running_loop().time())

    def _begin(self, event: _Event, now: float) -> None:
        """Put an event under way, and into the client's buffer if those before it are there."""
        event.until = self._until_confirmed(event.begun, now)
        event.reply = self._acks.expect(event)
        self._under_way[event] = None
        self._bytes += event.size
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(_LOOK_EVERY, self._look)
        connection = self._connection
        if (
            not self._is_sending
            and connection.connected
            and connection.client.post(event.subject, event.body, event.reply, event.head)
        ):
            self._note_sent(event, now)
        else:
            self._send_all()

    def _end(self, event: _Event) -> None:
        del self._under_way[event]
        if not self._under_way:
            self._idle_since = asyncio.get_running_loop().time()
        self._bytes -= event.size
        self._acks.forget(event.reply)
        if self._room:
            room, self._room = self._room, []
            for waiter in room:
                if not waiter.done():
                    waiter.set_result(None)

    # -- sending -------------------------------------------------------------------------------------------------

    @property
    def _is_sending(self) -> bool:
        return self._sending is not None and not self._sending.done()

    def _note_sent(self, event: _Event, now: float) -> None:
        event.sent_in = self._connection.reconnects
        event.sent_at = now
        event.sent += 1

    def _send_all(self) -> None:
        """Send all events that are to be sent, in their order."""
        if not self._is_sending and self._connection.connected:
            self._sending = self._tasks.spawn(self._send_in_order())

    async def _send_in_order(self) -> None:
        while self._connection.connected and (event := next(self._to_be_sent(), None)) is not None:
            self._note_sent(event, asyncio.get_running_loop().time())
            try:
                await self._connection.client.publish(event.subject, event.body, event.reply, event.headers)
            except (nats.errors.Error, NatsrtError, OSError) as error:
                logger.debug("an event on a durable topic is sent later: %s", error)
                event.problem = str(error) or type(error).__name__
                event.sent_in = None
                await asyncio.sleep(_LOOK_EVERY)

    def _to_be_sent(self) -> Iterator[_Event]:
        reconnects = self._connection.reconnects
        return (event for event in self._under_way if event.sent_in != reconnects and not event.waiter.done())

    def connection_lost(self) -> None:
        """Part of `Listener`."""
        self._lost_at = asyncio.get_running_loop().time()
        if self._under_way:
            self._connection.client.withdraw(self._acks.inbox)

    def connection_made(self) -> None:
        """Part of `Listener`."""
        if self._under_way:
            self._send_all()

    def _look(self) -> None:
        """End what has waited too long, and send again what was not answered."""
        loop = asyncio.get_running_loop()
        now, silent = loop.time(), None
        late = now - _SILENT - self._connection.rtt.allowance
        for event in self._under_way:
            if event.until <= now:
                event.fail(f"not confirmed within publish_timeout = {self._timeout:g} s: {self._why(event)}")
            elif event.sent_in is not None and event.sent_at <= late and self._connection.connected:
                event.sent_in, silent = None, event
        if silent is not None:
            self._find_out(silent.stream, silent.subject if silent.problem == _NOBODY else None)
        if next(self._to_be_sent(), None) is not None:
            self._send_all()
        self._looking = loop.call_later(_LOOK_EVERY, self._look) if self._under_way else None

    def _why(self, event: _Event) -> str:
        if event.problem:
            return event.problem
        return "the stream does not answer" if self._connection.connected else "the connection is lost"

    # -- answers -------------------------------------------------------------------------------------------------

    def on_answer(self, event: _Event, message: Msg) -> None:
        """Take what arrived on the reply subject of an event."""
        try:
            ack = read_ack(message)
        except nats.js.errors.NoStreamResponseError:
            self._not_stored(event, _NOBODY)
            self._find_out(event.stream, event.subject)
        except nats.js.errors.APIError as error:
            self._on_error(event, error)
        except (CannotDecode, WrongRevision) as error:
            if isinstance(error, WrongRevision) and _EXPECTED_LAST in event.headers:  # it is there already
                event.refused += 1
                event.end()
            else:
                event.problem = f"a subscriber of {event.subject} answered in place of the stream"
        else:
            if ack.stream == event.stream:
                self._silent_since = asyncio.get_running_loop().time()
                event.refused += ack.duplicate
                event.end()
            else:
                event.problem = f"{ack.stream or 'a subscriber'} answered in place of the stream"

    def _on_error(self, event: _Event, error: nats.js.errors.APIError) -> None:
        said = error.description or str(error)
        if (limit := limit_reached(error)) is not None:
            event.refused += 1
            event.end(JetStreamFull("write to", event.stream, limit.name, explained(limit, error)))
        elif error.err_code == _OTHER_STREAM:
            event.refused += 1
            event.fail(f"another stream captures {event.subject}")
        elif error.err_code in _NO_SCHEDULE:
            event.refused += 1
            reason = _NO_SCHEDULE[error.err_code].format(stream=event.stream, **event.headers)
            event.end(CannotSchedule(f"a message for {event.topic}", f"{reason} (the server says {said!r})"))
        elif error.code is not None and error.code < 500:
            event.refused += 1
            event.fail(said)
        else:
            self._not_stored(event, said)

    def _not_stored(self, event: _Event, problem: str) -> None:
        """An attempt was refused for a reason that may pass: the next one follows soon."""
        event.refused += 1
        event.problem = problem
        event.sent_at = asyncio.get_running_loop().time() - _SILENT - self._connection.rtt.allowance + _AGAIN

    def _on_denied(self, denied: Refusal) -> bool:
        if denied.operation == "subscribe to":
            concerned = list(self._under_way) if denied.subject.startswith(self._acks.inbox) else []
        else:
            concerned = [event for event in self._under_way if event.subject == denied.subject]
            for event in concerned:
                event.refused = event.sent
        for event in concerned:
            event.end(denied)
        return bool(concerned)

    def _find_out(self, stream: str, unheard: str | None = None) -> None:
        """Find out what is wrong with a stream that does not answer, if that is not being found out already.

        ``unheard`` is as in `DurableStreams.mend`.
        """
        if self._finding_out is None or self._finding_out.done():
            self._finding_out = self._tasks.spawn(self._mend(stream, unheard))

    async def _mend(self, stream: str, unheard: str | None) -> None:
        problem = await self._streams.mend(stream, unheard)
        if problem:
            for event in list(self._under_way):
                if event.stream == stream:
                    event.fail(problem)

    # -- stopping ------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Wait a moment for the events that are under way, and end the waits for the others. Harmless if stopped."""
        waiting = [event.waiter for event in self._under_way]
        if waiting:
            await asyncio.wait(waiting, timeout=_FINISH_WITHIN)
        for event in self._under_way:
            event.fail("this runtime was stopped")
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        await self._tasks.cancel()
        await self._acks.close()
