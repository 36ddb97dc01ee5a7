"""Which workers are alive: this worker's heartbeats, and the removal of workers that have died.

Heartbeats are not republished to the feed, so an idle runtime receives nothing from idle workers. Every worker checks
the next worker in the order of worker ids; a runtime that is no worker checks one at random. A worker is removed if its
heartbeat has expired and it does not answer either. A worker that was removed while it was frozen or cut off declares
itself again.
"""

from __future__ import annotations

import asyncio
import logging
import random

import nats.errors

from natsrt.background import BackgroundTasks
from natsrt.errors import NatsrtError, PermissionDenied
from natsrt.jetstream.registry.bucket import KNOWN_REFRESH, RegistryBucket
from natsrt.jetstream.registry.declare import OwnEntries
from natsrt.jetstream.registry.entries import WorkerEntry
from natsrt.jetstream.registry.follow import Follower
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.transport.peers import Peers

logger = logging.getLogger("natsrt.registry")


class Liveness:
    """Keeps this worker's entries alive, and removes those of dead workers."""

    def __init__(
        self,
        connection: Connection,
        bucket: RegistryBucket,
        follower: Follower,
        own: OwnEntries,
        peers: Peers,
        options: Options,
    ) -> None:
        self._connection = connection
        self._bucket = bucket
        self._follower = follower
        self._own = own
        self._peers = peers
        self._interval = options.heartbeat_interval
        self._tasks = BackgroundTasks(logger, "looking after the workers in the registry failed")
        self._examined: set[str] = set()
        """Ids of the workers that are being examined."""
        self._may_remove = True
        """False after the server refused to let this runtime remove entries."""

    def start(self) -> None:
        """Check other workers from time to time, until `stop`."""
        self._tasks.spawn(self._check_others())

    async def stop(self) -> None:
        """End heartbeats and checks. Harmless when stopped."""
        await self._tasks.cancel()

    # -- this worker ---------------------------------------------------------------------------------------------

    def keep_alive(self, worker: WorkerEntry) -> None:
        """Send heartbeats for this worker until it leaves, or until `stop`."""
        self._tasks.spawn(self._send_heartbeats(worker.worker_id))

    async def _send_heartbeats(self, worker_id: str) -> None:
        refreshed_at = asyncio.get_running_loop().time()
        while self._is_own(worker_id):
            await asyncio.sleep(self._interval)
            if not self._connection.connected or not self._is_own(worker_id):
                continue
            try:
                await self._bucket.beat(worker_id)
                now = asyncio.get_running_loop().time()
                if now - refreshed_at > KNOWN_REFRESH:
                    refreshed_at = now
                    await self._own.refresh_known()
            except NatsrtError as error:
                logger.debug("heartbeat: %s", error)

    def _is_own(self, worker_id: str) -> bool:
        return self._own.worker is not None and self._own.worker.worker_id == worker_id

    # -- other workers -------------------------------------------------------------------------------------------

    def examine(self, worker_id: str) -> None:
        """Remove a worker in the background if it is dead."""
        self._tasks.spawn(self._remove_if_dead(worker_id))

    async def _check_others(self) -> None:
        while self._may_remove:
            await asyncio.sleep(self._interval)
            if self._connection.connected and (worker_id := self._next_to_check()) is not None:
                await self._remove_if_dead(worker_id)

    def _next_to_check(self) -> str | None:
        workers = self._follower.view.workers
        if self._own.worker is None:
            return random.choice(list(workers)) if workers else None
        own = self._own.worker.worker_id
        ring = sorted({*workers, own})
        following = ring[(ring.index(own) + 1) % len(ring)]
        return following if following != own else None

    async def _remove_if_dead(self, worker_id: str) -> None:
        """Remove a worker that has no heartbeat and does not answer. Removing it twice changes nothing."""
        if worker_id in self._examined or not self._may_remove:
            return
        self._examined.add(worker_id)
        try:
            if await self._bucket.has_heartbeat(worker_id) or await self._peers.alive(worker_id):
                return
            view = self._follower.view
            if not (worker_id in view.workers or worker_id in view.of_worker) and self._follower.synced:
                return  # another runtime has removed it meanwhile
            logger.info("worker %s has no heartbeat and does not answer: removing its entries", worker_id)
            await self._bucket.remove_worker(worker_id)
        except PermissionDenied as error:
            self._may_remove = False
            logger.info("this runtime leaves the entries of dead workers to others: %s", error)
        except (NatsrtError, nats.errors.Error) as error:
            logger.debug("looking after worker %s: %s", worker_id, error)
        finally:
            self._examined.discard(worker_id)
