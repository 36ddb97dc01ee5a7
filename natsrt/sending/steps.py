"""The steps that all sends share: their turn in the queue, the wait for a connection, and storing a large payload."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from autogen_core import AgentId, CancellationToken, MessageContext, TopicId

from natsrt.agents.interventions import Interventions
from natsrt.sending.send_queue import SendQueue
from natsrt.transport.bodies import Bodies
from natsrt.transport.cancellation import Cancellations
from natsrt.transport.readiness import Readiness
from natsrt.wire.references import OfEvent, Reference

T = TypeVar("T")


class SendSteps:
    """What every message of one runtime passes on its way out. See `natsrt.sending.call_sender` for the rules."""

    def __init__(
        self, *, bodies: Bodies, cancellations: Cancellations, interventions: Interventions, readiness: Readiness
    ) -> None:
        self._bodies = bodies
        self._cancellations = cancellations
        self._interventions = interventions
        self._readiness = readiness
        self.queue: SendQueue = SendQueue()
        self.under_way: int = 0
        """Number of sends that have not returned."""

    @property
    def are_free(self) -> bool:
        """True if a message can be sent at once: nothing intervenes, nothing waits, and there is a connection."""
        return not self._interventions.handlers and not self.queue.waiting and self._readiness.is_ready

    async def counted(self, sending: Awaitable[T]) -> T:
        """Await a send, which is under way meanwhile."""
        self.under_way += 1
        try:
            return await sending
        finally:
            self.under_way -= 1

    def link(self, token: CancellationToken | None) -> Callable[[asyncio.Future[Any]], None] | None:
        """A function that makes ``token`` cancel a future; None if there is no token."""
        return None if token is None else partial(self._cancellations.link, token)

    @asynccontextmanager
    async def turn(
        self, sent: Callable[[], None] | None, token: CancellationToken | None = None
    ) -> AsyncIterator[Callable[[], None]]:
        """Hold the turn of the send queue until the function that is returned is called.

        ``sent`` is this function if the send has the turn already.
        """
        if sent is not None:
            yield sent
            return
        async with self.queue.turn(self.link(token)) as turn:
            yield turn.end

    async def wait_ready(self, token: CancellationToken | None, begun: float) -> None:
        """Wait until the runtime has started and is connected, or until ``token`` is cancelled.

        ``begun`` is when the send began, in seconds by the event loop's clock. Raises as `Readiness.wait`.
        """
        if self._readiness.is_ready:
            return
        waiting = asyncio.ensure_future(self._readiness.wait(begun))
        if token is not None:
            self._cancellations.link(token, waiting)
        try:
            await waiting
        finally:
            waiting.cancel()

    async def store(
        self,
        payload: bytes,
        token: CancellationToken | None = None,
        ttl: float | None = None,
        of_event: OfEvent | None = None,
    ) -> Reference:
        """Store a payload, until ``token`` is cancelled. ``ttl`` and ``of_event`` are as in `Bodies.store`."""
        storing = asyncio.ensure_future(self._bodies.store(payload, ttl, of_event))
        if token is not None:
            self._cancellations.link(token, storing)
        try:
            return await storing
        finally:
            storing.cancel()


async def traced(span: AbstractContextManager[str], send: Callable[[str], Awaitable[T]]) -> T:
    """Send a message inside ``span``. ``send`` is called with the attributes that contain its trace context."""
    with span as trace_context:
        sending = send(trace_context)
        del send  # so that memory does not hold a large payload until the reply arrives
        return await sending


def send_context(
    sender: AgentId | None, topic: TopicId | None, token: CancellationToken | None, message_id: str
) -> MessageContext:
    """The context for intervention handlers. ``topic`` is None for a call."""
    return MessageContext(
        sender=sender,
        topic_id=topic,
        is_rpc=topic is None,
        cancellation_token=token or CancellationToken(),
        message_id=message_id,
    )
