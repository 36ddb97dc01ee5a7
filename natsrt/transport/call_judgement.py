"""Decides what to do about calls that take long. No I/O: observations and times are passed in, a verdict is returned.

Rules (`natsrt.transport.call_watch` carries out the verdicts):

1. If a worker has accepted a call, only that worker is asked about it. If that worker no longer knows the call, the
   call is lost.
2. If no worker has accepted a call, then once it is old enough, all workers that may have received it are asked.
3. A call was lost on its way, and can be sent again, if every worker answers that it never received the call and
   promises never to handle it, and no worker has left since the call was sent. The answer "unknown" means "never
   received" if the worker's log goes back to a time before the call. The promise is needed because the call may still
   be on its way, on a connection that stalls. A worker of an older version makes no promises; its answers count as one.
   Whether a worker has left is not known while the directory is read again, after a reconnect: that is waited for, at
   most ``lost_after`` seconds.
4. A call is lost if every worker is ruled out. A worker is ruled out if it does not know the call, or if the worker
   itself is lost. Such a call may have been handled, so it is not sent again.
5. A worker is lost after ``lost_after`` seconds without an answer, or after `GONE_AFTER` seconds in which the server
   reports that the worker's subject has no subscriber. The second limit is shorter, because a worker that does not
   answer may only be slow: a handler that blocks its event loop for 2 s at a time delays every step of an answer.
6. A call for which the directory lists no worker, and on whose subject nobody listens, was not received, if no worker
   has left since it was sent (what is not known is waited for as in rule 3), and if it was not sent on a former
   connection. Otherwise it is lost, and may have been handled.
7. Time does not count while the connection is down. Reports of the server about subscribers count only once the
   connection has settled, because other workers may still be reconnecting before that.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum
from types import MappingProxyType

from autogen_core import AgentId
from nats.aio.msg import Msg

from natsrt.transport.round_trip_time import RoundTripTime

FIRST_QUESTION = 0.5
"""Seconds after which workers are asked about a call that none of them has accepted."""
GONE_AFTER = 1.5
"""Seconds without a subscription after which a worker is lost. It is longer than a reconnect, for which 0.2 to 0.3 s
were measured."""
_CONVINCED = 2
"""Number of answers "unknown" from one worker that rule it out. One is not enough: in a cluster, the first question may
have overtaken the call. The question before the last of these answers asks for the promise."""
_MARGIN = 1.0
"""Seconds before the call to which a worker's log must go back. This allows for the time that the call takes to reach
the worker."""
_KNOWN_WITHIN = 1.0
"""Seconds after which the directory lists every worker that could have received a call, beside the round trip."""
_RECONNECT_TRIPS = 4
"""Round trips that a reconnect takes: the connection, its beginning, and the subscriptions; one more for TLS."""

_NONE: Mapping[str, int] = MappingProxyType({})
"""Counts of nothing. Few calls are ever asked about, so they share it."""


def _counted(counts: Mapping[str, int], worker_id: str) -> Mapping[str, int]:
    return {**counts, worker_id: counts.get(worker_id, 0) + 1}


class PendingCall:
    """A call that was sent and has not completed."""

    __slots__ = (
        "accepted_by",
        "awaited_by",
        "checking",
        "future",
        "holders",
        "never_received_by",
        "plain_until",
        "promised_by",
        "recipient",
        "reply",
        "sent_at",
        "subject",
        "unknown_to",
        "watched_from",
        "withdraw",
        "withdraw_since",
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
        self.reply: str = reply
        """The subject of its reply, which is also its id."""
        self.subject: str = subject
        self.recipient: AgentId = recipient
        self.future: asyncio.Future[Msg] = future
        self.awaited_by: object | None = awaited_by
        """What waits for the reply, shown by `Calls.awaited`; None: not shown."""
        self.sent_at: float = now
        self.watched_from: float = now
        """The time from which its age counts. It is `sent_at`, or earlier after a reconnect, so that workers are asked
        about the call at once."""
        self.accepted_by: str | None = None
        """The worker that accepted it, or reported it as running; None before that."""
        self.holders: frozenset[str] | None = None
        """All workers that could have received it; None until the directory is certain to list them all."""
        self.checking: bool = False
        """True while a check against the directory is running."""
        self.plain_until: float | None = None
        """The time by which a plain responder must have answered; None if no plain responder was found."""
        self.unknown_to: Mapping[str, int] = _NONE
        """How often each worker answered that it does not know the call."""
        self.never_received_by: Mapping[str, int] = _NONE
        """How often each worker's answer meant that it never received the call."""
        self.promised_by: frozenset[str] = frozenset()
        """The workers that promised never to handle it."""
        self.withdraw: bool = False
        """True if workers that are asked about it are to promise that."""
        self.withdraw_since: float | None = None
        """Since when they are asked for that; None before. A worker without room for promises gives none."""

    def receive(self, message: Msg) -> None:
        """Complete the call with its reply, unless it has completed."""
        if not self.future.done():
            self.future.set_result(message)

    def fail(self, error: BaseException) -> None:
        """Complete the call with ``error``, unless it has completed."""
        if not self.future.done():
            self.future.set_exception(error)

    def unknown(self, worker_id: str, remembers: float, now: float, promised: bool | None = None) -> bool:
        """Record that a worker does not know the call. Its log is complete for the last ``remembers`` seconds.

        ``promised`` says whether the worker promises never to handle the call; None if it makes no promises. Returns
        True if the call is lost, because this worker had accepted it.
        """
        self.unknown_to = _counted(self.unknown_to, worker_id)
        if remembers > now - self.sent_at + _MARGIN:
            self.never_received_by = _counted(self.never_received_by, worker_id)
        if promised or (promised is None and self.unknown_to[worker_id] >= _CONVINCED):
            self.promised_by |= {worker_id}
        return self.accepted_by == worker_id

    def reconnected(self, now: float) -> None:
        """Record a reconnect. The reply may have been lost before it, so workers are asked about the call at once."""
        self.watched_from = min(self.watched_from, now - FIRST_QUESTION)
        self.holders = self.withdraw_since = None


