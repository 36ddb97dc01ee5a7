"""``publish_message``: who gets an event, how often, and with what context."""

from __future__ import annotations

import pytest
from autogen_core import (
    AgentId,
    DefaultTopicId,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypePrefixSubscription,
    TypeSubscription,
    default_subscription,
    message_handler,
    type_subscription,
)
from google.protobuf import struct_pb2, wrappers_pb2

from tests.conformance.conftest import MakeWorld, World, natsrt_only, register
from tests.conformance.samples import Recorder, Seen, Text, contents


@default_subscription
class DefaultRecorder(Recorder):
    pass


@type_subscription("news")
class NewsRecorder(Recorder):
    pass


async def test_an_event_reaches_the_agent_whose_key_is_the_topics_source(world: World) -> None:
    seen: list[Seen] = []
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder(seen))
    await world.caller.publish_message(Text("a"), TopicId("news", "desk"))
    await world.caller.publish_message(Text("b"), TopicId("news", "a.b *> ü"))
    await world.idle()
    assert [(one.agent, one.message.content) for one in seen] == [
        (AgentId("recorder", "desk"), "a"),
        (AgentId("recorder", "a.b *> ü"), "b"),
    ]


async def test_a_handler_of_an_event_sees_topic_sender_and_id(world: World) -> None:
    seen: list[Seen] = []
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder(seen))
    await Recorder.register(world.host, "boss", lambda: Recorder([]))
    topic = TopicId("news", "desk")
    await world.caller.publish_message(Text("a"), topic, sender=AgentId("boss", "b"), message_id="m1")
    await world.caller.publish_message(Text("b"), topic)
    await world.idle()
    first, second = (one.context for one in seen)
    assert (first.topic_id, first.sender, first.is_rpc, first.message_id) == (topic, AgentId("boss", "b"), False, "m1")
    assert second.sender is None
    assert second.message_id
    assert not second.cancellation_token.is_cancelled()


async def test_the_default_subscription_takes_the_default_topic(world: World) -> None:
    seen: list[Seen] = []
    await DefaultRecorder.register(world.host, "recorder", lambda: DefaultRecorder(seen))
    await world.caller.publish_message(Text("a"), DefaultTopicId())
    await world.caller.publish_message(Text("b"), TopicId("other", "default"))
    await world.idle()
    assert contents(seen) == ["a"]
    assert seen[0].agent == AgentId("recorder", "default")


async def test_a_default_topic_published_by_a_handler_has_its_agents_key_as_source(world: World) -> None:
    seen: list[Seen] = []

    class Publisher(RoutedAgent):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> None:
            await self.publish_message(message, DefaultTopicId())

    await DefaultRecorder.register(world.host, "recorder", lambda: DefaultRecorder(seen))
    await Publisher.register(world.host, "publisher", lambda: Publisher("publishes"))
    await world.caller.send_message(Text("a"), AgentId("publisher", "me"))
    await world.idle()
    assert [one.agent for one in seen] == [AgentId("recorder", "me")]
    assert seen[0].context.sender == AgentId("publisher", "me")


async def test_an_event_reaches_every_subscribed_type(world: World) -> None:
    seen: list[Seen] = []
    for name in ("first", "second", "third"):
        await NewsRecorder.register(world.host, name, lambda: NewsRecorder(seen))
    await world.caller.publish_message(Text("a"), TopicId("news", "k"))
    await world.idle()
    assert sorted(one.agent.type for one in seen) == ["first", "second", "third"]


@natsrt_only
async def test_several_subscriptions_that_match_deliver_once(world: World) -> None:
    seen: list[Seen] = []
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    for subscription in (
        TypeSubscription("news.tech", "recorder"),
        TypePrefixSubscription("news.", "recorder"),
        TypePrefixSubscription("news", "recorder"),
        TypePrefixSubscription("ne", "recorder"),
        TypePrefixSubscription("", "recorder"),
    ):
        await world.host.add_subscription(subscription)
    for n in range(100):
        await world.caller.publish_message(Text(str(n)), TopicId("news.tech", "k"))
    await world.idle()
    assert contents(seen) == [str(n) for n in range(100)]


