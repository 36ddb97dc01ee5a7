"""Requests to JetStream about the consumers of one stream, whose failures become natsrt's errors."""

from __future__ import annotations

import asyncio
import datetime
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import nats.errors
import nats.js.errors
import orjson
from nats.aio.msg import Msg

from natsrt.errors import CannotDecode, JetStreamRequired, NatsrtError, StreamUnavailable
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.limits import CONSUMERS, limit_reached
from natsrt.jetstream.requests import NO_JETSTREAM, NO_STREAM
from natsrt.transport.connection import Connection, Refusal
from natsrt.wire.filters import widest
from natsrt.wire.times import known, rfc3339

START_ALL: Final = "all"
START_NOW: Final = "now"
Start = Literal["all", "now"] | int | datetime.datetime
"""Where a new consumer begins: with all that is stored, with what is stored from now on, with a sequence, or with what
was stored at a time or later. A time without a zone is local time."""

_UNDER_WAY: Final = "2200-01-01T00:00:00Z"
"""Until when a consumer is paused while it is made. An operator's pause has another time."""
_START: Final = "natsrt_start"
"""The key in a consumer's metadata with the first sequence that it is to deliver."""
_NO_CONSUMER: Final = 10014
"""JetStream's error code for a consumer that does not exist."""
_EXISTS: Final = 10148
"""JetStream's error code for a consumer that exists with another configuration."""
_WRONG_CONFIG: Final = 10012
"""JetStream's error code for a consumer that it does not make or change so. Its HTTP-like code is 500 nevertheless."""
_NO_MESSAGE: Final = 10037
"""JetStream's error code for a message that does not exist."""
_NOT_FOUND: Final = "404"
"""The status of a direct read of a message that does not exist."""
_SUBJECT: Final = "Nats-Subject"
"""Header of what was read directly: the message's subject."""
_SECOND: Final = 1_000_000_000
"""Nanoseconds, as JetStream has its durations."""
_ONE_REQUEST: Final = 2.0
"""Seconds within which one request is answered, beside the round trip."""
_RESETS_SINCE: Final = (2, 14)
"""The first version of nats-server that resets consumers."""
SILENT: Final = "JetStream does not answer"
"""The reason if there was no answer at all."""


@dataclass(frozen=True, kw_only=True)
class ConsumerConfig:
    """A durable pull consumer with explicit acknowledgements.

    ``name``: its durable name. ``filter_subjects``: which messages of the stream it delivers, as patterns that do not
    overlap; empty: all. ``ack_wait``: seconds after which a message that was not acknowledged is delivered again.
    ``max_ack_pending``: how many messages may wait for their acknowledgements, over all that pull. ``max_deliver``: how
    often a message is delivered; -1 has no limit. ``keeps_filters``: other filters that the consumer has stay, because
    clients that share it add theirs. ``description`` is for people. ``more``: further fields of a
    consumer's configuration, under JetStream's names.
    """

    name: str
    filter_subjects: tuple[str, ...] = ()
    ack_wait: float = 30.0
    max_ack_pending: int = 10_000
    max_deliver: int = -1
    keeps_filters: bool = False
    description: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        """As a request to JetStream has it."""
        config: dict[str, Any] = {
            "durable_name": self.name,
            "ack_policy": "explicit",
            "deliver_policy": "all",
            "ack_wait": int(self.ack_wait * _SECOND),
            "max_ack_pending": self.max_ack_pending,
            "max_deliver": self.max_deliver,
            **self.more,
        }
        if self.filter_subjects:
            config["filter_subjects"] = list(self.filter_subjects)
        if self.description:
            config["description"] = self.description
        return config

    def filters_with(self, has: dict[str, Any]) -> tuple[str, ...]:
        """The filters that the consumer must have. ``has`` is its configuration as JetStream describes it."""
        if not (self.keeps_filters and self.filter_subjects):
            return self.filter_subjects
        return widest([*self.filter_subjects, *(has.get("filter_subjects") or ())])

    def differs(self, answer: dict[str, Any]) -> bool:
        """Whether the consumer is configured otherwise. ``answer`` is JetStream's description of it."""
        has, wanted = answer["config"], self.request()
        wanted.pop("filter_subjects", None)
        metadata, has_metadata = wanted.pop("metadata", {}), has.get("metadata") or {}
        if any(has_metadata.get(name) != value for name, value in metadata.items()):
            return True
        if sorted(has.get("filter_subjects") or ()) != sorted(self.filters_with(has)):
            return True
        return any(has.get(name) != value for name, value in wanted.items())


