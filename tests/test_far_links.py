"""Callers and workers whose links take half a second for a round trip, and now and then seconds more.

Nothing is taken for dead, unknown or free because its answer takes long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import nats
import orjson
import pytest
from autogen_core import (
    AgentId,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypePrefixSubscription,
    TypeSubscription,
    message_handler,
)
from nats.aio.msg import Msg

import natsrt
from benchmarks.chaos.proxy import Proxy
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import UnknownAgentType
from natsrt.transport.call_judgement import GONE_AFTER, AskedWorker
from natsrt.transport.probe import Probe, _Reports
from natsrt.transport.round_trip_time import RoundTripTime
from tests.support import virtual_time
from tests.support.call_world import CALLS, World
from tests.support.calls import known
from tests.support.cli import natsrt as natsrt_command
from tests.support.processes import eventually

DELAY = 0.25
"""Seconds that a far link takes each way."""
SPIKE = 2.0
"""Seconds for which a link passes nothing on now and then."""


class Echo(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("Repeats what it gets.")

    @message_handler
    async def echo(self, message: str, ctx: MessageContext) -> str:
        return message


@natsrt.keyed
class Count(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("Adds what it gets.")
        self._total = 0

    @message_handler
    async def add(self, message: int, ctx: MessageContext) -> int:
        self._total += message
        return self._total

    async def save_state(self) -> Mapping[str, Any]:
        return {"total": self._total}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self._total = state["total"]


class Listener(RoutedAgent):
    heard: list[int] = []  # of all agents in this process

    def __init__(self) -> None:
        super().__init__("Notes what it gets.")

    @message_handler
    async def note(self, message: int, ctx: MessageContext) -> None:
        self.heard.append(message)


@pytest.fixture
async def link(server: EmbeddedServer) -> AsyncIterator[Proxy]:
    async with Proxy(server.url) as proxy:
        yield proxy


@contextmanager
def spikes(*links: Proxy) -> Iterator[None]:
    """While this is entered, the links pass nothing on for 2 of every 5 s."""

    async def disturb() -> None:
        while True:
            for link in links:
                link.spike(SPIKE)
            await asyncio.sleep(SPIKE + 3)

    disturbing = asyncio.ensure_future(disturb())
    try:
        yield
    finally:
        disturbing.cancel()


def runtime(url: str, namespace: str, name: str = "worker") -> NatsAgentRuntime:
    return NatsAgentRuntime(url, namespace=namespace, name=name, connect_timeout=20)


# -- the measure -------------------------------------------------------------------------------------------------------


def test_the_allowance_covers_the_round_trips_and_their_deviation() -> None:
    rtt = RoundTripTime()
    assert rtt.allowance == 0
    rtt.begin(0.5)
    assert rtt.allowance == pytest.approx(1.5)  # one sample says little
    for _ in range(50):
        rtt.measured(0.5)
    assert rtt.allowance == pytest.approx(0.5, abs=0.01)
    rtt.measured(2.5)
    assert rtt.allowance > 2.5  # a spike, which may come again
    for _ in range(50):
        rtt.measured(0.5)
    assert rtt.allowance == pytest.approx(0.5, abs=0.05)


def test_a_new_connection_is_measured_anew_and_the_allowance_is_limited() -> None:
    rtt = RoundTripTime()
    rtt.begin(60.0)
    assert rtt.allowance == 5.0
    rtt.begin(0.001)
    assert rtt.allowance == pytest.approx(0.003)


async def test_a_connection_measures_its_link(link: Proxy, namespace: str) -> None:
    link.delay = DELAY
    async with runtime(link.url, namespace) as far:
        rtt = far.running.connection.rtt
        assert 2 * DELAY <= rtt.smoothed < 1.5  # from the connection's beginning
        link.delay = 0
        await eventually(lambda: rtt.smoothed < DELAY, timeout=20)  # the supervisor measures it all the time


# -- who listens -------------------------------------------------------------------------------------------------------


def report(*subscribers: tuple[int, str]) -> Msg:
    """A server's report that it delivers a message to these kinds of connections and subjects of subscriptions."""
    events = [{"type": "eg", "kind": kind, "sub": subject} for kind, subject in subscribers]
    return Msg(cast(Any, None), "inbox", "", orjson.dumps({"events": [{"type": "in"}, *events]}), None)


CLIENT, SERVER = 0, 1


