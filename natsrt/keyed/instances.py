"""The instances of keyed agents on this worker, and their state: made and loaded, stored, dropped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TypeVar

import orjson
from autogen_core import Agent

from natsrt.agents.catalog import Catalog
from natsrt.agents.contained import contained
from natsrt.errors import NatsrtError, StateConflict, StateNotSaved
from natsrt.jetstream.agent_records import AgentRecords, RecordChanged
from natsrt.jetstream.record import encode_state
from natsrt.keyed.slots import AgentSlot, keeps_state
from natsrt.keyed.unmade import NotMade
from natsrt.observe.metrics import Counters
from natsrt.transport.connection import Connection

logger = logging.getLogger("natsrt.hosting")

T = TypeVar("T")

_CHANGED = "its stored state was changed elsewhere"
"""Why an instance is dropped whose record has another revision; for the log."""


class Instances:
    """Makes, loads, stores and drops the instances of one worker."""

    def __init__(
        self,
        *,
        connection: Connection,
        worker_id: str,
        catalog: Catalog,
        records: AgentRecords,
        counters: Counters,
    ) -> None:
        self._connection = connection
        self._worker_id = worker_id
        self._catalog = catalog
        self._records = records
        self._loop = asyncio.get_running_loop()
        self._counters = counters

    def count_conflict(self) -> None:
        """An instance was dropped because its record was changed elsewhere."""
        self._counters.state_conflicts += 1

    async def load(self, slot: AgentSlot) -> None:
        """Make the instance, with the state that is stored. Does nothing if the agent is not owned any more.

        Raises `NotMade` if the agent's factory or its ``load_state`` raises, `StateConflict`, and the errors of the
        records.
        """
        async with slot.saving:
            record = slot.record
            if slot.agent is not None or record is None:
                return
            try:
                agent = await _made(self._catalog.agent(slot.hosted, slot.key))
                state = await self._records.state(record) if record.has_state and keeps_state(agent) else None
                if state is not None:
                    await _made(contained(agent.load_state(orjson.loads(state))))
            except RecordChanged:
                await self.drop_lost(slot, _CHANGED)
                raise self.dropped(slot) from None
            except BaseException:
                await close_agent(slot.remove_instance())
                raise
            if slot.record is None:  # the ownership ended meanwhile
                await close_agent(slot.remove_instance())
                return
            slot.activate(agent, self._loop.time())

    def dropped(self, slot: AgentSlot) -> StateConflict:
        """The error for a call whose instance was dropped, even if the agent has a new instance here by now."""
        return StateConflict(str(slot.agent_id), self._worker_id)

    async def store(self, slot: AgentSlot) -> None:
        """Store the state if it changed.

        Raises `StateConflict`, `StateNotSaved`, `CannotSerialize`, and what the agent raises.
        """
        agent = slot.agent
        if agent is None or not slot.keeps_state:
            return
        slot.save_begins()
        try:
            record, state = slot.record, encode_state(await contained(agent.save_state()))
            if slot.record is not record or slot.is_saving:  # another write may come first, with a later state
                async with slot.saving:
                    if slot.agent is not agent:
                        raise self.dropped(slot)
                    await self._save(slot, agent, encode_state(await contained(agent.save_state())))
            elif record is None or not record.holds(state):
                async with slot.saving:
                    await self._save(slot, agent, state)
        except BaseException:
            slot.save_failed()
            raise

    async def _save(self, slot: AgentSlot, agent: Agent, state: bytes) -> None:
        record = slot.record
        if record is None or slot.agent is not agent:
            raise self.dropped(slot)
        if record.holds(state):
            return
        try:
            slot.saved(await self._records.save(record, state), self._loop.time())
        except RecordChanged:
            await self.drop_lost(slot, _CHANGED)
            raise self.dropped(slot) from None
        except NatsrtError as error:
            raise StateNotSaved(str(slot.agent_id), self._worker_id, str(error)) from error

    async def drop_lost(self, slot: AgentSlot, reason: str) -> None:
        """Drop the instance because the record is not as this worker wrote it, and count that."""
        self.count_conflict()
        logger.warning("the instance of %s is dropped: %s", slot.agent_id, reason)
        await self.drop(slot)

    async def drop(self, slot: AgentSlot) -> None:
        """End the ownership here: the instance is closed, and gets no more messages."""
        slot.disown()
        interest, agent = slot.take_interest(), slot.remove_instance()
        if interest is not None:
            await self._connection.unsubscribe(interest)
        await close_agent(agent)

    async def close(self, slot: AgentSlot) -> None:
        """Close the instance of an agent that is still owned here. The next message makes a new one."""
        await close_agent(slot.remove_instance())


async def _made(work: Awaitable[T]) -> T:
    """Await what makes an agent. Raises `NotMade` instead of its exception."""
    try:
        return await work
    except Exception as error:
        raise NotMade(error) from error


async def close_agent(agent: Agent | None) -> None:
    """Close an agent, if there is one. What it raises is logged."""
    if agent is None:
        return
    try:
        await contained(agent.close())
    except Exception:
        logger.exception("closing agent %s failed", agent.id)