async def test_the_publishing_agent_does_not_get_its_own_event(world: World) -> None:
    seen: list[Seen] = []

    @type_subscription("news")
    class Publisher(Recorder):
        @message_handler
        async def on_line(self, message: wrappers_pb2.StringValue, ctx: MessageContext) -> None:
            await self.publish_message(Text(message.value), TopicId("news", "k"))

    await Publisher.register(world.host, "publisher", lambda: Publisher(seen))
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder(seen))
    await world.caller.send_message(wrappers_pb2.StringValue(value="own"), AgentId("publisher", "k"))
    await world.caller.send_message(wrappers_pb2.StringValue(value="other"), AgentId("publisher", "x"))
    await world.idle()
    assert sorted((str(one.agent), one.message.content) for one in seen) == [
        ("publisher/k", "other"),
        ("recorder/k", "other"),
        ("recorder/k", "own"),
    ]


PREFIX_CASES = [
    ("news.", "news.tech", True),
    ("news.", "news.tech.deep", True),
    ("news.", "news", False),
    ("news", "news", True),
    ("news", "news.tech", True),
    ("news", "newspaper", True),
    ("ord", "orders", True),
    ("ord", "sord", False),
    ("a:", "a:b", True),
    ("a:", "a:b:c", True),
    ("a:", "a", False),
    ("", "anything", True),
    ("news.te", "news.tech", True),
    ("news.te", "news.sport", False),
]


@pytest.mark.parametrize(("prefix", "topic_type", "matches"), PREFIX_CASES)
async def test_a_prefix_subscription_takes_what_starts_with_its_prefix(
    world: World, prefix: str, topic_type: str, matches: bool
) -> None:
    seen: list[Seen] = []
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    await world.host.add_subscription(TypePrefixSubscription(prefix, "recorder"))
    await world.caller.publish_message(Text("a"), TopicId(topic_type, "k"))
    await world.idle()
    assert bool(seen) is matches


@natsrt_only
async def test_the_older_spelling_of_a_prefix_means_what_it_meant(world: World) -> None:
    seen: list[Seen] = []
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    await world.host.add_subscription(TypePrefixSubscription("news.*", "recorder"))
    for topic_type in ("news.tech", "news", "newspaper"):
        await world.caller.publish_message(Text(topic_type), TopicId(topic_type, "k"))
    await world.idle()
    assert contents(seen) == ["news.tech"]


@natsrt_only
@pytest.mark.parametrize("prefix", ["*", "news.>", "news*", "a b", "new s."])
async def test_a_prefix_that_no_topic_can_have_is_refused_with_the_right_spelling(world: World, prefix: str) -> None:
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    with pytest.raises(ValueError, match="prefix"):
        await world.host.add_subscription(TypePrefixSubscription(prefix, "recorder"))


class BySource:
    """A Subscription of the user's own: the topic's source, reversed, is the agent's key."""

    def __init__(self, agent_type: str, wanted: str) -> None:
        self.agent_type = agent_type
        self.wanted = wanted

    @property
    def id(self) -> str:
        return f"by-source-{self.agent_type}-{self.wanted}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BySource) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def is_match(self, topic_id: TopicId) -> bool:
        return topic_id.source.startswith(self.wanted)

    def map_to_agent(self, topic_id: TopicId) -> AgentId:
        return AgentId(self.agent_type, topic_id.source[::-1])


async def test_a_subscription_class_of_ones_own_decides(world: World) -> None:
    seen: list[Seen] = []
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    await world.host.add_subscription(BySource("recorder", "x"))
    await world.caller.publish_message(Text("a"), TopicId("any.topic", "xyz"))
    await world.caller.publish_message(Text("b"), TopicId("other", "abc"))
    await world.idle()
    assert [(one.agent.key, one.message.content) for one in seen] == [("zyx", "a")]
    await world.host.remove_subscription(BySource("recorder", "x").id)
    await world.caller.publish_message(Text("c"), TopicId("any.topic", "xyz"))
    await world.idle()
    assert contents(seen) == ["a"]


@natsrt_only
async def test_a_subscription_class_of_ones_own_and_an_ordinary_one_deliver_once_to_one_agent(world: World) -> None:
    seen: list[Seen] = []
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder(seen))
    await world.host.add_subscription(BySource("recorder", ""))
    await world.caller.publish_message(Text("same"), TopicId("news", "abba"))
    await world.caller.publish_message(Text("two"), TopicId("news", "ab"))
    await world.idle()
    assert sorted((one.agent.key, one.message.content) for one in seen) == [
        ("ab", "two"),
        ("abba", "same"),
        ("ba", "two"),
    ]


