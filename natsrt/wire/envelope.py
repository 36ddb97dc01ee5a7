"""The bodies of natsrt messages: CloudEvents 1.0 in the JSON event format, with ``data`` last.

Rules:

1. A natsrt body is ``{"specversion":"1.0",<attributes>,"data":<payload>}``. A quote inside a JSON string is always
   escaped, so the first ``,"data":`` ends the attributes, and the payload is cut out exactly as the sender's
   serializer wrote it. A payload that is not JSON is put into ``data_base64`` (CloudEvents JSON format, §3.1.1).
2. A body in another order is parsed as a whole. Its payload is then the JSON text of its ``data``.
3. A body whose ``type`` does not start with ``natsrt.`` is a *plain* body: the body itself is the payload.
4. A malformed natsrt body raises `CannotDecode`. It is never treated as a plain body.
5. A payload that is too large for one message is stored elsewhere. Its body has a reference in place of ``data``: see
   `natsrt.wire.references`.

All functions in this module are pure functions of bytes, without I/O or state.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from dataclasses import dataclass
from typing import Any, Final

import orjson

from natsrt.errors import CannotDecode
from natsrt.wire import references
from natsrt.wire.references import DATA_REF, Reference, reference_in
from natsrt.wire.subjects import MAX_SUBJECT_BYTES

CALL: Final = "natsrt.call"
REPLY: Final = "natsrt.reply"
ERROR: Final = "natsrt.error"
ACCEPTED: Final = "natsrt.accepted"
EVENT: Final = "natsrt.event"
CONTROL: Final = "natsrt.control"
FATE: Final = "natsrt.fate"
SERVE: Final = "natsrt.serve"
CANCEL: Final = "natsrt.cancel"
LOCATE: Final = "natsrt.locate"
OWNER: Final = "natsrt.owner"
WAITS: Final = "natsrt.waits"
ABANDONED: Final = "natsrt.abandoned"
WITHDRAWN: Final = "natsrt.withdrawn"
VIEW: Final = "natsrt.view"
BLOBS: Final = "natsrt.blobs"
TASKS: Final = "natsrt.tasks"
PART: Final = "natsrt.part"
ANSWER: Final = "natsrt.answer"
MORE: Final = "natsrt.more"

BLOBS_FEATURE: Final = "blobs"
"""Feature: it reads payloads that are sent by reference. A call lists what its caller understands in ``features``, and
a worker in its entry in the registry."""
FEATURES_ATTRIBUTE: Final = f'"features":"{BLOBS_FEATURE}"'
"""The attribute ``features`` of this version's calls, as JSON text."""

KEY_HEADER: Final = "Natsrt-Key"
"""Header with the key of the agent that a plain body is for. Without it the key is ``default``."""
TYPE_HEADER: Final = "Natsrt-Type"
"""Header with the message type of a plain body. Without it the type is inferred from the body."""
MESSAGE_ID_HEADER: Final = "Natsrt-Message-Id"
"""Header with the message id that the handlers of a durable event with a plain body are given."""
SUPERSEDES_HEADER: Final = "Natsrt-Supersedes"
"""Header of a call that is sent again, with the ids of its former copies, separated by spaces: at most one copy is
handled."""

JSON_CONTENT: Final = "application/json"
NO_AGENT: Final = "/"
"""The ``source`` of a message that no agent sent. CloudEvents requires a non-empty URI-reference."""

TEXTS: Final = references.TEXTS | frozenset(
    (
        "acceptto",
        "cancelid",
        "chain",
        "datacontenttype",
        "ended",
        "failed",
        "features",
        "id",
        "keyed",
        "messageclass",
        "messagetype",
        "natsattempt",
        "natssequence",
        "natsstored",
        "natsstream",
        "operation",
        "part",
        "parts",
        "partsto",
        "question",
        "questions",
        "source",
        "specversion",
        "subject",
        "timeout",
        "topicsource",
        "topictype",
        "traceparent",
        "tracestate",
        "type",
        "window",
        "windowbytes",
        "withdrawn",
        "workerid",
    )
)
"""The attributes and extensions that natsrt defines. All are strings."""

_WITH_MESSAGE = frozenset((CALL, EVENT, REPLY, PART))
_NEEDED = {False: {"id", "source"}, True: {"id", "source", "messagetype"}}
"""The required attributes, by whether the kind carries a message. If one is missing before ``data``, the whole body is
parsed, since it may come after ``data``."""
_SUBJECT = re.compile(rf"[^\s*>\x00-\x20\x7f]{{1,{MAX_SUBJECT_BYTES}}}")


class _NoData(bytes):
    """The class of `NO_DATA`, so that it is not the same object as other empty bytes."""


