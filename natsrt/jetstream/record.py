"""The record of a keyed agent: what is stored of its owner and its state. Pure values: no I/O.

Keys of the bucket (each part is a token as in `natsrt.wire.subjects`):

====================================== ===============================================================================
``a.<agent type>.<key>``               the agent's record: its head in the header ``Natsrt-Record``, its state as body
``c.<agent type>.<key>.<write>.<n>``   a part of a state that is too large for the record; ``write`` stored it
====================================== ===============================================================================

The head is a header and not in the body. So all records can be listed without their states, and a state is stored
exactly as it was encoded.
"""

from __future__ import annotations

import hashlib
import json
import marshal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import Annotated, Any, Final

import orjson
from autogen_core import AgentId
from pydantic import Field, TypeAdapter, ValidationError

from natsrt.errors import CannotDecode, CannotSerialize
from natsrt.wire.exactness import value_of_type
from natsrt.wire.exception_parts import cut
from natsrt.wire.subjects import encode_token

RECORD: Final = "Natsrt-Record"
"""The header that holds a record's head."""
MAX_HEAD_BYTES: Final = 32 * 1024
"""The longest head, without the ids in it. JetStream stores headers of 64 KB in all."""
SUPERSEDED_BYTES: Final = 8 * 1024
"""How much room the ids of lost copies take at most in a head, in bytes."""
HANDLED_BYTES: Final = 4 * 1024
"""How much room the handled sequences of streams take at most in a head, in bytes: those of about 80 streams."""
_SUPERSEDED_AT_MOST = 32
"""How many lost copies of calls a record names. With ids as natsrt makes them, they take about 2 kB."""
OTHER_HEADER_BYTES: Final = 256
"""Room for the other headers of a record, in bytes."""
NOTHING_HANDLED: Final[Mapping[str, int]] = MappingProxyType({})
"""The handled sequences of an agent that has handled no event of a stream."""
_NO_DICT: Final = "save_state must return a dict, but returned"
_LONGEST_PATH: Final = 300
"""How many characters of a path an error shows."""
_EXACT: Final = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS
"""orjson refuses what it would otherwise convert."""
_LARGE: Final = 4 * 1024 * 1024
"""Bytes of JSON up to which it is read back as a whole, to find out whether it is exact."""
_BATCH: Final = 512 * 1024
"""Bytes of JSON that are read back together of a larger one, about."""
_MOST: Final = 4096
"""Entries that are read back together, at most."""
_MANY: Final = 64
"""Entries of a list or a dictionary that may be large."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where and how a state is stored.

    ``size`` is in bytes, ``saved_at`` in seconds since the epoch. ``parts`` is the number of parts, which are stored
    under the name of the write ``saved_by``; 0: the state is the body of the record.
    """

    size: int
    sha256: str
    saved_at: float
    parts: int
    saved_by: str


@dataclass(frozen=True, slots=True)
class Record:
    """The record of one keyed agent at ``revision``, the fencing epoch. ``owner`` is a worker id; None: no owner."""

    agent: AgentId
    owner: str | None
    revision: int
    stored: Stored | None = None
    """Where the state is; None if the agent has no state."""
    write: str = ""
    """The name of the write that stored this revision."""
    body: bytes | None = field(default=None, repr=False, compare=False)
    """The state, if it is in the record and was read with it; else None."""
    superseded: tuple[str, ...] = ()
    """The ids of lost copies of calls that count in the state, by copies that were sent again. They are not handled."""
    handled: Mapping[str, int] = field(default_factory=lambda: NOTHING_HANDLED, hash=False)
    """By the id of a stream: the sequence of its last event that counts in the state. The one that advanced last is the
    last one. Events up to it are not handled. Without a state there are none."""

    @property
    def has_state(self) -> bool:
        return self.stored is not None

    def holds(self, state: bytes) -> bool:
        """Whether ``state`` is what is stored. An empty state need not be stored, so it equals no state."""
        if self.body is not None:
            return state == self.body
        if self.stored is None:
            return state == b"{}"
        return self.stored.sha256 == sha256(state)

    @property
    def size(self) -> int:
        """Bytes of the state; 0 if there is none."""
        return self.stored.size if self.stored is not None else 0

    @property
    def saved_at(self) -> float | None:
        """When the state was saved, in seconds since the epoch; None if there is no state."""
        return self.stored.saved_at if self.stored is not None else None


