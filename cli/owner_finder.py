"""Finding the owners of keyed agents, without changing anything."""

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

_ANSWER_WITHIN = 4.0
"""Seconds that an owner has to answer, beside the round trip to the server: enough for one that is far away, and still
a short wait for a person."""
_MOVED_WITHIN = 10.0
"""Seconds that a claim or a release may take; after that the worker counts as silent."""
_PAUSE = 0.1
"""Seconds between two questions while a claim or a release is under way."""


class Standing(Enum):
    """What is known of the owner of an agent."""

    NOBODY = "nobody"
    """The agent has no owner."""
    HOLDS = "holds"
    """The owner has the agent."""
    GONE = "gone"
    """The registry does not list the owner any more, or the owner answered that it does not have the agent."""
    SILENT = "silent"
    """The registry lists the owner, but it does not answer."""


class Found(NamedTuple):
    """The stored record of an agent (None if there is none), and what is known of its owner."""

    record: Record | None
    standing: Standing

    @property
    def is_free(self) -> bool:
        """True if no worker has the agent or may resume it."""
        return self.standing in (Standing.NOBODY, Standing.GONE)


class OwnerFinder:
    """Finds the owners of keyed agents and sends them requests. ``runtime`` must be started."""

    def __init__(self, runtime: NatsAgentRuntime) -> None:
        self._running = runtime.running
        self._subjects = Subjects(runtime.options.namespace)
        self._peers = self._running.network.peers
        self._silent: set[str] = set()

    async def find(self, agent: AgentId, *, damaged: bool = False) -> Found:
        """The record and its owner. Waits while a worker is claiming or releasing the agent.

        Raises `CannotDecode` for a record that cannot be read, unless ``damaged`` is true.
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
        """The owner's answer about the agent; if it does not answer, whether it is gone or silent."""
        registry = self._running.registry
        if owner not in self._silent and registry.lists(owner):
            claim = await self._peers.claim(registry.peer_subject(owner), agent, (), _ANSWER_WITHIN)
            if claim is not None:
                return claim
            self._silent.add(owner)
        await registry.catch_up()
        return Standing.SILENT if registry.lists(owner) else Standing.GONE

    async def ask(self, agent: AgentId, owner: str, operation: str, data: Any = None) -> Any:
        """Run a control operation on an agent, at its owner. Raises the errors of calls, and those of the agent."""
        return await self._running.outgoing.calls.control(
            agent, self._subjects.control_at(agent.type, owner), operation, data
        )


@dataclass(slots=True)
class Survey:
    """Totals over the records of keyed agents."""

    agents: int = 0
    with_state: int = 0
    state_bytes: int = 0
    owned: dict[str, Counter[str]] = field(default_factory=dict)
    """Number of agents that each worker owns, whether it is live or not, by agent type and worker id."""
    damaged: list[CannotDecode] = field(default_factory=list)
    """The errors of the records that cannot be read."""

    @classmethod
    async def of(cls, records: AgentRecords, agent_type: str | None = None) -> Survey:
        """Read all records, or those of one agent type."""
        survey = cls()
        async for record in records.records(agent_type, damaged=survey.damaged.append):
            survey.agents += 1
            survey.with_state += record.has_state
            survey.state_bytes += record.size
            if record.owner is not None:
                survey.owned.setdefault(record.agent.type, Counter())[record.owner] += 1
        return survey

    def owned_by_others_than(self, workers: Mapping[str, Any]) -> Counter[str]:
        """Number of agents, of any type, owned by each worker that is not in ``workers``."""
        gone: Counter[str] = Counter()
        for owners in self.owned.values():
            gone.update({owner: count for owner, count in owners.items() if owner not in workers})
        return gone


def saved_at(record: Record) -> str | None:
    """When the state was stored, as ISO 8601 in UTC; None if no state is stored."""
    return None if record.saved_at is None else datetime.fromtimestamp(record.saved_at, UTC).isoformat()
