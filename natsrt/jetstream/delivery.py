"""A message of a stream, as a consumer delivered it: what its reply subject says. Pure values: no I/O."""

from __future__ import annotations

from typing import Final

from nats.aio.msg import Msg

from natsrt.errors import CannotDecode

ACK_PREFIX: Final = "$JS.ACK."
"""The start of the subjects on which deliveries are acknowledged."""
_SHORT: Final = 9
"""Tokens of the form without domain: ``$JS.ACK.<stream>.<consumer>.<attempt>.<sequence>.<n>.<time>.<pending>``."""
_LONG: Final = 11
"""Minimum number of tokens of the form with domain and account hash before the stream. Newer servers may add some at
the end."""
_NANOSECONDS: Final = 1e9


class Delivery:
    """One delivery of a message to a consumer.

    ``stream`` and ``consumer`` are their names. ``sequence`` is the message's sequence in the stream. ``attempt``
    counts the deliveries of the message by the consumer, from 1, with those that did not arrive because a connection or
    a pull ended at that moment; resetting the consumer sets it back to 1. ``before`` is the number of attempts that
    were made before the message was stored once more for a later one; 0 for all other messages. ``first_sequence`` is
    where it was stored first, which is ``sequence`` for all others, and ``stored_at`` is of that moment, too.
    ``stored_at`` is when the stream stored the message, in seconds since the epoch. ``pending`` is the number of
    messages that the consumer has not delivered yet, after this one. ``message`` is the message itself, whose reply
    subject acknowledges the delivery.
    """

    __slots__ = (
        "attempt",
        "before",
        "consumer",
        "first_sequence",
        "message",
        "pending",
        "sequence",
        "stored_at",
        "stream",
    )

    def __init__(self, message: Msg) -> None:
        """Raises `CannotDecode` if the message's reply subject acknowledges no delivery."""
        tokens = message.reply.split(".")
        if len(tokens) == _SHORT:
            at = 2
        elif len(tokens) >= _LONG:
            at = 4
        else:
            raise self._unreadable(message)
        if tokens[0] != "$JS" or tokens[1] != "ACK":
            raise self._unreadable(message)
        try:
            self.stream: str = tokens[at]
            self.consumer: str = tokens[at + 1]
            self.attempt: int = int(tokens[at + 2])
            self.sequence: int = int(tokens[at + 3])
            self.stored_at: float = int(tokens[at + 5]) / _NANOSECONDS
            self.pending: int = int(tokens[at + 6])
        except ValueError:
            raise self._unreadable(message) from None
        self.first_sequence: int = self.sequence
        self.before: int = 0
        self.message: Msg = message

    @property
    def reply(self) -> str:
        """The subject on which it is acknowledged."""
        return self.message.reply

    @property
    def consumer_sequence(self) -> int:
        """The number of this delivery among all of the consumer, from 1; a reset begins with 1 again."""
        tokens = self.message.reply.split(".")
        return int(tokens[6 if len(tokens) == _SHORT else 8])

    def __repr__(self) -> str:
        return (
            f"Delivery(stream={self.stream!r}, consumer={self.consumer!r}, sequence={self.sequence}, "
            f"attempt={self.attempt})"
        )

    @staticmethod
    def _unreadable(message: Msg) -> CannotDecode:
        reason = f"the reply subject {message.reply[:200]!r} acknowledges no delivery"
        return CannotDecode("a message of a stream", reason, message.data)
