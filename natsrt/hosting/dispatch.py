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
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

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
from nats.aio.msg import Msg
from opentelemetry.context import Context

from natsrt.errors import (
    CannotDecode,
    NatsrtError,
    RemoteAgentError,
    UnhandledMessage,
    WorkerBusy,
    WorkerLost,
    WorkerStopped,
)
from natsrt.hosting.answers import Answer, Answers, id_of
from natsrt.hosting.catalog import Catalog, Gate, HostedType
from natsrt.hosting.control import carry_out_message
from natsrt.hosting.deadlocks import handling
from natsrt.hosting.fates import Fates
from natsrt.hosting.intake import CALL, CONTROL, EVENT, LOCATE, Entry, Intake
from natsrt.hosting.keyed import Keyed
from natsrt.hosting.mailbox import chain, chain_of
from natsrt.hosting.owning import NotOwned, OwnedElsewhere
from natsrt.hosting.reading import Delivery, Reading
from natsrt.hosting.sending import Sending
from natsrt.observe import events
from natsrt.observe.telemetry import Telemetry
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import Envelope
from natsrt.wire.serialization import Serialization
from natsrt.wire.subjects import Subjects, encode_text

logger = logging.getLogger("natsrt.hosting")


def _agent_variable() -> ContextVar[AgentId]:
    """The variable behind `MessageHandlerContext`, which AutoGen gives no public name.

    ``populate_context`` takes a microsecond, most of it to put back the old value; a handler's task ends instead.
    """
    mark = AgentId("mark", "mark")
    with MessageHandlerContext.populate_context(mark):
        return next(variable for variable, value in copy_context().items() if value is mark)


