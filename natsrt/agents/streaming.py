"""Handlers that send several items, or ask their caller: `natsrt.streaming`, `natsrt.emit` and `natsrt.ask`.

Items and questions go to the caller of the present call, which the present code finds in a context variable. So they
cross no hop: a call that the handler makes has a caller of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from types import NoneType
from typing import Any, Final, Protocol, TypeVar, Union, cast, get_args, get_origin, get_type_hints, overload

from autogen_core import MessageContext, MessageHandlerContext, message_handler

from natsrt.agents.chain import as_call
from natsrt.errors import NobodyToAsk

T = TypeVar("T")
Generator = Callable[[Any, Any, MessageContext], AsyncGenerator[Any, None]]
"""A method of an agent that is an asynchronous generator."""


class Emitter(Protocol):
    """Sends the items and the questions of one handler to its caller."""

    wants_items: bool
    """False if the caller only answers questions: it gets no items."""
    all_emitted: bool
    """True if the handler's result is the last item, which was sent already."""

    async def put(self, item: Any) -> None:
        """Send an item when there is room for it. Raises `StreamAbandoned`, `CannotSerialize`, `MessageTooLarge`."""

    async def ask(self, question: Any, reply_type: type[Any] | None) -> Any:
        """Ask the caller, and return its answer. Raises as `natsrt.ask` does."""


emits_to: ContextVar[Emitter | None] = ContextVar("natsrt_emits_to", default=None)
"""Sends what the present handler has for its caller; None if the caller neither streams nor answers questions."""

NO_ANSWERS: Final = "its caller gave no on_question"
"""Why a handler has nobody to ask."""
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
    emitter = _takes_items()
    if emitter is None:
        return False
    await emitter.put(item)
    return True


def _takes_items() -> Emitter | None:
    emitter = emits_to.get()
    return emitter if emitter is not None and emitter.wants_items else None


@overload
async def ask(question: Any, *, reply_type: type[T]) -> T: ...


@overload
async def ask(question: Any, *, reply_type: None = None) -> Any: ...


async def ask(question: Any, *, reply_type: type[Any] | None = None) -> Any:
    """Ask the caller of the present call, from any code below a handler, and wait for the answer: a person's approval,
    a value that only the caller knows.

    The caller answers with the function that it gave as ``on_question`` to `NatsAgentRuntime.send_message` or
    `NatsAgentRuntime.stream_message`. A caller that streams gets the question after the items that were sent before it.
    There is no deadline: use ``asyncio.timeout``. If the wait is cancelled, so is the caller's function. ``natsrt.ask``
    is itself such a function: a handler that calls another agent passes that agent's questions on with
    ``on_question=natsrt.ask``.

    Args:
        question: Any message.
        reply_type: The class of the answer. JSON values, such as a dict, are read as one of that class. None: the
            answer is of the class that it names.

    Raises:
        NobodyToAsk: The caller answers no questions, or no call is being handled.
        StreamAbandoned: The caller is gone. The handler is cancelled soon.
        CannotSerialize, MessageTooLarge: The question cannot be sent.
        CannotDecode: The answer cannot be read, or is of another class.
        Exception: What the caller's function raised, with its class if that is known here, else `RemoteAgentError`.
    """
    emitter = emits_to.get()
    if emitter is None:
        raise NobodyToAsk(*_asker())
    return await as_call(emitter.ask(question, reply_type))


def _asker() -> tuple[str | None, str]:
    """The agent whose handler runs, None if there is none, and why it has nobody to ask."""
    try:
        return str(MessageHandlerContext.agent_id()), NO_ANSWERS
    except RuntimeError:
        return None, "no call is being handled"


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
        emitter, last = _takes_items(), None
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
