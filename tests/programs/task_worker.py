"""A worker whose agents handle tasks: ``task_worker.py URL NAMESPACE FILE [WHERE [ACK_WAIT]]``.

It writes what it handles into FILE. With WHERE, the process is killed at that step of a task's end: ``before the
result``, ``before the removal`` or ``before the acknowledgement``. ACK_WAIT is in seconds.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

from autogen_core import MessageContext, RoutedAgent, rpc

from natsrt import NatsAgentRuntime
from natsrt.jetstream.pulling import Pull
from natsrt.jetstream.task_store import TaskStore


@dataclass
class Work:
    """``what`` to do, with a ``text`` that is returned, or for ``large`` a text of ``size`` characters."""

    name: str
    what: str = ""
    text: str = ""
    size: int = 0


@dataclass
class Done:
    """``count`` is the number of tasks that the agent has done, with this one."""

    name: str
    count: int
    text: str = ""


class Broken(Exception):
    """A failure with fields."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(name, number)
        self.name = name
        self.number = number


class Worker(RoutedAgent):
    """Writes the name of each task when it is handled, and counts it in its state."""

    file = ""

    def __init__(self) -> None:
        super().__init__("works")
        self._names: list[str] = []

    async def save_state(self) -> dict[str, Any]:
        return {"names": self._names}

    async def load_state(self, state: Any) -> None:
        self._names = state["names"]

    @rpc
    async def on_work(self, message: Work, ctx: MessageContext) -> Done:
        with open(self.file, "a") as file:
            file.write(f"{message.name}\n")
        if message.what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(float(message.what or 0))
        self._names.append(message.name)
        return Done(message.name, len(self._names), " ".join(self._names))


def die(*_: Any, **__: Any) -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(where: str) -> None:
    """Have this process killed at a step of a task's end."""
    if where == "before the result":
        TaskStore.finish = die  # type: ignore[assignment,method-assign]
    elif where == "before the removal":
        TaskStore.remove_handled = die  # type: ignore[assignment,method-assign]
    elif where == "before the acknowledgement":
        Pull.ack = die  # type: ignore[assignment,method-assign]


async def main(url: str, namespace: str, file: str, where: str = "", ack_wait: str = "2.0") -> None:
    Worker.file = file
    die_at(where)
    runtime = NatsAgentRuntime(
        url,
        namespace=namespace,
        name="w",
        ack_wait=float(ack_wait),
        retry_delay=0.1,
        max_deliver=20,
        heartbeat_interval=0.5,
        heartbeat_ttl=2.0,
    )
    await runtime.register_factory("plain", Worker, expected_class=Worker)
    await runtime.register_factory("keyed", Worker, expected_class=Worker, keyed=True)
    await runtime.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await runtime.stop_when_signal()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
