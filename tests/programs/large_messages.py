"""A worker that takes large messages, and a caller that sends one and says how much memory each of them needed.

    large_messages.py worker URL NAMESPACE
    large_messages.py caller URL NAMESPACE SIZE

The caller prints two numbers: the peak memory of the caller and of the worker for one call with a text of SIZE
characters, beyond what they had before, as multiples of SIZE.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from dataclasses import dataclass
from pathlib import Path

from autogen_core import AgentId, MessageContext, RoutedAgent, rpc

import natsrt
from natsrt import NatsAgentRuntime

AGENT = AgentId("measured", "a")


@dataclass
class Text:
    text: str


@dataclass
class Memory:
    """Asks for the most memory that the process has had; with ``anew``, for what it has, and that is forgotten."""

    anew: bool


def memory(anew: bool) -> int:
    """Resident bytes: now, and the most from now on is measured anew; else the most."""
    if anew:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
    name = "VmRSS:" if anew else "VmHWM:"
    return int(Path("/proc/self/status").read_text().partition(name)[2].split()[0]) * 1024


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Measured(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("takes texts")

    @rpc
    async def on_text(self, message: Text, ctx: MessageContext) -> int:
        return len(message.text)

    @rpc
    async def on_memory(self, message: Memory, ctx: MessageContext) -> int:
        return memory(message.anew)


async def work(url: str, namespace: str) -> None:
    runtime = NatsAgentRuntime(url, namespace=namespace)
    await natsrt.register(runtime, Measured, AGENT.type, Measured)
    async with runtime:
        say("ready")
        await asyncio.Event().wait()


async def call(url: str, namespace: str, size: int) -> None:
    async with NatsAgentRuntime(url, namespace=namespace) as runtime:
        await runtime.send_message(Text("x" * 10), AGENT)
        worker_before: int = await runtime.send_message(Memory(True), AGENT)
        before = memory(True)
        assert await runtime.send_message(Text("x" * size), AGENT) == size
        worker_peak: int = await runtime.send_message(Memory(False), AGENT)
        say(f"{(memory(False) - before) / size:.2f} {(worker_peak - worker_before) / size:.2f}")


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        asyncio.run(work(*sys.argv[2:]))
    else:
        asyncio.run(call(sys.argv[2], sys.argv[3], int(sys.argv[4])))
