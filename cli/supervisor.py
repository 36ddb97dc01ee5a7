"""Keeps a number of worker processes running.

Rules:

- A worker that dies is started again after a pause. The pause doubles with each worker that dies soon after its start,
  and is short again after a worker that ran for a while.
- A start that cannot succeed is not repeated for ever. If a worker ends before it is ready because of its module or its
  factory, the supervisor stops all workers and exits with that worker's exit code. If any worker has been ready before,
  the cause may be temporary, so the start is tried a few times. With ``--reload`` the supervisor waits for the next
  change of a file instead.
- A worker that hangs is killed, and replaced like one that died: see `natsrt_cli.supervised`. Only a worker that has
  been ready can hang, because a factory may block the event loop for as long as it takes to load a model.
- The first SIGTERM or SIGINT lets the workers finish what they do, a second one ends them at once. A worker that hangs
  has ``drain_timeout`` seconds for that, too, because its handler may end; one that does not hang has some more for its
  last steps. If a worker has to be killed, the exit code says so.
- No worker outlives this process. If an exception ends it, it first stops the workers, and kills those that do not
  stop. If it is killed with ``kill -9``, two things end the workers, independently: the guard of their process group
  (`ProcessGroupGuard`), which also ends one that is frozen, and each worker itself (`natsrt_cli.supervised`), also if
  it has left the group or if the guard was killed. Processes are only signalled by the ids of children that have not
  been waited for, or through the guard's group, so no other process can be hit.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from natsrt.background import end_tasks
from natsrt.embedded import ProcessGroupGuard
from natsrt.signals import StopSignals

from .exits import Exit
from .health import HealthEndpoint, ListenAddress
from .output import note
from .supervised import PULSE
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
HANG_TIMEOUT = 30.0
"""Seconds without a pulse after which a worker counts as hung. Other workers take it for lost after some seconds. It
is longer, so that a handler that blocks the event loop, but ends, does not cost the other messages of its worker."""
_STOP_MARGIN = 10.0
"""Seconds after ``drain_timeout`` at which a worker that has not stopped is killed."""
_RELOAD_GRACE = 5.0
"""Seconds that workers have to finish what they do when a file has changed; short, since a developer waits."""


@dataclass(slots=True)
class _Worker:
    process: asyncio.subprocess.Process
    report: int
    """The pipe into which the worker writes its pulses."""
    started: float = field(default_factory=time.monotonic)
    ready: bool = False
    replaced: bool = False
    silent: float = 0.0
    """Seconds since the last pulse."""

    def check_ready(self) -> bool:
        """Read the pulses; True if there ever was one."""
        try:
            pulses = os.read(self.report, 4096)
        except BlockingIOError:
            pulses = b""
        if pulses:
            self.ready, self.silent = True, 0.0
        return self.ready

    def hangs(self, passed: float, timeout: float) -> bool:
        """True if there was no pulse for ``timeout`` seconds. ``passed``: seconds since the last call."""
        self.silent += passed
        return self.check_ready() and not self.replaced and self.silent >= timeout

    def send_signal(self, signum: int) -> None:
        try:
            self.process.send_signal(signum)
        except OSError as error:  # it has ended, or it has become another user's
            logger.debug("worker process %d: %s", self.process.pid, error)

    def kill_if_alive(self) -> None:
        if self.process.returncode is None:
            note(f"worker process {self.process.pid} did not stop in time: killing it")
            self.send_signal(signal.SIGKILL)


class Supervisor:
    """Runs ``natsrt worker`` with ``arguments`` in ``processes`` processes.

    Args:
        watch: When one of these files changes, the workers are restarted. None: no files.
        drain_timeout: Seconds that workers have to finish their handlers at a stop.
        hang_timeout: Seconds without a pulse after which a worker that has been ready is replaced.
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
        drain_timeout: float,
        hang_timeout: float,
        health: ListenAddress | None,
    ) -> None:
        self._arguments = arguments
        self._processes = processes
        self._watch = watch
        self._drain_timeout = drain_timeout
        self._stop_timeout = drain_timeout + _STOP_MARGIN
        self._hang_timeout = hang_timeout
        self._health = health
        if health is not None:
            for index in range(processes):
                with HealthEndpoint(health.of_process(index)):
                    pass
        self._workers: dict[int, _Worker] = {}
        self._stopping = asyncio.Event()
        self._drains_until = -math.inf
        """When the workers no longer have time to finish their handlers, by `time.monotonic`; before a stop, never."""
        self._changed = asyncio.Event()
        self._ever_ready = False
        self._exit = Exit.OK
        self._guard: ProcessGroupGuard | None = None
        self._lifeline: tuple[int, int] = (-1, -1)
        """The pipe that the workers watch: its reading and its writing end. No child gets the writing end."""

    async def run(self) -> int:
        """Keep the workers running until a signal comes or a worker cannot be started. Returns the exit code."""
        self._guard = ProcessGroupGuard()
        self._lifeline = os.pipe()
        try:
            with StopSignals(first=self._stop, again=self._stop_at_once):
                try:
                    await self._keep_all()
                finally:
                    await self._end_all()
        finally:
            if any(worker.process.returncode is None for worker in self._workers.values()):
                self._guard.end_group()
            self._guard.release()
            for end in self._lifeline:
                os.close(end)
        return self._exit

    async def _keep_all(self) -> None:
        beside = [asyncio.create_task(self._replace_hanging())]
        if self._watch is not None:
            beside.append(asyncio.create_task(self._watch_files(self._watch)))
        await asyncio.sleep(0)  # the watching starts before the first worker imports a file
        try:
            await asyncio.gather(*(self._keep(index) for index in range(self._processes)))
        finally:
            await end_tasks(*beside)

    async def _end_all(self) -> None:
        """Stop the workers that an exception has left, and wait for them."""
        left = [worker for worker in self._workers.values() if worker.process.returncode is None]
        if not left:
            return
        note("the supervisor has failed: stopping all workers", "error")
        self._stop()
        async with asyncio.timeout(self._stop_timeout + _AT_ONCE):
            await asyncio.gather(*(worker.process.wait() for worker in left))

    # -- one worker process --------------------------------------------------------------------------------------

    async def _keep(self, index: int) -> None:
        deaths = failed_starts = 0
        while not self._stopping.is_set():
            try:
                worker = await self._spawn(index)
            except OSError as error:  # no memory, or too many processes or open files
                deaths, failed_starts = deaths + 1, failed_starts + 1
                if failed_starts >= _ATTEMPTS_TO_START and not self._ever_ready:
                    self._give_up(Exit.FAILED)
                    return
                await self._pause(f"a worker process cannot be started: {error.strerror}", deaths)
                continue
            code = await worker.process.wait()
            was_ready = worker.check_ready()
            os.close(worker.report)
            del self._workers[index]
            if self._stopping.is_set():
                self._note_end(code, was_ready)
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
            await self._pause(f"worker process {worker.process.pid} {_how(code)}", deaths)

    async def _pause(self, why: str, deaths: int) -> None:
        """Wait before the next start. ``deaths`` is how many workers in a row have died soon after their start."""
        pause = min(_FIRST_PAUSE * 2 ** max(0, deaths - 1), _LONGEST_PAUSE)
        note(f"{why}; another one starts in {pause:g} s")
        await self._either(self._changed, pause)

    async def _replace_hanging(self) -> None:
        """Kill workers that hang, so that they are started again, or do not hold up a stop."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(PULSE)
            now = time.monotonic()
            # If this process stood still too, as on a suspended machine, the workers get another chance to report.
            passed, looked = min(now - looked, 2 * PULSE), now
            for worker in self._workers.values():
                if worker.hangs(passed, self._hang_timeout) and now >= self._drains_until:
                    pid, seconds = worker.process.pid, worker.silent
                    how = "killing" if self._stopping.is_set() else "replacing"
                    note(f"worker process {pid} hangs: its event loop has not run for {seconds:.0f} s; {how} it")
                    worker.send_signal(signal.SIGKILL)

    def _note_end(self, code: int, was_ready: bool) -> None:
        """A worker has ended with ``code`` at the stop. If it did not end as it should, nor does the supervisor.

        One that a signal ended, other than that of the stop during its start, had no time to finish its handlers.
        """
        if code < 0 and (was_ready or code != -signal.SIGTERM):
            code = Exit.CUT_SHORT
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
        lifeline, _ = self._lifeline
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
                *("--supervisor-pipes", str(writing), str(lifeline)),
                stdin=subprocess.DEVNULL,
                pass_fds=(writing, lifeline),
                process_group=self._guard.group,
                env=env,
            )
        except BaseException:
            os.close(reading)
            raise
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
        self._drains_until = time.monotonic() + self._drain_timeout
        self._signal_all()
        asyncio.get_running_loop().call_later(self._stop_timeout, self._kill_all)

    def _signal_all(self) -> None:
        for worker in self._workers.values():
            worker.send_signal(signal.SIGTERM)

    def _kill_all(self) -> None:
        for worker in self._workers.values():
            worker.kill_if_alive()

    async def _watch_files(self, watched: Watched) -> None:
        try:
            async for names in watched.changes(self._stopping):
                note(f"changed: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}; restarting the workers")
                self._replace_all()
        except Exception as error:  # as when the directory is gone, or the system cannot watch so many files
            note(f"files can no longer be watched: {error}; stopping all workers", "error")
            self._exit = Exit.FAILED
            self._stop()

    def _replace_all(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        for worker in self._workers.values():
            worker.replaced = True
            worker.send_signal(signal.SIGTERM)
            asyncio.get_running_loop().call_later(_RELOAD_GRACE, worker.kill_if_alive)


def _how(code: int) -> str:
    """How a process ended, in words; ``code`` as in `subprocess.Popen.returncode`."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
