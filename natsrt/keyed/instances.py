"""The instances of keyed agents on this worker, and their state: made and loaded, stored, dropped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from typing import TypeVar

import orjson
from autogen_core import Agent

from natsrt.agents.catalog import Catalog
from natsrt.agents.contained import contained
from natsrt.errors import NatsrtError, StateConflict, StateNotSaved
from natsrt.jetstream.agent_records import AgentRecords, Record, RecordChanged, RecordTaken
from natsrt.jetstream.record import NOTHING_HANDLED, encode_state
from natsrt.keyed.slots import AgentSlot, keeps_state
from natsrt.keyed.unmade import NotMade
from natsrt.observe.metrics import Counters
from natsrt.transport.connection import Connection

logger: logging.Logger = logging.getLogger("natsrt.hosting")

T = TypeVar("T")

_LOG_AFTER = 0.2
"""Seconds within which agents that are stored again are logged in one line."""
_LIST_AT_MOST = 5
"""Agents that a log line lists by name."""


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
        self._restored: list[str] = []
        """The agents that were stored again, and are not logged yet."""

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
            except RecordChanged as changed:
                await self.drop_lost(slot, changed.present)
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
        """Store the state if it changed, or if events of a stream were handled.

        The sequences of these events are stored in the same write. They are taken before ``save_state`` is called, so
        the state has the effect of each.

        Raises `StateConflict`, `StateNotSaved`, `CannotSerialize`, and what the agent raises.
        """
        agent = slot.agent
        if agent is None or not slot.keeps_state:
            return
        slot.save_begins()
        try:
            record, applied = slot.record, slot.applied
            state = encode_state(await contained(agent.save_state()))
            if slot.record is not record or slot.is_saving:  # another write may come first, with a later state
                async with slot.saving:
                    if slot.agent is not agent:
                        raise self.dropped(slot)
                    applied = slot.applied
                    await self._save(slot, agent, encode_state(await contained(agent.save_state())), applied)
            elif record is None or applied or not record.holds(state):
                async with slot.saving:
                    await self._save(slot, agent, state, applied)
        except BaseException:
            slot.save_failed()
            raise

    async def _save(self, slot: AgentSlot, agent: Agent, state: bytes, applied: Mapping[str, int]) -> None:
        record = slot.record
        if record is None or slot.agent is not agent:
            raise self.dropped(slot)
        if not applied and record.holds(state):
            return
        try:
            try:
                saved = await self._records.save(record, state, slot.counted, applied)
                slot.saved(saved, self._loop.time(), applied)
            except RecordChanged as changed:
                if changed.present is not None or not await self._store_again(
                    slot, record, self._worker_id, state, applied
                ):
                    await self.drop_lost(slot, changed.present)
                    raise self.dropped(slot) from None
        except StateConflict:
            raise
        except NatsrtError as error:
            raise StateNotSaved(str(slot.agent_id), self._worker_id, str(error)) from error

    async def delete(self, slot: AgentSlot) -> None:
        """Delete the record, and drop the instance. If that fails, both stay.

        What enters meanwhile verifies the record first, so it waits for the end of this. It does so after a failure,
        too: the record may be deleted although nobody confirmed that.

        Raises `StateConflict` if the agent was taken over meanwhile, and `StateNotSaved` if the record cannot be
        deleted.
        """
        slot.to_delete = False
        slot.doubted()
        async with slot.saving:
            if (record := slot.record) is None:
                raise self.dropped(slot)
            try:
                await self._records.remove(record)
            except RecordChanged as changed:
                if changed.present is not None:
                    await self.drop_lost(slot, changed.present)
                    raise self.dropped(slot) from None
            except NatsrtError as error:
                raise StateNotSaved(str(slot.agent_id), self._worker_id, str(error)) from error
            await self.drop(slot)

    # -- records that are missing --------------------------------------------------------------------------------

    async def restore(self, slot: AgentSlot, owner: str | None) -> bool:
        """Store the record of an agent again that is missing, with the state that was stored.

        Call it with `AgentSlot.saving` locked. ``owner`` None: the agent has no owner afterwards. Returns False if
        somebody else claimed the agent meanwhile, or natsrt deleted the record.

        Raises the errors of the records, and what the agent raises.
        """
        lost = slot.record
        if lost is None:
            return False
        state, applied = await self._stored_state(slot, lost)
        return await self._store_again(slot, lost, owner, state, applied)

    async def present(self, slot: AgentSlot, own: Record) -> Record:
        """The record of an agent that is owned here, stored again if it was missing. Raises `RecordChanged`."""
        found = await self._records.read(slot.agent_id)
        if found is None and await self.restore(slot, self._worker_id) and slot.record is not None:
            return slot.record
        if found is None or found.owner != self._worker_id or not self._records.follows(found, own):
            raise RecordChanged(found)
        return own

    async def _stored_state(self, slot: AgentSlot, lost: Record) -> tuple[bytes | None, Mapping[str, int]]:
        """The state that was in a missing record; None if there was none, or if it is stored later.

        Also returns the sequences of the events that count in it beside those in the record.

        A large state is not kept in memory, so the present state of the agent takes its place. If a handler is changing
        that, it is stored after the handler.
        """
        if lost.stored is None or lost.body is not None:
            return lost.body, NOTHING_HANDLED
        agent = slot.agent
        if agent is None or not slot.keeps_state:
            logger.error("the state of %s is lost: %d bytes, which were stored only", slot.agent_id, lost.size)
            return None, NOTHING_HANDLED
        if slot.options.save == "message" and slot.mailbox.inside:
            return None, NOTHING_HANDLED
        try:
            applied = slot.applied
            return encode_state(await contained(agent.save_state())), applied
        except Exception as error:
            known = isinstance(error, NatsrtError)
            logger.error(
                "the state of %s cannot be stored again yet: %s",
                slot.agent_id,
                error,
                exc_info=None if known else error,
            )
            return None, NOTHING_HANDLED

    async def _store_again(
        self, slot: AgentSlot, lost: Record, owner: str | None, state: bytes | None, applied: Mapping[str, int]
    ) -> bool:
        try:
            record = await self._records.restore(lost, owner, state, applied)
        except (RecordTaken, RecordChanged):
            return False
        slot.saved(record, self._loop.time(), applied)
        if state is None and slot.agent is not None:
            slot.still_applied(lost)
        if not self._restored:
            self._loop.call_later(_LOG_AFTER, self._log_restored)
        self._restored.append(f"{slot.agent_id} at revision {record.revision}")
        return True

    def _log_restored(self) -> None:
        """Log all agents that were stored again at about the same time in one line."""
        restored, self._restored = self._restored, []
        more = f" and {len(restored) - _LIST_AT_MOST:,} more" if len(restored) > _LIST_AT_MOST else ""
        named = ", ".join(restored[:_LIST_AT_MOST])
        logger.warning(
            "records that were gone are stored again, with the states that this worker has: %s%s", named, more
        )

    # -- dropping ------------------------------------------------------------------------------------------------

    async def drop_lost(self, slot: AgentSlot, present: Record | None) -> None:
        """Drop the instance because its record is not as this worker wrote it, and count that.

        ``present`` is the record now; None if it was deleted.
        """
        self.count_conflict()
        if present is None:
            reason = "its record was deleted"
        elif present.owner not in (None, self._worker_id):
            reason = f"worker {present.owner} has taken it over"
        else:
            reason = "its stored state was changed elsewhere"
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
