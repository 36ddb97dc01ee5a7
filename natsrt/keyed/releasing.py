"""Giving up keyed agents: because the worker stops, because they are idle, or so that other workers get them.

Whoever releases stops listening, lets what was received be handled, stores, closes, and gives up the record, in this
order.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable, Collection, Coroutine, Iterator
from typing import Any

from natsrt.agents.catalog import Catalog
from natsrt.agents.hosted_type import HostedType
from natsrt.background import BackgroundTasks
from natsrt.errors import NatsrtError
from natsrt.jetstream.agent_records import AgentRecords, RecordChanged
from natsrt.jetstream.registry.registry import Registry
from natsrt.keyed.instances import Instances
from natsrt.keyed.slots import AgentSlot, AgentSlots, AgentSubjects, housekeeping_interval, is_free
from natsrt.transport.connection import Connection

logger = logging.getLogger("natsrt.hosting")


class Releasing:
    """Releases the agents of one worker, and looks after those that are idle or due to be stored.

    ``leaves(held)`` tells whether an agent cannot stay here.
    """

    def __init__(
        self,
        *,
        connection: Connection,
        catalog: Catalog,
        registry: Registry,
        records: AgentRecords,
        held: AgentSlots,
        instances: Instances,
        turns: asyncio.Semaphore,
        subjects: AgentSubjects,
        leaves: Callable[[AgentSlot], bool],
        tasks: BackgroundTasks,
    ) -> None:
        self._connection = connection
        self._catalog = catalog
        self._registry = registry
        self._records = records
        self._held = held
        self._instances = instances
        self._turns = turns
        self._subjects = subjects
        self._leaves = leaves
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._hosting: dict[str, tuple[int, float]] = {}
        """By type: how many workers host it, and when they last became more."""
        self._exempt: Collection[str] = ()
        """Visits that wait for the end of this worker themselves."""

    async def release_all(self) -> None:
        """Hand all agents over: what was received for them is handled, their state is stored, nobody owns them."""
        await asyncio.gather(*(self.release(held) for held in self._held))

    def exempt(self, visits: Collection[str]) -> None:
        """These visits wait for the end of this worker themselves, so that it does not wait for them."""
        self._exempt = (*self._exempt, *visits)
        for held in self._held:
            held.empty()

    async def release(self, held: AgentSlot) -> None:
        """Handle what was received for the agent, store its state, close it, and leave it to nobody.

        One that is under way is waited for.
        """
        try:
            async with held.moving:
                if held.record is not None:
                    held.releasing = True
                    try:
                        await self._release(held)
                    finally:
                        held.releasing = held.parting = False
        except Exception as error:
            known = isinstance(error, NatsrtError)
            logger.warning("%s cannot be released: %s", held.agent_id, error, exc_info=None if known else error)
        finally:
            self._held.tidy(held)

    async def _release(self, held: AgentSlot) -> None:
        while True:
            await self._emptied(held)
            interest, held.interest = held.interest, None
            if interest is not None:
                async with self._turns:
                    await self._connection.unsubscribe(interest)
            if not self._in_use(held):
                break
            # What came in last runs now, and what comes along its chain must come in.
            held.interest = await self._subjects.listen(held.hosted, held.key)
        held.parting = True
        async with self._turns:
            try:
                if held.options.save != "manual":
                    await self._instances.store(held)
                if held.record is not None:
                    await self._instances.end(held)
                    await self._records.release(held.record)
            except RecordChanged:
                self._instances.count_conflict()
            except Exception:
                if held.record is not None and not self._leaves(held):  # it can be stored later, as long as it lives
                    held.interest = await self._subjects.listen(held.hosted, held.key)
                else:
                    await self._instances.drop(held)
                raise
            await self._instances.drop(held)

    def _in_use(self, held: AgentSlot) -> bool:
        return held.record is not None and held.users > held.mailbox.count(self._exempt)

    async def _emptied(self, held: AgentSlot) -> None:
        while self._in_use(held):
            held.emptied = self._loop.create_future()
            await held.emptied
        held.emptied = None

    async def give_away(self, agent_type: str, count: int) -> int:
        """Release up to ``count`` idle agents of a type, so that other workers get them. Returns how many it were."""
        now = self._loop.time()
        idle = [held for held in self._held.of(agent_type) if is_free(held, now)]
        chosen = random.sample(idle, min(count, len(idle)))
        await asyncio.gather(*(self.release(held) for held in chosen))
        return len(chosen)

    async def keep_house(self) -> None:
        """Release what is idle, store what is due, and share with workers that joined. Nobody waits for a slow one."""
        while True:
            keyed = [hosted.keyed for hosted in self._catalog if hosted.keyed is not None]
            await asyncio.sleep(min(map(housekeeping_interval, keyed), default=5.0))
            now = self._loop.time()
            for hosted in self._catalog:
                for work in self._due(hosted, now):
                    self._tasks.spawn(work)

    def _due(self, hosted: HostedType, now: float) -> Iterator[Coroutine[Any, Any, None]]:
        options = hosted.keyed
        if options is None:
            return
        hosting = len(self._registry.view.workers_hosting(hosted.agent_type))
        before, joined = self._hosting.get(hosted.agent_type, (hosting, -math.inf))
        joined = now if hosting > before else joined
        self._hosting[hosted.agent_type] = hosting, joined
        for held in self._held.of(hosted.agent_type):
            if held.record is None or held.is_moving or held.is_saving:
                continue
            if options.idle_timeout is not None and not held.users and now - held.used_at > options.idle_timeout:
                yield self.release(held)
            elif options.rebalance and held.owned_since < joined and is_free(held, now):
                yield self.release(held)  # whichever worker gets its next message claims it
            elif options.save == "interval" and held.changed and now - held.saved_at >= options.save_interval:
                yield self._store_in_background(held)

    async def _store_in_background(self, held: AgentSlot) -> None:
        try:
            await self._instances.store(held)
        except Exception as error:
            logger.warning("the state of %s could not be stored: %s", held.agent_id, error)
        finally:
            self._held.tidy(held)
