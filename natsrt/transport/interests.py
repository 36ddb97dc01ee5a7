"""Subscriptions that outlive their clients, and what becomes of those that the server refuses."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Iterator

from nats.aio.subscription import Subscription as NatsSubscription

from natsrt.errors import PermissionDenied, SubscriptionRefused
from natsrt.transport.client import Ordered
from natsrt.transport.refusals import REFUSED_AGAIN, ServerError
from natsrt.transport.tls import TlsFailure

logger: logging.Logger = logging.getLogger("natsrt.connection")

_SAID_AGAIN_AFTER = 60.0
"""Seconds after which an error of the server is logged again if it comes again."""
_SAID_AT_MOST = 1000
"""Number of errors for which the time of their last log line is kept."""

Refusal = PermissionDenied | SubscriptionRefused
"""The error for a subscription, or a publish, that the server refused."""


class Interest:
    """A subscription that outlives its client: `Connection` repeats it on every new client."""

    __slots__ = ("current", "future", "optional", "queue", "refusal", "subject")

    def __init__(self, subject: str, queue: str, future: Ordered, optional: bool = False) -> None:
        self.subject: str = subject
        self.queue: str = queue
        self.future: Ordered = future
        self.optional: bool = optional
        """Whether the runtime works without it."""
        self.current: NatsSubscription | None = None
        self.refusal: Refusal | None = None
        """Why the server refuses it; None if it does not, or if that is not known yet."""

    def check(self) -> None:
        """Raise `PermissionDenied` or `SubscriptionRefused` if the server refuses it.

        That is certain after a `Connection.barrier`.
        """
        if self.refusal is not None:
            raise self.refusal


class Interests:
    """The subscriptions of one connection, and those of them that the server refuses."""

    def __init__(self) -> None:
        self._all: dict[Interest, None] = {}
        self._refused: dict[Interest, None] = {}
        self._refused_at = -math.inf
        self.ended: int = 0
        """Number of subscriptions that were ended, so that the server has room for others."""

    def __contains__(self, interest: Interest) -> bool:
        return interest in self._all

    def __iter__(self) -> Iterator[Interest]:
        return iter(list(self._all))

    def add(self, interest: Interest) -> None:
        self._all[interest] = None

    def remove(self, interest: Interest) -> bool:
        """Returns False if it was removed before."""
        if self._all.pop(interest, self) is self:
            return False
        self._refused.pop(interest, None)
        self.ended += interest.refusal is None
        return True

    def clear(self) -> None:
        self._all.clear()
        self._refused.clear()

    @property
    def refused(self) -> bool:
        """Whether the server refuses any."""
        return bool(self._refused)

    @property
    def refusals(self) -> list[Refusal]:
        """The errors of those that the server refuses, except optional ones."""
        return [refused.refusal for refused in self._refused if refused.refusal is not None and not refused.optional]

    def refuse(self, interests: Iterable[Interest], refusal: Callable[[Interest], Refusal]) -> None:
        """The server refuses ``interests``."""
        for interest in interests:
            interest.refusal = refusal(interest)
            self._refused[interest] = None
            self._refused_at = asyncio.get_running_loop().time()

    def accept_all(self) -> list[Interest]:
        """None is known to be refused any more. Returns those that were."""
        refused = list(self._refused)
        self._refused.clear()
        for interest in refused:
            interest.refusal = None
        return refused

    def take_due(self) -> list[Interest]:
        """Those that the server has refused some seconds ago, to be tried again. They count as accepted from now on."""
        due = asyncio.get_running_loop().time() > self._refused_at + REFUSED_AGAIN
        return self.accept_all() if due else []


class ServerLog:
    """Logs what servers say, each error once in a while however often it comes."""

    def __init__(self) -> None:
        self._logged_at: dict[str, float] = {}

    def log(self, error: ServerError | TlsFailure, text: str) -> None:
        """Log ``text`` as a warning, unless that was done a short time ago for an error of this kind."""
        now = asyncio.get_running_loop().time()
        again = now - self._logged_at.get(error.kind, -math.inf) < _SAID_AGAIN_AFTER
        logger.log(logging.DEBUG if again else logging.WARNING, "%s", text)
        if not again:
            if len(self._logged_at) >= _SAID_AT_MOST:
                self._logged_at.clear()
            self._logged_at[error.kind] = now
