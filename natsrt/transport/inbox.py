"""The inbox of one runtime: one subscription for all replies to it.

Each request gets its own reply subject, ``<inbox_prefix>.<nonce>.<token>``, so a message on that subject belongs to
that request only.

Tokens are random. Whoever may call an agent can name any reply subject, and its worker then publishes there with its
own permissions. So a user that could guess the token of another runtime's request could have a worker answer it.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from hashlib import blake2b

from nats.aio.msg import Msg
from nats.nuid import NUID

from natsrt.options import Options
from natsrt.transport.connection import Connection, Interest

Receiver = Callable[[Msg], None]
"""Called in the read loop for each message on one reply subject. Must not block, and may raise only `CannotDecode`."""

PLAIN_REQUEST = "r"
"""The kind of the reply subjects of plain requests. No reply subject of another kind begins with this letter."""
_POSTED_FOR = 10.0
"""Maximum time to wait for the server's "no responders" to a posted message, in seconds. It takes a round trip, and
later ones are not waited for if many messages are posted."""
_TOKEN_BYTES = 12
"""Random bytes in a token: 96 bits cannot be guessed."""
_TOKENS_AT_ONCE = 256
"""Tokens that are drawn from the operating system at once. A system call for each would cost more than the rest."""
_POSTED_AT_MOST = 10_000
"""Maximum number of posted messages that are watched at a time. They take a few megabytes besides their data."""


class Inbox:
    """The reply subjects of one runtime, each with the receiver of its messages."""

    def __init__(self, connection: Connection, options: Options) -> None:
        self._connection = connection
        self._prefix = options.inbox_prefix
        self._max_posted_bytes = options.max_pending_bytes
        self.root: str = f"{self._prefix}.{NUID().next().decode()}"
        """The start of all reply subjects, without the last dot."""
        self._secret = os.urandom(_TOKEN_BYTES)
        self._random: list[str] = []
        """Random tokens that were not used yet."""
        self.receivers: dict[str, Receiver] = {}
        """The receiver of each reply subject. Messages on any other reply subject are ignored."""
        self._posted: deque[tuple[float, str, int]] = deque()
        """When each posted message was sent, its reply subject, and its size in bytes; the oldest first."""
        self._posted_bytes = 0
        self._interest: Interest | None = None

    @property
    def is_open(self) -> bool:
        """True if the inbox is subscribed, so that replies arrive."""
        return self._interest is not None

    async def start(self) -> None:
        self._interest = await self._connection.subscribe(f"{self.root}.*", self._on_message)

    async def stop(self) -> None:
        """Accept no more replies. Has no effect if stopped."""
        interest, self._interest = self._interest, None
        if interest is not None:
            await self._connection.unsubscribe(interest)

    def subject(self, name: str) -> str:
        """Return the reply subject with this name: always the same one in this inbox, and a secret of it.

        ``name`` must be a valid token of a subject.
        """
        secret = blake2b(name.encode(), digest_size=_TOKEN_BYTES, key=self._secret).hexdigest()
        return f"{self.root}.{name}-{secret}"

    def new_subject(self, kind: str = "") -> str:
        """Return a reply subject that was not used before. Its token starts with ``kind``."""
        return f"{self.root}.{kind}{self.new_token()}"

    def new_token(self) -> str:
        """Return a random text of hex digits that was not used before, and cannot be guessed."""
        if not self._random:
            self._random = os.urandom(_TOKEN_BYTES * _TOKENS_AT_ONCE).hex(" ", _TOKEN_BYTES).split()
        return self._random.pop()

    async def post(self, subject: str, body: bytes, lost: Callable[[], None]) -> None:
        """Send a message that is not answered.

        Calls ``lost`` if the server reports within 10 s that there is no subscriber. Only the last 10,000 messages are
        watched, and at most ``max_pending_bytes`` of them. Raises the same errors as `Connection.publish`.
        """
        now = asyncio.get_running_loop().time()
        size = len(body)
        while self._posted and (
            self._posted[0][0] < now - _POSTED_FOR
            or len(self._posted) >= _POSTED_AT_MOST
            or self._posted_bytes + size > self._max_posted_bytes
        ):
            self._forget_oldest()
        reply = self.new_subject("p")
        self.receivers[reply] = lambda message: lost() if is_nobody(message) else None
        self._posted.append((now, reply, size))
        self._posted_bytes += size
        await self._connection.publish(subject, body, reply=reply)

    @property
    def posted(self) -> int:
        """Number of posted messages for which the server may still report that there is no subscriber."""
        now = asyncio.get_running_loop().time()
        while self._posted and self._posted[0][0] < now - _POSTED_FOR:
            self._forget_oldest()
        return len(self._posted)

    def forget_posted(self) -> None:
        """Watch the posted messages no longer, because the server has processed all of them."""
        while self._posted:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, reply, size = self._posted.popleft()
        self._posted_bytes -= size
        self.receivers.pop(reply, None)

    def _on_message(self, message: Msg) -> None:
        receiver = self.receivers.get(message.subject)
        if receiver is not None:
            receiver(message)


def is_nobody(message: Msg) -> bool:
    """True if a message is the server's report that there is no subscriber ("no responders")."""
    return message.headers is not None and message.headers.get("Status") == "503" and not message.data
