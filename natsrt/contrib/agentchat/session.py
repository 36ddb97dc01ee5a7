"""The caller's side of one session: what remote agents and teams have in common."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final, TypeAlias

from autogen_agentchat.base import Response, TaskResult
from autogen_agentchat.messages import BaseAgentEvent, BaseChatMessage
from autogen_core import AgentId, CancellationToken

from natsrt.contrib.agentchat.chain import refuse_circle
from natsrt.contrib.agentchat.repeats import Repeats
from natsrt.contrib.agentchat.requests import OUT_OF_TURN, ChatTurn, Close, Forget, TeamRun, TurnStarted
from natsrt.contrib.agentchat.runtimes import Runtimes
from natsrt.contrib.arguments import checked_retries
from natsrt.errors import (
    AgentNotServed,
    NoLiveWorker,
    ServerUnreachable,
    StateConflict,
    StateNotSaved,
    UndeliveredCall,
    UnknownAgentType,
    WorkerLost,
    WorkerStopped,
)

logger: logging.Logger = logging.getLogger("natsrt.agentchat")

OnQuestion: TypeAlias = Callable[[Any], Any]
"""Gets a question, and returns the answer or an awaitable of it."""

_AGAIN: Final = (WorkerLost, WorkerStopped, NoLiveWorker, UnknownAgentType, StateConflict, StateNotSaved)
"""The ends of a turn after which it may be tried again: it has not begun, does not count, or its answer is stored."""
_WORKER_WITHIN: Final = 30.0
"""Seconds that an attempt waits for a live worker of the type, such as one that is started in place of the lost one."""


class Session:
    """One session of a hosted agent or team, as its callers see it."""

    def __init__(
        self,
        runtimes: Runtimes,
        agent_id: AgentId,
        *,
        retries: int = 0,
        on_question: OnQuestion | None = None,
    ) -> None:
        """Raises ValueError if ``retries`` is not a whole number of at least 0."""
        self._runtimes = runtimes
        self.agent_id: AgentId = agent_id
        self.retries: int = checked_retries(retries)
        self._on_question = on_question
        self._used = False
        """Whether the worker may have a live agent or team of this session because of this object."""

    async def call(self, request: Any, token: CancellationToken | None = None) -> Any:
        """Send a request, and return the answer. Raises as `NatsAgentRuntime.send_message`."""
        if not isinstance(request, OUT_OF_TURN):
            refuse_circle(str(self.agent_id))
        self._used = True
        async with self._runtimes.use() as runtime:
            return await runtime.send_message(request, self.agent_id, cancellation_token=token)

    async def turn(
        self, request: ChatTurn | TeamRun, token: CancellationToken | None
    ) -> AsyncGenerator[BaseAgentEvent | BaseChatMessage | Response | TaskResult, None]:
        """What the agent or team says in a turn, and its result at the end, when the turn is completed and stored.

        If the worker is lost, or there is none, the turn is tried again, ``retries`` times; what was said already is
        left out.
        """
        refuse_circle(str(self.agent_id))
        self._used, repeats = True, Repeats()
        for left in range(self.retries, -1, -1):
            try:
                result: Response | TaskResult | None = None
                async with (
                    self._runtimes.use() as runtime,
                    runtime.stream_message(
                        request, self.agent_id, cancellation_token=token, on_question=self._on_question
                    ) as stream,
                ):
                    async for item in stream:
                        if isinstance(item, Response | TaskResult):
                            result = item
                        elif not isinstance(item, TurnStarted) and repeats.is_new(item):
                            yield item
                if result is None:
                    raise RuntimeError(f"{self.agent_id} gave no final result")
                yield result
                return
            except _AGAIN as error:
                if not left or not await self._is_served(token):
                    raise
                logger.info("a turn of %s is tried again: %s", self.agent_id, error)
                repeats.again()

    async def _is_served(self, token: CancellationToken | None) -> bool:
        """Wait for a live worker of the type. False if there is none in time."""
        async with self._runtimes.use() as runtime:
            waiting = asyncio.ensure_future(runtime.wait_for(self.agent_id.type, timeout=_WORKER_WITHIN))
            if token is not None:
                token.link_future(waiting)
            try:
                await waiting
            except AgentNotServed:
                return False
            return True

    async def close(self) -> None:
        """Let the worker close its live agent or team, if this session was used from here. What is stored stays.

        A worker that cannot be reached has nothing to close.
        """
        if not self._used:
            return
        try:
            await self.call(Close())
        except (UndeliveredCall, ServerUnreachable) as error:
            logger.debug("%s is not closed: %s", self.agent_id, error)
        self._used = False

    async def forget(self) -> None:
        """End the session: nothing stays live or stored. Raises as `NatsAgentRuntime.send_message`."""
        await self.call(Forget())
        self._used = False
