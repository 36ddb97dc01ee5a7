"""Publishers of events to keyed agents whose owners are not known: how many may wait, who waits, and what is lost."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import nats
import pytest
from autogen_core import (
    AgentId,
    DefaultInterventionHandler,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypeSubscription,
    event,
    rpc,
)
from autogen_core import type_subscription as subscribes_to

import natsrt
from natsrt import NatsAgentRuntime, session
from natsrt.embedded import EmbeddedServer
from natsrt.sending import keyed_delivery
from tests.support.calls import known
from tests.support.processes import TAP, Process, Processes, eventually

WORKER = """
import asyncio, sys
from natsrt import NatsAgentRuntime
from tests.test_bounded_publishers import host

async def main(url, namespace):
    async with NatsAgentRuntime(url, namespace=namespace) as runtime:
        await host(runtime, "reader")
        print("ready", flush=True)
        await runtime.stop_when_signal()

asyncio.run(main(*sys.argv[1:]))
"""
READER = AgentId("reader", "one")
NEWS = TopicId("news", "one")
LONG = 25.0
"""Seconds within which an agent has a new owner after the death of the old one, on a slow machine."""


@natsrt.keyed
@subscribes_to("news")
class Reader(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("keeps what it reads")
        self.texts: list[str] = []

    @event
    async def read(self, message: str, ctx: MessageContext) -> None:
        self.texts.append(message[:10])

    @rpc
    async def tell(self, message: int, ctx: MessageContext) -> str:
        return ",".join(self.texts)


class Plain(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("answers")

    @rpc
    async def answer(self, message: str, ctx: MessageContext) -> str:
        return message


async def host(runtime: NatsAgentRuntime, agent_type: str) -> None:
    await natsrt.register(runtime, Reader, agent_type, Reader)


async def read_by(runtime: NatsAgentRuntime, agent: AgentId = READER) -> list[str]:
    texts: str = await runtime.send_message(0, agent)
    return texts.split(",") if texts else []


@asynccontextmanager
async def publishing(url: str, namespace: str, **settings: Any) -> AsyncIterator[NatsAgentRuntime]:
    """A runtime that knows the type of the readers. The block must not end before its owners are found."""
    async with NatsAgentRuntime(url, namespace=namespace, **settings) as runtime:
        await known(runtime, "reader")
        yield runtime


def publish(runtime: NatsAgentRuntime, text: str, topic: TopicId = NEWS) -> asyncio.Task[None]:
    """An event that is published in a task."""
    return asyncio.ensure_future(runtime.publish_message(text, topic))


def waiting(runtime: NatsAgentRuntime) -> int:
    return runtime.running.outgoing.delivery.under_way


async def returned(publishing: Awaitable[None]) -> None:
    """The publisher goes on at once."""
    await asyncio.wait_for(publishing, 5)


@pytest.fixture
async def frozen(server: EmbeddedServer, namespace: str, processes: Processes) -> Process:
    """The only worker of the readers, for tests that let it stand still."""
    worker = processes.python(WORKER, server.url, namespace, name="reader")
    await worker.wait_for_line("ready", 20)
    return worker


@pytest.fixture
def five(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than five events may wait while their publishers go on."""
    monkeypatch.setattr(keyed_delivery, "_MANY_WAITING", 5)


def lost_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if re.match(r"(an event|\d+ events) for", r.getMessage())]


# -- the bound -------------------------------------------------------------------------------------------------------


async def test_a_publisher_waits_when_too_many_events_wait_and_all_arrive_in_order(
    server: EmbeddedServer, namespace: str, frozen: Process, five: None
) -> None:
    async with publishing(server.url, namespace) as runtime:
        frozen.pause()
        for number in range(5):
            await returned(publish(runtime, f"{number}"))
        late = [publish(runtime, f"{number}") for number in range(5, 8)]
        await eventually(lambda: waiting(runtime) == 8)
        await runtime.running.connection.round_trip(5)
        assert not any(task.done() for task in late)
        frozen.resume()
        await asyncio.wait_for(asyncio.gather(*late), LONG)
        assert await read_by(runtime) == [f"{number}" for number in range(8)]
        await returned(publish(runtime, "8"))  # the owner is known: nothing waits
        assert waiting(runtime) == 0 and runtime.running.outgoing.delivery._waiting_bytes == 0
        assert (await read_by(runtime))[-1] == "8"


