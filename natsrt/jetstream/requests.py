"""Requests to a JetStream bucket: they are repeated where that helps, and their failures become natsrt's errors."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TypeVar

import nats.errors
import nats.js.errors

from natsrt.errors import JetStreamFull, JetStreamRequired, NatsrtError
from natsrt.jetstream.buckets import purge
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.limits import CONSUMERS, Limit, explained, limit_reached
from natsrt.transport.connection import Connection, Refusal

OPEN = "open"
READ = "read"
WRITE = "write to"

_NEEDED = {
    OPEN: (
        "$js.api.info",
        "$js.api.stream.info.",
        "$js.api.stream.create.",
        "$js.api.stream.update.",
        "$js.api.stream.names",
    ),
    READ: (
        "$js.api.consumer.create.",
        "$js.api.consumer.info.",
        "$js.api.consumer.msg.next.",
        "$js.api.direct.",
        "$js.api.stream.msg.get.",
    ),
    WRITE: ("$kv.", "$js.api.stream.purge."),
}
"""Starts of the subjects that an operation publishes to, in lower case. The server does not answer a request that it
refuses to publish; it reports the refused subject only, and this tells which request it concerns."""
_OF_THE_ACCOUNT = ("$js.api.info", "$js.api.stream.names")
"""The subjects of `OPEN` that do not name a bucket."""
NO_STREAM = 10059
"""JetStream's error code for a stream that does not exist."""
_LOOK_FOR_BUCKET = 1.0
"""Seconds within which it must be known whether the bucket exists, after a request to it has failed."""
_LOOK_FOR_CAUSE = 1.0
"""Seconds within which the server must say why it does not store anything."""
_REPORTED_FOR = 60.0
"""Seconds for which a refusal because of a limit is reported."""
NOBODYS_KEY = "-"
"""A key that nothing is stored under."""
NO_JETSTREAM = (10039, 10076)
"""JetStream's error codes for "not enabled for this account", and "not enabled"."""
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
    makes every request fail: inboxes, a feed. ``domain``: where the bucket is. ``patient``: requests also wait that
    long for a lost connection, and those that were under way are sent again after a reconnect. ``make_again`` makes the
    bucket if it is gone, and returns whether it was gone; None: a bucket that is gone is an error. ``stream``: the name
    of a stream that is no bucket, and the start of its subjects; None for a bucket.
    """

    SILENT = _SILENT
    """The reason if there was no answer at all."""

    def __init__(
        self,
        connection: Connection,
        bucket: str,
        unavailable: Callable[[str, str], NatsrtError],
        *,
        subscribed: tuple[str, ...],
        domain: Domain,
        retry_for: float,
        patient: bool = False,
        make_again: Callable[[], Awaitable[bool]] | None = None,
        stream: tuple[str, str] | None = None,
    ) -> None:
        self._connection = connection
        self._stream, self._entries = stream or (f"KV_{bucket}", f"$KV.{bucket}")
        self._name = bucket
        self._bucket = bucket.lower()
        self._unavailable = unavailable
        self._subscribed = tuple(subject.lower() for subject in subscribed)
        self._domain = domain
        self._retry_for = retry_for
        self._patient = patient
        self._make_again = make_again
        self._running: dict[_Attempt, None] = {}
        self._looking: asyncio.TimerHandle | None = None
        self._refused: tuple[JetStreamFull, float] | None = None
        connection.on_denied(self._on_denied)
        connection.add_listener(self)

    def close(self) -> None:
        """Let the connection forget these requests. No further one may be made."""
        self._connection.off_denied(self._on_denied)
        self._connection.remove_listener(self)

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
        refused = self._domain.plain(refused)
        ours = refused in _OF_THE_ACCOUNT or self._bucket in refused
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
        A limit that is reached does not pass by waiting, except that of consumers, so such a request fails at once.

        It may be repeated after it was carried out, when the answer was lost. ``subject``: the only subject, with those
        below it, that the request publishes to; None for any that the operation needs. ``within``: seconds for one
        attempt, beside the round trip to the server; None if ``request`` limits its time itself.

        Raises `PermissionDenied`, `JetStreamRequired`, `JetStreamFull`, `ServerUnreachable` or what ``unavailable``
        makes. Other exceptions of ``request`` are raised as they are.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        until = begun + self._retry_for
        wants_cause = operation == WRITE
        while True:
            if self._patient and not self._connection.connected:
                await self._connection.wait_connected(self._retry_for, begun)
            late = math.inf if within is None else loop.time() + within + self._connection.rtt.allowance
            attempt = _Attempt(operation, subject, late)
            try:
                return await self._attempt(attempt, request)
            except NatsrtError:  # some are an OSError or a TimeoutError too
                raise
            except (nats.errors.Error, OSError, TimeoutError) as error:
                problem = self._problem(attempt, error)
                silent = isinstance(error, TimeoutError) and self._connection.connected
            if silent and wants_cause:
                wants_cause = False
                await self._look_for_cause()
            if await self._was_gone(operation) and loop.time() <= until:
                continue
            if loop.time() > until or not (self._patient or self._connection.connected):
                if self._connection.refused:  # the server does not accept the connection, and says why
                    raise self._connection.unreachable(0.0)
                raise await self._failure(operation, problem)
            await asyncio.sleep(_PAUSE)

    async def _failure(self, operation: str, problem: str | JetStreamFull) -> NatsrtError:
        """The error of a request that was repeated in vain."""
        if isinstance(problem, JetStreamFull):
            return problem
        if operation != OPEN and self._connection.connected and await self._is_missing():
            problem = self._no_bucket
        return self._unavailable(operation, problem)

    @property
    def _no_bucket(self) -> str:
        return f"there is no bucket {self._name}: it was deleted. Workers make it again when they start"

    async def _is_missing(self) -> bool:
        """True if the server says that there is no such bucket. False if it does not say."""
        try:
            async with asyncio.timeout(_LOOK_FOR_BUCKET):
                await self._connection.jetstream.stream_info(self._stream)
        except nats.js.errors.APIError as error:
            return error.err_code == NO_STREAM
        except (nats.errors.Error, OSError, TimeoutError):
            pass
        return False

    async def _look_for_cause(self) -> None:
        """Raise `JetStreamFull` if the server cannot write to its disk. Returns if it does not say so.

        A server whose disk is full does not answer what is published, but it answers a purge, here of nothing.
        """
        try:
            async with asyncio.timeout(_LOOK_FOR_CAUSE):
                await purge(self._connection.jetstream, self._stream, f"{self._entries}.{NOBODYS_KEY}")
        except nats.js.errors.APIError as error:
            if (limit := limit_reached(error)) is not None:
                raise self._full(WRITE, limit, error) from None
        except (nats.errors.Error, OSError, TimeoutError):
            pass

    def _full(self, operation: str, limit: Limit, error: nats.js.errors.APIError) -> JetStreamFull:
        full = JetStreamFull(operation, self._name, limit.name, explained(limit, error))
        self._refused = full, asyncio.get_running_loop().time()
        return full

    def full(self, now: float) -> JetStreamFull | None:
        """The last refusal because of a limit, if it is less than a minute ago; ``now`` is the event loop's time."""
        return self._refused[0] if self._refused is not None and now - self._refused[1] < _REPORTED_FOR else None

    async def _was_gone(self, operation: str) -> bool:
        """Make the bucket if it is gone. Returns whether it was. Raises what ``make_again`` raises where the bucket
        cannot be used, which no other attempt will change.
        """
        if self._make_again is None or operation == OPEN or not self._connection.connected:
            return False
        try:
            async with asyncio.timeout(_LOOK_FOR_BUCKET + self._connection.rtt.allowance):
                return await self._make_again()
        except NatsrtError:  # some are an OSError or a TimeoutError too
            raise
        except (nats.errors.Error, OSError, TimeoutError):  # the next attempt finds out what is wrong
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

    def _nobody_there(self, attempt: _Attempt) -> str:
        """Why no server receives requests to JetStream. Raises `JetStreamRequired` if that will not pass.

        A server that runs JetStream receives none while its cluster is about to start, nor does one whose connection to
        the domain is lost.
        """
        if self._domain.name is not None:
            return f"{self._connection.server} reaches no JetStream domain {self._domain.name!r}: see jetstream_domain"
        if attempt.operation == OPEN and not self._connection.client.has_jetstream:
            raise JetStreamRequired(self._connection.server) from None
        return _SILENT

    def _problem(self, attempt: _Attempt, error: Exception) -> str | JetStreamFull:
        """Why an attempt failed, if it is worth another one. Raises what ends the request."""
        if isinstance(error, nats.js.errors.APIError) and (limit := limit_reached(error)) is not None:
            full = self._full(attempt.operation, limit, error)
            if limit.name != CONSUMERS:
                raise full from error
            return full
        if isinstance(error, nats.js.errors.ServiceUnavailableError) and error.err_code is None:
            return self._nobody_there(attempt)
        if isinstance(error, nats.js.errors.NoStreamResponseError | TimeoutError):
            if attempt.denied is not None:
                raise attempt.denied from None
            return _SILENT
        if isinstance(error, nats.js.errors.APIError):
            if error.err_code in NO_JETSTREAM:
                raise JetStreamRequired(self._connection.server) from None
            if error.err_code == NO_STREAM and self._make_again is not None and attempt.operation != OPEN:
                return f"the bucket {self._name} is gone"
            if error.err_code == NO_STREAM and attempt.operation != OPEN:
                raise self._unavailable(attempt.operation, self._no_bucket) from None
            if error.err_code == NO_STREAM:  # made a moment ago, and not known yet to the server that was asked
                return error.description or str(error)
            if error.code is not None and error.code < 500:
                raise self._unavailable(attempt.operation, error.description or str(error)) from error
            return error.description or str(error)
        return str(error) or type(error).__name__
