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
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from autogen_core import AgentId, CancellationToken, MessageContext, TopicId
from autogen_core.exceptions import MessageDroppedException
from autogen_core.logging import DeliveryStage, MessageKind
from nats.aio.msg import Msg
from opentelemetry.trace import SpanKind

from natsrt.agents.chain import chain, chain_attribute
from natsrt.agents.inbound import waiting_handler
from natsrt.agents.interventions import Interventions
from natsrt.errors import CallTimeout, CannotDecode
from natsrt.jetstream.registry.registry import Registry
from natsrt.observe import events
from natsrt.observe.metrics import Counters
from natsrt.observe.telemetry import Telemetry
from natsrt.options import Options
from natsrt.sending.attributes import MessageAttributes
from natsrt.sending.keyed_delivery import KeyedDelivery
from natsrt.sending.replies import Replies
from natsrt.sending.send_queue import SendQueue, Turn, intervening
from natsrt.transport.bodies import Bodies
from natsrt.transport.calls import Calls
from natsrt.transport.cancellation import Cancellations
from natsrt.transport.connection import Connection
from natsrt.transport.readiness import Readiness
from natsrt.wire import envelope
from natsrt.wire.envelope import attribute
from natsrt.wire.serialization import Serialization
from natsrt.wire.subjects import Subjects, is_hashed


