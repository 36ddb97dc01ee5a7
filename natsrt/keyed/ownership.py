"""Who owns keyed agents: claiming them, verifying that they are still owned here, and telling others.

Rules:

1. The stored record decides who owns an agent. Every write to it names the revision that it follows, so a worker that
   lost the ownership, frozen or cut off, cannot store anything any more: it drops its instance.
2. A worker that was blocked, disconnected or taken for dead verifies its records again before it handles or answers a
   message.
3. An owner that does not answer is replaced when the registry no longer lists it, or when the server says that it does
   not listen and that this cannot be a reconnect that all workers go through.
4. An agent whose record is missing belongs to the worker that has it, which stores the record again. Another worker
   claims the agent only if nobody listens on the agent's subject.
5. A worker that cannot subscribe to an agent's subject leaves the agent to other workers.

`natsrt.keyed.turns` handles the messages of what is owned, `natsrt.keyed.instances` makes and stores it,
`natsrt.keyed.releasing` gives it up.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection

import nats.errors
from autogen_core import Agent, AgentId

from natsrt.agents.hosted_type import HostedType
from natsrt.background import BackgroundTasks
from natsrt.errors import NatsrtError, SubscriptionRefused, WorkerLost
from natsrt.jetstream.agent_records import AgentRecords, Record, RecordChanged, RecordTaken
from natsrt.jetstream.registry.registry import Registry, RegistryListener
from natsrt.keyed.instances import Instances, close_agent
from natsrt.keyed.releasing import Releasing
from natsrt.keyed.room import Room
from natsrt.keyed.slots import AgentSlot, AgentSlots, AgentSubjects, lease
from natsrt.keyed.unmade import NotMade, UnmadeAgents
from natsrt.options import Options
from natsrt.sending.owner_locator import OwnerLocator
from natsrt.transport.connection import Connection, Refusal
from natsrt.transport.peers import Peers
from natsrt.transport.stall_watch import StallWatch
from natsrt.wire.failures import class_name
from natsrt.wire.peer_messages import Claim, Location

logger = logging.getLogger("natsrt.hosting")

_STALL = 2.0
"""Seconds for which the event loop must stand still before this worker verifies what it owns: other workers may have
taken it for dead meanwhile."""
_MOVES_WITHIN = 4.0
"""Seconds beyond `Options.lost_after` for which the end of another worker's claim or release is waited for."""
_ASK = 0.5
"""Seconds within which the owner that a record names must answer. docs/PROTOCOL.md fixes this time."""
_PAUSE = 0.02
"""Seconds before the record of an agent that another worker claims or releases is read again; doubled each time."""
_LONGEST_PAUSE = 0.25
"""Seconds of such a pause at most."""
_LOOK_EVERY = 10.0
"""Seconds between two looks whether the bucket of the records still exists."""
_GATHERED = 0.1
"""Seconds within which refused subscriptions are one reason to verify or release what is owned."""
_ROOM = 5
"""Agents that are released when this worker has no room for a subscription to an inbox: reading the registry takes one,
and a worker has few at the same time."""
_CLOSE_WITHIN = 1.0
"""Seconds for which a stop waits for the agents that could not be released to close."""
_AT_ONCE = 64
"""Agents that are verified at the same time, so that a worker with many does not flood JetStream."""


class OwnedElsewhere(Exception):
    """The worker ``worker_id`` owns the agent."""

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        super().__init__(worker_id)


class NotOwned(Exception):
    """This worker does not own the agent, and was not to claim it."""


class Declined(Exception):
    """The agent cannot be made here, because of ``error``. Another worker hosts its type, and may be able to."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        super().__init__(str(error))


class _NoRoom(Exception):
    """This worker cannot subscribe to the subject of an agent, because of ``refusal``."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal)


