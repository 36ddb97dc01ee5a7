"""Writing the records of keyed agents, each write after the revision that it names.

Every write has a name of its own, and the record keeps it. When the acknowledgement of a write is lost, the write is
sent again. If that is refused, the name in the record tells whether the first attempt had arrived.

A write that fails is *unresolved*: it may have arrived or not. Its name is remembered, so that the next write of this
worker after the same revision may also follow the unresolved one.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from functools import partial
from typing import NamedTuple

from nats.js import api

from natsrt.errors import CannotDecode, StateUnavailable
from natsrt.jetstream.acks import WrongRevision
from natsrt.jetstream.agent_bucket import ANSWER_WITHIN, RETRY_FOR, AgentBucket
from natsrt.jetstream.buckets import MARKER, is_gone
from natsrt.jetstream.record import OTHER_HEADER_BYTES, RECORD, Record, decode_record, record_key, write_of
from natsrt.jetstream.requests import READ, WRITE
from natsrt.transport.connection import Connection
from natsrt.transport.headers import HEADER_OVERHEAD

_PAUSE = 0.05
"""Seconds until a write is sent again that was refused because of another write, which then failed."""

_EXPECTED = api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value


class RecordChanged(Exception):
    """The record has changed since it was read. ``present``: the record now; None if it is gone or unreadable."""

    def __init__(self, present: Record | None) -> None:
        self.present = present
        super().__init__("it is gone" if present is None else f"it is at revision {present.revision}")


class Found(NamedTuple):
    """The last message on a record's subject. ``gone``: it is a tombstone, of a client or of the server."""

    key: str
    revision: int
    gone: bool
    headers: dict[str, str] | None
    body: bytes

    @property
    def is_deleted(self) -> bool:
        """Whether natsrt deleted the record, which then is not missing. Other tombstones are of programs without it."""
        return self.gone and self.headers is not None and (RECORD in self.headers or MARKER in self.headers)

    @property
    def record(self) -> Record:
        """The record in the message. Raises `CannotDecode`."""
        return decode_record(self.key, self.headers, self.body, self.revision)


class Refused(Exception):
    """A write was refused for good, because the record is another one: ``found``; None if there is none."""

    def __init__(self, found: Found | None) -> None:
        self.found = found
        super().__init__()

    @property
    def changed(self) -> RecordChanged:
        """The error for a caller that expected an unchanged record."""
        try:
            return RecordChanged(None if self.found is None or self.found.gone else self.found.record)
        except CannotDecode:
            return RecordChanged(None)


class _Unresolved(NamedTuple):
    """The ``names`` of writes that were to follow the revision ``base``, and that may have arrived or not."""

    base: int
    names: set[str]


class RecordWrites:
    """Writes records. There must not be two writes to one record at a time in one worker."""

    def __init__(self, connection: Connection, bucket: AgentBucket) -> None:
        self._connection = connection
        self._bucket = bucket
        self._writer = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._unresolved: dict[str, _Unresolved] = {}
        """By the record's key."""

    def new_name(self) -> str:
        """A name for a write that no other write has, of any worker."""
        return f"{self._writer}-{next(self._numbers)}"

    def is_unresolved(self, key: str) -> bool:
        """Whether writes of the record may have arrived or not."""
        return key in self._unresolved

    def follows(self, present: Record, own: Record) -> bool:
        """Whether ``present`` is ``own``, or was stored by an unresolved write of this worker after ``own``."""
        return present.revision == own.revision or self._is_own(record_key(own.agent), own.revision, present.write)

    def _is_own(self, key: str, base: int, write: str | None) -> bool:
        unresolved = self._unresolved.get(key)
        return unresolved is not None and unresolved.base == base and write in unresolved.names

    async def find(self, key: str) -> Found | None:
        """The last message on the record's subject, as the stream's leader has it; None if there is none."""
        message = await self._bucket.requests.run(READ, partial(self._bucket.last, key))
        if message is None:
            return None
        return Found(key, message.seq or 0, is_gone(message.headers), message.headers, message.data or b"")

    async def put(
        self, key: str, write: str, base: int, headers: dict[str, str], body: bytes, *, missing: bool = False
    ) -> int:
        """Store the message that follows the revision ``base``; 0: none, or a tombstone. Returns its own revision.

        ``missing``: only if there is no tombstone of natsrt. ``write`` is the message's name, and in the head in
        ``headers`` too. Raises `Refused` if the record is at another revision that this worker did not store, and
        `MessageTooLarge`.
        """
        self._connection.check_stored(len(body), HEADER_OVERHEAD + OTHER_HEADER_BYTES + len(headers[RECORD]))
        try:
            revision = await self._put_after(key, write, base, headers, body, missing)
        except Refused:
            self._unresolved.pop(key, None)
            raise
        except BaseException as error:
            self._remember_unresolved(key, write, base)
            if isinstance(error, StateUnavailable):
                self._bucket.doubt()
            raise
        self._unresolved.pop(key, None)
        return revision

    def _remember_unresolved(self, key: str, write: str, base: int) -> None:
        unresolved = self._unresolved.get(key)
        if unresolved is None or unresolved.base != base:
            unresolved = self._unresolved[key] = _Unresolved(base, set())
        unresolved.names.add(write)

    async def _put_after(
        self, key: str, write: str, base: int, headers: dict[str, str], body: bytes, missing: bool
    ) -> int:
        until = asyncio.get_running_loop().time() + RETRY_FOR
        subject = self._bucket.subject(key)
        expected = base
        while True:
            headers[_EXPECTED] = str(expected)
            publish = partial(self._bucket.publish, subject, body, headers)
            try:
                return await self._bucket.requests.run(WRITE, publish, subject=subject, within=ANSWER_WITHIN)
            except WrongRevision:
                found = await self.find(key)
            present = found.revision if found is not None else 0
            name = write_of(found.headers) if found is not None else None
            if name == write:  # an earlier attempt had arrived
                return present
            is_vacant = base == 0 and (found is None or (found.gone and not (missing and found.is_deleted)))
            if present == expected:  # refused because of another write, which has failed by now
                await asyncio.sleep(_PAUSE)
            elif not is_vacant and not self._is_own(key, base, name):
                raise Refused(found)
            expected = present
            if asyncio.get_running_loop().time() > until:
                raise StateUnavailable(WRITE, "other writes to the same record always come first")
