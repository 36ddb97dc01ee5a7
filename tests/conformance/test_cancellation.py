"""Cancellation tokens: the caller stops waiting, and every handler whose message carried the token is told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from autogen_core import (
    AgentId,
    CancellationToken,
    MessageContext,
    RoutedAgent,
    TopicId,
    message_handler,
    type_subscription,
)

from tests.conformance.conftest import World, natsrt_only
from tests.conformance.samples import Recorder, Seen, Text, Waiter
from tests.support.processes import eventually

NEWS = TopicId("news", "k")


async def start_waiting(world: World) -> tuple[asyncio.Event, list[MessageContext]]:
    """Agents that wait in their handlers, and the contexts of the messages they got."""
    release, contexts = asyncio.Event(), list[MessageContext]()
    await Waiter.register(world.host, "waiter", lambda: Waiter(asyncio.Event(), release, contexts))
    return release, contexts


async def test_a_cancelled_call_raises_at_the_caller_and_tells_the_handler(world: World) -> None:
    release, contexts = await start_waiting(world)
    token = CancellationToken()
    call = asyncio.ensure_future(world.caller.send_message(Text("a"), AgentId("waiter", "k"), cancellation_token=token))
    await eventually(lambda: contexts)
    assert not contexts[0].cancellation_token.is_cancelled()
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(call, 5)
    await eventually(lambda: contexts[0].cancellation_token.is_cancelled())
    release.set()


async def test_a_cancelled_token_does_not_cancel_the_handlers_task(world: World) -> None:
    release, contexts = await start_waiting(world)
    finished: list[str] = []

    class Finisher(Waiter):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> Text:
            self.contexts.append(ctx)
            await self.release.wait()
            finished.append(message.content)
            return message

    await Finisher.register(world.host, "finisher", lambda: Finisher(asyncio.Event(), release, contexts))
    token = CancellationToken()
    call = asyncio.ensure_future(
        world.caller.send_message(Text("a"), AgentId("finisher", "k"), cancellation_token=token)
    )
    await eventually(lambda: contexts)
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await eventually(lambda: contexts[0].cancellation_token.is_cancelled())
    release.set()
    await eventually(lambda: finished == ["a"])


@natsrt_only
async def test_a_token_cancelled_before_the_call_ends_it_at_once(world: World) -> None:
    seen: list[Seen] = []
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    token = CancellationToken()
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await world.caller.send_message(Text("a"), AgentId("recorder", "k"), cancellation_token=token)
    await world.idle()
    assert seen == []


async def test_a_cancelled_event_tells_its_handlers(world: World) -> None:
    release = asyncio.Event()
    contexts: list[MessageContext] = []

    @type_subscription("news")
    class NewsWaiter(Waiter):
        pass

    for name in ("first", "second"):
        await NewsWaiter.register(world.host, name, lambda: NewsWaiter(asyncio.Event(), release, contexts))
    token = CancellationToken()
    await world.caller.publish_message(Text("a"), NEWS, cancellation_token=token)
    await eventually(lambda: len(contexts) == 2)
    assert not any(context.cancellation_token.is_cancelled() for context in contexts)
    token.cancel()
    await eventually(lambda: all(context.cancellation_token.is_cancelled() for context in contexts))
    release.set()


async def test_a_token_cancelled_after_the_call_ended_still_tells_who_kept_it(world: World) -> None:
    seen: list[Seen] = []
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    token = CancellationToken()
    await world.caller.send_message(Text("a"), AgentId("recorder", "k"), cancellation_token=token)
    assert not seen[0].context.cancellation_token.is_cancelled()
    token.cancel()
    await eventually(lambda: seen[0].context.cancellation_token.is_cancelled())


async def test_a_cancellation_travels_through_nested_calls(world: World) -> None:
    release, contexts = await start_waiting(world)

    class Forwarder(RoutedAgent):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> Text:
            return await self.send_message(
                message, AgentId("waiter", "inner"), cancellation_token=ctx.cancellation_token
            )

    await Forwarder.register(world.caller, "forwarder", lambda: Forwarder("forwards"))
    token = CancellationToken()
    call = asyncio.ensure_future(
        world.caller.send_message(Text("a"), AgentId("forwarder", "k"), cancellation_token=token)
    )
    await eventually(lambda: contexts)
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(call, 5)
    await eventually(lambda: contexts[0].cancellation_token.is_cancelled())
    release.set()


async def test_a_handler_may_cancel_what_its_message_came_with(world: World) -> None:
    class Canceller(RoutedAgent):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> Text:
            ctx.cancellation_token.cancel()
            await asyncio.Event().wait()
            return message

    await Canceller.register(world.host, "canceller", lambda: Canceller("cancels"))
    token = CancellationToken()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(
            world.caller.send_message(Text("a"), AgentId("canceller", "k"), cancellation_token=token), 5
        )
    assert token.is_cancelled()


async def test_one_token_ends_all_calls_that_carry_it(world: World) -> None:
    release, contexts = await start_waiting(world)
    token = CancellationToken()
    calls = [
        asyncio.ensure_future(
            world.caller.send_message(Text(str(n)), AgentId("waiter", str(n)), cancellation_token=token)
        )
        for n in range(20)
    ]
    other = asyncio.ensure_future(
        world.caller.send_message(Text("other"), AgentId("waiter", "other"), cancellation_token=CancellationToken())
    )
    await eventually(lambda: len(contexts) == 21)
    token.cancel()
    results: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert not other.done()
    release.set()
    assert await asyncio.wait_for(other, 5) == Text("other")


@natsrt_only
async def test_a_cancelled_task_stops_waiting_and_leaves_no_call_behind(world: World) -> None:
    release, contexts = await start_waiting(world)
    call = asyncio.ensure_future(world.caller.send_message(Text("a"), AgentId("waiter", "k")))
    await eventually(lambda: contexts)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert world.caller.running.calls.pending == 0
    release.set()
    await world.idle()
