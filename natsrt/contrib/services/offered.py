"""An agent type as a NATS service, on a subject of one's choice. ``nats service ls``, ``info`` and ``req`` know it.

Requests become calls of the runtime, as `NatsAgentRuntime.send_message` makes them. So any worker may host the agent
type, and what holds for calls holds for these: keyed agents, limits, tracing, typed errors.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from autogen_core import AgentId, AgentType
from nats.nuid import NUID
from opentelemetry import context as tracing
from opentelemetry.propagate import extract

from natsrt import NatsAgentRuntime
from natsrt.contrib.arguments import checked_timeout
from natsrt.contrib.services.json_types import JsonType
from natsrt.errors import CallTimeout, CannotDecode, NatsrtError, WorkerStopped
from natsrt.plain import (
    KEY_HEADER,
    PART_HEADER,
    PARTS_HEADER,
    SERVICE_ERROR,
    SERVICE_ERROR_CODE,
    STREAM_HEADER,
    PlainHandler,
    PlainMessage,
    PlainSubscription,
    checked_service_subject,
    checked_subject,
    header_text,
)

logger: logging.Logger = logging.getLogger("natsrt.contrib")

Key = Callable[[PlainMessage], str]

_VERBS: Final = ("PING", "INFO", "STATS")
_KIND: Final = "io.nats.micro.v1.{}_response"
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_VERSION: Final = re.compile(r"\d+\.\d+\.\d+(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?")
_CANCELLED: Final = 499
"""The code of a call that its agent cancelled, as natsrt sends it (docs/PROTOCOL.md)."""


@dataclass(slots=True)
class _Stats:
    """What the service protocol reports of an endpoint."""

    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat().replace("+00:00", "Z"))
    requests: int = 0
    errors: int = 0
    last_error: str = ""
    busy_ns: int = 0

    def report(self) -> dict[str, Any]:
        return {
            "num_requests": self.requests,
            "num_errors": self.errors,
            "last_error": self.last_error,
            "processing_time": self.busy_ns,
            "average_processing_time": self.busy_ns // self.requests if self.requests else 0,
        }


class _Broken(Exception):
    """A stream broke off after ``count`` items, for ``reason``."""

    def __init__(self, count: int, reason: BaseException) -> None:
        self.count = count
        self.reason = reason


class OfferedService:
    """An agent type that is offered as a NATS service: from `offer_service`."""

    def __init__(
        self,
        runtime: NatsAgentRuntime,
        agent_type: str,
        *,
        subject: str,
        request: JsonType,
        response: JsonType,
        name: str,
        version: str,
        description: str,
        queue: str,
        timeout: float,
        key: Key,
        metadata: Mapping[str, str],
    ) -> None:
        self.id: str = NUID().next().decode()
        """The id of this instance of the service."""
        self.name: str = name
        self.subject: str = subject
        self._runtime = runtime
        self._agent_type = agent_type
        self._request = request
        self._response = response
        self._version = version
        self._description = description
        self._queue = queue
        self._timeout = timeout
        self._key = key
        self._metadata = dict(metadata)
        self._schemas = {
            "request_schema": json.dumps(request.schema("validation")),
            "response_schema": json.dumps(response.schema("serialization")),
        }
        self._stats = _Stats()
        self._subscriptions: list[PlainSubscription] = []

    async def start(self) -> None:
        """Take requests, and answer the questions of the service protocol. `offer_service` calls it."""
        subscribe = self._runtime.subscribe_plain
        try:
            self._subscriptions.append(await subscribe(self.subject, self._serve, queue=self._queue))
            for verb in _VERBS:
                for end in ("", f".{self.name}", f".{self.name}.{self.id}"):
                    told = await subscribe(f"$SRV.{verb}{end}", self._teller(verb), optional=True)
                    self._subscriptions.append(told)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Take no more requests. Those that were taken are answered. Has no effect if it is stopped."""
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await subscription.unsubscribe()

    # -- requests ----------------------------------------------------------------------------------------------------

    async def _serve(self, message: PlainMessage) -> None:
        began, failure = time.perf_counter_ns(), ""
        context = tracing.attach(extract(message.headers))
        try:
            if self._is_for_stream(message):
                await self._stream(message)
            else:
                await self._answer(message)
        except Exception as error:
            failure = await self._refuse(message, error)
        except asyncio.CancelledError as error:
            if not _is_cancelled():
                failure = await self._refuse(message, error)
            else:  # the runtime stops, and does not wait any longer
                stopped = WorkerStopped(self.subject, self._runtime.worker_id or self.name)
                failure = await self._refuse(message, stopped)
                raise
        finally:
            tracing.detach(context)
            self._stats.requests += 1
            self._stats.busy_ns += time.perf_counter_ns() - began
            if failure:
                self._stats.errors += 1
                self._stats.last_error = failure

    def _is_for_stream(self, message: PlainMessage) -> bool:
        """True for a request for a stream. Raises `CannotDecode`: its sender may wait for an end that does not come."""
        wanted = message.headers.get(STREAM_HEADER)
        if wanted not in (None, "1"):
            raise CannotDecode(f"a request on {self.subject}", f"its header {STREAM_HEADER} must be 1")
        return wanted is not None and bool(message.reply)

    def _call(self, message: PlainMessage) -> tuple[Any, AgentId]:
        """The message and the agent of a request. Raises `CannotDecode`, and what ``key`` raises."""
        request = self._request.decode(message.payload, f"a request on {self.subject}")
        return request, AgentId(self._agent_type, self._key(message))

    async def _answer(self, message: PlainMessage) -> None:
        request, agent = self._call(message)
        reply = await self._runtime.send_message(request, agent, timeout=self._timeout)
        if message.reply:
            await message.respond(self._response.encode(reply))

    async def _stream(self, message: PlainMessage) -> None:
        """Answer with each item that the handler sends, and an empty message as the end."""
        request, agent = self._call(message)
        count, limit = 0, asyncio.timeout(self._timeout)
        try:
            async with limit, self._runtime.stream_message(request, agent) as stream:
                async for item in stream:
                    payload = self._response.encode(item)
                    count += 1
                    await message.respond(payload, headers={PART_HEADER: str(count)})
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                raise
            if isinstance(error, TimeoutError) and limit.expired():
                error = CallTimeout(str(agent), self._timeout, "timeout")
            raise _Broken(count, error) from None
        await message.respond(b"", headers={PARTS_HEADER: str(count)})

    async def _refuse(self, message: PlainMessage, error: BaseException) -> str:
        """Answer with an error. Returns what the statistics say of it: code and class. Its text is for its client."""
        more: dict[str, str] = {}
        if isinstance(error, _Broken):
            more, error = {PARTS_HEADER: str(error.count)}, error.reason
        code, text = _described(error)
        failure = f"{code}: {_kind(error)}"
        if not message.reply:
            logger.warning(
                "a message on %s, which wants no reply, could not be handled: %s", self.subject, _kind(error)
            )
            return failure
        try:
            await message.respond(b"", headers={SERVICE_ERROR: text, SERVICE_ERROR_CODE: str(code), **more})
        except NatsrtError as unsent:
            logger.warning("a request on %s could not be answered: %s", self.subject, unsent)
        return failure

    # -- the service protocol ----------------------------------------------------------------------------------------

    def _teller(self, verb: str) -> PlainHandler:
        async def tell(message: PlainMessage) -> None:
            if message.reply:
                await message.respond(json.dumps(self.response(verb)).encode())

        return tell

    def response(self, verb: str) -> dict[str, Any]:
        """The answer to ``PING``, ``INFO`` or ``STATS`` (ADR-32)."""
        answer: dict[str, Any] = {
            "type": _KIND.format(verb.lower()),
            "name": self.name,
            "id": self.id,
            "version": self._version,
            "metadata": self._metadata,
        }
        if verb == "PING":
            return answer
        endpoint: dict[str, Any] = {"name": self.name, "subject": self.subject, "queue_group": self._queue}
        if verb == "STATS":
            return answer | {"started": self._stats.started, "endpoints": [endpoint | self._stats.report()]}
        return answer | {"description": self._description, "endpoints": [endpoint | {"metadata": self._schemas}]}


