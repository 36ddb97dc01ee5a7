"""It comes back: servers that stop, die, hang or drop the connection, and what becomes of the calls meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from autogen_core import AgentId, CancellationToken, MessageContext, TypeSubscription
from nats.aio.client import Client

import natsrt
from benchmarks.chaos.proxy import Proxy
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.subjects import Subjects
from tests.programs import labor
from tests.programs.labor import TOPIC, Laborer, Work
from tests.support.calls import ended, failure, known, running, worker_process
from tests.support.processes import Processes, eventually

LABORER = AgentId("laborer", "default")

# The promises' own limits, in seconds.
AT_ONCE = 2.0
SOON = 5.0


async def _echoes(caller: NatsAgentRuntime) -> bool:
    """Whether a call works."""
    try:
        return bool((await caller.send_message(Work("echo", "again"), LABORER)).note == "again")
    except natsrt.NatsrtError:
        return False


# -- the server goes and comes back ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
@pytest.mark.parametrize("seconds", [0.5, 4.0], ids=["short", "long"])
async def test_calls_under_way_are_answered_after_a_restart_of_the_server(
    processes: Processes, own_server: EmbeddedServer, namespace: str, kill: bool, seconds: float
) -> None:
    worker, worker_id = await worker_process(processes, own_server.url, namespace, "laborer")
    async with running(own_server.url, namespace) as caller:
        await known(caller, "laborer")
        calls = [asyncio.ensure_future(caller.send_message(Work("sleep", f"w{n}", seconds), LABORER)) for n in range(5)]
        for n in range(5):
            await worker.wait_for_line(f"begins w{n}")
        await own_server.restart(kill=kill, downtime=1.0)
        replies = (await ended(asyncio.gather(*calls), within=seconds + SOON)).result()
        assert [(reply.note, reply.worker) for reply in replies] == [(f"w{n}", worker_id) for n in range(5)]


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
async def test_calls_and_events_work_again_soon_after_a_restart_of_the_server(
    processes: Processes, own_server: EmbeddedServer, namespace: str, kill: bool
) -> None:
    worker, worker_id = await worker_process(processes, own_server.url, namespace, "laborer", "listening")
    async with running(own_server.url, namespace) as caller:
        await known(caller, "laborer", "listening")
        assert await _echoes(caller)
        await own_server.restart(kill=kill, downtime=1.0)

        async def works_again() -> None:
            while not await _echoes(caller):
                await asyncio.sleep(0.05)
            await caller.publish_message(Work("echo", "after"), TOPIC)
            await worker.wait_for_line("begins after", timeout=SOON)

        await ended(works_again(), within=SOON)
        await eventually(lambda: caller.ready)
        assert (await caller.send_message(Work("echo"), LABORER)).worker == worker_id
        error = await failure(caller.send_message(Work("echo"), AgentId("nobody", "k")), within=AT_ONCE)
        assert isinstance(error, natsrt.UnknownAgentType)


@pytest.mark.slow
async def test_what_is_sent_while_the_server_is_away_arrives_when_it_is_back(
    own_server: EmbeddedServer, namespace: str
) -> None:
    async with running(own_server.url, namespace, "laborer") as runtime:
        await own_server.kill()
        await eventually(lambda: not runtime.running.connection.connected)
        assert not runtime.ready
        calls = [asyncio.ensure_future(runtime.send_message(Work("echo", str(n)), LABORER)) for n in range(20)]
        await asyncio.wait(calls, timeout=1.0)
        await own_server.start()
        replies = (await ended(asyncio.gather(*calls), within=SOON)).result()
        assert [reply.note for reply in replies] == [str(n) for n in range(20)]


@pytest.mark.slow
async def test_a_paused_server_delays_calls_and_loses_none(
    processes: Processes, own_server: EmbeddedServer, namespace: str
) -> None:
    worker, _ = await worker_process(processes, own_server.url, namespace, "laborer")
    async with running(own_server.url, namespace) as caller:
        await known(caller, "laborer")
        under_way = asyncio.ensure_future(caller.send_message(Work("sleep", "under way", 3.0), LABORER))
        await worker.wait_for_line("begins under way")
        own_server.pause()
        await asyncio.wait({under_way}, timeout=8.0)
        own_server.resume()
        assert (await ended(under_way, within=SOON)).result().note == "under way"
        await eventually(lambda: _echoes(caller), timeout=SOON)


# -- the server is gone ----------------------------------------------------------------------------------------------


async def test_when_the_server_is_gone_for_good_everything_fails_after_offline_timeout(
    own_server: EmbeddedServer, namespace: str
) -> None:
    async with (
        running(own_server.url, namespace, "laborer") as hosting,
        running(own_server.url, namespace, offline_timeout=1.0) as caller,
    ):
        await known(caller, "laborer")
        under_way = asyncio.ensure_future(caller.send_message(Work("sleep", seconds=60.0), LABORER))
        await eventually(lambda: hosting.running.dispatch.running)
        await own_server.kill()
        await eventually(lambda: not caller.running.connection.connected)
        late: list[Any] = [caller.send_message(Work("echo"), LABORER) for _ in range(10)]
        late += [caller.publish_message(Work("echo"), TOPIC) for _ in range(10)]
        outcome = await ended(asyncio.gather(under_way, *late, return_exceptions=True), within=3.0)
        assert {type(error) for error in outcome.result()} == {natsrt.ServerUnreachable}
        assert {error.seconds for error in outcome.result()} == {1.0}
        await hosting.running.dispatch.finish(0.0, asyncio.Event())


async def test_calls_for_which_there_was_no_room_fail_after_offline_timeout_too(
    own_server: EmbeddedServer, namespace: str
) -> None:
    async with (
        running(own_server.url, namespace, "laborer"),
        running(own_server.url, namespace, offline_timeout=1.0) as caller,
    ):
        await known(caller, "laborer")
        client = caller.running.connection.client
        own_server.pause()
        client.doubt()  # it writes nothing before the server has answered
        while client.post(namespace, bytes(1_000_000), ""):
            pass
        calls = [asyncio.ensure_future(caller.send_message(Work("echo"), LABORER)) for _ in range(3)]
        await asyncio.wait(calls, timeout=0.2)
        await own_server.kill()
        outcome = await ended(asyncio.gather(*calls, return_exceptions=True), within=2 * SOON)
        assert {type(error) for error in outcome.result()} == {natsrt.ServerUnreachable}


async def test_a_token_ends_a_send_that_waits_for_the_server(own_server: EmbeddedServer, namespace: str) -> None:
    async with running(own_server.url, namespace, "laborer") as runtime:
        await own_server.kill()
        await eventually(lambda: not runtime.running.connection.connected)
        tokens = [CancellationToken() for _ in range(3)]
        calls = [
            asyncio.ensure_future(runtime.send_message(Work("echo"), LABORER, cancellation_token=token))
            for token in tokens
        ]
        await asyncio.wait(calls, timeout=0.1)
        for token, call in reversed(list(zip(tokens, calls, strict=True))):
            token.cancel()
            assert isinstance(await failure(call, within=AT_ONCE), asyncio.CancelledError)


@pytest.mark.parametrize("offline_timeout", [30.0, None])
async def test_stopping_ends_the_sends_that_wait_for_the_server(
    own_server: EmbeddedServer, namespace: str, offline_timeout: float | None
) -> None:
    runtime = NatsAgentRuntime(own_server.url, namespace=namespace, offline_timeout=offline_timeout or "none")
    await runtime.start()
    await own_server.kill()
    await eventually(lambda: not runtime.running.connection.connected)
    calls = [asyncio.ensure_future(runtime.send_message(Work("echo"), LABORER)) for _ in range(3)]
    await asyncio.wait(calls, timeout=0.1)
    await ended(runtime.stop(), within=SOON)
    for call in calls:
        assert isinstance(await failure(call, within=AT_ONCE), natsrt.ServerUnreachable)


@pytest.mark.slow
async def test_a_call_to_an_unknown_type_ends_when_the_registry_cannot_be_read(tmp_path: Path, namespace: str) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(f'jetstream {{ store_dir: "{tmp_path / "jetstream"}" }}')
    async with (
        EmbeddedServer(config=config, port=-1) as server,
        running(server.url, namespace) as runtime,
    ):
        config.write_text("")
        await server.restart()
        await eventually(lambda: runtime.running.connection.connected)
        assert not runtime.ready
        error = await failure(runtime.send_message(Work("echo"), AgentId("nobody", "k")), within=15.0)
        assert isinstance(error, natsrt.RegistryUnavailable | natsrt.JetStreamRequired)


# -- the network -----------------------------------------------------------------------------------------------------


class _Gated(Laborer):
    """Its handler goes on when it is told to."""

    begun: asyncio.Event
    go_on: asyncio.Event

    async def sleep(self, message: Work, ctx: MessageContext) -> Any:
        type(self).begun.set()
        await type(self).go_on.wait()
        return await self.echo(message, ctx)


@pytest.fixture
def gated() -> type[_Gated]:
    _Gated.begun, _Gated.go_on = asyncio.Event(), asyncio.Event()
    return _Gated


@pytest.mark.parametrize("accepted", [False, True], ids=["before its acceptance", "after its acceptance"])
async def test_a_reply_that_is_published_while_the_caller_is_disconnected_arrives(
    own_server: EmbeddedServer, namespace: str, gated: type[_Gated], accepted: bool
) -> None:
    async with (
        Proxy(own_server.url) as proxy,
        running(own_server.url, namespace) as hosting,
        running(proxy.url, namespace) as caller,
    ):
        await natsrt.register(hosting, gated, "gated", gated)
        await known(caller, "gated")
        call = asyncio.ensure_future(caller.send_message(Work("sleep", "kept"), AgentId("gated", "k")))
        await gated.begun.wait()
        if accepted:
            await asyncio.wait({call}, timeout=0.5)
        proxy.cut()
        await eventually(lambda: not caller.running.connection.connected)
        gated.go_on.set()
        await eventually(lambda: not hosting.running.dispatch.running)
        await hosting.running.connection.barrier()
        await proxy.restore()
        assert (await ended(call)).result().note == "kept"


async def test_a_call_that_got_lost_on_its_way_is_sent_again(
    processes: Processes, own_server: EmbeddedServer, namespace: str
) -> None:
    worker, worker_id = await worker_process(processes, own_server.url, namespace, "laborer")
    async with (
        Proxy(own_server.url) as proxy,
        running(proxy.url, namespace) as caller,
    ):
        await known(caller, "laborer")
        assert await _echoes(caller)
        await eventually(lambda: _remembers(caller, worker_id, 3.0))
        proxy.freeze()
        call = asyncio.ensure_future(caller.send_message(Work("echo", "lost"), LABORER))
        await eventually(lambda: caller.running.calls.pending == 1)
        proxy.cut()
        proxy.thaw()
        await proxy.restore()
        reply = (await ended(call, within=SOON)).result()
        assert (reply.note, reply.worker) == ("lost", worker_id)
        assert worker.stdout.count("begins lost") == 1


async def _remembers(caller: NatsAgentRuntime, worker_id: str, seconds: float) -> bool:
    """Whether the worker's memory of calls reaches back so far."""
    question = envelope.encode(envelope.FATE, '"id":"fate","source":"/"', b'{"calls":[]}')
    answer = await caller.running.network.peers.ask(Subjects(caller.options.namespace).worker(worker_id), question, 1.0)
    body = None if answer is None else envelope.decode(answer.data)
    return body is not None and body.json()["remembers"] > seconds


