"""Why a program cannot listen on an address of this machine, and what answers there."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket

_ANSWER_SECONDS = 1.0
"""Seconds that whatever listens on a port has to accept a connection, and to say that it is a NATS server."""


async def why_not(host: str, port: int) -> str | None:
    """Why this process cannot listen on ``host`` and ``port``, as a sentence; None if it can."""
    try:
        places = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return f"the host {host!r} cannot be resolved: {error.strerror}"
    for family, kind, protocol, _, address in places:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as nats-server listens
            try:
                probe.bind(address)
            except OSError as error:
                return await _reason(error, host, port)
    return None


async def _reason(error: OSError, host: str, port: int) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} is in use, and {await _who_answers(host, port)}"
        case errno.EADDRNOTAVAIL:
            return f"{host} is not an address of this machine"
        case errno.EACCES:
            return f"this user may not listen on port {port}: choose one from 1024 on"
    return f"cannot listen on {host}:{port}: {error.strerror}"


async def _who_answers(host: str, port: int) -> str:
    """What answers on a port, in words."""
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return "nothing answers there: another program has it, but accepts no connections"
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            is_nats = (await reader.readline()).startswith(b"INFO {")
    except (OSError, TimeoutError, ValueError):  # ValueError: a long text without a line end
        is_nats = False
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return "a NATS server answers there" if is_nats else "a program that is no NATS server answers there"
