"""Stores, reads and deletes blobs for callers: they may send nothing to JetStream.

All runtimes that may do so answer. They are one queue group. A chunk goes through the worker, which publishes it with
its own permissions: an answer of JetStream itself, or an acknowledgement, would go to any subject that a caller names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import nats.errors
import orjson
from nats.aio.msg import Msg

from natsrt.agents.inbound import Answer
from natsrt.errors import CannotDecode, NatsrtError, StreamUnavailable
from natsrt.hosting.answers import Answers
from natsrt.hosting.reply_subjects import ReplySubjects
from natsrt.hosting.service_answers import ServiceAnswers
from natsrt.jetstream.blobs import Blobs
from natsrt.jetstream.registry.registry import Registry
from natsrt.jetstream.served_blobs import (
    BLOB_HEADER,
    CHUNK_HEADER,
    DELETE,
    MISSING,
    OPEN,
    READ,
    TTL_HEADER,
    WANTS,
)
from natsrt.jetstream.streams import BLOBS
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.references import is_blob_id, is_number
from natsrt.wire.subjects import Subjects

_QUESTION = "a question about a blob"


class BlobAnswers(ServiceAnswers):
    """Answers the questions on ``natsrt.blobs`` that reach one runtime."""

    def __init__(
        self,
        *,
        connection: Connection,
        subjects: Subjects,
        registry: Registry,
        blobs: Blobs,
        options: Options,
        answers: Answers,
        reply_subjects: ReplySubjects,
    ) -> None:
        super().__init__(
            connection, _QUESTION, (subjects.blobs,), registry=registry, answers=answers, reply_subjects=reply_subjects
        )
        self._name = subjects.bucket(BLOBS)
        self._blobs = blobs
        self._max_ttl = options.blob_ttl

    async def _answer_to(self, message: Msg) -> Answer:
        try:
            return await self._done(message)
        except NatsrtError:  # some are an OSError or a TimeoutError too
            raise
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise StreamUnavailable("use", self._name, str(error) or type(error).__name__) from error

    async def _done(self, message: Msg) -> Answer:
        """Do what a message asks for, and return the answer."""
        if self._is_asked_too_much:
            raise StreamUnavailable("use", self._name, "this worker is asked too much")
        stream = self._blobs.stream
        if message.headers is not None and BLOB_HEADER in message.headers:
            blob_id, chunk, ttl = _chunk(message.headers)
            await self._blobs.write(blob_id, chunk, message.data, min(ttl, self._max_ttl))
            return _reply({})
        question = _question(message)
        want = question["want"]
        if want == OPEN:
            return _reply({"created": await stream.ensure()})
        blob_id = question["id"]
        if want == DELETE:
            await stream.delete(blob_id)
            return _reply({})
        chunk = question["chunk"]
        data = await stream.read(blob_id, chunk)
        return _reply({MISSING: True}) if data is None else Answer(data, {CHUNK_HEADER: str(chunk)})


def _chunk(headers: Mapping[str, str]) -> tuple[str, int, int]:
    """The blob, the number and the time to live of a chunk that is to be stored. Raises `CannotDecode`."""
    blob_id, chunk, ttl = headers[BLOB_HEADER], headers.get(CHUNK_HEADER, ""), headers.get(TTL_HEADER, "")
    if not is_blob_id(blob_id) or not is_number(chunk) or not is_number(ttl):
        raise CannotDecode(_QUESTION, f"{BLOB_HEADER} must be an id, {CHUNK_HEADER} and {TTL_HEADER} numbers")
    return blob_id, int(chunk), int(ttl)


def _question(message: Msg) -> dict[str, Any]:
    """The data of a question, checked. Raises `CannotDecode`."""
    body = envelope.decode(message.data)
    data = None if body is None else body.json()
    if body is None or body.type != envelope.BLOBS or not isinstance(data, dict):
        raise CannotDecode(_QUESTION, f"expected an object in an envelope of type {envelope.BLOBS}")
    want, chunk = data.get("want"), data.get("chunk")
    if want not in WANTS:
        raise CannotDecode(_QUESTION, f"want must be one of {', '.join(WANTS)}")
    if want != OPEN and not is_blob_id(data.get("id")):
        raise CannotDecode(_QUESTION, "id must be the id of a blob")
    if want == READ and not (type(chunk) is int and chunk >= 0):
        raise CannotDecode(_QUESTION, "chunk must be the number of a chunk, from 0")
    return data


def _reply(data: dict[str, Any]) -> Answer:
    return Answer(envelope.encode(envelope.REPLY, '"id":"answer","source":"/"', orjson.dumps(data)))
