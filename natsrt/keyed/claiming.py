"""Claiming keyed agents: naming this worker in the record of an agent, and subscribing to the agent's subject.

Rules:

1. An owner that does not answer is replaced when the registry no longer lists it, or when the server says that it does
   not listen and that this cannot be a reconnect that all workers go through. Nothing follows from a missing answer
   alone, because the owner may be far away.
2. An agent whose record is missing belongs to the worker that has it, which stores the record again. Another worker
   claims the agent only if nobody listens on the agent's subject.
3. A worker that cannot own an agent has another worker own it: because the server allows no more subscriptions, or
   because the agent could not be made here lately.
"""

from __future__ import annotations

import asyncio
import logging
import random

from autogen_core import AgentId

from natsrt.background import end_tasks
from natsrt.errors import (
    JetStreamRequired,
    NatsrtError,
    ServerUnreachable,
    StateUnavailable,
    SubscriptionRefused,
    WorkerLost,
)
from natsrt.jetstream.agent_records import AgentRecords, Record, RecordChanged, RecordTaken
from natsrt.jetstream.registry.registry import Registry
from natsrt.keyed.instances import Instances
from natsrt.keyed.releasing import Releasing
from natsrt.keyed.room import Room
from natsrt.keyed.slots import AgentSlot, AgentSlots, AgentSubjects, Doubts, FailedClaim
from natsrt.keyed.unmade import UnmadeAgents
from natsrt.options import Options
from natsrt.sending.owner_locator import OwnerLocator
from natsrt.transport.connection import Connection, Refusal
from natsrt.transport.peers import Peers
from natsrt.wire.peer_messages import Claim

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_MOVES_WITHIN = 4.0
"""Seconds beyond `Options.lost_after` for which the end of another worker's claim or release is waited for."""
_ASK = 0.5
"""Seconds for which an owner is waited for that the registry does not list, and for which the holder of an agent
without a record is waited for at first; both beside the round trip to the server."""
_PAUSE = 0.02
"""Seconds before the record of an agent that another worker claims or releases is read again; doubled each time."""
_LONGEST_PAUSE = 0.25
"""Seconds of such a pause at most."""


