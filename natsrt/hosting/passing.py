"""Messages for keyed agents, on their way to the worker that owns them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence

from autogen_core import AgentId, TopicId
from nats.aio.msg import Msg

from natsrt.errors import CannotDecode, NatsrtError, NoLiveWorker, WorkerLost
from natsrt.hosting.deadlocks import handler
from natsrt.hosting.locating import Locating, Place
from natsrt.hosting.mailbox import chain, chain_attribute
from natsrt.hosting.owning import Location
from natsrt.hosting.replies import Replies
from natsrt.jetstream.registry import Registry
from natsrt.transport.calls import Calls
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import KEY_HEADER, TYPE_HEADER, attribute
from natsrt.wire.serialization import Encoded
from natsrt.wire.subjects import Subjects, encode_text

logger = logging.getLogger("natsrt.hosting")

_PLAIN_HEADERS = (KEY_HEADER, TYPE_HEADER)
_PATIENCE = (0.5, 1.0, 2.0)
"""Seconds for which a worker may say nothing, before another one is asked. The last one may take longer."""
_DELIVERIES = 5
"""How often an event is sent to a keyed agent whose owner turns out not to listen."""


class Passing:
    """Finds owners, sends events to them, and passes on what came to the wrong worker.

    ``question(agent)`` writes the attributes of what natsrt itself asks about an agent.
    """

    def __init__(
        self,
        *,
        connection: Connection,
        subjects: Subjects,
        calls: Calls,
        registry: Registry,
        replies: Replies,
        question: Callable[[AgentId], str],
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._calls = calls
        self._replies = replies
        self._question = question
        self._locating = Locating(subjects, is_keyed=registry.is_keyed, stays=registry.stays, ask=self.locate)
        self._deliveries: set[asyncio.Task[None]] = set()
        self.undelivered = 0
        """Events that no worker could be found for."""

    @property
    def under_way(self) -> int:
        """Events that wait until their agent's owner is known."""
        return len(self._deliveries)

    def place_of(self, agent: AgentId) -> Place | None:
        """Where an agent lives; None where its type is not keyed."""
        return self._locating.place_of(agent)

    async def locate(self, agent: AgentId, along: Collection[str] | None = None) -> Location:
        """Ask a worker of the agent's type who owns the agent. ``along`` is the chain that asks; None: the present one.

        Raises what a call of the agent would raise.
        """
        visits = chain.get() if along is None else along
        attributes = self._question(agent) + chain_attribute(visits)
        body = envelope.encode(envelope.LOCATE, attributes, b"null")
        reply = await self._ask(agent, body)
        data = self._replies.answered(reply, agent).json()
        try:
            return Location(str(data["worker_id"]), float(data["lease"]))
        except (TypeError, KeyError, ValueError):
            raise CannotDecode(f"where {agent} lives", "the answer does not say it", reply.data) from None

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

    async def call_on(self, agent: AgentId, message: Msg, body: envelope.Envelope | None) -> Msg:
        """Call an agent's owner for a caller that did not know him. ``body`` is None for a plain call."""
        place = self.place_of(agent)
        if body is not None:
            return await self._calls.call(
                agent, envelope.rewrite(body, acceptto=self._calls.accept_to), place=place, awaited_by=handler()
            )
        headers = {name: value for name, value in (message.headers or {}).items() if name in _PLAIN_HEADERS}
        return await self._calls.call(agent, message.data, place=place, headers=headers or None, awaited_by=handler())

    async def control_on(self, agent: AgentId, owner: str, body: envelope.Envelope) -> Msg:
        """The same with a control message for a worker that owns the agent."""
        subject = self._subjects.control_at(agent.type, owner)
        body_on = envelope.rewrite(body, acceptto=self._calls.accept_to)
        return await self._calls.call(agent, body_on, subject=subject, awaited_by=handler())

    async def event_on(self, agent: AgentId, topic: TopicId, body: envelope.Envelope) -> None:
        """Send an event of another publisher to the agent's owner."""
        await self._deliver(agent, envelope.rewrite(body, keyed=None, **_delivered(agent, topic)))

    async def deliver(self, agent: AgentId, topic: TopicId, attributes: str, encoded: Encoded) -> None:
        """Send an event with these attributes to the agent's owner."""
        await self._deliver(agent, _delivery(agent, topic, attributes, encoded))

    async def deliver_all(
        self, takers: Sequence[str], topic: TopicId, sender: AgentId | None, attributes: str, encoded: Encoded
    ) -> str:
        """Send an event to the keyed agents that it is for. Returns the attribute that says which types have it."""
        agents = [AgentId(agent_type, topic.source) for agent_type in takers]
        for agent in agents:
            if agent != sender:
                await self._deliver(agent, _delivery(agent, topic, attributes, encoded))
        return f",{attribute('keyed', ' '.join(takers))}"

    async def _deliver(self, agent: AgentId, body: bytes) -> None:
        """Send an event where ``agent`` lives, or, until that is known, let it stand in line for it."""
        self._connection.check_size(body)
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

        await self._calls.post(place.subject, body, lost)

    def _deliver_later(self, place: Place, body: bytes, tries: int) -> None:
        task = asyncio.get_running_loop().create_task(self._deliver_in_turn(place, place.join(), body, tries))
        self._deliveries.add(task)
        task.add_done_callback(self._deliveries.discard)

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
        self.undelivered += 1
        logger.warning("an event for %s found nobody: %s", place.recipient, reason)

    async def finish(self, within: float) -> None:
        """Wait until the events that stand in line now have gone, ``within`` seconds at most."""
        if self._deliveries:
            await asyncio.wait(set(self._deliveries), timeout=within)

    async def stop(self) -> None:
        """Give up the events that still wait."""
        for task in list(self._deliveries):
            task.cancel()
        await asyncio.gather(*self._deliveries, return_exceptions=True)


def _delivered(agent: AgentId, topic: TopicId) -> dict[str, str]:
    """What an event that is sent to one keyed agent says beside what it said: the subject no longer names the topic."""
    return {"subject": encode_text(agent.key), "topictype": topic.type, "topicsource": topic.source}


def _delivery(agent: AgentId, topic: TopicId, attributes: str, encoded: Encoded) -> bytes:
    named = "".join(f",{attribute(name, value)}" for name, value in _delivered(agent, topic).items())
    return envelope.encode(envelope.EVENT, attributes + named, encoded.payload, encoded.content_type)
