"""Calls: NATS requests whose fate is always known.

Rules:

1. One inbox per runtime, one token per call; a reply belongs to the call of its token and to nothing else.
2. "No responders" is a short cut, never the only signal: any tap (``nats sub '>'``) hides it.
3. A call that is neither answered nor accepted after ``check_after`` seconds is checked against the directory. Nobody
   there who could answer: a typed failure at once. A worker accepts a call that takes longer; from then on the caller
   asks that worker about it.
4. A worker that is asked and does not answer is lost, and so are its calls, when the server says that it does not
   listen any more, or after ``lost_after`` seconds of silence. The server is believed sooner because a worker that is
   alive may be slow: a handler that holds its event loop for 2 s at a time delays every step of an answer.
5. A call that every worker of the type says it never received is sent again, provided that none has left meanwhile.
   Unknown to a worker whose memory does not reach back far enough, or with one missing, it is lost: it may have been
   handled.
6. While the connection is down no clock of rule 4 runs; after it returns every pending call is asked for, because its
   reply may have been lost between two reconnects.

Every wait has an end: a reply, a failure of rule 3 or 4, ``offline_timeout``, ``plain_timeout`` or the caller's own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import orjson
from autogen_core import AgentId
from nats.aio.msg import Msg

from natsrt.background import BackgroundTasks
from natsrt.errors import CallTimeout, CannotDecode, NatsrtError, PermissionDenied, ServerUnreachable, WorkerLost
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.transport.inbox import Inbox, is_nobody
from natsrt.transport.probe import Probe
from natsrt.wire import envelope
from natsrt.wire.failures import BUSY, SERVICE_ERROR_CODE

logger = logging.getLogger("natsrt.calls")

_TICK = 0.05
_ASK_EVERY = 0.5
_FIRST_QUESTION = 0.5
"""Seconds after which an unaccepted call is asked for at every worker that could have it."""
_GONE_AFTER = 1.5
"""Seconds for which a worker does not listen, after which it is lost, on a settled connection."""
_MAX_QUESTIONS = 500
_CONVINCED = 2
"""Answers "unknown" of one worker that settle it: the first may have overtaken the call on its way in a cluster."""
_MARGIN = 1.0
"""Seconds by which a worker's memory must reach back further than the call."""
_KNOWN_WITHIN = 1.0
"""Seconds after which the directory lists every worker that could have received a call."""
_ANSWER = "an answer about calls"
_RESENDS = 3
"""How often a call is sent again that got lost on its way."""
_BUSY = str(BUSY)
_BUSY_PAUSE = 0.05
"""Seconds between two attempts at most: a queue group chooses by chance, so it takes some to find who has room."""


class Directory(Protocol):
    """Who hosts what, as far as a caller needs to know."""

    def subject_of(self, recipient: AgentId) -> str:
        """The subject on which ``recipient`` is to be called."""

    def worker_subject(self, worker_id: str) -> str:
        """The subject on which ``worker_id`` is asked about calls."""

    def workers_of(self, recipient: AgentId) -> Sequence[str]:
        """The live workers that may host ``recipient``, from the present view."""

    async def verify(self, recipient: AgentId) -> NatsrtError | None:
        """Read afresh: None if a live worker may host ``recipient``, else the failure that says why not."""

    def suspect(self, worker_id: str) -> None:
        """``worker_id`` did not answer: check whether it is still there."""

    def all_stayed(self, since: float) -> bool:
        """Whether no worker has left since the moment ``since`` of the event loop's clock."""


class Place(Protocol):
    """Where a keyed agent lives. Until that is known its messages wait, in order."""

    subject: str

    def may_send(self) -> bool:
        """True if a message may be sent now. Also extends the lease, as if one had been sent."""

    def join(self) -> asyncio.Future[None]:
        """Stand in the line, from this moment on."""

    async def wait(self, turn: asyncio.Future[None]) -> None:
        """Return when the message of ``turn`` may go, which it then does at once."""

    def lost(self) -> None:
        """Nobody listens there any more."""

    def owner_lost(self) -> None:
        """The worker that the agent lives on was lost, and all that lives there with it."""


