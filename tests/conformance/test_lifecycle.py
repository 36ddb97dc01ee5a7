"""Starting, stopping, starting again and closing natsrt's runtime, and what may be done in each state."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from autogen_core import (
    AgentId,
    CancellationToken,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypeSubscription,
    event,
    message_handler,
    type_subscription,
)

from natsrt import NatsAgentRuntime, create_distributed_runtime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import (
    JetStreamRequired,
    NatsrtError,
    NoLiveWorker,
    PermissionDenied,
    ServerUnreachable,
    UndeliveredCall,
    WorkerStopped,
)
from tests.conformance.conftest import MakeRuntime
from tests.conformance.samples import Counter, Number, Recorder, Seen, Text, Waiter, contents
from tests.support.processes import Process, Processes, eventually

RECORDER = AgentId("recorder", "k")
NEWS = TopicId("news", "k")


@type_subscription("news")
class NewsRecorder(Recorder):
    pass


@pytest.fixture
def unused_url() -> Iterator[str]:
    """A URL on which nobody listens, and nobody else can."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"nats://127.0.0.1:{bound.getsockname()[1]}"


# -- starting --------------------------------------------------------------------------------------------------------


async def test_what_is_registered_before_the_start_is_served_after_it(make_runtime: MakeRuntime) -> None:
    seen: list[Seen] = []
    runtime, caller = make_runtime(), make_runtime()
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    await runtime.register_agent_instance(Counter(), AgentId("counter", "mine"))
    await runtime.add_subscription(TypeSubscription("more", "recorder"))
    assert not runtime.ready
    await runtime.start()
    await caller.start()
    assert runtime.ready
    assert await caller.send_message(Text("call"), RECORDER) == Text("k got call")
    assert await caller.send_message(Number(1), AgentId("counter", "mine")) == Number(1)
    for topic_type in ("news", "more"):
        await caller.publish_message(Text(topic_type), TopicId(topic_type, "k"))
    await caller.running.wait_idle()
    await runtime.running.wait_idle()
    assert contents(seen) == ["call", "news", "more"]


async def test_a_start_that_is_not_awaited_is_waited_for_by_what_is_sent(make_runtime: MakeRuntime) -> None:
    seen: list[Seen] = []
    runtime = make_runtime()
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    runtime.start()
    await runtime.publish_message(Text("event"), NEWS)
    assert await runtime.send_message(Text("call"), RECORDER) == Text("k got call")
    assert contents(seen) == ["event", "call"]


async def test_what_is_registered_during_a_start_that_is_not_awaited_is_served(make_runtime: MakeRuntime) -> None:
    seen: list[Seen] = []
    runtime = make_runtime()
    runtime.start()
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    await runtime.publish_message(Text("event"), NEWS)
    assert await runtime.send_message(Text("call"), RECORDER) == Text("k got call")
    await runtime.stop_when_idle()
    assert contents(seen) == ["event", "call"]


async def test_many_senders_that_do_not_await_the_start_keep_their_order(make_runtime: MakeRuntime) -> None:
    seen: list[Seen] = []
    runtime = make_runtime()
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    runtime.start()
    await asyncio.gather(
        *(
            runtime.send_message(Text(str(n)), RECORDER) if n % 3 else runtime.publish_message(Text(str(n)), NEWS)
            for n in range(60)
        )
    )
    await runtime.stop_when_idle()
    assert contents(seen) == [str(n) for n in range(60)]


