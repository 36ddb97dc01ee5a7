"""Keyed agents that call one another at the same moment: no call hangs, and none that can be served is refused."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from autogen_core import AgentId, CancellationToken, MessageContext, RoutedAgent, message_handler

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.keyed.deadlocks import find_cycles
from natsrt.wire.peer_messages import WaitLink
from tests.support.processes import eventually

ENDS_WITHIN = 100
"""Seconds; without an end to a deadlock it would be for ever."""


@dataclass
class Call:
    """To be handed on along a path of agents."""

    path: list[str] = field(default_factory=list)
    held_at: str = ""
    """The gate at which the first handler waits before it goes on."""
    given_up: str = ""
    """How the first handler gives its call up, before it works on until a gate of this name opens."""
    apart: bool = False
    """Whether it calls in a task that it does not wait for, before it works on until a gate of this name opens."""


class Meeting:
    """The gates of one test, and who stands at them."""

    def __init__(self) -> None:
        self.gates: dict[str, asyncio.Event] = {}
        self.inside: list[tuple[str, str]] = []
        self.apart: list[asyncio.Task[str]] = []
        self.saves: dict[str, str] = {}
        """What agents call when they are saved."""

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    async def wait_at(self, gate: str, agent: AgentId) -> None:
        self.inside.append((gate, str(agent)))
        await self.gate(gate).wait()


class Member(RoutedAgent):
    def __init__(self, meeting: Meeting) -> None:
        super().__init__("hands on")
        self.meeting = meeting

    @message_handler
    async def on_call(self, message: Call, ctx: MessageContext) -> str:
        meeting, name = self.meeting, str(self.id)
        if message.held_at:
            await meeting.wait_at(message.held_at, self.id)
        if message.apart:
            meeting.apart.append(asyncio.create_task(self._call_on(message)))
            await meeting.wait_at("apart", self.id)
            return name
        if not message.path:
            return name
        if message.given_up:
            await self._give_up(message)
            await meeting.wait_at(message.given_up, self.id)
            return name
        return f"{name} {await self._call_on(message)}"

    async def _give_up(self, message: Call) -> None:
        with suppress(TimeoutError, asyncio.CancelledError):
            if message.given_up == "timeout":
                async with asyncio.timeout(0.3):
                    await self._call_on(message)
            elif message.given_up == "token":
                token = CancellationToken()
                asyncio.get_running_loop().call_later(0.3, token.cancel)
                await self._call_on(message, token)
            else:  # the runtime's call_timeout
                await self._call_on(message)

    async def _call_on(self, message: Call, token: CancellationToken | None = None) -> str:
        answer: str = await self.send_message(
            Call(message.path[1:]), AgentId.from_str(message.path[0]), cancellation_token=token
        )
        return answer

    async def save_state(self) -> Mapping[str, Any]:
        if (other := self.meeting.saves.pop(str(self.id), None)) is not None:
            await self.send_message(Call([str(self.id)]), AgentId.from_str(other))
        return {}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        pass


class Town:
    """Workers whose agents meet."""

    def __init__(self, url: str, namespace: str, stack: AsyncExitStack) -> None:
        self.url, self.namespace, self.stack = url, namespace, stack
        self.meeting = Meeting()
        self._names = itertools.count()

    async def worker(self, agent_type: str, keyed: bool = True, **settings: Any) -> NatsAgentRuntime:
        runtime = NatsAgentRuntime(self.url, namespace=self.namespace, name=f"worker-{agent_type}", **settings)
        await runtime.register_factory(
            agent_type, lambda: Member(self.meeting), expected_class=Member, keyed=keyed or None
        )
        return await self.stack.enter_async_context(runtime)

    async def caller(self) -> NatsAgentRuntime:
        return await self.stack.enter_async_context(NatsAgentRuntime(self.url, namespace=self.namespace, name="caller"))

    async def together(self, caller: NatsAgentRuntime, *paths: list[str]) -> list[str | BaseException]:
        """Let the first agent of each path handle a call before any of them goes on. What became of the calls."""
        gate = f"gate {next(self._names)}"
        calls = [
            asyncio.ensure_future(caller.send_message(Call(rest, held_at=gate), AgentId.from_str(first)))
            for first, *rest in paths
        ]
        await self.inside(gate, len(paths))
        self.meeting.gate(gate).set()
        async with asyncio.timeout(ENDS_WITHIN):
            return await asyncio.gather(*calls, return_exceptions=True)

    async def inside(self, gate: str, count: int) -> None:
        await eventually(lambda: [name for name, _ in self.meeting.inside].count(gate) == count)

    async def looked(self, caller: NatsAgentRuntime, *types: str) -> None:
        """Return when the workers of these types have looked twice: each found a cycle that was there."""

        async def one_looked(agent_type: str) -> None:
            names = [f"{agent_type}/looked", f"{agent_type}/looked too"]
            assert_one_was_refused(await self.together(caller, names, names[::-1]), set(names))

        await asyncio.gather(*map(one_looked, types))


@pytest.fixture
async def town(server: EmbeddedServer, namespace: str) -> AsyncIterator[Town]:
    async with AsyncExitStack() as stack:
        yield Town(server.url, namespace, stack)


def assert_one_was_refused(outcomes: list[str | BaseException], agents: set[str]) -> None:
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert len(refused) == 1
    assert isinstance(refused[0], natsrt.Deadlock)
    assert set(refused[0].agents) == agents


# -- cycles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("types", [("a", "a"), ("a", "b"), ("a", "b", "c"), ("a", "b", "a", "c", "b")])
async def test_agents_that_call_one_another_in_a_cycle_all_end(town: Town, types: tuple[str, ...]) -> None:
    for agent_type in sorted(set(types)):
        await town.worker(agent_type)
    caller = await town.caller()
    agents = [f"{agent_type}/{number}" for number, agent_type in enumerate(types)]
    outcomes = await town.together(caller, *([one, agents[at - 1]] for at, one in enumerate(agents)))
    assert_one_was_refused(outcomes, set(agents))
    for one in agents:  # and nothing is left of it
        assert await caller.send_message(Call(), AgentId.from_str(one)) == one


async def test_a_cycle_over_agents_that_are_not_keyed_ends(town: Town) -> None:
    await town.worker("a")
    await town.worker("b")
    await town.worker("between", keyed=False)
    caller = await town.caller()
    paths = [["a/1", "between/x", "between/z", "b/1"], ["b/1", "between/y", "a/1"]]
    assert_one_was_refused(await town.together(caller, *paths), {"a/1", "b/1"})


async def test_cycles_that_share_nothing_lose_one_call_each(town: Town) -> None:
    for agent_type in ("a", "b"):
        await town.worker(agent_type)
    caller = await town.caller()
    paths = [[f"{one}/{pair}", f"{other}/{pair}"] for pair in range(4) for one, other in (("a", "b"), ("b", "a"))]
    outcomes = await town.together(caller, *paths)
    for pair in range(4):
        assert_one_was_refused(outcomes[2 * pair : 2 * pair + 2], {f"a/{pair}", f"b/{pair}"})


@pytest.mark.timeout(150)  # 1,100 calls take 7 s alone, and a minute beside others on two processors
@pytest.mark.parametrize(("count", "key"), [(1_100, "{}"), (300, "{}" + "long" * 750)])
async def test_a_cycle_is_found_behind_which_many_calls_wait(town: Town, count: int, key: str) -> None:
    for agent_type in ("a", "b"):
        await town.worker(agent_type)
    caller = await town.caller()
    cycle = asyncio.ensure_future(town.together(caller, [f"a/{key.format(1)}", "b/1"], ["b/1", f"a/{key.format(1)}"]))
    await town.inside("gate 0", 2)
    behind = [
        caller.send_message(Call([f"{agent_type}/1"]), AgentId(agent_type, key.format(f"behind {number}")))
        for agent_type in ("a", "b")
        for number in range(count)
    ]
    *answers, outcomes = await asyncio.gather(*behind, cycle)
    assert_one_was_refused(outcomes, {f"a/{key.format(1)}"[:200], "b/1"})
    assert len(answers) == 2 * count


async def test_a_cycle_is_found_over_a_worker_that_gave_its_type_up(town: Town) -> None:
    await town.worker("a")
    leaving = await town.worker("b")
    caller = await town.caller()
    calls = [
        asyncio.ensure_future(caller.send_message(Call([f"{other}/{number}"], held_at=one), AgentId(one, str(number))))
        for number in range(4)  # whichever worker has the call to be refused
        for one, other in (("a", "b"), ("b", "a"))
    ]
    await town.inside("a", 4)
    await town.inside("b", 4)
    town.meeting.gate("a").set()
    await eventually(lambda: len(leaving.running.incoming.deadlocks._waiting) == 4)
    await leaving.unregister("b")
    town.meeting.gate("b").set()
    async with asyncio.timeout(ENDS_WITHIN):
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for number in range(4):
        assert_one_was_refused(outcomes[2 * number : 2 * number + 2], {f"a/{number}", f"b/{number}"})


async def test_a_cycle_over_agents_that_are_being_saved_ends(town: Town) -> None:
    await town.worker("a")
    await town.worker("b")
    caller = await town.caller()
    town.meeting.saves["a/1"] = "b/1"
    async with asyncio.timeout(ENDS_WITHIN):
        with pytest.raises(natsrt.Deadlock):
            await caller.send_message(Call(), AgentId("a", "1"))
    assert await caller.send_message(Call(), AgentId("a", "1")) == "a/1"


# -- no cycles --------------------------------------------------------------------------------------------------------


async def test_a_handler_that_does_not_wait_for_its_call_is_in_no_cycle(town: Town) -> None:
    """However long it takes: both calls are served when the handlers have ended."""
    for agent_type in ("a", "b"):
        await town.worker(agent_type)
    caller = await town.caller()
    calls = [
        asyncio.ensure_future(caller.send_message(Call([other], held_at="all", apart=True), AgentId.from_str(one)))
        for one, other in (("a/1", "b/1"), ("b/1", "a/1"))
    ]
    await town.inside("all", 2)
    town.meeting.gate("all").set()
    await town.inside("apart", 2)
    await town.looked(caller, "a", "b")
    assert not any(call.done() for call in [*calls, *town.meeting.apart])
    town.meeting.gate("apart").set()
    assert await asyncio.gather(*calls) == ["a/1", "b/1"]
    assert sorted(await asyncio.gather(*town.meeting.apart)) == ["a/1", "b/1"]


@pytest.mark.parametrize("how", ["timeout", "token", "call_timeout"])
@pytest.mark.parametrize("between", [[], ["between/x"]], ids=["directly", "over another"])
async def test_a_call_that_was_given_up_is_in_no_cycle(town: Town, how: str, between: list[str]) -> None:
    """Although its message waits in the other's mailbox still."""
    await town.worker("a", **({"call_timeout": 0.3} if how == "call_timeout" else {}))
    for agent_type in ("b", "c"):
        await town.worker(agent_type)
    await town.worker("between", keyed=False)
    caller = await town.caller()
    second = asyncio.ensure_future(caller.send_message(Call(["a/1"], held_at="b"), AgentId("b", "1")))
    await town.inside("b", 1)
    first = asyncio.ensure_future(caller.send_message(Call([*between, "b/1"], given_up=how), AgentId("a", "1")))
    await town.inside(how, 1)
    town.meeting.gate("b").set()
    await town.looked(caller, "b", "c")
    assert not first.done()
    assert not second.done()
    town.meeting.gate(how).set()
    assert await asyncio.gather(first, second) == ["a/1", "b/1 a/1"]


