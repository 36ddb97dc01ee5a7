"""What a worker does with tasks beside what it does with other durable events: their results and their progress.

Rules:

1. A result is stored before its task is removed from its stream, and that before the delivery is acknowledged. So a
   worker that ends between two of these steps loses nothing, and a task that has a result is not handled again.
2. A task that was cancelled has a result too. So before a handler begins, it is looked for, unless the task has just
   been stored and delivered for the first time: then the cancellation itself is heard. It is always looked for if the
   submitter has chosen the message id: the task may have been stored again when the first one had just ended.
3. How far a task is, is told when its handler has run for a moment, so that short tasks cost nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass, replace
from typing import Final

from natsrt.agents.inbound import CALL, Answer, Inbound
from natsrt.background import BackgroundTasks
from natsrt.errors import TaskResultLost
from natsrt.hosting.answers import Answers
from natsrt.jetstream.task_store import TaskStore
from natsrt.retry_types import RetryOptions
from natsrt.task_types import TaskId, task_of
from natsrt.transport.bodies import Bodies
from natsrt.wire.envelope import Envelope
from natsrt.wire.task_attributes import attempts_of, has_chosen_id, result_ttl_of
from natsrt.wire.times import known_seconds

logger: logging.Logger = logging.getLogger("natsrt.tasks")

_TOLD_AFTER: Final = 0.25
"""Seconds after which it is told that a handler has begun."""
_TOLD_EVERY: Final = 0.1
"""Seconds between two reports of one task's progress, at least. The last one is always told."""
_TOLD_AGAIN: Final = 8 * 3600.0
"""Seconds after which what was told of a task is told again, because it expires."""
_HEARD_WITHIN: Final = 1.0
"""Seconds after its arrival within which a task that was cancelled is known by its cancellation."""
_SCHEDULER: Final = "Nats-Scheduler"
"""Header with which the server publishes a message that was scheduled."""


@dataclass(frozen=True, slots=True)
class TaskParts:
    """What all that handle tasks have in common. ``result_ttl`` is for tasks that do not say it."""

    store: TaskStore
    answers: Answers
    bodies: Bodies
    result_ttl: float
    background: BackgroundTasks


def as_task(inbound: Inbound) -> TaskId | None:
    """Have a message handled as a call if it is a task for an agent here. Returns the task; None if it is none."""
    task = task_of(inbound.topic)
    if task is None or inbound.key is None:
        return None
    inbound.kind, inbound.topic = CALL, None
    return task


def retries_of(general: RetryOptions, body: Envelope | None) -> RetryOptions:
    """How a task is tried again: as its agent type's events, and as often as its submitter said."""
    attempts = None if body is None else attempts_of(body)
    return general if attempts is None else replace(general, max_deliver=attempts)


