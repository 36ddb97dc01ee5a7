"""Asks workers for the owner of a keyed agent."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from autogen_core import AgentId
from nats.aio.msg import Msg

from natsrt.agents.chain import chain_attribute, current_chain
from natsrt.errors import WorkerLost
from natsrt.sending.attributes import MessageAttributes
from natsrt.sending.replies import Replies
from natsrt.transport.bodies import Bodies
from natsrt.transport.calls import Calls
from natsrt.wire import envelope
from natsrt.wire.peer_messages import Location, read_location
from natsrt.wire.subjects import Subjects

_ANSWER_WITHIN = (0.5, 1.0, 2.0)
"""Seconds to wait for an answer to the first, second and third question. Each may reach a different worker of the type.
A fourth question waits as long as any other call."""


class OwnerLocator:
    """Sends the questions of one runtime."""

    def __init__(
        self, *, bodies: Bodies, subjects: Subjects, calls: Calls, replies: Replies, attributes: MessageAttributes
    ) -> None:
        self._bodies = bodies
        self._subjects = subjects
        self._calls = calls
        self._replies = replies
        self._attributes = attributes

    async def locate(self, agent: AgentId, handlers: Collection[str] | None = None) -> Location:
        """Ask a worker of the agent's type for the agent's owner. If the agent has no owner, that worker claims it.

        ``handlers`` are the ids of the handlers that wait for the answer; None means those of the current chain. Raises
        the same errors as a call to the agent.
        """
        waiting = current_chain.get() if handlers is None else handlers
        question = self._bodies.pack(
            envelope.LOCATE, self._attributes.question(agent) + chain_attribute(waiting), b"null"
        )
        return read_location(self._replies.answered(await self._ask(agent, question), agent), agent)

    async def _ask(self, agent: AgentId, question: bytes) -> Msg:
        """Send the question, and repeat it while no answer arrives. Repeating it has no side effects."""
        subject = self._subjects.agent(agent.type)
        for within in _ANSWER_WITHIN:
            try:
                async with asyncio.timeout(within) as deadline:
                    return await self._calls.call(agent, question, subject=subject)
            except WorkerLost:
                continue
            except TimeoutError:
                if not deadline.expired():
                    raise
        return await self._calls.call(agent, question, subject=subject)
