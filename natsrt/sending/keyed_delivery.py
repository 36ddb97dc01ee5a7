"""Events for keyed agents, and messages that are forwarded to the worker that owns their agent.

An event for a keyed agent is also sent to the agent's own subject, because the topic's subject may reach any worker of
the type. It has no reply, so it counts as delivered unless the server reports that there is no subscriber. In that case
it is sent again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from autogen_core import AgentId, TopicId
from nats.aio.msg import Msg

from natsrt.agents.inbound import awaiting
from natsrt.background import BackgroundTasks
from natsrt.errors import NatsrtError, NoLiveWorker, WorkerLost
from natsrt.observe.metrics import Counters
from natsrt.sending.attributes import milliseconds
from natsrt.sending.owner_cache import CachedOwner, OwnerCache
from natsrt.transport.bodies import Bodies
from natsrt.transport.calls import Calls
from natsrt.transport.inbox import Inbox
from natsrt.wire import envelope
from natsrt.wire.envelope import KEY_HEADER, TYPE_HEADER, attribute
from natsrt.wire.exception_parts import class_name
from natsrt.wire.serialization import Encoded
from natsrt.wire.subjects import Subjects, encode_text

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_PLAIN_HEADERS = (KEY_HEADER, TYPE_HEADER)
"""The headers of a plain call that are forwarded with it."""
_DELIVERIES = 5
"""How often an event is sent to a keyed agent before it is given up, if the agent's subject has no subscriber."""


class KeyedDelivery:
    """Sends the events of one runtime to keyed agents, and forwards messages that did not reach the owner."""

    def __init__(
        self,
        *,
        owners: OwnerCache,
        bodies: Bodies,
        subjects: Subjects,
        calls: Calls,
        inbox: Inbox,
        counters: Counters,
    ) -> None:
        self._owners = owners
        self._bodies = bodies
        self._subjects = subjects
        self._calls = calls
        self._inbox = inbox
        self._counters = counters
        self._waiting = BackgroundTasks(logger, "delivering an event failed")
        """One task for each event that waits for its turn."""

    @property
    def under_way(self) -> int:
        """Number of events that wait until their agent's owner is known."""
        return len(self._waiting)

    # -- forwarding ----------------------------------------------------------------------------------------------

    async def forward_call(
        self, agent: AgentId, message: Msg, body: envelope.Envelope | None, timeout: float | None
    ) -> Msg:
        """Send a call to the agent's owner, and return the reply.

        ``body`` is None for a plain call. ``timeout`` is for how many more seconds the caller waits; None if it set no
        deadline.
        """
        owner = self._owners.owner_of(agent)
        if body is not None:
            changes = {"acceptto": self._calls.accept_to}
            if timeout is not None:
                changes["timeout"] = milliseconds(timeout)
            data, headers = self._bodies.repack(body, **changes), None
        else:
            data = message.data
            headers = {name: value for name, value in (message.headers or {}).items() if name in _PLAIN_HEADERS}
        return await self._calls.call(agent, data, destination=owner, headers=headers or None, awaited_by=awaiting())

    async def forward_control(self, agent: AgentId, worker_id: str, body: envelope.Envelope) -> Msg:
        """Send a control message to ``worker_id``, the agent's owner, and return the reply."""
        subject = self._subjects.control_at(agent.type, worker_id)
        data = self._bodies.repack(body, acceptto=self._calls.accept_to)
        return await self._calls.call(agent, data, subject=subject, awaited_by=awaiting())

    async def forward_event(self, agent: AgentId, topic: TopicId, body: envelope.Envelope) -> None:
        """Send an event of another publisher to the agent's owner."""
        await self._deliver(agent, self._bodies.repack(body, keyed=None, **_addressed(agent, topic)))

    # -- events --------------------------------------------------------------------------------------------------

    async def deliver_all(
        self, agent_types: Sequence[str], topic: TopicId, sender: AgentId | None, attributes: str, encoded: Encoded
    ) -> str:
        """Send an event to its agent in each of these keyed types, except to ``sender``.

        Returns the envelope attribute that lists the types, with a leading comma. The event on the topic's subject
        must contain it, so that workers do not deliver the event to these types again.
        """
        agents = [AgentId(agent_type, topic.source) for agent_type in agent_types]
        for agent in agents:
            if agent != sender:
                await self.deliver(agent, topic, attributes, encoded)
        return f",{attribute('keyed', ' '.join(agent_types))}"

    async def deliver(self, agent: AgentId, topic: TopicId, attributes: str, encoded: Encoded) -> None:
        """Send an event with these envelope attributes to the agent's owner."""
        addressed = "".join(f",{attribute(name, value)}" for name, value in _addressed(agent, topic).items())
        await self._deliver(
            agent, self._bodies.pack(envelope.EVENT, attributes + addressed, encoded.payload, encoded.content_type)
        )

    async def _deliver(self, agent: AgentId, body: bytes) -> None:
        """Send an event to the agent's owner now, or queue it until the owner is known."""
        owner = self._owners.owner_of(agent)
        if owner is None:
            raise NoLiveWorker(str(agent), agent.type)
        if owner.may_send():
            await self._post(owner, body, _DELIVERIES)
        else:
            self._deliver_later(owner, body, _DELIVERIES)

    async def _post(self, owner: CachedOwner, body: bytes, tries: int) -> None:
        """Send an event now. If there is no subscriber, try again, up to ``tries`` times in total."""

        def lost() -> None:
            owner.lost()
            self._deliver_later(owner, body, tries - 1)

        await self._inbox.post(owner.subject, body, lost)

    def _deliver_later(self, owner: CachedOwner, body: bytes, tries: int) -> None:
        """Take a place in the queue now, and send the event from a separate task when its turn comes."""
        self._waiting.spawn(self._deliver_in_turn(owner, owner.join(), body, tries))

    async def _deliver_in_turn(self, owner: CachedOwner, turn: asyncio.Future[None], body: bytes, tries: int) -> None:
        """Wait for the turn, then send the event. Counts and logs the event if that fails."""
        try:
            await owner.wait(turn)
            if not tries:
                raise WorkerLost(str(owner.recipient), None, "its owner repeatedly had no subscription")
            await self._post(owner, body, tries)
        except asyncio.CancelledError:
            self._count_undelivered(owner, "this runtime was stopped")
            raise
        except Exception as error:
            self._count_undelivered(owner, str(error) if isinstance(error, NatsrtError) else class_name(type(error)))

    def _count_undelivered(self, owner: CachedOwner, reason: str) -> None:
        self._counters.undelivered_events += 1
        logger.warning("an event for %s could not be delivered: %s", owner.recipient, reason)

    async def finish(self, within: float) -> None:
        """Wait until all events that are waiting now have been sent, at most ``within`` seconds."""
        await self._waiting.wait(within)

    async def stop(self) -> None:
        """Give up the events that are still waiting. Each is counted and logged as undelivered."""
        await self._waiting.cancel()


def _addressed(agent: AgentId, topic: TopicId) -> dict[str, str]:
    """The additional attributes of an event for one keyed agent, whose subject does not contain the topic."""
    return {"subject": encode_text(agent.key), "topictype": topic.type, "topicsource": topic.source}
