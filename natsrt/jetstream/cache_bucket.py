"""A bucket of cached values, each with its own time to live. Its entries are those of any KV bucket."""

from __future__ import annotations

import math
from functools import partial
from typing import Final

import nats.js.errors
from nats.js import api

from natsrt.errors import StreamUnavailable
from natsrt.jetstream.acks import Acks
from natsrt.jetstream.buckets import TTL, is_gone
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.requests import OPEN, READ, WRITE, BucketRequests
from natsrt.jetstream.session_log import ATTEMPTS, NEEDED, NO_MESSAGE, OTHER_LIMITS
from natsrt.jetstream.streams import ensure_stream, require_settings, require_version
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.transport.headers import headers_size
from natsrt.wire.subjects import encode_token

_WITHIN: Final = 2.0
"""Seconds for one attempt of a request, beside the round trip."""


class CacheBucket:
    """One bucket. All methods raise `StreamUnavailable`, `PermissionDenied`, `ServerUnreachable`, `JetStreamRequired`
    and `ServerTooOld`. Reading waits ``offline_timeout`` seconds for a lost server, writing ``publish_timeout``.

    A bucket that was deleted is made again, empty.
    """

    def __init__(
        self, connection: Connection, options: Options, acks: Acks, *, bucket: str, config: api.StreamConfig
    ) -> None:
        self.stream: str = config.name or ""
        self._connection = connection
        self._acks = acks
        self._config = config
        self._entries = f"$KV.{bucket}"
        self._domain = Domain(options.jetstream_domain)
        patience = math.inf if options.offline_timeout is None else options.offline_timeout
        self._reads = self._requests(options, patience)
        self._writes = self._requests(options, options.publish_timeout)
        self._write_within = min(_WITHIN, options.publish_timeout / ATTEMPTS)

    def _requests(self, options: Options, retry_for: float) -> BucketRequests:
        return BucketRequests(
            self._connection,
            self.stream,
            self._unavailable,
            subscribed=(options.inbox_prefix,),
            domain=self._domain,
            retry_for=retry_for,
            patient=True,
            make_again=self._make_again,
            stream=(self.stream, self._entries),
        )

    def _unavailable(self, operation: str, reason: str) -> StreamUnavailable:
        return StreamUnavailable(operation, self.stream, reason)

    async def open(self) -> None:
        """Make the bucket if it is missing."""
        version = self._connection.client.connected_server_version
        text = f"{version.major}.{version.minor}.{version.patch}"
        require_version((version.major, version.minor), text, "caches in JetStream", NEEDED)
        if not self._acks.open:
            await self._acks.subscribe()
        await self._reads.run(OPEN, self._ensure, within=_WITHIN)

    def close(self) -> None:
        """Forget the connection."""
        self._reads.close()
        self._writes.close()

    async def _ensure(self) -> None:
        js = self._connection.jetstream
        info = await ensure_stream(js, self.stream, partial(js.add_stream, self._config))
        require_settings(info, self._config, self._unavailable, OTHER_LIMITS)

    async def _make_again(self) -> bool:
        """Make the bucket if it is gone. Returns whether it was."""
        try:
            await self._connection.jetstream.stream_info(self.stream)
        except nats.js.errors.NotFoundError:
            await self._ensure()
            return True
        return False

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
        self._connection.check_stored(len(value), headers_size(headers))
        subject = self._domain.publish(self._subject(key))

        async def attempt() -> None:
            await self._acks.store(self.stream, subject, value, headers)

        await self._writes.run(WRITE, attempt, subject=subject, within=self._write_within)
