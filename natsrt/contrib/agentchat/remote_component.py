"""`RemoteComponent`: what `RemoteChatAgent` and `RemoteTeam` have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self, cast

from autogen_core import AgentType

from natsrt import NatsAgentRuntime
from natsrt.contrib.agentchat.announcement import Kind
from natsrt.contrib.agentchat.components import RemoteConfig
from natsrt.contrib.agentchat.remote import Remote, mapping, wait_for_worker
from natsrt.contrib.agentchat.requests import LoadState, SaveState, State
from natsrt.contrib.agentchat.session import OnQuestion, Session


class RemoteComponent(ABC):
    """An agent or a team that lives on a worker. The arguments are described at `RemoteChatAgent`."""

    component_config_schema: type[RemoteConfig] = RemoteConfig
    kind: ClassVar[Kind]
    """What it is, as workers announce it."""

    def __init__(
        self,
        type: str | AgentType,
        runtime: NatsAgentRuntime,
        *,
        name: str | None = None,
        description: str | None = None,
        session: str | None = None,
        message_types: Iterable[Any] = (),
        retries: int = 0,
        on_question: OnQuestion | None = None,
    ) -> None:
        self._begin(
            Remote.of(
                self.kind,
                type,
                runtime,
                name=name,
                description=description,
                session=session,
                message_types=message_types,
                retries=retries,
                on_question=on_question,
            )
        )

    @abstractmethod
    def _begin(self, remote: Remote) -> None:
        """What the constructor does when it knows who it is. Call this one too."""
        self._remote: Remote = remote
        self._session: Session = remote.session

    @classmethod
    async def connect(
        cls,
        type: str | AgentType,
        runtime: NatsAgentRuntime,
        *,
        timeout: float | None = None,
        name: str | None = None,
        description: str | None = None,
        session: str | None = None,
        message_types: Iterable[Any] = (),
        retries: int = 0,
        on_question: OnQuestion | None = None,
    ) -> Self:
        """Wait until a live worker hosts the type, and return the agent or team. The arguments are those of the class.

        Args:
            timeout: Seconds to wait. None: without a limit.

        Raises:
            AgentNotServed: The time is up.
            RuntimeError: The runtime is not started.
            Exception: What the constructor and `NatsAgentRuntime.wait_for` raise.
        """
        await wait_for_worker(type, runtime, timeout)
        return cls(
            type,
            runtime,
            name=name,
            description=description,
            session=session,
            message_types=message_types,
            retries=retries,
            on_question=on_question,
        )

    @property
    def session(self) -> str:
        """The session, for others that are to share or to resume it."""
        return self._session.agent_id.key

    async def save_state(self) -> Mapping[str, Any]:
        """Return the state after the last turn that was completed, as the agent or team itself saves it."""
        return cast(State, await self._session.call(SaveState())).state

    async def load_state(self, state: Mapping[str, Any]) -> None:
        """Load a state of the agent or team, and store it. One in this process may have saved it.

        Raises TypeError if the state is no mapping, and RuntimeError if it is a team that runs.
        """
        await self._session.call(LoadState(mapping(state)))

    async def close(self) -> None:
        """Let the worker release what it holds in memory. The session stays, and goes on with the next turn."""
        await self._session.close()

    async def forget(self) -> None:
        """End the session, after the turns before this: nothing of it stays stored, and the next turn begins anew.

        All who share the session lose it. It needs a live worker, which may have to make the agent or team first;
        without one, use ``natsrt state rm``. Has no effect on a session that had no turn. After an error it may be
        called again.

        Raises:
            RuntimeError: It is a team that runs.
            StateNotSaved: The worker cannot delete what is stored. The session stays.
            Exception: What `NatsAgentRuntime.send_message` raises.
        """
        await self._session.forget()

    def _to_config(self) -> RemoteConfig:
        return self._remote.config()

    @classmethod
    def _from_config(cls, config: RemoteConfig) -> Self:
        made = cls.__new__(cls)
        made._begin(Remote.loaded(cls.kind, config))
        return made
