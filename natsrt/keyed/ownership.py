"""Who owns keyed agents: verifying that they are still owned here, telling others, and making what is owned live.

Rules:

1. The stored record decides who owns an agent. Every write to it names the revision that it follows, so a worker that
   lost the ownership, frozen or cut off, cannot store anything any more: it drops its instance.
2. A worker that was blocked, disconnected or taken for dead verifies its records again before it handles or answers a
   message.

`natsrt.keyed.claiming` claims agents, `natsrt.keyed.turns` handles the messages of what is owned,
`natsrt.keyed.instances` makes and stores it, `natsrt.keyed.releasing` gives it up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

import nats.errors
from autogen_core import Agent, AgentId

from natsrt.agents.chain import Handler, current_handler
from natsrt.agents.hosted_type import HostedType
from natsrt.background import BackgroundTasks
from natsrt.errors import NatsrtError, SubscriptionRefused
from natsrt.jetstream.agent_records import AgentRecords, Record, RecordChanged
from natsrt.jetstream.registry.registry import Registry, RegistryListener
from natsrt.keyed.claiming import CannotOwn, Claiming
from natsrt.keyed.instances import Instances, close_agent
from natsrt.keyed.releasing import Releasing
from natsrt.keyed.slots import AgentSlot, AgentSlots, Doubts, lease
from natsrt.keyed.unmade import NotMade
from natsrt.options import Options
from natsrt.transport.connection import Connection, Refusal
from natsrt.transport.stall_watch import StallWatch
from natsrt.wire.exception_parts import class_name
from natsrt.wire.peer_messages import Claim, Location

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_STALL = 2.0
"""Seconds for which the event loop must stand still before this worker verifies what it owns: other workers may have
taken it for dead meanwhile."""
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


class Ownership(RegistryListener):
    """The ownership of one worker. A `Listener` of its connection, of its registry, and of the records' bucket."""

    def __init__(
        self,
        *,
        connection: Connection,
        options: Options,
        worker_id: str,
        registry: Registry,
        records: AgentRecords,
        slots: AgentSlots,
        instances: Instances,
        releasing: Releasing,
        claiming: Claiming,
        doubts: Doubts,
    ) -> None:
        self._connection = connection
        self._options = options
        self._worker_id = worker_id
        self._records = records
        self._loop = asyncio.get_running_loop()
        self._slots = slots
        self._instances = instances
        self._releasing = releasing
        self._claiming = claiming
        self._doubts = doubts
        self._stall_watch = StallWatch(_STALL, self._stalled)
        self._tasks = BackgroundTasks(logger, "verifying keyed agents failed")
        self._verifying = asyncio.Semaphore(_AT_ONCE)
        self._started = False
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
        self._doubts.epoch += 1

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
            if not self._connection.connected or not (self.owns_some or self._records.problem):
                continue
            try:
                await self._records.look()
            except (NatsrtError, nats.errors.Error, OSError, TimeoutError) as error:
                logger.debug("looking for the records of keyed agents: %s", error)

    def doubt(self) -> None:
        """Other workers may have taken this one for dead: begin to verify every record again.

        Until an agent is verified, this worker may receive messages that are for its new owner.
        """
        self._doubts.epoch += 1
        if self._started:
            self._tasks.spawn(self._verify_all(self._doubts.epoch))

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
        await self._instances.store(self._live(agent_id))

    def delete_after_handler(self, agent_id: AgentId) -> None:
        """Delete the agent's record and instance when the present handler, which runs in it, has ended.

        Raises `LookupError` where it is not live here, and `RuntimeError` outside its handlers.
        """
        slot = self._live(agent_id)
        handler = current_handler.get()
        if not isinstance(handler, Handler) or not slot.mailbox.runs_any((handler.handler_id,)):
            raise RuntimeError(f"only a handler of {agent_id} itself can delete its state")
        slot.to_delete = True

    def _live(self, agent_id: AgentId) -> AgentSlot:
        """The slot of an agent that is live here. Raises `LookupError` if it is not."""
        slot = self._slots.find(agent_id.type, agent_id.key)
        if slot is None or slot.agent is None:
            raise LookupError(f"Agent {agent_id} is not live in this runtime.")
        return slot

    async def release_some(self, agent_type: str, count: int) -> int:
        """Release up to ``count`` agents of a type that can move to other workers now. Returns the number released."""
        return await self._releasing.release_some(agent_type, count)

    def check_able(self, agent_id: AgentId) -> None:
        """Raise the error because of which this worker cannot own an agent that it does not own now, if any."""
        self._claiming.check(agent_id)

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
        return await self._claiming.own(slot)

    # -- verifying -----------------------------------------------------------------------------------------------

    def is_verified(self, slot: AgentSlot) -> bool:
        """Whether this worker owns the agent, and there was no reason to doubt that since it was last verified."""
        self._stall_watch.look()
        return slot.record is not None and slot.verified_epoch == self._doubts.epoch

    async def verify(self, slot: AgentSlot) -> None:
        """Read the record if the ownership is in doubt. Drops the instance if another worker has changed the record."""
        if slot.record is not None and not self.is_verified(slot):
            async with slot.saving:
                if slot.record is not None and slot.verified_epoch != self._doubts.epoch:
                    await self._verify(slot, slot.record)

    async def _verify(self, slot: AgentSlot, own: Record) -> None:
        epoch = self._doubts.epoch
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
                if epoch == self._doubts.epoch:
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
        self._doubts.epoch += 1

    async def activate(self, slot: AgentSlot, chain: Collection[str], claim: bool) -> Agent:
        """Own the agent and make its instance, as far as needed. Returns the instance.

        ``chain`` is the chain of the message that needs it. Raises `OwnedElsewhere` if another worker owns the agent;
        if ``claim`` is off, `NotOwned` if this worker does not; `CannotOwn` if the agent cannot be made here,
        but possibly on another worker; and what making it raises.
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

        Raises `CannotOwn` then.
        """
        try:
            self._claiming.require_made(slot.agent_id)
            await self._instances.load(slot)
        except NotMade as failure:
            self._claiming.unmade.failed(slot.agent_id, failure.error, self._loop.time())
            if not self._claiming.others_host(slot.hosted.agent_type):
                raise failure.error from None
            what = class_name(type(failure.error))
            logger.warning("%s cannot be made here (%s) and is left to other workers", slot.agent_id, what)
            self._leave_to_others(slot)
            raise CannotOwn(failure.error) from None
        except CannotOwn:
            self._leave_to_others(slot)
            raise
        self._claiming.unmade.made(slot.agent_id)

    def _leave_to_others(self, slot: AgentSlot) -> None:
        if slot.record is not None and not slot.releasing:
            self._releasing.release_soon(slot)
