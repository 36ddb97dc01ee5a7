"""A worker that hosts the model ``gpt``. What the model does, the last message says: see `Scripted`.

Arguments: URL of the server, namespace, name of the worker, ``max_running`` and ``max_waiting`` (``-`` for None).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal

from autogen_core import CancellationToken
from autogen_core.models import (
    ChatCompletionClient,
    CreateResult,
    LLMMessage,
    ModelInfo,
    RequestUsage,
)
from autogen_core.tools import Tool, ToolSchema
from pydantic import BaseModel

from natsrt import NatsAgentRuntime
from natsrt.contrib.models import host_model

INFO = ModelInfo(vision=True, function_calling=True, json_output=True, family="scripted", structured_output=True)


class OutOfTokens(Exception):
    """A class of the model's library."""


class Scripted(ChatCompletionClient):
    """Does what the last message says: a verb, and a number.

    ``count 3`` gives 3 tokens; ``slow 3`` one each 20 ms; ``endless 0`` never ends, and does not look at its token;
    ``hang 2`` gives 2 tokens and then nothing more, ``first 2`` does so on the worker ``first``; ``fail 2`` raises
    after 2 tokens; ``refuse 0`` raises another error.
    """

    def __init__(self, name: str = "here", notes: list[str] | None = None) -> None:
        self.name = name
        self.notes: list[str] = [] if notes is None else notes
        self.calls: list[dict[str, Any]] = []
        self.running = 0
        self.most = 0
        self.closed = 0

    def note(self, text: str) -> None:
        self.notes.append(text)
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    async def create(
        self,
        messages: Sequence[LLMMessage],
        *,
        tools: Sequence[Tool | ToolSchema] = [],
        tool_choice: Tool | Literal["auto", "required", "none"] = "auto",
        json_output: bool | type[BaseModel] | None = None,
        extra_create_args: Mapping[str, Any] = {},
        cancellation_token: CancellationToken | None = None,
    ) -> CreateResult:
        arguments: dict[str, Any] = {"tools": tools, "tool_choice": tool_choice, "json_output": json_output}
        arguments |= {"extra_create_args": extra_create_args, "cancellation_token": cancellation_token}
        *_, result = [item async for item in self.create_stream(messages, **arguments)]
        assert isinstance(result, CreateResult)
        return result

    async def create_stream(
        self,
        messages: Sequence[LLMMessage],
        *,
        tools: Sequence[Tool | ToolSchema] = [],
        tool_choice: Tool | Literal["auto", "required", "none"] = "auto",
        json_output: bool | type[BaseModel] | None = None,
        extra_create_args: Mapping[str, Any] = {},
        cancellation_token: CancellationToken | None = None,
    ) -> AsyncGenerator[str | CreateResult, None]:
        self.calls.append(
            {
                "messages": messages,
                "tools": tools,
                "tool_choice": tool_choice,
                "json_output": json_output,
                "extra_create_args": extra_create_args,
            }
        )
        verb, number = str(messages[-1].content).split()
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for token in range(int(number)):
                if verb == "slow":
                    await asyncio.sleep(0.02)
                yield f"{token} "
            if verb == "fail":
                raise OutOfTokens("no tokens are left")
            if verb == "refuse":
                raise ValueError("no such model")
            if verb == "hang" or (verb == "first" and self.name == "first"):
                await asyncio.sleep(3600)
            while verb == "endless":
                await asyncio.sleep(0.005)
                yield "on "
            yield CreateResult(
                finish_reason="stop", content=self.name, usage=RequestUsage(10, int(number)), cached=False, thought="t"
            )
            self.note(f"done {verb}")
        except BaseException as error:
            self.note(f"ended {verb}: {type(error).__name__}")
            raise
        finally:
            self.running -= 1

    async def close(self) -> None:
        self.closed += 1

    def actual_usage(self) -> RequestUsage:
        return RequestUsage(0, 0)

    def total_usage(self) -> RequestUsage:
        return RequestUsage(0, 0)

    def count_tokens(self, messages: Sequence[LLMMessage], *, tools: Sequence[Tool | ToolSchema] = []) -> int:
        return len(messages)

    def remaining_tokens(self, messages: Sequence[LLMMessage], *, tools: Sequence[Tool | ToolSchema] = []) -> int:
        return 8000 - len(messages)

    @property
    def capabilities(self) -> Any:
        return INFO

    @property
    def model_info(self) -> ModelInfo:
        return INFO


async def main(url: str, namespace: str, name: str, *limits: str) -> None:
    max_running, max_waiting = (None if limit == "-" else int(limit) for limit in limits)
    async with NatsAgentRuntime(url, namespace=namespace, name=name) as runtime:
        await host_model(runtime, "gpt", lambda: Scripted(name), max_running=max_running, max_waiting=max_waiting)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await runtime.stop_when_signal()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
