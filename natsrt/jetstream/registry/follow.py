"""Follows the registry: a snapshot, then every committed change in the stream's order.

Changes come over a plain subscription to what the stream republishes, not over a KV watch, which can be blind for 20 s
after a server restart. After each reconnect, and when a change shows that one before it was missed, a new snapshot is
read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import nats.errors
from nats.aio.msg import Msg

from natsrt.background import BackgroundTasks
from natsrt.errors import CannotDecode, NatsrtError, RegistryUnavailable
from natsrt.jetstream.buckets import is_gone
from natsrt.jetstream.registry.entries import FEED, HEARTBEAT, RegistryEntry, decode_entry
from natsrt.jetstream.registry.origin import ANSWER, ORIGIN, Origin
from natsrt.jetstream.registry.pages import Stored
from natsrt.jetstream.registry.source import RegistrySource
from natsrt.jetstream.registry.store import IN_ORDER, LEFT
from natsrt.jetstream.registry.view import View
from natsrt.options import Options
from natsrt.transport.connection import Connection, Interest
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.registry")

_LONGEST_PAUSE = 5.0
"""Seconds between two attempts to read a snapshot at most."""
_FAR = 10**9
"""Revisions between two changes of one bucket at most. The first revision of a bucket is the time, in microseconds."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the registry, as it was applied to the view."""

    key: str
    deletes: bool
    """True for a deletion."""
    before: RegistryEntry | None
    """The entry in the view before the change; None if there was none."""
    after: RegistryEntry | None
    """The entry in the view after the change, which may be a newer one; None if there is none."""


class FollowerOwner(Protocol):
    """What acts on the changes that a follower sees."""

    def rules_changed(self, agent_type: str) -> None:
        """The subscriptions in force for a type may have changed."""

    def view_changed(self) -> None:
        """The view was replaced, or a change was applied to it."""

    def entry_changed(self, change: Change) -> None:
        """An entry was stored or deleted, by whatever runtime."""

    def elsewhere(self, origin: Origin | None, *, is_answer: bool) -> None:
        """A change was stored in another bucket: this one was replaced, or there are two.

        ``origin`` None: it tells none. ``is_answer``: it was only stored because the other one heard of this one.
        """

    def workers_without_heartbeat(self, worker_ids: Collection[str]) -> None:
        """A snapshot has entries of these workers, and no heartbeat."""

    async def restore(self, *, everything: bool = False) -> None:
        """A snapshot was read: store again what this runtime declared and is not there. ``everything``: the bucket is
        another one, and no snapshot of it was read.
        """


