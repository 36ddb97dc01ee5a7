"""Requests to a JetStream bucket: they are repeated where that helps, and their failures become natsrt's errors."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TypeVar

import nats.errors
import nats.js.errors

from natsrt.errors import JetStreamRequired, NatsrtError
from natsrt.transport.connection import Connection, Refusal

OPEN = "open"
READ = "read"
WRITE = "write to"

_NEEDED = {
    OPEN: ("$js.api.info", "$js.api.stream.info.", "$js.api.stream.create."),
    READ: ("$js.api.consumer.", "$js.api.direct.", "$js.api.stream.msg.get."),
    WRITE: ("$kv.", "$js.api.stream.purge."),
}
"""Starts of the subjects that an operation publishes to, in lower case. The server does not answer a request that it
refuses to publish; it reports the refused subject only, and this tells which request it concerns."""
_OF_THE_ACCOUNT = "$js.api.info"
"""The one subject of `OPEN` that does not name a bucket."""
_NO_STREAM = 10059
"""JetStream's error code for a stream that does not exist."""
_LOOK_FOR_BUCKET = 1.0
"""Seconds within which it must be known whether the bucket exists, after a request to it has failed."""
_NO_JETSTREAM = 10039
"""JetStream's error code for "not enabled for this account"."""
_PAUSE = 0.2
"""Seconds between two attempts."""
_LOOK_EVERY = 0.1
"""Seconds between two looks for requests that are late."""
_SILENT = "JetStream does not answer"

T = TypeVar("T")


