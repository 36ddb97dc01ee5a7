"""What `natsrt doctor` examines: one connection, and the findings so far."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import nats.errors
import orjson

from natsrt.background import end_tasks
from natsrt.errors import NatsrtError
from natsrt.options import Options
from natsrt.transport.connection import Connection, Refusal
from natsrt.wire.subjects import Subjects

from .role_check import RoleCheck

Level = Literal["ok", "warning", "problem", "skipped"]
T = TypeVar("T")

REQUEST_SECONDS = 2.0
"""Seconds to wait for the server's answer to a request, beside the round trip."""
LIST_AT_MOST = 5
"""Items that a finding lists by name."""
OPERATOR = "use an operator's user: see docs/permissions.md"
"""Advice for checks that need more permissions than workers and callers have."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``advice`` says what to do; empty if nothing needs to be done."""

    check: str
    level: Level
    text: str
    advice: str = ""


@dataclass(slots=True)
class Patient:
    """The connection that is examined, and the findings so far."""

    connection: Connection
    options: Options
    subjects: Subjects
    role: RoleCheck | None = None
    findings: list[Finding] = field(default_factory=list)
    types: set[str] = field(default_factory=set)
    """The agent types in the registry, as far as it could be read."""
    denied: set[tuple[str, str]] = field(default_factory=set)
    refusal: Refusal | None = None
    no_inbox: Refusal | None = None
    """The refusal of an inbox: without one, no answer comes."""
    refused: asyncio.Event = field(default_factory=asyncio.Event)

    def found(self, check: str, level: Level, text: str, advice: str = "") -> None:
        self.findings.append(Finding(check, level, text, advice))

    def deny(self, denied: Refusal) -> None:
        """Note what the server refuses."""
        self.denied.add((denied.operation, denied.subject))
        if denied.operation == "subscribe to" and denied.subject.startswith(f"{self.options.inbox_prefix}."):
            self.no_inbox = denied
        self.refusal = denied
        self.refused.set()

    async def ask(self, request: Coroutine[Any, Any, T]) -> T:
        """The result of a request. Raises the server's refusal as soon as it comes, since no answer comes then."""
        self.denied.clear()
        self.refused.clear()
        if self.no_inbox is not None:
            request.close()
            self.deny(self.no_inbox)
            raise self.no_inbox
        asking, refused = asyncio.ensure_future(request), asyncio.ensure_future(self.refused.wait())
        try:
            await asyncio.wait({asking, refused}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done() and self.refusal is not None:
                raise self.refusal
            return await asking
        finally:
            await end_tasks(asking, refused)

    @property
    def answer_within(self) -> float:
        """Seconds to wait for the answer to a request."""
        return REQUEST_SECONDS + self.connection.rtt.allowance

    async def request(self, subject: str) -> dict[str, Any] | None:
        """The JSON object that answers an empty request; None if there is no such answer."""
        try:
            reply = await self.ask(self.connection.client.request(subject, b"", timeout=self.answer_within))
            answer = orjson.loads(reply.data)
        except (NatsrtError, nats.errors.Error, TimeoutError, orjson.JSONDecodeError):
            return None
        return answer if isinstance(answer, dict) else None


async def refused(
    patient: Patient, *, publish: dict[str, dict[str, str]], subscribe: dict[str, str], body: bytes = b""
) -> list[str]:
    """The operations that the server refuses; ``publish``: headers by subject, ``subscribe``: queue by subject."""
    patient.denied.clear()
    connection = patient.connection
    interests = [
        await connection.subscribe(subject, lambda _: None, queue=queue) for subject, queue in subscribe.items()
    ]
    try:
        for subject, headers in publish.items():
            await connection.publish(subject, body, headers=dict(headers) or None)
        await connection.barrier()
    finally:
        for interest in interests:
            await connection.unsubscribe(interest)
    tried = [("publish to", subject) for subject in publish] + [("subscribe to", subject) for subject in subscribe]
    return [f"{operation} {subject}" for operation, subject in tried if (operation, subject) in patient.denied]


def allowing(patient: Patient) -> str:
    """Advice about what the server has refused since the last request began.

    Only what the role needs should be allowed; callers and clients have no request to the server or to JetStream.
    """
    needed = [
        f"{operation} {subject}"
        for operation, subject in sorted(patient.denied)
        if (
            not subject.startswith("$")
            if patient.role is None
            else patient.role.needs(operation.removesuffix(" to"), subject)
        )
    ]
    if needed:
        return f"allow this user to {', '.join(needed)}"
    refused = ", ".join(f"{operation} {subject}" for operation, subject in sorted(patient.denied))
    return f"to {refused}, {OPERATOR}" if refused else OPERATOR
