"""``natsrt worker``: host the agents of a module."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, nullcontext
from pathlib import Path
from typing import Any

import click

from natsrt.background import end_tasks
from natsrt.errors import NatsrtError
from natsrt.options import Options
from natsrt.runtime import NatsAgentRuntime
from natsrt.signals import StopSignals
from natsrt.wire.ranges import LARGEST

from .connecting import Connecting, connects
from .ending import end_within
from .exits import CommandFailed, Exit
from .health import PATIENCE, HealthEndpoint, ListenAddress, health_options
from .loading import Target, load, needs_start
from .logs import give_way, of_runtime, of_supervisor, of_worker
from .moments import Duration
from .output import announce, note
from .server import server_if_none_answers
from .supervised import Supervised
from .supervisor import HANG_TIMEOUT, Supervisor
from .watching import Watched, checked_patterns, require_watchfiles

_MOST_PROCESSES = 10_000
"""More than any machine can run, so that a slip is refused."""
_START_GRACE = 2.0
"""Seconds that a start has to complete after a signal, if the worker may already be serving calls."""
_END_WITHIN = 3.0
"""Seconds after its stop that a worker waits for threads and tasks of its agents."""


@click.command()
@click.argument("target", metavar="MODULE:FACTORY|FILE.json")
@click.option("--type", "agent_type", metavar="TYPE", help="Agent type for an agent class or factory. [default: NAME]")
@click.option("--name", help="Name of the worker; its id starts with it. [default: made from the host name]")
@click.option(
    "--app-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    help="Directory to import modules from. [default: the current one]",
)
@click.option(
    "--processes",
    type=click.IntRange(1, _MOST_PROCESSES),
    default=1,
    show_default=True,
    help="How many workers to run.",
)
@click.option(
    "--max-running",
    type=click.IntRange(1, LARGEST),
    help="How many handlers may run at once in a worker. [default: the setting max_running]",
)
@click.option("--reload", is_flag=True, help="Restart when a Python file below --app-dir changes.")
@click.option(
    "--reload-include",
    "included",
    metavar="PATTERN",
    multiple=True,
    callback=checked_patterns,
    help="With --reload, restart for other files too, such as '*.yaml' or 'prompts/*'. May be given several times.",
)
@click.option(
    "--hang-timeout",
    type=Duration(PATIENCE),
    help="With --processes or --reload, replace a worker whose event loop has not run for this time. "
    f"[default: {HANG_TIMEOUT:g}]",
)
@click.option("--embedded", is_flag=True, help="Start a server, with temporary data, if none answers.")
@health_options
@click.option("--supervisor-pipes", type=(int, int), hidden=True)
@click.option("--worker-number", type=int, hidden=True)
@connects("info")
def worker(
    connecting: Connecting,
    target: str,
    agent_type: str | None,
    name: str | None,
    app_dir: Path,
    processes: int,
    max_running: int | None,
    reload: bool,
    included: tuple[str, ...],
    hang_timeout: float | None,
    embedded: bool,
    health: ListenAddress | None,
    supervisor_pipes: tuple[int, int] | None,
    worker_number: int | None,
) -> int:
    """Host the agents of a module.

    At SIGTERM or Ctrl-C it finishes running handlers and exits; a second signal ends it at once.

    MODULE:FACTORY names one of three: a callable, sync or async, that takes the runtime and registers agents; an agent
    class; or a callable without parameters that makes one agent. A class, or a callable without parameters, is
    registered under --type, with the subscriptions of the class; its agent with the key "default" is made at the start.
    A callable that takes the runtime is called before the runtime starts. If it sends messages, it must first start the
    runtime with `await runtime.start()`.

    An agent or a team of AgentChat, from a callable without parameters, or from a JSON file as AutoGen Studio exports
    it, is hosted under --type for callers in all processes. Each session has one of its own.

    If the module configures logging, as with logging.basicConfig, that takes the place of the log on standard error and
    of --log-level.

    With --processes, the first worker answers on --health-port and each other one on the next port.

    \b
    natsrt worker my_module:register_agents
    natsrt worker my_module:MyAgent --type my_agent --processes 4
    natsrt worker team.json --type research
    """
    supervised = None if supervisor_pipes is None else Supervised(*supervisor_pipes)
    if included and not reload:
        raise CommandFailed("--reload-include has no effect without --reload", Exit.USAGE)
    if hang_timeout is not None and processes == 1 and not reload:
        raise CommandFailed("--hang-timeout has no effect without --processes or --reload", Exit.USAGE)
    if worker_number is not None:
        of_worker(worker_number)
    options = connecting.options(name=name, max_running=max_running)
    if processes == 1 and not reload:
        with nullcontext() if health is None else HealthEndpoint(health) as endpoint:
            if endpoint is not None:
                announce(f"health: {endpoint.url}")
            loaded = load(target, agent_type, app_dir)
            give_way()
            return _run(_host(loaded, options, embedded, endpoint, supervised))
    if reload:
        require_watchfiles()
    arguments = [target, "--app-dir", str(app_dir), *connecting.arguments()]
    arguments += ["--type", agent_type] if agent_type is not None else []
    arguments += ["--name", name] if name is not None else []
    arguments += ["--max-running", str(max_running)] if max_running is not None else []
    supervisor = Supervisor(
        arguments,
        processes,
        watch=Watched(app_dir, included) if reload else None,
        drain_timeout=options.drain_timeout,
        hang_timeout=HANG_TIMEOUT if hang_timeout is None else hang_timeout,
        health=health,
    )
    of_supervisor()
    return asyncio.run(_supervise(supervisor, options, embedded))


def _run(hosting: Coroutine[Any, Any, int]) -> int:
    """Run it on uvloop if that is installed, else on asyncio's own event loop."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    try:
        import uvloop

        factory = uvloop.new_event_loop
    except ImportError:
        pass
    with asyncio.Runner(loop_factory=factory) as runner:
        try:
            return runner.run(hosting)
        finally:
            # The runner waits for tasks and threads that are left without a time limit, and so does Python's exit.
            end_within(_END_WITHIN, runner.get_loop())


