"""Where one runtime reads the registry: from the bucket if it may, else from a worker. It is decided here alone."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Protocol

from natsrt.errors import JetStreamRequired, NatsrtError, PermissionDenied, RegistryUnavailable
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.registry.entries import KnownEntry
from natsrt.jetstream.registry.origin import Origin
from natsrt.jetstream.registry.pages import Stored
from natsrt.jetstream.registry.served import ServedRegistry
from natsrt.jetstream.registry.store import RegistryStore
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.registry")

Load = Callable[[int, AsyncGenerator[list[Stored], None]], Awaitable[None]]
"""Takes a snapshot: the revision that it is complete to, and its pages."""


class Readable(Protocol):
    """What can be read of a registry. See `RegistryStore` and `ServedRegistry`."""

    async def read(self, load: Load) -> None: ...

    async def last_change(self) -> int: ...

    async def is_known(self, agent_type: str) -> bool: ...

    async def known(self, agent_type: str | None = None) -> dict[str, KnownEntry]: ...

    async def some_known(self, limit: int) -> list[str]: ...


class RegistrySource:
    """The registry as one runtime reads it. The first snapshot decides where it is read from then on."""

    def __init__(self, connection: Connection, subjects: Subjects, options: Options, store: RegistryStore) -> None:
        self._store = store
        self._domain = Domain(options.jetstream_domain)
        self._served = ServedRegistry(connection, subjects, options)
        self._source: Readable | None = None
        self._forbidden: NatsrtError | None = None
        """Why the bucket cannot be read; None if it can be, or if that is not known yet."""

    @property
    def is_bucket(self) -> bool:
        """True if this runtime reads the bucket itself."""
        return self._source is self._store

    def says_nobody_lives(self, error: RegistryUnavailable) -> bool:
        """True if ``error`` was raised because no worker lives."""
        return error.reason == self._served.nobody

    @property
    def now(self) -> Readable:
        """Where the registry is read."""
        return self._source or self._store

    def close(self) -> None:
        """Find out again where the registry can be read, at the next snapshot."""
        self._source = self._forbidden = None

    @property
    def origin(self) -> Origin | None:
        """Which registry it is; None before the first snapshot, and if a worker of an older version tells it."""
        return self._served.origin if self._forbidden is not None else self._store.origin

    async def is_same(self) -> bool:
        """Whether the registry is still the one that `origin` names. Raises as the requests do."""
        return await (self._served.is_same() if self._source is self._served else self._store.is_same())

    async def open(self, above: int = 0) -> None:
        """Make the bucket if it is missing, where that is allowed. ``above``: see `RegistryStore.open`."""
        if self._source is not self._served:
            self._forbidden = None
            try:
                await self._store.open(above)
            except (PermissionDenied, JetStreamRequired) as error:
                self._leave_bucket(error)

    def _leave_bucket(self, error: PermissionDenied | JetStreamRequired) -> None:
        """Read the registry from workers, because of ``error``. Raises it if it does not forbid reading the bucket."""
        if self._source is self._store or not self._forbids_reading(error):
            raise error
        self._forbidden = error

    def _forbids_reading(self, error: NatsrtError) -> bool:
        """True if an error says that this user may not send requests to JetStream."""
        return isinstance(error, JetStreamRequired) or (
            isinstance(error, PermissionDenied)
            and error.operation == "publish to"
            and self._domain.plain(error.subject).startswith("$js.api.")
        )

    async def read(self, load: Load) -> None:
        """Give ``load`` a snapshot. Call `open` before. Raises as `RegistryStore` and `ServedRegistry` do."""
        if self._forbidden is None:
            try:
                await self._store.read(load)
                self._source = self._store
                return
            except (PermissionDenied, JetStreamRequired) as error:
                self._leave_bucket(error)
        try:
            await self._served.read(load)
        except (RegistryUnavailable, PermissionDenied) as error:
            if isinstance(self._forbidden, JetStreamRequired):
                raise self._forbidden from None
            raise error from self._forbidden
        if self._source is None:
            logger.info("this runtime reads the registry from workers, not from its bucket: %s", self._forbidden)
        self._source = self._served

    async def has_heartbeat(self, worker_id: str) -> bool:
        """Whether a worker's heartbeat is stored, and has not expired. Raises what nats-py raises.

        Raises `PermissionDenied` or `JetStreamRequired` if this runtime does not read the bucket.
        """
        if self._forbidden is not None:
            raise self._forbidden
        return await self._store.has_heartbeat(worker_id)
