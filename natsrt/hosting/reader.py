"""Reads inbound messages: determines the agent, topic and sender of a message, and the arguments of its handler.

The NATS subject decides the agent type, the topic and, on the subject of one agent, the key. The body supplies only
what the subject does not contain, and must agree with it. Messages are not changed. All functions raise `CannotDecode`
for a message that cannot be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from autogen_core import AgentId, CancellationToken, MessageContext, Subscription, TopicId, UnknownPayload
from autogen_core.exceptions import MessageDroppedException
from nats.aio.msg import Msg

from natsrt.agents.catalog import Catalog
from natsrt.agents.declarations import Declarations
from natsrt.agents.inbound import CALL, EVENT, LOCATE, Address, EventDropped, Inbound, InboundKind, Route
from natsrt.agents.interventions import Interventions
from natsrt.errors import CannotDecode
from natsrt.options import Options
from natsrt.transport.cancellation import Cancellations
from natsrt.wire import envelope
from natsrt.wire.envelope import KEY_HEADER, TYPE_HEADER, Envelope
from natsrt.wire.known_classes import NamedClasses
from natsrt.wire.message_classes import full_name, type_name_of
from natsrt.wire.serialization import Serialization
from natsrt.wire.subjects import Subjects, decode_token, encode_text

_REMEMBERED = 4096
"""Maximum numbers of parsed topics and of parsed senders that are cached; a few hundred kilobytes each."""
_LONGEST = 1024
"""Maximum length of a cached subject or ``source`` in characters, which limits the size of the caches."""

_T = TypeVar("_T")


@dataclass(slots=True)
class Delivery:
    """The arguments of a handler, with details of the message for logs and spans."""

    message: Any
    context: MessageContext
    payload: bytes
    type_name: str
    attributes: dict[str, Any]
    registered: bool = True
    """False if there is no serializer for the message's type in this runtime."""


