"""What a message says: for which agent it is, on which topic, from whom, and with which message for the handler.

The NATS subject decides agent type, topic and, for an instance, the key; a body only adds what the subject hides, and
must agree with it. Everything here raises `CannotDecode` for what cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from autogen_core import AgentId, CancellationToken, MessageContext, Subscription, TopicId
from nats.nuid import NUID

from natsrt.errors import CannotDecode
from natsrt.hosting.catalog import Catalog, HostedType
from natsrt.hosting.intake import Entry
from natsrt.hosting.interventions import Interventions
from natsrt.transport.cancellation import Cancellations
from natsrt.wire import envelope
from natsrt.wire.envelope import KEY_HEADER, TYPE_HEADER, Envelope
from natsrt.wire.serialization import Serialization
from natsrt.wire.subjects import Subjects, decode_token

_CLAIMS = ("topictype", "topicsource")
"""Extensions with the real values of hashed tokens."""
_REMEMBERED = 4096
"""Topics and acceptance subjects that are not checked again."""


class Delivery(NamedTuple):
    """What a handler is called with."""

    message: Any
    context: MessageContext
    payload: bytes
    type_name: str
    attributes: dict[str, Any]


class Reading:
    """Reads the messages of one worker."""

    def __init__(
        self,
        *,
        subjects: Subjects,
        catalog: Catalog,
        serialization: Serialization,
        cancellations: Cancellations,
        interventions: Interventions,
        infer_types: bool,
        custom_of: Callable[[str], Sequence[Subscription]],
    ) -> None:
        self._subjects = subjects
        self._catalog = catalog
        self._serialization = serialization
        self._cancellations = cancellations
        self._interventions = interventions
        self._infer_types = infer_types
        self._custom_of = custom_of
        self._topics: dict[str, TopicId] = {}
        self._acceptable: set[str] = set()

    # -- whom it is for ------------------------------------------------------------------------------------------

    def accept_at(self, entry: Entry, body: Envelope) -> None:
        accept_to = body.text("acceptto")
        if accept_to is None or entry.pending is None:
            return
        if accept_to not in self._acceptable:
            if not envelope.is_subject(accept_to) or self._subjects.is_reserved(accept_to):
                raise CannotDecode("an envelope", "its acceptto lies where no acceptance may go")
            if len(self._acceptable) >= _REMEMBERED:
                self._acceptable.clear()
            self._acceptable.add(accept_to)
        entry.pending.accept_to = accept_to

    def key(self, entry: Entry, body: Envelope | None) -> str:
        """The key of the agent a call is for. The subject decides; the body adds the key, or must agree with it."""
        route = entry.route
        if body is None:
            key = (entry.message.headers or {}).get(KEY_HEADER)
        else:
            subject = body.text("subject")
            try:
                key = None if subject is None else decode_token(subject)
            except ValueError as error:
                raise CannotDecode("an envelope", f"its subject is not an encoded key: {error}") from None
        if route.key is None:
            return "default" if key is None else key
        if key is not None and key != route.key:
            raise CannotDecode("an envelope", "its subject names another agent than the NATS subject does")
        return route.key

    def topic(self, entry: Entry, body: Envelope | None) -> TopicId:
        subject = entry.message.subject
        claims = {} if body is None else {name: body.attributes[name] for name in _CLAIMS if name in body.attributes}
        topic = None if claims else self._topics.get(subject)
        if topic is None:
            try:
                parsed = self._subjects.parse_topic(
                    subject, topic_type=claims.get("topictype"), source=claims.get("topicsource")
                )
                topic = TopicId(*parsed)
            except ValueError as error:
                raise CannotDecode("a topic", str(error)) from None
            if not claims:
                if len(self._topics) >= _REMEMBERED:
                    self._topics.clear()
                self._topics[subject] = topic
        return topic

    def match(self, entry: Entry, topic: TopicId) -> str | None:
        """The key of this type's agent that the union of its subscriptions gives the event to; None for none here."""
        route, hosted = entry.route, entry.route.hosted
        ordinary = hosted.takes(topic.type)
        if route.custom is not None:
            agent_id = _mapped(route.custom, topic)
            if agent_id is None or agent_id.type != hosted.agent_type:
                return None
            if ordinary and agent_id.key == topic.source:
                return None  # the ordinary subscriptions deliver it already
            for other in self._custom_of(hosted.agent_type):
                if other is route.custom:
                    break
                if _mapped(other, topic) == agent_id:
                    return None  # of several custom ones the first delivers it
            key = agent_id.key
        elif ordinary:
            key = topic.source
        else:
            return None
        if hosted.has_instances_only and key not in (hosted.live if route.key is None else (route.key,)):
            return None
        return key

    # -- what it is ----------------------------------------------------------------------------------------------

    def sender(self, body: Envelope | None) -> AgentId | None:
        """Who says that he sent it: a claim, documented as such."""
        source = envelope.NO_AGENT if body is None else body.required("source")
        if source == envelope.NO_AGENT:
            return None
        agent_type, slash, key = source.partition("/")
        try:
            if not slash:
                raise ValueError("it has no key")
            return AgentId(agent_type, decode_token(key))
        except ValueError as error:
            raise CannotDecode("an envelope", f"its source is not type/key: {error}") from None

    def delivery(self, body: Envelope, topic: TopicId | None) -> Delivery:
        """Raises `CannotDecode`. A message of a type that nobody here knows is an ``UnknownPayload``."""
        attributes = body.attributes
        try:
            type_name, message_id = attributes["messagetype"], attributes["id"]
        except KeyError as missing:
            raise CannotDecode("an envelope", f"the attribute {missing} is missing") from None
        try:
            message = self._serialization.decode(type_name, body.content_type, body.payload)
        except CannotDecode:
            general = body.general()
            if general is None:
                raise
            return self.delivery(general, topic)
        cancel_id = attributes.get("cancelid")
        token = CancellationToken() if cancel_id is None else self._cancellations.token_of(cancel_id)
        context = MessageContext(self.sender(body), topic, topic is None, token, message_id)
        return Delivery(message, context, body.payload, type_name, attributes)

    async def plain_delivery(self, hosted: HostedType, key: str, entry: Entry, topic: TopicId | None) -> Delivery:
        """A body that is not ours is the payload itself."""
        headers, payload = entry.message.headers or {}, entry.message.data
        type_name = headers.get(TYPE_HEADER)
        if type_name is not None:
            await self._catalog.wait_for_serializer(hosted, type_name)
            content_type = self._serialization.content_type_of(type_name)
            message = self._serialization.decode(type_name, content_type, payload)
        elif self._infer_types:
            message = self._serialization.infer(payload, list(hosted.handles.values()))
        else:
            raise CannotDecode(
                "a plain body",
                f"type inference is off: name the message type in the header {TYPE_HEADER}, "
                f"one of {', '.join(sorted(hosted.handles)) or 'none'}",
                payload,
            )
        context = MessageContext(
            sender=None,
            topic_id=topic,
            is_rpc=topic is None,
            cancellation_token=CancellationToken(),
            message_id=NUID().next().decode(),
        )
        if self._interventions:
            if topic is None:
                message = await self._interventions.on_send(message, context, AgentId(hosted.agent_type, key))
            else:
                message = await self._interventions.on_publish(message, context)
        return Delivery(message, context, payload, type_name or type(message).__name__, {"id": context.message_id})


def _mapped(subscription: Subscription, topic: TopicId) -> AgentId | None:
    return subscription.map_to_agent(topic) if subscription.is_match(topic) else None
