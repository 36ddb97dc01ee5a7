"""The sending side: interventions, encoding and order.

Rules:

1. The messages of one runtime, both calls and events, are sent in the order in which ``send_message`` and
   ``publish_message`` were called. Without interventions, and while the runtime is ready, a message is put into the
   client's buffer without waiting. Otherwise sends wait in a `SendQueue`, and every later send waits behind them.
2. Interventions run in the turn of their message. A message that an intervention handler itself sends bypasses the
   queue, because it would wait for its own turn. After that, the order of the message whose intervention is running is
   no longer guaranteed.
3. A payload that does not fit into one message is stored first, in the turn of its message, so later messages wait.

Each message passes the same steps: the turn and the interventions if needed (`send`, `publish`), encoding (`_call`,
`_event`), and sending (`_send_call`, `_send_event`), inside a span if tracing is on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any

import orjson
from autogen_core import AgentId, CancellationToken, MessageContext, TopicId
from autogen_core.exceptions import MessageDroppedException
from autogen_core.logging import DeliveryStage, MessageKind
from nats.aio.msg import Msg
from opentelemetry.trace import SpanKind

from natsrt.agents.chain import as_call, chain_attribute, current_chain
from natsrt.agents.control import encode_data
from natsrt.agents.inbound import awaiting
from natsrt.agents.interventions import Interventions
from natsrt.errors import CannotSchedule, EventNotStored, MessageTooLarge
from natsrt.jetstream.dead_letter_box import DeadLetterBox
from natsrt.jetstream.durable import DurableStreams
from natsrt.jetstream.payload_uses import PayloadUses
from natsrt.jetstream.registry.registry import Registry, RegistryListener
from natsrt.jetstream.registry.view import NO_TAKERS
from natsrt.jetstream.task_store import TaskStore
from natsrt.observe import events
from natsrt.observe.metrics import Counters
from natsrt.observe.telemetry import Telemetry
from natsrt.options import Options
from natsrt.sending.again import Again
from natsrt.sending.attributes import MessageAttributes, unhashed
from natsrt.sending.durable import DurablePublisher, delayed_headers, event_headers
from natsrt.sending.keyed_delivery import KeyedDelivery
from natsrt.sending.limits import Limit
from natsrt.sending.missing_instances import MissingInstances
from natsrt.sending.owner_cache import OwnerCache
from natsrt.sending.reach import Reach
from natsrt.sending.referring import ADDED_LATER, Referring
from natsrt.sending.reminders import Reminders
from natsrt.sending.replies import Replies
from natsrt.sending.send_queue import SendQueue
from natsrt.sending.tickets import Ticket, Tickets, cancel_id
from natsrt.task_types import TaskId
from natsrt.transport.bodies import Bodies
from natsrt.transport.calls import Calls
from natsrt.transport.cancellation import Cancellations
from natsrt.transport.connection import Connection, headers_size
from natsrt.transport.readiness import Readiness
from natsrt.wire import envelope
from natsrt.wire.envelope import MESSAGE_ID_HEADER, TYPE_HEADER, attribute
from natsrt.wire.references import OfEvent, Reference
from natsrt.wire.schedules import Schedule
from natsrt.wire.serialization import Encoded, Serialization
from natsrt.wire.serializers import BYTES, JSON
from natsrt.wire.subjects import Subjects, encode_text
from natsrt.wire.task_attributes import task_attributes


class Sender(RegistryListener):
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
        streams: DurableStreams,
        dead_letters: DeadLetterBox,
        tasks: TaskStore,
        payload_uses: PayloadUses,
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
        self._publish_timeout = options.publish_timeout
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
        self._reach = Reach(connection, subjects, self._queue)
        self._streams = streams
        self._referring = Referring(connection, registry, options)
        self._durable = DurablePublisher(connection, subjects, options, self._queue, streams)
        self.reminders: Reminders = Reminders(
            subjects=subjects,
            registry=registry,
            serialization=serialization,
            streams=streams,
            publisher=self._durable,
            bodies=bodies,
            referring=self._referring,
            uses=payload_uses,
        )
        self.again: Again = Again(self._durable, subjects, dead_letters, bodies, registry)
        self.tickets: Tickets = Tickets(
            connection=connection,
            subjects=subjects,
            options=options,
            registry=registry,
            store=tasks,
            replies=replies,
            bodies=bodies,
            cancellations=cancellations,
            dead_letters=dead_letters,
            again=self.again,
        )
        registry.add_listener(self)
        self._under_way = 0
        """Number of calls of `send` and `publish` that have not returned."""

    @property
    def under_way(self) -> int:
        """Number of sends that have not completed: calls without a reply, and events not yet published or delivered."""
        return self._under_way + self._delivery.under_way

    async def stop(self) -> None:
        """End the waits for events on durable topics that are not confirmed yet, and for results of tasks. Has no
        effect if stopped."""
        self.tickets.stop()
        await self._durable.stop()

    def durable_changed(self) -> None:
        """Part of `RegistryListener`. A topic may be durable now although events were sent on it before."""
        self._reach.forget()

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
            exchange = self._exchange_message(recipient, attributes, encoded, token, sent)
            del encoded  # so that memory does not hold a large payload until the reply arrives
            answer = self._replies.unpack(reply := await exchange)
            if answer is not None and answer.reference is not None:
                await self._replies.load(answer, answer.reference)
            return self._replies.result(answer, reply, type(message), reply_type, recipient)
        with self._telemetry.sending(
            "send",
            self._subjects.agent(recipient.type),
            kind=SpanKind.CLIENT,
            message_type=encoded.type_name,
            message_id=message_id,
            size=len(encoded.payload),
        ) as trace_context:
            attributes += trace_context
            exchange = self._exchange_message(recipient, attributes, encoded, token, sent)
            del encoded  # so that memory does not hold a large payload until the reply arrives
            answer = self._replies.unpack(reply := await exchange)
            if answer is not None and answer.reference is not None:
                await self._replies.load(answer, answer.reference)
            return self._replies.result(answer, reply, type(message), reply_type, recipient)

    def _exchange_message(
        self,
        recipient: AgentId,
        attributes: str,
        encoded: Encoded,
        token: CancellationToken | None,
        sent: Callable[[], None] | None,
    ) -> Awaitable[Msg]:
        """Send a call, in one message or by reference, and return the reply. Raises `MessageTooLarge`."""
        if len(encoded.payload) > self._bodies.surely_fits and not self._fits(envelope.CALL, attributes, encoded):
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
        await self._wait_ready(None, asyncio.get_running_loop().time())
        self._counters.sent += 1
        chain = chain_attribute(current_chain.get())
        attributes = f"{self._attributes.question(recipient)},{attribute('operation', operation)}{chain}"
        encoded = Encoded("", JSON, payload, None)
        if len(payload) > self._bodies.surely_fits and not self._fits(envelope.CONTROL, attributes, encoded):
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
            link=None if token is None else self._link(token),
            awaited_by=awaiting(),
        )

    # -- payloads by reference -----------------------------------------------------------------------------------

    def _fits(self, kind: str, attributes: str, encoded: Encoded, more: int = 0) -> bool:
        return self._bodies.fits(kind, attributes, encoded.payload, encoded.content_type, more)

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
        async with self._turn(sent, token) as end:
            reference, content_type = await self._store(encoded.payload, token), encoded.content_type
            del encoded
            try:
                body = self._bodies.pack_reference(kind, attributes, reference, content_type)
                return await self._exchange(recipient, body, subject=subject, token=token, sent=end)
            finally:  # it was answered, or nobody waits for an answer any more
                self._bodies.discard(reference)

    @asynccontextmanager
    async def _turn(
        self, sent: Callable[[], None] | None, token: CancellationToken | None
    ) -> AsyncIterator[Callable[[], None]]:
        """Hold the turn of the send queue until the function that is returned is called. ``sent`` is this function if
        the send has the turn already.
        """
        if sent is not None:
            yield sent
            return
        async with self._queue.turn(self._link(token)) as turn:
            yield turn.end

    async def _store(
        self,
        payload: bytes,
        token: CancellationToken | None = None,
        ttl: float | None = None,
        of_event: OfEvent | None = None,
    ) -> Reference:
        """Store a payload, until ``token`` is cancelled. ``ttl`` and ``of_event`` are as in `Bodies.store`."""
        storing = asyncio.ensure_future(self._bodies.store(payload, ttl, of_event))
        if token is not None:
            self._cancellations.link(token, storing)
        try:
            return await storing
        finally:
            storing.cancel()

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
        due: datetime | None = None,
    ) -> None:
        """Publish an event. If ``message_id`` is None, a new id is used. ``due``: when it is published; None: now."""
        self._under_way += 1
        try:
            self._counters.sent += 1
            if message_id is None:
                message_id = self._attributes.next_id()
            if self._interventions.handlers or self._queue.waiting or not self._readiness.is_ready:
                await self._publish_in_turn(message, topic, sender, token, message_id, due)
            else:
                await self._event(message, topic, sender, token, message_id, due)
        finally:
            self._under_way -= 1

    async def _publish_in_turn(
        self,
        message: Any,
        topic: TopicId,
        sender: AgentId | None,
        token: CancellationToken | None,
        message_id: str,
        due: datetime | None,
    ) -> None:
        begun = asyncio.get_running_loop().time()
        stream = self._registry.view.durable_stream(topic.type) if self._readiness.started else None
        try:
            async with self._durable.patience(begun, stream is not None) as waiting, self._queue.turn(None) as turn:
                await self._wait_ready(None, begun)
                waiting.end()
                if self._interventions.handlers:
                    context = _context(sender, topic, token, message_id)
                    try:
                        message = await turn.intervene(self._interventions.on_publish(message, context))
                    except MessageDroppedException:
                        return
                    begun = asyncio.get_running_loop().time()
                await self._event(message, topic, sender, token, message_id, due, turn.end, begun)
        except TimeoutError:
            if stream is None or not waiting.expired:
                raise
            reason = (
                f"it could not be sent within publish_timeout = {self._publish_timeout:g} s: the connection is lost"
            )
            raise EventNotStored(str(topic), stream, reason, may_be_stored=False) from None

    def _event(
        self,
        message: Any,
        topic: TopicId,
        sender: AgentId | None,
        token: CancellationToken | None,
        message_id: str,
        due: datetime | None,
        sent: Callable[[], None] | None = None,
        begun: float | None = None,
    ) -> Awaitable[None]:
        """Encode an event now. Await the result to send the event.

        ``sent`` is called when the event is in the client's buffer, is waiting for its agents' owners, or is under way
        to its stream. None: no function is called. ``begun`` is when its publisher began to wait, by the event loop's
        clock; None: now.
        """
        subject = self._subjects.topic(topic.type, topic.source)
        encoded = self._serialization.encode(message)
        attributes = self._attributes.message(message_id, sender, encoded, token)
        if events.listening():
            events.message(
                encoded.payload, sender=sender, receiver=topic, kind=MessageKind.PUBLISH, stage=DeliveryStage.SEND
            )
        if self._telemetry is None:
            return self._send_event(subject, topic, sender, message_id, attributes, encoded, due, sent, begun)
        span = self._telemetry.sending(
            "publish",
            subject,
            kind=SpanKind.PRODUCER,
            message_type=encoded.type_name,
            message_id=message_id,
            size=len(encoded.payload),
        )
        return _traced(
            span,
            lambda more: self._send_event(
                subject, topic, sender, message_id, attributes + more, encoded, due, sent, begun
            ),
        )

    async def _send_event(
        self,
        subject: str,
        topic: TopicId,
        sender: AgentId | None,
        message_id: str,
        attributes: str,
        encoded: Encoded,
        due: datetime | None,
        sent: Callable[[], None] | None,
        begun: float | None = None,
    ) -> None:
        """Send an event to the keyed agents that are subscribed to it, then to the subject of its topic.

        On a durable topic it is stored by the topic's stream instead; `Reach` never knows such a topic. If too many
        events wait for the owners of their agents, wait until this one is sent to all of its agents.
        """
        more = unhashed(subject, topic) if "=H" in subject else ""
        large = len(encoded.payload) > self._bodies.surely_fits
        if due is not None or large or topic.type not in self._reach.topics:
            stream = self._registry.view.durable_stream(topic.type)
            if due is not None:
                stream = self._keeps_delayed(topic, stream)
            if stream is not None:
                more = attributes + more
                await self._store_event(subject, topic, stream, message_id, more, encoded, due, sent, begun)
                return
        if large and not self._event_fits(attributes + more, topic, encoded):
            await self._send_large_event(subject, topic, sender, message_id, attributes, encoded, sent)
            return
        late: Collection[asyncio.Task[None]] = ()
        told = True
        if topic.type not in self._reach.topics:
            # Nothing is sent for an event that is too large.
            self._bodies.pack(envelope.EVENT, attributes + more, encoded.payload, encoded.content_type)
            told = await self._reach.check(topic, subject, self._registry.takers(topic.type).keyed)
        if (takers := self._registry.takers(topic.type)) is not NO_TAKERS:
            if takers.keyed:
                if not self._reach.includes(takers.keyed):
                    await self._reach.check(topic, subject, takers.keyed)
                listed, late = await self._delivery.deliver_all(takers.keyed, topic, sender, attributes, encoded)
                more += listed
            if takers.instances:
                self._missing.check(takers.instances, topic, sender)
        try:
            body = self._bodies.pack(envelope.EVENT, attributes + more, encoded.payload, encoded.content_type)
            await self._connection.publish(subject, body)
            if not told:
                if sent is not None:
                    sent()
                await self._reach.confirm(topic, subject)
        except BaseException:
            self._delivery.give_up(late)
            raise
        if late:
            if sent is not None:
                sent()
            await self._delivery.wait(late)

    def _event_fits(self, attributes: str, topic: TopicId, encoded: Encoded) -> bool:
        """True if the payload fits into each of the event's messages: one for the topic, one for each keyed type."""
        more = self._delivery.more_bytes(self._registry.takers(topic.type).keyed, topic)
        return self._fits(envelope.EVENT, attributes, encoded, more)

    async def _send_large_event(
        self,
        subject: str,
        topic: TopicId,
        sender: AgentId | None,
        message_id: str,
        attributes: str,
        encoded: Encoded,
        sent: Callable[[], None] | None,
    ) -> None:
        """Send an event by reference. Its payload expires: any number of workers may read it."""
        self._referring.require_readers(self._registry.view.workers, len(encoded.payload))
        async with self._turn(sent, None) as end:
            reference = await self._store(encoded.payload)
            referring = encoded._replace(payload=envelope.NO_DATA)
            attributes = f"{attributes},{reference.attributes}"
            await self._send_event(subject, topic, sender, message_id, attributes, referring, None, end)

    # -- events on durable topics --------------------------------------------------------------------------------

    async def _store_event(
        self,
        subject: str,
        topic: TopicId,
        stream: str,
        message_id: str,
        attributes: str,
        encoded: Encoded,
        due: datetime | None,
        sent: Callable[[], None] | None,
        begun: float | None,
    ) -> None:
        """Have the stream of a durable topic store an event, in one message or by reference."""
        payload, content_type = encoded.payload, encoded.content_type
        if len(payload) > self._bodies.surely_fits:
            headers = event_headers(message_id, subject, stream)
            if due is not None:
                headers |= delayed_headers(subject, due)
            more = headers_size(headers)
            if self._registry.reads_bucket:  # others may not be able to send it by reference
                more += ADDED_LATER + 4 * len(str(topic).encode())
            if not self._fits(envelope.EVENT, attributes, encoded, more):
                self._referring.require_readers(self._registry.view.workers, len(encoded.payload))
                async with self._turn(sent, None) as end:
                    of_event = None if due is not None else self._referring.event_in(stream)
                    ttl = self._referring.kept_for(stream, due)
                    reference = await self._store(payload, ttl=ttl, of_event=of_event)
                    unused = partial(self._bodies.discard, reference)
                    try:
                        body = self._bodies.pack_reference(envelope.EVENT, attributes, reference, content_type)
                    except MessageTooLarge:
                        unused()
                        raise
                    await self._durable.publish(subject, topic, stream, message_id, body, end, due, unused=unused)
                return
        body = self._bodies.pack(envelope.EVENT, attributes, payload, content_type)
        await self._durable.publish(subject, topic, stream, message_id, body, sent, due, begun=begun)

    # -- later ---------------------------------------------------------------------------------------------------

    def _keeps_delayed(self, topic: TopicId, stream: str | None) -> str:
        """The stream of a topic, if it can keep delayed events. Raises `CannotSchedule` and `ServerTooOld` if not."""
        what = f"an event on {topic}"
        if stream is None:
            raise CannotSchedule(
                what,
                f"the topic is not durable, and only a stream keeps events: name {topic.type!r}, or a prefix of it, in "
                "the setting durable of a runtime",
            )
        self._streams.require_version("delayed events")
        if not self._registry.view.durable[stream].topics.schedules:
            raise CannotSchedule(
                what,
                f"the server delays no messages of a stream with discard new, as {stream} has: declare the topic with "
                "discard old, or without max_bytes and max_messages; under a name, it has a stream of its own",
            )
        return stream

    async def publish_body(self, body: bytes, topic: TopicId, due: datetime, type_name: str | None) -> str:
        """Have a plain body published at a later time, as an event with a new message id, which is returned.

        ``type_name`` is the type of the message; None: it is found out by its agents. Raises `CannotSchedule`,
        `ServerTooOld`, ValueError, and as `DurablePublisher.publish`.
        """
        stream = self._keeps_delayed(topic, self._registry.view.durable_stream(topic.type))
        self._counters.sent += 1
        message_id = self._attributes.next_id()
        headers = {MESSAGE_ID_HEADER: message_id} | ({} if type_name is None else {TYPE_HEADER: type_name})
        subject = self._subjects.topic(topic.type, topic.source)
        async with self._queue.turn(None) as turn:
            await self._durable.publish(subject, topic, stream, message_id, body, turn.end, due, headers)
        return message_id

    # -- bodies that are ready ------------------------------------------------------------------------------------

    async def call_large_body(self, body: bytes, recipient: AgentId, type_name: str) -> bytes:
        """Call an agent with a JSON body that does not fit into one message, and return the payload of its reply.

        The payloads of the call and of the reply are sent by reference. ``type_name`` is the type of the message, or
        the full name of its class. Raises as `send`.
        """
        encoded = _ready(body, type_name)
        self._counters.sent += 1
        attributes = self._attributes.message(self._attributes.next_id(), None, encoded, None)
        attributes += self._attributes.call(recipient)
        reply = await self._exchange_message(recipient, attributes, encoded, None, None)
        answer = self._replies.answered(reply, recipient)
        if answer.reference is not None:
            await self._replies.load(answer, answer.reference)
        return answer.payload

    async def publish_large_body(self, body: bytes, topic: TopicId, type_name: str, due: datetime | None) -> str:
        """Publish a JSON body that does not fit into one message, by reference. Returns its message id, a new one.

        ``type_name`` is as in `call_large_body`. ``due`` is when its stream publishes it; None: now. Raises as
        `publish`.
        """
        encoded = _ready(body, type_name)
        subject = self._subjects.topic(topic.type, topic.source)
        self._counters.sent += 1
        message_id = self._attributes.next_id()
        attributes = self._attributes.message(message_id, None, encoded, None)
        await self._send_event(subject, topic, None, message_id, attributes, encoded, due, None)
        return message_id

    async def cancel_delayed(self, message_id: str, topic: TopicId) -> bool:
        """Remove a delayed event. Returns False if it is not there.

        Raises `CannotSchedule`, `ServerTooOld`, and as `DurableStreams.purge`.
        """
        stream = self._keeps_delayed(topic, self._registry.view.durable_stream(topic.type))
        subject = self._subjects.delayed(stream, message_id, self._subjects.topic(topic.type, topic.source))
        return await self._streams.purge(stream, subject) > 0

    # -- tasks ---------------------------------------------------------------------------------------------------

    async def submit(
        self,
        message: Any,
        recipient: AgentId,
        *,
        sender: AgentId | None,
        message_id: str | None,
        due: datetime | None,
        attempts: int | None,
        result_ttl: float,
    ) -> Ticket:
        """Have a call stored, to be handled by its agent. The topics of tasks must be durable.

        ``message_id`` None: a new one. ``due``: when it is handled; None: now. ``attempts``: how often it is tried;
        None: as often as events of the agent's type. ``result_ttl``: seconds for which its result is kept. Raises as
        `publish`.
        """
        self._under_way += 1
        begun = asyncio.get_running_loop().time()
        try:
            self._counters.sent += 1
            task = TaskId.new(recipient) if message_id is None else TaskId.of(recipient, message_id)
            if message_id is not None and await self.tickets.has_result(task):
                return self.tickets.ticket(task, type(message))
            async with self._queue.turn(None) as turn:
                await self._wait_ready(None, begun)
                if self._interventions.handlers:
                    context = _context(sender, None, None, task.message_id)
                    message = await turn.intervene(self._interventions.on_send(message, context, recipient))
                encoded = self._serialization.encode(message)
                await self._store_task(encoded, task, sender, due, attempts, result_ttl, turn.end)
            return self.tickets.ticket(task, type(message))
        finally:
            self._under_way -= 1

    async def submit_body(
        self,
        body: bytes,
        recipient: AgentId,
        type_name: str | None,
        *,
        message_id: str | None,
        due: datetime | None,
        attempts: int | None,
        result_ttl: float,
    ) -> TaskId:
        """Have a call with a body that is ready stored. It may have any size.

        ``type_name`` is the type of the message, or the full name of its class, and the body is JSON then; None: its
        agent finds it out, as for a plain body. The others are as in `submit`, which says what is raised; also
        ValueError if the body is not JSON.
        """
        encoded = _untyped(body) if type_name is None else _ready(_checked_json(body), type_name)
        self._counters.sent += 1
        task = TaskId.new(recipient) if message_id is None else TaskId.of(recipient, message_id)
        if message_id is None or not await self.tickets.has_result(task):
            async with self._queue.turn(None) as turn:
                await self._store_task(encoded, task, None, due, attempts, result_ttl, turn.end)
        return task

    async def _store_task(
        self,
        encoded: Encoded,
        task: TaskId,
        sender: AgentId | None,
        due: datetime | None,
        attempts: int | None,
        result_ttl: float,
        sent: Callable[[], None],
    ) -> None:
        topic = task.topic
        subject = self._subjects.topic(topic.type, topic.source)
        attributes = self._attributes.message(task.message_id, sender, encoded, None)
        attributes += task_attributes(encode_text(task.agent.key), cancel_id(task), result_ttl, attempts)
        if events.listening():
            events.message(
                encoded.payload, sender=sender, receiver=task.agent, kind=MessageKind.DIRECT, stage=DeliveryStage.SEND
            )
        if self._telemetry is None:
            await self._send_event(subject, topic, sender, task.message_id, attributes, encoded, due, sent)
            return
        span = self._telemetry.sending(
            "submit",
            subject,
            kind=SpanKind.PRODUCER,
            message_type=encoded.type_name,
            message_id=task.message_id,
            size=len(encoded.payload),
        )
        with span as more:
            await self._send_event(subject, topic, sender, task.message_id, attributes + more, encoded, due, sent)

    async def remind(self, agent: AgentId, name: str, message: Any, schedule: Schedule) -> None:
        """Set a reminder, in its turn. Raises as `Reminders.set`."""
        begun = asyncio.get_running_loop().time()
        async with self._queue.turn(None) as turn:
            await self._wait_ready(None, begun)
            await self.reminders.set(agent, name, message, schedule, turn.end)

    async def publish_to(self, agent: AgentId, message: Any, topic: TopicId, message_id: str) -> None:
        """Send an event to one keyed agent, on behalf of a publisher that is a plain NATS client."""
        encoded = self._serialization.encode(message)
        await self._delivery.deliver(agent, topic, self._attributes.message(message_id, None, encoded, None), encoded)

    def enveloped(self, message: Any, message_id: str) -> envelope.Envelope:
        """Return the envelope of an event whose publisher is a plain NATS client."""
        encoded = self._serialization.encode(message)
        attributes = self._attributes.message(message_id, None, encoded, None)
        body = envelope.decode(envelope.encode(envelope.EVENT, attributes, encoded.payload, encoded.content_type))
        assert body is not None
        return body


def _ready(body: bytes, type_name: str) -> Encoded:
    """A JSON body as a message of the type ``type_name``, which may also be the full name of a class."""
    return Encoded(type_name.rpartition(".")[2], JSON, body, type_name if "." in type_name else None)


def _checked_json(body: bytes) -> bytes:
    """A body that is JSON, as it is. Raises ValueError if it is not: it would spoil the envelope around it."""
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"the body is not JSON: {error}") from None
    return body


def _untyped(body: bytes) -> Encoded:
    """A body as a message whose type its agent finds out."""
    try:
        return Encoded("", JSON, _checked_json(body), None)
    except ValueError:
        return Encoded("", BYTES, body, None)


async def _traced(span: AbstractContextManager[str], send: Callable[[str], Awaitable[None]]) -> None:
    """Send an event inside ``span``. ``send`` is called with the attributes that contain its trace context."""
    with span as trace_context:
        await send(trace_context)


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
