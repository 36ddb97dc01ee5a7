"""Any name is delivered to exactly the agent it names, or refused before sending; the connection never closes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from autogen_core import (
    AgentId,
    BaseAgent,
    MessageContext,
    MessageSerializer,
    TopicId,
    TypePrefixSubscription,
    TypeSubscription,
)
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from natsrt import MessageTooLarge, NatsAgentRuntime
from natsrt.embedded import EmbeddedServer

HOSTILE = [
    "",
    "*",
    ">",
    "a.*",
    "a b",
    ".",
    "..",
    "a.",
    ".a",
    "a..b",
    "=",
    "=H",
    "=20",
    "=H" + "0" * 64,
    "$JS.API.INFO",
    "_INBOX.x",
    "agent.admin",
    "natsrt.cancel",
    "a/b",
    "a:b:",
    "x\r\nPUB agent.admin 0\r\n\r\n",
    "\x00",
    "\t\n",
    '","data":{"x":',
    "\\",
    '"',
    "x" * 199,
    "x" * 200,
    "x" * 201,
    "x" * 10_000,
    "." * 300,
    "ä" * 5_000,
    "日本語",
    "🙂",
    "\u00a0",
    "\u202e",
    "\ud800",
    "a\udfff",
]
texts = st.sampled_from(HOSTILE) | st.text(max_size=40) | st.text(st.characters(), max_size=12)
sampled = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@dataclass
class Note:
    text: str


class Recorder(BaseAgent):
    """Remembers what reached which agent, and returns its own id."""

    seen: list[tuple[AgentId, Any, MessageContext]] = []

    def __init__(self) -> None:
        super().__init__("remembers")

    async def on_message_impl(self, message: Any, ctx: MessageContext) -> Any:
        self.seen.append((self.id, message, ctx))
        return [self.id.type, self.id.key]


class Pair:
    """A runtime that hosts, and one that sends."""

    def __init__(self, worker: NatsAgentRuntime, sender: NatsAgentRuntime) -> None:
        self.worker, self.sender = worker, sender

    @asynccontextmanager
    async def hosting(self, *agent_types: str) -> AsyncIterator[None]:
        """Types hosted for one example."""
        Recorder.seen.clear()
        try:
            for agent_type in agent_types:
                await self.worker.register_factory(agent_type, Recorder)
            yield
        finally:
            for agent_type in agent_types:
                await self.worker.unregister(agent_type)

    def lives(self) -> None:
        for runtime in (self.worker, self.sender):
            assert runtime.running.connection.reconnects == 0
            assert runtime.ready

    async def settled(self) -> None:
        """Everything that was sent has arrived and been handled."""
        await self.sender.running.connection.barrier()
        await self.worker.running.wait_idle()


@pytest.fixture
async def pair(server: EmbeddedServer, namespace: str) -> AsyncIterator[Pair]:
    worker = NatsAgentRuntime(server.url, namespace=namespace)
    sender = NatsAgentRuntime(server.url, namespace=namespace)
    worker.add_message_serializer(NoteSerializer(Note))
    await worker.register_factory("plain", Recorder)
    async with worker, sender:
        yield Pair(worker, sender)


class NoteSerializer(MessageSerializer[Note]):
    """Notes of a class with any name, in any content type."""

    def __init__(self, cls: type[Note], content_type: str = "application/json") -> None:
        self.cls, self._content_type = cls, content_type

    @property
    def type_name(self) -> str:
        return self.cls.__name__

    @property
    def data_content_type(self) -> str:
        return self._content_type

    def serialize(self, message: Note) -> bytes:
        return b'"' + message.text.encode() + b'"'

    def deserialize(self, payload: bytes) -> Note:
        return self.cls(payload[1:-1].decode())


def can_travel(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@sampled
@given(texts)
async def test_a_call_reaches_exactly_the_key_it_names_or_is_refused(pair: Pair, key: str) -> None:
    async with pair.hosting("keys"):
        if not can_travel(key):
            with pytest.raises(ValueError, match="surrogate"):
                await pair.sender.send_message(Note("hi"), AgentId("keys", key))
        else:
            assert await pair.sender.send_message(Note("hi"), AgentId("keys", key)) == ["keys", key]
            assert [agent_id for agent_id, _, _ in Recorder.seen] == [AgentId("keys", key)]
    pair.lives()


agent_types = st.from_regex(r"[\w\-.]{1,20}", fullmatch=True) | st.sampled_from(
    [text for text in HOSTILE if text.replace(".", "").replace("-", "").isalnum()] + [".", "..", "-", "a.b", "a_b", "Ä"]
)


@sampled
@given(st.sets(agent_types, min_size=1, max_size=3))
async def test_a_call_reaches_exactly_the_type_it_names(pair: Pair, types: set[str]) -> None:
    try:
        ids = [AgentId(agent_type, "k") for agent_type in types]
    except ValueError:
        assume(False)
    async with pair.hosting(*types):
        for agent_id in ids:
            assert await pair.sender.send_message(Note("hi"), agent_id) == [agent_id.type, "k"]
        assert [agent_id for agent_id, _, _ in Recorder.seen] == ids
    pair.lives()


topic_types = st.from_regex(r"[\w\-.:=]{1,20}", fullmatch=True) | st.sampled_from(
    ["a", "a.b", "a..b", ".", ":", "=", "=H", "a:", "a:b", "a.", ".a", "x" * 500, "x." * 100, "x." * 480, "ä" * 300]
)


@sampled
@given(topic_types, texts, st.sampled_from(["type", "prefix", "shorter prefix", "another type"]))
@example("x." * 480, "s", "shorter prefix")
async def test_an_event_reaches_exactly_the_agent_of_its_source_or_is_refused(
    pair: Pair, topic_type: str, source: str, kind: str
) -> None:
    try:
        topic = TopicId(topic_type, source)
    except ValueError:
        assume(False)
    async with pair.hosting("events"):
        subscription: TypeSubscription | TypePrefixSubscription
        match kind:
            case "type":
                subscription = TypeSubscription(topic_type, "events")
            case "prefix":
                subscription = TypePrefixSubscription(topic_type, "events")
            case "shorter prefix":
                subscription = TypePrefixSubscription(topic_type[: len(topic_type) // 2], "events")
            case _:
                subscription = TypeSubscription(topic_type + "x", "events")
        try:
            await pair.worker.add_subscription(subscription)
        except ValueError as error:
            assert "subject" in str(error)  # too long for any event to match
            added = False
        else:
            added = True
        try:
            await pair.sender.publish_message(Note("hi"), topic)
            sent = True
        except ValueError as error:
            assert "surrogate" in str(error) or "subject" in str(error)
            assert not can_travel(source) or len(topic_type) > 200
            sent = False
        await pair.settled()
        reached = [(agent_id, ctx.topic_id) for agent_id, _, ctx in Recorder.seen]
        matches = sent and added and kind != "another type"
        assert reached == ([(AgentId("events", source), topic)] if matches else [])
        if added:
            await pair.worker.remove_subscription(subscription.id)
    pair.lives()


@sampled
@given(message_id=texts, sender_key=texts, key=texts)
async def test_message_ids_and_senders_arrive_as_they_are_or_are_refused(
    pair: Pair, message_id: str, sender_key: str, key: str
) -> None:
    sender = AgentId("sender", sender_key)
    topic = TopicId("notes", "k")
    can_be_sent = can_travel(message_id) and can_travel(sender_key)
    async with pair.hosting("notes"):
        subscription = TypeSubscription("notes", "notes")
        await pair.worker.add_subscription(subscription)
        call = pair.sender.send_message(Note("hi"), AgentId("notes", "k"), sender=sender, message_id=message_id)
        publish = pair.sender.publish_message(Note("hi"), topic, sender=sender, message_id=message_id)
        if can_be_sent:
            await call
            await publish
        else:
            for work in (call, publish):
                with pytest.raises(ValueError, match="UTF-8"):
                    await work
        await pair.settled()
        arrived = [(context.message_id, context.sender, context.topic_id) for _, _, context in Recorder.seen]
        assert arrived == ([(message_id, sender, None), (message_id, sender, topic)] if can_be_sent else [])
        await pair.worker.remove_subscription(subscription.id)
    pair.lives()


@cache
def note_class(name: str) -> type[Note]:
    return type(name, (Note,), {})


@sampled
@given(type_name=texts, content_type=texts)
async def test_type_names_and_content_types_arrive_as_they_are_or_are_refused(
    pair: Pair, type_name: str, content_type: str
) -> None:
    assume(type_name not in ("Note", "str", "int", "None", "dict", "list", "bytes", "bool", "float", "UnknownPayload"))
    try:
        cls = note_class(type_name)
    except ValueError:  # Python has no class of that name
        assume(False)
    serializer = NoteSerializer(cls, content_type)
    for runtime in (pair.worker, pair.sender):
        runtime.add_message_serializer(serializer)
    async with pair.hosting("notes"):
        call = pair.sender.send_message(cls("hi"), AgentId("notes", "k"))
        if type_name and can_travel(type_name) and can_travel(content_type):
            assert await call == ["notes", "k"]
            [(_, message, _)] = Recorder.seen
            assert type(message) is cls
            assert message.text == "hi"
        else:
            with pytest.raises(ValueError):
                await call
            assert not Recorder.seen
    pair.lives()


@sampled
@given(headers=st.dictionaries(st.sampled_from(["Natsrt-Key", "Natsrt-Type"]), texts), body=st.binary(max_size=30))
async def test_names_in_the_headers_of_plain_messages_cannot_hurt(
    pair: Pair, headers: dict[str, str], body: bytes
) -> None:
    assume(all(can_travel(value) and not set(value) & set("\r\n") for value in headers.values()))
    Recorder.seen.clear()
    client = pair.sender.running.connection.client
    subject = f"{pair.worker.options.namespace}.agent.plain"
    answer = await client.request(subject, body, headers=headers or None, timeout=10)
    if not answer.headers:
        assert [agent_id.type for agent_id, _, _ in Recorder.seen] == ["plain"]
    pair.lives()


async def test_a_name_that_makes_the_message_too_large_is_refused_before_sending(pair: Pair) -> None:
    async with pair.hosting("keys"):
        limit = pair.sender.running.connection.max_payload
        for long in ("x" * limit, " " * limit):
            with pytest.raises(MessageTooLarge):
                await pair.sender.send_message(Note("hi"), AgentId("keys", long))
            with pytest.raises(MessageTooLarge):
                await pair.sender.send_message(Note("hi"), AgentId("keys", "k"), message_id=long)
            with pytest.raises(MessageTooLarge):
                await pair.sender.publish_message(Note("hi"), TopicId("t", long))
        assert not Recorder.seen
        assert await pair.sender.send_message(Note("hi"), AgentId("keys", "k")) == ["keys", "k"]
    pair.lives()


@sampled
@given(texts)
async def test_an_instance_of_any_name_is_reached_or_refused_and_leaves_nothing_behind(pair: Pair, key: str) -> None:
    agent_id = AgentId("instances", key)
    Recorder.seen.clear()
    if not can_travel(key):
        with pytest.raises(ValueError, match="surrogate"):
            await pair.worker.register_agent_instance(Recorder(), agent_id)
    else:
        await pair.worker.register_agent_instance(Recorder(), agent_id)
        assert await pair.sender.send_message(Note("hi"), agent_id) == ["instances", key]
        assert (await pair.sender.agent_metadata(agent_id))["key"] == key
        assert [agent for agent, _, _ in Recorder.seen] == [agent_id]
    await pair.worker.unregister("instances")
    async with pair.hosting("instances"):  # the type is free again
        pass
    pair.lives()
