"""A NATS responder as an agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import lru_cache
from typing import Any

from autogen_core import MessageContext, RoutedAgent
from opentelemetry.propagate import inject

import natsrt
from natsrt.contrib.arguments import checked_timeout
from natsrt.contrib.services.json_types import JsonType, check_message_type
from natsrt.contrib.services.replies import RepliesRead
from natsrt.errors import CallTimeout
from natsrt.plain import STREAM_HEADER, PlainMessage, PlainReplies, checked_headers, checked_subject


class ServiceAgent(RoutedAgent):
    """An agent that asks a NATS responder: a service in any language, which knows nothing of natsrt.

    A message of ``request_type`` becomes a request on ``subject``, with plain JSON as payload. The JSON reply becomes
    an object of ``response_type``, which the handler returns. The request carries the present trace context.

    Register it as any agent, with a factory that makes it: ``await natsrt.register(runtime, ServiceAgent, "weather",
    lambda: ServiceAgent(subject="weather.get", request_type=City, response_type=Weather))``. It runs in
    `NatsAgentRuntime` only.

    Args:
        subject: The subject of the responder, as it is: without the namespace of the runtime.
        request_type: The class of the messages that it handles, or a union of classes: dataclasses, Pydantic models,
            ``str``, ``int``, ``dict`` and the like; ``bytes`` for requests that are no JSON.
        response_type: The class of the replies, in the same way. ``bytes`` for replies that are no JSON; None for
            empty ones.
        stream: True if the responder sends several replies to a request. The request then has the header
            ``Natsrt-Stream: 1``, each reply is an item for callers that use ``stream_message``, and an empty message
            ends them, unless it has the header ``Natsrt-Part``. Other callers get the last item.
        timeout: Seconds to wait for a reply; with ``stream``, for each one.
        headers: Headers of the requests. None: no others than those of natsrt.
        description: The description of the agent. None: it names the subject.

    Raises:
        TypeError: A type has no JSON, or is no class, such as ``list[int]``, ``Any`` or a ``TypedDict``.
        ValueError: The subject, a header or the timeout is not valid.

    The handler raises:
        NoResponders: Nobody listens on the subject. Where somebody listens who never answers, it is `CallTimeout`.
        CallTimeout: No reply came in time.
        ServiceError: The service answered with an error.
        CannotDecode: A reply is no JSON or does not fit ``response_type``, or replies of a stream were lost.
        TooManyReplies: The replies of a stream were not taken fast enough.
        CannotSerialize, MessageTooLarge, PermissionDenied: The request cannot be sent.
    """

    def __init__(
        self,
        *,
        subject: str,
        request_type: Any,
        response_type: Any,
        stream: bool = False,
        timeout: float = 10.0,
        headers: Mapping[str, str] | None = None,
        description: str | None = None,
    ) -> None:
        check_message_type(request_type, "request_type")
        check_message_type(response_type, "response_type")
        # AutoGen reads the message types of an agent from its class, so each pair of types has a class of its own.
        self.__class__ = _class_for(type(self), request_type, response_type)
        super().__init__(description or f"the NATS service on {subject}")
        self.subject: str = checked_subject(subject)
        self._request = JsonType(request_type, "request_type")
        self._response = JsonType(response_type, "response_type")
        self._stream = stream
        self._timeout = checked_timeout(timeout)
        self._headers = checked_headers(headers)

    async def _items(self, message: Any, ctx: MessageContext) -> AsyncGenerator[Any, None]:
        payload, headers = self._request.encode(message), dict(self._headers)
        inject(headers)
        if self._stream:
            headers[STREAM_HEADER] = "1"
        read = RepliesRead(self.subject, self._response, stream=self._stream)
        async with natsrt.runtime_of(self).request_plain(self.subject, payload, headers=headers) as replies:
            while not read.is_complete:
                try:
                    reply = await self._next(replies, ctx)
                except CallTimeout as error:
                    raise read.missing() or error from None
                for item in read.read(reply.headers, reply.payload):
                    yield item

    async def _next(self, replies: PlainReplies, ctx: MessageContext) -> PlainMessage:
        """The next reply. It is not waited for any more when the token of the call is cancelled."""
        waiting = asyncio.ensure_future(anext(replies))
        ctx.cancellation_token.link_future(waiting)
        try:
            async with asyncio.timeout(self._timeout):
                return await waiting
        except TimeoutError:
            raise CallTimeout(self.subject, self._timeout, "timeout") from None


@lru_cache(maxsize=1024)
def _class_for(cls: type[ServiceAgent], request_type: Any, response_type: Any) -> type[ServiceAgent]:
    """The subclass of ``cls`` whose handler has these types."""

    async def ask(self: ServiceAgent, message: Any, ctx: MessageContext) -> AsyncGenerator[Any, None]:
        async with aclosing(self._items(message, ctx)) as items:
            async for item in items:
                yield item

    ask.__annotations__ = {
        "message": request_type,
        "ctx": MessageContext,
        "return": AsyncGenerator[response_type, None],
    }
    members = {"__module__": cls.__module__, "__doc__": cls.__doc__, "ask": natsrt.streaming(ask)}
    return type(cls.__name__, (cls,), members)
