"""What a worker answers: replies and failures as bodies, ready to be sent."""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from natsrt.errors import CannotDecode, MessageTooLarge
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import Envelope, quote
from natsrt.wire.failures import describe
from natsrt.wire.serialization import Encoded
from natsrt.wire.subjects import encode_text

WORKER_EXTENSION = "workerid"
"""Extension of a reply that names the worker which answered."""

_REMEMBERED = 4096
"""Agents and message types whose attributes are not written again."""
_LONGEST = 1024
"""Characters of what is remembered, so that this stays small."""


@dataclass(slots=True)
class Answer:
    body: bytes
    headers: dict[str, str] | None = None


class Answers:
    """Writes the answers of one worker."""

    def __init__(self, connection: Connection, options: Options, worker_id: str) -> None:
        self._connection = connection
        self._with_tracebacks = options.send_tracebacks
        self._worker_attribute = envelope.attribute(WORKER_EXTENSION, worker_id)
        self._constant: dict[tuple[str, str, str], str] = {}
        """The attributes of replies that are the same for all of an agent's replies of one type."""

    def reply(self, encoded: Encoded, body: Envelope | None, agent_type: str, key: str) -> Answer:
        """The reply to ``body`` (None: to a plain call). Raises `MessageTooLarge`."""
        if body is None:
            answer = Answer(encoded.payload)
        else:
            constant = self._constant.get((agent_type, key, encoded.type_name))
            if constant is None:
                constant = self._remember(agent_type, key, encoded.type_name)
            attributes = f'"id":{quote(id_of(body) + "-r")},{constant}'
            answer = Answer(envelope.encode(envelope.REPLY, attributes, encoded.payload, encoded.content_type))
        self._connection.check_size(answer.body)
        return answer

    def control_reply(self, result: object, body: Envelope, agent_type: str, key: str) -> Answer:
        """The reply to a control message. Raises `CannotDecode` for what is no JSON, and `MessageTooLarge`."""
        try:
            payload = orjson.dumps(result)
        except TypeError as error:
            raise CannotDecode("a control result", f"an agent's state must be JSON: {error}") from None
        attributes = self._attributes(id_of(body), f"{agent_type}/{encode_text(key)}")
        answer = Answer(envelope.encode(envelope.REPLY, attributes, payload))
        self._connection.check_size(answer.body)
        return answer

    def failure(
        self, error: BaseException, plain: bool, recipient: str, call_id: str, *, refused: bool = False
    ) -> Answer:
        """What tells the caller of ``error``, without its traceback where it would be too large."""
        with_traceback = self._with_tracebacks
        answer = self._failure(error, plain, recipient, call_id, with_traceback=with_traceback, refused=refused)
        try:
            self._connection.check_size(answer.body, answer.headers)
        except MessageTooLarge as too_large:  # said without what may be long: traceback, and names from the message
            return self._failure(too_large, plain, envelope.NO_AGENT, "-", with_traceback=False, refused=False)
        return answer

    def _failure(
        self, error: BaseException, plain: bool, recipient: str, call_id: str, *, with_traceback: bool, refused: bool
    ) -> Answer:
        failure = describe(error, with_traceback=with_traceback, refused=refused)
        if plain:
            return Answer(failure.payload, failure.headers)
        attributes = self._attributes(call_id, recipient)
        return Answer(envelope.encode(envelope.ERROR, attributes, failure.payload), failure.headers)

    def _remember(self, agent_type: str, key: str, type_name: str) -> str:
        source = f"{agent_type}/{encode_text(key)}"
        constant = f"{self._from(source)},{envelope.attribute('messagetype', type_name)}"
        if len(constant) <= _LONGEST:
            if len(self._constant) >= _REMEMBERED:
                self._constant.clear()
            self._constant[agent_type, key, type_name] = constant
        return constant

    def _attributes(self, call_id: str, source: str) -> str:
        return f'"id":{quote(call_id + "-r")},{self._from(source)}'

    def _from(self, source: str) -> str:
        return f'"source":{quote(source)},{self._worker_attribute}'


def id_of(body: Envelope | None) -> str:
    """The call's id for its reply."""
    return "-" if body is None else body.attributes.get("id", "-")
