"""The sending side: interventions, encoding and order.

Rules:

1. What one runtime sends leaves in the order in which it was sent, over calls and events. Without interventions and
   while connected nothing waits between ``send_message`` and the client's buffer. Otherwise senders stand in one line,
   and nobody overtakes it.
2. Interventions run in that line. What a handler of theirs sends itself bypasses it, or it would wait for itself; and
   from then on the message that it intervenes in no longer keeps its place.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import orjson
from autogen_core import AgentId, CancellationToken, MessageContext, TopicId
from autogen_core.exceptions import MessageDroppedException
from autogen_core.logging import DeliveryStage, MessageKind
from nats.aio.msg import Msg
from nats.nuid import NUID
from opentelemetry.trace import SpanKind

from natsrt.errors import CallTimeout, CannotDecode, NatsrtError, NoLiveWorker, WorkerLost
from natsrt.hosting.interventions import Interventions
from natsrt.hosting.locating import Locating, Place
from natsrt.hosting.mailbox import chain
from natsrt.hosting.owning import Location
from natsrt.hosting.replies import Replies
from natsrt.jetstream.registry import Registry
from natsrt.observe import events
from natsrt.observe.telemetry import Telemetry
from natsrt.options import Options
from natsrt.transport.calls import Calls
from natsrt.transport.cancellation import Cancellations
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import KEY_HEADER, TYPE_HEADER, attribute, quote
from natsrt.wire.serialization import Encoded, Serialization
from natsrt.wire.subjects import Subjects, encode_text, is_hashed

logger = logging.getLogger("natsrt.hosting")

_PLAIN_HEADERS = (KEY_HEADER, TYPE_HEADER)
_DELIVERIES = 5
"""How often an event is sent to a keyed agent whose owner turns out not to listen."""


class _Turn:
    """A sender's turn in the line. ``intervening`` while an intervention runs in it."""

    __slots__ = ("_leave", "intervening")

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave
        self.intervening = False

    def leave(self) -> None:
        """End the turn early. Doing so twice is harmless."""
        self._leave()


_intervening: ContextVar[_Turn | None] = ContextVar("natsrt_intervening", default=None)
"""The turn whose intervention the present code runs in."""


class _Line:
    """The one line of senders: first come, first served. Whoever gives up leaves it at once."""

    def __init__(self) -> None:
        self._places: OrderedDict[asyncio.Future[None], None] = OrderedDict()  # the first one has the turn

    @property
    def length(self) -> int:
        return len(self._places)

    @asynccontextmanager
    async def turn(self, link: Callable[[asyncio.Future[None]], None]) -> AsyncIterator[_Turn]:
        """Wait for the turn; it ends at the latest with the block.

        ``link`` is given the future that is waited for, to cancel it. What an intervention sends itself does not stand
        in the line, and ends the turn that it runs in: whoever has to answer it may have to send, too.
        """
        outer = _intervening.get()
        if outer is not None and outer.intervening:
            outer.leave()
            yield _Turn(_nothing)
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._places[place] = None
        self._call_next()
        link(place)
        try:
            await place
            yield _Turn(lambda: self._leave(place))
        finally:
            self._leave(place)

    def _leave(self, place: asyncio.Future[None]) -> None:
        if place in self._places:
            del self._places[place]
            self._call_next()

    def _call_next(self) -> None:
        first = next(iter(self._places), None)
        if first is not None and not first.done():
            first.set_result(None)


def _nothing() -> None:
    """Ends no turn."""


