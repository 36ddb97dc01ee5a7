"""``natsrt agents forget`` and ``natsrt agents ls --watch``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TypeSubscription, rpc
from natsrt_cli.demo_agents import Upper

from natsrt import NatsAgentRuntime, keyed, register
from natsrt.embedded import EmbeddedServer
from tests.support.cli import Ended, natsrt
from tests.support.processes import Process, Processes, eventually


@keyed
class Counter(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("counts")
        self.total = 0

    @rpc
    async def add(self, message: int, ctx: MessageContext) -> int:
        self.total += message
        return self.total

    async def save_state(self) -> Mapping[str, Any]:
        return {"total": self.total}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.total = state["total"]


class Place:
    """A namespace of the shared server."""

    def __init__(self, server: EmbeddedServer, namespace: str) -> None:
        self.arguments = ("--server", server.url, "--namespace", namespace)
        self._url, self._namespace = server.url, namespace

    async def run(self, *arguments: str) -> Ended:
        return await natsrt(*arguments, *self.arguments)

    def runtime(self) -> NatsAgentRuntime:
        return NatsAgentRuntime(self._url, namespace=self._namespace)

    async def types(self) -> list[str]:
        return [row["type"] for row in (await self.run("agents", "ls", "--json")).json]


@pytest.fixture
def place(server: EmbeddedServer, namespace: str) -> Place:
    return Place(server, namespace)


# -- forget ------------------------------------------------------------------------------------------------------


async def test_forget_removes_what_the_registry_keeps_and_says_what(place: Place) -> None:
    async with place.runtime() as script:
        async with place.runtime() as worker:
            await register(worker, Upper, "upper", Upper)
            await script.add_subscription(TypeSubscription("elsewhere", "upper"))
        assert "upper" in await place.types()
        would = await place.run("agents", "forget", "upper", "--dry-run")
        assert would.stderr == "would forget agent type 'upper': what it handles, 1 subscription\n"
        assert "upper" in await place.types()
        forgot = await place.run("agents", "forget", "upper")
        assert (forgot.code, forgot.stdout) == (0, "")
        assert forgot.stderr == "forgot agent type 'upper': what it handles, 1 subscription\n"
        assert await place.types() == []
        await eventually(lambda: not script.running.registry.view.rules("upper"))
    again = await place.run("agents", "forget", "upper")
    assert (again.code, "agent type 'upper' is unknown" in again.stderr) == (4, True)


async def test_forget_removes_the_entries_of_a_worker_that_was_killed(place: Place, processes: Processes) -> None:
    worker = processes.natsrt("worker", "natsrt_cli.demo_agents:Upper", "--type", "upper", *place.arguments)
    await worker.wait_for_line("ready")
    worker.kill()

    async def forgotten() -> bool:
        return (await place.run("agents", "forget", "upper")).code == 0

    await eventually(forgotten, 30)
    assert await place.types() == []


async def test_forget_refuses_while_a_worker_is_alive_and_names_it(place: Place) -> None:
    async with place.runtime() as worker:
        await register(worker, Upper, "upper", Upper)
        refused = await place.run("agents", "forget", "upper")
        assert refused.code == 1
        text = f"agent type 'upper' is hosted by the live worker {worker.worker_id}: stop it first"
        assert refused.stderr == f"natsrt: {text}\n"
        assert "upper" in await place.types()


async def test_forget_keeps_records_unless_it_is_asked(place: Place) -> None:
    async with place.runtime() as worker:
        await register(worker, Counter, "counter", Counter)
        assert await worker.send_message(5, AgentId("counter", "x")) == 5
    kept = await place.run("agents", "forget", "counter")
    assert "; of keyed agents, 1 record stays: --records deletes them" in kept.stderr
    assert (await place.run("state", "get", "counter/x")).json == {"total": 5}
    gone = await place.run("agents", "forget", "counter", "--records")
    assert (gone.code, gone.stderr) == (0, "forgot agent type 'counter': 1 record\n")
    assert (await place.run("state", "get", "counter/x")).code == 4
    assert (await place.run("agents", "forget", "counter", "--records")).code == 4


# -- ls --watch --------------------------------------------------------------------------------------------------


def lists(watch: Process) -> list[list[str]]:
    """The live types in each list that was shown, as JSON."""
    shown = [json.loads(line) for line in watch.stdout.splitlines()]
    return [[row["type"] for row in rows if row["live"]] for rows in shown]


async def test_watch_shows_the_list_again_when_it_changes(place: Place, processes: Processes) -> None:
    watch = processes.natsrt("agents", "ls", "--watch", "--json", *place.arguments)
    await eventually(lambda: lists(watch) == [[]], 20)
    async with place.runtime() as worker:
        await register(worker, Upper, "upper", Upper)
        await eventually(lambda: lists(watch)[-1] == ["upper"], 20)
    await eventually(lambda: lists(watch)[-1] == [], 20)
    watch.interrupt()
    assert await watch.wait() == 0
    assert watch.stderr == ""


async def test_watch_of_one_type_prints_a_table_for_each_change(place: Place, processes: Processes) -> None:
    watch = processes.natsrt("agents", "ls", "counter", "--watch", *place.arguments)
    async with place.runtime() as worker:
        await register(worker, Counter, "counter", Counter)
        await eventually(lambda: "counter" in watch.stdout, 20)
        await worker.send_message(5, AgentId("counter", "x"))
        await eventually(lambda: "KEYED TYPE   RECORDS" in watch.stdout, 20)
        assert watch.running
    watch.terminate()
    assert await watch.wait() == 0


async def test_watch_outlives_a_restart_of_the_server(own_server: EmbeddedServer, processes: Processes) -> None:
    watch = processes.natsrt("agents", "ls", "--watch", "--json", "--server", own_server.url)
    await eventually(lambda: lists(watch) == [[]], 20)
    await own_server.restart(kill=True)
    async with NatsAgentRuntime(own_server.url) as worker:
        await register(worker, Upper, "upper", Upper)
        await eventually(lambda: lists(watch)[-1] == ["upper"], 40)
    watch.interrupt()
    assert await watch.wait() == 0