def key_in_header(message: PlainMessage) -> str:
    """The key of the agent for a request: its header ``Natsrt-Key``, else ``default``."""
    return message.headers.get(KEY_HEADER, "default")


async def offer_service(
    runtime: NatsAgentRuntime,
    agent_type: str | AgentType,
    *,
    subject: str,
    request_type: Any,
    response_type: Any,
    name: str | None = None,
    version: str = "1.0.0",
    description: str = "",
    queue: str = "q",
    timeout: float = 60.0,
    key: Key = key_in_header,
    metadata: Mapping[str, str] | None = None,
) -> OfferedService:
    """Offer an agent type as a NATS service: requests on ``subject``, with plain JSON, become calls to its agents.

    The service is offered from the start of the runtime to its stop, which answers the requests that were taken. The
    agent type may be hosted by any worker. Several processes can offer the same service: each request goes to one.

    A request with the header ``Natsrt-Stream`` is answered with each item of the handler, numbered in ``Natsrt-Part``,
    and an empty message with their number in ``Natsrt-Parts``. What an agent raises is answered with the headers of
    services, ``Nats-Service-Error`` and ``Nats-Service-Error-Code``.

    Args:
        runtime: The runtime that takes the requests.
        agent_type: The agent type that handles them.
        subject: The subject, as it is: without the namespace. It may have wildcards.
        request_type: The type of the requests, which the agents handle: a dataclass, a Pydantic model, a plain type;
            ``bytes`` for requests that are no JSON.
        response_type: The type of the replies. A union, if there are several; None if handlers return nothing.
        name: The name of the service, and of its endpoint: letters, digits, ``_`` and ``-``. None: the agent type, with
            ``_`` for other characters.
        version: The version of the service, such as ``1.0.0``.
        description: What the service does.
        queue: The queue group of its subscription. The default is that of NATS services.
        timeout: Seconds for which a request may take, with all items of a stream.
        key: Returns the key of the agent for a request. The default is the header ``Natsrt-Key``, or else ``default``.
        metadata: Metadata of the service: texts.

    Returns:
        The service. Its ``stop`` ends it before the runtime does.

    Raises:
        TypeError: A type has no JSON or no JSON schema, or the description or the metadata are no texts.
        ValueError: An argument is not valid, or the subject can match one of natsrt, an inbox, or one of the server.
        PermissionDenied: This user may not subscribe to the subject. Before the start, it is the start that raises it.
    """
    agent_type = agent_type.type if isinstance(agent_type, AgentType) else AgentId(agent_type, "default").type
    checked_service_subject(subject, runtime.options)
    _check_queue(queue)
    name = re.sub(r"[^A-Za-z0-9_-]", "_", agent_type) if name is None else name
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(f"name must be letters, digits, _ and -, not {name!r:.60}")
    if not (isinstance(version, str) and _VERSION.fullmatch(version)):
        raise ValueError(f"version must be a semantic version such as 1.0.0, not {version!r:.60}")
    if not isinstance(description, str):
        raise TypeError(f"description must be a text, not {description!r:.60}")
    if not callable(key):
        raise TypeError(f"key must be a function of the request, which returns the key, not {key!r:.60}")
    request, response = JsonType(request_type, "request_type"), JsonType(response_type, "response_type")
    service = OfferedService(
        runtime,
        agent_type,
        subject=subject,
        request=request,
        response=response,
        name=name,
        version=version,
        description=description,
        queue=queue,
        timeout=checked_timeout(timeout),
        key=key,
        metadata=_checked_metadata(metadata),
    )
    runtime.add_message_type(*response.message_classes)
    await service.start()
    return service


