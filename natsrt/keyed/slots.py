"""What an owner keeps for each keyed agent, and what follows from the options of its type.

Everything else only reads a slot. It changes by its methods, each of which says what happened: to its messages ("use"),
to the ownership, to the instance, to the release.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from autogen_core import Agent, AgentId, BaseAgent

from natsrt.agents.catalog import Catalog
from natsrt.agents.hosted_type import HostedType
from natsrt.jetstream.record import NOTHING_HANDLED, Record, advanced, latest
from natsrt.keyed.mailbox import Mailbox
from natsrt.keyed_types import KeyedOptions
from natsrt.transport.connection import Interest
from natsrt.wire.stored_events import StoredEvent

_LEASE = 10.0
"""Seconds after a message for which its sender may assume that the owner is still the same, if the type's
``idle_timeout`` allows it. A conversation that pauses longer asks once more."""
LONGEST_INTERVAL = 5.0
"""Seconds between two rounds of housekeeping at most."""
_SHORTEST_INTERVAL = 0.05
"""Seconds between two rounds of housekeeping at least, however short the timeouts are."""


class AgentSubjects(Protocol):
    """Subscribes to the subjects of single agents."""

    async def listen(self, hosted: HostedType, key: str) -> Interest:
        """Take in what is sent to one keyed agent, until the interest is unsubscribed."""


class Doubts:
    """Reasons to doubt that what this worker owns is still owned here."""

    def __init__(self) -> None:
        self.epoch = 0
        """Number of times that there was such a reason."""


class FailedClaim(NamedTuple):
    """An attempt to own an agent that failed with ``error``, ``at`` the event loop's time."""

    error: Exception
    at: float


