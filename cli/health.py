"""``/livez``, ``/readyz`` and ``/healthz`` over HTTP, for probes such as those of Kubernetes.

Rules:

1. The endpoint runs in its own threads and asks the event loop. ``/livez`` fails if the event loop does not answer.
2. A process whose event loop answers is live, even if its runtime is not connected: the runtime recovers by itself, and
   a restart would not help. A process that still imports its module is live, and so is one that is stopping.
3. Handlers may block the event loop for 2 s at a time. It counts as hung only after `PATIENCE`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import socket
import socketserver
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

import click
import orjson
from pydantic import TypeAdapter, ValidationError

from natsrt.observe.health import Health

from .exits import CommandFailed
from .ports import PORT
from .usage import judge_usage

logger = logging.getLogger("natsrt.health")

PATIENCE = 5.0
"""Seconds without an answer after which the event loop counts as hung: more than the 2 s that a handler may block."""
_REQUEST_SECONDS = 10.0
"""Seconds that a client has to send its request; ends threads of clients that send nothing."""
_POLL_SECONDS = 0.1
"""Seconds between two looks whether the endpoint should stop, and so the longest that stopping it takes."""
_PORT_VARIABLE, _HOST_VARIABLE = "NATSRT_HEALTH_PORT", "NATSRT_HEALTH_HOST"

_PATHS: dict[str, Callable[[Health], bool]] = {
    "/livez": lambda health: health.live,
    "/readyz": lambda health: health.live and health.ready,
    "/healthz": lambda health: health.live and health.ready,
}
"""For each path: True answers with status 200, False with 503."""


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where an endpoint listens. Port 0 means any free port."""

    host: str
    port: int

    def of_process(self, index: int) -> ListenAddress:
        """The address of one of several worker processes, counted from 0: each has the next port."""
        return replace(self, port=self.port + index) if self.port else self

    def arguments(self) -> list[str]:
        """This address as arguments for ``natsrt worker``."""
        return ["--health-host", self.host, "--health-port", str(self.port or -1)]


def health_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the endpoint, passed to the command as ``health``: a `ListenAddress`, None for no endpoint."""

    @click.option(
        "--health-port",
        type=PORT,
        envvar=_PORT_VARIABLE,
        help=f"Answer /livez, /readyz and /healthz over HTTP on this port, -1 for a free one (${_PORT_VARIABLE}).",
    )
    @click.option(
        "--health-host",
        envvar=_HOST_VARIABLE,
        default="127.0.0.1",
        show_default=True,
        help=f"Address for --health-port; 0.0.0.0 for the probes of Kubernetes (${_HOST_VARIABLE}).",
    )
    @functools.wraps(command)
    def run(health_port: int | None, health_host: str, **parameters: Any) -> Any:
        health = None if health_port is None else ListenAddress(health_host, max(health_port, 0))
        return command(health=health, **parameters)

    return run


class HealthEndpoint:
    """Answers health probes. It listens as soon as it is made; the runtime may follow later. A context manager.

    Raises:
        CommandFailed: The address is in use, or does not belong to this machine.
    """

    def __init__(self, address: ListenAddress) -> None:
        self._loop_health: _LoopHealth | None = None
        try:
            self._server = _Server(address, self.health)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise CommandFailed(f"--health-port: cannot listen on {address.host}:{address.port}: {reason}") from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="natsrt health", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Base URL of the endpoint."""
        host, port = self._server.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def report(self, examine: Callable[[], Health]) -> None:
        """From now on answer with the result of ``examine``, called in the event loop that is running now."""
        self._loop_health = _LoopHealth(asyncio.get_running_loop(), examine)

    def health(self) -> Health:
        """The present health. Call it in any thread except that of the event loop."""
        if self._loop_health is None:
            return Health(live=True, ready=False, reasons=("The worker is about to start.",))
        return self._loop_health.health()


