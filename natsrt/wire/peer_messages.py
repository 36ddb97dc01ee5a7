"""What workers tell each other about keyed agents, as values: claims, locations, waiting calls.

The questions and answers are described in docs/PROTOCOL.md.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from natsrt.errors import CannotDecode
from natsrt.wire.envelope import Envelope


class Claim(Enum):
    """The answer of a worker that is asked about an agent whose record names it as the owner."""

    HOLDS = "holds"
    """It owns the agent."""
    MOVING = "moving"
    """It is claiming or releasing the agent now."""
    FREE = "free"
    """It does not own the agent."""


class Location(NamedTuple):
    """Where a keyed agent lives."""

    worker_id: str
    """The owner."""
    lease: float
    """Seconds after each message to the agent for which the sender may assume that the owner is still the same."""


class WaitLink(NamedTuple):
    """``call`` waits for ``awaited``. Each call is named by its reply subject. The field names are the wire's."""

    call: str
    awaited: str
    visit: str
    """Id of the handler that awaits ``awaited``; empty for an agent that is not keyed."""
    agent: str
    """The keyed agent at which ``call`` waits for its turn; empty where ``call`` is being handled."""


_LINKS: TypeAdapter[list[WaitLink]] = TypeAdapter(list[WaitLink])


def read_claim(answer: Envelope) -> Claim:
    """The claim in a worker's answer. Raises `CannotDecode`."""
    data = answer.json()
    try:
        return Claim(data["grip"])
    except (TypeError, KeyError, ValueError):
        raise CannotDecode("a worker's answer about an agent", "it has no grip of a known name") from None


def read_links(answer: Envelope) -> list[WaitLink]:
    """The links in a worker's answer. Raises `CannotDecode`."""
    try:
        return _LINKS.validate_python(answer.json()["waits"])
    except (TypeError, KeyError, ValidationError):
        raise CannotDecode("a worker's answer about what calls wait for", "it is no list of these") from None


def read_location(answer: Envelope, agent: Any) -> Location:
    """The location of ``agent`` in a worker's answer. Raises `CannotDecode`."""
    data = answer.json()
    try:
        return Location(str(data["worker_id"]), float(data["lease"]))
    except (TypeError, KeyError, ValueError):
        raise CannotDecode(f"where {agent} lives", "the answer does not say it", answer.body) from None
