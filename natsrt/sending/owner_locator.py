"""Asks workers for the owner of a keyed agent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from autogen_core import AgentId
from nats.aio.msg import Msg

from natsrt.agents.chain import chain_attribute, current_chain
from natsrt.agents.control import ACTIVATE
from natsrt.errors import WorkerLost
from natsrt.sending.attributes import MessageAttributes
from natsrt.sending.replies import Replies
from natsrt.transport.bodies import Bodies
from natsrt.transport.calls import Calls
from natsrt.transport.peers import Peers
from natsrt.transport.round_trip_time import RoundTripTime
from natsrt.wire import envelope
from natsrt.wire.envelope import attribute
from natsrt.wire.peer_messages import MISSING, Location, read_location
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.calls")

_ANSWER_WITHIN = (0.5, 1.0, 2.0)
"""Seconds to wait for an answer to the first, second and third question, beside the round trip to the server. Each may
reach a different worker of the type. A fourth question waits as long as any other call."""


class OwnerLocator:
    """Sends the questions of one runtime."""

    def __init__(
        self,
        *,
        bodies: Bodies,
        subjects: Subjects,
        calls: Calls,
        replies: Replies,
        attributes: MessageAttributes,
        peers: Peers,
        rtt: RoundTripTime,
    ) -> None:
        self._bodies = bodies
        self._subjects = subjects
        self._calls = calls
        self._replies = replies
        self._attributes = attributes
        self._peers = peers
        self._rtt = rtt

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

    def subject_of(self, agent: AgentId) -> str:
        """The agent's own subject, on which its owner listens."""
        return self._subjects.instance(agent.type, agent.key)

    async def is_listened_for(self, agent: AgentId) -> bool:
        """Whether a worker listens on the agent's own subject, as its owner does."""
        return await self._peers.has_listener(self._subjects.instance(agent.type, agent.key))

    async def ask_holder(self, agent: AgentId, within: float) -> str | None:
        """Ask the worker that listens on the agent's own subject, whose record of the agent is missing.

        That worker stores the record again. Returns its id; None if there is no answer within ``within`` seconds.
        """
        subject = self._subjects.instance(agent.type, agent.key)
        question = self._bodies.pack(envelope.LOCATE, self._attributes.question(agent), MISSING)
        answer = await self._peers.ask(subject, question, within)
        if answer is None:
            return None
        try:
            return read_location(self._replies.answered(answer, agent), agent).worker_id
        except Exception as error:  # the owner cannot tell at the moment, or the subscriber is no worker
            logger.debug("who has %s: %s", agent, error)
            return None

    async def give(self, agent: AgentId, worker_id: str) -> None:
        """Have a worker own an agent that nobody owns. Raises the same errors as a call to the agent."""
        attributes = f"{self._attributes.question(agent)},{attribute('operation', ACTIVATE)}"
        question = self._bodies.pack(envelope.CONTROL, attributes, b"null")
        subject = self._subjects.control_at(agent.type, worker_id)
        self._replies.answered(await self._calls.call(agent, question, subject=subject), agent)

    async def _ask(self, agent: AgentId, question: bytes) -> Msg:
        """Send the question, and repeat it while no answer arrives. Repeating it has no side effects."""
        subject = self._subjects.agent(agent.type)
        for within in _ANSWER_WITHIN:
            try:
                async with asyncio.timeout(within + self._rtt.allowance) as deadline:
                    return await self._calls.call(agent, question, subject=subject)
            except WorkerLost:
                continue
            except TimeoutError:
                if not deadline.expired():
                    raise
        return await self._calls.call(agent, question, subject=subject)
