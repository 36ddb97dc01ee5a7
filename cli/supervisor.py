"""N worker processes that are kept running.

Rules:

- A worker that dies is started again after a pause, which doubles from one quick death to the next and begins anew once
  a worker has lived for a while.
- What cannot get better is not tried for ever. A worker that ends before it was ready, because of its module or its
  factory, ends all and gives its exit code; where others have been ready it may be chance, so it is tried a few times.
  With ``--reload`` the next change of a file is waited for instead.
- The first SIGTERM or SIGINT stops the workers in order, a second one at once. No worker outlives this process, not
  even its ``kill -9`` (`ProcessGroupGuard`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from natsrt.embedded import ProcessGroupGuard

from .exits import CommandFailed, Exit
from .health import Address, HealthEndpoint
from .output import note

logger = logging.getLogger("natsrt.supervisor")

COMMAND = (sys.executable, "-P", "-m", "natsrt_cli")
"""The command line in a process of its own. -P: what is importable is decided by ``--app-dir``."""

_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 30.0
_LIVED_A_WHILE = 10.0
_ATTEMPTS_TO_START = 5
_AT_ONCE = 3.0
"""Seconds that workers have after a second signal before they are killed."""
_RELOAD_GRACE = 5.0
"""Seconds that workers have to finish what they do when a file has changed."""


@dataclass(slots=True)
class _Worker:
    process: asyncio.subprocess.Process
    ready_pipe: int
    started: float = field(default_factory=time.monotonic)
    ready: bool = False
    replaced: bool = False

    def look_whether_ready(self) -> bool:
        """Whether it has said that it is ready."""
        if not self.ready:
            try:
                self.ready = bool(os.read(self.ready_pipe, 1))
            except BlockingIOError:
                pass
        return self.ready

    def send_signal(self, signum: int) -> None:
        try:
            self.process.send_signal(signum)
        except ProcessLookupError:  # it has ended
            pass

    def kill_if_alive(self) -> None:
        if self.process.returncode is None:
            note(f"worker process {self.process.pid} does not stop and is killed")
            self.send_signal(signal.SIGKILL)


class Supervisor:
    """Runs ``natsrt worker`` with ``arguments`` in ``processes`` processes.

    Args:
        watch: Directory whose changed Python files make the workers start anew. None: none.
        stop_timeout: Seconds that workers have to stop in order before they are killed.
        health: Where the first worker answers probes; each other one has the next port. None: nowhere.

    Raises:
        CommandFailed: One of those ports is not free.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        processes: int,
        *,
        watch: Path | None,
        stop_timeout: float,
        health: Address | None,
    ) -> None:
        self._arguments = arguments
        self._processes = processes
        self._watch = watch
        self._stop_timeout = stop_timeout
        self._health = health
        if health is not None:
            for slot in range(processes):
                with HealthEndpoint(health.of_slot(slot)):
                    pass
        self._workers: dict[int, _Worker] = {}
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._ever_ready = False
        self._signals = 0
        self._exit = Exit.OK
        self._guard: ProcessGroupGuard | None = None

    async def run(self) -> int:
        """Keep the workers running until a signal comes or they cannot be. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        self._guard = ProcessGroupGuard()
        try:
            watching = asyncio.create_task(self._watch_files(self._watch)) if self._watch is not None else None
            await asyncio.sleep(0)  # files are watched from before the first import
            await asyncio.gather(*(self._keep(slot) for slot in range(self._processes)))
            if watching is not None:
                await watching
        finally:
            self._guard.release()
        return self._exit

    # -- one place for one worker --------------------------------------------------------------------------------

    async def _keep(self, slot: int) -> None:
        deaths = failed_starts = 0
        while not self._stopping.is_set():
            worker = await self._spawn(slot)
            code = await worker.process.wait()
            was_ready = worker.look_whether_ready()
            os.close(worker.ready_pipe)
            del self._workers[slot]
            if self._stopping.is_set():
                return
            if worker.replaced:
                deaths = failed_starts = 0
                continue
            self._ever_ready |= was_ready or any(other.look_whether_ready() for other in self._workers.values())
            failed_starts = 0 if was_ready else failed_starts + 1
            if not was_ready and self._watch is not None and code in (Exit.FAILED, Exit.USAGE):
                note("waiting for a file to change")
                await self._either(self._changed)
                continue
            if self._is_hopeless(code, failed_starts):
                self._give_up(code)
                return
            deaths = 0 if time.monotonic() - worker.started >= _LIVED_A_WHILE else deaths + 1
            pause = min(_FIRST_PAUSE * 2 ** max(0, deaths - 1), _LONGEST_PAUSE)
            note(f"worker process {worker.process.pid} {_how(code)}; another one starts in {pause:g} s")
            await self._either(self._changed, pause)

    def _is_hopeless(self, code: int, failed_starts: int) -> bool:
        """Whether a worker that ended so is not worth another try."""
        if not failed_starts:
            return False
        if code == Exit.NOT_CONNECTED:
            return not self._ever_ready
        if code == Exit.USAGE or (code == Exit.FAILED and not self._ever_ready):
            return True
        return failed_starts >= _ATTEMPTS_TO_START

    def _give_up(self, code: int) -> None:
        note("a worker cannot be started: all are stopped")
        self._exit = Exit(code) if code in (Exit.USAGE, Exit.NOT_CONNECTED) else Exit.FAILED
        self._stop()

    async def _spawn(self, slot: int) -> _Worker:
        assert self._guard is not None
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        health = [] if self._health is None else self._health.of_slot(slot).arguments()
        env = {**os.environ}
        if self._watch is not None:  # a file changed twice within a second is not told from its compiled form
            env["PYTHONDONTWRITEBYTECODE"] = "1"
        try:
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                "worker",
                *self._arguments,
                *health,
                "--ready-fd",
                str(writing),
                stdin=subprocess.DEVNULL,
                pass_fds=(writing,),
                process_group=self._guard.group,
                env=env,
            )
        finally:
            os.close(writing)
        worker = self._workers[slot] = _Worker(process, reading)
        logger.info("worker process %d started", process.pid)
        if self._stopping.is_set():
            worker.send_signal(signal.SIGTERM)
        return worker

    async def _either(self, event: asyncio.Event, timeout: float | None = None) -> None:
        """Wait for ``event`` or the stop, ``timeout`` seconds at most."""
        waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(self._stopping.wait())]
        try:
            await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    # -- stopping and reloading ----------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals == 1:
            self._stop()
        else:
            self._signal_all()
            asyncio.get_running_loop().call_later(_AT_ONCE, self._kill_all)

    def _stop(self) -> None:
        self._stopping.set()
        self._signal_all()
        asyncio.get_running_loop().call_later(self._stop_timeout, self._kill_all)

    def _signal_all(self) -> None:
        for worker in self._workers.values():
            worker.send_signal(signal.SIGTERM)

    def _kill_all(self) -> None:
        for worker in self._workers.values():
            worker.kill_if_alive()

    async def _watch_files(self, directory: Path) -> None:
        from watchfiles import PythonFilter, awatch

        async for changes in awatch(directory, watch_filter=PythonFilter(), stop_event=self._stopping):
            names = sorted({Path(path).name for _, path in changes})
            note(f"changed: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}; the workers start anew")
            self._changed.set()
            self._changed = asyncio.Event()
            for worker in self._workers.values():
                worker.replaced = True
                worker.send_signal(signal.SIGTERM)
                asyncio.get_running_loop().call_later(_RELOAD_GRACE, worker.kill_if_alive)


def require_watchfiles() -> None:
    """Raises `CommandFailed` where the package that watches files is missing."""
    try:
        import watchfiles  # noqa: F401
    except ImportError:
        missing = "--reload needs the package watchfiles: pip install 'natsrt[reload]'"
        raise CommandFailed(missing, Exit.USAGE) from None


def _how(code: int) -> str:
    """How a process ended, in words."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
