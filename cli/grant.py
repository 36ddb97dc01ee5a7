"""A permission of a user of the server. Pure values, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from natsrt.wire.filters import covers

Operation = Literal["publish", "subscribe"]

PUBLISH: Final = "publish"
SUBSCRIBE: Final = "subscribe"


@dataclass(frozen=True, slots=True)
class Grant:
    """A permission: to publish or to subscribe to a subject, which may have wildcards, and what for."""

    operation: Operation
    subject: str
    why: str


def included(own: Iterable[Grant], operation: str, subject: str) -> bool:
    """Whether one of the permissions ``own`` includes an operation on all that ``subject`` matches."""
    return any(grant.operation == operation and covers(grant.subject, subject) for grant in own)
