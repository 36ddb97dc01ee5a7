"""JetStream without sockets: streams with the semantics on which records of keyed agents depend.

Requests are carried out one after the other. Revisions are those of the stream. A publish that names the last revision
of its subject is refused if that is another one. A request or its answer can be lost or late, so a publish may be
stored although its acknowledgement is lost.
"""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from tests.support.network import NOBODY, Message, Server, matches

_API = "$JS.API."
_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
_CREATED = "2026-01-01T00:00:00Z"
_WRONG_REVISION = {"code": 400, "err_code": 10071, "description": "wrong last sequence"}
_NO_MESSAGE = {"code": 404, "err_code": 10037, "description": "no message found"}
_NO_STREAM = {"code": 404, "err_code": 10059, "description": "stream not found"}


@dataclass(frozen=True, slots=True)
class Stored:
    """A message in a stream. ``follows`` is the revision that it was to follow, None: any; ``before`` is the revision
    that its subject had, 0: none."""

    sequence: int
    message: Message
    follows: int | None
    before: int


@dataclass
class Stream:
    """One stream. ``last`` has the last message of each subject, ``log`` everything that was ever stored."""

    name: str
    subjects: str
    sequence: int = 0
    last: dict[str, Stored] = field(default_factory=dict)
    log: list[Stored] = field(default_factory=list)


class JetStream:
    """The streams of a server. Times are in seconds."""

    def __init__(self, server: Server, rng: random.Random) -> None:
        self.streams: dict[str, Stream] = {}
        self.loss = 0.0
        """The part of requests that is never carried out, as while a leader is elected."""
        self.answer_loss = 0.0
        """The part of answers and acknowledgements that is lost."""
        self.late = 0.0
        """The part of answers that is late, by up to three seconds."""
        self.takes = 0.003
        """How long a request takes at most."""
        self.checks_revisions = True
        """False: messages are stored whatever revision they are to follow."""
        self._server = server
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._last = 0.0
        server.services.append(self)

    def add_bucket(self, name: str, first: int) -> Stream:
        """Make a key-value bucket, whose first revision is ``first``."""
        stream = self.streams[f"KV_{name}"] = Stream(f"KV_{name}", f"$KV.{name}.>", first - 1)
        return stream

    def takes_subject(self, subject: str) -> bool:
        return subject.startswith((_API, "$KV."))

    def take(self, message: Message) -> None:
        if self._rng.random() >= self.loss:
            self._last = max(self._last, self._loop.time() + self._rng.uniform(0, self.takes)) + 1e-7
            self._loop.call_at(self._last, self._carry_out, message)

    def _carry_out(self, message: Message) -> None:
        subject = message.subject
        if subject.startswith(_API):
            payload, headers = self._request(subject[len(_API) :], message.payload)
        else:
            payload, headers = self._store(message), None
        if message.reply and self._rng.random() >= self.answer_loss:
            late = self._rng.uniform(0, 3.0) if self._rng.random() < self.late else 0.0
            answer = Message(message.reply, payload, "", headers)
            self._loop.call_at(self._loop.time() + late, self._server.take, answer)

    def _store(self, message: Message) -> bytes:
        stream = next((one for one in self.streams.values() if matches(one.subjects, message.subject)), None)
        if stream is None:
            return b""
        wanted = (message.headers or {}).get(_EXPECTED)
        follows = None if wanted is None else int(wanted)
        present = stream.last.get(message.subject)
        last = 0 if present is None else present.sequence
        if follows is not None and follows != last and self.checks_revisions:
            return orjson.dumps({"error": _WRONG_REVISION, "stream": stream.name, "seq": 0})
        stream.sequence += 1
        stored = Stored(stream.sequence, message, follows, last)
        stream.last[message.subject] = stored
        stream.log.append(stored)
        return orjson.dumps({"stream": stream.name, "seq": stored.sequence})

    def _request(self, request: str, payload: bytes) -> tuple[bytes, dict[str, str] | None]:
        """Carry out a request of the API. Returns the answer."""
        for start, carry_out in self._requests:
            if request.startswith(start):
                name, _, rest = request[len(start) :].partition(".")
                stream = self.streams.get(name)
                if stream is None:
                    return orjson.dumps({"error": _NO_STREAM}), None
                answer = carry_out(self, stream, rest, orjson.loads(payload) if payload else {})
                return answer if isinstance(answer, tuple) else (orjson.dumps(answer), None)
        return b"", NOBODY

    def _info(self, stream: Stream, rest: str, question: Any) -> Any:
        config: dict[str, Any] = {"name": stream.name, "subjects": [stream.subjects], "max_msgs_per_subject": 1}
        config |= {"discard": "new", "allow_direct": True, "allow_msg_ttl": True}
        config["subject_delete_marker_ttl"] = 60 * 10**9
        state = {"messages": len(stream.last), "bytes": 0, "first_seq": 0, "last_seq": stream.sequence}
        return {"config": config, "state": {**state, "consumer_count": 0}, "created": _CREATED}

    def _get(self, stream: Stream, rest: str, question: Any) -> Any:
        found = stream.last.get(question["last_by_subj"])
        if found is None:
            return {"error": _NO_MESSAGE}
        message: dict[str, Any] = {"subject": found.message.subject, "seq": found.sequence, "time": _CREATED}
        message["data"] = base64.b64encode(found.message.payload).decode()
        if found.message.headers:
            lines = "".join(f"{name}: {value}\r\n" for name, value in found.message.headers.items())
            message["hdrs"] = base64.b64encode(f"NATS/1.0\r\n{lines}\r\n".encode()).decode()
        return {"message": message}

    def _get_direct(self, stream: Stream, rest: str, question: Any) -> Any:
        found = stream.last.get(rest)
        if found is None:
            return b"", {"Status": "404"}
        place = {"Nats-Subject": rest, "Nats-Sequence": str(found.sequence), "Nats-Time-Stamp": _CREATED}
        return found.message.payload, {**(found.message.headers or {}), **place}

    def _purge(self, stream: Stream, rest: str, question: Any) -> Any:
        below = question.get("seq", stream.sequence + 1)
        found = [s for s, one in stream.last.items() if matches(question["filter"], s) and one.sequence < below]
        for subject in found:
            del stream.last[subject]
        return {"success": True, "purged": len(found)}

    _requests: tuple[tuple[str, Callable[[JetStream, Stream, str, Any], Any]], ...] = (
        ("STREAM.INFO.", _info),
        ("STREAM.MSG.GET.", _get),
        ("DIRECT.GET.", _get_direct),
        ("STREAM.PURGE.", _purge),
    )
