"""The inbox of one runtime: one subscription for all replies to it.

Each request gets its own reply subject, ``<inbox_prefix>.<nonce>.<token>``, so a message on that subject belongs to
that request only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from nats.aio.msg import Msg
from nats.nuid import NUID

from natsrt.options import Options
from natsrt.transport.connection import Connection, Interest

Receiver = Callable[[Msg], None]
"""Called in the read loop for each message on one reply subject. Must not block, and may raise only `CannotDecode`."""

_POSTED_FOR = 2.0
"""Maximum time to wait for the server's "no responders" to a posted message, in seconds. It normally takes 0.4 ms."""
_POSTED_AT_MOST = 10_000
"""Maximum number of posted messages that are watched at a time. They take a few megabytes."""


class Inbox:
    """The reply subjects of one runtime, each with the receiver of its messages."""

    def __init__(self, connection: Connection, options: Options) -> None:
        self._connection = connection
        self._prefix = options.inbox_prefix
        self._root = ""
        self._counter = 0
        self.receivers: dict[str, Receiver] = {}
        """The receiver of each reply subject. Messages on any other reply subject are ignored."""
        self._posted: deque[tuple[float, str]] = deque()
        self._interest: Interest | None = None

    @property
    def is_open(self) -> bool:
        """True if the inbox is subscribed, so that replies arrive."""
        return self._interest is not None

    async def start(self) -> None:
        self._root = f"{self._prefix}.{NUID().next().decode()}"
        self._interest = await self._connection.subscribe(f"{self._root}.*", self._on_message)

    async def stop(self) -> None:
        """Accept no more replies. Has no effect if stopped."""
        interest, self._interest = self._interest, None
        if interest is not None:
            await self._connection.unsubscribe(interest)

    def subject(self, token: str) -> str:
        """Return the reply subject for ``token``, which must be a valid token of a subject."""
        return f"{self._root}.{token}"

    def new_subject(self, kind: str = "") -> str:
        """Return a reply subject that was not used before. Its token starts with ``kind``."""
        self._counter += 1
        return f"{self._root}.{kind}{self._counter:x}"

    async def post(self, subject: str, body: bytes, lost: Callable[[], None]) -> None:
        """Send a message that is not answered.

        Calls ``lost`` if the server reports within 2 s that there is no subscriber. Raises the same errors as
        `Connection.publish`.
        """
        now = asyncio.get_running_loop().time()
        while self._posted and (self._posted[0][0] < now - _POSTED_FOR or len(self._posted) >= _POSTED_AT_MOST):
            self.receivers.pop(self._posted.popleft()[1], None)
        reply = self.new_subject("p")
        self.receivers[reply] = lambda message: lost() if is_nobody(message) else None
        self._posted.append((now, reply))
        await self._connection.publish(subject, body, reply=reply)

    def _on_message(self, message: Msg) -> None:
        receiver = self.receivers.get(message.subject)
        if receiver is not None:
            receiver(message)


def is_nobody(message: Msg) -> bool:
    """True if a message is the server's report that there is no subscriber ("no responders")."""
    return message.headers is not None and message.headers.get("Status") == "503" and not message.data
