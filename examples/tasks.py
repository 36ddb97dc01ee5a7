"""Tasks: one process submits them and ends, a worker is killed while it works, and a third process fetches the results.

Run it: python examples/tasks.py
"""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass

from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
from local_server import local_server

import natsrt
from natsrt import NatsAgentRuntime


@dataclass
class Translate:
    text: str


@dataclass
class Translation:
    text: str


class Translator(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("translates, slowly")

    @message_handler
    async def translate(self, message: Translate, ctx: MessageContext) -> Translation:
        words = message.text.split()
        for number, word in enumerate(words):
            natsrt.progress(number / len(words), word)
            await asyncio.sleep(0.3)
        return Translation(message.text.upper())


async def work(url: str) -> None:
    """A worker process. It runs until it gets a signal to stop."""
    async with NatsAgentRuntime(url, ack_wait=2.0) as runtime:
        await Translator.register(runtime, "translator", Translator)
        print("ready", flush=True)
        await runtime.stop_when_signal()


async def submit(url: str) -> None:
    """A process that submits three tasks, prints their ids, and ends. No worker need run."""
    async with NatsAgentRuntime(url) as runtime:
        for text in ("to be or not to be", "that is the question", "whether tis nobler"):
            ticket = await runtime.submit_message(Translate(text), AgentId("translator", "hamlet"))
            print(ticket.id, flush=True)


async def start(role: str, url: str) -> Process:
    return await asyncio.create_subprocess_exec(sys.executable, __file__, role, url, stdout=PIPE)


async def start_worker(url: str) -> Process:
    worker = await start("work", url)
    assert worker.stdout is not None and await worker.stdout.readline() == b"ready\n"
    return worker


async def main() -> None:
    async with local_server() as url:
        submitter = await start("submit", url)
        output, _ = await submitter.communicate()
        ids = output.decode().split("\n")[:-1]
        print(f"{len(ids)} tasks are stored, and who submitted them has ended")

        first = await start_worker(url)
        async with NatsAgentRuntime(url) as runtime:
            async for status in runtime.ticket(ids[0]):
                if status.state == "running":
                    break
            first.kill()
            await first.wait()
            print("the worker was killed while the first task was running")

            second = await start_worker(url)
            for id in ids:
                result = await runtime.ticket(id).result(timeout=30, reply_type=Translation)
                print(result.text)
            second.terminate()
            await second.wait()


if __name__ == "__main__":
    roles = {"work": work, "submit": submit}
    asyncio.run(roles[sys.argv[1]](sys.argv[2]) if len(sys.argv) > 1 else main())
