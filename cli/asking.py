"""Asks workers whether they are there, and what they count."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import orjson
from nats.aio.msg import Msg
from nats.nuid import NUID

from natsrt.errors import CannotDecode
from natsrt.options import Options
from natsrt.transport.connection import Connection, Refusal
from natsrt.transport.inbox import is_nobody
from natsrt.wire import envelope
from natsrt.wire.failures import decode_answer
from natsrt.wire.subjects import Subjects

from .exits import CommandFailed, Exit

_PATIENCE = 4.0
"""Seconds to wait for the answers of workers, beside the round trip to the server: enough for a worker that is far
away, and still a short wait for a person."""
_GRACE = 0.5
"""Seconds to wait for a worker's answer as a service, after every worker has answered in one way or the other. A worker
gives the two answers one after the other."""
_QUESTION = envelope.encode(envelope.FATE, '"id":"ping","source":"/"', b'{"calls":[]}')


@dataclass(slots=True)
class WorkerAnswer:
    """What a worker has answered."""

    round_trip_ms: float
    """Milliseconds until its first answer."""
    is_service: bool = False
    """True if it is a NATS service (ADR-32)."""
    endpoints: list[dict[str, Any]] = field(default_factory=list)
    """The endpoints in its answer as a service."""


async def gather_answers(
    connection: Connection, subjects: Subjects, options: Options, verb: str, expected: Collection[str]
) -> dict[str, WorkerAnswer]:
    """The answers of the ``expected`` workers to ``$SRV.<verb>`` and to a question on their own subjects, by worker id.

    A worker need not be a NATS service, but answers on its own subject. One that did not answer in time is missing.

    Raises `CommandFailed` if this user may not ask, so that an answer that is missing says nothing about a worker.
    """
    if not expected:
        return {}
    asking = _Asking(expected)
    connection.on_denied(asking.refuse)
    inbox = f"{options.inbox_prefix}.{NUID().next().decode()}"
    service = await connection.subscribe(f"{inbox}.service", asking.take_service)
    peer = await connection.subscribe(f"{inbox}.worker.*", asking.take_answer)
    try:
        await connection.barrier()
        asking.check(f"{inbox}.service", f"{inbox}.worker.*")
        asking.asked = time.perf_counter()
        await connection.publish(f"$SRV.{verb}", b"", reply=f"{inbox}.service")
        for worker_id in expected:
            await connection.publish(subjects.worker(worker_id), _QUESTION, reply=f"{inbox}.worker.{worker_id}")
        await connection.barrier()  # the server reports what it refuses before that
        if verb != "PING" or not asking.refused.isdisjoint(map(subjects.worker, expected)):
            asking.check(f"$SRV.{verb}")
        async with asyncio.timeout(min(_PATIENCE, options.connect_timeout) + connection.rtt.allowance):
            await asking.all_answered.wait()
            if verb == "PING":  # nothing more to learn
                return asking.answers
            async with asyncio.timeout(_GRACE + connection.rtt.allowance):
                await asking.all_services.wait()
    except TimeoutError:
        pass
    finally:
        await connection.unsubscribe(service)
        await connection.unsubscribe(peer)
    asking.check(*(subjects.worker(worker_id) for worker_id in expected if worker_id not in asking.answers))
    return asking.answers


async def other_workers(
    connection: Connection, subjects: Subjects, options: Options, listed: Collection[str]
) -> set[str]:
    """The ids of workers of this namespace that answer, and are not among those that the registry has ``listed``.

    Empty if this user may not ask, or may not receive the answers.
    """
    found: set[str] = set()

    def take(message: Msg) -> None:
        try:
            said = orjson.loads(message.data)
            if said["metadata"]["namespace"] == options.namespace and said["metadata"]["worker_id"] == said["id"]:
                found.add(str(said["id"]))
        except (orjson.JSONDecodeError, LookupError, TypeError):
            pass  # another service

    inbox = f"{options.inbox_prefix}.{NUID().next().decode()}"
    interest = await connection.subscribe(inbox, take, optional=True)
    try:
        await connection.barrier()
        await connection.publish("$SRV.PING", b"", reply=inbox)
        await connection.barrier()
        await asyncio.sleep(min(_GRACE, options.connect_timeout))
    finally:
        await connection.unsubscribe(interest)
    return found.difference(listed)


class _Asking:
    """The answers so far."""

    def __init__(self, expected: Collection[str]) -> None:
        self._expected = frozenset(expected)
        self.answers: dict[str, WorkerAnswer] = {}
        self.refused: set[str] = set()
        self.asked = 0.0
        self.all_answered, self.all_services = asyncio.Event(), asyncio.Event()

    def refuse(self, denied: Refusal) -> bool:
        """Note a subject that the server refuses. Returns whether `check` is about it, so that it is not logged too."""
        self.refused.add(denied.subject)
        return denied.operation == "publish to"

    def check(self, *subjects: str) -> None:
        """Raise `CommandFailed` if the server refuses one of these subjects."""
        for subject in subjects:
            if subject in self.refused:
                text = f"this user may not ask {subject}; use an operator's user (docs/permissions.md)"
                raise CommandFailed(text, Exit.NOT_CONNECTED)

    def take_service(self, message: Msg) -> None:
        """Take the answer of a service. Its id is the worker's id; other services are ignored."""
        try:
            said = orjson.loads(message.data)
        except orjson.JSONDecodeError:
            return
        if not isinstance(said, dict) or (answer := self._answer(said.get("id"))) is None:
            return
        answer.is_service = True
        endpoints = said.get("endpoints")
        answer.endpoints = [one for one in endpoints if isinstance(one, dict)] if isinstance(endpoints, list) else []
        if all(one.is_service for one in self.answers.values()) and len(self.answers) == len(self._expected):
            self.all_services.set()

    def take_answer(self, message: Msg) -> None:
        """Take the answer to a question on a worker's own subject."""
        try:
            body = None if is_nobody(message) else decode_answer(message.headers, message.data)
        except CannotDecode:
            return
        if body is not None and body.type == envelope.REPLY:
            self._answer(message.subject.rpartition(".")[2])

    def _answer(self, worker_id: object) -> WorkerAnswer | None:
        """The answer of a worker, made if it is its first one; None if the worker is not expected to answer."""
        if not isinstance(worker_id, str) or worker_id not in self._expected:
            return None
        answer = self.answers.get(worker_id)
        if answer is None:
            answer = self.answers[worker_id] = WorkerAnswer((time.perf_counter() - self.asked) * 1000)
            if len(self.answers) == len(self._expected):
                self.all_answered.set()
        return answer
