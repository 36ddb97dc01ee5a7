"""Answers questions of callers on subjects that all able runtimes share: the mechanism, without what is asked.

All runtimes that may send requests to JetStream answer, as one queue group. A caller that is refused asks again.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence

from nats.aio.msg import Msg

from natsrt.agents.inbound import Answer
from natsrt.background import BackgroundTasks
from natsrt.errors import CannotDecode, NatsrtError
from natsrt.hosting.answers import Answers
from natsrt.hosting.reply_subjects import ReplySubjects
from natsrt.jetstream.registry.registry import Registry
from natsrt.transport.connection import Connection, Interest, Refusal

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_QUEUE = "workers"
"""The queue group of all that answer."""
_FINISH_WITHIN = 2.0
"""Seconds for which a stop waits for answers. A caller waits as long for one before it asks again."""
_AT_ONCE = 64
"""Maximum number of questions that are answered at the same time; with blobs, these are 32 MB of chunks. Further ones
are refused."""


class ServiceAnswers(ABC):
    """Answers the questions on some subjects that reach one runtime.

    Args:
        connection: The runtime's connection.
        question: What a question is called in errors: ``a question about the registry``.
        subjects: The subjects of the questions, from the start on.
        registry: Tells whether this runtime may send requests to JetStream.
        answers: Makes the answers that are errors.
        reply_subjects: Says where answers may be sent.
    """

    def __init__(
        self,
        connection: Connection,
        question: str,
        subjects: Sequence[str],
        *,
        registry: Registry,
        answers: Answers,
        reply_subjects: ReplySubjects,
    ) -> None:
        self._connection = connection
        self._question = question
        self._at_first = subjects
        self._registry = registry
        self._answers = answers
        self._reply_subjects = reply_subjects
        self._interests: dict[str, Interest] = {}
        self._tasks = BackgroundTasks(logger, f"{question} could not be answered")
        connection.on_denied(self._on_denied)

    async def start(self) -> None:
        """Subscribe, if this runtime may send requests to JetStream."""
        for subject in self._at_first:
            await self._listen(subject)

    async def _listen(self, subject: str) -> None:
        if self._registry.reads_bucket and subject not in self._interests:
            self._interests[subject] = await self._connection.subscribe(
                subject, self._on_question, queue=_QUEUE, optional=True
            )

    async def _stop_listening(self, subject: str) -> None:
        interest = self._interests.pop(subject, None)
        if interest is not None:
            await self._connection.unsubscribe(interest)

    async def stop(self) -> None:
        """Answer what has arrived, and stop. Has no effect if stopped."""
        for subject in list(self._interests):
            await self._stop_listening(subject)
        await self._tasks.wait(_FINISH_WITHIN)
        await self._tasks.cancel()

    @property
    def _is_asked_too_much(self) -> bool:
        return len(self._tasks) > _AT_ONCE

    def _on_denied(self, denied: Refusal) -> bool:
        """Say nothing of it: operators may not answer, and callers are told if nobody does."""
        return denied.operation == "subscribe to" and denied.subject in self._interests

    def _on_question(self, message: Msg) -> None:
        if not self._reply_subjects.may_answer_service(message.reply):
            raise CannotDecode(self._question, "it has no reply subject, or one that is not allowed")
        self._tasks.spawn(self._answer(message))

    async def _answer(self, message: Msg) -> None:
        try:
            answer = await self._answer_to(message)
        except NatsrtError as error:
            answer = self._answers.not_for_an_agent(error)
        await self._connection.publish(message.reply, answer.body, headers=answer.headers)

    @abstractmethod
    async def _answer_to(self, message: Msg) -> Answer:
        """The answer to a question. Raises `NatsrtError`, which is the answer then."""
