"""Looks whether the registry still is what this runtime knows, and mends it.

A bucket that is deleted or purged announces nothing on the feed. So every runtime that has declared something looks
every few heartbeats whether the bucket is the one that it knows, and whether its own entries are stored there. What has
vanished is stored again.

Two buckets of one name may be in reach of one another, in two JetStream domains: the feed of each crosses to the other.
A runtime that hears of another registry logs an error. The one whose registry is newer owns no keyed agents, and does
not start as a worker. As the feed is silent while nothing changes, a worker of a named domain stores its entry again
if it heard no change of its registry for some seconds, and at once if it hears of another registry. So a link that
comes up carries a change soon, whatever the number of workers.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Sequence

import nats.errors

from natsrt.background import BackgroundTasks
from natsrt.errors import NatsrtError
from natsrt.jetstream.registry.declare import Declared
from natsrt.jetstream.registry.entries import RegistryEntry
from natsrt.jetstream.registry.follow import Follower
from natsrt.jetstream.registry.origin import Origin, conflict
from natsrt.jetstream.registry.source import RegistrySource
from natsrt.jetstream.registry.store import RegistryStore
from natsrt.options import Options
from natsrt.transport.connection import Connection

logger: logging.Logger = logging.getLogger("natsrt.registry")

_LOOK_EVERY = 2
"""Heartbeats between two looks."""
_LOOK_AGAIN = 0.25
"""Seconds until entries that seem to have vanished are looked for again: a replica may lag behind."""
_ANNOUNCE_AFTER = 3.0
"""Seconds without a change of a registry until it is announced to other JetStream domains."""
_OTHERS_WAIT = (1.0, 3.0)
"""Seconds, at least and at most, for which the other workers wait for the one that should announce the registry: so one
that hangs does not keep it silent, and seldom do two announce it."""
_ANSWER_EVERY = 0.2
"""Seconds between two answers to another registry, at least."""
_FORGET_AFTER = 180.0
"""Seconds after which a foreign registry counts as gone if it is not heard of again. Older participants announce theirs
every minute."""
_MEET_WITHIN = 0.5
"""Seconds for which a worker that starts in a named domain waits to hear of other registries."""


class Integrity:
    """The looks of one runtime, and what it hears of other registries."""

    def __init__(
        self,
        connection: Connection,
        options: Options,
        store: RegistryStore,
        source: RegistrySource,
        follower: Follower,
        declared: Declared,
    ) -> None:
        self._connection = connection
        self._pause = _LOOK_EVERY * options.heartbeat_interval
        self._store = store
        self._source = source
        self._follower = follower
        self._declared = declared
        self._tasks = BackgroundTasks(logger, "looking after the registry failed")
        self._finding_out: asyncio.Task[None] | None = None
        self._foreign: Origin | None = None
        self._heard_at = -math.inf
        self._answered_at = -math.inf
        self._in_doubt = False
        """True if a change was stored elsewhere, and it is not known why."""
        self._answered_by: Origin | None = None
        """Another registry that heard of this one, and is not known yet."""
        self._owes_answer = False
        """True if another registry was heard of that may not have heard of this one."""
        self._heard = asyncio.Event()
        """Set when another registry was heard of for the first time."""
        self.problem: str = ""
        """What was found and is being mended; empty if nothing is wrong."""

    def start(self) -> None:
        """Begin to look."""
        self._tasks.spawn(self._looks())
        self._tasks.spawn(self._announcements())

    async def stop(self) -> None:
        await self._tasks.cancel()

    # -- what this runtime has stored ------------------------------------------------------------------------------

    async def _looks(self) -> None:
        while True:
            await asyncio.sleep(self._pause)
            if not self._declared.is_empty and self._follower.synced:
                try:
                    await self.look()
                except (NatsrtError, nats.errors.Error, OSError, TimeoutError) as error:
                    logger.debug("looking after the registry: %s", error)

    async def look(self) -> None:
        """Look once, and mend what is wrong. Raises what the requests raise; the next look tries again then."""
        if not await self._source.is_same():
            self._replaced()
        elif await self._declared.vanished():
            await asyncio.sleep(_LOOK_AGAIN)
            vanished = await self._declared.vanished()
            if await self._source.is_same():
                await self._mend(vanished)
            else:
                self._replaced()
        else:
            self.problem = ""

    def _replaced(self) -> None:
        self._follower.resync("Its bucket was deleted or replaced; the entries are stored again.")

    async def _mend(self, vanished: Sequence[RegistryEntry]) -> None:
        if vanished:
            logger.warning("%d entries of this runtime have vanished from the registry: stored again", len(vanished))
            self.problem = f"{len(vanished)} of its entries have vanished; they are stored again."
            await self._declared.store_again(vanished)
        self.problem = ""

    # -- other registries --------------------------------------------------------------------------------------------

    @property
    def foreign(self) -> Origin | None:
        """Another registry that was heard of lately; None if none was."""
        foreign = self._foreign
        if foreign is None or self._is_own(foreign) or self._seconds_since(self._heard_at) > _FORGET_AFTER:
            return None
        return foreign

    def _is_own(self, origin: Origin) -> bool:
        own = self._source.origin
        return own is not None and own.created == origin.created

    @property
    def conflict(self) -> str:
        """What is wrong, if the other registry is the older one; else empty."""
        foreign, own = self.foreign, self._source.origin
        if foreign is None or own is None or own.created < foreign.created:
            return ""
        return conflict(own, foreign, self._store.bucket)

    def elsewhere(self, origin: Origin | None, *, is_answer: bool) -> None:
        """Find out why a change was stored in another bucket. It may not be applied to the view.

        One that is not an answer may be of a runtime that did not notice yet that the bucket was replaced. Who answers
        has looked whether it still is in its own bucket.
        """
        if origin is not None and origin == self._foreign:
            self._heard_at = asyncio.get_running_loop().time()
        else:
            self._in_doubt = True
            self._answered_by = origin if is_answer else self._answered_by
        self._owes_answer |= origin is not None and not is_answer
        if self._finding_out is None or self._finding_out.done():
            self._finding_out = self._tasks.spawn(self._find_out())

    async def _find_out(self) -> None:
        try:
            while self._in_doubt or self._owes_answer:
                if self._in_doubt and not await self._is_certain():
                    return
                if self._owes_answer:
                    await asyncio.sleep(_ANSWER_EVERY - self._seconds_since(self._answered_at))
                    self._answered_at, self._owes_answer = asyncio.get_running_loop().time(), False
                    await self._answer()
        except (NatsrtError, nats.errors.Error, OSError, TimeoutError) as error:
            logger.debug("another registry: %s", error)

    async def _is_certain(self) -> bool:
        """Whether the bucket is the one that is known, so that what was stored elsewhere is in another registry."""
        self._in_doubt = False
        if not await self._source.is_same():
            self._owes_answer, self._answered_by = False, None
            self._replaced()
            return False
        foreign, self._answered_by = self._answered_by, None
        if foreign is not None and not self._is_own(foreign):  # it is, if this one was replaced since
            self._met(foreign)
            self._owes_answer = True  # it may not know of this one
        return True

    def _met(self, foreign: Origin) -> None:
        self._foreign, self._heard_at = foreign, asyncio.get_running_loop().time()
        self._heard.set()
        if (own := self._source.origin) is not None:
            logger.error("%s", conflict(own, foreign, self._store.bucket))

    async def meet_others(self) -> None:
        """Wait a moment for the answer of other registries to what this runtime has stored, if there may be some."""
        if not self._store.is_named:
            return
        try:
            async with asyncio.timeout(_MEET_WITHIN):
                await self._heard.wait()
                if self._finding_out is not None:  # the others shall know of this one, though it does not start
                    await asyncio.wait({self._finding_out})
        except TimeoutError:
            pass

    @property
    def _is_first(self) -> bool:
        """Whether this is the worker that announces the registry: the first in the order of the ids."""
        worker = self._declared.worker
        return worker is not None and worker.worker_id == min(self._follower.view.workers, default=None)

    async def _announcements(self) -> None:
        """Let other domains hear of this registry while nothing changes in it."""
        tried_at = asyncio.get_running_loop().time()
        while True:
            told_at = max(tried_at, self._follower.told_at)
            pause = _ANNOUNCE_AFTER + (0.0 if self._is_first else random.uniform(*_OTHERS_WAIT))
            await asyncio.sleep(pause - self._seconds_since(told_at))
            if self._follower.told_at > told_at:
                continue
            tried_at = asyncio.get_running_loop().time()
            if self._store.is_named and self._follower.synced:
                try:
                    await self._declared.announce(is_answer=False)
                except (NatsrtError, nats.errors.Error, OSError, TimeoutError) as error:
                    logger.debug("announcing the registry: %s", error)

    async def _answer(self) -> None:
        """Let the other registry hear of this one."""
        if self._is_first:
            await self._declared.announce(is_answer=True)

    @staticmethod
    def _seconds_since(moment: float) -> float:
        return asyncio.get_running_loop().time() - moment