class _LoopHealth:
    """Asks an event loop for the health, from other threads. Made in the thread of that loop.

    Concurrent requests share one question. `PATIENCE` seconds after it was asked, all of them stop waiting.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, examine: Callable[[], Health]) -> None:
        self._loop = loop
        self._loops_thread = threading.get_ident()
        self._examine = examine
        self._lock = threading.Lock()
        self._asked_at = 0.0
        self._question: Future[Health] | None = None
        self._reported: Future[Health] | None = None

    def health(self) -> Health:
        try:
            question, asked_at = self._ask()
        except RuntimeError:  # the loop is closed
            return Health(live=True, ready=False, reasons=("The worker has ended.",))
        try:
            return question.result(max(0.0, asked_at + PATIENCE - time.monotonic()))
        except TimeoutError:
            return self._hung(question, time.monotonic() - asked_at)

    def _ask(self) -> tuple[Future[Health], float]:
        with self._lock:
            if self._question is None or self._question.done():
                self._question, self._asked_at = Future(), time.monotonic()
                self._loop.call_soon_threadsafe(self._answer, self._question)
            return self._question, self._asked_at

    def _answer(self, question: Future[Health]) -> None:
        """Called in the event loop."""
        try:
            question.set_result(replace(self._examine(), live=True))
        except Exception as error:
            question.set_exception(error)

    def _hung(self, question: Future[Health], seconds: float) -> Health:
        frame = sys._current_frames().get(self._loops_thread)
        reason = f"The event loop has not answered for {seconds:.1f} s{_place(frame)}."
        with self._lock:
            first, self._reported = self._reported is not question, question
        if first:
            stack = "".join(traceback.format_stack(frame)).rstrip() if frame is not None else ""
            logger.warning("%s It is blocked here:\n%s", reason, stack)
        # Only the event loop changes what `examine` reads, and it is blocked: so it can be called in this thread.
        return replace(self._examine(), live=False, ready=False, reasons=(reason,))


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return ""
    code = frame.f_code
    return f": it is in {Path(code.co_filename).name}, line {frame.f_lineno}, in {code.co_name}"


class _Server(socketserver.ThreadingTCPServer):
    # Not http.server.HTTPServer, which asks DNS for the name of its address.
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(self, address: ListenAddress, health: Callable[[], Health]) -> None:
        self.health = health
        self.address_family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        super().__init__((address.host, address.port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a request for the health of this worker failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _REQUEST_SECONDS
    wbufsize = -1  # send an answer as a whole
    server_version, sys_version = "natsrt", ""

    def do_GET(self) -> None:
        decide = _PATHS.get(self.path.partition("?")[0])
        if decide is None:
            self._send(HTTPStatus.NOT_FOUND, {"error": f"the paths are {', '.join(_PATHS)}"})
        else:
            health = self.server.health()
            self._send(HTTPStatus.OK if decide(health) else HTTPStatus.SERVICE_UNAVAILABLE, health)

    def _send(self, status: HTTPStatus, content: Any) -> None:
        body = orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


# -- reading it --------------------------------------------------------------------------------------------------

_LOSSES = {
    "dropped_events": "dropped events",
    "undelivered_events": "events that found no owner",
    "undecodable": "messages that could not be read",
    "unknown_payloads": "messages of unknown types",
    "refused_replies": "calls with a reserved reply subject",
}
"""Counts of `Health` that should be 0, and how they are called in a finding."""


def judge(url: str) -> list[tuple[Literal["ok", "warning", "problem"], str, str]]:
    """Findings about the worker whose endpoint is ``url``: level, text, and what to do. Blocks until it answers."""
    url = f"{url.rstrip('/')}/healthz"
    try:
        health = TypeAdapter(Health).validate_python(read_json(url, PATIENCE + _REQUEST_SECONDS))
    except (OSError, ValueError) as error:
        text = "it does not report the health of a worker" if isinstance(error, ValidationError) else str(error)
        return [("problem", f"{url} cannot be read: {text}", "check --health-url, and that worker's --health-port")]
    who, reasons = f"{health.worker_id or 'the worker'} at {url}", " ".join(health.reasons)
    if not health.live:
        advice = "restart it; run code that blocks the event loop with asyncio.to_thread"
        return [("problem", f"{who} hangs. {reasons}", advice)]
    figures = f"{sum(health.agents.values()):,} live agents, {health.handlers_running:,} handlers running"
    losses = [f"{count:,} {what}" for name, what in _LOSSES.items() if (count := getattr(health, name))]
    found: list[tuple[Literal["ok", "warning", "problem"], str, str]] = [
        ("ok", f"{who} is ready: {figures}", "") if health.ready else ("warning", f"{who} is not ready. {reasons}", "")
    ]
    if health.server_error is not None:
        found.append(
            ("warning", f"the server says to {who}: {health.server_error!r}", "see docs/operations.md, Limits")
        )
    if health.jetstream_full is not None:
        found.append(("problem", f"JetStream refused a request of {who} a moment ago: {health.jetstream_full}", ""))
    found += judge_usage(health.jetstream_usage)
    if losses:
        found.append(("warning", f"{who} counts {', '.join(losses)}", "see its log"))
    return found


def read_json(url: str, timeout: float) -> Any:
    """The JSON at ``url``, with status 503 too. Raises OSError, and ValueError if it is not JSON or not an HTTP URL."""
    if not url.startswith(("http://", "https://")):
        raise ValueError("it must start with http:// or https://")
    try:
        answer = urllib.request.urlopen(url, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
            raise
        answer = error
    with answer:
        return json.load(answer)
