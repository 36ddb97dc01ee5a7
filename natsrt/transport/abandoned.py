"""Calls for whose replies nobody waits any more. Their workers are told, so that they need not handle them.

A worker is told on its own subject. A call that no worker has accepted yet is remembered, and the worker that accepts
it is told then. If this fails, the call is handled in vain.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import Protocol

import orjson

from natsrt.background import BackgroundTasks
from natsrt.transport.connection import Connection
from natsrt.wire import envelope

logger: logging.Logger = logging.getLogger("natsrt.calls")

_REMEMBER = 30.0
"""Seconds for which a call that nobody has accepted is remembered. A worker accepts a call soon after it arrives."""
_REMEMBER_AT_MOST = 10_000
"""Maximum number of such calls. The oldest are dropped first."""
_AT_ONCE = 500
"""Maximum number of calls in one message: about 25 kB, far below the ``max_payload`` of any server."""


class WorkerSubjects(Protocol):
    """Knows the subjects of workers."""

    def worker_subject(self, worker_id: str) -> str:
        """Return the subject for messages to ``worker_id`` about calls."""


class AbandonedCalls:
    """The calls of one runtime that were given up. All are named by their reply subjects."""

    def __init__(self, connection: Connection, subjects: WorkerSubjects) -> None:
        self._connection = connection
        self._subjects = subjects
        self._unaccepted: OrderedDict[str, float] = OrderedDict()
        """The calls that no worker has accepted, and when they were given up, by the event loop's clock."""
        self._to_tell: dict[str, list[str]] = {}
        """The calls of which each worker is about to be told."""
        self._tasks = BackgroundTasks(logger, "a worker could not be told that nobody waits for a call")

    def add(self, call: str, accepted_by: str | None) -> None:
        """Nobody waits for ``call``. ``accepted_by`` is the worker that accepted it; None if none has."""
        if accepted_by is not None:
            self._tell(accepted_by, call)
            return
        now = asyncio.get_running_loop().time()
        self._unaccepted[call] = now
        while (
            len(self._unaccepted) > _REMEMBER_AT_MOST or now - next(iter(self._unaccepted.values())) > _REMEMBER
        ):  # the newest one is never older than that
            self._unaccepted.popitem(last=False)

    def accepted(self, worker_id: str, call: str) -> None:
        """A worker has accepted ``call``, which is not pending here."""
        if self._unaccepted.pop(call, None) is not None:
            self._tell(worker_id, call)

    def _tell(self, worker_id: str, call: str) -> None:
        calls = self._to_tell.get(worker_id)
        if calls is None:
            self._to_tell[worker_id] = [call]
            self._tasks.spawn(self._send(worker_id))
        else:
            calls.append(call)

    async def _send(self, worker_id: str) -> None:
        await asyncio.sleep(0)  # many calls may be given up at the same time
        calls = self._to_tell.pop(worker_id)
        subject = self._subjects.worker_subject(worker_id)
        for start in range(0, len(calls), _AT_ONCE):
            data = orjson.dumps({"calls": calls[start : start + _AT_ONCE]})
            await self._connection.publish(
                subject, envelope.encode(envelope.ABANDONED, '"id":"abandoned","source":"/"', data)
            )

    async def stop(self) -> None:
        """Tell what is to be told, and forget the rest."""
        await self._tasks.wait()
        self._unaccepted.clear()
