"""Cancellation tokens that work across processes.

A token gets an id when it is first sent. Every message with the token contains the id as ``cancelid``. ``cancel()`` on
any copy, in any process, is announced and cancels every copy. As in AutoGen, a cancelled token only informs the
handler; it does not end the handler's task.

Copies are in the runtimes that host agents, which listen on the cancel subject, and in the runtime that made the token.
An id contains a subject of the latter's inbox, so that a runtime that only calls need not hear the cancellations of
others. The rest of an id is random: whoever knows an id can cancel its token.

A cancellation may arrive before the message with its token, because the two may take different routes through a
cluster. So the ids of cancellations are kept for `_REMEMBER` seconds.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import orjson
from autogen_core import CancellationToken
from nats.aio.msg import Msg

from natsrt.background import BackgroundTasks
from natsrt.errors import CannotDecode, NatsrtError
from natsrt.transport.connection import Connection, Interest
from natsrt.transport.inbox import Inbox
from natsrt.wire import envelope
from natsrt.wire.ids import checked_id
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.cancellation")

_REMEMBER = 30.0
"""Seconds for which the id of an announced cancellation is kept for messages that arrive later."""
_REPEATS = (1.0, 3.0, 6.0)
"""Seconds between the announcements of one cancellation."""
_OWNED = re.compile(r"(\S+\.cancel-[0-9a-f]{24})/[0-9a-f]{24}")
"""An id with the subject of the runtime that made the token."""
_REMEMBER_AT_MOST = 10_000
"""Maximum number of ids of announced cancellations that are kept. The oldest are dropped first."""


class _Shared:
    """The id of one token, and the futures that it cancels. The token's callback refers to it, so it lives as long as
    the token."""

    __slots__ = ("__weakref__", "cancel_id", "futures")

    def __init__(self, cancel_id: str) -> None:
        self.cancel_id = cancel_id
        self.futures: set[asyncio.Future[Any]] = set()


class Cancellations:
    """The tokens that one runtime sent or received."""

    def __init__(self, connection: Connection, inbox: Inbox, subjects: Subjects) -> None:
        self._connection = connection
        self._inbox = inbox
        self._subjects = subjects
        self._own = inbox.subject("cancel")
        """The subject on which the copies of this runtime's own tokens are cancelled."""
        self._shared: WeakKeyDictionary[CancellationToken, _Shared] = WeakKeyDictionary()
        self._tokens: WeakValueDictionary[str, CancellationToken] = WeakValueDictionary()
        self._early: OrderedDict[str, float] = OrderedDict()
        self._from_wire: set[str] = set()
        self._interest: Interest | None = None
        self._started = False
        self._listening = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unsent: set[str] = set()
        self._announced: set[str] = set()
        self._announcing = BackgroundTasks(logger, "a cancellation could not be announced")
        connection.add_listener(self)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._inbox.receivers[self._own] = self._on_cancel
        self._started = True
        self.connection_made()

    @property
    def hears_all(self) -> bool:
        """True if this runtime hears the cancellations of all tokens, or has not started."""
        return self._listening or not self._started

    async def listen(self) -> None:
        """Hear the cancellations of all tokens from now on, as runtimes with agents must. Has no effect if it does."""
        if self._started and not self._listening:
            self._listening = True
            self._interest = await self._connection.subscribe(self._subjects.cancel, self._on_cancel, optional=True)

    async def stop(self) -> None:
        self._started = self._listening = False
        await asyncio.sleep(0)  # so that a token that was cancelled just now is announced at least once
        await self._announcing.cancel()
        if self._interest is not None:
            await self._connection.unsubscribe(self._interest)
            self._interest = None
        self._inbox.receivers.pop(self._own, None)

    def connection_lost(self) -> None:
        """Do nothing. Tokens that are cancelled while disconnected are announced after the reconnect."""

    def connection_made(self) -> None:
        """Announce recent cancellations again, since they may have been lost with the connection."""
        if not self._started:
            return
        for cancel_id in {*self._unsent, *self._announced}:
            self._announcing.spawn(self._announce(cancel_id))

    # -- sending -------------------------------------------------------------------------------------------------

    def id_of(self, token: CancellationToken) -> str:
        """Return the id with which ``token`` is sent. It is created on first use."""
        return self._share(token).cancel_id

    def link(self, token: CancellationToken, future: asyncio.Future[Any]) -> None:
        """Cancel ``future`` when ``token`` is cancelled, as long as the future is pending.

        Unlike ``token.link_future``, this does not let a token that is used for many calls grow.
        """
        futures = self._share(token).futures
        futures.add(future)
        future.add_done_callback(futures.discard)
        if token.is_cancelled():
            future.cancel()

    def announce(self, cancel_id: str) -> None:
        """Have all copies of the token with this id cancelled. This runtime need not have one."""
        self._announced.add(cancel_id)
        self._announcing.spawn(self._announce(cancel_id))

    def _share(self, token: CancellationToken, cancel_id: str | None = None) -> _Shared:
        shared = self._shared.get(token)
        if shared is None:
            if cancel_id is None:
                cancel_id = f"{self._own}/{self._inbox.new_token()}"
            shared = self._shared[token] = _Shared(cancel_id)
            self._tokens[cancel_id] = token
            token.add_callback(lambda: self._cancelled_here(shared))
        return shared

    def _cancelled_here(self, shared: _Shared) -> None:
        """Called inside ``token.cancel()``, with the token's lock held, and possibly in another thread."""
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
        self.announce(shared.cancel_id)

    async def _announce(self, cancel_id: str) -> None:
        """Publish a cancellation several times, for runtimes that are reconnecting. Repetitions have no effect."""
        for pause in _REPEATS:
            await self._broadcast(cancel_id)
            await asyncio.sleep(pause)
        await self._broadcast(cancel_id)
        self._announced.discard(cancel_id)

    async def _broadcast(self, cancel_id: str) -> None:
        body = envelope.encode(envelope.CANCEL, '"id":"cancel","source":"/"', orjson.dumps({"cancelid": cancel_id}))
        try:
            await self._connection.publish(self._subjects.cancel, body)
            if (owner := self._owner(cancel_id)) is not None:
                await self._connection.publish(owner, body)
            self._unsent.discard(cancel_id)
        except NatsrtError as error:
            self._unsent.add(cancel_id)
            logger.info("a cancellation could not be announced yet: %s", error)

    def _owner(self, cancel_id: str) -> str | None:
        """The subject on which the runtime that made a token hears of its cancellation; None if there is none, or if it
        is this one."""
        subject = _OWNED.fullmatch(cancel_id)
        if subject is None or subject[1] == self._own or not envelope.is_subject(subject[1]):
            return None
        return None if self._subjects.is_reserved(subject[1]) else subject[1]

    # -- receiving -----------------------------------------------------------------------------------------------

    def token_of(self, cancel_id: str | None) -> CancellationToken:
        """Return the token for a message that arrived.

        All messages with the same id get the same object, as long as there is a reference to it. If ``cancel_id`` is
        None, the result is a new token that no other process can cancel. Raises `CannotDecode`.
        """
        if cancel_id is None:
            return CancellationToken()
        token = self._tokens.get(cancel_id)
        if token is None:
            token = CancellationToken()
            self._share(token, checked_id(cancel_id, "an envelope"))
            if cancel_id in self._early:
                self._cancel_from_wire(cancel_id, token)
        return token

    def _on_cancel(self, message: Msg) -> None:
        body = envelope.decode(message.data)
        data = body.json() if body is not None and body.type == envelope.CANCEL else None
        cancel_id = data.get("cancelid") if isinstance(data, dict) else None
        if not isinstance(cancel_id, str):
            raise CannotDecode("a cancellation", f"expected {envelope.CANCEL} with a cancelid", message.data)
        checked_id(cancel_id, "a cancellation")
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
        except Exception:  # raised by a callback that the user added
            logger.exception("a callback of a cancellation token failed")
