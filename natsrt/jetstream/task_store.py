"""What is kept of tasks: their results, and their progress. See `natsrt.task_types`.

Both are in one stream, which keeps the last message on each subject, each with its own time to live. Rules:

1. The first result of a task stays, whoever else stores one. Only that of a task which failed gives way to another
   one: the task was tried again by hand.
2. A message without a state is no result, and gives way to one. Such messages can be stored by those who may publish on
   a durable topic: the server's acknowledgement goes to the reply subject that they choose (docs/security.md).
3. A result is stored before its task is removed, so a task that is in neither place never was, or has expired.
4. Progress is told without waiting for the stream, and may get lost. It says nothing of a task that has a result.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import math
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
from autogen_core import TopicId
from nats.aio.msg import Msg

from natsrt.errors import CannotDecode, NatsrtError
from natsrt.jetstream.acks import WrongRevision
from natsrt.jetstream.blobs import Blobs
from natsrt.jetstream.dead_letter_box import event_topic
from natsrt.jetstream.durable import DurableStreams
from natsrt.jetstream.stored_once import WritesOnce
from natsrt.jetstream.stream_reader import StoredMessage, StreamReader
from natsrt.jetstream.streams import RESULTS, events_name, topic_filter
from natsrt.options import Options
from natsrt.task_types import ENDS, TASK_TOPICS, TaskId, TaskState, TaskStatus, task_of, task_prefix
from natsrt.transport.connection import Connection
from natsrt.wire.envelope import reference_of
from natsrt.wire.schedules import SCHEDULE, TARGET, Schedule
from natsrt.wire.subjects import Subjects, decode_token, encode_text
from natsrt.wire.times import known_seconds, utc

logger: logging.Logger = logging.getLogger("natsrt.tasks")

STATE_HEADER: Final = "Natsrt-Task-State"
"""Header of a result: ``done``, ``failed`` or ``cancelled``."""
TASK_HEADER: Final = "Natsrt-Task"
"""Header of a result and of progress: the id of the task's ticket, encoded as in subjects."""
ATTEMPT_HEADER: Final = "Natsrt-Task-Attempt"
"""Header of a result: the number of the attempt that ended with it."""
WORKER_HEADER: Final = "Natsrt-Task-Worker"
"""Header of a result: the worker that stored it."""
_TTL: Final = "Nats-TTL"
_PROGRESS_TTL: Final = 7 * 86400
"""Seconds for which progress is kept that nothing replaces: a worker may have died."""
_GONE_TTL: Final = 1
"""Seconds for which the end of progress is kept."""
_LONGEST_TEXT: Final = 500
"""Characters of a text of progress."""


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The result of a task as it is stored. ``body`` is a reply, or empty if the task was cancelled."""

    state: TaskState
    body: bytes
    headers: dict[str, str]
    sequence: int
    stored_at: float

    @property
    def ttl(self) -> int | None:
        """For how many seconds it is kept; None if it does not say so."""
        ttl = self.headers.get(_TTL, "")
        return int(ttl) if ttl.isdecimal() else None


class TaskStore:
    """Keeps and reads the results and the progress of tasks. Methods that wait raise as `StreamReader`."""

    def __init__(
        self,
        connection: Connection,
        subjects: Subjects,
        options: Options,
        streams: DurableStreams,
        reader: StreamReader,
        blobs: Blobs,
        worker_id: str,
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._reader = reader
        self._streams = streams
        self._blobs = blobs
        self._worker_id = worker_id
        self.stream: str = subjects.bucket(RESULTS)
        """The stream of results and progress."""
        self.tasks: str = events_name(subjects, TASK_TOPICS.name)
        """The stream of the tasks themselves."""
        self._writer = WritesOnce(connection, options, streams.mend_other)

    async def stop(self) -> None:
        """Write no more. Has no effect if stopped."""
        await self._writer.stop()

    # -- results -------------------------------------------------------------------------------------------------

    async def finish(
        self,
        task: TaskId,
        state: TaskState,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        *,
        ttl: float,
        attempt: int | None = None,
    ) -> bool:
        """Store the result of a task for ``ttl`` seconds, in the ``state`` in which it ends.

        ``body`` and ``headers`` are those of a reply. ``attempt`` is the number of the attempt that ended; None: none
        did. Returns False if it has another result, which stays.

        Raises `JetStreamFull`, `MessageTooLarge`, `StreamUnavailable` and `PermissionDenied`.
        """
        subject = self._subject("result", task)
        headers = (headers or {}) | result_headers(task, state, ttl, self._worker_id, attempt)
        self._writer.check_size(self.stream, body, headers)
        follows = 0
        while True:
            try:
                await self._writer.write(self.stream, subject, body, headers, follows=follows)
                return True
            except WrongRevision:
                stored = await self._kept(task)
            if stored is None or not _is_result(stored):
                follows = 0 if stored is None else stored.sequence  # None: it has expired
                continue
            present = self.read(stored)
            if present.state == "failed" and state != "cancelled" and present.sequence != follows:
                follows = present.sequence
            else:
                return present.state == state and present.body == body

    async def result(self, task: TaskId) -> TaskResult | None:
        """The result of a task; None if it has none."""
        found = await self._kept(task)
        return None if found is None or not _is_result(found) else self.read(found)

    async def _kept(self, task: TaskId) -> StoredMessage | None:
        """What is stored in the place of a task's result; None if nothing is."""
        return await self._reader.last(self.stream, self._subject("result", task))

    def read(self, message: StoredMessage) -> TaskResult:
        """The result that a message of the stream is. Raises `CannotDecode`."""
        state: Any = message.headers.get(STATE_HEADER)
        if state not in ENDS:
            raise CannotDecode("the result of a task", f"its {STATE_HEADER} is {state!r}", message.data)
        return TaskResult(state, message.data, dict(message.headers), message.sequence, message.stored_at)

    async def drop_result(self, task: TaskId) -> None:
        """Delete the result of a task, and what is left of its progress. Raises as `DurableStreams.purge`."""
        await self._streams.purge(self.stream, self._subject("*", task))

    def told(self, task: TaskId) -> tuple[str, str]:
        """The subjects on which the server tells the result and the progress of a task."""
        return (
            self._subjects.told(self._subject("result", task)),
            self._subjects.told(self._subject("progress", task)),
        )

    # -- progress ------------------------------------------------------------------------------------------------

    async def tell(
        self,
        task: TaskId,
        state: TaskState,
        *,
        attempt: int,
        fraction: float | None = None,
        text: str | None = None,
        due: float | None = None,
    ) -> None:
        """Say how far a task is. ``due`` is when it is tried again, in seconds since the epoch. Does not fail."""
        content = {
            "state": state,
            "attempt": attempt,
            "fraction": fraction,
            "text": None if text is None else text[:_LONGEST_TEXT],
            "workerid": self._worker_id,
            "due": due,
        }
        await self._tell(task, orjson.dumps({k: v for k, v in content.items() if v is not None}), _PROGRESS_TTL)

    async def tell_end(self, task: TaskId) -> None:
        """Say that there is no more progress of a task, which has ended. Does not fail."""
        await self._tell(task, b"{}", _GONE_TTL)

    async def _tell(self, task: TaskId, body: bytes, ttl: int) -> None:
        headers = {_TTL: str(ttl), TASK_HEADER: encode_text(str(task))}
        try:
            await self._connection.publish(self._subject("progress", task), body, headers=headers)
        except NatsrtError as error:
            logger.debug("the progress of %s could not be told: %s", task, error)

    # -- status --------------------------------------------------------------------------------------------------

    async def status(self, task: TaskId) -> TaskStatus | None:
        """What is known of a task; None if there is no such task, and no result of one."""
        # A result is stored before its task is removed, so it is looked for again after that.
        for _ in range(2):
            if (result := await self.result(task)) is not None:
                return self.status_of_result(task, result)
            queued, delayed, told = await asyncio.gather(
                self._last_task(self._queued(task)),
                self._last_task(self._delayed(task)),
                self._reader.last(self.stream, self._subject("progress", task)),
            )
            if queued is not None:
                told_of = None if told is None else progress_of(task, told.data, told.stored_at)
                return told_of or TaskStatus(id=str(task), state="queued", since=utc(queued.stored_at))
            if delayed is not None:
                return TaskStatus(
                    id=str(task), state="scheduled", since=utc(delayed.stored_at), due=due_of(delayed.headers)
                )
        return None

    def status_of_result(self, task: TaskId, result: TaskResult) -> TaskStatus:
        """The status of a task with this result."""
        attempt = result.headers.get(ATTEMPT_HEADER, "")
        return TaskStatus(
            id=str(task),
            state=result.state,
            attempt=int(attempt) if attempt.isdecimal() else None,
            worker_id=None if result.state == "cancelled" else result.headers.get(WORKER_HEADER),
            since=utc(result.stored_at),
        )

    async def statuses(self, agent_type: str | None = None) -> AsyncGenerator[TaskStatus, None]:
        """What is known of each task of an agent type; None: of all types. The one that changed last comes last.

        Of the tasks and their results, only headers are read. Raises as `DurableStreams.headers` too.
        """
        # A task goes on from its schedule to its stream, and from there to its result. So they are read in that order,
        # and the last one that is found counts.
        found: dict[TaskId, TaskStatus] = {}
        topics = topic_filter(
            self._subjects, TASK_TOPICS.patterns[0] if agent_type is None else task_prefix(agent_type)
        )
        for message in await self._streams.headers(self.tasks, self._subjects.all_delayed(self.tasks, topics)):
            headers = message.headers or {}
            if (task := await self._task_in(message, headers.get(TARGET, ""))) is not None:
                stored = message.metadata.timestamp
                found[task] = TaskStatus(id=str(task), state="scheduled", since=stored, due=due_of(headers))
        for message in await self._streams.headers(self.tasks, topics):
            if (task := await self._task_in(message, message.subject)) is not None:
                found[task] = TaskStatus(id=str(task), state="queued", since=message.metadata.timestamp)
        async for told in self._reader.read(self.stream, self._subjects.all_tasks("progress", agent_type)):
            task = _task_named(told.headers)
            if task in found and found[task].state == "queued":
                found[task] = progress_of(task, told.data, told.stored_at) or found[task]
        for message in await self._streams.headers(self.stream, self._subjects.all_tasks("result", agent_type)):
            if (task := _task_named(message.headers or {})) is not None:
                with contextlib.suppress(CannotDecode):  # any NATS client can write one
                    found[task] = self.status_of_result(task, self.read(_stored(message)))
        for status in sorted(found.values(), key=_changed):
            yield status

    async def _task_in(self, message: Msg, subject: str) -> TaskId | None:
        """The task that a message of the stream of tasks is for, which is or will be published on ``subject``.

        If the subject has a hash of a name, the message is read.
        """
        if (task := self.task_on(subject)) is not None:
            return task
        whole = await self._reader.message(self.tasks, message.metadata.sequence.stream)
        return None if whole is None else task_of(event_topic(self._subjects, subject, whole.data))

    # -- the task itself -----------------------------------------------------------------------------------------

    async def cancel(self, task: TaskId, ttl: float) -> bool:
        """Give a task the result ``cancelled``, kept for ``ttl`` seconds, and remove it.

        Returns False if it has another result. Otherwise its cancellation is to be announced.
        """
        # Its result comes first: a worker that gets the task after this sees it, and does not handle it.
        if not await self.finish(task, "cancelled", ttl=ttl):
            return False
        await self.remove(task)
        return True

    # Messages are deleted one by one, by their sequences. After a purge of a subject, the server takes messages for
    # acknowledged that come before the one that is gone: see decision 54.

    async def remove(self, task: TaskId) -> int:
        """Remove a task from its stream, whether it waits for a worker or for its time, and its payload. Returns the
        number of its messages there."""
        places = (self._queued(task), self._delayed(task))
        present = [m for m in await asyncio.gather(*map(self._last_task, places)) if m is not None]
        removed = await asyncio.gather(*(self._reader.delete(self.tasks, message.sequence) for message in present))
        for message in present:
            if (reference := reference_of(message.data)) is not None:
                self._blobs.delete(reference.blob_id)
        return sum(removed)

    async def remove_handled(self, subject: str, copy: int | None) -> bool:
        """Remove a task that has a result from its stream, where it is on ``subject``, and its ``copy`` for a later
        attempt, by its sequence; None: there is none. Returns False if that is not possible now: who gets it next sees
        its result."""
        try:
            message = await self._last_task(subject)
            present = copy if message is None else message.sequence
            for sequence in {present, copy}:
                if sequence is not None:
                    await self._reader.delete(self.tasks, sequence)
        except NatsrtError as error:
            logger.error("a task that has ended is still in %s, on %s: %s", self.tasks, subject, error)
            return False
        return True

    async def _last_task(self, subject: str) -> StoredMessage | None:
        return await self._reader.last(self.tasks, subject)

    def task_on(self, subject: str) -> TaskId | None:
        """The task whose message is on ``subject``; None if it cannot be read."""
        try:
            return task_of(TopicId(*self._subjects.parse_topic(subject)))
        except ValueError:
            return None

    def _queued(self, task: TaskId) -> str:
        """The subject on which a task waits for a worker."""
        return self._subjects.topic(task.topic.type, task.topic.source)

    def _delayed(self, task: TaskId) -> str:
        """The subject on which a task waits for its time."""
        return self._subjects.delayed(self.tasks, task.message_id, self._queued(task))

    def _subject(self, kind: str, task: TaskId) -> str:
        return self._subjects.task(kind, task.agent.type, task.agent.key, task.message_id)


