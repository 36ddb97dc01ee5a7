"""The transcript of a room: a keyed agent, so that it outlives every process but the NATS server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from autogen_core import MessageContext, RoutedAgent, message_handler

import natsrt
from examples.chat.messages import Keep, Kept, Line, Recall


@natsrt.keyed
class Transcript(RoutedAgent):
    """Keeps the lines of one room. The key is the room."""

    def __init__(self) -> None:
        super().__init__("keeps what has been said in a room")
        self._lines: list[Line] = []

    @message_handler
    async def keep(self, message: Keep, ctx: MessageContext) -> None:
        self._lines = message.lines

    @message_handler
    async def recall(self, message: Recall, ctx: MessageContext) -> Kept:
        return Kept(self._lines)

    async def save_state(self) -> Mapping[str, Any]:
        return {"lines": [asdict(line) for line in self._lines]}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self._lines = [Line(**line) for line in state["lines"]]
