"""Values that workers send each other about keyed agents: claims, locations, waiting calls.

The questions and answers are described in docs/PROTOCOL.md.
"""

from __future__ import annotations

import hashlib
from enum import Enum
from typing import Any, Final, NamedTuple

from pydantic import TypeAdapter, ValidationError

from natsrt.errors import CannotDecode
from natsrt.wire.envelope import Envelope
from natsrt.wire.subjects import is_subject_length


class Claim(Enum):
    """The answer of a worker that is asked about an agent whose record names it as the owner."""

    HOLDS = "holds"
    """It owns the agent."""
    MOVING = "moving"
    """It is claiming or releasing the agent now."""
    FREE = "free"
    """It does not own the agent."""


MISSING: Final = b'{"missing":true}'
"""The data of a question about an agent's location, asked of the worker that listens on the agent's own subject: the
record of the agent is missing."""


class Location(NamedTuple):
    """Where a keyed agent lives."""

    worker_id: str
    """The owner."""
    lease: float
    """Seconds after each message to the agent for which the sender may assume that the owner is still the same."""


class WaitLink(NamedTuple):
    """The call ``call`` waits for the call ``awaited``.

    Both are identified by their reply subjects. The field names are the names on the wire.
    """

    call: str
    awaited: str
    visit: str
    """Id of the handler that awaits ``awaited``; empty for an agent that is not keyed."""
    agent: str
    """The keyed agent at which ``call`` waits for its turn; empty where ``call`` is being handled."""

    def without_names(self) -> WaitLink:
        """The same link with digests instead of the reply subject of ``awaited`` and the visit.

        Whoever knows these can have a worker answer the awaited call, or enter an agent's mailbox out of turn.
        """
        return self._replace(awaited=_digest(self.awaited), visit=_digest(self.visit))


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:24] if name else ""


_LINKS: TypeAdapter[list[WaitLink]] = TypeAdapter(list[WaitLink])
_PROMISES: TypeAdapter[dict[str, float]] = TypeAdapter(dict[str, float])


def read_claim(answer: Envelope) -> Claim:
    """Return the claim in a worker's answer. Raises `CannotDecode`."""
    data = answer.json()
    try:
        return Claim(data["grip"])
    except (TypeError, KeyError, ValueError):
        raise CannotDecode("a worker's answer about an agent", "its grip is missing or unknown") from None


def read_links(answer: Envelope) -> list[WaitLink]:
    """Return the links in a worker's answer. Raises `CannotDecode`."""
    try:
        return _LINKS.validate_python(answer.json()["waits"])
    except (TypeError, KeyError, ValidationError):
        raise CannotDecode("a worker's answer about waiting calls", "it is not a list of waiting calls") from None


def read_promises(answer: Envelope) -> dict[str, float]:
    """Return the calls that a worker has promised not to handle, and how many seconds ago. Raises `CannotDecode`."""
    try:
        promises = _PROMISES.validate_python(answer.json()["withdrawn"])
    except (TypeError, KeyError, ValidationError):
        raise CannotDecode("a worker's answer about withdrawn calls", "it is not an object of ages") from None
    return {call_id: age for call_id, age in promises.items() if is_subject_length(call_id)}


def says_missing(question: Envelope) -> bool:
    """True if a question about an agent's location says that the agent's record is missing. Raises `CannotDecode`."""
    data = question.json()
    return isinstance(data, dict) and data.get("missing") is True


def read_location(answer: Envelope, agent: Any) -> Location:
    """Return the location of ``agent`` in a worker's answer. Raises `CannotDecode`."""
    data = answer.json()
    try:
        return Location(str(data["worker_id"]), float(data["lease"]))
    except (TypeError, KeyError, ValueError):
        raise CannotDecode(
            f"the location of {agent}", "the answer has no valid worker_id and lease", answer.body
        ) from None
