"""No call hangs: every call ends in the reply, in the handler's error, or in a typed failure, within known limits."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats
import pytest
from autogen_core import (
    AgentId,
    CancellationToken,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypeSubscription,
    message_handler,
)
from nats.aio.msg import Msg

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.wire import envelope
from tests.programs.labor import TOPIC, Done, Laborer, Sabotage, Stray, Work
from tests.support.calls import ended, failure, known, running, worker_process
from tests.support.clients import settled
from tests.support.processes import Process, Processes, eventually

LABORER = AgentId("laborer", "default")

# The promises' own limits, in seconds.
AT_ONCE = 2.0
SOON = 5.0


@pytest.fixture
async def runtime(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    """A runtime that hosts laborers itself."""
    async with running(server.url, namespace, "laborer") as hosting:
        yield hosting


@pytest.fixture
async def caller(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    """A runtime that hosts nothing."""
    async with running(server.url, namespace) as calling:
        yield calling


# -- nobody there ----------------------------------------------------------------------------------------------------


async def test_a_call_to_an_unknown_type_fails_at_once(caller: NatsAgentRuntime) -> None:
    error = await failure(caller.send_message(Work("echo"), AgentId("nobody", "k")), within=AT_ONCE)
    assert isinstance(error, natsrt.UnknownAgentType)
    assert isinstance(error, LookupError)
    assert error.agent_type == "nobody"
    assert str(error.recipient) == "nobody/k"


async def test_many_calls_to_an_unknown_type_fail_at_once(caller: NatsAgentRuntime) -> None:
    calls = [caller.send_message(Work("echo"), AgentId("nobody", str(n))) for n in range(50)]
    outcome = (await ended(asyncio.gather(*calls, return_exceptions=True), within=AT_ONCE)).result()
    assert {type(error) for error in outcome} == {natsrt.UnknownAgentType}


async def test_a_call_to_a_type_whose_last_worker_stopped_fails_at_once(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    async with running(server.url, namespace, "laborer"):
        await caller.send_message(Work("echo"), LABORER)
    error = await failure(caller.send_message(Work("echo"), LABORER), within=AT_ONCE)
    assert isinstance(error, natsrt.NoLiveWorker)
    assert error.agent_type == "laborer"


async def test_a_call_to_an_instance_that_does_not_exist_fails_at_once(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    async with running(server.url, namespace) as hosting:
        await hosting.register_agent_instance(Laborer(), AgentId("single", "one"))
        await known(caller, "single")
        reply = await caller.send_message(Work("echo", "here"), AgentId("single", "one"))
        assert reply.note == "here"
        error = await failure(caller.send_message(Work("echo"), AgentId("single", "two")), within=AT_ONCE)
    assert isinstance(error, natsrt.UnknownAgent)
    assert error.known == ["single/one"]


# -- replies and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("none", None),
        ("text", "wörld"),
        ("number", 7),
        ("real", 0.5),
        ("yes", True),
        ("bytes", b"\0\xff"),
        ("list", [1]),
    ],
)
async def test_plain_replies_arrive_as_they_are(runtime: NatsAgentRuntime, name: str, value: Any) -> None:
    reply = (await ended(runtime.send_message(Work("answer", name), LABORER))).result()
    assert reply == value
    assert type(reply) is type(value)


@pytest.mark.parametrize(
    ("deed", "expected"),
    [
        ("unserializable", natsrt.CannotSerialize),
        ("sabotage", natsrt.RemoteAgentError),
        ("look_up", LookupError),
        ("surrogate_error", ValueError),
        ("unprintable_error", natsrt.RemoteAgentError),
        ("unprintable_field", natsrt.RemoteAgentError),
        ("leave", natsrt.RemoteAgentError),
        ("interrupt", natsrt.RemoteAgentError),
        ("stop_iteration", RuntimeError),
        ("cancel_itself", asyncio.CancelledError),
        ("no_such_method", AttributeError),
    ],
)
async def test_whatever_a_handler_raises_reaches_its_caller(
    runtime: NatsAgentRuntime, deed: str, expected: type[BaseException]
) -> None:
    error = await failure(runtime.send_message(Work(deed, "why"), LABORER))
    assert isinstance(error, expected)
    reply = await runtime.send_message(Work("echo", "still there"), LABORER)
    assert reply.note == "still there"


async def test_a_registered_error_arrives_as_itself_with_its_fields_and_origin(
    processes: Processes, server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    _, worker_id = await worker_process(processes, server.url, namespace, "laborer")
    caller.add_error_type(Sabotage)
    await known(caller, "laborer")
    error = await failure(caller.send_message(Work("sabotage", "why"), LABORER))
    assert isinstance(error, Sabotage)
    assert (error.args, error.grade) == (("why", 3), 3)
    origin = error.natsrt_remote  # type: ignore[attr-defined]
    assert (origin.agent, origin.worker_id) == ("laborer/default", worker_id)
    assert "in sabotage" in origin.traceback


async def test_a_message_that_no_agent_handles_fails(runtime: NatsAgentRuntime) -> None:
    error = await failure(runtime.send_message(Stray("lost"), LABORER))
    assert isinstance(error, natsrt.UnhandledMessage | natsrt.errors.CantHandleException)


async def test_a_factory_that_raises_answers_every_call(server: EmbeddedServer, namespace: str) -> None:
    async with running(server.url, namespace, "broken") as runtime:
        calls = [runtime.send_message(Work("echo"), AgentId("broken", str(n % 2))) for n in range(6)]
        outcome = (await ended(asyncio.gather(*calls, return_exceptions=True))).result()
        assert {type(error) for error in outcome} == {natsrt.RemoteAgentError}
        assert {error.error_type for error in outcome} == {"tests.programs.labor.Sabotage"}


@pytest.mark.parametrize(
    "body",
    [
        b'{"specversion":"1.0","type":"natsrt.call","id":"1","source":"/","subject":"k","messagetype":"Work","data":{]}',
        b'{"specversion":"1.0","type":"natsrt.call","id":"1","source":"/","subject":"k","messagetype":"Work","data":7}',
        b'{"specversion":"1.0","type":"natsrt.call","id":"1","source":"/","subject":"=ZZ","messagetype":"Work","data":{}}',
        b'{"specversion":"1.0","type":"natsrt.call","id":1,"source":"/","subject":"k","messagetype":"Work","data":{}}',
        b'{"specversion":"1.0","type":"natsrt.call","id":"1","subject":"k","data":{}}',
        b'{"specversion":"1.0","type":"natsrt.nonsense","id":"1","source":"/","subject":"k","data":{}}',
        b'{"specversion":"1.0","type":"natsrt.call"',
        b'{"do":7}',
        b"\xff\xfe",
        b"",
    ],
)
async def test_an_undecodable_message_is_answered_and_counted(
    server: EmbeddedServer, namespace: str, runtime: NatsAgentRuntime, body: bytes
) -> None:
    client = await nats.connect(server.url)
    try:
        reply = await client.request(f"{namespace}.agent.laborer", body, timeout=SOON)
    finally:
        await client.close()
    assert reply.headers is not None
    assert reply.headers["Nats-Service-Error-Code"] in ("400", "422")
    assert runtime.running.counters.undecodable == 1
    assert (await runtime.send_message(Work("echo", "alive"), LABORER)).note == "alive"


async def test_replies_of_two_callers_with_equal_counters_and_ids_never_cross(
    processes: Processes, server: EmbeddedServer, namespace: str
) -> None:
    await worker_process(processes, server.url, namespace, "laborer")

    async def calls_of(runtime: NatsAgentRuntime, name: str) -> list[Any]:
        return await asyncio.gather(
            *(
                runtime.send_message(Work("echo", f"{name}{n}"), AgentId("laborer", "same"), message_id=str(n % 10))
                for n in range(300)
            )
        )

    async with running(server.url, namespace) as first, running(server.url, namespace) as second:
        both = asyncio.gather(calls_of(first, "a"), calls_of(second, "b"))
        replies = (await ended(both, within=20.0)).result()
    assert [reply.note for reply in replies[0]] == [f"a{n}" for n in range(300)]
    assert [reply.note for reply in replies[1]] == [f"b{n}" for n in range(300)]


async def test_a_handler_that_calls_its_own_type_again_is_answered(runtime: NatsAgentRuntime) -> None:
    work = Work("echo", "deep", via=["laborer"] * 20)
    assert (await ended(runtime.send_message(work, LABORER))).result().note == "deep"


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deed", ["large", "large_error"])
@pytest.mark.parametrize("excess", [-3000, -200, -1, 0, 1, 1_000_000])
async def test_a_reply_of_any_size_ends_the_call(runtime: NatsAgentRuntime, deed: str, excess: int) -> None:
    connection = runtime.running.connection
    work = Work(deed, size=connection.max_payload + excess)
    task = await ended(runtime.send_message(work, LABORER))
    error = task.exception()
    if deed == "large":
        assert len(task.result()) == work.size
    else:
        assert isinstance(error, ValueError | natsrt.RemoteAgentError)
    assert connection.reconnects == 0


async def test_an_error_for_a_call_with_a_message_id_as_large_as_the_limit_ends_the_call(
    runtime: NatsAgentRuntime,
) -> None:
    limit = runtime.running.connection.max_payload
    for room in (300, 400, 500, 700, 1500):
        call = runtime.send_message(Work("look_up"), LABORER, message_id="m" * (limit - room))
        assert isinstance(await failure(call), natsrt.MessageTooLarge | LookupError)


async def test_a_plain_call_whose_error_is_too_large_is_answered(
    server: EmbeddedServer, namespace: str, runtime: NatsAgentRuntime
) -> None:
    client = await nats.connect(server.url)
    try:
        body = b'{"do":"large_error","size":3000000}'
        reply = await client.request(f"{namespace}.agent.laborer", body, timeout=SOON)
    finally:
        await client.close()
    assert reply.headers is not None
    assert reply.headers["Nats-Service-Error"]


# -- workers that die ------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_worker_killed_in_mid_call_fails_the_call(
    processes: Processes, server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    worker, worker_id = await worker_process(processes, server.url, namespace, "laborer")
    await known(caller, "laborer")
    calls = [asyncio.ensure_future(caller.send_message(Work("sleep", "long", 60.0), LABORER)) for _ in range(10)]
    await worker.wait_for_line("begins long")
    await asyncio.wait(calls, timeout=1.0)
    worker.kill()
    outcome = (await ended(asyncio.gather(*calls, return_exceptions=True), within=SOON)).result()
    assert {type(error) for error in outcome} == {natsrt.WorkerLost}
    assert {error.worker_id for error in outcome} == {worker_id}


@pytest.mark.slow
async def test_a_worker_killed_right_after_the_handler_began_fails_the_call(
    processes: Processes, server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    worker, _ = await worker_process(processes, server.url, namespace, "laborer")
    await known(caller, "laborer")
    call = asyncio.ensure_future(caller.send_message(Work("sleep", "long", 60.0), LABORER))
    await worker.wait_for_line("begins long")
    worker.kill()
    assert isinstance(await failure(call, within=SOON), natsrt.UndeliveredCall)


async def test_a_call_whose_worker_the_registry_gave_up_while_it_had_the_call_may_have_been_handled(
    processes: Processes, server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    worker, worker_id = await worker_process(processes, server.url, namespace, "laborer", accept_after=60.0)
    await known(caller, "laborer")
    call = asyncio.ensure_future(caller.send_message(Work("sleep", "long", 60.0), LABORER))
    await worker.wait_for_line("begins long")
    worker.kill()
    await caller.running.registry._store.remove_worker(worker_id)  # as other workers do some seconds later
    assert isinstance(await failure(call, within=SOON), natsrt.WorkerLost)
    error = await failure(caller.send_message(Work("echo"), LABORER), within=AT_ONCE)
    assert isinstance(error, natsrt.NoLiveWorker)


@pytest.mark.slow
async def test_a_worker_killed_before_it_looked_at_the_message_fails_the_call(
    processes: Processes, server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    worker, _ = await worker_process(processes, server.url, namespace, "laborer")
    await known(caller, "laborer")
    worker.pause()
    sent = caller.running.connection.client.stats["out_msgs"]
    call = asyncio.ensure_future(caller.send_message(Work("echo"), LABORER))
    await eventually(lambda: caller.running.connection.client.stats["out_msgs"] > sent)
    worker.kill()
    assert isinstance(await failure(call, within=SOON), natsrt.UndeliveredCall)


@pytest.mark.slow
async def test_a_call_to_a_frozen_worker_fails(processes: Processes, server: EmbeddedServer, namespace: str) -> None:
    worker, _ = await worker_process(processes, server.url, namespace, "laborer")
    async with running(server.url, namespace, lost_after=3.0) as caller:
        await known(caller, "laborer")
        worker.pause()
        error = await failure(caller.send_message(Work("echo"), LABORER), within=SOON)
        assert isinstance(error, natsrt.WorkerLost)
        worker.resume()
        await eventually(lambda: _echoes(caller), timeout=20.0)


async def _echoes(caller: NatsAgentRuntime, recipient: AgentId = LABORER) -> bool:
    try:
        return bool((await caller.send_message(Work("echo", "again"), recipient)).note == "again")
    except natsrt.NatsrtError:
        return False


@pytest.mark.slow
async def test_every_call_ends_when_one_of_two_workers_is_killed(
    processes: Processes, server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    doomed, doomed_id = await worker_process(processes, server.url, namespace, "laborer")
    _, other_id = await worker_process(processes, server.url, namespace, "laborer")
    await eventually(lambda: len(caller.running.registry.workers_of(LABORER)) == 2)
    stop = asyncio.Event()
    ends: list[tuple[float, str]] = []

    async def keep_calling(name: str) -> None:
        while not stop.is_set():
            try:
                reply = await caller.send_message(Work("sleep", name, 0.3), LABORER)
                ends.append((time.monotonic(), reply.worker))
            except natsrt.UndeliveredCall as error:
                ends.append((time.monotonic(), type(error).__name__))

    callers = [asyncio.ensure_future(keep_calling(f"c{n}")) for n in range(50)]
    await eventually(lambda: {worker for _, worker in ends} >= {doomed_id, other_id})
    doomed.kill()
    killed = time.monotonic()
    stop.set()  # the calls that are under way are the last ones
    await ended(asyncio.gather(*callers), within=SOON)
    assert {end for moment, end in ends if moment > killed} <= {doomed_id, other_id, "WorkerLost"}
    for _ in range(20):
        assert (await caller.send_message(Work("echo"), LABORER)).worker == other_id


@pytest.mark.slow
async def test_a_worker_that_is_stopped_finishes_its_calls_running_and_queued(
    processes: Processes, server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    worker, _ = await worker_process(processes, server.url, namespace, "laborer")
    await known(caller, "laborer")
    queued = [asyncio.ensure_future(caller.send_message(Work("queue", f"q{n}", 0.7), LABORER)) for n in range(3)]
    for n in range(3):
        await worker.wait_for_line(f"begins q{n}")
    worker.terminate()
    replies = (await ended(asyncio.gather(*queued), within=10.0)).result()
    assert [reply.note for reply in replies] == ["q0", "q1", "q2"]
    assert await worker.wait() == 0


async def test_a_handler_that_calls_and_publishes_while_its_worker_stops_still_can(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    class Slow(Laborer):
        async def sleep(self, message: Work, ctx: MessageContext) -> Any:
            begun.set()
            await go_on.wait()
            await self.publish_message(Work("echo", "event"), TopicId("nobody", "listens"))
            return await self.send_message(Work("echo", "nested"), AgentId("helper", "k"))

    async with running(server.url, namespace, "helper") as helping, running(server.url, namespace) as stopping:
        await natsrt.register(stopping, Slow, "slow", Slow)
        await known(caller, "slow")
        await known(stopping, "helper")
        call = asyncio.ensure_future(caller.send_message(Work("sleep"), AgentId("slow", "k")))
        await begun.wait()
        stop = asyncio.ensure_future(stopping.stop())
        await eventually(lambda: not stopping.ready)
        go_on.set()
        reply = (await ended(call)).result()
        assert (reply.note, reply.worker) == ("nested", helping.worker_id)
        await ended(stop)


async def test_a_handler_that_outlasts_the_drain_is_ended_and_its_caller_told(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    async with running(server.url, namespace, "laborer", drain_timeout=0.2) as stopping:
        await known(caller, "laborer")
        call = asyncio.ensure_future(caller.send_message(Work("sleep", seconds=60.0), LABORER))
        await eventually(lambda: stopping.running.dispatch.running)
        await stopping.stop()
        assert isinstance(await failure(call), natsrt.WorkerStopped)


async def test_calls_that_are_sent_while_their_own_runtime_stops_end(server: EmbeddedServer, namespace: str) -> None:
    async with running(server.url, namespace, "laborer") as other:
        runtime = NatsAgentRuntime(server.url, namespace=namespace, drain_timeout=0.2)
        await runtime.start()
        await known(runtime, "laborer")
        before = [asyncio.ensure_future(runtime.send_message(Work("sleep", seconds=60.0), LABORER)) for _ in range(3)]
        await eventually(lambda: other.running.dispatch.running == 3)
        stop = asyncio.ensure_future(runtime.stop())
        during = []
        while not stop.done():
            during.append(asyncio.ensure_future(runtime.send_message(Work("sleep", seconds=60.0), LABORER)))
            await asyncio.wait({stop}, timeout=0.005)
        for call in (*before, *during):
            error = await failure(call)
            assert isinstance(error, natsrt.NatsrtError | RuntimeError)
        await other.running.dispatch.finish(0.0, asyncio.Event())


async def test_a_send_whose_runtime_could_not_start_fails(own_server: EmbeddedServer, namespace: str) -> None:
    await own_server.kill()
    runtime = NatsAgentRuntime(own_server.url, namespace=namespace, connect_timeout=0.5)
    starting = runtime.start()
    sends = [
        asyncio.ensure_future(runtime.send_message(Work("echo"), LABORER)),
        asyncio.ensure_future(runtime.publish_message(Work("echo"), TOPIC)),
    ]
    for send in sends:
        assert isinstance(await failure(send), natsrt.ServerUnreachable)
    assert isinstance(await failure(starting), natsrt.ServerUnreachable)


# -- workers that work honestly --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["sleep", "labor"])
async def test_a_handler_that_works_for_thirty_seconds_is_not_cut_off(
    processes: Processes, server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime, deed: str
) -> None:
    await worker_process(processes, server.url, namespace, "laborer")
    await known(caller, "laborer")
    reply = (await ended(caller.send_message(Work(deed, "long", 30.0), LABORER), within=50.0)).result()
    assert reply.note == "long"


@pytest.mark.slow
async def test_calls_that_wait_ten_seconds_for_their_agent_to_be_made_are_answered(
    processes: Processes, server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    await worker_process(processes, server.url, namespace, "slow", factory_seconds=10.0)
    await known(caller, "slow")
    calls = [caller.send_message(Work("echo", str(n)), AgentId("slow", "k")) for n in range(20)]
    replies = (await ended(asyncio.gather(*calls), within=30.0)).result()
    assert [reply.note for reply in replies] == [str(n) for n in range(20)]


@pytest.mark.slow
async def test_calls_that_wait_ten_seconds_behind_others_are_answered(
    processes: Processes, server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    await worker_process(processes, server.url, namespace, "laborer")
    await known(caller, "laborer")
    calls = [caller.send_message(Work("queue", str(n), 2.5), LABORER) for n in range(5)]
    replies = (await ended(asyncio.gather(*calls), within=30.0)).result()
    assert [reply.note for reply in replies] == [str(n) for n in range(5)]


@pytest.mark.slow
async def test_the_callers_of_a_worker_whose_event_loop_is_blocked_get_their_replies(
    processes: Processes, server: EmbeddedServer, namespace: str
) -> None:
    worker, _ = await worker_process(processes, server.url, namespace, "laborer")
    async with running(server.url, namespace) as first, running(server.url, namespace) as second:
        await known(first, "laborer")
        await known(second, "laborer")
        blocking = asyncio.ensure_future(first.send_message(Work("block", "blocks", 2.0), LABORER))
        await worker.wait_for_line("begins blocks")
        calls = [
            runtime.send_message(Work("echo", f"{n}"), AgentId("laborer", str(n)))
            for n in range(10)
            for runtime in (first, second)
        ]
        replies = (await ended(asyncio.gather(blocking, *calls), within=10.0)).result()
    assert [reply.note for reply in replies] == ["blocks", *(str(n) for n in range(10) for _ in range(2))]


@pytest.mark.slow
async def test_a_caller_whose_own_event_loop_was_blocked_gets_its_reply(
    processes: Processes, server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    worker, _ = await worker_process(processes, server.url, namespace, "laborer")
    await known(caller, "laborer")
    call = asyncio.ensure_future(caller.send_message(Work("sleep", "long", 12.0), LABORER))
    await worker.wait_for_line("begins long")
    await asyncio.wait({call}, timeout=1.0)
    time.sleep(8.0)  # longer than a worker may stay silent; the worker answered, but nobody listened
    assert (await ended(call, within=10.0)).result().note == "long"


# -- cancellation ----------------------------------------------------------------------------------------------------


async def test_a_token_cancelled_before_the_send_ends_it_at_once(runtime: NatsAgentRuntime) -> None:
    token = CancellationToken()
    token.cancel()
    sent = runtime.running.connection.client.stats["out_msgs"]
    call = runtime.send_message(Work("echo"), LABORER, cancellation_token=token)
    assert isinstance(await failure(call, within=AT_ONCE), asyncio.CancelledError)
    assert runtime.running.connection.client.stats["out_msgs"] == sent


async def test_cancelling_sets_the_tokens_of_nested_handlers_in_other_processes(
    processes: Processes, server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    relay, _ = await worker_process(processes, server.url, namespace, "relay")
    last, _ = await worker_process(processes, server.url, namespace, "last")
    await known(caller, "relay", "last")
    token = CancellationToken()
    work = Work("until_cancelled", "nested", via=["last"])
    call = asyncio.ensure_future(caller.send_message(work, AgentId("relay", "k"), cancellation_token=token))
    await last.wait_for_line("begins nested")
    token.cancel()
    assert isinstance(await failure(call, within=AT_ONCE), asyncio.CancelledError)
    await asyncio.gather(
        relay.wait_for_line("cancelled nested", timeout=AT_ONCE),
        last.wait_for_line("cancelled nested", timeout=AT_ONCE),
    )


async def test_cancelling_sets_the_tokens_of_an_events_handlers(
    processes: Processes, server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    first, _ = await worker_process(processes, server.url, namespace, "listening")
    second, _ = await worker_process(processes, server.url, namespace, "listening_too")
    await known(caller, "listening", "listening_too")
    token = CancellationToken()
    await caller.publish_message(Work("until_cancelled", "event"), TOPIC, cancellation_token=token)
    await asyncio.gather(first.wait_for_line("begins event"), second.wait_for_line("begins event"))
    token.cancel()
    await asyncio.gather(
        first.wait_for_line("cancelled event", timeout=AT_ONCE),
        second.wait_for_line("cancelled event", timeout=AT_ONCE),
    )


async def test_cancelling_sets_tokens_along_a_chain_of_a_call_and_an_event(
    processes: Processes, server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    await worker_process(processes, server.url, namespace, "relay")
    last, _ = await worker_process(processes, server.url, namespace, "listening")
    await known(caller, "relay", "listening")
    token = CancellationToken()
    work = Work("until_cancelled", "chain", via=["event"], by_event=True)
    await ended(caller.send_message(work, AgentId("relay", "k"), cancellation_token=token))
    await last.wait_for_line("begins chain")
    token.cancel()
    await last.wait_for_line("cancelled chain", timeout=AT_ONCE)


async def test_cancelling_after_the_call_has_ended_sets_a_token_that_the_agent_kept(
    processes: Processes, server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    worker, _ = await worker_process(processes, server.url, namespace, "laborer")
    await known(caller, "laborer")
    token = CancellationToken()
    reply = await caller.send_message(Work("keep", "kept"), LABORER, cancellation_token=token)
    assert reply.note == "kept"
    gc.collect()
    token.cancel()
    await worker.wait_for_line("cancelled kept", timeout=AT_ONCE)


async def test_cancelling_in_a_handler_ends_the_call_of_its_caller(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    class Canceller(Laborer):
        async def sleep(self, message: Work, ctx: MessageContext) -> Any:
            ctx.cancellation_token.cancel()
            await asyncio.sleep(message.seconds)

    async with running(server.url, namespace) as hosting:
        await natsrt.register(hosting, Canceller, "canceller", Canceller)
        await known(caller, "canceller")
        token = CancellationToken()
        call = caller.send_message(Work("sleep", seconds=30.0), AgentId("canceller", "k"), cancellation_token=token)
        assert isinstance(await failure(call, within=AT_ONCE), asyncio.CancelledError)
        assert token.is_cancelled()


async def test_a_call_whose_cancel_arrives_before_it_is_not_handled(
    server: EmbeddedServer, namespace: str, runtime: NatsAgentRuntime
) -> None:
    client = await nats.connect(server.url)
    try:
        cancel = envelope.encode(envelope.CANCEL, '"id":"c","source":"/"', b'{"cancelid":"early-1"}')
        await client.publish(f"{namespace}.natsrt.cancel", cancel)
        call = envelope.encode(
            envelope.CALL,
            '"id":"1","source":"/","subject":"k","messagetype":"Work","cancelid":"early-1"',
            b'{"do":"until_cancelled","note":"early"}',
        )
        reply = await client.request(f"{namespace}.agent.laborer", call, timeout=SOON)
    finally:
        await client.close()
    assert b'"natsrt.error"' in reply.data and b"does not wait any more" in reply.data


async def test_a_cancel_that_arrives_before_its_event_sets_the_token(server: EmbeddedServer, namespace: str) -> None:
    seen: asyncio.Queue[bool] = asyncio.Queue()

    class Listener(RoutedAgent):
        @message_handler
        async def on_text(self, message: str, ctx: MessageContext) -> None:
            seen.put_nowait(ctx.cancellation_token.is_cancelled())

    async with running(server.url, namespace) as hosting:
        await natsrt.register(hosting, Listener, "listener", lambda: Listener("listens"))
        await hosting.add_subscription(TypeSubscription("news", "listener"))
        client = await nats.connect(server.url)
        try:
            cancel = envelope.encode(envelope.CANCEL, '"id":"c","source":"/"', b'{"cancelid":"early-2"}')
            await client.publish(f"{namespace}.natsrt.cancel", cancel)
            event = '"id":"1","source":"/","messagetype":"str","cancelid":"early-2"'
            await client.publish(f"{namespace}.topic.news.k", envelope.encode(envelope.EVENT, event, b'"early"'))
            async with asyncio.timeout(SOON):
                assert await seen.get()
        finally:
            await client.close()


async def test_stopping_does_not_wait_for_handlers_whose_callers_cancelled(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    async with running(server.url, namespace, "laborer") as hosting:
        await known(caller, "laborer")
        token = CancellationToken()
        call = asyncio.ensure_future(
            caller.send_message(Work("sleep", seconds=60.0), LABORER, cancellation_token=token)
        )
        await eventually(lambda: hosting.running.dispatch.running)
        token.cancel()
        await failure(call)
        await ended(hosting.stop(), within=SOON)


async def test_a_call_that_the_caller_gives_up_leaves_nothing_behind(runtime: NatsAgentRuntime) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await runtime.send_message(Work("sleep", seconds=1.0), LABORER)
    assert runtime.running.calls.pending == 0
    assert (await runtime.send_message(Work("echo", "next"), LABORER)).note == "next"


# -- plain responders ------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_reply_by_the_nats_cli_after_ten_seconds_arrives(
    processes: Processes, nats_cli: Path, server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    responder = processes.start(
        [nats_cli, "-s", server.url, "reply", f"{namespace}.agent.shout", '{"text":"HI"}', "--sleep", "10s"],
        name="nats",
    )
    await _listens(caller, responder, "shout")
    reply = (await ended(caller.send_message({"text": "hi"}, AgentId("shout", "k")), within=20.0)).result()
    assert reply == {"text": "HI"}


async def _listens(caller: NatsAgentRuntime, responder: Process, agent_type: str) -> None:
    """Wait until the server has the responder's subscription, in the queue group that the CLI uses."""
    await responder.wait_for_line("istening on")
    await caller.running.connection.barrier()


