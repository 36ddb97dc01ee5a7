"""Who owns each keyed agent, and its state: one record per agent in a JetStream KV bucket.

Rules:

1. Every write of a record names the revision that it follows, so the revision is the fencing epoch: a worker that lost
   the ownership, frozen or cut off, cannot store anything any more.
2. Every write has a name of its own, and the record keeps it. A write whose acknowledgement was lost is sent again, and
   where it is refused then, the name in the record tells whether the first one had arrived. One that was given up, and
   may have arrived or not, is remembered: the next write of the same worker that follows the same revision may follow
   that one instead.
3. A state that is too large for the record is stored in parts before the record that refers to them. The parts that no
   record refers to any more are deleted after it; those of a refused write at once.
4. Records are read from the leader of the stream, never from a replica that may lag behind. Parts never change, so they
   are read from any.
5. A deleted record leaves a tombstone for a while: a claim that was on its way for long must not find the place empty.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple

from autogen_core import AgentId
from nats.aio.msg import Msg
from nats.js import api

from natsrt.errors import CannotDecode, MessageTooLarge, StateUnavailable
from natsrt.jetstream.acks import WrongRevision
from natsrt.jetstream.buckets import OPERATION, TTL, is_gone
from natsrt.jetstream.record import (
    RECORD,
    Record,
    Stored,
    checked,
    decode_record,
    encode_head,
    record_key,
    sha256,
    write_of,
)
from natsrt.jetstream.requests import READ, WRITE
from natsrt.jetstream.state_parts import ANSWER_WITHIN, HEADERS_AT_MOST, RETRY_FOR, AgentBucket, StateParts
from natsrt.options import Options
from natsrt.transport.connection import HEADER_OVERHEAD, Connection
from natsrt.wire.subjects import Subjects, encode_token

__all__ = ["AgentRecords", "Record", "RecordChanged", "RecordTaken"]

logger = logging.getLogger("natsrt.agents")

_KEPT_BYTES = 4 * 1024
"""The largest state that stays in memory with the record of its last save."""
_TOMBSTONE_TTL = "120"
_PAUSE = 0.05

_EXPECTED = api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value


class RecordTaken(Exception):
    """There is a ``record`` of the agent already."""

    def __init__(self, record: Record) -> None:
        self.record = record
        super().__init__(f"{record.agent} is owned by {record.owner or 'nobody'} at revision {record.revision}")


class RecordChanged(Exception):
    """The record is not as it was read any more. ``present``: as it is now; None where it is gone or unreadable."""

    def __init__(self, present: Record | None) -> None:
        self.present = present
        super().__init__("it is gone" if present is None else f"it is at revision {present.revision}")


class _Found(NamedTuple):
    """The last message on a record's subject. ``gone``: a tombstone, of the client or of the server."""

    key: str
    revision: int
    gone: bool
    headers: dict[str, str] | None
    body: bytes

    @property
    def record(self) -> Record:
        """Raises `CannotDecode`."""
        return decode_record(self.key, self.headers, self.body, self.revision)


class _Refused(Exception):
    """A write was refused for good, because of what was ``found`` instead; None: nothing."""

    def __init__(self, found: _Found | None) -> None:
        self.found = found
        super().__init__()

    @property
    def changed(self) -> RecordChanged:
        try:
            return RecordChanged(None if self.found is None or self.found.gone else self.found.record)
        except CannotDecode:
            return RecordChanged(None)


