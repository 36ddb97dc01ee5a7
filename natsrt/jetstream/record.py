"""What is stored of a keyed agent. Pure values: no I/O.

Keys of the bucket (each part is a token as in `natsrt.wire.subjects`):

====================================== ===============================================================================
``a.<agent type>.<key>``               the agent's record: its head in the header ``Natsrt-Record``, its state as body
``c.<agent type>.<key>.<write>.<n>``   a part of a state that is too large for the record; ``write`` stored it
====================================== ===============================================================================

The head is not in the body, so that all records can be listed without their states, and so that what an agent saved is
stored exactly as it was encoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from autogen_core import AgentId
from pydantic import TypeAdapter, ValidationError

from natsrt.errors import CannotDecode, CannotSerialize
from natsrt.wire.subjects import encode_token

RECORD: Final = "Natsrt-Record"
_EXACT: Final = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS
MAX_HEAD_BYTES: Final = 32 * 1024
"""The longest head; JetStream stores headers of 64 KB in all."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A state as it is stored: ``size`` in bytes, ``saved_at`` in seconds since the epoch.

    ``parts`` under the name of the write ``saved_by``; 0: it is the body of the record.
    """

    size: int
    sha256: str
    saved_at: float
    parts: int
    saved_by: str


@dataclass(frozen=True, slots=True)
class Record:
    """One keyed agent, as it was stored at ``revision``, the fencing epoch. ``owner``: a worker id; None: nobody."""

    agent: AgentId
    owner: str | None
    revision: int
    stored: Stored | None = None
    """The state; None where the agent has none."""
    write: str = ""
    """Names the write that made this revision."""
    body: bytes | None = field(default=None, repr=False, compare=False)
    """The state where it is in the record and came along with it."""

    @property
    def has_state(self) -> bool:
        return self.stored is not None

    def holds(self, state: bytes) -> bool:
        """Whether ``state`` is what is stored. An empty one need not be."""
        if self.body is not None:
            return state == self.body
        if self.stored is None:
            return state == b"{}"
        return self.stored.sha256 == sha256(state)

    @property
    def size(self) -> int:
        """Bytes of state, 0 for none."""
        return self.stored.size if self.stored is not None else 0

    @property
    def saved_at(self) -> float | None:
        """Seconds since the epoch; None where there is no state."""
        return self.stored.saved_at if self.stored is not None else None


@dataclass(frozen=True, slots=True)
class _Head:
    type: str
    key: str
    owner: str | None
    write: str
    state: Stored | None = None


_HEAD: TypeAdapter[_Head] = TypeAdapter(_Head)


def record_key(agent: AgentId) -> str:
    return f"a.{encode_token(agent.type)}.{encode_token(agent.key)}"


def parts_key(agent: AgentId, write: str) -> str:
    """The key of what a write stored in parts, without their numbers; ``>`` for that of all writes."""
    return f"c.{encode_token(agent.type)}.{encode_token(agent.key)}.{write}"


def encode_head(agent: AgentId, owner: str | None, write: str, stored: Stored | None) -> str:
    """The header of a record, in ASCII. Raises `CannotSerialize` where the agent's names are too long."""
    head = {"type": agent.type, "key": agent.key, "owner": owner, "write": write, "state": stored}
    text = orjson.dumps(head).decode()
    if not text.isascii():
        text = json.dumps(orjson.loads(text), separators=(",", ":"))
    if len(text) > MAX_HEAD_BYTES:
        raise CannotSerialize("AgentId", f"a keyed agent's type and key may take {MAX_HEAD_BYTES:,} bytes")
    return text


def decode_record(key: str, headers: Mapping[str, str] | None, body: bytes | None, revision: int) -> Record:
    """The record under ``key``; ``body`` is None where only its headers were read. Raises `CannotDecode`."""
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
    return Record(agent, head.owner, revision, head.state, head.write, body if inside else None)


def write_of(headers: Mapping[str, str] | None) -> str | None:
    """The name of the write that stored a record, or deleted it; None where it cannot be told."""
    try:
        return _HEAD.validate_json((headers or {})[RECORD]).write
    except (KeyError, ValidationError):
        return None


def encode_state(state: Mapping[str, Any]) -> bytes:
    """What an agent's ``save_state`` returned, as JSON.

    Raises `CannotSerialize` where ``load_state`` would get something that is not equal to it.
    """
    tree = state if type(state) is dict else dict(state)
    if (text := _exact_json(tree)) is None:
        name = next((name for name, value in tree.items() if _exact_json({name: value}) is None), None)
        where = f" under {name!r}" if isinstance(name, str) else ""
        raise CannotSerialize(
            "dict",
            f"the agent's state holds something{where} that is no JSON, or would be another value when it is loaded: a "
            "state may hold text, finite numbers, integers of 64 bits, True, False, None, lists, and dictionaries with "
            "text as keys",
        )
    return text


def _exact_json(tree: dict[str, Any]) -> bytes | None:
    """The JSON of ``tree`` if that reads as an equal one, else None. All of it in compiled code: every reply waits."""
    try:
        text = orjson.dumps(tree, option=_EXACT)
        return text if orjson.loads(text) == tree else None
    except (TypeError, ValueError, RecursionError):
        return None


def sha256(state: bytes) -> str:
    return hashlib.sha256(state).hexdigest()


def checked(agent: AgentId, stored: Stored, state: bytes) -> bytes:
    """``state`` if it is what was stored. Raises `CannotDecode`."""
    problem = None
    if len(state) != stored.size:
        problem = f"{len(state):,} bytes are stored, and it has {stored.size:,}"
    elif sha256(state) != stored.sha256:
        problem = "what is stored does not have its SHA-256"
    if problem is not None:
        raise CannotDecode(f"the state of {agent}", problem, state)
    return state
