"""The agents and their team, and what each worker process hosts of them.

A worker is ``natsrt worker examples.chat.team:writer``; the other two are ``editor`` and ``publisher``. Each hosts its
agent, and beside it the team and the transcripts, so that these go on when any one of the workers is gone.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import AgentInstantiationContext
from autogen_core.models import ChatCompletionClient

import natsrt
from examples.chat import script
from examples.chat.messages import Approval, Verdict, let_read
from examples.chat.transcript import Transcript
from natsrt import NatsAgentRuntime
from natsrt.agentchat import RemoteChatAgent, host

AGENTS: Mapping[str, str] = {
    "writer": "Drafts the text that a person has asked for.",
    "editor": "Makes the draft shorter and better.",
    "publisher": "Publishes the text, if a person approves.",
}
"""The agent types of the members of the team, in the order in which they speak, with their descriptions."""
TEAM = "newsroom"
"""The agent type of the team."""
TRANSCRIPT = "transcript"
"""The agent type of the transcripts."""
MODEL = "CHAT_MODEL"
"""The variable with a model client as JSON. Not set: the agents follow the script."""

logging.getLogger("autogen_core").setLevel(logging.CRITICAL)
# AutoGen logs a traceback for each member of a team when a run fails or is cancelled. The web server logs the error.


async def publish(text: str) -> str:
    """Publish a text. The people in the room are asked first."""
    verdict = await natsrt.ask(Approval(text), reply_type=Verdict)
    return f"Published. {verdict.by} approved." if verdict.approved else f"Not published. {verdict.by} refused."


def model_client(scripted: script.Script) -> ChatCompletionClient:
    """The client of a real model, if there is one, or else one that follows the script."""
    if given := os.environ.get(MODEL):
        return ChatCompletionClient.load_component(json.loads(given))
    return script.ScriptedClient(scripted)


def make_writer() -> AssistantAgent:
    return AssistantAgent(
        "writer",
        model_client(script.write),
        description=AGENTS["writer"],
        system_message="You draft short announcements. Put the draft in “quotation marks”.",
        model_client_stream=True,
    )


def make_editor() -> AssistantAgent:
    return AssistantAgent(
        "editor",
        model_client(script.edit),
        description=AGENTS["editor"],
        system_message="You shorten the last draft to two sentences. Put your text in “quotation marks”.",
        model_client_stream=True,
    )


def make_publisher() -> AssistantAgent:
    return AssistantAgent(
        "publisher",
        model_client(script.publish),
        description=AGENTS["publisher"],
        system_message="You call the tool publish with the editor's last text.",
        model_client_stream=True,
        tools=[publish],
    )


def make_team(runtime: NatsAgentRuntime) -> RoundRobinGroupChat:
    """The team of one room. Each member answers once; it shares the session of the room."""
    room = AgentInstantiationContext.current_agent_id().key
    return RoundRobinGroupChat(
        [
            RemoteChatAgent(
                agent_type,
                runtime,
                name=agent_type,
                description=description,
                session=room,
                on_question=natsrt.ask,  # whoever runs the team is asked
            )
            for agent_type, description in AGENTS.items()
        ],
        name=TEAM,
        max_turns=len(AGENTS),
    )


def worker(agent_type: str, factory: Callable[[], AssistantAgent]) -> Callable[[NatsAgentRuntime], Awaitable[None]]:
    """What ``natsrt worker`` calls to register what it hosts."""

    async def register(runtime: NatsAgentRuntime) -> None:
        let_read(runtime)
        await host(runtime, agent_type, factory)
        await host(runtime, TEAM, lambda: make_team(runtime))
        await natsrt.register(runtime, Transcript, TRANSCRIPT, Transcript)

    return register


writer = worker("writer", make_writer)
editor = worker("editor", make_editor)
publisher = worker("publisher", make_publisher)
