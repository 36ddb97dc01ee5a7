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
from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import orjson
from autogen_core import (
    Agent,
    AgentId,
    MessageHandlerContext,
    RoutedAgent,
    TopicId,
    UnknownPayload,
)
from autogen_core.exceptions import MessageDroppedException
from autogen_core.logging import DeliveryStage, MessageKind

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
from natsrt.hosting.reading import Delivery, Reading
from natsrt.observe import events
from natsrt.observe.telemetry import Telemetry
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import Envelope
from natsrt.wire.failures import describe
from natsrt.wire.serialization import Encoded, Serialization
from natsrt.wire.subjects import Subjects, encode_text

logger = logging.getLogger("natsrt.hosting")

WORKER_EXTENSION = "workerid"
"""Extension of a reply that names the worker which answered."""


class Answer(NamedTuple):
    body: bytes
    headers: dict[str, str] | None = None


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
        reading: Reading,
        fates: Fates,
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._options = options
        self._worker_id = worker_id
        self._worker_attribute = envelope.attribute(WORKER_EXTENSION, worker_id)
        self._catalog = catalog
        self._serialization = serialization
        self._reading = reading
        self._fates = fates
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

    @property
    def active(self) -> Sequence[Entry]:
        """The entries behind `running`, as they are now."""
        return list(self._active)

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
        return f'"id":{envelope.quote(call_id + "-r")},"source":{envelope.quote(recipient)},{self._worker_attribute}'

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

    def _agent_of(self, entry: Entry, body: Envelope | None) -> tuple[str, str]:
        """The agent of a message that failed, as text and as a ``source``: the route's name where it names no key."""
        if entry.route.kind is Kind.EVENT:
            return entry.route.name, entry.route.name
        agent_type = entry.route.hosted.agent_type
        try:
            key = self._reading.key(entry, body)
            return f"{agent_type}/{key}", f"{agent_type}/{encode_text(key)}"
        except ValueError:  # its key cannot be read, which may be what failed
            return entry.route.name, entry.route.name

    async def _call(self, entry: Entry, body: Envelope | None) -> Answer:
        if body is not None:
            if body.type != envelope.CALL:
                raise CannotDecode("an envelope", f"expected {envelope.CALL}, not {body.type!r}")
            self._reading.accept_at(entry, body)
        key = self._reading.key(entry, body)
        hosted = entry.route.hosted
        agent, delivery = self._admit_at_once(hosted, key, entry, body, None) or (
            await self._admit_in_turn(hosted, key, entry, body, None)
        )
        response = await self._invoke(hosted, agent, delivery, entry)
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
        self._reading.accept_at(entry, body)
        hosted, key = entry.route.hosted, self._reading.key(entry, body)
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
        topic = self._reading.topic(entry, body)
        key = self._reading.match(entry, topic)
        if key is None:
            return
        sender = self._reading.sender(body)
        if sender is None or sender.key != key or sender.type != route.hosted.agent_type:
            await self._deliver(route.hosted, key, entry, body, topic)

    async def _deliver(self, hosted: HostedType, key: str, entry: Entry, body: Envelope | None, topic: TopicId) -> None:
        try:
            agent, delivery = self._admit_at_once(hosted, key, entry, body, topic) or (
                await self._admit_in_turn(hosted, key, entry, body, topic)
            )
            await self._invoke(hosted, agent, delivery, entry)
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
    ) -> tuple[Agent, Delivery] | None:
        """The agent and what it is to be given, if nothing has to be waited for, and nobody waits at its gate."""
        agent = hosted.live.get(key)
        if agent is None or body is None or key in hosted.gates:
            return None
        delivery = self._reading.delivery(body, topic)
        if isinstance(delivery.message, UnknownPayload) and hosted.settling:
            return None
        self.intake.started(entry)
        return agent, delivery

    async def _admit_in_turn(
        self, hosted: HostedType, key: str, entry: Entry, body: Envelope | None, topic: TopicId | None
    ) -> tuple[Agent, Delivery]:
        """The same, waiting for the agent and the serializer, in the order of arrival."""
        gate = hosted.gates.get(key)
        if gate is None:
            gate = hosted.gates[key] = Gate()
        gate.users += 1
        try:
            async with gate.lock:
                agent = await self._catalog.agent(hosted, key)
                if body is None:
                    delivery = await self._reading.plain_delivery(hosted, key, entry, topic)
                else:
                    await self._catalog.wait_for_serializer(hosted, body.required("messagetype"))
                    delivery = self._reading.delivery(body, topic)
                self.intake.started(entry)
                return agent, delivery
        finally:
            gate.users -= 1
            if not gate.users:
                hosted.gates.pop(key, None)

    async def _invoke(self, hosted: HostedType, agent: Agent, delivery: Delivery, entry: Entry) -> Any:
        message, context = delivery.message, delivery.context
        if type(message) is UnknownPayload:
            self.unknown_payloads += 1
            if self._has_default_unhandled(agent):
                logger.warning("%s does not know messages of type %s", agent.id, _clip(delivery.type_name))
                if context.is_rpc:
                    raise UnhandledMessage(str(agent.id), delivery.type_name, sorted(hosted.handles))
                return None
        if events.listening():
            events.message(
                delivery.payload,
                sender=context.sender,
                receiver=agent.id if context.is_rpc else None,
                kind=MessageKind.DIRECT if context.is_rpc else MessageKind.PUBLISH,
                stage=DeliveryStage.DELIVER,
            )
        entry.token = context.cancellation_token
        try:
            with MessageHandlerContext.populate_context(agent.id):
                if self.telemetry is None:
                    return await agent.on_message(message, context)
                with self._process_span(self.telemetry, agent.id, delivery, entry):
                    return await agent.on_message(message, context)
        except BaseException as error:
            events.handler_failed(delivery.payload, agent=agent.id, error=error)
            raise

    def _process_span(
        self, telemetry: Telemetry, agent_id: AgentId, delivery: Delivery, entry: Entry
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


def _clip(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def _outline(error: BaseException) -> str:
    """An error for the log: class and places. Its text may quote a payload, so only natsrt's own texts are shown."""
    if isinstance(error, RemoteAgentError):
        return f"another agent's {error.error_type}"
    if isinstance(error, NatsrtError):
        return str(error)
    return f"{type(error).__qualname__}\n{''.join(traceback.format_tb(error.__traceback__))}".rstrip()
