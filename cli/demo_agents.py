"""The two agents of ``natsrt demo``."""

from __future__ import annotations

from dataclasses import dataclass

import click
from autogen_core import MessageContext, RoutedAgent, event, rpc, type_subscription

TOPIC = "demo.news"


@dataclass
class Text:
    """The message of calls to both agents, and of their replies."""

    text: str


@dataclass
class Headline:
    """The event that both agents receive."""

    headline: str


@type_subscription(TOPIC)
class Reverse(RoutedAgent):
    """Answers with the text reversed."""

    def __init__(self) -> None:
        super().__init__("Reverses text")

    @rpc
    async def reverse(self, message: Text, ctx: MessageContext) -> Text:
        return Text(message.text[::-1])

    @event
    async def read(self, message: Headline, ctx: MessageContext) -> None:
        click.echo(f"reverse reads: {message.headline[::-1]}")


@type_subscription(TOPIC)
class Upper(RoutedAgent):
    """Answers with the text in upper case."""

    def __init__(self) -> None:
        super().__init__("Turns text into upper case")

    @rpc
    async def upper(self, message: Text, ctx: MessageContext) -> Text:
        return Text(message.text.upper())

    @event
    async def read(self, message: Headline, ctx: MessageContext) -> None:
        click.echo(f"upper reads: {message.headline.upper()}")
