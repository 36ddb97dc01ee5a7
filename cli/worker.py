"""``natsrt worker``: host the agents of a module."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import click

from natsrt.cli.connecting import Connecting, connects
from natsrt.cli.exits import CommandFailed, Exit
from natsrt.cli.loading import Target, load
from natsrt.cli.output import line, note
from natsrt.cli.server import server_if_none_answers
from natsrt.cli.supervisor import Supervisor, require_watchfiles
from natsrt.errors import NatsrtError
from natsrt.options import Options
from natsrt.runtime import NatsAgentRuntime

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STOP_MARGIN = 10.0
"""Seconds beyond ``drain_timeout`` after which a supervised worker that was told to stop is killed."""


@click.command()
@click.argument("target", metavar="MODULE:FACTORY")
@click.option("--type", "agent_type", metavar="TYPE", help="Agent type for an agent class or factory. [default: NAME]")
@click.option("--name", help="Name of the worker, the start of its id. [default: made from the host's name]")
@click.option(
    "--app-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    help="Directory from which modules are imported. [default: the current one]",
)
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True, help="How many workers to run.")
@click.option("--reload", is_flag=True, help="Start anew when a Python file below --app-dir changes.")
@click.option("--embedded", is_flag=True, help="Start a server, with temporary data, if none answers.")
@click.option("--ready-fd", type=int, hidden=True)
@connects("info")
def worker(
    connecting: Connecting,
    target: str,
    agent_type: str | None,
    name: str | None,
    app_dir: Path,
    processes: int,
    reload: bool,
    embedded: bool,
    ready_fd: int | None,
) -> int:
    """Host agents until SIGTERM or Ctrl-C; a second one ends what still runs at once.

    MODULE:FACTORY names a callable that takes the runtime and registers agents (sync or async), or an agent class or a
    callable without parameters that makes one agent. Those two are registered under --type, with the subscriptions of
    the class; their agent with the key "default" is made at the start.

    \b
    natsrt worker my_module:register_agents
    natsrt worker my_module:MyAgent --type my_agent --processes 4
    """
    options = connecting.options(name=name)
    if processes == 1 and not reload:
        return _run(_host(load(target, agent_type, app_dir), options, embedded, ready_fd))
    if reload:
        require_watchfiles()
    arguments = [target, "--app-dir", str(app_dir), *connecting.arguments()]
    arguments += ["--type", agent_type] if agent_type is not None else []
    arguments += ["--name", name] if name is not None else []
    return asyncio.run(_supervise(arguments, processes, app_dir if reload else None, options, embedded))


def _run(hosting: "Coroutine[object, object, int]") -> int:
    """Run it on uvloop, where that is installed."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    try:
        import uvloop

        factory = uvloop.new_event_loop
    except ImportError:
        pass
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(hosting)


async def _supervise(
    arguments: list[str], processes: int, watch: Path | None, options: Options, embedded: bool
) -> int:
    stop_timeout = options.drain_timeout + _STOP_MARGIN
    async with server_if_none_answers(options) if embedded else nullcontext():
        return await Supervisor(arguments, processes, watch=watch, stop_timeout=stop_timeout).run()


async def _host(target: Target, options: Options, embedded: bool, ready_fd: int | None) -> int:
    interrupted = asyncio.Event()
    working = asyncio.ensure_future(_work(target, options, embedded, ready_fd, interrupted))

    def interrupt() -> None:
        interrupted.set()
        working.cancel()

    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, interrupt)
    try:
        await working
    except asyncio.CancelledError:
        if not interrupted.is_set():
            raise
    return Exit.OK
