"""A worker of the type ``jobs``, which handles events of durable topics as they say. It prints what it does.

Arguments: URL of the server, namespace, name of the worker, ``ack_wait`` in seconds, and then settings such as
``max_deliver=2``. With ``NATSRT_TEST_GAP`` in its environment, the process is killed when an event was stored for a
later attempt, before its delivery is acknowledged.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

from autogen_core import MessageContext, RoutedAgent, TypeSubscription, event

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.hosting import endings
from natsrt.jetstream.later_retries import LaterRetries


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
        if message.what == "die":
            os._exit(1)
        if message.what.startswith("later ") and delivery.attempt == 1:
            raise natsrt.Retry(after=float(message.what.removeprefix("later ")))
        if message.what == "until thawed":
            # SIGSTOP stops the process here. When it goes on, it first reads what was sent to it meanwhile.
            for _ in range(20):
                await asyncio.sleep(0.05)
        tell(f"handled {message.number}")


def die_in_the_gap() -> None:
    put = LaterRetries.put

    async def put_and_die(self: LaterRetries, *arguments: Any, **more: Any) -> None:
        await put(self, *arguments, **more)
        tell("stored")
        os.kill(os.getpid(), signal.SIGKILL)

    LaterRetries.put = put_and_die  # type: ignore[method-assign]
    endings.LONGEST_IN_PLACE = 0.1  # type: ignore[misc]


async def main(url: str, namespace: str, name: str, ack_wait: str, *more: str) -> None:
    if "NATSRT_TEST_GAP" in os.environ:
        die_in_the_gap()
    settings = {setting: int(value) for setting, value in (one.split("=") for one in more)}
    runtime = NatsAgentRuntime(
        url, namespace=namespace, name=name, ack_wait=float(ack_wait), durable=["work."], **settings
    )
    await Worker.register(runtime, "jobs", Worker)
    await runtime.add_subscription(TypeSubscription("work.jobs", "jobs"))
    async with runtime:
        tell("ready")
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
