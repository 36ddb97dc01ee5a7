"""Processes whose agents handle tasks and write down what they handle, and those that submit tasks and read results."""

from __future__ import annotations

import asyncio
import datetime
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from autogen_core import AgentId, MessageContext, RoutedAgent, rpc

import natsrt
from benchmarks.chaos import roles
from benchmarks.chaos.counters import Tap
from benchmarks.chaos.durable import KEYED, PLAIN, Ask, handled_by, messages_in
from benchmarks.chaos.journal import Journal
from benchmarks.roles import Role
from natsrt.jetstream.streams import DEAD, EVENTS
from natsrt.task_types import TASK_TOPICS

TASKS = f"{EVENTS}_{TASK_TOPICS.name}"
"""The stream of tasks."""
BEGUN, HANDLED = "begun", "handled"
"""Words of the journal: a handler began, and it returned."""
_PAUSE = 0.1
"""Seconds between two attempts to submit a task."""
_AT_ONCE = 500
"""Tasks that are submitted, or whose results are read, at the same time."""


@dataclass
class Job:
    """A task with a unique ``name``. ``seconds``: how long its handler runs."""

    name: str
    seconds: float = 0.0


@dataclass
class Result:
    """What a handler returned: the name of the task, and how many tasks the agent has handled, with this one."""

    name: str
    count: int


@dataclass
class Names:
    """The reply to `Ask`: the names of tasks, in the order in which they were handled."""

    names: list[str]


class Plain(RoutedAgent):
    """Writes down each task that it handles."""

    journal: ClassVar[Journal]

    def __init__(self) -> None:
        super().__init__("works")
        self._names: list[str] = []

    @rpc
    async def on_job(self, message: Job, ctx: MessageContext) -> Result:
        self.journal.write(BEGUN, message.name)
        await asyncio.sleep(message.seconds)
        self._names.append(message.name)
        self.journal.write(HANDLED, message.name)
        return Result(message.name, len(self._names))

    @rpc
    async def on_ask(self, message: Ask, ctx: MessageContext) -> Names:
        return Names(self._names)


@natsrt.keyed
class Keyed(Plain):
    """Also keeps the names of its tasks as its state, in the order in which it handled them."""

    async def save_state(self) -> Mapping[str, Any]:
        return {"names": self._names}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self._names = list(state["names"])


_CLASSES: dict[str, type[Plain]] = {PLAIN: Plain, KEYED: Keyed}


class Worker(roles.Worker):
    """Hosts one agent type: its setting ``hosts``. Its setting ``journal`` is the directory of the journals."""

    async def start(self) -> None:
        options = dict(self.setup.options)
        Plain.journal = Journal(options.pop("journal"))
        agent_type = options.pop("hosts")
        self.setup = replace(self.setup, options=tuple(options.items()))
        await super().start()
        await natsrt.register(self.runtime, _CLASSES[agent_type], agent_type, _CLASSES[agent_type])


class Submitter(roles.Caller):
    """Submits tasks, each until it is confirmed, and reads the results of tasks, also of others."""

    async def submit(
        self, agent_type: str, first: int, count: int, keys: int, seconds: float, due: float | None = None
    ) -> dict[str, Any]:
        """Submit ``count`` tasks, the first one with the number ``first``, to ``keys`` agents.

        Their handlers run for ``seconds``. ``due`` is when they are handled, in seconds since the epoch; None: now.
        Returns their ids by name, the failed attempts by error, and the seconds that all took.
        """
        failed: Counter[str] = Counter()
        ids: dict[str, str] = {}
        at = None if due is None else datetime.datetime.fromtimestamp(due, datetime.UTC)
        began, room = time.monotonic(), asyncio.Semaphore(_AT_ONCE)

        async def one(number: int) -> None:
            job = Job(f"t{number}", seconds)
            while True:
                try:
                    async with room:
                        ticket = await self.runtime.submit_message(
                            job, AgentId(agent_type, f"k{number % keys}"), message_id=f"{os.getpid()}-{number}", at=at
                        )
                except natsrt.NatsrtError as error:
                    failed[type(error).__name__] += 1
                    await asyncio.sleep(_PAUSE)
                else:
                    ids[job.name] = ticket.id
                    return

        await asyncio.gather(*(one(number) for number in range(first, first + count)))
        return {"ids": ids, "failed": failed, "seconds": time.monotonic() - began}

    async def cancel(self, ids: Sequence[str]) -> int:
        """Cancel tasks. Returns how many were cancelled."""
        return sum(await asyncio.gather(*(self.runtime.ticket(one).cancel() for one in ids)))

    async def results(self, ids: Mapping[str, str], seconds: float) -> dict[str, str]:
        """Return, by name, the name in each result, or the class of the error; for all within ``seconds``."""
        room, deadline = asyncio.Semaphore(_AT_ONCE), time.monotonic() + seconds

        async def one(ticket_id: str) -> str:
            async with room:
                try:
                    timeout = max(0.1, deadline - time.monotonic())
                    result = await self.runtime.ticket(ticket_id).result(timeout, reply_type=Result)
                except Exception as error:
                    return f"{type(error).__name__}: {error}"
            return str(result.name)

        return dict(zip(ids, await asyncio.gather(*map(one, ids.values())), strict=True))

    async def left(self, seconds: float) -> dict[str, int]:
        """Return how many tasks and dead letters are stored, when there are no tasks any more or after ``seconds``."""
        deadline = time.monotonic() + seconds
        while True:
            stored = await messages_in(self.runtime, (TASKS, DEAD))
            if not stored[TASKS] or time.monotonic() > deadline:
                return stored
            await asyncio.sleep(_PAUSE)

    async def names(self, keys: int) -> list[list[str]]:
        """Return the names of the tasks that each keyed agent has handled."""
        replies = await handled_by(self.runtime, [f"k{number}" for number in range(keys)], Names)
        return [reply.names for reply in replies]


ROLES: dict[str, type[Role]] = {"worker": Worker, "caller": Submitter, "tap": Tap}
