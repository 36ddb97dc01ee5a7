"""Messages for keyed agents, on their way to the worker that owns them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence

from autogen_core import AgentId, TopicId
from nats.aio.msg import Msg

from natsrt.agents.chain import chain, chain_attribute
from natsrt.agents.inbound import waiting_handler
from natsrt.background import BackgroundTasks
from natsrt.errors import NatsrtError, NoLiveWorker, WorkerLost
from natsrt.jetstream.registry.registry import Registry
from natsrt.observe.metrics import Counters
from natsrt.sending.attributes import MessageAttributes
from natsrt.sending.owner_cache import OwnerCache, Place
from natsrt.sending.replies import Replies
from natsrt.transport.bodies import Bodies
from natsrt.transport.calls import Calls
from natsrt.transport.inbox import Inbox
from natsrt.wire import envelope
from natsrt.wire.envelope import KEY_HEADER, TYPE_HEADER, attribute
from natsrt.wire.peer_messages import Location, read_location
from natsrt.wire.serialization import Encoded
from natsrt.wire.subjects import Subjects, encode_text

logger = logging.getLogger("natsrt.hosting")

_PLAIN_HEADERS = (KEY_HEADER, TYPE_HEADER)
_PATIENCE = (0.5, 1.0, 2.0)
"""Seconds for which a worker may say nothing, before another one is asked. The last one may take longer."""
_DELIVERIES = 5
"""How often an event is sent to a keyed agent whose owner turns out not to listen."""


class KeyedDelivery:
    """Finds owners, sends events to them, and forwards what came to the wrong worker."""

    def __init__(
        self,
        *,
        bodies: Bodies,
        subjects: Subjects,
        calls: Calls,
        inbox: Inbox,
        registry: Registry,
        replies: Replies,
        attributes: MessageAttributes,
        counters: Counters,
    ) -> None:
        self._bodies = bodies
        self._subjects = subjects
        self._calls = calls
        self._replies = replies
        self._inbox = inbox
        self._attributes = attributes
        self._counters = counters
        self._owners = OwnerCache(subjects, registry, self)
        self._deliveries = BackgroundTasks(logger, "delivering an event failed")

    @property
    def under_way(self) -> int:
        """Events that wait until their agent's owner is known."""
        return len(self._deliveries)

    def place_of(self, agent: AgentId) -> Place | None:
        """Where an agent lives; None where its type is not keyed."""
        return self._owners.place_of(agent)

    async def locate(self, agent: AgentId, along: Collection[str] | None = None) -> Location:
        """Ask a worker of the agent's type who owns the agent. ``along`` is the chain that asks; None: the present one.

        Raises what a call of the agent would raise.
        """
        visits = chain.get() if along is None else along
        attributes = self._attributes.question(agent) + chain_attribute(visits)
        body = self._bodies.pack(envelope.LOCATE, attributes, b"null")
        reply = await self._ask(agent, body)
        return read_location(self._replies.answered(reply, agent), agent)

    async def _ask(self, agent: AgentId, question: bytes) -> Msg:
        """Ask a worker of the agent's type, and anew where no answer comes: a question can be asked again."""
        subject = self._subjects.agent(agent.type)
        for patience in _PATIENCE:
            try:
                async with asyncio.timeout(patience) as deadline:
                    return await self._calls.call(agent, question, subject=subject)
            except WorkerLost:
                continue
            except TimeoutError:
                if not deadline.expired():
                    raise
        return await self._calls.call(agent, question, subject=subject)

    async def forward_call(self, agent: AgentId, message: Msg, body: envelope.Envelope | None) -> Msg:
        """Call an agent's owner for a caller that did not know him. ``body`` is None for a plain call."""
        place = self.place_of(agent)
        if body is not None:
            return await self._calls.call(
                agent,
                self._bodies.repack(body, acceptto=self._calls.accept_to),
                place=place,
                awaited_by=waiting_handler(),
            )
        headers = {name: value for name, value in (message.headers or {}).items() if name in _PLAIN_HEADERS}
        return await self._calls.call(
            agent, message.data, place=place, headers=headers or None, awaited_by=waiting_handler()
        )

    async def forward_control(self, agent: AgentId, owner: str, body: envelope.Envelope) -> Msg:
        """The same with a control message for a worker that owns the agent."""
        subject = self._subjects.control_at(agent.type, owner)
        body_on = self._bodies.repack(body, acceptto=self._calls.accept_to)
        return await self._calls.call(agent, body_on, subject=subject, awaited_by=waiting_handler())

    async def forward_event(self, agent: AgentId, topic: TopicId, body: envelope.Envelope) -> None:
        """Send an event of another publisher to the agent's owner."""
        await self._deliver(agent, self._bodies.repack(body, keyed=None, **_delivered(agent, topic)))

    async def deliver(self, agent: AgentId, topic: TopicId, attributes: str, encoded: Encoded) -> None:
        """Send an event with these attributes to the agent's owner."""
        await self._deliver(agent, self._pack_event(agent, topic, attributes, encoded))

    async def deliver_all(
        self, takers: Sequence[str], topic: TopicId, sender: AgentId | None, attributes: str, encoded: Encoded
    ) -> str:
        """Send an event to the keyed agents that it is for. Returns the attribute that says which types have it."""
        agents = [AgentId(agent_type, topic.source) for agent_type in takers]
        for agent in agents:
            if agent != sender:
                await self._deliver(agent, self._pack_event(agent, topic, attributes, encoded))
        return f",{attribute('keyed', ' '.join(takers))}"

    def _pack_event(self, agent: AgentId, topic: TopicId, attributes: str, encoded: Encoded) -> bytes:
        named = "".join(f",{attribute(name, value)}" for name, value in _delivered(agent, topic).items())
        return self._bodies.pack_message(envelope.EVENT, attributes + named, encoded)

    async def _deliver(self, agent: AgentId, body: bytes) -> None:
        """Send an event where ``agent`` lives, or, until that is known, let it stand in line for it."""
        place = self.place_of(agent)
        if place is None:
            raise NoLiveWorker(str(agent), agent.type)
        if place.is_open():
            await self._post(place, body, _DELIVERIES)
        else:
            self._deliver_later(place, body, _DELIVERIES)

    async def _post(self, place: Place, body: bytes, tries: int) -> None:
        def lost() -> None:
            place.lost()
            self._deliver_later(place, body, tries - 1)

        await self._inbox.post(place.subject, body, lost)

    def _deliver_later(self, place: Place, body: bytes, tries: int) -> None:
        self._deliveries.spawn(self._deliver_in_turn(place, place.join(), body, tries))

    async def _deliver_in_turn(self, place: Place, turn: asyncio.Future[None], body: bytes, tries: int) -> None:
        try:
            await place.wait(turn)
            if not tries:
                raise WorkerLost(str(place.recipient), None, "its owner does not listen, again and again")
            await self._post(place, body, tries)
        except asyncio.CancelledError:
            self._count_undelivered(place, "this runtime was stopped")
            raise
        except Exception as error:
            self._count_undelivered(place, str(error) if isinstance(error, NatsrtError) else type(error).__qualname__)

    def _count_undelivered(self, place: Place, reason: str) -> None:
        self._counters.undelivered_events += 1
        logger.warning("an event for %s found nobody: %s", place.recipient, reason)

    async def finish(self, within: float) -> None:
        """Wait until the events that stand in line now have gone, ``within`` seconds at most."""
        await self._deliveries.wait(within)

    async def stop(self) -> None:
        """Give up the events that still wait."""
        await self._deliveries.cancel()


def _delivered(agent: AgentId, topic: TopicId) -> dict[str, str]:
    """What an event that is sent to one keyed agent says beside what it said: the subject no longer names the topic."""
    return {"subject": encode_text(agent.key), "topictype": topic.type, "topicsource": topic.source}
