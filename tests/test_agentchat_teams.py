"""AgentChat teams whose participants live in processes of their own: each test compares them with one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("autogen_agentchat", reason="autogen-agentchat is not installed: pip install 'natsrt[dev]'")
pytest.importorskip("autogen_ext", reason="autogen-ext is not installed: pip install 'natsrt[dev]'")

from autogen_agentchat.base import Response, TaskResult, Team
from autogen_agentchat.messages import BaseAgentEvent, BaseChatMessage, ModelClientStreamingChunkEvent, TextMessage
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import CancellationToken, SingleThreadedAgentRuntime

from natsrt import NatsAgentRuntime
from natsrt.agentchat import RemoteChatAgent, RemoteTeam, host
from natsrt.embedded import EmbeddedServer
from natsrt.errors import WorkerLost
from tests.programs.chat_teams import SCENES, Scene, type_of
from tests.support.chat import Counter
from tests.support.processes import REPOSITORY, Processes, eventually

WORKER = REPOSITORY / "tests" / "programs" / "chat_teams.py"
NAMESPACE = "chatteams"


@pytest.fixture(scope="module")
def workers(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Three worker processes, one for each place in a team. Gives their namespace."""
    processes = Processes(tmp_path_factory.mktemp("workers"))
    try:
        for place in range(3):
            processes.python(WORKER, server.url, NAMESPACE, f"place{place}", str(place), name=f"place{place}")
        yield NAMESPACE
    finally:
        processes.close()


@pytest.fixture
async def runtime(server: EmbeddedServer, workers: str) -> AsyncIterator[NatsAgentRuntime]:
    async with NatsAgentRuntime(server.url, namespace=workers) as started:
        yield started


def contents(item: BaseAgentEvent | BaseChatMessage | TaskResult) -> Any:
    """All of a message but its id and its time."""
    if isinstance(item, TaskResult):
        return item.stop_reason, [contents(message) for message in item.messages]
    return type(item), item.model_dump(exclude={"id", "created_at", "full_message_id", "request_id"})


async def streamed(team: Team, **task: Any) -> list[Any]:
    async with asyncio.timeout(30):
        return [contents(item) async for item in team.run_stream(**task)]


async def remote(scene: str, runtime: NatsAgentRuntime) -> list[RemoteChatAgent | RemoteTeam]:
    agents: list[RemoteChatAgent | RemoteTeam] = []
    for place, factory in enumerate(SCENES[scene].participants):
        cls = RemoteTeam if isinstance(factory(), Team) else RemoteChatAgent
        agents.append(
            await cls.connect(type_of(scene, place), runtime, timeout=20, message_types=SCENES[scene].message_types)
        )
    return agents


def local(scene: Scene) -> Team:
    return scene.build([factory() for factory in scene.participants])


@pytest.mark.parametrize("name", SCENES)
async def test_a_team_over_processes_says_what_it_says_in_one(name: str, runtime: NatsAgentRuntime) -> None:
    scene = SCENES[name]
    expected = await streamed(local(scene), task="Begin.")
    found = await streamed(scene.build(await remote(name, runtime)), task="Begin.")
    assert found == expected
    assert len(expected) > 3


async def test_tokens_of_a_model_arrive_as_they_come(runtime: NatsAgentRuntime) -> None:
    team = SCENES["round_robin"].build(await remote("round_robin", runtime))
    found = await streamed(team, task="Begin.")
    assert [kind for kind, *_ in found].count(ModelClientStreamingChunkEvent) > 3


@pytest.mark.parametrize("name", ["round_robin", "nested"])
async def test_a_team_over_processes_goes_on_is_reset_and_saved_as_in_one(name: str, runtime: NatsAgentRuntime) -> None:
    def plain(state: Any) -> Any:
        if isinstance(state, dict):
            return {key: plain(value) for key, value in state.items() if key not in {"id", "created_at"}}
        return [plain(value) for value in state] if isinstance(state, list) else state

    ours, theirs = SCENES[name].build(await remote(name, runtime)), local(SCENES[name])
    assert await streamed(ours, task="Begin.") == await streamed(theirs, task="Begin.")
    saved = await theirs.save_state()
    assert plain(await ours.save_state()) == plain(saved)
    await ours.reset()
    await theirs.reset()
    assert await streamed(ours, task="Again.") == await streamed(theirs, task="Again.")
    fresh = SCENES[name].build(await remote(name, runtime))
    await fresh.load_state(saved)
    assert plain(await fresh.save_state()) == plain(saved)


