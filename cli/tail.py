"""``natsrt tail``: shows events as they are published."""

from __future__ import annotations

import asyncio
import base64
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, NamedTuple

import click
import orjson
from autogen_core import TopicId
from nats.aio.msg import Msg

from natsrt.background import BackgroundTasks
from natsrt.errors import CannotDecode
from natsrt.jetstream.stream_reader import StoredMessage
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import TYPE_HEADER
from natsrt.wire.ranges import LARGEST
from natsrt.wire.references import DATA_REF
from natsrt.wire.subjects import Subjects

from .chosen_events import Wanted, wanted
from .connecting import Connecting, connects
from .moments import Moment, iso
from .output import line, note, printable
from .stored_events import StoredEvents

logger = logging.getLogger("natsrt.cli")

_BLOB_SIZE = "blob_size_bytes"
_Message = Msg | StoredMessage
_Show = Callable[[_Message | Exception], None]


class _Event(NamedTuple):
    """The content of an event's message. ``problem`` says what could not be read; None if all could.
    ``payload`` is None if it is stored elsewhere: then ``fields`` say where, and how large it is."""

    topic: TopicId | None
    fields: dict[str, Any]
    payload: bytes | None
    problem: str | None = None


@click.command()
@click.argument("topics", metavar="[PREFIX|TOPIC/SOURCE|SUBJECT]", default="")
@click.option(
    "--since", type=Moment(), help="Begin with the events of durable topics that were stored since then: 1h30m, a time."
)
@click.option("--count", type=click.IntRange(1, LARGEST), metavar="N", help="Stop after N events.")
@click.option("--json", "as_json", is_flag=True, help="Print each event as one line of JSON.")
@connects()
def tail(connecting: Connecting, topics: str, since: float | None, count: int | None, as_json: bool) -> None:
    """Show events as they are published.

    Shows the events of all topics whose type starts with PREFIX, until Ctrl-C; with a source, those of one topic. What
    is "topic" or starts with "topic." is a NATS subject, which may have wildcards; without one, it includes all
    subjects below it.

    With --since, it first shows those that the streams of durable topics have stored since then, and goes on with each
    one that they store, without a gap and without showing one twice. Events on other topics are shown from now on.

    \b
    natsrt tail                    all events
    natsrt tail news.              news.tech, news.sport, …
    natsrt tail news.tech/server   one topic
    natsrt tail 'topic.news.*.*'   as `nats sub` has it
    natsrt tail orders. --since 1h
    """
    asyncio.run(_tail(connecting, topics, since, count, as_json))


async def _tail(connecting: Connecting, topics: str, since: float | None, count: int | None, as_json: bool) -> None:
    subjects = Subjects(connecting.options().namespace)
    chosen = wanted(topics, subjects)
    arrived: asyncio.Queue[_Message | Exception | None] = asyncio.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, arrived.put_nowait, None)
    source = _live(connecting, chosen, arrived.put_nowait)
    if since is not None:
        source = _since(connecting, chosen, since, arrived.put_nowait)
    async with source:
        shown = 0
        while (count is None or shown < count) and (message := await arrived.get()) is not None:
            if isinstance(message, Exception):
                raise message
            event = _read(message, subjects)
            if chosen.includes(message.subject, event.topic):
                shown += 1
                line(_json_line(message, event) if as_json else _text_line(message, event))


@asynccontextmanager
async def _live(connecting: Connecting, chosen: Wanted, show: _Show) -> AsyncIterator[None]:
    """Show what is published from now on."""
    connection = Connection(connecting.options(), client_name="natsrt tail")
    await connection.open()
    try:
        await _listen(connection, chosen, show)
        yield
    finally:
        await connection.close()


async def _listen(connection: Connection, chosen: Wanted, show: Callable[[Msg], None]) -> None:
    denied: list[Exception] = []
    connection.on_denied(denied.append)
    for subject in chosen.subjects:
        await connection.subscribe(subject, show)
    await connection.barrier()
    if denied:
        raise denied[0]
    note(f"listening on {' and '.join(chosen.subjects)} at {connection.server}")


