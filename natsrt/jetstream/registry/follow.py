"""Following the registry: a snapshot of the bucket, then every change in the stream's order.

Changes come over a plain subscription to what the stream republishes, not over a KV watch, which can miss changes for
20 s after a server restart. Where changes may have been missed, the follower *resyncs*: it makes the bucket if that is
gone, reads a new snapshot, and lets its listeners restore what they have stored. This happens after each reconnect, and
when a change shows that the change before it was missed.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

import nats.errors
from nats.aio.msg import Msg

from natsrt.background import BackgroundTasks
from natsrt.errors import CannotDecode, NatsrtError, RegistryUnavailable
from natsrt.jetstream.buckets import is_gone
from natsrt.jetstream.registry.bucket import IN_ORDER, LEFT, RegistryBucket
from natsrt.jetstream.registry.entries import FEED, decode_entry
from natsrt.jetstream.registry.view import View
from natsrt.options import Options
from natsrt.transport.connection import Connection, Interest

logger = logging.getLogger("natsrt.registry")

_LONGEST_PAUSE = 5.0
"""Seconds between two attempts to resync, at most. The first pause is ``reconnect_wait``; each further one doubles."""


class FollowerListener(Protocol):
    """Is informed of what a `Follower` sees. Only `restore` may wait or raise."""

    def rules_changed(self, agent_type: str) -> None:
        """The subscriptions in force for a type may have changed."""

    def entry_deleted(self, key: str) -> None:
        """The deletion or the expiry of an entry arrived, and was applied to the view."""

    def heartbeat_missing(self, worker_id: str) -> None:
        """A snapshot has entries of this worker, but no heartbeat."""

    async def restore(self) -> None:
        """Store what the view should have and does not have. Part of every resync, which is repeated if this raises."""


class Follower:
    """Keeps a `View` of the registry complete. Writes nothing, but makes the bucket. A connection `Listener`."""

    def __init__(self, connection: Connection, bucket: RegistryBucket, options: Options) -> None:
        self._connection = connection
        self._bucket = bucket
        self._options = options
        self._key_start = len(bucket.feed) + 1
        self._listeners: list[FollowerListener] = []
        self._interest: Interest | None = None
        self._tasks = BackgroundTasks(logger, "following the registry failed")
        self._resyncing: asyncio.Task[None] | None = None
        self._resyncs_wanted = 0
        """How often a resync was asked for."""
        self._complete = False
        self._collected: list[Msg] | None = None
        """The changes that arrived while a snapshot is being read; None while none is."""
        self._reading = asyncio.Lock()
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        """Those that wait until the view contains a revision."""
        self._last_loss = float("-inf")
        self.view = View()
        self.is_open = False
        connection.add_listener(self)

    def add_listener(self, listener: FollowerListener) -> None:
        self._listeners.append(listener)

    @property
    def synced(self) -> bool:
        """Whether the view is complete, and the listeners have restored what they store."""
        return self._complete and self._connection.connected

    def all_stayed(self, since: float) -> bool:
        """Whether no worker was lost since the moment ``since`` of the event loop's clock. Workers that left in order
        do not count."""
        return self._last_loss < since and self.synced

    # -- lifecycle -----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Make the bucket if it is missing, and read the snapshot.

        Raises `JetStreamRequired`, `PermissionDenied` or `RegistryUnavailable`.
        """
        self.view = View()
        self.is_open = True
        try:
            self._interest = await self._connection.subscribe(f"{self._bucket.feed}.>", self._on_change)
            await self._bucket.ensure()
            await self._read_snapshot()
        except BaseException:
            self.is_open = False
            raise
        self._complete = True

    async def close(self) -> None:
        """Stop following. Harmless when closed."""
        self.is_open = False
        self._complete = False
        await self._tasks.cancel()
        for _, waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(RegistryUnavailable("follow", "this runtime was stopped"))
                waiter.exception()  # so that asyncio does not log it if nobody awaits the waiter any more
        self._waiting.clear()
        if self._interest is not None:
            await self._connection.unsubscribe(self._interest)
            self._interest = None

    def connection_lost(self) -> None:
        self._complete = False

    def connection_made(self) -> None:
        if self.is_open and self._interest is not None:
            self.resync()

    # -- changes -------------------------------------------------------------------------------------------------

    def _on_change(self, message: Msg) -> None:
        if self._collected is not None:
            self._collected.append(message)
        else:
            self._apply(message)

    def _apply(self, message: Msg) -> None:
        headers = message.headers or {}
        key = f"{FEED}.{message.subject[self._key_start :]}"
        try:
            revision, before = int(headers["Nats-Sequence"]), int(headers.get("Nats-Last-Sequence", 0))
        except (KeyError, ValueError):
            raise CannotDecode(f"a message on {message.subject}", "it is not from the registry's stream") from None
        if 0 < self.view.revision_of(key) < before:
            self.resync()
        try:
            self._change(key, revision, headers, message.data)
        finally:  # an entry that cannot be read, perhaps of a newer runtime, counts as seen too
            self.view.advance(revision)
            self._wake()

    def _change(self, key: str, revision: int, headers: dict[str, str], value: bytes) -> None:
        if is_gone(headers):
            workers = len(self.view.workers)
            touched = self.view.delete(key, revision)
            if len(self.view.workers) < workers and headers.get(LEFT) != IN_ORDER:
                self._last_loss = asyncio.get_running_loop().time()
            for listener in self._listeners:
                listener.entry_deleted(key)
        else:
            touched = self.view.put(key, revision, decode_entry(key, value))
        for agent_type in touched:
            self._announce_rules(agent_type)

    def _announce_rules(self, agent_type: str) -> None:
        for listener in self._listeners:
            listener.rules_changed(agent_type)

    # -- waiting for a revision ----------------------------------------------------------------------------------

    def _wake(self) -> None:
        still = []
        for revision, waiter in self._waiting:
            if revision <= self.view.applied:
                if not waiter.done():
                    waiter.set_result(None)
            else:
                still.append((revision, waiter))
        self._waiting = still

    async def shown(self, revision: int) -> None:
        """Wait until the view contains ``revision``.

        Raises `RegistryUnavailable` if it does not arrive within ``subscription_timeout`` seconds.
        """
        if revision <= self.view.applied:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append((revision, waiter))
        try:
            async with asyncio.timeout(self._options.subscription_timeout):
                await waiter
        except TimeoutError:
            self.resync()
            raise RegistryUnavailable("follow", f"change {revision} was stored but not announced") from None

    async def catch_up(self) -> None:
        """Wait until the view contains everything that is committed now. Raises as `RegistryBucket` and `shown` do."""
        await self.shown(await self._bucket.last_revision())

    # -- snapshots -----------------------------------------------------------------------------------------------

    async def _read_snapshot(self) -> None:
        """Replace the view by what the stream holds. Changes that arrive meanwhile are applied afterwards."""
        async with self._reading:
            await self._replace_view()

    async def _replace_view(self) -> None:
        self._collected = []
        stale = self.view
        try:
            await self._connection.barrier()
            self.view, without_heartbeat = await self._bucket.read()
            for worker_id in without_heartbeat:
                for listener in self._listeners:
                    listener.heartbeat_missing(worker_id)
            if not stale.workers.keys() <= self.view.workers.keys():
                self._last_loss = asyncio.get_running_loop().time()
        finally:
            self._apply_collected()
        for agent_type in {*stale.declared, *self.view.declared}:
            self._announce_rules(agent_type)
        self._wake()

    def _apply_collected(self) -> None:
        collected, self._collected = self._collected or [], None
        for message in collected:
            try:
                self._apply(message)
            except CannotDecode as error:
                logger.warning("%s", error)

    def resync(self) -> None:
        """Read everything again in the background, until that succeeds.

        A resync that is running is followed by another one: it may have read before the change that matters now.
        """
        self._resyncs_wanted += 1
        if self._resyncing is None or self._resyncing.done():
            self._resyncing = self._tasks.spawn(self._resync())

    async def _resync(self) -> None:
        pause = self._options.reconnect_wait
        while self.is_open:
            self._complete = False
            wanted = self._resyncs_wanted
            try:
                await self._bucket.ensure()
                await self._read_snapshot()
                for listener in self._listeners:
                    await listener.restore()
                if wanted == self._resyncs_wanted:
                    self._complete = True
                    return
            except Exception as error:  # of any kind: a registry that never resyncs again would be worse
                known = isinstance(error, NatsrtError | nats.errors.Error)
                logger.info("the registry is not back yet: %s", error, exc_info=None if known else error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
