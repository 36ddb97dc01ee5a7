"""Runs the handler of an agent for a message whose address has been read.

Rules:

1. The agent is found, or created by its factory, before the message is decoded, because the message types that the
   agent's class handles are known only then.
2. If an agent must be created for a message, the serializer of the message is still missing, or its payload must be
   loaded, because it is sent by reference, later messages for that agent wait too. They queue at the agent's gate and
   start in the order in which they arrived.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable
from contextlib import AbstractContextManager
from contextvars import ContextVar, copy_context
from typing import Any

from autogen_core import Agent, AgentId, MessageHandlerContext, RoutedAgent, UnknownPayload
from autogen_core.logging import DeliveryStage, MessageKind
from opentelemetry.context import Context

from natsrt.agents.catalog import Catalog
from natsrt.agents.chain import current_chain, current_handler
from natsrt.agents.hosted_type import Gate
from natsrt.agents.inbound import Answer, Inbound
from natsrt.agents.streaming import emits_to
from natsrt.errors import UnhandledMessage
from natsrt.hosting.answers import Answers
from natsrt.hosting.intake import Intake
from natsrt.hosting.places import Places
from natsrt.hosting.reader import Delivery, Reader
from natsrt.hosting.settlements import clip
from natsrt.hosting.streams import Streams
from natsrt.observe import events
from natsrt.observe.first import FirstIsWarning
from natsrt.observe.metrics import Counters
from natsrt.observe.telemetry import Telemetry
from natsrt.transport.bodies import Bodies
from natsrt.wire.known_classes import NO_CLASSES, NamedClasses
from natsrt.wire.message_classes import full_name
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.hosting")


def _agent_variable() -> ContextVar[AgentId]:
    """Find the context variable of `MessageHandlerContext`, for which AutoGen has no public name.

    ``populate_context`` takes a microsecond, most of it to restore the old value. This is not needed here, because the
    task ends with the handler.
    """
    mark = AgentId("mark", "mark")
    with MessageHandlerContext.populate_context(mark):
        return next(variable for variable, value in copy_context().items() if value is mark)


_handling_agent = _agent_variable()


class Invoker:
    """Runs the handlers of one worker's agents."""

    def __init__(
        self,
        *,
        subjects: Subjects,
        catalog: Catalog,
        reader: Reader,
        intake: Intake,
        answers: Answers,
        counters: Counters,
        telemetry: Telemetry | None,
        places: Places,
        bodies: Bodies,
        streams: Streams,
    ) -> None:
        self._places = places
        self._streams = streams
        self._bodies = bodies
        self._subjects = subjects
        self._catalog = catalog
        self._reader = reader
        self._intake = intake
        self._answers = answers
        self._counters = counters
        self._telemetry = telemetry
        self._first = FirstIsWarning()

    def handle(self, inbound: Inbound) -> Awaitable[Answer | None]:
        """Let an agent of this process handle a call or an event. Await the answer; None if the sender wants none.

        Raises any exception of the handler, any error in creating the agent, decoding the message or writing the
        answer, and `SentBack` if the caller does not wait any more.
        """
        is_limited = self._places.limits_all or inbound.route.hosted.max_running is not None
        if is_limited and not inbound.is_out_of_turn:  # that a handler runs must not keep those out that may stop it
            return self._handle_in_place(inbound)
        return self._handle(inbound)

    async def _handle(self, inbound: Inbound) -> Answer | None:
        agent, delivery = self._admit_at_once(inbound) or await self._admit_in_turn(inbound)
        if "partsto" in delivery.attributes and inbound.call is not None:
            inbound.stream = self._streams.open(inbound, delivery.context)
        elif inbound.body is None and inbound.streams_plainly:
            return await self._handle_for_plain_client(agent, delivery, inbound)
        elif emits_to.get() is not None:  # this worker was started by a handler that streams
            emits_to.set(None)
        try:
            response = await self._invoke(agent, delivery, inbound)
        finally:
            if inbound.stream is not None:
                inbound.stream.end()
        if not inbound.settlement.wants_answer:
            return None
        assert inbound.key is not None
        answer = self._answers.reply(
            response,
            inbound.body,
            inbound.route.hosted.agent_type,
            inbound.key,
            delivery.context.sender,
            inbound.settlement.kept_for(inbound),
            "" if inbound.stream is None else inbound.stream.attributes,
        )
        return answer if isinstance(answer, Answer) else await answer

    async def _handle_for_plain_client(self, agent: Agent, delivery: Delivery, inbound: Inbound) -> Answer:
        stream = inbound.stream = self._streams.open_plain(inbound, delivery.context)
        try:
            return await stream.ended_with(await self._invoke(agent, delivery, inbound))
        finally:
            stream.end()

    async def _handle_in_place(self, inbound: Inbound) -> Answer | None:
        """Do what `handle` does when the handler may start: see `natsrt.hosting.places`.

        A call that nobody waits for any more waits no longer, nor does a message that its settlement gives back.
        """
        hosted, call, loop = inbound.route.hosted, inbound.call, asyncio.get_running_loop()
        place = self._places.place(hosted, inbound.chain if call is not None else ())
        inbound.settlement.waits_for_place(inbound, place.refuse)
        expiry: asyncio.TimerHandle | None = None
        if call is not None:
            call.on_abandoned = lambda: place.refuse(inbound.unwanted())
            if call.wanted_until < math.inf:
                expiry = loop.call_at(call.wanted_until, lambda: place.refuse(inbound.unwanted()))
        try:
            await self._places.enter(place, hosted.agent_type)
        finally:
            if call is not None:
                call.on_abandoned = None
            if expiry is not None:
                expiry.cancel()
        outer_chain = current_chain.set((*current_chain.get(), place.handler_id))
        outer_handler = current_handler.set(place.inside(current_handler.get()))
        try:
            return await self._handle(inbound)
        finally:
            current_handler.reset(outer_handler)
            current_chain.reset(outer_chain)
            self._places.leave(place)

    # -- agent and message ---------------------------------------------------------------------------------------

    def _admit_at_once(self, inbound: Inbound) -> tuple[Agent, Delivery] | None:
        """Return the agent and its delivery; None if something must be awaited, or if messages wait at the gate."""
        hosted, key, body = inbound.route.hosted, inbound.key, inbound.body
        assert key is not None
        agent = hosted.live.get(key)
        if agent is None or body is None or key in hosted.gates or body.reference is not None:
            return None
        delivery = self._reader.delivery(body, inbound.topic, hosted.handled_by.get(type(agent), NO_CLASSES))
        if not delivery.registered and hosted.settling:
            return None
        self._intake.started(inbound)
        return agent, delivery

    async def _admit_in_turn(self, inbound: Inbound) -> tuple[Agent, Delivery]:
        """Return the agent and its delivery, after waiting for the agent, for the serializer, and for a payload that is
        sent by reference, in the order of arrival.
        """
        hosted, key, body = inbound.route.hosted, inbound.key, inbound.body
        assert key is not None
        gate = hosted.gates.get(key)
        if gate is None:
            gate = hosted.gates[key] = Gate()
        gate.users += 1
        try:
            async with gate.lock:
                agent = await self._catalog.agent(hosted, key)
                handled = hosted.handled_by.get(type(agent), NO_CLASSES)
                if body is None:
                    delivery = await self._reader.plain_delivery(inbound, AgentId(hosted.agent_type, key), handled)
                else:
                    if body.reference is not None:
                        inbound.token = self._reader.token(body)
                        inbound.refuse_unwanted()
                        await self._bodies.load(body)
                    await self._catalog.wait_for_serializer(
                        hosted, body.required("messagetype"), body.text("messageclass")
                    )
                    delivery = self._reader.delivery(body, inbound.topic, handled)
                self._intake.started(inbound)
                return agent, delivery
        finally:
            gate.users -= 1
            if not gate.users:
                hosted.gates.pop(key, None)

    # -- the handler ---------------------------------------------------------------------------------------------

    async def _invoke(self, agent: Agent, delivery: Delivery, inbound: Inbound) -> Any:
        message, context = delivery.message, delivery.context
        inbound.token = context.cancellation_token
        if inbound.call is not None and (inbound.call.wanted_until != math.inf or "cancelid" in delivery.attributes):
            inbound.refuse_unwanted()
        if not delivery.registered:
            self._check_unregistered(agent, delivery, inbound)
        if events.listening():
            events.message(
                delivery.payload,
                sender=context.sender,
                receiver=agent.id if context.is_rpc else None,
                kind=MessageKind.DIRECT if context.is_rpc else MessageKind.PUBLISH,
                stage=DeliveryStage.DELIVER,
            )
        if inbound.settlement.looks_before_handlers:
            await inbound.settlement.begins(inbound)
        _handling_agent.set(agent.id)
        inbound.begun = True
        try:
            if self._telemetry is None or (trace := self._telemetry.continued(delivery.attributes)) is None:
                return await agent.on_message(message, context)
            with self._process_span(self._telemetry, trace, agent.id, delivery, inbound):
                return await agent.on_message(message, context)
        except BaseException as error:
            events.handler_failed(delivery.payload, agent=agent.id, error=error)
            raise

    def _check_unregistered(self, agent: Agent, delivery: Delivery, inbound: Inbound) -> None:
        """Log and count a message without a serializer. Raises `UnhandledMessage` for a call that nothing handles.

        An event goes to the agent, as in AutoGen: its ``on_unhandled_message`` logs it, or does what its user wants.
        """
        unknown = type(delivery.message) is UnknownPayload
        self._counters.unknown_payloads += 1
        if not _has_default_unhandled(agent):
            return
        agent_type, type_name = inbound.route.hosted.agent_type, clip(delivery.type_name)
        if unknown or delivery.context.is_rpc:
            level = self._first.level(agent_type, type_name)
            logger.log(level, "%s does not know messages of type %s", agent.id, type_name)
        if delivery.context.is_rpc:
            raise _unhandled(agent, delivery, inbound.route.hosted.handles)

    def _process_span(
        self, telemetry: Telemetry, trace: Context, agent_id: AgentId, delivery: Delivery, inbound: Inbound
    ) -> AbstractContextManager[Any]:
        return telemetry.processing(
            trace,
            delivery.attributes,
            subject=clip(inbound.message.subject),
            destination=self._subjects.agent(agent_id.type),
            agent=agent_id,
            message_type=delivery.type_name,
            size=len(inbound.message.data),
            arrived=inbound.arrived,
        )


def _unhandled(agent: Agent, delivery: Delivery, handles: NamedClasses) -> UnhandledMessage:
    """The error of a message that the agent does not handle. It has full names where the plain ones do not differ."""
    name, names = delivery.type_name, list(handles.names)
    class_name = delivery.attributes.get("messageclass")
    if class_name is not None and (namesakes := handles.named(name)):
        names = [one for one in names if one != name] + sorted(map(full_name, namesakes))
        name = class_name
    return UnhandledMessage(str(agent.id), name, names)


def _has_default_unhandled(agent: Agent) -> bool:
    """True if the agent has AutoGen's default ``on_unhandled_message``, which only logs."""
    return isinstance(agent, RoutedAgent) and (
        type(agent).on_unhandled_message is RoutedAgent.on_unhandled_message
        and type(agent).on_message_impl is RoutedAgent.on_message_impl
    )
