"""Core NATS's copies of events on durable topics.

The server gives such an event to the topic's stream and to every subscriber of the topic. Agent types get it from the
stream, so they handle no copy that comes over a subscription. A type is not subscribed to topics that are all durable;
where a subscription matches other topics too, the copies are dropped here.
"""

from __future__ import annotations

from natsrt.durable_types import covers, is_prefix
from natsrt.jetstream.registry.entries import Rule
from natsrt.jetstream.registry.registry import Registry
from natsrt.jetstream.streams import topic_filter
from natsrt.wire.subjects import Subjects


class CoreCopies:
    """Recognises these copies, by the durable topics in the registry's view."""

    def __init__(self, subjects: Subjects, registry: Registry) -> None:
        self._subjects = subjects
        self._registry = registry
        self.exist: bool = False
        """True if there are durable topics."""
        self._types: frozenset[str] = frozenset()
        """The subjects of durable topic types, without their sources."""
        self._prefixes: tuple[str, ...] = ()
        """The starts of the subjects of all topic types with a durable prefix."""

    def update(self) -> None:
        """Follow the registry's view. Called whenever its durable topics have changed."""
        patterns = [pattern for entry in self._registry.view.durable.values() for pattern in entry.patterns]
        self._types = frozenset(
            topic_filter(self._subjects, pattern).removesuffix(".*") for pattern in patterns if not is_prefix(pattern)
        )
        self._prefixes = tuple(
            topic_filter(self._subjects, pattern).removesuffix("*.>") for pattern in patterns if is_prefix(pattern)
        )
        self.exist = bool(patterns)

    def is_one(self, subject: str) -> bool:
        """True if an event that arrived on ``subject`` comes from a stream too."""
        topic_type = subject.rpartition(".")[0]
        return topic_type in self._types or topic_type.startswith(self._prefixes)

    def is_durable(self, topic_type: str) -> bool:
        """True if topics of this type are durable."""
        return self._registry.view.durable_stream(topic_type) is not None

    def take_all(self, rule: Rule) -> bool:
        """True if all topics of an ordinary subscription are durable."""
        if rule.kind == "type":
            return self.is_durable(rule.pattern)
        return self.exist and any(
            is_prefix(pattern) and covers(pattern, rule.pattern)
            for entry in self._registry.view.durable.values()
            for pattern in entry.patterns
        )
