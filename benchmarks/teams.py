"""Starts and controls the processes of one peer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Self

from benchmarks.peers import Peer
from benchmarks.setup import Place, Setup

_START_SECONDS = 300.0
_COMMAND_SECONDS = 300.0
_STOP_SECONDS = 15.0
_TAIL = 2000
_ANSWER_BYTES = 2**26
"""Maximum length of an answer of a process, in bytes."""
_REPOSITORY = Path(__file__).resolve().parents[1]


class ProcessFailed(Exception):
    """A process of a peer failed, did not answer in time, or has ended. The text contains the end of its output."""


class Member:
    """One process of a peer."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, errors: IO[bytes]) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._errors = errors

    @classmethod
    async def start(cls, peer: Peer, role: str, place: Place, setup: Setup, loop: str) -> Self:
        """Start a process. It is ready when this returns.

        Raises:
            ProcessFailed: It did not start.
        """
        errors = tempfile.TemporaryFile()  # noqa: SIM115  # stop() closes it
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "benchmarks.process",
            peer.module,
            role,
            loop,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            limit=_ANSWER_BYTES,
            cwd=_REPOSITORY,
            process_group=0,  # only the driver gets Ctrl-C; it then stops its processes
        )
        member = cls(f"{peer.name} {role}", process, errors)
        try:
            given = {"place": asdict(place), "setup": asdict(setup)}
            member.address = await member._exchange(given, _START_SECONDS)
        except BaseException:
            await member.stop()
            raise
        return member

    address = ""
    """The address that other processes connect to; empty if they do not."""

    async def ask(self, command: str, **arguments: Any) -> Any:
        """Run a command of its role, and return the result.

        Raises:
            ProcessFailed: The command failed in the process, or was not answered in time.
        """
        return await self._exchange({"command": command, "arguments": arguments}, _COMMAND_SECONDS)

    async def _exchange(self, content: dict[str, Any], timeout: float) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout):
                self._process.stdin.write(json.dumps(content).encode() + b"\n")
                await self._process.stdin.drain()
                line = await self._process.stdout.readline()
        except (TimeoutError, OSError) as error:
            raise ProcessFailed(f"{self.name}: {type(error).__name__}{self._tail()}") from error
        if not line:
            raise ProcessFailed(f"{self.name} ended{self._tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ProcessFailed(f"{self.name}: {answer['error']}{self._tail()}")
        return answer["result"]

    async def stop(self) -> None:
        """Let the process end by itself. Kill it if it does not end in time."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        finally:
            self._errors.close()

    def _tail(self) -> str:
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - _TAIL))
        written = self._errors.read().decode(errors="replace").strip()
        return f"\n{written}" if written else ""


class Team:
    """All processes of one peer with one setup.

    `Member.ask` runs commands in ``caller`` and ``workers``: the public methods of the peer's roles.
    """

    caller: Member

    def __init__(self, peer: Peer, setup: Setup, server_url: str, server_pid: int | None, loop: str) -> None:
        self.peer = peer
        self.setup = setup
        self.workers: list[Member] = []
        self._loop = loop
        self._place = Place(address=server_url, namespace=f"bench{secrets.token_hex(4)}")
        self._server_pid = server_pid
        self._others: list[Member] = []

    async def start(self) -> None:
        """Start host, workers, idle workers and caller, in this order, and make the agents live."""
        try:
            if self.peer.has_host:
                host = await self._member("host")
                self._others.append(host)
                self._place = Place(address=host.address, namespace=self._place.namespace)
                self._server_pid = host.pid
            if self.peer.has_workers:
                self.workers = list(await asyncio.gather(*(self._member("worker") for _ in range(self.setup.workers))))
            if self.setup.idle_workers:
                self._others.append(await self._member("idle"))
            self.caller = await self._member("caller")
            if self.setup.live_agents > 1:
                await self.caller.ask("make_live", count=self.setup.live_agents)
        except BaseException:
            await self.stop()
            raise

    async def start_worker(self) -> Member:
        """Start one more worker."""
        worker = await self._member("worker")
        self.workers.append(worker)
        return worker

    async def stop_worker(self, worker: Member) -> None:
        """Stop one worker."""
        self.workers.remove(worker)
        await worker.stop()

    async def stop(self) -> None:
        """Stop all processes."""
        caller = [self.caller] if hasattr(self, "caller") else []
        for members in (caller, self.workers, self._others):
            await asyncio.gather(*(member.stop() for member in members))

    async def _member(self, role: str) -> Member:
        return await Member.start(self.peer, role, self._place, self.setup, self._loop)

    def cpu(self) -> CpuTimes:
        """Return the CPU time that the processes have used until now."""
        return CpuTimes(
            _cpu_seconds([self.caller.pid]),
            _cpu_seconds([worker.pid for worker in self.workers]),
            _cpu_seconds([self._server_pid] if self._server_pid is not None and self.peer.has_workers else []),
        )


class CpuTimes:
    """CPU seconds of the caller, all workers together, and the server or host. None: not known, or no such process."""

    def __init__(self, caller: float | None, workers: float | None, server: float | None) -> None:
        self._seconds = (caller, workers, server)

    def per_message(self, before: CpuTimes, count: int) -> dict[str, float | None]:
        """Return the microseconds per message since ``before``, for ``count`` messages."""
        names = ("caller_us", "worker_us", "server_us")
        return {
            name: None if now is None or then is None else (now - then) / count * 1e6
            for name, now, then in zip(names, self._seconds, before._seconds, strict=True)
        }


def _cpu_seconds(pids: Sequence[int]) -> float | None:
    """Return the CPU seconds of these processes. Linux counts in ticks of 10 ms, which is short compared to a turn."""
    if not pids:
        return None
    ticks = 0
    with contextlib.suppress(OSError):
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")
    return None
