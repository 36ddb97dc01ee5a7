"""What is sent between the processes, beside AutoGen's own messages."""

from __future__ import annotations

from dataclasses import dataclass

from autogen_core import AgentRuntime, try_get_known_serializers_for_type


@dataclass
class Approval:
    """A question to the people in the room: may this text be published?"""

    text: str


@dataclass
class Verdict:
    """The answer, and the name of the person who gave it."""

    approved: bool
    by: str


@dataclass
class Line:
    """One entry of a room's transcript, which the page shows as one box."""

    id: str
    kind: str
    """``person``, ``agent``, ``question`` or ``error``."""
    name: str
    text: str
    state: str = ""
    """Of a person's message: ``waiting`` until the team begins with it, then ``asked``; ``unheard`` if the team failed.
    Of an agent's message: ``writing``, or ``broken`` if the agent did not get to its end. Of a question: ``open``,
    ``approved``, ``refused``, or ``withdrawn`` if nobody has answered in time. Empty: complete."""
    by: str = ""
    """Who approved or refused."""


@dataclass
class Keep:
    """Keep these lines as the transcript of the room."""

    lines: list[Line]


@dataclass
class Recall:
    """Answered with the `Kept` lines of the room."""


@dataclass
class Kept:
    """The transcript of a room. Empty for a new room."""

    lines: list[Line]


def let_read(runtime: AgentRuntime) -> None:
    """Let a runtime read questions and their answers, which none of its own agents handles or returns."""
    for cls in (Approval, Verdict):
        runtime.add_message_serializer(try_get_known_serializers_for_type(cls))
