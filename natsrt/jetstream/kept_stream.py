"""What the streams of `natsrt.storage` have in common: they are made when they are first used, and again if they are
deleted; their requests are repeated.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Final

import nats.js.errors
from nats.js import api

from natsrt.errors import MessageTooLarge, StreamUnavailable
from natsrt.jetstream.acks import Acks
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.requests import OPEN, BucketRequests
from natsrt.jetstream.streams import ensure_stream, require_settings, require_version
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.transport.headers import headers_size

NO_MESSAGE: Final = 10037
"""JetStream's error code for a message that does not exist."""
_NEEDED: Final = (2, 11)
"""The first version of nats-server that has batches of direct gets, and times to live of single messages."""
_WITHIN: Final = 2.0
"""Seconds for one attempt of a request, beside the round trip: a cluster that elects a leader does not answer."""
_ATTEMPTS: Final = 3
"""Attempts to write for which there is time at least: beside a tap, a stream that is gone does not answer the first."""
_STORED_WITH_EACH: Final = 34
"""Bytes that the server's file store adds to the subject, the headers and the body of a message with headers."""
_OTHER_LIMITS: Final = "use the same limits everywhere, give what needs others a name of its own, or delete the stream"
"""What to do with a stream if a setting of it cannot be changed."""


class KeptStream:
    """One stream, made as ``config`` says. Reading waits ``offline_timeout`` seconds for a lost server, writing
    ``publish_timeout``.

    ``feature`` is what needs it, for errors; ``entries`` the start of its subjects; ``subscribed`` are subjects without
    which it cannot be used, beside the inbox.
    """

    def __init__(
        self,
        connection: Connection,
        options: Options,
        acks: Acks,
        config: api.StreamConfig,
        *,
        feature: str,
        entries: str,
        subscribed: tuple[str, ...] = (),
    ) -> None:
        self.stream: str = config.name or ""
        self._connection = connection
        self._acks = acks
        self._config = config
        self._feature = feature
        self._domain = Domain(options.jetstream_domain)
        patience = math.inf if options.offline_timeout is None else options.offline_timeout
        self._reads, self._writes = (
            BucketRequests(
                connection,
                self.stream,
                self._unavailable,
                subscribed=(options.inbox_prefix, *subscribed),
                domain=self._domain,
                retry_for=retry_for,
                patient=True,
                make_again=self._make_again,
                stream=(self.stream, entries),
            )
            for retry_for in (patience, options.publish_timeout)
        )
        self._write_within = min(_WITHIN, options.publish_timeout / _ATTEMPTS)

    def _check_size(self, subject: str, body: bytes, headers: dict[str, str], *, alone: bool = False) -> None:
        """Raise `MessageTooLarge` if the stream would not keep this message.

        A stream stores a message that is larger than its ``max_bytes``, and then drops all its messages for it, and the
        message too. ``alone``: the message may be dropped, since it is there to remove the others.
        """
        head, limit = headers_size(headers), self._config.max_bytes
        self._connection.check_stored(len(body), head)
        size = len(subject.encode()) + head + len(body) + _STORED_WITH_EACH
        if limit is not None and 0 < limit < size and not alone:
            raise MessageTooLarge(
                size,
                limit,
                f"as it is stored, but max_bytes of the stream {self.stream} is {limit:,}: raise max_bytes, or store "
                "less in one message",
            )

    def _unavailable(self, operation: str, reason: str) -> StreamUnavailable:
        return StreamUnavailable(operation, self.stream, reason)

    async def _open(self) -> None:
        """Make the stream if it is missing, and let acknowledgements arrive."""
        version = self._connection.client.connected_server_version
        text = f"{version.major}.{version.minor}.{version.patch}"
        require_version((version.major, version.minor), text, self._feature, _NEEDED)
        if not self._acks.open:
            await self._acks.subscribe()
        await self._reads.run(OPEN, self._ensure, within=_WITHIN)

    def _forget(self) -> None:
        """Let the connection forget the stream."""
        self._reads.close()
        self._writes.close()

    async def _ensure(self) -> None:
        js = self._connection.jetstream
        info = await ensure_stream(js, self.stream, partial(js.add_stream, self._config))
        require_settings(info, self._config, self._unavailable, _OTHER_LIMITS)

    async def _make_again(self) -> bool:
        """Make the stream if it is gone. Returns whether it was."""
        try:
            await self._connection.jetstream.stream_info(self.stream)
        except nats.js.errors.NotFoundError:
            await self._ensure()
            return True
        return False