class _NeverReceived(Exception):
    """The call got lost on its way: it can be sent again."""


class _Call:
    __slots__ = (
        "accepted_by",
        "awaited_by",
        "checking",
        "future",
        "holders",
        "never_at",
        "plain_until",
        "recipient",
        "reply",
        "sent_at",
        "subject",
        "unknown_to",
        "watched_from",
    )

    def __init__(
        self,
        reply: str,
        subject: str,
        recipient: AgentId,
        future: asyncio.Future[Msg],
        now: float,
        awaited_by: object | None,
    ) -> None:
        self.reply = reply
        """The subject of its reply, which is its id, too."""
        self.subject = subject
        self.recipient = recipient
        self.future = future
        self.awaited_by = awaited_by
        self.sent_at = now
        self.watched_from = now
        """The moment from which the waits count: `sent_at`, or earlier after a reconnect, when all is to be asked."""
        self.accepted_by: str | None = None
        self.holders: frozenset[str] | None = None
        """The workers that could have it; None as long as some of them may not be known."""
        self.checking = False
        self.plain_until: float | None = None
        self.unknown_to: dict[str, int] = {}
        """How often each worker said that it does not know the call."""
        self.never_at: dict[str, int] = {}
        """How often each worker said that it never received it."""

    def receive(self, message: Msg) -> None:
        """The reply has arrived."""
        if not self.future.done():
            self.future.set_result(message)

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _Asked:
    """A worker that was asked about calls, and how long it has not answered."""

    __slots__ = ("asked_at", "gone_since", "silent_since")

    def __init__(self) -> None:
        self.asked_at = 0.0
        self.silent_since: float | None = None
        self.gone_since: float | None = None

    def heard(self) -> None:
        self.silent_since = self.gone_since = None

    def gone(self, now: float) -> None:
        """It does not listen any more."""
        if self.gone_since is None:
            self.gone_since = now


