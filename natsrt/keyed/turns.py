"""Lets the messages of keyed agents have their turns, each with the agent live and owned by this worker.

A turn: wait in the agent's mailbox, have the instance live and owned, run the handler, verify the ownership again,
store what changed, leave the mailbox. So a call is answered only if its agent is still owned here, and its state is
stored, as far as the type's options say so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from autogen_core import Agent
from nats.nuid import NUID

from natsrt.agents.chain import chain as current_chain
from natsrt.agents.hosted_type import HostedType
from natsrt.agents.inbound import Inbound
from natsrt.keyed.deadlocks import Deadlocks
from natsrt.keyed.instances import Instances
from natsrt.keyed.ownership import Ownership
from natsrt.keyed.slots import AgentSlot, AgentSlots

T = TypeVar("T")


class Turns:
    """The turns of the agents of one worker."""

    def __init__(self, slots: AgentSlots, ownership: Ownership, instances: Instances, deadlocks: Deadlocks) -> None:
        self._slots = slots
        self._ownership = ownership
        self._instances = instances
        self._deadlocks = deadlocks
        self._loop = asyncio.get_running_loop()
        self._id_prefix = NUID().next().decode()[-8:]
        self._count = 0

    async def run(
        self,
        hosted: HostedType,
        key: str,
        chain: tuple[str, ...],
        serve: Callable[[], Awaitable[T]],
        *,
        inbound: Inbound | None = None,
        claim: bool = True,
    ) -> T:
        """Run ``serve`` when its turn comes, and store the agent's state after it. Returns what ``serve`` returned.

        Args:
            hosted: The agent's type.
            key: The agent's key.
            chain: The chain of the message.
            serve: Handles the message; the instance is then in ``hosted.live``.
            inbound: The message; None if there is none.
            claim: Whether to claim an agent that is not owned here.

        Raises:
            OwnedElsewhere: Another worker owns the agent.
            NotOwned: The agent is not owned here, and ``claim`` is off.
            Deadlock: The turn would never come.
            StateConflict, StateNotSaved: The agent was taken over meanwhile, or its state could not be stored.
            Exception: What ``serve`` and the agent's own methods raise.
        """
        slot = self._slots.get(hosted, key)
        slot.enter(chain)
        self._count += 1
        handler_id = f"{self._id_prefix}{self._count:x}"
        if inbound is not None:
            inbound.handler_id = handler_id
        try:
            if not slot.mailbox.enter(handler_id, chain):
                await self._deadlocks.wait(slot.mailbox, slot.agent_id, handler_id, inbound)
            try:
                agent = slot.agent
                if agent is None or slot.parting or not self._ownership.is_verified(slot):
                    agent = await self._ownership.activate(slot, chain, claim)
                if slot.options.concurrency == "concurrent":
                    slot.mailbox.step_aside(handler_id)
                mark = current_chain.set((*chain, handler_id))
                try:
                    return await serve()
                finally:
                    current_chain.reset(mark)
                    await self._complete(slot, agent)
            finally:
                slot.mailbox.exit(handler_id)
        finally:
            slot.exit(chain, self._loop.time())
            if slot.record is None:
                self._slots.forget_unused(slot)

    async def _complete(self, slot: AgentSlot, agent: Agent) -> None:
        """After the handler: the agent must still be the one that it was, and what it changed is stored."""
        slot.changed = True
        if not self._ownership.is_verified(slot):
            await self._ownership.verify(slot)
        if slot.agent is not agent:
            raise self._instances.dropped(slot)
        if slot.keeps_state and slot.options.save == "message":
            await self._instances.store(slot)
