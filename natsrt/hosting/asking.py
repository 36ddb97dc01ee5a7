"""What workers ask one another, each on its own subject ``natsrt.worker.<worker_id>``, and how a worker answers.

What became of calls is asked by callers, too: see `natsrt.transport.calls`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import orjson
from autogen_core import AgentId
from nats.aio.msg import Msg
from pydantic import TypeAdapter, ValidationError

from natsrt.errors import CannotDecode
from natsrt.hosting.deadlocks import Deadlocks, Link
from natsrt.hosting.fates import Fates
from natsrt.hosting.owning import Grip, Owning
from natsrt.transport.calls import Calls
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import Envelope
from natsrt.wire.subjects import Subjects

_ALIVE_WITHIN = 1.0
_LINKS_WITHIN = 0.5
_LINKS: TypeAdapter[list[Link]] = TypeAdapter(list[Link])
_QUESTION = "a question to a worker"


class Asking:
    """Asks other workers."""

    def __init__(self, calls: Calls, subjects: Subjects) -> None:
        self._calls = calls
        self._subjects = subjects

    async def alive(self, worker_id: str) -> bool:
        """Whether a worker answers."""
        return await self._ask(worker_id, envelope.FATE, {"calls": []}, _ALIVE_WITHIN) is not None

    async def serves(self, worker_id: str, agent_type: str, revision: int, timeout: float) -> bool:
        """Whether a worker says that it serves the type as the registry says at ``revision``."""
        question = {"agent_type": agent_type, "revision": revision}
        return await self._ask(worker_id, envelope.SERVE, question, timeout) is not None

    async def grip(self, worker_id: str, agent: AgentId, along: Collection[str], timeout: float) -> Grip | None:
        """A worker's grip on a keyed agent, for a message of the chain ``along``; None where it does not answer.

        Raises `CannotDecode`.
        """
        question = {"agent_type": agent.type, "key": agent.key, "chain": list(along)}
        answer = await self._ask(worker_id, envelope.OWNER, question, timeout)
        if answer is None:
            return None
        data = answer.json()
        try:
            return Grip(data["grip"])
        except (TypeError, KeyError, ValueError):
            raise CannotDecode("a worker's answer about an agent", "it has no grip of a known name") from None

    async def links(self, worker_id: str, calls: Sequence[str]) -> list[Link]:
        """What a worker says that calls wait for; nothing where it does not answer. Raises `CannotDecode`."""
        answer = await self._ask(worker_id, envelope.WAITS, {"calls": calls}, _LINKS_WITHIN)
        if answer is None:
            return []
        try:
            return _LINKS.validate_python(answer.json()["waits"])
        except (TypeError, KeyError, ValidationError):
            raise CannotDecode("a worker's answer about what calls wait for", "it is no list of these") from None

    async def _ask(self, worker_id: str, kind: str, question: dict[str, Any], timeout: float) -> Envelope | None:
        body = envelope.encode(kind, '"id":"question","source":"/"', orjson.dumps(question))
        reply = await self._calls.ask(self._subjects.worker(worker_id), body, timeout)
        answer = None if reply is None else envelope.decode(reply.data)
        return answer if answer is not None and answer.type == envelope.REPLY else None


class Answering:
    """Answers what this worker is asked.

    ``serve(agent_type, revision)`` serves a type as the registry says at ``revision``; ``refuse(reply, error)`` answers
    with an error; ``spawn`` runs what takes time.
    """

    def __init__(
        self,
        *,
        connection: Connection,
        subjects: Subjects,
        fates: Fates,
        owning: Owning,
        deadlocks: Deadlocks,
        serve: Callable[[str, int], Awaitable[None]],
        refuse: Callable[[str, Exception], Awaitable[None]],
        spawn: Callable[[Awaitable[None]], None],
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._fates = fates
        self._owning = owning
        self._deadlocks = deadlocks
        self._serve = serve
        self._refuse = refuse
        self._spawn = spawn

    def on_question(self, message: Msg) -> None:
        """In the read loop: questions about calls are answered in wire order with the calls themselves."""
        reply = message.reply
        answerable = bool(reply) and not self._subjects.is_reserved(reply)
        try:
            body = envelope.decode(message.data)
            data = None if body is None else body.json()
            if body is None or not isinstance(data, dict):
                raise CannotDecode("a message to a worker", "expected an object in a natsrt envelope")
            if not answerable:
                raise CannotDecode("a message to a worker", "it has no reply subject, or one where no reply may go")
            if body.type == envelope.FATE:
                self._fates.asked(envelope.texts(data, "calls", _QUESTION), reply)
            elif body.type == envelope.OWNER:
                grip = self._owning.grip(
                    _text(data, "agent_type"), _text(data, "key"), envelope.texts(data, "chain", _QUESTION)
                )
                self._spawn(self._answer(reply, {"grip": grip.value}))
            elif body.type == envelope.WAITS:
                links = self._deadlocks.links(envelope.texts(data, "calls", _QUESTION))
                self._spawn(self._answer(reply, {"waits": [link._asdict() for link in links]}))
            elif body.type == envelope.SERVE:
                revision = data.get("revision")
                if not isinstance(revision, int):
                    raise CannotDecode(_QUESTION, "revision must be a number")
                self._spawn(self._serve_as_asked(_text(data, "agent_type"), revision, reply))
            else:
                raise CannotDecode("a message to a worker", f"unknown type {body.type!r}")
        except CannotDecode as error:
            if answerable:
                self._spawn(self._refuse(reply, error))
            raise  # the connection counts it

    async def _serve_as_asked(self, agent_type: str, revision: int, reply: str) -> None:
        try:
            await self._serve(agent_type, revision)
        except Exception as error:
            await self._refuse(reply, error)
            raise
        await self._answer(reply, {"serves": True})

    async def _answer(self, reply: str, data: dict[str, Any]) -> None:
        body = envelope.encode(envelope.REPLY, '"id":"answer","source":"/"', orjson.dumps(data))
        await self._connection.publish(reply, body)


def _text(data: dict[str, Any], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str):
        raise CannotDecode(_QUESTION, f"{name} must be text")
    return value
