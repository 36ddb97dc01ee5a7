"""Tells callers about tasks, and cancels tasks for them: they may send nothing to JetStream.

The workers that take the tasks of an agent type answer on ``natsrt.tasks.<agent type>``, as one queue group.
"""

from __future__ import annotations

from typing import Any

import orjson
from nats.aio.msg import Msg

from natsrt.agents.inbound import Answer
from natsrt.errors import CannotDecode, StreamUnavailable
from natsrt.hosting.answers import Answers
from natsrt.hosting.reply_subjects import ReplySubjects
from natsrt.hosting.service_answers import ServiceAnswers
from natsrt.jetstream.registry.registry import Registry
from natsrt.jetstream.served_tasks import CANCEL, MISSING, RESULT, STATUS, WANTS, status_data
from natsrt.jetstream.task_store import TaskStore
from natsrt.task_types import TaskId
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.subjects import Subjects

_QUESTION = "a question about a task"


class TaskAnswers(ServiceAnswers):
    """Answers the questions about tasks of the agent types whose tasks this worker takes."""

    def __init__(
        self,
        *,
        connection: Connection,
        subjects: Subjects,
        registry: Registry,
        store: TaskStore,
        result_ttl: float,
        answers: Answers,
        reply_subjects: ReplySubjects,
    ) -> None:
        super().__init__(connection, _QUESTION, (), registry=registry, answers=answers, reply_subjects=reply_subjects)
        self._subjects = subjects
        self._store = store
        self._result_ttl = result_ttl

    async def serve(self, agent_type: str) -> None:
        """Answer questions about the tasks of a type. Has no effect if it does."""
        await self._listen(self._subjects.asks_tasks(agent_type))

    async def end(self, agent_type: str) -> None:
        """Answer no more questions about the tasks of a type. Has no effect if it does not."""
        await self._stop_listening(self._subjects.asks_tasks(agent_type))

    async def _answer_to(self, message: Msg) -> Answer:
        if self._is_asked_too_much:
            raise StreamUnavailable("read", self._store.stream, "this worker is asked too much")
        task, question = self._asked(message)
        match question["want"]:
            case "result":
                result = await self._store.result(task)
                return _reply({MISSING: True}) if result is None else Answer(result.body, result.headers)
            case "status":
                status = await self._store.status(task)
                return _reply({MISSING: True} if status is None else status_data(status))
        ttl = question.get("ttl")
        if isinstance(ttl, bool) or not isinstance(ttl, int | float) or ttl < 1:
            raise CannotDecode(_QUESTION, "ttl must be a number of seconds of at least 1")
        return _reply({"cancelled": await self._store.cancel(task, min(ttl, self._result_ttl))})

    def _asked(self, message: Msg) -> tuple[TaskId, dict[str, Any]]:
        """The task and the data of a question, checked. Raises `CannotDecode`."""
        body = envelope.decode(message.data)
        data = None if body is None else body.json()
        if body is None or body.type != envelope.TASKS or not isinstance(data, dict):
            raise CannotDecode(_QUESTION, f"expected an object in an envelope of type {envelope.TASKS}")
        if data.get("want") not in WANTS:
            raise CannotDecode(_QUESTION, f"want must be one of {RESULT}, {STATUS} and {CANCEL}")
        try:
            task = TaskId.parse(str(data.get("id")))
        except ValueError as error:
            raise CannotDecode(_QUESTION, str(error)) from None
        if message.subject != self._subjects.asks_tasks(task.agent.type):  # who may ask is decided by the subject
            raise CannotDecode(_QUESTION, f"{task} is not a task of the agent type in the subject")
        return task, data


def _reply(data: dict[str, Any]) -> Answer:
    return Answer(envelope.encode(envelope.REPLY, '"id":"answer","source":"/"', orjson.dumps(data)))