async def test_a_call_that_may_have_been_handled_is_not_sent_again(
    processes: Processes, own_server: EmbeddedServer, namespace: str
) -> None:
    lost, _ = await worker_process(processes, own_server.url, namespace, "laborer")
    async with running(own_server.url, namespace) as caller:
        await known(caller, "laborer")
        call = asyncio.ensure_future(caller.send_message(Work("sleep", "unsure", 60.0), LABORER))
        await lost.wait_for_line("begins unsure")
        other, _ = await worker_process(processes, own_server.url, namespace, "laborer")
        lost.kill()
        error = await failure(call, within=SOON)
        assert isinstance(error, natsrt.WorkerLost)
        assert "begins unsure" not in other.stdout


async def test_a_subscription_is_added_although_another_worker_of_the_type_was_killed(
    processes: Processes, own_server: EmbeddedServer, namespace: str
) -> None:
    dead, _ = await worker_process(processes, own_server.url, namespace, "laborer")
    async with running(own_server.url, namespace) as other:
        await known(other, "laborer")
        dead.kill()
        await dead.wait()
        await other.add_subscription(TypeSubscription("late", "laborer"))


async def test_a_reply_whose_worker_is_disconnected_when_it_is_ready_arrives(
    own_server: EmbeddedServer, namespace: str, gated: type[_Gated]
) -> None:
    async with (
        Proxy(own_server.url) as proxy,
        running(proxy.url, namespace) as hosting,
        running(own_server.url, namespace) as caller,
    ):
        await natsrt.register(hosting, gated, "gated", gated)
        await known(caller, "gated")
        call = asyncio.ensure_future(caller.send_message(Work("sleep", "kept"), AgentId("gated", "k")))
        await gated.begun.wait()
        proxy.cut()
        await eventually(lambda: not hosting.running.connection.connected)
        gated.go_on.set()
        await eventually(lambda: not hosting.running.dispatch.running)
        await proxy.restore()
        assert (await ended(call)).result().note == "kept"


