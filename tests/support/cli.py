"""The command ``natsrt`` for tests that wait for its end."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.forks import NATSRT, start

__all__ = ["NATSRT", "Ended", "natsrt"]


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


class _Pipe:
    """A pipe that a command writes to, and that the event loop reads."""

    def __enter__(self) -> _Pipe:
        self._read, self.end = os.pipe()
        os.set_blocking(self._read, False)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._read)
        self._close_end()

    async def read(self) -> bytes:
        """All that was written, once nobody can write any more."""
        self._close_end()
        loop, heard, ended = asyncio.get_running_loop(), bytearray(), asyncio.Event()

        def hear() -> None:
            data = os.read(self._read, 1 << 16)
            heard.extend(data)
            if not data:
                ended.set()

        loop.add_reader(self._read, hear)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._read)
        return bytes(heard)

    def _close_end(self) -> None:
        if self.end >= 0:
            os.close(self.end)
            self.end = -1


async def natsrt(
    *arguments: str,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 40.0,
) -> Ended:
    """Run the installed command to its end, within ``timeout`` seconds."""
    wanted = {**os.environ, "COLUMNS": "160", **(env or {})}
    with tempfile.TemporaryFile() as given, _Pipe() as stdout, _Pipe() as stderr:
        given.write((stdin or "").encode())
        given.seek(0)
        process = start(
            [NATSRT, *arguments], stdin=given.fileno(), stdout=stdout.end, stderr=stderr.end, env=wanted, cwd=cwd
        )
        try:
            async with asyncio.timeout(timeout):
                out, err = await asyncio.gather(stdout.read(), stderr.read())
                while process.poll() is None:
                    await asyncio.sleep(0.002)
        finally:
            process.kill()
            code = process.wait()
    return Ended(code, out.decode(), err.decode())
