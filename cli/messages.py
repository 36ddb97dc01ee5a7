"""``natsrt send`` and ``publish``: sending messages from a terminal."""

from __future__ import annotations

import asyncio
import sys
from datetime import datetime
from functools import partial

import click
from autogen_core import AgentId, TopicId

from natsrt.errors import CallTimeout
from natsrt.runtime import NatsAgentRuntime
from natsrt.transport.connection import Refusal
from natsrt.transport.headers import headers_size
from natsrt.wire.envelope import KEY_HEADER, TYPE_HEADER
from natsrt.wire.failures import SERVICE_ERROR, ErrorTypes
from natsrt.wire.serialization import NAME_THE_TYPE
from natsrt.wire.subjects import Subjects

from .connecting import Connecting, connects
from .exits import CommandFailed, Exit, answered
from .moments import Duration, Time
from .moments import due as due_then
from .naming import DEFAULT, agent_id, topic_id
from .output import line, note

type_name_option = click.option(
    "--type-name",
    metavar="T",
    help="Type of the message. [default: the type of the agent's messages that the body fits]",
)


def given_body(given: str | None) -> bytes:
    """The body: the argument, or standard input if the argument is ``-`` or missing."""
    if given is not None and given != "-":
        return given.encode("utf-8", "surrogateescape")
    if given is None and sys.stdin.isatty():
        raise CommandFailed("the body is missing: give it as an argument, or pipe it in", Exit.USAGE)
    return sys.stdin.buffer.read()


def _in_one_message(runtime: NatsAgentRuntime, body: bytes, headers: dict[str, str]) -> bool:
    """True if a body and its headers fit into one message."""
    return len(body) + headers_size(headers) <= runtime.running.connection.max_payload


def _require_type(type_name: str | None, body: bytes) -> str:
    """The type of a message that is sent by reference. Raises `CommandFailed` if it is not given."""
    if type_name is None:
        raise CommandFailed(
            f"the body has {len(body):,} bytes, more than the server accepts in one message: name its type with "
            "--type-name, then it is sent by reference",
            Exit.USAGE,
        )
    return type_name


def with_option(failure: BaseException) -> BaseException:
    """What an agent has answered, with the option in place of the header that names the type of a message."""
    if NAME_THE_TYPE not in str(failure):
        return failure
    return CommandFailed(answered(failure).replace(NAME_THE_TYPE, "name the type with --type-name"), Exit.REMOTE_ERROR)


# -- send --------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("agent", metavar="TYPE[/KEY]")
@click.argument("body", required=False)
@type_name_option
@click.option("--stream", "streams", is_flag=True, help="Print each item that the handler sends, as it comes.")
@click.option(
    "--json", "as_json", is_flag=True, help="With --stream: print each item as one line of JSON, with its type."
)
@connects()
def send(
    connecting: Connecting, agent: str, body: str | None, type_name: str | None, streams: bool, as_json: bool
) -> None:
    """Call an agent and print its reply.

    BODY is the message as JSON; "-", or no BODY with a pipe, reads it from standard input. Without KEY, the key is
    "default". The call waits until the handler has finished; --timeout, or the setting call_timeout, limits that. A
    BODY that does not fit into one message is sent by reference, and needs --type-name.

    With --stream, prints each item that the handler sends, and its result as the last one. The questions of the handler
    are asked: a line of standard input is the answer, as JSON or as text. The handler is stopped when this command ends
    before it, as after Ctrl-C. Only --timeout limits the wait.

    \b
    natsrt send upper/demo '{"text": "hi"}'
    natsrt send --stream writer/ada '{"text": "to be or not to be"}'
    """
    if as_json and not streams:
        raise CommandFailed("--json needs --stream: a reply is printed as the agent sent it", Exit.USAGE)
    named, sent = agent_id(agent, default_key=DEFAULT), given_body(body)
    if streams:
        asyncio.run(_stream(connecting, named, sent, type_name, as_json))
    else:
        asyncio.run(_send(connecting, named, sent, type_name))


async def _stream(connecting: Connecting, agent: AgentId, body: bytes, type_name: str | None, as_json: bool) -> None:
    from .streamed import stream

    try:
        await stream(connecting, agent, body, type_name, as_json)
    except Exception as failure:
        raise with_option(failure) from None


