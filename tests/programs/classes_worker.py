"""A worker process whose message classes have the same names: ``classes_worker.py URL NAMESPACE``.

It hosts ``orders``, ``payments``, ``either``, which handles the requests of both, and ``stranger``, whose replies
contain objects of a class that no other process has. It says ``ready`` when it serves them.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import Any

from autogen_core import MessageContext, RoutedAgent, message_handler

import natsrt
from tests.programs import orders, payments


class Either(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("takes the requests of both")

    @message_handler
    async def on_request(self, message: orders.Request | payments.Request, ctx: MessageContext) -> str:
        return type(message).__module__


@dataclass
class Alone:
    """Unknown to all other processes."""

    name: str


@dataclass
class Inside:
    """Unknown to all other processes."""

    name: str


class Stranger(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("returns what nobody else knows")

    @message_handler
    async def on_text(self, message: str, ctx: MessageContext) -> Any:
        return Alone("a") if message == "alone" else [Inside("a")]


async def main() -> None:
    url, namespace = sys.argv[1:]
    runtime = natsrt.NatsAgentRuntime(url, namespace=namespace)
    await natsrt.register(runtime, orders.Orders, "orders", orders.Orders)
    await natsrt.register(runtime, payments.Payments, "payments", payments.Payments)
    await natsrt.register(runtime, Either, "either", Either)
    await natsrt.register(runtime, Stranger, "stranger", Stranger)
    await runtime.start()
    print("ready", flush=True)  # noqa: T201
    await runtime.stop_when_signal()


asyncio.run(main())
