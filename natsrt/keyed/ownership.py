"""The keyed agents that this worker owns: who owns an agent, and letting its messages in.

Rules:

1. The stored record decides who owns an agent. Every write to it names the revision that it follows, so whoever lost
   the ownership, frozen or cut off, cannot store anything any more: it drops its instance.
2. A worker that stood still, was disconnected or was taken for dead looks its records up again before it handles a
   message or answers one.
3. An owner that does not answer is replaced when the registry no longer lists it, or when the server says that it does
   not listen and that cannot be a reconnect that all go through.
4. State is stored before the reply, as far as the type's options say so.

`natsrt.keyed.instances` makes and stores what is owned, `natsrt.keyed.releasing` gives it up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

from autogen_core import Agent, AgentId
from nats.nuid import NUID

from natsrt.agents.catalog import Catalog
from natsrt.agents.chain import chain
from natsrt.agents.hosted_type import HostedType
from natsrt.agents.inbound import Inbound
from natsrt.background import BackgroundTasks
from natsrt.errors import WorkerLost
from natsrt.jetstream.agent_records import AgentRecords, Record, RecordChanged, RecordTaken
from natsrt.jetstream.registry.registry import Registry, RegistryListener
from natsrt.keyed.deadlocks import Deadlocks
from natsrt.keyed.instances import Instances, close, take_out
from natsrt.keyed.releasing import Releasing
from natsrt.keyed.slots import AgentSlot, AgentSlots, AgentSubjects, lease
from natsrt.observe.metrics import Counters
from natsrt.options import Options
from natsrt.sending.owner_locator import OwnerLocator
from natsrt.transport.connection import Connection
from natsrt.transport.peers import Peers
from natsrt.transport.stall_watch import StallWatch
from natsrt.wire.peer_messages import Claim, Location

logger = logging.getLogger("natsrt.hosting")

_STALL = 2.0
"""Seconds for which the event loop stood still, after which others may have taken this worker for dead."""
_MOVES_WITHIN = 4.0
"""Seconds by which an owner may take longer over a claim or a release than `Options.lost_after`."""
_ASK = 0.5
_PAUSE = 0.02
_LONGEST_PAUSE = 0.25
_CLOSE_WITHIN = 1.0
"""Seconds for which a stop waits for agents that could not be released to close."""
_AT_ONCE = 64
"""Agents that are looked up or released at the same time."""

T = TypeVar("T")


class OwnedElsewhere(Exception):
    """The agent lives on ``worker_id``."""

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        super().__init__(worker_id)


class NotOwned(Exception):
    """The agent does not live here, and was not to be claimed."""


class Ownership(RegistryListener):
    """What one worker owns. A `Listener` of its connection."""

    def __init__(
        self,
        *,
        connection: Connection,
        options: Options,
        worker_id: str,
        catalog: Catalog,
        registry: Registry,
        peers: Peers,
        records: AgentRecords,
        subjects: AgentSubjects,
        locator: OwnerLocator,
        deadlocks: Deadlocks,
        counters: Counters,
    ) -> None:
        self._connection = connection
        self._options = options
        self._worker_id = worker_id
        self._catalog = catalog
        self._registry = registry
        self._peers = peers
        self._records = records
        self._subjects = subjects
        self._locator = locator
        self._deadlocks = deadlocks
        self._loop = asyncio.get_running_loop()
        self._slots = AgentSlots()
        self._instances = Instances(
            connection=connection,
            worker_id=worker_id,
            catalog=catalog,
            records=records,
            counters=counters,
        )
        self._visit_prefix = NUID().next().decode()[-8:]
        self._visits = 0
        self._doubts = 0
        self._pulse = StallWatch(_STALL, self._became_unsure)
        self._tasks = BackgroundTasks(logger, "looking after keyed agents failed")
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._started = False
        self.draining = False
        """Whether this worker claims nothing more, and is about to give up what it owns."""
        self._releasing = Releasing(
            connection=connection,
            catalog=catalog,
            registry=registry,
            records=records,
            held=self._slots,
            instances=self._instances,
            turns=self._turns,
            subjects=subjects,
            leaves=self._leaves,
            tasks=self._tasks,
        )
        connection.add_listener(self)
        registry.add_listener(self)

    # -- lifecycle -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Needed once this worker hosts a keyed type. Harmless when started."""
        if not self._started:
            self._started = True
            try:
                await self._records.open()
            except BaseException:
                self._started = False
                raise
            self._pulse.start()
            self._tasks.spawn(self._releasing.keep_house())

    async def drain(self) -> None:
        """Hand all agents over: what was received for them is handled, their state is stored, nobody owns them."""
        self.draining = True
        await self._releasing.release_all()

    def exempt(self, visits: Collection[str]) -> None:
        """These visits wait for the end of this worker themselves, so that it does not wait for them."""
        self._releasing.exempt(visits)

    def leave(self, agent_type: str) -> None:
        """Begin to release all agents of a type, which this worker does not host any more."""
        for held in self._slots.of(agent_type):
            self._tasks.spawn(self._releasing.release(held))

    async def stop(self) -> None:
        """End: close and forget what was not released."""
        self._pulse.stop()
        await self._tasks.cancel()
        left = []
        for held in self._slots:
            held.record = None
            agent = take_out(held)
            if agent is not None:
                left.append(asyncio.ensure_future(close(agent)))
        self._slots.clear()
        if left:
            await asyncio.wait(left, timeout=_CLOSE_WITHIN)
        for closing in left:
            closing.cancel()

    def connection_lost(self) -> None:
        self._doubts += 1

    def connection_made(self) -> None:
        self.doubt()

    def evicted(self) -> None:
        self.doubt()

    def doubt(self) -> None:
        """Others may have taken this worker for dead: look every record up again, and soon.

        Until then this worker would take messages that are for others.
        """
        self._doubts += 1
        if self._started:
            self._tasks.spawn(self._look_up_all(self._doubts))

    # -- messages ------------------------------------------------------------------------------------------------

    async def visit(
        self,
        hosted: HostedType,
        key: str,
        along: Collection[str],
        serve: Callable[[], Awaitable[T]],
        *,
        inbound: Inbound | None = None,
        claim: bool = True,
    ) -> T:
        """Run ``serve`` when its turn comes, with the agent live and owned here, and store the state after it.

        ``along`` is the chain of the message, and ``inbound`` the message, if there is one. Without ``claim`` an agent
        that is not owned here is not claimed: `NotOwned`. Raises `OwnedElsewhere`, `Deadlock`, `StateConflict`,
        `StateNotSaved`, and what ``serve`` and the agent's own methods raise.
        """
        held = self._slots.hold(hosted, key)
        held.users += 1
        if along:
            held.come(along)
        self._visits += 1
        visit = f"{self._visit_prefix}{self._visits:x}"
        if inbound is not None:
            inbound.handler_id = visit
        try:
            if not held.mailbox.enters(visit, along):
                await self._deadlocks.wait(held.mailbox, held.agent_id, visit, inbound)
            try:
                agent = held.agent
                if agent is None or held.parting or not self._is_sure(held):
                    agent = await self._activate(held, along, claim)
                if held.options.concurrency == "concurrent":
                    held.mailbox.step_aside(visit)
                mark = chain.set((*along, visit))
                try:
                    return await serve()
                finally:
                    chain.reset(mark)
                    held.changed = True
                    if not self._is_sure(held):
                        await self._make_sure(held)
                    if held.agent is not agent:
                        raise self._instances.dropped(held)
                    if held.keeps_state and held.options.save == "message":
                        await self._instances.store(held)
            finally:
                held.mailbox.leave(visit)
        finally:
            held.used_at = self._loop.time()
            held.users -= 1
            if along:
                held.go(along)
            if held.emptied is not None:
                held.empty()
            if held.record is None:
                self._slots.tidy(held)

    async def locate(self, hosted: HostedType, key: str, along: Collection[str]) -> Location:
        """Who owns the agent, for a message of the chain ``along``. This worker claims it where nobody does."""
        held = self._slots.hold(hosted, key)
        held.guests += 1
        held.come(along)
        try:
            owner = await self._own(held, along, to_stay=True)
            held.used_at = self._loop.time()
            return Location(owner or self._worker_id, lease(held.options))
        finally:
            held.guests -= 1
            held.go(along)
            self._slots.tidy(held)

    def claim_of(self, agent_type: str, key: str, along: Collection[str]) -> Claim:
        """What to tell a worker that found this one in the agent's record, for a message of the chain ``along``."""
        held = self._slots.find(agent_type, key)
        if held is None:
            return Claim.FREE
        if held.record is not None and held.mailbox.holds(along):  # it cannot be released before that message came
            return Claim.HOLDS
        if held.is_moving or held.releasing:
            return Claim.MOVING
        if held.record is None:
            return Claim.FREE
        if self._leaves(held):
            return Claim.MOVING
        return Claim.HOLDS

    async def store(self, agent_id: AgentId) -> None:
        """Store the agent's state now. Raises `LookupError` where it is not live here."""
        held = self._slots.find(agent_id.type, agent_id.key)
        if held is None or held.agent is None:
            raise LookupError(f"Agent {agent_id} is not live in this runtime.")
        await self._instances.store(held)

    async def give_away(self, agent_type: str, count: int) -> int:
        """Release up to ``count`` idle agents of a type, so that other workers get them. Returns how many it were."""
        return await self._releasing.give_away(agent_type, count)

    @property
    def owns_some(self) -> bool:
        """Whether this worker owns any agent."""
        return any(held.record is not None for held in self._slots)

    def owned(self, agent_type: str) -> int:
        """How many agents of the type this worker owns."""
        return sum(1 for held in self._slots.of(agent_type) if held.record is not None)

    # -- ownership -----------------------------------------------------------------------------------------------

    async def _own(self, held: AgentSlot, along: Collection[str], *, to_stay: bool = False) -> str | None:
        """Own the agent, and return None; or return the id of the worker that does.

        One that is being released is still owned until it is `AgentSlot.parting`; with ``to_stay`` this waits for the
        end of its release instead.
        """
        if held.record is not None:
            await self._make_sure(held)
            goes = held.parting or (to_stay and held.releasing and not held.mailbox.holds(along))
            if held.record is not None and not goes:
                return None
        async with held.moving:
            return None if held.record is not None else await self._claim(held)

    def _leaves(self, held: AgentSlot) -> bool:
        """Whether the agent cannot stay on this worker: it ends, or does not host the type any more."""
        return self.draining or self._catalog.find(held.hosted.agent_type) is not held.hosted

    async def _claim(self, held: AgentSlot) -> str | None:
        if self._leaves(held):
            return (await self._locator.locate(held.agent_id, held.waited_for_by)).worker_id
        until = self._loop.time() + self._options.lost_after + _MOVES_WITHIN
        doubts, pause = self._doubts, _PAUSE
        present: Record | None = None
        while True:
            try:
                if present is None:
                    held.record = await self._records.claim(held.agent_id, self._worker_id)
                    break
                if present.owner is not None and present.owner != self._worker_id:
                    grip = await self._grip_of(present.owner, held.agent_id, held.waited_for_by)
                    if grip is Claim.HOLDS:
                        return present.owner
                    if grip is Claim.MOVING:
                        if self._loop.time() > until:
                            raise WorkerLost(str(held.agent_id), present.owner, "it owns the agent, but is silent")
                        await asyncio.sleep(pause)
                        pause = min(pause * 2, _LONGEST_PAUSE)
                        present = await self._records.read(held.agent_id)
                        continue
                held.record = await self._records.take(present, self._worker_id)
                break
            except RecordTaken as taken:
                present = taken.record
            except RecordChanged:
                present = await self._records.read(held.agent_id)
        held.sure, held.owned_since = doubts, self._loop.time()
        try:
            held.interest = await self._subjects.listen(held.hosted, held.key)
            await self._connection.barrier()
        except BaseException:
            await self._instances.drop(held)
            raise
        if self._leaves(held):  # since it began
            self._tasks.spawn(self._releasing.release(held))
        return None

    async def _grip_of(self, owner: str, agent_id: AgentId, along: Collection[str]) -> Claim:
        """The owner's grip on the agent; ``FREE`` if the owner is gone, ``MOVING`` while that is not certain."""
        grip = await self._peers.claim(owner, agent_id, along, _ASK)
        if grip is not None:
            return grip
        if not self._registry.lists(owner):
            await self._registry.catch_up()
            if not self._registry.lists(owner):
                return Claim.FREE
        if await self._peers.listens(owner):
            return Claim.MOVING
        self._registry.suspect(owner)
        return Claim.FREE if self._connection.settled else Claim.MOVING

    def _is_sure(self, held: AgentSlot) -> bool:
        """Whether this worker owns the agent, and nothing speaks against that."""
        self._pulse.look()
        return held.record is not None and held.sure == self._doubts

    async def _make_sure(self, held: AgentSlot) -> None:
        """Know that the record is still as this worker wrote it, or drop the instance."""
        if held.record is not None and not self._is_sure(held):
            async with held.saving:
                if held.record is not None and held.sure != self._doubts:
                    await self._look_up(held, held.record)

    async def _look_up(self, held: AgentSlot, own: Record) -> None:
        doubts = self._doubts
        record = await self._records.read(held.agent_id)
        if record is None or record.owner != self._worker_id or not self._records.follows(record, own):
            await self._instances.lose(held, "it was taken over while this worker was away")
        else:
            held.sure = doubts

    async def _look_up_all(self, doubts: int) -> None:
        async def look_up(held: AgentSlot) -> None:
            async with self._turns:
                if doubts == self._doubts:
                    await self._make_sure(held)
                    self._slots.tidy(held)

        for outcome in await asyncio.gather(*(look_up(held) for held in self._slots), return_exceptions=True):
            if isinstance(outcome, Exception):
                logger.info("an owner cannot be looked up yet: %s", outcome)

    def _became_unsure(self) -> None:
        """This worker stood still. If it was really taken for dead, it loses its connection or its registry entry too.

        Those are reasons to look every record up: `doubt`.
        """
        self._doubts += 1

    async def _activate(self, held: AgentSlot, along: Collection[str], claim: bool) -> Agent:
        """Own the agent, and have its instance live, which is returned.

        Raises `OwnedElsewhere`, or without ``claim`` `NotOwned`.
        """
        while True:
            if not claim:
                await self._make_sure(held)
                if held.record is None or held.parting:
                    raise NotOwned
            if (owner := await self._own(held, along)) is not None:
                raise OwnedElsewhere(owner)
            if held.agent is None:
                await self._instances.load(held)
            if held.agent is not None:  # else it was lost meanwhile
                return held.agent
