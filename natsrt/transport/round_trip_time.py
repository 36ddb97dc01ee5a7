"""How long the server takes to answer, and by how much that makes a wait for an answer longer. No I/O.

Rules:

1. Every wait that decides whether something is alive, owned or there is a number of seconds that is enough on a link
   that takes no time, plus `RoundTripTime.allowance`. The number is the floor of the wait.
2. The allowance covers nearly every answer, and not all. An answer that is late says nothing: the question is asked
   again, and only an answer decides, or ``lost_after`` seconds without one.
3. Only the way to the server of this runtime is measured. The link of another worker may be far longer, so rule 2
   applies to every question to a worker, however short the own link is.

The estimate is that of TCP's retransmission timer (RFC 6298).
"""

from __future__ import annotations

_MOST = 5.0
"""Maximum allowance in seconds. Samples above it are those of a blocked event loop or a server that hangs, not of a
link."""


class RoundTripTime:
    """The round trip time of one connection."""

    def __init__(self) -> None:
        self.smoothed: float = 0.0
        """Seconds that a round trip takes, as a moving average; 0 before the first."""
        self._deviation = 0.0
        self.allowance: float = 0.0
        """Seconds to add to a wait for an answer: the average and four times its deviation, 5 at most; 0 before the
        first round trip."""

    def begin(self, seconds: float) -> None:
        """Start anew with the first round trip of a connection, which took ``seconds``."""
        self.smoothed, self._deviation = seconds, seconds / 2
        self._allow()

    def measured(self, seconds: float) -> None:
        """Take in another round trip."""
        self._deviation += (abs(seconds - self.smoothed) - self._deviation) / 4
        self.smoothed += (seconds - self.smoothed) / 8
        self._allow()

    def _allow(self) -> None:
        self.allowance = min(self.smoothed + 4 * self._deviation, _MOST)
