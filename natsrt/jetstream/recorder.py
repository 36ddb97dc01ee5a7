"""Records what passes into a stream: calls, replies and events, as ``natsrt record`` does.

Rules:

1. It only listens: with subscriptions that have wildcards and no queue group, which the server's message tracing tells
   from those that may answer (`natsrt.transport.probe`). One without a wildcard would make callers wait for an agent.
2. It listens on one connection, so that what passes through one server arrives in the order of passing, and stores on
   another one, whose acknowledgements do not wait behind what arrives.
3. What waits to be stored is bounded in bytes. What does not fit is counted, and the next record says how much it was.
4. A record is stored when the stream says so, and sent again until then. Its id makes the stream store it once.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import api

from natsrt.background import BackgroundTasks
from natsrt.errors import (
    CannotDecode,
    ConfigurationError,
    JetStreamRequired,
    MessageTooLarge,
    NatsrtError,
    StreamUnavailable,
)
from natsrt.jetstream.acks import Acks
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.limits import explained, limit_reached
from natsrt.jetstream.passing import Passing
from natsrt.jetstream.requests import NO_JETSTREAM
from natsrt.jetstream.stream_settings import Wrong, described, remedy, wrong_settings
from natsrt.jetstream.streams import DUPLICATE_WINDOW, WEEK, ensure_stream
from natsrt.options import Options
from natsrt.transport.connection import Connection, Interest, Refusal
from natsrt.transport.headers import headers_size
from natsrt.wire.recorded import RECORD_HEADER, Record
from natsrt.wire.subjects import Subjects, inbox_problem

logger: logging.Logger = logging.getLogger("natsrt.recorder")

GIGABYTE: Final = 1024**3
WAITING_BYTES: Final = 64 * 1024 * 1024
"""Bytes of messages that may wait to be stored."""
_AT_ONCE: Final = 256
"""Records that are stored at the same time."""
_BYTES_AT_ONCE: Final = 8 * 1024 * 1024
_ACKNOWLEDGED_WITHIN: Final = 5.0
_PAUSE: Final = 0.5
"""Seconds between two attempts to store the same records."""
_LAST_ATTEMPTS: Final = 5.0
"""Seconds after the end within which what was taken in is still stored."""
_OVERHEAD: Final = 500
"""Bytes that a waiting record takes beside its message."""
_MOST_INBOXES: Final = 1000
_STREAM: Final = re.compile(r"[A-Za-z0-9_-]{1,200}")
_OF_NATSRT: Final = re.compile(r"KV_|OBJ_|(.*_)?natsrt_")
_EXPECTED_STREAM: Final = api.Header.EXPECTED_STREAM.value
_MSG_ID: Final = api.Header.MSG_ID.value


def record_tree(subjects: Subjects, stream: str) -> str:
    """The start of the subjects of a stream of records: ``natsrt.record.<stream>``. Raises `ConfigurationError`."""
    if _STREAM.fullmatch(stream) is None:
        raise ConfigurationError("stream", f"{stream!r} is no name for it: use 1 to 200 of A-Z, a-z, 0-9, _ and -")
    if _OF_NATSRT.match(stream):
        raise ConfigurationError("stream", f"{stream!r} is a name of natsrt's own streams and of buckets: use another")
    return f"{subjects.view.removesuffix('view')}record.{stream}"


def records_stream(
    subjects: Subjects, stream: str, max_age: float, max_bytes: int, replicas: int | None = None
) -> api.StreamConfig:
    """How a stream of records is made. Raises `ConfigurationError` if its name cannot be that of one."""
    return api.StreamConfig(
        name=stream,
        description="natsrt: records of calls, replies and events",
        subjects=[f"{record_tree(subjects, stream)}.>"],
        retention=api.RetentionPolicy.LIMITS,
        num_replicas=replicas,
        discard=api.DiscardPolicy.OLD,
        max_age=max_age,
        max_bytes=max_bytes,
        duplicate_window=min(DUPLICATE_WINDOW, max_age),
        allow_direct=True,
    )


def wrong_records(subjects: Subjects, stream: str, there: api.StreamConfig) -> list[Wrong]:
    """The settings of a stream with which it is no stream of records. Raises `ConfigurationError` as `record_tree`.

    Its limits, and what happens when it is full, are the operator's.
    """
    wanted = records_stream(subjects, stream, WEEK, GIGABYTE).evolve(
        discard=there.discard,
        max_age=there.max_age,
        max_bytes=there.max_bytes,
        duplicate_window=there.duplicate_window,
        max_msgs_per_subject=there.max_msgs_per_subject,
        storage=there.storage,
    )
    return wrong_settings(there, wanted)


@dataclass(slots=True)
class Recorded:
    """What a recorder did so far."""

    stored: Counter[str] = field(default_factory=Counter)
    """Records in the stream, by kind."""
    missed: int = 0
    """Messages that were left out, because too many waited or because they are too large with what a record adds."""
    unstored: int = 0
    """Messages that still waited at the end."""
    gaps: int = 0
    """How often the connection was lost. What passed meanwhile is in neither number."""
    gap_seconds: float = 0.0
    copies: int = 0
    """Messages that passed again, on their way to another worker for example, and are recorded once."""


class Recorder:
    """Records what passes into ``stream``, which it makes if it is missing.

    ``agents`` and ``topics`` are as in `Passing`; ``inboxes`` are prefixes of reply subjects beside ``_INBOX`` and
    those that calls name. ``max_age`` (seconds) and ``max_bytes`` bound a stream that it makes; the oldest records go
    first. ``tell`` is called with each line about what is wrong, and about its end.
    """

    def __init__(
        self,
        options: Options,
        stream: str,
        *,
        tell: Callable[[str], None],
        agents: Iterable[str] = (),
        topics: Iterable[str] = (),
        inboxes: Iterable[str] = (),
        max_age: float = WEEK,
        max_bytes: int = GIGABYTE,
        waiting_bytes: int = WAITING_BYTES,
    ) -> None:
        self._subjects = Subjects(options.namespace)
        self._tree = record_tree(self._subjects, stream)
        self._stream, self._tell = stream, tell
        self._limits = max_age, max_bytes
        self._domain = Domain(options.jetstream_domain)
        self._replicas = options.registry_replicas
        wanted = dict.fromkeys(("_INBOX", options.inbox_prefix, *inboxes))
        self._inboxes = [one for one in wanted if not any(one.startswith(f"{other}.") for other in wanted)]
        self._learned: set[str] = set()
        self._listening = Connection(options, client_name="natsrt record")
        self._storing = Connection(options, client_name="natsrt record, storing")
        self._acks = Acks(self._storing, options.inbox_prefix)
        self._passing = Passing(self._subjects, secrets.token_hex(6), agents, topics)
        self._waiting_bytes = waiting_bytes
        self._queue: deque[Record] = deque()
        self._bytes = 0
        self._missed = 0
        self._gap = 0.0
        self._lost_at: float | None = None
        self._some = asyncio.Event()
        self._trouble = ""
        self._refused: Refusal | None = None
        self._tasks = BackgroundTasks(logger, "listening to an inbox failed")
        self.done: Recorded = Recorded()

    async def open(self) -> str:
        """Make the stream, and listen. Returns the server that it listens to.

        Raises `StreamUnavailable` if the stream is no stream of records, `PermissionDenied`, `JetStreamRequired`,
        `ServerUnreachable`.
        """
        await self._storing.open()
        self._storing.on_denied(self._on_denied)
        await self._acks.subscribe()
        await self._storing.barrier()
        self._acks.check()
        await self._make()
        await self._listening.open()
        root = self._tree.partition("natsrt.record.")[0]
        needed = [await self._listen(f"{root}{tree}.>") for tree in ("agent", "topic")]
        for inbox in self._inboxes:
            needed.append(await self._listen(f"{inbox}.>"))
        needed.append(await self._listen(f"{root}natsrt.blob.>"))
        await self._listening.barrier()
        for interest in needed:
            interest.check()
        self._listening.add_listener(self)
        return self._listening.server

    async def _listen(self, subject: str) -> Interest:
        return await self._listening.subscribe(subject, self._take, optional=True)

    async def close(self) -> None:
        """End both connections. Has no effect if they have ended."""
        await self._tasks.cancel()
        await self._listening.close()
        await self._storing.close()

    async def _make(self) -> None:
        """Make the stream if it is missing. Raises what `open` does, except for what passes by itself."""
        max_age, max_bytes = self._limits
        wanted = records_stream(self._subjects, self._stream, max_age, max_bytes, self._replicas)
        js = self._storing.jetstream
        self._refused = None
        try:
            info = await ensure_stream(js, self._stream, lambda: js.add_stream(wanted))
        except nats.js.errors.APIError as error:
            if error.err_code in NO_JETSTREAM:
                raise JetStreamRequired(self._storing.server) from None
            raise StreamUnavailable("make", self._stream, error.description or str(error)) from error
        except (nats.errors.Error, OSError, TimeoutError) as error:
            if self._refused is not None:
                raise self._refused from None
            raise StreamUnavailable("make", self._stream, "JetStream does not answer", passing=True) from error
        if wrong := wrong_records(self._subjects, self._stream, info.config):
            reason = f"{described(self._stream, wrong)}: {remedy(self._stream, wrong, 'use another name')}"
            raise StreamUnavailable("record into", self._stream, reason)

    # -- listening ---------------------------------------------------------------------------------------------------

    def connection_lost(self) -> None:
        self._lost_at = time.monotonic()

    def connection_made(self) -> None:
        if self._lost_at is not None:
            lost, self._lost_at = time.monotonic() - self._lost_at, None
            self._gap += lost
            self.done.gaps += 1
            self.done.gap_seconds += lost
            self._tell(f"the connection was lost for {lost:.1f} s: what passed meanwhile is not recorded")

    def _take(self, message: Msg) -> None:
        record = self._passing.take(message.subject, message.reply, message.headers or {}, message.data, time.time())
        self.done.copies = self._passing.copies
        if record is None:
            return
        if record.kind == "call" and record.reply:
            self._learn(record.reply)
        size = len(record.data) + _OVERHEAD
        if self._bytes + size > self._waiting_bytes and self._queue:
            self._miss("too many messages wait to be stored: some are left out")
            return
        self._bytes += size
        self._queue.append(self._with_gaps(record))
        self._some.set()

    def _with_gaps(self, record: Record) -> Record:
        if self._missed or self._gap:
            record = replace(record, missed=self._missed, gap=self._gap)
            self._missed, self._gap = 0, 0.0
        return record

    def _miss(self, why: str) -> None:
        self._missed += 1
        self.done.missed += 1
        self._say(why)

    def _learn(self, reply: str) -> None:
        """Listen where the caller's replies arrive, from now on."""
        prefix = reply.rpartition(".")[0]
        if prefix in self._learned or any(reply.startswith(f"{inbox}.") for inbox in self._inboxes):
            return
        if len(self._learned) < _MOST_INBOXES and not inbox_problem(prefix, self._subjects.namespace):
            self._learned.add(prefix)
            self._tasks.spawn(self._listen_to(prefix))

    async def _listen_to(self, prefix: str) -> None:
        await self._listen(f"{prefix}.*")

    # -- storing -----------------------------------------------------------------------------------------------------

    def _on_denied(self, denied: Refusal) -> bool:
        self._refused = denied
        return True

    def _say(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            self._tell(trouble)

    async def run(self, ended: asyncio.Event) -> Recorded:
        """Store what passes until ``ended`` is set, then what waits. Returns what was done.

        Goes on where the stream is full or gone, a permission is missing, or the server is restarted, and says so.
        """
        ending = asyncio.ensure_future(ended.wait())
        pending: list[Record] = []
        until = float("inf")
        loop = asyncio.get_running_loop()
        try:
            while True:
                if ending.done() and until == float("inf"):
                    await self._stop_listening()
                    until = loop.time() + _LAST_ATTEMPTS
                pending += self._batch() if not pending else []
                if not pending:
                    if ending.done():
                        break
                    await self._wait(ending)
                elif loop.time() > until:
                    break
                else:
                    pending = await self._store_all(pending)
                    if pending:
                        await asyncio.sleep(_PAUSE)
        finally:
            ending.cancel()
        self.done.unstored = len(pending) + len(self._queue)
        return self.done

    async def _stop_listening(self) -> None:
        """What the server has sent by now is taken in."""
        if self._listening.connected:
            try:
                await self._listening.barrier(2.0)
            except NatsrtError as error:
                logger.debug("the last messages may be missing: %s", error)
        await self._listening.close()

    async def _wait(self, ending: asyncio.Future[Literal[True]]) -> None:
        self._some.clear()
        some = asyncio.ensure_future(self._some.wait())
        try:
            await asyncio.wait({some, ending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            some.cancel()

    def _batch(self) -> list[Record]:
        batch: list[Record] = []
        size = 0
        while self._queue and len(batch) < _AT_ONCE and size < _BYTES_AT_ONCE:
            batch.append(self._queue.popleft())
            size += len(batch[-1].data) + _OVERHEAD
        return batch

    async def _store_all(self, records: list[Record]) -> list[Record]:
        """Store records in their order. Returns those that are not stored."""
        troubles = await asyncio.gather(*map(self._store, records))
        left = [record for record, trouble in zip(records, troubles, strict=True) if trouble]
        self._bytes -= sum(len(record.data) + _OVERHEAD for record in records) - sum(
            len(record.data) + _OVERHEAD for record in left
        )
        if left:
            self._say(next(filter(None, troubles)))
        elif self._trouble and not self._missed:
            self._trouble = ""
            self._tell("storing again")
        return left

    async def _store(self, record: Record) -> str:
        """Store one record. Returns what is wrong; empty if it is stored, or never can be."""
        headers = {RECORD_HEADER: record.header(), _MSG_ID: record.store_id, _EXPECTED_STREAM: self._stream}
        try:
            self._storing.check_stored(len(record.data), headers_size(headers))
        except MessageTooLarge:
            self._miss("a message is too large to be stored with what a record adds: it is left out")
            return ""
        subject = self._domain.publish(self._passing.subject_of(record, self._tree))
        self._refused = None
        try:
            async with asyncio.timeout(_ACKNOWLEDGED_WITHIN + self._storing.rtt.allowance):
                await self._acks.publish(subject, record.data, headers)
        except nats.js.errors.APIError as error:
            limit = limit_reached(error)
            what = error.description or str(error) if limit is None else explained(limit, error)
            return f"the stream {self._stream} does not store: {what}; trying again"
        except nats.js.errors.NoStreamResponseError:
            return await self._made_again()
        except (CannotDecode, nats.errors.Error, OSError, TimeoutError):
            if self._refused is not None:
                return f"{self._refused}; trying again"
            return f"the stream {self._stream} does not answer; trying again"
        self.done.stored[record.kind] += 1
        return ""

    async def _made_again(self) -> str:
        try:
            await self._make()
        except NatsrtError as error:
            return f"{error}; trying again"
        return f"the stream {self._stream} was gone, and is made again; what it had recorded is lost"
