"""Who owns each keyed agent, and its state: one record per agent in a JetStream KV bucket.

Rules:

1. Every write of a record names the revision that it follows, so the revision is the fencing epoch: a worker that was
   frozen or cut off, and lost the ownership meanwhile, cannot store anything any more.
2. A write whose acknowledgement was lost is recognised by its name (`natsrt.jetstream.record_writes`).
3. A state that is too large for the record is stored in parts, before the record that refers to them. Parts that no
   record refers to any more are deleted afterwards; those of a refused write are deleted at once.
4. Records are read from the leader of the stream, as a replica may lag behind. Parts never change, so they are read
   from any replica.
5. A deleted record leaves a tombstone for a while: a claim that was delayed for long must not find the place empty.
   Where JetStream is full, the record is purged first, which needs no room, and is fenced as a write is.
6. A record that is gone without a tombstone, with its bucket or by an operator's hand, is *missing*. Its owner stores
   it again, unless somebody else claimed the agent meanwhile. Its new revision is higher than the one that was lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from functools import partial

from autogen_core import AgentId
from nats.aio.msg import Msg

from natsrt.background import BackgroundTasks
from natsrt.errors import CannotDecode, JetStreamFull
from natsrt.jetstream.agent_bucket import AgentBucket, BucketListener
from natsrt.jetstream.buckets import OPERATION, TTL, is_gone
from natsrt.jetstream.record import (
    NOTHING_HANDLED,
    RECORD,
    Record,
    Stored,
    advanced,
    checked,
    decode_record,
    encode_head,
    latest,
    record_key,
    sha256,
)
from natsrt.jetstream.record_writes import Found, RecordChanged, RecordWrites, Refused
from natsrt.jetstream.requests import READ, WRITE
from natsrt.jetstream.state_parts import StateParts
from natsrt.jetstream.usage import Usage
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire.subjects import Subjects, encode_token

__all__ = ["AgentRecords", "Record", "RecordChanged", "RecordTaken"]

logger: logging.Logger = logging.getLogger("natsrt.agents")

_KEPT_BYTES = 4 * 1024
"""The largest state that stays in memory with the record of its last save, in bytes."""
_TOMBSTONE_TTL = "120"
"""Seconds for which the tombstone of a deleted record stays."""


class RecordTaken(Exception):
    """The agent has a ``record`` already."""

    def __init__(self, record: Record) -> None:
        self.record = record
        super().__init__(f"{record.agent} is owned by {record.owner or 'nobody'} at revision {record.revision}")


class AgentRecords:
    """The records of all keyed agents of a namespace.

    Every method raises `StateUnavailable`, `ServerUnreachable`, `PermissionDenied` or `JetStreamRequired` if the bucket
    cannot be reached for some seconds; a write may have been carried out nevertheless. There must not be two writes to
    one record at a time in one worker.
    """

    def __init__(self, connection: Connection, subjects: Subjects, options: Options) -> None:
        self._connection = connection
        self._bucket = AgentBucket(connection, subjects, options)
        self._parts = StateParts(connection, self._bucket)
        self._writes = RecordWrites(connection, self._bucket)
        self._cleaning = BackgroundTasks(logger, "deleting old parts of a state failed")

    async def open(self) -> None:
        """Make the bucket if it is missing. Returns at once if it was found since the last reconnect."""
        await self._bucket.open()

    async def look(self) -> None:
        """Look for the bucket once, and make it if it is gone. Raises what nats-py raises, and `StateUnavailable`."""
        await self._bucket.look()

    def only_read(self) -> None:
        """Read what is stored even if the bucket cannot be used, so that it can be saved. Do not write afterwards."""
        self._bucket.is_lenient = True

    @property
    def problem(self) -> str:
        """Why the bucket cannot be used, as far as is known; empty if it can."""
        return "" if self._bucket.problem is None else str(self._bucket.problem)

    @property
    def are_new(self) -> bool:
        """Whether the bucket was made since the last reconnect, in place of one that was gone."""
        return self._bucket.is_new

    @property
    def usage(self) -> Usage:
        """What is used of the bucket's limits, as an owner of agents measures it from time to time."""
        return self._bucket.usage

    def full(self, now: float) -> JetStreamFull | None:
        """The last refusal because of a limit, if it is less than a minute ago; ``now`` is the event loop's time."""
        return self._bucket.requests.full(now)

    def add_listener(self, listener: BucketListener) -> None:
        self._bucket.add_listener(listener)

    # -- ownership -----------------------------------------------------------------------------------------------

    async def claim(self, agent: AgentId, worker_id: str) -> Record:
        """Become the owner of an agent that has no record. Raises `RecordTaken` if it has one, even without owner."""
        return await self._create(agent, worker_id, None)

    async def restore(
        self, lost: Record, owner: str | None, state: bytes | None, handled: Mapping[str, int] = NOTHING_HANDLED
    ) -> Record:
        """Store a record again that is missing, with this state; None for none. Returns the new record.

        ``handled`` are the sequences of the events that were handled since ``lost``, and count in this state, too.
        Raises `RecordTaken` if somebody claimed the agent meanwhile, `RecordChanged` if natsrt deleted the record, and
        `StateUnavailable`, with nothing stored, if the bucket cannot take it.
        """
        await self._bucket.confirm(lost.revision)
        return await self._create(
            lost.agent,
            owner,
            state,
            missing=True,
            superseded=lost.superseded,
            handled=advanced(lost.handled, handled),
        )

    async def take(self, record: Record, worker_id: str) -> Record:
        """Become the owner in place of the present owner, if any; the state stays. Raises `RecordChanged`."""
        return await self._hand_over(record, worker_id)

    async def release(self, record: Record) -> None:
        """Give up the ownership: the state stays; a record without a state is deleted. Raises `RecordChanged`."""
        if record.has_state:
            await self._hand_over(record, None)
        else:
            await self._delete(record)

    async def read(self, agent: AgentId, *, damaged: bool = False) -> Record | None:
        """The record as the stream's leader has it; None if there is none.

        Raises `CannotDecode` if it cannot be decoded. With ``damaged`` it returns a record without an owner and a state
        instead, which can be replaced or removed.
        """
        await self.open()
        found = await self._writes.find(record_key(agent))
        if found is None or found.gone:
            return None
        try:
            return found.record
        except CannotDecode:
            if not damaged:
                raise
            return Record(agent, None, found.revision)

    def follows(self, present: Record, own: Record) -> bool:
        """Whether ``present`` is ``own``, or was stored after ``own`` by a write of this worker that seemed to fail."""
        return self._writes.follows(present, own)

    # -- state ---------------------------------------------------------------------------------------------------

    def save(
        self,
        record: Record,
        state: bytes,
        counted: Sequence[str] = (),
        handled: Mapping[str, int] = NOTHING_HANDLED,
    ) -> Awaitable[Record]:
        """Store the agent's state; the owner stays. Raises `RecordChanged`.

        ``counted`` are the ids of lost copies of calls that count in this state, beside those in ``record``.
        ``handled`` are the sequences of the events that count in it, beside those in ``record``: see
        `natsrt.jetstream.record.advanced`. The oldest of both are dropped where a record has no room for all.
        """
        superseded = latest((*record.superseded, *counted)) if counted else record.superseded
        sequences = advanced(record.handled, handled) if handled else record.handled
        return self._replace(record, record.owner, state, superseded, sequences)

    async def state(self, record: Record) -> bytes | None:
        """The state; None if there is none.

        Raises `CannotDecode` if it is damaged, and `RecordChanged` if the record has changed since.
        """
        stored = record.stored
        if stored is None:
            return None
        if stored.parts:
            await self.open()
            state = await self._parts.read(record.agent, stored)
            if state is None:
                await self._check_present(record)
                raise CannotDecode(f"the state of {record.agent}", f"of its {stored.parts} parts some are missing")
        else:
            state = await self._body(record)
        return checked(record.agent, stored, state)

    # -- for operators -------------------------------------------------------------------------------------------

    async def write_state(
        self, agent: AgentId, state: bytes | None, *, expected: Record | None, handled: Mapping[str, int] | None = None
    ) -> Record:
        """Store a state, or None for no state. The agent has no owner afterwards.

        ``handled`` are the sequences of the last events that count in this state. None: those of the present record
        stay, as the new state takes the place of the present one.
        ``expected`` is the present record; None if there is none. Raises `RecordChanged` or `RecordTaken` if that is
        wrong. An owner that is alive notices the change when it saves.
        """
        if handled is None:
            handled = NOTHING_HANDLED if expected is None else expected.handled
        if expected is None:
            return await self._create(agent, None, state, handled=handled)
        return await self._replace(expected, None, state, handled=handled)

    async def remove(self, record: Record) -> None:
        """Delete the record and its state. Raises `RecordChanged`."""
        revision = await self._delete(record)
        await self._parts.clean(record.agent, ">", before=revision)

    async def records(
        self, agent_type: str | None = None, *, damaged: Callable[[CannotDecode], None] | None = None
    ) -> AsyncGenerator[Record, None]:
        """All records without their states, of one agent type or of all (None). A page of 500 is in memory at a time.

        A record that cannot be decoded is left out, and its error is given to ``damaged``; None: logged. Each agent
        comes once, even if its record changes meanwhile.
        """
        if damaged is None:
            damaged = partial(logger.warning, "%s")
        await self.open()
        pattern = "a.>" if agent_type is None else f"a.{encode_token(agent_type)}.*"
        seen: set[str] = set()
        pages: AsyncGenerator[list[Msg], None] | None = None

        async def next_page() -> list[Msg]:
            nonlocal pages
            if pages is None:
                pages = self._bucket.all_headers(pattern)
            try:
                return await anext(pages, [])
            except BaseException:
                pages = None  # messages on their way are lost, so the next attempt starts from the beginning
                raise

        try:
            while page := await self._bucket.requests.run(READ, next_page):
                for message in page:
                    key = self._bucket.key(message.subject)
                    if key in seen or is_gone(message.headers):
                        continue
                    seen.add(key)
                    try:
                        yield decode_record(key, message.headers, None, message.metadata.sequence.stream)
                    except CannotDecode as error:
                        damaged(error)
        finally:
            if pages is not None:
                await pages.aclose()

    async def count(self, agent_type: str) -> int:
        """How many records there are of one agent type, without reading them.

        A deleted record counts for as long as its tombstone stays: two minutes.
        """
        await self.open()
        request = partial(self._bucket.count, f"a.{encode_token(agent_type)}.*")
        return await self._bucket.requests.run(READ, request, subject=self._bucket.info_subject)

    # -- writing -------------------------------------------------------------------------------------------------

    async def _create(
        self,
        agent: AgentId,
        owner: str | None,
        state: bytes | None,
        *,
        missing: bool = False,
        superseded: Sequence[str] = (),
        handled: Mapping[str, int] = NOTHING_HANDLED,
    ) -> Record:
        try:
            return await self._write(
                agent, owner, state, base=0, before=None, missing=missing, superseded=superseded, handled=handled
            )
        except Refused as refused:
            found = refused.found
            if found is None or found.gone:
                raise RecordChanged(None) from None
            raise RecordTaken(found.record) from None

    async def _replace(
        self,
        record: Record,
        owner: str | None,
        state: bytes | None,
        superseded: Sequence[str] = (),
        handled: Mapping[str, int] = NOTHING_HANDLED,
    ) -> Record:
        try:
            return await self._write(
                record.agent,
                owner,
                state,
                base=record.revision,
                before=record.stored,
                superseded=superseded,
                handled=handled,
            )
        except Refused as refused:
            raise refused.changed from None

    async def _write(
        self,
        agent: AgentId,
        owner: str | None,
        state: bytes | None,
        *,
        base: int,
        before: Stored | None,
        missing: bool = False,
        superseded: Sequence[str] = (),
        handled: Mapping[str, int] = NOTHING_HANDLED,
    ) -> Record:
        """Store a record with a new state after the revision ``base``; 0 for none. ``before`` is the state there."""
        if not self._bucket.is_open:
            await self.open()
        key, write = record_key(agent), self._writes.new_name()
        stored, body, oldest = None, b"", None
        if state is not None:
            parts = self._parts.count(agent, state)
            stored = Stored(len(state), sha256(state), time.time(), parts, write)
            head = encode_head(agent, owner, write, stored, superseded, handled)
            if parts:
                oldest = await self._parts.write(agent, write, state)
            else:
                body = state
        else:
            handled = NOTHING_HANDLED
            head = encode_head(agent, owner, write, None, superseded)
        leaves_parts = before is not None and before.parts > 0 or self._writes.is_unresolved(key)
        try:
            revision = await self._writes.put(key, write, base, {RECORD: head}, body, missing=missing)
        except Refused:
            if oldest is not None:
                self._cleaning.spawn(self._parts.clean(agent, f"{write}.>"))
            raise
        if leaves_parts:
            self._cleaning.spawn(self._parts.clean(agent, ">", before=oldest or revision))
        # A copy: bytes that orjson returns keep its whole buffer, which may be larger, in memory.
        kept = bytes(memoryview(body)) if stored and not stored.parts and len(body) <= _KEPT_BYTES else None
        return Record(agent, owner, revision, stored, write, kept, tuple(superseded), handled)

    async def _hand_over(self, record: Record, owner: str | None) -> Record:
        """Change the owner only."""
        await self.open()
        stored, write = record.stored, self._writes.new_name()
        body = await self._body(record) if stored is not None and not stored.parts else b""
        head = encode_head(record.agent, owner, write, stored, record.superseded, record.handled)
        try:
            revision = await self._writes.put(record_key(record.agent), write, record.revision, {RECORD: head}, body)
        except Refused as refused:
            raise refused.changed from None
        kept = body if stored and not stored.parts else None
        return Record(record.agent, owner, revision, stored, write, kept, record.superseded, record.handled)

    async def _delete(self, record: Record) -> int:
        """Replace the record by a tombstone. Returns the tombstone's revision."""
        await self.open()
        try:
            try:
                return await self._put_tombstone(record, base=record.revision)
            except JetStreamFull:
                return await self._purge(record)
        except Refused as refused:
            raise refused.changed from None

    async def _put_tombstone(self, record: Record, *, base: int) -> int:
        write = self._writes.new_name()
        headers = {OPERATION: "DEL", TTL: _TOMBSTONE_TTL, RECORD: encode_head(record.agent, None, write, None)}
        return await self._writes.put(record_key(record.agent), write, base, headers, b"")

    async def _purge(self, record: Record) -> int:
        """Delete the record where there is no room for a tombstone: purge it, and store the tombstone in its room.

        A purge has no expected revision, but it leaves what is newer than a sequence. So it deletes this revision or
        nothing. Returns the tombstone's revision; the record's if there is still no room.
        """
        key = record_key(record.agent)
        purge = partial(self._bucket.purge, key, record.revision + 1)
        purged = await self._bucket.requests.run(WRITE, purge, subject=self._bucket.purge_subject)
        if not purged and (found := await self._writes.find(key)) is not None and not found.gone:
            raise Refused(found)
        await self._parts.clean(record.agent, ">", before=record.revision)
        try:
            return await self._put_tombstone(record, base=0)
        except JetStreamFull as full:
            logger.warning(
                "the record of %s is deleted, but there is no room for the mark of that: a worker that has the agent "
                "will store the record again: %s",
                record.agent, full,
            )  # fmt: skip
            return record.revision

    # -- reading -------------------------------------------------------------------------------------------------

    async def _body(self, record: Record) -> bytes:
        """The state in the record. Raises `RecordChanged` if the record has changed since."""
        return record.body if record.body is not None else (await self._check_present(record)).body

    async def _check_present(self, record: Record) -> Found:
        """The record's message. Raises `RecordChanged` if the record is at another revision."""
        await self.open()
        found = await self._writes.find(record_key(record.agent))
        if found is None or found.revision != record.revision:
            raise Refused(found).changed
        return found