def result_headers(task: TaskId, state: TaskState, ttl: float, worker_id: str, attempt: int | None) -> dict[str, str]:
    """The headers of a result, beside those of the reply that it is. The arguments are as in `TaskStore.finish`."""
    headers = {
        _TTL: str(math.ceil(ttl)),
        STATE_HEADER: state,
        TASK_HEADER: encode_text(str(task)),
        WORKER_HEADER: worker_id,
    }
    return headers if attempt is None else headers | {ATTEMPT_HEADER: str(attempt)}


def _task_named(headers: Mapping[str, str]) -> TaskId | None:
    """The task whose result or progress has these headers; None if they do not say so."""
    try:
        return TaskId.parse(decode_token(headers.get(TASK_HEADER, "")))
    except ValueError:
        return None


def _stored(message: Msg) -> StoredMessage:
    metadata = message.metadata
    return StoredMessage(
        stream=metadata.stream,
        sequence=metadata.sequence.stream,
        stored_at=metadata.timestamp.timestamp(),
        subject=message.subject,
        headers=message.headers or {},
        data=b"",
    )


def _changed(status: TaskStatus) -> float:
    return 0.0 if status.since is None else status.since.timestamp()


def _is_result(message: StoredMessage) -> bool:
    """False for a message that nobody stored as a result."""
    return STATE_HEADER in message.headers


def progress_of(task: TaskId, data: bytes, told_at: float | None) -> TaskStatus | None:
    """The status that a message of progress says; None if it says that there is none any more, or nothing."""
    try:
        said = orjson.loads(data)
    except ValueError:
        return None
    if not isinstance(said, dict) or said.get("state") not in ("running", "waiting"):
        return None
    due = said.get("due")
    return TaskStatus(
        id=str(task),
        state=said["state"],
        attempt=said.get("attempt") if isinstance(said.get("attempt"), int) else None,
        fraction=said.get("fraction") if isinstance(said.get("fraction"), int | float) else None,
        text=said.get("text") if isinstance(said.get("text"), str) else None,
        worker_id=said.get("workerid") if isinstance(said.get("workerid"), str) else None,
        since=None if told_at is None else utc(told_at),
        due=utc(known_seconds(due)) if isinstance(due, int | float) else None,
    )


def due_of(headers: Mapping[str, str]) -> datetime.datetime | None:
    """When a schedule publishes its message once; None if its headers do not say so."""
    try:
        return Schedule(headers.get(SCHEDULE, "")).last
    except ValueError:
        return None
