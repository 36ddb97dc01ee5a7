"""Tickets of tasks: their results, how far they are, and their end. See `natsrt.task_types`.

A result is waited for on the subject on which the server tells it, and looked for in its stream: at first, then again
after a subscription is in effect, after each reconnect, and from time to time, because what is told may get lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any, Final, TypeVar

from autogen_core import AgentId
from nats.aio.msg import Msg

from natsrt.errors import (
    CallTimeout,
    PermissionDenied,
    ServerUnreachable,
    StreamUnavailable,
    TaskCancelled,
    TaskUnknown,
)
from natsrt.jetstream.dead_letter_box import DeadLetterBox
from natsrt.jetstream.registry.registry import Registry
from natsrt.jetstream.served_tasks import ServedTasks, TaskSource
from natsrt.jetstream.task_store import TaskResult, TaskStore, progress_of
from natsrt.options import Options
from natsrt.sending.again import Again
from natsrt.sending.replies import Replies
from natsrt.task_types import TaskId, TaskStatus, task_of
from natsrt.transport.bodies import Bodies
from natsrt.transport.cancellation import Cancellations
from natsrt.transport.connection import Connection, Interest
from natsrt.wire.envelope import Envelope
from natsrt.wire.subjects import Subjects
from natsrt.wire.times import seconds_of

logger: logging.Logger = logging.getLogger("natsrt.tasks")

T = TypeVar("T")

_LOOK_EVERY: Final = 10.0
"""Seconds between two looks for a result that was not told."""
_LOOK_OFTEN: Final = 1.0
"""The same, where this user may not hear what is told."""
_TOLD: Final = ("running", "waiting")
"""The states that are told as progress, by one stream and its clock."""
_AGAIN: Final = 0.5
"""Seconds between two looks while the stream does not answer."""
_STOPPED: Final = "this runtime was stopped; get the ticket again, with its id, from one that is started"


def cancel_id(task: TaskId) -> str:
    """The id of the cancellation token of a task."""
    return task.cancel_id


class Ticket:
    """A task that was submitted, here or by another process: from `NatsAgentRuntime.submit_message` and
    `NatsAgentRuntime.ticket`.

    Use it with the runtime that made it, until that is stopped: then its methods raise `StreamUnavailable`. To iterate
    over it is to follow its progress: ``async for status in ticket`` yields a `TaskStatus` whenever it changes, the
    last one with the end of the task.
    """

    def __init__(self, tickets: Tickets, task: TaskId, sent: type[Any] | None = None) -> None:
        self._tickets = tickets
        self._task = task
        self._sent = sent

    @property
    def id(self) -> str:
        """Names the task in any process that uses the same servers: ``<agent type>/<agent key>/<message id>``."""
        return str(self._task)

    @property
    def agent(self) -> AgentId:
        """The agent that handles the task."""
        return self._task.agent

    @property
    def message_id(self) -> str:
        """The id of the task's message, as its handler gets it."""
        return self._task.message_id

    def __repr__(self) -> str:
        return f"Ticket({self.id!r})"

    async def result(self, timeout: float | None = None, *, reply_type: type[Any] | None = None) -> Any:
        """Wait for the task, and return what its handler returned.

        Args:
            timeout: Seconds to wait. None: without a limit.
            reply_type: The class to which the result is decoded. None: the result names its class.

        Raises:
            CallTimeout: The time is up. The task goes on.
            TaskCancelled: The task was cancelled.
            TaskUnknown: There is no such task, and no result of one.
            TaskResultLost: A keyed agent handled the task, and its worker was lost before it stored the result.
            BlobLost, BlobDamaged, CannotDecode: The result cannot be read.
            PermissionDenied: This user may not read results.
            StreamUnavailable: The runtime was stopped. Another one, or this one after a new start, gets the result with
                the id of the ticket.
            Exception: What the handler raised in the last attempt, with its class if that is known here, else
                `RemoteAgentError`.
        """
        return await self._tickets.result(self._task, timeout, self._sent, reply_type)

    async def status(self) -> TaskStatus:
        """Return what is known of the task now.

        Raises `TaskUnknown`, `StreamUnavailable` and `PermissionDenied`.
        """
        return await self._tickets.status(self._task)

    async def cancel(self) -> bool:
        """Cancel the task. Returns False if it has a result already.

        A task that waits, for a worker, for its time or for its next attempt, is not handled any more. If its handler
        runs, the handler's cancellation token is set, and what it returns is dropped. In all cases the result is
        `TaskCancelled` from now on.

        Raises `TaskUnknown`, `JetStreamFull`, `StreamUnavailable` and `PermissionDenied`.
        """
        return await self._tickets.cancel(self._task)

    def __aiter__(self) -> AsyncIterator[TaskStatus]:
        return self._tickets.follow(self._task)


