"""Room in the registry's bucket that is freed where JetStream is full.

JetStream has limits for each account, server and bucket, but keeps no room for one bucket while others fill the rest.
So the registry stores some messages without meaning. A write of the registry that is refused because of a limit deletes
one of them and is sent again. So a worker can register, renew its heartbeat and leave where no state can be stored.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from natsrt.errors import JetStreamFull, NatsrtError
from natsrt.jetstream.buckets import purge
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.limits import DISK, MESSAGE_SIZE
from natsrt.jetstream.registry.entries import RESERVE
from natsrt.jetstream.requests import OPEN, WRITE, BucketRequests
from natsrt.jetstream.usage import Usage, of_account, of_stream
from natsrt.transport.connection import Connection

logger: logging.Logger = logging.getLogger("natsrt.registry")

_PARTS = 8
"""Parts of the reserve. Each makes room once; several, since others may take the room that one has freed."""
_PART_BYTES = 16 * 1024
"""Bytes of one part: more than a worker with 20 types and their subscriptions declares."""
_HEADER_BYTES = 256
"""Room for the headers of a part, where the server's max_payload is small. The server counts them, and closes the
connection of a client that sends more."""
_SHARE = 8
"""The reserve takes at most one eighth of the storage that the account or the bucket may have."""

T = TypeVar("T")


class Reserve:
    """The reserve of one registry."""

    def __init__(
        self, connection: Connection, stream: str, prefix: str, requests: BucketRequests, domain: Domain
    ) -> None:
        self._connection = connection
        self._stream = stream
        self._subjects = f"{prefix}{RESERVE}."
        self._requests = requests
        self._domain = domain
        self.usage: Usage = {}
        """What was used of the limits of the account and of the registry's bucket, when `keep` last ran."""

    async def used_by(self, request: Callable[[], Awaitable[T]]) -> T:
        """Run a request that writes to the bucket. Where JetStream is full, it uses the reserve up, part by part.

        Raises as `BucketRequests.run` does.
        """
        for part in range(_PARTS):
            try:
                return await self._requests.run(WRITE, request)
            except JetStreamFull as full:
                if full.limit in (DISK, MESSAGE_SIZE) or not await self._free(part):
                    raise
        return await self._requests.run(WRITE, request)

    async def _free(self, first: int) -> bool:
        """Delete one part, from the ``first`` on. Returns False if there is none, or if this is not possible."""
        try:
            for part in range(first, _PARTS):
                free = partial(purge, self._connection.jetstream, self._stream, f"{self._subjects}{part}")
                if await self._requests.run(WRITE, free):
                    logger.warning(
                        "JetStream is full: the registry uses part %d of its reserve of %d", part + 1, _PARTS
                    )
                    return True
        except NatsrtError as error:
            logger.debug("the registry's reserve cannot be used: %s", error)
        return False

    async def keep(self) -> None:
        """Store the parts that are missing, as far as there is room, and measure what is used. Does not fail."""
        try:
            await self._requests.run(OPEN, self._store_missing)
        except NatsrtError as error:
            logger.debug("the registry's reserve is not complete: %s", error)

    async def _store_missing(self) -> None:
        js = self._connection.jetstream
        info = await js.stream_info(self._stream, subjects_filter=f"{self._subjects}*")
        self.usage = of_stream(info) | of_account(await js.account_info())
        present = info.state.subjects or {}
        filling = bytes(min(_PART_BYTES, self._connection.max_payload - _HEADER_BYTES))
        for part in range(_PARTS - self._wanted, _PARTS):
            if (subject := f"{self._subjects}{part}") not in present:
                await js.publish(self._domain.publish(subject), filling, stream=self._stream)

    @property
    def _wanted(self) -> int:
        """How many parts the reserve should have."""
        limits = [limit for name, (_, limit) in self.usage.items() if name.endswith((": max_bytes", ": max_file"))]
        return min(_PARTS, min(limits, default=_PARTS * _PART_BYTES * _SHARE) // (_SHARE * _PART_BYTES))
