"""What becomes of calls that take long, as a decision without I/O: what was seen goes in, a verdict comes out.

Rules (times in seconds; `natsrt.transport.call_watch` does what the verdicts say):

1. A call that a worker has accepted belongs to that worker: it is asked about the call. A worker that no longer knows a
   call it had accepted has lost it.
2. For a call that nobody has accepted, all workers that may have received it are asked, once the call is old enough.
3. A call that every worker says it never received, while no worker left meanwhile, was lost on its way: it can be sent
   again. A worker says so if it does not know the call and its log reaches back further than the call.
4. A call that every worker either does not know, or cannot answer for because it is lost itself, is lost: it may have
   been handled.
5. A worker is lost after ``lost_after`` seconds of silence, or when the server says for `GONE_AFTER` that it does not
   listen. The server is believed sooner because a living worker may be slow: a handler that holds its event loop for
   2 s at a time delays every step of an answer.
6. Nothing counts while the connection is down, and the server's word counts only once the connection has settled:
   others may still be reconnecting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import Enum

from autogen_core import AgentId
from nats.aio.msg import Msg

FIRST_QUESTION = 0.5
"""Age of a call that nobody has accepted from which on it is asked for at every worker that could have it."""
GONE_AFTER = 1.5
"""Time for which a worker does not listen, after which it is lost: a reconnect of nats-py takes about half a second."""
_CONVINCED = 2
"""Answers "unknown" of one worker that settle it: the first may have overtaken the call on its way in a cluster."""
_MARGIN = 1.0
"""Time by which a worker's log must reach back further than the call: what a call may take on its way."""
_KNOWN_WITHIN = 1.0
"""Time after which the directory lists every worker that could have received a call."""


class PendingCall:
    """A call that was sent and has not ended."""

    __slots__ = (
        "accepted_by",
        "awaited_by",
        "checking",
        "future",
        "holders",
        "never_received_by",
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
        awaited_by: object | None = None,
    ) -> None:
        self.reply = reply
        """The subject of its reply, which is its id too."""
        self.subject = subject
        self.recipient = recipient
        self.future = future
        self.awaited_by = awaited_by
        """On whose behalf it waits; None where nobody asks."""
        self.sent_at = now
        self.watched_from = now
        """The time from which its age counts: `sent_at`, or earlier after a reconnect, when every call is asked for."""
        self.accepted_by: str | None = None
        """The worker that has it; None as long as no worker has said so."""
        self.holders: frozenset[str] | None = None
        """The workers that could have it; None as long as some of them may not be known."""
        self.checking = False
        """Whether it is being checked against the directory now."""
        self.plain_until: float | None = None
        """The time by which a plain responder must have answered; None where none was found."""
        self.unknown_to: dict[str, int] = {}
        """How often each worker said that it does not know the call."""
        self.never_received_by: dict[str, int] = {}
        """How often each worker said that it never received the call."""

    def receive(self, message: Msg) -> None:
        """The reply has arrived."""
        if not self.future.done():
            self.future.set_result(message)

    def fail(self, error: BaseException) -> None:
        """End the call with ``error``, unless it has ended."""
        if not self.future.done():
            self.future.set_exception(error)

    def unknown(self, worker_id: str, remembers: float, now: float) -> None:
        """A worker does not know the call. Its log is complete for the last ``remembers`` seconds."""
        self.unknown_to[worker_id] = self.unknown_to.get(worker_id, 0) + 1
        if remembers > now - self.sent_at + _MARGIN:
            self.never_received_by[worker_id] = self.never_received_by.get(worker_id, 0) + 1

    def reconnected(self, now: float) -> None:
        """The connection is back: the reply may have been lost with the old one, so ask for the call at once."""
        self.watched_from = min(self.watched_from, now - FIRST_QUESTION)
        self.holders = None


