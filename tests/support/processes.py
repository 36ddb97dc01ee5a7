"""Real processes for tests, and waiting for conditions instead of sleeping.

A process belongs to no event loop: it is a plain ``subprocess.Popen``, or a fork of one that has imported natsrt
(`tests.support.forks`). Its output goes to files, so that it never blocks on a full pipe and its output stays readable
after its end.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, overload

from natsrt.embedded import ProcessGroupGuard, freeze
from tests.support import forks

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parents[2]

TAP = os.environ.get("NATSRT_TEST_TAP") == "1"
"""Whether a subscription to every subject is open beside the tests."""

_POLL_SECONDS = 0.02
_LINES_IN_FAILURES = 40


@overload
async def eventually(condition: Callable[[], Awaitable[T]], timeout: float = 5.0, message: str = "") -> T: ...
@overload
async def eventually(condition: Callable[[], T], timeout: float = 5.0, message: str = "") -> T: ...
async def eventually(condition: Callable[[], Any], timeout: float = 5.0, message: str = "") -> Any:
    """Poll ``condition``, a function or a coroutine function, until it is true, and return what it returned.

    Raises:
        AssertionError: It was not true within ``timeout`` seconds, with ``message`` and the last value in its text.
    """
    last: object = "nothing: the condition did not return"
    deadline = time.monotonic() + timeout
    while True:
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + max(deadline - time.monotonic(), 0.0)):
                outcome = condition()
                value = await outcome if inspect.isawaitable(outcome) else outcome
        except TimeoutError:
            if time.monotonic() < deadline:
                raise  # the condition's own
        else:
            if value:
                return value
            last = value
        if time.monotonic() >= deadline:
            raise AssertionError(f"{message or 'the condition'}: not within {timeout:g} s; last value {last!r}")
        await asyncio.sleep(_POLL_SECONDS)


class Process:
    """A process in a group of its own, which does not outlive the test run, however that ends.

    ``close()``, or the end of a ``with`` block, kills the whole group, children included.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        output: Path,
        name: str = "process",
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> None:
        """Start ``command``. ``env`` is added to this process's environment; output goes to files under ``output``."""
        self.name = name
        self._stdout = output / f"{name}.stdout"
        self._stderr = output / f"{name}.stderr"
        self._guard = ProcessGroupGuard()
        try:
            with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
                self._process = forks.start(
                    command,
                    stdout=stdout.fileno(),
                    stderr=stderr.fileno(),
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
                    cwd=cwd,
                    group=self._guard.group,
                )
        except BaseException:
            self._guard.end_group()
            raise

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the signal that ended it, or None while it runs."""
        return self._process.poll()

    @property
    def running(self) -> bool:
        """Whether the process has not ended; a paused one runs."""
        return self.returncode is None

    @property
    def stdout(self) -> str:
        """All that it has written to standard output until now."""
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """All that it has written to standard error until now."""
        return self._stderr.read_text(errors="replace")

    async def wait_for_line(self, pattern: str | re.Pattern[str], timeout: float = 10.0) -> str:
        """Wait for a whole line, on either output, that contains the text or matches the pattern, and return it.

        Raises:
            AssertionError: It ended without such a line, or wrote none within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            running = self.running  # asked first: what it wrote before its end is then read below
            for line in (*_whole_lines(self.stdout), *_whole_lines(self.stderr)):
                if pattern in line if isinstance(pattern, str) else pattern.search(line):
                    return line
            if not running:
                raise AssertionError(f"{self.name} ended without the line {pattern!r}; {self.describe()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name} did not write {pattern!r} within {timeout:g} s; {self.describe()}")
            await asyncio.sleep(_POLL_SECONDS)

    async def wait(self, timeout: float = 10.0) -> int:
        """Wait for the end and return the exit code.

        Raises:
            AssertionError: It did not end within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while (code := self.returncode) is None:
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name} did not end within {timeout:g} s; {self.describe()}")
            await asyncio.sleep(_POLL_SECONDS)
        return code

    def send_signal(self, signum: int) -> None:
        """Send the process, not its children, a signal. Does nothing when it has ended."""
        self._process.send_signal(signum)

    def terminate(self) -> None:
        """SIGTERM: ask it to stop."""
        self.send_signal(signal.SIGTERM)

    def interrupt(self) -> None:
        """SIGINT, as Ctrl-C."""
        self.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """SIGSTOP: freeze it, its connections staying open. It stands still when this returns."""
        if isinstance(self._process, forks.Fork):
            self._process.freeze()
        else:
            freeze(self._process)

    def resume(self) -> None:
        """SIGCONT: let it go on."""
        self.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill it and all that it started in its group. Closing again is harmless."""
        self._guard.end_group()
        self._process.wait()

    def describe(self) -> str:
        """Its state and its last output, for failures."""
        state = "running" if self.running else f"ended with {self.returncode}"
        return f"{state}\n--- stdout\n{_last_lines(self.stdout)}\n--- stderr\n{_last_lines(self.stderr)}"


class Processes:
    """Starts processes and ends all of them with ``close()``. Use it through the fixture ``processes``."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._started: list[Process] = []

    def start(
        self,
        command: Sequence[str | Path],
        *,
        name: str = "process",
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> Process:
        """Start any command."""
        numbered = f"{name}-{len(self._started) + 1}"
        process = Process(command, output=self._output, name=numbered, env=env, cwd=cwd)
        self._started.append(process)
        return process

    def python(
        self,
        source: str | Path,
        *arguments: str,
        name: str = "python",
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> Process:
        """Start this Python with a source text (``str``) or a file (``Path``). The package ``tests`` is importable."""
        program = [source] if isinstance(source, Path) else ["-c", source]
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        return self.start(
            [sys.executable, *program, *arguments], name=name, env={"PYTHONPATH": path, **(env or {})}, cwd=cwd
        )

    def natsrt(
        self,
        *arguments: str,
        name: str = "natsrt",
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> Process:
        """Start the installed command ``natsrt``, such as ``processes.natsrt("worker", "my_module:factory")``."""
        return self.start([forks.NATSRT, *arguments], name=name, env=env, cwd=cwd)

    def close(self) -> None:
        """End every process that is left, and print what they wrote, which pytest shows if the test failed."""
        for process in self._started:
            process.close()
            sys.stdout.write(f"{process.name}: {process.describe()}\n")


_TAP = """
import asyncio, sys
import nats

async def discard(_):
    pass

async def main():
    while True:
        closed = asyncio.Event()

        async def on_closed():
            closed.set()

        client = await nats.connect(
            sys.argv[1], max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=discard, closed_cb=on_closed
        )
        await client.subscribe(">", cb=discard)
        await asyncio.sleep(0)  # the subscription is then written ahead of the flush's ping
        await client.flush()
        print("listening", flush=True)
        await closed.wait()

asyncio.run(main())
"""


async def start_tap(processes: Processes, url: str) -> Process:
    """A client that subscribes to every subject and discards what comes, as ``nats sub '>'`` beside the test.

    It reconnects for ever, and is a process of its own so that it takes no time from the test's event loop.
    """
    tap = processes.python(_TAP, url, name="tap")
    await tap.wait_for_line("listening")
    return tap


def _whole_lines(text: str) -> list[str]:
    return [line.rstrip("\r\n") for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-_LINES_IN_FAILURES:])
