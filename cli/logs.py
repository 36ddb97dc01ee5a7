"""Logging of the commands to standard error, which gives way to what a user's module configures.

Rules:

1. The root logger gets no handler. Instead, the handler of last resort, which Python uses for records that no other
   handler takes, writes them in natsrt's format. So ``logging.basicConfig`` of a user's module is not ignored, as it
   would be if the root logger had a handler; and when the module has added a handler, no line appears twice.
2. AutoGen logs every message at INFO, and watchfiles every change. Their loggers are quiet unless the user's module
   gives the root logger a handler, or gives them a level of their own.
3. With the format ``json``, each line on standard error is a JSON object, notes and errors of the commands included.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import click

from .output import shape_notes

if TYPE_CHECKING:
    from natsrt.runtime import NatsAgentRuntime

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")

_FORMAT = "%(asctime)s {place}%(levelname)s %(name)s: %(message)s"
_NOISY = ("autogen_core", "watchfiles")
_QUIET = logging.WARNING - 1
"""The level of quiet loggers. It is not WARNING, so that a level that a user's module has set can be told from it."""
_NOTES = "natsrt"
"""The logger that notes of the commands name in JSON."""


class _Origin:
    """The process that logs: what natsrt's formats say of it."""

    def __init__(self) -> None:
        self.place = ""
        """Stands in each line of text; empty for a command that starts no workers."""
        self.worker_number: int | None = None
        """Which worker of ``--processes`` this is, from 1; None for all other processes."""
        self.runtime: NatsAgentRuntime | None = None
        """The runtime of this process; None until there is one."""


_origin = _Origin()


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__(_FORMAT.format(place=_origin.place.replace("%", "%%")))


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        try:
            message = record.getMessage()
        except Exception:  # the arguments of the user's call do not fit its text
            message = f"{record.msg} (its arguments do not fit)"
        exception = self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else None
        return json_line(record.created, record.levelname, record.name, message, exception=exception)


def json_line(
    created: float, level: str, logger: str, message: str, *, exception: str | None = None, pid: int | None = None
) -> str:
    """One line of a log in JSON.

    ``created`` is in seconds since the epoch. ``exception`` is a traceback, None for none. ``pid`` is the process that
    logs; None: this one.
    """
    shown: dict[str, Any] = {
        "time": datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds"),
        "level": level.upper(),
        "logger": logger,
        "message": message,
    }
    if exception is not None:
        shown["exception"] = exception
    shown["process"] = os.getpid() if pid is None else pid
    if pid is None:
        if _origin.worker_number is not None:
            shown["worker"] = _origin.worker_number
        shown["worker_id"] = None if _origin.runtime is None else _origin.runtime.worker_id
    return json.dumps(shown)  # not orjson, which refuses lone surrogates


def log_options(level: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add ``--log-level``, with this default, and ``--log-format``."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        command = click.option(
            "--log-format",
            type=click.Choice(FORMATS, case_sensitive=False),
            envvar="NATSRT_LOG_FORMAT",
            default="text",
            show_default=True,
            help="How to log to standard error; json: one object for each line ($NATSRT_LOG_FORMAT).",
        )(command)
        return click.option(
            "--log-level",
            type=click.Choice(LEVELS, case_sensitive=False),
            envvar="NATSRT_LOG_LEVEL",
            default=level,
            show_default=True,
            help="What to log to standard error ($NATSRT_LOG_LEVEL).",
        )(command)

    return decorate


def log_to_stderr(level: str, log_format: str) -> None:
    """Log records of ``level`` and above to standard error until a handler is added to the root logger."""
    handler = logging.StreamHandler(sys.stderr)
    logging.lastResort = handler
    logging.getLogger().setLevel(level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(_QUIET)
    if log_format == "json":
        handler.setFormatter(_JsonFormatter())
        shape_notes(lambda text, level: json_line(datetime.now(UTC).timestamp(), level, _NOTES, text))
        warnings.showwarning = _log_warning  # logging.captureWarnings would add a handler that writes nothing
        sys.excepthook = _log_uncaught
        threading.excepthook = lambda hooked: _log_uncaught(
            hooked.exc_type, hooked.exc_value or hooked.exc_type(), hooked.exc_traceback
        )
    else:
        handler.setFormatter(_TextFormatter())


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = warnings.formatwarning(message, category, filename, lineno, line)
    logging.getLogger("py.warnings").warning("%s", text.rstrip())


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    logging.getLogger(_NOTES).critical("uncaught exception", exc_info=(kind, error, traceback))


def of_supervisor() -> None:
    """Name this process in each line as the one that supervises others."""
    _name(f"[supervisor, process {os.getpid()}] ")


def of_worker(number: int) -> None:
    """Name this process in each line as worker ``number`` of several, counted from 1."""
    _origin.worker_number = number
    _name(f"[worker {number}, process {os.getpid()}] ")


def _name(place: str) -> None:
    _origin.place = place
    handler = logging.lastResort
    if handler is not None and isinstance(handler.formatter, _TextFormatter):
        handler.setFormatter(_TextFormatter())
        shape_notes(lambda text, _: place + text)


def of_runtime(runtime: NatsAgentRuntime) -> None:
    """Name the worker id of this runtime in each line of a log in JSON, once it has one."""
    _origin.runtime = runtime


def give_way() -> None:
    """Call this after code of the user has run: if it has configured logging, natsrt's own levels no longer count."""
    if logging.getLogger().handlers:
        for name in _NOISY:
            if logging.getLogger(name).level == _QUIET:
                logging.getLogger(name).setLevel(logging.NOTSET)
