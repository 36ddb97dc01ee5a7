"""Python programs in real processes of their own, without the second that Python and AutoGen take to start.

A process that has imported what most programs use (`_Forge`, one for each test process) forks one child for each
program, which is the command ``natsrt`` or a source. The child gets its own arguments, environment, directory, process
group and output, and ends as any Python program does. What Python itself reads at its start cannot be given to such a
child: `start` then executes the program instead.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

NATSRT = Path(sysconfig.get_path("scripts")) / "natsrt"
"""The installed command."""

_READ_AT_THE_START = ("PYTHON", "OTEL_", "LC_", "LANG", "LD_")
"""Prefixes of variables that Python, or what it imports, reads only once."""
_TAKEN_OVER = ("PYTHONPATH", "PYTHONUNBUFFERED")
"""Variables of these that a child takes over all the same."""
_IMPORTED = ("agents", "auth", "demo", "doctor", "messages", "server", "state", "tail", "supervised", "worker")


Command = Sequence[str | Path]
"""A program and its arguments: `NATSRT`, or this Python with a file, or with ``-c`` and a source."""


class Fork:
    """One program that runs in a fork. Has what `subprocess.Popen` has, as far as tests need it."""

    def __init__(
        self,
        command: Command,
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        env: Mapping[str, str],
        cwd: str | Path | None = None,
        group: int = 0,
    ) -> None:
        """Start a program. The descriptors stay the caller's; ``group`` 0 is a process group of its own."""
        told, tell = os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY)
        order = {
            "command": [str(part) for part in command],
            "env": dict(env),
            "cwd": str(cwd or Path.cwd()),
            "group": group,
        }
        try:
            given = nothing if stdin == subprocess.DEVNULL else stdin
            _forge().order(order, [given, stdout, stderr, tell])
        finally:
            os.close(tell)
            os.close(nothing)
        self._told: int | None = told
        self._said = b""
        while b"\n" not in self._said:
            self._hear()
        self.pid = int(self._said.split(b"\n")[0])
        self.returncode: int | None = None

    @property
    def told(self) -> int:
        """A descriptor that becomes readable when the command has ended."""
        assert self._told is not None
        return self._told

    def poll(self) -> int | None:
        """The exit code, minus the signal that ended it; None while it runs."""
        if self.returncode is None and select.select([self.told], [], [], 0)[0]:
            if self._said.count(b"\n") < 2:  # else it had ended when its start was heard of
                self._hear()
            self.returncode = int(self._said.split(b"\n")[1])
            os.close(self.told)
            self._told = None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, and return the exit code.

        Raises:
            subprocess.TimeoutExpired: It did not end within ``timeout`` seconds.
        """
        if self.returncode is None and not select.select([self.told], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("natsrt", timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, signum: int) -> None:
        """Send it a signal. Does nothing when it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP, and wait until each of its threads stands still."""
        self.send_signal(signal.SIGSTOP)
        while self.poll() is None and not self._stands_still():
            time.sleep(0.002)

    def _stands_still(self) -> bool:
        try:
            threads = list(Path(f"/proc/{self.pid}/task").iterdir())
            states = [(thread / "stat").read_text().rpartition(")")[2].split()[0] for thread in threads]
        except OSError:
            return False  # a thread, or the process, ended meanwhile
        return all(state in "TZX" for state in states)

    def _hear(self) -> None:
        heard = os.read(self.told, 100)
        if not heard:
            raise RuntimeError("the process that forks commands has ended")
        self._said += heard


def start(
    command: Command,
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int,
    stderr: int,
    env: Mapping[str, str],
    cwd: str | Path | None = None,
    group: int = 0,
) -> Fork | subprocess.Popen[bytes]:
    """Start any program: in a fork if that is the same, else executed. See `Fork` for the arguments."""
    if _forkable(command, env):
        return Fork(command, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd, group=group)
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd, process_group=group)


def _forkable(command: Command, env: Mapping[str, str]) -> bool:
    if sys.platform != "linux" or command[0] not in (NATSRT, sys.executable):
        return False
    if command[0] == sys.executable and str(command[1]).startswith("-") and command[1] != "-c":
        return False  # an option of Python
    names = {*env, *os.environ}
    changed = [name for name in names if name not in _TAKEN_OVER and env.get(name) != os.environ.get(name)]
    return not any(name.startswith(_READ_AT_THE_START) for name in changed)


class _Forge:
    """The process that forks, as the test process sees it. It ends with the test process, and belongs to its group."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        self.owner = os.getpid()
        atexit.register(self._end)

    def _end(self) -> None:
        if self.owner == os.getpid():
            self._orders.close()
            self._process.wait()

    def order(self, order: Mapping[str, object], descriptors: list[int]) -> None:
        data = json.dumps(order).encode()
        socket.send_fds(self._orders, [len(data).to_bytes(4, "big")], descriptors)
        self._orders.sendall(data)