async def _supervise(supervisor: Supervisor, options: Options, embedded: bool) -> int:
    async with server_if_none_answers(options) if embedded else nullcontext():
        return await supervisor.run()


async def _host(
    target: Target, options: Options, embedded: bool, endpoint: HealthEndpoint | None, supervised: Supervised | None
) -> int:
    async with AsyncExitStack() as stack:
        loop = asyncio.get_running_loop()
        signals = StopSignals(again=lambda: end_within(0, loop))  # until the runtime handles signals itself
        stop = stack.enter_context(signals).received
        if embedded:
            await stack.enter_async_context(server_if_none_answers(options))
        runtime = NatsAgentRuntime(options=options)
        of_runtime(runtime)
        if endpoint is not None:
            endpoint.report(runtime.health)
        try:
            if await _started(runtime, target, stop):
                _announce(runtime)
                if supervised is not None:
                    supervised.ready()
                if stop.is_set():  # once the runtime handles signals itself
                    asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGTERM)
                await _serve(runtime)
        finally:
            await _close(runtime)
    return Exit.CUT_SHORT if runtime.cut_short else Exit.OK


async def _close(runtime: NatsAgentRuntime) -> None:
    """Stop, and close the agents. If these do not close within ``drain_timeout`` and some seconds, end the process."""
    if runtime.worker_id is not None:
        try:
            await runtime.stop()
        except RuntimeError:  # it has stopped meanwhile
            pass
    ending = end_within(runtime.options.drain_timeout + _END_WITHIN, asyncio.get_running_loop())
    try:
        await runtime.close()
    finally:
        ending.cancel()


async def _start(runtime: NatsAgentRuntime, target: Target) -> None:
    try:
        await target.register(runtime)
    except RuntimeError as error:
        if not needs_start(error):
            raise
        give_way()
        await runtime.start()
        await target.register(runtime)
    give_way()
    if runtime.worker_id is None:
        await runtime.start()


async def _started(runtime: NatsAgentRuntime, target: Target, stop: asyncio.Event) -> bool:
    """Register and start; give up if ``stop`` is set before there is a connection. True if the start completed."""
    starting, stopped = asyncio.create_task(_start(runtime, target)), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set() and runtime.worker_id is not None and runtime.running.connection.connected:
            # It may already be serving calls. An orderly stop finishes them, and needs a start that is complete.
            await asyncio.wait({starting}, timeout=_START_GRACE)
        if starting.done():
            starting.result()
        return starting.done()
    finally:
        ending = end_within(_END_WITHIN, asyncio.get_running_loop())
        try:
            await end_tasks(starting, stopped)
        finally:
            ending.cancel()


def _announce(runtime: NatsAgentRuntime) -> None:
    hosts = runtime.running.registry.view.hosts
    types = sorted(agent_type for agent_type, workers in hosts.items() if runtime.worker_id in workers)
    if not types:
        note("no agent was registered: this worker hosts nothing")
    announce(f"worker {runtime.worker_id} ready: types {', '.join(types) or 'none'}")


async def _serve(runtime: NatsAgentRuntime) -> None:
    try:
        await runtime.stop_when_signal()
    except NatsrtError:
        raise
    except Exception as error:  # its text may quote a message, and messages stay out of logs
        raise CommandFailed(
            f"an event handler raised {type(error).__qualname__}; use --debug for its traceback"
        ) from error