class AgentSlot:
    """What this worker keeps for one keyed agent that it owns, or is finding out about."""

    __slots__ = (
        "_applying",
        "_moving",
        "_saving",
        "agent",
        "agent_id",
        "applied",
        "chains",
        "changed",
        "closing",
        "counted",
        "hosted",
        "interest",
        "keeps_state",
        "key",
        "mailbox",
        "open_questions",
        "options",
        "owned_since",
        "record",
        "releasing",
        "saved_at",
        "to_delete",
        "unclaimed",
        "use_changed",
        "used_at",
        "users",
        "verified_epoch",
    )

    def __init__(self, hosted: HostedType, key: str) -> None:
        assert hosted.keyed is not None
        now = asyncio.get_running_loop().time()
        self.hosted: HostedType = hosted
        self.options: KeyedOptions = hosted.keyed
        self.key: str = key
        self.agent_id: AgentId = AgentId(hosted.agent_type, key)
        self.mailbox: Mailbox = Mailbox()
        self._moving: asyncio.Lock | None = None
        self._saving: asyncio.Lock | None = None
        self._applying: asyncio.Lock | None = None
        # use
        self.users: int = 0
        """Messages that wait or are handled."""
        self.open_questions: int = 0
        """Questions about the agent's location that are being answered."""
        self.chains: list[Collection[str]] | None = None
        """The chains of these messages and questions, as far as they have one."""
        self.used_at: float = now
        """The event loop's time when the last message ended, or the last question was answered."""
        # ownership
        self.record: Record | None = None
        """The record as this worker wrote it last; None while this worker does not own the agent."""
        self.interest: Interest | None = None
        """The subscription to the agent's subject; None while there is none."""
        self.verified_epoch: int = -1
        """Value of `Doubts.epoch` when the record was last verified; a different value means: verify again."""
        self.owned_since: float = now
        """The event loop's time of the last claim."""
        self.unclaimed: FailedClaim | None = None
        """The last attempt to own the agent that failed because of JetStream; None if there was none."""
        # instance
        self.agent: Agent | None = None
        """The instance, with its state loaded; None while there is none that may get messages."""
        self.keeps_state: bool = False
        """Whether the instance has a state to be stored."""
        self.changed: bool = False
        """Whether messages were handled since the last save."""
        self.to_delete: bool = False
        """Whether the record and the instance are to be deleted when no handler runs in it any more."""
        self.counted: tuple[str, ...] = ()
        """The ids of lost copies of calls that were handled since the last save."""
        self.applied: Mapping[str, int] = NOTHING_HANDLED
        """By the id of a stream: the sequence of its last event that was handled since the last save. It is replaced,
        never changed."""
        self.saved_at: float = now
        """The event loop's time when the instance was made, or its state was last stored."""
        # release
        self.releasing: bool = False
        """Whether the agent is being released."""
        self.closing: bool = False
        """Whether the release has come so far that no message is handled any more: new ones wait for its end."""
        self.use_changed: asyncio.Future[None] | None = None
        """Done when `users` changes, for a release that waits; None while none does."""

    # -- use -----------------------------------------------------------------------------------------------------

    def enter(self, chain: Collection[str]) -> None:
        """A message with this chain has arrived."""
        self.users += 1
        if chain:
            self._add_chain(chain)

    def exit(self, chain: Collection[str], now: float) -> None:
        """A message with this chain has been handled, or was given up."""
        self.used_at = now
        self.users -= 1
        if chain:
            self._remove_chain(chain)
        if self.use_changed is not None:
            self.wake_release()

    def asked(self, chain: Collection[str]) -> None:
        """A question about the agent's location has arrived, for a message with this chain."""
        self.open_questions += 1
        self._add_chain(chain)

    def located(self, now: float) -> None:
        """A sender learns where the agent is, and may send messages there from now on."""
        self.used_at = now

    def answered(self, chain: Collection[str]) -> None:
        """A question for a message with this chain has been answered, or was given up."""
        self.open_questions -= 1
        self._remove_chain(chain)

    def _add_chain(self, chain: Collection[str]) -> None:
        if chain:
            if self.chains is None:
                self.chains = []
            self.chains.append(chain)

    def _remove_chain(self, chain: Collection[str]) -> None:
        if chain and self.chains is not None:
            self.chains.remove(chain)

    @property
    def blocked_handlers(self) -> set[str]:
        """Ids of all handlers blocked on messages in this slot."""
        return set().union(*self.chains) if self.chains else set()

    def is_used(self, exempt: Collection[str] = ()) -> bool:
        """Whether this worker owns the agent, and has messages for it other than those of the ``exempt`` handlers."""
        return self.record is not None and self.users > self.mailbox.count(exempt)

    # -- ownership -----------------------------------------------------------------------------------------------

    def own(self, record: Record, epoch: int, now: float) -> None:
        """This worker has become the owner, by a record that it wrote at this doubt epoch."""
        self.record, self.verified_epoch, self.owned_since = record, epoch, now

    def verified(self, epoch: int) -> None:
        """The record is still as this worker wrote it. That was read at this doubt epoch."""
        self.verified_epoch = epoch

    def doubted(self) -> None:
        """The record may have changed, or be gone."""
        self.verified_epoch = -1

    def listening(self, interest: Interest) -> None:
        """This worker has subscribed to the agent's subject."""
        self.interest = interest

    @property
    def is_deaf(self) -> bool:
        """Whether the server refuses the subscription to the agent's subject."""
        return self.interest is not None and self.interest.refusal is not None

    def take_interest(self) -> Interest | None:
        """The subscription to the agent's subject, which the caller ends; None if there is none."""
        interest, self.interest = self.interest, None
        return interest

    def disown(self) -> None:
        """This worker does not own the agent any more."""
        self.record = None
        self.wake_release()

    # -- instance ------------------------------------------------------------------------------------------------

    def activate(self, agent: Agent, now: float) -> None:
        """The instance is live, with the state that is stored."""
        self.agent, self.keeps_state, self.saved_at = agent, keeps_state(agent), now

    def handled(self, supersedes: Sequence[str] = ()) -> None:
        """The instance has handled a message, which may have changed its state.

        ``supersedes`` are the ids of its lost copies, which are not handled any more.
        """
        self.changed = True
        if supersedes:
            self.counted = latest((*self.counted, *supersedes))  # no record names more

    def has_applied(self, event: StoredEvent) -> bool:
        """Whether the instance's state contains the effect of this event, or of a later one of its stream."""
        stored = 0 if self.record is None else self.record.handled.get(event.stream, 0)
        return event.sequence <= max(stored, self.applied.get(event.stream, 0))

    def apply(self, event: StoredEvent) -> None:
        """The instance has handled this event. The sequence is stored with the next save."""
        self.applied = advanced(self.applied, {event.stream: event.sequence})

    def still_applied(self, lost: Record) -> None:
        """The record ``lost`` was stored again without its state, which the instance has, and which is stored later."""
        self.applied = advanced(lost.handled, self.applied)

    def is_due(self, now: float) -> bool:
        """Whether the state must be stored at the end of a message, or by the housekeeping."""
        if not self.keeps_state or self.options.save != "interval":
            return self.keeps_state and self.options.save == "message"
        return self.changed and now - self.saved_at >= self.options.save_interval

    def counts(self, call_id: str) -> bool:
        """Whether the state contains the effect of another copy of this call."""
        return call_id in self.counted or (self.record is not None and call_id in self.record.superseded)

    def save_begins(self) -> None:
        """The state is about to be stored. A message that is handled from now on changes it again."""
        self.changed = False

    def save_failed(self) -> None:
        """The state was not stored, and must be stored later if the instance is still live."""
        self.changed = self.agent is not None

    def saved(self, record: Record, now: float, applied: Mapping[str, int] = NOTHING_HANDLED) -> None:
        """The state was stored, in this record, with these of the events that were handled since the last save."""
        self.record, self.saved_at = record, now
        if applied:
            left = {stream: last for stream, last in self.applied.items() if last > applied.get(stream, 0)}
            self.applied = left or NOTHING_HANDLED
        self.counted = tuple(call for call in self.counted if call not in record.superseded)

    def remove_instance(self) -> Agent | None:
        """Take the instance out, so that it gets no more messages. Returns it; None if there is none."""
        self.agent, self.changed, self.counted, self.applied = None, False, (), NOTHING_HANDLED
        self.to_delete = False
        return self.hosted.live.pop(self.key, None)

    # -- release -------------------------------------------------------------------------------------------------

    def release_begins(self) -> None:
        """The agent is being released. Messages that have arrived, and those of their chains, are still handled."""
        self.releasing = True

    def close_begins(self) -> None:
        """The release handles no more messages."""
        self.closing = True

    def release_ends(self) -> None:
        """The agent was released, or could not be."""
        self.releasing = self.closing = False

    async def wait_for_change(self) -> None:
        """Return when `users` changes, or `wake_release` is called."""
        self.use_changed = asyncio.get_running_loop().create_future()
        try:
            await self.use_changed
        finally:
            self.use_changed = None

    def wake_release(self) -> None:
        """Let a release that waits check again whether the agent is used."""
        if self.use_changed is not None and not self.use_changed.done():
            self.use_changed.set_result(None)

    # -- locks ---------------------------------------------------------------------------------------------------
    #
    # They are made when they are first used: of 100,000 agents few ever need one.

    @property
    def moving(self) -> asyncio.Lock:
        """Locked from the beginning to the end of a claim or a release."""
        if self._moving is None:
            self._moving = asyncio.Lock()
        return self._moving

    @property
    def is_moving(self) -> bool:
        return self._moving is not None and self._moving.locked()

    @property
    def saving(self) -> asyncio.Lock:
        """Locked while this worker, as the owner, loads or stores the state or verifies the record."""
        if self._saving is None:
            self._saving = asyncio.Lock()
        return self._saving

    @property
    def is_saving(self) -> bool:
        return self._saving is not None and self._saving.locked()

    @property
    def applying(self) -> asyncio.Lock:
        """Locked while a handler handles an event of a stream."""
        if self._applying is None:
            self._applying = asyncio.Lock()
        return self._applying

    @property
    def is_applying(self) -> bool:
        return self._applying is not None and self._applying.locked()


