"""Plain NATS messages on subjects of the user's choice, over the connection of a runtime.

Rules:

1. A request ends: with replies, with `NoResponders` or `PermissionDenied`, or when its reader stops waiting. It has no
   time limit of its own.
2. Replies wait here until they are read, up to ``max_pending_bytes``. Plain NATS has no flow control, so what exceeds
   that is dropped, and the reader gets `TooManyReplies`.
3. A handler runs for each message. Where those that are handled take more than ``max_pending_bytes``, a request is
   answered with busy, as agents do it, and a message that wants no answer is dropped, with a warning.
4. Subscriptions outlive the session: `PlainSubscriptions` keeps them, and `PlainMessages` serves them from the start of
   a session to its stop. A stop takes no new messages first, and then waits for the handlers.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Protocol, Self

from nats.aio.msg import Msg

from natsrt.background import BackgroundTasks, end_tasks
from natsrt.errors import CannotDecode, NoResponders, PermissionDenied, TooManyReplies
from natsrt.options import Options
from natsrt.transport.connection import Connection, Interest, Refusal
from natsrt.transport.inbox import PLAIN_REQUEST, Inbox, is_nobody
from natsrt.wire.failures import SERVICE_ERROR, SERVICE_ERROR_CODE
from natsrt.wire.subjects import is_subject_length, service_problem, taken_problem

logger: logging.Logger = logging.getLogger("natsrt.plain")

_TOKEN: Final = r"[^\s.*>\x00-\x1f\x7f\ud800-\udfff]+"
_SUBJECT: Final = re.compile(rf"{_TOKEN}(?:\.{_TOKEN})*")
_FILTER: Final = re.compile(rf"(?:(?:{_TOKEN}|\*)\.)*(?:{_TOKEN}|\*|>)")
_HEADER_NAME: Final = re.compile(r"[!-9;-~]+")
_HEADER_VALUE: Final = re.compile(r"[^\r\n\x00\ud800-\udfff]*")
_OVERHEAD: Final = 512
"""Bytes that a message takes in addition to its payload while it is handled."""
_BUSY: Final = {SERVICE_ERROR: "busy: too many requests are handled here", SERVICE_ERROR_CODE: "429"}


def checked_subject(subject: str, *, wildcards: bool = False) -> str:
    """``subject``, if it is valid. Raises ValueError."""
    if isinstance(subject, str) and (_FILTER if wildcards else _SUBJECT).fullmatch(subject):
        if is_subject_length(subject):
            return subject
        raise ValueError(f"the subject {subject:.60}… is too long: at most 1,024 bytes")
    may = "wildcards as whole tokens" if wildcards else "no wildcards"
    raise ValueError(f"{subject!r:.100} is not a subject: tokens without white space, separated by dots; {may}")


def checked_service_subject(subject: str, options: Options) -> str:
    """``subject``, which may have wildcards, if a runtime with these options can offer a service on it.

    Raises ValueError if it is not valid, or can match a subject that others use: one of natsrt, in the namespace of the
    options or without one, an inbox, or a subject of the server.
    """
    if checked_subject(subject, wildcards=True).partition(".")[0] in ("*", ">"):
        raise ValueError(f"the subject {subject!r} begins with a wildcard: it would take the messages of others")
    if problem := service_problem(subject, ("", options.namespace), (options.inbox_prefix,)):
        raise ValueError(f"the subject {subject!r} {problem}; choose another one")
    return subject


def checked_plain_subject(subject: str, options: Options) -> str:
    """``subject``, which may have wildcards, if a runtime with these options can subscribe to it as to a plain one.

    Raises ValueError if it is not valid, or can match a subject of natsrt, in the namespace of the options or without
    one, or an inbox. Those of the server are allowed: it sends reports there, and clients ask services on ``$SRV``.
    """
    checked_subject(subject, wildcards=True)
    if problem := taken_problem(subject, ("", options.namespace), (options.inbox_prefix,)):
        raise ValueError(f"the subject {subject!r} {problem}; choose one that begins with a token of your own")
    return subject


def checked_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """A copy of ``headers``, if they can be sent: a line end in one would begin another. Raises ValueError."""
    if not isinstance(headers, Mapping | None):
        raise ValueError(f"headers must be a mapping of texts to texts, not {headers!r:.60}")
    for name, value in (headers or {}).items():
        if not (isinstance(name, str) and _HEADER_NAME.fullmatch(name)):
            raise ValueError(f"{name!r:.60} is not the name of a header: printable ASCII without colons and spaces")
        if not (isinstance(value, str) and _HEADER_VALUE.fullmatch(value)):
            raise ValueError(
                f"the header {name} must be a text without line ends, NUL and lone surrogates, not {value!r:.60}"
            )
    return dict(headers or {})


class AnswerSubjects(Protocol):
    """Decides where answers may be published."""

    def may_answer_plain(self, reply: str) -> bool:
        """True if the answer to a plain message may be published to ``reply``."""


@dataclass(frozen=True, slots=True)
class PlainMessage:
    """A NATS message that is not one of natsrt: a request or an event for a subscription, or the reply to a request.

    ``reply`` is the subject for answers; empty if the sender wants none.
    """

    subject: str
    payload: bytes = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    reply: str
    _connection: Connection = field(repr=False)

    async def respond(self, payload: bytes, *, headers: Mapping[str, str] | None = None) -> None:
        """Send an answer. May be called several times.

        Raises:
            ValueError: The sender wants no answer, or a header is not valid.
            MessageTooLarge: The server accepts no message of this size.
            ServerUnreachable: There is no connection, and too much waits for one.
        """
        if not self.reply:
            raise ValueError("the sender of this message wants no answer: its reply subject is empty")
        await self._connection.publish(self.reply, payload, headers=checked_headers(headers) or None)


class PlainReplies:
    """The replies to one request, in order: from `NatsAgentRuntime.request_plain`.

    Use it in ``async with``, which sends the request, and iterate over it. The iteration has no end of its own, because
    only the protocol of the responder says which reply is the last. When the block is left, later replies are ignored.
    """

    def __init__(self, plain: PlainMessages, subject: str, payload: bytes, headers: dict[str, str]) -> None:
        self._plain = plain
        self.subject: str = subject
        self._payload = payload
        self._headers = headers
        self._reply = ""
        self._arrived: deque[PlainMessage] = deque()
        self._bytes = 0
        self._failure: Exception | None = None
        self._news = asyncio.Event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> PlainMessage:
        """The next reply.

        Raises:
            NoResponders: The server reports that nobody listens on the subject. It does not if somebody listens who
                never answers, such as a tap or a stream.
            PermissionDenied: This user may not publish to the subject.
            TooManyReplies: Replies were not read fast enough.
        """
        while not self._arrived:
            if self._failure is not None:
                raise self._failure
            self._news.clear()
            await self._news.wait()
        message = self._arrived.popleft()
        self._bytes -= len(message.payload)
        return message

    def take(self, message: Msg) -> None:
        """Take in a reply. Called in the read loop."""
        if is_nobody(message):
            self.fail(NoResponders(self.subject))
        elif self._failure is None:
            self._bytes += len(message.data)
            if self._bytes > self._plain.max_pending_bytes:
                self.fail(TooManyReplies(self.subject, self._plain.max_pending_bytes))
            else:
                self._arrived.append(self._plain.message(message))
                self._news.set()

    def fail(self, failure: Exception) -> None:
        """Let the iteration raise ``failure``, after what has arrived."""
        self._failure = self._failure or failure
        self._news.set()

    async def __aenter__(self) -> Self:
        if self._reply:
            raise RuntimeError("this request was sent before: make another one")
        self._reply = self._plain.begin(self)
        try:
            await self._plain.send(self.subject, self._payload, self._reply, self._headers)
        except BaseException:
            self._plain.end(self, self._reply)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._plain.end(self, self._reply)


PlainHandler = Callable[[PlainMessage], Awaitable[None]]
"""Handles a message of a subscription, in a task of its own. It must answer by itself."""


class PlainSubscription:
    """A subscription to a subject: from `NatsAgentRuntime.subscribe_plain`."""

    def __init__(
        self, owner: PlainSubscriptions, subject: str, handler: PlainHandler, queue: str, *, optional: bool
    ) -> None:
        self._owner = owner
        self.subject: str = subject
        self.handler: PlainHandler = handler
        self.queue: str = queue
        """The queue group; empty for none."""
        self.optional: bool = optional
        """Whether the runtime works without it."""

    async def unsubscribe(self) -> None:
        """End the subscription. Handlers that run go on. Has no effect if it has ended."""
        await self._owner.remove(self)


class PlainSubscriptions:
    """The subscriptions of one runtime. They remain when it is stopped and started again."""

    def __init__(self) -> None:
        self._all: list[PlainSubscription] = []
        self.served_by: PlainMessages | None = None
        """The session that serves them; None while there is none."""

    def __iter__(self) -> Iterator[PlainSubscription]:
        return iter(list(self._all))

    async def add(self, subscription: PlainSubscription) -> PlainSubscription:
        """Add a subscription. Raises as `PlainMessages.serve`."""
        self._all.append(subscription)
        if self.served_by is not None:
            try:
                await self.served_by.serve([subscription])
            except BaseException:
                await self.remove(subscription)
                raise
        return subscription

    async def remove(self, subscription: PlainSubscription) -> None:
        """Remove a subscription. Has no effect if it was removed."""
        if subscription in self._all:
            self._all.remove(subscription)
            if self.served_by is not None:
                await self.served_by.drop(subscription)


class PlainMessages:
    """The plain messages of one session."""

    def __init__(
        self,
        connection: Connection,
        inbox: Inbox,
        options: Options,
        subscriptions: PlainSubscriptions,
        replies: AnswerSubjects,
    ) -> None:
        self._connection = connection
        self._inbox = inbox
        self._subscriptions = subscriptions
        self._answer_subjects = replies
        self._offline_timeout = options.offline_timeout
        self.max_pending_bytes: int = options.max_pending_bytes
        """The limit of the replies to one request that wait to be read, in bytes."""
        self._open: set[PlainReplies] = set()
        self._interests: dict[PlainSubscription, Interest] = {}
        self._handling = BackgroundTasks(logger, "a plain message could not be handled")
        self._running: set[asyncio.Task[None]] = set()
        """The tasks of the handlers."""
        self._exempt: set[asyncio.Task[Any]] = set()
        self._handled_bytes = 0
        self._refusing = BackgroundTasks(logger, "a plain request could not be refused")

    # -- lifecycle ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Serve the subscriptions of the runtime. Raises as `serve`."""
        self._connection.on_denied(self._denied)
        self._subscriptions.served_by = self
        await self.serve(list(self._subscriptions))

    async def stop(self, within: float, abort: asyncio.Event) -> int:
        """Take no new messages, and wait for the handlers, ``within`` seconds at most and until ``abort`` is set. What
        runs then is cancelled; its number is returned. Harmless if stopped.
        """
        self._subscriptions.served_by = None
        for interest in self._interests.values():
            await self._connection.unsubscribe(interest)
        self._interests.clear()
        handlers = self._running - self._exempt
        if handlers:
            ended, aborted = asyncio.ensure_future(asyncio.wait(handlers)), asyncio.ensure_future(abort.wait())
            await asyncio.wait({ended, aborted}, timeout=within, return_when=asyncio.FIRST_COMPLETED)
            await end_tasks(ended, aborted)
        cut_short = [handler for handler in handlers if not handler.done()]
        await end_tasks(*cut_short)
        await self._refusing.cancel()
        with suppress(ValueError):
            self._connection.off_denied(self._denied)
        return len(cut_short)

    def exempt(self, task: asyncio.Task[Any] | None) -> None:
        """Do not let a stop wait for ``task``, if it is the task of a handler: it waits for the stop itself."""
        if task in self._running:
            self._exempt.add(task)

    # -- requests ----------------------------------------------------------------------------------------------------

    def request(self, subject: str, payload: bytes, headers: dict[str, str]) -> PlainReplies:
        return PlainReplies(self, subject, payload, headers)

    def begin(self, replies: PlainReplies) -> str:
        """Let replies arrive. Returns their subject."""
        self._open.add(replies)
        subject = self._inbox.new_subject(PLAIN_REQUEST)
        self._inbox.receivers[subject] = replies.take
        return subject

    def end(self, replies: PlainReplies, subject: str) -> None:
        """Let no replies arrive any more. Has no effect if none do."""
        self._open.discard(replies)
        self._inbox.receivers.pop(subject, None)

    async def send(self, subject: str, payload: bytes, reply: str, headers: dict[str, str]) -> None:
        """Send a request. Raises `MessageTooLarge` and `ServerUnreachable`."""
        await self._connection.wait_connected(self._offline_timeout)
        await self._connection.publish(subject, payload, reply=reply, headers=headers or None)

    def _denied(self, refusal: Refusal) -> bool:
        """Returns True if a request was refused."""
        if not isinstance(refusal, PermissionDenied) or refusal.operation != "publish to":
            return False
        refused = [replies for replies in self._open if replies.subject == refusal.subject]
        for replies in refused:
            replies.fail(refusal)
        return bool(refused)

    # -- subscriptions -----------------------------------------------------------------------------------------------

    async def serve(self, subscriptions: list[PlainSubscription]) -> None:
        """Begin to handle the messages of subscriptions. When this returns, the server has them.

        Raises:
            PermissionDenied, SubscriptionRefused: The server refuses one that is not optional.
            ServerUnreachable: There was no connection for ``offline_timeout`` seconds.
        """
        if not subscriptions:
            return
        for one in subscriptions:
            sink = self._sink(one)
            interest = await self._connection.subscribe(one.subject, sink, queue=one.queue, optional=one.optional)
            self._interests[one] = interest
        await self._connection.round_trip(self._offline_timeout)
        for one in subscriptions:
            if not one.optional:
                self._interests[one].check()

    async def drop(self, subscription: PlainSubscription) -> None:
        """End a subscription. Has no effect if it is not served."""
        if (interest := self._interests.pop(subscription, None)) is not None:
            await self._connection.unsubscribe(interest)

    def _sink(self, subscription: PlainSubscription) -> Callable[[Msg], None]:
        def take(message: Msg) -> None:
            plain, size = self.message(message), len(message.data) + _OVERHEAD
            if plain.reply and not self._answer_subjects.may_answer_plain(plain.reply):
                raise CannotDecode(f"a message on {subscription.subject}", "its reply subject is not allowed")
            if self._handled_bytes + size <= self.max_pending_bytes:
                self._handled_bytes += size
                work = self._handle(subscription, plain, size)
                task = self._handling.spawn(work, name=f"natsrt {subscription.subject}")
                self._running.add(task)
                task.add_done_callback(self._running.discard)
            elif plain.reply:
                self._refusing.spawn(plain.respond(b"", headers=_BUSY))
            else:
                logger.warning("too many messages on %s: one was dropped", subscription.subject)

        return take

    async def _handle(self, subscription: PlainSubscription, message: PlainMessage, size: int) -> None:
        try:
            await subscription.handler(message)
        finally:
            self._handled_bytes -= size

    @property
    def handling(self) -> int:
        """Number of messages that are handled."""
        return len(self._running)

    def message(self, message: Msg) -> PlainMessage:
        return PlainMessage(message.subject, message.data, message.headers or {}, message.reply, self._connection)
