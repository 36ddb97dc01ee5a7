"""What ``natsrt server`` shows of the log of its nats-server."""

from __future__ import annotations

import asyncio
import re
import time
from types import TracebackType
from typing import IO

from natsrt.background import end_tasks
from natsrt.embedded import EmbeddedServer

from .logs import json_line
from .output import write_to_stderr

_POLL_SECONDS = 0.1
"""Seconds between two looks at the log file."""
_LINE = re.compile(r"\[(\d+)\] \d{4}/\d\d/\d\d \d\d:\d\d:\d\d(?:\.\d+)? \[([A-Z]{3})\] (.*)")
"""A line of nats-server's log: process, level and text."""
_LEVELS = {
    "TRC": "DEBUG", "DBG": "DEBUG", "INF": "INFO", "WRN": "WARNING", "ERR": "ERROR", "FTL": "CRITICAL",
}  # fmt: skip
_SHOWN = ("WARNING", "ERROR", "CRITICAL")
_WITHOUT_LEVEL = "ERROR"
"""The level of lines that have none, such as those of a crash."""
_LOGGER = "nats-server"


class ServerLog:
    """Shows new lines of the server's log on standard error: warnings and errors only, unless ``verbose``.

    An async context manager, to be entered when the server is ready.
    """

    def __init__(self, server: EmbeddedServer, *, verbose: bool, as_json: bool) -> None:
        self._server = server
        self._verbose = verbose
        self._as_json = as_json
        self._file: IO[bytes] | None = None
        self._rest = b""

    async def __aenter__(self) -> ServerLog:
        if (path := self._server.log_path) is not None:
            self._file = path.open("rb")
            self._file.seek(self._server.log_start)
        self._task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await end_tasks(self._task)
        self._show_new()
        if self._file is not None:
            self._file.close()

    async def _follow(self) -> None:
        while True:
            self._show_new()
            await asyncio.sleep(_POLL_SECONDS)

    def _show_new(self) -> None:
        if self._file is None:
            return
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            self._show(line.decode(errors="replace"))

    def _show(self, line: str) -> None:
        found = _LINE.match(line)
        level = _LEVELS.get(found[2], "INFO") if found is not None else _WITHOUT_LEVEL
        if not (self._verbose or level in _SHOWN):
            return
        if self._as_json:
            text = found[3] if found is not None else line
            pid = int(found[1]) if found is not None else self._server.pid
            line = json_line(time.time(), level, _LOGGER, text, pid=pid)
        write_to_stderr(line)
