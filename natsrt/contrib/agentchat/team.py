"""`RemoteTeam`: a team that lives on a worker, in any process."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, ClassVar, cast

from autogen_agentchat.base import TaskResult, Team
from autogen_agentchat.messages import BaseAgentEvent, BaseChatMessage, TextMessage
from autogen_core import CancellationToken, Component

from natsrt.contrib.agentchat.announcement import Kind
from natsrt.contrib.agentchat.chain import waiting
from natsrt.contrib.agentchat.components import RemoteConfig
from natsrt.contrib.agentchat.remote import Remote
from natsrt.contrib.agentchat.remote_component import RemoteComponent
from natsrt.contrib.agentchat.requests import Pause, Reset, Resume, TeamRun


class RemoteTeam(RemoteComponent, Team, Component[RemoteConfig]):
    """A team that a worker hosts with `host`. Use it as any other one: alone, in another team, or as a tool.

    Its manager and its participants are at the worker, or wherever that finds them, and its state is stored there after
    each run. What they say comes as they say it. A run that is cancelled, or left in the middle, does not count.

    The arguments, and what is raised, are those of `RemoteChatAgent`. The name may be any text.
    """

    component_provider_override: ClassVar[str | None] = "natsrt.agentchat.RemoteTeam"
    kind: ClassVar[Kind] = "team"

    def _begin(self, remote: Remote) -> None:
        super()._begin(remote)
        self._running = False

    @property
    def name(self) -> str:
        """The name of the team here."""
        return self._remote.announcement.name

    @property
    def description(self) -> str:
        """What the team is for."""
        return self._remote.announcement.description

    async def run(
        self,
        *,
        task: str | BaseChatMessage | Sequence[BaseChatMessage] | None = None,
        cancellation_token: CancellationToken | None = None,
        output_task_messages: bool = True,
    ) -> TaskResult:
        """Run the team, and return the result. Arguments and errors are those of `run_stream`."""
        result: TaskResult | None = None
        async for item in self.run_stream(
            task=task, cancellation_token=cancellation_token, output_task_messages=output_task_messages
        ):
            if isinstance(item, TaskResult):
                result = item
        assert result is not None, "the stream ends with the result, or raises"
        return result

    async def run_stream(
        self,
        *,
        task: str | BaseChatMessage | Sequence[BaseChatMessage] | None = None,
        cancellation_token: CancellationToken | None = None,
        output_task_messages: bool = True,
    ) -> AsyncGenerator[BaseAgentEvent | BaseChatMessage | TaskResult, None]:
        """Run the team, and give what is said; the result comes last, when the state is stored.

        Args:
            task: As in AutoGen's teams. None: the team goes on.
            cancellation_token: Ends the run. None: it cannot be cancelled by a token.
            output_task_messages: Whether what is said begins with the task.

        Raises:
            ValueError: The team is running, or ``task`` is no task.
            asyncio.CancelledError: The token was cancelled.
            Exception: What the team raises, with its class as far as natsrt knows it, and what
                `NatsAgentRuntime.stream_message` raises, such as `WorkerLost`.
        """
        run = TeamRun(
            task=_messages(task),
            output_task_messages=output_task_messages,
            turn=uuid.uuid4().hex,
            keep=self._session.retries > 0,
            callers=waiting(),
            started=True,
        )
        if self._running:
            raise ValueError("The team is already running, it cannot run again until it is stopped.")
        with self._busy():
            async with aclosing(self._session.turn(run, cancellation_token)) as items:
                async for item in items:
                    yield cast(BaseAgentEvent | BaseChatMessage | TaskResult, item)

    async def reset(self) -> None:
        """Reset the team, and store that. Raises RuntimeError if it is running."""
        if self._running:
            raise RuntimeError("The group chat is currently running. It must be stopped before it can be reset.")
        with self._busy():
            await self._session.call(Reset())

    async def pause(self) -> None:
        """Pause the participants, in the middle of a run. Raises RuntimeError if the team has not run yet."""
        await self._session.call(Pause())

    async def resume(self) -> None:
        """Resume the participants, in the middle of a run. Raises RuntimeError if the team has not run yet."""
        await self._session.call(Resume())

    async def load_state(self, state: Mapping[str, Any]) -> None:
        """Load a state of the team, and store it. A team in this process may have saved it.

        Raises RuntimeError if the team is running, and TypeError if the state is no mapping.
        """
        if self._running:
            raise RuntimeError("The team cannot be loaded while it is running.")
        with self._busy():
            await super().load_state(state)

    async def forget(self) -> None:
        """As `RemoteChatAgent.forget`. Raises RuntimeError if the team is running."""
        if self._running:
            raise RuntimeError("The session cannot be ended while the team is running.")
        with self._busy():
            await super().forget()

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._running = True
        try:
            yield
        finally:
            self._running = False


def _messages(task: str | BaseChatMessage | Sequence[BaseChatMessage] | None) -> list[BaseChatMessage] | None:
    """A task as messages. Raises ValueError, as AutoGen's teams do."""
    if task is None:
        return None
    if isinstance(task, str):
        return [TextMessage(content=task, source="user")]
    if isinstance(task, BaseChatMessage):
        return [task]
    if not isinstance(task, Sequence):
        raise ValueError("Task must be a string, a BaseChatMessage, or a list of BaseChatMessage.")
    messages: list[Any] = list(task)
    if not messages:
        raise ValueError("Task list cannot be empty.")
    if not all(isinstance(message, BaseChatMessage) for message in messages):
        raise ValueError("All messages in task list must be valid BaseChatMessage types")
    return messages