@pytest.mark.parametrize("closes", ["server", "client"])
async def test_a_connection_that_was_closed_is_made_again(
    own_server: EmbeddedServer, namespace: str, gated: type[_Gated], closes: str
) -> None:
    async with running(own_server.url, namespace, "laborer") as runtime:
        await natsrt.register(runtime, gated, "gated", gated)
        call = asyncio.ensure_future(runtime.send_message(Work("sleep", "kept"), AgentId("gated", "k")))
        await gated.begun.wait()
        connection = runtime.running.connection
        closed = connection.client
        if closes == "server":
            await closed.publish("s" * 5000, b"")  # a line that is longer than the server takes
        else:
            await closed.close()
        await eventually(lambda: connection.reconnects == 1 and connection.connected, timeout=SOON)
        assert (connection.client is closed) == (closes == "server")  # nats-py reconnects where the server closes
        gated.go_on.set()
        assert (await ended(call)).result().note == "kept"
        assert (await ended(runtime.send_message(Work("echo", "new"), LABORER))).result().note == "new"


@asynccontextmanager
async def _being_replaced(
    proxy: Proxy, connection: Connection, closed: Callable[[], Awaitable[None]] | None = None
) -> AsyncIterator[None]:
    """Run the block while ``connection`` has no client and can connect none.

    ``closed`` is called again and again from the moment in which the client has closed until the block.
    """
    lost = connection.client
    proxy.cut()
    closing = asyncio.ensure_future(lost.close())
    while closed is not None and connection._client is lost:
        await asyncio.sleep(0)
        if lost.is_closed:  # for good, and the connection does not know it yet
            await closed()
    await closing
    await eventually(lambda: connection._client is None)
    with pytest.raises(natsrt.ServerUnreachable):
        _ = connection.client
    yield
    await proxy.restore()