class AskedWorker:
    """The state of a worker that is asked about calls."""

    __slots__ = ("_questions", "asked_at", "distance", "gone_since", "silent_since")

    def __init__(self) -> None:
        self.asked_at: float = -math.inf
        """The time of the last question; minus infinity if the next one is due at once."""
        self.silent_since: float | None = None
        """The time of the first question without an answer; None if every question was answered."""
        self.gone_since: float | None = None
        """The time of the server's first report that the worker does not listen; None if there is no such report."""
        self.distance: float = math.inf
        """The shortest time, in seconds, in which the worker has answered a question; infinity before the first answer.
        The shortest one is that of its link: its event loop may have been blocked during the others."""
        self._questions: deque[float] = deque()
        """The times of the questions without an answer."""

    def asked(self, now: float) -> None:
        """Record that a question was sent."""
        self.asked_at = now
        self._questions.append(now)
        if self.silent_since is None:
            self.silent_since = now

    def heard(self) -> None:
        """Record a sign of life of the worker."""
        self.silent_since = self.gone_since = None

    def answered(self, now: float) -> None:
        """Record that the worker has answered a question."""
        self.heard()
        if self._questions:
            self.distance = min(self.distance, now - self._questions.popleft())

    def gone(self, now: float) -> None:
        """Record the server's report that the worker does not listen."""
        if self.gone_since is None:
            self.gone_since = now

    def listens(self) -> None:
        """Record the server's report that the worker listens."""
        self.gone_since = None

    def reconnected(self, now: float) -> None:
        """Record a reconnect or a stall. The time without an answer counts from now, and the next question is due at
        once."""
        self.asked_at = -math.inf
        self.gone_since = None
        self._questions.clear()
        if self.silent_since is not None:
            self.silent_since = now

    def is_lost(self, now: float, lost_after: float, settled: bool) -> bool:
        """True if the worker is lost: it is not expected to answer any more.

        Args:
            now: The current time.
            lost_after: Seconds without an answer after which it is lost.
            settled: True if every other worker has had time to reconnect.
        """
        if self.silent_since is not None and now - self.silent_since > lost_after:
            return True
        reconnect = 0.0 if self.distance == math.inf else _RECONNECT_TRIPS * self.distance
        return settled and self.gone_since is not None and now - self.gone_since > GONE_AFTER + reconnect


