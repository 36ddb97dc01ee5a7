"""Durable topics: events that JetStream stores before ``publish_message`` returns.

They are named by patterns, in the setting ``durable``. All patterns with one retention policy share a stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from natsrt.errors import ConfigurationError
from natsrt.wire.ranges import seconds_problem, whole_problem
from natsrt.wire.subjects import plain_prefix

T = TypeVar("T")

_SETTING: Final = "durable"
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,100}")
_STORAGES: Final = ("file", "memory")
_DISCARDS: Final = ("old", "new")
_MOST_REPLICAS: Final = 5
DURABLE_FIELDS: Final = ("name", "max_age", "max_bytes", "max_messages", "storage", "replicas", "discard")
"""The arguments of `DurableTopics` beside its patterns."""
MONTH: Final = 30 * 86400.0
"""Seconds in thirty days."""
_NATSRT: Final = "natsrt."
_OWN: Final = {"natsrt.task.": "tasks", "natsrt.reminder.": "reminders"}
"""The patterns that natsrt declares itself, each with the name of its topics."""


def is_prefix(pattern: str) -> bool:
    """True if a pattern of durable topics is a prefix; False if it is one topic type."""
    return pattern.endswith((".", ":"))


def covers(pattern: str, topic_type: str) -> bool:
    """True if topics of this type are durable by ``pattern``."""
    return topic_type.startswith(pattern) if is_prefix(pattern) else topic_type == pattern


def overlaps(patterns: Iterable[tuple[str, T]]) -> Iterator[tuple[tuple[str, T], tuple[str, T]]]:
    """The pairs of patterns that overlap: a topic type can be durable by both. The wider one comes first.

    Each pattern has a companion, which is not looked at. In the order of texts, all that a prefix covers follows it.
    """
    wider: list[tuple[str, T]] = []
    for one in sorted(patterns, key=lambda one: one[0]):
        while wider and not covers(wider[-1][0], one[0]):
            wider.pop()
        for other in wider:
            yield other, one
        wider.append(one)


def _refuse_overlapping(patterns: Iterable[str]) -> None:
    for (one, _), (other, _) in overlaps((pattern, None) for pattern in patterns):
        raise ConfigurationError(_SETTING, f"{one!r} and {other!r} overlap; give one of them")


@dataclass(frozen=True, slots=True, init=False)
class DurableTopics:
    """Topics whose events JetStream stores, and for how long it keeps them.

    Args:
        patterns: Topic types (``"audit.log"``), and prefixes of topic types that end in ``.`` or ``:``
            (``"orders."``: all types that start so, but not ``orders`` itself).
        name: The last part of the stream's name: ``natsrt_events_<name>``. Give one to topics with another policy than
            those without a name. None: the stream is ``natsrt_events``.
        max_age: Seconds for which an event is kept, handled or not; from 1 to 9,223,372,036. None: without a limit.
        max_bytes: Size of the stream in bytes, at most; up to 2**63 - 1. None: without a limit.
        max_messages: Number of events in the stream, at most; up to 2**63 - 1. None: without a limit.
        storage: ``file`` or ``memory``. What is in memory is lost when its servers restart.
        replicas: Copies in a JetStream cluster, 1 to 5. Used when the stream is made. None: the setting
            ``registry_replicas``.
        discard: What happens at ``max_bytes`` or ``max_messages``. ``new``: ``publish_message`` raises `JetStreamFull`.
            ``old``: the oldest events are deleted, whether they were handled or not. None: ``new`` with one of these
            limits, else ``old``. The server cannot delay messages of a stream with ``new``.

    Raises:
        ConfigurationError: A value cannot be used, or patterns overlap; or the topics are natsrt's own: their types
            start with ``natsrt.``, or the name is ``tasks`` or ``reminders``.
    """

    patterns: tuple[str, ...]
    name: str | None
    max_age: float | None
    max_bytes: int | None
    max_messages: int | None
    storage: Literal["file", "memory"]
    replicas: int | None
    discard: Literal["old", "new"]

    def __init__(
        self,
        *patterns: str,
        name: str | None = None,
        max_age: float | None = MONTH,
        max_bytes: int | None = None,
        max_messages: int | None = None,
        storage: Literal["file", "memory"] = "file",
        replicas: int | None = None,
        discard: Literal["old", "new"] | None = None,
    ) -> None:
        if not patterns:
            raise ConfigurationError(_SETTING, "DurableTopics needs at least one topic type or prefix")
        for pattern in patterns:
            _check_pattern(pattern)
        patterns = tuple(dict.fromkeys(patterns))
        _refuse_overlapping(patterns)
        if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise ConfigurationError(
                _SETTING, f"the name {name!r:.60} must be letters, digits, - and _, at most 100 of them"
            )
        _refuse_own(patterns, name)
        for setting, problem in (
            ("max_age", seconds_problem(max_age, 1, or_none=True)),
            ("max_bytes", whole_problem(max_bytes, or_none=True)),
            ("max_messages", whole_problem(max_messages, or_none=True)),
            ("replicas", whole_problem(replicas, _MOST_REPLICAS, or_none=True)),
        ):
            if problem:
                raise ConfigurationError(_SETTING, f"{setting} {problem}")
        if discard is None:
            discard = "old" if max_bytes is None and max_messages is None else "new"
        for setting, choice, choices in (("storage", storage, _STORAGES), ("discard", discard, _DISCARDS)):
            if choice not in choices:
                raise ConfigurationError(_SETTING, f"{setting} must be {' or '.join(choices)}, not {choice!r:.60}")
        values = (patterns, name, max_age, max_bytes, max_messages, storage, replicas, discard)
        for field, given in zip(("patterns", *DURABLE_FIELDS), values, strict=True):
            object.__setattr__(self, field, given)

    @property
    def policy(self) -> Mapping[str, Any]:
        """What all topics of one stream have in common: everything but the patterns and the name."""
        return {field: getattr(self, field) for field in DURABLE_FIELDS if field != "name"}

    @property
    def schedules(self) -> bool:
        """True if the stream can publish messages later. nats-server has no schedules with ``discard: new``."""
        return self.discard == "old"

    def with_patterns(self, patterns: Iterable[str]) -> DurableTopics:
        """The same policy for these patterns. Raises `ConfigurationError` as the constructor does."""
        return DurableTopics(*patterns, name=self.name, **self.policy)


def merged(given: Iterable[DurableTopics]) -> tuple[DurableTopics, ...]:
    """The topics of each stream, in the order of the streams.

    Raises `ConfigurationError` if two that have the same name differ in another thing than patterns, or overlap, and if
    natsrt's own are among them.
    """
    streams: dict[str | None, list[DurableTopics]] = {}
    for topics in given:
        if topics.name in _OWN.values():
            raise ConfigurationError(_SETTING, f"{topics.patterns[0]!r} is natsrt's own, and is durable without it")
        streams.setdefault(topics.name, []).append(topics)
        present = streams[topics.name][0]
        for setting, value in present.policy.items():
            if topics.policy[setting] != value:
                raise ConfigurationError(
                    _SETTING,
                    f"{', '.join(map(repr, present.patterns))} and {', '.join(map(repr, topics.patterns))} have the "
                    f"same stream, but {setting} is {value} and {topics.policy[setting]}; give one of them a name",
                )
    found = [
        streams[name][0].with_patterns(pattern for topics in streams[name] for pattern in topics.patterns)
        for name in sorted(streams, key=lambda name: name or "")
    ]
    _refuse_overlapping(pattern for topics in found for pattern in topics.patterns)
    return tuple(found)


def _check_pattern(pattern: object) -> None:
    if not isinstance(pattern, str):
        raise ConfigurationError(_SETTING, f"a pattern must be a topic type or a prefix, not {pattern!r:.60}")
    if not pattern:
        raise ConfigurationError(_SETTING, "a pattern must be a topic type or a prefix, not an empty text")
    plain = pattern.rstrip("*>")
    if plain != pattern:
        meant = plain if is_prefix(plain) or not plain else f"{plain}."
        right = f"write {meant!r} for all topic types that start with it" if meant else "name the topics"
        raise ConfigurationError(_SETTING, f"the pattern {pattern!r:.80} has a wildcard; {right}")
    try:
        plain_prefix(pattern)
    except ValueError as error:
        raise ConfigurationError(_SETTING, str(error)) from None


def _refuse_own(patterns: tuple[str, ...], name: str | None) -> None:
    """Raise `ConfigurationError` for patterns below ``natsrt.``, and for names of natsrt's own topics, but not for what
    natsrt declares itself."""
    if name is not None and [_OWN.get(pattern) for pattern in patterns] == [name]:
        return
    for pattern in patterns:
        if pattern.startswith(_NATSRT):
            problem = (
                f"{pattern!r:.80} is below {_NATSRT!r}, where natsrt's own topics are; give these topics another type"
            )
            raise ConfigurationError(_SETTING, problem)
    if name in _OWN.values():
        raise ConfigurationError(_SETTING, f"the name {name!r} is that of natsrt's own topics; give these another one")