async def test_what_is_published_while_the_client_is_replaced_arrives_in_order(own_server: EmbeddedServer) -> None:
    heard: list[tuple[int, dict[str, str] | None]] = []
    async with Proxy(own_server.url) as proxy:
        sending, listening = connections = [
            Connection(Options(servers=[url], reconnect_wait=0.01), client_name="test")
            for url in (proxy.url, own_server.url)
        ]
        for connection in connections:
            await connection.open()
        await listening.subscribe("count", lambda message: heard.append((int(message.data), message.headers)))
        await listening.barrier()
        sent: list[int] = []

        async def publish() -> None:
            sent.append(number := len(sent))
            await sending.publish("count", b"%d" % number, headers={"n": str(number)} if number % 3 == 0 else None)

        for _ in range(10):
            await publish()
        await sending.barrier()
        async with _being_replaced(proxy, sending, publish):
            assert len(sent) > 10
            for _ in range(100):
                await publish()
            with pytest.raises(natsrt.MessageTooLarge):
                await sending.publish("count", b"x" * (sending.max_payload + 1))
        while sending.reconnects == 0:  # at each step of connecting
            await publish()
            await asyncio.sleep(0)
        await publish()
        await eventually(lambda: len(heard) >= len(sent))
        assert [number for number, _ in heard] == sent
        assert all(headers == ({"n": str(number)} if number % 3 == 0 else None) for number, headers in heard)
        for connection in connections:
            await connection.close()


