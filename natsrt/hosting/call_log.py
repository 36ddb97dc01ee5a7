"""The calls that this worker received, and their replies. The caller's side is `natsrt.transport.calls`.

If a call is not answered within ``accept_after`` seconds after it arrived, whether it is running or queued, the worker
accepts it: it tells the caller which worker has the call. Replies are kept for some time, because a reply can be lost
during a reconnect. Replies to accepted calls are kept for ``keep_replies`` seconds. Of the others, the most recent ones
are kept as long as there is room.

A caller that finds that a call was lost on its way sends it again. The lost copy may still be on its way, on a
connection that stalls, so a worker promises not to handle it: see `natsrt.hosting.withdrawn`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Sequence

import orjson

from natsrt.agents.inbound import Answer, LoggedCall
from natsrt.background import BackgroundTasks
from natsrt.hosting.withdrawn import WithdrawnCalls
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire import envelope

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_SWEEP = 0.05
"""Seconds between two checks for calls to accept. It is short compared with ``accept_after``. One timer serves all
calls."""
_LAST_AT_MOST = 2048
"""Maximum number of replies to calls that were not accepted. It is about 0.1 s of full load; within that time the
callers receive the replies or ask for them."""
_LAST_BYTES = 8 * 1024 * 1024
"""Maximum size of these replies, in bytes."""
_ALWAYS = 1e9
"""Reported as ``remembers`` (seconds) while no reply has been evicted. A call that is not in the log was then never
received, not even before the start."""


class _LastReplies:
    """The most recent replies, in the order in which they were sent. Adding is cheap; searching is slow, but rare."""

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count, self._max_bytes = max_count, max_bytes
        self._bytes = 0
        self._replies: deque[tuple[str, bytes, dict[str, str] | None, float]] = deque()
        self.forgot = float("-inf")
        """The event loop's time at which the latest call arrived whose reply was evicted."""

    def add(self, call_id: str, body: bytes, headers: dict[str, str] | None, arrived: float) -> None:
        self._replies.append((call_id, body, headers, arrived))
        self._bytes += len(body)
        while self._bytes > self._max_bytes or len(self._replies) > self._max_count:
            _, forgotten, _, arrived = self._replies.popleft()
            self._bytes -= len(forgotten)
            if arrived > self.forgot:  # max() takes longer, and this is done for each reply
                self.forgot = arrived

    def get(self, call_id: str) -> Answer | None:
        for known, body, headers, _ in reversed(self._replies):
            if known == call_id:
                return Answer(body, headers)
        return None


class _KeptReplies:
    """Replies by call id, kept for ``max_age`` seconds and up to ``max_bytes``. The oldest are evicted first."""

    def __init__(self, max_bytes: int, max_age: float) -> None:
        self._max_bytes, self._max_age = max_bytes, max_age
        self._bytes = 0
        self._replies: OrderedDict[str, tuple[float, Answer]] = OrderedDict()
        self.forgot = float("-inf")
        """The event loop's time at which the latest call ended whose reply was evicted."""

    def add(self, call_id: str, reply: Answer, now: float) -> None:
        if call_id in self._replies:
            self._bytes -= len(self._replies.pop(call_id)[1].body)
        self._replies[call_id] = (now, reply)
        self._bytes += len(reply.body)
        while self._replies and (
            self._bytes > self._max_bytes or now - next(iter(self._replies.values()))[0] > self._max_age
        ):
            ended, forgotten = self._replies.popitem(last=False)[1]
            self._bytes -= len(forgotten.body)
            self.forgot = max(self.forgot, ended)

    def get(self, call_id: str) -> Answer | None:
        kept = self._replies.get(call_id)
        return None if kept is None else kept[1]


