"""Asks the server whether a subject has a subscriber that may answer.

"No responders" does not show that, because a tap (``nats sub '>'``) counts as a subscriber too. Message tracing does
(nats-server 2.11, ADR-41): the server does not deliver a message with the header ``Nats-Trace-Only``, and reports every
subscription that would have received it. A subscription with a queue group, or one without wildcards, counts as a
responder; a wildcard subscription without a queue group counts as a tap.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Any, Final

import orjson
from nats.aio.msg import Msg

from natsrt.errors import ServerUnreachable
from natsrt.transport.client import retrieve
from natsrt.transport.connection import Connection, Refusal
from natsrt.transport.inbox import Inbox, is_nobody

logger: logging.Logger = logging.getLogger("natsrt.connection")

TRACE_DEST: Final = "Nats-Trace-Dest"
TRACE_ONLY: Final = "Nats-Trace-Only"

CLIENT_NAME: Final = "natsrt "
"""Start of the client names of natsrt's own connections."""

_TOKEN = "t-"
"""Start of the last token of the subjects to which the server reports."""
_WAIT = 0.15
"""Seconds to wait for the server's report once it has the question. It normally takes a millisecond."""
_OTHERS_WAIT = 2.0
"""Seconds to wait for the reports of the other servers that have the message, some of which may be far away. One whose
version does not trace messages never reports."""
_REPEAT_FOR = 10.0
"""Seconds for which a question is repeated that a server with message tracing does not report on: its reports are
late."""
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

    def _on_denied(self, denied: Refusal) -> bool:
        """Say once what it means. Callers are not meant to have this permission, so it is no warning."""
        is_report = denied.subject.lower().startswith(f"{self._inbox.root}.{_TOKEN}".lower())
        if is_report and not self._refused:
            self._refused = True
            logger.info(
                "this user may not publish to its own inboxes, so the server does not report whether a subject has "
                "subscribers, and wait_for does not notice plain responders; that is right for callers "
                "(docs/permissions.md)"
            )
        return is_report

    async def responder_exists(
        self, subject: str, *, plain: bool = False, patterns: Collection[str] = ()
    ) -> bool | None:
        """True if ``subject`` has a subscriber that may reply; None if the servers cannot tell.

        With ``plain``, the subscriptions of natsrt's own runtimes do not count. They are known by their client names.
        Wildcard subscriptions to one of ``patterns`` count.

        A report that is late says nothing, so the question is repeated. A server without message tracing cannot tell.
        Nor can one that does not let this user publish to its own inbox; it is asked once only. With such a server,
        plain responders must answer calls within ``check_after``. Raises `ServerUnreachable`, also if the connection is
        lost.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + _REPEAT_FOR
        while not self._refused:
            reports = _Reports(plain, patterns)
            await self._ask(subject, reports)
            if reports.verdict.done():
                return reports.verdict.result()
            if reports.some or not self._connection.traces or loop.time() > until:
                break
        return None

    async def _ask(self, subject: str, reports: _Reports) -> None:
        """Send the question, and wait for the reports on it."""
        reply = self._inbox.new_subject(_TOKEN)
        self._inbox.receivers[reply] = reports.take
        has_question: asyncio.Future[None] | None = None
        try:
            headers = {TRACE_DEST: reply, TRACE_ONLY: "true"}
            await self._connection.publish(subject, b"", reply=reply, headers=headers)
            has_question = asyncio.ensure_future(self._connection.barrier())
            has_question.add_done_callback(retrieve)
            waits: list[asyncio.Future[Any]] = [reports.verdict, has_question]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not reports.verdict.done():
                has_question.result()
                await reports.wait(self._connection.rtt.allowance)
        finally:
            self._inbox.receivers.pop(reply, None)
            if has_question is not None and not has_question.done():
                has_question.cancel()

    async def listens(self, subject: str, *, patterns: Collection[str] = ()) -> bool:
        """True if ``subject`` has a subscriber that may answer, or if that cannot be found out at the moment.

        ``patterns`` are as for `responder_exists`.
        """
        try:
            return await self.responder_exists(subject, patterns=patterns) is not False
        except ServerUnreachable:
            return True


class _Reports:
    """The servers' reports on one question. Each server that has the message sends one."""

    def __init__(self, plain: bool, patterns: Collection[str] = ()) -> None:
        self._plain = plain
        self._patterns = patterns
        self._missing = 1
        """Number of the servers that have the message and have not reported."""
        self.some: bool = False
        """True if any server has reported."""
        self.verdict: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """Whether there is a responder. It is False only when all servers have reported."""

    def take(self, message: Msg) -> None:
        """Take in a report, or the message that the subject has no subscriber at all."""
        self.some = True
        if self.verdict.done():
            return
        if is_nobody(message):
            self.verdict.set_result(False)
        elif (report := _read(message.data, self._plain, self._patterns)) is not None:
            exists, passed_on = report
            self._missing += passed_on - 1
            if exists or self._missing <= 0:
                self.verdict.set_result(exists)

    async def wait(self, allowance: float) -> None:
        """Wait for the verdict, after the server has the question. ``allowance`` is that of the round trip."""
        await asyncio.wait({self.verdict}, timeout=_WAIT + allowance)
        if self.some:
            await asyncio.wait({self.verdict}, timeout=_OTHERS_WAIT)


def _read(report: bytes, plain: bool, patterns: Collection[str] = ()) -> tuple[bool, int] | None:
    """Return whether a server delivers the message to a responder, and to how many other servers it passes the message
    on.

    None if this is no report. With ``plain``, connections of natsrt's runtimes do not count. Wildcard subscriptions to
    one of ``patterns`` count.
    """
    try:
        content = orjson.loads(report)
    except orjson.JSONDecodeError:
        return None
    events = content.get("events") if isinstance(content, dict) else None
    if not isinstance(events, list):
        return None
    passed_on = 0
    for event in events:
        if not isinstance(event, dict) or event.get("type") != "eg":
            continue
        if event.get("kind") != _CLIENT:
            passed_on += 1
            continue
        if plain and str(event.get("name", "")).startswith(CLIENT_NAME):
            continue
        pattern = str(event.get("sub", ""))
        if event.get("queue") or pattern in patterns or not ("*" in pattern or pattern.endswith(">")):
            return True, 0
    return False, passed_on
