"""A model in worker processes: agents in this process use it, its tokens stream, and the worker is killed meanwhile.

Recorded answers (``ReplayChatCompletionClient``) replace the model, so the example needs no API key.

Run it: python examples/remote_model.py (needs AutoGen's extensions: pip install 'natsrt[examples]')
"""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import CreateResult, UserMessage
from autogen_ext.models.replay import ReplayChatCompletionClient
from local_server import local_server

from natsrt import NatsAgentRuntime
from natsrt.contrib.models import RemoteChatCompletionClient, host_model


async def work(url: str) -> None:
    """A worker process, such as one on a machine with a GPU. It runs until it gets a signal to stop."""
    async with NatsAgentRuntime(url) as runtime:
        await host_model(runtime, "poet", lambda: ReplayChatCompletionClient(["The sea is calm tonight."] * 100))
        print("ready", flush=True)
        await runtime.stop_when_signal()


async def start_worker(url: str) -> Process:
    worker = await asyncio.create_subprocess_exec(sys.executable, __file__, url, stdout=PIPE)
    assert worker.stdout is not None and await worker.stdout.readline() == b"ready\n"
    return worker


async def main() -> None:
    async with local_server() as url, NatsAgentRuntime(url) as runtime:
        workers = await asyncio.gather(start_worker(url), start_worker(url))
        client = await RemoteChatCompletionClient.connect("poet", runtime, retries=2)

        async for item in client.create_stream([UserMessage(content="A poem, please.", source="user")]):
            print(f"{item.usage.completion_tokens} tokens" if isinstance(item, CreateResult) else item)

        another = [UserMessage(content="Another one!", source="user")]
        requests = [asyncio.create_task(client.create(another)) for _ in range(20)]
        workers[0].kill()
        print(f"one worker was killed: {len(await asyncio.gather(*requests))} poems from the other")

        assistant = AssistantAgent("assistant", client)
        print((await assistant.run(task="And for me?")).messages[-1].content)

        workers[1].terminate()
        await asyncio.gather(*(worker.wait() for worker in workers))


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1]) if len(sys.argv) > 1 else main())
