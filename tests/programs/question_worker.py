"""A worker of the agent type ``asking``, whose handlers ask their callers.

Arguments: URL of the server, namespace, name of the worker, and whether the type is keyed (``keyed`` or empty).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler, rpc

import natsrt
from natsrt import NatsAgentRuntime
from tests.programs.stream_worker import Item, Odd, tell


@dataclass
class Ask:
    """Ask ``times`` questions with texts of ``size`` characters, with an item before each."""

    times: int = 1
    size: int = 0
    timeout: float | None = None
    what: str = ""


@dataclass
class Question:
    number: int
    text: str = ""


@dataclass
class Answer:
    number: int
    text: str = ""


@dataclass
class Answered:
    numbers: list[int] = field(default_factory=list)
    error: str = ""


@dataclass
class Touch:
    pass


class Asking(RoutedAgent):
    """Notes in ``notes`` what happened to its questions."""

    def __init__(self, notes: list[str] | None = None) -> None:
        super().__init__("asking")
        self.notes = [] if notes is None else notes
        self.asked = 0

    async def save_state(self) -> Mapping[str, Any]:
        return {"asked": self.asked}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.asked = state["asked"]

    async def _ask(self, message: Ask, number: int) -> int:
        self.asked += 1
        try:
            async with asyncio.timeout(message.timeout):
                answer = await natsrt.ask(Question(number, "q" * message.size), reply_type=Answer)
        except BaseException as error:
            self.notes.append(type(error).__name__)
            tell(f"asked in vain: {type(error).__name__}")
            raise
        assert answer.text == "a" * message.size
        return answer.number

    @message_handler
    async def ask(self, message: Ask, ctx: MessageContext) -> Answered:
        if message.what == "together":
            asked = (self._ask(message, number) for number in range(1, message.times + 1))
            return Answered(list(await asyncio.gather(*asked)))
        if message.what == "relay":
            answered: Answered = await natsrt.runtime_of(self).send_message(
                Ask(message.times), AgentId("asking", "other"), on_question=natsrt.ask
            )
            return answered
        numbers = []
        for number in range(1, message.times + 1):
            self.notes.append(str(await natsrt.emit(Item(number))))
            numbers.append(await self._ask(message, number))
        return Answered(numbers)

    @natsrt.streaming
    async def stream(self, message: str, ctx: MessageContext) -> AsyncGenerator[Item | Answered, None]:
        if message == "fails":
            try:
                await self._ask(Ask(), 1)
            except Odd as error:
                yield Answered(error=str(error))
            return
        yield Item(1)
        answer = await self._ask(Ask(), 1)
        yield Item(2)
        yield Answered([answer])

    @rpc
    async def touch(self, message: Touch, ctx: MessageContext) -> Answered:
        return Answered([self.asked])


async def main(url: str, namespace: str, name: str, keyed: str) -> None:
    runtime = NatsAgentRuntime(url, namespace=namespace, name=name)
    await runtime.register_factory("asking", Asking, expected_class=Asking, keyed=bool(keyed))
    await runtime.start()
    tell("ready")
    await runtime.stop_when_signal()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
