"""An AgentChat team on a runtime of natsrt: its agents run in this process, and a tool calls an agent elsewhere.

A team runs in the process that calls `run`. What its agents use may run anywhere: here the clerk's tool calls the
warehouse, an agent of another runtime. docs/agentchat.md is about agents and teams in other processes. Recorded answers
(``ReplayChatCompletionClient``) replace the models, so the example needs no API key.

Run it: python examples/agent_chat.py (needs AgentChat: pip install 'natsrt[examples]')
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import TaskResult
from autogen_agentchat.conditions import TextMentionTermination
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import AgentId, FunctionCall, MessageContext, RoutedAgent, message_handler
from autogen_core.models import CreateResult, ModelFamily, ModelInfo, RequestUsage
from autogen_ext.models.replay import ReplayChatCompletionClient
from local_server import local_server

from natsrt import NatsAgentRuntime


@dataclass
class Lookup:
    article: str


@dataclass
class Stock:
    pieces: int


class Warehouse(RoutedAgent):
    @message_handler
    async def look_up(self, message: Lookup, ctx: MessageContext) -> Stock:
        return Stock({"lamp": 7}.get(message.article, 0))


def replay(*answers: str | CreateResult) -> ReplayChatCompletionClient:
    able = ModelInfo(
        vision=False, function_calling=True, json_output=True, structured_output=True, family=ModelFamily.UNKNOWN
    )
    return ReplayChatCompletionClient(list(answers), model_info=able)


def tool_call(name: str, **arguments: str) -> CreateResult:
    """What a model answers to call a tool."""
    return CreateResult(
        finish_reason="function_calls",
        content=[FunctionCall(id="1", name=name, arguments=json.dumps(arguments))],
        usage=RequestUsage(prompt_tokens=0, completion_tokens=0),
        cached=False,
    )


async def main() -> None:
    async with local_server() as url, NatsAgentRuntime(url) as worker, NatsAgentRuntime(url) as runtime:
        await Warehouse.register(worker, "warehouse", lambda: Warehouse("knows the stock"))

        async def stock_of(article: str) -> str:
            """How many pieces of an article there are."""
            stock = await runtime.send_message(Lookup(article), AgentId("warehouse", "default"))
            return f"{stock.pieces} pieces of {article}"

        clerk = AssistantAgent("clerk", replay(tool_call("stock_of", article="lamp")), tools=[stock_of])
        buyer = AssistantAgent("buyer", replay("That is enough. DONE"))
        team = RoundRobinGroupChat(
            [clerk, buyer], termination_condition=TextMentionTermination("DONE"), runtime=runtime
        )

        async for item in team.run_stream(task="How many lamps are there?"):
            if isinstance(item, TaskResult):
                print(f"stopped: {item.stop_reason}")
                assert [message.source for message in item.messages] == ["user", *3 * ["clerk"], "buyer"]
            else:
                print(f"{item.source}: {item.to_text()}")


if __name__ == "__main__":
    asyncio.run(main())
