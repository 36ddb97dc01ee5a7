"""Names of agents and agent types on the command line."""

from __future__ import annotations

from typing import Any

import click
from autogen_core import AgentId, TopicId

from natsrt.errors import UnknownAgentType
from natsrt.jetstream.registry.registry import Registry
from natsrt.wire.subjects import plain_prefix

from .exits import CommandFailed, Exit

DEFAULT = "default"
"""The key of an agent, or the source of a topic, that is not named."""


def agent_id(text: str, *, default_key: str | None = None) -> AgentId:
    """The agent that ``TYPE/KEY`` names. ``default_key`` replaces a missing key; None: the key is required."""
    agent_type, slash, key = text.partition("/")
    if not slash:
        if default_key is None:
            raise CommandFailed(f"{text!r} is not an agent: write TYPE/KEY", Exit.USAGE)
        key = default_key
    try:
        return AgentId(agent_type, key)
    except ValueError as error:
        raise CommandFailed(f"{text!r} is not an agent: {error}", Exit.USAGE) from None


def agent_type(text: str) -> str:
    """The agent type that ``TYPE`` names."""
    try:
        return _checked_type(text)
    except ValueError as error:
        raise CommandFailed(str(error), Exit.USAGE) from None


def _checked_type(text: str) -> str:
    """The agent type that ``text`` names. Raises ValueError if it is none."""
    try:
        return AgentId(text, DEFAULT).type
    except ValueError as error:
        raise ValueError(f"{text!r} is not an agent type: {error}") from None


class AgentTypeName(click.ParamType[str]):
    """The name of an agent type."""

    name = "TYPE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return _checked_type(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class TopicPrefix(click.ParamType[str]):
    """The beginning of topic types."""

    name = "PREFIX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return plain_prefix(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


AGENT_TYPE = AgentTypeName()
TOPIC_PREFIX = TopicPrefix()


def topic_id(text: str) -> TopicId:
    """The topic that ``TYPE[/SOURCE]`` names; the source is ``default`` if there is none."""
    topic_type, slash, source = text.partition("/")
    try:
        return TopicId(topic_type, source if slash else DEFAULT)
    except ValueError as error:
        raise CommandFailed(f"{text!r} is not a topic: {error}", Exit.USAGE) from None


async def refuse_unknown(registry: Registry, agent_type: str) -> None:
    """Raise `UnknownAgentType` if the registry does not have the type."""
    if not await registry.is_known(agent_type):
        raise UnknownAgentType(agent_type, agent_type, await registry.some_known())
