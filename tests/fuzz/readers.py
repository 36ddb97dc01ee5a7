"""What reads from the wire without I/O, one reader for each kind of input.

An input is bytes. Readers that get more than a body take it apart with `_parts`: a line with a subject or a key, a
block of headers as NATS sends it, and a body.
"""

from __future__ import annotations

import functools
import json
import traceback
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import nats.errors
from autogen_core import AgentId
from nats.aio.msg import Msg
from pydantic import BaseModel

from natsrt import errors
from natsrt.agents.chain import chain_of
from natsrt.contrib.services.json_types import JsonType
from natsrt.contrib.services.replies import RepliesRead
from natsrt.errors import CannotDecode, ServiceError
from natsrt.jetstream.acks import WrongRevision, read_ack
from natsrt.jetstream.dead_letters import STORED_AT_HEADER
from natsrt.jetstream.delivery import Delivery
from natsrt.jetstream.later_retries import recognise
from natsrt.jetstream.passing import Passing
from natsrt.jetstream.record import (
    HANDLED_BYTES,
    RECORD,
    Stored,
    advanced,
    checked,
    decode_record,
    encode_head,
    sha256,
    write_of,
)
from natsrt.jetstream.registry.entries import SubscriptionEntry, decode_entry, encode_entry
from natsrt.jetstream.registry.view import View
from natsrt.options import Options
from natsrt.sending.replies import Replies
from natsrt.transport.bodies import BlobStore, Bodies
from natsrt.transport.client import NatsClient
from natsrt.transport.connection import Connection
from natsrt.transport.refusals import ServerError
from natsrt.wire import envelope, peer_messages
from natsrt.wire.envelope import SUPERSEDES_HEADER
from natsrt.wire.failures import FULL, SHORT, ErrorTypes, decode_answer, describe, is_refusal
from natsrt.wire.ids import MAX_FORMER, former_copies
from natsrt.wire.known_classes import NamedClasses
from natsrt.wire.part_flow import PartsSent, Window
from natsrt.wire.part_messages import number_of_part, read_awaited, read_progress, read_window, total_of
from natsrt.wire.recorded import RECORD_HEADER, read_record
from natsrt.wire.retry_subjects import attempts_of
from natsrt.wire.serialization import Serialization
from natsrt.wire.stored_events import STORED, stored_event
from natsrt.wire.subjects import Subjects, decode_token, encode_text, encode_token, is_subject_length

_HERE: Final = Path(__file__).parent
_AGENT: Final = AgentId("counter", "one")
_SUBJECTS: Final = Subjects()
_LONG: Final = 10_000
HEADERS_END: Final = b"\r\n\r\n"


@dataclass(frozen=True)
class Reader:
    """One kind of input.

    Args:
        name: Name on the command line and of the directory with its findings.
        corpus: Good inputs, and bad ones of the vectors.
        read: Reads an input. Raises AssertionError if what it returns contradicts itself.
        raises: The typed errors of bad inputs.
        words: Names that mean something to the reader.
    """

    name: str
    corpus: Sequence[bytes]
    read: Callable[[bytes], None]
    raises: tuple[type[BaseException], ...] = (CannotDecode,)
    words: Sequence[str] = field(default=())


def found(name: str) -> list[bytes]:
    """Return the inputs that once broke this reader."""
    return [path.read_bytes() for path in sorted((_HERE / "found" / name).glob("*"))]


def vectors(name: str) -> dict[str, Any]:
    """Return a file of the vectors."""
    return cast(dict[str, Any], json.loads((_HERE.parent / "vectors" / f"{name}.json").read_text("utf-8")))


def _cases(file: str, member: str) -> list[bytes]:
    """Every text, or bytes in hex, with this name in a file of the vectors."""
    texts: list[bytes] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                if name == member and isinstance(value, str):
                    texts.append(value.encode())
                elif name == f"{member}_hex":
                    texts.append(bytes.fromhex(value))
                else:
                    walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(vectors(file))
    return texts


