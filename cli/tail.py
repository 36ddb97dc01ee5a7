"""``natsrt tail``: shows events as they are published."""

from __future__ import annotations

import asyncio
import base64
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import click
import orjson
from autogen_core import TopicId
from nats.aio.msg import Msg

from natsrt.errors import CannotDecode
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import TYPE_HEADER
from natsrt.wire.subjects import Subjects, plain_prefix

from .connecting import Connecting, connects
from .exits import CommandFailed, Exit
from .naming import topic_id
from .output import line, note, printable


class _Event(NamedTuple):
    """The content of an event's message. ``problem`` says what could not be read; None if all could."""

    topic: TopicId | None
    fields: dict[str, Any]
    payload: bytes
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Which events are shown: those on ``subjects`` whose topic type starts with ``prefix``."""

    subjects: Sequence[str]
    prefix: str = ""


_NO_EVENTS = {
    "agent": "calls, which tail does not show: it shows events. For one agent type, see `natsrt agents stats`",
    "natsrt": "messages between runtimes, which tail does not show: it shows events",
}
"""What is sent on subjects that are none of events, by their first token."""


def _wanted(text: str, subjects: Subjects) -> _Wanted:
    """The events that the argument names: by a prefix of topic types, a topic, or a NATS subject."""
    root = f"{subjects.namespace}." if subjects.namespace else ""
    subject = text.removeprefix(root)
    first, _, rest = subject.partition(".")
    if first in _NO_EVENTS:
        advice = f"topics whose type starts with {subject!r} are on {f'topic.{subject}.>'!r}"
        raise CommandFailed(f"{text!r} is a subject of {_NO_EVENTS[first]}; {advice}", Exit.USAGE)
    if first == "topic":
        return _Wanted(_on_subject(text, rest, f"{root}topic."))
    try:
        if "/" in text:
            topic = topic_id(text)
            return _Wanted([subjects.topic(topic.type, topic.source)])
        prefix = plain_prefix(text)
        return _Wanted([subjects.prefix_filter(prefix).subject], prefix)
    except ValueError as error:
        raise CommandFailed(str(error), Exit.USAGE) from None


def _on_subject(text: str, rest: str, trees: str) -> list[str]:
    """The subjects to subscribe to for one that the user wrote: without a wildcard, also everything below it."""
    tokens = rest.rstrip(".").split(".") if rest else [">"]
    last = len(tokens) - 1
    for index, token in enumerate(tokens):
        valid = token == "*" or (token == ">" and index == last) or (token and not set(token) & set("*> \t\r\n/"))
        if not valid:
            problem = (
                f"{token!r} is no token of a subject; * stands for one token, and > at the end for all that follow"
            )
            raise CommandFailed(f"{text!r} is not a subject: {problem}", Exit.USAGE)
    subject = trees + ".".join(tokens)
    if not {"*", ">"}.isdisjoint(tokens):
        return [subject]
    return [f"{subject}.>"] if rest.endswith(".") else [subject, f"{subject}.>"]


@click.command()
@click.argument("topics", metavar="[PREFIX|TOPIC/SOURCE|SUBJECT]", default="")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="Stop after N events.")
@click.option("--json", "as_json", is_flag=True, help="Print each event as one line of JSON.")
@connects()
def tail(connecting: Connecting, topics: str, count: int | None, as_json: bool) -> None:
    """Show events as they are published.

    Shows the events of all topics whose type starts with PREFIX, until Ctrl-C; with a source, those of one topic. What
    is "topic" or starts with "topic." is a NATS subject, which may have wildcards; without one, it includes all
    subjects below it.

    \b
    natsrt tail                    all events
    natsrt tail news.              news.tech, news.sport, …
    natsrt tail news.tech/server   one topic
    natsrt tail 'topic.news.*.*'   as `nats sub` has it
    """
    asyncio.run(_tail(connecting, topics, count, as_json))


async def _tail(connecting: Connecting, topics: str, count: int | None, as_json: bool) -> None:
    options = connecting.options()
    subjects = Subjects(options.namespace)
    wanted = _wanted(topics, subjects)
    arrived: asyncio.Queue[Msg | None] = asyncio.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, arrived.put_nowait, None)
    connection = Connection(options, client_name="natsrt tail")
    denied: list[Exception] = []
    connection.on_denied(denied.append)
    await connection.open()
    try:
        for subject in wanted.subjects:
            await connection.subscribe(subject, arrived.put_nowait)
        await connection.barrier()
        if denied:
            raise denied[0]
        note(f"listening on {' and '.join(wanted.subjects)} at {connection.server}")
        shown = 0
        while (count is None or shown < count) and (message := await arrived.get()) is not None:
            event = _read(message, subjects)
            if event.topic is None or event.topic.type.startswith(wanted.prefix):
                shown += 1
                line(_json_line(message, event) if as_json else _text_line(message, event))
    finally:
        await connection.close()


def _read(message: Msg, subjects: Subjects) -> _Event:
    topic = None
    try:
        body = envelope.decode(message.data)
        claims = (None, None) if body is None else (body.text("topictype"), body.text("topicsource"))
        topic = TopicId(*subjects.parse_topic(message.subject, topic_type=claims[0], source=claims[1]))
        if body is None:
            return _Event(
                topic, {"plain": True, "message_type": (message.headers or {}).get(TYPE_HEADER)}, message.data
            )
        fields = {"plain": False, "message_type": body.text("messagetype")}
        fields |= {"id": body.text("id"), "sender": body.text("source")}
        return _Event(topic, fields, body.payload)
    except (CannotDecode, ValueError) as error:
        return _Event(topic, {}, message.data, str(error))


def _json_line(message: Msg, event: _Event) -> str:
    topic = {} if event.topic is None else {"topic_type": event.topic.type, "topic_source": event.topic.source}
    shown: dict[str, Any] = {"subject": message.subject, **topic, **event.fields, "size_bytes": len(message.data)}
    if event.problem is not None:
        shown["problem"] = event.problem
    try:
        shown["data"] = orjson.loads(event.payload)
    except orjson.JSONDecodeError:
        shown["data_base64"] = base64.b64encode(event.payload).decode()
    return orjson.dumps(shown).decode()


def _text_line(message: Msg, event: _Event) -> str:
    where = message.subject if event.topic is None else f"{event.topic.type}/{event.topic.source}"
    what = event.fields.get("message_type") or "(plain)"
    payload = event.payload.decode("utf-8", "backslashreplace")
    shown = f"cannot be read: {event.problem}" if event.problem is not None else " ".join(payload.split("\n"))
    return printable(f"{datetime.now():%H:%M:%S.%f}"[:-3] + f"  {where}  {what}  {shown}")
