"""Answers the questions that arrive on this worker's subjects. `natsrt.transport.peers` asks them.

Callers may ask on ``natsrt.worker.<worker_id>``, about calls: see `natsrt.transport.call_watch`. Other workers ask on
``natsrt.peer.<worker_id>``, those of older versions on the former subject, too.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import orjson
from nats.aio.msg import Msg

from natsrt.agents.inbound import Answer
from natsrt.background import BackgroundTasks
from natsrt.errors import CannotDecode
from natsrt.hosting.answers import Answers
from natsrt.hosting.call_log import CallLog
from natsrt.hosting.reply_subjects import ReplySubjects
from natsrt.hosting.streams import Streams
from natsrt.hosting.subscriptions import Subscriptions
from natsrt.jetstream.registry.entries import PEER
from natsrt.jetstream.registry.registry import Registry
from natsrt.keyed.deadlocks import Deadlocks
from natsrt.keyed.ownership import Ownership
from natsrt.transport.connection import Connection, Interest
from natsrt.transport.inbox import Inbox
from natsrt.wire import envelope
from natsrt.wire.ids import MAX_CHAIN, ids
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_QUESTION = "a question to a worker"
_QUESTIONS = frozenset(
    (
        envelope.FATE,
        envelope.OWNER,
        envelope.WAITS,
        envelope.SERVE,
        envelope.ABANDONED,
        envelope.WITHDRAWN,
        envelope.MORE,
    )
)
_PROMISES_AT_MOST = 5000
"""Maximum number of promises in one answer: about 400 kB."""
_ENVELOPE_BYTES = 1024
"""Room for the envelope of that answer."""


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
        registry: Registry,
        inbox: Inbox,
        reply_subjects: ReplySubjects,
        streams: Streams,
    ) -> None:
        self._streams = streams
        self._connection = connection
        self._subjects = subjects
        self._worker_id = worker_id
        self._call_log = call_log
        self._ownership = ownership
        self._deadlocks = deadlocks
        self._subscriptions = subscriptions
        self._answers = answers
        self._registry = registry
        self._own_inboxes = f"{inbox.root.rpartition('.')[0]}."
        self._reply_subjects = reply_subjects
        self._interests: list[Interest] = []
        self._tasks = BackgroundTasks(logger, "answering a message to this worker failed")

    async def start(self) -> None:
        """Subscribe to this worker's subjects."""
        for subject, sink in (
            (self._subjects.worker(self._worker_id), self._on_question),
            (self._subjects.peer(self._worker_id), self._on_peer_question),
        ):
            self._interests.append(await self._connection.subscribe(subject, sink))

    async def stop(self) -> None:
        """Stop answering. Has no effect if stopped."""
        await self._tasks.cancel()
        interests, self._interests = self._interests, []
        for interest in interests:
            await self._connection.unsubscribe(interest)

    def _on_question(self, message: Msg) -> None:
        self._take(message, from_peer=False)

    def _on_peer_question(self, message: Msg) -> None:
        self._take(message, from_peer=True)

    def _take(self, message: Msg, *, from_peer: bool) -> None:
        """Called in the read loop, so a question about calls is answered in wire order with the calls themselves."""
        reply = message.reply
        answerable = self._reply_subjects.may_answer(reply)
        try:
            body = envelope.decode(message.data)
            if body is not None and body.type == envelope.ANSWER:
                self._streams.answered(body)
                if answerable:
                    self._tasks.spawn(self._send(reply, _reply({"received": True})))
                return
            data = None if body is None else body.json()
            if body is not None and body.type not in _QUESTIONS:
                raise CannotDecode("a message to a worker", f"unknown type {body.type!r}")
            if body is None or not isinstance(data, dict):
                raise CannotDecode("a message to a worker", "expected an object in a natsrt envelope")
            if body.type == envelope.MORE:
                self._streams.told(data)
                return
            if body.type == envelope.ABANDONED:
                self._call_log.abandoned(ids(data, "calls", _QUESTION))
                return
            if not answerable:
                raise CannotDecode("a message to a worker", "it has no reply subject, or one that is not allowed")
            self._answer(body.type, data, reply, from_peer)
        except CannotDecode as error:
            if answerable:
                self._tasks.spawn(self._send(reply, self._answers.not_for_an_agent(error)))
            raise  # the connection counts it

    def _answer(self, kind: str, data: dict[str, Any], reply: str, from_peer: bool) -> None:
        """Answer one question. Raises `CannotDecode`."""
        if kind == envelope.FATE:
            withdraw = ids(data, "withdraw", _QUESTION) if "withdraw" in data else ()
            self._call_log.asked(ids(data, "calls", _QUESTION), reply, frozenset(withdraw))
        elif kind == envelope.WITHDRAWN:
            if not from_peer:
                raise CannotDecode(_QUESTION, f"{kind} names calls of others, and is answered on natsrt.peer only")
            room = self._connection.max_payload - _ENVELOPE_BYTES
            now = asyncio.get_running_loop().time()
            ages = self._call_log.withdrawn.ages(now, _PROMISES_AT_MOST, room)
            self._tasks.spawn(self._send(reply, _reply({"withdrawn": ages})))
        elif kind == envelope.OWNER:
            chain = ids(data, "chain", _QUESTION, at_most=MAX_CHAIN)
            claim = self._ownership.claim_of(_text(data, "agent_type"), _text(data, "key"), chain)
            self._tasks.spawn(self._send(reply, _reply({"grip": claim.value})))
        elif kind == envelope.WAITS:
            links = self._deadlocks.links(ids(data, "calls", _QUESTION))
            if not (from_peer or self._may_be_older_peer(reply)):
                links = [link.without_names() for link in links]
            self._tasks.spawn(self._send(reply, _reply({"waits": [link._asdict() for link in links]})))
        else:  # SERVE
            revision = data.get("revision")
            if not isinstance(revision, int):
                raise CannotDecode(_QUESTION, "revision must be a number")
            self._tasks.spawn(self._serve(_text(data, "agent_type"), revision, reply))

    def _may_be_older_peer(self, reply: str) -> bool:
        """True if a question that anybody may ask may come from a worker of an older version.

        The answer must then have reply subjects and visits in it. It goes to an inbox of the same prefix as this
        worker's, so whoever can read it may read the replies to this worker, too.
        """
        return reply.startswith(self._own_inboxes) and not self._registry.view.all_understand(PEER)

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
