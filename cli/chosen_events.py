"""Events on the command line: by a prefix of topic types, a topic, or a NATS subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autogen_core import TopicId

from natsrt.wire.filters import covers
from natsrt.wire.subjects import Subjects, plain_prefix

from .exits import CommandFailed, Exit
from .naming import topic_id


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events a command is about: those on ``subjects`` whose topic type starts with ``prefix``."""

    subjects: Sequence[str]
    prefix: str = ""

    def subject(self, subjects: Subjects) -> str:
        """One subject that all of them have, perhaps together with other events."""
        return self.subjects[0] if len(self.subjects) == 1 else subjects.everything

    def includes(self, subject: str, topic: TopicId | None) -> bool:
        """Whether an event on ``subject`` is one of them. ``topic`` None: its topic cannot be read."""
        on_it = any(covers(pattern, subject) for pattern in self.subjects)
        return on_it and (topic is None or topic.type.startswith(self.prefix))


_NO_EVENTS = {
    "agent": "calls, which tail does not show: it shows events. For one agent type, see `natsrt agents stats`",
    "natsrt": "messages between runtimes, which tail does not show: it shows events",
}
"""What is sent on subjects that are none of events, by their first token."""


def wanted(text: str, subjects: Subjects) -> Wanted:
    """The events that the argument names: by a prefix of topic types, a topic, or a NATS subject."""
    root = f"{subjects.namespace}." if subjects.namespace else ""
    subject = text.removeprefix(root)
    first, _, rest = subject.partition(".")
    if first in _NO_EVENTS:
        advice = f"topics whose type starts with {subject!r} are on {f'topic.{subject}.>'!r}"
        raise CommandFailed(f"{text!r} is a subject of {_NO_EVENTS[first]}; {advice}", Exit.USAGE)
    if first == "topic":
        return Wanted(_on_subject(text, rest, f"{root}topic."))
    try:
        if "/" in text:
            topic = topic_id(text)
            return Wanted([subjects.topic(topic.type, topic.source)])
        prefix = plain_prefix(text)
        return Wanted([subjects.prefix_filter(prefix).subject], prefix)
    except ValueError as error:
        raise CommandFailed(str(error), Exit.USAGE) from None


def _on_subject(text: str, rest: str, trees: str) -> list[str]:
    """The subjects to subscribe to for one that the user wrote: without a wildcard, also everything below it."""
    tokens = rest.rstrip(".").split(".") if rest else [">"]
    last = len(tokens) - 1
    for index, token in enumerate(tokens):
        valid = token == "*" or (token == ">" and index == last) or (token and not set(token) & set("*> \t\r\n/"))
        if not valid:
            problem = (
                f"{token!r} is no token of a subject; * stands for one token, and > at the end for all that follow"
            )
            raise CommandFailed(f"{text!r} is not a subject: {problem}", Exit.USAGE)
    subject = trees + ".".join(tokens)
    if not {"*", ">"}.isdisjoint(tokens):
        return [subject]
    return [f"{subject}.>"] if rest.endswith(".") else [subject, f"{subject}.>"]
