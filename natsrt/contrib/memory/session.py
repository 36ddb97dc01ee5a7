"""Keeps the memory of one process in step with the log of its session.

Rules:

1. One task alone adds to the memory that is wrapped, in the order of the log. So nobody who is cancelled leaves a part
   of it there, and all processes have the same order.
2. What the server tells is taken at once, as long as it follows what was taken before. Otherwise, and for whoever waits
   in `in_step`, the stream is asked.
3. The memory holds what the stream holds. What the stream has dropped is dropped here too: by limits the oldest, which
   `ListMemory` can lose one by one; any other memory is cleared and filled again once an eighth of it is gone.
4. The memory is cleared and filled again as well if the stream was deleted, or lost messages that are not its oldest:
   an operator removed them, or a server came back with an older state of its disk. So it is if the last message that
   was taken is not in the stream: somebody else told it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

from autogen_core.memory import ListMemory, Memory, MemoryContent

from natsrt.background import end_tasks
from natsrt.contrib.memory.contents import decode
from natsrt.errors import CannotDecode, NatsrtError
from natsrt.storage import LogMessage, SessionLog

logger: logging.Logger = logging.getLogger("natsrt.memory")

_MOST_TOLD: Final = 1_000
"""Messages that the server told and that wait here, at most. Later they are read from the stream."""
_PAUSES: Final = (0.1, 0.5)
"""Seconds between the attempts to add what the memory refuses."""
_LOOKS: Final = 5
"""Looks at a stream that drops messages while it is read."""
_IN_THREAD: Final = 65_536
"""Bytes from which a body is decoded in a thread: an image of a megabyte takes some ten milliseconds."""
_KEPT_FAILURES: Final = 100


@asynccontextmanager
async def _no_cancellation() -> AsyncIterator[None]:
    """Turn a ``CancelledError`` that a memory raises by itself into a RuntimeError, which does not end the task."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RuntimeError("the memory that is wrapped raised CancelledError") from None


class _Entry(NamedTuple):
    """A message that the stream holds. ``held``: the memory has what it says."""

    sequence: int
    held: bool


