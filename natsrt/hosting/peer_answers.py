"""Answers the questions that arrive on this worker's subject. `natsrt.transport.peers` asks them.

Questions about calls also come from callers: see `natsrt.transport.call_watch`.
"""

from __future__ import annotations

import logging
from typing import Any

import orjson
from nats.aio.msg import Msg

from natsrt.agents.inbound import Answer
from natsrt.background import BackgroundTasks
from natsrt.errors import CannotDecode
from natsrt.hosting.answers import Answers
from natsrt.hosting.call_log import CallLog
from natsrt.hosting.subscriptions import Subscriptions
from natsrt.keyed.deadlocks import Deadlocks
from natsrt.keyed.ownership import Ownership
from natsrt.transport.connection import Connection, Interest
from natsrt.wire import envelope
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_QUESTION = "a question to a worker"
_QUESTIONS = frozenset((envelope.FATE, envelope.OWNER, envelope.WAITS, envelope.SERVE, envelope.ABANDONED))


class PeerAnswers:
    """Answers the questions of other workers and of callers."""

    def __init__(
        self,
        *,
        connection: Connection,
        subjects: Subjects,
        worker_id: str,
        call_log: CallLog,
        ownership: Ownership,
        deadlocks: Deadlocks,
        subscriptions: Subscriptions,
        answers: Answers,
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._worker_id = worker_id
        self._call_log = call_log
        self._ownership = ownership
        self._deadlocks = deadlocks
        self._subscriptions = subscriptions
        self._answers = answers
        self._interest: Interest | None = None
        self._tasks = BackgroundTasks(logger, "answering a message to this worker failed")

    async def start(self) -> None:
        """Subscribe to this worker's subject."""
        self._interest = await self._connection.subscribe(self._subjects.worker(self._worker_id), self._on_question)

    async def stop(self) -> None:
        """Stop answering. Has no effect if stopped."""
        await self._tasks.cancel()
        interest, self._interest = self._interest, None
        if interest is not None:
            await self._connection.unsubscribe(interest)

    def _on_question(self, message: Msg) -> None:
        """Called in the read loop, so a question about calls is answered in wire order with the calls themselves."""
        reply = message.reply
        answerable = bool(reply) and not self._subjects.is_reserved(reply)
        try:
            body = envelope.decode(message.data)
            data = None if body is None else body.json()
            if body is not None and body.type not in _QUESTIONS:
                raise CannotDecode("a message to a worker", f"unknown type {body.type!r}")
            if body is None or not isinstance(data, dict):
                raise CannotDecode("a message to a worker", "expected an object in a natsrt envelope")
            if body.type == envelope.ABANDONED:
                self._call_log.abandoned(envelope.texts(data, "calls", _QUESTION))
                return
            if not answerable:
                raise CannotDecode("a message to a worker", "it has no reply subject, or one that is not allowed")
            self._answer(body.type, data, reply)
        except CannotDecode as error:
            if answerable:
                self._tasks.spawn(self._send(reply, self._answers.not_for_an_agent(error)))
            raise  # the connection counts it

    def _answer(self, kind: str, data: dict[str, Any], reply: str) -> None:
        """Answer one question. Raises `CannotDecode`."""
        if kind == envelope.FATE:
            self._call_log.asked(envelope.texts(data, "calls", _QUESTION), reply)
        elif kind == envelope.OWNER:
            chain = envelope.texts(data, "chain", _QUESTION)
            claim = self._ownership.claim_of(_text(data, "agent_type"), _text(data, "key"), chain)
            self._tasks.spawn(self._send(reply, _reply({"grip": claim.value})))
        elif kind == envelope.WAITS:
            links = self._deadlocks.links(envelope.texts(data, "calls", _QUESTION))
            self._tasks.spawn(self._send(reply, _reply({"waits": [link._asdict() for link in links]})))
        else:  # SERVE
            revision = data.get("revision")
            if not isinstance(revision, int):
                raise CannotDecode(_QUESTION, "revision must be a number")
            self._tasks.spawn(self._serve(_text(data, "agent_type"), revision, reply))

    async def _serve(self, agent_type: str, revision: int, reply: str) -> None:
        try:
            await self._subscriptions.serve_at(agent_type, revision)
        except Exception as error:
            await self._send(reply, self._answers.not_for_an_agent(error))
            raise
        await self._send(reply, _reply({"serves": True}))

    async def _send(self, subject: str, answer: Answer) -> None:
        await self._connection.publish(subject, answer.body, headers=answer.headers)


def _reply(data: dict[str, Any]) -> Answer:
    return Answer(envelope.encode(envelope.REPLY, '"id":"answer","source":"/"', orjson.dumps(data)))


def _text(data: dict[str, Any], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str):
        raise CannotDecode(_QUESTION, f"{name} must be text")
    return value