class CannotOwn(Exception):
    """This worker cannot own the agent, because of ``error``. Another worker may be able to."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        super().__init__(str(error))


class Claiming:
    """Claims the agents of one worker."""

    def __init__(
        self,
        *,
        connection: Connection,
        options: Options,
        worker_id: str,
        registry: Registry,
        peers: Peers,
        records: AgentRecords,
        subjects: AgentSubjects,
        locator: OwnerLocator,
        slots: AgentSlots,
        instances: Instances,
        releasing: Releasing,
        doubts: Doubts,
    ) -> None:
        self._connection = connection
        self._options = options
        self._worker_id = worker_id
        self._registry = registry
        self._peers = peers
        self._records = records
        self._subjects = subjects
        self._locator = locator
        self._slots = slots
        self._instances = instances
        self._releasing = releasing
        self._doubts = doubts
        self._loop = asyncio.get_running_loop()
        self._room = Room(connection)
        self.unmade: UnmadeAgents = UnmadeAgents()
        """The agents that could not be made here lately."""

    async def own(self, slot: AgentSlot) -> str | None:
        """Own the agent, and return None; or return the id of the worker that owns it.

        If no other worker can own an agent that could not be made here lately, it is tried here again.
        """
        try:
            return await self._own_here(slot)
        except CannotOwn as cannot:
            try:
                return await self._give_elsewhere(slot, cannot.error)
            except Exception:
                if not self.unmade.try_again(slot.agent_id, self._loop.time()):
                    raise
        return await self._own_here(slot)

    async def _own_here(self, slot: AgentSlot) -> str | None:
        """Own the agent. Who waits while another attempt fails because of JetStream gets its error, and does not wait
        for one more: a caller that hears nothing for a while asks again, and all its questions are answered at once.
        """
        begun = self._loop.time()
        async with slot.moving:
            if slot.record is not None:
                return None
            if (failed := slot.unclaimed) is not None and failed.at >= begun:
                raise failed.error
            try:
                return await self._claim(slot)
            except (StateUnavailable, JetStreamRequired, ServerUnreachable) as error:
                slot.unclaimed = FailedClaim(error, self._loop.time())
                raise

    def others_host(self, agent_type: str) -> bool:
        """Whether another worker hosts the type, and is not stopping."""
        return any(one != self._worker_id for one in self._registry.view.workers_hosting(agent_type))

    def require_made(self, agent_id: AgentId) -> None:
        """Raise `CannotOwn` if the agent could not be made here lately, and another worker hosts its type."""
        error = self.unmade.error(agent_id, self._loop.time())
        if error is not None and self.others_host(agent_id.type):
            raise CannotOwn(error)

    def check(self, agent_id: AgentId) -> None:
        """Raise the error because of which this worker cannot own an agent that it does not own now, if any."""
        slot = self._slots.find(agent_id.type, agent_id.key)
        if slot is not None and slot.record is not None:
            return
        try:
            self._require_room(agent_id)
            self.require_made(agent_id)
        except CannotOwn as cannot:
            raise cannot.error from None

    async def _give_elsewhere(self, slot: AgentSlot, reason: Exception) -> str:
        """Have another worker own an agent. Returns its id. Raises ``reason`` if none can."""
        others = [w for w in self._registry.view.workers_hosting(slot.hosted.agent_type) if w != self._worker_id]
        random.shuffle(others)
        for worker_id in others:
            try:
                await self._locator.give(slot.agent_id, worker_id)
            except Exception as error:  # the factory of that worker may raise anything
                logger.debug("worker %s does not take %s: %s", worker_id, slot.agent_id, error)
            else:
                return worker_id
        raise reason

    async def _claim(self, slot: AgentSlot) -> str | None:
        """Become the owner, and return None; or return the id of the worker that is, or becomes, the owner."""
        if self._slots.must_leave(slot):
            return (await self._locator.locate(slot.agent_id, slot.blocked_handlers)).worker_id
        self.require_made(slot.agent_id)
        epoch = self._doubts.epoch
        outcome = await self._write_claim(slot)
        if isinstance(outcome, str):
            return outcome
        slot.own(outcome, epoch, self._loop.time())
        try:
            slot.listening(await self._subjects.listen(slot.hosted, slot.key))
            await self._connection.round_trip(self._options.offline_timeout)
        except BaseException:
            await self._instances.drop(slot)
            raise
        if slot.interest is not None and slot.interest.refusal is not None:
            await self._give_back(slot, outcome, slot.interest.refusal)
        self._room.accepted()
        if slot.record is None:  # lost meanwhile, before there was a subscription to end
            await self._instances.drop(slot)
        elif self._slots.must_leave(slot):  # since the claim began
            self._releasing.release_soon(slot)
        return None

    async def _give_back(self, slot: AgentSlot, record: Record, refusal: Refusal) -> None:
        """Give up an agent that was just claimed, and whose subject the server refuses. Raises `CannotOwn`."""
        await self._instances.drop(slot)
        self._room.refused(refusal)
        logger.warning("this worker takes no more keyed agents for now: %s", refusal)
        try:
            await self._records.release(record)
        except (RecordChanged, NatsrtError) as error:
            logger.debug("%s cannot be given back: %s", slot.agent_id, error)
        raise CannotOwn(refusal)

    async def _write_claim(self, slot: AgentSlot) -> Record | str:
        """Name this worker in the agent's record, and return the record; or return the id of its present owner.

        Raises `WorkerLost` if the owner does not answer, and is not known to be gone either.
        """
        until = self._loop.time() + self._options.lost_after + _MOVES_WITHIN + self._connection.rtt.allowance
        pause = _PAUSE
        present = None if self._room.refusal is None else await self._records.read(slot.agent_id)
        while True:
            try:
                if present is None:
                    if (holder := await self._holder(slot, until)) is not None:
                        return holder
                    self._require_room(slot.agent_id)
                    return await self._records.claim(slot.agent_id, self._worker_id)
                owner = present.owner
                if owner is None or owner == self._worker_id:
                    self._require_room(slot.agent_id)
                    return await self._records.take(present, self._worker_id)
                claim = await self._ask_owner(owner, slot, until)
                if claim is Claim.HOLDS:
                    return owner
                if claim is Claim.FREE:
                    self._require_room(slot.agent_id)
                    return await self._records.take(present, self._worker_id)
                if self._loop.time() > until:
                    raise WorkerLost(str(slot.agent_id), owner, "it owns the agent, but is silent")
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
                present = await self._records.read(slot.agent_id)
            except RecordTaken as taken:
                present = taken.record
            except RecordChanged:
                present = await self._records.read(slot.agent_id)

    def _require_room(self, agent_id: AgentId) -> None:
        """Raise `CannotOwn` if the server allows no more subscriptions, and `StateUnavailable` if another registry has
        the agent's owner perhaps.
        """
        if conflict := self._registry.conflict:
            raise StateUnavailable("claim", conflict)
        if (refusal := self._room.refusal) is not None:
            if isinstance(refusal, SubscriptionRefused):
                refusal = SubscriptionRefused(self._locator.subject_of(agent_id), refusal.reason)
            raise CannotOwn(refusal)

    async def _holder(self, slot: AgentSlot, until: float) -> str | None:
        """The worker that has an agent without a record; None if none has it, or none has answered at ``until``.

        Raises `RecordTaken` if there is a record.
        """
        await self._records.open()
        within = _ASK
        while self._loop.time() < until:
            if await self._locator.is_listened_for(slot.agent_id):
                present = await self._records.read(slot.agent_id)
                if present is not None:
                    raise RecordTaken(present)
                holder = await self._locator.ask_holder(slot.agent_id, within)
                within *= 2
                if holder is not None:
                    return holder
            elif self._connection.settled or not self._records.are_new:
                return None
            await asyncio.sleep(_LONGEST_PAUSE)  # it is blocked, reconnecting, or about to end its subscription
        return None

    async def _ask_owner(self, owner: str, slot: AgentSlot, until: float) -> Claim:
        """Ask the owner for its claim on the agent: ``FREE`` if it is gone, ``MOVING`` while that is not certain.

        Waits until the owner answers, is gone, is not listed by the registry any more, or has not answered at
        ``until``.
        """
        asking = asyncio.ensure_future(
            self._peers.claim(
                self._registry.peer_subject(owner),
                slot.agent_id,
                slot.blocked_handlers,
                max(_ASK, until - self._loop.time()),
            )
        )
        try:
            await asyncio.wait({asking}, timeout=_ASK + self._connection.rtt.allowance)
            while not asking.done() and self._registry.lists(owner):
                await asyncio.wait({asking}, timeout=_LONGEST_PAUSE)
            if asking.done() and (claim := asking.result()) is not None:
                return claim
        finally:
            await end_tasks(asking)
        if not self._registry.lists(owner):
            await self._registry.catch_up()
            if not self._registry.lists(owner):
                return Claim.FREE
        if await self._peers.listens(owner):
            return Claim.MOVING
        self._registry.suspect(owner)
        return Claim.FREE if self._connection.settled else Claim.MOVING