NO_DATA: Final[bytes] = _NoData()
"""In place of a payload that is sent by reference. It is compared with ``is``."""
_START = b'{"specversion":"1.0"'
_DATA = b',"data":'
_CLOSE = ord("}")


@dataclass(slots=True)
class Envelope:
    """A decoded natsrt body.

    ``attributes`` are the CloudEvents attributes and extensions as they were sent. `decode` has checked that those
    defined by natsrt are strings. Unknown extensions may have any JSON type. ``body`` is the whole body. ``reference``
    is the blob with the payload; None if the body has the payload itself. Until it is loaded, ``payload`` is then
    `NO_DATA`.
    """

    attributes: dict[str, Any]
    payload: bytes
    body: bytes
    reference: Reference | None = None

    @property
    def type(self) -> str:
        return self.attributes["type"]  # type: ignore[no-any-return]

    @property
    def content_type(self) -> str:
        """The media type of the payload."""
        return self.attributes.get("datacontenttype", JSON_CONTENT)  # type: ignore[no-any-return]

    def text(self, name: str) -> str | None:
        """Return the attribute ``name``, which must be one that natsrt defines; None if it is absent."""
        return self.attributes.get(name)

    def required(self, name: str) -> str:
        """Return the attribute ``name``, which must be one that natsrt defines. Raises `CannotDecode` if absent."""
        value: str | None = self.attributes.get(name)
        if value is None:
            raise CannotDecode("an envelope", f"the attribute {name!r} is missing", self.body)
        return value

    def json(self) -> Any:
        """Return the payload as plain JSON values. Raises `CannotDecode` if it is not JSON."""
        try:
            return orjson.loads(self.payload)
        except orjson.JSONDecodeError as error:
            raise CannotDecode("the data of an envelope", str(error), self.payload) from None

    def general(self) -> Envelope | None:
        """Return the body parsed as a whole; None if that gives the same attributes, or if the body is not JSON.

        If the sender put attributes after ``data``, the payload that `decode` has cut out is invalid. A reader that
        cannot read the payload calls this once before it reports an error.
        """
        try:
            whole = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return None
        parsed = _from_object(whole, self.body)
        return None if parsed is None or parsed.attributes == self.attributes else parsed


def quote(text: str) -> str:
    """Return ``text`` as a JSON string. Raises ValueError for a lone surrogate, which UTF-8 cannot encode."""
    try:
        return orjson.dumps(text).decode()
    except orjson.JSONEncodeError:
        raise ValueError(f"{text!r} cannot be encoded as UTF-8") from None


def encode(kind: str, attributes: str, payload: bytes, content_type: str = JSON_CONTENT) -> bytes:
    """Return a body with ``type`` set to ``kind``.

    ``attributes`` is JSON text such as ``"id":"1","source":"/"`` (see `attribute`). It is text because callers on the
    hot path compose it from parts that are already quoted. For `NO_DATA`, they contain the `Reference`.
    """
    if payload is NO_DATA:
        if content_type != JSON_CONTENT:
            attributes += f',"datacontenttype":{quote(content_type)}'
        return f'{{"specversion":"1.0","type":"{kind}",{attributes}}}'.encode()
    if content_type == JSON_CONTENT:
        return b'{"specversion":"1.0","type":"%b",%b,"data":%b}' % (kind.encode(), attributes.encode(), payload)
    return b'{"specversion":"1.0","type":"%b",%b,"datacontenttype":%b,"data_base64":"%b"}' % (
        kind.encode(),
        attributes.encode(),
        quote(content_type).encode(),
        b64encode(payload),
    )


def encoded_size(kind: str, attributes: str, payload: bytes, content_type: str) -> int:
    """Return the size of what `encode` would return, in bytes."""
    size = len(encode(kind, attributes, b"", content_type)) + len(payload)
    return size if content_type == JSON_CONTENT else size + (len(payload) + 2) // 3 * 4 - len(payload)


def reference_of(data: bytes) -> Reference | None:
    """The reference in a message's data; None if it has none, or is no envelope that can be read."""
    if DATA_REF.encode() not in data:
        return None
    try:
        body = decode(data)
    except CannotDecode:
        return None
    return None if body is None else body.reference


def rewrite(body: Envelope, **changes: str | None) -> bytes:
    """Return the body of the same message with changed attributes. The value None removes an attribute.

    A reference stays, whether its payload was loaded or not.
    """
    attributes = {
        name: value
        for name, value in {**body.attributes, **changes}.items()
        if value is not None and name not in ("specversion", "type", "datacontenttype")
    }
    payload = body.payload if body.reference is None else NO_DATA
    return encode(body.type, orjson.dumps(attributes)[1:-1].decode(), payload, body.content_type)