async def test_starting_twice_is_a_runtime_error(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    starting = runtime.start()
    with pytest.raises(RuntimeError, match="already started"):
        runtime.start()
    await starting
    with pytest.raises(RuntimeError, match="already started"):
        await runtime.start()
    assert runtime.ready


async def test_what_needs_a_started_runtime_is_a_runtime_error_before_the_start(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    with pytest.raises(RuntimeError, match="not started"):
        await runtime.stop()
    with pytest.raises(RuntimeError, match="not started"):
        await runtime.stop_when_idle()
    with pytest.raises(RuntimeError, match="not started"):
        await runtime.stop_when_signal()
    await runtime.wait_until_stopped()


async def test_a_runtime_starts_again_with_all_that_it_hosts_and_a_new_worker_id(make_runtime: MakeRuntime) -> None:
    seen: list[Seen] = []
    runtime, caller = make_runtime(), make_runtime()
    await caller.start()
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    ids = set()
    for n in range(3):
        await runtime.start()
        ids.add(runtime.worker_id)
        await caller.publish_message(Text(f"event {n}"), NEWS)
        assert await caller.send_message(Text(f"call {n}"), RECORDER) == Text(f"k got call {n}")
        await runtime.stop()
        assert runtime.worker_id is None
        with pytest.raises(NoLiveWorker):
            await caller.send_message(Text("nobody"), RECORDER)
    assert len(ids) == 3
    assert contents(seen) == [f"{kind} {n}" for n in range(3) for kind in ("event", "call")]


async def test_an_agent_outlives_a_stop(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    await runtime.register_factory("counter", Counter)
    for n in range(1, 4):
        await runtime.start()
        assert await runtime.send_message(Number(1), AgentId("counter", "k")) == Number(n)
        await runtime.stop()


async def test_what_a_stopped_runtime_can_still_do(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    for _ in range(2):
        kept = runtime.worker_id
        assert kept is None
        name = f"counter{len(await runtime.save_state())}"
        await runtime.register_factory(name, Counter)
        subscription = TypeSubscription("news", name)
        await runtime.add_subscription(subscription)
        await runtime.remove_subscription(subscription.id)
        agent = await runtime.try_get_underlying_agent_instance(AgentId(name, "k"), Counter)
        agent.count = 3
        assert (await runtime.save_state())[f"{name}/k"] == {"count": 3}
        await runtime.load_state({f"{name}/k": {"count": 4}})
        assert agent.count == 4
        assert await runtime.agent_save_state(AgentId(name, "k")) == {"count": 4}
        await runtime.agent_load_state(AgentId(name, "k"), {"count": 5})
        assert (await runtime.agent_metadata(AgentId(name, "k")))["type"] == name
        assert await runtime.get(name, "k", lazy=False) == AgentId(name, "k")
        with pytest.raises(LookupError):
            await runtime.try_get_underlying_agent_instance(AgentId("nobody", "k"))
        with pytest.raises(LookupError):
            await runtime.agent_metadata(AgentId("nobody", "k"))
        await runtime.start()
        assert await runtime.send_message(Number(1), AgentId(name, "k")) == Number(6)
        await runtime.stop()


# -- servers that cannot be used -------------------------------------------------------------------------------------


async def test_a_start_without_a_server_fails_within_connect_timeout_and_says_what_to_do(unused_url: str) -> None:
    runtime = NatsAgentRuntime(unused_url, connect_timeout=0.5)
    began = time.monotonic()
    with pytest.raises(ServerUnreachable, match="natsrt server") as raised:
        await runtime.start()
    assert time.monotonic() - began < 3
    assert raised.value.servers == [unused_url]
    assert isinstance(raised.value, ConnectionError)
    assert runtime.worker_id is None
    with pytest.raises(ServerUnreachable):
        await runtime.send_message(Text("a"), RECORDER)
    await runtime.close()


async def test_what_was_sent_during_a_start_that_fails_fails_with_it(unused_url: str) -> None:
    runtime = NatsAgentRuntime(unused_url, connect_timeout=0.5)
    runtime.start()
    results = await asyncio.wait_for(
        asyncio.gather(
            runtime.send_message(Text("a"), RECORDER),
            runtime.send_message(Text("b"), RECORDER, cancellation_token=CancellationToken()),
            runtime.publish_message(Text("c"), NEWS),
            return_exceptions=True,
        ),
        10,
    )
    assert [type(result) for result in results] == [ServerUnreachable] * 3
    await runtime.close()


async def test_a_runtime_stopped_during_its_start_fails_what_waits_for_the_start(unused_url: str) -> None:
    runtime = NatsAgentRuntime(unused_url, connect_timeout=1)
    runtime.start()
    sending = asyncio.ensure_future(runtime.send_message(Text("a"), RECORDER))
    await asyncio.sleep(0)
    await runtime.stop()
    with pytest.raises(NatsrtError):
        await asyncio.wait_for(sending, 5)


async def test_a_runtime_whose_start_failed_can_be_started_later(own_server: EmbeddedServer) -> None:
    url = own_server.url
    await own_server.stop()
    seen: list[Seen] = []
    runtime = NatsAgentRuntime(url, connect_timeout=0.3)
    await Recorder.register(runtime, "recorder", lambda: Recorder(seen))
    for _ in range(2):
        with pytest.raises(ServerUnreachable):
            await runtime.start()
    await own_server.start()
    assert own_server.url == url
    async with runtime:
        assert await runtime.send_message(Text("a"), RECORDER) == Text("k got a")


@asynccontextmanager
async def configured_server(tmp_path: Path, config: str) -> AsyncIterator[EmbeddedServer]:
    path = tmp_path / "server.conf"
    path.write_text(config)
    async with EmbeddedServer(config=path, port=-1) as server:
        yield server


async def test_a_server_without_jetstream_is_an_error_that_says_how_to_enable_it(tmp_path: Path) -> None:
    async with configured_server(tmp_path, "server_name: plain\n") as server:
        runtime = NatsAgentRuntime(server.url)
        with pytest.raises(JetStreamRequired, match="nats-server -js"):
            await asyncio.wait_for(runtime.start(), 8)
        assert runtime.worker_id is None
        await runtime.close()


_USERS = """
jetstream {{ store_dir: {store} }}
accounts {{
  WITH {{ jetstream: enabled, users: [{{ user: good, password: secret }}] }}
  WITHOUT {{ users: [{{ user: plain, password: secret }}] }}
}}
"""


async def test_an_account_without_jetstream_is_the_same_error(tmp_path: Path) -> None:
    async with configured_server(tmp_path, _USERS.format(store=tmp_path / "js")) as server:
        with pytest.raises(JetStreamRequired):
            await asyncio.wait_for(NatsAgentRuntime(server.url, user="plain", password="secret").start(), 8)


async def test_a_wrong_password_is_denied_at_once(tmp_path: Path) -> None:
    async with configured_server(tmp_path, _USERS.format(store=tmp_path / "js")) as server:
        async with NatsAgentRuntime(server.url, user="good", password="secret") as runtime:
            assert runtime.ready
        for wrong in ({"user": "good", "password": "wrong"}, {"token": "wrong"}, {}):
            began = time.monotonic()
            runtime = NatsAgentRuntime(server.url, **wrong)
            with pytest.raises(PermissionDenied) as raised:
                await runtime.start()
            assert time.monotonic() - began < 3
            assert "wrong" not in str(raised.value)
            await runtime.close()


# -- stopping --------------------------------------------------------------------------------------------------------


async def test_stop_finishes_the_handlers_that_run_and_their_callers_get_their_replies(
    make_runtime: MakeRuntime,
) -> None:
    entered, release = asyncio.Event(), asyncio.Event()
    runtime, caller = make_runtime(), make_runtime()
    await Waiter.register(runtime, "waiter", lambda: Waiter(entered, release, []))
    await runtime.start()
    await caller.start()
    call = asyncio.ensure_future(caller.send_message(Text("a"), AgentId("waiter", "k")))
    await entered.wait()
    stopping = asyncio.ensure_future(runtime.stop())
    await eventually(lambda: not caller.running.registry.view.workers_hosting("waiter"))
    assert not stopping.done()
    release.set()
    await stopping
    assert await call == Text("a")


async def test_a_handler_may_send_and_publish_while_its_runtime_stops(make_runtime: MakeRuntime) -> None:
    entered, release = asyncio.Event(), asyncio.Event()
    seen: list[Seen] = []

    class Finishes(RoutedAgent):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> Text:
            entered.set()
            await release.wait()
            await self.publish_message(Text("event"), NEWS)
            return await self.send_message(Text("call"), RECORDER)

    runtime, other = make_runtime(), make_runtime()
    await Finishes.register(runtime, "finishes", lambda: Finishes("finishes"))
    await NewsRecorder.register(other, "recorder", lambda: NewsRecorder(seen))
    await runtime.start()
    await other.start()
    call = asyncio.ensure_future(other.send_message(Text("a"), AgentId("finishes", "k")))
    await entered.wait()
    stopping = asyncio.ensure_future(runtime.stop())
    await eventually(lambda: not other.running.registry.view.workers_hosting("finishes"))
    release.set()
    began = time.monotonic()
    await stopping
    assert time.monotonic() - began < 4  # drain_timeout is 5
    assert await call == Text("k got call")
    assert contents(seen) == ["event", "call"]


async def test_drain_timeout_bounds_stop_and_the_caller_of_an_endless_handler_learns_it(
    make_runtime: MakeRuntime,
) -> None:
    entered = asyncio.Event()
    runtime, caller = make_runtime(drain_timeout=0.3), make_runtime()
    await Waiter.register(runtime, "waiter", lambda: Waiter(entered, asyncio.Event(), []))
    await runtime.start()
    await caller.start()
    worker_id = runtime.worker_id
    call = asyncio.ensure_future(caller.send_message(Text("a"), AgentId("waiter", "k")))
    await entered.wait()
    began = time.monotonic()
    await runtime.stop()
    assert 0.3 <= time.monotonic() - began < 3
    with pytest.raises(WorkerStopped) as raised:
        await asyncio.wait_for(call, 5)
    assert raised.value.recipient == "waiter/k"
    assert raised.value.worker_id == worker_id


async def test_the_caller_of_a_handler_that_will_not_be_cancelled_learns_it_too(make_runtime: MakeRuntime) -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    class Stubborn(RoutedAgent):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> Text:
            entered.set()
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue
            return message

    runtime, caller = make_runtime(drain_timeout=0.2), make_runtime()
    await Stubborn.register(runtime, "stubborn", lambda: Stubborn("stubborn"))
    await runtime.start()
    await caller.start()
    call = asyncio.ensure_future(caller.send_message(Text("a"), AgentId("stubborn", "k")))
    await entered.wait()
    began = time.monotonic()
    await runtime.stop()
    assert time.monotonic() - began < 4
    with pytest.raises(UndeliveredCall):
        await asyncio.wait_for(call, 10)
    release.set()


async def test_stop_does_not_wait_for_handlers_whose_callers_have_cancelled(make_runtime: MakeRuntime) -> None:
    entered = asyncio.Event()
    ended: list[str] = []

    class Ends(Waiter):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> Text:
            try:
                self.entered.set()
                await self.release.wait()
            finally:
                ended.append(message.content)
            return message

    runtime, caller = make_runtime(drain_timeout=30.0), make_runtime()
    await Ends.register(runtime, "ends", lambda: Ends(entered, asyncio.Event(), []))
    await runtime.start()
    await caller.start()
    token = CancellationToken()
    call = asyncio.ensure_future(caller.send_message(Text("a"), AgentId("ends", "k"), cancellation_token=token))
    await entered.wait()
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ended == []
    await asyncio.wait_for(runtime.stop(), 10)
    assert ended == ["a"]


async def test_stop_handles_what_was_delivered_before_it(make_runtime: MakeRuntime) -> None:
    seen: list[Seen] = []
    runtime, caller = make_runtime(), make_runtime()
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    await runtime.start()
    await caller.start()
    for n in range(500):
        await caller.publish_message(Text(str(n)), NEWS)
    await caller.running.connection.barrier()
    await runtime.stop()
    assert contents(seen) == [str(n) for n in range(500)]


async def test_several_stops_at_once_are_one(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    await runtime.register_factory("counter", Counter)
    await runtime.start()
    waiting = asyncio.ensure_future(runtime.wait_until_stopped())
    await asyncio.sleep(0)
    assert not waiting.done()
    await asyncio.gather(runtime.stop(), runtime.stop(), runtime.close())
    await asyncio.wait_for(waiting, 5)
    assert runtime.worker_id is None


async def test_calls_that_wait_when_their_own_runtime_stops_fail(make_runtime: MakeRuntime) -> None:
    entered, release = asyncio.Event(), asyncio.Event()
    runtime, caller = make_runtime(), make_runtime()
    await Waiter.register(runtime, "waiter", lambda: Waiter(entered, release, []))
    await runtime.start()
    await caller.start()
    call = asyncio.ensure_future(caller.send_message(Text("a"), AgentId("waiter", "k")))
    await entered.wait()
    await caller.stop()
    with pytest.raises(UndeliveredCall, match="stopped"):
        await asyncio.wait_for(call, 5)
    release.set()


# -- idle ------------------------------------------------------------------------------------------------------------


class Chain(RoutedAgent):
    """Passes a number on, down to zero, by event and by call in turn."""

    def __init__(self, handled: list[int]) -> None:
        super().__init__("passes on")
        self.handled = handled

    @message_handler
    async def on_number(self, message: Number, ctx: MessageContext) -> None:
        await asyncio.sleep(0)
        self.handled.append(message.value)
        if message.value == 0:
            return
        key = f"{message.value}"
        if message.value % 2:
            await self.send_message(Number(message.value - 1), AgentId("chain", key))
        else:
            await self.publish_message(Number(message.value - 1), TopicId("chain:", key))


async def test_stop_when_idle_waits_for_a_publish_and_all_that_it_causes(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    handled: list[int] = []
    await Chain.register(runtime, "chain", lambda: Chain(handled))
    for _ in range(5):
        handled.clear()
        await runtime.start()
        await runtime.publish_message(Number(20), TopicId("chain:", "first"))
        await runtime.stop_when_idle()
        assert handled == list(range(20, -1, -1))


async def test_stop_when_idle_waits_for_a_start_that_is_not_awaited_and_what_was_sent_in_it(
    make_runtime: MakeRuntime,
) -> None:
    runtime = make_runtime()
    seen: list[Seen] = []
    await NewsRecorder.register(runtime, "recorder", lambda: NewsRecorder(seen))
    runtime.start()
    publishing = asyncio.ensure_future(runtime.publish_message(Text("a"), NEWS))
    await asyncio.sleep(0)
    await runtime.stop_when_idle()
    await publishing
    assert contents(seen) == ["a"]


async def test_stop_when_idle_waits_for_a_call_to_another_runtime(make_runtime: MakeRuntime) -> None:
    entered, release = asyncio.Event(), asyncio.Event()
    runtime, other = make_runtime(), make_runtime()
    await Waiter.register(other, "waiter", lambda: Waiter(entered, release, []))
    await runtime.start()
    await other.start()
    call = asyncio.ensure_future(runtime.send_message(Text("a"), AgentId("waiter", "k")))
    await entered.wait()
    stopping = asyncio.ensure_future(runtime.stop_when_idle())
    await other.running.connection.barrier()
    assert not stopping.done()
    release.set()
    await asyncio.wait_for(stopping, 5)
    assert await call == Text("a")


# -- closing ---------------------------------------------------------------------------------------------------------


async def test_close_closes_every_agent_once(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    made: list[Counter] = []

    def factory() -> Counter:
        made.append(Counter())
        return made[-1]

    instance = Counter()
    await runtime.register_factory("counter", factory)
    await runtime.register_agent_instance(instance, AgentId("instance", "k"))
    await runtime.start()
    for key in "abc":
        await runtime.send_message(Number(1), AgentId("counter", key))
    await runtime.close()
    assert runtime.worker_id is None
    await runtime.close()
    assert [agent.closed for agent in (*made, instance)] == [1, 1, 1, 1]


@pytest.mark.slow
async def test_close_closes_an_agent_whose_address_a_closed_one_had_before(make_runtime: MakeRuntime) -> None:
    closed: list[int] = []

    class Short(Counter):
        async def close(self) -> None:
            closed.append(id(self))

    runtime = make_runtime()
    for _ in range(40):
        await runtime.register_agent_instance(Short(), AgentId("instance", "k"))
        await runtime.close()
        await runtime.unregister("instance")
        gc.collect()
    assert len(closed) == 40
    assert len(set(closed)) < 40  # so addresses were used again


async def test_close_of_a_runtime_that_was_never_started_closes_its_agents(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    instance = Counter()
    await runtime.register_agent_instance(instance, AgentId("instance", "k"))
    await runtime.close()
    assert instance.closed == 1


async def test_an_agent_that_fails_to_close_keeps_no_other_from_closing(make_runtime: MakeRuntime) -> None:
    class Fails(Counter):
        async def close(self) -> None:
            await super().close()
            raise ValueError("cannot close")

    runtime = make_runtime()
    agents = [Fails(), Fails()]
    for n, agent in enumerate(agents):
        await runtime.register_agent_instance(agent, AgentId("instance", str(n)))
    last = Counter()
    await runtime.register_agent_instance(last, AgentId("last", "k"))
    await runtime.start()
    with pytest.raises(ValueError, match="cannot close"):
        await runtime.close()
    assert [agent.closed for agent in (*agents, last)] == [1, 1, 1]
    await runtime.close()
    assert [agent.closed for agent in (*agents, last)] == [1, 1, 1]


async def test_close_closes_the_agents_also_where_an_event_handlers_exception_is_raised(
    make_runtime: MakeRuntime,
) -> None:
    @type_subscription("news")
    class Raises(Counter):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> None:
            raise ValueError("no news")

    runtime = make_runtime(ignore_unhandled_exceptions=False)
    made: list[Raises] = []

    def factory() -> Raises:
        made.append(Raises())
        return made[-1]

    await Raises.register(runtime, "raises", factory)
    await runtime.start()
    await runtime.publish_message(Text("a"), NEWS)
    await runtime.running.wait_idle()
    with pytest.raises(ValueError, match="no news"):
        await runtime.close()
    assert [agent.closed for agent in made] == [1]


async def test_a_runtime_is_a_context_manager_that_starts_and_closes(make_runtime: MakeRuntime) -> None:
    instance = Counter()
    runtime = make_runtime()
    await runtime.register_agent_instance(instance, AgentId("instance", "k"))
    async with runtime as entered:
        assert entered is runtime
        assert await runtime.send_message(Number(1), AgentId("instance", "k")) == Number(1)
    assert runtime.worker_id is None
    assert instance.closed == 1


async def test_a_context_manager_closes_when_its_block_raises(make_runtime: MakeRuntime) -> None:
    instance = Counter()
    runtime = make_runtime()
    await runtime.register_agent_instance(instance, AgentId("instance", "k"))
    with pytest.raises(KeyError):
        async with runtime:
            raise KeyError("out")
    assert instance.closed == 1


# -- signals ---------------------------------------------------------------------------------------------------------

_PROGRAM = """
import asyncio, sys
from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
from natsrt import NatsAgentRuntime
from tests.conformance.samples import Text

class Slow(RoutedAgent):
    @message_handler
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        print("handles", message.content, flush=True)
        if message.content == "endless":
            await asyncio.Event().wait()
        await self.send_message(Text("may it finish"), AgentId("gate", "k"))
        return Text("finished " + message.content)

async def main():
    runtime = NatsAgentRuntime(sys.argv[1], namespace=sys.argv[2], drain_timeout=60)
    await Slow.register(runtime, "slow", lambda: Slow("slow"))
    await runtime.start()
    print("started", flush=True)
    waiting = asyncio.ensure_future(runtime.wait_until_stopped())
    await runtime.stop_when_signal()
    await waiting
    print("stopped", flush=True)

asyncio.run(main())
"""


async def start_program(processes: Processes, server: EmbeddedServer, namespace: str) -> Process:
    program = processes.python(_PROGRAM, server.url, namespace)
    await program.wait_for_line("started")
    return program


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_the_handlers_finish(
    make_runtime: MakeRuntime, processes: Processes, server: EmbeddedServer, namespace: str, signum: int
) -> None:
    entered, release = asyncio.Event(), asyncio.Event()
    runtime = make_runtime()
    await Waiter.register(runtime, "gate", lambda: Waiter(entered, release, []))
    await runtime.start()
    program = await start_program(processes, server, namespace)
    call = asyncio.ensure_future(runtime.send_message(Text("a"), AgentId("slow", "k")))
    await entered.wait()
    program.send_signal(signum)
    await eventually(lambda: not runtime.running.registry.view.workers_hosting("slow"))
    assert program.running
    release.set()
    assert await asyncio.wait_for(call, 10) == Text("finished a")
    assert await program.wait() == 0
    await program.wait_for_line("stopped")


async def test_a_second_signal_stops_at_once(
    make_runtime: MakeRuntime, processes: Processes, server: EmbeddedServer, namespace: str
) -> None:
    runtime = make_runtime()
    await runtime.start()
    program = await start_program(processes, server, namespace)
    call = asyncio.ensure_future(runtime.send_message(Text("endless"), AgentId("slow", "k")))
    await program.wait_for_line("handles endless")
    program.terminate()
    await eventually(lambda: not runtime.running.registry.view.workers_hosting("slow"))
    assert program.running
    await asyncio.sleep(0.6)  # signals within half a second are one
    program.terminate()
    assert await program.wait() == 0
    await program.wait_for_line("stopped")
    with pytest.raises(WorkerStopped):
        await asyncio.wait_for(call, 5)


async def test_stop_when_signal_ends_when_somebody_else_stops_the_runtime(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    await runtime.start()
    before = signal.getsignal(signal.SIGTERM)
    waiting = asyncio.ensure_future(runtime.stop_when_signal())
    await eventually(lambda: signal.getsignal(signal.SIGTERM) is not before)
    await runtime.stop()
    await asyncio.wait_for(waiting, 5)
    assert signal.getsignal(signal.SIGTERM) is before


# -- as AutoGen's documentation spells it ----------------------------------------------------------------------------


async def test_a_distributed_runtime_is_created_as_autogens_documentation_shows(own_server: EmbeddedServer) -> None:
    runtime = create_distributed_runtime(broker_url=own_server.url, instance_id="instance-1", tracer_provider=None)
    assert isinstance(runtime, NatsAgentRuntime)
    assert runtime.options.name == "instance-1"
    await Recorder.register(runtime, "recorder", lambda: Recorder([]))
    async with runtime:
        assert runtime.worker_id is not None
        assert runtime.worker_id.startswith("instance-1")
        assert await runtime.send_message(Text("a"), RECORDER) == Text("k got a")


def test_a_runtime_is_made_outside_of_an_event_loop_and_run_in_several(server: EmbeddedServer, namespace: str) -> None:
    """One loop after the other, as a program with several ``asyncio.run`` has them."""
    runtime = NatsAgentRuntime(server.url, namespace=namespace)

    async def run(n: int) -> None:
        if n == 0:
            await runtime.register_factory("counter", Counter)
        async with runtime:
            assert await runtime.send_message(Number(1), AgentId("counter", "k")) == Number(n + 1)

    for n in range(3):
        asyncio.run(run(n))


class StopsItsRuntime(RoutedAgent):
    def __init__(self, stopped: asyncio.Event) -> None:
        super().__init__("stops its runtime")
        self._stopped = stopped

    @event
    async def on_text(self, message: Text, ctx: MessageContext) -> None:
        await cast(NatsAgentRuntime, self.runtime).stop()
        self._stopped.set()


async def test_a_handler_may_stop_its_own_runtime(server: EmbeddedServer, namespace: str) -> None:
    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    stopped = asyncio.Event()
    await StopsItsRuntime.register(runtime, "stopper", lambda: StopsItsRuntime(stopped))
    await runtime.add_subscription(TypeSubscription("quit", "stopper"))
    await runtime.start()
    await runtime.publish_message(Text("now"), TopicId("quit", "x"))
    async with asyncio.timeout(10):
        await stopped.wait()
    assert runtime.worker_id is None
