"""A bucket of cached values, each with its own time to live. Its entries are those of any KV bucket."""

from __future__ import annotations

import math

import nats.js.errors
from nats.js import api

from natsrt.jetstream.acks import Acks
from natsrt.jetstream.buckets import TTL, is_gone
from natsrt.jetstream.kept_stream import NO_MESSAGE, KeptStream
from natsrt.jetstream.requests import READ, WRITE
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire.subjects import encode_token


class CacheBucket(KeptStream):
    """One bucket. All methods raise `StreamUnavailable`, `PermissionDenied`, `ServerUnreachable`, `JetStreamRequired`
    and `ServerTooOld`. Reading waits ``offline_timeout`` seconds for a lost server, writing ``publish_timeout``.

    A bucket that was deleted is made again, empty.
    """

    def __init__(
        self, connection: Connection, options: Options, acks: Acks, *, bucket: str, config: api.StreamConfig
    ) -> None:
        self._entries = f"$KV.{bucket}"
        super().__init__(connection, options, acks, config, feature="caches in JetStream", entries=self._entries)

    async def open(self) -> None:
        """Make the bucket if it is missing."""
        await self._open()

    def _subject(self, key: str) -> str:
        return f"{self._entries}.{encode_token(key)}"

    async def get(self, key: str) -> bytes | None:
        """The value of a key, as the bucket's leader has it; None if there is none, or it has expired."""

        async def attempt() -> bytes | None:
            try:
                found = await self._connection.jetstream.get_msg(self.stream, subject=self._subject(key))
            except nats.js.errors.NotFoundError as error:
                if error.err_code == NO_MESSAGE:
                    return None
                raise
            return None if is_gone(found.headers) else found.data or b""

        return await self._reads.run(READ, attempt, subject=self._domain.api(f"STREAM.MSG.GET.{self.stream}"))

    async def put(self, key: str, value: bytes, ttl: float | None) -> None:
        """Store a value for ``ttl`` seconds, of which only whole ones count; None: until it is replaced.

        Raises `MessageTooLarge` and `JetStreamFull` too.
        """
        headers = {api.Header.EXPECTED_STREAM.value: self.stream}
        if ttl is not None:
            headers[TTL] = f"{max(1, math.ceil(ttl))}s"
        self._check_size(self._subject(key), value, headers)
        subject = self._domain.publish(self._subject(key))

        async def attempt() -> None:
            await self._acks.store(self.stream, subject, value, headers)

        await self._writes.run(WRITE, attempt, subject=subject, within=self._write_within)
