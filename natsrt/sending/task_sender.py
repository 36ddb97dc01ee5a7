"""Submits tasks: calls that the stream of tasks stores until they are handled. See `natsrt.task_types`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

from autogen_core import AgentId
from autogen_core.logging import DeliveryStage, MessageKind

from natsrt.agents.interventions import Interventions
from natsrt.errors import EventNotStored, StreamUnavailable
from natsrt.jetstream.registry.registry import Registry
from natsrt.observe import events
from natsrt.observe.metrics import Counters
from natsrt.options import Options
from natsrt.sending.attributes import MessageAttributes
from natsrt.sending.event_sender import EventSender
from natsrt.sending.ready_bodies import checked_json, ready_message, untyped_message
from natsrt.sending.steps import SendSteps, send_context
from natsrt.sending.tickets import Ticket, Tickets, cancel_id
from natsrt.task_types import TaskId
from natsrt.wire.serialization import Encoded, Serialization
from natsrt.wire.subjects import Subjects, encode_text
from natsrt.wire.task_attributes import task_attributes

logger: logging.Logger = logging.getLogger("natsrt.tasks")

_AGAIN: Final = 0.25
"""Seconds between two looks whether a task has a result."""


class TaskSender:
    """Submits the tasks of one runtime."""

    def __init__(
        self,
        *,
        steps: SendSteps,
        subjects: Subjects,
        options: Options,
        registry: Registry,
        serialization: Serialization,
        interventions: Interventions,
        events: EventSender,
        tickets: Tickets,
        attributes: MessageAttributes,
        counters: Counters,
    ) -> None:
        self._steps = steps
        self._subjects = subjects
        self._publish_timeout = options.publish_timeout
        self._registry = registry
        self._serialization = serialization
        self._interventions = interventions
        self._events = events
        self._tickets = tickets
        self._attributes = attributes
        self._counters = counters

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
        `EventSender.publish`.
        """
        self._steps.under_way += 1
        try:
            begun = asyncio.get_running_loop().time()
            self._counters.sent += 1
            task = TaskId.new(recipient) if message_id is None else TaskId.of(recipient, message_id)
            if message_id is not None:
                await self._steps.wait_ready(None, begun)
                if await self._has_result(task, begun):
                    return self._tickets.ticket(task, type(message))
            async with self._steps.queue.turn(None) as turn:
                await self._steps.wait_ready(None, begun)
                if self._interventions.handlers:
                    context = send_context(sender, None, None, task.message_id)
                    message = await turn.intervene(self._interventions.on_send(message, context, recipient))
                encoded = self._serialization.encode(message)
                chosen = message_id is not None
                await self._store(encoded, task, sender, due, attempts, result_ttl, chosen, turn.end)
            return self._tickets.ticket(task, type(message))
        finally:
            self._steps.under_way -= 1

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
        encoded = untyped_message(body) if type_name is None else ready_message(checked_json(body), type_name)
        self._counters.sent += 1
        task = TaskId.new(recipient) if message_id is None else TaskId.of(recipient, message_id)
        chosen = message_id is not None
        if not chosen or not await self._has_result(task, asyncio.get_running_loop().time()):
            async with self._steps.queue.turn(None) as turn:
                await self._store(encoded, task, None, due, attempts, result_ttl, chosen, turn.end)
        return task

    async def _has_result(self, task: TaskId, begun: float) -> bool:
        """True if a task has a result, so that it is not submitted again.

        ``begun`` is when its submitter began to wait, by the event loop's clock. Raises `EventNotStored` if that cannot
        be found out within ``publish_timeout`` seconds.
        """
        while True:
            try:
                return await self._tickets.has_result(task)
            except StreamUnavailable as error:
                if asyncio.get_running_loop().time() > begun + self._publish_timeout:
                    stream = self._registry.view.durable_stream(task.topic.type) or error.stream
                    reason = f"it is not known whether the task has a result: {error}"
                    raise EventNotStored(str(task.topic), stream, reason, may_be_stored=False) from error
                logger.debug("%s", error)
                await asyncio.sleep(_AGAIN)

    async def _store(
        self,
        encoded: Encoded,
        task: TaskId,
        sender: AgentId | None,
        due: datetime | None,
        attempts: int | None,
        result_ttl: float,
        chosen: bool,
        sent: Callable[[], None],
    ) -> None:
        topic = task.topic
        subject = self._subjects.topic(topic.type, topic.source)
        attributes = self._attributes.message(task.message_id, sender, encoded, None)
        attributes += task_attributes(encode_text(task.agent.key), cancel_id(task), result_ttl, attempts, chosen=chosen)
        if events.listening():
            events.message(
                encoded.payload, sender=sender, receiver=task.agent, kind=MessageKind.DIRECT, stage=DeliveryStage.SEND
            )
        await self._events.send_encoded(
            "submit", subject, topic, sender, task.message_id, attributes, encoded, due, sent
        )