async def test_only_the_reports_of_all_servers_say_that_nobody_listens() -> None:
    reports = _Reports(plain=False)
    reports.take(report((SERVER, ""), (SERVER, "")))
    reports.take(report((CLIENT, ">")))  # a tap; the other server has not reported yet
    assert not reports.verdict.done()
    reports.take(report((CLIENT, "agent.chat")))
    assert reports.verdict.result()
    reports = _Reports(plain=False)
    for message in (report((SERVER, "")), report((CLIENT, ">"))):
        assert not reports.verdict.done()
        reports.take(message)
    assert not reports.verdict.result()


async def test_a_report_that_is_late_says_nothing(link: Proxy, namespace: str) -> None:
    async with runtime(link.url, namespace) as far:
        await natsrt.register(far, Echo, "echo", Echo)
        probe, subjects = far.running.network.probe, far.running.network.subjects
        for subject, listens in ((subjects.agent("echo"), True), (subjects.agent("nobody"), False)):
            link.spike(SPIKE)
            assert await probe.responder_exists(subject) is listens
        assert far.running.connection.reconnects == 0


def test_the_server_is_asked_again_while_its_reports_are_late() -> None:
    async def test() -> None:
        async with World().started() as world:
            world.workers.start()
            probe = Probe(cast(Any, world.network), world.inbox)
            world.network.loss = 1.0
            asking = asyncio.ensure_future(probe.responder_exists(CALLS))
            await asyncio.sleep(1)
            assert not asking.done()
            world.network.loss = 0.0
            assert await asking
            world.network.loss, world.network.traces = 1.0, False
            assert await probe.responder_exists(CALLS) is None  # this server never reports

    virtual_time.run(test())


def test_a_worker_that_reconnects_from_far_away_is_not_lost() -> None:
    worker = AskedWorker()
    for asked, answered in ((100.0, 100.5), (101.0, 103.0), (104.0, 104.5)):  # its event loop was blocked once
        worker.asked(asked)
        worker.answered(answered)
    worker.asked(105.0)
    worker.gone(105.0)
    assert not worker.is_lost(105.0 + GONE_AFTER + 2.0, 12.0, True)
    assert worker.is_lost(105.0 + GONE_AFTER + 2.1, 12.0, True)


async def test_a_worker_that_answers_late_is_alive(server: EmbeddedServer, link: Proxy, namespace: str) -> None:
    async with runtime(link.url, namespace) as far, runtime(server.url, namespace) as near:
        await natsrt.register(far, Echo, "echo", Echo)
        await known(near, "echo")
        link.spike(SPIKE)
        assert await near.running.network.peers.alive(far.running.worker_id, far.options.heartbeat_ttl / 2)
        assert far.running.connection.reconnects == 0


# -- calls -------------------------------------------------------------------------------------------------------------


async def test_a_far_caller_calls_agents_and_plain_responders(
    server: EmbeddedServer, link: Proxy, namespace: str
) -> None:
    plain = await nats.connect(server.url)

    async def shout(message: Msg) -> None:
        await asyncio.sleep(0.5)
        await message.respond(b'{"text":"HI"}')

    await plain.subscribe(f"{namespace}.agent.shout", queue="shout", cb=shout)
    link.delay = DELAY
    try:
        async with runtime(server.url, namespace) as near, runtime(link.url, namespace) as far:
            await natsrt.register(near, Echo, "echo", Echo)
            async with asyncio.timeout(60):
                await far.wait_for("echo")
                assert await far.send_message("x", AgentId("echo", "a")) == "x"
                for _ in range(2):
                    assert await far.send_message({"text": "hi"}, AgentId("shout", "a")) == {"text": "HI"}
                with pytest.raises(UnknownAgentType):
                    await far.send_message("x", AgentId("nobody", "a"))
    finally:
        await plain.close()


async def test_the_agents_of_a_far_worker_are_called_and_waited_for(
    server: EmbeddedServer, link: Proxy, namespace: str
) -> None:
    async with runtime(link.url, namespace) as far, runtime(server.url, namespace) as near:
        await natsrt.register(far, Echo, "echo", Echo)
        link.delay = DELAY
        link.spike(SPIKE)
        async with asyncio.timeout(60):
            await near.wait_for("echo")
            link.spike(SPIKE)
            assert await near.send_message("x", AgentId("echo", "a")) == "x"
        assert far.running.connection.reconnects == near.running.connection.reconnects == 0
        link.delay = 0


# -- keyed agents ------------------------------------------------------------------------------------------------------


