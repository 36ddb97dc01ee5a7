"""Records: messages that passed, as ``natsrt record`` stores them in a stream. Pure values, no I/O.

Rules:

1. The body of a record is that of the message, byte for byte. All else stands in one header, `RECORD_HEADER`, as
   JSON: so no header of the message, such as ``Nats-Msg-Id`` or ``Nats-TTL``, acts on the stream, and no name can
   end a line.
2. The subject of a record says what it is: ``natsrt.record.<stream>.call.<type>.<key>``,
   ``….reply.<type>.<key>``, ``….event.<topic type>.<source>``, ``….delivery.<type>.<key>``,
   ``….chunk.<blob>.<number>``.
3. Every message that a run of the recorder took in has a number of its own, counted from 1, also one that it could not
   store. So a gap in the numbers of a run is a message that is missing, and its numbers are the order of passing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, get_args

import orjson

from natsrt.errors import CannotDecode

RECORD_HEADER: Final = "Natsrt-Record"
"""The header of a record, with JSON."""

Kind = Literal["call", "reply", "event", "delivery", "chunk"]
"""What passed. ``delivery`` is an event on its way to one keyed agent, whose ``event`` passed too unless a stream keeps
it. ``chunk`` is a part of a payload that is sent by reference."""
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

_MICROSECONDS: Final = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One message that passed.

    ``subject``, ``reply``, ``headers`` and ``data`` are the message's; ``reply`` is empty if it wants none. ``at`` is
    when the recorder took it in, in seconds since the epoch. ``run`` and ``number`` name it. ``id`` is the message id;
    empty for a plain body. ``sender`` and ``recipient`` are agents as ``type/enc(key)``; empty if there is none, or if
    it is not known. ``call`` is the number of the call that a reply belongs to; None if the recorder did not see it.
    ``missed`` is how many messages the run had to leave out before this one since the last that it stored, and ``gap``
    for how many seconds it was not connected since then.
    """

    kind: Kind
    subject: str
    run: str
    number: int
    at: float
    data: bytes
    reply: str = ""
    headers: Mapping[str, str]
    id: str = ""
    sender: str = ""
    recipient: str = ""
    call: int | None = None
    missed: int = 0
    gap: float = 0.0

    @property
    def store_id(self) -> str:
        """The id under which a stream stores it once."""
        return f"{self.run}-{self.number}"

    def header(self) -> str:
        """The value of `RECORD_HEADER`: JSON in one line."""
        fields: dict[str, Any] = {
            "kind": self.kind,
            "subject": self.subject,
            "run": self.run,
            "number": self.number,
            "at": round(self.at * _MICROSECONDS),
        }
        for name in ("reply", "id", "sender", "recipient", "missed"):
            if value := getattr(self, name):
                fields[name] = value
        if self.call is not None:
            fields["call"] = self.call
        if self.gap:
            fields["gap"] = round(self.gap, 3)
        if self.headers:
            fields["headers"] = dict(self.headers)
        return orjson.dumps(fields).decode()


def read_record(headers: Mapping[str, str], data: bytes) -> Record:
    """The record in a stored message. Raises `CannotDecode` if it is none."""
    lower = RECORD_HEADER.lower()
    text = next((value for name, value in headers.items() if name.lower() == lower), None)
    if text is None:
        raise CannotDecode("a record", f"the header {RECORD_HEADER} is missing", data)
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise CannotDecode("a record", f"the header {RECORD_HEADER} is not JSON: {error}", data) from None
    if not isinstance(fields, dict):
        raise CannotDecode("a record", f"the header {RECORD_HEADER} is not a JSON object", data)

    def field(name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        value = fields.get(name, default)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise CannotDecode("a record", f"{name!r} in the header {RECORD_HEADER} is missing or malformed", data)
        return value

    if (kind := field("kind", str)) not in KINDS:
        raise CannotDecode("a record", f"its kind is {kind!r}; known are {', '.join(KINDS)}", data)
    own = field("headers", dict, {})
    if not all(isinstance(value, str) for value in own.values()):
        raise CannotDecode("a record", f"'headers' in the header {RECORD_HEADER} must be strings", data)
    return Record(
        kind=cast(Kind, kind),
        subject=field("subject", str),
        run=field("run", str),
        number=field("number", int),
        at=field("at", int) / _MICROSECONDS,
        data=data,
        reply=field("reply", str, ""),
        headers=own,
        id=field("id", str, ""),
        sender=field("sender", str, ""),
        recipient=field("recipient", str, ""),
        call=None if fields.get("call") is None else field("call", int),
        missed=field("missed", int, 0),
        gap=float(field("gap", (int, float), 0.0)),
    )
