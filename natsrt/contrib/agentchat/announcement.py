"""What the registry says about a hosted agent or team. Teams want it in their constructors, which cannot wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

from autogen_agentchat.base import ChatAgent, Team
from pydantic import TypeAdapter, ValidationError

from natsrt import NatsAgentRuntime
from natsrt.contrib.agentchat.message_types import produced_types

Kind: TypeAlias = Literal["agent", "team"]

_MEMBER: Final = "agentchat"
"""The member of the type's details in the registry."""
_REMOTE: Final[Mapping[Kind, str]] = {"agent": "RemoteChatAgent", "team": "RemoteTeam"}


@dataclass(frozen=True, slots=True)
class Announcement:
    """What is announced of an agent type: ``produces`` are the names of the message classes of its answers."""

    kind: Kind
    name: str
    description: str
    produces: tuple[str, ...] = ()

    @classmethod
    def of(cls, made: ChatAgent | Team) -> Announcement:
        """What is said of an agent or team."""
        if isinstance(made, Team):
            return cls("team", made.name, made.description)
        produced = tuple(dict.fromkeys(one.__name__ for one in produced_types(made.produced_message_types)))
        return cls("agent", made.name, made.description, produced)

    @property
    def details(self) -> dict[str, Any]:
        """The details of the type in the registry."""
        return {_MEMBER: {**asdict(self), "produces": list(self.produces)}}


_reader: TypeAdapter[Announcement] = TypeAdapter(Announcement)


def announced(runtime: NatsAgentRuntime, agent_type: str, kind: Kind) -> Announcement | None:
    """What the registry says about an agent type; None if no live worker hosts it.

    Raises ValueError if the type is hosted otherwise, or is of the other kind, and RuntimeError if the runtime is not
    started.
    """
    details = runtime.type_details(agent_type)
    if details is None:
        return None
    if _MEMBER not in details:
        raise ValueError(f"the agent type {agent_type!r} is not hosted by natsrt.agentchat.host")
    try:
        found = _reader.validate_python(details[_MEMBER])
    except ValidationError as error:
        raise ValueError(f"what the workers of {agent_type!r} say about it cannot be read: {error}") from None
    if found.kind != kind:
        raise ValueError(
            f"the agent type {agent_type!r} is a{'n' * (found.kind == 'agent')} {found.kind}: use {_REMOTE[found.kind]}"
        )
    return found
