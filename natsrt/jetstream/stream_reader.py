"""Reading streams: their messages in pages, and their state. It needs no consumer, and changes nothing.

A page is one batch of direct gets. A server may end a batch early, so the next page begins after the last message of
the one before, until nothing is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import nats.errors
import nats.js.errors
import orjson
from nats.aio.msg import Msg
from nats.js import api

from natsrt.errors import CannotDecode, JetStreamRequired, NatsrtError, StreamUnavailable
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.requests import NO_JETSTREAM, NO_STREAM, READ, WRITE
from natsrt.options import Options
from natsrt.transport.connection import Connection, Refusal
from natsrt.transport.inbox import is_nobody
from natsrt.wire.times import known_seconds, rfc3339, seconds_of, utc

PAGE: Final = 256
"""Messages of a page."""
_PAGE_BYTES: Final = 4 * 1024 * 1024
"""Bytes of a page; a larger message is a page of its own."""
_ONE_ANSWER: Final = 3.0
"""Seconds until the next message of a page, or an answer, beside the round trip."""
_NO_MESSAGE: Final = (10037, 10043, 10057)
"""JetStream's error codes for a message that does not exist."""
_LAST_SEQUENCE: Final = 2**64 - 1
"""The last sequence that a message can have."""
_NO_CONSUMER: Final = 10014
"""JetStream's error code for a consumer that does not exist."""
_ABOUT: Final = ("nats-sequence", "nats-stream", "nats-subject", "nats-time-stamp", "nats-num-pending")
"""The headers, in lower case, that the server adds to a message that it reads."""
_LAST: Final = "nats-last-sequence"
_SILENT: Final = "JetStream does not answer"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMessage:
    """A message as a stream has stored it. ``stored_at`` is when, in seconds since the epoch."""

    stream: str
    sequence: int
    stored_at: float
    subject: str
    headers: Mapping[str, str]
    data: bytes


