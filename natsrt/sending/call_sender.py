"""Sends the calls and the control messages of one runtime, in their order.

Rules, for calls and for events:

1. The messages of one runtime, both calls and events, are sent in the order in which ``send_message`` and
   ``publish_message`` were called. Without interventions, and while the runtime is ready, a message is put into the
   client's buffer without waiting. Otherwise sends wait in a `SendQueue`, and every later send waits behind them.
2. Interventions run in the turn of their message. A message that an intervention handler itself sends bypasses the
   queue, because it would wait for its own turn. After that, the order of the message whose intervention is running is
   no longer guaranteed.
3. A payload that does not fit into one message is stored first, in the turn of its message, so later messages wait.

Each message passes the same steps: the turn and the interventions if needed (`CallSender.send`, `EventSender.publish`),
encoding (``_call``, ``_event``), and sending (``_answered``, ``_send_event``), inside a span if tracing is on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from autogen_core import AgentId, CancellationToken
from autogen_core.logging import DeliveryStage, MessageKind
from nats.aio.msg import Msg
from opentelemetry.trace import SpanKind

from natsrt.agents.chain import as_call, chain_attribute, current_chain
from natsrt.agents.control import encode_data
from natsrt.agents.inbound import awaiting
from natsrt.agents.interventions import Interventions
from natsrt.arguments import checked_message_id
from natsrt.jetstream.registry.registry import Registry
from natsrt.observe import events
from natsrt.observe.metrics import Counters
from natsrt.observe.telemetry import Telemetry
from natsrt.options import Options
from natsrt.sending.attributes import MessageAttributes
from natsrt.sending.limits import Limit
from natsrt.sending.owner_cache import OwnerCache
from natsrt.sending.ready_bodies import ready_message
from natsrt.sending.referring import Referring
from natsrt.sending.replies import Replies
from natsrt.sending.steps import SendSteps, send_context, traced
from natsrt.transport.bodies import Bodies
from natsrt.transport.calls import Calls
from natsrt.wire import envelope
from natsrt.wire.envelope import Envelope, attribute
from natsrt.wire.serialization import Encoded, Serialization
from natsrt.wire.serializers import JSON
from natsrt.wire.subjects import Subjects


class Call:
    """A call that is about to be sent."""

    __slots__ = ("deadline", "message", "message_id", "more", "on_answer", "recipient", "reply_type", "sender", "token")

    def __init__(
        self,
        message: Any,
        recipient: AgentId,
        sender: AgentId | None,
        token: CancellationToken | None,
        message_id: str | None,
        reply_type: type[Any] | None,
        deadline: float | None = None,
        more: str = "",
        on_answer: Callable[[Envelope | None], None] | None = None,
    ) -> None:
        self.message: Any = message
        self.recipient: AgentId = recipient
        self.sender: AgentId | None = sender
        """None: no agent makes the call."""
        self.token: CancellationToken | None = token
        self.message_id: str | None = message_id
        """None: a new id is used."""
        self.reply_type: type[Any] | None = reply_type
        """The class of the reply; None: the reply names its class."""
        self.deadline: float | None = deadline
        """When the caller stops waiting, by the event loop's clock; None: never."""
        self.more: str = more
        """Further attributes, with a leading comma."""
        self.on_answer: Callable[[Envelope | None], None] | None = on_answer
        """Called with the envelope of the reply, or None for a plain one, before it is read. None: this call has no
        parts, and intervention handlers get its response."""