class _Attempt:
    """One attempt of a request, in the task that makes it.

    ``subject`` is the subject that the request publishes to; None for all that the operation needs. ``until`` is the
    event loop's time at which the attempt ends. It works like ``asyncio.timeout``, but without a timer of its own,
    which would cost more than the request itself.
    """

    __slots__ = ("_cancelling", "_ended", "_task", "denied", "operation", "subject", "until")

    def __init__(self, operation: str, subject: str | None, until: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._ended = False
        self.operation = operation
        self.subject = subject
        self.until = until
        self.denied: Refusal | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises TimeoutError if `end` alone cancelled the request."""
        if self._ended and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def end(self) -> None:
        """Cancel the request, which then fails with TimeoutError."""
        if not self._ended:
            self._ended = True
            self._task.cancel()


class BucketRequests:
    """Runs the requests to one bucket. A connection `Listener`.

    A request is repeated for ``retry_for`` seconds. If the bucket cannot be reached until then,
    ``unavailable(operation, reason)`` makes the error. ``subscribed`` are the starts of the subjects whose refusal
    makes every request fail: inboxes, a feed. ``patient``: requests also wait that long for a lost connection, and
    those that were under way are sent again after a reconnect. ``make_again`` makes the bucket if it is gone, and
    returns whether it was gone; None: a bucket that is gone is an error.
    """

    def __init__(
        self,
        connection: Connection,
        bucket: str,
        unavailable: Callable[[str, str], NatsrtError],
        *,
        subscribed: tuple[str, ...],
        retry_for: float,
        patient: bool = False,
        make_again: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self._connection = connection
        self._name = bucket
        self._bucket = bucket.lower()
        self._unavailable = unavailable
        self._subscribed = tuple(subject.lower() for subject in subscribed)
        self._retry_for = retry_for
        self._patient = patient
        self._make_again = make_again
        self._running: dict[_Attempt, None] = {}
        self._looking: asyncio.TimerHandle | None = None
        connection.on_denied(self._on_denied)
        connection.add_listener(self)

    def connection_lost(self) -> None:
        pass

    def connection_made(self) -> None:
        if self._patient:  # requests that were sent on the lost connection get no answer any more
            for attempt in self._running:
                attempt.end()

    def _end_late(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for attempt in self._running:
            if attempt.until <= now:
                attempt.end()
        self._looking = loop.call_later(_LOOK_EVERY, self._end_late) if self._running else None

    def _on_denied(self, denied: Refusal) -> bool:
        refused, raised = denied.subject.lower(), False
        for attempt in self._running:
            if attempt.denied is None and (refused.startswith(self._subscribed) or self._needs(attempt, refused)):
                attempt.denied = denied
                attempt.end()
                raised = True
        return raised

    def _needs(self, attempt: _Attempt, refused: str) -> bool:
        if attempt.subject is not None:
            return refused == attempt.subject.lower() or refused.startswith(f"{attempt.subject.lower()}.")
        ours = refused == _OF_THE_ACCOUNT or self._bucket in refused
        return ours and refused.startswith(_NEEDED[attempt.operation])

    async def run(
        self,
        operation: str,
        request: Callable[[], Awaitable[T]],
        *,
        subject: str | None = None,
        within: float | None = None,
    ) -> T:
        """Run ``request``, and repeat it for some seconds if the cause of its failure may pass, as a leader's election.

        It may be repeated after it was carried out, when the answer was lost. ``subject``: the only subject, with those
        below it, that the request publishes to; None for any that the operation needs. ``within``: seconds for one
        attempt; None if ``request`` limits its time itself.

        Raises `PermissionDenied`, `JetStreamRequired`, `ServerUnreachable` or what ``unavailable`` makes. Other
        exceptions of ``request`` are raised as they are.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self._retry_for
        while True:
            if self._patient and not self._connection.connected:
                await self._connection.wait_connected(max(0.0, until - loop.time()))
            attempt = _Attempt(operation, subject, math.inf if within is None else loop.time() + within)
            try:
                return await self._attempt(attempt, request)
            except NatsrtError:  # some are an OSError or a TimeoutError too
                raise
            except (nats.errors.Error, OSError, TimeoutError) as error:
                problem = self._problem(attempt, error)
            if await self._was_gone(operation) and loop.time() <= until:
                continue
            if loop.time() > until or not (self._patient or self._connection.connected):
                if self._connection.refused:  # the server does not accept the connection, and says why
                    raise self._connection.unreachable(0.0)
                raise self._unavailable(operation, problem)
            await asyncio.sleep(_PAUSE)

    async def _was_gone(self, operation: str) -> bool:
        """Make the bucket if it is gone. Returns whether it was."""
        if self._make_again is None or operation == OPEN or not self._connection.connected:
            return False
        try:
            async with asyncio.timeout(_LOOK_FOR_BUCKET):
                return await self._make_again()
        except (NatsrtError, nats.errors.Error, OSError, TimeoutError):  # the next attempt finds out what is wrong
            return False

    async def _attempt(self, attempt: _Attempt, request: Callable[[], Awaitable[T]]) -> T:
        """Run ``request`` once."""
        with attempt:
            self._running[attempt] = None
            if self._looking is None:
                self._looking = asyncio.get_running_loop().call_later(_LOOK_EVERY, self._end_late)
            try:
                return await request()
            finally:
                del self._running[attempt]

    def _problem(self, attempt: _Attempt, error: Exception) -> str:
        """Why an attempt failed, if it is worth another one. Raises what ends the request."""
        if isinstance(error, nats.js.errors.ServiceUnavailableError):
            if attempt.operation == OPEN:
                raise JetStreamRequired(self._connection.server) from None
            return error.description or _SILENT
        if isinstance(error, nats.js.errors.NoStreamResponseError | TimeoutError):
            if attempt.denied is not None:
                raise attempt.denied from None
            return _SILENT
        if isinstance(error, nats.js.errors.APIError):
            if error.err_code == _NO_JETSTREAM:
                raise JetStreamRequired(self._connection.server) from None
            if error.err_code == _NO_STREAM and self._make_again is not None and attempt.operation != OPEN:
                return f"the bucket {self._name} is gone"
            if error.code is not None and error.code < 500:
                raise self._unavailable(attempt.operation, error.description or str(error)) from error
            return error.description or str(error)
        return str(error) or type(error).__name__
