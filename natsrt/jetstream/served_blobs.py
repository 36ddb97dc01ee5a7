"""Blobs as workers store, read and delete them for runtimes that may send nothing to JetStream.

Whoever may send it any request, or may publish to a subject of a stream, can have its answer delivered to any subject,
and so write to every stream of the account. So callers get no such permission: they ask on ``natsrt.blobs``.
`natsrt.hosting.blob_answers` is the other side. An id cannot be guessed, so whoever knows one may read the blob.
"""

from __future__ import annotations

from typing import Any, Final

import nats.errors
import orjson
from nats.aio.msg import Msg

from natsrt.errors import CannotDecode, JetStreamFull
from natsrt.jetstream.blob_stream import CHUNK_WITHIN
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.failures import ErrorTypes, decode_answer
from natsrt.wire.subjects import Subjects

OPEN: Final = "open"
READ: Final = "read"
DELETE: Final = "delete"
WANTS: Final = (OPEN, READ, DELETE)
BLOB_HEADER: Final = "Natsrt-Blob"
"""Header of a request that is a chunk itself, to be stored, with the id of its blob."""
CHUNK_HEADER: Final = "Natsrt-Chunk"
"""Header of such a request, and of an answer that is a chunk itself, with its number."""
TTL_HEADER: Final = "Natsrt-TTL"
"""Header of such a request, with the whole seconds for which the chunk is to be stored."""
MISSING: Final = "missing"
"""In the data of an answer: the chunk is not there."""


_ERRORS: Final = ErrorTypes()


class _Refused(nats.errors.Error):
    """A worker did not do what it was asked, for the reason in its text; another one may."""


class ServedBlobs:
    """Has workers store, read and delete chunks. Implements `ChunkSource`."""

    def __init__(self, connection: Connection, subjects: Subjects) -> None:
        self._connection = connection
        self.subject: str = subjects.blobs

    async def ensure(self) -> str:
        return str((await self._told({"want": OPEN})).get("created"))

    async def write(self, blob_id: str, chunk: int, data: bytes, ttl: float) -> None:
        headers = {BLOB_HEADER: blob_id, CHUNK_HEADER: str(chunk), TTL_HEADER: str(max(1, round(ttl)))}
        self._connection.check_size(data, headers)
        _data(await self._request(data, headers))

    async def read(self, blob_id: str, chunk: int) -> bytes | None:
        answer = await self._ask({"want": READ, "id": blob_id, "chunk": chunk})
        if answer.headers is not None and answer.headers.get(CHUNK_HEADER) == str(chunk):
            return answer.data
        if not _data(answer).get(MISSING):
            raise CannotDecode("a worker's answer about a blob", "it is no chunk")
        return None

    async def delete(self, blob_id: str) -> None:
        await self._told({"want": DELETE, "id": blob_id})

    async def _told(self, question: dict[str, Any]) -> dict[str, Any]:
        return _data(await self._ask(question))

    async def _ask(self, question: dict[str, Any]) -> Msg:
        return await self._request(
            envelope.encode(envelope.BLOBS, '"id":"question","source":"/"', orjson.dumps(question))
        )

    async def _request(self, body: bytes, headers: dict[str, str] | None = None) -> Msg:
        timeout = CHUNK_WITHIN + self._connection.rtt.allowance
        try:
            return await self._connection.client.request(self.subject, body, timeout=timeout, headers=headers)
        except nats.errors.NoRespondersError:
            raise _Refused(
                f"nobody answers on {self.subject}: no worker that can read payloads by reference is alive, and this "
                "user may send no requests to JetStream (docs/permissions.md)"
            ) from None


def _data(answer: Msg) -> dict[str, Any]:
    """The data of an answer. Raises `JetStreamFull`, `_Refused`, and `CannotDecode`."""
    body = decode_answer(answer.headers, answer.data)
    data = None if body is None else body.json()
    if body is None or not isinstance(data, dict):
        raise CannotDecode("a worker's answer about a blob", "it is no envelope with an object")
    if body.type != envelope.REPLY:
        error = _ERRORS.rebuild(body.payload, agent=None, worker_id=None)
        if isinstance(error, JetStreamFull):
            raise error
        raise _Refused(f"the worker that was asked says: {data.get('message')}")
    return data
