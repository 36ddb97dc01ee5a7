"""Who lives: this worker's heartbeat, and the removal of workers whose heartbeats have ended.

Heartbeats are outside the feed, so an idle runtime hears nothing of idle workers. Every worker looks after the next one
in the order of worker ids, and any other runtime after one by chance. A worker is removed when its heartbeat has
expired and it does not answer either. Removing it twice changes nothing.

A runtime whose heartbeats are not stored any more hears nothing of the registry either: JetStream does not answer, or a
link to its domain is cut. Others may have removed it. So it is out of step until the registry can be read again. If
only the heartbeat is refused, as where the disk is full, it stays in step: others ask it before they remove it.
"""

from __future__ import annotations

import asyncio
import logging
import random

import nats.errors

from natsrt.background import BackgroundTasks
from natsrt.errors import NatsrtError, PermissionDenied
from natsrt.jetstream.registry.declare import Declared
from natsrt.jetstream.registry.follow import Follower
from natsrt.jetstream.registry.source import RegistrySource
from natsrt.jetstream.registry.store import RegistryStore
from natsrt.jetstream.requests import BucketRequests
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.transport.peers import Peers, alive_within

logger: logging.Logger = logging.getLogger("natsrt.registry")

_KNOWN_REFRESH = 12 * 3600
"""Seconds between two confirmations of what this worker's types handle: a third of the time for which it stays."""

_ANSWER_WITHIN = 2.0
"""Seconds that JetStream gets to answer, beside the round trip to the server, when no heartbeat was stored for long."""
_RESERVE_EVERY = 30.0
"""Seconds between two looks whether the registry has its reserve."""


class Liveness:
    """Keeps one worker alive in the registry, and looks after others."""

    def __init__(
        self,
        connection: Connection,
        options: Options,
        store: RegistryStore,
        source: RegistrySource,
        follower: Follower,
        declared: Declared,
        peers: Peers | None,
    ) -> None:
        """``peers`` None: dead workers are left to others."""
        self._connection = connection
        self._options = options
        self._store = store
        self._source = source
        self._follower = follower
        self._declared = declared
        self._peers = peers
        self._examined: set[str] = set()
        """The workers that are being examined."""
        self._tasks = BackgroundTasks(logger, "looking after workers failed")

    def start(self) -> None:
        """Begin to look after others."""
        if self._peers is not None:
            self._tasks.spawn(self._look_after_others())

    async def stop(self) -> None:
        await self._tasks.cancel()

    def keep_alive(self, runtime_id: str) -> None:
        """Send heartbeats until this runtime leaves."""
        self._tasks.spawn(self._heartbeats(runtime_id))
        self._tasks.spawn(self._watch_heartbeats(runtime_id))

    def suspect(self, worker_id: str) -> None:
        """A worker may be dead: find out, and remove it then."""
        if self._peers is not None:
            self._tasks.spawn(self._remove_if_dead(worker_id))

    async def _heartbeats(self, runtime_id: str) -> None:
        loop = asyncio.get_running_loop()
        known_since = reserve_kept = loop.time()
        while self._declared.alive_as == runtime_id:
            await asyncio.sleep(self._options.heartbeat_interval)
            if not self._connection.connected or self._declared.alive_as != runtime_id:
                continue
            try:
                overdue = self._declared.is_overdue(self._options.heartbeat_ttl)
                await self._declared.beat()
                if overdue:  # others may have removed this worker
                    self._follower.resync()
                now = loop.time()
                if now - reserve_kept > _RESERVE_EVERY and self._declared.worker is not None:
                    reserve_kept = now
                    await self._store.reserve.keep()
                if now - known_since > _KNOWN_REFRESH:
                    known_since = now
                    await self._declared.confirm_known()
            except NatsrtError as error:
                logger.debug("heartbeat: %s", error)

    async def _watch_heartbeats(self, runtime_id: str) -> None:
        """Put this runtime out of step when its last heartbeat has expired, and nothing answers for the bucket."""
        loop, ttl = asyncio.get_running_loop(), self._options.heartbeat_ttl
        while self._declared.alive_as == runtime_id:
            await asyncio.sleep(self._options.heartbeat_interval)
            if loop.time() < self._declared.beaten_at + ttl or not self._follower.synced:
                continue
            problem = await self._silence()
            if problem and self._follower.synced and self._declared.alive_as == runtime_id:
                logger.warning("no heartbeat of this runtime was stored for %g s: %s", ttl, problem)
                self._follower.resync(f"No heartbeat of it was stored for {ttl:g} s: {problem}.")

    async def _silence(self) -> str:
        """Why nothing answers for the registry's bucket; empty if something does."""
        try:
            async with asyncio.timeout(_ANSWER_WITHIN + self._connection.rtt.allowance):
                await self._source.is_same()
        except (NatsrtError, nats.errors.Error, OSError) as error:  # a TimeoutError is an OSError, without a text
            return str(error) or BucketRequests.SILENT
        return ""

    async def _look_after_others(self) -> None:
        while self._peers is not None:
            await asyncio.sleep(self._options.heartbeat_interval)
            if self._connection.connected and (worker_id := self._one_to_look_after()) is not None:
                await self._remove_if_dead(worker_id)

    def _one_to_look_after(self) -> str | None:
        workers = self._follower.view.workers
        if self._declared.worker is None:
            return random.choice(list(workers)) if workers else None
        own = self._declared.worker.worker_id
        ring = sorted({*workers, own})
        following = ring[(ring.index(own) + 1) % len(ring)]
        return following if following != own else None

    async def _remove_if_dead(self, worker_id: str) -> None:
        """Remove a worker that has no heartbeat and does not answer."""
        if worker_id in self._examined or self._peers is None:
            return
        self._examined.add(worker_id)
        try:
            within = alive_within(self._options)
            if await self._source.has_heartbeat(worker_id) or await self._peers.alive(worker_id, within):
                return
            view = self._follower.view
            if not (worker_id in view.workers or worker_id in view.of_worker) and self._follower.synced:
                return  # another one was faster
            logger.info("worker %s has no heartbeat and does not answer: removing its entries", worker_id)
            await self._store.remove_worker(worker_id)
        except PermissionDenied as error:
            self._peers = None
            logger.info("this runtime leaves the entries of dead workers to others: %s", error)
        except (NatsrtError, nats.errors.Error) as error:
            logger.debug("looking after worker %s: %s", worker_id, error)
        finally:
            self._examined.discard(worker_id)
