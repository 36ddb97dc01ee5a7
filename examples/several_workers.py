"""Several workers: three processes host one agent type and share its calls. One is killed; the others continue.

Run it: python examples/several_workers.py
"""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from dataclasses import dataclass

from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
from local_server import local_server

from natsrt import NatsAgentRuntime, UndeliveredCall


@dataclass
class Question:
    number: int


@dataclass
class Answer:
    square: int
    pid: int


class Squarer(RoutedAgent):
    @message_handler
    async def square(self, message: Question, ctx: MessageContext) -> Answer:
        return Answer(message.number**2, os.getpid())


async def work(url: str) -> None:
    """A worker process. It runs until it gets a signal to stop."""
    async with NatsAgentRuntime(url) as runtime:
        await Squarer.register(runtime, "squarer", lambda: Squarer("squares numbers"))
        print("ready", flush=True)
        await runtime.stop_when_signal()


async def start_worker(url: str) -> Process:
    worker = await asyncio.create_subprocess_exec(sys.executable, __file__, "work", url, stdout=PIPE)
    assert worker.stdout is not None and await worker.stdout.readline() == b"ready\n"
    return worker


async def ask(runtime: NatsAgentRuntime, number: int) -> Answer | None:
    """Returns the answer; None if the worker was lost before it replied."""
    try:
        answer: Answer = await runtime.send_message(Question(number), AgentId("squarer", str(number)))
    except UndeliveredCall as error:
        print(f"no answer to {number}: {error}")
        return None
    assert answer.square == number**2
    return answer


async def main() -> None:
    async with local_server() as url, NatsAgentRuntime(url) as caller:
        workers = await asyncio.gather(*(start_worker(url) for _ in range(3)))
        try:
            answers = await asyncio.gather(*(ask(caller, number) for number in range(300)))
            shares = Counter(answer.pid for answer in answers if answer is not None)
            assert shares.keys() == {worker.pid for worker in workers}
            print(f"300 answers from {len(shares)} processes")

            workers[0].kill()
            await workers[0].wait()
            answers = await asyncio.gather(*(ask(caller, number) for number in range(300)))
            shares = Counter(answer.pid for answer in answers if answer is not None)
            assert shares.keys() <= {worker.pid for worker in workers[1:]}
            print(f"one process was killed: {shares.total()} answers from {len(shares)} processes")
        finally:
            for worker in workers:
                if worker.returncode is None:
                    worker.terminate()
            await asyncio.gather(*(worker.wait() for worker in workers))


if __name__ == "__main__":
    asyncio.run(work(sys.argv[2]) if sys.argv[1:2] == ["work"] else main())