class Reader:
    """Reads the messages of one worker."""

    def __init__(
        self,
        *,
        subjects: Subjects,
        catalog: Catalog,
        serialization: Serialization,
        cancellations: Cancellations,
        interventions: Interventions,
        declarations: Declarations,
        options: Options,
    ) -> None:
        self._subjects = subjects
        self._catalog = catalog
        self._serialization = serialization
        self._cancellations = cancellations
        self._interventions = interventions
        self._declarations = declarations
        self._infer_types = options.infer_types
        self._topics: dict[str, TopicId] = {}
        self._senders: dict[str, AgentId] = {}

    # -- the address ---------------------------------------------------------------------------------------------

    def address(self, inbound: Inbound) -> Address:
        """Return the kind, agent and topic of a message whose body has been unpacked."""
        route, message, body = inbound.route, inbound.message, inbound.body
        kind = route.kind if body is None or body.attributes["type"] == route.expects else self._other_kind(route, body)
        if kind is not EVENT:
            return kind, self._key(route, message, body), None
        if route.kind is not EVENT and body is not None:
            return kind, route.key, self._claimed_topic(body)
        topic = self._topic(message, body)
        key = self._match(route, topic)
        if key is not None and body is not None:
            sender = self._sender(body)
            if sender is not None and sender.key == key and sender.type == route.hosted.agent_type:
                key = None  # a publisher does not receive its own event
        return kind, key, topic

    def source(self, inbound: Inbound) -> tuple[str, str]:
        """Return the agent of a message that failed, as text and as an envelope's ``source``.

        The text is the name of the route if the message is an event, or if its key cannot be read; the ``source`` is
        then the one of no agent.
        """
        name = inbound.route.name
        if inbound.kind is EVENT:
            return name, envelope.NO_AGENT
        try:
            key = self._key(inbound.route, inbound.message, inbound.body)
            return f"{inbound.agent_type}/{key}", f"{inbound.agent_type}/{encode_text(key)}"
        except ValueError:  # its key cannot be read, which may be what failed
            return name, envelope.NO_AGENT

    def _other_kind(self, route: Route, body: Envelope) -> InboundKind:
        """Return the kind of a message whose envelope does not have the type that is expected on its subject."""
        found = body.attributes["type"]
        if route.kind is CALL and route.hosted.keyed is not None:
            if found == envelope.EVENT and route.key is not None:
                return EVENT
            if found == envelope.LOCATE:
                return LOCATE
        raise CannotDecode("an envelope", f"expected {route.expects}, not {found!r}")

    def _claimed_topic(self, body: Envelope) -> TopicId:
        """Return the topic of an event that its publisher sent directly to a keyed agent."""
        try:
            return TopicId(body.required("topictype"), body.required("topicsource"))
        except ValueError as error:
            raise CannotDecode("a topic", str(error)) from None

    def _key(self, route: Route, message: Msg, body: Envelope | None) -> str:
        """Return the key of the agent that a call is for.

        If the NATS subject contains the key, a key in the body must agree with it. Otherwise the key is the one in the
        body, or ``default``.
        """
        if body is None:
            key = (message.headers or {}).get(KEY_HEADER)
        else:
            subject = body.attributes.get("subject")
            try:
                key = None if subject is None else decode_token(subject)
            except ValueError as error:
                raise CannotDecode("an envelope", f"its subject is not an encoded key: {error}") from None
        if route.key is None:
            return "default" if key is None else key
        if key is not None and key != route.key:
            raise CannotDecode("an envelope", "its subject names another agent than the NATS subject does")
        return route.key

    def _topic(self, message: Msg, body: Envelope | None) -> TopicId:
        subject = message.subject
        if body is not None and ("topictype" in body.attributes or "topicsource" in body.attributes):
            return self._read_topic(subject, body.attributes.get("topictype"), body.attributes.get("topicsource"))
        topic = self._topics.get(subject)
        if topic is None:
            topic = self._read_topic(subject, None, None)
            _remember(self._topics, subject, topic)
        return topic

    def _read_topic(self, subject: str, topic_type: str | None, source: str | None) -> TopicId:
        """Read a topic. ``topic_type`` and ``source`` are the values in the body, None if it has none."""
        try:
            return TopicId(*self._subjects.parse_topic(subject, topic_type=topic_type, source=source))
        except ValueError as error:
            raise CannotDecode("a topic", str(error)) from None

    def _match(self, route: Route, topic: TopicId) -> str | None:
        """Return the key of the agent to which the type's subscriptions map the event.

        None if they do not map it, if another subscription delivers it, or if that agent is not on this worker.
        """
        hosted = route.hosted
        ordinary = hosted.takes(topic.type)
        if route.custom is not None:
            agent_id = _mapped(route.custom, topic)
            if agent_id is None or agent_id.type != hosted.agent_type:
                return None
            if ordinary and agent_id.key == topic.source:
                return None  # the ordinary subscriptions deliver it already
            for other in self._declarations.custom(hosted.agent_type):
                if other is route.custom:
                    break
                if _mapped(other, topic) == agent_id:
                    return None  # if several custom ones match, the first delivers it
            key = agent_id.key
        elif ordinary:
            key = topic.source
        else:
            return None
        if hosted.factory is None and key not in (hosted.live if route.key is None else (route.key,)):
            return None
        return key

    # -- the message ---------------------------------------------------------------------------------------------

    def _sender(self, body: Envelope | None) -> AgentId | None:
        """The sender named in the body (not authenticated); None if no agent sent it."""
        source = envelope.NO_AGENT if body is None else body.attributes.get("source") or body.required("source")
        if source == envelope.NO_AGENT:
            return None
        sender = self._senders.get(source)
        if sender is None:
            agent_type, slash, key = source.partition("/")
            try:
                if not slash:
                    raise ValueError("it has no key")
                sender = AgentId(agent_type, decode_token(key))
            except ValueError as error:
                raise CannotDecode("an envelope", f"its source is not type/key: {error}") from None
            _remember(self._senders, source, sender)
        return sender

    def delivery(self, body: Envelope, topic: TopicId | None, handled: NamedClasses) -> Delivery:
        """Return the handler's arguments for a message in an envelope.

        ``topic`` is None for a call. ``handled`` are the message types that the agent handles. A message whose type is
        empty in the envelope gets the one that it fits, as a plain body does. A message of a type that is unknown here
        becomes an ``UnknownPayload``. Its class may be known although it has no serializer here.
        """
        attributes = body.attributes
        try:
            type_name, message_id = attributes["messagetype"], attributes["id"]
        except KeyError as missing:
            raise CannotDecode("an envelope", f"the attribute {missing} is missing") from None
        try:
            if not type_name:
                message, registered = self._inferred(body.payload, handled)
                type_name = type_name_of(type(message))
            else:
                message, registered = self._decoded(
                    type_name,
                    attributes.get("datacontenttype", envelope.JSON_CONTENT),
                    body.payload,
                    attributes.get("messageclass"),
                    handled,
                )
        except CannotDecode:
            general = body.general()
            if general is None:
                raise
            return self.delivery(general, topic, handled)
        if not registered and type(message) is not UnknownPayload:
            type_name = type_name_of(type(message))
        context = MessageContext(self._sender(body), topic, topic is None, self.token(body), message_id)
        return Delivery(message, context, body.payload, type_name, attributes, registered)

    def token(self, body: Envelope) -> CancellationToken:
        """Return the cancellation token of a message in an envelope: a new one if its sender passed none."""
        cancel_id = body.attributes.get("cancelid")
        return CancellationToken() if cancel_id is None else self._cancellations.token_of(cancel_id)

    async def plain_delivery(
        self, inbound: Inbound, agent_id: AgentId, handled: NamedClasses, message_id: str | None = None
    ) -> Delivery:
        """Return the handler's arguments for a plain body, which is the payload itself.

        ``handled`` are the message types that the agent handles. ``message_id`` None: that of the settlement.
        Also raises any exception of an intervention handler. If one drops the message, this is
        ``MessageDroppedException`` for a call and `EventDropped` for an event.
        """
        hosted, topic = inbound.route.hosted, inbound.topic
        headers, payload, registered = inbound.message.headers or {}, inbound.message.data, True
        type_name = headers.get(TYPE_HEADER)
        if type_name is not None:
            await self._catalog.wait_for_serializer(hosted, type_name)
            content_type = self._serialization.content_type_of(type_name)
            message, registered = self._decoded(type_name, content_type, payload, None, handled)
        else:
            message, registered = self._inferred(payload, handled)
        context = MessageContext(
            sender=None,
            topic_id=topic,
            is_rpc=topic is None,
            cancellation_token=CancellationToken(),
            message_id=inbound.settlement.plain_id(inbound) if message_id is None else message_id,
        )
        if self._interventions.handlers:
            if topic is None:
                message = await self._interventions.on_send(message, context, agent_id)
            else:
                try:
                    message = await self._interventions.on_publish(message, context)
                except MessageDroppedException:
                    raise EventDropped from None
        attributes = {"id": context.message_id}
        return Delivery(message, context, payload, type_name or type(message).__name__, attributes, registered)

    def _inferred(self, payload: bytes, handled: NamedClasses) -> tuple[Any, bool]:
        """Return a message whose type is not said, and whether there is a serializer for it. Raises `CannotDecode`."""
        if not self._infer_types:
            raise CannotDecode(
                "a plain body",
                f"type inference is off: set the header {TYPE_HEADER} to the message type, "
                f"one of {', '.join(handled.names) or 'none'}",
                payload,
            )
        message = self._serialization.infer(payload, list(handled))
        return message, self._is_known(type(message), handled)

    def _decoded(
        self, type_name: str, content_type: str, payload: bytes, class_name: str | None, handled: NamedClasses
    ) -> tuple[Any, bool]:
        """Return a message, and whether there is a serializer for its type. Raises `CannotDecode`."""
        message = self._serialization.decode(type_name, content_type, payload, class_name, handled)
        if type(message) is not UnknownPayload:
            name = type(message).__name__
            if name == type_name or name == type_name.rpartition(".")[2]:
                return message, True
            return message, self._is_known(type(message), handled)  # the body names another class than its envelope
        return self._serialization.decode_unregistered(message, class_name), False

    def _is_known(self, cls: type, handled: NamedClasses) -> bool:
        """True if the agent handles ``cls`` or it is registered here. A subclass of such a class need not be."""
        name = type_name_of(cls)
        return name in handled or self._serialization.is_known(name, full_name(cls), handled)


def _remember(known: dict[str, _T], text: str, value: _T) -> None:
    if len(text) <= _LONGEST:
        if len(known) >= _REMEMBERED:
            known.clear()
        known[text] = value


def _mapped(subscription: Subscription, topic: TopicId) -> AgentId | None:
    return subscription.map_to_agent(topic) if subscription.is_match(topic) else None
