"""``natsrt agents wait``: wait until agent types are served."""

from __future__ import annotations

import asyncio
import time

import click
from autogen_core import AgentId

from natsrt.errors import AgentNotServed
from natsrt.runtime import NatsAgentRuntime

from .connecting import Connecting, connects
from .exits import CommandFailed, Exit
from .naming import agent_id, agent_type
from .output import line


@click.command()
@click.argument("agents", metavar="TYPE[/KEY]...", nargs=-1, required=True)
@connects()
def wait(connecting: Connecting, agents: tuple[str, ...]) -> None:
    """Wait until a live worker serves each agent type.

    A call that is made then reaches a worker. With a key, wait for that agent: this makes a difference only for
    registered instances. Prints each type when it is served.

    --timeout limits the whole wait, including the connection to the server. Without it, a server must answer within the
    setting connect_timeout, and then the wait has no limit.

    When the time is up, it names the types that are still missing, and exits with 5.

    \b
    natsrt agents wait writer editor --timeout 30
    """
    awaited = {text: agent_id(text) if "/" in text else agent_type(text) for text in agents}
    asyncio.run(_wait(connecting, awaited, time.monotonic()))


async def _wait(connecting: Connecting, awaited: dict[str, AgentId | str], begun: float) -> None:
    async with connecting.runtime() as runtime:
        # The text of --timeout is also the setting connect_timeout, which has converted and checked it.
        limit = None if connecting.timeout is None else runtime.options.connect_timeout
        left = None if limit is None else max(limit - (time.monotonic() - begun), 0.001)
        waits = (_served(runtime, text, agent, left) for text, agent in awaited.items())
        missing = [reason for reason in await asyncio.gather(*waits) if reason is not None]
    if missing and limit is not None:
        raise CommandFailed(f"not served within {limit:g} s: {'; '.join(missing)}", Exit.TIMEOUT)


async def _served(runtime: NatsAgentRuntime, text: str, agent: AgentId | str, timeout: float | None) -> str | None:
    """Wait for one agent, and print it. If the time is up, return what is missing."""
    try:
        await runtime.wait_for(agent, timeout=timeout)
    except AgentNotServed as error:
        return f"{text} ({error.reason})"
    line(f"{text} is served")
    return None
