"""Sends the events of one runtime: on core NATS and to keyed agents, or to the stream of a durable topic.

See `natsrt.sending.call_sender` for the order in which events and calls are sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from datetime import datetime
from functools import partial
from typing import Any

from autogen_core import AgentId, CancellationToken, TopicId
from autogen_core.exceptions import MessageDroppedException
from autogen_core.logging import DeliveryStage, MessageKind
from opentelemetry.trace import SpanKind

from natsrt.agents.interventions import Interventions
from natsrt.arguments import checked_message_id
from natsrt.errors import CannotSchedule, EventNotStored, MessageTooLarge
from natsrt.jetstream.durable import DurableStreams
from natsrt.jetstream.registry.registry import Registry, RegistryListener
from natsrt.jetstream.registry.view import NO_TAKERS
from natsrt.observe import events
from natsrt.observe.metrics import Counters
from natsrt.observe.telemetry import Telemetry
from natsrt.options import Options
from natsrt.sending.attributes import MessageAttributes, unhashed
from natsrt.sending.durable import DurablePublisher, delayed_headers, event_headers
from natsrt.sending.keyed_delivery import KeyedDelivery
from natsrt.sending.missing_instances import MissingInstances
from natsrt.sending.reach import Reach
from natsrt.sending.ready_bodies import ready_message
from natsrt.sending.referring import Referring
from natsrt.sending.steps import SendSteps, send_context, traced
from natsrt.transport.bodies import Bodies
from natsrt.transport.connection import Connection
from natsrt.transport.readiness import Readiness
from natsrt.wire import envelope
from natsrt.wire.envelope import MESSAGE_ID_HEADER, TYPE_HEADER
from natsrt.wire.serialization import Encoded, Serialization
from natsrt.wire.subjects import Subjects


class Event:
    """An event that is about to be published."""

    __slots__ = ("due", "message", "message_id", "sender", "token", "topic")

    def __init__(
        self,
        message: Any,
        topic: TopicId,
        sender: AgentId | None,
        token: CancellationToken | None,
        message_id: str | None,
        due: datetime | None,
    ) -> None:
        self.message: Any = message
        self.topic: TopicId = topic
        self.sender: AgentId | None = sender
        """None: no agent publishes it."""
        self.token: CancellationToken | None = token
        self.message_id: str | None = message_id
        """None: a new id is used."""
        self.due: datetime | None = due
        """When it is published; None: now."""


class EventSender(RegistryListener):
    """Sends the events of one runtime."""

    def __init__(
        self,
        *,
        steps: SendSteps,
        connection: Connection,
        bodies: Bodies,
        subjects: Subjects,
        options: Options,
        serialization: Serialization,
        interventions: Interventions,
        registry: Registry,
        streams: DurableStreams,
        publisher: DurablePublisher,
        referring: Referring,
        readiness: Readiness,
        attributes: MessageAttributes,
        delivery: KeyedDelivery,
        missing: MissingInstances,
        counters: Counters,
        telemetry: Telemetry | None,
    ) -> None:
        self._steps = steps
        self._connection = connection
        self._bodies = bodies
        self._subjects = subjects
        self._publish_timeout = options.publish_timeout
        self._serialization = serialization
        self._interventions = interventions
        self._registry = registry
        self._streams = streams
        self._durable = publisher
        self._referring = referring
        self._readiness = readiness
        self._attributes = attributes
        self._delivery = delivery
        self._missing = missing
        self._counters = counters
        self._telemetry = telemetry
        self._reach = Reach(connection, subjects, steps.queue)
        registry.add_listener(self)

    def durable_changed(self) -> None:
        """Part of `RegistryListener`. A topic may be durable now although events were sent on it before."""
        self._reach.forget()

    # -- events --------------------------------------------------------------------------------------------------

    def publish(self, event: Event) -> Awaitable[None]:
        """Publish an event. Await the result at once to send it."""
        self._counters.sent += 1
        if event.message_id is None:
            event.message_id = self._attributes.next_id()
        else:
            checked_message_id(event.message_id)
        send = self._event if self._steps.are_free else self._publish_in_turn
        return self._steps.counted(send(event))

    async def _publish_in_turn(self, event: Event) -> None:
        assert event.message_id is not None
        begun = asyncio.get_running_loop().time()
        stream = self._registry.view.durable_stream(event.topic.type) if self._readiness.started else None
        try:
            async with (
                self._durable.patience(begun, stream is not None) as waiting,
                self._steps.queue.turn(None) as turn,
            ):
                await self._steps.wait_ready(None, begun)
                waiting.end()
                if self._interventions.handlers:
                    context = send_context(event.sender, event.topic, event.token, event.message_id)
                    try:
                        event.message = await turn.intervene(self._interventions.on_publish(event.message, context))
                    except MessageDroppedException:
                        return
                    begun = asyncio.get_running_loop().time()
                await self._event(event, turn.end, begun)
        except TimeoutError:
            if stream is None or not waiting.expired:
                raise
            reason = (
                f"it could not be sent within publish_timeout = {self._publish_timeout:g} s: the connection is lost"
            )
            raise EventNotStored(str(event.topic), stream, reason, may_be_stored=False) from None

    def _event(
        self, event: Event, sent: Callable[[], None] | None = None, begun: float | None = None
    ) -> Awaitable[None]:
        """Encode an event now. Await the result to send the event.

        ``sent`` is called when the event is in the client's buffer, is waiting for its agents' owners, or is under way
        to its stream. None: no function is called. ``begun`` is when its publisher began to wait, by the event loop's
        clock; None: now.
        """
        topic, sender, message_id = event.topic, event.sender, event.message_id
        assert message_id is not None
        subject = self._subjects.topic(topic.type, topic.source)
        encoded = self._serialization.encode(event.message)
        attributes = self._attributes.message(message_id, sender, encoded, event.token)
        if events.listening():
            events.message(
                encoded.payload, sender=sender, receiver=topic, kind=MessageKind.PUBLISH, stage=DeliveryStage.SEND
            )
        return self.send_encoded(
            "publish", subject, topic, sender, message_id, attributes, encoded, event.due, sent, begun
        )

    def send_encoded(
        self,
        operation: str,
        subject: str,
        topic: TopicId,
        sender: AgentId | None,
        message_id: str,
        attributes: str,
        encoded: Encoded,
        due: datetime | None,
        sent: Callable[[], None] | None,
        begun: float | None = None,
    ) -> Awaitable[None]:
        """Send an event that is encoded, in a span for ``operation`` if tracing is on. Await the result at once.

        ``due`` is as in `Event`; the others are as in `_event`.
        """
        if self._telemetry is None:
            return self._send_event(subject, topic, sender, message_id, attributes, encoded, due, sent, begun)
        span = self._telemetry.sending(
            operation,
            subject,
            kind=SpanKind.PRODUCER,
            message_type=encoded.type_name,
            message_id=message_id,
            size=len(encoded.payload),
        )
        return traced(
            span,
            lambda more: self._send_event(
                subject, topic, sender, message_id, attributes + more, encoded, due, sent, begun
            ),
        )

    def _send_event(
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
    ) -> Awaitable[None]:
        """Have the stream of a durable topic store an event, or send it by core NATS. Await the result at once.

        `Reach` never knows a durable topic.
        """
        more = unhashed(subject, topic) if "=H" in subject else ""
        large = len(encoded.payload) > self._bodies.surely_fits
        if due is not None or large or topic.type not in self._reach.topics:
            stream = self._registry.view.durable_stream(topic.type)
            if due is not None:
                stream = self._keeps_delayed(topic, stream)
            if stream is not None:
                return self._store_event(
                    subject, topic, stream, message_id, attributes + more, encoded, due, sent, begun
                )
        if large and not self._event_fits(attributes + more, topic, encoded):
            return self._send_large_event(subject, topic, sender, message_id, attributes, encoded, sent)
        return self._send_core_event(subject, topic, sender, attributes, more, encoded, sent)

    async def _send_core_event(
        self,
        subject: str,
        topic: TopicId,
        sender: AgentId | None,
        attributes: str,
        more: str,
        encoded: Encoded,
        sent: Callable[[], None] | None,
    ) -> None:
        """Send an event to the keyed agents that are subscribed to it, then to the subject of its topic.

        ``more`` are the attributes that only the message for the topic has. If too many events wait for the owners of
        their agents, wait until this one is sent to all of its agents.
        """
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
        return self._bodies.fits(envelope.EVENT, attributes, encoded.payload, encoded.content_type, more)

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
        async with self._steps.turn(sent) as end:
            reference = await self._steps.store(encoded.payload)
            referring = encoded._replace(payload=envelope.NO_DATA)
            attributes = f"{attributes},{reference.attributes}"
            await self._send_event(subject, topic, sender, message_id, attributes, referring, None, end)

    # -- events on durable topics --------------------------------------------------------------------------------

    def _store_event(
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
    ) -> Awaitable[None]:
        """Have the stream of a durable topic store an event, in one message or by reference."""
        if len(encoded.payload) > self._bodies.surely_fits:
            headers = event_headers(message_id, subject, stream)
            if due is not None:
                headers |= delayed_headers(subject, due)
            if not self._referring.stored_whole(attributes, encoded, headers, topic):
                return self._store_large_event(subject, topic, stream, message_id, attributes, encoded, due, sent)
        body = self._bodies.pack(envelope.EVENT, attributes, encoded.payload, encoded.content_type)
        return self._durable.publish(subject, topic, stream, message_id, body, sent, due, begun=begun)

    async def _store_large_event(
        self,
        subject: str,
        topic: TopicId,
        stream: str,
        message_id: str,
        attributes: str,
        encoded: Encoded,
        due: datetime | None,
        sent: Callable[[], None] | None,
    ) -> None:
        """Have a stream store an event by reference. Its payload lives as long as the stream may need it."""
        self._referring.require_readers(self._registry.view.workers, len(encoded.payload))
        async with self._steps.turn(sent) as end:
            of_event = None if due is not None else self._referring.event_in(stream)
            ttl = self._referring.kept_for(stream, due)
            reference = await self._steps.store(encoded.payload, ttl=ttl, of_event=of_event)
            unused = partial(self._bodies.discard, reference)
            try:
                body = self._bodies.pack_reference(envelope.EVENT, attributes, reference, encoded.content_type)
            except MessageTooLarge:
                unused()
                raise
            await self._durable.publish(subject, topic, stream, message_id, body, end, due, unused=unused)

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
        async with self._steps.queue.turn(None) as turn:
            await self._durable.publish(subject, topic, stream, message_id, body, turn.end, due, headers)
        return message_id

    async def publish_large_body(self, body: bytes, topic: TopicId, type_name: str, due: datetime | None) -> str:
        """Publish a JSON body that does not fit into one message, by reference. Returns its message id, a new one.

        ``type_name`` is as in `CallSender.call_large_body`. ``due`` is when its stream publishes it; None: now. Raises
        as `publish`.
        """
        encoded = ready_message(body, type_name)
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

    # -- of plain NATS clients -----------------------------------------------------------------------------------

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
