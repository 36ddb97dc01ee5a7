"""Reads replies: returns the result of a call, or raises the error that the reply reports."""

from __future__ import annotations

from typing import Any

import orjson
from autogen_core import AgentId, UnknownPayload
from autogen_core.logging import DeliveryStage, MessageKind
from nats.aio.msg import Msg

from natsrt.errors import CannotDecode
from natsrt.observe import events
from natsrt.transport.bodies import Bodies
from natsrt.wire import envelope
from natsrt.wire.envelope import TYPE_HEADER
from natsrt.wire.failures import SERVICE_ERROR, SERVICE_ERROR_CODE, ErrorTypes, decode_answer
from natsrt.wire.message_classes import full_name
from natsrt.wire.references import Reference
from natsrt.wire.serialization import BYTES, JSON, PROTOBUF, Encoded, Serialization


class Replies:
    """Reads the replies that one runtime receives. Raises the error that a reply reports, and `CannotDecode`."""

    def __init__(self, bodies: Bodies, serialization: Serialization, error_types: ErrorTypes) -> None:
        self._bodies = bodies
        self._serialization = serialization
        self._error_types = error_types

    def unpack(self, reply: Msg) -> envelope.Envelope | None:
        """Return the envelope of a reply; None for a plain one. If it has a reference, `load` it next."""
        headers = reply.headers
        return self._bodies.unpack(reply.data) if headers is None else decode_answer(headers, reply.data)

    async def load(self, body: envelope.Envelope, reference: Reference) -> None:
        """Put the payload into a reply that has ``reference``. Nobody needs the stored one any more."""
        try:
            await self._bodies.load(body)
        finally:
            self._bodies.discard(reference)

    def result(
        self,
        body: envelope.Envelope | None,
        reply: Msg,
        sent: type[Any],
        reply_type: type[Any] | None,
        recipient: AgentId,
    ) -> Any:
        """Return the result of a call, for ``send_message``.

        ``body`` is the envelope of the reply, with its payload; None for a plain reply. ``sent`` is the class of the
        message that was sent. ``reply_type`` is the class of the reply; None means that the reply names its class. If
        the payload cannot be decoded, the result of `Envelope.general` is tried, if there is one. A caller that has
        sent an `Encoded` message gets the reply as one, whose type is empty if the reply does not name it.
        """
        if body is None:
            return self._plain_result(reply, sent, reply_type, recipient)
        self._check(body, reply, recipient)
        return self.message(body, sent, reply_type, recipient)

    def message(
        self, body: envelope.Envelope, sent: type[Any], reply_type: type[Any] | None, recipient: AgentId | str
    ) -> Any:
        """Return the message in a reply, in a part of one, or in the answer to a question.

        The arguments are as for `result`. ``recipient`` is a text if no agent was asked.
        """
        type_name = body.required("messagetype")
        if sent is Encoded:
            return Encoded(type_name, body.content_type, body.payload, body.text("messageclass"))
        try:
            result = self._serialization.reply(
                type_name, body.content_type, body.payload, body.text("messageclass"), sent, reply_type
            )
        except CannotDecode:
            general = body.general()
            if general is None:
                raise
            result = self._serialization.reply(
                type_name, general.content_type, general.payload, general.text("messageclass"), sent, reply_type
            )
        if isinstance(result, UnknownPayload):
            self._serialization.check_reply_type(
                type_name, body.content_type, body.payload, body.text("messageclass"), sent, reply_type
            )
            raise unknown_type(recipient, type_name, body.payload)
        if events.listening():
            events.message(
                body.payload,
                sender=recipient if isinstance(recipient, AgentId) else None,
                receiver=None,
                kind=MessageKind.RESPOND,
                stage=DeliveryStage.DELIVER,
            )
        return result

    def payload(self, body: envelope.Envelope | None, reply: Msg, recipient: AgentId) -> bytes:
        """Return the payload of a reply as it is. ``body`` is as in `result`."""
        if body is None:
            self._raise_service_error(reply, recipient)
            return reply.data
        self._check(body, reply, recipient)
        return body.payload

    def failure(self, reply: Msg, recipient: AgentId) -> BaseException | None:
        """Return the error that a reply to an event reports; None if it reports none.

        One of an unknown class is as in `ErrorTypes.as_base`. Raises `CannotDecode` as `answered` does.
        """
        try:
            self.answered(reply, recipient)
        except CannotDecode as error:
            if getattr(error, "natsrt_remote", None) is None:
                raise
            return error
        except BaseException as error:
            return self._error_types.as_base(error)
        return None

    def answered(self, reply: Msg, recipient: AgentId) -> envelope.Envelope:
        """Return the envelope of a reply. Raises `CannotDecode` for a plain reply."""
        body = self.unpack(reply)
        if body is None:
            self._raise_service_error(reply, recipient)
            raise CannotDecode(f"the reply of {recipient}", "it is not a natsrt reply", reply.data)
        self._check(body, reply, recipient)
        return body

    def _check(self, body: envelope.Envelope, reply: Msg, recipient: AgentId) -> None:
        """Raise the error that a reply reports."""
        if body.type == envelope.ERROR:
            raise self._error_types.rebuild(body.payload, agent=str(recipient), worker_id=body.text("workerid"))
        if body.type != envelope.REPLY:
            raise CannotDecode(f"the reply of {recipient}", f"its type is {body.type!r}", reply.data)

    def _raise_service_error(self, reply: Msg, recipient: AgentId) -> None:
        """Raise the error that a plain reply reports in the headers of NATS services (ADR-32), if there is one."""
        headers = reply.headers or {}
        text = headers.get(SERVICE_ERROR)
        if text is not None:
            text = f"{text} ({headers[SERVICE_ERROR_CODE]})" if SERVICE_ERROR_CODE in headers else text
            raise self._error_types.rebuild(reply.data, agent=str(recipient), worker_id=None, text=text)

    def _plain_result(self, reply: Msg, sent: type[Any], reply_type: type[Any] | None, recipient: AgentId) -> Any:
        """Return the reply of a plain NATS client.

        It is decoded as the type that its header names, else as ``reply_type`` if that is given. Otherwise the result
        is JSON values, text or bytes, the first that fits.
        """
        self._raise_service_error(reply, recipient)
        type_name = (reply.headers or {}).get(TYPE_HEADER)
        if sent is Encoded:
            return Encoded(type_name or "", JSON, reply.data, None)
        if type_name is not None:
            result = self._of_type(type_name, reply.data, sent, reply_type)
            if not isinstance(result, UnknownPayload):
                return result
            if reply_type is None:
                raise unknown_type(recipient, type_name, reply.data)
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

    def _of_type(self, type_name: str, payload: bytes, sent: type[Any], reply_type: type[Any] | None) -> Any:
        """Return a plain body of a type, in the content type in which that type can be read.

        The type may also be the full name of a class. The result is an ``UnknownPayload`` if the type is unknown.
        """
        result = self._of_name(type_name, None, payload, sent, reply_type)
        if isinstance(result, UnknownPayload):
            found = self._of_name(type_name.rpartition(".")[2], type_name, payload, sent, reply_type)
            if full_name(type(found)) == type_name:
                return found
        return result

    def _of_name(
        self, name: str, class_name: str | None, payload: bytes, sent: type[Any], reply_type: type[Any] | None
    ) -> Any:
        result: Any = None
        for content_type in dict.fromkeys((self._serialization.content_type_of(name), JSON, PROTOBUF, BYTES)):
            result = self._serialization.reply(name, content_type, payload, class_name, sent, reply_type)
            if not isinstance(result, UnknownPayload):
                break
        return result


def unknown_type(recipient: AgentId | str, type_name: str, payload: bytes) -> CannotDecode:
    """The error of a reply whose class is not known here."""
    generic = type_name.partition("[")[0] if type_name.endswith("]") else ""
    advice = (
        f"a class with type arguments is not found by its name: pass it as reply_type={type_name}, or have "
        f"the agent return {generic}(...)"
        if generic
        else "add its serializer with runtime.add_message_serializer, or pass its class as reply_type"
    )
    return CannotDecode(
        f"the reply of {recipient}",
        f"its type {type_name!r} is unknown here; {advice}",
        payload,
    )
