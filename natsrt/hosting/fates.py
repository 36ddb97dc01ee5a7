"""What this worker knows of the calls it received: the worker's half of `natsrt.transport.calls`.

A call that is still unanswered ``accept_after`` seconds after its receipt, running or queued, is accepted: its caller
learns whom to ask. Replies are kept for a while, because a reply can be lost between two reconnects: those of accepted
calls for ``keep_replies`` seconds, the last few of the others as long as there is room.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import orjson

from natsrt.errors import NatsrtError
from natsrt.options import Options
from natsrt.wire import envelope

logger = logging.getLogger("natsrt.hosting")

_SWEEP = 0.05
_OTHERS_AT_MOST = 2048
_OTHERS_BYTES = 8 * 1024 * 1024
_ALWAYS = 1e9
"""Seconds for which a worker remembers that has forgotten nothing: it never received what it does not know, and what
came before its start no less."""

Publish = Callable[..., Awaitable[None]]


class Reply(NamedTuple):
    body: bytes
    headers: dict[str, str] | None


class _Last:
    """The last few replies, in the order in which they were given. Cheap to add to; rarely searched."""

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count, self._max_bytes = max_count, max_bytes
        self._bytes = 0
        self._replies: deque[tuple[str, bytes, dict[str, str] | None, float]] = deque()
        self.forgot = float("-inf")
        """The latest arrival of a call whose reply is forgotten."""

    def add(self, call_id: str, body: bytes, headers: dict[str, str] | None, arrived: float) -> None:
        self._replies.append((call_id, body, headers, arrived))
        self._bytes += len(body)
        while self._bytes > self._max_bytes or len(self._replies) > self._max_count:
            _, forgotten, _, arrived = self._replies.popleft()
            self._bytes -= len(forgotten)
            self.forgot = max(self.forgot, arrived)

    def get(self, call_id: str) -> Reply | None:
        for known, body, headers, _ in reversed(self._replies):
            if known == call_id:
                return Reply(body, headers)
        return None


class _Kept:
    """Replies by call id, for a time; the oldest are forgotten first."""

    def __init__(self, max_bytes: int, max_age: float) -> None:
        self._max_bytes, self._max_age = max_bytes, max_age
        self._bytes = 0
        self._replies: OrderedDict[str, tuple[float, Reply]] = OrderedDict()
        self.forgot = float("-inf")
        """The latest end of a call whose reply is forgotten."""

    def add(self, call_id: str, reply: Reply, now: float) -> None:
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

    def get(self, call_id: str) -> Reply | None:
        kept = self._replies.get(call_id)
        return None if kept is None else kept[1]


class Pending:
    """A call that was received and is not answered yet."""

    __slots__ = ("accept_to", "accepted", "arrived", "call_id")

    def __init__(self, call_id: str, arrived: float) -> None:
        self.call_id = call_id
        self.arrived = arrived
        self.accept_to: str | None = None
        """Where to accept it; None until its envelope is read, and for plain calls, which are never accepted."""
        self.accepted = False


class Fates:
    """The calls of one worker, running and lately finished."""

    def __init__(self, options: Options, worker_id: str, publish: Publish) -> None:
        self._accept_after = options.accept_after
        self._worker_id = worker_id
        self._publish = publish
        self._running: dict[str, Pending] = {}
        self._aging: deque[Pending] = deque()
        self._kept = _Kept(options.keep_replies_bytes, options.keep_replies)
        self._others = _Last(_OTHERS_AT_MOST, _OTHERS_BYTES)
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def running(self) -> int:
        return len(self._running)

    def begin(self, call_id: str, now: float) -> Pending:
        """A call arrived. Not async and cheap: it runs in the intake."""
        pending = Pending(call_id, now)
        self._running[call_id] = pending
        self._aging.append(pending)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SWEEP, self._sweep)
        return pending

    def end(self, pending: Pending, body: bytes, headers: dict[str, str] | None) -> None:
        """The call is answered with ``body``; the reply may still be asked for."""
        self._running.pop(pending.call_id, None)
        if pending.accepted:
            self._kept.add(pending.call_id, Reply(body, headers), asyncio.get_running_loop().time())
        else:
            self._others.add(pending.call_id, body, headers, pending.arrived)

    def forget(self, pending: Pending) -> None:
        """The call was refused before anything was done for it."""
        self._running.pop(pending.call_id, None)

    def accept_all(self) -> None:
        """Accept every call that is not answered yet: the worker is about to leave the registry."""
        self._accept_older_than(float("inf"))

    def _sweep(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        self._accept_older_than(loop.time() - self._accept_after)
        if self._aging:
            self._timer = loop.call_later(_SWEEP, self._sweep)

    def _accept_older_than(self, moment: float) -> None:
        accepted: dict[str, list[str]] = {}
        unread: list[Pending] = []
        while self._aging and self._aging[0].arrived <= moment:
            pending = self._aging.popleft()
            if pending.call_id not in self._running:
                continue
            if pending.accept_to is None:
                unread.append(pending)  # its envelope was not looked at yet, or it has none
            else:
                pending.accepted = True
                accepted.setdefault(pending.accept_to, []).append(pending.call_id)
        self._aging.extendleft(reversed(unread))
        for accept_to, calls in accepted.items():
            self._spawn(self._accept(accept_to, calls))

    async def _accept(self, accept_to: str, calls: list[str]) -> None:
        data = orjson.dumps({"worker": self._worker_id, "calls": calls})
        await self._publish(accept_to, envelope.encode(envelope.ACCEPTED, '"id":"accepted","source":"/"', data))

    def asked(self, calls: list[str], reply_to: str) -> None:
        """Somebody asks what became of ``calls``. Finished ones are answered again first.

        The answer says for how many seconds back this worker remembers every call: what is unknown to it and younger
        was never received.
        """
        running, unknown, finished = [], [], []
        for call_id in calls:
            if call_id in self._running:
                self._running[call_id].accepted = True  # its caller now knows whom to ask
                running.append(call_id)
            elif (reply := self._kept.get(call_id) or self._others.get(call_id)) is not None:
                finished.append(call_id)
                self._spawn(self._publish(call_id, reply.body, headers=reply.headers))
            else:
                unknown.append(call_id)
        forgot = max(self._others.forgot, self._kept.forgot)
        data = orjson.dumps(
            {
                "worker": self._worker_id,
                "running": running,
                "finished": finished,
                "unknown": unknown,
                "remembers": min(asyncio.get_running_loop().time() - forgot, _ALWAYS),
            }
        )
        self._spawn(self._publish(reply_to, envelope.encode(envelope.REPLY, '"id":"fate-r","source":"/"', data)))

    def _spawn(self, work: Awaitable[None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except NatsrtError as error:
                logger.warning("an answer about calls could not be sent: %s", error)

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Stop accepting; what is being sent is sent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._aging.clear()
        self._running.clear()
        await asyncio.gather(*self._tasks, return_exceptions=True)