async def _send(connecting: Connecting, agent: AgentId, body: bytes, type_name: str | None) -> None:
    # A plain call: the runtime follows it as its own calls, and does not interpret the reply.
    headers = {KEY_HEADER: agent.key} | ({TYPE_HEADER: type_name} if type_name else {})
    async with connecting.runtime(call_timeout=connecting.timeout) as runtime:
        limit = runtime.options.call_timeout
        try:
            async with asyncio.timeout(limit):
                if not _in_one_message(runtime, body, headers):
                    calls, named = runtime.running.outgoing.calls, _require_type(type_name, body)
                    line((await calls.call_large_body(body, agent, named)).decode("utf-8", "backslashreplace"))
                    return
                reply = await runtime.running.calls.call(agent, body, headers=headers)
        except TimeoutError as error:
            if limit is None or isinstance(error, CallTimeout):
                raise
            raise CallTimeout(str(agent), limit, "--timeout") from None
    if SERVICE_ERROR in (reply.headers or {}):
        raise with_option(ErrorTypes().rebuild(reply.data, agent=str(agent), worker_id=None))
    line(reply.data.decode("utf-8", "backslashreplace"))


# -- publish -----------------------------------------------------------------------------------------------------


@click.command()
@click.argument("topic", metavar="TOPIC_TYPE[/SOURCE]")
@click.argument("body", required=False)
@type_name_option
@click.option("--delay", type=Duration(), help="Publish it after this time, on a durable topic: 90s, 24h.")
@click.option("--at", type=Time(), help="Publish it at this time, on a durable topic: 2030-01-31T09:00:00Z.")
@connects()
def publish(
    connecting: Connecting,
    topic: str,
    body: str | None,
    type_name: str | None,
    delay: float | None,
    at: datetime | None,
) -> None:
    """Publish an event.

    Prints the agent types that receive it to standard error. With --delay or --at, prints the message id, under which
    a program can cancel the event.

    BODY is the message as JSON; "-", or no BODY with a pipe, reads it from standard input. Without SOURCE, the source
    is "default". A BODY that does not fit into one message is sent by reference, and needs --type-name.

    \b
    natsrt publish news.tech/server '{"headline": "42"}'
    """
    due = due_then(delay, at)
    publishing = _publish if due is None else partial(_publish_later, due)
    asyncio.run(publishing(connecting, topic_id(topic), given_body(body), type_name))


async def _publish_later(
    due: datetime, connecting: Connecting, topic: TopicId, body: bytes, type_name: str | None
) -> None:
    async with connecting.runtime() as runtime:
        try:
            headers = {TYPE_HEADER: type_name} if type_name else {}
            events = runtime.running.outgoing.events
            if _in_one_message(runtime, body, headers):
                message_id = await events.publish_body(body, topic, due, type_name)
            else:
                message_id = await events.publish_large_body(body, topic, _require_type(type_name, body), due)
        except ValueError as error:
            raise CommandFailed(str(error), Exit.USAGE) from None
    note(f"{len(body):,} bytes will be published on {topic} at {due.isoformat(timespec='seconds')}, with the id:")
    line(message_id)


async def _publish(connecting: Connecting, topic: TopicId, body: bytes, type_name: str | None) -> None:
    async with connecting.runtime() as runtime:
        running = runtime.running
        try:
            subject = Subjects(runtime.options.namespace).topic(topic.type, topic.source)
        except ValueError as error:
            raise CommandFailed(str(error), Exit.USAGE) from None
        refused: list[Refusal] = []

        def note_refusal(denied: Refusal) -> bool:
            """Whether it is about this event: then it is raised here, and not logged too."""
            if denied.subject == subject:
                refused.append(denied)
            return denied.subject == subject

        running.connection.on_denied(note_refusal)
        headers = {TYPE_HEADER: type_name} if type_name else {}
        if _in_one_message(runtime, body, headers):
            await running.connection.publish(subject, body, headers=headers or None)
        else:
            await running.outgoing.events.publish_large_body(body, topic, _require_type(type_name, body), None)
        await running.connection.barrier()
        for denied in refused:
            raise denied
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
        else f"{shown}; no live agent type subscribes to that topic{_hint(topic.type, runtime.options.namespace)}"
    )


def _hint(topic_type: str, namespace: str) -> str:
    """What was meant by a topic type that is written as a NATS subject; empty if it is not."""
    subject = topic_type.removeprefix(f"{namespace}.")
    meant = subject.removeprefix("topic.")
    return "" if meant == subject else f". The topic type is {topic_type!r}; did you mean {meant!r}?"
