"""The instances of keyed agents on this worker, and their state: made and loaded, stored, dropped."""

from __future__ import annotations

import asyncio
import logging

import orjson
from autogen_core import Agent

from natsrt.agents.catalog import Catalog
from natsrt.errors import NatsrtError, StateConflict, StateNotSaved
from natsrt.jetstream.agent_records import AgentRecords, RecordChanged
from natsrt.jetstream.record import encode_state
from natsrt.keyed.slots import AgentSlot, keeps_state
from natsrt.observe.metrics import Counters
from natsrt.transport.connection import Connection

logger = logging.getLogger("natsrt.hosting")

_CHANGED = "its stored state was changed elsewhere"


class Instances:
    """Makes, stores and drops them."""

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

    async def load(self, held: AgentSlot) -> None:
        """Make the instance, with the state that is stored; nothing where the agent is not owned any more."""
        async with held.saving:
            record = held.record
            if held.agent is not None or record is None:
                return
            try:
                agent = await self._catalog.agent(held.hosted, held.key)
                state = await self._records.state(record) if record.has_state and keeps_state(agent) else None
                if state is not None:
                    await agent.load_state(orjson.loads(state))
            except RecordChanged:
                await self.lose(held, _CHANGED)
                raise self.dropped(held) from None
            except BaseException:
                await close(take_out(held))
                raise
            if held.record is None:  # this worker was stopped meanwhile
                await close(take_out(held))
                return
            held.agent, held.keeps_state = agent, keeps_state(agent)
            held.saved_at = self._loop.time()

    def dropped(self, held: AgentSlot) -> StateConflict:
        """What a call is told whose instance was dropped, also if its agent has another one here by now."""
        return StateConflict(str(held.agent_id), self._worker_id)

    async def store(self, held: AgentSlot) -> None:
        """Store the state if it changed. Raises `StateConflict`, `StateNotSaved`, and what the agent raises."""
        agent = held.agent
        if agent is None or not held.keeps_state:
            return
        held.changed = False
        try:
            record, state = held.record, encode_state(await agent.save_state())
            if held.record is not record or held.is_saving:  # another write may come before, of a later state
                async with held.saving:
                    if held.agent is not agent:
                        raise self.dropped(held)
                    await self._save(held, agent, encode_state(await agent.save_state()))
            elif record is None or not record.holds(state):
                async with held.saving:
                    await self._save(held, agent, state)
        except BaseException:
            held.changed = held.agent is not None
            raise

    async def _save(self, held: AgentSlot, agent: Agent, state: bytes) -> None:
        record = held.record
        if record is None or held.agent is not agent:
            raise self.dropped(held)
        if record.holds(state):
            return
        try:
            held.record = await self._records.save(record, state)
            held.saved_at = self._loop.time()
        except RecordChanged:
            await self.lose(held, _CHANGED)
            raise self.dropped(held) from None
        except NatsrtError as error:
            raise StateNotSaved(str(held.agent_id), self._worker_id, str(error)) from error

    async def lose(self, held: AgentSlot, reason: str) -> None:
        """The record is not as this worker wrote it."""
        self.count_conflict()
        logger.warning("the instance of %s is dropped: %s", held.agent_id, reason)
        await self.drop(held)

    async def drop(self, held: AgentSlot) -> None:
        """This worker does not own the agent any more: its instance must not be met again."""
        held.record, held.changed = None, False
        held.empty()
        agent = take_out(held)
        interest, held.interest = held.interest, None
        if interest is not None:
            await self._connection.unsubscribe(interest)
        await close(agent)

    async def end(self, held: AgentSlot) -> None:
        """Close the instance, which is made anew if it is needed again."""
        held.changed = False
        await close(take_out(held))


def take_out(held: AgentSlot) -> Agent | None:
    """The live instance, which then is not live any more; None where there is none."""
    held.agent = None
    return held.hosted.live.pop(held.key, None)


async def close(agent: Agent | None) -> None:
    """Close an agent, if there is one. What it raises is logged."""
    if agent is None:
        return
    try:
        await agent.close()
    except Exception:
        logger.exception("closing agent %s failed", agent.id)