@dataclass(frozen=True, slots=True)
class _Head:
    type: str
    key: str
    owner: str | None
    write: str
    state: Stored | None = None
    superseded: tuple[str, ...] = ()
    handled: dict[str, Annotated[int, Field(strict=True, gt=0, lt=2**63)]] = field(default_factory=dict)


_HEAD: TypeAdapter[_Head] = TypeAdapter(_Head)


def record_key(agent: AgentId) -> str:
    """The key of an agent's record."""
    return f"a.{encode_token(agent.type)}.{encode_token(agent.key)}"


def parts_key(agent: AgentId, write: str) -> str:
    """The key of the parts that a write stored, without a part's number; with ``>``, the pattern for all writes."""
    return f"c.{encode_token(agent.type)}.{encode_token(agent.key)}.{write}"


def encode_head(
    agent: AgentId,
    owner: str | None,
    write: str,
    stored: Stored | None,
    superseded: Sequence[str] = (),
    handled: Mapping[str, int] = NOTHING_HANDLED,
) -> str:
    """The head of a record, in ASCII. Raises `CannotSerialize` if the agent's type and key are too long."""
    head: dict[str, Any] = {"type": agent.type, "key": agent.key, "owner": owner, "write": write, "state": stored}
    if superseded:
        head["superseded"] = superseded
    if handled:
        head["handled"] = handled
    text = orjson.dumps(head).decode()
    if not text.isascii():
        text = json.dumps(orjson.loads(text), separators=(",", ":"))
    if len(text) - _room_of(superseded) - _room_of(handled) > MAX_HEAD_BYTES:
        raise CannotSerialize("AgentId", f"a keyed agent's type and key may take {MAX_HEAD_BYTES:,} bytes")
    return text


def latest(superseded: Sequence[str]) -> tuple[str, ...]:
    """Of the ids of lost copies, those that a record has room for: the last ones."""
    latest = superseded[-_SUPERSEDED_AT_MOST:]
    while _room_of(latest) > SUPERSEDED_BYTES:
        latest = latest[1:]
    return tuple(latest)


def advanced(handled: Mapping[str, int], by: Mapping[str, int]) -> dict[str, int]:
    """The handled sequences after those in ``by``. Where there is no room for all streams, the first are left out.

    A sequence never goes back.
    """
    result = {stream: sequence for stream, sequence in handled.items() if sequence >= by.get(stream, 0)}
    result |= {stream: sequence for stream, sequence in by.items() if stream not in result}
    while _room_of(result) > HANDLED_BYTES:
        del result[next(iter(result))]
    return result


def _room_of(member: Sequence[str] | Mapping[str, int]) -> int:
    """Bytes that these ids or sequences take in a head."""
    return len(json.dumps(member)) if member else 0


def decode_record(key: str, headers: Mapping[str, str] | None, body: bytes | None, revision: int) -> Record:
    """The record under ``key``; ``body`` is None if only the headers were read. Raises `CannotDecode`."""
    what = f"the record {key!r}"
    text = (headers or {}).get(RECORD)
    if text is None:
        raise CannotDecode(what, f"it has no header {RECORD}", body or b"")
    try:
        head = _HEAD.validate_json(text)
    except ValidationError as error:
        raise CannotDecode(what, error.errors()[0]["msg"], text.encode()) from None
    try:
        agent = AgentId(head.type, head.key)
        belongs = record_key(agent)
    except ValueError as error:
        raise CannotDecode(what, str(error), text.encode()) from None
    if belongs != key:
        raise CannotDecode(what, f"its names belong under {belongs!r}", text.encode())
    inside = head.state is not None and not head.state.parts
    return Record(
        agent,
        head.owner,
        revision,
        head.state,
        head.write,
        body if inside else None,
        head.superseded,
        head.handled if head.state is not None else NOTHING_HANDLED,
    )


def write_of(headers: Mapping[str, str] | None) -> str | None:
    """The name of the write that stored or deleted a record; None if the headers do not have it."""
    try:
        return _HEAD.validate_json((headers or {})[RECORD]).write
    except (KeyError, ValidationError):
        return None