class Ownership(RegistryListener):
    """The ownership of one worker. A `Listener` of its connection, of its registry, and of the records' bucket."""

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
    ) -> None:
        self._connection = connection
        self._options = options
        self._worker_id = worker_id
        self._registry = registry
        self._peers = peers
        self._records = records
        self._subjects = subjects
        self._locator = locator
        self._loop = asyncio.get_running_loop()
        self._slots = slots
        self._instances = instances
        self._releasing = releasing
        self._unmade = UnmadeAgents()
        self.doubt_epoch = 0
        """Number of times that there was a reason to doubt that what is owned here still is."""
        self._stall_watch = StallWatch(_STALL, self._stalled)
        self._tasks = BackgroundTasks(logger, "verifying keyed agents failed")
        self._verifying = asyncio.Semaphore(_AT_ONCE)
        self._started = False
        self._room = Room(connection)
        self._refused: asyncio.TimerHandle | None = None
        connection.add_listener(self)
        connection.on_denied(self._on_denied)
        registry.add_listener(self)
        records.add_listener(self)

    # -- lifecycle -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the records, and begin to watch. Call it once this worker hosts a keyed type. Harmless when started."""
        if not self._started:
            self._started = True
            try:
                await self._records.open()
            except BaseException:
                self._started = False
                raise
            self._stall_watch.start()
            self._releasing.start()
            self._tasks.spawn(self._watch_bucket())

    def begin_drain(self) -> None:
        """Claim no more agents."""
        self._slots.draining = True

    async def drain(self) -> None:
        """Claim no more agents, and release all. Returns when all are released, or could not be."""
        self.begin_drain()
        await self._releasing.release_all()

    def exempt(self, handlers: Collection[str]) -> None:
        """Do not wait in `drain` for the handlers with these ids: they wait for the stop of this worker themselves."""
        self._releasing.exempt(handlers)

    def leave(self, agent_type: str) -> None:
        """Begin to release all agents of a type, which this worker does not host any more."""
        for slot in self._slots.of(agent_type):
            self._releasing.release_soon(slot)

    async def stop(self) -> None:
        """Close the agents that were not released, and forget all."""
        self._stall_watch.stop()
        if self._refused is not None:
            self._refused.cancel()
        await self._releasing.stop()
        await self._tasks.cancel()
        left = []
        for slot in self._slots:
            slot.disown()
            agent = slot.remove_instance()
            if agent is not None:
                left.append(asyncio.ensure_future(close_agent(agent)))
        self._slots.clear()
        if left:
            await asyncio.wait(left, timeout=_CLOSE_WITHIN)
        for closing in left:
            closing.cancel()

    def connection_lost(self) -> None:
        self.doubt_epoch += 1

    def connection_made(self) -> None:
        self.doubt()

    def evicted(self) -> None:
        self.doubt()

    def bucket_replaced(self) -> None:
        self.doubt()

    def _on_denied(self, denied: Refusal) -> None:
        """The server may have ended the subscription to an agent's subject, or has no room for one to an inbox."""
        if isinstance(denied, SubscriptionRefused):
            needed = denied.subject.startswith(self._options.inbox_prefix)
            work = self._make_room if needed else None
        else:
            work = self.doubt if denied.operation == "subscribe to" else None
        if work is not None and self._refused is None:
            self._refused = self._loop.call_later(_GATHERED, self._after_refusals, work)

    def _after_refusals(self, work: Callable[[], None]) -> None:
        self._refused = None
        work()

    def _make_room(self) -> None:
        """Release some agents: what this worker needs to work with the registry and the records comes first."""
        unused = [slot for slot in self._slots if slot.record is not None and not slot.users and not slot.is_moving]
        unused.sort(key=lambda slot: slot.used_at)
        for slot in unused[:_ROOM]:
            self._releasing.release_soon(slot)

    async def _watch_bucket(self) -> None:
        """Look for the bucket from time to time: an agent whose state does not change writes nothing to it."""
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            if not self._connection.connected or not self.owns_some:
                continue
            try:
                await self._records.look()
            except (NatsrtError, nats.errors.Error, OSError, TimeoutError) as error:
                logger.debug("looking for the records of keyed agents: %s", error)

    def doubt(self) -> None:
        """Other workers may have taken this one for dead: begin to verify every record again.

        Until an agent is verified, this worker may receive messages that are for its new owner.
        """
        self.doubt_epoch += 1
        if self._started:
            self._tasks.spawn(self._verify_all(self.doubt_epoch))

    # -- questions -----------------------------------------------------------------------------------------------

    async def locate(self, hosted: HostedType, key: str, chain: Collection[str], *, missing: bool = False) -> Location:
        """Where the agent lives, for a message with this chain. This worker claims it if nobody owns it.

        ``missing``: the asker found no record of the agent, so the own one is verified.

        Raises what claiming raises: `WorkerLost`, `SubscriptionRefused`, and the errors of the records.
        """
        slot = self._slots.get(hosted, key)
        if missing:
            slot.doubted()
        slot.asked(chain)
        try:
            owner = await self._own(slot, chain, to_stay=True)
            slot.located(self._loop.time())
            return Location(owner or self._worker_id, lease(slot.options))
        finally:
            slot.answered(chain)
            self._slots.forget_unused(slot)

    def claim_of(self, agent_type: str, key: str, chain: Collection[str]) -> Claim:
        """The answer to a worker that found this one in the agent's record, for a message with this chain."""
        slot = self._slots.find(agent_type, key)
        if slot is None:
            return Claim.FREE
        if slot.record is not None and slot.mailbox.runs_any(chain):  # it is not released before that message has come
            return Claim.HOLDS
        if slot.is_moving or slot.releasing:
            return Claim.MOVING
        if slot.record is None:
            return Claim.FREE
        return Claim.MOVING if self._slots.must_leave(slot) else Claim.HOLDS

    async def store(self, agent_id: AgentId) -> None:
        """Store the agent's state now. Raises `LookupError` where it is not live here."""
        slot = self._slots.find(agent_id.type, agent_id.key)
        if slot is None or slot.agent is None:
            raise LookupError(f"Agent {agent_id} is not live in this runtime.")
        await self._instances.store(slot)

    async def release_some(self, agent_type: str, count: int) -> int:
        """Release up to ``count`` agents of a type that can move to other workers now. Returns the number released."""
        return await self._releasing.release_some(agent_type, count)

    def check_room(self, agent_type: str, key: str) -> None:
        """Raise `SubscriptionRefused` or `PermissionDenied` if this worker does not own the agent, and cannot."""
        slot = self._slots.find(agent_type, key)
        if (refusal := self._room.refusal) is not None and (slot is None or slot.record is None):
            raise refusal

    @property
    def owns_some(self) -> bool:
        """Whether this worker owns any agent."""
        return any(slot.record is not None for slot in self._slots)

    def owned(self, agent_type: str) -> int:
        """How many agents of the type this worker owns."""
        return sum(1 for slot in self._slots.of(agent_type) if slot.record is not None)

    # -- ownership -----------------------------------------------------------------------------------------------

    async def _own(self, slot: AgentSlot, chain: Collection[str], *, to_stay: bool = False) -> str | None:
        """Own the agent, and return None; or return the id of the worker that owns it.

        An agent that is being released is still owned until it is `AgentSlot.closing`. With ``to_stay`` this waits for
        the end of the release instead, and claims the agent again.
        """
        if slot.record is not None:
            await self.verify(slot)
            leaves = slot.closing or (to_stay and slot.releasing and not slot.mailbox.runs_any(chain))
            if slot.record is not None and not leaves:
                return None
        try:
            async with slot.moving:
                return None if slot.record is not None else await self._claim(slot)
        except _NoRoom as declined:
            return await self._give_elsewhere(slot, declined.refusal)

    async def _give_elsewhere(self, slot: AgentSlot, refusal: Refusal) -> str:
        """Have another worker own an agent. Returns its id. Raises ``refusal`` if none can."""
        others = [w for w in self._registry.view.workers_hosting(slot.hosted.agent_type) if w != self._worker_id]
        random.shuffle(others)
        for worker_id in others:
            try:
                await self._locator.give(slot.agent_id, worker_id)
            except Exception as error:  # the factory of that worker may raise anything
                logger.debug("worker %s does not take %s: %s", worker_id, slot.agent_id, error)
            else:
                return worker_id
        raise refusal

    async def _claim(self, slot: AgentSlot) -> str | None:
        """Become the owner, and return None; or return the id of the worker that is, or becomes, the owner."""
        if self._slots.must_leave(slot):
            return (await self._locator.locate(slot.agent_id, slot.blocked_handlers)).worker_id
        self._decline(slot)
        epoch = self.doubt_epoch
        outcome = await self._write_claim(slot)
        if isinstance(outcome, str):
            return outcome
        slot.own(outcome, epoch, self._loop.time())
        try:
            slot.listening(await self._subjects.listen(slot.hosted, slot.key))
            await self._connection.barrier()
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
        """Give up an agent that was just claimed, and whose subject the server refuses. Raises `_NoRoom`."""
        await self._instances.drop(slot)
        self._room.refused(refusal)
        logger.warning("this worker takes no more keyed agents for now: %s", refusal)
        try:
            await self._records.release(record)
        except (RecordChanged, NatsrtError) as error:
            logger.debug("%s cannot be given back: %s", slot.agent_id, error)
        raise _NoRoom(refusal)

    async def _write_claim(self, slot: AgentSlot) -> Record | str:
        """Name this worker in the agent's record, and return the record; or return the id of its present owner.

        Raises `WorkerLost` if the owner does not answer, and is not known to be gone either.
        """
        until = self._loop.time() + self._options.lost_after + _MOVES_WITHIN
        pause = _PAUSE
        present = None if self._room.refusal is None else await self._records.read(slot.agent_id)
        while True:
            try:
                if present is None:
                    if (holder := await self._holder(slot, until)) is not None:
                        return holder
                    self._require_room()
                    return await self._records.claim(slot.agent_id, self._worker_id)
                owner = present.owner
                if owner is None or owner == self._worker_id:
                    self._require_room()
                    return await self._records.take(present, self._worker_id)
                claim = await self._ask_owner(owner, slot.agent_id, slot.blocked_handlers)
                if claim is Claim.HOLDS:
                    return owner
                if claim is Claim.FREE:
                    self._require_room()
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

    def _require_room(self) -> None:
        """Raise `_NoRoom` if this worker cannot own more agents."""
        if (refusal := self._room.refusal) is not None:
            raise _NoRoom(refusal)

    async def _holder(self, slot: AgentSlot, until: float) -> str | None:
        """The worker that has an agent without a record; None if none has it, or none has answered at ``until``.

        Raises `RecordTaken` if there is a record.
        """
        await self._records.open()
        while self._loop.time() < until:
            if await self._locator.is_listened_for(slot.agent_id):
                present = await self._records.read(slot.agent_id)
                if present is not None:
                    raise RecordTaken(present)
                holder = await self._locator.ask_holder(slot.agent_id, _ASK)
                if holder is not None:
                    return holder
            elif self._connection.settled or not self._records.are_new:
                return None
            await asyncio.sleep(_LONGEST_PAUSE)  # it is blocked, reconnecting, or about to end its subscription
        return None

    async def _ask_owner(self, owner: str, agent_id: AgentId, chain: Collection[str]) -> Claim:
        """Ask the owner for its claim on the agent: ``FREE`` if it is gone, ``MOVING`` while that is not certain."""
        claim = await self._peers.claim(owner, agent_id, chain, _ASK)
        if claim is not None:
            return claim
        if not self._registry.lists(owner):
            await self._registry.catch_up()
            if not self._registry.lists(owner):
                return Claim.FREE
        if await self._peers.listens(owner):
            return Claim.MOVING
        self._registry.suspect(owner)
        return Claim.FREE if self._connection.settled else Claim.MOVING

    # -- verifying -----------------------------------------------------------------------------------------------

    def is_verified(self, slot: AgentSlot) -> bool:
        """Whether this worker owns the agent, and there was no reason to doubt that since it was last verified."""
        self._stall_watch.look()
        return slot.record is not None and slot.verified_epoch == self.doubt_epoch

    async def verify(self, slot: AgentSlot) -> None:
        """Read the record if the ownership is in doubt. Drops the instance if another worker has changed the record."""
        if slot.record is not None and not self.is_verified(slot):
            async with slot.saving:
                if slot.record is not None and slot.verified_epoch != self.doubt_epoch:
                    await self._verify(slot, slot.record)

    async def _verify(self, slot: AgentSlot, own: Record) -> None:
        epoch = self.doubt_epoch
        try:
            await self._instances.present(slot, own)
        except RecordChanged as changed:
            await self._instances.drop_lost(slot, changed.present)
            return
        slot.verified(epoch)
        if slot.is_deaf:
            self._releasing.release_soon(slot)

    async def _verify_all(self, epoch: int) -> None:
        async def verify(slot: AgentSlot) -> None:
            async with self._verifying:
                if epoch == self.doubt_epoch:
                    await self.verify(slot)
                    self._slots.forget_unused(slot)

        for outcome in await asyncio.gather(*(verify(slot) for slot in self._slots), return_exceptions=True):
            if isinstance(outcome, Exception):
                logger.info("the ownership of an agent cannot be verified yet: %s", outcome)

    def _stalled(self) -> None:
        """The event loop was blocked. Each record is verified before the agent's next message is handled or answered.

        A worker that was taken for dead loses its connection or its registry entry, too. Then `doubt` verifies all at
        once.
        """
        self.doubt_epoch += 1

    async def activate(self, slot: AgentSlot, chain: Collection[str], claim: bool) -> Agent:
        """Own the agent and make its instance, as far as needed. Returns the instance.

        ``chain`` is the chain of the message that needs it. Raises `OwnedElsewhere` if another worker owns the agent;
        if ``claim`` is off, `NotOwned` if this worker does not; `Declined` if the agent cannot be made here, but
        possibly on another worker; and what making it raises.
        """
        while True:
            if not claim:
                await self.verify(slot)
                if slot.record is None or slot.closing:
                    raise NotOwned
            if (owner := await self._own(slot, chain)) is not None:
                raise OwnedElsewhere(owner)
            if slot.agent is None:
                await self._load(slot)
            if slot.agent is not None:  # None: the ownership was lost meanwhile
                return slot.agent

    async def _load(self, slot: AgentSlot) -> None:
        """Make the instance. If it cannot be made, give the agent up if another worker hosts its type.

        Raises `Declined` then.
        """
        try:
            self._decline(slot)
            await self._instances.load(slot)
        except NotMade as failure:
            self._unmade.failed(slot.agent_id, failure.error, self._loop.time())
            if not self._others_host(slot):
                raise failure.error from None
            what = class_name(type(failure.error))
            logger.warning("%s cannot be made here (%s) and is left to other workers", slot.agent_id, what)
            self._leave_to_others(slot)
            raise Declined(failure.error) from None
        except Declined:
            self._leave_to_others(slot)
            raise
        self._unmade.made(slot.agent_id)

    def _leave_to_others(self, slot: AgentSlot) -> None:
        if slot.record is not None and not slot.releasing:
            self._releasing.release_soon(slot)

    def _decline(self, slot: AgentSlot) -> None:
        """Raise `Declined` if the agent could not be made here lately, and another worker hosts its type."""
        error = self._unmade.error(slot.agent_id, self._loop.time())
        if error is not None and self._others_host(slot):
            raise Declined(error)

    def _others_host(self, slot: AgentSlot) -> bool:
        """Whether another worker hosts the type, and is not stopping."""
        return any(one != self._worker_id for one in self._registry.view.workers_hosting(slot.hosted.agent_type))
