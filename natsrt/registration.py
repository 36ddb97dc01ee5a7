"""`register`: does what AutoGen's ``Agent.register`` does, without its restrictions on message types."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from autogen_core import (
    AgentType,
    BaseAgent,
    Subscription,
    SubscriptionInstantiationContext,
    TypePrefixSubscription,
)

from natsrt.agents.message_types import message_types_of
from natsrt.jetstream.consumers import START_NOW, Start
from natsrt.jetstream.registry.entries import Rule
from natsrt.keyed_types import KeyedOptions
from natsrt.runtime import NatsAgentRuntime
from natsrt.wire.serialization import serializer_for

T = TypeVar("T", bound=BaseAgent)


async def register(
    runtime: NatsAgentRuntime,
    cls: type[T],
    type: str | AgentType,
    factory: Callable[[], T | Awaitable[T]],
    *,
    skip_class_subscriptions: bool = False,
    skip_direct_message_subscription: bool = False,
    max_running: int | None = None,
    start_from: Start = START_NOW,
    keyed: bool | KeyedOptions | None = None,
    details: Mapping[str, Any] | None = None,
) -> AgentType:
    """Register an agent class: its factory, its subscriptions, and one for direct messages, as ``cls.register`` does.

    AutoGen's own ``register`` refuses handlers for ``str`` and other plain values, and for dataclasses with nested
    dataclasses or unions. This function accepts them. If it fails, it removes what it has registered.

    Args:
        runtime: The runtime that will host the type.
        cls: The class of the agents that ``factory`` creates.
        type: The name of the agent type.
        factory: Creates one agent. It is called without arguments, and may be asynchronous.
        skip_class_subscriptions: True to omit the subscriptions that are declared by decorators of the class.
        skip_direct_message_subscription: True to omit the subscription to topics whose type begins with the type's name
            and a colon, which AutoGen uses for direct messages.
        max_running: Number of handlers of the type that may run at once in this runtime; further messages wait, in
            order. None: only the setting ``max_running`` limits them.
        start_from: As in `NatsAgentRuntime.register_factory`.
        keyed: As in `NatsAgentRuntime.register_factory`.
        details: As in `NatsAgentRuntime.register_factory`.

    Returns:
        The agent type.

    Raises:
        CannotSerialize: natsrt cannot serialize a handler's message type.
        ValueError: The type already exists in this runtime, a subscription has a prefix that no topic can have,
            ``max_running`` is not a whole number of at least 1, ``start_from`` is no start, ``details`` are no JSON
            values, or the type is keyed on another worker and not here, or the reverse.
    """
    for message_type in message_types_of(cls).handled:
        if message_type is not object:
            serializer_for(message_type)
    agent_type = type if isinstance(type, AgentType) else AgentType(type)
    subscriptions = await _subscriptions(cls, agent_type, skip_class_subscriptions)
    if not skip_direct_message_subscription:
        # The prefix ends in ":", as in AutoGen, so it does not match the topics of a type with a longer name.
        subscriptions.append(TypePrefixSubscription(f"{agent_type.type}:", agent_type.type))
    for subscription in subscriptions:
        Rule.of(subscription)  # raises before anything is registered
    await runtime.register_factory(
        agent_type,
        factory,
        expected_class=cls,
        keyed=keyed,
        max_running=max_running,
        start_from=start_from,
        details=details,
    )
    added: list[Subscription] = []
    try:
        for subscription in subscriptions:
            await runtime.add_subscription(subscription)
            added.append(subscription)
    except BaseException:
        for subscription in added:
            await runtime.remove_subscription(subscription.id)
        await runtime.unregister(agent_type, keep_subscriptions=True)
        raise
    return agent_type


async def _subscriptions(cls: type[BaseAgent], agent_type: AgentType, skip: bool) -> list[Subscription]:
    subscriptions: list[Subscription] = []
    if not skip:
        with SubscriptionInstantiationContext.populate_context(agent_type):
            for unbound in cls.internal_unbound_subscriptions_list:
                made = unbound()
                subscriptions += await made if inspect.isawaitable(made) else made
    return subscriptions
