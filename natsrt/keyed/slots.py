"""One keyed agent on a worker, and what follows from the options of its type."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from autogen_core import Agent, AgentId, BaseAgent

from natsrt.agents.hosted_type import HostedType
from natsrt.jetstream.agent_records import Record
from natsrt.keyed.mailbox import Mailbox
from natsrt.keyed_types import KeyedOptions
from natsrt.transport.connection import Interest

_LEASE = 10.0


class AgentSubjects(Protocol):
    """Subscribes to the subjects of single agents."""

    async def listen(self, hosted: HostedType, key: str) -> Interest:
        """Take in what is sent to one keyed agent, until the interest is unsubscribed."""


class AgentSlot:
    """A keyed agent that this worker owns, or is finding out about."""

    __slots__ = (
        "_moving",
        "_saving",
        "agent",
        "agent_id",
        "chains",
        "changed",
        "emptied",
        "guests",
        "hosted",
        "interest",
        "keeps_state",
        "key",
        "mailbox",
        "options",
        "owned_since",
        "parting",
        "record",
        "releasing",
        "saved_at",
        "sure",
        "used_at",
        "users",
    )

    def __init__(self, hosted: HostedType, key: str) -> None:
        assert hosted.keyed is not None
        now = asyncio.get_running_loop().time()
        self.hosted = hosted
        self.options = hosted.keyed
        self.key = key
        self.agent_id = AgentId(hosted.agent_type, key)
        self.mailbox = Mailbox()
        self._moving: asyncio.Lock | None = None
        self._saving: asyncio.Lock | None = None
        self.record: Record | None = None
        """The record as this worker wrote it last; None while it does not own the agent."""
        self.interest: Interest | None = None
        self.sure = -1
        """How many reasons to doubt there had been when the record was last known to be as this worker wrote it."""
        self.agent: Agent | None = None
        """The instance, with its state; None while there is none that may get messages."""
        self.keeps_state = False
        """Whether the instance has a state to be stored."""
        self.changed = False
        """Whether messages were handled since the last save."""
        self.saved_at = now
        self.owned_since = now
        self.used_at = now
        self.users = 0
        """Messages that wait or are handled."""
        self.guests = 0
        """Questions for its place that are being answered."""
        self.chains: list[Collection[str]] | None = None
        """The chains of the messages and questions that are here, as far as they have one."""
        self.releasing = False
        self.parting = False
        """Whether the release has come so far that it handles nothing more: what comes waits for its end."""
        self.emptied: asyncio.Future[None] | None = None
        """Done when `users` changes, for who releases."""

    @property
    def moving(self) -> asyncio.Lock:
        """Held from the beginning to the end of a claim or a release. Locks are made when they are first used: of
        100,000 agents few ever need one."""
        if self._moving is None:
            self._moving = asyncio.Lock()
        return self._moving

    @property
    def is_moving(self) -> bool:
        return self._moving is not None and self._moving.locked()

    @property
    def saving(self) -> asyncio.Lock:
        """Held while the record or the instance changes under an owner: loading, storing, looking up."""
        if self._saving is None:
            self._saving = asyncio.Lock()
        return self._saving

    @property
    def is_saving(self) -> bool:
        return self._saving is not None and self._saving.locked()

    def come(self, along: Collection[str]) -> None:
        """A message or a question of the chain ``along`` is here."""
        if along:
            if self.chains is None:
                self.chains = []
            self.chains.append(along)

    def go(self, along: Collection[str]) -> None:
        """It is not here any more."""
        if along and self.chains is not None:
            self.chains.remove(along)

    @property
    def waited_for_by(self) -> set[str]:
        """The visits, of any agent, that wait for what is here."""
        return set().union(*self.chains) if self.chains else set()

    def empty(self) -> None:
        """Let who releases it look again whether anybody uses it."""
        if self.emptied is not None and not self.emptied.done():
            self.emptied.set_result(None)


class AgentSlots:
    """All agents that a worker owns or is finding out about, by type and key."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, AgentSlot]] = {}

    def __iter__(self) -> Iterator[AgentSlot]:
        return iter([held for of_type in self._held.values() for held in of_type.values()])

    def find(self, agent_type: str, key: str) -> AgentSlot | None:
        return self._held.get(agent_type, {}).get(key)

    def of(self, agent_type: str) -> Sequence[AgentSlot]:
        """Those of one type."""
        return list(self._held.get(agent_type, {}).values())

    def hold(self, hosted: HostedType, key: str) -> AgentSlot:
        """The one with this id, made where it is not there yet."""
        of_type = self._held.get(hosted.agent_type)
        if of_type is None:
            of_type = self._held[hosted.agent_type] = {}
        held = of_type.get(key)
        if held is None:
            held = of_type[key] = AgentSlot(hosted, key)
        return held

    def tidy(self, held: AgentSlot) -> None:
        """Forget what this worker neither owns nor is asked for."""
        if held.record is None and not (held.users or held.guests or held.releasing or held.is_moving):
            of_type = self._held.get(held.hosted.agent_type, {})
            if of_type.get(held.key) is held:
                del of_type[held.key]

    def clear(self) -> None:
        self._held.clear()


def is_free(held: AgentSlot, now: float) -> bool:
    """Whether nobody uses the agent, and no sender may take it for granted that it is here."""
    return held.record is not None and not held.users and now - held.used_at > 2 * lease(held.options)


def lease(options: KeyedOptions) -> float:
    """Seconds after a message for which its sender may rely on where it went.

    An agent that is released for being idle was so for longer than that.
    """
    return _LEASE if options.idle_timeout is None else min(_LEASE, options.idle_timeout / 2)


def housekeeping_interval(options: KeyedOptions) -> float:
    """Seconds between two looks at the agents of a type."""
    due = [options.idle_timeout or _LEASE * 2]
    if options.save == "interval":
        due.append(options.save_interval)
    return min(5.0, max(0.05, min(due) / 4))


def keeps_state(agent: Agent) -> bool:
    """Whether the agent's class implements ``save_state``: AutoGen's base class only warns that it does not."""
    return getattr(type(agent), "save_state", None) is not BaseAgent.save_state
