"""Decides what to do about calls that take long. No I/O: observations and times are passed in, a verdict is returned.

Rules (`natsrt.transport.call_watch` carries out the verdicts):

1. A call that a worker has accepted is asked for at that worker only. If that worker does not know it any more, the
   call is lost.
2. A call that no worker has accepted is asked for, once it is old enough, at all workers that may have received it.
3. A call was lost on its way, and can be sent again, if every worker answers that it never received the call and no
   worker has left since the call was sent. The answer "unknown" means "never received" if the worker's log reaches back
   further than the call.
4. A call is lost if every worker is ruled out: either it does not know the call, or it is lost itself. Such a call may
   have been handled, so it is not sent again.
5. A worker is lost after ``lost_after`` seconds without an answer, or after `GONE_AFTER` seconds in which the server
   reports that it does not listen. The second limit is shorter because silence alone proves little: a handler that
   blocks its event loop for 2 s at a time delays every step of an answer.
6. No time counts while the connection is down. What the server reports about listeners counts only once the connection
   has settled: until then, other workers may still be reconnecting.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from enum import Enum

from autogen_core import AgentId
from nats.aio.msg import Msg

FIRST_QUESTION = 0.5
"""Seconds after which workers are asked about a call that none of them has accepted."""
GONE_AFTER = 1.5
"""Seconds without a subscription after which a worker is lost: reconnects took 0.2 to 0.3 s when measured."""
_CONVINCED = 2
"""How many answers "unknown" of one worker count: in a cluster, the first question may have overtaken the call."""
_MARGIN = 1.0
"""Seconds by which a worker's log must reach back further than the call: allows for the time that a call travels."""
_KNOWN_WITHIN = 1.0
"""Seconds after which the directory lists every worker that could have received a call."""


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
        """What waits for the reply, shown by `Calls.awaited`; None: not shown."""
        self.sent_at = now
        self.watched_from = now
        """The time from which its age counts: `sent_at`; earlier after a reconnect, so that it is asked for at once."""
        self.accepted_by: str | None = None
        """The worker that accepted it, or reported it as running; None before that."""
        self.holders: frozenset[str] | None = None
        """All workers that could have received it; None until the directory is sure to list them all."""
        self.checking = False
        """Whether a check against the directory is running."""
        self.plain_until: float | None = None
        """The time by which a plain responder must have answered; None if none was found."""
        self.unknown_to: dict[str, int] = {}
        """How often each worker answered that it does not know the call."""
        self.never_received_by: dict[str, int] = {}
        """How often each worker's answer meant that it never received the call."""

    def receive(self, message: Msg) -> None:
        """End the call with its reply, unless it has ended."""
        if not self.future.done():
            self.future.set_result(message)

    def fail(self, error: BaseException) -> None:
        """End the call with ``error``, unless it has ended."""
        if not self.future.done():
            self.future.set_exception(error)

    def unknown(self, worker_id: str, remembers: float, now: float) -> bool:
        """Note that a worker does not know the call, with a log that is complete for the last ``remembers`` seconds.

        Returns True if that ends the call: this worker had accepted it, so the call is lost.
        """
        self.unknown_to[worker_id] = self.unknown_to.get(worker_id, 0) + 1
        if remembers > now - self.sent_at + _MARGIN:
            self.never_received_by[worker_id] = self.never_received_by.get(worker_id, 0) + 1
        return self.accepted_by == worker_id

    def reconnected(self, now: float) -> None:
        """Note that the connection is back. The reply may have been lost meanwhile, so ask for the call at once."""
        self.watched_from = min(self.watched_from, now - FIRST_QUESTION)
        self.holders = None


class AskedWorker:
    """A worker that is asked about calls: when it was asked, and since when it has not answered or listened."""

    __slots__ = ("asked_at", "gone_since", "silent_since")

    def __init__(self) -> None:
        self.asked_at = -math.inf
        """The time of the last question; before every other time if the next one is due at once."""
        self.silent_since: float | None = None
        """The time of the first question without an answer; None if it has answered."""
        self.gone_since: float | None = None
        """The time of the server's first report that it does not listen; None if it listens, as far as is known."""

    def asked(self, now: float) -> None:
        """Note that a question was sent."""
        self.asked_at = now
        if self.silent_since is None:
            self.silent_since = now

    def heard(self) -> None:
        """Note that it has answered."""
        self.silent_since = self.gone_since = None

    def gone(self, now: float) -> None:
        """Note the server's report that it does not listen."""
        if self.gone_since is None:
            self.gone_since = now

    def listens(self) -> None:
        """Note the server's report that it listens."""
        self.gone_since = None

    def reconnected(self, now: float) -> None:
        """Note that the connection is back: its silence counts from now, and the next question is due at once."""
        self.asked_at = -math.inf
        self.gone_since = None
        if self.silent_since is not None:
            self.silent_since = now

    def is_lost(self, now: float, lost_after: float, settled: bool) -> bool:
        """Whether it will not answer any more.

        Args:
            now: The present time.
            lost_after: Seconds of silence after which it is lost.
            settled: Whether every other worker has had time to reconnect.
        """
        if self.silent_since is not None and now - self.silent_since > lost_after:
            return True
        return settled and self.gone_since is not None and now - self.gone_since > GONE_AFTER


class Verdict(Enum):
    """What to do about a call that takes long."""

    WAIT = "wait"
    """Do nothing yet."""
    CHECK = "check"
    """The directory lists no worker that could answer: read it afresh, and look for a plain responder."""
    ASK = "ask"
    """Ask the worker that accepted it; without one, all workers that may have it."""
    NEVER_RECEIVED = "never received"
    """The call was lost on its way: it can be sent again."""
    LOST = "lost"
    """No worker will answer it, and it may have been handled."""


class Judge:
    """Decides about the calls of one runtime, from what the workers answered. All times are passed in."""

    def __init__(self, lost_after: float) -> None:
        self._lost_after = lost_after
        self.asked: dict[str, AskedWorker] = {}
        """The workers that are asked about calls, by their ids."""

    def worker(self, worker_id: str) -> AskedWorker:
        """The state of a worker, which is new if the worker was not asked before."""
        asked = self.asked.get(worker_id)
        if asked is None:
            asked = self.asked[worker_id] = AskedWorker()
        return asked

    def is_lost(self, worker_id: str, now: float, settled: bool) -> bool:
        """Whether a worker will not answer any more; False if it was never asked. See `AskedWorker.is_lost`."""
        asked = self.asked.get(worker_id)
        return asked is not None and asked.is_lost(now, self._lost_after, settled)

    def verdict(
        self, call: PendingCall, workers: Sequence[str], now: float, *, all_stayed: bool, up_since: float, settled: bool
    ) -> Verdict:
        """What to do about a call that is accepted, or older than ``check_after``.

        Args:
            call: The call. Sets its `PendingCall.holders` once they are known.
            workers: The live workers that may have it, by the directory.
            now: The present time.
            all_stayed: Whether no worker has left since the call was sent.
            up_since: The time since which the connection is up.
            settled: Whether every other worker has had time to reconnect.
        """
        if call.accepted_by is not None:
            return Verdict.LOST if self.is_lost(call.accepted_by, now, settled) else Verdict.ASK
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
