"""AutoGen's structured events, and payloads that stay out of natsrt's logs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from autogen_core import (
    EVENT_LOGGER_NAME,
    AgentId,
    DefaultInterventionHandler,
    DropMessage,
    MessageContext,
    RoutedAgent,
    TopicId,
    message_handler,
    try_get_known_serializers_for_type,
    type_subscription,
)
from autogen_core.exceptions import MessageDroppedException
from autogen_core.logging import (
    AgentConstructionExceptionEvent,
    MessageDroppedEvent,
    MessageEvent,
    MessageHandlerExceptionEvent,
)

from natsrt.errors import CannotDecode, NatsrtError
from natsrt.hosting.settlements import clip
from natsrt.observe import events
from tests.conformance.conftest import MakeWorld, World, natsrt_only, one_runtime, two_runtimes
from tests.conformance.samples import Number, Recorder, Text

SECRET = "s3cr3t-payload"
NEWS = TopicId("news", "k")


@type_subscription("news")
class NewsRecorder(Recorder):
    pass


@type_subscription("news")
class Raiser(RoutedAgent):
    @message_handler
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        raise OwnError(f"cannot take {message.content}")


class OwnError(Exception):
    pass


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.events.append(record.msg)


@pytest.fixture
def structured() -> Iterator[_Kept]:
    """What is logged on AutoGen's event logger, at INFO."""
    logger = logging.getLogger(EVENT_LOGGER_NAME)
    handler, level = _Kept(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


async def test_a_call_is_shown_on_its_way_there_and_back(world: World, structured: _Kept) -> None:
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    await world.caller.send_message(Text("a"), AgentId("recorder", "k"), sender=None)
    assert all(isinstance(shown, MessageEvent) for shown in structured.events)
    assert [(shown.kwargs["kind"], shown.kwargs["delivery_stage"]) for shown in structured.events] == [
        ("MessageKind.DIRECT", "DeliveryStage.SEND"),
        ("MessageKind.DIRECT", "DeliveryStage.DELIVER"),
        ("MessageKind.RESPOND", "DeliveryStage.SEND"),
        ("MessageKind.RESPOND", "DeliveryStage.DELIVER"),
    ]
    sent, delivered, answered, _ = structured.events
    assert (sent.kwargs["sender"], sent.kwargs["receiver"]) == (None, "recorder/k")
    assert delivered.kwargs["receiver"] == "recorder/k"
    assert answered.kwargs["sender"] == "recorder/k"


async def test_an_event_is_shown_where_it_was_published_and_at_each_agent(world: World, structured: _Kept) -> None:
    await NewsRecorder.register(world.host, "first", lambda: NewsRecorder([]))
    await NewsRecorder.register(world.host, "second", lambda: NewsRecorder([]))
    await world.caller.publish_message(Text("a"), NEWS)
    await world.idle()
    shown = [(one.kwargs["kind"], one.kwargs["delivery_stage"]) for one in structured.events]
    assert (
        shown
        == [("MessageKind.PUBLISH", "DeliveryStage.SEND")] + [("MessageKind.PUBLISH", "DeliveryStage.DELIVER")] * 2
    )
    assert structured.events[0].kwargs["receiver"] == str(NEWS)


async def test_what_a_handler_and_a_factory_raise_is_shown(world: World, structured: _Kept) -> None:
    def broken() -> Recorder:
        raise ValueError("no agent")

    await Raiser.register(world.host, "raiser", lambda: Raiser("raises"))
    await Recorder.register(world.host, "broken", broken)
    for agent_type in ("raiser", "broken"):
        with pytest.raises(Exception, match=r"cannot take a|no agent"):
            await world.caller.send_message(Text("a"), AgentId(agent_type, "k"))
    raised = [shown for shown in structured.events if isinstance(shown, MessageHandlerExceptionEvent)]
    assert raised[0].kwargs["handling_agent"] == "raiser/k"
    assert "cannot take a" in raised[0].kwargs["exception"]
    failed = [shown for shown in structured.events if isinstance(shown, AgentConstructionExceptionEvent)]
    assert [shown.kwargs["agent_id"] for shown in failed] == ["broken/k"]


async def test_what_an_intervention_handler_drops_is_shown(make_world: MakeWorld, structured: _Kept) -> None:
    class Drops(DefaultInterventionHandler):
        async def on_send(self, message: Any, *, message_context: MessageContext, recipient: AgentId) -> Any:
            return DropMessage

    world = await make_world(intervention_handlers=[Drops()])
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    with pytest.raises(MessageDroppedException):
        await world.caller.send_message(Text("a"), AgentId("recorder", "k"))
    dropped = [shown for shown in structured.events if isinstance(shown, MessageDroppedEvent)]
    assert [(shown.kwargs["kind"], shown.kwargs["receiver"]) for shown in dropped] == [
        ("MessageKind.DIRECT", "recorder/k")
    ]


@natsrt_only
async def test_structured_events_carry_the_payload_only_at_debug(world: World, structured: _Kept) -> None:
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    await world.caller.send_message(Text("a"), AgentId("recorder", "k"))
    assert {shown.kwargs["payload"] for shown in structured.events} == {events.HIDDEN}
    structured.events.clear()
    logging.getLogger(EVENT_LOGGER_NAME).setLevel(logging.DEBUG)
    await world.caller.send_message(Text("a"), AgentId("recorder", "k"))
    payloads = [json.loads(shown.kwargs["payload"]) for shown in structured.events]
    assert payloads == [{"content": "a"}] * 2 + [{"content": "k got a"}] * 2


@one_runtime
async def test_structured_events_are_built_only_when_somebody_listens(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    for name in ("MessageEvent", "MessageHandlerExceptionEvent", "AgentConstructionExceptionEvent"):
        monkeypatch.setattr(events, name, lambda n=name, **fields: built.append(n) or n)
    logger = logging.getLogger(EVENT_LOGGER_NAME)
    level = logger.level
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder([]))
    await Raiser.register(world.host, "raiser", lambda: Raiser("raises"))

    async def use() -> None:
        await world.caller.send_message(Text("a"), AgentId("recorder", "k"))
        await world.caller.publish_message(Text("a"), NEWS)
        await world.idle()

    try:
        logger.setLevel(logging.WARNING)
        await use()
        assert built == []
        logger.setLevel(logging.INFO)
        await use()
        assert set(built) == {"MessageEvent", "MessageHandlerExceptionEvent"}
    finally:
        logger.setLevel(level)


# -- payloads --------------------------------------------------------------------------------------------------------


def natsrt_texts(caplog: pytest.LogCaptureFixture) -> list[str]:
    """All that natsrt logged above DEBUG, as a formatter would write it, tracebacks included."""
    formatter = logging.Formatter("%(message)s")
    return [
        formatter.format(record)
        for record in caplog.records
        if record.name.startswith("natsrt") and record.levelno > logging.DEBUG
    ]


@dataclass
class Unregistered:
    content: str


@dataclass
class Unreadable:
    """Its name is that of another class at the receiver."""

    content: str


def _unreadable_at_receiver() -> type[Any]:
    @dataclass
    class Unreadable:
        other: int

    return Unreadable


@two_runtimes
async def test_payloads_stay_out_of_the_log_whatever_happens(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    theirs = _unreadable_at_receiver()

    class Reader(RoutedAgent):
        @message_handler
        async def on_unreadable(self, message: Any, ctx: MessageContext) -> None:
            raise AssertionError("it cannot be read")

    Reader.on_unreadable.__annotations__["message"] = theirs

    class Nested(RoutedAgent):
        """An event handler whose call fails with what the payload says."""

        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> None:
            await self.send_message(message, AgentId("raiser", "k"))

    class NewsNested(Nested):
        pass

    type_subscription("news")(NewsNested)

    def broken() -> Recorder:
        raise ValueError(SECRET)

    class BadReply(RoutedAgent):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> Any:
            return {message.content: object()}

    world.host.add_message_serializer(try_get_known_serializers_for_type(theirs))
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder([]))
    await Raiser.register(world.host, "raiser", lambda: Raiser("raises"))
    await NewsNested.register(world.host, "nested", lambda: NewsNested("nests"))
    await Recorder.register(world.host, "broken", broken)
    await BadReply.register(world.host, "badreply", lambda: BadReply("bad"))

    text = Text(SECRET)
    assert await world.caller.send_message(text, AgentId("recorder", "k")) == Text(f"k got {SECRET}")
    failures: list[tuple[Any, str]] = [
        (text, "raiser"),
        (text, "nested"),
        (text, "broken"),
        (text, "nobody"),
        (text, "badreply"),
        (Unregistered(SECRET), "recorder"),
        (Unreadable(SECRET), "recorder"),
        ({SECRET: object()}, "recorder"),
        ({SECRET: float("nan")}, "recorder"),
    ]
    for message, agent_type in failures:
        with pytest.raises((NatsrtError, ValueError, OwnError)):
            await world.caller.send_message(message, AgentId(agent_type, "k"))
    for message in (text, Unregistered(SECRET), Unreadable(SECRET)):
        await world.caller.publish_message(message, NEWS)
    for runtime in (world.caller, world.host):
        client = runtime.running.connection
        prefix = runtime.options.namespace
        for subject in ("agent.recorder", "topic.news.k"):
            for body in (
                b'{"content":"%b","extra":1}' % SECRET.encode(),
                b'{"specversion":"1.0","type":"natsrt.call","id":"1","data":%b' % SECRET.encode(),
                b'{"specversion":"1.0","type":"natsrt.call","id":"1","source":"x","data":"%b"}' % SECRET.encode(),
                SECRET.encode(),
            ):
                await client.publish(f"{prefix}.{subject}", body)
    await world.idle()
    texts = natsrt_texts(caplog)
    assert any("failed" in shown for shown in texts)
    assert [shown for shown in texts if SECRET in shown] == []


@two_runtimes
async def test_the_bytes_of_what_cannot_be_decoded_stay_with_the_error_where_it_was_raised(world: World) -> None:
    """``payload`` neither travels nor is it shown in the text."""

    class Answerer(RoutedAgent):
        @message_handler
        async def on_number(self, message: Number, ctx: MessageContext) -> Any:
            return Nowhere()

    class Nowhere:
        """Only its serializer can read and write it, and the caller does not have it."""

    class Writer:
        cls, type_name, data_content_type = Nowhere, "Nowhere", "application/json"

        def serialize(self, message: Nowhere) -> bytes:
            return json.dumps(SECRET).encode()

        def deserialize(self, payload: bytes) -> Nowhere:
            return Nowhere()

    world.host.add_message_serializer(Writer())
    await Answerer.register(world.host, "answerer", lambda: Answerer("answers"))
    with pytest.raises(CannotDecode) as raised:
        await world.caller.send_message(Number(1), AgentId("answerer", "k"))
    assert SECRET.encode() in raised.value.payload
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "shown"), [("a" * 120, "a" * 120), ("a" * 121, "a" * 117 + "..."), ("", "")], ids=["fits", "long", "empty"]
)
def test_a_subject_that_is_too_long_for_a_log_line_is_shortened(text: str, shown: str) -> None:
    assert clip(text) == shown
