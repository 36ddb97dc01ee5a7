"""AgentChat teams whose participants a worker hosts: what the tests run in one process, and over several.

As a program it is a worker. Arguments: URL of the server, namespace, name of the worker, and the place in each team of
the participants that it hosts.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import ChatAgent, Handoff, Team
from autogen_agentchat.conditions import HandoffTermination, TextMentionTermination
from autogen_agentchat.messages import StructuredMessage
from autogen_agentchat.teams import (
    DiGraphBuilder,
    GraphFlow,
    MagenticOneGroupChat,
    RoundRobinGroupChat,
    SelectorGroupChat,
    Swarm,
)
from autogen_core import FunctionCall
from autogen_core.models import AssistantMessage, CreateResult, LLMMessage, ModelFamily, ModelInfo, RequestUsage
from autogen_ext.models.replay import ReplayChatCompletionClient
from pydantic import BaseModel

from natsrt import NatsAgentRuntime
from natsrt.agentchat import host

MODEL = ModelInfo(
    vision=True, function_calling=True, json_output=True, structured_output=True, family=ModelFamily.UNKNOWN
)


class Plan(BaseModel):
    steps: list[str]


def replay(*answers: str | CreateResult) -> ReplayChatCompletionClient:
    return ReplayChatCompletionClient(list(answers), model_info=MODEL)


class Recalling(ReplayChatCompletionClient):
    """Answers by what it is told: after two answers in the context comes the third one, whichever client gave them."""

    def _recall(self, messages: Sequence[LLMMessage]) -> None:
        self._current_index = sum(isinstance(message, AssistantMessage) for message in messages)

    async def create(self, messages: Sequence[LLMMessage], **more: Any) -> CreateResult:
        self._recall(messages)
        return await super().create(messages, **more)

    async def create_stream(self, messages: Sequence[LLMMessage], **more: Any) -> Any:
        self._recall(messages)
        async for item in super().create_stream(messages, **more):
            yield item


def assistant(name: str, *answers: str | CreateResult, **settings: Any) -> Callable[[], AssistantAgent]:
    return lambda: AssistantAgent(
        name, Recalling(list(answers), model_info=MODEL), description=f"is {name}", **settings
    )


def calls(name: str, **arguments: Any) -> CreateResult:
    """A model's request to call a tool."""
    call = FunctionCall(id="1", name=name, arguments=json.dumps(arguments))
    usage = RequestUsage(prompt_tokens=0, completion_tokens=0)
    return CreateResult(finish_reason="function_calls", content=[call], usage=usage, cached=False)


def ledger(satisfied: bool, speaker: str) -> str:
    answers = {
        "is_request_satisfied": satisfied,
        "is_progress_being_made": True,
        "is_in_loop": False,
        "instruction_or_question": "Look it up.",
        "next_speaker": speaker,
    }
    return json.dumps({key: {"reason": "so it is", "answer": answer} for key, answer in answers.items()})


async def stock_of(article: str) -> str:
    """How many pieces of an article there are."""
    return f"7 pieces of {article}"


async def look(article: str) -> str:
    """Looks up an article, as long as the file exists that ``CHAT_GATE`` names. Beside it, it tells who looks."""
    gate = Path(os.environ.get("CHAT_GATE", "/nonexistent"))
    if gate.exists():
        gate.with_suffix(".pid").write_text(str(os.getpid()))
        while gate.exists():
            await asyncio.sleep(0.01)
    return f"the {article} is blue"


def graph(agents: list[Any]) -> Team:
    writer, checker, last = agents
    builder = DiGraphBuilder().add_node(writer).add_node(checker).add_node(last)
    builder.add_edge(writer, checker).add_edge(checker, last, condition="fine")
    builder.add_edge(checker, writer, condition="again")
    builder.set_entry_point(writer)
    return GraphFlow(agents, graph=builder.build(), max_turns=10)


@dataclass(frozen=True)
class Scene:
    """A kind of team, and what its participants are made by."""

    participants: Sequence[Callable[[], ChatAgent | Team]]
    build: Callable[[list[Any]], Team]
    message_types: Sequence[Any] = ()


SCENES = {
    "round_robin": Scene(
        [
            assistant("writer", "a draft", "a better draft", model_client_stream=True),
            assistant("clerk", calls("stock_of", article="lamp"), "seven", tools=[stock_of]),
            assistant("critic", "too short", "APPROVE"),
        ],
        lambda agents: RoundRobinGroupChat(agents, termination_condition=TextMentionTermination("APPROVE")),
    ),
    "structured": Scene(
        [
            assistant("planner", '{"steps": ["look", "tell"]}', output_content_type=Plan),
            assistant("reader", "I have read it"),
        ],
        lambda agents: RoundRobinGroupChat(agents, max_turns=2, custom_message_types=[StructuredMessage[Plan]]),
        [StructuredMessage[Plan]],
    ),
    "selector": Scene(
        [assistant("planner", "first sums", "done"), assistant("sums", "4")],
        lambda agents: SelectorGroupChat(
            agents,
            replay("planner", "sums", "planner"),
            termination_condition=TextMentionTermination("done"),
            allow_repeated_speaker=True,
            emit_team_events=True,
        ),
    ),
    "swarm": Scene(
        [
            assistant("desk", calls("transfer_to_refunds"), handoffs=["refunds"]),
            assistant("refunds", calls("transfer_to_user"), handoffs=[Handoff(target="user", message="Which order?")]),
        ],
        lambda agents: Swarm(agents, termination_condition=HandoffTermination("user")),
    ),
    "magentic_one": Scene(
        [assistant("surfer", "42"), assistant("coder", "…")],
        lambda agents: MagenticOneGroupChat(
            agents,
            replay("the facts", "the plan", ledger(False, "surfer"), ledger(True, "surfer"), "The answer is 42."),
        ),
    ),
    "graph": Scene(
        [
            assistant("writer", "first", "second"),
            assistant("checker", "again", "fine"),
            assistant("last", "the end"),
        ],
        graph,
    ),
    "lost": Scene(
        [
            assistant(
                "finder",
                calls("look", article="lamp"),
                "It is blue, as I have seen.",
                "Still blue.",
                tools=[look],
                reflect_on_tool_use=True,
                model_client_stream=True,
            ),
            assistant("asker", "Are you sure?", "APPROVE"),
        ],
        lambda agents: RoundRobinGroupChat(agents, termination_condition=TextMentionTermination("APPROVE")),
    ),
    "nested": Scene(
        [
            lambda: RoundRobinGroupChat(
                [assistant("deep", "one", "three")(), assistant("deeper", "two", "four")()],
                max_turns=2,
                name="inner",
                description="is inner",
            ),
            assistant("top", "so one and two", "so three and four"),
        ],
        lambda agents: RoundRobinGroupChat(agents, max_turns=4),
    ),
}


def type_of(scene: str, place: int) -> str:
    """The agent type of a participant."""
    return f"{scene}.{place}"


async def main(url: str, namespace: str, name: str, place: int) -> None:
    async with NatsAgentRuntime(url, namespace=namespace, name=name) as runtime:
        for scene, found in SCENES.items():
            if place < len(found.participants):
                await host(runtime, type_of(scene, place), found.participants[place], message_types=found.message_types)
        await runtime.stop_when_signal()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