_made: _Forge | None = None


def _forge() -> _Forge:
    global _made
    if _made is None or _made.owner != os.getpid():
        _made = _Forge()
    return _made


# -- the process that forks ----------------------------------------------------------------------------------------


def _serve(orders: socket.socket) -> Mapping[str, Any]:
    """Fork a child for each order. Returns the order, in the child; the parent ends when nobody can order any more."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda signum, frame: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    running: dict[int, int] = {}  # the descriptor that hears of each child's end
    while True:
        ready, _, _ = select.select([orders, woken], [], [])
        if woken in ready:
            os.read(woken, 1000)
            _report(running)
        if orders not in ready:
            continue
        size, descriptors, _, _ = socket.recv_fds(orders, 4, 4)
        if not size:
            sys.exit()
        data = b""
        while len(data) < int.from_bytes(size, "big"):
            data += orders.recv(65536)
        order: dict[str, Any] = json.loads(data)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in (woken, wake, descriptors[3], *running.values()):
                os.close(descriptor)
            orders.close()
            return {**order, "descriptors": descriptors[:3]}
        for descriptor in descriptors[:3]:
            os.close(descriptor)
        running[pid] = descriptors[3]
        os.write(descriptors[3], b"%d\n" % pid)


def _report(running: dict[int, int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        tell = running.pop(pid)
        try:
            os.write(tell, b"%d\n" % os.waitstatus_to_exitcode(status))
        except BrokenPipeError:
            pass  # the test has ended
        os.close(tell)


def _become(order: Mapping[str, Any]) -> None:
    """Be the process that the order asks for, up to its program."""
    os.setpgid(0, order["group"])
    for number, descriptor in enumerate(order["descriptors"]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    former = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    time.tzset()
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=unbuffered or stream is sys.stderr or stream.isatty())
    own = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [*own, *(place for place in sys.path if place not in former)]


def _run(program: str, *arguments: str) -> None:
    if program == str(NATSRT):
        sys.path.insert(0, str(NATSRT.parent))
        sys.argv[:] = [program, *arguments]
        natsrt_cli.main()
    main = sys.modules["__main__"] = ModuleType("__main__")
    if arguments[0] == "-c":
        source, name = arguments[1], "<string>"
        sys.path.insert(0, "")
        sys.argv[:] = ["-c", *arguments[2:]]
    else:
        name = main.__file__ = arguments[0]
        source = Path(name).read_text()
        sys.path.insert(0, str(Path(name).parent))
        sys.argv[:] = arguments
    exec(compile(source, name, "exec"), main.__dict__)


if __name__ == "__main__":
    import natsrt_cli

    for module in _IMPORTED:
        __import__(f"natsrt_cli.{module}")
    gc.collect()
    gc.freeze()
    _order = _serve(socket.socket(fileno=int(sys.argv[1])))
    _become(_order)
    _run(*_order["command"])
