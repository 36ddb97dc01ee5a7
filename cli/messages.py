"""``natsrt send``, ``publish`` and ``tail``: sending and receiving messages in a terminal."""

from __future__ import annotations

import asyncio
import base64
import signal
import sys
from datetime import datetime
from typing import Any, NamedTuple

import click
import orjson
from autogen_core import AgentId, TopicId
from nats.aio.msg import Msg

from natsrt.errors import CallTimeout, CannotDecode
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import KEY_HEADER, TYPE_HEADER
from natsrt.wire.failures import SERVICE_ERROR, ErrorTypes
from natsrt.wire.subjects import Subjects, plain_prefix

from .connecting import Connecting, connects
from .exits import CommandFailed, Exit
from .naming import agent_id
from .output import line, note, printable

_DEFAULT = "default"

_type_name = click.option(
    "--type-name",
    metavar="T",
    help="Type of the message. [default: the type of the agent's messages that the body fits]",
)


def _body(given: str | None) -> bytes:
    """The body: the argument, or standard input if the argument is ``-`` or missing."""
    if given is not None and given != "-":
        return given.encode("utf-8", "surrogateescape")
    if given is None and sys.stdin.isatty():
        raise CommandFailed("the body is missing: give it as an argument, or pipe it in", Exit.USAGE)
    return sys.stdin.buffer.read()


# -- send --------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("agent", metavar="TYPE[/KEY]")
@click.argument("body", required=False)
@_type_name
@connects()
def send(connecting: Connecting, agent: str, body: str | None, type_name: str | None) -> None:
    """Call an agent and print its reply.

    BODY is the message as JSON; "-", or no BODY with a pipe, reads it from standard input. Without KEY, the key is
    "default". The call waits until the handler has finished; --timeout, or the setting call_timeout, limits that.

    \b
    natsrt send upper/demo '{"text": "hi"}'
    """
    asyncio.run(_send(connecting, agent_id(agent, default_key=_DEFAULT), _body(body), type_name))


async def _send(connecting: Connecting, agent: AgentId, body: bytes, type_name: str | None) -> None:
    # A plain call: the runtime follows it as its own calls, and does not interpret the reply.
    headers = {KEY_HEADER: agent.key} | ({TYPE_HEADER: type_name} if type_name else {})
    async with connecting.runtime(call_timeout=connecting.timeout) as runtime:
        limit = runtime.options.call_timeout
        calling = runtime.running.calls.call(agent, body, headers=headers)
        try:
            async with asyncio.timeout(limit):
                reply = await calling
        except TimeoutError as error:
            if limit is None or isinstance(error, CallTimeout):
                raise
            raise CallTimeout(str(agent), limit, "--timeout") from None
    if SERVICE_ERROR in (reply.headers or {}):
        raise ErrorTypes().rebuild(reply.data, agent=str(agent), worker_id=None)
    line(reply.data.decode("utf-8", "backslashreplace"))


# -- publish -----------------------------------------------------------------------------------------------------


@click.command()
@click.argument("topic", metavar="TOPIC_TYPE[/SOURCE]")
@click.argument("body", required=False)
@_type_name
@connects()
def publish(connecting: Connecting, topic: str, body: str | None, type_name: str | None) -> None:
    """Publish an event.

    Prints the agent types that receive it to standard error.

    BODY is the message as JSON; "-", or no BODY with a pipe, reads it from standard input. Without SOURCE, the source
    is "default".

    \b
    natsrt publish news.tech/server '{"headline": "42"}'
    """
    asyncio.run(_publish(connecting, _topic_id(topic), _body(body), type_name))


def _topic_id(text: str) -> TopicId:
    topic_type, slash, source = text.partition("/")
    try:
        return TopicId(topic_type, source if slash else _DEFAULT)
    except ValueError as error:
        raise CommandFailed(f"{text!r} is not a topic: {error}", Exit.USAGE) from None


async def _publish(connecting: Connecting, topic: TopicId, body: bytes, type_name: str | None) -> None:
    async with connecting.runtime() as runtime:
        running = runtime.running
        try:
            subject = Subjects(runtime.options.namespace).topic(topic.type, topic.source)
        except ValueError as error:
            raise CommandFailed(str(error), Exit.USAGE) from None
        await running.connection.publish(subject, body, headers={TYPE_HEADER: type_name} if type_name else None)
        await running.connection.barrier()
        view = running.registry.view
        takers = sorted(
            agent_type
            for agent_type in view.hosts
            if view.workers_hosting(agent_type)
            and any(rule.kind == "custom" or rule.matches(topic.type) for rule in view.rules(agent_type))
        )
    shown = f"published {len(body):,} bytes to {subject}"
    note(
        f"{shown}, for agent types: {', '.join(takers)}"
        if takers
        else f"{shown}; no live agent type subscribes to that topic"
    )


# -- tail --------------------------------------------------------------------------------------------------------


class _Event(NamedTuple):
    """The content of an event's message. ``problem`` says what could not be read; None if all could."""

    topic: TopicId | None
    fields: dict[str, Any]
    payload: bytes
    problem: str | None = None


@click.command()
@click.argument("prefix", default="")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="Stop after N events.")
@click.option("--json", "as_json", is_flag=True, help="Print each event as one line of JSON.")
@connects()
def tail(connecting: Connecting, prefix: str, count: int | None, as_json: bool) -> None:
    """Show events as they are published.

    Shows the events of all topics whose type starts with PREFIX, until Ctrl-C.

    \b
    natsrt tail              all events
    natsrt tail news.        news.tech, news.sport, …
    """
    try:
        prefix = plain_prefix(prefix)
    except ValueError as error:
        raise CommandFailed(str(error), Exit.USAGE) from None
    asyncio.run(_tail(connecting, prefix, count, as_json))


async def _tail(connecting: Connecting, prefix: str, count: int | None, as_json: bool) -> None:
    options = connecting.options()
    subjects = Subjects(options.namespace)
    arrived: asyncio.Queue[Msg | None] = asyncio.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, arrived.put_nowait, None)
    connection = Connection(options, client_name="natsrt tail")
    denied: list[Exception] = []
    connection.on_denied(denied.append)
    await connection.open()
    try:
        subject = subjects.prefix_filter(prefix).subject
        await connection.subscribe(subject, arrived.put_nowait)
        await connection.barrier()
        if denied:
            raise denied[0]
        note(f"listening on {subject} at {connection.server}")
        shown = 0
        while (count is None or shown < count) and (message := await arrived.get()) is not None:
            event = _read(message, subjects)
            if event.topic is None or event.topic.type.startswith(prefix):
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
