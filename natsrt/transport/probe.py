"""Is anybody there who answers on a subject?

"No responders" cannot tell: a tap (``nats sub '>'``) is interest too. The server itself can: a message with the header
``Nats-Trace-Only`` is delivered to nobody, and the server reports every subscription it would have gone to (message
tracing, nats-server 2.11, ADR-41). A subscription with a queue group, or one without wildcards, is a responder; a
wildcard without a queue group is a tap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import orjson
from nats.aio.msg import Msg
from nats.nuid import NUID

from natsrt.transport.connection import Connection

TRACE_DEST: Final = "Nats-Trace-Dest"
TRACE_ONLY: Final = "Nats-Trace-Only"

_WAIT = 0.15
"""Seconds for the reports of all servers of a cluster to come in; a single server reports within a millisecond."""
_CLIENT = 0


def is_nobody(message: Msg) -> bool:
    """Whether the server says that nobody listens."""
    return message.headers is not None and message.headers.get("Status") == "503" and not message.data


async def responder_exists(
    connection: Connection, subject: str, inbox: str, listeners: dict[str, Callable[[Msg], None]]
) -> bool | None:
    """Whether a subscriber on ``subject`` looks like one that replies; None if no server told.

    ``listeners`` maps tokens under ``inbox`` to callbacks. A server too old to trace reports nothing: its plain
    responders must answer within ``check_after``.
    """
    token = f"t-{NUID().next().decode()}"
    found = asyncio.get_running_loop().create_future()

    def report(message: Msg) -> None:
        verdict = False if is_nobody(message) else _verdict(message.data)
        if verdict is not None and not found.done():
            found.set_result(verdict)

    listeners[token] = report
    try:
        await connection.publish(
            subject,
            b"",
            reply=f"{inbox}.{token}",
            headers={TRACE_DEST: f"{inbox}.{token}", TRACE_ONLY: "true"},
        )
        async with asyncio.timeout(_WAIT):
            return bool(await found)
    except TimeoutError:
        return None
    finally:
        listeners.pop(token, None)


def _verdict(report: bytes) -> bool | None:
    """True for a responder, False for none, None where another server of the cluster will tell."""
    try:
        content = orjson.loads(report)
    except orjson.JSONDecodeError:
        return None
    events = content.get("events") if isinstance(content, dict) else None
    if not isinstance(events, list):
        return None
    travels_on = False
    for event in events:
        if not isinstance(event, dict) or event.get("type") != "eg":
            continue
        if event.get("kind") != _CLIENT:
            travels_on = True
            continue
        pattern = str(event.get("sub", ""))
        if event.get("queue") or not ("*" in pattern or pattern.endswith(">")):
            return True
    return None if travels_on else False