class Verdict(Enum):
    """What to do about a call that takes long."""

    WAIT = "wait"
    """Do nothing yet."""
    CHECK = "check"
    """The directory lists no worker that could answer. Read it again, and look for a plain responder."""
    ASK = "ask"
    """Ask the worker that accepted the call. If none has accepted it, ask all workers that may have it."""
    WITHDRAW = "withdraw"
    """No worker has received the call. Ask all workers about it again, and to promise never to handle it."""
    NEVER_RECEIVED = "never received"
    """The call was lost on its way. It can be sent again, if the directory lists no worker that has not promised."""
    LOST = "lost"
    """No worker will answer it, and it may have been handled."""


class Judge:
    """Decides about the calls of one runtime, from the answers of the workers. All times are passed in."""

    def __init__(self, lost_after: float, rtt: RoundTripTime) -> None:
        self._lost_after = lost_after
        self._rtt = rtt
        self.asked: dict[str, AskedWorker] = {}
        """The workers that are asked about calls, by their ids."""

    def worker(self, worker_id: str) -> AskedWorker:
        """Return the state of a worker. It is created if the worker was not asked before."""
        asked = self.asked.get(worker_id)
        if asked is None:
            asked = self.asked[worker_id] = AskedWorker()
        return asked

    def reconsider(self, now: float) -> None:
        """Count the silence of every worker from now: this runtime was disconnected, or its event loop was blocked."""
        for asked in self.asked.values():
            asked.reconnected(now)

    def is_lost(self, worker_id: str, now: float, settled: bool) -> bool:
        """True if a worker is lost; False if it was never asked. See `AskedWorker.is_lost`."""
        asked = self.asked.get(worker_id)
        return asked is not None and asked.is_lost(now, self._lost_after + self._rtt.allowance, settled)

    def verdict(
        self,
        call: PendingCall,
        workers: Sequence[str],
        now: float,
        *,
        all_stayed: bool | None,
        up_since: float,
        settled: bool,
    ) -> Verdict:
        """Return what to do about a call that is accepted, or older than ``check_after``.

        Args:
            call: The call. Its `PendingCall.holders` are set once they are known.
            workers: The live workers that may have it, according to the directory.
            now: The current time.
            all_stayed: True if no worker has left since the call was sent; None if that is not known yet.
            up_since: The time since which the connection has been up.
            settled: True if every other worker has had time to reconnect.
        """
        if call.accepted_by is not None:
            return Verdict.LOST if self.is_lost(call.accepted_by, now, settled) else Verdict.ASK
        if not workers:
            return Verdict.CHECK
        if now - call.watched_from < FIRST_QUESTION:
            return Verdict.WAIT
        all_stayed = self.stayed(call, all_stayed, now, up_since)
        answers = min(call.never_received_by.get(worker_id, 0) for worker_id in workers)
        if answers and all_stayed is not False:
            all_promised = call.promised_by.issuperset(workers)
            if all_stayed and all_promised and answers >= _CONVINCED:
                return Verdict.NEVER_RECEIVED
            awaited = all_stayed is None or not all_promised
            if awaited and not any(self.is_lost(worker_id, now, settled) for worker_id in workers):
                call.withdraw_since = now if call.withdraw_since is None else call.withdraw_since
                if now - call.withdraw_since <= self._lost_after + self._rtt.allowance:
                    return Verdict.WITHDRAW
        if call.holders is None and now - max(call.sent_at, up_since) >= _KNOWN_WITHIN + self._rtt.allowance:
            call.holders = frozenset(workers)
        if call.holders is not None and all(
            self._ruled_out(call, worker_id, now, settled) for worker_id in workers if worker_id in call.holders
        ):
            return Verdict.LOST
        return Verdict.ASK

    def stayed(self, call: PendingCall, all_stayed: bool | None, now: float, up_since: float) -> bool | None:
        """Return ``all_stayed``, or False if it has been unknown for too long. For the arguments see `verdict`."""
        if all_stayed is None and now - max(call.sent_at, up_since) > self._lost_after + self._rtt.allowance:
            return False
        return all_stayed

    def _ruled_out(self, call: PendingCall, worker_id: str, now: float, settled: bool) -> bool:
        return call.unknown_to.get(worker_id, 0) >= _CONVINCED or self.is_lost(worker_id, now, settled)