class Sending:
    """What ``send_message`` and ``publish_message`` do."""

    def __init__(
        self,
        *,
        connection: Connection,
        subjects: Subjects,
        options: Options,
        calls: Calls,
        serialization: Serialization,
        cancellations: Cancellations,
        interventions: Interventions,
        replies: Replies,
        registry: Registry,
        ready: Callable[[float], Awaitable[None]],
        is_ready: Callable[[], bool],
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._options = options
        self._calls = calls
        self._serialization = serialization
        self._cancellations = cancellations
        self._interventions = interventions
        self._replies = replies
        self._registry = registry
        self._locating = Locating(subjects, is_keyed=registry.is_keyed, stays=registry.stays, ask=self.locate)
        self._deliveries: set[asyncio.Task[None]] = set()
        self._ready = ready
        self._is_ready = is_ready
        self._line = _Line()
        self._id_prefix = NUID().next().decode()
        self._type_attributes: dict[str, str] = {}
        self.telemetry: Telemetry | None = None
        self.sent = 0
        """Messages sent since the runtime was started."""
        self.undelivered = 0
        """Events for keyed agents that no worker could be found for."""
        self.under_way = 0
        """Sends that have not come to their end: calls not answered, events not published."""

    # -- calls ---------------------------------------------------------------------------------------------------

    async def send(
        self,
        message: Any,
        recipient: AgentId,
        *,
        sender: AgentId | None,
        token: CancellationToken | None,
        message_id: str | None,
        reply_type: type[Any] | None = None,
    ) -> Any:
        """A call, from the message to the handler's answer."""
        self.under_way += 1
        try:
            self.sent += 1
            if message_id is None:
                message_id = self._next_id()
            if token is not None and token.is_cancelled():
                raise asyncio.CancelledError("the cancellation token was cancelled before the send")
            if self._interventions or self._line.length or not self._is_ready():
                return await self._send_in_line(message, recipient, sender, token, message_id, reply_type)
            return await self._call(message, recipient, sender, token, message_id, reply_type)
        finally:
            self.under_way -= 1

    async def _send_in_line(
        self,
        message: Any,
        recipient: AgentId,
        sender: AgentId | None,
        token: CancellationToken | None,
        message_id: str,
        reply_type: type[Any] | None,
    ) -> Any:
        begun = asyncio.get_running_loop().time()
        async with self._line.turn(self._link(token)) as turn:
            await self._wait_ready(token, begun)
            if self._interventions:
                context = MessageContext(
                    sender=sender,
                    topic_id=None,
                    is_rpc=True,
                    cancellation_token=token or CancellationToken(),
                    message_id=message_id,
                )
                message = await self._intervene(turn, self._interventions.on_send(message, context, recipient))
            response = await self._call(message, recipient, sender, token, message_id, reply_type, turn.leave)
        if self._interventions:
            response = await self._interventions.on_response(response, recipient, sender)
        return response

    async def _call(
        self,
        message: Any,
        recipient: AgentId,
        sender: AgentId | None,
        token: CancellationToken | None,
        message_id: str,
        reply_type: type[Any] | None,
        leave: Callable[[], None] | None = None,
    ) -> Any:
        encoded = self._serialization.encode(message)
        attributes = (
            f"{self._head(message_id, sender, encoded, token)},"
            f'"subject":"{encode_text(recipient.key)}","acceptto":"{self._calls.accept_to}"'
        )
        if visits := chain.get():
            attributes += f',"chain":"{" ".join(visits)}"'
        if events.listening():
            events.message(
                encoded.payload, sender=sender, receiver=recipient, kind=MessageKind.DIRECT, stage=DeliveryStage.SEND
            )
        if self.telemetry is None:
            body = envelope.encode(envelope.CALL, attributes, encoded.payload, encoded.content_type)
            reply = await self._exchange(recipient, body, token=token, leave=leave)
            return self._replies.result(reply, type(message), reply_type, recipient)
        with self.telemetry.sending(
            "send",
            self._subjects.agent(recipient.type),
            kind=SpanKind.CLIENT,
            message_type=encoded.type_name,
            message_id=message_id,
            size=len(encoded.payload),
        ) as carrier:
            body = envelope.encode(envelope.CALL, attributes + carrier, encoded.payload, encoded.content_type)
            reply = await self._exchange(recipient, body, token=token, leave=leave)
            return self._replies.result(reply, type(message), reply_type, recipient)

    async def control(self, recipient: AgentId, subject: str, operation: str, data: Any = None) -> Any:
        """Ask the one worker behind a control subject. Returns plain JSON values."""
        try:
            payload = orjson.dumps(data)
        except TypeError as error:
            raise CannotDecode("a state", f"it must be JSON: {error}") from None
        await self._wait_ready(None, asyncio.get_running_loop().time())
        self.sent += 1
        attributes = f"{self._question(recipient)},{attribute('operation', operation)}"
        if visits := chain.get():
            attributes += f',"chain":"{" ".join(visits)}"'
        reply = await self._exchange(recipient, envelope.encode(envelope.CONTROL, attributes, payload), subject=subject)
        return self._replies.answered(reply, recipient).json()

    def _exchange(
        self,
        recipient: AgentId,
        body: bytes,
        *,
        subject: str | None = None,
        token: CancellationToken | None = None,
        leave: Callable[[], None] | None = None,
    ) -> Awaitable[Msg]:
        link = None if token is None else self._link(token)
        place = None if subject is not None else self._locating.place_of(recipient)
        call = self._calls.call(recipient, body, subject=subject, place=place, sent=leave, link=link)
        timeout = self._options.call_timeout
        return call if timeout is None else self._within(timeout, call, recipient)

    async def _within(self, timeout: float, call: Awaitable[Msg], recipient: AgentId) -> Msg:
        try:
            async with asyncio.timeout(timeout) as deadline:
                return await call
        except TimeoutError:
            if not deadline.expired():
                raise
            raise CallTimeout(str(recipient), timeout, "call_timeout") from None

    def _link(self, token: CancellationToken | None) -> Callable[[asyncio.Future[Any]], None]:
        """What makes ``token`` cancel a future."""
        if token is None:
            return lambda future: None
        return lambda future: self._cancellations.link(token, future)

    async def _wait_ready(self, token: CancellationToken | None, begun: float) -> None:
        """Wait for the start and the connection, or until ``token`` is cancelled. The send began at ``begun``."""
        if self._is_ready():
            return
        waiting = asyncio.ensure_future(self._ready(begun))
        self._link(token)(waiting)
        try:
            await waiting
        finally:
            waiting.cancel()

    # -- events --------------------------------------------------------------------------------------------------

    async def publish(
        self,
        message: Any,
        topic: TopicId,
        *,
        sender: AgentId | None,
        token: CancellationToken | None,
        message_id: str | None,
    ) -> None:
        """Publish an event."""
        self.under_way += 1
        try:
            self.sent += 1
            if message_id is None:
                message_id = self._next_id()
            if not self._interventions and not self._line.length and self._is_ready():
                await self._publish(message, topic, sender, token, message_id)
                return
            begun = asyncio.get_running_loop().time()
            async with self._line.turn(self._link(None)) as turn:
                await self._wait_ready(None, begun)
                if self._interventions:
                    context = MessageContext(
                        sender=sender,
                        topic_id=topic,
                        is_rpc=False,
                        cancellation_token=token or CancellationToken(),
                        message_id=message_id,
                    )
                    try:
                        message = await self._intervene(turn, self._interventions.on_publish(message, context))
                    except MessageDroppedException:
                        return
                await self._publish(message, topic, sender, token, message_id)
        finally:
            self.under_way -= 1

    async def _publish(
        self,
        message: Any,
        topic: TopicId,
        sender: AgentId | None,
        token: CancellationToken | None,
        message_id: str,
    ) -> None:
        subject = self._subjects.topic(topic.type, topic.source)
        encoded = self._serialization.encode(message)
        attributes = self._head(message_id, sender, encoded, token)
        hidden = self._hidden(subject, topic) if "=H" in subject else ""
        if events.listening():
            events.message(
                encoded.payload, sender=sender, receiver=topic, kind=MessageKind.PUBLISH, stage=DeliveryStage.SEND
            )
        takers = self._registry.keyed_takers(topic.type)
        if self.telemetry is None:
            if takers:
                hidden += await self._deliver_all(takers, topic, sender, attributes, encoded)
            body = envelope.encode(envelope.EVENT, attributes + hidden, encoded.payload, encoded.content_type)
            await self._connection.publish(subject, body)
            return
        with self.telemetry.sending(
            "publish",
            subject,
            kind=SpanKind.PRODUCER,
            message_type=encoded.type_name,
            message_id=message_id,
            size=len(encoded.payload),
        ) as carrier:
            attributes += carrier
            if takers:
                hidden += await self._deliver_all(takers, topic, sender, attributes, encoded)
            body = envelope.encode(envelope.EVENT, attributes + hidden, encoded.payload, encoded.content_type)
            await self._connection.publish(subject, body)

    @staticmethod
    def _hidden(subject: str, topic: TopicId) -> str:
        """The real values of hashed tokens."""
        tokens = subject.split(".")
        hidden = f",{attribute('topicsource', topic.source)}" if is_hashed(tokens[-1]) else ""
        if any(is_hashed(token) for token in tokens[:-1]):
            hidden += f",{attribute('topictype', topic.type)}"
        return hidden

    # -- keyed agents --------------------------------------------------------------------------------------------

    async def locate(self, agent: AgentId, along: Collection[str] | None = None) -> Location:
        """Ask a worker of the agent's type who owns the agent. ``along`` is the chain that asks; None: the present one.

        Raises what a call of the agent would raise.
        """
        visits = chain.get() if along is None else along
        attributes = self._question(agent) + (f',"chain":"{" ".join(visits)}"' if visits else "")
        body = envelope.encode(envelope.LOCATE, attributes, b"null")
        reply = await self._calls.call(agent, body, subject=self._subjects.agent(agent.type))
        data = self._replies.answered(reply, agent).json()
        try:
            return Location(str(data["worker_id"]), float(data["lease"]))
        except (TypeError, KeyError, ValueError):
            raise CannotDecode(f"where {agent} lives", "the answer does not say it", reply.data) from None

    async def pass_call_on(self, agent: AgentId, message: Msg, body: envelope.Envelope | None) -> Msg:
        """Call an agent's owner for a caller that did not know him. ``body`` is None for a plain call."""
        place = self._locating.place_of(agent)
        if body is not None:
            return await self._calls.call(agent, envelope.rewrite(body, acceptto=self._calls.accept_to), place=place)
        headers = {name: value for name, value in (message.headers or {}).items() if name in _PLAIN_HEADERS}
        return await self._calls.call(agent, message.data, place=place, headers=headers or None)

    async def pass_control_on(self, agent: AgentId, owner: str, body: envelope.Envelope) -> Msg:
        """The same with a control message for a worker that owns the agent."""
        subject = self._subjects.control_at(agent.type, owner)
        return await self._calls.call(agent, envelope.rewrite(body, acceptto=self._calls.accept_to), subject=subject)

    async def pass_event_on(self, agent: AgentId, topic: TopicId, body: envelope.Envelope) -> None:
        """Send an event of another publisher to the agent's owner."""
        await self._deliver(agent, envelope.rewrite(body, keyed=None, **_delivered(agent, topic)))

    async def deliver_new(self, agent: AgentId, topic: TopicId, message: Any, message_id: str) -> None:
        """Send an event of a plain publisher to the agent's owner."""
        encoded = self._serialization.encode(message)
        await self._deliver(agent, _delivery(agent, topic, self._head(message_id, None, encoded, None), encoded))

    async def _deliver_all(
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
        place = self._locating.place_of(agent)
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
        self.under_way += 1
        self._deliveries.add(task)
        task.add_done_callback(self._delivered)

    async def _deliver_in_turn(self, place: Place, turn: asyncio.Future[None], body: bytes, tries: int) -> None:
        try:
            await place.wait(turn)
            if not tries:
                raise WorkerLost(str(place.recipient), None, "its owner does not listen, again and again")
            await self._post(place, body, tries)
        except NatsrtError as error:
            self.undelivered += 1
            logger.warning("an event for %s found nobody: %s", place.recipient, error)

    def _delivered(self, task: asyncio.Task[None]) -> None:
        self.under_way -= 1
        self._deliveries.discard(task)

    async def stop(self) -> None:
        """Give up the events that still wait."""
        for task in list(self._deliveries):
            task.cancel()
        await asyncio.gather(*self._deliveries, return_exceptions=True)

    # -- both ----------------------------------------------------------------------------------------------------

    def _head(self, message_id: str, sender: AgentId | None, encoded: Encoded, token: CancellationToken | None) -> str:
        """The attributes that every message has."""
        source = '"/"' if sender is None else quote(f"{sender.type}/{encode_text(sender.key)}")
        type_attribute = self._type_attributes.get(encoded.type_name)
        if type_attribute is None:
            type_attribute = attribute("messagetype", encoded.type_name)
            self._type_attributes[encoded.type_name] = type_attribute
        head = f'"id":{quote(message_id)},"source":{source},{type_attribute}'
        return head if token is None else f'{head},"cancelid":"{self._cancellations.id_of(token)}"'

    def _question(self, agent: AgentId) -> str:
        """The attributes of what natsrt itself asks about an agent."""
        return (
            f"{attribute('id', self._next_id())},{attribute('source', envelope.NO_AGENT)},"
            f'"subject":"{encode_text(agent.key)}","acceptto":"{self._calls.accept_to}"'
        )

    def _next_id(self) -> str:
        return f"{self._id_prefix}-{self.sent:x}"

    async def _intervene(self, turn: _Turn, work: Awaitable[Any]) -> Any:
        turn.intervening = True
        mark = _intervening.set(turn)
        try:
            return await work
        finally:
            turn.intervening = False
            _intervening.reset(mark)


def _delivered(agent: AgentId, topic: TopicId) -> dict[str, str]:
    """What an event that is sent to one keyed agent says beside what it said: the subject no longer names the topic."""
    return {"subject": encode_text(agent.key), "topictype": topic.type, "topicsource": topic.source}


def _delivery(agent: AgentId, topic: TopicId, attributes: str, encoded: Encoded) -> bytes:
    named = "".join(f",{attribute(name, value)}" for name, value in _delivered(agent, topic).items())
    return envelope.encode(envelope.EVENT, attributes + named, encoded.payload, encoded.content_type)
