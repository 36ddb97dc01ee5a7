"""Calls: NATS requests that always complete.

Rules:

1. Every call has its own reply subject. A message on that subject belongs to that call only.
2. "No responders" is used only to react faster. No decision depends on it alone, because any tap (``nats sub '>'``)
   prevents it.
3. A call is sent again only if it was not handled, and never will be: there was no subscriber, every worker was busy,
   or the call was lost on its way and the workers have promised not to handle it if it arrives after all. `Attempts`
   decides how often and for how long. A copy names those that it supersedes, in a header, for workers that know of no
   promise.
4. A call that takes long is watched: see `natsrt.transport.call_watch`.

Every wait ends: with a reply or an error, because of ``offline_timeout`` or ``plain_timeout``, or because of the
caller's own limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from autogen_core import AgentId
from nats.aio.msg import Msg

from natsrt.errors import WorkerLost
from natsrt.options import Options
from natsrt.transport.call_judgement import PendingCall
from natsrt.transport.call_watch import CallWatch, Directory, NeverReceived, stopped
from natsrt.transport.connection import Connection
from natsrt.transport.inbox import Inbox, is_nobody
from natsrt.wire.envelope import SUPERSEDES_HEADER
from natsrt.wire.failures import is_refusal

_RESENDS = 3
"""How often a call that was lost on its way is sent again. Each attempt takes about a second, so all attempts together
take less than 5 s."""
_FIRST_PAUSE = 0.02
"""Seconds before a call is sent again for the first time. In a cluster, all servers have a new subscription within
milliseconds."""
_NOBODY_PAUSE = 0.25
"""Maximum pause between two attempts if there is no subscriber, in seconds."""
_BUSY_PAUSE = 0.05
"""Maximum pause between two attempts if a worker is busy, in seconds. It is short because a queue group selects a
worker at random, so it may take several attempts to reach one that has room."""

Link = Callable[[asyncio.Future[Any]], None]
"""Cancels a future when the caller's cancellation token is cancelled."""


class Destination(Protocol):
    """The destination of messages for a keyed agent. Until the agent's owner is known, the messages wait in order."""

    subject: str

    def may_send(self) -> bool:
        """True if a message may be sent now. Also extends the lease, as if one had been sent."""

    def join(self) -> asyncio.Future[None]:
        """Take the next place in the queue of messages now. Returns the turn to pass to `wait`."""

    async def wait(self, turn: asyncio.Future[None]) -> None:
        """Wait until the message of ``turn`` may be sent. It must then be sent at once."""

    def lost(self) -> None:
        """Record that the owner must be looked up again, because a message did not reach it or was refused."""

    def owner_lost(self) -> None:
        """Record that the worker that owns the agent was lost, and with it all agents that it owned."""


class Attempts:
    """Counts the attempts of one call, and decides whether another one follows. No I/O: times are passed in."""

    __slots__ = ("_options", "_pause", "_refused_at", "_times_lost")

    def __init__(self, options: Options) -> None:
        self._options = options
        self._refused_at: float | None = None
        """The time of the first refusal since the call was sent, or last lost on its way; None if there was none."""
        self._times_lost = 0
        self._pause = _FIRST_PAUSE

    def lost(self) -> bool:
        """Record that the call was lost on its way. Returns True if it is to be sent again."""
        self._times_lost += 1
        self._refused_at = None
        return self._times_lost <= _RESENDS

    def nobody(self, now: float) -> float | None:
        """Record that there was no subscriber. Returns the seconds to wait before sending again; None to give up."""
        if now - self._since(now) + self._pause > self._options.no_responders_retry:
            return None
        return self._next_pause(_NOBODY_PAUSE)

    def busy(self, now: float) -> float | None:
        """Record that a worker was busy. Returns the seconds to wait before sending again; None to give up."""
        if now - self._since(now) > self._options.busy_retry:
            return None
        return self._next_pause(_BUSY_PAUSE)

    def _since(self, now: float) -> float:
        if self._refused_at is None:
            self._refused_at = now
        return self._refused_at

    def _next_pause(self, longest: float) -> float:
        pause, self._pause = self._pause, min(self._pause * 2, longest)
        return pause