async def test_a_far_owner_keeps_its_agent(server: EmbeddedServer, link: Proxy, namespace: str) -> None:
    agent = AgentId("count", "a")
    async with runtime(link.url, namespace, "far") as far:
        await natsrt.register(far, Count, "count", Count)
        assert await far.send_message(1, agent) == 1
        async with runtime(server.url, namespace, "near") as near:
            await natsrt.register(near, Count, "count", Count)
            link.delay = 2 * DELAY  # a second for a round trip: more than any worker may be asked for in vain
            async with asyncio.timeout(60):
                assert await near.send_message(1, agent) == 2
                link.spike(SPIKE)
                assert await near.send_message(1, agent) == 3
            assert far.running.ownership.owned("count") == 1
            link.delay = 0


async def test_the_agents_of_a_far_worker_that_is_cut_off_move(
    server: EmbeddedServer, link: Proxy, namespace: str
) -> None:
    agent = AgentId("count", "a")
    async with runtime(link.url, namespace, "far") as far, runtime(server.url, namespace, "near") as near:
        await natsrt.register(far, Count, "count", Count)
        async with asyncio.timeout(50):
            assert await far.send_message(1, agent) == 1
            await natsrt.register(near, Count, "count", Count)
            link.delay = DELAY
            link.cut()
            assert await near.send_message(1, agent) == 2
            await link.restore()
            assert await far.send_message(1, agent) == 3
        link.delay = 0


@pytest.mark.slow
@pytest.mark.timeout(150)
async def test_increments_count_once_over_far_links_with_spikes(server: EmbeddedServer, namespace: str) -> None:
    async with Proxy(server.url) as link, Proxy(server.url) as other:
        link.delay = other.delay = DELAY
        async with runtime(link.url, namespace, "far") as far, runtime(other.url, namespace, "caller") as caller:
            await natsrt.register(far, Count, "count", Count)
            async with runtime(server.url, namespace, "near") as near, asyncio.timeout(120):
                await natsrt.register(near, Count, "count", Count)
                with spikes(link, other):
                    for sender, expected in ((caller, 1), (caller, 2), (near, 3)):
                        calls = [sender.send_message(1, AgentId("count", f"k{n}")) for n in range(8)]
                        assert await asyncio.gather(*calls) == [expected] * 8


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("command", ["agents ping", "agents stats", "doctor"])
async def test_commands_work_over_a_far_link_and_with_a_far_worker(link: Proxy, namespace: str, command: str) -> None:
    async with runtime(link.url, namespace) as far:
        await natsrt.register(far, Echo, "echo", Echo)
        link.delay = DELAY
        link.spike(SPIKE)
        ended = await natsrt_command(*command.split(), "--server", link.url, "--namespace", namespace, "--json")
        link.delay = 0
    assert ended.code == 0, ended
    assert "1 of 1 have a heartbeat and answer" in ended.stdout or "worker-" in ended.stdout


@pytest.mark.slow
async def test_a_far_worker_starts_serves_and_stops(server: EmbeddedServer, link: Proxy, namespace: str) -> None:
    link.delay = DELAY
    far = runtime(link.url, namespace)
    await natsrt.register(far, Echo, "echo", Echo)
    await natsrt.register(far, Count, "count", Count)
    async with runtime(server.url, namespace) as near:
        await far.start()
        await near.wait_for("echo", timeout=20)
        assert await near.send_message(1, AgentId("count", "a")) == 1
        await far.stop()
        assert not near.running.registry.view.workers


# -- after a reconnect -------------------------------------------------------------------------------------------------


async def test_events_for_subscriptions_that_were_added_during_a_disconnection_arrive(
    server: EmbeddedServer, link: Proxy, namespace: str
) -> None:
    Listener.heard = []
    async with runtime(link.url, namespace) as one, runtime(server.url, namespace) as other:
        await natsrt.register(one, Listener, "listener", Listener)
        await natsrt.register(other, Listener, "listener", Listener)
        # Its filter has a wildcard, so that each member gets a part of all events, those of other topic types too.
        await other.add_subscription(TypePrefixSubscription("ord", "listener"))
        link.delay = DELAY  # so that the registry is read again long after the reconnect
        link.cut()
        await eventually(lambda: not one.running.connection.connected)
        await other.add_subscription(TypeSubscription("news", "listener"))
        await link.restore()
        sent = 0
        async with asyncio.timeout(60):
            while not (one.running.connection.connected and one.running.registry.synced):
                await other.publish_message(sent, TopicId("news", "a"))
                sent += 1
                await asyncio.sleep(0.02)
            await eventually(lambda: sorted(Listener.heard) == list(range(sent)), timeout=20)
        assert sent > 20
        link.delay = 0