class Consumers:
    """Makes requests about the consumers of ``stream``, each once.

    All methods raise `StreamUnavailable`, `JetStreamRequired`, `PermissionDenied` and `ServerUnreachable`, and
    `CannotDecode` for an answer that is not JetStream's.
    """

    def __init__(self, connection: Connection, domain: Domain, stream: str) -> None:
        self._connection = connection
        self._domain = domain
        self._stream = stream
        self._denied: Refusal | None = None
        self._limit: asyncio.Timeout | None = None
        """The time limit of the request that is under way; None if none is."""

    def deny(self, refusal: Refusal) -> None:
        """The server refuses something that concerns the stream: the request that is under way fails with that."""
        self._denied = refusal
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time())

    async def info(self, consumer: str) -> dict[str, Any] | None:
        """JetStream's description of the consumer; None if it does not exist."""
        answer = await self._ask("read", f"CONSUMER.INFO.{self._stream}.{consumer}", b"", _NO_CONSUMER)
        return None if "error" in answer else answer

    async def state(self) -> tuple[str, int]:
        """When the stream was made, as the server has it, and the sequence of its last message; 0 if there was none."""
        answer = await self._ask("read", f"STREAM.INFO.{self._stream}", b"")
        try:
            return str(answer["created"]), int(answer["state"]["last_seq"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._unavailable("read", f"the server's answer cannot be read: {error!r}") from None

    async def first_sequence(self, start: Start) -> int:
        """The first sequence from which a consumer delivers that starts at ``start``; at most that of the next
        message."""
        if start == START_ALL:
            return 1
        if isinstance(start, datetime.datetime):
            wanted = {"start_time": rfc3339(known(start))}
            answer = await self._ask("read", f"STREAM.MSG.GET.{self._stream}", wanted, _NO_MESSAGE)
            if "error" not in answer:
                return int(answer["message"]["seq"])
            start = START_NOW
        _, last = await self.state()
        return last + 1 if start == START_NOW else max(1, min(int(start), last + 1))

    async def make(self, config: ConsumerConfig, first: int) -> dict[str, Any]:
        """Make the consumer so that it begins with the sequence ``first``. Returns JetStream's description of it.

        Where it exists, or another client makes it at the same moment, it is left as it is. It can be reset to any
        sequence later, because it is not made with ``first``, but reset to it.
        """
        wanted = config.request()
        if first > 1:
            metadata = {**wanted.get("metadata", {}), _START: str(first)}
            wanted |= {"pause_until": _UNDER_WAY, "metadata": metadata}
        answer = await self._create(config, "create", wanted, _EXISTS)
        if "error" in answer:
            answer = await self._described(config.name)
        return await self.finish(answer)

    @staticmethod
    def is_under_way(answer: dict[str, Any]) -> bool:
        """Whether making the consumer is not finished. ``answer`` is its description."""
        return bool(answer["config"].get("pause_until") == _UNDER_WAY)

    async def finish(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Finish making a consumer if that is not done: reset it to its start, and let it deliver. Returns its
        description.
        """
        if not self.is_under_way(answer):
            return answer
        config = answer["config"]
        name = config["durable_name"]
        await self.reset(name, int(config.get("metadata", {}).get(_START, "1")))
        await self._ask("write to", f"CONSUMER.PAUSE.{self._stream}.{name}", {})
        return await self._described(name)

    async def _described(self, consumer: str) -> dict[str, Any]:
        """Its description. Raises `StreamUnavailable` also if it does not exist."""
        answer = await self.info(consumer)
        if answer is None:
            raise self._unavailable("read", f"its consumer {consumer} was deleted at this moment", passing=True)
        return answer

    async def update(self, config: ConsumerConfig, answer: dict[str, Any]) -> dict[str, Any]:
        """Change the consumer's configuration. ``answer`` is its description. Returns the new one."""
        wanted = config.request()
        if filters := config.filters_with(answer["config"]):
            wanted["filter_subjects"] = list(filters)
        if metadata := answer["config"].get("metadata"):
            wanted["metadata"] = metadata | wanted.get("metadata", {})
        return await self._create(config, "update", wanted)

    async def reset(self, consumer: str, first: int) -> None:
        """Let the consumer deliver again from the sequence ``first``. Counts of deliveries begin again with 1."""
        try:
            await self._ask("write to", f"CONSUMER.RESET.{self._stream}.{consumer}", {"seq": first})
        except StreamUnavailable as error:
            version = self._connection.client.connected_server_version
            if error.reason != SILENT or (version.major, version.minor) >= _RESETS_SINCE:
                raise
            reason = f"resetting a consumer needs nats-server 2.14, and {self._connection.server} is {version.major}."
            raise self._unavailable("write to", f"{reason}{version.minor}") from None

    async def unpin(self, consumer: str, group: str) -> None:
        """Let the server pin another client of a priority group."""
        await self._ask("write to", f"CONSUMER.UNPIN.{self._stream}.{consumer}", {"group": group})

    async def message(self, sequence: int) -> Msg | None:
        """Read a message of the stream, which must allow direct reads. None: it does not have the message any more."""
        return await self._read({"seq": sequence})

    async def next_message(self, subject: str, first: int) -> Msg | None:
        """Read the first message on ``subject``, which may have wildcards, from the sequence ``first`` on. None: there
        is none. The stream must allow direct reads."""
        return await self._read({"next_by_subj": subject, "seq": first})

    async def _read(self, wanted: dict[str, Any]) -> Msg | None:
        request, timeout = self._domain.api(f"DIRECT.GET.{self._stream}"), _ONE_REQUEST + self._connection.rtt.allowance
        try:
            message = await self._connection.client.request(request, orjson.dumps(wanted), timeout=timeout)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise self._unavailable("read", str(error) or SILENT, passing=True) from error
        headers = message.headers or {}
        if headers.get("Status") == _NOT_FOUND:
            return None
        if _SUBJECT not in headers:
            raise self._unavailable("read", f"the server says {headers.get('Description')!r}", passing=True)
        message.subject = headers[_SUBJECT]
        return message

    async def _create(
        self, config: ConsumerConfig, action: str, wanted: dict[str, Any], *expected: int
    ) -> dict[str, Any]:
        body = {"stream_name": self._stream, "config": wanted, "action": action}
        return await self._ask("write to", f"CONSUMER.CREATE.{self._stream}.{config.name}", body, *expected)

    async def _ask(self, operation: str, request: str, body: object, *expected: int) -> dict[str, Any]:
        """Make a request. An answer with one of the ``expected`` error codes is returned, and all others are raised."""
        timeout = _ONE_REQUEST + self._connection.rtt.allowance
        payload = body if isinstance(body, bytes) else orjson.dumps(body)
        self._denied = None
        try:
            async with asyncio.timeout(timeout) as self._limit:
                message = await self._connection.client.request(self._domain.api(request), payload, timeout=timeout)
            answer = orjson.loads(message.data)
            if not isinstance(answer, dict):
                raise ValueError("no JSON object")
        except NatsrtError:  # some are an OSError too
            raise
        except (nats.errors.Error, OSError, TimeoutError) as error:
            if self._denied is not None:
                raise self._denied from None
            lost = not self._connection.connected
            reason = "the connection is lost" if lost else SILENT
            raise self._unavailable(operation, reason, passing=True) from error
        except ValueError as error:
            raise CannotDecode("an answer of JetStream", str(error), message.data) from None
        finally:
            self._limit = None
        problem = answer.get("error")
        if problem is None or problem.get("err_code") in expected:
            return answer
        raise self._refused(operation, problem)

    def _refused(self, operation: str, problem: dict[str, Any]) -> NatsrtError:
        error = nats.js.errors.APIError(problem.get("code"), problem.get("description"), problem.get("err_code"))
        if error.err_code in NO_JETSTREAM:
            return JetStreamRequired(self._connection.server)
        if error.err_code == NO_STREAM:
            return self._unavailable(operation, "there is no such stream")
        text = error.description or str(error)
        if (limit := limit_reached(error)) is not None:
            text = f"{limit.text} (the server says {error.description!r})"
        lasting = (error.code is not None and error.code < 500) or error.err_code == _WRONG_CONFIG
        passing = not lasting or (limit is not None and limit.name == CONSUMERS)
        return self._unavailable(operation, text, passing=passing)

    def _unavailable(self, operation: str, reason: str, *, passing: bool = False) -> StreamUnavailable:
        return StreamUnavailable(operation, self._stream, reason, passing=passing)
