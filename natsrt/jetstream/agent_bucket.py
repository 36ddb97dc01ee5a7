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
from natsrt.jetstream.buckets import ensure_bucket, last_messages, purge
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.requests import OPEN, BucketRequests
from natsrt.jetstream.stream_settings import MARKER_TTL
from natsrt.jetstream.streams import require_settings
from natsrt.jetstream.usage import Usage, of_stream
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.agents")

AGENTS_BUCKET: Final = "natsrt_agents"
RETRY_FOR: Final = 10.0
"""Seconds for which a request that fails is repeated: writes fail for up to 7.5 s after the leader of a cluster was
killed."""
ANSWER_WITHIN: Final = 2.0
"""Seconds for one attempt, beside the round trip. A request that arrives while a cluster elects a leader is never
answered."""
_PAST_ALL_KEYS = 1_000_000_000
"""The first of the keys that a page of the stream's subjects lists. From there on there are none, so the server sends
their number only."""
_NO_MESSAGE = 10037
"""JetStream's error code for a subject without messages."""


class BucketListener(Protocol):
    """Is notified about the bucket. May not raise or block."""

    def bucket_replaced(self) -> None:
        """Called when the bucket was gone with all its entries, and there is a new one that can be used; and when one
        that could not be used can be used again, since its entries may be gone.
        """


def agents_bucket(subjects: Subjects, options: Options) -> api.KeyValueConfig:
    """How the bucket of keyed agents of a namespace is made."""
    return api.KeyValueConfig(
        bucket=subjects.bucket(AGENTS_BUCKET),
        description="natsrt: owners and state of keyed agents",
        history=1,
        direct=True,
        replicas=options.registry_replicas,
        limit_marker_ttl=MARKER_TTL,
    )


class AgentBucket:
    """The bucket of keyed agents in one namespace.

    One whose settings are wrong is not used, nor one whose revisions are lower than those of records that were lost:
    they may be those of workers that still believe in the old ones.

    A bucket that is gone is made again. The revisions of a bucket start at the time at which it is made, in
    microseconds. So they are higher than all revisions of an earlier bucket, and a write that follows one of those is
    refused.

    Its methods make one attempt and raise what nats-py raises, except `open`. To have them repeated, run them through
    ``requests``.
    """

    def __init__(self, connection: Connection, subjects: Subjects, options: Options) -> None:
        self._connection = connection
        self._config = agents_bucket(subjects, options)
        self._name = subjects.bucket(AGENTS_BUCKET)
        self._stream = f"KV_{self._name}"
        self._prefix = f"$KV.{self._name}."
        self._domain = Domain(options.jetstream_domain)
        self.info_subject: str = self._domain.api(f"STREAM.INFO.{self._stream}")
        """The subject of requests for what the stream holds."""
        self.purge_subject: str = self._domain.api(f"STREAM.PURGE.{self._stream}")
        """The subject of requests that delete what the stream holds."""
        self.requests: BucketRequests = BucketRequests(
            connection,
            self._name,
            StateUnavailable,
            subscribed=(options.inbox_prefix,),
            domain=self._domain,
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
        self._looked_at = 0.0
        """The event loop's time at which the last look for the bucket began that found it."""
        self._lost_at = 0
        """The highest revision of a record that was lost."""
        self._listeners: list[BucketListener] = []
        self.is_lenient: bool = False
        """Whether a bucket that cannot be used is read nevertheless. Nothing may be written then."""
        self.problem: StateUnavailable | None = None
        """Why the bucket that was found last cannot be used; None if it can."""
        self.usage: Usage = {}
        """What was used of the bucket's limits when it was last found."""

    def add_listener(self, listener: BucketListener) -> None:
        self._listeners.append(listener)

    @property
    def _answer_within(self) -> float:
        return ANSWER_WITHIN + self._connection.rtt.allowance

    def subject(self, key: str) -> str:
        """The subject to publish a key's message to."""
        return self._domain.publish(self._prefix + key)

    def key(self, subject: str) -> str:
        """The key of a stored message's subject."""
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
        """Look for the bucket once, and make it if it is gone. Raises what nats-py raises, and `StateUnavailable` if it
        cannot be used.
        """
        await self._make_again()

    async def confirm(self, lost_at: int) -> None:
        """Look for the bucket again, because a record is missing that was at the revision ``lost_at``: it may be
        another bucket. Of many who ask at once, few look. Raises as `open` does, also if the bucket's revisions are
        lower.
        """
        self._lost_at = max(self._lost_at, lost_at)
        asked = asyncio.get_running_loop().time()
        async with self._opening:
            if self._looked_at < asked:
                await self.requests.run(OPEN, self._ensure)

    async def _make_again(self) -> bool:
        """Make the bucket if it is gone. Returns whether another bucket was found before."""
        known = self._created
        await self._ensure()
        return known is not None and known != self._created

    async def _ensure(self) -> None:
        began = asyncio.get_running_loop().time()
        info = await ensure_bucket(self._connection.jetstream, self._config, first_revision=time.time_ns() // 1000)
        self.usage = of_stream(info)
        try:
            self._require_revisions(info)
            require_settings(info, self._config, StateUnavailable)
        except StateUnavailable as error:
            known_problem, self.problem = self.problem, error
            if self.is_lenient:
                if known_problem is None:
                    logger.warning("%s", error)
                return
            if known_problem is None:
                logger.error("%s. The agents of this worker stay in memory until then", error)
            self._opened = None
            raise
        self._looked_at = began
        mended, self.problem = self.problem is not None, None
        known, self._created = self._created, info.created
        if known is not None and known != info.created:
            logger.warning("the bucket %s was gone with all its records, and there is a new one", self._name)
            self._replaced = self._connection.reconnects
        elif not mended:
            return
        for listener in self._listeners:
            listener.bucket_replaced()

    def _require_revisions(self, info: api.StreamInfo) -> None:
        """Raise `StateUnavailable` if a record that is stored now could have a revision that was given before."""
        if info.state.last_seq < self._lost_at:
            raise StateUnavailable(
                OPEN,
                f"the bucket {self._name} was made anew and is only at revision {info.state.last_seq}, and records "
                f"were lost at revision {self._lost_at}: delete it, and natsrt makes it; or make it with a first_seq "
                "above that (docs/operations.md, Buckets)",
            )

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
        return last_messages(js, self._stream, self._prefix + pattern, timeout=self._answer_within, headers_only=True)

    async def count(self, pattern: str) -> int:
        """How many keys match ``pattern``, counted by the server.

        Deleted keys count too, for as long as their tombstones stay.
        """
        question = orjson.dumps({"subjects_filter": self._prefix + pattern, "offset": _PAST_ALL_KEYS})
        message = await self._connection.client.request(self.info_subject, question, timeout=self._answer_within)
        answer = orjson.loads(message.data)
        if "error" in answer:
            raise nats.js.errors.APIError.from_error(answer["error"])
        return int(answer.get("total", 0))

    async def purge(self, pattern: str, before: int | None) -> int:
        """Delete all messages under keys that match ``pattern``; with ``before`` only those of a lower sequence.

        Returns the number of messages that were deleted. Needs no room, so it works where JetStream is full.
        """
        return await purge(self._connection.jetstream, self._stream, self._prefix + pattern, before)
