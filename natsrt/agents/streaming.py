"""Handlers that send several items: `natsrt.streaming` and `natsrt.emit`.

The items go to the caller that streams the call, which the present code finds in a context variable. So they cross no
hop: a call that the handler makes has a stream of its own, or none.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from types import NoneType
from typing import Any, Final, Protocol, TypeVar, Union, cast, get_args, get_origin, get_type_hints, overload

from autogen_core import MessageContext, message_handler

T = TypeVar("T")
Generator = Callable[[Any, Any, MessageContext], AsyncGenerator[Any, None]]
"""A method of an agent that is an asynchronous generator."""


class Emitter(Protocol):
    """Sends the items of one handler."""

    all_emitted: bool
    """True if the handler's result is the last item, which was sent already."""

    async def put(self, item: Any) -> None:
        """Send an item when there is room for it. Raises `StreamAbandoned`, `CannotSerialize`, `MessageTooLarge`."""


emits_to: ContextVar[Emitter | None] = ContextVar("natsrt_emits_to", default=None)
"""Sends the items of the present handler; None if its caller does not stream."""

_ITERATED: Final = ("AsyncGenerator", "AsyncIterator", "AsyncIterable")


async def emit(item: Any) -> bool:
    """Send an item to the caller that streams the present call, from any code below a handler.

    It returns when the item is on its way, after a wait if the caller is behind: see ``window`` in
    `NatsAgentRuntime.stream_message`.

    Returns:
        False if the caller does not stream, or if no call is being handled: the item is dropped.

    Raises:
        StreamAbandoned: The caller does not want any more items. The handler is cancelled soon.
        CannotSerialize, MessageTooLarge: The item cannot be sent.
    """
    emitter = emits_to.get()
    if emitter is None:
        return False
    await emitter.put(item)
    return True


@overload
def streaming(function: Generator) -> Any: ...


@overload
def streaming(
    function: None = None, *, match: Callable[[Any, MessageContext], bool] | None = None, strict: bool = True
) -> Callable[[Generator], Any]: ...


def streaming(
    function: Generator | None = None,
    *,
    match: Callable[[Any, MessageContext], bool] | None = None,
    strict: bool = True,
) -> Any:
    """Make an asynchronous generator a message handler of a `RoutedAgent`: each item that it yields is sent at once.

    The caller reads the items with `NatsAgentRuntime.stream_message`. To ``send_message``, and in other runtimes of
    AutoGen, the handler returns its last item; None if there was none.

    Args:
        function: The method. The annotations of ``message`` and of the items say what it handles and sends, as for
            AutoGen's ``message_handler``: ``async def write(self, message: Task, ctx: MessageContext) ->
            AsyncGenerator[Chunk | Text, None]``.
        match: As in AutoGen's ``message_handler``: whether it handles a message of its type. None: it does.
        strict: As in AutoGen's ``message_handler``.

    Raises:
        TypeError: The method is not annotated as an asynchronous generator.
    """
    if function is None:
        return functools.partial(streaming, match=match, strict=strict)
    if not inspect.isasyncgenfunction(function):
        raise TypeError(f"{function!r:.100} must be an asynchronous generator: an async def with yield")
    hints = get_type_hints(function)
    returned = hints.get("return")
    origin = get_origin(returned)
    if origin is None or origin.__name__ not in _ITERATED:
        raise TypeError(
            f"{function.__qualname__} must return AsyncGenerator[item, None], as an async def with yield does, not "
            f"{returned!r:.80}"
        )

    @functools.wraps(function)
    async def handler(self: Any, message: Any, ctx: MessageContext) -> Any:
        emitter, last = emits_to.get(), None
        items: AsyncIterator[Any]
        async with aclosing(function(self, message, ctx)) as items:
            async for last in items:
                if emitter is not None:
                    await emitter.put(last)
        if emitter is not None:
            emitter.all_emitted = True
        return last

    item = get_args(returned)[0]
    handler.__annotations__ = hints | {"return": item if item is Any else Union[item, NoneType]}  # noqa: UP007
    del handler.__wrapped__  # its annotations would be read in place of these
    return message_handler(match=match, strict=strict)(cast(Any, handler))
