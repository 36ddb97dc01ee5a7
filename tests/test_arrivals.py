"""``runtime.wait_for``: when it returns, the first call reaches a worker."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import nats
import pytest
from autogen_core import AgentId, AgentType, MessageContext, RoutedAgent, message_handler

from natsrt import (
    AgentNotServed,
    JetStreamRequired,
    NatsAgentRuntime,
    RegistryUnavailable,
    ServerUnreachable,
    keyed,
    register,
)
from natsrt.embedded import EmbeddedServer
from natsrt.sending import arrivals
from tests.support.clients import settled
from tests.support.processes import REPOSITORY, Process, Processes, eventually

FOREIGN = REPOSITORY / "examples" / "without_natsrt.py"
LONG = 30.0
"""Seconds after which a wait that should succeed has failed."""


class Writer(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("writes")

    @message_handler
    async def write(self, message: str, ctx: MessageContext) -> str:
        return f"{self.id}: {message}"


@keyed
class Ledger(Writer):
    """Keyed."""


WORKER = """
import asyncio, sys
from natsrt import NatsAgentRuntime, register
from tests.test_arrivals import Writer

async def main():
    runtime = NatsAgentRuntime(sys.argv[1], namespace=sys.argv[2], name="writers")
    await register(runtime, Writer, "writer", Writer)
    await runtime.start()
    print("ready", flush=True)
    await runtime.stop_when_signal()