class Sender:
    """What ``send_message`` and ``publish_message`` do."""

    def __init__(
        self,
        *,
        connection: Connection,
        bodies: Bodies,
        subjects: Subjects,
        options: Options,
        calls: Calls,
        serialization: Serialization,
        cancellations: Cancellations,
        interventions: Interventions,
        replies: Replies,
        registry: Registry,
        readiness: Readiness,
        attributes: MessageAttributes,
        delivery: KeyedDelivery,
        counters: Counters,
        telemetry: Telemetry | None,
    ) -> None:
        self._connection = connection
        self._bodies = bodies
        self._subjects = subjects
        self._options = options
        self._calls = calls
        self._serialization = serialization
        self._cancellations = cancellations
        self._interventions = interventions
        self._replies = replies
        self._registry = registry
        self._readiness = readiness
        self._attributes = attributes
        self._delivery = delivery
        self._counters = counters
        self._telemetry = telemetry
        self._queue = SendQueue()
        self._under_way = 0

    @property
    def under_way(self) -> int:
        """Sends that have not come to their end: calls not answered, events not published or not delivered."""
        return self._under_way + self._delivery.under_way

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
        self._under_way += 1
        try:
            self._counters.sent += 1
            if message_id is None:
                message_id = self._attributes.next_id()
            if token is not None and token.is_cancelled():
                raise asyncio.CancelledError("the cancellation token was cancelled before the send")
            if self._interventions or self._queue.length or not self._readiness.is_ready:
                return await self._send_in_line(message, recipient, sender, token, message_id, reply_type)
            return await self._call(message, recipient, sender, token, message_id, reply_type)
        finally:
            self._under_way -= 1

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
        async with self._queue.turn(self._link(token)) as turn:
            await self._wait_ready(token, begun)
            if self._interventions:
                context = _context(sender, None, token, message_id)
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
        attributes = self._attributes.message(message_id, sender, encoded, token) + self._attributes.call(recipient)
        if visits := chain.get():
            attributes += chain_attribute(visits)
        if events.listening():
            events.message(
                encoded.payload, sender=sender, receiver=recipient, kind=MessageKind.DIRECT, stage=DeliveryStage.SEND
            )
        if self._telemetry is None:
            body = self._bodies.pack_message(envelope.CALL, attributes, encoded)
            reply = await self._exchange(recipient, body, token=token, leave=leave)
            return self._replies.result(reply, type(message), reply_type, recipient)
        with self._telemetry.sending(
            "send",
            self._subjects.agent(recipient.type),
            kind=SpanKind.CLIENT,
            message_type=encoded.type_name,
            message_id=message_id,
            size=len(encoded.payload),
        ) as carrier:
            body = self._bodies.pack_message(envelope.CALL, attributes + carrier, encoded)
            reply = await self._exchange(recipient, body, token=token, leave=leave)
            return self._replies.result(reply, type(message), reply_type, recipient)

    async def control(self, recipient: AgentId, subject: str, operation: str, data: Any = None) -> Any:
        """Ask the one worker behind a control subject. Returns plain JSON values."""
        try:
            payload = orjson.dumps(data)
        except TypeError as error:
            raise CannotDecode("a state", f"it must be JSON: {error}") from None
        await self._wait_ready(None, asyncio.get_running_loop().time())
        self._counters.sent += 1
        attributes = (
            f"{self._attributes.question(recipient)},{attribute('operation', operation)}{chain_attribute(chain.get())}"
        )
        reply = await self._exchange(
            recipient, self._bodies.pack(envelope.CONTROL, attributes, payload), subject=subject
        )
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
        place = None if subject is not None else self._delivery.place_of(recipient)
        call = self._calls.call(
            recipient, body, subject=subject, place=place, sent=leave, link=link, awaited_by=waiting_handler()
        )
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
        if self._readiness.is_ready:
            return
        waiting = asyncio.ensure_future(self._readiness.wait(begun))
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
        self._under_way += 1
        try:
            self._counters.sent += 1
            if message_id is None:
                message_id = self._attributes.next_id()
            if not self._interventions and not self._queue.length and self._readiness.is_ready:
                await self._publish(message, topic, sender, token, message_id)
                return
            begun = asyncio.get_running_loop().time()
            async with self._queue.turn(self._link(None)) as turn:
                await self._wait_ready(None, begun)
                if self._interventions:
                    context = _context(sender, topic, token, message_id)
                    try:
                        message = await self._intervene(turn, self._interventions.on_publish(message, context))
                    except MessageDroppedException:
                        return
                await self._publish(message, topic, sender, token, message_id)
        finally:
            self._under_way -= 1

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
        attributes = self._attributes.message(message_id, sender, encoded, token)
        hidden = self._hidden(subject, topic) if "=H" in subject else ""
        if events.listening():
            events.message(
                encoded.payload, sender=sender, receiver=topic, kind=MessageKind.PUBLISH, stage=DeliveryStage.SEND
            )
        takers = self._registry.keyed_takers(topic.type)
        if self._telemetry is None:
            if takers:
                hidden += await self._delivery.deliver_all(takers, topic, sender, attributes, encoded)
            body = self._bodies.pack_message(envelope.EVENT, attributes + hidden, encoded)
            await self._connection.publish(subject, body)
            return
        with self._telemetry.sending(
            "publish",
            subject,
            kind=SpanKind.PRODUCER,
            message_type=encoded.type_name,
            message_id=message_id,
            size=len(encoded.payload),
        ) as carrier:
            attributes += carrier
            if takers:
                hidden += await self._delivery.deliver_all(takers, topic, sender, attributes, encoded)
            body = self._bodies.pack_message(envelope.EVENT, attributes + hidden, encoded)
            await self._connection.publish(subject, body)

    @staticmethod
    def _hidden(subject: str, topic: TopicId) -> str:
        """The real values of hashed tokens."""
        tokens = subject.split(".")
        hidden = f",{attribute('topicsource', topic.source)}" if is_hashed(tokens[-1]) else ""
        if any(is_hashed(token) for token in tokens[:-1]):
            hidden += f",{attribute('topictype', topic.type)}"
        return hidden

    async def publish_to(self, agent: AgentId, message: Any, topic: TopicId, message_id: str) -> None:
        """Send the event of a plain publisher to one keyed agent."""
        encoded = self._serialization.encode(message)
        await self._delivery.deliver(agent, topic, self._attributes.message(message_id, None, encoded, None), encoded)

    async def _intervene(self, turn: Turn, work: Awaitable[Any]) -> Any:
        turn.intervening = True
        mark = intervening.set(turn)
        try:
            return await work
        finally:
            turn.intervening = False
            intervening.reset(mark)


def _context(
    sender: AgentId | None, topic: TopicId | None, token: CancellationToken | None, message_id: str
) -> MessageContext:
    """What interventions are given: of a call, or with a ``topic`` of an event."""
    return MessageContext(
        sender=sender,
        topic_id=topic,
        is_rpc=topic is None,
        cancellation_token=token or CancellationToken(),
        message_id=message_id,
    )
