"""Asks the server whether a subject has a subscriber that may answer.

"No responders" does not show that, because a tap (``nats sub '>'``) counts as a subscriber too. Message tracing does
(nats-server 2.11, ADR-41): the server does not deliver a message with the header ``Nats-Trace-Only``, and reports every
subscription that would have received it. A subscription with a queue group, or one without wildcards, counts as a
responder; a wildcard subscription without a queue group counts as a tap.
"""

from __future__ import annotations

import asyncio
from typing import Final

import orjson
from nats.aio.msg import Msg
from nats.nuid import NUID

from natsrt.transport.connection import Connection, Refusal
from natsrt.transport.inbox import Inbox, is_nobody

TRACE_DEST: Final = "Nats-Trace-Dest"
TRACE_ONLY: Final = "Nats-Trace-Only"

CLIENT_NAME: Final = "natsrt "
"""Start of the client names of natsrt's own connections."""

_TOKEN = "t-"
"""Start of the last token of the subjects to which the server reports."""
_WAIT = 0.15
"""Seconds to wait for the reports of all servers of a cluster. A single server reports within a millisecond."""
_CLIENT = 0
"""The kind of a client's connection in a report. Connections of other servers have other kinds."""


class Probe:
    """Asks the server about subscribers."""

    def __init__(self, connection: Connection, inbox: Inbox) -> None:
        self._connection = connection
        self._inbox = inbox
        self._refused = False
        """True if this user may not publish to its own inbox, to which the server would report in its name."""
        connection.on_denied(self._on_denied)

    def _on_denied(self, denied: Refusal) -> None:
        if denied.subject.lower().startswith(self._inbox.subject(_TOKEN).lower()):
            self._refused = True

    async def responder_exists(self, subject: str, *, plain: bool = False) -> bool | None:
        """True if ``subject`` has a subscriber that may reply; None if no server reported in time.

        With ``plain``, the subscriptions of natsrt's own runtimes do not count. They are known by their client names.

        A server without message tracing does not report. Nor does one that does not let this user publish to its own
        inbox; it is asked once only. With such a server, plain responders must answer calls within
        ``check_after``. Raises `ServerUnreachable`.
        """
        if self._refused:
            return None
        found: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def report(message: Msg) -> None:
            verdict = False if is_nobody(message) else _verdict(message.data, plain)
            if verdict is not None and not found.done():
                found.set_result(verdict)

        reply = self._inbox.subject(f"{_TOKEN}{NUID().next().decode()}")
        self._inbox.receivers[reply] = report
        try:
            headers = {TRACE_DEST: reply, TRACE_ONLY: "true"}
            await self._connection.publish(subject, b"", reply=reply, headers=headers)
            async with asyncio.timeout(_WAIT):
                return await found
        except TimeoutError:
            return None
        finally:
            self._inbox.receivers.pop(reply, None)

    async def listens(self, subject: str) -> bool:
        """True if ``subject`` has a subscriber that may answer, or if no server reported in time."""
        return await self.responder_exists(subject) is not False


def _verdict(report: bytes, plain: bool) -> bool | None:
    """True if there is a responder; False if there is none; None if another server of the cluster will report.

    With ``plain``, connections of natsrt's runtimes do not count.
    """
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
        if plain and str(event.get("name", "")).startswith(CLIENT_NAME):
            continue
        pattern = str(event.get("sub", ""))
        if event.get("queue") or not ("*" in pattern or pattern.endswith(">")):
            return True
    return None if travels_on else False