@natsrt_only
async def test_a_subscription_without_an_agent_type_is_refused(world: World) -> None:
    class Nameless:
        id = "nameless"

        def is_match(self, topic_id: TopicId) -> bool:
            return True

        def map_to_agent(self, topic_id: TopicId) -> AgentId:
            return AgentId("recorder", "k")

    with pytest.raises(ValueError, match="agent_type"):
        await world.host.add_subscription(Nameless())


async def test_an_event_without_subscribers_reaches_nobody_and_fails_nowhere(world: World) -> None:
    seen: list[Seen] = []
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    await world.host.add_subscription(TypeSubscription("somebody", "recorder"))
    await world.caller.publish_message(Text("a"), TopicId("nobody", "listens"))
    await world.caller.publish_message(Text("b"), TopicId("somebody", "listens"))
    await world.idle()
    assert contents(seen) == ["b"]


@pytest.mark.parametrize(
    "message", [wrappers_pb2.StringValue(value="v"), struct_pb2.Struct(fields={})], ids=["wrapper", "struct"]
)
async def test_protobuf_messages_are_events(world: World, message: object) -> None:
    seen: list[object] = []

    class Protobuf(RoutedAgent):
        @message_handler
        async def on_protobuf(self, message: wrappers_pb2.StringValue | struct_pb2.Struct, ctx: MessageContext) -> None:
            seen.append(message)

    await register(world.host, Protobuf, "protobuf", lambda: Protobuf("protobuf"))
    await world.host.add_subscription(TypeSubscription("p", "protobuf"))
    await world.caller.publish_message(message, TopicId("p", "k"))
    await world.idle()
    assert seen == [message]


@natsrt_only
@pytest.mark.parametrize("message", ["text", 7, 1.5, True, b"\x00\xff", [1], {"a": 1}, None], ids=repr)
async def test_plain_values_are_events(world: World, message: object) -> None:
    seen: list[object] = []

    class Plain(RoutedAgent):
        @message_handler
        async def on_plain(
            self, message: str | int | float | bool | bytes | list | dict | None, ctx: MessageContext
        ) -> None:
            seen.append(message)

    await register(world.host, Plain, "plain", lambda: Plain("plain"))
    await world.host.add_subscription(TypeSubscription("p", "plain"))
    await world.caller.publish_message(message, TopicId("p", "k"))
    await world.idle()
    assert seen == [message]
    assert type(seen[0]) is type(message)


async def test_an_event_to_one_agents_own_topic_is_a_direct_message(world: World) -> None:
    seen: list[Seen] = []
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    await world.caller.publish_message(Text("a"), TopicId("recorder:", "k"))
    await world.caller.publish_message(Text("b"), TopicId("recorder:x", "k"))
    await world.idle()
    assert sorted(contents(seen)) == ["a", "b"]


async def test_events_of_one_topic_are_handled_in_the_order_sent(world: World) -> None:
    seen: list[Seen] = []
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder(seen))
    for n in range(500):
        await world.caller.publish_message(Text(str(n)), TopicId("news", "k"))
    await world.idle()
    assert contents(seen) == [str(n) for n in range(500)]


async def test_a_handler_that_raises_disturbs_neither_the_publisher_nor_other_agents(world: World) -> None:
    seen: list[Seen] = []

    @type_subscription("news")
    class Raiser(RoutedAgent):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> None:
            raise ValueError("no news")

    await Raiser.register(world.host, "raiser", lambda: Raiser("raises"))
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder(seen))
    for n in range(2):
        await world.caller.publish_message(Text(str(n)), TopicId("news", "k"))
    await world.idle()
    assert contents(seen) == ["0", "1"]


@natsrt_only
async def test_an_event_handlers_exception_is_raised_by_stop_when_idle_where_asked_for(make_world: MakeWorld) -> None:
    world = await make_world(ignore_unhandled_exceptions=False)

    @type_subscription("news")
    class Raiser(RoutedAgent):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> None:
            raise ValueError(message.content)

    await Raiser.register(world.host, "raiser", lambda: Raiser("raises"))
    await world.caller.publish_message(Text("no news"), TopicId("news", "k"))
    if world.is_remote:
        await world.caller.stop_when_idle()
    with pytest.raises(ValueError, match="no news"):
        await world.host.stop_when_idle()
    assert world.host.worker_id is None


@natsrt_only
async def test_a_topic_whose_subject_would_be_too_long_is_refused_before_it_is_sent(world: World) -> None:
    with pytest.raises(ValueError, match="1,?024"):
        await world.caller.publish_message(Text("a"), TopicId(".".join(["x" * 100] * 12), "k"))
    await world.idle()