class CallSender:
    """Sends the calls and control messages of one runtime."""

    def __init__(
        self,
        *,
        steps: SendSteps,
        bodies: Bodies,
        subjects: Subjects,
        options: Options,
        calls: Calls,
        serialization: Serialization,
        interventions: Interventions,
        replies: Replies,
        registry: Registry,
        referring: Referring,
        attributes: MessageAttributes,
        owners: OwnerCache,
        counters: Counters,
        telemetry: Telemetry | None,
    ) -> None:
        self._steps = steps
        self._bodies = bodies
        self._subjects = subjects
        self._limit = Limit(options.call_timeout, "call_timeout")
        self._calls = calls
        self._serialization = serialization
        self._interventions = interventions
        self._replies = replies
        self._registry = registry
        self._referring = referring
        self._attributes = attributes
        self._owners = owners
        self._counters = counters
        self._telemetry = telemetry

    # -- calls ---------------------------------------------------------------------------------------------------

    def send(self, call: Call) -> Awaitable[Any]:
        """Call an agent. Await the result to send the call, and to get what the handler returned.

        Intervention handlers do not get the response of a call with parts: it is only one of the items.
        """
        return as_call(self._send(call))

    async def _send(self, call: Call) -> Any:
        self._steps.under_way += 1
        try:
            self._counters.sent += 1
            if call.message_id is None:
                call.message_id = self._attributes.next_id()
            else:
                checked_message_id(call.message_id)
            if call.token is not None and call.token.is_cancelled():
                raise asyncio.CancelledError("the cancellation token was cancelled before the send")
            if self._steps.are_free:
                return await self._call(call)
            return await self._send_in_turn(call)
        finally:
            self._steps.under_way -= 1

    async def _send_in_turn(self, call: Call) -> Any:
        assert call.message_id is not None
        begun = asyncio.get_running_loop().time()
        async with self._steps.queue.turn(self._steps.link(call.token)) as turn:
            await self._steps.wait_ready(call.token, begun)
            if self._interventions.handlers:
                context = send_context(call.sender, None, call.token, call.message_id)
                on_send = self._interventions.on_send(call.message, context, call.recipient)
                call.message = await turn.intervene(on_send)
            response = await self._call(call, turn.end)
        if self._interventions.handlers and call.on_answer is None:
            response = await self._interventions.on_response(response, call.recipient, call.sender)
        return response

    def _call(self, call: Call, sent: Callable[[], None] | None = None) -> Awaitable[Any]:
        """Encode a call. Await the result to send it, and to get what the handler returned.

        ``sent`` is called when the call is in the client's buffer, or is waiting for its agent's owner.
        """
        message_id = call.message_id
        assert message_id is not None
        encoded = self._serialization.encode(call.message)
        timeout = None if call.deadline is None else call.deadline - asyncio.get_running_loop().time()
        attributes = self._attributes.message(message_id, call.sender, encoded, call.token)
        attributes += self._attributes.call(call.recipient, timeout)
        attributes += call.more
        if chain := current_chain.get():
            attributes += chain_attribute(chain)
        if events.listening():
            events.message(
                encoded.payload,
                sender=call.sender,
                receiver=call.recipient,
                kind=MessageKind.DIRECT,
                stage=DeliveryStage.SEND,
            )
        if self._telemetry is None:
            return self._answered(call, attributes, encoded, sent)
        span = self._telemetry.sending(
            "send",
            self._subjects.agent(call.recipient.type),
            kind=SpanKind.CLIENT,
            message_type=encoded.type_name,
            message_id=message_id,
            size=len(encoded.payload),
        )
        return traced(span, lambda more: self._answered(call, attributes + more, encoded, sent))

    async def _answered(self, call: Call, attributes: str, encoded: Encoded, sent: Callable[[], None] | None) -> Any:
        """Send a call. Returns what the handler returned, or raises the error that the reply reports."""
        exchange = self._exchange_message(call.recipient, attributes, encoded, call.token, sent)
        del encoded  # so that memory does not hold a large payload until the reply arrives
        reply = await exchange
        answer = self._replies.unpack(reply)
        if call.on_answer is not None:
            call.on_answer(answer)
        if answer is not None and answer.reference is not None:
            await self._replies.load(answer, answer.reference)
        return self._replies.result(answer, reply, type(call.message), call.reply_type, call.recipient)

    def _exchange_message(
        self,
        recipient: AgentId,
        attributes: str,
        encoded: Encoded,
        token: CancellationToken | None,
        sent: Callable[[], None] | None,
    ) -> Awaitable[Msg]:
        """Send a call, in one message or by reference, and return the reply. Raises `MessageTooLarge`."""
        if self._is_large(envelope.CALL, attributes, encoded):
            return self._exchange_large(recipient, envelope.CALL, attributes, encoded, token=token, sent=sent)
        body = self._bodies.pack(envelope.CALL, attributes, encoded.payload, encoded.content_type)
        return self._exchange(recipient, body, token=token, sent=sent)

    def control(self, recipient: AgentId, subject: str, operation: str, data: Any = None) -> Awaitable[Any]:
        """Send a control operation on an agent to ``subject``. Await its result, which is plain JSON values.

        Raises `CannotSerialize` if ``data`` is a state that would arrive as something else.
        """
        control = self._control(recipient, subject, operation, data)
        return as_call(self._limit.within(recipient, control))

    async def _control(self, recipient: AgentId, subject: str, operation: str, data: Any) -> Any:
        payload = encode_data(operation, data)
        await self._steps.wait_ready(None, asyncio.get_running_loop().time())
        self._counters.sent += 1
        chain = chain_attribute(current_chain.get())
        attributes = f"{self._attributes.question(recipient)},{attribute('operation', operation)}{chain}"
        encoded = Encoded("", JSON, payload, None)
        if self._is_large(envelope.CONTROL, attributes, encoded):
            del payload  # so that memory does not hold a large state until the reply arrives
            exchange = self._exchange_large(recipient, envelope.CONTROL, attributes, encoded, subject=subject)
            del encoded
            reply = await exchange
        else:
            body = self._bodies.pack(envelope.CONTROL, attributes, payload)
            reply = await self._exchange(recipient, body, subject=subject)
        answer = self._replies.answered(reply, recipient)
        if answer.reference is not None:
            await self._replies.load(answer, answer.reference)
        return answer.json()

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
            link=None if token is None else self._steps.link(token),
            awaited_by=awaiting(),
        )

    # -- payloads by reference -----------------------------------------------------------------------------------

    def _is_large(self, kind: str, attributes: str, encoded: Encoded) -> bool:
        """True if a payload does not fit into its message."""
        payload = encoded.payload
        return len(payload) > self._bodies.surely_fits and not self._bodies.fits(
            kind, attributes, payload, encoded.content_type
        )

    async def _exchange_large(
        self,
        recipient: AgentId,
        kind: str,
        attributes: str,
        encoded: Encoded,
        *,
        subject: str | None = None,
        token: CancellationToken | None = None,
        sent: Callable[[], None] | None = None,
    ) -> Msg:
        """Send a call or a control message by reference, and return the reply. Sends that begin later wait until it is
        sent. If ``subject`` is None, it is sent to the recipient.
        """
        if (failure := await self._registry.verify(recipient)) is not None:
            raise failure
        self._referring.require_readers(self._registry.workers_of(recipient), len(encoded.payload))
        async with self._steps.turn(sent, token) as end:
            reference, content_type = await self._steps.store(encoded.payload, token), encoded.content_type
            del encoded
            try:
                body = self._bodies.pack_reference(kind, attributes, reference, content_type)
                return await self._exchange(recipient, body, subject=subject, token=token, sent=end)
            finally:  # it was answered, or nobody waits for an answer any more
                self._bodies.discard(reference)

    async def call_large_body(self, body: bytes, recipient: AgentId, type_name: str) -> bytes:
        """Call an agent with a JSON body that does not fit into one message, and return the payload of its reply.

        The payloads of the call and of the reply are sent by reference. ``type_name`` is the type of the message, or
        the full name of its class. Raises as `send`.
        """
        encoded = ready_message(body, type_name)
        self._counters.sent += 1
        attributes = self._attributes.message(self._attributes.next_id(), None, encoded, None)
        attributes += self._attributes.call(recipient)
        reply = await self._exchange_message(recipient, attributes, encoded, None, None)
        answer = self._replies.answered(reply, recipient)
        if answer.reference is not None:
            await self._replies.load(answer, answer.reference)
        return answer.payload
