"""Gives what an agent says the name under which its caller knows it."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar, cast

from autogen_agentchat.base import Response
from autogen_agentchat.messages import BaseAgentEvent, BaseChatMessage, HandoffMessage
from autogen_core.models import AssistantMessage, LLMMessage

Item = TypeVar("Item", bound="BaseAgentEvent | BaseChatMessage | Response")


def renamed(item: Item, own: str, wanted: str) -> Item:
    """``item`` of an agent whose name is ``own``, as an agent with the name ``wanted`` would say it.

    Teams such as GraphFlow, and terminations by source, look at the source of a message. It is the same object if the
    names do not differ.
    """
    if own == wanted:
        return item
    if isinstance(item, Response):
        inner = item.inner_messages
        return cast(
            Item,
            replace(
                item,
                chat_message=_renamed(item.chat_message, own, wanted),
                inner_messages=None if inner is None else [_renamed(message, own, wanted) for message in inner],
            ),
        )
    return _renamed(item, own, wanted)


Message = TypeVar("Message", bound="BaseAgentEvent | BaseChatMessage")


def _renamed(message: Message, own: str, wanted: str) -> Message:
    changes: dict[str, object] = {}
    if message.source == own:
        changes["source"] = wanted
    if isinstance(message, HandoffMessage) and message.context:
        changes["context"] = [_in_context(one, own, wanted) for one in message.context]
    return cast(Message, message.model_copy(update=changes)) if changes else message


def _in_context(message: LLMMessage, own: str, wanted: str) -> LLMMessage:
    if isinstance(message, AssistantMessage) and message.source == own:
        return message.model_copy(update={"source": wanted})
    return message