def _check_queue(queue: str) -> None:
    """Raise ValueError if ``queue`` is no name of a queue group, which consists of tokens as a subject does."""
    try:
        checked_subject(queue)
    except ValueError:
        raise ValueError(
            f"queue must be the name of a queue group, without white space and wildcards, not {queue!r:.60}"
        ) from None


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """A copy of ``metadata``, if clients of any language can read it: ADR-32 has texts only. Raises TypeError."""
    if not isinstance(metadata, Mapping | None):
        raise TypeError(f"metadata must be a mapping of texts to texts, not {metadata!r:.60}")
    for name, value in (metadata or {}).items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise TypeError(f"metadata must have texts as names and values, not {name!r:.60}: {value!r:.60}")
    return dict(metadata or {})


def _is_cancelled() -> bool:
    """True if the present task was cancelled; False if an agent raised CancelledError by itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _described(error: BaseException) -> tuple[int, str]:
    """The code and the description of an error, for headers.

    The description has the first line of the text only: further ones may be a traceback, with the paths of files.
    """
    if isinstance(error, asyncio.CancelledError):
        return _CANCELLED, f"{_kind(error)}: the agent cancelled the call"
    code = error.code if isinstance(error, NatsrtError) else 504 if isinstance(error, TimeoutError) else 500
    lines = str(error).strip().splitlines()
    return code, header_text(f"{_kind(error)}: {lines[0]}" if lines else _kind(error))


def _kind(error: BaseException) -> str:
    return type(error).__name__