class CallLog:
    """The calls of one worker that are not answered yet, or were answered recently."""

    def __init__(self, connection: Connection, options: Options, worker_id: str) -> None:
        self._connection = connection
        self._accept_after = options.accept_after
        self._worker_id = worker_id
        self._running: dict[str, LoggedCall] = {}
        self._aging: deque[LoggedCall] = deque()
        """The calls that may have to be accepted, oldest first."""
        self._kept = _KeptReplies(options.keep_replies_bytes, options.keep_replies)
        self._last = _LastReplies(_LAST_AT_MOST, _LAST_BYTES)
        self.withdrawn: WithdrawnCalls = WithdrawnCalls()
        """The calls that this worker has promised not to handle."""
        self._timer: asyncio.TimerHandle | None = None
        self._tasks = BackgroundTasks(logger, "an answer about calls could not be sent")

    def begin(self, call_id: str, now: float) -> LoggedCall | None:
        """Add a call that arrived at ``now``, by the clock of the event loop in seconds.

        Returns None if the call was withdrawn.

        Called in the read loop, so it is cheap and does not block.
        """
        if call_id in self.withdrawn:
            return None
        call = LoggedCall(call_id, now)
        self._running[call_id] = call
        self._aging.append(call)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SWEEP, self._sweep)
        return call

    def end(self, call: LoggedCall, answer: Answer) -> None:
        """Record the answer to a call. Its caller may still ask for it."""
        for call_id in (call.call_id, *call.also) if call.also else (call.call_id,):
            self._running.pop(call_id, None)
            if call.accepted:
                self._kept.add(call_id, answer, asyncio.get_running_loop().time())
            else:
                self._last.add(call_id, answer.body, answer.headers, call.arrived)

    def forget(self, call: LoggedCall) -> None:
        """Remove a call that was refused before it was handled, as if it had never been received."""
        for call_id in (call.call_id, *call.also):
            self._running.pop(call_id, None)

    def join(self, call: LoggedCall) -> bool:
        """Give a call the answer of a former copy of it, if one is or was handled here. Returns False if none is.

        Former copies that have not arrived are withdrawn then.
        """
        now = asyncio.get_running_loop().time()
        for former in call.supersedes:
            if (running := self._running.get(former)) is not None:
                running.also += (call.call_id,)
                self._running[call.call_id] = running
                return True
            if (reply := self._reply_to(former)) is not None:
                self._running.pop(call.call_id, None)
                self._kept.add(call.call_id, reply, now)
                self._tasks.spawn(self._send(call.call_id, reply))
                return True
        self.withdrawn.name(call.supersedes, now)
        return False

    def _reply_to(self, call_id: str) -> Answer | None:
        return self._kept.get(call_id) or self._last.get(call_id)

    def abandoned(self, calls: Iterable[str]) -> None:
        """The callers of these calls do not wait any more. Those that have not started are not handled."""
        for call_id in calls:
            if (call := self._running.get(call_id)) is not None:
                call.abandon()

    def accept_all(self) -> None:
        """Accept every call that is not answered yet. Used before the worker leaves the registry."""
        self._accept_older_than(float("inf"))

    def _sweep(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        self._accept_older_than(loop.time() - self._accept_after)
        if self._aging:
            self._timer = loop.call_later(_SWEEP, self._sweep)

    def _accept_older_than(self, moment: float) -> None:
        accepted: dict[str, list[str]] = {}
        unread: list[LoggedCall] = []
        while self._aging and self._aging[0].arrived <= moment:
            call = self._aging.popleft()
            if call.call_id not in self._running:
                continue
            if call.accept_to is None:
                unread.append(call)  # its envelope has not been read yet, or it has no acceptance subject
            else:
                call.accepted = True
                accepted.setdefault(call.accept_to, []).append(call.call_id)
        self._aging.extendleft(reversed(unread))
        for accept_to, calls in accepted.items():
            self._tasks.spawn(self._accept(accept_to, calls))

    async def _accept(self, accept_to: str, calls: list[str]) -> None:
        data = orjson.dumps({"worker": self._worker_id, "calls": calls})
        await self._connection.publish(
            accept_to, envelope.encode(envelope.ACCEPTED, '"id":"accepted","source":"/"', data)
        )

    def asked(self, calls: Sequence[str], reply_to: str, withdraw: Collection[str] = ()) -> None:
        """Tell the sender of a question, on ``reply_to``, the state of each of ``calls``.

        The replies of finished calls are sent again first. The answer contains the number of seconds for which the log
        is complete (``remembers``): a call that is younger and not in the log was never received. Of the calls that are
        not in the log, those in ``withdraw`` will not be handled if they arrive later, as far as there is room for
        promises.
        """
        running, unknown, finished = [], [], []
        for call_id in calls:
            if call_id in self._running:
                self._running[call_id].accepted = True  # its caller now knows which worker has it
                running.append(call_id)
            elif (reply := self._reply_to(call_id)) is not None:
                finished.append(call_id)
                self._tasks.spawn(self._send(call_id, reply))
            else:
                unknown.append(call_id)
        forgot = max(self._last.forgot, self._kept.forgot)
        now = asyncio.get_running_loop().time()
        self.withdrawn.promise([call_id for call_id in unknown if call_id in withdraw], now)
        data = orjson.dumps(
            {
                "worker": self._worker_id,
                "running": running,
                "finished": finished,
                "unknown": unknown,
                "withdrawn": [call_id for call_id in unknown if self.withdrawn.has_promised(call_id)],
                "remembers": min(now - forgot, _ALWAYS),
            }
        )
        answer = Answer(envelope.encode(envelope.REPLY, '"id":"fate-r","source":"/"', data))
        self._tasks.spawn(self._send(reply_to, answer))

    async def _send(self, subject: str, answer: Answer) -> None:
        await self._connection.publish(subject, answer.body, headers=answer.headers)

    async def stop(self) -> None:
        """Stop accepting calls. Returns when the answers that are being sent have been sent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._aging.clear()
        self._running.clear()
        await self._tasks.wait()