async def test_a_connection_that_ends_while_its_client_is_replaced_says_how_much_is_lost(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with Proxy(own_server.url) as proxy:
        connection = Connection(Options(servers=[proxy.url]), client_name="test")
        await connection.open()
        async with _being_replaced(proxy, connection):
            for _ in range(3):
                await connection.publish("count", b"x" * 500_000)
            with pytest.raises(natsrt.ServerUnreachable, match="buffer"):
                await connection.publish("count", b"x" * 1_000_000)
            await connection.close()
        assert "3 messages that were sent last will not arrive" in caplog.text
        with pytest.raises(natsrt.ServerUnreachable, match="closed"):
            await connection.publish("count", b"")


async def test_a_handler_that_calls_and_replies_while_its_client_is_replaced_is_answered(
    own_server: EmbeddedServer, namespace: str, gated: type[_Gated]
) -> None:
    async with (
        Proxy(own_server.url) as proxy,
        running(proxy.url, namespace) as hosting,
        running(own_server.url, namespace, "laborer") as caller,
    ):
        await natsrt.register(hosting, gated, "gated", gated)
        await known(caller, "gated")
        await known(hosting, "laborer")
        call = asyncio.ensure_future(caller.send_message(Work("sleep", "kept"), AgentId("gated", "k")))
        await gated.begun.wait()
        async with _being_replaced(proxy, hosting.running.connection):
            gated.go_on.set()
            await eventually(lambda: not hosting.running.dispatch.running)
            nested = asyncio.ensure_future(hosting.send_message(Work("echo", "nested"), LABORER))
            await asyncio.wait({nested}, timeout=0.1)
            assert not nested.done()
        assert (await ended(call)).result().note == "kept"
        assert (await ended(nested)).result().note == "nested"


@pytest.mark.slow
async def test_a_connection_that_has_gone_deaf_is_replaced(own_server: EmbeddedServer, namespace: str) -> None:
    async with (
        Proxy(own_server.url) as proxy,
        running(own_server.url, namespace, "laborer"),
        running(proxy.url, namespace) as caller,
    ):
        await known(caller, "laborer")
        deaf = caller.running.connection.client
        proxy.freeze()
        flushing = asyncio.ensure_future(Client.flush(deaf))  # nats-py's own, whose answer will find it cancelled
        await asyncio.wait({flushing}, timeout=0.1)
        flushing.cancel()
        proxy.thaw()
        connection = caller.running.connection
        await eventually(lambda: connection.connected and connection.client is not deaf, timeout=10.0)
        assert (await ended(caller.send_message(Work("echo", "hears"), LABORER))).result().note == "hears"


async def test_giving_up_a_barrier_does_not_make_the_connection_deaf(
    own_server: EmbeddedServer, namespace: str
) -> None:
    async with (
        Proxy(own_server.url) as proxy,
        running(own_server.url, namespace, "laborer"),
        running(proxy.url, namespace) as caller,
    ):
        await known(caller, "laborer")
        connection = caller.running.connection
        client = connection.client
        proxy.freeze()
        barrier = asyncio.ensure_future(connection.barrier())
        flush = asyncio.ensure_future(client.flush(timeout=1))
        await asyncio.wait({barrier}, timeout=0.1)
        barrier.cancel()
        await asyncio.wait({barrier, flush})
        proxy.thaw()
        await ended(connection.barrier())
        assert (await ended(caller.send_message(Work("echo", "hears"), LABORER))).result().note == "hears"
        assert connection.client is client
        assert connection.reconnects == 0


@pytest.mark.slow
async def test_a_link_that_hangs_is_replaced_and_calls_go_on(own_server: EmbeddedServer, namespace: str) -> None:
    async with (
        Proxy(own_server.url) as proxy,
        running(own_server.url, namespace, "laborer", "listening"),
        running(proxy.url, namespace) as caller,
    ):
        await known(caller, "laborer", "listening")
        proxy.freeze()
        for _ in range(40):  # more than the sockets hold
            await caller.publish_message("x" * 900_000, TOPIC)
        call = caller.send_message(Work("echo", "through"), LABORER)
        outcome = await ended(call, within=15.0)
        assert isinstance(outcome.exception(), natsrt.NatsrtError) if outcome.exception() else outcome.result()
        await eventually(lambda: _echoes(caller), timeout=10.0)


# -- stopping and cancelling meanwhile -------------------------------------------------------------------------------


@pytest.mark.slow
async def test_stopping_while_the_server_hangs_leaves_nothing_behind(
    own_server: EmbeddedServer, namespace: str
) -> None:
    runtime = NatsAgentRuntime(own_server.url, namespace=namespace, drain_timeout=5.0)
    await runtime.start()
    await labor.host(runtime, "laborer")
    own_server.pause()
    try:
        await ended(runtime.stop(), within=30.0)
    finally:
        own_server.resume()
    assert runtime.worker_id is None
    await eventually(lambda: not [t for t in asyncio.all_tasks() if t.get_name().startswith("natsrt ")])
    async with running(own_server.url, namespace) as other:
        assert isinstance(await failure(other.send_message(Work("echo"), LABORER), within=SOON), natsrt.UndeliveredCall)


async def test_a_cancellation_during_a_blink_of_the_workers_connection_arrives(
    own_server: EmbeddedServer, namespace: str
) -> None:
    async with (
        Proxy(own_server.url) as proxy,
        running(proxy.url, namespace, "laborer") as hosting,
        running(own_server.url, namespace) as caller,
    ):
        await known(caller, "laborer")
        token = CancellationToken()
        call = asyncio.ensure_future(
            caller.send_message(Work("until_cancelled", "blink"), LABORER, cancellation_token=token)
        )
        await eventually(lambda: any(entry.token for entry in hosting.running.incoming.active))
        proxy.cut()
        await eventually(lambda: not hosting.running.connection.connected)
        token.cancel()
        await asyncio.wait({call})
        assert call.cancelled()
        await proxy.restore()
        await eventually(lambda: hosting.running.dispatch.running == 0, timeout=15.0)
