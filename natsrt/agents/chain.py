"""The chain of a message: the handlers of keyed agents that wait for it.

While a keyed agent handles a message, that handler has an id. A call that the handler makes carries the ids of all
handlers that wait for the call, outermost first, and for each of them which of its calls led to this one: its *chain*.
If the handler that runs in a keyed agent awaits the call that led to a message, the message may enter the agent's
mailbox at once, because the handler cannot go on before that.

The chain is sent in the envelope's extension ``chain``, with its parts separated by spaces. A part is the id of a
handler, or names one of its calls: the id, ``/``, and a number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Sequence
from contextvars import ContextVar
from typing import Any, Final, Protocol, TypeVar

from natsrt.awaiting import awaits
from natsrt.wire.envelope import Envelope
from natsrt.wire.ids import handlers

T = TypeVar("T")
Chain = tuple[str, ...]

CALL_MARK: Final = "/"
"""Between a handler's id and the number of one of its calls."""

current_chain: ContextVar[Chain] = ContextVar("natsrt_chain", default=())
"""The chain of messages that the current code sends: the handlers that wait for them and their calls, outermost first.

A handler of a keyed agent makes calls with `as_call`, which adds the call.
"""


class Caller(Protocol):
    """Makes the calls of a handler, so that it is known which of them the handler awaits."""

    async def call(self, work: Awaitable[T]) -> T:
        """Await ``work``, which makes a call. Returns its result."""

    async def until_last(self) -> None:
        """Wait until the handler may go on, after it has awaited something that others may have entered for."""


class Place(Protocol):
    """Where a handler runs: the mailbox of its agent. Handlers that it waits for may run above it."""

    def is_last(self, handler: Handler) -> bool:
        """Return True if no handler runs above this one."""

    async def until_last(self, handler: Handler) -> None:
        """Wait until no handler runs above this one."""

    def above(self, handler: Handler) -> Sequence[Handler]:
        """The handlers that run above this one."""


class Handler:
    """One run of a handler of a keyed agent."""

    __slots__ = ("_calls", "_last", "handler_id", "place", "resuming", "task")

    def __init__(self, handler_id: str, task: asyncio.Task[Any] | None, place: Place) -> None:
        """``task`` is the task that runs it."""
        self.handler_id: str = handler_id
        self.task: asyncio.Task[Any] | None = task
        self.place: Place = place
        self._last = 0
        self._calls: dict[str, asyncio.Task[Any] | None] | None = None
        """The tasks that make calls for it now, by the names of the calls. None until there is one."""
        self.resuming: int = 0
        """Number of its calls that have ended, but wait for the handlers above this one."""

    async def call(self, work: Awaitable[T]) -> T:
        """Await ``work``, which makes a call for this handler in the current task. Returns its result.

        The call gets a name, which is added to `current_chain`. A handler that entered because this one awaits the call
        may still run when the call has ended. The result is returned when it has ended, too. A call that is cancelled
        does not wait for that.
        """
        self._last += 1
        name = f"{self.handler_id}{CALL_MARK}{self._last}"
        if self._calls is None:
            self._calls = {}
        self._calls[name] = asyncio.current_task()
        outer = current_chain.set((*current_chain.get(), name))
        given_up = False
        try:
            return await work
        except asyncio.CancelledError:
            given_up = True
            raise
        finally:
            current_chain.reset(outer)
            del self._calls[name]
            if not given_up:
                await self.until_last()

    async def until_last(self) -> None:
        """Wait until the handlers have ended that entered because this one awaited something."""
        if not self.place.is_last(self):
            self.resuming += 1
            try:
                await self.place.until_last(self)
            finally:
                self.resuming -= 1

    def awaits(self, chain: Collection[str]) -> bool:
        """Return True if this handler cannot go on before the message with this chain was handled.

        A chain that names the handler, but none of its calls, is taken to belong to a call that it awaits: not every
        sender names calls.
        """
        if self.handler_id not in chain:
            return False
        mark = self.handler_id + CALL_MARK
        names = [part for part in chain if part.startswith(mark)]
        return not names or any(self._awaits_call(name) for name in names)

    def _awaits_call(self, name: str) -> bool:
        task = None if self._calls is None else self._calls.get(name)
        return task is not None and self.task is not None and awaits(self.task, task)


current_handler: ContextVar[Caller | None] = ContextVar("natsrt_handler", default=None)
"""The handler in which the current code runs, or which started the current task, if it is the handler of a keyed agent
or has a place (see `natsrt.hosting.places`); None otherwise."""


def as_call(work: Awaitable[T]) -> Awaitable[T]:
    """``work``, which makes one call and awaits it, as a call of the `current_handler`, if there is one."""
    handler = current_handler.get()
    return work if handler is None else handler.call(work)


def chain_of(body: Envelope | None) -> Chain:
    """Return the chain of a message. It is empty for a plain body (None) and for a body without a chain."""
    parts = None if body is None else body.text("chain")
    return () if parts is None else handlers(parts)


def chain_attribute(chain: Collection[str]) -> str:
    """Return the envelope attribute for a chain, with a leading comma; ``""`` for an empty chain."""
    return f',"chain":"{" ".join(chain)}"' if chain else ""
