"""A blocked event loop: the server closes the connection meanwhile, and nothing that is sent after it is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from autogen_core import AgentId, TypeSubscription

from benchmarks.chaos.proxy import Proxy
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import NatsrtError
from natsrt.options import Options
from natsrt.transport.connection import Connection
from tests.programs import stalling
from tests.programs.labor import Work
from tests.programs.stalling import NOTES, Keeper, Note
from tests.support.calls import ended, running, worker_process
from tests.support.processes import Processes, eventually

PROGRAM = Path(stalling.__file__)
STALL = 2.6
"""Seconds of a stall, longer than the server below waits for answers to its pings."""
NOTICED = 1.3
"""Seconds of a stall after which the connection is in doubt."""
SCENARIOS = {
    "publisher": [1, 2, 3, 4],
    "idle": [1],
    "caller": [1, 2],
    "handler": [1, 2, 3],
    "keyed": [1, 2, 3],
    "registers": [1],
    "drains": [1, 2, 3],
}
"""The programs, and the events that arrive, each once and in order."""


@pytest.fixture
async def strict(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    """A server that closes a connection after 1 to 2 s without an answer to its pings."""
    config = tmp_path / "strict.conf"
    config.write_text('ping_interval: "1s"\nping_max: 1\n')
    async with EmbeddedServer(config=config, data_dir=tmp_path / "data", port=-1, extra_args=["-js"]) as server:
        yield server


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_nothing_that_is_sent_around_a_stall_is_lost_or_comes_twice(
    scenario: str, strict: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    numbers: list[int] = []
    async with NatsAgentRuntime(strict.url, namespace=namespace) as runtime:
        await runtime.register_factory("keeper", lambda: Keeper(numbers), expected_class=Keeper)
        await runtime.add_subscription(TypeSubscription("notes", "keeper"))
        program = processes.python(PROGRAM, scenario, strict.url, namespace, str(STALL))
        assert await program.wait(timeout=50) == 0, program.describe()
        await runtime.running.connection.barrier()
        await eventually(lambda: not runtime.running.dispatch.running)
    assert numbers == SCENARIOS[scenario], program.describe()
    said = [line for line in program.stderr.splitlines() if "the event loop did not run for" in line]
    assert said and all("asyncio.to_thread" in line for line in said)
    assert "Start one with" not in program.stderr  # there is a server
    assert "lost the connection" in program.stderr  # the stall was long enough to test anything
    if scenario == "idle":
        assert float(program.stdout.split("processor")[1]) < 2


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["publisher", "handler", "keyed"])
async def test_a_restart_of_the_server_during_a_stall_loses_nothing(
    scenario: str, own_server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    numbers: list[int] = []
    async with NatsAgentRuntime(own_server.url, namespace=namespace) as runtime:
        await runtime.register_factory("keeper", lambda: Keeper(numbers), expected_class=Keeper)
        await runtime.add_subscription(TypeSubscription("notes", "keeper"))
        program = processes.python(PROGRAM, scenario, own_server.url, namespace, "5")
        await program.wait_for_line("begins" if scenario != "publisher" else "started", timeout=20)
        await asyncio.sleep(0.5)  # it blocks now, and for as long as the restart takes
        await own_server.restart(kill=True, downtime=0.5)
        await eventually(lambda: runtime.ready, timeout=10)
        assert await program.wait(timeout=50) == 0, program.describe()
        await eventually(lambda: numbers[-1:] == SCENARIOS[scenario][-1:])
    assert numbers == SCENARIOS[scenario], program.describe()


async def test_events_that_arrive_during_a_stall_are_handled_although_the_registry_gives_the_worker_up(
    server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    async with running(server.url, namespace, heartbeat_interval=0.4, heartbeat_ttl=1.0) as runtime:
        program = processes.python(PROGRAM, "listens", server.url, namespace, "4.5")
        await program.wait_for_line("begins", timeout=20)
        await runtime.publish_message(Note(1), NOTES)
        await eventually(lambda: not runtime.running.registry.view.workers_hosting("keeper"), timeout=4)
        await runtime.publish_message(Note(2), NOTES)
        assert await program.wait(timeout=20) == 0, program.describe()
    assert "heard 1 2" in program.stdout, program.describe()


# -- the connection --------------------------------------------------------------------------------------------------


class Link:
    """Two connections to one server: one over a link that can be cut, and one that listens."""

    def __init__(self, connection: Connection, proxy: Proxy, heard: list[bytes], namespace: str) -> None:
        self.connection = connection
        self.proxy = proxy
        self.heard = heard
        self.subject = f"{namespace}.stalled"


@pytest.fixture
async def link(server: EmbeddedServer, namespace: str) -> AsyncIterator[Link]:
    async with Proxy(server.url) as proxy:
        connection = Connection(Options(servers=[proxy.url], connect_timeout=20), client_name="stalled")
        listener = Connection(Options(servers=[server.url]), client_name="listener")
        await connection.open()
        await listener.open()
        one = Link(connection, proxy, [], namespace)
        await listener.subscribe(one.subject, lambda message: one.heard.append(message.data))
        await listener.barrier()
        await connection.barrier()
        yield one
        await connection.close()
        await listener.close()


async def test_what_is_sent_in_the_step_of_the_stall_waits_for_a_new_connection(link: Link) -> None:
    await link.connection.publish(link.subject, b"before")
    link.proxy.cut()
    time.sleep(NOTICED)
    await link.connection.publish(link.subject, b"after")
    time.sleep(NOTICED)
    await link.connection.publish(link.subject, b"later")
    await asyncio.sleep(0.1)
    assert link.heard == []
    await link.proxy.restore()
    await eventually(lambda: len(link.heard) == 3)
    await eventually(lambda: link.connection.connected)
    await link.connection.barrier()
    assert link.heard == [b"before", b"after", b"later"]
    assert link.connection.reconnects == 1


async def test_after_a_stall_of_a_connection_that_works_everything_is_sent_on_it(link: Link) -> None:
    for number in range(3):
        time.sleep(NOTICED)
        await link.connection.publish(link.subject, b"%d" % number)
    await link.connection.barrier()
    await eventually(lambda: link.heard == [b"0", b"1", b"2"])
    assert link.connection.reconnects == 0


@pytest.mark.slow
async def test_what_waits_on_a_link_that_hangs_is_sent_by_the_client_that_replaces_it(link: Link) -> None:
    link.proxy.freeze()
    time.sleep(NOTICED)
    client = link.connection.client
    await link.connection.publish(link.subject, b"once")
    used = time.process_time()
    waiting = asyncio.create_task(link.connection.round_trip(None))
    await ended(waiting, within=20)
    assert time.process_time() - used < 2  # a flush that waits does not spin
    link.proxy.thaw()
    assert link.connection.client is not client
    await eventually(lambda: link.heard)
    await link.connection.barrier()
    assert link.heard == [b"once"]


async def test_closing_waits_for_what_was_kept_back(link: Link) -> None:
    link.proxy.cut()
    time.sleep(NOTICED)
    await link.connection.publish(link.subject, b"last")
    closing = asyncio.create_task(link.connection.close())
    await asyncio.sleep(0.2)
    assert not closing.done()
    await link.proxy.restore()
    await ended(closing)
    await eventually(lambda: link.heard == [b"last"])


async def test_closing_gives_up_after_connect_timeout_and_says_so(
    server: EmbeddedServer, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Proxy(server.url) as proxy:
        connection = Connection(Options(servers=[proxy.url], connect_timeout=0.5), client_name="stalled")
        await connection.open()
        proxy.cut()
        time.sleep(NOTICED)
        for _ in range(3):
            await connection.publish(namespace, b"lost")
        await ended(connection.close())
    assert "the server does not answer: 3 messages that were sent last will not arrive" in caplog.text


async def test_a_reconnect_does_not_wait_for_a_round_trip_on_the_connection_before(link: Link) -> None:
    link.proxy.freeze()
    waiting = asyncio.create_task(link.connection.client.flush())
    await eventually(lambda: link.connection.client._pongs)
    link.proxy.cut()
    await link.proxy.restore()
    await eventually(lambda: link.connection.reconnects == 1 and link.connection.connected)
    await asyncio.wait({waiting}, timeout=5)
    assert waiting.done()
    assert waiting.exception() is not None


async def test_waiting_for_a_connection_always_waits_while_there_is_none(link: Link) -> None:
    """Also when the client has noticed the loss and the connection has not: between the two, `stop_when_idle` spun."""
    link.proxy.cut()
    client = link.connection.client
    while client.is_connected:
        await asyncio.sleep(0)
    with pytest.raises(NatsrtError):
        await link.connection.barrier()
    waiting = asyncio.create_task(link.connection.wait_connected(None))
    await asyncio.sleep(0)
    assert not waiting.done()
    await link.proxy.restore()
    await ended(waiting)
    assert link.connection.connected


# -- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_worker_is_not_taken_for_lost_because_its_callers_loop_was_blocked(
    server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    await worker_process(processes, server.url, namespace, "laborer")
    async with running(server.url, namespace, lost_after=1.5) as caller:
        call = asyncio.ensure_future(caller.send_message(Work("sleep", "kept", 5.0), AgentId("laborer", "k")))
        judge = caller.running.calls._watch._judge
        async with asyncio.timeout(10):
            while not any(asked.silent_since is not None for asked in judge.asked.values()):
                await asyncio.sleep(0)
        time.sleep(3.0)  # the answer to the question lies in the socket
        assert (await ended(call, within=10)).result().note == "kept"
