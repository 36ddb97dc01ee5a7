"""What a server says in ``-ERR``, and which subscriptions it has refused. Pure values: no I/O.

nats-server closes the connection after most errors, but not after these:

- A refused permission. Its text names the subject.
- ``maximum subscriptions exceeded``. Its text names nothing. `SubscriptionLog` finds out which subscriptions it is
  about.
- A subject that the server does not accept.

So a client must leave it to the server to close the connection.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

import nats.errors

REFUSED_AGAIN: Final = 10.0
"""Seconds until a subscription or a publish that the server refused is tried again."""
_TOO_MANY: Final = "maximum subscriptions exceeded"
_TOO_LARGE: Final = "maximum payload violation"
_CREDENTIALS: Final = (
    "authorization violation",
    "user authentication expired",
    "user authentication revoked",
    "account authentication expired",
)
"""Starts of the texts with which a server ends or refuses a connection because of its credentials."""
_STAYS_OPEN: Final = ("permissions violation", _TOO_MANY, "invalid subject", "invalid publish subject")
"""Starts of the texts after which a server leaves the connection open."""
_VIOLATION = re.compile(
    r"permissions violation for (publish|subscription)\w* to \"?([^\"\s]+)\"?(?: using queue \"([^\"]*)\")?",
    re.IGNORECASE,
)


class Violation(NamedTuple):
    """A refused permission."""

    operation: str
    """``publish to`` or ``subscribe to``."""
    subject: str
    queue: str
    """The queue group; empty for none."""


class ServerError(nats.errors.Error):
    """An error that a server has sent. ``text`` is what it says, without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(f"nats: {text}")

    @property
    def refuses_credentials(self) -> bool:
        """Whether the server does not accept the credentials, or does so no longer."""
        return self.text.lower().startswith(_CREDENTIALS)

    @property
    def ends_connection(self) -> bool:
        """Whether the server closes the connection after this error, or refuses to accept it."""
        return not self.text.lower().startswith(_STAYS_OPEN)

    @property
    def too_many_subscriptions(self) -> bool:
        """Whether the server has refused a subscription because of its limit."""
        return self.text.lower().startswith(_TOO_MANY)

    @property
    def too_large(self) -> bool:
        """Whether the server has refused a message because of its size."""
        return self.text.lower().startswith(_TOO_LARGE)

    @property
    def kind(self) -> str:
        """Equal for errors that are logged as one: a refused permission on subjects that differ in their last token."""
        violation = self.violation
        return self.text if violation is None else f"{violation.operation} {violation.subject.rpartition('.')[0]}"

    @property
    def violation(self) -> Violation | None:
        """The permission that the server refuses; None if it is another error."""
        match = _VIOLATION.search(self.text)
        if match is None:
            return None
        operation = "publish to" if match.group(1).lower() == "publish" else "subscribe to"
        return Violation(operation, match.group(2), match.group(3) or "")


class SubscriptionLog:
    """The subscriptions of one connection, in the order in which they were sent.

    The server processes them in that order, and says for each refused one only that there are too many. Its answer to a
    PING shows how many of the subscriptions that were sent before the PING it has refused. These are known then: as
    long as no subscription ends, the server refuses all after the first one that it refuses.
    """

    def __init__(self) -> None:
        self._held: set[int] = set()
        """The ids of the subscriptions that the server is known to have."""
        self._sent: list[tuple[int, bool]] = []
        """Ids of subscriptions that were begun (True) or ended (False), and are not answered: written ones first."""
        self._answered = 0
        """Number of entries that were removed from the start of `_sent`."""
        self._written = 0
        """Number of entries, of all that there ever were, that are written to the connection."""
        self._pings: deque[int] = deque()
        """For each PING on its way: the number of entries that the server processes before it."""
        self._refusals = 0

    def restart(self, sids: Iterable[int]) -> None:
        """There is a new connection. The subscriptions ``sids`` are written to it, in this order."""
        self._held.clear()
        self._sent = [(sid, True) for sid in sids]
        self._answered = 0
        self._written = len(self._sent)
        self._pings.clear()
        self._refusals = 0

    def begun(self, sid: int) -> None:
        """A subscription is queued."""
        self._sent.append((sid, True))

    def ended(self, sid: int) -> None:
        """The end of a subscription is queued."""
        self._sent.append((sid, False))

    def refused(self) -> None:
        """The server has refused one more subscription."""
        self._refusals += 1

    def written(self) -> None:
        """All that was queued is written to the connection."""
        self._written = self._answered + len(self._sent)

    def ping(self) -> None:
        """A PING is written. It may overtake what is queued."""
        self._pings.append(self._written)

    def pong(self) -> list[int]:
        """The server has answered the first PING. Returns the ids of the subscriptions that are known to be refused."""
        if not self._pings:
            return []
        count = self._pings.popleft() - self._answered
        if count <= 0:
            return []
        sent, self._sent = self._sent[:count], self._sent[count:]
        self._answered += count
        refusals, self._refusals = self._refusals, 0
        if refusals == 0:
            _process(self._held, sent, len(sent))
            return []
        # The more room there is, the fewer are refused: find the room for which as many are refused as the server said.
        room = bisect_left(range(len(sent)), -refusals, key=lambda room: -_process(set(self._held), sent, room)[0])
        return _process(self._held, sent, room)[1]


def _process(held: set[int], sent: list[tuple[int, bool]], room: int) -> tuple[int, list[int]]:
    """Change ``held`` as the server does that has room for ``room`` more subscriptions.

    Returns the number of refusals, and the ids of the refused subscriptions. A repeated subscription can be refused
    although the server has it.
    """
    refusals, refused = 0, []
    for sid, begins in sent:
        if not begins:
            room += sid in held
            held.discard(sid)
        elif room <= 0:
            refusals += 1
            if sid not in held:
                refused.append(sid)
        elif sid not in held:
            held.add(sid)
            room -= 1
    return refusals, refused