def _as_told(task: TaskId, message: Msg) -> TaskStatus | None:
    """The status of a task that the server tells; None: it is to be looked for."""
    return progress_of(task, message.data, _told_at(message))


def _told_at(message: Msg) -> float | None:
    """When the stream stored what the server tells, in seconds since the epoch; None if it does not say so."""
    time = (message.headers or {}).get("Nats-Time-Stamp")
    return None if time is None else seconds_of(time)


def _is_news(status: TaskStatus, last: TaskStatus) -> bool:
    """True if a status differs from the ``last`` one. What was told before that was looked for is no news."""
    both_told = status.state in _TOLD and last.state in _TOLD
    if both_told and status.since is not None and last.since is not None and status.since < last.since:
        return False
    return replace(status, since=None) != replace(last, since=None)


async def _answer(reading: Awaitable[T | None]) -> T | None:
    """What is read; None also if the stream does not answer now."""
    try:
        return await reading
    except StreamUnavailable as error:
        logger.debug("%s", error)
        return None


class _Told:
    """What the server tells of a task while somebody waits for it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._interests: list[Interest] = []
        self._messages: asyncio.Queue[Msg | None] = asyncio.Queue()
        """What has come and was not returned yet. None is from `wake`."""
        self._reconnects = 0

    async def listen(self, subjects: Iterable[str]) -> None:
        """Subscribe. This user may not be allowed to."""
        for subject in subjects:
            interest = await self._connection.subscribe(subject, self._messages.put_nowait, optional=True)
            self._interests.append(interest)

    async def stop(self) -> None:
        """End the subscriptions."""
        for interest in self._interests:
            await self._connection.unsubscribe(interest)

    async def in_effect(self) -> None:
        """Wait until the subscriptions are in effect."""
        while True:
            await self._connection.wait_connected(None)
            self._reconnects = self._connection.reconnects
            try:
                await self._connection.barrier()
                return
            except ServerUnreachable:
                await asyncio.sleep(_AGAIN)

    async def next(self) -> Msg | None:
        """Wait for the next message. None: the task is to be looked for first, because messages may have got lost."""
        clock = asyncio.get_running_loop().time
        heard = all(interest.refusal is None for interest in self._interests)
        until = clock() + (_LOOK_EVERY if heard else _LOOK_OFTEN)
        while clock() < until and self._connection.reconnects == self._reconnects:
            try:
                async with asyncio.timeout(_AGAIN):
                    return await self._messages.get()
            except TimeoutError:
                continue
        return None

    def wake(self) -> None:
        """Have `next` return None, after the messages that have come."""
        self._messages.put_nowait(None)


class Tickets:
    """The tickets of one runtime."""

    def __init__(
        self,
        *,
        connection: Connection,
        subjects: Subjects,
        options: Options,
        registry: Registry,
        store: TaskStore,
        replies: Replies,
        bodies: Bodies,
        cancellations: Cancellations,
        dead_letters: DeadLetterBox,
        again: Again,
    ) -> None:
        self._connection = connection
        self._registry = registry
        self._store = store
        self._replies = replies
        self._bodies = bodies
        self._cancellations = cancellations
        self._dead_letters = dead_letters
        self._again = again
        self._served = ServedTasks(connection, subjects, store.stream)
        self._result_ttl = options.result_ttl
        self._waiting: set[_Told] = set()
        """What those hear who wait now."""
        self._stopped = False

    async def stop(self) -> None:
        """End all waits for results and progress: they raise `StreamUnavailable`. Has no effect if stopped."""
        self._stopped = True
        for told in self._waiting:
            told.wake()

    def ticket(self, task: TaskId, sent: type[Any] | None = None) -> Ticket:
        """The ticket of a task. ``sent`` is the class of its message; None: not known here."""
        return Ticket(self, task, sent)

    @property
    def _source(self) -> TaskSource:
        return self._store if self._registry.reads_bucket else self._served

    def _require(self, task: TaskId) -> None:
        """Raise `TaskUnknown` if no task was ever submitted, and `StreamUnavailable` after the stop."""
        if self._stopped:
            raise StreamUnavailable("read", self._store.stream, _STOPPED)
        if self._store.tasks not in self._registry.view.durable:
            raise TaskUnknown(str(task))

    async def status(self, task: TaskId) -> TaskStatus:
        """See `Ticket.status`."""
        self._require(task)
        status = await self._source.status(task)
        if status is None:
            raise TaskUnknown(str(task))
        return status

    async def statuses(self, agent_type: str | None) -> AsyncGenerator[TaskStatus, None]:
        """See `NatsAgentRuntime.tasks`."""
        if self._store.tasks in self._registry.view.durable:  # else there never was a task
            async for status in self._store.statuses(agent_type):
                yield status

    async def has_result(self, task: TaskId) -> bool:
        """True if a task has a result, as far as this user may know that. Raises `StreamUnavailable`."""
        try:
            return await self._source.result(task) is not None
        except PermissionDenied:
            return False

    async def stored_result(self, task: TaskId) -> TaskResult | None:
        """The result of a task as it is stored; None if it has none. Raises as `status`."""
        return await self._source.result(task)

    # -- results -------------------------------------------------------------------------------------------------

    async def result(
        self, task: TaskId, timeout: float | None, sent: type[Any] | None, reply_type: type[Any] | None
    ) -> Any:
        """See `Ticket.result`. ``sent`` is the class of the message; None: not known."""
        answer, reply = await self._reply(task, timeout)
        return self._replies.result(answer, reply, sent or object, reply_type, task.agent)

    async def payload(self, task: TaskId, timeout: float | None) -> bytes:
        """Wait for the result of a task, and return the payload of the reply as it is. Raises as `Ticket.result`."""
        answer, reply = await self._reply(task, timeout)
        return self._replies.payload(answer, reply, task.agent)

    async def _reply(self, task: TaskId, timeout: float | None) -> tuple[Envelope | None, Msg]:
        """Wait for the reply that is a task's result, and return its envelope with its payload, and the reply."""
        if timeout is not None and (
            isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0
        ):
            raise ValueError(f"timeout must be a number of seconds above 0, or None, not {timeout!r:.60}")
        try:
            async with asyncio.timeout(timeout) as limit:
                result = await self._wait(task)
        except TimeoutError:
            if not limit.expired():
                raise
            raise CallTimeout(f"the task {task}", timeout or 0.0, "timeout") from None
        if result.state == "cancelled":
            raise TaskCancelled(str(task))
        reply = Msg(self._connection.client, "", "", result.body, dict(result.headers))
        answer = self._replies.unpack(reply)
        if answer is not None:
            await self._bodies.load(answer)
        return answer, reply

    async def _wait(self, task: TaskId) -> TaskResult:
        """Return the result of a task when it has one. Raises `TaskUnknown`."""
        self._require(task)
        if (result := await _answer(self._source.result(task))) is not None:
            return result
        subject, _ = self._store.told(task)
        async with self._listen(subject) as told:
            while (result := await self._look(task, told, self._result_of)) is None:
                await told.next()
            return result

    async def _result_of(self, task: TaskId) -> TaskResult | None:
        """The result of a task; None if it has none yet. Raises `TaskUnknown`."""
        result = await self._source.result(task)
        if result is None:
            await self.status(task)
        return result

    # -- progress ------------------------------------------------------------------------------------------------

    async def follow(self, task: TaskId) -> AsyncGenerator[TaskStatus, None]:
        """Yield the status of a task, and then each change, until it has ended. Waits while the stream does not answer.

        Raises `TaskUnknown`, `PermissionDenied`, and `StreamUnavailable` when this runtime stops.
        """
        self._require(task)
        last: TaskStatus | None = None
        async with self._listen(*self._store.told(task)) as told:
            while True:
                status = await self._look(task, told, self.status)
                if status is None:
                    await asyncio.sleep(_AGAIN)
                while status is not None:
                    if last is None or _is_news(status, last):
                        yield status
                        last = status
                    if status.has_ended:
                        return
                    message = await told.next()
                    status = None if message is None else _as_told(task, message)

    # -- both ----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _listen(self, *subjects: str) -> AsyncIterator[_Told]:
        """What is told on these subjects, until the end of the block."""
        told = _Told(self._connection)
        try:
            await told.listen(subjects)
            self._waiting.add(told)
            yield told
        finally:
            self._waiting.discard(told)
            await told.stop()

    async def _look(self, task: TaskId, told: _Told, read: Callable[[TaskId], Awaitable[T | None]]) -> T | None:
        """What ``read`` finds when ``told`` is in effect. None: nothing, or the stream does not answer now."""
        self._require(task)
        await told.in_effect()
        return await _answer(read(task))

    # -- ends ----------------------------------------------------------------------------------------------------

    async def cancel(self, task: TaskId) -> bool:
        """See `Ticket.cancel`."""
        status = await self.status(task)
        if status.has_ended or not await self._source.cancel(task, self._result_ttl):
            return False
        self._cancellations.announce(cancel_id(task))
        # A worker that holds the task must not begin it after this returns. One that does not hear of it drops what
        # comes of it.
        with contextlib.suppress(ServerUnreachable):
            await self._connection.barrier()
        return True

    async def retry(self, task: TaskId) -> bool:
        """Give a task that has failed to its agent type again. Returns False if there is no dead letter of it.

        Raises as `NatsAgentRuntime.redrive`.
        """
        async for letter in self._dead_letters.read(task.agent.type):
            if task_of(letter.topic) == task:
                await self._store.drop_result(task)
                await self._again.redrive(letter)
                return True
        return False
