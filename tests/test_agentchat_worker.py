"""``natsrt worker`` with agents and teams of AgentChat: from a module, and from a JSON file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("autogen_agentchat", reason="autogen-agentchat is not installed: pip install 'natsrt[dev]'")
pytest.importorskip("autogen_ext", reason="autogen-ext is not installed: pip install 'natsrt[dev]'")

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.models import UserMessage
from autogen_ext.models.replay import ReplayChatCompletionClient
from natsrt_cli.exits import Exit

from natsrt import NatsAgentRuntime
from natsrt.agentchat import RemoteChatAgent, RemoteTeam
from natsrt.contrib.models import RemoteChatCompletionClient
from natsrt.embedded import EmbeddedServer
from tests.support.processes import Process, Processes

MODULE = """
from contextlib import asynccontextmanager

from autogen_agentchat.agents import AssistantAgent, BaseChatAgent
from autogen_agentchat.base import Response
from autogen_agentchat.messages import TextMessage
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import AgentInstantiationContext
from autogen_ext.models.replay import ReplayChatCompletionClient

from natsrt.agentchat import RemoteChatAgent

made = []

def assistant():
    made.append(1)
    return AssistantAgent("writer", ReplayChatCompletionClient([f"answer {len(made)}"]), description="writes")

class Echo(BaseChatAgent):
    def __init__(self):
        super().__init__("echo", "echoes")

    produced_message_types = (TextMessage,)

    async def on_messages(self, messages, cancellation_token):
        return Response(chat_message=TextMessage(content=messages[-1].to_text(), source=self.name))

    async def on_reset(self, cancellation_token): ...

async def team():
    runtime = AgentInstantiationContext.current_runtime()
    return RoundRobinGroupChat([RemoteChatAgent("echo", runtime, name="far", description="far"), Echo()], max_turns=2)

@asynccontextmanager
async def lent():
    yield RoundRobinGroupChat([Echo()], max_turns=1)

async def pair():
    runtime = AgentInstantiationContext.current_runtime()
    echo = await RemoteChatAgent.connect("echo", runtime)
    return RoundRobinGroupChat([echo, AssistantAgent("two", client)], max_turns=1)

def needs_runtime(runtime):
    return assistant()

writer = assistant()
client = ReplayChatCompletionClient([])

def model():
    return ReplayChatCompletionClient(["from afar"])
