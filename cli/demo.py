"""``natsrt demo``: shows in a few seconds what natsrt does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import click
from autogen_core import AgentId, TopicId

from natsrt.embedded import EmbeddedServer, ProcessGroupGuard
from natsrt.options import Options
from natsrt.runtime import NatsAgentRuntime

from .agents import print_types, type_rows
from .connecting import basics
from .demo_agents import TOPIC, Headline, Text
from .exits import CommandFailed
from .output import line
from .supervisor import COMMAND

_AGENTS = {"reverse": "natsrt_cli.demo_agents:Reverse", "upper": "natsrt_cli.demo_agents:Upper"}
_TEXT = "agents over NATS"
_PATIENCE = 30.0
"""Seconds allowed for each step. A step normally takes well under one; a slow machine must not fail the demo."""


@click.command()
@basics()
def demo(**_: str) -> None:
    """Show what natsrt does, in a few seconds.

    Starts a server and two workers, calls both, publishes an event to both, and stops.

    Leaves nothing behind: the server listens on a free port of this machine, and its data is temporary.
    """
    asyncio.run(_demo())


async def _demo() -> None:
    async with AsyncExitStack() as stack:
        line("1. A nats-server with JetStream, for development")
        server = await stack.enter_async_context(EmbeddedServer())
        line("   $ natsrt server")
        line(f"   it listens at {server.url}")

        line("\n2. Two workers, each in its own process with one agent type")
        workers = {}
        for agent_type, target in _AGENTS.items():
            line(f"   $ natsrt worker {target} --type {agent_type}")
            workers[agent_type] = await stack.enter_async_context(_worker(agent_type, target, server.url))
        for worker in workers.values():
            line(f"   {await worker.line_with('ready: types')}")

        runtime = NatsAgentRuntime(options=Options(servers=server.url, name="demo"))
        await stack.enter_async_context(runtime)
        line("\n3. A call to each agent, from this process")
        for agent_type in _AGENTS:
            line(f'   $ natsrt send {agent_type}/demo \'{{"text": "{_TEXT}"}}\'')
            reply = await runtime.send_message(Text(_TEXT), AgentId(agent_type, "demo"))
            if not isinstance(reply, Text):
                raise CommandFailed(f"{agent_type} answered {type(reply).__name__}, not Text")
            line(f'   {{"text": "{reply.text}"}}')

        line("\n4. One event, which both workers receive")
        line(f'   $ natsrt publish {TOPIC}/demo \'{{"headline": "{_TEXT}"}}\'')
        await runtime.publish_message(Headline(_TEXT), TopicId(TOPIC, "demo"))
        for agent_type, worker in workers.items():
            line(f"   worker process {worker.pid}: {await worker.line_with(f'{agent_type} reads: ')}")

        line("\n5. The agent types")
        line("   $ natsrt agents ls")
        print_types(await type_rows(runtime.running.registry))

        line("\n6. Stopping the workers, then the server")
        for worker in workers.values():
            await worker.stop()
    line("   done. To try it yourself, run these commands; give the server and each worker its own terminal.")


class _DemoWorker:
    def __init__(self, agent_type: str, process: asyncio.subprocess.Process) -> None:
        self._agent_type = agent_type
        self._process = process
        self._seen: list[str] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    async def line_with(self, text: str) -> str:
        """Wait for a line of its output that contains ``text``, and return it."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(_PATIENCE):
                async for written in self._process.stdout:
                    self._seen.append(written.decode(errors="replace").rstrip())
                    if text in self._seen[-1]:
                        return self._seen[-1]
        except TimeoutError:
            pass
        raise CommandFailed("\n".join([f"the worker of {self._agent_type} did not print {text!r}:", *self._seen]))

    async def stop(self) -> None:
        """Send SIGTERM and wait until the worker has ended."""
        self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(_PATIENCE):
            code = await self._process.wait()
        if code:
            raise CommandFailed("\n".join([f"the worker of {self._agent_type} ended with {code}:", *self._seen]))


@asynccontextmanager
async def _worker(agent_type: str, target: str, url: str) -> AsyncIterator[_DemoWorker]:
    guard = ProcessGroupGuard()
    try:
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *("worker", target, "--type", agent_type, "--name", agent_type, "--server", url, "--log-level", "warning"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=guard.group,
            env=_without_settings(os.environ),
        )
        try:
            yield _DemoWorker(agent_type, process)
        finally:
            guard.end_group()
            await process.wait()
    finally:
        guard.end_group()


def _without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without NATS and natsrt settings, which could name another server than the demo's."""
    return {name: value for name, value in environ.items() if not name.startswith(("NATS_", "NATSRT_"))}