_handling_agent = _agent_variable()


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
        keyed: Keyed,
        sending: Sending,
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._options = options
        self._worker_id = worker_id
        self._answers = Answers(connection, options, worker_id)
        self._catalog = catalog
        self._serialization = serialization
        self._reading = reading
        self._fates = fates
        self._keyed = keyed
        self._sending = sending
        self._passing = sending.passing
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
        entry.task = asyncio.get_running_loop().create_task(work, name=entry.route.name)

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
        hosted = route.hosted
        began = time.perf_counter_ns()
        answer: Answer | None = None
        error: BaseException | None = None
        body: Envelope | None = None
        key: str | None = None
        try:
            body = envelope.decode(message.data)
            key, topic = self._reading.recipient(entry, body)
            if entry.kind is CONTROL:
                answer = await self._controlled(hosted, key, entry, body)
            elif key is not None:
                along: tuple[str, ...] = ()
                if body is not None and "chain" in body.attributes:
                    along = chain_of(body)
                    chain.set(along)
                if along or hosted.keyed is not None:
                    handling.set(entry)
                if entry.late and entry.kind is CALL and body is not None:
                    answer = self._send_back(AgentId(hosted.agent_type, key), entry, body, "it stood still")
                elif hosted.keyed is None:
                    answer = await self._handle(hosted, key, entry, body, topic)
                else:
                    answer = await self._handle_keyed(hosted, key, entry, body, topic, along)
        except BaseException as raised:  # a handler's BaseException is answered too, and must not end the event loop
            error = self._failed(raised, entry, body, key)
            if error is not None and entry.kind is not EVENT and message.reply:
                answer = self._failure(error, entry, body)
        if entry.waiting:
            self.intake.started(entry)
        if entry.kind is CALL or entry.kind is EVENT:
            hosted.statistics.record(began, error)
        try:
            if answer is not None and message.reply:
                await self._answer(entry, answer)
        finally:
            self._active.discard(entry)
            entry.task = None  # which refers to the entry, as `handling`

    def _failed(
        self, error: BaseException, entry: Entry, body: Envelope | None, key: str | None
    ) -> BaseException | None:
        """Note that a message failed. Returns what its caller is told; None where that was no failure.

        ``key`` is None where it failed before its agent was known.
        """
        if entry.kind is EVENT and key is not None:
            if body is None and isinstance(error, MessageDroppedException):
                return None
            if not self._options.ignore_unhandled_exceptions and self.background_error is None:
                self.background_error = error
        if isinstance(error, asyncio.CancelledError) and self._stopping:
            error = WorkerStopped(self._agent_of(entry, body)[0], self._worker_id)
        if isinstance(error, CannotDecode):
            self.undecodable += 1
        if entry.kind is EVENT or not entry.message.reply:
            logger.error("%s on %s failed: %s", entry.kind.value, _clip(entry.message.subject), _outline(error))
        return error

    def _failure(self, error: BaseException, entry: Entry, body: Envelope | None) -> Answer:
        return self._answers.failure(error, body is None, self._agent_of(entry, body)[1], id_of(body))

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
        answer = self._answers.failure(error, False, envelope.NO_AGENT, "-")
        await self._connection.publish(reply, answer.body, headers=answer.headers)

    def _refuse(self, entry: Entry) -> None:
        """The intake is full: say so, without starting anything."""
        if entry.pending is not None:
            self._fates.forget(entry.pending)
        error = WorkerBusy(entry.route.hosted.agent_type, self._worker_id, self.intake.pending_bytes)
        entry.pending = None
        self._run(entry, self._answer_refused(entry, error))

    async def _answer_refused(self, entry: Entry, error: WorkerBusy) -> None:
        plain, is_for_here = False, True
        try:
            body = envelope.decode(entry.message.data)
            plain = body is None
            is_for_here = self._reading.recipient(entry, body)[0] is not None
        except CannotDecode:
            pass
        try:
            if entry.kind is EVENT:
                if is_for_here:
                    self.intake.drop(entry)
            elif entry.message.reply:
                answer = self._answers.failure(error, plain, entry.route.name, "busy", refused=True)
                await self._answer(entry, answer)
        finally:
            self._active.discard(entry)

    def _agent_of(self, entry: Entry, body: Envelope | None) -> tuple[str, str]:
        """The agent of a message that failed, as text and as a ``source``: the route's name where it names no key."""
        if entry.kind is EVENT:
            return entry.route.name, entry.route.name
        agent_type = entry.route.hosted.agent_type
        try:
            key = self._reading.key(entry, body)
            return f"{agent_type}/{key}", f"{agent_type}/{encode_text(key)}"
        except ValueError:  # its key cannot be read, which may be what failed
            return entry.route.name, entry.route.name

    async def _handle(
        self, hosted: HostedType, key: str, entry: Entry, body: Envelope | None, topic: TopicId | None
    ) -> Answer | None:
        """Let the live agent here handle the message. The answer to a call; None for an event."""
        agent, delivery = self._admit_at_once(hosted, key, entry, body, topic) or (
            await self._admit_in_turn(hosted, key, entry, body, topic)
        )
        response = await self._invoke(hosted, agent, delivery, entry)
        return self._reply(response, delivery, body, hosted.agent_type, key) if topic is None else None

    def _reply(self, response: Any, delivery: Delivery, body: Envelope | None, agent_type: str, key: str) -> Answer:
        encoded = self._serialization.encode(response)
        if events.listening():
            events.message(
                encoded.payload,
                sender=AgentId(agent_type, key),
                receiver=delivery.context.sender,
                kind=MessageKind.RESPOND,
                stage=DeliveryStage.SEND,
            )
        return self._answers.reply(encoded, body, agent_type, key)

    async def _controlled(self, hosted: HostedType, key: str | None, entry: Entry, body: Envelope | None) -> Answer:
        if body is None or key is None:
            raise CannotDecode("a control message", f"expected {envelope.CONTROL}")
        if hosted.keyed is None:
            result = await carry_out_message(self._catalog, hosted, key, body)
        else:
            try:
                result = await self._keyed.control(hosted, key, entry, body)
            except OwnedElsewhere as owner:
                return _passed_on(
                    await self._passing.control_on(AgentId(hosted.agent_type, key), owner.worker_id, body)
                )
        return self._answers.control_reply(result, body, hosted.agent_type, key)

    # -- keyed agents --------------------------------------------------------------------------------------------

    async def _handle_keyed(
        self,
        hosted: HostedType,
        key: str,
        entry: Entry,
        body: Envelope | None,
        topic: TopicId | None,
        along: tuple[str, ...],
    ) -> Answer | None:
        """The same where the agent lives: here, or on the worker that owns it. ``along`` is the message's chain."""
        if entry.kind is EVENT and entry.pending is not None:  # a reply subject tells its publisher that it is lost
            self._fates.forget(entry.pending)
            entry.pending = None
        if entry.kind is LOCATE and body is not None:
            location = await self._keyed.owning.locate(hosted, key, along)
            return self._answers.control_reply(location._asdict(), body, hosted.agent_type, key)
        sent_to_owner = entry.kind is CALL and entry.route.key is not None and body is not None
        try:
            handle = partial(self._handle, hosted, key, entry, body, topic)
            return await self._keyed.owning.visit(hosted, key, along, handle, entry=entry, claim=not sent_to_owner)
        except NotOwned:
            return self._send_back(AgentId(hosted.agent_type, key), entry, body, "the agent left it")
        except OwnedElsewhere:
            return await self._pass_on(AgentId(hosted.agent_type, key), hosted, entry, body, topic)

    def _send_back(self, agent: AgentId, entry: Entry, body: Envelope | None, reason: str) -> Answer:
        """Refuse a call that is not for this worker any more; its caller sends it again, if it still waits.

        It may have waited here for so long, while this worker stood still, that its caller knows from all others that
        nobody received it, and has sent it again already. Handled or passed on, it would count twice.
        """
        if entry.pending is not None:
            self._fates.forget(entry.pending)
            entry.pending = None
        error = WorkerLost(str(agent), self._worker_id, reason)
        return self._answers.failure(error, False, entry.route.name, id_of(body), refused=True)

    async def _pass_on(
        self, agent: AgentId, hosted: HostedType, entry: Entry, body: Envelope | None, topic: TopicId | None
    ) -> Answer | None:
        """Send a message to the owner of its agent, for a sender that did not know him."""
        self.intake.started(entry)
        if topic is None:
            return _passed_on(await self._passing.call_on(agent, entry.message, body))
        if body is None:  # a plain event becomes one of ours on the way
            delivery = await self._reading.plain_delivery(hosted, agent.key, entry, topic)
            await self._sending.publish_to(agent, delivery.message, topic, delivery.context.message_id)
        else:
            await self._passing.event_on(agent, topic, body)
        return None

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
        _handling_agent.set(agent.id)
        try:
            if self.telemetry is None or (trace := self.telemetry.continued(delivery.attributes)) is None:
                return await agent.on_message(message, context)
            with self._process_span(self.telemetry, trace, agent.id, delivery, entry):
                return await agent.on_message(message, context)
        except BaseException as error:
            events.handler_failed(delivery.payload, agent=agent.id, error=error)
            raise

    def _process_span(
        self, telemetry: Telemetry, trace: Context, agent_id: AgentId, delivery: Delivery, entry: Entry
    ) -> AbstractContextManager[Any]:
        return telemetry.processing(
            trace,
            delivery.attributes,
            subject=_clip(entry.message.subject),
            destination=self._subjects.agent(agent_id.type),
            agent=agent_id,
            message_type=delivery.type_name,
            size=entry.size,
            arrived=entry.arrived,
        )

    @staticmethod
    def _has_default_unhandled(agent: Agent) -> bool:
        return isinstance(agent, RoutedAgent) and (
            type(agent).on_unhandled_message is RoutedAgent.on_unhandled_message
            and type(agent).on_message_impl is RoutedAgent.on_message_impl
        )


def _passed_on(reply: Msg) -> Answer:
    """The owner's reply as the answer to the message that was passed on to it."""
    return Answer(reply.data, reply.headers)


def _task_of(entry: Entry) -> asyncio.Task[None]:
    assert entry.task is not None
    return entry.task


def _clip(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def _outline(error: BaseException) -> str:
    """An error for the log: class and places. Its text may quote a payload, so only natsrt's own texts are shown."""
    if isinstance(error, RemoteAgentError):
        return f"another agent's {error.error_type}"
    if isinstance(error, NatsrtError):
        return str(error)
    return f"{type(error).__qualname__}\n{''.join(traceback.format_tb(error.__traceback__))}".rstrip()
