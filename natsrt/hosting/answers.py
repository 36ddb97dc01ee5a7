"""The answers of a worker: replies and failures as bodies that are ready to be sent."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Final

import orjson
from autogen_core import AgentId
from autogen_core.logging import DeliveryStage, MessageKind

from natsrt.agents.inbound import Answer
from natsrt.errors import CannotDecode, MessageTooLarge
from natsrt.jetstream.task_store import result_headers
from natsrt.observe import events
from natsrt.options import Options
from natsrt.task_types import TaskId
from natsrt.transport.bodies import Bodies
from natsrt.transport.headers import headers_size
from natsrt.wire import envelope
from natsrt.wire.envelope import Envelope, quote
from natsrt.wire.failures import ErrorTypes, Failure, describe, describe_within
from natsrt.wire.serialization import Encoded, Serialization
from natsrt.wire.serializers import JSON
from natsrt.wire.subjects import encode_text
from natsrt.wire.task_attributes import MOST

WORKER_EXTENSION = "workerid"
"""Envelope extension of a reply with the id of the worker that sent it."""

_REMEMBERED = 4096
"""Maximum number of pairs of agent and message type whose attributes are cached as text; a few hundred kilobytes."""
_LONGEST = 1024
"""Maximum length of a cached text in characters, which limits the size of the cache."""

_LONGEST_PLAIN_ID: Final = "x" * 200
"""In place of the id of a plain task."""
_OF_STREAM: Final = 256
"""Bytes of the headers that say in which stream a result is stored, and what it follows there."""


class Answers:
    """Writes the answers of one worker."""

    def __init__(
        self,
        bodies: Bodies,
        serialization: Serialization,
        error_types: ErrorTypes,
        options: Options,
        worker_id: str,
    ) -> None:
        self._bodies = bodies
        self._serialization = serialization
        self._error_types = error_types
        self._with_tracebacks = options.send_tracebacks
        self._blob_ttl = options.blob_ttl
        self._worker_id = worker_id
        self._worker_attribute = envelope.attribute(WORKER_EXTENSION, worker_id)
        self._constant: dict[tuple[str, str, str, str | None], str] = {}
        """The attributes that are the same in all replies of one message type from one agent."""

    def reply(
        self,
        response: object,
        body: Envelope | None,
        agent_type: str,
        key: str,
        caller: AgentId | None,
        kept_for: float | None = None,
        more: str = "",
    ) -> Answer | Awaitable[Answer]:
        """Return the reply of the agent ``agent_type/key`` to a call. If it is sent by reference, await it.

        ``body`` is the envelope of the call, None for a plain call. ``caller`` is the agent that sent the call, None if
        no agent did. ``kept_for``: seconds for which the reply is kept; None: until its caller has read it. ``more``
        are further attributes, with a leading comma. Raises `CannotSerialize` and `MessageTooLarge`.
        """
        encoded = self._serialization.encode(response)
        if events.listening():
            events.message(
                encoded.payload,
                sender=AgentId(agent_type, key),
                receiver=caller,
                kind=MessageKind.RESPOND,
                stage=DeliveryStage.SEND,
            )
        room = 0
        if kept_for is not None and len(encoded.payload) > self._bodies.surely_fits:
            room = self._of_result(AgentId(agent_type, key), body)
        if body is None:
            return Answer(self._bodies.pack_plain(encoded.payload, more=room))
        attributes = f'"id":{quote(_id_of(body) + "-r")},{self._names(agent_type, key, encoded)}{more}'
        return self._message(envelope.REPLY, attributes, body, encoded, kept_for, room)

    def part(
        self, encoded: Encoded, number: int, body: Envelope, agent_type: str, key: str, more: str = ""
    ) -> Answer | Awaitable[Answer]:
        """Return a part of the reply of the agent ``agent_type/key`` to a call with the envelope ``body``.

        If it is sent by reference, await it. ``more`` is as in `reply`. Raises `MessageTooLarge`.
        """
        part_id = quote(f"{_id_of(body)}-p{number}")
        attributes = f'"id":{part_id},"part":"{number}",{self._names(agent_type, key, encoded)}{more}'
        return self._message(envelope.PART, attributes, body, encoded, None)

    def _names(self, agent_type: str, key: str, encoded: Encoded) -> str:
        """The attributes that are the same in all messages of one class from one agent."""
        constant = self._constant.get((agent_type, key, encoded.type_name, encoded.class_name))
        if constant is None:
            constant = self._remember(agent_type, key, encoded.type_name, encoded.class_name)
        return constant

    def _message(
        self, kind: str, attributes: str, body: Envelope, encoded: Encoded, kept_for: float | None, room: int = 0
    ) -> Answer | Awaitable[Answer]:
        if len(encoded.payload) > self._bodies.surely_fits and not self._bodies.fits(
            kind, attributes, encoded.payload, encoded.content_type, room
        ):
            return self._by_reference(kind, body, attributes, encoded, kept_for)
        return Answer(self._bodies.pack(kind, attributes, encoded.payload, encoded.content_type))

    async def _by_reference(
        self, kind: str, body: Envelope, attributes: str, encoded: Encoded, kept_for: float | None
    ) -> Answer:
        """Store the payload of a reply. Its caller, whose call has the envelope ``body``, deletes it, unless it is kept
        for some time."""
        if kept_for is not None:
            kept_for += self._blob_ttl  # it is stored before the reply, and loaded after the reply was read
        elif envelope.BLOBS_FEATURE not in (body.text("features") or "").split():
            limit = self._bodies.max_payload
            raise MessageTooLarge(
                len(encoded.payload),
                limit,
                f"but one message may have {limit:,}, and its caller did not say that it reads payloads by reference",
            )
        reference = await self._bodies.store(encoded.payload, kept_for)
        return Answer(self._bodies.pack_reference(kind, attributes, reference, encoded.content_type))

    def control_reply(self, result: object, body: Envelope, agent_type: str, key: str) -> Answer:
        """Return the reply to a question, or to a control message whose result is small.

        Raises `CannotDecode` if ``result`` cannot be written as JSON, and `MessageTooLarge`.
        """
        attributes = self._attributes(_id_of(body), f"{agent_type}/{encode_text(key)}")
        return Answer(self._bodies.pack(envelope.REPLY, attributes, _control_payload(result)))

    async def control_result(self, result: object, body: Envelope, agent_type: str, key: str) -> Answer:
        """Return the reply to a control message, which may be a state of any size. Raises as `reply` and
        `control_reply`.
        """
        attributes = self._attributes(_id_of(body), f"{agent_type}/{encode_text(key)}")
        payload = _control_payload(result)
        if len(payload) > self._bodies.surely_fits and not self._bodies.fits(envelope.REPLY, attributes, payload, JSON):
            return await self._by_reference(envelope.REPLY, body, attributes, Encoded("", JSON, payload, None), None)
        return Answer(self._bodies.pack(envelope.REPLY, attributes, payload))

    def failure(
        self,
        error: BaseException,
        body: Envelope | None,
        source: str,
        *,
        refused: bool = False,
        more: str = "",
        agent: AgentId | None = None,
    ) -> Answer:
        """Return the answer that reports ``error`` to the caller. If it would be too large, it is cut.

        ``body`` is the envelope of the call, None for a plain call. ``source`` names the agent as in an envelope's
        ``source``. ``refused`` is True if the call was not handled and can be sent again. ``more`` is as in `reply`.
        ``agent`` is as in `describe`; the answer is the result of its task.
        """
        room = 0 if agent is None else self._of_result(agent, body)
        plain, call_id = body is None, _id_of(body)
        try:
            return describe_within(
                error,
                lambda failure: self._failure(failure, plain, source, call_id, more, room),
                with_traceback=self._with_tracebacks,
                refused=refused,
                types=self._error_types,
                agent=None if agent is None else str(agent),
            )
        except MessageTooLarge as too_large:
            # Without the names from the message, which may be long too.
            return self._failure(describe(too_large, with_traceback=False), plain, envelope.NO_AGENT, "-", more)

    def passed_on(self, error: BaseException, body: Envelope | None, agent: AgentId) -> Answer:
        """Return the answer that reports ``error`` of a task for ``agent``: as the agent's worker has sent it, if it
        has; else as `failure` does.
        """
        return self.failure(error, body, f"{agent.type}/{encode_text(agent.key)}", agent=agent)

    def not_for_an_agent(self, error: BaseException) -> Answer:
        """Return the answer that reports ``error`` to the sender of a message that is not for an agent."""
        failure = describe(error, with_traceback=self._with_tracebacks, types=self._error_types)
        return self._failure(failure, False, envelope.NO_AGENT, "-")

    def _failure(
        self, failure: Failure, plain: bool, source: str, call_id: str, more: str = "", room: int = 0
    ) -> Answer:
        if plain:
            return Answer(self._bodies.pack_plain(failure.payload, failure.headers, room), failure.headers)
        attributes = self._attributes(call_id, source) + more
        body = self._bodies.pack(envelope.ERROR, attributes, failure.payload, headers=failure.headers, more=room)
        return Answer(body, failure.headers)

    def _of_result(self, agent: AgentId, body: Envelope | None) -> int:
        """Bytes that the result of a task takes in addition to the answer that it is: the headers with which it is
        stored. ``body`` is the envelope of the task, None for a plain one."""
        task = TaskId(agent, _LONGEST_PLAIN_ID if body is None else _id_of(body))
        return headers_size(result_headers(task, "cancelled", MOST, self._worker_id, MOST)) + _OF_STREAM

    def _remember(self, agent_type: str, key: str, type_name: str, class_name: str | None) -> str:
        source = f"{agent_type}/{encode_text(key)}"
        constant = f"{self._from(source)},{envelope.message_names(type_name, class_name)}"
        if len(constant) <= _LONGEST:
            if len(self._constant) >= _REMEMBERED:
                self._constant.clear()
            self._constant[agent_type, key, type_name, class_name] = constant
        return constant

    def _attributes(self, call_id: str, source: str) -> str:
        return f'"id":{quote(call_id + "-r")},{self._from(source)}'

    def _from(self, source: str) -> str:
        return f'"source":{quote(source)},{self._worker_attribute}'


def _control_payload(result: object) -> bytes:
    try:
        return orjson.dumps(result)
    except TypeError as error:
        raise CannotDecode("a control result", f"an agent's metadata must be JSON: {error}") from None


def _id_of(body: Envelope | None) -> str:
    return "-" if body is None else body.attributes.get("id", "-")
