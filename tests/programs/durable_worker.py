"""A worker of the type ``jobs``, which handles events of durable topics as they say. It prints what it does.

Arguments: URL of the server, namespace, name of the worker, ``ack_wait`` in seconds.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

from autogen_core import MessageContext, RoutedAgent, TypeSubscription, event

import natsrt
from natsrt import NatsAgentRuntime


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@dataclass
class Job:
    number: int
    what: str = ""


class Worker(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("works")

    @event
    async def on_job(self, message: Job, ctx: MessageContext) -> None:
        delivery = natsrt.current_delivery()
        assert delivery is not None
        tell(f"begun {message.number} attempt {delivery.attempt}")
        if message.what == "for ever":
            await asyncio.Event().wait()
        if message.what == "until thawed":
            # SIGSTOP stops the process here. When it goes on, it first reads what was sent to it meanwhile.
            for _ in range(20):
                await asyncio.sleep(0.05)
        tell(f"handled {message.number}")


async def main(url: str, namespace: str, name: str, ack_wait: str) -> None:
    runtime = NatsAgentRuntime(url, namespace=namespace, name=name, ack_wait=float(ack_wait), durable=["work."])
    await Worker.register(runtime, "jobs", Worker)
    await runtime.add_subscription(TypeSubscription("work.jobs", "jobs"))
    async with runtime:
        tell("ready")
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