class Follower:
    """The view of one runtime, kept in step with the bucket. A `Listener` of its connection."""

    def __init__(
        self, connection: Connection, subjects: Subjects, options: Options, source: RegistrySource, owner: FollowerOwner
    ) -> None:
        self._connection = connection
        self._options = options
        self._source = source
        self._owner = owner
        self._feed = subjects.registry_feed
        self._feed_prefix = len(subjects.registry_feed) + 1
        self._interest: Interest | None = None
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._collected: list[Msg] | None = None
        """The changes that came while a snapshot is read; None while none is."""
        self._tasks = BackgroundTasks(logger, "following the registry failed")
        self._syncing: asyncio.Task[None] | None = None
        self._reading = asyncio.Lock()
        self._generation = 0
        """How many new snapshots were asked for."""
        self._open = False
        self._synced = asyncio.Event()
        self.departed_at: float = float("-inf")
        """The event loop's time at which a worker last left without having answered everything."""
        self.told_at: float = float("-inf")
        """The event loop's time at which a change last told which registry this one is."""
        self.problem: str = ""
        """Why this runtime is not in step, as far as it is known; empty if it is."""
        self.view: View = View()
        connection.add_listener(self)

    @property
    def synced(self) -> bool:
        """Whether the view is complete and this runtime's own entries are stored."""
        return self._synced.is_set() and self._connection.connected

    async def in_step(self) -> None:
        """Wait until `synced` is true. Waits end in the order in which they began."""
        while not self.synced:
            await self._synced.wait()

    @property
    def is_open(self) -> bool:
        return self._open

    # -- lifecycle -----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Make the bucket if it is missing, and read the first snapshot. Raises as `RegistrySource` does."""
        self.view = View()
        self._open = True
        try:
            self._interest = await self._connection.subscribe(f"{self._feed}.>", self._on_change)
            await self._source.open()
            await self._read_snapshot()
        except BaseException:
            self._open = False
            raise
        self._synced.set()

    async def stop(self) -> None:
        """Read no more snapshots; changes are still applied until `close`."""
        self._open = False
        self._synced.clear()
        await self._tasks.cancel()

    async def close(self) -> None:
        """Stop following. Harmless when closed."""
        for _, waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(RegistryUnavailable("follow", "this runtime was stopped"))
                waiter.exception()  # nobody has to wait for it
        self._waiting.clear()
        if self._interest is not None:
            await self._connection.unsubscribe(self._interest)
            self._interest = None

    def connection_lost(self) -> None:
        self._synced.clear()

    def connection_made(self) -> None:
        if self._open and self._interest is not None:
            self.resync()

    # -- changes -------------------------------------------------------------------------------------------------

    def _on_change(self, message: Msg) -> None:
        if self._collected is not None:
            self._collected.append(message)
        else:
            self._apply(message)

    def _apply(self, message: Msg) -> None:
        headers = message.headers or {}
        key = f"{FEED}.{message.subject[self._feed_prefix :]}"
        try:
            revision, before = int(headers["Nats-Sequence"]), int(headers.get("Nats-Last-Sequence", 0))
        except (KeyError, ValueError):
            raise CannotDecode(f"a message on {message.subject}", "it is not from the registry's stream") from None
        if self._is_elsewhere(headers, revision):
            self._owner.elsewhere(Origin.of(headers), is_answer=ANSWER in headers)
            return
        if ORIGIN in headers:
            self.told_at = asyncio.get_running_loop().time()
        known = self.view.revision_of(key)
        if known and known < before:
            self.resync()
        try:
            self._change(key, revision, headers, message.data)
        finally:  # one that cannot be read, perhaps of a newer runtime, is seen too
            self.view.saw(revision)
            self._wake()

    def _is_elsewhere(self, headers: dict[str, str], revision: int) -> bool:
        """True if a change was stored in another bucket than the one that this runtime follows.

        The server's marks of what has expired, and what older participants store, tell no origin. Those of another
        bucket have revisions that are far away, unless the two were made within minutes.
        """
        own, origin = self._source.origin, Origin.of(headers)
        if own is None:
            return False
        if origin is not None:
            return origin.created != own.created
        return self.view.applied > 0 and abs(revision - self.view.applied) > _FAR

    def _change(self, key: str, revision: int, headers: dict[str, str], value: bytes) -> None:
        before, deletes, touched = self.view.entry(key), is_gone(headers), set[str]()
        if deletes:
            workers = len(self.view.workers)
            touched = self.view.delete(key, revision)
            if len(self.view.workers) < workers and headers.get(LEFT) != IN_ORDER:
                self.departed_at = asyncio.get_running_loop().time()
        else:
            touched = self.view.put(key, revision, self._decoded(self.view, key, value))
        self._owner.entry_changed(Change(key, deletes, before, self.view.entry(key)))
        for agent_type in touched:
            self._owner.rules_changed(agent_type)

    def _wake(self) -> None:
        still = []
        for revision, waiter in self._waiting:
            if revision <= self.view.applied:
                if not waiter.done():
                    waiter.set_result(None)
            else:
                still.append((revision, waiter))
        self._waiting = still
        self._owner.view_changed()

    async def shown(self, revision: int) -> None:
        """Wait until the view contains ``revision``. Raises `RegistryUnavailable` when it does not come."""
        if revision <= self.view.applied:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append((revision, waiter))
        try:
            async with asyncio.timeout(self._options.subscription_timeout + self._connection.rtt.allowance):
                await waiter
        except TimeoutError:
            self.resync()
            raise RegistryUnavailable("follow", f"change {revision} was stored but not announced") from None

    # -- snapshots -----------------------------------------------------------------------------------------------

    async def _read_snapshot(self) -> None:
        """Replace the view by what the stream holds; what the feed brings meanwhile is applied after it."""
        async with self._reading:
            await self._replace_view()

    async def _replace_view(self) -> None:
        self._collected = []
        stale = self.view
        try:
            await self._connection.barrier()
            await self._source.read(self._load)
            if not stale.workers.keys() <= self.view.workers.keys():
                self.departed_at = asyncio.get_running_loop().time()
        finally:
            collected, self._collected = self._collected, None
            for message in collected:
                try:
                    self._apply(message)
                except CannotDecode as error:
                    logger.warning("%s", error)
        for agent_type in {*stale.declared, *self.view.declared}:
            self._owner.rules_changed(agent_type)
        self._wake()

    async def _load(self, complete_to: int, pages: AsyncGenerator[list[Stored], None]) -> None:
        view, alive = View(), set[str]()
        view.saw(complete_to)
        async with aclosing(pages):
            async for page in pages:
                for stored in page:
                    self._load_one(stored, view, alive)
        # Also those whose entry is gone, but not all that they declared: their removal was not finished.
        self._owner.workers_without_heartbeat({*view.workers, *view.of_worker} - alive)
        self.view = view

    @staticmethod
    def _decoded(view: View, key: str, value: bytes) -> RegistryEntry:
        """The entry under ``key``. Raises `CannotDecode`, and the view then knows why the entry counts for nothing."""
        try:
            return decode_entry(key, value)
        except CannotDecode as error:
            view.unreadable[key] = error.reason
            raise

    def _load_one(self, stored: Stored, view: View, alive: set[str]) -> None:
        key, revision, value = stored
        if key.startswith(f"{HEARTBEAT}."):
            if value is not None:
                alive.add(key[len(HEARTBEAT) + 1 :])
        elif value is None:
            view.delete(key, revision)
        else:
            try:
                view.put(key, revision, self._decoded(view, key, value))
            except CannotDecode as error:
                view.saw(revision)
                logger.warning("%s", error)

    def resync(self, problem: str = "") -> None:
        """Read a new snapshot, and store again what is missing in it. ``problem`` says why; empty: it is not known."""
        self.problem = problem or self.problem
        self._generation += 1  # one that is under way is not enough: it may have read before what matters now
        if self._syncing is None or self._syncing.done():
            self._syncing = self._tasks.spawn(self._synchronise())

    async def _open_store(self) -> None:
        """Make the bucket if it is missing. If it is not the one that was known, this runtime's own entries are stored
        before the snapshot is read, so that its subscriptions stay in force.
        """
        known = self._source.origin
        await self._source.open(self.view.applied)
        if known not in (None, self._source.origin):
            logger.warning("the registry was gone with all its entries: this runtime stores its own ones again")
            await self._owner.restore(everything=True)

    async def _synchronise(self) -> None:
        """Bucket, snapshot, own entries. Tries until it succeeds without another `resync` meanwhile."""
        pause = self._options.reconnect_wait
        while self._open:
            self._synced.clear()
            generation = self._generation
            try:
                await self._open_store()
                await self._read_snapshot()
                await self._owner.restore()
                if generation == self._generation:
                    self.problem = ""
                    self._synced.set()
                    return
            except Exception as error:  # whatever it is, the registry comes back
                known = isinstance(error, NatsrtError | nats.errors.Error)
                self.problem = str(error)
                logger.info("the registry is not back yet: %s", error, exc_info=None if known else error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
