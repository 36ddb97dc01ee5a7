"""Asks questions to other workers, on the subject of each worker, ``natsrt.worker.<worker_id>``.

`natsrt.hosting.peer_answers` answers them. Questions about calls are asked by `natsrt.transport.call_watch`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

import orjson
from autogen_core import AgentId
from nats.aio.msg import Msg

from natsrt.transport.connection import Connection
from natsrt.transport.inbox import Inbox, is_nobody
from natsrt.transport.probe import Probe
from natsrt.wire import envelope
from natsrt.wire.envelope import Envelope
from natsrt.wire.failures import decode_answer
from natsrt.wire.peer_messages import Claim, WaitLink, read_claim, read_links
from natsrt.wire.subjects import Subjects

_ALIVE_WITHIN = 1.0
"""Maximum time to wait for the answer that shows that a worker is alive, in seconds."""
_LINKS_WITHIN = 0.5
"""Maximum time to wait for an answer in `Peers.links`, in seconds. A worker that answers late is asked again in the
next round."""
_TAPPED_AFTER = 0.1
"""Seconds without an answer after which the server is asked whether there is a subscriber. Each further pause is twice
as long. A tap prevents the "no responders" message, and a subscriber may die before it answers."""


class Peers:
    """Asks the other workers."""

    def __init__(self, connection: Connection, inbox: Inbox, probe: Probe, subjects: Subjects) -> None:
        self._connection = connection
        self._inbox = inbox
        self._probe = probe
        self._subjects = subjects

    async def alive(self, worker_id: str) -> bool:
        """True if a worker answers within 1 s."""
        return await self._ask_worker(worker_id, envelope.FATE, {"calls": []}, _ALIVE_WITHIN) is not None

    async def listens(self, worker_id: str) -> bool:
        """True if the server has a worker's subscription to the worker's subject, or if no server reported."""
        return await self._probe.listens(self._subjects.worker(worker_id))

    async def has_listener(self, subject: str) -> bool:
        """True if the server has a subscription to ``subject`` that may answer, or if no server reported."""
        return await self._probe.listens(subject)

    async def serves(self, worker_id: str, agent_type: str, revision: int, timeout: float) -> bool:
        """True if a worker confirms within ``timeout`` seconds that it serves the subscriptions of an agent type.

        These are the subscriptions in the registry at ``revision``.
        """
        question = {"agent_type": agent_type, "revision": revision}
        return await self._ask_worker(worker_id, envelope.SERVE, question, timeout) is not None

    async def claim(self, worker_id: str, agent: AgentId, chain: Collection[str], timeout: float) -> Claim | None:
        """Return a worker's claim on a keyed agent; None if it does not answer within ``timeout`` seconds.

        ``chain`` is the chain of the message for which the agent is needed. Raises `CannotDecode`.
        """
        question = {"agent_type": agent.type, "key": agent.key, "chain": list(chain)}
        answer = await self._ask_worker(worker_id, envelope.OWNER, question, timeout)
        return None if answer is None else read_claim(answer)

    async def links(self, worker_id: str, calls: Sequence[str]) -> list[WaitLink]:
        """Return the calls for which ``calls`` wait on a worker; empty if it does not answer. Raises `CannotDecode`."""
        answer = await self._ask_worker(worker_id, envelope.WAITS, {"calls": calls}, _LINKS_WITHIN)
        return [] if answer is None else read_links(answer)

    async def _ask_worker(self, worker_id: str, kind: str, question: dict[str, Any], timeout: float) -> Envelope | None:
        body = envelope.encode(kind, '"id":"question","source":"/"', orjson.dumps(question))
        reply = await self.ask(self._subjects.worker(worker_id), body, timeout)
        answer = None if reply is None else decode_answer(reply.headers, reply.data)
        return answer if answer is not None and answer.type == envelope.REPLY else None

    async def ask(self, subject: str, body: bytes, timeout: float) -> Msg | None:
        """Send a question. Returns the first answer; None if there is no subscriber, or after ``timeout`` seconds.

        Raises the same errors as `Connection.publish`.
        """
        reply = self._inbox.new_subject("q")
        answer: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._inbox.receivers[reply] = lambda message: None if answer.done() else answer.set_result(message)
        try:
            await self._connection.publish(subject, body, reply=reply)
            async with asyncio.timeout(timeout):
                pause = _TAPPED_AFTER
                while not (await asyncio.wait({answer}, timeout=pause))[0]:
                    if not await self._probe.listens(subject) and not answer.done():
                        return None
                    pause *= 2
                message = answer.result()
        except TimeoutError:
            return None
        finally:
            self._inbox.receivers.pop(reply, None)
        return None if is_nobody(message) else message