class StreamReader:
    """Reads the streams of one account or domain.

    All methods raise `StreamUnavailable`, `JetStreamRequired`, `PermissionDenied` and `CannotDecode`.
    """

    def __init__(self, connection: Connection, options: Options) -> None:
        self._connection = connection
        self._domain = Domain(options.jetstream_domain)
        self._running: dict[asyncio.Timeout, str] = {}
        """The time limits of the requests under way, and the streams that they concern."""
        self._refusals: dict[asyncio.Timeout, Refusal] = {}
        connection.on_denied(self._on_denied)

    def _on_denied(self, denied: Refusal) -> bool:
        """Requests that the server refuses get no answer: they end at once, with its refusal."""
        tokens = denied.subject.split(".")
        concerned = [limit for limit, stream in self._running.items() if stream in tokens]
        for limit in concerned:
            self._refusals[limit] = denied
            limit.reschedule(asyncio.get_running_loop().time())
        return bool(concerned)

    async def info(self, stream: str, subjects: str | None = None) -> api.StreamInfo | None:
        """The stream's configuration and state; None if there is no such stream. ``subjects``: count the messages on
        each subject that this pattern matches."""
        js = self._connection.jetstream
        return await self._ask(READ, stream, lambda: js.stream_info(stream, subjects_filter=subjects))

    async def consumers(self, stream: str) -> list[dict[str, Any]]:
        """JetStream's descriptions of all consumers of the stream. Empty if there is no such stream."""
        found: list[dict[str, Any]] = []
        while True:
            body = {"offset": len(found)}
            answer = await self._request(READ, stream, f"CONSUMER.LIST.{stream}", body)
            page = [] if answer is None else answer.get("consumers") or []
            found += page
            if answer is None or not page or len(found) >= answer.get("total", 0):
                return found

    async def consumer(self, stream: str, name: str) -> dict[str, Any] | None:
        """JetStream's description of a consumer of the stream; None if there is none."""
        return await self._request(READ, stream, f"CONSUMER.INFO.{stream}.{name}", {})

    async def delete(self, stream: str, sequence: int) -> bool:
        """Delete a message. Returns False if it does not exist."""
        body = {"seq": sequence, "no_erase": True}
        return await self._request(WRITE, stream, f"STREAM.MSG.DELETE.{stream}", body) is not None

    async def message(self, stream: str, sequence: int) -> StoredMessage | None:
        """One message; None if it does not exist."""
        if sequence > _LAST_SEQUENCE:
            return None
        page, _ = await self._page(stream, {"seq": sequence, "batch": 1})
        return page[0] if page and page[0].sequence == sequence else None

    async def last(self, stream: str, subject: str) -> StoredMessage | None:
        """The last message on ``subject``, which has no wildcards; None if there is none.

        A stream that does not exist is `StreamUnavailable`, because one without a leader looks the same.
        """
        return await self._ask(READ, stream, lambda: self._last(stream, subject))

    async def _last(self, stream: str, subject: str) -> StoredMessage:
        timeout = _ONE_ANSWER + self._connection.rtt.allowance
        request = self._domain.api(f"DIRECT.GET.{stream}.{subject}")
        try:
            message = await self._connection.client.request(request, b"", timeout=timeout)
        except nats.errors.NoRespondersError:
            raise StreamUnavailable(READ, stream, "there is no such stream, or it has no leader now") from None
        headers = {name.lower(): value for name, value in (message.headers or {}).items()}
        if "status" in headers:
            raise nats.js.errors.NotFoundError(code=404, err_code=_NO_MESSAGE[0])
        return _stored(stream, message, headers)

    async def read(
        self, stream: str, subject: str, *, first: int = 1, since: float | None = None, last: int | None = None
    ) -> AsyncGenerator[StoredMessage, None]:
        """The messages on ``subject``, which may have wildcards, in their order.

        From the sequence ``first`` on, or from the time ``since`` on, in seconds since the epoch, if it is given; up to
        the sequence ``last``. None: up to the end.
        """
        wanted: dict[str, Any] = {"batch": PAGE, "max_bytes": _PAGE_BYTES, "next_by_subj": subject}
        wanted |= {"seq": first} if since is None else {"start_time": rfc3339(utc(known_seconds(since)))}
        while True:
            page, more = await self._page(stream, wanted)
            for message in page:
                if last is not None and message.sequence > last:
                    return
                yield message
            if not page or not more:
                return
            wanted.pop("start_time", None)
            wanted["seq"] = page[-1].sequence + 1

    async def _page(self, stream: str, wanted: dict[str, Any]) -> tuple[list[StoredMessage], bool]:
        """The messages that answer one direct request, and whether there may be more."""
        return await self._ask(READ, stream, lambda: self.batch(stream, wanted)) or ([], False)

    async def batch(self, stream: str, wanted: dict[str, Any]) -> tuple[list[StoredMessage], bool]:
        """The messages that answer one direct request, and whether there may be more. One attempt.

        Raises what nats-py raises: ``NotFoundError`` if there is no such stream, or it has no leader.
        """
        answers: asyncio.Queue[Msg] = asyncio.Queue()
        client = self._connection.client
        found: list[StoredMessage] = []
        inbox = await self._connection.subscribe(client.new_inbox(), answers.put_nowait)
        try:
            request = self._domain.api(f"DIRECT.GET.{stream}")
            await client.publish(request, orjson.dumps(wanted), inbox.subject)
            while True:
                async with asyncio.timeout(_ONE_ANSWER + self._connection.rtt.allowance):
                    message = await answers.get()
                if is_nobody(message):
                    raise nats.js.errors.NotFoundError(code=404, err_code=NO_STREAM)
                headers = {name.lower(): value for name, value in (message.headers or {}).items()}
                if "status" in headers:
                    return found, headers.get("nats-num-pending", "0") != "0"
                found.append(_stored(stream, message, headers))
                if wanted["batch"] == 1:
                    return found, True
        finally:
            await self._connection.unsubscribe(inbox)

    async def _request(self, operation: str, stream: str, request: str, body: object) -> dict[str, Any] | None:
        """The answer to a request; None if what it is about does not exist."""

        async def attempt() -> dict[str, Any]:
            timeout = _ONE_ANSWER + self._connection.rtt.allowance
            subject, client = self._domain.api(request), self._connection.client
            message = await client.request(subject, orjson.dumps(body), timeout=timeout)
            answer = orjson.loads(message.data)
            if not isinstance(answer, dict):
                raise ValueError("no JSON object")
            if "error" in answer:
                raise nats.js.errors.APIError.from_error(answer["error"])
            return answer

        return await self._ask(operation, stream, attempt)

    async def _ask(self, operation: str, stream: str, attempt: Callable[[], Awaitable[T]]) -> T | None:
        """Run one request. Returns None if what it is about does not exist."""
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._running[limit] = stream
                return await attempt()
        except NatsrtError:  # some are an OSError too
            raise
        except nats.js.errors.APIError as error:
            if error.err_code in (NO_STREAM, _NO_CONSUMER, *_NO_MESSAGE):
                return None
            if error.err_code in NO_JETSTREAM:
                raise JetStreamRequired(self._connection.server) from None
            raise StreamUnavailable(operation, stream, error.description or str(error)) from error
        except (nats.errors.Error, OSError, TimeoutError) as error:
            if (denied := self._refusals.get(limit)) is not None:
                raise denied from None
            lost = not self._connection.connected
            raise StreamUnavailable(operation, stream, "the connection is lost" if lost else _SILENT) from error
        except (KeyError, TypeError, ValueError) as error:
            raise CannotDecode("an answer of JetStream", repr(error), b"") from None
        finally:
            self._running.pop(limit, None)
            self._refusals.pop(limit, None)


def _stored(stream: str, message: Msg, headers: Mapping[str, str]) -> StoredMessage:
    return StoredMessage(
        stream=stream,
        sequence=int(headers["nats-sequence"]),
        stored_at=seconds_of(headers["nats-time-stamp"]),
        subject=headers["nats-subject"],
        headers={
            name: value
            for name, value in (message.headers or {}).items()
            if name.lower() not in _ABOUT and name.lower() != _LAST
        },
        data=message.data,
    )
