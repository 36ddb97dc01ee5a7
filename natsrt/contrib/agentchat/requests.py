"""What a remote agent or team sends to the worker that hosts it. The names of these classes are on the wire."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from autogen_agentchat.base import Response, TaskResult
from autogen_agentchat.messages import (
    BaseChatMessage,
    CodeExecutionEvent,
    CodeGenerationEvent,
    HandoffMessage,
    MemoryQueryEvent,
    ModelClientStreamingChunkEvent,
    MultiModalMessage,
    SelectorEvent,
    SelectSpeakerEvent,
    StopMessage,
    TextMessage,
    ThoughtEvent,
    ToolCallExecutionEvent,
    ToolCallRequestEvent,
    ToolCallSummaryMessage,
    UserInputRequestedEvent,
)

ANSWERS: Final = (
    Response,
    TaskResult,
    CodeExecutionEvent,
    CodeGenerationEvent,
    HandoffMessage,
    MemoryQueryEvent,
    ModelClientStreamingChunkEvent,
    MultiModalMessage,
    SelectorEvent,
    SelectSpeakerEvent,
    StopMessage,
    TextMessage,
    ThoughtEvent,
    ToolCallExecutionEvent,
    ToolCallRequestEvent,
    ToolCallSummaryMessage,
    UserInputRequestedEvent,
)
"""The classes of what is answered. natsrt finds the class of an answer in the module of the message that it answers, so
these are known to every caller without being registered."""


@dataclass
class TurnStarted:
    """The first item of a turn whose caller asked for it: the worker notices from now on if the caller disappears."""


@dataclass(kw_only=True)
class ChatTurn:
    """One turn of a chat agent: its answer is the stream of ``on_messages_stream``."""

    messages: list[BaseChatMessage]
    name: str
    """The name under which the caller knows the agent: the source of what the agent says."""
    turn: str
    """The id of the turn. It stays the same when the turn is tried again."""
    keep: bool = False
    """Whether the turn may be tried again, so that its answer is stored with the state."""
    callers: list[str] = field(default_factory=list)
    """The sessions whose turns wait for this one, the outermost first."""
    started: bool = False
    """Whether the first item is to be `TurnStarted`, before the agent says anything."""


@dataclass(kw_only=True)
class TeamRun:
    """One run of a team: its answer is the stream of ``run_stream``."""

    task: list[BaseChatMessage] | None
    """None: the team goes on."""
    output_task_messages: bool
    turn: str
    """As in `ChatTurn`."""
    keep: bool = False
    """As in `ChatTurn`."""
    callers: list[str] = field(default_factory=list)
    """As in `ChatTurn`."""
    started: bool = False
    """As in `ChatTurn`."""


@dataclass
class Reset:
    """``on_reset`` of an agent, ``reset`` of a team."""


@dataclass
class Pause:
    """``on_pause`` of an agent, ``pause`` of a team."""


@dataclass
class Resume:
    """``on_resume`` of an agent, ``resume`` of a team."""


@dataclass
class SaveState:
    """Answered with the `State` after the last turn that was completed."""


@dataclass
class State:
    """What ``save_state`` returned."""

    state: dict[str, Any]


@dataclass
class LoadState:
    """``load_state``."""

    state: dict[str, Any]


@dataclass
class Close:
    """Close the live agent or team. What is stored stays."""


@dataclass
class Forget:
    """End the session: close the live agent or team, and delete what is stored."""


OF_BOTH: Final = (Reset, LoadState, Close, Forget, Pause, Resume, SaveState)
"""The requests that agents and teams have in common."""
OUT_OF_TURN: Final = (Pause, Resume, SaveState)
"""The requests that are carried out beside a turn, not after it."""
