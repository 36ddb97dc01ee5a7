"""Watches calls that take long: asks workers about them, and fails those that no worker will answer.

`natsrt.transport.call_judgement` decides what to do, and this module does it. The workers' side is in
`natsrt.hosting.call_log` and `natsrt.hosting.peer_answers`.

- A worker accepts a call that takes longer than its ``accept_after``. From then on that worker is asked about the call.
- A call that is neither answered nor accepted after ``check_after`` seconds is watched: the workers of its type are
  asked. If the directory lists none, it is read again. A call that a worker may have received meanwhile then ends in
  `WorkerLost`, and not in an error that says that no handler was started.
- While the connection is down, calls fail only because of ``offline_timeout``.
- After a reconnect, workers are asked about every pending call, because its reply may have been lost while either side
  was disconnected.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from typing import Any, Protocol

import orjson
from autogen_core import AgentId
from nats.aio.msg import Msg

from natsrt.background import BackgroundTasks, end_tasks
from natsrt.errors import CallTimeout, CannotDecode, NatsrtError, PermissionDenied, WorkerLost
from natsrt.options import Options
from natsrt.transport.abandoned import AbandonedCalls
from natsrt.transport.call_judgement import AskedWorker, Judge, PendingCall, Verdict
from natsrt.transport.connection import Connection, Refusal
from natsrt.transport.inbox import Inbox, is_nobody
from natsrt.transport.probe import Probe
from natsrt.wire import envelope
from natsrt.wire.failures import decode_answer
from natsrt.wire.ids import checked_id

logger: logging.Logger = logging.getLogger("natsrt.calls")

_TICK = 0.05
"""Seconds between two rounds while calls are pending. A verdict is late by at most this time, which is short compared
with ``check_after``."""
_ASK_EVERY = 0.5
"""Seconds between two questions to one worker."""
_STALL = 1.0
"""Seconds by which a round must be late to mean that the event loop was blocked."""
_MAX_QUESTIONS = 500
"""Maximum number of calls in one question: about 25 kB, far below the ``max_payload`` of any server."""
_ANSWER = "an answer about calls"
"""The name of such a message in errors."""


class Directory(Protocol):
    """The information about workers and their agents that callers need."""

    def subject_of(self, recipient: AgentId) -> str:
        """Return the subject for calls to ``recipient``."""

    def worker_subject(self, worker_id: str) -> str:
        """Return the subject for questions about calls to ``worker_id``."""

    def workers_of(self, recipient: AgentId) -> Sequence[str]:
        """Return the live workers that may host ``recipient``, from the current view."""

    async def catch_up(self) -> None:
        """Make the view contain every worker that is registered now. Raises `NatsrtError` if that fails."""

    async def verify(self, recipient: AgentId) -> NatsrtError | None:
        """Read the directory again. Returns None if a live worker may host ``recipient``, else an error that says why
        not."""

    def suspect(self, worker_id: str) -> None:
        """Check whether ``worker_id`` is still alive, because it did not answer."""

    def all_stayed(self, since: float) -> bool | None:
        """True if no worker has left since ``since``, in seconds by the event loop's clock.

        None if that is not known, because the directory is being read again.
        """


class NeverReceived(Exception):
    """The call was lost on its way, and can be sent again."""


class CallWatch:
    """Watches the pending calls of one runtime until they complete. It is a `Listener` of its connection."""

    def __init__(
        self, connection: Connection, inbox: Inbox, probe: Probe, options: Options, directory: Directory
    ) -> None:
        self._connection = connection
        self._inbox = inbox
        self._probe = probe
        self._options = options
        self._directory = directory
        self._judge = Judge(options.lost_after, connection.rtt)
        self._abandoned = AbandonedCalls(connection, directory)
        self.pending: dict[str, PendingCall] = {}
        """The calls that have not completed, by their reply subjects, oldest first."""
        self._watched: dict[str, PendingCall] = {}
        """The pending calls that take long or were accepted, by their reply subjects."""
        self._watcher: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._checks = BackgroundTasks(logger, "a check of a call failed")
        self._down_since: float | None = None
        self._up_since = 0.0
        self._lost_at = -math.inf
        """When the connection was last lost; minus infinity if it never was."""
        self.accept_to: str = ""
        """The subject on which workers accept this runtime's calls."""
        connection.add_listener(self)
        connection.on_denied(self._denied)

    # -- lifecycle -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.accept_to = self._inbox.subject("accept")
        self._inbox.receivers[self.accept_to] = self._on_accepted
        self._watcher = asyncio.create_task(self._watch(), name="natsrt call watcher")

    async def stop(self) -> None:
        """Stop watching. Calls that are still pending fail with `WorkerLost`. Has no effect if stopped."""
        if self._watcher is not None:
            await end_tasks(self._watcher)
            self._watcher = None
        await self._checks.wait()
        for call in list(self.pending.values()):
            if not call.future.done():
                self._abandoned.add(call.reply, call.accepted_by)
            call.fail(stopped(call.recipient, call.accepted_by))
        await self._abandoned.stop()
        self._watched.clear()
        self._judge.asked.clear()

    def connection_lost(self) -> None:
        self._down_since = self._lost_at = asyncio.get_running_loop().time()

    def connection_made(self) -> None:
        now = asyncio.get_running_loop().time()
        self._down_since, self._up_since = None, now
        self._judge.reconsider(now)
        for call in self.pending.values():
            self._watched.setdefault(call.reply, call)
            call.reconnected(now)
        self._wake.set()

    # -- calls ---------------------------------------------------------------------------------------------------

    def add(self, call: PendingCall) -> None:
        """Add a call that is about to be sent. `remove` must be called for it later."""
        self.pending[call.reply] = call
        self._wake.set()
        self._inbox.receivers[call.reply] = call.receive

    def remove(self, call: PendingCall) -> None:
        """Remove a call that has completed, or whose caller no longer waits for it, which its worker is told."""
        if call.future.cancelled():
            self._abandoned.add(call.reply, call.accepted_by)
        del self.pending[call.reply]
        self._inbox.receivers.pop(call.reply, None)
        self._watched.pop(call.reply, None)

    def _denied(self, denied: Refusal) -> bool:
        if denied.operation == "subscribe to":
            return False
        refused = [call for call in self.pending.values() if call.subject.lower() == denied.subject.lower()]
        for call in refused:
            call.fail(PermissionDenied(denied.operation, call.subject))
        return bool(refused)

    # -- what workers answer -------------------------------------------------------------------------------------

    def _on_accepted(self, message: Msg) -> None:
        data = _data(message, envelope.ACCEPTED)
        worker_id, calls = data.get("worker"), envelope.texts(data, "calls", _ANSWER)
        if not isinstance(worker_id, str):
            raise CannotDecode("an acceptance", "it does not name its worker", message.data)
        checked_id(worker_id, "an acceptance")
        for reply in calls:
            call = self.pending.get(reply)
            if call is not None:
                call.accepted_by = worker_id
                self._watched.setdefault(call.reply, call)
            else:
                self._abandoned.accepted(worker_id, reply)
        self._asked(worker_id).heard()

    def _on_answer(self, worker_id: str, message: Msg) -> None:
        """Process a worker's answer to a question about calls, or the server's report that it does not listen."""
        asked, now = self._asked(worker_id), asyncio.get_running_loop().time()
        if is_nobody(message):
            asked.gone(now)
            return
        data = _data(message, envelope.REPLY)
        running, unknown = envelope.texts(data, "running", _ANSWER), envelope.texts(data, "unknown", _ANSWER)
        promised = set(envelope.texts(data, "withdrawn", _ANSWER)) if "withdrawn" in data else None
        remembers = data.get("remembers", 0.0)
        if not isinstance(remembers, int | float):
            raise CannotDecode(_ANSWER, "remembers must be a number of seconds", message.data)
        asked.answered(now)
        for reply in running:
            call = self.pending.get(reply)
            if call is not None:
                call.accepted_by = worker_id
        for reply in unknown:
            call = self.pending.get(reply)
            if call is None:
                continue
            if call.unknown(worker_id, remembers, now, None if promised is None else reply in promised):
                call.fail(WorkerLost(str(call.recipient), worker_id, "it no longer knows the call"))

    def _asked(self, worker_id: str) -> AskedWorker:
        if worker_id not in self._judge.asked:
            self._inbox.receivers[self._answer_subject(worker_id)] = lambda message: self._on_answer(worker_id, message)
        return self._judge.worker(worker_id)

    def _answer_subject(self, worker_id: str) -> str:
        return self._inbox.subject(f"w-{worker_id}")

    # -- rounds --------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self.pending:
                self._wake.clear()
                await self._wake.wait()
            slept_at = loop.time()
            await asyncio.sleep(_TICK)
            now = loop.time()
            if now - slept_at > _STALL:  # answers that arrived meanwhile are read after this
                self._judge.reconsider(now)
                continue
            young = self._options.check_after + self._connection.rtt.allowance
            for call in self.pending.values():  # oldest first
                if now - call.watched_from < young:
                    break
                self._watched[call.reply] = call
            try:
                if self._down_since is not None:
                    self._fail_offline(now, self._down_since)
                elif self._watched or self._judge.asked:  # without calls, it forgets the workers that were asked
                    await self._ask_about(self._judge_all(now), now)
            except NatsrtError as error:  # the connection has gone down; the next round handles that
                logger.debug("could not ask about calls: %s", error)
            except Exception:  # watching must continue, because otherwise every later call could hang
                logger.exception("a round of the call watch failed")

    def _fail_offline(self, now: float, down_since: float) -> None:
        limit = self._options.offline_timeout
        if limit is not None and now - down_since > limit:
            for call in list(self.pending.values()):
                call.fail(self._connection.unreachable(limit, "the connection was lost during a call"))

    def _judge_all(self, now: float) -> dict[str, list[PendingCall]]:
        """Carry out the verdicts about the watched calls. Returns, for each worker to ask, the calls to ask about."""
        questions: dict[str, list[PendingCall]] = {}
        for call in list(self._watched.values()):
            if call.future.done():
                continue
            workers = self._directory.workers_of(call.recipient)
            match self._judge.verdict(
                call,
                workers,
                now,
                all_stayed=self._directory.all_stayed(call.sent_at),
                up_since=self._up_since,
                settled=self._connection.settled,
            ):
                case Verdict.ASK | Verdict.WITHDRAW as verdict:
                    call.withdraw = verdict is Verdict.WITHDRAW
                    for worker_id in workers if call.accepted_by is None else (call.accepted_by,):
                        questions.setdefault(worker_id, []).append(call)
                case Verdict.CHECK:
                    self._check(call, now)
                case Verdict.NEVER_RECEIVED:
                    if not call.checking:
                        call.checking = True
                        self._checks.spawn(self._confirm_never_received(call))
                case Verdict.LOST:
                    self._lost(call, workers, now)
        return questions

    def _lost(self, call: PendingCall, workers: Sequence[str], now: float) -> None:
        if call.accepted_by is not None:
            workers, reason = (call.accepted_by,), "it no longer answers"
        else:
            reason = "no worker of its type knows the call"
        for worker_id in workers:
            if self._judge.is_lost(worker_id, now, self._connection.settled):
                self._directory.suspect(worker_id)
        call.fail(WorkerLost(str(call.recipient), call.accepted_by, reason))

    async def _ask_about(self, questions: dict[str, list[PendingCall]], now: float) -> None:
        """Ask each worker about its calls if a question is due, and forget the workers that are not asked anything."""
        for worker_id, calls in questions.items():
            asked = self._asked(worker_id)
            if self._judge.is_lost(worker_id, now, self._connection.settled):
                self._directory.suspect(worker_id)
            if now - asked.asked_at >= _ASK_EVERY:
                late = _ASK_EVERY + self._connection.rtt.allowance
                if asked.silent_since is not None and now - asked.silent_since >= late:
                    self._checks.spawn(self._look_for(worker_id, asked))
                await self._ask(worker_id, asked, calls, now)
        for worker_id in [known for known in self._judge.asked if known not in questions]:
            del self._judge.asked[worker_id]
            self._inbox.receivers.pop(self._answer_subject(worker_id), None)

    async def _ask(self, worker_id: str, asked: AskedWorker, calls: Sequence[PendingCall], now: float) -> None:
        asked.asked(now)
        subject, reply = self._directory.worker_subject(worker_id), self._answer_subject(worker_id)
        for start in range(0, len(calls), _MAX_QUESTIONS):
            some = calls[start : start + _MAX_QUESTIONS]
            question = {"calls": [call.reply for call in some]}
            if withdraw := [call.reply for call in some if call.withdraw]:
                question["withdraw"] = withdraw
            body = envelope.encode(envelope.FATE, '"id":"fate","source":"/"', orjson.dumps(question))
            await self._connection.publish(subject, body, reply=reply)

    async def _look_for(self, worker_id: str, asked: AskedWorker) -> None:
        """Ask the server whether a worker that does not answer still listens.

        A tap (``nats sub '>'``) would prevent the "no responders" message, so that message alone is not sufficient.
        """
        try:
            listens = await self._probe.responder_exists(self._directory.worker_subject(worker_id))
        except NatsrtError as error:  # the connection has gone down
            logger.debug("could not check whether worker %s listens: %s", worker_id, error)
            return
        if listens:
            asked.listens()
        elif listens is not None:
            asked.gone(asyncio.get_running_loop().time())

    async def _confirm_never_received(self, call: PendingCall) -> None:
        """Have the call sent again if every worker that is registered by now has promised never to handle it.

        A worker that started meanwhile learns from the others what they promised, so it need not be waited for longer.
        """
        began = asyncio.get_running_loop().time()
        try:
            await self._directory.catch_up()
            workers = self._directory.workers_of(call.recipient)
            if call.promised_by.issuperset(workers) and self._directory.all_stayed(call.sent_at):
                call.fail(NeverReceived())
        except NatsrtError as error:
            self._check_failed(call, error, began)
        finally:
            call.checking = False

    # -- calls without a worker ----------------------------------------------------------------------------------

    def _check(self, call: PendingCall, now: float) -> None:
        """Handle a call for which the directory lists no worker: start a check, or apply ``plain_timeout``."""
        if call.plain_until is not None:
            if now > call.plain_until:
                call.fail(CallTimeout(str(call.recipient), self._options.plain_timeout, "plain_timeout"))
        elif not call.checking:
            call.checking = True
            self._checks.spawn(self._verify(call))

    async def _verify(self, call: PendingCall) -> None:
        """Fail the call if no worker may host its recipient and no plain responder listens on its subject.

        The directory's error says that the call was not handled. It is the call's error only if no worker can have
        received the call. The directory was read after the call was sent, so it lists every worker that received it,
        except those that have left. Those that left in order have answered the call. But what was sent on a former
        connection may arrive later than the directory's answer.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            failure = await self._directory.verify(call.recipient)
            if failure is None or call.future.done() or self._directory.workers_of(call.recipient):
                return
            if await self._probe.responder_exists(call.subject):
                call.plain_until = call.sent_at + self._options.plain_timeout
                return
            all_stayed = self._directory.all_stayed(call.sent_at) if call.sent_at > self._lost_at else False
            match self._judge.stayed(call, all_stayed, loop.time(), self._up_since):
                case True:
                    call.fail(failure)
                case False:
                    call.fail(WorkerLost(str(call.recipient), None, "no worker of its type is left"))
                case None:  # known once the directory has been read again: see the next check
                    await asyncio.sleep(_ASK_EVERY)
        except NatsrtError as error:
            self._check_failed(call, error, began)
        finally:
            call.checking = False

    def _check_failed(self, call: PendingCall, error: NatsrtError, began: float) -> None:
        """The directory could not be read for a check that began at this time."""
        logger.debug("could not check a call to %s: %s", call.recipient, error)
        if self._down_since is None and self._up_since < began:
            call.fail(error)  # the connection was up all the time; otherwise the next round tries again


def stopped(recipient: AgentId, worker_id: str | None = None) -> WorkerLost:
    """Return the error of a call whose caller's runtime was stopped."""
    return WorkerLost(str(recipient), worker_id, "this runtime was stopped")


def _data(message: Msg, kind: str) -> dict[str, Any]:
    body = decode_answer(message.headers, message.data)
    data = body.json() if body is not None and body.type == kind else None
    if not isinstance(data, dict):
        raise CannotDecode(_ANSWER, f"expected {kind} with an object as data", message.data)
    return data
