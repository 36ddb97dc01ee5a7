"""What the agents say without a model: answers that are made from what has been said, and come word by word.

An answer depends on the conversation alone, so it does not matter which process gives it.
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, TypeAlias

from autogen_core import FunctionCall
from autogen_core.models import CreateResult, LLMMessage, ModelFamily, ModelInfo, RequestUsage, UserMessage
from autogen_ext.models.replay import ReplayChatCompletionClient

WORDS_PER_SECOND = 20.0

Script: TypeAlias = Callable[[Sequence[LLMMessage]], str | CreateResult]
"""Makes the next answer of an agent from what it has been told."""

_MODEL = ModelInfo(
    vision=False, function_calling=True, json_output=False, structured_output=False, family=ModelFamily.UNKNOWN
)


class ScriptedClient(ReplayChatCompletionClient):
    """Replays the answer of a script, at the pace of a model."""

    def __init__(self, script: Script) -> None:
        super().__init__([], model_info=_MODEL)
        self._script = script

    def _replay(self, messages: Sequence[LLMMessage]) -> tuple[ReplayChatCompletionClient, Sequence[LLMMessage]]:
        """A client that has the next answer, and the messages whose tokens it can count."""
        texts = [one for one in messages if isinstance(one.content, str)]
        return ReplayChatCompletionClient([self._script(messages)], model_info=_MODEL), texts

    async def create(self, messages: Sequence[LLMMessage], **more: Any) -> CreateResult:
        replay, texts = self._replay(messages)
        return await replay.create(texts, **more)

    async def create_stream(
        self, messages: Sequence[LLMMessage], **more: Any
    ) -> AsyncGenerator[str | CreateResult, None]:
        replay, texts = self._replay(messages)
        async for part in replay.create_stream(texts, **more):
            yield part
            if isinstance(part, str):
                await asyncio.sleep(1 / WORDS_PER_SECOND)


def write(messages: Sequence[LLMMessage]) -> str:
    person, _, request = _last(messages, "user").partition(": ")
    text = (
        f"{_sentence(request)} We have thought about this for a very long time, we have talked to everyone who was "
        "awake, and this is what we can say today: it is happening, it is open to all, and there will be cake."
    )
    return f"Here is a first draft, {person}. “{text}”"


def edit(messages: Sequence[LLMMessage]) -> str:
    _, _, request = _last(messages, "user").partition(": ")
    return (
        "Shorter, and the cake stays. "
        f"“{_sentence(request)} It is happening, it is open to all, and there will be cake.”"
    )


def publish(messages: Sequence[LLMMessage]) -> CreateResult:
    quoted = re.findall("“(.*?)”", _last(messages, "editor"), re.DOTALL)
    call = FunctionCall(id=uuid.uuid4().hex, name="publish", arguments=json.dumps({"text": quoted[-1]}))
    usage = RequestUsage(prompt_tokens=0, completion_tokens=0)
    return CreateResult(finish_reason="function_calls", content=[call], usage=usage, cached=False)


def _last(messages: Sequence[LLMMessage], source: str) -> str:
    """The last message from a source."""
    return next(str(one.content) for one in reversed(messages) if isinstance(one, UserMessage) and one.source == source)


def _sentence(request: str) -> str:
    """What a person has written, as a sentence without quotation marks."""
    text = re.sub("[“”]", "", request).strip()
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."
