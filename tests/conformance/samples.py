"""Messages and agents that the conformance tests share."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
from pydantic import BaseModel


@dataclass
class Text:
    content: str


@dataclass
class Number:
    value: int


@dataclass
class Point:
    x: int
    y: float


@dataclass
class Line:
    start: Point
    end: Point | None = None
    between: list[Point] = field(default_factory=list)
    named: dict[str, Point] = field(default_factory=dict)


class Shape(BaseModel):
    name: str


class Circle(Shape):
    radius: float


class Drawing(BaseModel):
    background: Shape
    shapes: list[Shape]


@dataclass
class Seen:
    """One message that an agent got."""

    agent: AgentId
    message: Any
    context: MessageContext


class Recorder(RoutedAgent):
    """Keeps every `Text` that it gets."""

    def __init__(self, seen: list[Seen]) -> None:
        super().__init__("keeps what it gets")
        self.seen = seen

    @message_handler
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        self.seen.append(Seen(self.id, message, ctx))
        return Text(f"{self.id.key} got {message.content}")


class Counter(RoutedAgent):
    """Has a state, and tells whether it was closed."""

    def __init__(self) -> None:
        super().__init__("counts")
        self.count = 0
        self.closed = 0

    @message_handler
    async def on_number(self, message: Number, ctx: MessageContext) -> Number:
        self.count += message.value
        return Number(self.count)

    async def save_state(self) -> Mapping[str, Any]:
        return {"count": self.count}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]

    async def close(self) -> None:
        self.closed += 1


class Waiter(RoutedAgent):
    """Waits in its handler until ``release`` is set."""

    def __init__(self, entered: asyncio.Event, release: asyncio.Event, contexts: list[MessageContext]) -> None:
        super().__init__("waits")
        self.entered = entered
        self.release = release
        self.contexts = contexts

    @message_handler
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        self.contexts.append(ctx)
        self.entered.set()
        await self.release.wait()
        return message


def contents(seen: list[Seen]) -> list[str]:
    """The texts in the order in which they were handled."""
    return [one.message.content for one in seen]