async def test_two_teams_with_one_remote_agent_at_a_time_have_a_session_each(runtime: NatsAgentRuntime) -> None:
    expected = await streamed(local(SCENES["round_robin"]), task="Begin.")
    teams = [SCENES["round_robin"].build(await remote("round_robin", runtime)) for _ in range(4)]
    assert await asyncio.gather(*(streamed(team, task="Begin.") for team in teams)) == [expected] * 4


@pytest.mark.parametrize("place", ["its own runtime", "a given runtime", "a worker"])
async def test_after_a_cancelled_run_a_team_goes_on_as_the_page_says(
    place: str, server: EmbeddedServer, namespace: str
) -> None:
    """A team of this process as a new one with the state of the old one; a `RemoteTeam` as it is."""
    waiting, gate = asyncio.Event(), asyncio.Event()

    class Slow(Counter):
        async def on_messages_stream(
            self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken
        ) -> AsyncGenerator[BaseAgentEvent | BaseChatMessage | Response, None]:
            waiting.set()
            opened = asyncio.ensure_future(gate.wait())
            cancellation_token.link_future(opened)
            await opened
            async for item in super().on_messages_stream(messages, cancellation_token):
                yield item

    given = SingleThreadedAgentRuntime() if place == "a given runtime" else None
    async with (
        NatsAgentRuntime(server.url, namespace=namespace) as worker,
        NatsAgentRuntime(server.url, namespace=namespace) as caller,
    ):
        await host(worker, "slow", Slow)

        async def make() -> RoundRobinGroupChat:
            return RoundRobinGroupChat([await RemoteChatAgent.connect("slow", caller)], max_turns=3, runtime=given)

        team: Team = await make()
        if place == "a worker":
            await host(worker, "team", make)
            team = await RemoteTeam.connect("team", caller)
        if given is not None:
            given.start()
        token = CancellationToken()
        running = asyncio.create_task(team.run(task="Begin.", cancellation_token=token))
        async with asyncio.timeout(20):
            await waiting.wait()
            token.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            gate.set()
            if place != "a worker":
                saved = await team.save_state()
                team = await make()
                await team.load_state(saved)
            result = await team.run(task="Again.")
        assert result.stop_reason == "Maximum number of turns 3 reached."
        assert [type(message) for message in result.messages].count(TextMessage) == 4
        if given is not None:
            await given.stop()


@pytest.mark.parametrize("end", ["killed", pytest.param("frozen", marks=pytest.mark.slow)])
async def test_a_team_ends_as_if_nothing_had_happened_when_a_participant_is_lost(
    end: str, server: EmbeddedServer, namespace: str, processes: Processes, tmp_path: Path
) -> None:
    """In the middle of its turn, after a tool call was reported. The context of its model has each message once."""
    local_agents = [factory() for factory in SCENES["lost"].participants]
    expected = await streamed(SCENES["lost"].build(local_agents), task="Which colour?")
    gate = tmp_path / "gate"
    gate.touch()
    environment = {"CHAT_GATE": str(gate)}
    finders = [
        processes.python(WORKER, server.url, namespace, f"finder{n}", "0", name=f"finder{n}", env=environment)
        for n in range(2)
    ]
    processes.python(WORKER, server.url, namespace, "asker", "1", name="asker")
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        await eventually(lambda: len(hosting(runtime, "lost.0")) == 2, 20)
        finder = await RemoteChatAgent.connect("lost.0", runtime, retries=1)
        asker = await RemoteChatAgent.connect("lost.1", runtime, timeout=20)
        running = asyncio.create_task(streamed(SCENES["lost"].build([finder, asker]), task="Which colour?"))
        pid = int(await eventually(lambda: read(gate.with_suffix(".pid")), 20))
        (looking,) = [process for process in finders if process.pid == pid]
        (looking.kill if end == "killed" else looking.pause)()
        gate.unlink()
        assert await running == expected
        assert await finder.save_state() == await local_agents[0].save_state()
        looking.resume()


def hosting(runtime: NatsAgentRuntime, agent_type: str) -> list[str]:
    return runtime.running.registry.view.workers_hosting(agent_type)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


async def test_without_retries_the_loss_of_a_worker_ends_the_turn(
    server: EmbeddedServer, namespace: str, processes: Processes, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    worker = processes.python(WORKER, server.url, namespace, "finder", "0", name="finder", env={"CHAT_GATE": str(gate)})
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        finder = await RemoteChatAgent.connect("lost.0", runtime, timeout=20)
        running = asyncio.create_task(finder.run(task="Which colour?"))
        await eventually(lambda: read(gate.with_suffix(".pid")), 20)
        worker.kill()
        with pytest.raises(WorkerLost):
            await running
