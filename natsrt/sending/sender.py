"""The sending side: interventions, encoding and order.

Rules:

1. The messages of one runtime, both calls and events, are sent in the order in which ``send_message`` and
   ``publish_message`` were called. Without interventions, and while the runtime is ready, a message is put into the
   client's buffer without waiting. Otherwise sends wait in a `SendQueue`, and every later send waits behind them.
2. Interventions run in the turn of their message. A message that an intervention handler itself sends bypasses the
   queue, because it would wait for its own turn. After that, the order of the message whose intervention is running is
   no longer guaranteed.

Each message passes the same steps: the turn and the interventions if needed (`send`, `publish`), encoding (`_call`,
`_event`), and sending (`_send_call`, `_send_event`), inside a span if tracing is on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from autogen_core import AgentId, CancellationToken, MessageContext, TopicId
from autogen_core.exceptions import MessageDroppedException
from autogen_core.logging import DeliveryStage, MessageKind
from nats.aio.msg import Msg
from opentelemetry.trace import SpanKind

from natsrt.agents.chain import as_call, chain_attribute, current_chain
from natsrt.agents.control import encode_data
from natsrt.agents.inbound import awaiting
from natsrt.agents.interventions import Interventions
from natsrt.jetstream.registry.registry import Registry
from natsrt.jetstream.registry.view import NO_TAKERS
from natsrt.observe import events
from natsrt.observe.metrics import Counters
from natsrt.observe.telemetry import Telemetry
from natsrt.options import Options
from natsrt.sending.attributes import MessageAttributes
from natsrt.sending.keyed_delivery import KeyedDelivery
from natsrt.sending.limits import Limit
from natsrt.sending.missing_instances import MissingInstances
from natsrt.sending.owner_cache import OwnerCache
from natsrt.sending.replies import Replies
from natsrt.sending.send_queue import SendQueue
from natsrt.transport.bodies import Bodies
from natsrt.transport.calls import Calls
from natsrt.transport.cancellation import Cancellations
from natsrt.transport.connection import Connection
from natsrt.transport.readiness import Readiness
from natsrt.wire import envelope
from natsrt.wire.envelope import attribute
from natsrt.wire.serialization import Encoded, Serialization
from natsrt.wire.subjects import Subjects, is_hashed


class Sender:
    """Sends the calls, events and control messages of one runtime."""

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
        owners: OwnerCache,
        delivery: KeyedDelivery,
        missing: MissingInstances,
        counters: Counters,
        telemetry: Telemetry | None,
    ) -> None:
        self._connection = connection
        self._bodies = bodies
        self._subjects = subjects
        self._limit = Limit(options.call_timeout, "call_timeout")
        self._calls = calls
        self._serialization = serialization
        self._cancellations = cancellations
        self._interventions = interventions
        self._replies = replies
        self._registry = registry
        self._readiness = readiness
        self._attributes = attributes
        self._owners = owners
        self._delivery = delivery
        self._missing = missing
        self._counters = counters
        self._telemetry = telemetry
        self._queue = SendQueue()
        self._under_way = 0
        """Number of calls of `send` and `publish` that have not returned."""

    @property
    def under_way(self) -> int:
        """Number of sends that have not completed: calls without a reply, and events not yet published or delivered."""
        return self._under_way + self._delivery.under_way

    # -- calls ---------------------------------------------------------------------------------------------------

    def send(
        self,
        message: Any,
        recipient: AgentId,
        *,
        sender: AgentId | None,
        token: CancellationToken | None,
        message_id: str | None,
        reply_type: type[Any] | None = None,
        deadline: float | None = None,
    ) -> Awaitable[Any]:
        """Call an agent. Await the result to send the call, and to get what the handler returned.

        If ``message_id`` is None, a new id is used. ``reply_type`` is the class of the reply; None means that the reply
        names its class. ``deadline`` is when the caller stops waiting, by the event loop's clock; None: never.
        """
        return as_call(self._send(message, recipient, sender, token, message_id, reply_type, deadline))

    async def _send(
        self,
        message: Any,
        recipient: AgentId,
        sender: AgentId | None,
        token: CancellationToken | None,
        message_id: str | None,
        reply_type: type[Any] | None,
        deadline: float | None,
    ) -> Any:
        self._under_way += 1
        try:
            self._counters.sent += 1
            if message_id is None:
                message_id = self._attributes.next_id()
            if token is not None and token.is_cancelled():
                raise asyncio.CancelledError("the cancellation token was cancelled before the send")
            if self._interventions.handlers or self._queue.waiting or not self._readiness.is_ready:
                return await self._send_in_turn(message, recipient, sender, token, message_id, reply_type, deadline)
            return await self._call(message, recipient, sender, token, message_id, reply_type, deadline)
        finally:
            self._under_way -= 1

    async def _send_in_turn(
        self,
        message: Any,
        recipient: AgentId,
        sender: AgentId | None,
        token: CancellationToken | None,
        message_id: str,
        reply_type: type[Any] | None,
        deadline: float | None,
    ) -> Any:
        begun = asyncio.get_running_loop().time()
        async with self._queue.turn(self._link(token)) as turn:
            await self._wait_ready(token, begun)
            if self._interventions.handlers:
                context = _context(sender, None, token, message_id)
                message = await turn.intervene(self._interventions.on_send(message, context, recipient))
            response = await self._call(message, recipient, sender, token, message_id, reply_type, deadline, turn.end)
        if self._interventions.handlers:
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
        deadline: float | None,
        sent: Callable[[], None] | None = None,
    ) -> Any:
        """Send a call, and return the handler's result.

        ``deadline`` is when the caller stops waiting, by the event loop's clock; None: never. ``sent`` is called when
        the call is in the client's buffer, or is waiting for its agent's owner.
        """
        encoded = self._serialization.encode(message)
        timeout = None if deadline is None else deadline - asyncio.get_running_loop().time()
        attributes = self._attributes.message(message_id, sender, encoded, token)
        attributes += self._attributes.call(recipient, timeout)
        if chain := current_chain.get():
            attributes += chain_attribute(chain)
        if events.listening():
            events.message(
                encoded.payload, sender=sender, receiver=recipient, kind=MessageKind.DIRECT, stage=DeliveryStage.SEND
            )
        if self._telemetry is None:
            body = self._bodies.pack(envelope.CALL, attributes, encoded.payload, encoded.content_type)
            reply = await self._exchange(recipient, body, token=token, sent=sent)
            return self._replies.result(reply, type(message), reply_type, recipient)
        with self._telemetry.sending(
            "send",
            self._subjects.agent(recipient.type),
            kind=SpanKind.CLIENT,
            message_type=encoded.type_name,
            message_id=message_id,
            size=len(encoded.payload),
        ) as trace_context:
            attributes += trace_context
            body = self._bodies.pack(envelope.CALL, attributes, encoded.payload, encoded.content_type)
            reply = await self._exchange(recipient, body, token=token, sent=sent)
            return self._replies.result(reply, type(message), reply_type, recipient)

    def control(self, recipient: AgentId, subject: str, operation: str, data: Any = None) -> Awaitable[Any]:
        """Send a control operation on an agent to ``subject``. Await its result, which is plain JSON values.

        Raises `CannotSerialize` if ``data`` is a state that would arrive as something else.
        """
        control = self._control(recipient, subject, operation, data)
        return as_call(self._limit.within(recipient, control))

    async def _control(self, recipient: AgentId, subject: str, operation: str, data: Any) -> Any:
        payload = encode_data(operation, data)
        await self._wait_ready(None, asyncio.get_running_loop().time())
        self._counters.sent += 1
        chain = chain_attribute(current_chain.get())
        attributes = f"{self._attributes.question(recipient)},{attribute('operation', operation)}{chain}"
        body = self._bodies.pack(envelope.CONTROL, attributes, payload)
        reply = await self._exchange(recipient, body, subject=subject)
        return self._replies.answered(reply, recipient).json()

    def _exchange(
        self,
        recipient: AgentId,
        body: bytes,
        *,
        subject: str | None = None,
        token: CancellationToken | None = None,
        sent: Callable[[], None] | None = None,
    ) -> Awaitable[Msg]:
        """Send ``body`` to ``subject``, and return the reply. If ``subject`` is None, it is sent to the recipient."""
        return self._calls.call(
            recipient,
            body,
            subject=subject,
            destination=self._owners.owner_of(recipient) if subject is None else None,
            sent=sent,
            link=None if token is None else self._link(token),
            awaited_by=awaiting(),
        )

    def _link(self, token: CancellationToken | None) -> Callable[[asyncio.Future[Any]], None] | None:
        """A function that makes ``token`` cancel a future; None if there is no token."""
        return None if token is None else partial(self._cancellations.link, token)

    async def _wait_ready(self, token: CancellationToken | None, begun: float) -> None:
        """Wait until the runtime has started and is connected, or until ``token`` is cancelled.

        ``begun`` is when the send began, in seconds by the event loop's clock.
        """
        if self._readiness.is_ready:
            return
        waiting = asyncio.ensure_future(self._readiness.wait(begun))
        if token is not None:
            self._cancellations.link(token, waiting)
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
        """Publish an event. If ``message_id`` is None, a new id is used."""
        self._under_way += 1
        try:
            self._counters.sent += 1
            if message_id is None:
                message_id = self._attributes.next_id()
            if self._interventions.handlers or self._queue.waiting or not self._readiness.is_ready:
                await self._publish_in_turn(message, topic, sender, token, message_id)
            else:
                await self._event(message, topic, sender, token, message_id)
        finally:
            self._under_way -= 1

    async def _publish_in_turn(
        self,
        message: Any,
        topic: TopicId,
        sender: AgentId | None,
        token: CancellationToken | None,
        message_id: str,
    ) -> None:
        begun = asyncio.get_running_loop().time()
        async with self._queue.turn(None) as turn:
            await self._wait_ready(None, begun)
            if self._interventions.handlers:
                context = _context(sender, topic, token, message_id)
                try:
                    message = await turn.intervene(self._interventions.on_publish(message, context))
                except MessageDroppedException:
                    return
            await self._event(message, topic, sender, token, message_id)

    def _event(
        self,
        message: Any,
        topic: TopicId,
        sender: AgentId | None,
        token: CancellationToken | None,
        message_id: str,
    ) -> Awaitable[None]:
        """Encode an event now. Await the result to send the event."""
        subject = self._subjects.topic(topic.type, topic.source)
        encoded = self._serialization.encode(message)
        attributes = self._attributes.message(message_id, sender, encoded, token)
        if events.listening():
            events.message(
                encoded.payload, sender=sender, receiver=topic, kind=MessageKind.PUBLISH, stage=DeliveryStage.SEND
            )
        if self._telemetry is None:
            return self._send_event(subject, topic, sender, attributes, encoded)
        span = self._telemetry.sending(
            "publish",
            subject,
            kind=SpanKind.PRODUCER,
            message_type=encoded.type_name,
            message_id=message_id,
            size=len(encoded.payload),
        )
        return self._send_traced_event(span, subject, topic, sender, attributes, encoded)

    async def _send_event(
        self, subject: str, topic: TopicId, sender: AgentId | None, attributes: str, encoded: Encoded
    ) -> None:
        """Send an event to the keyed agents that are subscribed to it, then to the subject of its topic."""
        more = _unhashed(subject, topic) if "=H" in subject else ""
        if (takers := self._registry.takers(topic.type)) is not NO_TAKERS:
            if takers.keyed:
                more += await self._delivery.deliver_all(takers.keyed, topic, sender, attributes, encoded)
            if takers.instances:
                self._missing.check(takers.instances, topic, sender)
        body = self._bodies.pack(envelope.EVENT, attributes + more, encoded.payload, encoded.content_type)
        await self._connection.publish(subject, body)

    async def _send_traced_event(
        self,
        span: AbstractContextManager[str],
        subject: str,
        topic: TopicId,
        sender: AgentId | None,
        attributes: str,
        encoded: Encoded,
    ) -> None:
        """Do what `_send_event` does inside ``span``, with the trace context of ``span`` added to the attributes."""
        with span as trace_context:
            await self._send_event(subject, topic, sender, attributes + trace_context, encoded)

    async def publish_to(self, agent: AgentId, message: Any, topic: TopicId, message_id: str) -> None:
        """Send an event to one keyed agent, on behalf of a publisher that is a plain NATS client."""
        encoded = self._serialization.encode(message)
        await self._delivery.deliver(agent, topic, self._attributes.message(message_id, None, encoded, None), encoded)


def _unhashed(subject: str, topic: TopicId) -> str:
    """The attributes with the topic's type and source, if the subject contains only their hashes."""
    tokens = subject.split(".")
    attributes = f",{attribute('topicsource', topic.source)}" if is_hashed(tokens[-1]) else ""
    if any(is_hashed(token) for token in tokens[:-1]):
        attributes += f",{attribute('topictype', topic.type)}"
    return attributes


def _context(
    sender: AgentId | None, topic: TopicId | None, token: CancellationToken | None, message_id: str
) -> MessageContext:
    """Return the context for intervention handlers. ``topic`` is None for a call."""
    return MessageContext(
        sender=sender,
        topic_id=topic,
        is_rpc=topic is None,
        cancellation_token=token or CancellationToken(),
        message_id=message_id,
    )
