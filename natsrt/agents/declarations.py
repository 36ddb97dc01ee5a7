"""The subscriptions that this runtime added, by id, by rule and by agent type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autogen_core import Subscription, TypePrefixSubscription, TypeSubscription

from natsrt.jetstream.registry.entries import Rule, SubscriptionEntry
from natsrt.jetstream.registry.registry import RegistryListener
from natsrt.wire.subjects import Subjects

_EQUAL_BY_RULE = (TypeSubscription.__eq__, TypePrefixSubscription.__eq__)
"""AutoGen's comparisons. They return True for equal ids and for equal rules."""


class Declarations(RegistryListener):
    """The subscriptions of one runtime, in the order in which they were added."""

    def __init__(self, subjects: Subjects) -> None:
        self._subjects = subjects
        self._by_id: dict[str, Subscription] = {}
        self._rules: dict[Rule, str] = {}
        self._by_type: dict[str, dict[str, Subscription]] = {}
        self._custom: dict[str, dict[str, Subscription]] = {}
        """Subscriptions of custom classes, which only this process can evaluate, by agent type and rule digest."""
        self._special: dict[str, dict[str, Subscription]] = {}
        """Subscriptions whose ``==`` may compare more than the rule, by agent type and id."""
        self.unowned: dict[str, SubscriptionEntry] = {}
        """The entries of subscriptions that were stored while this runtime did not host the type, by their keys in the
        registry. They remain there after a stop."""

    def __iter__(self) -> Iterator[Subscription]:
        return iter(list(self._by_id.values()))

    def add(self, subscription: Subscription) -> None:
        """Add a subscription.

        Raises ValueError if an equal one was added before (equal by id, by rule, or by ``==``), or if no NATS subject
        can express it.
        """
        rule = Rule.of(subscription)
        rule.subject(self._subjects)
        is_special = rule.kind == "custom" or type(subscription).__eq__ not in _EQUAL_BY_RULE
        of_type, special = self._by_type.setdefault(rule.agent_type, {}), self._special.setdefault(rule.agent_type, {})
        asked = (of_type if is_special else special).values()
        if subscription.id in self._by_id or rule in self._rules or any(other == subscription for other in asked):
            raise ValueError("Subscription already exists")
        self._by_id[subscription.id] = of_type[subscription.id] = subscription
        self._rules[rule] = subscription.id
        if is_special:
            special[subscription.id] = subscription
        if rule.kind == "custom":
            self._custom.setdefault(rule.agent_type, {})[rule.digest] = subscription

    def find(self, subscription_id: str) -> Subscription | None:
        return self._by_id.get(subscription_id)

    def remove(self, subscription: Subscription) -> None:
        rule = Rule.of(subscription)
        del self._by_id[subscription.id], self._rules[rule], self._by_type[rule.agent_type][subscription.id]
        self._special[rule.agent_type].pop(subscription.id, None)
        self._custom.get(rule.agent_type, {}).pop(rule.digest, None)

    def subscription_removed(self, entry: SubscriptionEntry) -> None:
        """Called when another runtime removed a subscription that this one had added without hosting the type."""
        self.unowned.pop(entry.key, None)
        subscription = self._by_id.get(entry.subscription_id)
        if subscription is not None:
            self.remove(subscription)

    def of(self, agent_type: str) -> Sequence[Subscription]:
        """Return the subscriptions of one agent type."""
        return list(self._by_type.get(agent_type, {}).values())

    def rules(self, agent_type: str) -> Iterator[Rule]:
        """Yield the rules of the subscriptions of one agent type."""
        return map(Rule.of, self._by_type.get(agent_type, {}).values())

    def custom(self, agent_type: str) -> Sequence[Subscription]:
        """Return the subscriptions of one agent type that have a custom class, in the same order in all processes."""
        ranked = self._custom.get(agent_type, {})
        return [ranked[digest] for digest in sorted(ranked)]
