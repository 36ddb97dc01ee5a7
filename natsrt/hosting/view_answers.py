"""Tells callers what this runtime sees in the registry: they may not read its bucket.

All runtimes that read the bucket themselves answer, so a worker answers before it hosts its first agent type. They are
one queue group. One that is not in step refuses, and the caller asks again.
"""

from __future__ import annotations

import logging

from nats.aio.msg import Msg

from natsrt.agents.inbound import Answer
from natsrt.errors import CannotDecode, RegistryUnavailable
from natsrt.hosting.answers import Answers
from natsrt.hosting.reply_subjects import ReplySubjects
from natsrt.hosting.service_answers import ServiceAnswers
from natsrt.jetstream.registry.pages import ENTRIES, KNOWN, Pages, Question, read_question, revision_data
from natsrt.jetstream.registry.registry import Registry
from natsrt.transport.connection import Connection, Refusal
from natsrt.wire import envelope
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_QUESTION = "a question about the registry"


class ViewAnswers(ServiceAnswers):
    """Answers the questions on ``natsrt.view`` that reach one runtime."""

    def __init__(
        self,
        *,
        connection: Connection,
        subjects: Subjects,
        registry: Registry,
        answers: Answers,
        reply_subjects: ReplySubjects,
    ) -> None:
        super().__init__(
            connection, _QUESTION, (subjects.view,), registry=registry, answers=answers, reply_subjects=reply_subjects
        )
        self._pages = Pages()
        self._expected = False

    def expect(self) -> None:
        """This runtime hosts agents, so its user should be allowed to answer. Log a warning if it is not."""
        self._expected = True
        for interest in self._interests.values():
            if interest.refusal is not None:
                logger.warning("%s", interest.refusal)

    def _on_denied(self, denied: Refusal) -> bool:
        """Say nothing of it where nothing is hosted: operators may read the bucket, but not answer callers."""
        return super()._on_denied(denied) and not self._expected

    async def _answer_to(self, message: Msg) -> Answer:
        body = envelope.decode(message.data)
        if body is None or body.type != envelope.VIEW:
            raise CannotDecode(_QUESTION, f"expected {envelope.VIEW}")
        data = await self._told(read_question(body.json()))
        return Answer(envelope.encode(envelope.REPLY, '"id":"answer","source":"/"', data))

    async def _told(self, question: Question) -> bytes:
        """The data of the answer. Raises `NatsrtError` if this runtime cannot answer now."""
        registry = self._registry
        if not registry.synced or self._is_asked_too_much:
            raise RegistryUnavailable("tell", "this runtime is not in step with it, or is asked too much")
        if question.want == KNOWN:
            known = await registry.known(question.agent_type)
            return self._pages.known(registry.view.applied, known, question.after)
        if question.revision:
            await registry.shown(question.revision)
        else:
            await registry.catch_up()
        if question.want == ENTRIES:
            return self._pages.entries(registry.view, question.after, registry.origin)
        return revision_data(registry.view.applied, registry.origin)
