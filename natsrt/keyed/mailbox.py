"""One message at a time for one agent, in order, without deadlock along a call chain.

Rules:

1. A handler keeps all messages out until it ends, except one: a message that the handler waits for, because it belongs
   to a call that the handler awaits (see `natsrt.agents.chain`). This message enters at once, and its handler keeps
   others out in turn. So the handlers inside are a stack, of which only the last one runs.
2. Of several messages that a handler waits for at the same time, the first one enters. The others wait until its
   handler has ended.
3. Messages that no handler inside waits for enter in order, when all handlers have ended.
4. A handler beside the turns keeps nobody out, and nobody keeps it out. A message for which it waits is let in no
   earlier than others.
5. A handler whose call has ended goes on when it is the last one again. A handler that entered above it may not have
   ended, if nobody awaits its message any more.

A handler that gave up a call goes on at once, although the handler of that call may still be inside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import NamedTuple

from natsrt.agents.chain import Chain, Handler

_FIRST_LOOK = 0.001
"""Seconds after which a message looks for the first time whether the last handler awaits its call by now."""
_LOOK_EVERY = 0.05
"""Seconds between two such looks at most."""


class _Waiting(NamedTuple):
    """A message that waits to enter: its handler, its chain, and the future that is done when it has entered."""

    handler: Handler
    chain: Chain
    turn: asyncio.Future[None]


class Mailbox:
    """The messages of one agent, from their arrival to the end of their handlers."""

    __slots__ = ("_beside", "_concurrent", "_inside", "_resuming", "_waiting")

    def __init__(self) -> None:
        self._inside: list[Handler] = []
        """The handlers that keep others out, in the order in which they entered."""
        self._concurrent: set[str] | None = None
        """The ids of handlers that run, but do not keep others out. None until there is one."""
        self._beside: set[str] | None = None
        """The ids of handlers that run beside the turns. None until there is one."""
        self._waiting: dict[str, _Waiting] | None = None
        """The messages that wait to enter, in order, by the ids of their handlers. None until there is one."""
        self._resuming: list[asyncio.Future[None]] | None = None
        """Futures that are completed when a handler ends, for handlers that wait to go on. None until there is one."""

    @property
    def inside(self) -> tuple[str, ...]:
        """The ids of the handlers that keep others out, in the order in which they entered."""
        return tuple(handler.handler_id for handler in self._inside)

    def runs_any(self, chain: Collection[str]) -> bool:
        """Return True if a handler of this chain runs here."""
        if any(handler.handler_id in chain for handler in self._inside):
            return True
        return any(ids is not None and not ids.isdisjoint(chain) for ids in (self._concurrent, self._beside))

    def is_alone(self, handler: Handler) -> bool:
        """Return True if no other handler runs here, apart from those beside the turns."""
        others = {one.handler_id for one in self._inside} | (self._concurrent or set())
        return others <= {handler.handler_id}

    def count(self, handlers: Collection[str]) -> int:
        """How many of ``handlers`` run here."""
        if not handlers:
            return 0
        others = (*(self._concurrent or ()), *(self._beside or ()))
        return sum(one.handler_id in handlers for one in self._inside) + sum(one in handlers for one in others)

    def keep_out(self, handler_id: str) -> Sequence[Handler]:
        """The handlers that must end before a waiting message enters. Empty if the message does not wait."""
        waiting = None if self._waiting is None else self._waiting.get(handler_id)
        if waiting is None:
            return ()
        for at in range(len(self._inside), 0, -1):
            if self._inside[at - 1].awaits(waiting.chain):
                return self._inside[at:]
        return list(self._inside)

    # -- entering ------------------------------------------------------------------------------------------------

    def try_enter(self, handler: Handler, chain: Chain = ()) -> bool:
        """Enter if that is possible without `wait`. Returns whether it was; then `exit` must follow.

        ``chain`` is the chain of the message that the handler is for.
        """
        if (self._inside or self._waiting) and not self._is_let_in(chain):
            return False
        self._inside.append(handler)
        return True

    def enter_beside(self, handler: Handler) -> None:
        """Enter without a turn; `exit` must follow."""
        if self._beside is None:
            self._beside = set()
        self._beside.add(handler.handler_id)

    async def wait(self, handler: Handler, chain: Chain = ()) -> None:
        """Wait until the handler has entered; then `exit` must follow. Raises the error that was given to `refuse`."""
        if self._waiting is None:
            self._waiting = {}
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[handler.handler_id] = _Waiting(handler, chain, turn)
        try:
            pause = _FIRST_LOOK
            while self.runs_any(chain) and not turn.done():  # its call may be awaited from now on: nothing reports that
                await asyncio.wait((turn,), timeout=pause)
                pause = min(2 * pause, _LOOK_EVERY)
                self._admit()
            await turn
        except BaseException:
            if handler in self._inside:  # it had entered before it was cancelled
                self._remove(handler)
            else:
                self._waiting.pop(handler.handler_id, None)
            raise

    def refuse(self, handler_id: str, error: Exception) -> None:
        """Let `wait` raise ``error``. Does nothing if the handler does not wait."""
        waiting = None if self._waiting is None else self._waiting.pop(handler_id, None)
        if waiting is not None and not waiting.turn.done():
            waiting.turn.set_exception(error)

    def let_others_in(self, handler: Handler) -> None:
        """The handler goes on, and keeps others out no longer."""
        if self._concurrent is None:
            self._concurrent = set()
        self._concurrent.add(handler.handler_id)
        self._remove(handler)

    def exit(self, handler: Handler) -> None:
        """The handler has ended."""
        if self._concurrent and handler.handler_id in self._concurrent:
            self._concurrent.remove(handler.handler_id)
        elif self._beside and handler.handler_id in self._beside:
            self._beside.remove(handler.handler_id)
        else:
            self._remove(handler)

    def _remove(self, handler: Handler) -> None:
        self._inside.remove(handler)
        if self._waiting:
            self._admit()
        if self._resuming:
            resuming, self._resuming = self._resuming, None
            for future in resuming:
                if not future.done():
                    future.set_result(None)

    # -- going on after a call -----------------------------------------------------------------------------------

    def above(self, handler: Handler) -> Sequence[Handler]:
        """The handlers inside that entered after this one. Empty if it keeps nobody out."""
        return self._inside[self._inside.index(handler) + 1 :] if handler in self._inside else ()

    def is_last(self, handler: Handler) -> bool:
        """Return True if no handler runs above this one."""
        return not self._inside or self._inside[-1] is handler or handler not in self._inside

    async def until_last(self, handler: Handler) -> None:
        """Wait until no handler runs above this one."""
        while not self.is_last(handler):
            if self._resuming is None:
                self._resuming = []
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._resuming.append(ended)
            await ended

    def _is_let_in(self, chain: Chain) -> bool:
        """Return True if a handler inside waits for a new message with this chain."""
        if not chain:
            return False
        if self._concurrent is not None and not self._concurrent.isdisjoint(chain):
            return True
        if self._waiting:
            self._admit()  # a message that came earlier may have become awaited
        return bool(self._inside) and self._inside[-1].awaits(chain)

    def _admit(self) -> None:
        """Let the next waiting message enter, if one may."""
        while self._waiting:
            found = self._next(self._waiting)
            if found is None:
                return
            del self._waiting[found.handler.handler_id]
            if not found.turn.done():
                self._inside.append(found.handler)
                found.turn.set_result(None)
                return

    def _next(self, waiting: dict[str, _Waiting]) -> _Waiting | None:
        if not self._inside:
            return next(iter(waiting.values()))
        last = self._inside[-1]
        return next((one for one in waiting.values() if one.chain and last.awaits(one.chain)), None)
