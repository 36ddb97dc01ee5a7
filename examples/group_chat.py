"""A distributed group chat, after AutoGen's design pattern: writer, editor and manager, each in its own runtime.

All participants subscribe to the topic of the chat, so each of them gets every message. The manager decides who speaks
next, and asks that participant on the participant's own topic. Recorded answers (``ReplayChatCompletionClient``)
replace the models, so the example needs no API key. To use a real model, replace only the client.

The session's name is the source of all topics, and so the key of all agents: many chats can run at the same time.

Run it: python examples/group_chat.py (needs autogen-ext: pip install 'natsrt[examples]')
"""

from __future__ import annotations

import asyncio

from autogen_core import (
    ClosureAgent,
    ClosureContext,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypeSubscription,
    message_handler,
)
from autogen_core.models import AssistantMessage, ChatCompletionClient, LLMMessage, SystemMessage, UserMessage
from autogen_ext.models.replay import ReplayChatCompletionClient
from local_server import local_server
from pydantic import BaseModel

from natsrt import NatsAgentRuntime

CHAT = "chat"
OVER = "chat_over"


class Said(BaseModel):
    """A participant or the user said something in the chat."""

    body: UserMessage


class YourTurn(BaseModel):
    """The manager asks a participant to speak."""


class Over(BaseModel):
    """The manager ended the chat."""

    messages: int


class Participant(RoutedAgent):
    """Records the chat, and speaks when the manager asks it to."""

    def __init__(self, description: str, model: ChatCompletionClient) -> None:
        super().__init__(description)
        self._model = model
        self._history: list[LLMMessage] = []

    @message_handler
    async def listen(self, message: Said, ctx: MessageContext) -> None:
        self._history.append(message.body)

    @message_handler
    async def speak(self, message: YourTurn, ctx: MessageContext) -> None:
        instruction = SystemMessage(content=f"You are the {self.id.type}: {self.metadata['description']}")
        completion = await self._model.create([instruction, *self._history])
        assert isinstance(completion.content, str)
        self._history.append(AssistantMessage(content=completion.content, source=self.id.type))
        said = Said(body=UserMessage(content=completion.content, source=self.id.type))
        await self.publish_message(said, TopicId(CHAT, self.id.key))


class Manager(RoutedAgent):
    """Has its model choose the next speaker, until the editor approves."""

    def __init__(self, participants: list[str], model: ChatCompletionClient) -> None:
        super().__init__("chooses who speaks next")
        self._participants = participants
        self._model = model
        self._history: list[UserMessage] = []

    @message_handler
    async def listen(self, message: Said, ctx: MessageContext) -> None:
        self._history.append(message.body)
        assert isinstance(message.body.content, str)
        if message.body.source == "editor" and "approve" in message.body.content.lower():
            await self.publish_message(Over(messages=len(self._history)), TopicId(OVER, self.id.key))
            return
        question = SystemMessage(content=f"Who speaks next? Answer with one of {', '.join(self._participants)}.")
        choice = (await self._model.create([*self._history, question])).content
        assert isinstance(choice, str) and choice in self._participants
        await self.publish_message(YourTurn(), TopicId(choice, self.id.key))


async def main() -> None:
    writer_model = ReplayChatCompletionClient(
        ["A lighthouse dreams of trains.", "Each night a lighthouse waits for one."]
    )
    editor_model = ReplayChatCompletionClient(["Lovely. Who waits for whom?", "I approve."])
    manager_model = ReplayChatCompletionClient(["writer", "editor", "writer", "editor"])
    transcript: list[str] = []
    over = asyncio.Event()

    async with (
        local_server() as url,
        NatsAgentRuntime(url) as writers,
        NatsAgentRuntime(url) as editors,
        NatsAgentRuntime(url) as managers,
        NatsAgentRuntime(url) as audience,
    ):
        await Participant.register(writers, "writer", lambda: Participant("writes one-line stories", writer_model))
        await Participant.register(editors, "editor", lambda: Participant("asks for more, or approves", editor_model))
        await Manager.register(managers, "manager", lambda: Manager(["writer", "editor"], manager_model))
        for runtime, agent_type in ((writers, "writer"), (editors, "editor"), (managers, "manager")):
            await runtime.add_subscription(TypeSubscription(CHAT, agent_type))
            await runtime.add_subscription(TypeSubscription(agent_type, agent_type))

        async def hear(context: ClosureContext, message: Said | Over, ctx: MessageContext) -> None:
            if isinstance(message, Over):
                over.set()
            else:
                transcript.append(f"{message.body.source}: {message.body.content}")

        await ClosureAgent.register_closure(
            audience,
            "audience",
            hear,
            subscriptions=lambda: [TypeSubscription(CHAT, "audience"), TypeSubscription(OVER, "audience")],
        )

        task = Said(body=UserMessage(content="A story about a lighthouse, please.", source="user"))
        await audience.publish_message(task, TopicId(CHAT, "story-1"))
        await over.wait()

    print("\n".join(transcript))
    assert [line.partition(":")[0] for line in transcript] == ["user", "writer", "editor", "writer", "editor"]
    assert transcript[-1] == "editor: I approve."


if __name__ == "__main__":
    asyncio.run(main())
