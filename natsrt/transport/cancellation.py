"""Cancellation tokens that reach over processes.

A token gets an id when it is first sent; the id travels as ``cancelid`` with every message that carries the token.
``cancel()`` on any copy, in any process, is one message on the cancel subject, and sets every copy. AutoGen's meaning
is kept: a token tells a handler, it does not end its task.

An id that is cancelled before its message arrives is remembered for some seconds, because calls and the cancel subject
may take different ways through a cluster.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import orjson
from autogen_core import CancellationToken
from nats.aio.msg import Msg
from nats.nuid import NUID

from natsrt.errors import CannotDecode, NatsrtError
from natsrt.transport.connection import Connection, Interest
from natsrt.wire import envelope

logger = logging.getLogger("natsrt.cancellation")

_REMEMBER = 30.0
_REPEATS = (1.0, 3.0, 6.0)
"""Seconds between the announcements of one cancellation."""
_REMEMBER_AT_MOST = 10_000


class _Shared:
    """What this runtime knows of one token. The token's callback keeps it alive, and it dies with the token."""

    __slots__ = ("__weakref__", "cancel_id", "futures")

    def __init__(self, cancel_id: str) -> None:
        self.cancel_id = cancel_id
        self.futures: set[asyncio.Future[Any]] = set()


class Cancellations:
    """The tokens of one runtime that travel, or arrived."""

    def __init__(self, connection: Connection, subject: str) -> None:
        self._connection = connection
        self._subject = subject
        self._prefix = NUID().next().decode()
        self._counter = 0
        self._shared: WeakKeyDictionary[CancellationToken, _Shared] = WeakKeyDictionary()
        self._tokens: WeakValueDictionary[str, CancellationToken] = WeakValueDictionary()
        self._early: OrderedDict[str, float] = OrderedDict()
        self._from_wire: set[str] = set()
        self._interest: Interest | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unsent: set[str] = set()
        self._announced: set[str] = set()
        self._sending: set[asyncio.Task[None]] = set()
        connection.add_listener(self)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._interest = await self._connection.subscribe(self._subject, self._on_cancel)
        self.connection_made()

    async def stop(self) -> None:
        await asyncio.sleep(0)  # what was cancelled just now is said at least once
        for announcing in list(self._sending):
            announcing.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        if self._interest is not None:
            await self._connection.unsubscribe(self._interest)
            self._interest = None

    def connection_lost(self) -> None:
        """Nothing to do: what is cancelled meanwhile is said when the connection is back."""

    def connection_made(self) -> None:
        """Say again what was cancelled of late: it may have been lost with the connection."""
        if self._interest is None:
            return
        for cancel_id in {*self._unsent, *self._announced}:
            self._announce(cancel_id)

    # -- sending -------------------------------------------------------------------------------------------------

    def id_of(self, token: CancellationToken) -> str:
        """The id under which ``token`` travels; made on first use."""
        return self._share(token).cancel_id

    def link(self, token: CancellationToken, future: asyncio.Future[Any]) -> None:
        """Cancel ``future`` when ``token`` is cancelled, for as long as the future is pending.

        Unlike ``token.link_future`` this leaves nothing behind in a token that is used for many calls.
        """
        futures = self._share(token).futures
        futures.add(future)
        future.add_done_callback(futures.discard)
        if token.is_cancelled():
            future.cancel()

    def _share(self, token: CancellationToken, cancel_id: str | None = None) -> _Shared:
        shared = self._shared.get(token)
        if shared is None:
            if cancel_id is None:
                self._counter += 1
                cancel_id = f"{self._prefix}-{self._counter:x}"
            shared = self._shared[token] = _Shared(cancel_id)
            self._tokens[cancel_id] = token
            token.add_callback(lambda: self._cancelled_here(shared))
        return shared

    def _cancelled_here(self, shared: _Shared) -> None:
        """Called inside ``token.cancel()``, under the token's lock and perhaps in another thread."""
        loop = self._loop
        if loop is None or loop.is_closed():
            self._unsent.add(shared.cancel_id)
            return
        loop.call_soon_threadsafe(self._spread, shared)

    def _spread(self, shared: _Shared) -> None:
        for future in list(shared.futures):
            future.cancel()
        if shared.cancel_id in self._from_wire:
            self._from_wire.discard(shared.cancel_id)
            return
        self._announced.add(shared.cancel_id)
        self._announce(shared.cancel_id)

    def _announce(self, cancel_id: str) -> None:
        task = asyncio.create_task(self._repeat(cancel_id))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _repeat(self, cancel_id: str) -> None:
        """Say it several times: whoever was reconnecting would not hear it else. Hearing it twice changes nothing."""
        for pause in _REPEATS:
            await self._broadcast(cancel_id)
            await asyncio.sleep(pause)
        await self._broadcast(cancel_id)
        self._announced.discard(cancel_id)

    async def _broadcast(self, cancel_id: str) -> None:
        body = envelope.encode(envelope.CANCEL, '"id":"cancel","source":"/"', orjson.dumps({"cancelid": cancel_id}))
        try:
            await self._connection.publish(self._subject, body)
            self._unsent.discard(cancel_id)
        except NatsrtError as error:
            self._unsent.add(cancel_id)
            logger.info("a cancellation could not be sent yet: %s", error)

    # -- receiving -----------------------------------------------------------------------------------------------

    def token_of(self, cancel_id: str | None) -> CancellationToken:
        """The token of an arriving message: the same object for all messages of one id, while somebody holds it."""
        if cancel_id is None:
            return CancellationToken()
        token = self._tokens.get(cancel_id)
        if token is None:
            token = CancellationToken()
            self._share(token, cancel_id)
            if cancel_id in self._early:
                self._cancel_from_wire(cancel_id, token)
        return token

    def _on_cancel(self, message: Msg) -> None:
        body = envelope.decode(message.data)
        data = body.json() if body is not None and body.type == envelope.CANCEL else None
        cancel_id = data.get("cancelid") if isinstance(data, dict) else None
        if not isinstance(cancel_id, str):
            raise CannotDecode("a cancellation", f"expected {envelope.CANCEL} with a cancelid", message.data)
        now = asyncio.get_running_loop().time()
        self._early[cancel_id] = now
        while self._early and (
            len(self._early) > _REMEMBER_AT_MOST or now - next(iter(self._early.values())) > _REMEMBER
        ):
            self._early.popitem(last=False)
        token = self._tokens.get(cancel_id)
        if token is not None and not token.is_cancelled():
            self._cancel_from_wire(cancel_id, token)

    def _cancel_from_wire(self, cancel_id: str, token: CancellationToken) -> None:
        self._from_wire.add(cancel_id)
        try:
            token.cancel()
        except Exception:  # callbacks that users attached run here
            logger.exception("a callback of a cancellation token failed")
