"""Tasks: calls that are stored before they are handled, and whose results are stored too.

A task is an event on a durable topic of its own, ``natsrt.task.<agent type>:<id>``, whose source is the agent's key. So
it is stored, handled at least once, tried again, and kept as a dead letter, as other durable events. But it is handled
as a call, and what its handler returns or raises is its result.
"""

from __future__ import annotations

import datetime
import secrets
from dataclasses import dataclass
from typing import Final, Literal

from autogen_core import AgentId, TopicId

from natsrt.durable_types import DurableTopics
from natsrt.wire.subjects import MAX_SUBJECT_BYTES, decode_token, encode_token, is_hashed
from natsrt.wire.task_attributes import MOST

_TOPICS: Final = "natsrt.task."
TASK_TOPICS: Final = DurableTopics(_TOPICS, name="tasks", max_age=None)
"""The topics of all tasks. A task waits for a worker without a limit of time."""

_CANCELS: Final = "task/"
"""The start of the ids of the cancellation tokens of tasks."""
_LONGEST: Final = MAX_SUBJECT_BYTES - len(_CANCELS)
"""Bytes of the id of a task, so that the id of its cancellation token is read (`natsrt.wire.ids`)."""

TaskState = Literal["scheduled", "queued", "running", "waiting", "done", "failed", "cancelled"]
"""``scheduled``: it is due later. ``queued``: no handler has begun, as far as that is known. ``running``: a handler has
begun some time ago. ``waiting``: an attempt failed, and the next one follows. The others are ends."""
ENDS: Final = ("done", "failed", "cancelled")
"""The states in which a task has a result."""


@dataclass(frozen=True, slots=True)
class TaskId:
    """Names a task: its agent, and the id of its message, which is unique among the tasks of the agent.

    As text it is ``<agent type>/<agent key>/<message id>``, the id encoded as in subjects. `new` and `of` are for tasks
    that are to be submitted. Others may have submitted one with a longer id, which fails.
    """

    agent: AgentId
    message_id: str

    def __str__(self) -> str:
        return f"{self.agent}/{encode_token(self.message_id)}"

    @property
    def topic(self) -> TopicId:
        """The topic of its message."""
        return TopicId(f"{task_prefix(self.agent.type)}{encode_token(self.message_id)}", self.agent.key)

    @property
    def cancel_id(self) -> str:
        """The id of its cancellation token."""
        return f"{_CANCELS}{self}"

    @classmethod
    def new(cls, agent: AgentId) -> TaskId:
        """A task of this agent with an id that nobody can guess: who knows it may be able to cancel the task.

        Raises ValueError as `of`.
        """
        return cls.of(agent, secrets.token_hex(12))

    @classmethod
    def of(cls, agent: AgentId, message_id: str) -> TaskId:
        """The task of this agent and message id. Raises ValueError if no task can have the id, or if it is too long."""
        task = cls._named(agent, message_id)
        size = len(str(task).encode("utf-8", "surrogatepass"))
        if size > _LONGEST:
            raise ValueError(
                f"the id of a task may have {_LONGEST:,} bytes, and {str(task)!r:.60}… has {size:,}: choose a shorter "
                "key of the agent or message id. Nothing was stored"
            )
        return task

    @classmethod
    def _named(cls, agent: AgentId, message_id: str) -> TaskId:
        if not isinstance(message_id, str) or not message_id or is_hashed(encode_token(message_id)):
            raise ValueError(f"the message id of a task must be a text of 1 to 200 bytes, not {message_id!r:.80}")
        return cls(agent, message_id)

    @classmethod
    def parse(cls, text: str) -> TaskId:
        """The task whose id is ``text``. Raises ValueError."""
        agent, slash, token = text.rpartition("/") if isinstance(text, str) else ("", "", "")
        try:
            if not slash or "/" not in agent:
                raise ValueError
            return cls._named(AgentId.from_str(agent), decode_token(token))
        except ValueError:
            raise ValueError(
                f"{text!r:.200} is not the id of a task: it must be <agent type>/<agent key>/<message id>"
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStatus:
    """What is known of a task.

    ``id`` is the id of its ticket. ``attempt`` is the number of the present or last attempt to handle it, from 1; None
    if that is not known, or none has begun. ``fraction`` and ``text`` are what its handler said last with
    `natsrt.progress`; None if it said nothing. ``worker_id`` is the worker that handles it, or handled it; None if that
    is not known. ``since`` is when it got into this state, or when that was last told. ``due`` is when it is handled,
    or tried again; None for tasks that do not wait for a time.
    """

    id: str
    state: TaskState
    attempt: int | None = None
    fraction: float | None = None
    text: str | None = None
    worker_id: str | None = None
    since: datetime.datetime | None = None
    due: datetime.datetime | None = None

    @property
    def has_ended(self) -> bool:
        """True if the task has a result."""
        return self.state in ENDS


def task_prefix(agent_type: str) -> str:
    """The start of the topic types of all tasks of an agent type."""
    return f"{_TOPICS}{agent_type}:"


def checked_result_ttl(result_ttl: float) -> float:
    """The seconds for which the result of a task is to be kept.

    Raises ValueError if it is not a number from 1, which is the least time to live of a message, to `MOST`.
    """
    if isinstance(result_ttl, bool) or not isinstance(result_ttl, int | float) or not 1 <= result_ttl <= MOST:
        raise ValueError(f"result_ttl must be a number of seconds from 1 to {MOST:,}, not {result_ttl!r:.60}")
    return result_ttl


def is_task(topic_type: str) -> bool:
    """True if a topic of this type is that of a task."""
    return topic_type.startswith(_TOPICS)


def task_of(topic: TopicId | None) -> TaskId | None:
    """The task with this topic; None if it is not that of a task."""
    if topic is None or not topic.type.startswith(_TOPICS):
        return None
    agent_type, colon, token = topic.type.removeprefix(_TOPICS).partition(":")
    try:
        return TaskId._named(AgentId(agent_type, topic.source), decode_token(token)) if colon else None
    except ValueError:
        return None