@asynccontextmanager
async def _since(connecting: Connecting, chosen: Wanted, since: float, show: _Show) -> AsyncIterator[None]:
    """Show what durable topics have stored since then, what they store from now on, and what is published on others."""
    async with connecting.runtime() as runtime:
        running = runtime.running
        subjects, reader, view = running.network.subjects, running.network.reader, running.registry.view
        tasks = BackgroundTasks(logger, "reading a stream of durable topics failed")
        streams: dict[str, StoredEvents] = {}

        def follow(stream: str) -> StoredEvents:
            if stream not in streams:
                streams[stream] = StoredEvents(reader, stream, chosen.subject(subjects), since)
                tasks.spawn(run(streams[stream]))
            return streams[stream]

        async def run(events: StoredEvents) -> None:
            try:
                await events.follow(show)
            except Exception as error:
                show(error)

        def on_core_copy(message: Msg) -> None:
            topic = _read(message, subjects).topic
            stream = None if topic is None else view.durable_stream(topic.type)
            if stream is None:
                show(message)
            else:
                follow(stream).expect()

        try:
            await _listen(running.connection, chosen, on_core_copy)
            for stream in view.durable:
                follow(stream)
            yield
        finally:
            await tasks.cancel()


def _read(message: _Message, subjects: Subjects) -> _Event:
    topic = None
    try:
        body = envelope.decode(message.data)
        claims = (None, None) if body is None else (body.text("topictype"), body.text("topicsource"))
        topic = TopicId(*subjects.parse_topic(message.subject, topic_type=claims[0], source=claims[1]))
        if body is None:
            return _Event(
                topic, {"plain": True, "message_type": (message.headers or {}).get(TYPE_HEADER)}, message.data
            )
        fields: dict[str, Any] = {"plain": False, "message_type": body.text("messagetype")}
        fields |= {"id": body.text("id"), "sender": body.text("source")}
        if body.reference is not None:
            fields |= {DATA_REF: body.text(DATA_REF), _BLOB_SIZE: body.reference.size}
            return _Event(topic, fields, None)
        return _Event(topic, fields, body.payload)
    except (CannotDecode, ValueError) as error:
        return _Event(topic, {}, message.data, str(error))


def _json_line(message: _Message, event: _Event) -> str:
    topic = {} if event.topic is None else {"topic_type": event.topic.type, "topic_source": event.topic.source}
    shown: dict[str, Any] = {"subject": message.subject, **topic, **event.fields, "size_bytes": len(message.data)}
    if isinstance(message, StoredMessage):
        shown |= {"stream": message.stream, "sequence": message.sequence, "stored_at": iso(message.stored_at)}
    if event.problem is not None:
        shown["problem"] = event.problem
    if event.payload is None:
        return orjson.dumps(shown).decode()
    try:
        shown["data"] = orjson.loads(event.payload)
    except orjson.JSONDecodeError:
        shown["data_base64"] = base64.b64encode(event.payload).decode()
    return orjson.dumps(shown).decode()


def _text_line(message: _Message, event: _Event) -> str:
    where = message.subject if event.topic is None else f"{event.topic.type}/{event.topic.source}"
    what = event.fields.get("message_type") or "(plain)"
    when = datetime.fromtimestamp(message.stored_at if isinstance(message, StoredMessage) else time.time())
    return printable(f"{when:%H:%M:%S.%f}"[:-3] + f"  {where}  {what}  {_shown(event)}")


def _shown(event: _Event) -> str:
    if event.problem is not None:
        return f"cannot be read: {event.problem}"
    if event.payload is None:
        return f"({event.fields[_BLOB_SIZE]:,} bytes by reference, {event.fields[DATA_REF]})"
    return " ".join(event.payload.decode("utf-8", "backslashreplace").split("\n"))
