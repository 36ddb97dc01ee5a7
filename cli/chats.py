"""Agents and teams of AgentChat, as ``natsrt worker`` finds them. The extra ``agentchat`` may not be installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from natsrt.runtime import NatsAgentRuntime

from .exits import CommandFailed, Exit


def is_chat(found: Any) -> bool:
    """Whether this is an agent or a team of AgentChat."""
    return isinstance(found, _bases())


def is_chat_class(cls: type) -> bool:
    """Whether this is a class of agents or teams of AgentChat."""
    return issubclass(cls, _bases())


def _bases() -> tuple[type, ...]:
    """The classes of AgentChat; none if nothing has imported it, since then there is no object of them."""
    base = sys.modules.get("autogen_agentchat.base")
    return () if base is None else (base.ChatAgent, base.Team)


async def host_chats(runtime: NatsAgentRuntime, agent_type: str, factory: Callable[[], Any]) -> None:
    """Host the agents or teams that ``factory`` makes. Raises as `natsrt.agentchat.host`."""
    from natsrt.agentchat import host

    await host(runtime, agent_type, factory)


def component_factory(path: Path) -> Callable[[], Any]:
    """What makes what a JSON file describes, as AutoGen's ``dump_component`` and Studio write it.

    Raises `CommandFailed` if the file has no description of one.
    """
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise CommandFailed(f"{path} cannot be read: {error.strerror}", Exit.USAGE) from None
    except ValueError as error:
        raise CommandFailed(f"{path} is not JSON: {error}", Exit.USAGE) from None
    if not isinstance(tree, dict) or not isinstance(tree.get("provider"), str):
        raise CommandFailed(
            f"{path} describes no component of AutoGen: it must be an object with the fields provider and config",
            Exit.USAGE,
        )
    from autogen_core import ComponentLoader

    return lambda: ComponentLoader.load_component(tree)
