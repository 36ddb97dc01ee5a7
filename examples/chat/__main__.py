"""Starts the NATS server, the three workers and the web server, each a process, and starts again what has ended."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from autogen_core.models import ChatCompletionClient

from examples.chat.team import AGENTS, MODEL
from natsrt import EmbeddedServerError
from natsrt.embedded import EmbeddedServer, ProcessGroupGuard

CHECKOUT = Path(__file__).resolve().parents[2]
STOP_SECONDS = 10.0
"""Seconds that a process has to stop before it is killed."""
SHORT = 5.0
"""A process that has not lived for so many seconds is started again later each time, after 10 s at most."""

SETTINGS = {
    "NATSRT_DRAIN_TIMEOUT": "5",  # less than STOP_SECONDS
    "NATSRT_STREAM_IDLE_TIMEOUT": "5",  # so that the team is soon free again if the web server is killed
}
"""Settings of the runtimes, for a demonstration in which processes end all the time; both values are seconds."""


class Processes:
    """The processes of the example. None outlives this one, however it ends, and Ctrl-C reaches this one alone."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._guard = ProcessGroupGuard()

    async def keep(self, name: str, *arguments: str, pass_fds: tuple[int, ...] = ()) -> None:
        """Run a Python program, and start it again whenever it ends. If this is cancelled, it is stopped."""
        pause = 0.5
        while True:
            began = time.monotonic()
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                env=self._environment,
                pass_fds=pass_fds,
                process_group=self._guard.group,
            )
            print(f"{name}: process {process.pid}", flush=True)
            try:
                code = await process.wait()
            except asyncio.CancelledError:
                await _stopped(process)
                raise
            pause = min(pause * 2, 10.0) if time.monotonic() - began < SHORT else 0.5
            print(f"{name} has ended with {code}: it is started again", flush=True)
            await asyncio.sleep(pause)

    def close(self) -> None:
        """Kill what is left."""
        self._guard.end_group()


async def _stopped(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


@asynccontextmanager
async def nats_server(data_dir: Path | None) -> AsyncIterator[str]:
    """The URL of the server in NATS_URL, or of one that runs during the block, and is started again if it ends."""
    if url := os.environ.get("NATS_URL"):
        yield url
        return
    async with EmbeddedServer(data_dir=data_dir) as server:

        async def keep() -> None:
            while True:
                print(f"nats-server: process {server.pid}, {server.url}", flush=True)
                code = await server.wait()
                print(f"nats-server has ended with {code}: it is started again", flush=True)
                while server.pid is None:
                    try:
                        await server.start()
                    except EmbeddedServerError as error:
                        print(error, flush=True)
                        await asyncio.sleep(1)

        keeping = asyncio.create_task(keep())
        try:
            yield server.url
        finally:
            await _cancelled(keeping)


async def _cancelled(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def run(listening: socket.socket, data_dir: Path | None, model: str | None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with nats_server(data_dir) as url:
        environment = {**os.environ, **SETTINGS, "NATS_URL": url, MODEL: model or ""}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
        processes = Processes(environment)
        try:
            workers = [
                asyncio.create_task(
                    processes.keep(
                        f"worker {name}",
                        *("-m", "natsrt", "worker", f"examples.chat.team:{name}", "--name", name),
                        *("--log-level", "warning"),
                    )
                )
                for name in AGENTS
            ]
            fd = listening.fileno()
            web = asyncio.create_task(processes.keep("web server", "-m", "examples.chat.web", str(fd), pass_fds=(fd,)))
            print(f"http://127.0.0.1:{listening.getsockname()[1]}/ is the page; Ctrl-C ends everything", flush=True)
            await stop.wait()
            await _cancelled(web)  # first, so that no worker waits for an answer of its people
            await _cancelled(*workers)
        finally:
            processes.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.chat", description="A chat with a team of agents.")
    parser.add_argument("--port", type=int, default=8000, help="port of the page; 0 is a free one (default: 8000)")
    parser.add_argument("--data-dir", type=Path, help="keep the conversations in this directory (default: nowhere)")
    parser.add_argument("--model", type=Path, metavar="FILE", help="JSON file with a model client (default: a script)")
    arguments = parser.parse_args()
    model = None
    if arguments.model is not None:
        try:
            model = arguments.model.read_text("utf-8")
            ChatCompletionClient.load_component(json.loads(model))
        except Exception as error:
            parser.error(f"--model {arguments.model}: {type(error).__name__}: {error}")
    try:
        listening = socket.create_server(("127.0.0.1", arguments.port))
    except (OSError, OverflowError) as error:
        parser.error(f"--port {arguments.port}: {error}; --port 0 takes a free one")
    with listening:
        try:
            asyncio.run(run(listening, arguments.data_dir, model))
        except EmbeddedServerError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