class Session:
    """The memory of one process. A `LogReader`."""

    def __init__(self, log: SessionLog, memory: Memory, max_messages: int | None) -> None:
        self.log: SessionLog = log
        self.using: asyncio.Lock = asyncio.Lock()
        """Held while the memory is used."""
        self.left_out: int = 0
        """Number of messages that could not be read, or that the memory refused."""
        self._memory = memory
        self._max_messages = max_messages
        self._entries: deque[_Entry] = deque()
        self._position = 0
        """The sequence of the last message that was taken; 0: there was none."""
        self._last = b""
        """The body of that message."""
        self._seen = 0
        """All messages of the log up to this sequence of the stream were taken."""
        self._created: str | None = None
        """When the stream was made that was read; None before."""
        self._surplus = 0
        """Number of contents that the memory holds and the stream does not."""
        self._told: deque[LogMessage] = deque()
        self._unsure = True
        """Whether messages may have been missed."""
        self._doubtful = False
        """Whether the server may be another one than before."""
        self._wake = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []
        self._stored: list[tuple[int, asyncio.Future[None]]] = []
        """Who waits until a message of this process was taken, by its sequence."""
        self._waiters: set[asyncio.Future[None]] = set()
        """All who wait."""
        self._failures: dict[int, Exception] = {}
        """Why the memory refused messages, by their sequences: the last ones."""
        self._task: asyncio.Task[None] | None = None

    # -- starting and stopping ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to follow the log, and return when the memory is in step."""
        await self.log.open(self)
        self._task = asyncio.create_task(self._follow(), name="natsrt memory")
        await self.in_step()

    async def stop(self) -> None:
        """Follow the log no longer. Has no effect if stopped."""
        task, self._task = self._task, None
        if task is not None:
            await end_tasks(task)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(RuntimeError("the memory was closed meanwhile"))
        await self.log.close()

    # -- what the log tells ------------------------------------------------------------------------------------------

    def told(self, message: LogMessage) -> None:
        """Part of `LogReader`."""
        if len(self._told) < _MOST_TOLD:
            self._told.append(message)
        else:
            self._told.clear()
            self._unsure = True
        self._wake.set()

    def reconnected(self) -> None:
        """Part of `LogReader`."""
        self._unsure = self._doubtful = True
        self._wake.set()

    # -- waiting -----------------------------------------------------------------------------------------------------

    async def in_step(self) -> None:
        """Wait until the memory has all that the stream had when this was called.

        Raises what `SessionLog` raises, and what the memory raises when it is cleared.
        """
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        await self._wait(waiter)

    async def taken(self, sequence: int) -> None:
        """Wait until a message that this process has stored was taken, if the stream can be read.

        Raises what the memory raised when it was added.
        """
        if self._position < sequence:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._stored.append((sequence, waiter))
            await self._wait(waiter)
        if (failure := self._failures.pop(sequence, None)) is not None:
            failure.add_note("The content is stored, and other processes that share the memory may have it.")
            raise failure

    async def _wait(self, waiter: asyncio.Future[None]) -> None:
        if self._task is None:
            raise RuntimeError("the memory was closed meanwhile")
        self._waiters.add(waiter)
        self._wake.set()
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    # -- the one task ------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            waiting, self._waiting = self._waiting, []
            stored, self._stored = self._stored, []
            error: Exception | None = None
            try:
                if not await self._take_told() or waiting or self._unsure:
                    await self._catch_up()
                elif stored:
                    await self._read_until(max(sequence for sequence, _ in stored))
            except Exception as problem:
                error = problem
                if isinstance(problem, NatsrtError):  # the next query raises it, if it lasts
                    logger.debug("the memory of %s is not in step: %s", self.log.stream, problem)
                else:  # its text may quote a content
                    kind = type(problem).__name__
                    logger.warning("the memory of %s is not in step: clearing it raised %s", self.log.stream, kind)
            for waiter in waiting:
                if not waiter.done() and error is not None:
                    waiter.set_exception(error)
                elif not waiter.done():
                    waiter.set_result(None)
            for _, waiter in stored:  # its message is stored, whatever became of reading it
                if not waiter.done():
                    waiter.set_result(None)

    async def _take_told(self) -> bool:
        """Take what the server told. Returns False if something is missing before it, or is gone."""
        if self._created is None:
            return False
        for _ in range(len(self._told)):  # who waits may not wait for what comes meanwhile
            message = self._told.popleft()
            if message.sequence <= self._position:
                continue
            if message.previous != self._position:
                self._told.clear()
                return False
            await self._take(message)
        if self._told:
            self._wake.set()
        return True

    async def _catch_up(self) -> None:
        """Take all that the stream has, and drop what it has dropped."""
        self._unsure = False
        try:
            for _ in range(_LOOKS):
                if await self._look():
                    return
        except BaseException:
            self._unsure = True
            raise

    async def _look(self) -> bool:
        """Look at the stream once. Returns False if another look is needed."""
        position = self._position
        state = await self.log.state()
        if state.created != self._created:
            if self._created is not None:
                logger.warning("the stream %s was deleted, with all that its sessions remember", self.log.stream)
            await self._start_over(state.created)
        elif (self._doubtful or position > state.last) and not await self._is_there():
            logger.warning(
                "the stream %s does not have the message that was taken last: it is read again", self.log.stream
            )
            await self._start_over(state.created)
        self._doubtful = False
        is_new = state.last > self._seen
        if is_new:
            await self._read_until(state.last)
            self._seen = state.last
        gone = len(self._entries) - state.messages
        for entry in reversed(self._entries):
            if entry.sequence <= state.last:
                break
            gone -= 1  # it was stored after that look
        if gone < 0 and is_new:  # the stream has dropped messages before they were read
            return False
        if gone < 0 or (gone > 0 and not await self._drop_oldest(gone)) or self._is_stale:
            await self._start_over(state.created)
            return False
        return True

    async def _is_there(self) -> bool:
        """Whether the stream still has the message that was taken last."""
        if self._position == 0:
            return True
        found = await self.log.next(self._position - 1)
        return found is not None and (found.sequence, found.body) == (self._position, self._last)

    async def _drop_oldest(self, gone: int) -> bool:
        """Drop what the stream has dropped. Returns False if not only the oldest are gone."""
        first = await self.log.next(0)
        dropped = 0
        while self._entries and (first is None or self._entries[0].sequence < first.sequence):
            self._lose(self._entries.popleft())
            dropped += 1
        return dropped >= gone

    def _lose(self, entry: _Entry) -> None:
        if not entry.held:
            return
        if isinstance(self._memory, ListMemory):
            del self._memory.content[0]
        else:
            self._surplus += 1

    @property
    def _is_stale(self) -> bool:
        """Whether so much of the memory is gone from the stream that it is to be filled again."""
        return self._surplus > 0 and self._surplus * 8 >= len(self._entries)

    async def _start_over(self, created: str) -> None:
        """Forget all, so that the stream is read from its beginning."""
        await self._clear_memory()
        self._entries.clear()
        self._position = self._seen = self._surplus = 0
        self._created = created

    async def _clear_memory(self) -> None:
        async with self.using, _no_cancellation():
            await self._memory.clear()

    async def _read_until(self, last: int) -> None:
        """Take all that the stream has up to a sequence, as its leader says. Others may store more meanwhile, without
        an end, so no later message is waited for."""
        while self._position < last:
            message = await self.log.next(self._position)
            if message is None or message.sequence > last:
                return
            await self._take(message)
            more = True
            while more and self._position < last:
                page, more = await self.log.page(self._position)
                for message in page:
                    await self._take(message)
                more = more and bool(page)

    async def _take(self, message: LogMessage) -> None:
        held = False
        try:
            large = len(message.body) > _IN_THREAD
            content = await asyncio.to_thread(decode, message.body) if large else decode(message.body)
        except CannotDecode as error:
            self.left_out += 1
            logger.warning("message %d of the stream %s is left out: %s", message.sequence, self.log.stream, error)
        else:
            if content is None:
                await self._clear_memory()
                self._entries.clear()
                self._surplus = 0
            else:
                held = await self._add(message.sequence, content)
        self._position, self._last = message.sequence, message.body
        self._entries.append(_Entry(message.sequence, held))
        if self._max_messages is not None and len(self._entries) > self._max_messages:
            self._lose(self._entries.popleft())
            if self._is_stale:
                self._unsure = True
                self._wake.set()

    async def _add(self, sequence: int, content: MemoryContent) -> bool:
        """Add to the memory. Returns False if it refuses that, in all attempts."""
        for pause in (*_PAUSES, None):
            try:
                async with self.using, _no_cancellation():
                    await self._memory.add(content)
                return True
            except Exception as error:
                if pause is None:
                    self.left_out += 1
                    self._failures[sequence] = error
                    if len(self._failures) > _KEPT_FAILURES:
                        del self._failures[next(iter(self._failures))]
                    logger.error(
                        "message %d of the stream %s is left out: the memory that is wrapped raised %s",
                        sequence,
                        self.log.stream,
                        type(error).__name__,
                    )
                    return False
            await asyncio.sleep(pause)
        raise AssertionError  # the last attempt returns