def texts(data: dict[str, Any], name: str, what: str) -> list[str]:
    """Return the list of strings under ``name`` in ``data``. Raises `CannotDecode` if it is not such a list.

    ``what`` describes ``data`` in the error.
    """
    value = data.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise CannotDecode(what, f"{name} must be a list of strings")
    return value


def media_type(content_type: str) -> str:
    """Return a content type without its parameters, in lower case: ``application/json`` for all forms of JSON's."""
    return content_type.partition(";")[0].strip().lower()


def is_subject(text: str) -> bool:
    """True if ``text`` is a valid subject to publish to.

    A space or CR LF in a subject would end it in the protocol line, and the rest would be read as protocol.
    """
    return _SUBJECT.fullmatch(text) is not None


def attribute(name: str, value: str) -> str:
    """Return one attribute as JSON text. ``name`` is a name that natsrt defines; ``value`` may be any text."""
    return f'"{name}":{quote(value)}'


def message_names(type_name: str, class_name: str | None) -> str:
    """Return the attributes that name the class of a message, as JSON text.

    ``class_name`` is its full name, None if there is none.
    """
    names = attribute("messagetype", type_name)
    return names if class_name is None else f"{names},{attribute('messageclass', class_name)}"


def decode(body: bytes) -> Envelope | None:
    """Return the envelope in ``body``; None for a plain body. Raises `CannotDecode` for a malformed natsrt body."""
    if body.startswith(_START):
        end = body.find(_DATA)
        if end >= 0 and body[-1] == _CLOSE:
            try:
                attributes = orjson.loads(body[:end] + b"}")
            except orjson.JSONDecodeError:
                return _decode_whole(body)
            if (
                _all_texts(attributes)
                and attributes.get("type") in _WITH_MESSAGE
                and "id" in attributes
                and "source" in attributes
                and "messagetype" in attributes
                and "data_base64" not in attributes
            ):  # the form in which natsrt writes messages
                return Envelope(attributes, body[end + len(_DATA) : -1], body)
            kind = attributes.get("type")
            if isinstance(kind, str) and kind.startswith("natsrt.") and "data_base64" not in attributes:
                cut = Envelope(_checked(attributes, body), body[end + len(_DATA) : -1], body)
                return cut if _NEEDED[kind in _WITH_MESSAGE] <= cut.attributes.keys() else cut.general() or cut
    elif body.lstrip()[:1] != b"{":
        return None
    return _decode_whole(body)


def _decode_whole(body: bytes) -> Envelope | None:
    """Do what `decode` does for a body whose attributes cannot be cut out, by parsing all of it."""
    try:
        whole = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if body.startswith(_START) and b'"natsrt.' in body[:200]:
            raise CannotDecode("a natsrt envelope", str(error), body) from None
        return None
    return _from_object(whole, body)


def _from_object(whole: Any, body: bytes) -> Envelope | None:
    if not isinstance(whole, dict):
        return None
    kind = whole.get("type")
    if not isinstance(kind, str) or not kind.startswith("natsrt."):
        return None
    if whole.get("specversion") != "1.0":
        raise CannotDecode("a natsrt envelope", "its specversion must be '1.0'", body)
    attributes = {name: value for name, value in whole.items() if name not in ("data", "data_base64")}
    if whole.get("data_base64") is not None:
        if whole.get("data") is not None:
            raise CannotDecode("a natsrt envelope", "it has both data and data_base64", body)
        try:
            payload = b64decode(whole["data_base64"], validate=True)
        except (ValueError, TypeError):
            raise CannotDecode("a natsrt envelope", "its data_base64 is not base64", body) from None
    elif whole.get(DATA_REF) is not None and "data" not in whole:
        checked = _checked(attributes, body)
        return Envelope(checked, NO_DATA, body, reference_in(checked, body))
    else:
        payload = orjson.dumps(whole.get("data"))
    return Envelope(_checked(attributes, body), payload, body)


def _all_texts(attributes: dict[str, Any]) -> bool:
    for value in attributes.values():  # noqa: SIM110 (a generator takes four times as long)
        if type(value) is not str:
            return False
    return True


def _checked(attributes: dict[str, Any], body: bytes) -> dict[str, Any]:
    """The attributes without those that are null, which are missing. Raises `CannotDecode` if one is no string."""
    if None in attributes.values():  # rare, so most envelopes are not copied
        attributes = {name: value for name, value in attributes.items() if value is not None}
    for name, value in attributes.items():
        if name in TEXTS and not isinstance(value, str):
            raise CannotDecode("an envelope", f"the attribute {name!r} must be a string, not {json_kind(value)}", body)
    return attributes


def json_kind(value: Any) -> str:
    """What a value that was read from JSON is called in JSON."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}
    return kinds.get(type(value), "an object")
