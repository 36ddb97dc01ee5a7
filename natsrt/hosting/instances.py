"""The instances of keyed agents on this worker, and their state: made and loaded, stored, dropped."""

from __future__ import annotations

import asyncio
import logging

import orjson
from autogen_core import Agent

from natsrt.errors import NatsrtError, StateConflict, StateNotSaved
from natsrt.hosting.catalog import Catalog
from natsrt.hosting.held import Held, keeps_state
from natsrt.jetstream.agents import AgentRecords, RecordChanged
from natsrt.transport.connection import Connection
from natsrt.wire.serialization import Serialization

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
        serialization: Serialization,
        records: AgentRecords,
    ) -> None:
        self._connection = connection
        self._worker_id = worker_id
        self._catalog = catalog
        self._serialization = serialization
        self._records = records
        self._loop = asyncio.get_running_loop()
        self.conflicts = 0
        """Instances dropped because their records were changed elsewhere."""

    async def load(self, held: Held) -> None:
        """Make the instance, with the state that is stored; nothing where the agent is not owned any more."""
        async with held.saving:
            record = held.record
            if held.loaded or record is None:
                return
            try:
                agent = await self._catalog.agent(held.hosted, held.key)
                state = await self._records.state(record) if record.has_state and keeps_state(agent) else None
                if state is not None:
                    await agent.load_state(orjson.loads(state))
            except RecordChanged:
                await self.lose(held, _CHANGED)
                raise StateConflict(str(held.agent_id), self._worker_id) from None
            except BaseException:
                await close(take_out(held))
                raise
            held.loaded = True
            held.stores = held.options.save == "message" and keeps_state(agent)
            held.saved_at = self._loop.time()

    def check_live(self, held: Held, agent: Agent) -> None:
        """Raises `StateConflict` where ``agent`` was dropped, also if its id has another instance here by now."""
        if held.record is None or held.hosted.live.get(held.key) is not agent:
            raise StateConflict(str(held.agent_id), self._worker_id)

    async def store(self, held: Held) -> None:
        """Store the state if it changed. Raises `StateConflict`, `StateNotSaved`, and what the agent raises."""
        agent = held.hosted.live.get(held.key)
        if agent is None or not held.loaded or not keeps_state(agent):
            return
        async with held.saving:
            self.check_live(held, agent)
            held.changed = False
            try:
                await self._store_state_of(held, agent)
            except BaseException:
                held.changed = held.loaded
                raise
            held.saved_at = self._loop.time()

    async def _store_state_of(self, held: Held, agent: Agent) -> None:
        state = self._serialization.encode(dict(await agent.save_state())).payload
        record = held.record
        if record is None or record.holds(state) or (state == b"{}" and not record.has_state):
            return
        try:
            held.record = await self._records.save(record, state)
        except RecordChanged:
            await self.lose(held, _CHANGED)
            raise StateConflict(str(held.agent_id), self._worker_id) from None
        except NatsrtError as error:
            raise StateNotSaved(str(held.agent_id), self._worker_id, str(error)) from error

    async def lose(self, held: Held, reason: str) -> None:
        """The record is not as this worker wrote it."""
        self.conflicts += 1
        logger.warning("the instance of %s is dropped: %s", held.agent_id, reason)
        await self.drop(held)

    async def drop(self, held: Held) -> None:
        """This worker does not own the agent any more: its instance must not be met again."""
        held.record, held.loaded, held.changed = None, False, False
        held.empty()
        agent = take_out(held)
        interest, held.interest = held.interest, None
        if interest is not None:
            await self._connection.unsubscribe(interest)
        await close(agent)

    async def end(self, held: Held) -> None:
        """Close the instance, which is made anew if it is needed again."""
        held.loaded = held.changed = False
        await close(take_out(held))


def take_out(held: Held) -> Agent | None:
    """The live instance, which then is not live any more; None where there is none."""
    return held.hosted.live.pop(held.key, None)


async def close(agent: Agent | None) -> None:
    """Close an agent, if there is one. What it raises is logged."""
    if agent is None:
        return
    try:
        await agent.close()
    except Exception:
        logger.exception("closing agent %s failed", agent.id)