class AskedWorker:
    """A worker that was asked about calls, and for how long it has not answered."""

    __slots__ = ("asked_at", "gone_since", "silent_since")

    def __init__(self) -> None:
        self.asked_at = 0.0
        self.silent_since: float | None = None
        """The time of the first question without an answer; None if it has answered."""
        self.gone_since: float | None = None
        """The time since which the server says that it does not listen; None if it listens."""

    def asked(self, now: float) -> None:
        """A question was sent."""
        self.asked_at = now
        if self.silent_since is None:
            self.silent_since = now

    def heard(self) -> None:
        """It has answered."""
        self.silent_since = self.gone_since = None

    def gone(self, now: float) -> None:
        """The server says that it does not listen."""
        if self.gone_since is None:
            self.gone_since = now

    def listens(self) -> None:
        """The server says that it listens."""
        self.gone_since = None

    def reconnected(self, now: float) -> None:
        """The connection is back: its silence counts anew, and it is asked at once."""
        self.asked_at = 0.0
        self.gone_since = None
        if self.silent_since is not None:
            self.silent_since = now

    def is_lost(self, now: float, lost_after: float, settled: bool) -> bool:
        """Whether it will not answer any more. ``settled``: whether all others have had time to reconnect."""
        if self.silent_since is not None and now - self.silent_since > lost_after:
            return True
        return settled and self.gone_since is not None and now - self.gone_since > GONE_AFTER


class Verdict(Enum):
    """What is to be done about a call that takes long."""

    WAIT = "wait"
    """Nothing yet."""
    CHECK = "check"
    """No worker is known that could answer: find out what that means."""
    ASK = "ask"
    """Ask the workers that could have it."""
    NEVER_RECEIVED = "never received"
    """It was lost on its way: it can be sent again."""
    LOST = "lost"
    """No worker has it, and it may have been handled."""


class Judge:
    """Decides about the calls of one runtime. It keeps what the workers said; times are given to it."""

    def __init__(self, lost_after: float) -> None:
        self._lost_after = lost_after
        self.asked: dict[str, AskedWorker] = {}
        """The workers that are asked about calls."""

    def worker(self, worker_id: str) -> AskedWorker:
        """What is known of a worker; new where nothing is."""
        asked = self.asked.get(worker_id)
        if asked is None:
            asked = self.asked[worker_id] = AskedWorker()
        return asked

    def is_lost(self, worker_id: str, now: float, settled: bool) -> bool:
        """Whether a worker will not answer any more."""
        asked = self.asked.get(worker_id)
        return asked is not None and asked.is_lost(now, self._lost_after, settled)

    def verdict(
        self, call: PendingCall, workers: Sequence[str], now: float, *, all_stayed: bool, up_since: float, settled: bool
    ) -> Verdict:
        """What to do about a call that is older than ``check_after``.

        Args:
            call: The call. Its `PendingCall.holders` are set once they are known.
            workers: The live workers that may have it, by the directory.
            now: The present time.
            all_stayed: Whether no worker has left since the call was sent.
            up_since: The time since which the connection is up.
            settled: Whether all others have had time to reconnect.
        """
        if call.accepted_by is not None:
            return Verdict.ASK
        if not workers:
            return Verdict.CHECK
        if now - call.watched_from < FIRST_QUESTION:
            return Verdict.WAIT
        if all_stayed and all(call.never_received_by.get(worker_id, 0) >= _CONVINCED for worker_id in workers):
            return Verdict.NEVER_RECEIVED
        if call.holders is None and now - max(call.sent_at, up_since) >= _KNOWN_WITHIN:
            call.holders = frozenset(workers)
        if call.holders is not None and all(
            self._ruled_out(call, worker_id, now, settled) for worker_id in workers if worker_id in call.holders
        ):
            return Verdict.LOST
        return Verdict.ASK

    def _ruled_out(self, call: PendingCall, worker_id: str, now: float, settled: bool) -> bool:
        return call.unknown_to.get(worker_id, 0) >= _CONVINCED or self.is_lost(worker_id, now, settled)
