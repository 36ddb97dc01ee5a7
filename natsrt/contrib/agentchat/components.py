"""The configuration of remote agents and teams, which are components of AutoGen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from autogen_agentchat.messages import StructuredMessage, StructuredMessageFactory
from autogen_core import ComponentModel
from pydantic import BaseModel

from natsrt.contrib.agentchat.message_types import MessageType, MessageTypes
from natsrt.contrib.servers import ServersConfig


class RemoteConfig(ServersConfig):
    """The configuration of a `RemoteChatAgent` or `RemoteTeam`. It has no credentials."""

    type: str
    session: str | None = None
    name: str
    description: str
    produces: list[str] = []
    message_types: list[ComponentModel] = []
    retries: int = 0


def dump_types(types: MessageTypes) -> list[ComponentModel]:
    """The structured message classes as components, with the JSON schemas of their contents.

    Raises ValueError for other classes, which a configuration cannot describe.
    """
    dumped = []
    for cls in types:
        if not issubclass(cls, StructuredMessage):
            raise ValueError(
                f"the message type {cls.__name__} cannot be part of a configuration: only AutoGen's own types and "
                "StructuredMessage[...] can"
            )
        content = cast(type[BaseModel], cls.model_fields["content"].annotation)
        dumped.append(StructuredMessageFactory(input_model=content).dump_component())
    return dumped


def load_types(dumped: Iterable[ComponentModel]) -> list[MessageType]:
    """The message classes that `dump_types` was given, with contents made from their schemas."""
    return [StructuredMessageFactory.load_component(one).StructuredMessage for one in dumped]
