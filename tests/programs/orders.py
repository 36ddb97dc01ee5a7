"""A service whose message classes have the same names, and the same fields, as those of `tests.programs.payments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autogen_core import MessageContext, RoutedAgent, message_handler


@dataclass
class Item:
    name: str


@dataclass
class Request:
    text: str
    content: Any = None


@dataclass
class Response:
    text: str
    content: Any = None


@dataclass
class Batch:
    """Not a class of the other module."""

    items: list[Any] = field(default_factory=list)


class Orders(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("takes orders")

    @message_handler
    async def on_request(self, message: Request, ctx: MessageContext) -> Response:
        return Response(f"ordered {message.text}", message.content)

    @message_handler
    async def on_batch(self, message: Batch, ctx: MessageContext) -> Batch:
        return message
