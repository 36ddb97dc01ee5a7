"""Asking a human from a handler: the handler waits, and the event loop goes on.

`input()` blocks its thread until the human has answered. In a handler it would block the event loop: the runtime could
not answer the server's pings, and after some seconds the server would disconnect it. `asyncio.to_thread` runs it in a
thread of its own. Meanwhile the runtime handles other messages.

Run it: python examples/ask_human.py
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
from local_server import local_server

from natsrt import NatsAgentRuntime


@dataclass
class Question:
    text: str


@dataclass
class Answer:
    text: str


class Human(RoutedAgent):
    """Passes questions to the human at the terminal, one at a time."""

    def __init__(self) -> None:
        super().__init__("asks the human at the terminal")
        self._terminal = asyncio.Lock()

    @message_handler
    async def ask(self, message: Question, ctx: MessageContext) -> Answer:
        async with self._terminal:
            try:
                return Answer(await asyncio.to_thread(input, f"{message.text} "))
            except EOFError:  # there is no terminal
                return Answer("no")


class Clerk(RoutedAgent):
    """Orders only what the human agrees to."""

    @message_handler
    async def order(self, message: str, ctx: MessageContext) -> str:
        answer: Answer = await self.send_message(Question(f"Order {message}?"), AgentId("human", "default"))
        return f"{message}: {'ordered' if answer.text.lower().startswith('y') else 'not ordered'}"


async def main() -> None:
    async with local_server() as url, NatsAgentRuntime(url) as runtime:
        await Human.register(runtime, "human", Human)
        await runtime.register_factory("clerk", lambda: Clerk("orders"), expected_class=Clerk)
        orders = [runtime.send_message(goods, AgentId("clerk", "default")) for goods in ("paper", "a piano")]
        for outcome in await asyncio.gather(*orders):
            print(f"\n{outcome}")


if __name__ == "__main__":
    asyncio.run(main())
