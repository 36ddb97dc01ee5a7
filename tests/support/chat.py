"""An agent of AgentChat that counts what it gets, and what tests of sessions need beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from autogen_agentchat.agents import BaseChatAgent
from autogen_agentchat.base import ChatAgent, Response, Team
from autogen_agentchat.messages import BaseAgentEvent, BaseChatMessage, TextMessage, ThoughtEvent
from autogen_core import CancellationToken


class Odd(ThoughtEvent):
    """An event that cannot be sent if its value is no number."""

    content: str = ""
    value: float


class Counter(BaseChatAgent):
    """Keeps what it gets, and says how much that is. What a message says, it does."""

    def __init__(self, name: str = "counter") -> None:
        super().__init__(name, "counts messages")
        self.got: list[str] = []
        self.events: list[str] = []
        self.saves = 0
        self.may_go_on = asyncio.Event()

    @property
    def produced_message_types(self) -> Sequence[type[BaseChatMessage]]:
        return (TextMessage,)

    async def on_messages(self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken) -> Response:
        async for item in self.on_messages_stream(messages, cancellation_token):
            if isinstance(item, Response):
                return item
        raise AssertionError

    async def on_messages_stream(
        self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken
    ) -> AsyncGenerator[BaseAgentEvent | BaseChatMessage | Response, None]:
        self.got += [message.to_text() for message in messages]
        thought = ThoughtEvent(content=f"{len(self.got)} so far", source=self.name)
        yield thought
        if "odd" in self.got:
            yield Odd(value=float("nan"), source=self.name)
        if "fail" in self.got:
            raise ValueError("it failed")
        if "wait" in self.got:
            self.events.append("waits")
            waiting = asyncio.ensure_future(self.may_go_on.wait())
            if "deaf" in self.got:
                cancellation_token.add_callback(self.may_go_on.set)
            else:
                cancellation_token.link_future(waiting)
            try:
                await waiting
            except asyncio.CancelledError:
                self.events.append("cancelled")
                raise
        yield Response(chat_message=TextMessage(content=str(len(self.got)), source=self.name), inner_messages=[thought])

    async def on_reset(self, cancellation_token: CancellationToken) -> None:
        self.got.clear()

    async def on_pause(self, cancellation_token: CancellationToken) -> None:
        self.events.append("paused")

    async def on_resume(self, cancellation_token: CancellationToken) -> None:
        self.events.append("resumed")

    async def save_state(self) -> Mapping[str, Any]:
        self.saves += 1
        return {"got": list(self.got)}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.got = list(state["got"])

    async def close(self) -> None:
        self.events.append("closed")


class CancelsItself(Counter):
    async def on_messages_stream(
        self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken
    ) -> AsyncGenerator[BaseAgentEvent | BaseChatMessage | Response, None]:
        raise asyncio.CancelledError
        yield


class Made:
    """A factory that keeps what it has made, without the one that `host` looks at."""

    def __init__(self, factory: Callable[[], Any] = Counter) -> None:
        self._factory = factory
        self._made: list[Any] = []

    def __call__(self) -> Any:
        self._made.append(self._factory())
        return self._made[-1]

    @property
    def all(self) -> list[Any]:
        return self._made[1:]


async def said(agent: ChatAgent | Team, task: str) -> str:
    async with asyncio.timeout(10):
        return (await agent.run(task=task)).messages[-1].to_text()