class Calls:
    """The calling side of one runtime. A `Listener` of its connection."""

    def __init__(
        self, connection: Connection, inbox: Inbox, probe: Probe, options: Options, directory: Directory
    ) -> None:
        self._connection = connection
        self._inbox = inbox
        self._probe_server = probe
        self._options = options
        self._directory = directory
        self._pending: dict[str, _Call] = {}
        self._watched: dict[str, _Call] = {}
        self._asked: dict[str, _Asked] = {}
        self._open = False
        self._watcher: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._checks = BackgroundTasks(logger, "checking a call failed")
        self._down_since: float | None = None
        self._up_since = 0.0
        self.accept_to = ""
        """The subject on which workers accept this runtime's calls."""
        connection.add_listener(self)
        connection.on_denied(self._denied)

    @property
    def pending(self) -> int:
        """How many calls wait for their end."""
        return len(self._pending)

    def awaited(self) -> Iterator[tuple[str, object]]:
        """The calls that wait for their replies on behalf of somebody, each by its reply subject, and who that is."""
        for reply, call in self._pending.items():
            if call.awaited_by is not None:
                yield reply, call.awaited_by

    # -- lifecycle -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self.accept_to = self._inbox.subject("accept")
        self._inbox.receive(self.accept_to, self._on_accepted)
        self._open = True
        self._watcher = asyncio.create_task(self._watch(), name="natsrt call watcher")

    async def stop(self) -> None:
        """End the watch; calls that are still pending fail, and so do those that are sent from now on."""
        self._open = False
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None
        await self._checks.wait()
        for call in list(self._pending.values()):
            call.fail(_stopped(call.recipient, call.accepted_by))
        self._watched.clear()
        self._asked.clear()

    def connection_lost(self) -> None:
        self._down_since = asyncio.get_running_loop().time()

    def connection_made(self) -> None:
        now = asyncio.get_running_loop().time()
        self._down_since, self._up_since = None, now
        for asked in self._asked.values():
            asked.asked_at = 0.0
            asked.gone_since = None
            if asked.silent_since is not None:
                asked.silent_since = now
        for call in self._pending.values():
            self._watched.setdefault(call.reply, call)
            call.watched_from = min(call.watched_from, now - _FIRST_QUESTION)
            call.holders = None
        self._wake.set()

    # -- calling -------------------------------------------------------------------------------------------------

    async def call(
        self,
        recipient: AgentId,
        body: bytes,
        *,
        subject: str | None = None,
        place: Place | None = None,
        sent: Callable[[], None] | None = None,
        link: Callable[[asyncio.Future[Any]], None] | None = None,
        headers: dict[str, str] | None = None,
        awaited_by: object | None = None,
    ) -> Msg:
        """Send ``body`` to ``subject`` (None: where the directory says), and return the reply, whatever it is.

        ``place`` is that of a keyed agent, and names the subject. ``headers`` are those of a plain call. ``awaited_by``
        is shown by `awaited`. ``sent`` is called once the message is in the client's buffer, or stands in line at its
        place; ``link`` with every future that is waited for. Raises the failures of the rules above. Cancelling this
        coroutine forgets the call; it does not cancel the handler (that is what cancellation tokens do).
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        refused_at: float | None = None
        times_lost, pause = 0, 0.02
        while True:
            if not self._open:  # nobody would hear the reply
                raise _stopped(recipient)
            if place is not None and not place.may_send():
                turn = place.join()
                if link is not None:
                    link(turn)
                if sent is not None:
                    sent()
                await place.wait(turn)
                now = loop.time()
            reply_to = self._inbox.new_subject()
            future: asyncio.Future[Msg] = loop.create_future()
            if link is not None:
                link(future)
            if place is not None:
                route = place.subject
            else:
                route = self._directory.subject_of(recipient) if subject is None else subject
            call = self._pending[reply_to] = _Call(reply_to, route, recipient, future, now, awaited_by)
            self._inbox.receive(reply_to, call.receive)
            try:
                if not future.done():  # else its token is cancelled already
                    await self._connection.publish(route, body, reply=reply_to, headers=headers)
                if sent is not None:
                    sent()
                self._wake.set()
                reply = await future
            except WorkerLost:
                if place is not None:
                    place.owner_lost()
                raise
            except _NeverReceived:
                if place is not None:
                    place.lost()
                times_lost += 1
                if times_lost > _RESENDS:
                    raise WorkerLost(str(recipient), None, "it got lost on its way, again and again") from None
                now, refused_at = loop.time(), None
                continue
            finally:
                del self._pending[reply_to]
                self._inbox.drop(reply_to)
                self._watched.pop(reply_to, None)
            if reply.headers is None:
                return reply
            now = loop.time()
            refused_at = now if refused_at is None else refused_at
            if is_nobody(reply):
                if place is not None:
                    place.lost()
                failure = await self._directory.verify(recipient)
                if failure is not None:
                    raise failure
                for worker_id in self._directory.workers_of(recipient):
                    self._directory.suspect(worker_id)
                if now - refused_at + pause > self._options.no_responders_retry:
                    workers = self._directory.workers_of(recipient)
                    raise WorkerLost(str(recipient), workers[0] if workers else None, "it does not listen")
                longest = 0.25
            elif reply.headers.get(SERVICE_ERROR_CODE) == _BUSY and now - refused_at <= self._options.busy_retry:
                if place is not None:  # its owner may have refused because it is that no longer
                    place.lost()
                longest = _BUSY_PAUSE
            else:
                return reply
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)
            now = loop.time()

    # -- receiving -----------------------------------------------------------------------------------------------

    def _on_accepted(self, message: Msg) -> None:
        data = _data(message, envelope.ACCEPTED)
        worker_id, calls = data.get("worker"), envelope.texts(data, "calls", _ANSWER)
        if not isinstance(worker_id, str):
            raise CannotDecode("an acceptance", "it does not name its worker", message.data)
        for subject in calls:
            call = self._pending.get(subject)
            if call is not None:
                call.accepted_by = worker_id
                self._watched.setdefault(call.reply, call)
        self._asked_of(worker_id).heard()

    def _on_fate(self, worker_id: str, message: Msg) -> None:
        asked = self._asked_of(worker_id)
        if is_nobody(message):
            asked.gone(asyncio.get_running_loop().time())
            return
        data = _data(message, envelope.REPLY)
        running, unknown = envelope.texts(data, "running", _ANSWER), envelope.texts(data, "unknown", _ANSWER)
        remembers = data.get("remembers", 0.0)
        if not isinstance(remembers, int | float):
            raise CannotDecode(_ANSWER, "remembers must be a number of seconds", message.data)
        now = asyncio.get_running_loop().time()
        asked.heard()
        for subject in running:
            call = self._pending.get(subject)
            if call is not None:
                call.accepted_by = worker_id
        for subject in unknown:
            call = self._pending.get(subject)
            if call is None:
                continue
            call.unknown_to[worker_id] = call.unknown_to.get(worker_id, 0) + 1
            if remembers > now - call.sent_at + _MARGIN:
                call.never_at[worker_id] = call.never_at.get(worker_id, 0) + 1
            if call.accepted_by == worker_id:
                call.fail(WorkerLost(str(call.recipient), worker_id, "it no longer knows the call"))

    def _denied(self, denied: PermissionDenied) -> None:
        for call in list(self._pending.values()):
            if call.subject.lower() == denied.subject.lower():
                call.fail(PermissionDenied(denied.operation, call.subject))

    # -- watching ------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._pending:
                self._wake.clear()
                await self._wake.wait()
            await asyncio.sleep(_TICK)
            now = loop.time()
            for call in self._pending.values():  # the oldest first
                if now - call.watched_from < self._options.check_after:
                    break
                self._watched[call.reply] = call
            try:
                if self._down_since is not None:
                    self._fail_offline(now)
                elif self._watched:
                    await self._look_after(now)
            except NatsrtError as error:  # the connection went down in between: rule 6 takes over
                logger.debug("asking about calls: %s", error)
            except Exception:  # without the watch every later call could hang
                logger.exception("looking after the calls failed")

    def _fail_offline(self, now: float) -> None:
        limit = self._options.offline_timeout
        if limit is not None and self._down_since is not None and now - self._down_since > limit:
            for call in list(self._pending.values()):
                call.fail(ServerUnreachable(self._options.safe_servers, limit, "the connection was lost during a call"))

    async def _look_after(self, now: float) -> None:
        """One round over the calls that take longer: check, ask, and judge."""
        questions: dict[str, list[_Call]] = {}
        for call in list(self._watched.values()):
            if call.future.done():
                continue
            if call.accepted_by is not None:
                questions.setdefault(call.accepted_by, []).append(call)
                continue
            workers = self._directory.workers_of(call.recipient)
            if not workers:
                self._check(call, now)
            elif now - call.watched_from >= _FIRST_QUESTION:
                if all(call.never_at.get(worker_id, 0) >= _CONVINCED for worker_id in workers) and (
                    self._directory.all_stayed(call.sent_at)
                ):
                    call.fail(_NeverReceived())
                    continue
                if call.holders is None and now - max(call.sent_at, self._up_since) >= _KNOWN_WITHIN:
                    call.holders = frozenset(workers)
                if call.holders is not None and all(
                    self._out_of_question(call, worker_id, now) for worker_id in workers if worker_id in call.holders
                ):
                    call.fail(WorkerLost(str(call.recipient), None, "no worker of its type knows the call"))
                    continue
                for worker_id in workers:
                    questions.setdefault(worker_id, []).append(call)
        for worker_id, calls in questions.items():
            asked = self._asked_of(worker_id)
            if self._is_lost(asked, now):
                self._directory.suspect(worker_id)
                for call in calls:
                    if call.accepted_by == worker_id:
                        call.fail(WorkerLost(str(call.recipient), worker_id, "it does not answer any more"))
            if now - asked.asked_at >= _ASK_EVERY:
                if asked.silent_since is not None and now - asked.silent_since >= _ASK_EVERY:
                    self._checks.spawn(self._probe(worker_id, asked))
                await self._ask(worker_id, asked, calls, now)
        for worker_id in [w for w in self._asked if w not in questions]:
            del self._asked[worker_id]
            self._inbox.drop(self._inbox.subject(f"w-{worker_id}"))

    def _out_of_question(self, call: _Call, worker_id: str, now: float) -> bool:
        return call.unknown_to.get(worker_id, 0) >= _CONVINCED or self._is_lost(self._asked_of(worker_id), now)

    def _is_lost(self, asked: _Asked, now: float) -> bool:
        if asked.silent_since is not None and now - asked.silent_since > self._options.lost_after:
            return True
        return self._connection.settled and asked.gone_since is not None and now - asked.gone_since > _GONE_AFTER

    async def _ask(self, worker_id: str, asked: _Asked, calls: Sequence[_Call], now: float) -> None:
        asked.asked_at = now
        if asked.silent_since is None:
            asked.silent_since = now
        reply = self._inbox.subject(f"w-{worker_id}")
        for start in range(0, len(calls), _MAX_QUESTIONS):
            ids = [call.reply for call in calls[start : start + _MAX_QUESTIONS]]
            body = envelope.encode(envelope.FATE, '"id":"fate","source":"/"', orjson.dumps({"calls": ids}))
            await self._connection.publish(self._directory.worker_subject(worker_id), body, reply=reply)

    def _check(self, call: _Call, now: float) -> None:
        """No live natsrt worker is known that could answer: find out what that means."""
        if call.plain_until is not None:
            if now > call.plain_until:
                call.fail(CallTimeout(str(call.recipient), self._options.plain_timeout, "plain_timeout"))
        elif not call.checking:
            call.checking = True
            self._checks.spawn(self._verify(call))

    async def _probe(self, worker_id: str, asked: _Asked) -> None:
        """Ask the server whether a silent worker still listens: a tap hides its "no responders"."""
        subject = self._directory.worker_subject(worker_id)
        try:
            listens = await self._probe_server.responder_exists(subject)
        except NatsrtError as error:  # the connection went down in between
            logger.debug("looking for worker %s: %s", worker_id, error)
            return
        if listens:
            asked.gone_since = None
        elif listens is not None:
            asked.gone(asyncio.get_running_loop().time())

    async def _verify(self, call: _Call) -> None:
        began = asyncio.get_running_loop().time()
        try:
            failure = await self._directory.verify(call.recipient)
            if failure is None or call.future.done():
                return
            if await self._probe_server.responder_exists(call.subject):
                call.plain_until = call.sent_at + self._options.plain_timeout
                return
            call.fail(failure)
        except NatsrtError as error:  # the registry is out of reach
            logger.debug("checking a call to %s: %s", call.recipient, error)
            if self._down_since is None and self._up_since < began:
                call.fail(error)  # tried for seconds over a connection that held; else the next round tries again
        finally:
            call.checking = False

    def _asked_of(self, worker_id: str) -> _Asked:
        asked = self._asked.get(worker_id)
        if asked is None:
            asked = self._asked[worker_id] = _Asked()
            self._inbox.receive(
                self._inbox.subject(f"w-{worker_id}"), lambda message: self._on_fate(worker_id, message)
            )
        return asked


def _stopped(recipient: AgentId, worker_id: str | None = None) -> WorkerLost:
    return WorkerLost(str(recipient), worker_id, "this runtime was stopped")


def _data(message: Msg, kind: str) -> dict[str, Any]:
    body = envelope.decode(message.data)
    data = body.json() if body is not None and body.type == kind else None
    if not isinstance(data, dict):
        raise CannotDecode(_ANSWER, f"expected {kind} with an object as data", message.data)
    return data
