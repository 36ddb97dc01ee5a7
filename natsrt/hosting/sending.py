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
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import orjson
from autogen_core import AgentId, CancellationToken, MessageContext, TopicId, UnknownPayload
from autogen_core.exceptions import MessageDroppedException
from autogen_core.logging import DeliveryStage, MessageKind
from nats.aio.msg import Msg
from nats.nuid import NUID
from opentelemetry.trace import SpanKind

from natsrt.errors import CallTimeout, CannotDecode
from natsrt.hosting.interventions import Interventions
from natsrt.observe import events
from natsrt.observe.telemetry import Telemetry
from natsrt.options import Options
from natsrt.transport.calls import Calls, Directory
from natsrt.transport.cancellation import Cancellations
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import attribute, quote
from natsrt.wire.failures import SERVICE_ERROR, SERVICE_ERROR_CODE, ErrorTypes
from natsrt.wire.serialization import Encoded, Serialization
from natsrt.wire.subjects import Subjects, encode_text, is_hashed


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


class _Work(NamedTuple):
    """One request, ready to be sent."""

    recipient: AgentId
    route: Callable[[], str]
    kind: str
    encoded: Encoded
    token: CancellationToken | None


class Sending:
    """What ``send_message`` and ``publish_message`` do."""

    def __init__(
        self,
        *,
        connection: Connection,
        subjects: Subjects,
        options: Options,
        calls: Calls,
        directory: Directory,
        serialization: Serialization,
        cancellations: Cancellations,
        interventions: Interventions,
        error_types: ErrorTypes,
        produced_here: Callable[[], Iterable[type[Any]]],
        ready: Callable[[float], Awaitable[None]],
        is_ready: Callable[[], bool],
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._options = options
        self._calls = calls
        self._directory = directory
        self._serialization = serialization
        self._cancellations = cancellations
        self._interventions = interventions
        self._error_types = error_types
        self._produced_here = produced_here
        self._ready = ready
        self._is_ready = is_ready
        self._line = _Line()
        self._id_prefix = NUID().next().decode()
        self._type_attributes: dict[str, str] = {}
        self.telemetry: Telemetry | None = None
        self.sent = 0
        """Messages sent since the runtime was started."""
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
            if not self._interventions and not self._line.length and self._is_ready():
                response = await self._call(message, recipient, sender, token, message_id, reply_type, _nothing)
            else:
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
        finally:
            self.under_way -= 1

    async def _call(
        self,
        message: Any,
        recipient: AgentId,
        sender: AgentId | None,
        token: CancellationToken | None,
        message_id: str,
        reply_type: type[Any] | None,
        leave: Callable[[], None],
    ) -> Any:
        encoded = self._serialization.encode(message)
        attributes = (
            f"{self._head(message_id, sender, encoded, token)},"
            f'"subject":"{encode_text(recipient.key)}","acceptto":"{self._calls.accept_to}"'
        )
        if events.listening():
            events.message(
                encoded.payload, sender=sender, receiver=recipient, kind=MessageKind.DIRECT, stage=DeliveryStage.SEND
            )
        work = _Work(recipient, lambda: self._directory.subject_of(recipient), envelope.CALL, encoded, token)
        if self.telemetry is None:
            reply = await self._exchange(work, attributes, leave)
            return self._result(reply, type(message), reply_type, recipient)
        with self.telemetry.sending(
            "send",
            self._subjects.agent(recipient.type),
            kind=SpanKind.CLIENT,
            message_type=encoded.type_name,
            message_id=message_id,
            size=len(encoded.payload),
        ) as carrier:
            reply = await self._exchange(work, attributes + carrier, leave)
            return self._result(reply, type(message), reply_type, recipient)

    async def control(self, recipient: AgentId, subject: str, operation: str, data: Any = None) -> Any:
        """Ask the one worker behind a control subject. Returns plain JSON values."""
        try:
            payload = orjson.dumps(data)
        except TypeError as error:
            raise CannotDecode("a state", f"it must be JSON: {error}") from None
        await self._wait_ready(None, asyncio.get_running_loop().time())
        self.sent += 1
        attributes = (
            f"{attribute('id', self._next_id())},{attribute('source', envelope.NO_AGENT)},"
            f'"subject":"{encode_text(recipient.key)}",{attribute("operation", operation)},'
            f'"acceptto":"{self._calls.accept_to}"'
        )
        encoded = Encoded("", envelope.JSON_CONTENT, payload)
        work = _Work(recipient, lambda: subject, envelope.CONTROL, encoded, None)
        reply = await self._exchange(work, attributes, _nothing)
        return self._answered(reply, recipient).json()

    def _exchange(self, work: _Work, attributes: str, leave: Callable[[], None]) -> Awaitable[Msg]:
        body = envelope.encode(work.kind, attributes, work.encoded.payload, work.encoded.content_type)
        link = None if work.token is None else self._link(work.token)
        call = self._calls.call(work.recipient, work.route, body, sent=leave, link=link)
        timeout = self._options.call_timeout
        return call if timeout is None else self._within(timeout, call, work.recipient)

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

    # -- replies -------------------------------------------------------------------------------------------------

    def _result(self, reply: Msg, sent: type[Any], reply_type: type[Any] | None, recipient: AgentId) -> Any:
        body = envelope.decode(reply.data)
        if body is None:
            return self._plain_result(reply, reply_type, recipient)
        body = self._checked(body, reply, recipient)
        type_name = body.required("messagetype")

        def read(payload: bytes) -> Any:
            return self._serialization.reply(
                type_name, body.content_type, payload, self._produced_here, sent, reply_type
            )

        try:
            result = read(body.payload)
        except CannotDecode:
            general = body.general()
            if general is None:
                raise
            result = read(general.payload)
        if isinstance(result, UnknownPayload):
            raise CannotDecode(
                f"the reply of {recipient}",
                f"its type {type_name!r} is unknown here; add its serializer with runtime.add_message_serializer",
                body.payload,
            )
        if events.listening():
            events.message(
                body.payload, sender=recipient, receiver=None, kind=MessageKind.RESPOND, stage=DeliveryStage.DELIVER
            )
        return result

    def _answered(self, reply: Msg, recipient: AgentId) -> envelope.Envelope:
        body = envelope.decode(reply.data)
        if body is None:
            self._raise_service_error(reply, recipient)
            raise CannotDecode(f"the reply of {recipient}", "it is not a natsrt reply", reply.data)
        return self._checked(body, reply, recipient)

    def _checked(self, body: envelope.Envelope, reply: Msg, recipient: AgentId) -> envelope.Envelope:
        if body.type == envelope.ERROR:
            raise self._error_types.rebuild(body.payload, agent=str(recipient), worker_id=body.text("workerid"))
        if body.type != envelope.REPLY:
            raise CannotDecode(f"the reply of {recipient}", f"its type is {body.type!r}", reply.data)
        return body

    def _raise_service_error(self, reply: Msg, recipient: AgentId) -> None:
        """Raise what a plain reply reports as a NATS service does (ADR-32); one that is none changes nothing."""
        headers = reply.headers or {}
        text = headers.get(SERVICE_ERROR)
        if text is not None:
            text = f"{text} ({headers[SERVICE_ERROR_CODE]})" if SERVICE_ERROR_CODE in headers else text
            raise self._error_types.rebuild(reply.data, agent=str(recipient), worker_id=None, text=text)

    def _plain_result(self, reply: Msg, reply_type: type[Any] | None, recipient: AgentId) -> Any:
        """A NATS responder in any language answered: JSON values, or ``reply_type``; else text, else bytes."""
        self._raise_service_error(reply, recipient)
        if reply_type is not None:
            return self._serialization.infer(reply.data, [reply_type])
        try:
            return orjson.loads(reply.data)
        except orjson.JSONDecodeError:
            pass
        try:
            return reply.data.decode()
        except UnicodeDecodeError:
            return reply.data

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
        if "=H" in subject:
            attributes += self._hidden(subject, topic)
        if events.listening():
            events.message(
                encoded.payload, sender=sender, receiver=topic, kind=MessageKind.PUBLISH, stage=DeliveryStage.SEND
            )
        if self.telemetry is None:
            body = envelope.encode(envelope.EVENT, attributes, encoded.payload, encoded.content_type)
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
            body = envelope.encode(envelope.EVENT, attributes + carrier, encoded.payload, encoded.content_type)
            await self._connection.publish(subject, body)

    @staticmethod
    def _hidden(subject: str, topic: TopicId) -> str:
        """The real values of hashed tokens."""
        tokens = subject.split(".")
        hidden = f",{attribute('topicsource', topic.source)}" if is_hashed(tokens[-1]) else ""
        if any(is_hashed(token) for token in tokens[:-1]):
            hidden += f",{attribute('topictype', topic.type)}"
        return hidden

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
