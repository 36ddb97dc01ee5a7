"""Calls for whose replies nobody waits any more: they are not started, and do not keep others waiting."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import nats
import pytest
from autogen_core import AgentId, CancellationToken, MessageContext, RoutedAgent, message_handler

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.wire import envelope
from tests.support.processes import eventually


@dataclass
class Work:
    number: int


@dataclass
class Log:
    """What the agents of one test did."""

    started: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """The handler of the first work waits for it, and so does the factory of slow agents."""
    saves: int = 0


class Slow(RoutedAgent):
    """Its first work waits for the gate."""

    def __init__(self, log: Log) -> None:
        super().__init__("works")
        self.log = log

    @message_handler
    async def work(self, message: Work, ctx: MessageContext) -> Work:
        self.log.started.append(message.number)
        if message.number == 0:
            await self.log.gate.wait()
        self.log.finished.append(message.number)
        return message

    async def save_state(self) -> dict[str, Any]:
        self.log.saves += 1
        return {}


class Place:
    def __init__(self, url: str, namespace: str, stack: AsyncExitStack) -> None:
        self.url, self.namespace, self.stack = url, namespace, stack
        self.log = Log()

    async def runtime(self, *types: str, **settings: Any) -> NatsAgentRuntime:
        runtime = NatsAgentRuntime(self.url, namespace=self.namespace, **settings)
        for agent_type in types:
            await runtime.register_factory(
                agent_type,
                self._slow if agent_type == "making" else lambda: Slow(self.log),
                expected_class=Slow,
                keyed=agent_type.startswith("keyed") or None,
            )
        return await self.stack.enter_async_context(runtime)

    async def _slow(self) -> Slow:
        await self.log.gate.wait()
        return Slow(self.log)


@pytest.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(server.url, namespace, stack)


GiveUp = Callable[[NatsAgentRuntime, NatsAgentRuntime, AgentId, float], Awaitable[None]]


async def by_argument(caller: NatsAgentRuntime, hasty: NatsAgentRuntime, agent: AgentId, after: float) -> None:
    with pytest.raises(natsrt.CallTimeout, match="timeout = "):
        await caller.send_message(Work(1), agent, timeout=after)


async def by_setting(caller: NatsAgentRuntime, hasty: NatsAgentRuntime, agent: AgentId, after: float) -> None:
    with pytest.raises(natsrt.CallTimeout, match="call_timeout = "):
        await hasty.send_message(Work(1), agent)


async def by_asyncio(caller: NatsAgentRuntime, hasty: NatsAgentRuntime, agent: AgentId, after: float) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(after):
            await caller.send_message(Work(1), agent)


async def by_token(caller: NatsAgentRuntime, hasty: NatsAgentRuntime, agent: AgentId, after: float) -> None:
    token = CancellationToken()
    asyncio.get_running_loop().call_later(after, token.cancel)
    with pytest.raises(asyncio.CancelledError):
        await caller.send_message(Work(1), agent, cancellation_token=token)


async def by_task(caller: NatsAgentRuntime, hasty: NatsAgentRuntime, agent: AgentId, after: float) -> None:
    task = asyncio.ensure_future(caller.send_message(Work(1), agent))
    await asyncio.sleep(after)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


WAYS: list[GiveUp] = [by_argument, by_setting, by_asyncio, by_token, by_task]


@pytest.mark.parametrize("after", [0.1, 1.0], ids=["before it is accepted", "after it was accepted"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_a_keyed_agent_does_not_start_what_was_given_up(place: Place, way: GiveUp, after: float) -> None:
    worker = await place.runtime("keyed")
    caller, hasty = await place.runtime(), await place.runtime(call_timeout=after)
    agent = AgentId("keyed", "a")
    first = asyncio.ensure_future(caller.send_message(Work(0), agent))
    await eventually(lambda: place.log.started == [0])
    await asyncio.gather(*(way(caller, hasty, agent, after) for _ in range(20)))
    await eventually(lambda: worker.health().messages_queued == 0 and worker.health().handlers_running == 1)
    assert worker.health().pending_bytes == 0, "what nobody wants takes no room"
    last = asyncio.ensure_future(caller.send_message(Work(2), agent))
    place.log.gate.set()
    assert (await first, await last) == (Work(0), Work(2))
    assert place.log.started == [0, 2]
    assert worker.health().messages_handled == 2 and worker.health().messages_failed == 0
    assert place.log.saves == 2


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_an_agent_that_is_still_made_does_not_start_what_was_given_up(place: Place, way: GiveUp) -> None:
    worker = await place.runtime("making")
    caller, hasty = await place.runtime(), await place.runtime(call_timeout=0.3)
    agent = AgentId("making", "a")
    await asyncio.gather(*(way(caller, hasty, agent, 0.3) for _ in range(5)))
    last = asyncio.ensure_future(caller.send_message(Work(2), agent))
    await eventually(lambda: len(worker.running.incoming.call_log._running) == 6)
    await asyncio.sleep(1)  # the calls are accepted, and the caller tells that it does not want them
    place.log.gate.set()
    assert await last == Work(2)
    await eventually(lambda: worker.health().handlers_running == 0)
    assert place.log.started == [2]


async def test_a_handler_that_has_started_goes_on(place: Place) -> None:
    await place.runtime("keyed")
    caller = await place.runtime()
    with pytest.raises(natsrt.CallTimeout):
        await caller.send_message(Work(0), AgentId("keyed", "a"), timeout=1)
    await asyncio.sleep(0.2)
    place.log.gate.set()
    await eventually(lambda: place.log.finished == [0])


async def test_the_deadline_reaches_the_worker_although_its_caller_is_gone(place: Place) -> None:
    """A plain NATS client sends the calls, so nobody tells the worker that they were given up."""
    await place.runtime("keyed", "plain")
    caller = await place.runtime()
    first = asyncio.ensure_future(caller.send_message(Work(0), AgentId("keyed", "a")))
    await eventually(lambda: place.log.started == [0])
    client = await nats.connect(place.url)
    place.stack.push_async_callback(client.close)

    def call(number: int, timeout: str, agent_type: str = "keyed") -> bytes:
        attributes = f'"id":"m","source":"/","messagetype":"Work","subject":"a","timeout":"{timeout}"'
        return envelope.encode(envelope.CALL, attributes, json.dumps({"number": number}).encode())

    subject = f"{place.namespace}.agent.keyed"
    late = asyncio.ensure_future(client.request(subject, call(1, "200"), timeout=10))
    soon = asyncio.ensure_future(client.request(subject, call(2, "60000"), timeout=10))
    await asyncio.sleep(0.5)
    place.log.gate.set()
    assert await first == Work(0)
    answer = envelope.decode((await soon).data)
    assert answer is not None and answer.type == envelope.REPLY
    refusal = await late
    assert refusal.headers is not None and refusal.headers["Nats-Service-Error-Code"] == "429"
    assert "does not wait any more" in refusal.headers["Nats-Service-Error"]
    assert place.log.started == [0, 2]
    for wrong in ("-1", "1.5", "soon", "", "²"):
        refusal = await client.request(subject, call(3, wrong), timeout=10)
        assert refusal.headers is not None and "milliseconds" in refusal.headers["Nats-Service-Error"]
    assert place.log.started == [0, 2]


async def test_a_call_that_was_forwarded_to_the_owner_is_given_up_there(place: Place) -> None:
    """A caller that does not know that the type is keyed sends to any worker, which forwards the call."""
    owner, other = await place.runtime("keyed"), await place.runtime("keyed")
    caller = await place.runtime()
    agents = [AgentId("keyed", str(number)) for number in range(20)]
    for agent in agents:
        await caller.send_message(Work(1), agent)
    owned = {slot.key for slot in owner.running.incoming.ownership._slots if slot.record is not None}
    agent = next(agent for agent in agents if agent.key in owned)
    first = asyncio.ensure_future(caller.send_message(Work(0), agent))
    await eventually(lambda: place.log.started.count(0) == 1)
    before = len(place.log.started)
    sender = caller.running.outgoing.calls
    body = envelope.encode(
        envelope.CALL,
        f'"id":"m","source":"/","messagetype":"Work","subject":"{agent.key}",'
        f'"acceptto":"{caller.running.calls.accept_to}"',
        b'{"number":7}',
    )
    subject = f"{place.namespace}.agent.keyed"
    tasks = [asyncio.ensure_future(sender._exchange(agent, body, subject=subject)) for _ in range(20)]
    await eventually(lambda: other.running.calls.pending > 0)
    await asyncio.sleep(1)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await eventually(lambda: owner.health().handlers_running == 1 and other.health().handlers_running == 0)
    place.log.gate.set()
    assert await first == Work(0)
    assert len(place.log.started) == before
    assert other.health().messages_failed == owner.health().messages_failed == 0


async def test_a_deadline_also_holds_while_there_is_no_connection(namespace: str) -> None:
    async with EmbeddedServer() as own, NatsAgentRuntime(own.url, namespace=namespace) as caller:
        await own.stop()
        await eventually(lambda: not caller.health().connected)
        began = time.monotonic()
        with pytest.raises(natsrt.CallTimeout) as raised:
            await caller.send_message("hello", AgentId("any", "one"), timeout=0.5)
        assert time.monotonic() - began < 5
        assert (raised.value.seconds, raised.value.setting) == (0.5, "timeout")


@pytest.mark.parametrize("timeout", [0, -1, math.nan, "2", True])
async def test_a_timeout_that_is_no_positive_number_is_refused(place: Place, timeout: Any) -> None:
    caller = await place.runtime()
    with pytest.raises(ValueError, match="timeout must be a number of seconds above 0"):
        await caller.send_message(Work(1), AgentId("keyed", "a"), timeout=timeout)


async def test_an_infinite_timeout_overrides_the_setting(place: Place) -> None:
    await place.runtime("keyed")
    hasty = await place.runtime(call_timeout=0.2)
    call = asyncio.ensure_future(hasty.send_message(Work(0), AgentId("keyed", "a"), timeout=math.inf))
    await eventually(lambda: place.log.started == [0])
    await asyncio.wait([call], timeout=0.5)
    assert not call.done()
    place.log.gate.set()
    assert await call == Work(0)
    with suppress(natsrt.CallTimeout):
        await hasty.send_message(Work(1), AgentId("keyed", "a"))


@pytest.mark.parametrize("how", ["stop", "close"])
async def test_a_caller_that_stops_gives_its_calls_up(place: Place, how: str) -> None:
    worker = await place.runtime("keyed")
    caller = await place.runtime()
    agent = AgentId("keyed", "a")
    calls = [asyncio.ensure_future(caller.send_message(Work(number), agent)) for number in range(5)]
    await eventually(lambda: place.log.started == [0])
    await eventually(lambda: all(call.accepted_by for call in caller.running.calls._watch.pending.values()))
    await getattr(caller, how)()
    assert all(isinstance(one, natsrt.WorkerLost) for one in await asyncio.gather(*calls, return_exceptions=True))
    await eventually(lambda: worker.health().handlers_running == 1)
    place.log.gate.set()
    await eventually(lambda: worker.health().handlers_running == 0)
    assert place.log.started == [0]
