"""Asks questions to other workers, each on a subject of its own.

Callers may ask on ``natsrt.worker.<worker_id>``, other workers also on ``natsrt.peer.<worker_id>``: the registry knows
which workers listen there (`Registry.peer_subject`). `natsrt.hosting.peer_answers` answers. Questions about calls are
asked by `natsrt.transport.call_watch`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

import orjson
from autogen_core import AgentId
from nats.aio.msg import Msg

from natsrt.background import end_tasks
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.transport.inbox import Inbox, is_nobody
from natsrt.transport.probe import Probe
from natsrt.wire import envelope
from natsrt.wire.envelope import Envelope
from natsrt.wire.failures import decode_answer
from natsrt.wire.peer_messages import Claim, WaitLink, read_claim, read_links, read_promises
from natsrt.wire.subjects import Subjects

_PART_OF_TTL = 2
"""A worker that may be gone gets this part of ``heartbeat_ttl`` to answer, beside the round trip: 3 s by default, which
is enough for a link that takes half a second, and 2 s now and then."""
_LINKS_WITHIN = 1.5
"""Maximum time to wait for an answer in `Peers.links`, in seconds. A worker that answers late is asked again in the
next round."""
_PROMISES_WITHIN = 2.0
"""Maximum time to wait for the promises of a worker, in seconds, beside the round trip to the server. A start waits for
them, also for those of a worker that is frozen."""
_TAPPED_AFTER = 0.1
"""Seconds without an answer after which the server is asked whether there is a subscriber. Each further pause is twice
as long. A tap prevents the "no responders" message, and a subscriber may die before it answers."""
_LONGEST_PAUSE = 0.8
"""Maximum of these pauses in seconds. After each pause of that length the question is sent again."""


def alive_within(options: Options) -> float:
    """The seconds for which the answer of a worker that may be gone is waited for, beside the round trip."""
    return options.heartbeat_ttl / _PART_OF_TTL


class Peers:
    """Asks the other workers."""

    def __init__(self, connection: Connection, inbox: Inbox, probe: Probe, subjects: Subjects) -> None:
        self._connection = connection
        self._inbox = inbox
        self._probe = probe
        self._subjects = subjects

    async def alive(self, worker_id: str, timeout: float) -> bool:
        """True if a worker answers within ``timeout`` seconds, beside the round trip to the server."""
        return await self._ask(self._subjects.worker(worker_id), envelope.FATE, {"calls": []}, timeout) is not None

    async def listens(self, worker_id: str) -> bool:
        """True if the server has a worker's subscription to the worker's subject, or if no server reported."""
        return await self._probe.listens(self._subjects.worker(worker_id))

    async def has_listener(self, subject: str) -> bool:
        """True if the server has a subscription to ``subject`` that may answer, or if no server reported."""
        return await self._probe.listens(subject)

    async def serves(self, subject: str, agent_type: str, revision: int, timeout: float) -> bool:
        """True if the worker at ``subject`` confirms that it serves the subscriptions of an agent type.

        It must confirm within ``timeout`` seconds. These are the subscriptions in the registry at ``revision``.
        """
        question = {"agent_type": agent_type, "revision": revision}
        return await self._ask(subject, envelope.SERVE, question, timeout) is not None

    async def claim(self, subject: str, agent: AgentId, chain: Collection[str], timeout: float) -> Claim | None:
        """Return the claim of the worker at ``subject`` on a keyed agent; None if it does not answer in time.

        It has ``timeout`` seconds. ``chain`` is the chain of the message for which the agent is needed. Raises
        `CannotDecode`.
        """
        question = {"agent_type": agent.type, "key": agent.key, "chain": list(chain)}
        answer = await self._ask(subject, envelope.OWNER, question, timeout)
        return None if answer is None else read_claim(answer)

    async def links(self, subject: str, calls: Sequence[str]) -> list[WaitLink]:
        """Return the calls for which ``calls`` wait on the worker at ``subject``; empty if it does not answer.

        Raises `CannotDecode`.
        """
        answer = await self._ask(subject, envelope.WAITS, {"calls": calls}, _LINKS_WITHIN)
        return [] if answer is None else read_links(answer)

    async def withdrawn(self, subject: str) -> dict[str, float]:
        """Return the calls that the worker at ``subject`` has promised not to handle, and how many seconds ago.

        Empty if it does not answer, as workers of older versions do not. Raises `CannotDecode`.
        """
        answer = await self._ask(subject, envelope.WITHDRAWN, {}, _PROMISES_WITHIN)
        return {} if answer is None else read_promises(answer)

    async def _ask(self, subject: str, kind: str, question: dict[str, Any], timeout: float) -> Envelope | None:
        body = envelope.encode(kind, '"id":"question","source":"/"', orjson.dumps(question))
        reply = await self.ask(subject, body, timeout)
        answer = None if reply is None else decode_answer(reply.headers, reply.data)
        return answer if answer is not None and answer.type == envelope.REPLY else None

    async def ask(self, subject: str, body: bytes, timeout: float) -> Msg | None:
        """Send a question, and repeat it until it is answered. It must be one that may be asked several times.

        Returns the first answer; None if there is no subscriber, or after ``timeout`` seconds, beside the round trip to
        the server. An answer that is missing says nothing: the link of the worker may be far longer than that of this
        runtime. Raises the same errors as `Connection.publish`.
        """
        reply = self._inbox.new_subject("q")
        answer: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._inbox.receivers[reply] = lambda message: None if answer.done() else answer.set_result(message)
        try:
            await self._connection.publish(subject, body, reply=reply)
            async with asyncio.timeout(timeout + self._connection.rtt.allowance):
                pause = _TAPPED_AFTER
                while not (await asyncio.wait({answer}, timeout=pause + self._connection.rtt.allowance))[0]:
                    if await self._is_gone(subject, answer):
                        return None
                    if pause >= _LONGEST_PAUSE and not answer.done():
                        await self._connection.publish(subject, body, reply=reply)
                    pause = min(pause * 2, _LONGEST_PAUSE)
                message = answer.result()
        except TimeoutError:
            return None
        finally:
            self._inbox.receivers.pop(reply, None)
        return None if is_nobody(message) else message

    async def _is_gone(self, subject: str, answer: asyncio.Future[Msg]) -> bool:
        """True if the server says that there is no subscriber; False if it does not, or once there is an answer."""
        looking = asyncio.ensure_future(self._probe.listens(subject))
        try:
            await asyncio.wait((answer, looking), return_when=asyncio.FIRST_COMPLETED)
            return looking.done() and not looking.result() and not answer.done()
        finally:
            await end_tasks(looking)
