"""What a remote agent or team is made of: who it is, and its session."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from autogen_agentchat.messages import (
    BaseChatMessage,
    HandoffMessage,
    MultiModalMessage,
    StopMessage,
    TextMessage,
    ToolCallSummaryMessage,
)
from autogen_core import AgentId, AgentType

from natsrt import NatsAgentRuntime
from natsrt.contrib.agentchat.announcement import Announcement, Kind, announced
from natsrt.contrib.agentchat.components import RemoteConfig, dump_types, load_types
from natsrt.contrib.agentchat.message_types import MessageTypes
from natsrt.contrib.agentchat.runtimes import GivenRuntime, OwnRuntimes, Runtimes
from natsrt.contrib.agentchat.session import OnQuestion, Session
from natsrt.contrib.servers import config_of, settings_in
from natsrt.errors import NatsrtError

_USUAL: Final[tuple[type[BaseChatMessage], ...]] = (
    TextMessage,
    ToolCallSummaryMessage,
    HandoffMessage,
    MultiModalMessage,
    StopMessage,
)
"""The messages that an agent may send of which nothing is announced."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A remote agent or team: who it is, and its session. ``produces`` are the message classes of its answers."""

    announcement: Announcement
    produces: Sequence[type[BaseChatMessage]]
    session: Session
    types: MessageTypes
    runtimes: Runtimes
    key: str | None
    """The session that the user has named; None if it is this object's own."""

    @classmethod
    def of(
        cls,
        kind: Kind,
        type: str | AgentType,
        runtime: NatsAgentRuntime,
        *,
        name: str | None,
        description: str | None,
        session: str | None,
        message_types: Iterable[Any],
        retries: int,
        on_question: OnQuestion | None,
    ) -> Remote:
        """What the arguments of a constructor say, and the registry where they say nothing. Raises as `RemoteTeam`."""
        if not isinstance(runtime, NatsAgentRuntime):
            raise TypeError(f"runtime must be a NatsAgentRuntime, not {runtime!r:.80}")
        agent_type = type.type if isinstance(type, AgentType) else type
        types = MessageTypes(message_types)
        announcement = _announcement(runtime, agent_type, kind, name, description)
        produces = _classes(agent_type, announcement, types)
        runtimes = GivenRuntime(runtime, types)
        return cls._with(runtimes, agent_type, announcement, produces, types, session, retries, on_question)

    @classmethod
    def loaded(cls, kind: Kind, config: RemoteConfig) -> Remote:
        """What a configuration says. It makes runtimes of its own."""
        types = MessageTypes(load_types(config.message_types))
        announcement = Announcement(kind, config.name, config.description, tuple(config.produces))
        produces = _classes(config.type, announcement, types)
        runtimes = OwnRuntimes(settings_in(config), types)
        return cls._with(runtimes, config.type, announcement, produces, types, config.session, config.retries, None)

    @classmethod
    def _with(
        cls,
        runtimes: Runtimes,
        agent_type: str,
        announcement: Announcement,
        produces: Sequence[type[BaseChatMessage]],
        types: MessageTypes,
        session: str | None,
        retries: int,
        on_question: OnQuestion | None,
    ) -> Remote:
        if session is not None and (not isinstance(session, str) or not session):
            raise ValueError(f"session must be a text that is not empty, not {session!r:.80}")
        agent_id = AgentId(agent_type, session or uuid.uuid4().hex)
        one = Session(runtimes, agent_id, retries=retries, on_question=on_question)
        return cls(announcement, produces, one, types, runtimes, session)

    def config(self) -> RemoteConfig:
        """The configuration, without credentials, and without a session that is this object's own."""
        return RemoteConfig(
            type=self.session.agent_id.type,
            **config_of(self.runtimes.options),
            session=self.key,
            name=self.announcement.name,
            description=self.announcement.description,
            produces=list(self.announcement.produces),
            message_types=dump_types(self.types),
            retries=self.session.retries,
        )


async def wait_for_worker(type: str | AgentType, runtime: NatsAgentRuntime, timeout: float | None) -> None:
    """Wait until a live worker hosts the type. Raises as `NatsAgentRuntime.wait_for`."""
    if not isinstance(runtime, NatsAgentRuntime):
        raise TypeError(f"runtime must be a NatsAgentRuntime, not {runtime!r:.80}")
    try:
        await runtime.wait_for(type, timeout=timeout)
    except RuntimeError as error:
        if isinstance(error, NatsrtError) or runtime.worker_id is not None:
            raise
        raise RuntimeError(_not_started(type)) from error


def _not_started(type: str | AgentType) -> str:
    name = type.type if isinstance(type, AgentType) else type
    return (
        f"the runtime is not started, so it cannot find the workers of {name!r}: start it first (before `host`, if "
        "this is in a factory), or use the constructor, with name=... and description=..."
    )


def mapping(state: Any) -> dict[str, Any]:
    """A state to load, as a dict. Raises TypeError if it is no mapping."""
    if not isinstance(state, Mapping):
        raise TypeError(f"a state must be a mapping, as save_state returns it, not {state!r:.80}")
    return dict(state)


def _announcement(
    runtime: NatsAgentRuntime, agent_type: str, kind: Kind, name: str | None, description: str | None
) -> Announcement:
    try:
        found = announced(runtime, agent_type, kind)
    except RuntimeError as error:  # not started yet
        if name is None or description is None:
            raise RuntimeError(_not_started(agent_type)) from error
        found = None
    if found is None:
        if name is None or description is None:
            raise LookupError(
                f"this runtime knows no live worker that hosts {agent_type!r}, so its name and description are not "
                "known: wait for one with `await connect(...)` of this class, or pass name and description"
            )
        return Announcement(kind, name, description)
    return Announcement(
        kind,
        found.name if name is None else name,
        found.description if description is None else description,
        found.produces,
    )


def _classes(agent_type: str, announcement: Announcement, types: MessageTypes) -> Sequence[type[BaseChatMessage]]:
    """The classes of what is announced, and those that the user has named. Raises ValueError if one is not known."""
    found = {name: types.find(name) for name in announcement.produces}
    if unknown := [name for name, cls in found.items() if cls is None]:
        raise ValueError(
            f"the agent type {agent_type!r} sends messages of a type that is not known here: pass "
            f"message_types=[{', '.join(unknown)}]"
        )
    chat = [
        cls for cls in (*(found.values() or _USUAL), *types) if cls is not None and issubclass(cls, BaseChatMessage)
    ]
    return list(dict.fromkeys(chat))