asyncio.run(main())
"""


@pytest.fixture
async def caller(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    """A runtime that hosts nothing, and sends a call once only."""
    async with NatsAgentRuntime(server.url, namespace=namespace, name="caller", no_responders_retry=0.001) as runtime:
        yield runtime


async def waiting(runtime: NatsAgentRuntime, agent: str | AgentType | AgentId) -> asyncio.Task[None]:
    """A wait under way, whose first attempt found nothing."""
    task = asyncio.create_task(runtime.wait_for(agent, timeout=LONG))
    await eventually(lambda: bool(runtime.running.arrivals._watches))
    await runtime.running.connection.barrier()
    assert not task.done()
    return task


async def start_writer(server: EmbeddedServer, namespace: str, processes: Processes) -> Process:
    return processes.python(WORKER, server.url, namespace, name="writers")


# -- who counts --------------------------------------------------------------------------------------------------


async def test_the_first_call_after_the_wait_is_answered(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime, processes: Processes
) -> None:
    wait = await waiting(caller, "writer")
    await start_writer(server, namespace, processes)
    await wait
    assert await caller.send_message("hi", AgentId("writer", "a")) == "writer/a: hi"
    await caller.wait_for(AgentType("writer"), timeout=LONG)
    await caller.wait_for(AgentId("writer", "anyone"), timeout=LONG)


async def test_the_first_call_is_answered_each_time_that_a_type_is_registered(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    for number in range(20):
        agent_type = f"writer-{number}"
        async with NatsAgentRuntime(server.url, namespace=namespace, name="w") as worker:
            wait = await waiting(caller, agent_type)
            hosting = asyncio.create_task(register(worker, Writer, agent_type, Writer))
            await wait
            assert await caller.send_message("hi", AgentId(agent_type, "a")) == f"{agent_type}/a: hi"
            await hosting


async def test_a_type_of_this_runtime_itself_is_served(caller: NatsAgentRuntime) -> None:
    wait = await waiting(caller, "writer")
    await register(caller, Writer, "writer", Writer)
    await wait
    assert await caller.send_message("hi", AgentId("writer", "a")) == "writer/a: hi"


async def test_a_wait_that_begins_before_the_start_is_complete_goes_on_after_it(
    server: EmbeddedServer, namespace: str
) -> None:
    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    await register(runtime, Writer, "writer", Writer)
    starting = runtime.start()
    await runtime.wait_for("writer", timeout=LONG)
    assert await runtime.send_message("hi", AgentId("writer", "a")) == "writer/a: hi"
    await starting
    await runtime.stop()


async def test_keyed_types_are_served(server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime) -> None:
    agent = AgentId("ledger", "ada")
    waits = [await waiting(caller, "ledger"), await waiting(caller, agent)]
    async with NatsAgentRuntime(server.url, namespace=namespace, name="w") as worker:
        await register(worker, Ledger, "ledger", Ledger)
        await asyncio.gather(*waits)
        assert await caller.send_message("hi", agent) == "ledger/ada: hi"


async def test_of_registered_instances_one_serves_the_type_and_each_only_itself(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    one, other = AgentId("writer", "one"), AgentId("writer", "other")
    of_type, of_one, of_other = [await waiting(caller, agent) for agent in ("writer", one, other)]
    async with NatsAgentRuntime(server.url, namespace=namespace, name="w") as worker:
        await worker.register_agent_instance(Writer(), one)
        await asyncio.gather(of_type, of_one)
        assert await caller.send_message("hi", one) == "writer/one: hi"
        with pytest.raises(AgentNotServed, match=r"registered instances only \(writer/one\)") as raised:
            await caller.wait_for(other, timeout=0.3)
        assert raised.value.agent == "writer/other"
        assert not of_other.done()
        await worker.register_agent_instance(Writer(), other)
        await of_other
        assert await caller.send_message("hi", other) == "writer/other: hi"


async def test_a_worker_that_has_declared_a_type_and_does_not_serve_it_yet_does_not_count(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = NatsAgentRuntime(server.url, namespace=namespace, name="w")
    await register(worker, Writer, "writer", Writer)
    worker.start()
    subscriptions, may_go_on = worker.running.incoming.subscriptions, asyncio.Event()
    subscribe = type(subscriptions).start

    async def start() -> None:
        await may_go_on.wait()
        await subscribe(subscriptions)

    monkeypatch.setattr(type(subscriptions), "start", lambda self: start())
    await eventually(lambda: caller.running.registry.view.workers_hosting("writer"))
    with pytest.raises(AgentNotServed, match=rf"worker {worker.worker_id} hosts it, but did not confirm"):
        await caller.wait_for("writer", timeout=0.5)
    wait = asyncio.create_task(caller.wait_for("writer", timeout=LONG))
    may_go_on.set()
    await wait
    assert await caller.send_message("hi", AgentId("writer", "a")) == "writer/a: hi"
    await worker.stop()


async def test_a_worker_that_drains_does_not_count_and_its_successor_does(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    busy, done = asyncio.Event(), asyncio.Event()

    class Slow(Writer):
        @message_handler
        async def wait(self, message: int, ctx: MessageContext) -> int:
            busy.set()
            await done.wait()
            return message

    worker = NatsAgentRuntime(server.url, namespace=namespace, name="old")
    await register(worker, Slow, "writer", Slow)
    await worker.start()
    call = asyncio.create_task(caller.send_message(1, AgentId("writer", "a")))
    await busy.wait()
    await caller.wait_for("writer", timeout=LONG)
    old, stop = worker.worker_id, asyncio.create_task(worker.stop())
    await eventually(lambda: not caller.running.registry.view.workers_hosting("writer"))
    with pytest.raises(AgentNotServed, match=f"worker {old} hosts it, but is stopping"):
        await caller.wait_for("writer", timeout=0.3)
    wait = await waiting(caller, "writer")
    async with NatsAgentRuntime(server.url, namespace=namespace, name="new") as successor:
        await register(successor, Writer, "writer", Writer)
        await wait
        assert await caller.send_message("hi", AgentId("writer", "a")) == "writer/a: hi"
        done.set()
        assert await call == 1
        await stop


async def test_a_confirmation_from_a_worker_that_stops_meanwhile_does_not_count(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = NatsAgentRuntime(server.url, namespace=namespace, name="w")
    await register(worker, Writer, "writer", Writer)
    await worker.start()
    await eventually(lambda: caller.running.registry.view.workers_hosting("writer"))
    peers = caller.running.network.peers
    ask = peers.serves

    async def serves(*question: object) -> bool:
        confirmed = await ask(*question)  # type: ignore[arg-type]
        await worker.stop()
        return confirmed

    monkeypatch.setattr(type(peers), "serves", lambda self, *question: serves(*question))
    with pytest.raises(AgentNotServed, match="no worker hosts it"):
        await caller.wait_for("writer", timeout=2)


async def test_a_worker_in_the_midst_of_unregistering_the_type_does_not_count(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace, name="w") as worker:
        await register(worker, Writer, "writer", Writer)
        await caller.wait_for("writer", timeout=LONG)
        worker._catalog.remove("writer")
        await worker.running.incoming.subscriptions.end("writer")
        assert caller.running.registry.view.workers_hosting("writer")
        with pytest.raises(AgentNotServed):
            await caller.wait_for("writer", timeout=0.5)


async def test_a_change_of_the_registry_ends_the_pause_between_two_attempts(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "_FIRST_PAUSE", 60.0)
    wait = await waiting(caller, "writer")
    async with NatsAgentRuntime(server.url, namespace=namespace, name="w") as worker:
        await register(worker, Writer, "writer", Writer)
        await wait


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_dead_or_frozen_worker_does_not_count_and_another_one_does(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime, processes: Processes, signum: int
) -> None:
    worker = await start_writer(server, namespace, processes)
    await worker.wait_for_line("ready")
    await caller.wait_for("writer", timeout=LONG)
    worker.pause() if signum == signal.SIGSTOP else worker.kill()
    with pytest.raises(AgentNotServed, match="did not confirm|no worker hosts it"):
        await caller.wait_for("writer", timeout=1.5)
    worker.kill()
    wait = await waiting(caller, "writer")
    async with NatsAgentRuntime(server.url, namespace=namespace, name="w") as other:
        await register(other, Writer, "writer", Writer)
        await wait
        assert await caller.send_message("hi", AgentId("writer", "a")) == "writer/a: hi"


async def test_a_frozen_worker_does_not_pass_for_a_plain_responder_once_the_registry_has_removed_it(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime, processes: Processes
) -> None:
    worker = await start_writer(server, namespace, processes)
    await worker.wait_for_line("ready")
    await caller.wait_for("writer", timeout=LONG)
    view = caller.running.registry.view
    (worker_id,) = view.workers_hosting("writer")
    worker.pause()
    await caller.running.registry._store.remove_worker(worker_id)
    await eventually(lambda: not caller.running.registry.lists(worker_id))
    subject = caller.running.network.subjects.agent("writer")
    assert await caller.running.network.probe.responder_exists(subject)
    with pytest.raises(AgentNotServed, match="no worker hosts it"):
        await caller.wait_for("writer", timeout=0.5)


async def test_plain_responders_count(server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime) -> None:
    subject = caller.running.network.subjects.agent("writer")
    client = await nats.connect(server.url)
    try:
        await client.subscribe(f"{namespace}.>")  # a tap is not a responder
        await settled(client)
        with pytest.raises(AgentNotServed):
            await caller.wait_for("writer", timeout=0.5)
        wait = await waiting(caller, AgentId("writer", "a"))

        async def answer(message: nats.aio.msg.Msg) -> None:
            assert message.data
            await message.respond(b'"plain"')

        await client.subscribe(subject, queue="writer", cb=answer)
        await wait
        assert await caller.send_message("hi", AgentId("writer", "a")) == "plain"
    finally:
        await client.close()


async def test_a_foreign_worker_counts(own_server: EmbeddedServer, processes: Processes) -> None:
    async with NatsAgentRuntime(own_server.url, name="caller") as caller:
        wait = await waiting(caller, "counter")
        processes.python(FOREIGN, "work", own_server.url, name="foreign")
        await wait


async def test_a_server_that_restarts_meanwhile_does_not_end_the_wait(own_server: EmbeddedServer) -> None:
    async with NatsAgentRuntime(own_server.url, name="caller") as caller:
        wait = await waiting(caller, "writer")
        await own_server.restart()
        async with NatsAgentRuntime(own_server.url, name="w") as worker:
            await register(worker, Writer, "writer", Writer)
            await wait
            assert await caller.send_message("hi", AgentId("writer", "a")) == "writer/a: hi"


# -- how it ends -------------------------------------------------------------------------------------------------


async def test_the_error_says_what_there_is(server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime) -> None:
    with pytest.raises(AgentNotServed, match="live workers host nothing") as raised:
        await caller.wait_for("writer", timeout=0.2)
    assert isinstance(raised.value, TimeoutError)
    assert (raised.value.agent, raised.value.seconds) == ("writer", 0.2)
    async with NatsAgentRuntime(server.url, namespace=namespace, name="w") as worker:
        await register(worker, Writer, "writer", Writer)
        await caller.wait_for("writer", timeout=LONG)
        with pytest.raises(AgentNotServed, match="'wirter' within 0.2 s: no worker hosts it; live workers host writer"):
            await caller.wait_for("wirter", timeout=0.2)


async def test_a_runtime_that_was_not_started_is_refused(server: EmbeddedServer, namespace: str) -> None:
    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    with pytest.raises(RuntimeError, match=r"not started: call start\(\) first"):
        await runtime.wait_for("writer", timeout=1)
    async with runtime:
        pass
    with pytest.raises(RuntimeError, match="not started"):
        await runtime.wait_for("writer", timeout=1)


async def test_a_start_that_fails_ends_the_wait_with_its_error() -> None:
    runtime = NatsAgentRuntime("nats://127.0.0.1:1", connect_timeout=0.3)
    starting = asyncio.ensure_future(runtime.start())
    with pytest.raises(AgentNotServed, match="this runtime has not started yet"):
        await runtime.wait_for("writer", timeout=0.1)
    with pytest.raises(ServerUnreachable):
        await runtime.wait_for("writer")
    await asyncio.gather(starting, return_exceptions=True)


async def test_a_start_that_fails_after_it_has_connected_ends_the_wait_with_its_error(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text("max_payload: 1MB\n")
    async with EmbeddedServer(config=config, port=-1) as bare:
        runtime = NatsAgentRuntime(bare.url)
        starting = asyncio.ensure_future(runtime.start())
        with pytest.raises(JetStreamRequired):
            await runtime.wait_for("writer")
        await asyncio.gather(starting, return_exceptions=True)


@pytest.mark.parametrize("wrong", ["", "two words", "writer/a", "1+1"])
async def test_what_autogen_does_not_accept_as_a_type_is_refused(caller: NatsAgentRuntime, wrong: str) -> None:
    with pytest.raises(ValueError, match="type"):
        await caller.wait_for(wrong, timeout=LONG)


@pytest.mark.parametrize("wrong", [0, -1, float("nan")])
async def test_a_timeout_that_cannot_be_used_is_refused(caller: NatsAgentRuntime, wrong: float) -> None:
    with pytest.raises(ValueError, match="timeout must be a number of seconds above 0"):
        await caller.wait_for("writer", timeout=wrong)


async def test_a_stop_ends_every_wait_at_once_although_a_handler_runs(caller: NatsAgentRuntime) -> None:
    busy, done = asyncio.Event(), asyncio.Event()

    class Slow(Writer):
        @message_handler
        async def wait(self, message: int, ctx: MessageContext) -> None:
            busy.set()
            await done.wait()

    await register(caller, Slow, "slow", Slow)
    call = asyncio.create_task(caller.send_message(1, AgentId("slow", "a")))
    await busy.wait()
    waits = [asyncio.create_task(caller.wait_for(agent)) for agent in ("writer", "writer", "editor")]
    await eventually(lambda: len(caller.running.arrivals._watches) == 2)
    stop = asyncio.create_task(caller.stop())
    for wait in waits:
        with pytest.raises(RegistryUnavailable, match="this runtime was stopped"):
            await wait
    with pytest.raises(RegistryUnavailable, match="this runtime was stopped"):
        await caller.wait_for("slow")
    assert not stop.done()
    done.set()
    await asyncio.gather(call, stop, return_exceptions=True)


async def test_many_waits_for_one_type_are_one_task_which_ends_with_the_last_of_them(
    caller: NatsAgentRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "_FIRST_PAUSE", 60.0)
    watches, tasks = caller.running.arrivals._watches, caller.running.arrivals._tasks
    waits = [asyncio.create_task(caller.wait_for("writer")) for _ in range(1000)]
    short = asyncio.create_task(caller.wait_for("writer", timeout=0.2))
    await eventually(lambda: len(tasks) == 1)
    for wait in waits[1:]:
        wait.cancel()
    ended = await asyncio.gather(*waits[1:], short, return_exceptions=True)
    assert {type(error) for error in ended} == {asyncio.CancelledError, AgentNotServed}
    assert len(tasks) == 1
    await register(caller, Writer, "writer", Writer)
    await waits[0]
    assert not watches
    last = asyncio.create_task(caller.wait_for("editor"))
    await eventually(lambda: len(tasks) == 1)
    last.cancel()
    await asyncio.gather(last, return_exceptions=True)
    await eventually(lambda: not len(tasks) and not watches)


async def test_an_idle_wait_asks_nothing_of_the_registry_and_looks_about_once_a_second(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    client, seen = await nats.connect(server.url), []

    async def see(message: nats.aio.msg.Msg) -> None:
        seen.append(message.subject)

    try:
        await client.subscribe("$JS.API.>", cb=see)
        await settled(client)
        with pytest.raises(AgentNotServed):
            await caller.wait_for("writer", timeout=2)
        await settled(client)
    finally:
        await client.close()
    assert [subject for subject in seen if namespace in subject and "DIRECT.GET" in subject] == []


async def test_a_handler_may_wait(server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime) -> None:
    class Patient(RoutedAgent):
        def __init__(self) -> None:
            super().__init__("waits")

        @message_handler
        async def pass_on(self, message: str, ctx: MessageContext) -> str:
            await caller.wait_for("writer", timeout=LONG)
            return str(await self.send_message(message, AgentId("writer", "a")))

    await register(caller, Patient, "patient", Patient)
    call = asyncio.create_task(caller.send_message("hi", AgentId("patient", "p")))
    await eventually(lambda: bool(caller.running.arrivals._watches))
    async with NatsAgentRuntime(server.url, namespace=namespace, name="w") as worker:
        await register(worker, Writer, "writer", Writer)
        assert await call == "writer/a: hi"


async def test_many_workers_are_not_all_asked(server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(12):
            worker = NatsAgentRuntime(server.url, namespace=namespace, name="w")
            await register(worker, Writer, "writer", Writer)
            await stack.enter_async_context(worker)
        await eventually(lambda: len(caller.running.registry.view.workers_hosting("writer")) == 12)
        await caller.wait_for("writer", timeout=LONG)