"""


class Workers:
    """Starts ``natsrt worker`` in a folder with `MODULE`."""

    def __init__(self, processes: Processes, server: EmbeddedServer, namespace: str, folder: Path) -> None:
        (folder / "chats.py").write_text(MODULE)
        self._processes, self._folder = processes, folder
        self._environment = {"NATS_URL": server.url, "NATSRT_NAMESPACE": namespace}

    def start(self, *arguments: str) -> Process:
        return self._processes.natsrt("worker", *arguments, env=self._environment, cwd=self._folder)

    async def ready(self, *arguments: str) -> Process:
        worker = self.start(*arguments)
        await worker.wait_for_line("ready: types", 20)
        return worker

    async def refused(self, *arguments: str) -> str:
        worker = self.start(*arguments)
        assert await worker.wait(20) in (Exit.USAGE, Exit.FAILED), worker.describe()
        assert "Traceback" not in worker.stderr
        return worker.stderr


@pytest.fixture
def workers(processes: Processes, server: EmbeddedServer, namespace: str, tmp_path: Path) -> Workers:
    return Workers(processes, server, namespace, tmp_path)


async def last_words(agent: RemoteChatAgent | RemoteTeam, task: str) -> str:
    return (await agent.run(task=task)).messages[-1].to_text()


async def test_a_factory_an_agent_class_and_a_team_are_hosted(
    workers: Workers, server: EmbeddedServer, namespace: str
) -> None:
    await workers.ready("chats:assistant", "--type", "writer")
    await workers.ready("chats:Echo", "--type", "echo")
    await workers.ready("chats:team")
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        writer = await RemoteChatAgent.connect("writer", runtime, timeout=20)
        assert (writer.name, writer.description) == ("writer", "writes")
        # The module has made one, and the worker one more, to announce it. Each session has one of its own.
        assert await last_words(RemoteChatAgent("writer", runtime, session="default"), "x") == "answer 3"
        assert await last_words(writer, "x") == "answer 4"
        team = await RemoteTeam.connect("team", runtime, timeout=20)
        result = await team.run(task="hello")
        assert [(one.source, one.to_text()) for one in result.messages] == [
            ("user", "hello"), ("far", "hello"), ("echo", "hello"),
        ]  # fmt: skip


async def test_a_factory_with_an_end_of_its_own_is_hosted(
    workers: Workers, server: EmbeddedServer, namespace: str
) -> None:
    await workers.ready("chats:lent")
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        assert await last_words(await RemoteTeam.connect("lent", runtime, timeout=20), "hello") == "hello"


async def test_a_factory_may_wait_for_the_agents_of_other_workers(
    workers: Workers, server: EmbeddedServer, namespace: str
) -> None:
    waiting = workers.start("chats:pair")
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        await workers.ready("chats:Echo", "--type", "echo")
        await waiting.wait_for_line("ready: types pair", 20)
        assert await last_words(await RemoteTeam.connect("pair", runtime, timeout=20), "hello") == "hello"


async def test_a_team_from_a_json_file_is_hosted_with_several_processes(
    workers: Workers, server: EmbeddedServer, namespace: str, tmp_path: Path
) -> None:
    agents = [AssistantAgent(name, ReplayChatCompletionClient([name, "more"])) for name in ("one", "two")]
    team = RoundRobinGroupChat([*agents], termination_condition=MaxMessageTermination(3), description="from a file")
    (tmp_path / "research.json").write_text(team.dump_component().model_dump_json())
    (tmp_path / "one.json").write_text(agents[0].dump_component().model_dump_json())
    await workers.ready("research.json", "--processes", "2")
    await workers.ready("one.json", "--type", "first")
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        teams = [await RemoteTeam.connect("research", runtime, timeout=20) for _ in range(4)]
        assert teams[0].description == "from a file"
        assert [await last_words(remote, "x") for remote in teams] == ["two"] * 4
        assert await last_words(await RemoteChatAgent.connect("first", runtime, timeout=20), "x") == "one"


async def test_a_model_client_is_hosted_from_a_module_and_from_a_json_file(
    workers: Workers, server: EmbeddedServer, namespace: str, tmp_path: Path
) -> None:
    described = ReplayChatCompletionClient(["from a file"]).dump_component()
    (tmp_path / "other.json").write_text(described.model_dump_json())
    await workers.ready("chats:model", "--type", "gpt")
    await workers.ready("other.json")
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        said = []
        for agent_type in ("gpt", "other"):
            client = await RemoteChatCompletionClient.connect(agent_type, runtime, timeout=20)
            said.append((await client.create([UserMessage(content="hello", source="user")])).content)
        assert said == ["from afar", "from a file"]


@pytest.mark.parametrize(
    ("target", "contents", "text"),
    [
        ("nothing.json", None, "nothing.json cannot be read: No such file or directory"),
        ("broken.json", "{", "broken.json is not JSON: "),
        ("list.json", "[]", "list.json describes no component of AutoGen"),
        (
            "condition.json",
            {"provider": "autogen_agentchat.conditions.MaxMessageTermination", "config": {"max_messages": 1}},
            "returned MaxMessageTermination, not an agent",
        ),
        ("gone.json", {"provider": "nowhere.Team", "config": {}}, "No module named 'nowhere'"),
        ("bad name.json", {"provider": "nowhere.Team", "config": {}}, "'bad name' is not a valid agent type"),
        (
            "empty.json",
            {"provider": "autogen_agentchat.teams.RoundRobinGroupChat", "component_type": "team", "config": {}},
            "participants",
        ),
        ("chats:client", None, "is the ReplayChatCompletionClient itself, but each worker process needs"),
        ("chats:writer", None, "chats:writer is the AssistantAgent 'writer' itself, but each session needs one of"),
        ("chats:needs_runtime", None, r"takes the runtime, and returned the AssistantAgent 'writer'"),
        ("chats", None, "must be MODULE:NAME, such as my_module:factory, or a JSON file of AgentChat"),
    ],
)  # fmt: skip
async def test_what_cannot_be_hosted_is_said_in_plain_words(
    target: str, contents: str | dict[str, object] | None, text: str, workers: Workers, tmp_path: Path
) -> None:
    if contents is not None:
        (tmp_path / target).write_text(contents if isinstance(contents, str) else json.dumps(contents))
    assert text in await workers.refused(target)
