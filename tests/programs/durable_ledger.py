"""A worker of the keyed type ``ledger``, which writes down the events that it handles. It prints what it does.

Arguments: URL of the server, namespace, name of the worker, ``ack_wait`` in seconds, ``max_deliver``.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autogen_core import MessageContext, RoutedAgent, TypeSubscription, event, rpc

import natsrt
from natsrt import NatsAgentRuntime

SETTINGS: dict[str, Any] = {"durable": ["work."], "retry_delay": 0.05, "retry_delay_max": 0.2}


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@dataclass
class Entry:
    number: int
    what: str = ""


@dataclass
class Ask:
    pass


@dataclass
class Entries:
    numbers: list[int]


@natsrt.keyed
class Ledger(RoutedAgent):
    """Keeps the numbers of its events, in the order in which it handled them."""

    def __init__(self) -> None:
        super().__init__("keeps numbers")
        self._numbers: list[int] = []

    @event
    async def on_entry(self, message: Entry, ctx: MessageContext) -> None:
        delivery = natsrt.current_delivery()
        assert delivery is not None
        match message.what:
            case "fail":
                raise ValueError(f"entry {message.number}")
            case "reject":
                tell(f"rejects {message.number}")
                raise natsrt.Reject("no such entry")
            case "hang":
                tell(f"hangs {message.number}")
                await asyncio.Event().wait()
            case "later" if delivery.attempt == 1:
                tell(f"later {message.number}")
                raise natsrt.Retry(after=120.0)
            case "retry" if delivery.attempt == 1:
                raise natsrt.Retry(after=0.05)
            case "long":
                await asyncio.sleep(1.5)
            case "slow":
                tell(f"begun {message.number}")
                await asyncio.sleep(0.1)
            case "die":
                tell(f"dies of {message.number}")
                os._exit(1)
        self._numbers.append(message.number)

    @rpc
    async def on_ask(self, message: Ask, ctx: MessageContext) -> Entries:
        return Entries(self._numbers)

    async def save_state(self) -> Mapping[str, Any]:
        return {"numbers": self._numbers}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self._numbers = list(state["numbers"])


async def host(runtime: NatsAgentRuntime) -> None:
    """Register the type. Call it before the start."""
    await Ledger.register(runtime, "ledger", Ledger)
    await runtime.add_subscription(TypeSubscription("work.entries", "ledger"))


async def main(url: str, namespace: str, name: str, ack_wait: str, max_deliver: str) -> None:
    settings = SETTINGS | {"ack_wait": float(ack_wait), "max_deliver": int(max_deliver)}
    runtime = NatsAgentRuntime(url, namespace=namespace, name=name, **settings)
    await host(runtime)
    async with runtime:
        tell("ready")
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
