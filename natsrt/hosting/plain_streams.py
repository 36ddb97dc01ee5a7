"""What handlers send to plain NATS clients that want more than one reply: those with the header ``Natsrt-Stream: 1``.

Items are plain messages on the reply subject, and an empty one ends them. Such a client says nothing about how far it
is. So nothing is sent again, and no more is sent than to a client of natsrt that has the largest window and takes
nothing. Whether the client is still there shows in its subscription only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, Final

from natsrt.agents.inbound import Answer, Inbound
from natsrt.agents.streaming import NO_ANSWERS
from natsrt.errors import NobodyToAsk, StreamAbandoned
from natsrt.hosting.stopping import Stopping
from natsrt.transport.bodies import Bodies
from natsrt.transport.connection import Connection
from natsrt.transport.probe import Probe
from natsrt.wire.envelope import TYPE_HEADER
from natsrt.wire.part_messages import MOST_BYTES, MOST_ITEMS, PART_HEADER, PARTS_HEADER
from natsrt.wire.serialization import Serialization

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_LOOK_EVERY: Final = 3.0
"""Seconds between two looks whether the client is there."""


class PlainStream:
    """What one handler sends to a plain client. An `Emitter`."""

    wants_items: bool = True

    def __init__(
        self, inbound: Inbound, items_to: str, connection: Connection, bodies: Bodies, serialization: Serialization
    ) -> None:
        """``items_to`` is the subject on which the client gets the items."""
        self.stopping: Stopping = Stopping(inbound)
        self.all_emitted: bool = False
        self.items_to: str = items_to
        self._connection = connection
        self._bodies = bodies
        self._serialization = serialization
        self._sent = 0
        self._size = 0
        self._looked_at = asyncio.get_running_loop().time()

    async def put(self, item: Any) -> None:
        """Part of `Emitter`."""
        self.stopping.require_caller()
        await self._send(item)

    async def _send(self, item: Any) -> None:
        encoded = self._serialization.encode(item)
        if self._sent >= MOST_ITEMS or self._size + len(encoded.payload) > MOST_BYTES:
            reason = f"a plain client gets {MOST_ITEMS:,} items and {MOST_BYTES:,} bytes at most"
            raise StreamAbandoned(str(self.stopping), reason)
        headers = {PART_HEADER: str(self._sent + 1), TYPE_HEADER: encoded.type_name}
        data = self._bodies.pack_plain(encoded.payload, headers)
        self._sent += 1
        self._size += len(data)
        await self._connection.publish(self.items_to, data, headers=headers)

    async def ask(self, question: Any, reply_type: type[Any] | None) -> Any:
        """Part of `Emitter`. Plain clients cannot be asked."""
        raise NobodyToAsk(str(self.stopping), NO_ANSWERS)

    @property
    def attributes(self) -> str:
        """Part of `Stream`. A plain reply has none."""
        return ""

    def end(self) -> None:
        """Part of `Stream`."""
        self.stopping.end()

    async def ended_with(self, result: Any) -> Answer:
        """Return the message that ends the items. The handler has returned ``result``, which is sent if it is an item
        of its own.
        """
        if not self.all_emitted:
            await self._send(result)
        return Answer(b"", self.headers)

    @property
    def headers(self) -> dict[str, str]:
        """Part of `Stream`."""
        return {PARTS_HEADER: str(self._sent)}

    def awaited(self) -> Iterable[tuple[str, asyncio.Task[Any]]]:
        """Part of `Stream`. Plain clients cannot be asked."""
        return ()

    def reported(self, error: BaseException) -> BaseException:
        """Part of `Stream`."""
        return self.stopping.reported(error)

    def abandon(self) -> None:
        """The client is gone: stop the handler. Has no effect if it has ended, or is being stopped."""
        self.stopping.abandon()

    def is_due(self, now: float) -> bool:
        """True if it is time to look whether the client is there. Counts as a look."""
        if now < self._looked_at + _LOOK_EVERY:
            return False
        self._looked_at = now
        return True

    async def look(self, probe: Probe) -> None:
        """Stop the handler if its client is gone."""
        inbox = self.items_to.rpartition(".")[0]
        if not await probe.listens(self.items_to, patterns=(f"{inbox}.*", f"{inbox}.>") if "." in inbox else ()):
            logger.warning("the plain client that streams from %s is gone: its handler is stopped", self.stopping)
            self.abandon()
