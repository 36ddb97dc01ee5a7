"""Registrations that exclude one another, made on several workers at the same moment: one of them counts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from autogen_core import (
    AgentId,
    ClosureAgent,
    ClosureContext,
    MessageContext,
    RoutedAgent,
    TypeSubscription,
    rpc,
)

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.jetstream.registry.entries import InstanceEntry, RegistryEntry, TypeEntry, WorkerEntry
from natsrt.jetstream.registry.rivals import rivals
from natsrt.jetstream.registry.view import View
from tests.support.processes import REPOSITORY, Processes
from tests.test_registry import keys

READING_WORKER = REPOSITORY / "tests" / "support" / "reading_worker.py"


class Named(RoutedAgent):
    """Answers with the name of its worker."""

    def __init__(self, name: str) -> None:
        super().__init__("named")
        self._name = name

    @rpc
    async def on_str(self, message: str, ctx: MessageContext) -> str:
        return self._name


@natsrt.keyed
class KeyedNamed(Named):
    async def save_state(self) -> dict[str, Any]:
        return {}

    async def load_state(self, state: Any) -> None:
        pass


Registration = Callable[[NatsAgentRuntime, str, str], Awaitable[Any]]


async def plain(runtime: NatsAgentRuntime, agent_type: str, name: str) -> None:
    await runtime.register_factory(agent_type, lambda: Named(name), expected_class=Named)


async def keyed(runtime: NatsAgentRuntime, agent_type: str, name: str) -> None:
    await runtime.register_factory(agent_type, lambda: KeyedNamed(name), expected_class=KeyedNamed)


async def instance(runtime: NatsAgentRuntime, agent_type: str, name: str) -> None:
    await runtime.register_agent_instance(Named(name), AgentId(agent_type, "k"))


PAIRS = {
    "keyed and plain": (keyed, plain, "keyed on worker|not keyed on worker"),
    "a factory and an instance": (plain, instance, "cannot be registered to the same type"),
    "a keyed factory and an instance": (keyed, instance, "cannot be registered to the same type"),
    "one id twice": (instance, instance, "already exists on worker"),
}


async def is_the_only_one(server: EmbeddedServer, namespace: str, winner: NatsAgentRuntime, agent_type: str) -> None:
    """Check that one worker is registered for a type, and answers every call."""
    hosting = [key for key in await keys(server, namespace) if f".{agent_type}." in key and ".known." not in key]
    assert hosting
    assert {key.rpartition(".")[2] for key in hosting} == {winner.worker_id}
    async with NatsAgentRuntime(server.url, namespace=namespace) as caller:
        for _ in range(12):
            assert await caller.send_message("hi", AgentId(agent_type, "k")) == winner.options.name


@pytest.mark.parametrize("pair", PAIRS)
async def test_of_two_registrations_at_the_same_moment_that_exclude_each_other_one_counts(
    server: EmbeddedServer, namespace: str, pair: str
) -> None:
    first, second, reason = PAIRS[pair]
    async with (
        NatsAgentRuntime(server.url, namespace=namespace, name="a") as a,
        NatsAgentRuntime(server.url, namespace=namespace, name="b") as b,
    ):
        for number in range(10):
            agent_type = f"type{number}"
            registrations = [first(a, agent_type, "a"), second(b, agent_type, "b")]
            if number % 2:
                registrations.reverse()
            ended = await asyncio.gather(*registrations, return_exceptions=True)
            failures = [error for error in ended if error is not None]
            assert [type(error) for error in failures] == [ValueError], ended
            with pytest.raises(ValueError, match=reason):
                raise failures[0]
            a_won = (ended[0] is None) != bool(number % 2)
            await is_the_only_one(server, namespace, a if a_won else b, agent_type)
            winner, loser = (a, b) if a_won else (b, a)
            assert loser.health().agents.keys().isdisjoint({agent_type})
            await winner.unregister(agent_type)
            # Nothing is left over that would keep the other one from it now.
            await (second if a_won else first)(loser, agent_type, str(loser.options.name))
            await is_the_only_one(server, namespace, loser, agent_type)


@pytest.mark.parametrize("pair", PAIRS)
async def test_of_two_starts_at_the_same_moment_that_exclude_each_other_one_succeeds(
    server: EmbeddedServer, namespace: str, pair: str
) -> None:
    first, second, reason = PAIRS[pair]
    for number in range(6):
        types = [f"type{number}-{letter}" for letter in "abcd"]
        a = NatsAgentRuntime(server.url, namespace=namespace, name="a")
        b = NatsAgentRuntime(server.url, namespace=namespace, name="b")
        kinds = [(first, second) if position % 2 else (second, first) for position in range(len(types))]
        for agent_type, (kind, _) in zip(types, kinds, strict=True):
            await kind(a, agent_type, "a")
        for agent_type, (_, kind) in reversed(list(zip(types, kinds, strict=True))):
            await kind(b, agent_type, "b")
        ended = await asyncio.gather(a.start(), b.start(), return_exceptions=True)
        failures = [error for error in ended if error is not None]
        assert [type(error) for error in failures] == [ValueError], ended
        with pytest.raises(ValueError, match=reason):
            raise failures[0]
        winner, loser = (a, b) if ended[0] is None else (b, a)
        for agent_type in types:
            await is_the_only_one(server, namespace, winner, agent_type)
        await winner.close()
        async with loser:
            await is_the_only_one(server, namespace, loser, types[0])


async def test_a_start_stores_types_in_the_order_of_their_names(server: EmbeddedServer, namespace: str) -> None:
    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    names = [f"type{number:02}" for number in range(40)]
    for agent_type in reversed(names):
        await plain(runtime, agent_type, "x")
    async with runtime:
        view = runtime.running.registry.view
        assert sorted(names, key=lambda name: view.revision_of(f"r.type.{name}.{runtime.worker_id}")) == names


async def test_of_three_registrations_at_the_same_moment_those_count_that_agree_with_the_first(
    server: EmbeddedServer, namespace: str
) -> None:
    runtimes = [NatsAgentRuntime(server.url, namespace=namespace, name=name) for name in "abc"]
    for runtime in runtimes:
        await runtime.start()
    for number in range(10):
        agent_type = f"type{number}"
        kinds = random.Random(number).choices((plain, keyed, instance), k=3)
        attempts = (kind(runtime, agent_type, "x") for kind, runtime in zip(kinds, runtimes, strict=True))
        ended = await asyncio.gather(*attempts, return_exceptions=True)
        counting = [kind for kind, error in zip(kinds, ended, strict=True) if error is None]
        assert len(set(counting)) == 1, (kinds, ended)
        if counting[0] is instance:  # all of one id
            assert len(counting) == 1
        else:
            assert len(counting) == kinds.count(counting[0]), (kinds, ended)
    for runtime in runtimes:
        await runtime.close()


async def test_a_start_is_refused_where_another_worker_hosts_what_excludes_it(
    server: EmbeddedServer, namespace: str
) -> None:
    for number, (first, second, reason) in enumerate(PAIRS.values()):
        async with NatsAgentRuntime(server.url, namespace=namespace, name="a") as a:
            await first(a, f"type{number}", "a")
            b = NatsAgentRuntime(server.url, namespace=namespace, name="b")
            await second(b, f"type{number}", "b")
            await a.running.registry.catch_up()
            before = a.running.registry.view.applied
            with pytest.raises(ValueError, match=reason):
                await b.start()
            await a.running.registry.catch_up()
            assert a.running.registry.view.applied == before  # nothing was stored
            await is_the_only_one(server, namespace, a, f"type{number}")


async def test_a_worker_that_was_killed_excludes_nothing(
    server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    doomed = processes.python(READING_WORKER, server.url, namespace, "doomed", "news", name="doomed")
    await doomed.wait_for_line("ready", 20)
    doomed.kill()
    successor = NatsAgentRuntime(server.url, namespace=namespace, name="successor")
    await instance(successor, "memory-doomed", "successor")
    async with successor:  # although the entries of the killed one stay for some seconds
        assert await successor.send_message("hi", AgentId("memory-doomed", "k")) == "successor"


@pytest.mark.parametrize("before_the_start", [False, True], ids=["after the start", "before the start"])
async def test_a_second_worker_with_the_closure_type_of_another_one_is_warned_once(
    server: EmbeddedServer, namespace: str, caplog: pytest.LogCaptureFixture, before_the_start: bool
) -> None:
    async def collect(agent: ClosureContext, message: str, ctx: MessageContext) -> None:
        pass

    async def session(name: str, *types: str) -> NatsAgentRuntime:
        runtime = NatsAgentRuntime(server.url, namespace=namespace, name=name)
        if not before_the_start:
            await runtime.start()
        for agent_type in types:
            await ClosureAgent.register_closure(runtime, agent_type, collect)
            await runtime.add_subscription(TypeSubscription("results", agent_type))
        await plain(runtime, "ordinary", name)
        if before_the_start:
            await runtime.start()
        return runtime

    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    first = await session("first", "collect", "unique-1")
    assert warnings() == []
    second = await session("second", "collect", "unique-2")
    (warning,) = warnings()
    assert f"worker {first.worker_id} hosts the ClosureAgent type 'collect' too" in warning
    assert "unique name" in warning and "namespace" in warning and "session as the key" in warning
    await second.close()
    await first.close()
    third = await session("third", "collect")
    assert len(warnings()) == 1
    await third.close()


def test_a_type_on_which_workers_differ_is_what_the_first_one_says() -> None:
    view = View()
    view.put("r.worker.a", 1, WorkerEntry("a", "a", "h", 1, 0.0, "1"))
    view.put("r.worker.b", 2, WorkerEntry("b", "b", "h", 1, 0.0, "1"))
    one, other = TypeEntry("t", "a", keyed=False), TypeEntry("t", "b", keyed=True)
    for entries in ((one, other), (other, one)):
        first, second = entries
        view.put(first.key, 3, first)
        view.put(second.key, 4, second)
        assert ("t" in view.keyed) is first.keyed
        view.delete(second.key, 5)
        assert ("t" in view.keyed) is first.keyed
        view.delete(first.key, 6)
        assert "t" not in view.keyed


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(200))
def test_two_workers_that_look_when_their_entries_are_stored_agree_who_withdraws(seed: int) -> None:
    """Any order of writes: each worker's view contains at least what precedes its own last entry."""
    chance = random.Random(seed)
    workers = ["w0", "w1"]
    queues: dict[str, list[RegistryEntry]] = {}
    for worker_id in workers:
        queues[worker_id] = []
        for agent_type in ("a", "b", "c"):
            kind = chance.choice(("plain", "keyed", "instance", "absent"))
            if kind != "absent":
                queues[worker_id].append(
                    TypeEntry(agent_type, worker_id, keyed=kind == "keyed", instances=kind == "instance")
                )
            if kind == "instance":
                queues[worker_id].append(InstanceEntry(agent_type, "k", worker_id))
    view = View()
    for number, worker_id in enumerate(workers):
        view.put(f"r.worker.{worker_id}", number + 1, WorkerEntry(worker_id, "n", "h", 1, 0.0, "1"))
    revision, own = 10, {worker_id: list(queue) for worker_id, queue in queues.items()}
    refused: set[str] = set()
    while any(queues.values()):
        worker_id = chance.choice([worker_id for worker_id, queue in queues.items() if queue])
        entry, revision = queues[worker_id].pop(0), revision + 1
        view.put(entry.key, revision, entry)
        if not queues[worker_id]:  # its last entry is stored: it looks, and withdraws later
            theirs: dict[str, list[Any]] = {}
            for rival in rivals(view, own[worker_id]):
                theirs.setdefault(rival.worker_id, []).append(rival)
            if any(found[0].came_first and not found[0].yields for found in theirs.values()):
                refused.add(worker_id)
    assert len(refused) == (1 if rivals(view, own["w0"]) else 0)
