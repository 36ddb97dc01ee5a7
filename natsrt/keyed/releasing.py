"""Giving up keyed agents: because the worker stops, because they are idle, or so that other workers get them.

A release waits until the messages that were received are handled, ends the subscription, waits for the messages that
came in meanwhile, stores the state, closes the instance and gives up the record, in this order.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Collection, Coroutine, Iterator
from typing import Any

from natsrt.agents.catalog import Catalog
from natsrt.agents.hosted_type import HostedType
from natsrt.background import BackgroundTasks
from natsrt.errors import NatsrtError
from natsrt.jetstream.agent_records import AgentRecords, Record, RecordChanged
from natsrt.jetstream.registry.registry import Registry
from natsrt.keyed.instances import Instances
from natsrt.keyed.slots import (
    LONGEST_INTERVAL,
    AgentSlot,
    AgentSlots,
    AgentSubjects,
    can_move,
    housekeeping_interval,
)
from natsrt.transport.connection import Connection

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_AT_ONCE = 64
"""Agents that are released at the same time, so that a worker with many does not flood JetStream."""


class Releasing:
    """Releases the agents of one worker, and looks after those that are idle or due to be stored."""

    def __init__(
        self,
        *,
        connection: Connection,
        catalog: Catalog,
        registry: Registry,
        records: AgentRecords,
        slots: AgentSlots,
        instances: Instances,
        subjects: AgentSubjects,
    ) -> None:
        self._connection = connection
        self._catalog = catalog
        self._registry = registry
        self._records = records
        self._slots = slots
        self._instances = instances
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._subjects = subjects
        self._tasks = BackgroundTasks(logger, "looking after keyed agents failed")
        self._loop = asyncio.get_running_loop()
        self._hosting: dict[str, tuple[int, float]] = {}
        """By type: how many workers host it, and when they last became more."""
        self._exempt: Collection[str] = ()
        """Ids of handlers that wait for the stop of this worker themselves."""

    def start(self) -> None:
        """Begin the housekeeping."""
        self._tasks.spawn(self._housekeeping())

    async def stop(self) -> None:
        """Cancel the housekeeping, and the releases that it and `release_soon` began."""
        await self._tasks.cancel()

    async def release_all(self) -> None:
        """Release all agents. Returns when all are released, or could not be."""
        await asyncio.gather(*(self.release(slot) for slot in self._slots))

    def exempt(self, handlers: Collection[str]) -> None:
        """Do not wait for the handlers with these ids: they wait for the stop of this worker themselves."""
        self._exempt = (*self._exempt, *handlers)
        for slot in self._slots:
            slot.wake_release()

    def release_soon(self, slot: AgentSlot) -> None:
        """Begin to release an agent, without waiting for the end."""
        self._tasks.spawn(self.release(slot))

    async def release(self, slot: AgentSlot) -> None:
        """Handle what was received for the agent, store its state, close it, and give up the ownership.

        If a release is under way, wait for its end. Errors are logged.
        """
        try:
            async with slot.moving:
                if slot.record is not None:
                    slot.release_begins()
                    try:
                        await self._stop_listening(slot)
                        slot.close_begins()
                        async with self._at_once:
                            await self._give_up(slot)
                    finally:
                        slot.release_ends()
        except Exception as error:
            known = isinstance(error, NatsrtError)
            logger.warning("%s cannot be released: %s", slot.agent_id, error, exc_info=None if known else error)
        finally:
            self._slots.forget_unused(slot)

    async def _stop_listening(self, slot: AgentSlot) -> None:
        """End the subscription. Returns when all messages that came in before that are handled."""
        while True:
            await self._wait_unused(slot)
            interest = slot.take_interest()
            if interest is not None:
                async with self._at_once:
                    await self._connection.unsubscribe(interest)
            if not slot.is_used(self._exempt):
                return
            # A message came in before the subscription ended. What its handler calls must be able to call back.
            await self._listen(slot)

    async def _listen(self, slot: AgentSlot) -> None:
        slot.listening(await self._subjects.listen(slot.hosted, slot.key))

    async def _give_up(self, slot: AgentSlot) -> None:
        """Store the state, close the instance, and write into the record that nobody owns the agent."""
        try:
            if slot.options.save != "manual":
                await self._instances.store(slot)
            if slot.record is not None:
                await self._release_record(slot, slot.record)
        except RecordChanged:
            self._instances.count_conflict()
        except Exception:
            if slot.record is not None and not self._slots.must_leave(slot):  # keep it, to store its state later
                await self._listen(slot)
            else:
                await self._instances.drop(slot)
            raise
        await self._instances.drop(slot)

    async def _release_record(self, slot: AgentSlot, record: Record) -> None:
        """Close the instance, and write into the record that nobody owns the agent. A missing record is stored again.

        Raises `RecordChanged`.
        """
        async with slot.saving:
            if record.has_state and record.body is None and slot.agent is not None:  # only the instance has the state
                record = await self._instances.present(slot, record)
            await self._instances.close(slot)
            try:
                await self._records.release(record)
            except RecordChanged as changed:
                if changed.present is not None or not record.has_state or not await self._instances.restore(slot, None):
                    raise

    async def _wait_unused(self, slot: AgentSlot) -> None:
        while slot.is_used(self._exempt):
            await slot.wait_for_change()

    async def release_some(self, agent_type: str, count: int) -> int:
        """Release up to ``count`` agents of a type that can move to other workers now. Returns the number released."""
        now = self._loop.time()
        movable = [slot for slot in self._slots.of(agent_type) if can_move(slot, now)]
        chosen = random.sample(movable, min(count, len(movable)))
        await asyncio.gather(*(self.release(slot) for slot in chosen))
        return len(chosen)

    async def _housekeeping(self) -> None:
        """Release idle agents, store states that are due, and release agents for workers that joined.

        Each agent has a task of its own, so that a slow one delays no other.
        """
        while True:
            keyed = [hosted.keyed for hosted in self._catalog if hosted.keyed is not None]
            await asyncio.sleep(min(map(housekeeping_interval, keyed), default=LONGEST_INTERVAL))
            now = self._loop.time()
            for hosted in self._catalog:
                for work in self._due(hosted, now):
                    self._tasks.spawn(work)

    def _due(self, hosted: HostedType, now: float) -> Iterator[Coroutine[Any, Any, None]]:
        """What is to be done now for the agents of a type."""
        options = hosted.keyed
        if options is None:
            return
        hosting = len(self._registry.view.workers_hosting(hosted.agent_type))
        before, joined = self._hosting.get(hosted.agent_type, (hosting, -math.inf))
        joined = now if hosting > before else joined
        self._hosting[hosted.agent_type] = hosting, joined
        for slot in self._slots.of(hosted.agent_type):
            if slot.record is None or slot.is_moving or slot.is_saving:
                continue
            idle = options.idle_timeout is not None and not slot.users and now - slot.used_at > options.idle_timeout
            if idle or slot.is_deaf:  # an attempt to release a deaf one before may have found no room either
                yield self.release(slot)
            elif options.rebalance and slot.owned_since < joined and can_move(slot, now):
                yield self.release(slot)  # the worker that gets its next message claims it
            elif options.save == "interval" and slot.is_due(now) and not slot.is_applying:
                yield self._store_in_background(slot)

    async def _store_in_background(self, slot: AgentSlot) -> None:
        try:
            await self._instances.store(slot)
        except Exception as error:
            logger.warning("the state of %s could not be stored: %s", slot.agent_id, error)
        finally:
            self._slots.forget_unused(slot)
