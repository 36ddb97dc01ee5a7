"""`host`: agents and teams of AgentChat as agents of a worker."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from autogen_agentchat.base import Team
from autogen_core import AgentId, AgentType

import natsrt
from natsrt import KeyedOptions, NatsAgentRuntime
from natsrt.contrib.agentchat.announcement import Announcement
from natsrt.contrib.agentchat.conversation import AgentConversation, Conversation, TeamConversation
from natsrt.contrib.agentchat.factory import Factory, SessionFactory
from natsrt.contrib.agentchat.message_types import MessageTypes, produced_types


async def host(
    runtime: NatsAgentRuntime,
    type: str | AgentType,
    factory: Factory,
    *,
    message_types: Iterable[Any] = (),
    keyed: KeyedOptions | None = None,
    max_running: int | None = None,
) -> AgentType:
    """Host an agent or a team of AgentChat, for `RemoteChatAgent` and `RemoteTeam` in any process.

    Each session has one live agent or team over all workers, made by ``factory`` when it is first used, and the session
    is the key of the natsrt agent. Its state is stored after each turn. If a turn fails, is cancelled, or its caller
    leaves, the next turn starts from the state before it. See docs/agentchat.md.

    Args:
        runtime: The runtime that will host the type. It may be started later.
        type: The name of the agent type.
        factory: Makes the `ChatAgent` or `Team` of one session. It is called without arguments, and may be
            asynchronous. It may return an asynchronous context manager, as a function with
            ``contextlib.asynccontextmanager`` does, which gives the agent or team, and is left instead of calling
            ``close`` when the session is unloaded. AutoGen's `AgentInstantiationContext` has the session, as the key of
            the agent's id, and the runtime. It is called here once too, for a session ``default``, to find out what to
            announce; what it makes then is closed, and not used.
        message_types: Message classes beside AutoGen's own that the agent or team gets or sends, such as
            ``StructuredMessage[Plan]``. Those in ``produced_message_types`` need not be named.
        keyed: The options of the keyed type: when its state is stored, and how long an idle session stays in memory.
            None: ``KeyedOptions()``.
        max_running: As in `NatsAgentRuntime.register_factory`.

    Returns:
        The agent type.

    Raises:
        TypeError: ``factory`` is not callable, or makes something else; or ``message_types`` has something else.
        ValueError: ``keyed`` would let turns of one session run at the same time; the description has over 16 KiB; and
            as `natsrt.register`.
        Exception: What ``factory`` raises.
    """
    agent_type = type if isinstance(type, AgentType) else AgentType(type)
    options = _checked(KeyedOptions() if keyed is None else keyed)
    if not callable(factory):
        raise TypeError(
            f"factory must be a function that makes a ChatAgent or a Team for each session, not {factory!r:.80}"
        )
    given = list(message_types)
    made = await SessionFactory(factory, MessageTypes(given)).make(runtime, AgentId(agent_type.type, "default"))
    sample = made.one
    produced = [] if isinstance(sample, Team) else produced_types(sample.produced_message_types)
    made_here = {one.__name__ for one in produced}  # a factory may make classes anew that are given too
    known = MessageTypes([*(one for one in given if one.__name__ not in made_here), *produced])
    sessions = SessionFactory(factory, known)
    cls = TeamConversation if isinstance(sample, Team) else AgentConversation
    description, details = sample.description, Announcement.of(sample).details
    await made.close(f"the agent that was made to announce {agent_type.type!r}")

    async def begin() -> Conversation[Any]:
        conversation = cls(sessions, description, stores_turns=options.save == "message")
        await conversation.instance()
        return conversation

    sessions.types.register(runtime)
    return await natsrt.register(
        runtime,
        cls,
        agent_type,
        begin,
        keyed=options,
        max_running=max_running,
        details=details,
    )


def _checked(options: KeyedOptions) -> KeyedOptions:
    if options.concurrency != "serial":
        raise ValueError(
            "keyed must have concurrency='serial': a session has one turn at a time, and completed turns are stored"
        )
    return options
