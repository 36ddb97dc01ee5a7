"""Three processes share what a user has told them, and a cache of a model's answers.

Each process has a `NatsMemory` of the same session. Two of them add facts until they are killed. Another one comes
later, and knows the same, in the same order. Recorded answers (``ReplayChatCompletionClient``) replace the model, so
the example needs no API key.

Run it: python examples/shared_memory.py (needs AgentChat: pip install 'natsrt[examples]')
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys

from autogen_agentchat.agents import AssistantAgent
from autogen_core.memory import MemoryContent
from autogen_core.models import UserMessage
from autogen_ext.models.cache import ChatCompletionCache
from autogen_ext.models.replay import ReplayChatCompletionClient
from local_server import local_server

from natsrt.contrib.cache import NatsCacheStore
from natsrt.contrib.memory import NatsMemory

SESSION = "user/ada"


async def learn(url: str, name: str) -> None:
    """Add facts for ever, as a process that hears more and more."""
    async with NatsMemory(SESSION, url) as memory:
        number = 0
        while True:
            await memory.add(MemoryContent(content=f"fact {number} of {name}", mime_type="text/plain"))
            number += 1
            await asyncio.sleep(0.01)


def learning(url: str, name: str) -> None:
    asyncio.run(learn(url, name))


async def known(memory: NatsMemory) -> list[str]:
    return [str(content.content) for content in (await memory.query()).results]


async def share(url: str) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=learning, args=(url, name), daemon=True) for name in ("one", "two")]
    for process in processes:
        process.start()
    async with NatsMemory(SESSION, url) as memory:
        adding: set[str] = set()
        while adding != {"one", "two"}:
            adding = {fact.split()[-1] for fact in await known(memory)}
            await asyncio.sleep(0.05)
        print("two processes add facts, and a third one knows them")
        for process in processes:
            process.kill()
            process.join()
        facts = await known(memory)
        async with NatsMemory(SESSION, url) as late:
            same = (await known(late))[: len(facts)] == facts
        print(f"both were killed; who comes later has the same facts in the same order: {same}")
        await memory.clear()
        await memory.add(MemoryContent(content="The user is called Ada.", mime_type="text/plain"))
        assistant = AssistantAgent("assistant", ReplayChatCompletionClient(["Hello, Ada!"]), memory=[memory])
        result = await assistant.run(task="Do you know me?")
        print(f"assistant: {result.messages[-1].to_text()}")


async def cache(url: str) -> None:
    question = [UserMessage(content="What is NATS?", source="user")]
    with NatsCacheStore(url, ttl=3600) as store:
        await ChatCompletionCache(ReplayChatCompletionClient(["A messaging system."]), store).create(question)
    with NatsCacheStore(url) as store:
        answer = await ChatCompletionCache(ReplayChatCompletionClient([]), store).create(question)
    print(f"from the cache: {answer.content}")


async def main() -> None:
    async with local_server() as url:
        await share(url)
        await cache(url)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
