"""One call: a runtime calls an agent that another runtime hosts, and gets its reply or its exception.

Run it: python examples/one_call.py
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
from local_server import local_server

from natsrt import NatsAgentRuntime


@dataclass
class Division:
    dividend: int
    divisor: int


@dataclass
class Quotient:
    value: float


class Calculator(RoutedAgent):
    @message_handler
    async def divide(self, message: Division, ctx: MessageContext) -> Quotient:
        return Quotient(message.dividend / message.divisor)


async def main() -> None:
    # The two runtimes represent two processes: they exchange messages only through the server.
    async with local_server() as url, NatsAgentRuntime(url) as worker, NatsAgentRuntime(url) as caller:
        await Calculator.register(worker, "calculator", lambda: Calculator("divides"))
        calculator = AgentId("calculator", "default")

        quotient = await caller.send_message(Division(42, 4), calculator)
        assert quotient == Quotient(10.5)
        print(f"42 / 4 = {quotient.value}")

        try:
            await caller.send_message(Division(1, 0), calculator)
        except ZeroDivisionError as error:
            print(f"1 / 0 raised {type(error).__name__}: {error}")


if __name__ == "__main__":
    asyncio.run(main())