def block(headers: dict[str, str] | None) -> bytes:
    """Return a header block as it is on the wire."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    return f"NATS/1.0\r\n{lines}\r\n".encode()


# -- messages as the client makes them -------------------------------------------------------------------------------


class _Unread:
    """Takes what a client reports. It keeps nothing."""

    def unreadable(self, error: CannotDecode) -> None:
        """A message could not be read."""

    def subscriptions_refused(self, client: NatsClient, subjects: dict[int, str]) -> None:
        """Not used."""


_CLIENT: Final = NatsClient(_Unread(), cast(Any, None))


def headers_of(given: bytes) -> dict[str, str] | None:
    """Return what the client makes of a header block."""
    reading: Coroutine[Any, Any, dict[str, str] | None] = _CLIENT._process_headers(given)
    try:
        reading.send(None)
    except StopIteration as end:
        return cast("dict[str, str] | None", end.value)
    raise AssertionError("reading headers waits for something")


def parts(given: bytes) -> tuple[str, dict[str, str] | None, bytes]:
    """Return the subject or key, the headers and the body in an input."""
    line, _, rest = given.partition(b"\n")
    head, end, body = rest.partition(HEADERS_END)
    if not end:
        head, body = b"", rest
    return line.decode(errors="replace"), headers_of(head + end) if head else None, body


def joined(subject: str, headers: dict[str, str] | None, body: bytes) -> bytes:
    """The reverse of `parts`."""
    return subject.encode() + b"\n" + (block(headers) if headers else b"") + body


def message(given: bytes) -> Msg:
    """Return an input as a message."""
    subject, headers, body = parts(given)
    return Msg(_CLIENT, subject, "", body, headers)


# -- the readers -----------------------------------------------------------------------------------------------------


def _envelope(given: bytes) -> None:
    body = envelope.decode(given)
    if body is None:
        return
    assert body.type.startswith("natsrt.")
    chain_of(body)
    event = stored_event(body)
    if event is not None:
        attributes = {**event._replace(stored_at=None).attributes, STORED: None}
        moved = envelope.decode(envelope.rewrite(body, **attributes))
        assert moved is not None and stored_event(moved) == event._replace(stored_at=None)
    body.general()
    again = envelope.decode(envelope.rewrite(body, cancelid=None))
    assert again is not None and again.type == body.type and again.payload == body.payload
    body.json()


def _subject(given: bytes) -> None:
    text = given.decode()
    for use in (_SUBJECTS.is_reserved, envelope.is_subject):
        use(text)
    try:
        topic_type, source = _SUBJECTS.parse_topic(text)
        assert _SUBJECTS.topic(topic_type, source) == text
    except ValueError:
        pass
    try:
        _SUBJECTS.prefix_filter(text)
        _SUBJECTS.type_filter(text)
    except ValueError:
        pass
    if len(text) < _LONG:  # what is encoded is three times as long
        assert decode_token(encode_text(text)) == text
    assert len(encode_token(text)) <= 200
    assert encode_text(decode_token(text)) == text


_RETRY_CASES: Final = [
    joined(subject, {STORED_AT_HEADER: stored}, b"{}")
    for subject in ("natsrt.again.s.retry.jobs.17.1", "natsrt.again.s.retry.a=2Eb.9000000000.12", "natsrt.again.s.jobs")
    for stored in ("1767323045500000", "", "x")
]


def _retry(given: bytes) -> None:
    subject, headers, body = parts(given)
    delivery = Delivery(Msg(None, subject, "$JS.ACK.s.jobs.1.5.5.1767323045500000000.0", body, headers))  # type: ignore[arg-type]
    recognise(_SUBJECTS, delivery)
    assert delivery.sequence == 5
    assert 0 <= delivery.first_sequence < 2**63 > delivery.before >= 0
    assert 0.0 <= delivery.stored_at <= 1767323045.5
    attempts_of(_SUBJECTS, "jobs", "s", delivery.sequence, delivery.stored_at)


def _entry(given: bytes) -> None:
    key, _, body = parts(given)
    entry = decode_entry(key, body)
    assert decode_entry(key, encode_entry(entry)) == entry
    view = View()
    view.put(key, 1, entry)
    if isinstance(entry, SubscriptionEntry):
        try:
            entry.rule.subject(_SUBJECTS)
        except ValueError:
            pass
        view.takers(entry.pattern)
    view.delete(key, 2)


def _record(given: bytes) -> None:
    key, headers, body = parts(given)
    write_of(headers)
    record = decode_record(key, headers, body, 1)
    if record.stored is not None:
        record.holds(body)
        checked(record.agent, record.stored, body)
    handled = advanced(record.handled, {"s@1": 1})
    assert "s@1" in handled and len(json.dumps(handled)) <= HANDLED_BYTES


def _passing(given: bytes) -> None:
    """Messages as a recorder sees them: any is recorded or not, and its record says the same when it is read."""
    subject, headers, data = parts(given)
    passing = Passing(_SUBJECTS, "r")
    passing.take("agent.shop", "_INBOX.a.1", {}, b"1", 1.0)
    record = passing.take(subject, "_INBOX.a.2", headers or {}, data, 2.0)
    if record is not None:
        again = read_record({RECORD_HEADER: record.header()}, data)
        assert again == record
        assert passing.subject_of(again, "natsrt.record.a").startswith(f"natsrt.record.a.{record.kind}.")


def _recorded(given: bytes) -> None:
    _, headers, data = parts(given)
    record = read_record(headers or {}, data)
    assert record.data == data
    assert read_record({RECORD_HEADER: record.header()}, data).number == record.number


def _answer(given: bytes) -> None:
    """Answers and questions between workers."""
    body = envelope.decode(given)
    if body is None:
        raise CannotDecode("an answer", "it is plain")
    problems = []
    for read in (
        peer_messages.read_claim,
        peer_messages.read_links,
        peer_messages.read_promises,
        peer_messages.says_missing,
        functools.partial(peer_messages.read_location, agent=_AGENT),
    ):
        try:
            read(body)
        except CannotDecode as error:
            problems.append(error)
    if len(problems) >= 4:
        raise problems[0]


def _stream(given: bytes) -> None:
    """What callers and workers tell one another about streams and questions."""
    body = envelope.decode(given)
    if body is None:
        raise CannotDecode("a message of a stream", "it is plain")
    if body.type == envelope.MORE:
        data = body.json()
        if not isinstance(data, dict):
            raise CannotDecode("the progress of a stream", "expected an object")
        progress, stop = read_progress(data)
        assert all(isinstance(call, str) for calls in read_awaited(data).values() for call in calls)
        sent = PartsSent(Window(8, 1000))
        for number in range(4):
            sent.add(b"%d" % number, 1, 0.0)
        assert len(list(sent.told(progress, 1.0, 0.4))) <= 4 and isinstance(stop, bool)
    elif body.type == envelope.PART:
        assert number_of_part(body) >= 1 and isinstance(chain_of(body), tuple)
        body.text("question"), body.text("withdrawn")
    elif body.type == envelope.ANSWER:
        body.required("partsto"), body.required("question"), body.text("failed")
    elif body.type == envelope.CALL:
        assert all(one >= 1 for one in read_window(body)) and isinstance(body.text("questions"), str | None)
    else:
        assert total_of(body) >= 0


_ERROR_TYPES: Final = ErrorTypes()


def _failure(given: bytes) -> None:
    exception = _ERROR_TYPES.rebuild(given, agent="a/b", worker_id="w")
    for one in (exception, _ERROR_TYPES.as_base(exception)):
        for show in (str, repr, traceback.format_exception):
            show(one)
        describe(one, with_traceback=True)  # it may be raised by a handler again
        for limits in (FULL, SHORT):
            describe(one, with_traceback=True, agent="a/b", limits=limits)  # and passed on


class Shape(BaseModel):
    name: str
    sides: int | None = None


@dataclass
class Tree:
    name: str
    size: float
    shapes: list[Shape]
    children: list[Tree]
    extra: dict[str, int | str] | bytes | None = None


def _serialization() -> Serialization:
    serialization = Serialization()
    for cls in (Shape, Tree):
        serialization.add_class(cls)
    return serialization


_MESSAGES: Final = _serialization()
_HANDLED: Final = NamedClasses()
for _cls in (Shape, Tree):
    _HANDLED.add(_cls.__name__, _cls)
_GOOD: Final = Tree("a", 1.5, [Shape(name="b")], [Tree("c", 2.0, [], [], {"d": 1})])
_GOOD_JSON: Final = _MESSAGES.encode(_GOOD).payload


def _payload(given: bytes) -> None:
    _, headers, body = parts(given)
    content_type = (headers or {}).get("Content-Type", envelope.JSON_CONTENT)
    _MESSAGES.decode("Tree", content_type, body, None, _HANDLED)
    _MESSAGES.infer(body, [Shape, Tree])


class _NoConnection:
    """Bodies are read without a connection."""

    max_payload = 1_048_576

    def add_listener(self, listener: Any) -> None:
        pass


_REPLIES: Final = Replies(
    Bodies(cast(Connection, _NoConnection()), Options(), cast(BlobStore, None)), _MESSAGES, ErrorTypes()
)


def _reply(given: bytes) -> None:
    reply = message(given)
    is_refusal(reply.headers, reply.data)
    try:
        decode_answer(reply.headers, reply.data)
        body = _REPLIES.unpack(reply)
        if body is None or body.reference is None:
            _REPLIES.result(body, reply, Tree, None, _AGENT)
        _REPLIES.answered(reply, _AGENT)
    except CannotDecode:
        raise
    except BaseException as error:
        if not hasattr(error, "natsrt_remote"):  # all that was rebuilt from the reply has it
            raise


def _acknowledgement(given: bytes) -> None:
    assert isinstance(read_ack(message(given)).sequence, int)


def _header_block(given: bytes) -> None:
    headers = headers_of(given)
    assert headers is None or all(isinstance(text, str) for pair in headers.items() for text in pair)
    former = former_copies((headers or {}).get(SUPERSEDES_HEADER, ""), "_INBOX.a.3", forwarded=False)
    assert len(former) <= MAX_FORMER and all(is_subject_length(call_id) for call_id in former)


def _server_error(given: bytes) -> None:
    error = ServerError(given.decode(errors="replace"))
    assert isinstance(error.ends_connection, bool) and isinstance(error.kind, str)
    assert error.violation is None or error.violation.subject
    str(error)


# -- their corpora ---------------------------------------------------------------------------------------------------


def _envelopes() -> list[bytes]:
    return [
        *_cases("envelopes", "body"),
        *_cases("worker", "body"),
        *_cases("keyed", "body"),
        envelope.encode(envelope.CALL, '"id":"1","source":"a/b","messagetype":"Tree"', _GOOD_JSON),
        envelope.encode(envelope.EVENT, '"id":"1","source":"/","messagetype":"x"', b"\x00\xff", "application/x-any"),
    ]


def _entries() -> list[bytes]:
    cases = [case for part in ("entries", "required") for case in vectors("registry")[part]]
    return [joined(case["key"], None, case["value"].encode()) for case in cases]


def _records() -> list[bytes]:
    state = b'{"count":1}'
    stored = [Stored(len(state), sha256(state), 1.5, 0, "w-1"), Stored(1_000_000, "00", 1.5, 2, "w-1"), None]
    heads = [encode_head(_AGENT, owner, "w-1", one, ["_INBOX.a.1"]) for one in stored for owner in ("w-1", None)]
    heads += [case["record"] for case in vectors("keyed")["records"]]
    return [joined("a.counter.one", {RECORD: head}, state) for head in heads]


def _passed() -> list[bytes]:
    cases = [case["message"] for part in ("records", "ignored") for case in vectors("recorded")[part]]
    cases.append({"subject": "_INBOX.a.1", "headers": {}, "body": "2"})
    return [joined(case["subject"], case["headers"], case["body"].encode()) for case in cases]


def _stored_records() -> list[bytes]:
    headers = [json.dumps(case["header"]) for case in vectors("recorded")["records"]]
    headers += [case["header"] for case in vectors("recorded")["refused"] if case["header"] is not None]
    return [joined("a", {RECORD_HEADER: header}, b"1") for header in headers]


def _answers() -> list[bytes]:
    answers: list[Any] = [
        {"grip": "holds"},
        {"waits": [{"call": "_INBOX.a.1", "awaited": "_INBOX.b.2", "visit": "v", "agent": "counter/one"}]},
        {"withdrawn": {"_INBOX.a.1": 1.5}},
        {"worker_id": "w-1", "lease": 1.5},
        {"missing": True},
    ]
    return [envelope.encode(envelope.REPLY, '"id":"1","source":"/"', json.dumps(data).encode()) for data in answers]


def _streams() -> list[bytes]:
    steps = vectors("streams")["questions"]["steps"]
    whole = {"specversion": "1.0", "id": "1", "source": "a/b"}
    bodies = [whole | (step.get("caller_sends") or step["worker_sends"]) for step in steps]
    return [*_cases("streams", "body"), *(json.dumps(body, separators=(",", ":")).encode() for body in bodies)]


def _failures() -> list[bytes]:
    samples: list[BaseException] = [
        ValueError("no lamps"),
        OSError(2, "no such file", "x.txt"),
        KeyError("x"),
        ImportError("no", name="x", path="y"),
        NameError("no", name="x"),
        AttributeError("no", name="x"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        UnicodeEncodeError("utf-8", "\udc80", 0, 1, "bad"),
        UnicodeTranslateError("x", 0, 1, "bad"),
        SyntaxError("bad", ("x.py", 1, 2, "x =", 1, 3)),
        ExceptionGroup("several", [ValueError("a"), TypeError("b")]),
        errors.WorkerLost("chat/a", "w-1", "it does not answer"),
        errors.MessageTooLarge(2_000_000, 1_048_576),
        errors.Deadlock("chat/a", ["chat/b", "chat/a"]),
    ]
    samples[0].__cause__ = samples[1]
    samples[0].add_note("a note")
    described = [describe(sample, with_traceback=True).payload for sample in samples]
    return described + [json.dumps(case["data"]).encode() for case in vectors("errors")["known"]]


def _replies() -> list[bytes]:
    good = envelope.encode(envelope.REPLY, '"id":"1-r","source":"a/b","messagetype":"Tree"', _GOOD_JSON)
    failed = [envelope.encode(envelope.ERROR, '"id":"1-r","source":"a/b"', data) for data in _failures()]
    codes = {"Nats-Service-Error": "no", "Nats-Service-Error-Code": "500"}
    plain = [(codes, data) for data in _failures()]
    plain += [({"Natsrt-Type": "Tree"}, _GOOD_JSON), ({"Status": "503"}, b""), ({"Natsrt-Type": "x"}, b"\xff")]
    return [joined("_INBOX.a.1", headers, body) for headers, body in [(None, good), *plain]] + [
        joined("_INBOX.a.1", None, body) for body in failed
    ]


def _acknowledgements() -> list[bytes]:
    errors_of_server = [
        {"code": code, "err_code": err_code, "description": "no"}
        for code, err_code in ((400, 10071), (503, 10077), (500, 1), (404, 10059), (429, 2))
    ]
    answers: list[Any] = [{"stream": "S", "seq": 7, "duplicate": True}]
    answers += [{"stream": "S", "seq": 0, "error": error} for error in errors_of_server]
    return [joined("_INBOX.a.1", None, json.dumps(answer).encode()) for answer in answers]


_CLASS_NAMES: Final = tuple(sorted(_ERROR_TYPES._classes))
_MESSAGE_NAMES: Final = ("Tree", "Shape", f"{Tree.__module__}.Tree", "name", "size", "shapes", "children", "extra")
_SUBJECT_CASES: Final = tuple(
    text for member in ("subject", "token", "prefix", "type") for text in _cases("subjects", member)
)


@dataclass
class _Place:
    city: str
    days: list[int] = field(default_factory=list)


def _service_reply(given: bytes) -> None:
    """A reply of a NATS service, and the same one again."""
    _, headers, body = parts(given)
    for cls, stream in ((_Place, True), (_Place | None, False), (bytes, True)):
        read = RepliesRead("weather.get", JsonType(cls, "response_type"), stream=stream)
        for count in (1, 2):
            items = read.read(headers or {}, body)
            assert len(items) <= 1 and (items or read.total is not None)
            assert all(isinstance(item, cls) for item in items)
            if read.is_complete:
                break
            assert read.count <= count


def _service_replies() -> list[bytes]:
    good = b'{"city": "Rome", "days": [1, 2]}'
    headers: list[dict[str, str] | None] = [
        None,
        {"Natsrt-Part": "1"},
        {"Natsrt-Parts": "0"},
        {"Nats-Service-Error": "no", "Nats-Service-Error-Code": "404"},
        {"Nats-Service-Error-Code": "x"},
    ]
    return [joined("_INBOX.a.1", one, body) for one in headers for body in (good, b"", b"null")]


_HEADER_CASES: Final = tuple(
    block(headers)
    for headers in (
        None,
        {"Natsrt-Key": "k", "Natsrt-Type": "Tree"},
        {"Nats-Sequence": "7", "Nats-Last-Sequence": "6", "KV-Operation": "DEL"},
        {"Natsrt-Supersedes": "_INBOX.a.1 _INBOX.a.2"},
    )
) + (b"NATS/1.0 503\r\n\r\n", b"NATS/1.0 408 Request Timeout\r\nNats-Pending-Messages: 1\r\n\r\n")
_SERVER_ERRORS: Final = (
    b"'Permissions Violation for Publish to \"agent.admin\"'",
    b'\'Permissions Violation for Subscription to "agent.>" using queue "q"\'',
    b"'maximum subscriptions exceeded'",
    b"'Authorization Violation'",
    b"'Stale Connection'",
)

READERS: Final[dict[str, Reader]] = {
    reader.name: reader
    for reader in (
        Reader("envelope", _envelopes(), _envelope, words=tuple(sorted(envelope.TEXTS))),
        Reader("subject", _SUBJECT_CASES, _subject, (ValueError,)),
        Reader("retry", _RETRY_CASES, _retry),
        Reader("entry", _entries(), _entry),
        Reader("record", _records(), _record),
        Reader("answer", _answers(), _answer),
        Reader("stream", _streams(), _stream, words=tuple(sorted(envelope.TEXTS))),
        Reader("passing", _passed(), _passing, (), ("type", "subject", "source", "id", *_MESSAGE_NAMES)),
        Reader("recorded", _stored_records(), _recorded, words=("kind", "number", "at", "run", "call", "headers")),
        Reader("failure", _failures(), _failure, (), _CLASS_NAMES),
        Reader("payload", [joined("", None, _GOOD_JSON)], _payload, words=_MESSAGE_NAMES),
        Reader("reply", _replies(), _reply, words=(*_MESSAGE_NAMES, *_CLASS_NAMES)),
        Reader(
            "acknowledgement", _acknowledgements(), _acknowledgement, (CannotDecode, WrongRevision, nats.errors.Error)
        ),
        Reader("service", _service_replies(), _service_reply, (CannotDecode, ServiceError), ("place", "days", "unit")),
        Reader("headers", _HEADER_CASES, _header_block),
        Reader("server_error", _SERVER_ERRORS, _server_error, ()),
    )
}
"""All readers by name."""