async def test_the_bound_counts_bytes_too(server: EmbeddedServer, namespace: str, frozen: Process) -> None:
    async with publishing(server.url, namespace, max_pending_bytes=20_000) as runtime:
        frozen.pause()
        await returned(publish(runtime, "a" * 9_000))
        await returned(publish(runtime, "b" * 9_000))
        late = publish(runtime, "c" * 9_000)
        await eventually(lambda: waiting(runtime) == 3)
        assert not late.done()
        frozen.resume()
        await asyncio.wait_for(late, LONG)
        assert [text[0] for text in await read_by(runtime)] == ["a", "b", "c"]


@pytest.mark.parametrize("interventions", [False, True])
async def test_a_publisher_that_waits_holds_up_neither_calls_nor_events_for_other_agents(
    server: EmbeddedServer, namespace: str, frozen: Process, five: None, interventions: bool
) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace) as other:
        await natsrt.register(other, Plain, "plain", Plain)
        await natsrt.register(other, Reader, "other", Reader, skip_class_subscriptions=True)
        await other.add_subscription(TypeSubscription("olds", "other"))
        handlers = [DefaultInterventionHandler()] if interventions else None
        async with publishing(server.url, namespace, intervention_handlers=handlers) as runtime:
            await known(runtime, "plain", "other")
            await read_by(runtime, AgentId("other", "one"))
            frozen.pause()
            late = [publish(runtime, f"{number}") for number in range(7)]
            await eventually(lambda: waiting(runtime) == 7)
            await asyncio.wait_for(runtime.publish_message("by", TopicId("olds", "one")), 5)
            assert await asyncio.wait_for(runtime.send_message("hi", AgentId("plain", "k")), 5) == "hi"
            assert await asyncio.wait_for(read_by(runtime, AgentId("other", "one")), 5) == ["by"]
            assert sum(not task.done() for task in late) == 2
            frozen.resume()
            await asyncio.wait_for(asyncio.gather(*late), LONG)


async def test_an_event_whose_publisher_is_cancelled_is_not_sent_and_holds_up_nobody(
    server: EmbeddedServer, namespace: str, frozen: Process, five: None
) -> None:
    async with publishing(server.url, namespace) as runtime:
        frozen.pause()
        for number in range(5):
            await returned(publish(runtime, f"{number}"))
        late = [publish(runtime, f"late {number}") for number in range(3)]
        await eventually(lambda: waiting(runtime) == 8)
        late[1].cancel()
        delivery = runtime.running.outgoing.delivery
        given_up = await delivery._deliver(READER, b"given up before its task begins")
        assert given_up is not None
        delivery.give_up([given_up])
        await eventually(lambda: waiting(runtime) == 7)
        frozen.resume()
        async with asyncio.timeout(LONG):
            done = await asyncio.gather(*late, return_exceptions=True)
        assert [type(one) for one in done] == [type(None), asyncio.CancelledError, type(None)]
        assert await asyncio.wait_for(read_by(runtime), LONG) == [*"01234", "late 0", "late 2"]
        assert runtime.health().undelivered_events == 0