async def test_a_long_queue_is_no_cycle(town: Town) -> None:
    for agent_type in ("a", "b"):
        await town.worker(agent_type)
    caller = await town.caller()
    first = asyncio.ensure_future(caller.send_message(Call(held_at="all"), AgentId("a", "1")))
    await town.inside("all", 1)
    queue = [asyncio.ensure_future(caller.send_message(Call(["a/1"]), AgentId("b", str(one)))) for one in range(50)]
    await town.looked(caller, "a", "b")
    town.meeting.gate("all").set()
    assert await first == "a/1"
    assert await asyncio.gather(*queue) == [f"b/{one} a/1" for one in range(50)]


# -- the graph ---------------------------------------------------------------------------------------------------------


def links(*pairs: str) -> list[WaitLink]:
    """Of ``"a>b"``, ``a`` waits at an agent for ``b``; of ``"a=b"``, its handler awaits it."""
    made = []
    for pair in pairs:
        waits = ">" in pair
        call, awaited = pair.split(">" if waits else "=")
        made.append(WaitLink(call, awaited, f"visit of {call}", f"agent of {call}" if waits else ""))
    return made


def test_a_cycle_is_found_among_what_waits_otherwise_whatever_the_order() -> None:
    waits = links("w1=w2", "w2>w3", "w3=w1", "w0>w1", "w9>w2", *(f"x{number}>x{number + 1}" for number in range(50)))
    [found] = find_cycles(waits)
    assert {link.call for link in found} == {"w1", "w2", "w3"}
    assert all(one.awaited == other.call for one, other in itertools.pairwise([*found, found[0]]))
    for _ in range(20):
        random.shuffle(waits)
        assert find_cycles(waits) == [found]


def test_a_cycle_is_the_same_value_whatever_waits_for_it() -> None:
    cycle = ("w1=w2", "w2>w3", "w3=w1")
    found = {find_cycles(links(*cycle, f"{name}>{into}"))[0] for name in ("a", "x") for into in ("w1", "w2", "w3")}
    assert len(found) == 1


def test_cycles_that_share_no_call_are_all_found() -> None:
    waits = links(*(f"{pair}{one}>{pair}{other}" for pair in range(10) for one, other in ("ab", "bc", "ca")))
    assert {link.call for cycle in find_cycles(waits) for link in cycle} == {link.call for link in waits}
    assert len(find_cycles(waits)) == 10


def test_without_a_cycle_none_is_found() -> None:
    assert find_cycles([]) == []
    assert find_cycles(links(*(f"w{n:03}>w{n + step:03}" for n in range(500) for step in (1, 2)))) == []
