"""What passes a recorder: which messages it records, their kinds, and the call that a reply belongs to. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple, TypeVar

from natsrt.errors import CannotDecode
from natsrt.jetstream.dead_letter_box import event_topic
from natsrt.wire import envelope
from natsrt.wire.envelope import KEY_HEADER, NO_AGENT, Envelope
from natsrt.wire.failures import decode_answer
from natsrt.wire.recorded import Kind, Record
from natsrt.wire.subjects import Subjects, decode_token, encode_token, is_hashed

REMEMBERED: Final = 100_000
"""Calls whose replies are recognised, and messages whose copies are: the latest ones."""
_UNKNOWN: Final = "unknown"
_READ: Final = "nats-sequence"
"""A header, in lower case, of what the server reads from a stream for somebody."""
_REPLIES: Final = (envelope.REPLY, envelope.ERROR)
_RECORDED: Final[Mapping[str, Kind]] = {envelope.CALL: "call", envelope.EVENT: "delivery"}

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Call(NamedTuple):
    """A call that passed: its number, its recipient as two tokens with ``/`` between them, its subject and body."""

    number: int
    recipient: str
    subject: str
    body: int
    """The hash of its body."""


class Passing:
    """Makes records of messages. One for each run of a recorder.

    ``agents``: only calls to these agent types, their replies, and deliveries to them. ``topics``: only events whose
    topic type starts with one of these. If one of the two is given and the other is not, nothing of the other passes.
    """

    def __init__(self, subjects: Subjects, run: str, agents: Iterable[str] = (), topics: Iterable[str] = ()) -> None:
        self._subjects = subjects
        self._run = run
        self._agents = frozenset(map(encode_token, agents))
        self._topics = tuple(topics)
        self._all = not self._agents and not self._topics
        root = subjects.agent("x")[: -len("agent.x")]
        self._agent_tree, self._topic_tree, self._chunk_tree = f"{root}agent.", f"{root}topic.", f"{root}natsrt.blob."
        self._calls: dict[str, Call] = {}
        """The calls by their reply subjects."""
        self._seen: dict[tuple[str, ...], None] = {}
        self._number = 0
        self.copies: int = 0
        """Messages that were not recorded because the same one had passed on another subject, or before."""

    def take(self, subject: str, reply: str, headers: Mapping[str, str], data: bytes, at: float) -> Record | None:
        """The record of a message; None if it is not to be recorded. A message that cannot be read is recorded, too."""
        if subject.startswith(self._agent_tree):
            return self._to_agent(subject, reply, headers, data, at)
        if subject.startswith(self._topic_tree):
            return self._event(subject, reply, headers, data, at)
        if subject.startswith(self._chunk_tree):
            return self._make("chunk", subject, reply, headers, data, at, None, key=("chunk", subject))
        return self._reply(subject, reply, headers, data, at)

    def _to_agent(self, subject: str, reply: str, headers: Mapping[str, str], data: bytes, at: float) -> Record | None:
        agent_type, _, key = subject[len(self._agent_tree) :].partition(".")
        if not (self._all or agent_type in self._agents):
            return None
        body = _envelope(data)
        kind: Kind | None = "call" if body is None else _RECORDED.get(body.type)
        if kind is None:  # questions of runtimes to one another
            return None
        named = _text(body, "subject") if body is not None else _plain_key(headers)
        recipient = f"{agent_type}/{key or named or 'default'}"
        id_ = _text(body, "id")
        # A call that is forwarded to the owner of its agent keeps its id and its reply subject.
        copy = (kind, id_, reply if kind == "call" else recipient) if id_ else None
        first = self._calls.get(reply) if body is None else None
        if first is not None and first.subject != subject and first.body == hash(data):  # a plain one, forwarded
            self.copies += 1
            return None
        record = self._make(kind, subject, reply, headers, data, at, body, recipient=recipient, key=copy)
        if record is not None and kind == "call" and reply:
            _remember(self._calls, reply, Call(record.number, recipient, subject, hash(data)))
        return record

    def _event(self, subject: str, reply: str, headers: Mapping[str, str], data: bytes, at: float) -> Record | None:
        if not self._all:
            topic = event_topic(self._subjects, subject, data) if self._topics else None
            if topic is None or not topic.type.startswith(self._topics):
                return None
        body = _envelope(data)
        id_ = _text(body, "id")  # one on a durable topic is sent again if its stream does not answer
        return self._make(
            "event", subject, reply, headers, data, at, body, key=("event", id_, subject) if id_ else None
        )

    def _reply(self, subject: str, reply: str, headers: Mapping[str, str], data: bytes, at: float) -> Record | None:
        call = self._calls.get(subject)
        try:
            body = decode_answer(headers or None, data)
        except CannotDecode:
            body = None
        if body is not None and body.type not in _REPLIES:  # accepted, or an answer to a question of runtimes
            return None
        if call is None and any(name.lower() == _READ for name in headers):  # a record, as somebody reads it
            return None
        if call is None and (body is None or not self._all or body.type != envelope.REPLY or not _is_to_call(body)):
            return None
        recipient = call.recipient if call is not None else _text(body, "source")
        copy = ("reply", _text(body, "id"), subject) if body is not None else None
        number = None if call is None else call.number
        return self._make("reply", subject, reply, headers, data, at, body, recipient=recipient, key=copy, call=number)

    def _make(
        self,
        kind: Kind,
        subject: str,
        reply: str,
        headers: Mapping[str, str],
        data: bytes,
        at: float,
        body: Envelope | None,
        *,
        recipient: str = "",
        key: tuple[str, ...] | None = None,
        call: int | None = None,
    ) -> Record | None:
        if key is not None:
            if key in self._seen:
                self.copies += 1
                return None
            _remember(self._seen, key, None)
        self._number += 1
        sender = _text(body, "source")
        if sender in ("", NO_AGENT):  # the agent that a reply without its name comes from is the one that was called
            sender = recipient if kind == "reply" else ""
        return Record(
            kind=kind,
            subject=subject,
            run=self._run,
            number=self._number,
            at=at,
            data=data,
            reply=reply,
            headers={str.__str__(name): value for name, value in headers.items()},  # nats-py has some names as enums
            id=_text(body, "id"),
            sender=sender,
            recipient="" if kind == "reply" else recipient,
            call=call,
        )

    def subject_of(self, record: Record, tree: str) -> str:
        """The subject of a record below ``tree``."""
        if record.kind == "event":
            return f"{tree}.event.{record.subject[len(self._topic_tree) :]}"
        if record.kind == "chunk":
            return f"{tree}.chunk.{record.subject[len(self._chunk_tree) :]}"
        agent_type, _, key = (record.recipient or record.sender or f"{_UNKNOWN}/{_UNKNOWN}").partition("/")
        return f"{tree}.{record.kind}.{_token(agent_type)}.{_token(key)}"


def _is_to_call(body: Envelope) -> bool:
    """Whether a reply is one to a call: only those name the type of a message."""
    return body.text("messagetype") is not None


def _envelope(data: bytes) -> Envelope | None:
    try:
        return envelope.decode(data)
    except CannotDecode:
        return None


def _text(body: Envelope | None, name: str) -> str:
    return "" if body is None else body.text(name) or ""


def _plain_key(headers: Mapping[str, str]) -> str:
    key = next((value for name, value in headers.items() if name.lower() == KEY_HEADER.lower()), "")
    try:
        return encode_token(key) if key else ""
    except ValueError:
        return ""


def _token(text: str) -> str:
    """A token for a name as bodies have it. One that is none there is encoded once more."""
    if is_hashed(text):
        return text
    try:
        return encode_token(decode_token(text))
    except ValueError:
        return encode_token(text.encode("utf-8", "replace").decode())


def _remember(known: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    known.pop(key, None)
    known[key] = value
    if len(known) > REMEMBERED:
        del known[next(iter(known))]
