"""Dispatches messages to their handlers, and settles them.

Rules:

1. Reading the message, finding the agent, running the handler and writing the reply happen inside one ``try``, in
   `Dispatch._serve`. All messages that are not refused are settled there, so each is settled exactly once, whatever
   fails.
2. Every handler runs in a separate task. Tasks start in the order in which they are created, so handlers start in the
   order in which their messages arrived.
3. The settlement of a message, which comes from its route, decides how the message ends. This module does not depend on
   it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any

from autogen_core import AgentId

from natsrt.agents.chain import current_chain
from natsrt.agents.inbound import CALL, CONTROL, EVENT, Answer, EventDropped, Inbound, OtherCopy, SentBack, handling
from natsrt.errors import CannotDecode, WorkerBusy, WorkerLost, WorkerStopped
from natsrt.hosting.controls import Controls
from natsrt.hosting.intake import Intake
from natsrt.hosting.invocation import Invoker
from natsrt.hosting.keyed_messages import KeyedMessages
from natsrt.hosting.out_of_step import OutOfStep
from natsrt.hosting.reader import Reader
from natsrt.observe.metrics import Counters
from natsrt.transport.bodies import Bodies
from natsrt.wire import envelope
from natsrt.wire.exception_parts import class_name

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_LOOK_EVERY = 0.1
"""Seconds between two checks for cancelled calls while a stop waits for handlers."""
_CANCELLED_WITHIN = 1.0
"""Seconds for which a stop waits for handlers that it has cancelled."""


class Dispatch:
    """Handles the messages of one worker. It is the `Consumer` of the worker's intake.

    ``active`` is the set of the messages that are being handled. This class changes it, and other classes read it.
    """

    def __init__(
        self,
        *,
        worker_id: str,
        intake: Intake,
        bodies: Bodies,
        reader: Reader,
        invoker: Invoker,
        keyed: KeyedMessages,
        controls: Controls,
        active: set[Inbound],
        counters: Counters,
        out_of_step: OutOfStep,
    ) -> None:
        self._worker_id = worker_id
        self._intake = intake
        self._bodies = bodies
        self._reader = reader
        self._invoker = invoker
        self._keyed = keyed
        self._controls = controls
        self._active = active
        self._counters = counters
        self._out_of_step = out_of_step
        self._exempt: set[Inbound] = set()
        self._stopping = False
        intake.feed(self)

    @property
    def running(self) -> int:
        """Number of handlers that are running, or waiting for their agent."""
        return len(self._active)

    # -- a message -----------------------------------------------------------------------------------------------

    def start(self, inbound: Inbound) -> None:
        """Handle a message in a new task."""
        self._run(inbound, self._serve(inbound))

    def refuse(self, inbound: Inbound) -> None:
        """Settle a message for which the intake has no room, in a new task."""
        self._run(inbound, self._refuse(inbound))

    def _run(self, inbound: Inbound, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` in a new task.

        ``work`` must call `_end` at its end. A done callback of the task would need another turn of the event loop.
        """
        self._active.add(inbound)
        inbound.task = asyncio.get_running_loop().create_task(work, name=inbound.route.name)

    def _end(self, inbound: Inbound) -> None:
        self._active.discard(inbound)
        inbound.task = None  # breaks a reference cycle: the task refers to the message through `handling`

    async def _serve(self, inbound: Inbound) -> None:
        began = time.perf_counter_ns()
        answer: Answer | None = None
        error: BaseException | None = None
        back: SentBack | None = None
        try:
            inbound.body = self._bodies.unpack(inbound.message.data)
            inbound.identify(self._reader.address(inbound))
            while self._out_of_step.holds(inbound):
                await self._out_of_step.end()
                inbound.identify(self._reader.address(inbound))
            handler = self._handler_of(inbound)
            if handler is not None:
                answer = await handler.handle(inbound)
        except SentBack as raised:
            back = raised
        except (EventDropped, OtherCopy):
            pass
        except BaseException as raised:  # a handler's BaseException is reported too, and must not stop the event loop
            error = raised
        try:
            if inbound.waiting:
                self._intake.started(inbound)
            if back is None and (inbound.kind is CALL or inbound.kind is EVENT):  # those to natsrt itself do not count
                inbound.route.hosted.counters.record(began, error)
            if error is not None:
                await self._fail(inbound, error)
            elif back is not None:
                await inbound.settlement.refused(inbound, back.error)
            elif (settling := inbound.settlement.handled(inbound, answer)) is not None:
                await settling
        except asyncio.CancelledError:
            raise
        except BaseException as raised:
            await self._settle_anyway(inbound, error or raised)
        finally:
            self._end(inbound)

    async def _settle_anyway(self, inbound: Inbound, error: BaseException) -> None:
        """Settle a message although counting, logging or describing its failure has raised.

        An exception's class, or a logging handler, can raise anything. Has no effect if a reply was sent before.
        """
        told = RuntimeError(f"{class_name(type(error))} was raised, and could not be reported")
        with contextlib.suppress(Exception):
            await inbound.settlement.failed(inbound, told, envelope.NO_AGENT)

    def _handler_of(self, inbound: Inbound) -> Controls | KeyedMessages | Invoker | None:
        """Return the object that handles a message; None for an event that is not for an agent on this worker.

        Call it in the task of the message. Raises `SentBack`.
        """
        if inbound.kind is CONTROL:
            return self._controls
        if inbound.key is None:
            return None
        is_keyed = inbound.route.hosted.keyed is not None
        if inbound.late and inbound.can_be_sent_back:
            # The other workers may have told its caller that they did not receive it, and the caller may have sent it
            # again already. If it were handled or forwarded here, it could be handled twice.
            agent = AgentId(inbound.agent_type, inbound.key)
            raise SentBack(WorkerLost(str(agent), self._worker_id, "its process stalled"))
        if inbound.chain:
            current_chain.set(inbound.chain)
        if inbound.chain or is_keyed:
            handling.set(inbound)
        return self._keyed if is_keyed else self._invoker

    async def _fail(self, inbound: Inbound, error: BaseException) -> None:
        agent, source = self._reader.source(inbound)
        if isinstance(error, asyncio.CancelledError) and self._stopping:
            error = WorkerStopped(agent, self._worker_id)
        elif isinstance(error, CannotDecode):
            self._counters.undecodable += 1
        await inbound.settlement.failed(inbound, error, source)

    async def _refuse(self, inbound: Inbound) -> None:
        error = WorkerBusy(inbound.agent_type, self._worker_id, self._intake.pending_bytes)
        try:
            inbound.body = self._bodies.unpack(inbound.message.data)
            inbound.identify(self._reader.address(inbound))
        except CannotDecode:
            self._counters.undecodable += 1
        except (EventDropped, OtherCopy):
            self._end(inbound)
            return
        try:
            await inbound.settlement.refused(inbound, error)
        finally:
            self._end(inbound)

    # -- stopping ------------------------------------------------------------------------------------------------

    def exempt(self, task: asyncio.Task[Any] | None) -> None:
        """Do not wait for ``task`` in `finish` if it is the task of a handler: it waits for the stop itself."""
        self._exempt.update(inbound for inbound in self._active if inbound.task is task)

    @property
    def _unfinished(self) -> set[Inbound]:
        return self._active - self._exempt

    async def finish(self, timeout: float, abort: asyncio.Event) -> int:
        """Wait for the handlers, at most ``timeout`` seconds or until ``abort`` is set, then cancel the remaining ones.
        Returns how many these are.

        Handlers whose callers have cancelled are cancelled at once, because no caller waits for them any more.
        """
        self._stopping = True
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        while self._intake.queued or self._unfinished:
            for inbound in self._unfinished:
                if inbound.token is not None and inbound.token.is_cancelled():
                    _task_of(inbound).cancel()
            remaining = until - loop.time()
            if remaining <= 0 or abort.is_set():
                break
            if self._unfinished:
                tasks = [_task_of(inbound) for inbound in self._unfinished]
                await asyncio.wait(tasks, timeout=min(remaining, _LOOK_EVERY))
            else:
                await asyncio.sleep(0)
        tasks = [_task_of(inbound) for inbound in self._unfinished]
        if tasks:
            logger.warning("%d handlers did not finish in time and are cancelled", len(tasks))
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=_CANCELLED_WITHIN)
        return len(tasks)


def _task_of(inbound: Inbound) -> asyncio.Task[None]:
    assert inbound.task is not None
    return inbound.task
