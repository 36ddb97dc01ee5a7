"""When a consumer's next pull is due, and what the statuses of pulls mean. No I/O, and no clock of its own.

A pull asks the server for a number of messages and bytes. It stays open until they have come, or until a status ends
it. What the open pulls may still bring is `PullPlan.outstanding`; a pull is due when that is half of what may be
outstanding. Open pulls are served in turns, so only their sum is counted.

A generation is all pulls with the same reply subject. A new one begins when it is not certain any more what the open
pulls will bring; what old ones still bring is not counted.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

_TOO_LARGE: Final = "message size exceeds maxbytes"
_MOVED: Final = ("leadership change", "server shutdown")
"""Statuses 409 with which every open pull ends, although the consumer is as it was."""
_TIGHT: Final = 2
"""A pull is likely to end by its bytes if they are fewer than this many times those of its messages. Their size is that
of the last one, without its headers."""
_SILENT_TICKS: Final = 2
"""Ticks without anything heard after which two heartbeats are missing."""
_FIRST_DELAY: Final = 0.1
"""Seconds before the second of several generations that bring nothing; the time doubles from one to the next."""
_LONGEST_DELAY: Final = 5.0
"""Maximum of that time in seconds."""


class Verdict(enum.Enum):
    """What a status means for the generation that it came to."""

    GO_ON = "go on"
    """Nothing, except that another pull may be due."""
    RENEW = "renew"
    """Its pulls are gone, or may be: a new generation is due."""
    CHECK = "check"
    """The server refuses pulls: the consumer must be looked at, and then a new generation is due."""


class Ask(NamedTuple):
    """A pull that is due: for ``batch`` messages with ``max_bytes`` bytes together; None: of any size."""

    batch: int
    max_bytes: int | None


class PullPlan:
    """Plans the pulls of one consumer.

    ``batch``: messages that may be outstanding. ``max_bytes``: bytes that one pull may bring.
    """

    def __init__(self, batch: int, max_bytes: int) -> None:
        self._batch = batch
        self._half = batch // 2
        self._max_bytes = max_bytes
        self._heard = False
        self._silent = 0
        self._alone = False
        """True if the next message is larger than the bytes of the last pull. It is pulled alone, without a limit."""
        self._last: Ask | None = None
        """The last pull; None if it is known what became of it."""
        self.tight: bool = False
        """True if the bytes of the last pull, and not its number of messages, are likely to end it."""
        self._came = True
        """True if a message has come since the last pull."""
        self._in_vain = 0
        """Number of generations before this one, one after the other, that brought nothing."""
        self.brought: bool = True
        """True if the present generation brought a message or a heartbeat."""
        self.outstanding: int = 0
        """Messages that the open pulls of this generation may still bring."""
        self.received: int = 0
        """Messages that have come in all generations."""

    @property
    def hungry(self) -> bool:
        """Whether a pull is due, if the receiver has room."""
        return self.outstanding <= self._half

    @property
    def in_vain(self) -> int:
        """Number of generations before the present one, one after the other, that brought nothing at all."""
        return self._in_vain

    def begin(self) -> float:
        """Begin a new generation. Returns the seconds to wait before its first pull."""
        self._in_vain = 0 if self.brought else self._in_vain + 1
        self.brought = False
        self._heard = False
        self._silent = 0
        self.outstanding = 0
        if self._in_vain == 0:
            return 0.0
        return float(min(_FIRST_DELAY * 2 ** min(self._in_vain - 1, 10), _LONGEST_DELAY))

    def ask(self, messages: int, size: int) -> Ask | None:
        """The pull that is due, which counts as sent; None if none is.

        ``messages``: how many may be outstanding, beside the plan's own limit. ``size``: bytes that the receiver has
        room for.
        """
        most = min(self._batch, messages)
        if most < 1 or size < 1 or self.outstanding > most // 2:
            return None
        if self._alone:
            if self.outstanding:
                return None
            ask = Ask(1, None)
        else:
            ask = Ask(most - self.outstanding, min(self._max_bytes, size))
        self._last = ask
        self.outstanding += ask.batch
        self._came = False
        return ask

    def message(self, size: int = 0) -> None:
        """A message of so many bytes has come to this generation."""
        last = self._last
        self.tight = last is not None and last.max_bytes is not None and last.max_bytes < _TIGHT * size * last.batch
        self._heard = self._came = self.brought = True
        self._alone = False
        self.received += 1
        if self.outstanding:
            self.outstanding -= 1

    def status(self, code: str, text: str, pending: int | None) -> Verdict:
        """A status has come to this generation. ``pending`` is how many messages its pull did not bring; None: not
        said."""
        self._heard = True
        if code == "100":
            self.brought = True
            return Verdict.GO_ON
        text = text.lower()
        if code == "409" and text.startswith(_MOVED):
            return Verdict.RENEW
        if code == "423":  # another client is the pinned one
            return Verdict.RENEW
        if pending is None:  # of a pull that the server refused
            return Verdict.RENEW if code in ("404", "408") else Verdict.CHECK
        self.brought = True
        self.outstanding = max(0, self.outstanding - pending)
        if text.startswith(_TOO_LARGE) and not self._came:
            self._alone = True
        return Verdict.GO_ON

    def missed_end(self) -> bool:
        """Call it when no message has come for a moment although the consumer has more of them.

        Returns True if another pull may be due: the server ends a pull without a status when its bytes are used up
        exactly. At most once for each pull.
        """
        if not (self.tight and self.outstanding):
            return False
        self.tight, self._last = False, None
        self.outstanding = 0
        return True

    def tick(self) -> bool:
        """Call it once in the time between two heartbeats. Returns True if two heartbeats are missing.

        Ticks are counted, not seconds, so a time in which this process did not run is one tick.
        """
        self._silent = 0 if self._heard or not self.outstanding else self._silent + 1
        self._heard = False
        return self._silent >= _SILENT_TICKS
