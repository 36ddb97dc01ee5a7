"""A permission of a user of the server, and how the subjects of two compare. Pure values, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

Operation = Literal["publish", "subscribe"]

PUBLISH: Final = "publish"
SUBSCRIBE: Final = "subscribe"


@dataclass(frozen=True, slots=True)
class Grant:
    """A permission: to publish or to subscribe to a subject, which may have wildcards, and what for."""

    operation: Operation
    subject: str
    why: str


def covers(pattern: str, subject: str) -> bool:
    """Whether ``pattern`` matches all that ``subject``, which may have wildcards too, matches."""
    wanted, given = pattern.split("."), subject.split(".")
    for index, token in enumerate(wanted):
        if token == ">":
            return len(given) > index
        if index >= len(given) or given[index] == ">" or (token != "*" and token != given[index]):
            return False
    return len(wanted) == len(given)


def included(own: Iterable[Grant], operation: Operation, subject: str) -> bool:
    """Whether one of the permissions ``own`` includes an operation on all that ``subject`` matches."""
    return any(grant.operation == operation and covers(grant.subject, subject) for grant in own)
