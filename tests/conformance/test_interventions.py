"""Intervention handlers: once, in the sending runtime, in send order; what they raise reaches the caller unchanged."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from autogen_core import (
    AgentId,
    DefaultInterventionHandler,
    DropMessage,
    MessageContext,
    RoutedAgent,
    TopicId,
    message_handler,
    type_subscription,
)
from autogen_core.exceptions import MessageDroppedException

from natsrt.embedded import EmbeddedServer
from tests.conformance.conftest import MakeRuntime, MakeWorld, natsrt_only, plain_client
from tests.conformance.samples import Counter, Number, Recorder, Seen, Text, contents
from tests.support.clients import settled

RECORDER = AgentId("recorder", "k")
NEWS = TopicId("news", "k")


@type_subscription("news")
class NewsRecorder(Recorder):
    pass


class Handler(DefaultInterventionHandler):
    """Keeps what passes, and does what its ``act`` says with it."""

    def __init__(self, name: str = "", act: Any = lambda message: message) -> None:
        self.name = name
        self.act = act
        self.passed: list[tuple[Any, ...]] = []

    async def on_send(self, message: Any, *, message_context: MessageContext, recipient: AgentId) -> Any:
        self.passed.append(("send", message, message_context, recipient))
        return self.act(message)

    async def on_publish(self, message: Any, *, message_context: MessageContext) -> Any:
        self.passed.append(("publish", message, message_context))
        return self.act(message)

    async def on_response(self, message: Any, *, sender: AgentId, recipient: AgentId | None) -> Any:
        self.passed.append(("response", message, sender, recipient))
        return self.act(message)

    def kinds(self) -> list[str]:
        return [passed[0] for passed in self.passed]


async def test_a_handler_sees_a_call_with_its_context_and_its_response(make_world: MakeWorld) -> None:
    handler = Handler()
    world = await make_world(intervention_handlers=[handler])
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    await Recorder.register(world.host, "boss", lambda: Recorder([]))
    boss = AgentId("boss", "b")
    await world.caller.send_message(Text("a"), RECORDER, sender=boss, message_id="m1")
    (_, message, context, recipient), response = handler.passed
    assert (message, recipient) == (Text("a"), RECORDER)
    assert (context.sender, context.topic_id, context.is_rpc, context.message_id) == (boss, None, True, "m1")
    assert not context.cancellation_token.is_cancelled()
    assert response == ("response", Text("k got a"), RECORDER, boss)


async def test_a_handler_sees_an_event_with_its_context(make_world: MakeWorld) -> None:
    handler = Handler()
    world = await make_world(intervention_handlers=[handler])
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder([]))
    await world.caller.publish_message(Text("a"), NEWS, message_id="m1")
    await world.idle()
    ((_, message, context),) = handler.passed
    assert message == Text("a")
    assert (context.sender, context.topic_id, context.is_rpc, context.message_id) == (None, NEWS, False, "m1")


async def test_what_a_handler_returns_is_sent_and_returned(make_world: MakeWorld) -> None:
    seen: list[Seen] = []
    handler = Handler(act=lambda message: Text(f"<{message.content}>"))
    world = await make_world(intervention_handlers=[handler])
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder(seen))
    assert await world.caller.send_message(Text("a"), RECORDER) == Text("<k got <a>>")
    await world.caller.publish_message(Text("b"), NEWS)
    await world.idle()
    assert contents(seen) == ["<a>", "<b>"]


@natsrt_only
async def test_handlers_form_a_chain(make_world: MakeWorld) -> None:
    seen: list[Seen] = []
    handlers = [Handler(name, act=lambda message, n=name: Text(f"{message.content}{n}")) for name in "123"]
    world = await make_world(intervention_handlers=handlers)
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder(seen))
    assert await world.caller.send_message(Text("a"), RECORDER) == Text("k got a123123")
    await world.caller.publish_message(Text("b"), NEWS)
    await world.idle()
    assert contents(seen) == ["a123", "b123"]


@pytest.mark.parametrize("drop", [DropMessage, DropMessage()], ids=["the class", "an instance"])
async def test_a_dropped_call_raises_and_never_arrives(make_world: MakeWorld, drop: Any) -> None:
    seen: list[Seen] = []
    world = await make_world(intervention_handlers=[Handler(act=lambda message: drop)])
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder(seen))
    with pytest.raises(MessageDroppedException):
        await asyncio.wait_for(world.caller.send_message(Text("a"), RECORDER), 5)
    assert seen == []


@natsrt_only  # the other runtime never becomes idle after a drop
async def test_a_dropped_event_is_no_error_and_never_arrives(make_world: MakeWorld) -> None:
    seen: list[Seen] = []
    second = Handler()
    world = await make_world(intervention_handlers=[Handler(act=lambda message: DropMessage), second])
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder(seen))
    await world.caller.publish_message(Text("a"), NEWS)
    await world.idle()
    assert seen == []
    assert second.passed == []


async def test_a_dropped_response_raises_at_the_caller(make_world: MakeWorld) -> None:
    seen: list[Seen] = []

    class DropResponses(DefaultInterventionHandler):
        async def on_response(self, message: Any, *, sender: AgentId, recipient: AgentId | None) -> Any:
            return DropMessage

    world = await make_world(intervention_handlers=[DropResponses()])
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    with pytest.raises(MessageDroppedException):
        await asyncio.wait_for(world.caller.send_message(Text("a"), RECORDER), 5)
    assert contents(seen) == ["a"]


class Refused(BaseException):
    """Not even an Exception."""


@pytest.mark.parametrize("kind", ["send", "response"])
@pytest.mark.parametrize("error", [ValueError("no"), Refused("no")], ids=repr)
async def test_what_a_handler_raises_reaches_the_caller_unchanged(
    make_world: MakeWorld, kind: str, error: BaseException
) -> None:
    class Raises(DefaultInterventionHandler):
        async def on_send(self, message: Any, *, message_context: MessageContext, recipient: AgentId) -> Any:
            if kind == "send":
                raise error
            return message

        async def on_response(self, message: Any, *, sender: AgentId, recipient: AgentId | None) -> Any:
            raise error

    world = await make_world(intervention_handlers=[Raises()])
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    with pytest.raises(type(error)) as raised:
        await asyncio.wait_for(world.caller.send_message(Text("a"), RECORDER), 5)
    assert raised.value is error


@natsrt_only
async def test_what_a_handler_raises_reaches_the_publisher_unchanged(make_world: MakeWorld) -> None:
    error = ValueError("no")

    def refuse(message: Any) -> Any:
        raise error

    world = await make_world(intervention_handlers=[Handler(act=refuse)])
    with pytest.raises(ValueError, match="no") as raised:
        await world.caller.publish_message(Text("a"), NEWS)
    assert raised.value is error


@natsrt_only
async def test_a_handler_that_returns_none_warns_and_changes_nothing(make_world: MakeWorld) -> None:
    seen: list[Seen] = []
    world = await make_world(intervention_handlers=[Handler(act=lambda message: None)])
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder(seen))
    with pytest.warns(RuntimeWarning) as warned:
        assert await world.caller.send_message(Text("a"), RECORDER) == Text("k got a")
    assert [str(warning.message).partition(".")[0] for warning in warned] == [
        "Intervention handler on_send returned None",
        "Intervention handler on_response returned None",
    ]
    with pytest.warns(RuntimeWarning, match="on_publish returned None"):
        await world.caller.publish_message(Text("b"), NEWS)
    await world.idle()
    assert contents(seen) == ["a", "b"]


@natsrt_only
async def test_a_response_that_is_none_passes_without_a_warning(make_world: MakeWorld) -> None:
    class Silent(RoutedAgent):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> None:
            return None

    handler = Handler()
    world = await make_world(intervention_handlers=[handler])
    await Silent.register(world.host, "silent", lambda: Silent("silent"))
    assert await world.caller.send_message(Text("a"), AgentId("silent", "k")) is None
    assert handler.kinds() == ["send", "response"]


@natsrt_only
async def test_handlers_run_one_after_the_other_in_the_order_of_sending(make_world: MakeWorld) -> None:
    seen: list[Seen] = []
    order: list[str] = []

    class Slow(DefaultInterventionHandler):
        """Waits longer for the earlier ones, so that only a line keeps the order."""

        running = 0

        async def _pass(self, message: Any) -> Any:
            self.running += 1
            assert self.running == 1
            for _ in range(30 - int(message.content)):
                await asyncio.sleep(0)
            order.append(message.content)
            self.running -= 1
            return message

        async def on_send(self, message: Any, *, message_context: MessageContext, recipient: AgentId) -> Any:
            return await self._pass(message)

        async def on_publish(self, message: Any, *, message_context: MessageContext) -> Any:
            return await self._pass(message)

    world = await make_world(intervention_handlers=[Slow()])
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder(seen))
    await asyncio.gather(
        *(
            world.caller.send_message(Text(str(n)), RECORDER)
            if n % 2
            else world.caller.publish_message(Text(str(n)), NEWS)
            for n in range(30)
        )
    )
    await world.idle()
    assert order == [str(n) for n in range(30)]
    assert contents(seen) == order


@natsrt_only
async def test_handlers_run_in_the_sending_runtime_only(make_world: MakeWorld) -> None:
    handler = Handler()
    world = await make_world(intervention_handlers=[handler])
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder([]))
    await world.host.send_message(Text("a"), RECORDER)
    await world.host.publish_message(Text("b"), NEWS)
    await world.idle()
    assert handler.kinds() == ([] if world.is_remote else ["send", "response", "publish"])


@natsrt_only
async def test_a_handler_that_itself_sends_and_publishes_does_not_wait_for_itself(make_world: MakeWorld) -> None:
    seen: list[Seen] = []

    class Audits(DefaultInterventionHandler):
        runtime: Any = None

        async def _audit(self, message: Any) -> Any:
            if isinstance(message, Text) and not message.content.startswith("audit"):
                await self.runtime.publish_message(Text(f"audit of {message.content}"), NEWS)
                await self.runtime.send_message(Text(f"audit call of {message.content}"), AgentId("auditor", "k"))
            return message

        async def on_send(self, message: Any, *, message_context: MessageContext, recipient: AgentId) -> Any:
            return await self._audit(message)

        async def on_publish(self, message: Any, *, message_context: MessageContext) -> Any:
            return await self._audit(message)

    handler = Audits()
    world = await make_world(intervention_handlers=[handler])
    handler.runtime = world.caller
    await NewsRecorder.register(world.host, "recorder", lambda: NewsRecorder(seen))
    await Recorder.register(world.host, "auditor", lambda: Recorder([]))
    assert await asyncio.wait_for(world.caller.send_message(Text("a"), RECORDER), 5) == Text("k got a")
    await asyncio.wait_for(world.caller.publish_message(Text("b"), NEWS), 5)
    await world.idle()
    assert contents(seen) == ["audit of a", "a", "audit of b", "b"]


@natsrt_only
async def test_a_cancelled_sender_does_not_hold_up_the_line(make_world: MakeWorld) -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    class Holds(DefaultInterventionHandler):
        async def on_send(self, message: Any, *, message_context: MessageContext, recipient: AgentId) -> Any:
            if message == Text("held"):
                entered.set()
                await release.wait()
            return message

    world = await make_world(intervention_handlers=[Holds()])
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    held = asyncio.ensure_future(world.caller.send_message(Text("held"), RECORDER))
    await entered.wait()
    behind = [asyncio.ensure_future(world.caller.send_message(Text(str(n)), RECORDER)) for n in range(3)]
    await asyncio.sleep(0)
    behind[1].cancel()
    held.cancel()
    assert await asyncio.wait_for(behind[0], 5) == Text("k got 0")
    assert await asyncio.wait_for(behind[2], 5) == Text("k got 2")
    assert behind[1].cancelled()
    assert held.cancelled()


# -- plain messages from the wire ------------------------------------------------------------------------------------


async def test_plain_messages_pass_the_handlers_of_the_worker_that_receives_them(
    make_runtime: MakeRuntime, server: EmbeddedServer, namespace: str
) -> None:
    seen: list[Seen] = []
    handler = Handler(act=lambda message: Text(f"<{message.content}>"))
    runtime = make_runtime(intervention_handlers=[handler])
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    await runtime.start()
    async with plain_client(server) as client:
        reply = await client.request(f"{namespace}.agent.recorder", b'{"content":"a"}', timeout=5)
        assert orjson.loads(reply.data) == {"content": "default got <a>"}
        await client.publish(f"{namespace}.topic.news.k", b'{"content":"b"}')
        await settled(client)
        await runtime.running.wait_idle()
    assert contents(seen) == ["<a>", "<b>"]
    assert handler.kinds()[:1] == ["send"]
    assert "publish" in handler.kinds()
    assert handler.passed[0][3] == AgentId("recorder", "default")


async def test_a_plain_call_that_a_handler_drops_is_answered_with_an_error(
    make_runtime: MakeRuntime, server: EmbeddedServer, namespace: str
) -> None:
    seen: list[Seen] = []
    runtime = make_runtime(intervention_handlers=[Handler(act=lambda message: DropMessage)])
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    await runtime.start()
    async with plain_client(server) as client:
        reply = await client.request(f"{namespace}.agent.recorder", b'{"content":"a"}', timeout=5)
        assert (reply.headers or {})["Nats-Service-Error-Code"] == "500"
        assert b"MessageDroppedException" in reply.data
        await client.publish(f"{namespace}.topic.news.k", b'{"content":"b"}')
        await settled(client)
        await runtime.running.wait_idle()
    assert seen == []
    assert next(iter(runtime.running.incoming.subscriptions.endpoints())).counters.errors == 1


@natsrt_only
async def test_a_number_stays_a_number_through_the_chain(make_world: MakeWorld) -> None:
    class Doubler(RoutedAgent):
        @message_handler
        async def on_number(self, message: Number, ctx: MessageContext) -> Number:
            return Number(message.value * 2)

    world = await make_world(intervention_handlers=[DefaultInterventionHandler(), Handler()])
    await Doubler.register(world.host, "doubler", lambda: Doubler("doubles"))
    assert await world.caller.send_message(Number(2), AgentId("doubler", "k")) == Number(4)


class Moderator(RoutedAgent):
    """Asks another agent before it answers."""

    def __init__(self) -> None:
        super().__init__("moderates")

    @message_handler
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        await self.send_message(Number(1), AgentId("counter", "k"))
        return Text("allowed")


class AsksTheModerator(DefaultInterventionHandler):
    def __init__(self) -> None:
        self.runtime: Any = None

    async def on_send(self, message: Any, *, message_context: MessageContext, recipient: AgentId) -> Any:
        if recipient.type == "recorder":
            await self.runtime.send_message(message, AgentId("moderator", "k"))
        return message


@natsrt_only
async def test_an_intervention_may_ask_an_agent_whose_handler_sends(make_world: MakeWorld) -> None:
    handler = AsksTheModerator()
    world = await make_world(intervention_handlers=[handler])
    handler.runtime = world.caller
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    await Counter.register(world.host, "counter", Counter)
    await Moderator.register(world.host, "moderator", Moderator)
    async with asyncio.timeout(10):
        await asyncio.gather(*(world.caller.send_message(Text(f"t{n}"), RECORDER) for n in range(3)))