class AgentRecords:
    """The records of all keyed agents of a namespace.

    Every method raises `StateUnavailable`, `ServerUnreachable`, `PermissionDenied` or `JetStreamRequired` where the
    bucket cannot be reached for some seconds; a write may have been carried out nevertheless. There must not be two
    writes to one record at a time in one worker.
    """

    def __init__(self, connection: Connection, subjects: Subjects, options: Options) -> None:
        self._connection = connection
        self._bucket = AgentBucket(connection, subjects, options)
        self._parts = StateParts(connection, self._bucket)
        self._writer = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._unresolved: dict[str, tuple[int, set[str]]] = {}
        """By record: the revision that writes were to follow which may have arrived or not, and their names."""
        self._cleaning: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Make the bucket if it is missing. Costs nothing until the connection was lost again."""
        await self._bucket.open()

    # -- ownership -----------------------------------------------------------------------------------------------

    async def claim(self, agent: AgentId, worker_id: str) -> Record:
        """Become the owner of an agent that has no record. Raises `RecordTaken` where there is one, also an unowned."""
        return await self._create(agent, worker_id, None)

    async def take(self, record: Record, worker_id: str) -> Record:
        """Become the owner in place of the present one; the state stays. Raises `RecordChanged`."""
        return await self._hand_over(record, worker_id)

    async def release(self, record: Record) -> None:
        """Leave the agent to nobody: the state stays; without one the record goes. Raises `RecordChanged`."""
        if record.has_state:
            await self._hand_over(record, None)
        else:
            await self._delete(record)

    async def read(self, agent: AgentId, *, damaged: bool = False) -> Record | None:
        """The record as the stream's leader has it; None where there is none.

        Raises `CannotDecode` where it cannot be read; with ``damaged`` it is then one of nobody and without a state,
        good for being replaced or removed.
        """
        await self.open()
        found = await self._find(record_key(agent))
        if found is None or found.gone:
            return None
        try:
            return found.record
        except CannotDecode:
            if not damaged:
                raise
            return Record(agent, None, found.revision)

    def follows(self, present: Record, own: Record) -> bool:
        """Whether ``present`` is ``own``, or what a write made of it that this worker had given up."""
        base, writes = self._unresolved.get(record_key(own.agent), (0, ()))
        return present.revision == own.revision or (base == own.revision and present.write in writes)

    # -- state ---------------------------------------------------------------------------------------------------

    def save(self, record: Record, state: bytes) -> Awaitable[Record]:
        """Store the agent's state; the owner stays. Raises `RecordChanged`."""
        return self._replace(record, record.owner, state)

    async def state(self, record: Record) -> bytes | None:
        """The state, None for none.

        Raises `CannotDecode` where it is damaged, and `RecordChanged` where it is another one by now.
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

    async def write_state(self, agent: AgentId, state: bytes | None, *, expected: Record | None) -> Record:
        """Store a state, or that there is none, of an agent that nobody owns then.

        ``expected`` is the present record, None if there is none; raises `RecordChanged` or `RecordTaken` where that is
        not so. An owner that lives finds out when it saves.
        """
        return await (self._create(agent, None, state) if expected is None else self._replace(expected, None, state))

    async def remove(self, record: Record) -> None:
        """Delete the record and its state. Raises `RecordChanged`."""
        revision = await self._delete(record)
        await self._parts.clean(record.agent, ">", before=revision)

    async def records(
        self, agent_type: str | None = None, *, damaged: Callable[[CannotDecode], None] | None = None
    ) -> AsyncGenerator[Record, None]:
        """All records, of one type or of all, without their states, a page of some hundred in memory at a time.

        What cannot be read is left out, and given to ``damaged``; None: logged. Each agent comes once, however often it
        changes meanwhile.
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
                pages = None  # what was on its way is lost: from the beginning
                raise

        try:
            while page := await self._bucket.guard.run(READ, next_page):
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

    # -- writing -------------------------------------------------------------------------------------------------

    async def _create(self, agent: AgentId, owner: str | None, state: bytes | None) -> Record:
        try:
            return await self._write(agent, owner, state, base=0, before=None)
        except _Refused as refused:
            assert refused.found is not None  # an empty place refuses no claim
            raise RecordTaken(refused.found.record) from None

    async def _replace(self, record: Record, owner: str | None, state: bytes | None) -> Record:
        try:
            return await self._write(record.agent, owner, state, base=record.revision, before=record.stored)
        except _Refused as refused:
            raise refused.changed from None

    async def _write(
        self, agent: AgentId, owner: str | None, state: bytes | None, *, base: int, before: Stored | None
    ) -> Record:
        """Store a record with a new state after the revision ``base``, 0 for none; ``before`` is the state there."""
        if not self._bucket.is_open:
            await self.open()
        key, write = record_key(agent), self._name_write()
        stored, body, oldest = None, b"", None
        if state is not None:
            parts = self._parts.count(agent, state)
            stored = Stored(len(state), sha256(state), time.time(), parts, write)
            head = encode_head(agent, owner, write, stored)
            if parts:
                oldest = await self._parts.write(agent, write, state)
            else:
                body = state
        else:
            head = encode_head(agent, owner, write, None)
        leaves_parts = before is not None and before.parts > 0 or key in self._unresolved
        try:
            revision = await self._put(key, write, base, {RECORD: head}, body)
        except _Refused:
            if oldest is not None:
                self._later(self._parts.clean(agent, f"{write}.>"))
            raise
        if leaves_parts:
            self._later(self._parts.clean(agent, ">", before=oldest or revision))
        # A copy, because what orjson wrote takes up its whole buffer.
        kept = bytes(memoryview(body)) if stored and not stored.parts and len(body) <= _KEPT_BYTES else None
        return Record(agent, owner, revision, stored, write, kept)

    async def _hand_over(self, record: Record, owner: str | None) -> Record:
        """Change the owner only."""
        await self.open()
        stored, write = record.stored, self._name_write()
        body = await self._body(record) if stored is not None and not stored.parts else b""
        head = encode_head(record.agent, owner, write, stored)
        try:
            revision = await self._put(record_key(record.agent), write, record.revision, {RECORD: head}, body)
        except _Refused as refused:
            raise refused.changed from None
        return Record(record.agent, owner, revision, stored, write, body if stored and not stored.parts else None)

    async def _delete(self, record: Record) -> int:
        """Leave a tombstone in the record's place. Its revision."""
        await self.open()
        write = self._name_write()
        headers = {OPERATION: "DEL", TTL: _TOMBSTONE_TTL, RECORD: encode_head(record.agent, None, write, None)}
        try:
            return await self._put(record_key(record.agent), write, record.revision, headers, b"")
        except _Refused as refused:
            raise refused.changed from None

    def _name_write(self) -> str:
        return f"{self._writer}-{next(self._numbers)}"

    async def _put(self, key: str, write: str, base: int, headers: dict[str, str], body: bytes) -> int:
        """Write the message that follows the revision ``base``, 0 for none or a tombstone. Its own revision.

        Raises `_Refused` where the record is at another revision, and this worker did not bring it there.
        """
        size = HEADER_OVERHEAD + HEADERS_AT_MOST + len(headers[RECORD]) + len(body)
        if size > self._connection.max_payload:
            raise MessageTooLarge(size, self._connection.max_payload)
        try:
            revision = await self._follow(key, write, base, headers, body)
        except _Refused:
            self._unresolved.pop(key, None)
            raise
        except BaseException as error:  # it may have arrived or not
            known = self._unresolved.get(key)
            if known is None or known[0] != base:
                known = self._unresolved[key] = (base, set())
            known[1].add(write)
            if isinstance(error, StateUnavailable):
                self._bucket.doubt()
            raise
        self._unresolved.pop(key, None)
        return revision

    async def _follow(self, key: str, write: str, base: int, headers: dict[str, str], body: bytes) -> int:
        until = asyncio.get_running_loop().time() + RETRY_FOR
        subject = self._bucket.subject(key)
        expected = base
        while True:
            headers[_EXPECTED] = str(expected)
            publish = partial(self._bucket.publish, subject, body, headers)
            try:
                return await self._bucket.guard.run(WRITE, publish, subject=subject, within=ANSWER_WITHIN)
            except WrongRevision:
                found = await self._find(key)
            present = found.revision if found is not None else 0
            name = write_of(found.headers) if found is not None else None
            if name == write:
                return present
            given_up = self._unresolved.get(key, (base, ()))
            vacant = base == 0 and (found is None or found.gone)
            own = given_up[0] == base and name in given_up[1]
            if present == expected:  # another write was under way, and failed
                await asyncio.sleep(_PAUSE)
            elif not vacant and not own:
                raise _Refused(found)
            expected = present
            if asyncio.get_running_loop().time() > until:
                raise StateUnavailable(WRITE, "other writes come before it all the time")

    def _later(self, cleaning: Coroutine[Any, Any, None]) -> None:
        """Clean up without letting anybody wait, or end it by going away."""
        task = asyncio.get_running_loop().create_task(cleaning)
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)

    # -- reading -------------------------------------------------------------------------------------------------

    async def _body(self, record: Record) -> bytes:
        """The state in the record. Raises `RecordChanged` where it is another one by now."""
        return record.body if record.body is not None else (await self._check_present(record)).body

    async def _check_present(self, record: Record) -> _Found:
        """The record's message. Raises `RecordChanged` where the record is at another revision."""
        await self.open()
        found = await self._find(record_key(record.agent))
        if found is None or found.revision != record.revision:
            raise _Refused(found).changed
        return found

    async def _find(self, key: str) -> _Found | None:
        message = await self._bucket.guard.run(READ, partial(self._bucket.last, key))
        if message is None:
            return None
        return _Found(key, message.seq or 0, is_gone(message.headers), message.headers, message.data or b"")