class Tasks:
    """The results of the tasks that one worker handles."""

    def __init__(self, parts: TaskParts) -> None:
        self._parts = parts

    def ttl(self, body: Envelope | None) -> float:
        """Seconds for which the result of a task is kept."""
        said = None if body is None else result_ttl_of(body)
        return self._parts.result_ttl if said is None else said

    async def has_ended(self, task: TaskId) -> bool:
        """True if a task has a result that stays: a success, or that it was cancelled. Raises as `TaskStore.result`."""
        result = await self._parts.store.result(task)
        return result is not None and result.state != "failed"

    def may_have_ended(self, inbound: Inbound, attempt: int) -> bool:
        """True if it must be looked for the result of a task before it is handled. ``attempt`` is 1 if it was not
        delivered before. One that was scheduled, or whose id was chosen by its submitter, may have been submitted
        twice, and handled meanwhile."""
        body = inbound.body
        return (
            attempt > 1
            or body is None
            or has_chosen_id(body)
            or asyncio.get_running_loop().time() > inbound.arrived + _HEARD_WITHIN
            or _SCHEDULER in (inbound.message.headers or ())
        )

    async def succeeded(self, task: TaskId, answer: Answer, body: Envelope | None, attempt: int) -> None:
        """Store what a handler returned. Raises as `TaskStore.finish`."""
        store = self._parts.store
        await store.finish(task, "done", answer.body, answer.headers, ttl=self.ttl(body), attempt=attempt)

    async def failed(self, task: TaskId, error: BaseException, body: Envelope | None, attempt: int) -> None:
        """Store that a task is not tried again, and why. Raises as `TaskStore.finish`."""
        answer = self._parts.answers.passed_on(error, body, task.agent)
        store = self._parts.store
        await store.finish(task, "failed", answer.body, answer.headers, ttl=self.ttl(body), attempt=attempt)

    async def tell_end(self, task: TaskId) -> None:
        """Say that a task has ended which another worker handled. Does not fail."""
        await self._parts.store.tell_end(task)

    async def cancelled(self, task: TaskId, body: Envelope | None) -> None:
        """Store that a task was cancelled, if it has no result. Raises as `TaskStore.finish`."""
        await self._parts.store.finish(task, "cancelled", ttl=self.ttl(body))

    def on(self, subject: str) -> TaskId | None:
        """The task whose message has this subject; None if it is that of no task, or has a hash in place of a name."""
        return self._parts.store.task_on(subject)

    async def applied(self, task: TaskId, body: Envelope | None, attempt: int) -> None:
        """A keyed agent's state has the effect of a task already. Store that its result is lost, if it has none."""
        if await self._parts.store.result(task) is None:
            await self.failed(task, TaskResultLost(str(task)), body, attempt)

    async def remove(self, subject: str, body: Envelope | None, copy: int | None = None) -> bool:
        """Remove a task that has a result from its stream, and its payload. Returns False if that is not possible now.

        ``subject`` is that of its topic. ``body`` is None if its payload is still needed. ``copy`` is the sequence of
        its copy for a later attempt; None: there is none.
        """
        if body is not None and body.reference is not None:
            self._parts.bodies.discard(body.reference)
        return await self._parts.store.remove_handled(subject, copy)

    async def stop(self) -> None:
        """Tell no more progress. Has no effect if stopped."""
        await self._parts.background.cancel()

    def told(self, task: TaskId, attempt: int) -> Telling:
        """What is told of a task while a handler works."""
        return Telling(self._parts, task, attempt)


class Telling:
    """Tells how far one attempt to handle a task is. `begin` it when the handler begins, and `end` it."""

    def __init__(self, parts: TaskParts, task: TaskId, attempt: int) -> None:
        self._parts = parts
        self._task = task
        self.attempt: int = attempt
        self._fraction: float | None = None
        self._text: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._told_at = -math.inf
        self._telling: asyncio.Task[None] | None = None
        """The last report, while it is under way or after that."""
        self._ended = False

    def begin(self) -> None:
        """Its handler begins."""
        self._plan(_TOLD_AFTER)

    def progress(self, fraction: float | None, text: str | None) -> None:
        """Its handler says how far it is."""
        if self._ended:
            return
        self._fraction, self._text = fraction, text
        self._plan(max(0.0, self._told_at + _TOLD_EVERY - asyncio.get_running_loop().time()))

    def _plan(self, after: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(after, self._tell)

    def _tell(self) -> None:
        self._told_at = asyncio.get_running_loop().time()
        self._spawn(fraction=self._fraction, text=self._text)
        self._plan(_TOLD_AGAIN)

    def _spawn(self, *, fraction: float | None = None, text: str | None = None) -> None:
        store = self._parts.store
        self._telling = self._parts.background.spawn(
            store.tell(self._task, "running", attempt=self.attempt, fraction=fraction, text=text)
        )

    def _stop(self) -> None:
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def all_told(self) -> None:
        """Wait until the last report is published, so that what is told now comes after it."""
        if self._telling is not None:
            await asyncio.wait({self._telling})

    async def end(self) -> None:
        """The task has ended."""
        was_told = self._told_at > -math.inf
        self._stop()
        await self.all_told()
        if was_told or self.attempt > 1:
            await self._parts.store.tell_end(self._task)

    async def wait(self, due: float) -> None:
        """The attempt has failed, and the next one is ``due`` then, in seconds since the epoch."""
        self._stop()
        await self.all_told()
        await self._parts.store.tell(self._task, "waiting", attempt=self.attempt, due=known_seconds(due))

    def break_off(self) -> None:
        """The attempt has ended, and counts for nothing."""
        self._stop()
