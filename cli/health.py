"""``/livez``, ``/readyz`` and ``/healthz`` over HTTP, for probes such as those of Kubernetes.

Rules:

1. The endpoint has threads of its own and asks the event loop. One that does not answer is what ``/livez`` is for.
2. A process whose event loop answers is live, whatever its runtime lacks: that comes back by itself, and a restart
   would mend nothing. So is one that has still to import its module, and one that ends in order.
3. Handlers may hold the event loop for 2 s at a time. It counts as hung only after `PATIENCE`.
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

logger = logging.getLogger("natsrt.health")

PATIENCE = 5.0
"""Seconds for which an event loop may be silent."""
_REQUEST_SECONDS = 10.0
"""Seconds that a client has to send its request."""
_POLL_SECONDS = 0.1
"""Seconds that the end of the endpoint takes at most."""
_PORT_VARIABLE, _HOST_VARIABLE = "NATSRT_HEALTH_PORT", "NATSRT_HEALTH_HOST"

_PATHS: dict[str, Callable[[Health], bool]] = {
    "/livez": lambda health: health.live,
    "/readyz": lambda health: health.live and health.ready,
    "/healthz": lambda health: health.live and health.ready,
}
"""What decides between 200 and 503."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where an endpoint listens. Port 0 stands for any free one."""

    host: str
    port: int

    def of_slot(self, slot: int) -> Address:
        """The address of one of several worker processes: a port of its own, from this one on."""
        return replace(self, port=self.port + slot) if self.port else self

    def arguments(self) -> list[str]:
        """This address for a ``natsrt worker`` of its own."""
        return ["--health-host", self.host, "--health-port", str(self.port or -1)]


def health_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of the endpoint, passed on as ``health``: an `Address`, or None for no endpoint."""

    @click.option(
        "--health-port",
        type=click.IntRange(-1, 65535),
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
        health = None if health_port is None else Address(health_host, max(health_port, 0))
        return command(health=health, **parameters)

    return run


class HealthEndpoint:
    """Listens from its construction on; the runtime that it speaks for may come later. Use it with ``with``.

    Raises:
        CommandFailed: The address is not free, or not one of this machine.
    """

    def __init__(self, address: Address) -> None:
        self._asking: _Asking | None = None
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
        """Where it answers."""
        host, port = self._server.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def speak_for(self, examine: Callable[[], Health]) -> None:
        """From now on tell what ``examine`` says in the running event loop. To be called in its thread."""
        self._asking = _Asking(asyncio.get_running_loop(), examine)

    def health(self) -> Health:
        """The health as it is now. May be called in any thread but the event loop's."""
        if self._asking is None:
            return Health(live=True, ready=False, reasons=("The worker is about to start.",))
        return self._asking.health()


class _Asking:
    """Asks an event loop, from other threads. Made in the thread of that loop.

    All who wait share one question: when that has been open for `PATIENCE` seconds, nobody waits any longer.
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
        """In the event loop."""
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
            logger.warning("%s It is held here:\n%s", reason, stack)
        # What only the event loop changes stands still with it, so that it can be read from here.
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

    def __init__(self, address: Address, health: Callable[[], Health]) -> None:
        self.health = health
        self.address_family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        super().__init__((address.host, address.port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a request for the health of this worker failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _REQUEST_SECONDS
    wbufsize = -1  # an answer leaves as a whole
    server_version, sys_version = "natsrt", ""

    def do_GET(self) -> None:
        decide = _PATHS.get(self.path.partition("?")[0])
        if decide is None:
            self._send(HTTPStatus.NOT_FOUND, {"error": f"there are {', '.join(_PATHS)}"})
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
    "refused_replies": "calls whose replies may not be sent where they asked",
}
"""Counts of `Health` that should be 0."""


def judge(url: str) -> list[tuple[Literal["ok", "warning", "problem"], str, str]]:
    """What there is to say of a worker whose endpoint is ``url``: level, finding, and what to do. Waits for it."""
    url = f"{url.rstrip('/')}/healthz"
    try:
        health = TypeAdapter(Health).validate_python(read_json(url, PATIENCE + _REQUEST_SECONDS))
    except (OSError, ValueError) as error:
        text = "it does not tell a worker's health" if isinstance(error, ValidationError) else str(error)
        return [("problem", f"{url} cannot be read: {text}", "check --health-url, and that worker's --health-port")]
    who, reasons = f"{health.worker_id or 'the worker'} at {url}", " ".join(health.reasons)
    if not health.live:
        advice = "restart it; what holds its event loop belongs in asyncio.to_thread"
        return [("problem", f"{who} hangs. {reasons}", advice)]
    figures = f"{sum(health.agents.values()):,} live agents, {health.handlers_running:,} handlers running"
    losses = [f"{count:,} {what}" for name, what in _LOSSES.items() if (count := getattr(health, name))]
    found: list[tuple[Literal["ok", "warning", "problem"], str, str]] = [
        ("ok", f"{who} is ready: {figures}", "") if health.ready else ("warning", f"{who} is not ready. {reasons}", "")
    ]
    if losses:
        found.append(("warning", f"{who} counts {', '.join(losses)}", "look at its log"))
    return found


def read_json(url: str, timeout: float) -> Any:
    """What an address says, with status 503 too. Raises OSError, and ValueError for no JSON or no web address."""
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