class AgentSlots:
    """The slots of one worker, by type and key."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._slots: dict[str, dict[str, AgentSlot]] = {}
        self.draining = False
        """Whether this worker stops: it claims no more agents, and is about to release those that it owns."""

    def __iter__(self) -> Iterator[AgentSlot]:
        return iter([slot for of_type in self._slots.values() for slot in of_type.values()])

    def find(self, agent_type: str, key: str) -> AgentSlot | None:
        return self._slots.get(agent_type, {}).get(key)

    def of(self, agent_type: str) -> Sequence[AgentSlot]:
        """The slots of one type."""
        return list(self._slots.get(agent_type, {}).values())

    def get(self, hosted: HostedType, key: str) -> AgentSlot:
        """The slot of an agent, made if there is none. `forget_unused` must follow."""
        try:
            return self._slots[hosted.agent_type][key]
        except KeyError:
            slot = AgentSlot(hosted, key)
            self._slots.setdefault(hosted.agent_type, {})[key] = slot
            return slot

    def forget_unused(self, slot: AgentSlot) -> None:
        """Drop a slot whose agent this worker does not own, and has no messages or questions for."""
        if slot.record is None and not (slot.users or slot.open_questions or slot.releasing or slot.is_moving):
            of_type = self._slots.get(slot.hosted.agent_type, {})
            if of_type.get(slot.key) is slot:
                del of_type[slot.key]

    def must_leave(self, slot: AgentSlot) -> bool:
        """Whether an agent cannot stay on this worker: it stops, or does not host the type any more."""
        return self.draining or self._catalog.find(slot.hosted.agent_type) is not slot.hosted

    def clear(self) -> None:
        self._slots.clear()


def can_move(slot: AgentSlot, now: float) -> bool:
    """Whether the agent is owned here, has no messages, and no sender may still assume that it is here."""
    return slot.record is not None and not slot.users and now - slot.used_at > 2 * lease(slot.options)


def lease(options: KeyedOptions) -> float:
    """Seconds after a message for which its sender may assume that the owner is still the same.

    An agent that is released for being idle was idle for longer than that.
    """
    return _LEASE if options.idle_timeout is None else min(_LEASE, options.idle_timeout / 2)


def housekeeping_interval(options: KeyedOptions) -> float:
    """Seconds between two rounds of housekeeping for a type: a quarter of its shortest timeout, within bounds."""
    due = [options.idle_timeout or _LEASE * 2]
    if options.save == "interval":
        due.append(options.save_interval)
    return min(LONGEST_INTERVAL, max(_SHORTEST_INTERVAL, min(due) / 4))


def keeps_state(agent: Agent) -> bool:
    """Whether the agent's class implements ``save_state``: AutoGen's base class only warns that it does not."""
    return getattr(type(agent), "save_state", None) is not BaseAgent.save_state
