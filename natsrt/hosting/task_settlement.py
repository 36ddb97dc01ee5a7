"""How tasks are settled: as other durable events, but handled as calls, and with results.

`natsrt.hosting.tasks` has the rules.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable
from typing import Any

from natsrt.agents.current_task import tells_progress
from natsrt.agents.inbound import Answer, EventDropped, Inbound, SentBack
from natsrt.errors import NatsrtError
from natsrt.hosting.answers import Answers
from natsrt.hosting.durable_settlement import DurableSettlement, Held
from natsrt.hosting.endings import Acknowledge, Bury, Fate, GiveBack, TryAgain
from natsrt.hosting.settlements import ConfirmedSettlement, ReplySettlement
from natsrt.hosting.tasks import Tasks, Telling, as_task, retries_of
from natsrt.retry_types import RetryOptions
from natsrt.task_types import TaskId
from natsrt.wire.envelope import Envelope

logger: logging.Logger = logging.getLogger("natsrt.tasks")


class TaskSettlement(DurableSettlement):
    """Pulls the tasks of one agent type that is not keyed, and settles them."""

    wants_answer = True

    def __init__(self, tasks: Tasks, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._tasks = tasks
        self._telling: dict[Inbound, tuple[TaskId, Telling]] = {}
        """The tasks whose handlers are running, or about to."""

    def identified(self, inbound: Inbound) -> None:
        super().identified(inbound)
        task = as_task(inbound)
        held = self._held.get(inbound)
        if task is not None and held is not None:
            telling = self._tasks.told(task, held.attempts)
            self._telling[inbound] = task, telling
            tells_progress.set(telling.progress)

    def kept_for(self, inbound: Inbound) -> float | None:
        return self._tasks.ttl(inbound.body)

    def retries(self, inbound: Inbound) -> RetryOptions:
        return retries_of(super().retries(inbound), inbound.body)

    async def begins(self, inbound: Inbound) -> None:
        held, known = self._held.get(inbound), self._telling.get(inbound)
        if held is None or known is None:
            return
        task, telling = known
        await _refuse_ended(self._tasks, task, inbound, held.delivery.attempt + held.delivery.before)
        await super().begins(inbound)
        telling.attempt = held.attempts
        telling.begin()

    def handled(self, inbound: Inbound, answer: Answer | None) -> Awaitable[None] | None:
        held, known = self._held.get(inbound), self._telling.get(inbound)
        if held is None:
            return None
        if known is None or answer is None:  # it is for no agent, or has ended before it could be handled
            return self._settle(inbound, held, self._fate_of_handled(inbound, held))
        return self._succeed(inbound, held, known[0], answer)

    async def _succeed(self, inbound: Inbound, held: Held, task: TaskId, answer: Answer) -> None:
        """Store a result, and then settle its task."""
        try:
            await self._tasks.succeeded(task, answer, inbound.body, held.attempts)
        except NatsrtError as error:
            logger.error("the result of %s cannot be stored, and it is handled again: %s", task, error)
            await self._settle(inbound, held, GiveBack(self._retries.retry_delay_max))
            return
        await self._settle(inbound, held, Acknowledge())

    async def _settle(self, inbound: Inbound, held: Held, decided: Fate) -> None:
        match decided:
            case Acknowledge() if not await self._remove(inbound, held, inbound.body):
                decided = GiveBack(self._retries.retry_delay_max)
            case TryAgain(after=after) if inbound in self._telling:
                await self._telling[inbound][1].wait(time.time() + after)
        await super()._settle(inbound, held, decided)

    async def _bury(self, inbound: Inbound, held: Held, decided: Bury) -> None:
        if (task := self._task(inbound)) is not None:
            try:
                await self._tasks.failed(task, decided.error, inbound.body, decided.attempts)
            except NatsrtError as error:
                logger.error("the failure of %s cannot be stored, and it is tried again: %s", task, error)
                self._give_back(inbound, held, self._retries.retry_delay_max)
                return
        await super()._bury(inbound, held, decided)

    async def _buried(self, inbound: Inbound, held: Held, decided: Bury) -> None:
        if await self._remove(inbound, held, None):
            await super()._buried(inbound, held, decided)
        else:
            self._give_back(inbound, held, self._retries.retry_delay_max)

    async def _remove(self, inbound: Inbound, held: Held, body: Envelope | None) -> bool:
        """Remove a task that has a result, before its delivery is acknowledged. Returns False if that is not possible
        now. ``body`` as in `Tasks.remove`."""
        if inbound in self._telling:
            await self._telling[inbound][1].end()
        if self._task(inbound) is None:
            return True
        delivery = held.delivery
        copy = delivery.sequence if delivery.sequence != delivery.first_sequence else None
        return await self._tasks.remove(inbound.message.subject, body, copy)

    def _task(self, inbound: Inbound) -> TaskId | None:
        """The task that a message is, also if it could not be read; None if it is none."""
        known = self._telling.get(inbound)
        return self._tasks.on(inbound.message.subject) if known is None else known[0]

    def _release(self, inbound: Inbound) -> None:
        known = self._telling.pop(inbound, None)
        if known is not None:
            known[1].break_off()
        super()._release(inbound)


class ConfirmedTasks(ConfirmedSettlement):
    """For a task that was delivered to a keyed agent: it is handled as a call, and its result is stored before the
    feeder of the agent's type is told that it was handled."""

    wants_answer = True
    looks_before_handlers = True

    def __init__(self, replies: ReplySettlement, answers: Answers, tasks: Tasks) -> None:
        super().__init__(replies, answers)
        self._tasks = tasks
        self._telling: dict[Inbound, tuple[TaskId, Telling]] = {}

    def identified(self, inbound: Inbound) -> None:
        super().identified(inbound)
        task = as_task(inbound)
        if task is not None:
            telling = self._tasks.told(task, _attempt(inbound))
            self._telling[inbound] = task, telling
            tells_progress.set(telling.progress)

    def kept_for(self, inbound: Inbound) -> float | None:
        return self._tasks.ttl(inbound.body)

    async def begins(self, inbound: Inbound) -> None:
        task, telling = self._telling[inbound]
        await _refuse_ended(self._tasks, task, inbound, _attempt(inbound))
        telling.begin()

    def handled(self, inbound: Inbound, answer: Answer | None) -> Awaitable[None]:
        return self._finish(inbound, answer)

    async def _finish(self, inbound: Inbound, answer: Answer | None) -> None:
        known = self._telling.pop(inbound, None)
        if known is None:  # it is for no agent here
            await super().handled(inbound, None)
            return
        task, telling = known
        try:
            if answer is None:
                await self._tasks.applied(task, inbound.body, _attempt(inbound))
            else:
                await self._tasks.succeeded(task, answer, inbound.body, _attempt(inbound))
        except NatsrtError as error:
            telling.break_off()
            logger.error("the result of %s cannot be stored: %s", task, error)
            await super().refused(inbound, error)
            return
        await telling.end()
        await super().handled(inbound, None)

    async def failed(self, inbound: Inbound, error: BaseException, source: str) -> None:
        self._break_off(inbound)
        await super().failed(inbound, error, source)

    async def refused(self, inbound: Inbound, error: Exception) -> None:
        self._break_off(inbound)
        await super().refused(inbound, error)

    def _break_off(self, inbound: Inbound) -> None:
        known = self._telling.pop(inbound, None)
        if known is not None:
            known[1].break_off()


async def _refuse_ended(tasks: Tasks, task: TaskId, inbound: Inbound, attempt: int) -> None:
    """Raise `EventDropped` for a task that is not to be handled, because it has a result, or was cancelled."""
    token = inbound.token
    cancelled = token is not None and token.is_cancelled()
    if not cancelled and not tasks.may_have_ended(inbound, attempt):
        return
    try:
        ended = await tasks.has_ended(task)
        if cancelled and not ended:  # by somebody who cannot store that
            await tasks.cancelled(task, inbound.body)
    except NatsrtError as error:
        logger.warning("%s is given back, since it is not known whether it has a result: %s", task, error)
        raise SentBack(error) from None
    if ended or cancelled:
        raise EventDropped


def _attempt(inbound: Inbound) -> int:
    return 1 if inbound.event is None else inbound.event.attempt
