"""From a message to its handler, and back to the caller.

Rules:

1. Decoding, finding the agent, the handler and encoding the reply sit inside one ``try``, in `Dispatch._serve`, which
   is also the one place that answers. So every call is answered exactly once, whatever fails.
2. Every handler runs in a task of its own. Tasks start in the order in which they are made, so handlers start in the
   order in which their messages came in.
3. A message whose agent has to be made first, or whose serializer is still missing, holds up the later ones for that
   agent: they queue at its gate.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import orjson
from autogen_core import (
    Agent,
    AgentId,
    CancellationToken,
    MessageContext,
    MessageHandlerContext,
    RoutedAgent,
    Subscription,
    TopicId,
    UnknownPayload,
)
from autogen_core.exceptions import MessageDroppedException
from autogen_core.logging import DeliveryStage, MessageKind
from nats.nuid import NUID

from natsrt.errors import (
    CannotDecode,
    MessageTooLarge,
    NatsrtError,
    RemoteAgentError,
    UnhandledMessage,
    WorkerBusy,
    WorkerStopped,
)
from natsrt.hosting.catalog import Catalog, Gate, HostedType
from natsrt.hosting.control import carry_out_message
from natsrt.hosting.fates import Fates
from natsrt.hosting.intake import Entry, Intake, Kind
from natsrt.hosting.interventions import Interventions
from natsrt.observe import events
from natsrt.observe.telemetry import Telemetry
from natsrt.options import Options
from natsrt.transport.cancellation import Cancellations
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import Envelope
from natsrt.wire.failures import describe
from natsrt.wire.serialization import Encoded, Serialization
from natsrt.wire.subjects import Subjects, decode_token, encode_text

logger = logging.getLogger("natsrt.hosting")

KEY_HEADER = "Natsrt-Key"
"""Header that names the agent key of a plain body; ``default`` without it."""
TYPE_HEADER = "Natsrt-Type"
"""Header that names the message type of a plain body; inferred without it."""
WORKER_EXTENSION = "workerid"
"""Extension of a reply that names the worker which answered."""


class Answer(NamedTuple):
    body: bytes
    headers: dict[str, str] | None = None


class _Delivery(NamedTuple):
    """What a handler is called with."""

    message: Any
    context: MessageContext
    payload: bytes
    type_name: str
    attributes: dict[str, Any]


class Dispatch:
    """The handlers' side of one worker."""

    def __init__(
        self,
        *,
        connection: Connection,
        subjects: Subjects,
        options: Options,
        worker_id: str,
        catalog: Catalog,
        serialization: Serialization,
        cancellations: Cancellations,
        interventions: Interventions,
        fates: Fates,
        custom_of: Callable[[str], Sequence[Subscription]],
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._options = options
        self._worker_id = worker_id
        self._worker_attribute = envelope.attribute(WORKER_EXTENSION, worker_id)
        self._catalog = catalog
        self._serialization = serialization
        self._cancellations = cancellations
        self._interventions = interventions
        self._fates = fates
        self._custom_of = custom_of
        self._type_attributes: dict[str, str] = {}
        self._active: set[Entry] = set()
        self._excused: set[Entry] = set()
        self._stopping = False
        self.telemetry: Telemetry | None = None
        self.intake = Intake(fates, options.max_pending_bytes, start=self.start, refuse=self._refuse)
        self.undecodable = 0
        """Messages that could not be decoded."""
        self.unknown_payloads = 0
        """Messages of a type that this process does not know."""
        self.refused_replies = 0
        """Calls whose reply subject lies where no reply may go."""
        self.background_error: BaseException | None = None
        """The first exception of an event's handler, kept where ``ignore_unhandled_exceptions`` is off."""

    @property
    def running(self) -> int:
        """Handlers that run or wait for their agent."""
        return len(self._active)

    def start(self, entry: Entry) -> None:
        """Serve ``entry`` in a task of its own."""
        self._run(entry, self._serve(entry))

    def _run(self, entry: Entry, work: Coroutine[Any, Any, None]) -> None:
        """``work`` takes the entry out of `_active` at its end; a task's callback would cost a turn of the loop."""
        self._active.add(entry)
        entry.task = asyncio.get_running_loop().create_task(work)

    def excuse(self, task: asyncio.Task[Any] | None) -> None:
        """``task`` waits for the stop itself. If it is a handler's, the stop does not wait for it."""
        for entry in self._active:
            if entry.task is task:
                self._excused.add(entry)

    @property
    def _unfinished(self) -> set[Entry]:
        return self._active - self._excused

    async def finish(self, timeout: float, abort: asyncio.Event) -> None:
        """Wait for the handlers, ``timeout`` seconds at most or until ``abort``, then cancel them.

        Those whose callers have cancelled are cancelled at once: nobody is left to wait for them.
        """
        self._stopping = True
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        while self.intake.queued or self._unfinished:
            for entry in self._unfinished:
                if entry.token is not None and entry.token.is_cancelled():
                    _task_of(entry).cancel()
            remaining = until - loop.time()
            if remaining <= 0 or abort.is_set():
                break
            if self._unfinished:
                await asyncio.wait([_task_of(entry) for entry in self._unfinished], timeout=min(remaining, 0.1))
            else:
                await asyncio.sleep(0)
        if self._unfinished:
            tasks = [_task_of(entry) for entry in self._unfinished]
            logger.warning("%d handlers did not finish in time and are cancelled", len(tasks))
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1.0)

    # -- the one place that answers ------------------------------------------------------------------------------

    async def _serve(self, entry: Entry) -> None:
        route, message = entry.route, entry.message
        began = time.perf_counter_ns()
        answer: Answer | None = None
        error: BaseException | None = None
        body: Envelope | None = None
        plain = True
        try:
            body = envelope.decode(message.data)
            plain = body is None
            if route.kind is Kind.EVENT:
                await self._event(entry, body)
            elif route.kind is Kind.CALL:
                answer = await self._call(entry, body)
            else:
                answer = await self._controlled(entry, body)
        except BaseException as raised:  # a handler's BaseException is answered too, and must not end the event loop
            error = raised
            agent, source = self._agent_of(entry, body)
            if isinstance(raised, asyncio.CancelledError) and self._stopping:
                error = WorkerStopped(agent, self._worker_id)
            if isinstance(raised, CannotDecode):
                self.undecodable += 1
            if route.kind is not Kind.EVENT and message.reply:
                answer = self._failure(error, plain, source, _id_of(body))
            else:
                logger.error("%s on %s failed: %s", route.kind.value, _clip(message.subject), _outline(error))
        if entry.waiting:
            self.intake.started(entry)
        if route.kind is not Kind.CONTROL:
            route.hosted.statistics.record(began, error)
        try:
            if answer is not None and message.reply:
                await self._answer(entry, answer)
        finally:
            self._active.discard(entry)

    async def _answer(self, entry: Entry, answer: Answer) -> None:
        reply = entry.message.reply
        if self._subjects.is_reserved(reply):
            self.refused_replies += 1
            logger.error("a call asked for its reply on %s, where no reply may go", _clip(reply))
            if entry.pending is not None:
                self._fates.forget(entry.pending)
            return
        if entry.pending is not None:
            self._fates.end(entry.pending, answer.body, answer.headers)
        try:
            await self._connection.publish(reply, answer.body, headers=answer.headers)
        except NatsrtError as error:  # kept: the caller asks for it when both are connected again
            logger.warning("a reply could not be sent yet: %s", error)

    async def answer_error(self, reply: str, error: BaseException) -> None:
        """Answer a message that is not for an agent with ``error``."""
        answer = self._failure(error, False, envelope.NO_AGENT, "-")
        await self._connection.publish(reply, answer.body, headers=answer.headers)

    def _failure(
        self, error: BaseException, plain: bool, recipient: str, call_id: str, *, refused: bool = False
    ) -> Answer:
        with_traceback = self._options.send_tracebacks
        answer = self._error_answer(error, plain, recipient, call_id, with_traceback=with_traceback, refused=refused)
        try:
            self._connection.check_size(answer.body, answer.headers)
        except MessageTooLarge as too_large:  # said without what may be long: traceback, and names from the message
            return self._error_answer(too_large, plain, envelope.NO_AGENT, "-", with_traceback=False)
        return answer

    def _error_answer(
        self,
        error: BaseException,
        plain: bool,
        recipient: str,
        call_id: str,
        *,
        with_traceback: bool,
        refused: bool = False,
    ) -> Answer:
        failure = describe(error, with_traceback=with_traceback, refused=refused)
        if plain:
            return Answer(failure.payload, failure.headers)
        attributes = self._reply_attributes(call_id, recipient)
        return Answer(envelope.encode(envelope.ERROR, attributes, failure.payload), failure.headers)

    def _reply_attributes(self, call_id: str, recipient: str) -> str:
        return (
            f"{envelope.attribute('id', call_id + '-r')},{envelope.attribute('source', recipient)},"
            f"{self._worker_attribute}"
        )

    def _refuse(self, entry: Entry) -> None:
        """The intake is full: say so, without starting anything."""
        if entry.pending is not None:
            self._fates.forget(entry.pending)
        error = WorkerBusy(entry.route.hosted.agent_type, self._worker_id, self.intake.pending_bytes)
        entry.pending = None
        self._run(entry, self._answer_refused(entry, error))

    async def _answer_refused(self, entry: Entry, error: WorkerBusy) -> None:
        try:
            plain = envelope.decode(entry.message.data) is None
        except CannotDecode:
            plain = False
        try:
            if entry.message.reply:
                await self._answer(entry, self._failure(error, plain, entry.route.name, "busy", refused=True))
        finally:
            self._active.discard(entry)

    # -- calls ---------------------------------------------------------------------------------------------------

    def _accept_at(self, entry: Entry, body: Envelope) -> None:
        accept_to = body.text("acceptto")
        if accept_to is None or entry.pending is None:
            return
        if not envelope.is_subject(accept_to) or self._subjects.is_reserved(accept_to):
            raise CannotDecode("an envelope", "its acceptto lies where no acceptance may go")
        entry.pending.accept_to = accept_to

    def _key(self, entry: Entry, body: Envelope | None) -> str:
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

    def _agent_of(self, entry: Entry, body: Envelope | None) -> tuple[str, str]:
        """The agent of a message that failed, as text and as a ``source``: the route's name where it names no key."""
        if entry.route.kind is Kind.EVENT:
            return entry.route.name, entry.route.name
        agent_type = entry.route.hosted.agent_type
        try:
            key = self._key(entry, body)
            return f"{agent_type}/{key}", f"{agent_type}/{encode_text(key)}"
        except ValueError:  # its key cannot be read, which may be what failed
            return entry.route.name, entry.route.name

    async def _call(self, entry: Entry, body: Envelope | None) -> Answer:
        if body is not None:
            if body.type != envelope.CALL:
                raise CannotDecode("an envelope", f"expected {envelope.CALL}, not {body.type!r}")
            self._accept_at(entry, body)
        key = self._key(entry, body)
        hosted = entry.route.hosted
        agent, delivery = self._admit_at_once(hosted, key, entry, body, None) or (
            await self._admit_in_turn(hosted, key, entry, body, None)
        )
        response = await self._invoke(hosted, key, agent, delivery, entry)
        encoded = self._serialization.encode(response)
        if events.listening():
            events.message(
                encoded.payload,
                sender=AgentId(hosted.agent_type, key),
                receiver=delivery.context.sender,
                kind=MessageKind.RESPOND,
                stage=DeliveryStage.SEND,
            )
        answer = Answer(encoded.payload) if body is None else self._reply(encoded, body, hosted.agent_type, key)
        self._connection.check_size(answer.body)
        return answer

    def _reply(self, encoded: Encoded, body: Envelope, agent_type: str, key: str) -> Answer:
        type_attribute = self._type_attributes.get(encoded.type_name)
        if type_attribute is None:
            type_attribute = envelope.attribute("messagetype", encoded.type_name)
            self._type_attributes[encoded.type_name] = type_attribute
        attributes = f"{self._reply_attributes(_id_of(body), f'{agent_type}/{encode_text(key)}')},{type_attribute}"
        return Answer(envelope.encode(envelope.REPLY, attributes, encoded.payload, encoded.content_type))

    async def _controlled(self, entry: Entry, body: Envelope | None) -> Answer:
        if body is None or body.type != envelope.CONTROL:
            raise CannotDecode("a control message", f"expected {envelope.CONTROL}")
        self._accept_at(entry, body)
        hosted, key = entry.route.hosted, self._key(entry, body)
        result = await carry_out_message(self._catalog, hosted, key, body)
        try:
            payload = orjson.dumps(result)
        except TypeError as error:
            raise CannotDecode("a control result", f"an agent's state must be JSON: {error}") from None
        source = f"{hosted.agent_type}/{encode_text(key)}"
        answer = Answer(envelope.encode(envelope.REPLY, self._reply_attributes(_id_of(body), source), payload))
        self._connection.check_size(answer.body)
        return answer

    # -- events --------------------------------------------------------------------------------------------------

    async def _event(self, entry: Entry, body: Envelope | None) -> None:
        """Deliver to the agent that the type's subscriptions give the event to, unless it is the publisher."""
        route = entry.route
        if body is not None and body.type != envelope.EVENT:
            raise CannotDecode("an envelope", f"expected {envelope.EVENT}, not {body.type!r}")
        topic = self._topic(entry, body)
        key = self._match(entry, topic)
        if key is None:
            return
        sender = self._sender(body)
        if sender is None or sender.key != key or sender.type != route.hosted.agent_type:
            await self._deliver(route.hosted, key, entry, body, topic)

    def _topic(self, entry: Entry, body: Envelope | None) -> TopicId:
        claims = (None, None) if body is None else (body.text("topictype"), body.text("topicsource"))
        try:
            topic_type, source = self._subjects.parse_topic(
                entry.message.subject, topic_type=claims[0], source=claims[1]
            )
            return TopicId(topic_type, source)
        except ValueError as error:
            raise CannotDecode("a topic", str(error)) from None

    def _match(self, entry: Entry, topic: TopicId) -> str | None:
        """The key of this type's agent that the union of its subscriptions gives the event to; None for none here."""
        route, hosted = entry.route, entry.route.hosted
        ordinary = any(rule.matches(topic.type) for rule in hosted.rules)
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

    async def _deliver(self, hosted: HostedType, key: str, entry: Entry, body: Envelope | None, topic: TopicId) -> None:
        try:
            agent, delivery = self._admit_at_once(hosted, key, entry, body, topic) or (
                await self._admit_in_turn(hosted, key, entry, body, topic)
            )
            await self._invoke(hosted, key, agent, delivery, entry)
        except MessageDroppedException:
            if body is not None:
                raise
        except BaseException as error:
            if not self._options.ignore_unhandled_exceptions and self.background_error is None:
                self.background_error = error
            raise

    # -- agent and message ---------------------------------------------------------------------------------------

    def _admit_at_once(
        self, hosted: HostedType, key: str, entry: Entry, body: Envelope | None, topic: TopicId | None
    ) -> tuple[Agent, _Delivery] | None:
        """The agent and what it is to be given, if nothing has to be waited for, and nobody waits at its gate."""
        agent = hosted.live.get(key)
        if agent is None or body is None or key in hosted.gates:
            return None
        delivery = self._delivery(body, topic)
        if isinstance(delivery.message, UnknownPayload) and hosted.settling:
            return None
        self.intake.started(entry)
        return agent, delivery

    async def _admit_in_turn(
        self, hosted: HostedType, key: str, entry: Entry, body: Envelope | None, topic: TopicId | None
    ) -> tuple[Agent, _Delivery]:
        """The same, waiting for the agent and the serializer, in the order of arrival."""
        gate = hosted.gates.get(key)
        if gate is None:
            gate = hosted.gates[key] = Gate()
        gate.users += 1
        try:
            async with gate.lock:
                agent = await self._catalog.agent(hosted, key)
                if body is None:
                    delivery = await self._plain_delivery(hosted, key, entry, topic)
                else:
                    await self._catalog.wait_for_serializer(hosted, body.required("messagetype"))
                    delivery = self._delivery(body, topic)
                self.intake.started(entry)
                return agent, delivery
        finally:
            gate.users -= 1
            if not gate.users:
                hosted.gates.pop(key, None)

    def _sender(self, body: Envelope | None) -> AgentId | None:
        """Who says that he sent it: a claim, documented as such."""
        source = None if body is None else body.required("source")
        if source is None or source == envelope.NO_AGENT:
            return None
        agent_type, slash, key = source.partition("/")
        try:
            if not slash:
                raise ValueError("it has no key")
            return AgentId(agent_type, decode_token(key))
        except ValueError as error:
            raise CannotDecode("an envelope", f"its source is not type/key: {error}") from None

    def _delivery(self, body: Envelope, topic: TopicId | None) -> _Delivery:
        type_name = body.required("messagetype")
        content_type = body.content_type
        try:
            message = self._serialization.decode(type_name, content_type, body.payload)
        except CannotDecode:
            general = body.general()
            if general is None:
                raise
            body = general
            message = self._serialization.decode(type_name, content_type, body.payload)
        token = self._cancellations.token_of(body.text("cancelid"))
        context = MessageContext(
            sender=self._sender(body),
            topic_id=topic,
            is_rpc=topic is None,
            cancellation_token=token,
            message_id=body.required("id"),
        )
        return _Delivery(message, context, body.payload, type_name, body.attributes)

    async def _plain_delivery(self, hosted: HostedType, key: str, entry: Entry, topic: TopicId | None) -> _Delivery:
        """A body that is not ours is the payload itself."""
        headers, payload = entry.message.headers or {}, entry.message.data
        type_name = headers.get(TYPE_HEADER)
        if type_name is not None:
            await self._catalog.wait_for_serializer(hosted, type_name)
            content_type = self._serialization.content_type_of(type_name)
            message = self._serialization.decode(type_name, content_type, payload)
        elif self._options.infer_types:
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
        return _Delivery(message, context, payload, type_name or type(message).__name__, {"id": context.message_id})

    async def _invoke(self, hosted: HostedType, key: str, agent: Agent, delivery: _Delivery, entry: Entry) -> Any:
        context = delivery.context
        agent_id = agent.id
        if isinstance(delivery.message, UnknownPayload):
            self.unknown_payloads += 1
            if self._has_default_unhandled(agent):
                logger.warning("%s does not know messages of type %s", agent_id, _clip(delivery.type_name))
                if context.is_rpc:
                    raise UnhandledMessage(str(agent_id), delivery.type_name, sorted(hosted.handles))
                return None
        if events.listening():
            events.message(
                delivery.payload,
                sender=context.sender,
                receiver=agent_id if context.is_rpc else None,
                kind=MessageKind.DIRECT if context.is_rpc else MessageKind.PUBLISH,
                stage=DeliveryStage.DELIVER,
            )
        entry.token = context.cancellation_token
        try:
            with MessageHandlerContext.populate_context(agent_id):
                if self.telemetry is None:
                    return await agent.on_message(delivery.message, context)
                with self._process_span(self.telemetry, agent_id, delivery, entry):
                    return await agent.on_message(delivery.message, context)
        except BaseException as error:
            events.handler_failed(delivery.payload, agent=agent_id, error=error)
            raise

    def _process_span(
        self, telemetry: Telemetry, agent_id: AgentId, delivery: _Delivery, entry: Entry
    ) -> AbstractContextManager[None]:
        return telemetry.processing(
            delivery.attributes,
            subject=_clip(entry.message.subject),
            destination=self._subjects.agent(agent_id.type),
            agent=agent_id,
            message_type=delivery.type_name,
            size=entry.size,
            waited=asyncio.get_running_loop().time() - entry.arrived,
        )

    @staticmethod
    def _has_default_unhandled(agent: Agent) -> bool:
        return isinstance(agent, RoutedAgent) and (
            type(agent).on_unhandled_message is RoutedAgent.on_unhandled_message
            and type(agent).on_message_impl is RoutedAgent.on_message_impl
        )


def _task_of(entry: Entry) -> asyncio.Task[None]:
    assert entry.task is not None
    return entry.task


def _id_of(body: Envelope | None) -> str:
    """The call's id for its reply."""
    return "-" if body is None else body.attributes.get("id", "-")


def _mapped(subscription: Subscription, topic: TopicId) -> AgentId | None:
    return subscription.map_to_agent(topic) if subscription.is_match(topic) else None


def _clip(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def _outline(error: BaseException) -> str:
    """An error for the log: class and places. Its text may quote a payload, so only natsrt's own texts are shown."""
    if isinstance(error, RemoteAgentError):
        return f"another agent's {error.error_type}"
    if isinstance(error, NatsrtError):
        return str(error)
    return f"{type(error).__qualname__}\n{''.join(traceback.format_tb(error.__traceback__))}".rstrip()