async def test_events_that_a_worker_forwards_count_in_its_intake_while_they_wait(
    server: EmbeddedServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyed_delivery, "_MANY_WAITING", 2)
    async with (
        NatsAgentRuntime(server.url, namespace=namespace) as owner,
        NatsAgentRuntime(server.url, namespace=namespace) as other,
    ):
        await host(owner, "reader")
        await read_by(owner)  # it owns the agent
        await host(other, "reader")
        locator, found = other.running.outgoing.locator, asyncio.Event()
        locate = locator.locate

        async def late(*arguments: Any) -> Any:
            await found.wait()
            return await locate(*arguments)

        monkeypatch.setattr(locator, "locate", late)
        client = await nats.connect(server.url)
        for _ in range(40):  # each to one of both
            await client.publish(other.running.network.subjects.topic("news", "one"), b'"plain"')
        await client.close()
        await eventually(lambda: waiting(other) > 2 and other.health().pending_bytes > 0)
        found.set()
        await eventually(lambda: not waiting(other) and not other.health().pending_bytes)

        async def all_read() -> bool:
            return await read_by(owner) == ["plain"] * 40

        await eventually(all_read)


# -- what is lost ----------------------------------------------------------------------------------------------------


async def test_many_events_that_find_no_owner_are_one_line(
    server: EmbeddedServer, namespace: str, frozen: Process, caplog: pytest.LogCaptureFixture
) -> None:
    async with publishing(server.url, namespace) as runtime:
        frozen.pause()
        for number in range(30):
            await returned(publish(runtime, f"{number}"))
        frozen.kill()
        await eventually(lambda: runtime.health().undelivered_events == 30, LONG)
        await asyncio.sleep(0)
    (line,) = lost_lines(caplog)
    assert line.startswith("30 events for reader/one could not be delivered: ")


async def test_leaving_waits_for_what_was_published(
    server: EmbeddedServer, namespace: str, frozen: Process, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    async with runtime:
        await known(runtime, "reader")
        frozen.pause()
        for number in range(20):
            await returned(publish(runtime, f"{number}"))
        closing = asyncio.ensure_future(runtime.close())
        await eventually(lambda: not runtime.ready)
        await asyncio.sleep(2 * session._SENT_WITHIN)
        assert not closing.done()
        frozen.resume()
        await asyncio.wait_for(closing, LONG)
    async with publishing(server.url, namespace) as reading:
        assert await read_by(reading) == [f"{number}" for number in range(20)]
    assert not lost_lines(caplog)


async def test_leaving_ends_after_drain_timeout_and_says_in_one_line_how_much_was_lost(
    server: EmbeddedServer, namespace: str, frozen: Process, five: None, caplog: pytest.LogCaptureFixture
) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace, drain_timeout=1.5) as runtime:
        await known(runtime, "reader")
        frozen.pause()
        late = [publish(runtime, f"{number}", TopicId("news", f"{number % 3}")) for number in range(7)]
        await eventually(lambda: waiting(runtime) == 7)
        began = asyncio.get_running_loop().time()
    assert 1.0 < asyncio.get_running_loop().time() - began < 10
    await asyncio.wait_for(asyncio.gather(*late), 5)  # no publisher waits any longer
    assert lost_lines(caplog) == ["7 events for keyed agents could not be sent before this runtime stopped"]
    assert runtime.health().undelivered_events == 7


@pytest.mark.skipif(TAP, reason="a tap prevents the report that an event had no subscriber")
async def test_leaving_finds_a_new_owner_for_what_the_server_reports_back(
    server: EmbeddedServer, namespace: str, processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "natsrt")
    owner = processes.python(WORKER, server.url, namespace, name="owner")
    await owner.wait_for_line("ready", 20)
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        await known(runtime, "reader")
        await read_by(runtime)
        other = processes.python(WORKER, server.url, namespace, name="other")
        await other.wait_for_line("ready", 20)
        await eventually(lambda: len(runtime.running.registry.view.workers_hosting("reader")) == 2)
        owner.kill()
        peers, subject = runtime.running.network.peers, runtime.running.network.subjects.instance("reader", "one")

        async def silent() -> bool:
            return not await peers.has_listener(subject)

        await eventually(silent)
        await runtime.publish_message("last words", NEWS)
    async with publishing(server.url, namespace) as reading:
        assert await read_by(reading) == ["last words"]
    assert not lost_lines(caplog)
