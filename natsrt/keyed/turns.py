"""Lets the messages of keyed agents have their turns, each with the agent live and owned by this worker.

A turn has these steps: wait in the agent's mailbox, have the instance live and owned, run the handler, verify the
ownership again if there is a reason to, store the state, leave the mailbox. So a call gets a reply only if its agent is
still owned here, and after its state was stored, as far as the type's options say that.

A message whose handlers are *out of turn* (`natsrt.out_of_turn`) skips the mailbox, and nothing is stored after it.

A call whose turn comes at once, for an agent that is live and whose ownership is not in doubt, awaits nothing but its
handler and the save. All other steps are awaited only where they are needed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from autogen_core import Agent
from nats.nuid import NUID

from natsrt.agents.chain import Chain, Handler, current_chain, current_handler
from natsrt.agents.hosted_type import HostedType
from natsrt.agents.inbound import Inbound
from natsrt.keyed.deadlocks import Deadlocks
from natsrt.keyed.instances import Instances
from natsrt.keyed.ownership import Ownership
from natsrt.keyed.slots import AgentSlot, AgentSlots
from natsrt.wire.stored_events import StoredEvent

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
        self._numbers = itertools.count(1)

    async def run(
        self,
        hosted: HostedType,
        key: str,
        chain: Chain,
        serve: Callable[[], Awaitable[T]],
        *,
        inbound: Inbound | None = None,
        claim: bool = True,
        out_of_turn: bool = False,
    ) -> T:
        """Run ``serve`` when its turn comes, and store the agent's state after it. Returns what ``serve`` returned.

        Args:
            hosted: The agent's type.
            key: The agent's key.
            chain: The chain of the message.
            serve: Handles the message. While it runs, the instance is in ``hosted.live``.
            inbound: The message; None for what did not come in as a message.
            claim: Whether to claim an agent that is not owned here.
            out_of_turn: Whether to run ``serve`` at once, beside what the agent does, and to store nothing.

        Raises:
            SentBack: The caller of the message does not wait any more.
            OwnedElsewhere: Another worker owns the agent.
            CannotOwn: The agent cannot be made here, but possibly on another worker.
            NotOwned: The agent is not owned here, and ``claim`` is off.
            Deadlock: The turn would never come.
            StateConflict, StateNotSaved: The agent was taken over meanwhile, or its state could not be stored.
            Exception: What ``serve`` and the agent's own methods raise.
        """
        slot = self._slots.get(hosted, key)
        slot.enter(chain)
        handler = Handler(f"{self._id_prefix}{next(self._numbers):x}", asyncio.current_task(), slot.mailbox)
        if inbound is not None:
            inbound.handler = handler
        try:
            if out_of_turn:
                slot.mailbox.enter_beside(handler)
            elif not slot.mailbox.try_enter(handler, chain):
                await self._deadlocks.wait(slot.mailbox, slot.agent_id, handler, chain, inbound)
            try:
                if inbound is not None:
                    inbound.refuse_unwanted()
                agent = slot.agent
                if agent is None or slot.closing or not self._ownership.is_verified(slot):
                    agent = await self._ownership.activate(slot, chain, claim)
                call = None if inbound is None else inbound.call
                if call is not None and inbound is not None and slot.counts(call.call_id):
                    raise inbound.unwanted()
                if slot.options.concurrency == "concurrent" and not out_of_turn:
                    slot.mailbox.let_others_in(handler)
                event = None if inbound is None else inbound.event
                outer_chain = current_chain.set((*chain, handler.handler_id))
                outer_handler = current_handler.set(handler)
                try:
                    return await (serve() if event is None else self._apply(event, slot, agent, serve))
                finally:
                    current_handler.reset(outer_handler)
                    current_chain.reset(outer_chain)
                    if not out_of_turn:
                        slot.handled(() if call is None else call.supersedes)
                    if not self._ownership.is_verified(slot):
                        await self._ownership.verify(slot)
                    if slot.agent is not agent:
                        raise self._instances.dropped(slot)
                    ends = slot.to_delete and slot.mailbox.is_alone(handler)
                    if not out_of_turn and not ends and self._is_due(slot, event):
                        await self._instances.store(slot)
            finally:
                try:
                    # Another handler may have asked for it, and this one may not have run.
                    if slot.to_delete and slot.mailbox.is_alone(handler):
                        await self._instances.delete(slot)
                finally:
                    slot.mailbox.exit(handler)
        finally:
            slot.exit(chain, self._loop.time())
            if slot.record is None:
                self._slots.forget_unused(slot)

    def _is_due(self, slot: AgentSlot, event: StoredEvent | None) -> bool:
        """Whether to store the agent's state after a message, which is ``event`` if that is one of a stream."""
        if not slot.keeps_state:
            return False
        return slot.options.save == "message" or (event is not None and slot.is_due(self._loop.time()))

    async def _apply(
        self, event: StoredEvent, slot: AgentSlot, agent: Agent, serve: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Handle an event of a stream, unless the agent's state has its effect already. Returns None then.

        One event at a time, also in an agent with concurrent handlers: a second copy waits until it is known whether
        the first one was handled. If the ownership ended meanwhile, the slot may have another instance by now, which
        knows nothing of this event.
        """
        async with slot.applying:
            if slot.has_applied(event):
                return None
            answer = await serve()
            # An event that ends the agent counts when that has been done: if it fails, the event comes again.
            if slot.agent is agent and not slot.to_delete:
                slot.apply(event)
            return answer