def check_state(state: object, what: str = _NO_DICT) -> dict[str, Any]:
    """``state``, if it is a ``dict`` and of no subclass. ``what`` begins the text of the `CannotSerialize` if not."""
    if type(state) is not dict:
        raise CannotSerialize("dict", f"{what} {value_of_type(type(state))}")
    return state


def encode_state(state: Mapping[str, Any], what: str = _NO_DICT) -> bytes:
    """The JSON of what an agent's ``save_state`` returned.

    Raises `CannotSerialize` if ``load_state`` would get a value that is not equal to it. ``what``: see `check_state`.
    """
    tree = check_state(state, what)
    if (text := _exact_json(tree)) is None:
        raise CannotSerialize(
            "dict",
            f"the agent's state holds {_inexact_part(tree)} that is not JSON, or that would be a different value "
            "after it is loaded: a state may hold text, finite numbers, integers of 64 bits, True, False, None, lists, "
            "and dictionaries with text as keys",
        )
    return text


def _exact_json(tree: Any) -> bytes | None:
    """The JSON of ``tree`` if that reads as an equal value, else None. Runs in compiled code, as every reply waits."""
    try:
        text = orjson.dumps(tree, option=_EXACT)
        if len(text) > _LARGE:
            return text if _is_exact_in_batches(tree) else None
        # orjson writes the value of an enum, which may equal the member. marshal knows the built-in types only.
        marshal.dumps(tree, 2)
        return text if orjson.loads(text) == tree else None
    except (TypeError, ValueError, RecursionError):
        return None


def _is_exact_in_batches(tree: Any) -> bool:
    """Whether a value that JSON was made of reads as an equal value, in batches of its entries: to read a large state
    back as a whole would take its memory twice more. Its keys are text, as orjson takes no others.
    """
    if type(tree) is str:
        return True
    if type(tree) is not dict and type(tree) is not list:
        return _exact_json([tree]) is not None
    entries, most = iter(tree.items() if type(tree) is dict else enumerate(tree)), 1
    while batch := dict(islice(entries, most)):
        values = list(batch.values())
        is_large = any(map(_may_be_large, values)) or len(orjson.dumps(values, option=_EXACT)) > _BATCH
        most = max(1, most // 2) if is_large else min(2 * most, _MOST)
        if not (all(map(_is_exact_in_batches, values)) if is_large else _exact_json(values) is not None):
            return False
    return True


def _may_be_large(value: Any) -> bool:
    """Whether a value is not to be written to find out its size."""
    return (type(value) is str and len(value) > _BATCH) or (type(value) in (dict, list) and len(value) > _MANY)


def _inexact_part(tree: dict[Any, Any]) -> str:
    """The first innermost part of a state that JSON does not carry: its type and its path."""
    part: Any = tree
    path, seen = "", set[int]()
    while type(part) in (dict, list) and id(part) not in seen:
        seen.add(id(part))
        if type(part) is dict:
            if (key := next((key for key in part if _exact_json({key: None}) is None), None)) is not None:
                return f"a key of type {type(key).__name__}" + (f" under {cut(path, _LONGEST_PATH)!r}" if path else "")
            steps = ((f".{key}" if path else key, item) for key, item in part.items())
        else:
            steps = (("[]", item) for item in part)
        found = next(((step, item) for step, item in steps if _exact_json(item) is None), None)
        if found is None:
            break
        path, part = path + found[0], found[1]
    return value_of_type(type(part)) + (f" under {cut(path, _LONGEST_PATH)!r}" if path else "")


def sha256(state: bytes) -> str:
    """The SHA-256 of a state, in hex digits."""
    return hashlib.sha256(state).hexdigest()


def checked(agent: AgentId, stored: Stored, state: bytes) -> bytes:
    """``state``, if its size and its SHA-256 are as they were stored. Raises `CannotDecode` if not."""
    problem = None
    if len(state) != stored.size:
        problem = f"{len(state):,} bytes are stored, and it has {stored.size:,}"
    elif sha256(state) != stored.sha256:
        problem = "the stored bytes do not have the SHA-256 that was recorded"
    if problem is not None:
        raise CannotDecode(f"the state of {agent}", problem, state)
    return state
