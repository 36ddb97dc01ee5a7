"""A service whose message classes have the same names, and the same fields, as those of `tests.programs.orders`."""

from __future__ import annotations

from dataclasses import dataclass
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


class Payments(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("takes payments")

    @message_handler
    async def on_request(self, message: Request, ctx: MessageContext) -> Response:
        return Response(f"paid {message.text}", message.content)
