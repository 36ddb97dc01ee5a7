"""Counts the modules of natsrt that one message passes, from the sender to the handler and back.

Usage: ``python -m benchmarks.modules [-v]``. Caller and worker run in this process, on an embedded server.
``sys.setprofile`` reports every Python function that is called in a module of natsrt. ``-v`` lists the modules.

A failover is a call to a keyed agent whose owner, in a separate process, was killed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, message_handler

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer

_PACKAGE = str(Path(natsrt.__file__).parent)


class Echo(RoutedAgent):
    """Returns the message it received."""

    handled = 0

    def __init__(self) -> None:
        super().__init__("echoes")

    @message_handler
    async def on_text(self, message: str, ctx: MessageContext) -> str:
        Echo.handled += 1
        return message

    async def save_state(self) -> dict[str, Any]:
        return {}

    async def load_state(self, state: Any) -> None:
        pass


async def host(url: str, stack: AsyncExitStack, *keyed: bool) -> NatsAgentRuntime:
    runtime = await stack.enter_async_context(NatsAgentRuntime(url))
    for is_keyed in keyed:
        name = "keyed" if is_keyed else "plain"
        await runtime.register_factory(name, Echo, expected_class=Echo, keyed=is_keyed)
        await runtime.add_subscription(TypeSubscription(f"{name}-topic", name))
    return runtime


async def passed(work: Callable[[], Awaitable[Any]]) -> set[str]:
    """Return the modules of natsrt in which a function was called during ``work``."""
    modules: set[str] = set()

    def see(frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(_PACKAGE):
            modules.add(name[len(_PACKAGE) + 1 :])

    sys.setprofile(see)
    try:
        await work()
    finally:
        sys.setprofile(None)
    return modules


async def measure() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    async with EmbeddedServer() as server, AsyncExitStack() as stack:
        caller = await stack.enter_async_context(NatsAgentRuntime(server.url))
        await host(server.url, stack, False)
        owner = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.modules", server.url, stdout=asyncio.subprocess.PIPE
        )
        assert owner.stdout is not None
        await owner.stdout.readline()
        plain, keyed, orphan = AgentId("plain", "k"), AgentId("keyed", "k"), AgentId("keyed", "orphan")

        async def publish() -> None:
            before = Echo.handled
            await caller.publish_message("event", TopicId("plain-topic", "k"))
            while Echo.handled == before:  # noqa: ASYNC110 (an event would add calls to those that are counted)
                await asyncio.sleep(0)

        await caller.send_message("first", orphan)
        for _ in range(20):  # one-time work is then done, and the caches are filled
            await caller.send_message("again", plain)
            await publish()
        found["a call"] = await passed(lambda: caller.send_message("call", plain))
        found["an event"] = await passed(publish)
        await host(server.url, stack, True)
        before = Echo.handled
        while await caller.send_message("where", keyed) and Echo.handled == before:  # until this process owns one
            keyed = AgentId("keyed", f"{keyed.key}k")
        for _ in range(20):
            await caller.send_message("again", keyed)
        found["a keyed call"] = await passed(lambda: caller.send_message("call", keyed))
        owner.kill()
        await owner.wait()
        found["a failover"] = await passed(lambda: caller.send_message("call", orphan))
    return found


async def own(url: str) -> None:
    """Run in the other process: host keyed agents until the process is killed."""
    async with AsyncExitStack() as stack:
        await host(url, stack, True)
        print("ready", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    urls = [argument for argument in sys.argv[1:] if argument.startswith("nats://")]
    if urls:
        asyncio.run(own(urls[0]))
        return
    total = sum(1 for path in Path(_PACKAGE).rglob("*.py") if path.stat().st_size)
    for what, modules in asyncio.run(measure()).items():
        print(f"{what} passes {len(modules)} of {total} modules")
        if "-v" in sys.argv:
            print("\n".join(f"    {name}" for name in sorted(modules)))


if __name__ == "__main__":
    main()