@pytest.mark.slow
async def test_a_plain_responder_that_takes_ten_seconds_is_waited_for(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    client = await nats.connect(server.url)

    async def respond(message: Msg) -> None:
        await asyncio.sleep(10.0)
        await client.publish(message.reply, b'{"note": "at last", "worker": "plain"}')

    try:
        await client.subscribe(f"{namespace}.agent.plain", "plain", cb=respond)
        await asyncio.sleep(0)
        await settled(client)
        call = caller.send_message(Work("echo"), AgentId("plain", "k"), reply_type=Done)
        assert (await ended(call, within=20.0)).result() == Done("at last", "plain")
    finally:
        await client.close()


@pytest.mark.parametrize("code", ["400", "500", "503"])
async def test_an_error_of_a_plain_responder_is_an_error(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime, code: str
) -> None:
    client = await nats.connect(server.url)
    asked = 0

    async def respond(message: Msg) -> None:
        nonlocal asked
        asked += 1
        headers = {"Nats-Service-Error": "out of paper", "Nats-Service-Error-Code": code}
        await client.publish(message.reply, b"", headers=headers)

    try:
        await client.subscribe(f"{namespace}.agent.plain", "plain", cb=respond)
        await asyncio.sleep(0)
        await settled(client)
        error = await failure(caller.send_message({"text": "hi"}, AgentId("plain", "k")))
    finally:
        await client.close()
    assert isinstance(error, natsrt.RemoteAgentError)
    assert "out of paper" in str(error)
    assert asked == 1


async def test_a_plain_responder_that_never_answers_is_given_up_after_plain_timeout(
    server: EmbeddedServer, namespace: str
) -> None:
    client = await nats.connect(server.url)

    async def ignore(message: Msg) -> None:
        """Answers nothing."""

    try:
        await client.subscribe(f"{namespace}.agent.plain", "plain", cb=ignore)
        await asyncio.sleep(0)
        await settled(client)
        async with running(server.url, namespace, plain_timeout=1.0) as caller:
            error = await failure(caller.send_message({"text": "hi"}, AgentId("plain", "k")))
    finally:
        await client.close()
    assert isinstance(error, natsrt.CallTimeout)
    assert error.setting == "plain_timeout"


# -- deadlines, load, permissions ------------------------------------------------------------------------------------


async def test_call_timeout_ends_a_call_however_honest_the_handler(
    server: EmbeddedServer, namespace: str, runtime: NatsAgentRuntime
) -> None:
    async with running(server.url, namespace, call_timeout=0.5) as caller:
        await known(caller, "laborer")
        error = await failure(caller.send_message(Work("sleep", seconds=2.0), LABORER))
    assert isinstance(error, natsrt.CallTimeout)
    assert isinstance(error, TimeoutError)
    assert (error.setting, error.seconds) == ("call_timeout", 0.5)


async def test_a_timeout_error_of_the_handler_is_not_taken_for_the_callers(
    server: EmbeddedServer, namespace: str
) -> None:
    class Impatient(Laborer):
        async def sleep(self, message: Work, ctx: MessageContext) -> Any:
            raise TimeoutError("the handler's own")

    async with running(server.url, namespace, call_timeout=30.0) as runtime:
        await natsrt.register(runtime, Impatient, "impatient", Impatient)
        error = await failure(runtime.send_message(Work("sleep"), AgentId("impatient", "k")))
    assert type(error) is TimeoutError


class _Gate:
    """A factory that makes nothing before it is opened."""

    def __init__(self) -> None:
        self._open = asyncio.Event()

    async def make(self) -> Laborer:
        await self._open.wait()
        return Laborer()

    def open(self) -> None:
        self._open.set()


async def test_a_worker_that_is_full_answers_busy_and_counts_the_events_it_drops(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    gate = _Gate()
    async with running(server.url, namespace, max_pending_bytes=20_000) as full:
        await full.register_factory("laborer", gate.make, expected_class=Laborer)
        await full.add_subscription(TypeSubscription(TOPIC.type, "laborer"))
        await known(caller, "laborer")
        waiting = asyncio.ensure_future(caller.send_message(Work("echo", "n" * 18_000), LABORER))
        await eventually(lambda: full.running.dispatch.running == 1)
        error = await failure(caller.send_message(Work("echo", "n" * 5_000), LABORER))
        assert isinstance(error, natsrt.WorkerBusy)
        assert (error.worker_id, error.pending_bytes > 18_000) == (full.worker_id, True)
        for _ in range(3):
            await caller.publish_message(Work("echo", "n" * 5_000), TOPIC)
        await eventually(lambda: full.running.counters.dropped_events == 3)
        gate.open()
        assert len((await ended(waiting)).result().note) == 18_000
        assert (await ended(caller.send_message(Work("echo", "room"), LABORER))).result().note == "room"
        assert full.running.intake.pending_bytes == 0


async def test_a_plain_call_to_a_full_worker_gets_a_plain_error(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    async with running(server.url, namespace, "laborer", max_pending_bytes=1_000):
        client = await nats.connect(server.url)
        try:
            reply = await client.request(f"{namespace}.agent.laborer", b'{"do":"%b"}' % (b"x" * 2_000), timeout=SOON)
        finally:
            await client.close()
    assert reply.headers is not None
    assert reply.headers["Nats-Service-Error-Code"] == "429"
    assert b"specversion" not in reply.data


async def test_a_call_to_a_full_worker_is_taken_by_another_that_has_room(
    server: EmbeddedServer, namespace: str, caller: NatsAgentRuntime
) -> None:
    gate = _Gate()
    async with running(server.url, namespace, max_pending_bytes=20_000) as full:
        await full.register_factory("laborer", gate.make, expected_class=Laborer)
        await known(caller, "laborer")
        waiting = asyncio.ensure_future(caller.send_message(Work("echo", "n" * 18_000), LABORER))
        await eventually(lambda: full.running.dispatch.running == 1)
        async with running(server.url, namespace, "laborer") as other:
            await eventually(lambda: len(caller.running.registry.workers_of(LABORER)) == 2)
            calls = [caller.send_message(Work("echo", "n" * 5_000), LABORER) for _ in range(10)]
            replies = (await ended(asyncio.gather(*calls))).result()
            assert {reply.worker for reply in replies} == {other.worker_id}
        gate.open()
        await ended(waiting)


async def test_a_handler_whose_own_call_met_a_busy_worker_is_not_called_again(runtime: NatsAgentRuntime) -> None:
    calls = runtime.running.counters.taken_in
    error = await failure(runtime.send_message(Work("busy"), LABORER))
    assert isinstance(error, natsrt.WorkerBusy)
    assert runtime.running.counters.taken_in == calls + 1


async def test_a_call_that_the_server_forbids_fails_at_once(tmp_path: Path, namespace: str) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(
        "authorization { users = ["
        "{ user: all, password: all },"
        '{ user: some, password: some, permissions: { publish: { deny: "*.agent.laborer" }}}'
        "]}"
    )
    async with (
        EmbeddedServer(config=config, data_dir=tmp_path / "data", port=-1, extra_args=["-js"]) as server,
        running(server.url, namespace, "laborer", "open", user="all", password="all"),
        running(server.url, namespace, user="some", password="some") as caller,
    ):
        error = await failure(caller.send_message(Work("echo"), LABORER), within=AT_ONCE)
        assert isinstance(error, natsrt.PermissionDenied)
        assert isinstance(error, PermissionError)
        assert error.subject == f"{namespace}.agent.laborer"
        assert (await caller.send_message(Work("echo", "open"), AgentId("open", "k"))).note == "open"


@pytest.mark.slow
async def test_what_waited_at_a_frozen_worker_is_not_handled_twice(
    tmp_path: Path, namespace: str, processes: Processes
) -> None:
    """The registry gives it up while the server still sends it its share: callers send that again, to the others."""
    config = tmp_path / "patient.conf"
    config.write_text('ping_interval: "60s"\n')
    async with (
        EmbeddedServer(config=config, data_dir=tmp_path / "data", port=-1, extra_args=["-js"]) as patient,
        running(patient.url, namespace) as caller,
    ):
        frozen, frozen_id = await worker_process(processes, patient.url, namespace, "laborer")
        other, _ = await worker_process(processes, patient.url, namespace, "laborer")
        frozen.pause()
        await eventually(lambda: frozen_id not in caller.running.registry.view.workers, timeout=20)
        notes = [f"note{number:03}" for number in range(40)]
        calls = [asyncio.ensure_future(caller.send_message(Work("echo", note), LABORER)) for note in notes]
        await asyncio.wait(calls, timeout=4)
        frozen.resume()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Done] * len(notes)
        await eventually(lambda: frozen_id in caller.running.registry.view.workers, timeout=20)
        begun = [line for worker in (frozen, other) for line in worker.stdout.splitlines() if line.startswith("begins")]
        assert sorted(begun) == [f"begins {note}." for note in notes]
