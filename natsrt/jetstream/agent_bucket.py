"""The JetStream KV bucket of keyed agents: the requests that read and write it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from datetime import datetime
from typing import Any, Final, Protocol

import nats.js.errors
import orjson
from nats.aio.msg import Msg
from nats.js import api

from natsrt.errors import StateUnavailable
from natsrt.jetstream.acks import Acks
from natsrt.jetstream.buckets import MARKER_TTL, ensure_bucket, last_messages
from natsrt.jetstream.requests import OPEN, BucketRequests
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.agents")

AGENTS_BUCKET: Final = "natsrt_agents"
RETRY_FOR: Final = 10.0
"""Seconds for which a request that fails is repeated: writes fail for up to 7.5 s after the leader of a cluster was
killed."""
ANSWER_WITHIN: Final = 2.0
"""Seconds for one attempt. A request that arrives while a cluster elects a leader is never answered."""
_PAST_ALL_KEYS = 1_000_000_000
"""The first of the keys that a page of the stream's subjects lists. From there on there are none, so the server sends
their number only."""
_NO_MESSAGE = 10037
"""JetStream's error code for a subject without messages."""


class BucketListener(Protocol):
    """Is notified about the bucket. May not raise or block."""

    def bucket_replaced(self) -> None:
        """Called when the bucket was gone with all its entries, and there is a new one."""


class AgentBucket:
    """The bucket of keyed agents in one namespace.

    A bucket that is gone is made again. The revisions of a bucket start at the time at which it is made, in
    microseconds. So they are higher than all revisions of an earlier bucket, and a write that follows one of those is
    refused.

    Its methods make one attempt and raise what nats-py raises, except `open`. To have them repeated, run them through
    ``requests``.
    """

    def __init__(self, connection: Connection, subjects: Subjects, options: Options) -> None:
        self._connection = connection
        self._options = options
        self._name = subjects.bucket(AGENTS_BUCKET)
        self._stream = f"KV_{self._name}"
        self._prefix = f"$KV.{self._name}."
        self.info_subject: str = f"$JS.API.STREAM.INFO.{self._stream}"
        """The subject of requests for what the stream holds."""
        self.requests: BucketRequests = BucketRequests(
            connection,
            self._name,
            StateUnavailable,
            subscribed=(options.inbox_prefix,),
            retry_for=RETRY_FOR,
            patient=True,
            make_again=self._make_again,
        )
        self._acks = Acks(connection, options.inbox_prefix)
        self._opened: int | None = None
        """The connection's number of reconnects when the bucket was last found; None: not found yet, or in doubt."""
        self._opening = asyncio.Lock()
        self._created: datetime | None = None
        """When the bucket that was last found was made; None before."""
        self._replaced: int | None = None
        """The connection's number of reconnects when another bucket was found in place of the former; None: never."""
        self._listeners: list[BucketListener] = []

    def add_listener(self, listener: BucketListener) -> None:
        self._listeners.append(listener)

    def subject(self, key: str) -> str:
        """The subject of a key."""
        return self._prefix + key

    def key(self, subject: str) -> str:
        """The key of a subject."""
        return subject[len(self._prefix) :]

    def publish(self, subject: str, payload: bytes, headers: dict[str, str] | None = None) -> Coroutine[Any, Any, int]:
        """Publish to the stream: see `Acks.publish`."""
        return self._acks.publish(subject, payload, headers)

    @property
    def is_open(self) -> bool:
        """Whether the bucket was found since the last reconnect, and acknowledgements arrive."""
        return self._opened == self._connection.reconnects and self._acks.open

    @property
    def is_new(self) -> bool:
        """Whether another bucket was found since the last reconnect in place of the former one."""
        return self._replaced == self._connection.reconnects

    async def open(self) -> None:
        """Make the bucket if it is missing. Returns at once if it was found since the last reconnect.

        Raises `StateUnavailable`, `ServerUnreachable`, `PermissionDenied` or `JetStreamRequired`.
        """
        if self.is_open:
            return
        async with self._opening:
            if not self._acks.open:
                await self._acks.subscribe()
            reconnects = self._connection.reconnects
            if self._opened != reconnects:
                await self.requests.run(OPEN, self._ensure)
                self._opened = reconnects

    def doubt(self) -> None:
        """Let the next `open` look for the bucket again: it may have been deleted."""
        self._opened = None

    async def look(self) -> None:
        """Look for the bucket once, and make it if it is gone. Raises what nats-py raises."""
        await self._make_again()

    async def _make_again(self) -> bool:
        """Make the bucket if it is gone. Returns whether another bucket was found before."""
        known = self._created
        await self._ensure()
        return known is not None and known != self._created

    async def _ensure(self) -> None:
        config = api.KeyValueConfig(
            bucket=self._name,
            description="natsrt: owners and state of keyed agents",
            history=1,
            direct=True,
            replicas=self._options.registry_replicas,
            limit_marker_ttl=MARKER_TTL,
        )
        js = self._connection.jetstream
        info = await ensure_bucket(js, config, first_revision=time.time_ns() // 1000)
        known, self._created = self._created, info.created
        if known is not None and known != info.created:
            logger.warning("the bucket %s was gone with all its records, and was made again", self._name)
            self._replaced = self._connection.reconnects
            for listener in self._listeners:
                listener.bucket_replaced()

    async def last(self, key: str, *, direct: bool = False) -> api.RawStreamMsg | None:
        """The last message under ``key``; None if there is none.

        It is read from the stream's leader; with ``direct`` from any replica, which may lag behind.
        """
        try:
            return await self._connection.jetstream.get_last_msg(self._stream, self._prefix + key, direct=direct)
        except nats.js.errors.NotFoundError as error:
            if error.err_code not in (_NO_MESSAGE, None):  # a direct answer has no such code
                raise
            return None

    def all_headers(self, pattern: str) -> AsyncGenerator[list[Msg], None]:
        """The last message of every key that matches ``pattern``, with its headers only, in pages."""
        js = self._connection.jetstream
        return last_messages(js, self._stream, self._prefix + pattern, timeout=ANSWER_WITHIN, headers_only=True)

    async def count(self, pattern: str) -> int:
        """How many keys match ``pattern``, counted by the server.

        Deleted keys count too, for as long as their tombstones stay.
        """
        question = orjson.dumps({"subjects_filter": self._prefix + pattern, "offset": _PAST_ALL_KEYS})
        message = await self._connection.client.request(self.info_subject, question, timeout=ANSWER_WITHIN)
        answer = orjson.loads(message.data)
        if "error" in answer:
            raise nats.js.errors.APIError.from_error(answer["error"])
        return int(answer.get("total", 0))

    async def purge(self, pattern: str, before: int | None) -> None:
        """Delete all messages under keys that match ``pattern``; with ``before`` only those of a lower sequence."""
        await self._connection.jetstream.purge_stream(self._stream, seq=before, subject=self._prefix + pattern)
