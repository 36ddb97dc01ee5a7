"""`register`: AutoGen's ``Agent.register`` without its limits on message types."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import TypeVar

from autogen_core import (
    AgentType,
    BaseAgent,
    Subscription,
    SubscriptionInstantiationContext,
    TypePrefixSubscription,
)

from natsrt.agents.catalog import message_types
from natsrt.jetstream.registry.entries import Rule
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
) -> AgentType:
    """Do all that ``cls.register`` does, for handlers of any message type.

    AutoGen's own ``register`` refuses handlers for ``str`` and other plain values, and for dataclasses with nested
    dataclasses or unions. This one leaves nothing behind when it fails.

    Raises:
        CannotSerialize: A handler's message type cannot travel at all.
        ValueError: The type exists in this runtime already, or a subscription has a prefix that no topic can have.
    """
    for message_type in message_types(cls)[0]:
        if message_type is not object:
            serializer_for(message_type)
    agent_type = type if isinstance(type, AgentType) else AgentType(type)
    subscriptions = await _subscriptions(cls, agent_type, skip_class_subscriptions)
    if not skip_direct_message_subscription:
        # The prefix ends in ":" so that it meets no other agent's, as AutoGen's own does.
        subscriptions.append(TypePrefixSubscription(f"{agent_type.type}:", agent_type.type))
    for subscription in subscriptions:
        Rule.of(subscription)  # raises, before anything is known to others
    await runtime.register_factory(agent_type, factory, expected_class=cls)
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
