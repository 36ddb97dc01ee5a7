"""`RemoteChatAgent`: a chat agent that lives on a worker, in any process."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import ClassVar, cast

from autogen_agentchat.agents import BaseChatAgent
from autogen_agentchat.base import Response
from autogen_agentchat.messages import BaseAgentEvent, BaseChatMessage
from autogen_core import CancellationToken, Component

from natsrt.contrib.agentchat.announcement import Kind
from natsrt.contrib.agentchat.chain import waiting
from natsrt.contrib.agentchat.components import RemoteConfig
from natsrt.contrib.agentchat.remote import Remote
from natsrt.contrib.agentchat.remote_component import RemoteComponent
from natsrt.contrib.agentchat.requests import ChatTurn, Pause, Reset, Resume


class RemoteChatAgent(RemoteComponent, BaseChatAgent, Component[RemoteConfig]):
    """A chat agent that a worker hosts with `host`. Use it as any other one: alone, in a team, or as a tool.

    Its model, tools and memory are at the worker, and its state is stored there after each turn. What it says comes as
    it says it. A turn that is cancelled, or left in the middle, does not count.

    Args:
        type: The agent type.
        runtime: A runtime that is started. It need not host anything.
        name: The name of the agent here, as in a team. What it says has this name as its source. None: the name that
            the worker announces.
        description: None: the description that the worker announces.
        session: Whose conversation it is: agents with the same session, in any process, share one. It is kept until
            `forget`. None: one of this object's own; `session` says which.
        message_types: Message classes beside AutoGen's own that are sent to the agent, or come from it, such as
            ``StructuredMessage[Plan]``.
        retries: How often a turn is tried again whose worker is lost. The agent gets its messages once, whatever
            happens; a tool that was called by then may be called again.
        on_question: Answers what the agent asks with `natsrt.ask`, as that of ``stream_message``. None: nobody does.

    Raises:
        LookupError: No live worker hosts the type, and ``name`` or ``description`` is None. See `connect`.
        ValueError: The type is hosted otherwise, or sends messages of a class that is not known here; ``retries`` is
            no whole number of at least 0; or the name is no Python identifier.
        TypeError: ``runtime`` is another runtime, or ``message_types`` has something else.
        RuntimeError: The runtime is not started, and ``name`` or ``description`` is None.
    """

    component_provider_override: ClassVar[str | None] = "natsrt.agentchat.RemoteChatAgent"
    kind: ClassVar[Kind] = "agent"

    def _begin(self, remote: Remote) -> None:
        BaseChatAgent.__init__(self, remote.announcement.name, remote.announcement.description)
        super()._begin(remote)

    @property
    def produced_message_types(self) -> Sequence[type[BaseChatMessage]]:
        """The classes that the worker announces, and those of ``message_types``."""
        return self._remote.produces

    async def on_messages(self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken) -> Response:
        """Have the agent answer. Raises as `on_messages_stream`."""
        response: Response | None = None
        async for item in self.on_messages_stream(messages, cancellation_token):
            if isinstance(item, Response):
                response = item
        assert response is not None, "the stream ends with the response, or raises"
        return response

    async def on_messages_stream(
        self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken
    ) -> AsyncGenerator[BaseAgentEvent | BaseChatMessage | Response, None]:
        """Have the agent answer, and give what it says meanwhile; the response comes last, when the turn is stored.

        Raises:
            asyncio.CancelledError: The token was cancelled.
            Exception: What the agent raises, with its class as far as natsrt knows it, and what
                `NatsAgentRuntime.stream_message` raises, such as `WorkerLost`.
        """
        turn = ChatTurn(
            messages=list(messages),
            name=self.name,
            turn=uuid.uuid4().hex,
            keep=self._session.retries > 0,
            callers=waiting(),
            started=True,
        )
        async with aclosing(self._session.turn(turn, cancellation_token)) as items:
            async for item in items:
                yield cast(BaseAgentEvent | BaseChatMessage | Response, item)

    async def on_reset(self, cancellation_token: CancellationToken) -> None:
        """Reset the agent, and store that."""
        await self._session.call(Reset(), cancellation_token)

    async def on_pause(self, cancellation_token: CancellationToken) -> None:
        """Pause the agent, in the middle of a turn too."""
        await self._session.call(Pause(), cancellation_token)

    async def on_resume(self, cancellation_token: CancellationToken) -> None:
        """Resume the agent, in the middle of a turn too."""
        await self._session.call(Resume(), cancellation_token)