class Calls:
    """Sends the calls of one runtime, and returns their replies."""

    def __init__(
        self, connection: Connection, inbox: Inbox, watch: CallWatch, options: Options, directory: Directory
    ) -> None:
        self._connection = connection
        self._inbox = inbox
        self._watch = watch
        self._options = options
        self._directory = directory
        self._open = False
        self.accept_to: str = ""
        """The subject on which workers accept this runtime's calls."""

    @property
    def pending(self) -> int:
        """Number of calls that have not completed."""
        return len(self._watch.pending)

    def awaited(self) -> Iterator[tuple[str, object]]:
        """Yield the reply subject and ``awaited_by`` of each pending call that was sent with ``awaited_by``."""
        for reply, call in self._watch.pending.items():
            if call.awaited_by is not None:
                yield reply, call.awaited_by

    async def start(self) -> None:
        self._watch.start()
        self.accept_to = self._watch.accept_to
        self._open = True

    async def stop(self) -> None:
        """Stop. Pending calls fail with `WorkerLost`, and so do calls that are made from now on."""
        self._open = False
        await self._watch.stop()

    async def call(
        self,
        recipient: AgentId,
        body: bytes,
        *,
        subject: str | None = None,
        destination: Destination | None = None,
        sent: Callable[[], None] | None = None,
        link: Link | None = None,
        headers: dict[str, str] | None = None,
        awaited_by: object | None = None,
    ) -> Msg:
        """Send ``body``, and return the reply, which may also be an error or a refusal.

        Cancelling this coroutine only stops the wait for the reply. To cancel the handler, use a cancellation token.

        Args:
            recipient: The agent that is called.
            body: The message, ready to be sent.
            subject: The subject to send to; None for the subject that the directory gives for ``recipient``.
            destination: The destination of a keyed agent, which determines the subject; None for other agents.
            sent: Called when the message is in the client's buffer, or in the queue of its destination. It may be
                called more than once. None: no function is called.
            link: Called with every future that is awaited; None: no function is called.
            headers: The headers of a plain call; None for none.
            awaited_by: The object that waits for the reply, listed by `awaited`; None: the call is not listed.

        Raises:
            UndeliveredCall: There is no reply. The subclass of the error says why.
            ServerUnreachable, PermissionDenied, MessageTooLarge: The call could not be sent.
        """
        attempts: Attempts | None = None
        superseded = "" if headers is None else headers.get(SUPERSEDES_HEADER, "")
        while True:
            if not self._open:  # no reply would arrive
                raise stopped(recipient)
            if destination is not None and not destination.may_send():
                await _wait_for_turn(destination, sent, link)
            call = self._begin(recipient, subject, destination, link, awaited_by)
            try:
                if not call.future.done():  # otherwise its token is already cancelled
                    sending = {**(headers or {}), SUPERSEDES_HEADER: superseded} if superseded else headers
                    await self._connection.publish(call.subject, body, reply=call.reply, headers=sending)
                if sent is not None:
                    sent()
                reply = await call.future
            except WorkerLost:
                if destination is not None:
                    destination.owner_lost()
                raise
            except NeverReceived:
                if destination is not None:
                    destination.lost()
                attempts = attempts or Attempts(self._options)
                if not attempts.lost():
                    raise WorkerLost(str(recipient), None, "the call was repeatedly lost on its way") from None
                superseded = f"{superseded} {call.reply}".lstrip()
                continue
            finally:
                self._watch.remove(call)
            refused = is_refusal(reply.headers, reply.data)
            if not refused and reply.headers is None:
                return reply
            attempts = attempts or Attempts(self._options)
            if (pause := await self._pause(reply, refused, recipient, destination, attempts)) is None:
                return reply
            await asyncio.sleep(pause)

    def _begin(
        self,
        recipient: AgentId,
        subject: str | None,
        destination: Destination | None,
        link: Link | None,
        awaited_by: object | None,
    ) -> PendingCall:
        """Return a call that is about to be sent, with a new reply subject. `CallWatch.remove` must be called later."""
        loop = asyncio.get_running_loop()
        if destination is not None:
            subject = destination.subject
        elif subject is None:
            subject = self._directory.subject_of(recipient)
        future: asyncio.Future[Msg] = loop.create_future()
        if link is not None:
            link(future)
        call = PendingCall(self._inbox.new_subject(), subject, recipient, future, loop.time(), awaited_by)
        self._watch.add(call)
        return call

    async def _pause(
        self, reply: Msg, refused: bool, recipient: AgentId, destination: Destination | None, attempts: Attempts
    ) -> float | None:
        """Return the seconds after which to send the call again; None if ``reply`` is the result.

        Raises an error if there was no subscriber and the call cannot be sent again.
        """
        now = asyncio.get_running_loop().time()
        if is_nobody(reply):
            if destination is not None:
                destination.lost()
            failure = await self._directory.verify(recipient)
            if failure is not None:
                raise failure
            workers = self._directory.workers_of(recipient)
            for worker_id in workers:
                self._directory.suspect(worker_id)
            pause = attempts.nobody(now)
            if pause is None:
                raise WorkerLost(str(recipient), workers[0] if workers else None, "it does not listen")
            return pause
        if not refused or (pause := attempts.busy(now)) is None:
            return None
        if destination is not None:  # its owner may have refused because it no longer owns the agent
            destination.lost()
        return pause


async def _wait_for_turn(destination: Destination, sent: Callable[[], None] | None, link: Link | None) -> None:
    turn = destination.join()
    if link is not None:
        link(turn)
    if sent is not None:
        sent()
    await destination.wait(turn)
