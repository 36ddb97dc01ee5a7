"""Lets an agent type, and ``natsrt tail --since``, begin with stored events and go on while others are published."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

from autogen_core import MessageContext, RoutedAgent, TopicId, TypeSubscription, event

import natsrt
from benchmarks.chaos.roles import until
from benchmarks.chaos.scenario import Figure, Scenario
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer

_TOPIC = TopicId("past", "all")
_AT_ONCE = 500
_GIVE_UP = 120.0


class Taker(RoutedAgent):
    """Counts how often it handles each number."""

    handled: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__("counts")

    @event
    async def on_number(self, message: int, ctx: MessageContext) -> None:
        self.handled.append(message)


async def measure(*, stored: int = 10_000, live: int = 5_000) -> list[Figure]:
    """Store events, then start the type and the command while further ones are published.

    Args:
        stored: Number of events that are stored before.
        live: Number of events that are published meanwhile.
    """
    Taker.handled.clear()
    count = stored + live
    async with EmbeddedServer() as server:
        with tempfile.TemporaryDirectory(prefix="natsrt-past-") as directory:
            async with NatsAgentRuntime(server.url, durable=[_TOPIC.type]) as publisher:
                await _publish(publisher, range(stored))
                output = Path(directory) / "tail"
                with output.open("wb") as out:
                    command = [
                        sys.executable,
                        "-m",
                        "natsrt",
                        "tail",
                        "--since",
                        "1h",
                        "--json",
                        "--server",
                        server.url,
                    ]
                    tail = subprocess.Popen([*command, _TOPIC.type], stdout=out)  # noqa: ASYNC220
                try:
                    publishing = asyncio.create_task(_publish(publisher, range(stored, count), pause=0.1))
                    taker = NatsAgentRuntime(server.url, name="taker")
                    await natsrt.register(taker, Taker, "taker", Taker, start_from="all")
                    await taker.add_subscription(TypeSubscription(_TOPIC.type, "taker"))
                    began = time.monotonic()
                    async with taker:
                        await until(lambda: len(Taker.handled) >= stored, _GIVE_UP)
                        caught_up = time.monotonic() - began
                        await publishing
                        await until(lambda: len(Taker.handled) >= count, _GIVE_UP)
                        took = time.monotonic() - began
                        await until(lambda: output.read_bytes().count(b"\n") >= count, _GIVE_UP)
                        await asyncio.sleep(1.0)  # for what is handled or shown twice
                finally:
                    tail.terminate()
                    await asyncio.to_thread(tail.wait)
                shown = [int(json.loads(line)["data"]) for line in output.read_text().splitlines()]
    return [
        Figure(name="events stored before", value=stored),
        Figure(name="events published meanwhile", value=live),
        *_figures("the agent type", Taker.handled, count),
        Figure(name="the agent type: until as many as were stored were handled", value=caught_up, unit="s"),
        Figure(name="the agent type: until all were handled", value=took, unit="s"),
        *_figures("natsrt tail", shown, count),
        Figure(
            name="natsrt tail: shown in another order",
            value=sum(a > b for a, b in zip(shown, shown[1:], strict=False)),
            at_most=0,
        ),
    ]


def _figures(who: str, seen: list[int], count: int) -> list[Figure]:
    times = Counter(seen)
    return [
        Figure(name=f"{who}: missing", value=count - len(times), at_least=0, at_most=0),
        Figure(name=f"{who}: twice", value=sum(n > 1 for n in times.values()), at_most=0),
    ]


async def _publish(runtime: NatsAgentRuntime, numbers: range, pause: float = 0.0) -> None:
    """Publish the numbers in their order, with ``pause`` seconds after `_AT_ONCE` of them."""
    for first in range(numbers.start, numbers.stop, _AT_ONCE):
        some = range(first, min(first + _AT_ONCE, numbers.stop))
        await asyncio.gather(*(runtime.publish_message(number, _TOPIC) for number in some))
        await asyncio.sleep(pause)


async def _all(short: bool) -> list[Figure]:
    return await (measure(stored=1_000, live=500) if short else measure())


SCENARIO = Scenario(title="An agent type and natsrt tail begin with the past and go on with the present", measure=_all)
