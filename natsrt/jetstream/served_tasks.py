"""Results and status of tasks as workers tell them to runtimes that may send nothing to JetStream.

`natsrt.jetstream.served_blobs` says why those ask workers. They ask on ``natsrt.tasks.<agent type>``, and the workers
that take the tasks of the type answer: `natsrt.hosting.task_answers` is the other side.
"""

from __future__ import annotations

import datetime
from dataclasses import asdict
from typing import Any, Final, Protocol

import nats.errors
import orjson
from nats.aio.msg import Msg

from natsrt.errors import CannotDecode, NatsrtError, StreamUnavailable
from natsrt.jetstream.task_store import STATE_HEADER, TaskResult
from natsrt.task_types import ENDS, TaskId, TaskStatus
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.failures import ErrorTypes, decode_answer
from natsrt.wire.subjects import Subjects

RESULT: Final = "result"
STATUS: Final = "status"
CANCEL: Final = "cancel"
WANTS: Final = (RESULT, STATUS, CANCEL)
MISSING: Final = "missing"
"""In the data of an answer: there is none."""
_WITHIN: Final = 5.0
"""Seconds for an answer, beside the round trip."""
_TIMES: Final = ("since", "due")
_ERRORS: Final = ErrorTypes()


class TaskSource(Protocol):
    """Where tickets find out about tasks. Its methods raise `StreamUnavailable` and other `NatsrtError`."""

    async def result(self, task: TaskId) -> TaskResult | None:
        """The result of a task; None if it has none."""

    async def status(self, task: TaskId) -> TaskStatus | None:
        """What is known of a task; None if there is no such task, and no result of one."""

    async def cancel(self, task: TaskId, ttl: float) -> bool:
        """Give a task the result ``cancelled``, kept for ``ttl`` seconds, and remove it. False: it has a result."""


class ServedTasks:
    """Has workers tell about tasks. Implements `TaskSource`."""

    def __init__(self, connection: Connection, subjects: Subjects, stream: str) -> None:
        self._connection = connection
        self._subjects = subjects
        self._stream = stream

    async def result(self, task: TaskId) -> TaskResult | None:
        answer = await self._ask(task, {"want": RESULT})
        state: Any = (answer.headers or {}).get(STATE_HEADER)
        if state in ENDS:
            return TaskResult(state, answer.data, dict(answer.headers or {}), 0, 0.0)
        if not self._data(answer).get(MISSING):
            raise CannotDecode("a worker's answer about a task", "it is no result")
        return None

    async def status(self, task: TaskId) -> TaskStatus | None:
        data = self._data(await self._ask(task, {"want": STATUS}))
        return None if data.get(MISSING) else status_of(data)

    async def cancel(self, task: TaskId, ttl: float) -> bool:
        return self._data(await self._ask(task, {"want": CANCEL, "ttl": ttl})).get("cancelled") is True

    async def _ask(self, task: TaskId, question: dict[str, Any]) -> Msg:
        body = envelope.encode(
            envelope.TASKS, '"id":"question","source":"/"', orjson.dumps({"id": str(task), **question})
        )
        subject = self._subjects.asks_tasks(task.agent.type)
        try:
            return await self._connection.client.request(
                subject, body, timeout=_WITHIN + self._connection.rtt.allowance
            )
        except nats.errors.NoRespondersError:
            problem = (
                f"nobody answers on {subject}: no worker that takes tasks of {task.agent.type} is alive, and this user "
                "may send no requests to JetStream (docs/permissions.md)"
            )
        except (nats.errors.Error, OSError, TimeoutError) as error:
            problem = str(error) or type(error).__name__
        raise StreamUnavailable("read", self._stream, problem)

    def _data(self, answer: Msg) -> dict[str, Any]:
        """The data of an answer. Raises what the worker says, and `CannotDecode`."""
        body = decode_answer(answer.headers, answer.data)
        data = None if body is None else body.json()
        if body is None or not isinstance(data, dict):
            raise CannotDecode("a worker's answer about a task", "it is no envelope with an object")
        if body.type == envelope.REPLY:
            return data
        error = _ERRORS.rebuild(body.payload, agent=None, worker_id=None)
        if isinstance(error, NatsrtError):
            raise error
        raise StreamUnavailable("read", self._stream, f"the worker that was asked says: {error}")


def status_data(status: TaskStatus) -> dict[str, Any]:
    """A status as JSON."""
    data = {name: value for name, value in asdict(status).items() if value is not None}
    return {name: value.isoformat() if name in _TIMES else value for name, value in data.items()}


def status_of(data: dict[str, Any]) -> TaskStatus:
    """The status that `status_data` made. Raises `CannotDecode`."""
    try:
        fields: dict[str, Any] = dict(data)
        for name in data.keys() & set(_TIMES):
            fields[name] = datetime.datetime.fromisoformat(data[name])
        return TaskStatus(**fields)
    except (TypeError, ValueError) as error:
        raise CannotDecode("a worker's answer about a task", f"it is no status: {error}") from None
