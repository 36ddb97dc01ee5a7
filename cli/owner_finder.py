"""Who owns keyed agents, as commands find it out without changing anything."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any, NamedTuple

from autogen_core import AgentId

from natsrt.errors import CannotDecode
from natsrt.jetstream.agent_records import AgentRecords, Record
from natsrt.runtime import NatsAgentRuntime
from natsrt.wire.peer_messages import Claim
from natsrt.wire.subjects import Subjects

_ANSWER_WITHIN = 2.0
_MOVED_WITHIN = 10.0
"""Seconds that a claim or a release may take, before its worker counts as silent."""
_PAUSE = 0.1


class Standing(Enum):
    """How an agent's owner stands to it."""

    NOBODY = "nobody"
    """There is no owner."""
    HOLDS = "holds"
    GONE = "gone"
    """The registry does not list the owner any more, or it says that it does not have the agent."""
    SILENT = "silent"
    """The registry lists the owner, but it does not answer."""


class Found(NamedTuple):
    """What is stored of an agent, None for nothing, and how its owner stands to it."""

    record: Record | None
    standing: Standing

    @property
    def is_free(self) -> bool:
        """Whether no worker has the agent or may come back to it."""
        return self.standing in (Standing.NOBODY, Standing.GONE)


class OwnerFinder:
    """Finds owners of keyed agents and asks them. ``runtime`` is started."""

    def __init__(self, runtime: NatsAgentRuntime) -> None:
        self._running = runtime.running
        self._subjects = Subjects(runtime.options.namespace)
        self._peers = self._running.network.peers
        self._silent: set[str] = set()

    async def find(self, agent: AgentId, *, damaged: bool = False) -> Found:
        """The record and its owner, once nobody is claiming or releasing the agent.

        Raises `CannotDecode` for a record that cannot be read, unless ``damaged`` allows it.
        """
        until = asyncio.get_running_loop().time() + _MOVED_WITHIN
        while True:
            record = await self._running.records.read(agent, damaged=damaged)
            if record is None or record.owner is None:
                return Found(record, Standing.NOBODY)
            claim = await self._claim(record.owner, agent)
            if isinstance(claim, Standing):
                return Found(record, claim)
            if claim is not Claim.MOVING:
                return Found(record, Standing.HOLDS if claim is Claim.HOLDS else Standing.GONE)
            if asyncio.get_running_loop().time() > until:
                return Found(record, Standing.SILENT)
            await asyncio.sleep(_PAUSE)

    async def _claim(self, owner: str, agent: AgentId) -> Claim | Standing:
        """What the owner says of the agent, or what its silence means."""
        registry = self._running.registry
        if owner not in self._silent and registry.lists(owner):
            claim = await self._peers.claim(owner, agent, (), _ANSWER_WITHIN)
            if claim is not None:
                return claim
            self._silent.add(owner)
        await registry.catch_up()
        return Standing.SILENT if registry.lists(owner) else Standing.GONE

    async def ask(self, agent: AgentId, owner: str, operation: str, data: Any = None) -> Any:
        """A control operation on an agent, at its owner. Raises what calls and the agent raise."""
        return await self._running.sender.control(agent, self._subjects.control_at(agent.type, owner), operation, data)


@dataclass(slots=True)
class Survey:
    """The records of keyed agents in figures."""

    agents: int = 0
    with_state: int = 0
    state_bytes: int = 0
    owned: dict[str, Counter[str]] = field(default_factory=dict)
    """How many agents each worker owns, live or not, by agent type and worker id."""
    damaged: list[CannotDecode] = field(default_factory=list)
    """Why records cannot be read."""

    @classmethod
    async def of(cls, records: AgentRecords, agent_type: str | None = None) -> Survey:
        """Look at all records, or at those of one type."""
        survey = cls()
        async for record in records.records(agent_type, damaged=survey.damaged.append):
            survey.agents += 1
            survey.with_state += record.has_state
            survey.state_bytes += record.size
            if record.owner is not None:
                survey.owned.setdefault(record.agent.type, Counter())[record.owner] += 1
        return survey

    def owned_by_others_than(self, workers: Mapping[str, Any]) -> Counter[str]:
        """How many agents of any type belong to workers that are not among these."""
        gone: Counter[str] = Counter()
        for owners in self.owned.values():
            gone.update({owner: count for owner, count in owners.items() if owner not in workers})
        return gone


def saved_at(record: Record) -> str | None:
    """When the state was stored, in UTC; None where there is none."""
    return None if record.saved_at is None else datetime.fromtimestamp(record.saved_at, UTC).isoformat()
