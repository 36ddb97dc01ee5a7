"""Keeps a number of worker processes running.

Rules:

- A worker that dies is started again after a pause. The pause doubles with each worker that dies soon after its start,
  and is short again after a worker that ran for a while.
- A start that cannot succeed is not repeated for ever. If a worker ends before it is ready because of its module or its
  factory, the supervisor stops all workers and exits with that worker's exit code. If any worker has been ready before,
  the cause may be temporary, so the start is tried a few times. With ``--reload`` the supervisor waits for the next
  change of a file instead.
- The first SIGTERM or SIGINT lets the workers finish what they do, a second one ends them at once. No worker outlives
  this process, even if it is killed with ``kill -9`` (`ProcessGroupGuard`).
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

from natsrt.embedded import ProcessGroupGuard
from natsrt.signals import StopSignals

from .exits import Exit
from .health import HealthEndpoint, ListenAddress
from .output import note
from .watching import Watched

logger = logging.getLogger("natsrt.supervisor")

COMMAND = (sys.executable, "-P", "-m", "natsrt_cli")
"""Starts the command line in a new process. -P: only ``--app-dir`` is added to the import path."""

_FIRST_PAUSE = 0.2
"""Seconds before the first new start: short, since most deaths do not repeat."""
_LONGEST_PAUSE = 30.0
"""Seconds that a pause does not exceed, so that a worker is back soon after its trouble is over."""
_LIVED_A_WHILE = 10.0
"""Seconds after which the death of a worker no longer counts as a failed start."""
_ATTEMPTS_TO_START = 5
"""Starts in a row that may fail where a worker has been ready before."""
_AT_ONCE = 3.0
"""Seconds that workers have after a second signal before they are killed."""
_RELOAD_GRACE = 5.0
"""Seconds that workers have to finish what they do when a file has changed; short, since a developer waits."""


@dataclass(slots=True)
class _Worker:
    process: asyncio.subprocess.Process
    ready_pipe: int
    started: float = field(default_factory=time.monotonic)
    ready: bool = False
    replaced: bool = False

    def check_ready(self) -> bool:
        """Read the pipe; True if the worker has written to it that it is ready."""
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
            note(f"worker process {self.process.pid} did not stop in time: killing it")
            self.send_signal(signal.SIGKILL)


class Supervisor:
    """Runs ``natsrt worker`` with ``arguments`` in ``processes`` processes.

    Args:
        watch: When one of these files changes, the workers are restarted. None: no files.
        stop_timeout: Seconds that workers have to stop before they are killed.
        health: Where the first worker answers health probes; each other one has the next port. None: no probes.

    Raises:
        CommandFailed: One of these ports is in use.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        processes: int,
        *,
        watch: Watched | None,
        stop_timeout: float,
        health: ListenAddress | None,
    ) -> None:
        self._arguments = arguments
        self._processes = processes
        self._watch = watch
        self._stop_timeout = stop_timeout
        self._health = health
        if health is not None:
            for index in range(processes):
                with HealthEndpoint(health.of_process(index)):
                    pass
        self._workers: dict[int, _Worker] = {}
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._ever_ready = False
        self._exit = Exit.OK
        self._guard: ProcessGroupGuard | None = None

    async def run(self) -> int:
        """Keep the workers running until a signal comes or a worker cannot be started. Returns the exit code."""
        self._guard = ProcessGroupGuard()
        try:
            with StopSignals(first=self._stop, again=self._stop_at_once):
                await self._keep_all()
        finally:
            self._guard.release()
        return self._exit

    async def _keep_all(self) -> None:
        watching = asyncio.create_task(self._watch_files(self._watch)) if self._watch is not None else None
        await asyncio.sleep(0)  # the watching starts before the first worker imports a file
        await asyncio.gather(*(self._keep(index) for index in range(self._processes)))
        if watching is not None:
            await watching

    # -- one worker process --------------------------------------------------------------------------------------

    async def _keep(self, index: int) -> None:
        deaths = failed_starts = 0
        while not self._stopping.is_set():
            worker = await self._spawn(index)
            code = await worker.process.wait()
            was_ready = worker.check_ready()
            os.close(worker.ready_pipe)
            del self._workers[index]
            if self._stopping.is_set():
                self._note_end(code)
                return
            if worker.replaced:
                deaths = failed_starts = 0
                continue
            self._ever_ready |= was_ready or any(other.check_ready() for other in self._workers.values())
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

    def _note_end(self, code: int) -> None:
        """A worker has ended with ``code`` at the stop. If it did not end as it should, nor does the supervisor."""
        if code in (Exit.CUT_SHORT, Exit.STUCK):
            self._exit = max(self._exit, Exit(code))

    def _is_hopeless(self, code: int, failed_starts: int) -> bool:
        """True if a worker that ended with ``code`` should not be started again."""
        if not failed_starts:
            return False
        if code == Exit.NOT_CONNECTED:
            return not self._ever_ready
        if code == Exit.USAGE or (code == Exit.FAILED and not self._ever_ready):
            return True
        return failed_starts >= _ATTEMPTS_TO_START

    def _give_up(self, code: int) -> None:
        note("a worker cannot be started: stopping all workers")
        self._exit = Exit(code) if code in (Exit.USAGE, Exit.NOT_CONNECTED) else Exit.FAILED
        self._stop()

    async def _spawn(self, index: int) -> _Worker:
        assert self._guard is not None
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        health = [] if self._health is None else self._health.of_process(index).arguments()
        env = {**os.environ}
        if self._watch is not None:  # two changes within a second look the same to the cache of compiled files
            env["PYTHONDONTWRITEBYTECODE"] = "1"
        try:
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                "worker",
                *self._arguments,
                *health,
                *("--worker-number", str(index + 1)),
                *("--ready-fd", str(writing)),
                stdin=subprocess.DEVNULL,
                pass_fds=(writing,),
                process_group=self._guard.group,
                env=env,
            )
        finally:
            os.close(writing)
        worker = self._workers[index] = _Worker(process, reading)
        logger.info("worker process %d started", process.pid)
        if self._stopping.is_set():
            worker.send_signal(signal.SIGTERM)
        return worker

    async def _either(self, event: asyncio.Event, timeout: float | None = None) -> None:
        """Wait until ``event`` is set or the supervisor stops; at most ``timeout`` seconds, None for no limit."""
        waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(self._stopping.wait())]
        try:
            await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    # -- stopping and reloading ----------------------------------------------------------------------------------

    def _stop_at_once(self) -> None:
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

    async def _watch_files(self, watched: Watched) -> None:
        async for names in watched.changes(self._stopping):
            note(f"changed: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}; restarting the workers")
            self._changed.set()
            self._changed = asyncio.Event()
            for worker in self._workers.values():
                worker.replaced = True
                worker.send_signal(signal.SIGTERM)
                asyncio.get_running_loop().call_later(_RELOAD_GRACE, worker.kill_if_alive)


def _how(code: int) -> str:
    """How a process ended, in words; ``code`` as in `subprocess.Popen.returncode`."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
