"""What a message says: for which agent it is, on which topic, from whom, and with which message for the handler.

The NATS subject decides agent type, topic and, for an instance, the key; a body only adds what the subject hides, and
must agree with it. Everything here raises `CannotDecode` for what cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from autogen_core import AgentId, CancellationToken, MessageContext, Subscription, TopicId
from nats.nuid import NUID

from natsrt.errors import CannotDecode
from natsrt.hosting.catalog import Catalog, HostedType
from natsrt.hosting.intake import EVENT, LOCATE, Entry
from natsrt.hosting.interventions import Interventions
from natsrt.transport.cancellation import Cancellations
from natsrt.wire import envelope
from natsrt.wire.envelope import KEY_HEADER, TYPE_HEADER, Envelope
from natsrt.wire.serialization import Serialization
from natsrt.wire.subjects import Subjects, decode_token

_REMEMBERED = 4096
"""Topics, senders and acceptance subjects that are not read again."""
_LONGEST = 1024
"""Characters of what is remembered, so that this stays small."""

_T = TypeVar("_T")


@dataclass(slots=True)
class Delivery:
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
        self._senders: dict[str, AgentId] = {}
        self._acceptable: dict[str, None] = {}

    # -- whom it is for ------------------------------------------------------------------------------------------

    def recipient(self, entry: Entry, body: Envelope | None) -> tuple[str | None, TopicId | None]:
        """The key of the agent that the message is for, and the topic of an event, None for a call.

        The key is None for an event that no agent here gets: its publisher does not get it back. What the message is
        may turn out to be something else than its subject says: `Entry.kind`.
        """
        route = entry.route
        if body is not None and (kind := body.attributes["type"]) != route.expects:
            if kind == envelope.EVENT and route.hosted.keyed is not None and route.key is not None:
                topic = self._claimed_topic(body)
                entry.kind = EVENT
                return route.key, topic
            if kind != envelope.LOCATE or route.hosted.keyed is None:
                raise CannotDecode("an envelope", f"expected {route.expects}, not {kind!r}")
            entry.kind = LOCATE
        if route.kind is not EVENT:
            if body is not None:
                self._accept_at(entry, body)
            return self.key(entry, body), None
        topic = self.topic(entry, body)
        key = self.match(entry, topic)
        if key is not None and body is not None:
            sender = self.sender(body)
            if sender is not None and sender.key == key and sender.type == route.hosted.agent_type:
                return None, topic
        return key, topic

    def _claimed_topic(self, body: Envelope) -> TopicId:
        """The topic of an event that its publisher sent to a keyed agent itself."""
        try:
            return TopicId(body.required("topictype"), body.required("topicsource"))
        except ValueError as error:
            raise CannotDecode("a topic", str(error)) from None

    def _accept_at(self, entry: Entry, body: Envelope) -> None:
        accept_to = body.attributes.get("acceptto")
        if accept_to is None or entry.pending is None:
            return
        if accept_to not in self._acceptable:
            if not envelope.is_subject(accept_to) or self._subjects.is_reserved(accept_to):
                raise CannotDecode("an envelope", "its acceptto lies where no acceptance may go")
            _remember(self._acceptable, accept_to, None)
        entry.pending.accept_to = accept_to

    def key(self, entry: Entry, body: Envelope | None) -> str:
        """The key of the agent a call is for. The subject decides; the body adds the key, or must agree with it."""
        route = entry.route
        if body is None:
            key = (entry.message.headers or {}).get(KEY_HEADER)
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

    def topic(self, entry: Entry, body: Envelope | None) -> TopicId:
        subject = entry.message.subject
        if body is not None and ("topictype" in body.attributes or "topicsource" in body.attributes):
            return self._read_topic(subject, body.attributes.get("topictype"), body.attributes.get("topicsource"))
        topic = self._topics.get(subject)
        if topic is None:
            topic = self._read_topic(subject, None, None)
            _remember(self._topics, subject, topic)
        return topic

    def _read_topic(self, subject: str, topic_type: str | None, source: str | None) -> TopicId:
        """``topic_type`` and ``source`` are the body's claims, None where it has none."""
        try:
            return TopicId(*self._subjects.parse_topic(subject, topic_type=topic_type, source=source))
        except ValueError as error:
            raise CannotDecode("a topic", str(error)) from None

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
        if hosted.factory is None and key not in (hosted.live if route.key is None else (route.key,)):
            return None
        return key

    # -- what it is ----------------------------------------------------------------------------------------------

    def sender(self, body: Envelope | None) -> AgentId | None:
        """Who says that he sent it: a claim, documented as such."""
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

    def delivery(self, body: Envelope, topic: TopicId | None) -> Delivery:
        """Raises `CannotDecode`. A message of a type that nobody here knows is an ``UnknownPayload``."""
        attributes = body.attributes
        try:
            type_name, message_id = attributes["messagetype"], attributes["id"]
        except KeyError as missing:
            raise CannotDecode("an envelope", f"the attribute {missing} is missing") from None
        try:
            message = self._serialization.decode(
                type_name, attributes.get("datacontenttype", envelope.JSON_CONTENT), body.payload
            )
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


def _remember(known: dict[str, _T], text: str, value: _T) -> None:
    if len(text) <= _LONGEST:
        if len(known) >= _REMEMBERED:
            known.clear()
        known[text] = value


def _mapped(subscription: Subscription, topic: TopicId) -> AgentId | None:
    return subscription.map_to_agent(topic) if subscription.is_match(topic) else None
