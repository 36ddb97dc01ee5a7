"""Why a program cannot listen on an address of this machine, and what answers there.

A NATS server sends INFO first, or, with ``handshake_first``, after the TLS handshake. `greeting` finds both.
"""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import ssl
from dataclasses import dataclass
from typing import Any

_ANSWER_SECONDS = 1.0
"""Seconds that whatever listens on a port has to accept a connection, and to say that it is a NATS server."""
_INFO_SECONDS = 0.4
"""Seconds after which a server that has said nothing is asked for TLS. A NATS server sends INFO at once."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a server sends first."""

    info: dict[str, Any] | None
    """The fields of INFO; None if the server begins with TLS, and then wants a client certificate before INFO."""
    tls_first: bool
    """True if the server begins with the TLS handshake."""


async def greeting(host: str, port: int) -> Greeting:
    """What the NATS server on this port sends first, over TLS if it says nothing without it.

    Raises ValueError if what answers is no NATS server, and OSError if nothing answers. It may wait without a limit.
    """
    return await _greeting(*await asyncio.open_connection(host, port))


async def _greeting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Greeting:
    """`greeting`, over a connection that is closed then."""
    tls_first = False
    try:
        # A line that is being read is kept in the reader, and a server that begins with TLS sends none.
        line = asyncio.ensure_future(reader.readline())
        await asyncio.wait({line}, timeout=_INFO_SECONDS)
        if not line.done():
            line.cancel()
            await asyncio.wait({line})
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            await writer.start_tls(context)
            tls_first = True
            return Greeting(_info(await reader.readline()), tls_first)
        return Greeting(_info(line.result()), tls_first)
    except ssl.SSLError as error:
        if "ALERT" in (error.reason or ""):  # it speaks TLS, and refuses this client
            return Greeting(None, tls_first=True)
        raise
    finally:
        writer.transport.abort()  # after a handshake that failed, `wait_closed` would never return


def _info(line: bytes) -> dict[str, Any]:
    verb, _, fields = line.partition(b" ")
    if verb != b"INFO":
        raise ValueError("the first line is not INFO")
    info = json.loads(fields)
    if not isinstance(info, dict):
        raise ValueError("INFO is not followed by a JSON object")
    return info


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
            connection = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return "nothing answers there: another program has it, but accepts no connections"
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            found = await _greeting(*connection)
    except (OSError, TimeoutError, ValueError):  # ValueError: also a long text without a line end
        return "a program that is no NATS server answers there"
    if found.info is None:
        return "a server that begins with TLS and wants a client certificate answers there"
    return "a NATS server answers there" + (" (it begins with TLS)" if found.tls_first else "")
