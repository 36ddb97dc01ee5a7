"""natsrt workers as NATS services: ``nats service ls``, ``info``, ``stats`` and ``ping`` show them.

There is one service per worker process and one endpoint per agent type. The answers follow ADR-32. The ``micro`` module
of nats-py is not used, because it runs one handler at a time per endpoint and drops requests when it stops.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import orjson
from nats.aio.msg import Msg

from natsrt.background import BackgroundTasks
from natsrt.errors import CannotDecode, NatsrtError
from natsrt.observe.metrics import TypeCounters
from natsrt.transport.connection import Connection, Interest

logger: logging.Logger = logging.getLogger("natsrt.services")

_VERBS: Final = ("PING", "INFO", "STATS")
_TYPE: Final = "io.nats.micro.v1.{}_response"
_NAME = re.compile(r"[^A-Za-z0-9_-]")
_MAX_ERROR = 120
"""Maximum length of an endpoint's last error in the answer, in characters."""


@dataclass(frozen=True, slots=True)
class ServiceEndpoint:
    """One agent type as an endpoint of a NATS service."""

    name: str
    subject: str
    queue_group: str
    metadata: dict[str, str]
    counters: TypeCounters


class Endpoints(Protocol):
    """The endpoints of a worker."""

    def endpoints(self) -> Iterable[ServiceEndpoint]:
        """All current endpoints."""


class AnswerSubjects(Protocol):
    """Decides where answers may be published."""

    def may_answer_service(self, reply: str) -> bool:
        """True if a service answer may be published to ``reply``."""


def service_name(name: str) -> str:
    """Return ``name`` as a service name: each character that ADR-32 does not allow is replaced by ``_``."""
    return _NAME.sub("_", name) or "natsrt"


class Services:
    """Answers the service protocol for one worker."""

    def __init__(
        self,
        connection: Connection,
        *,
        replies: AnswerSubjects,
        name: str,
        worker_id: str,
        version: str,
        metadata: dict[str, str],
        endpoints: Endpoints,
    ) -> None:
        self._connection = connection
        self._name = service_name(name)
        self._worker_id = worker_id
        self._version = version
        self._metadata = metadata
        self._endpoints = endpoints
        self._replies = replies
        self._tasks = BackgroundTasks(logger, "a service request could not be answered")
        self._started = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        self._interests: list[Interest] = []

    async def start(self) -> None:
        """Subscribe to the nine subjects of the protocol: three verbs for all services, this name and this worker."""
        for verb in _VERBS:
            sink = self._sink(verb)
            for subject in (f"$SRV.{verb}", f"$SRV.{verb}.{self._name}", f"$SRV.{verb}.{self._name}.{self._worker_id}"):
                self._interests.append(await self._connection.subscribe(subject, sink, optional=True))

    async def stop(self) -> None:
        for interest in self._interests:
            await self._connection.unsubscribe(interest)
        self._interests.clear()
        await self._tasks.cancel()

    def _sink(self, verb: str) -> Callable[[Msg], None]:
        def take(message: Msg) -> None:
            if not self._replies.may_answer_service(message.reply):
                raise CannotDecode(f"a {verb} request", "it has no reply subject, or one that is not allowed")
            self._tasks.spawn(self._answer(verb, message.reply))

        return take

    async def _answer(self, verb: str, reply: str) -> None:
        try:
            await self._connection.publish(reply, orjson.dumps(self.response(verb)))
        except NatsrtError as error:
            logger.debug("a service request could not be answered: %s", error)

    def response(self, verb: str) -> dict[str, Any]:
        """Return the answer to ``PING``, ``INFO`` or ``STATS``."""
        answer: dict[str, Any] = {
            "type": _TYPE.format(verb.lower()),
            "name": self._name,
            "id": self._worker_id,
            "version": self._version,
            "metadata": self._metadata,
        }
        if verb == "INFO":
            answer["description"] = "AutoGen agents on natsrt"
            answer["endpoints"] = [
                {"name": e.name, "subject": e.subject, "queue_group": e.queue_group, "metadata": e.metadata}
                for e in self._endpoints.endpoints()
            ]
        elif verb == "STATS":
            answer["started"] = self._started
            answer["endpoints"] = [
                {
                    "name": e.name,
                    "subject": e.subject,
                    "queue_group": e.queue_group,
                    "num_requests": e.counters.messages,
                    "num_errors": e.counters.errors,
                    "last_error": e.counters.last_error[:_MAX_ERROR],
                    "processing_time": e.counters.busy_ns,
                    "average_processing_time": e.counters.busy_ns // e.counters.messages if e.counters.messages else 0,
                }
                for e in self._endpoints.endpoints()
            ]
        return answer
