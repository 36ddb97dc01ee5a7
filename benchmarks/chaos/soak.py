"""A cluster, workers and callers behind proxies, and everything that goes wrong with them at the moments of a plan."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any

from benchmarks import report
from benchmarks.chaos import soak_roles
from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.crew import Crew, Hand
from benchmarks.chaos.faults import Fault, Kind
from benchmarks.chaos.proxy import Proxy
from benchmarks.teams import ProcessFailed

SETTINGS = {"registry_replicas": 3, "heartbeat_interval": 0.5, "heartbeat_ttl": 4.0, "subscription_timeout": 20.0}

_STARTED_WITHIN = 60.0
"""Seconds within which a worker must have started, also if it needs several attempts."""


class Member:
    """A process, and its own way to each server."""

    def __init__(self, hand: Hand, proxies: Sequence[Proxy]) -> None:
        self.hand = hand
        self.proxies = proxies
        self.busy = asyncio.Lock()
        """Held by the fault that the process has: two at once would end each other's."""

    def links(self, action: Callable[[Proxy], None]) -> None:
        """Do the same with the links to all servers."""
        for proxy in self.proxies:
            action(proxy)


class Soak:
    """What a soak runs on. Use it with ``async with``. It ends only what it has started.

    Args:
        workers: Number of processes that host the agents.
        callers: Number of processes that call and publish.
    """

    def __init__(self, workers: int = 3, callers: int = 2) -> None:
        self._counts = (workers, callers)
        self._stack, self._proxies = AsyncExitStack(), AsyncExitStack()
        self.cluster = Cluster(advertise=False)
        self.workers: list[Member] = []
        self.callers: list[Member] = []
        self.done: Counter[str] = Counter()
        """How often each kind of fault came about."""
        self.failed_starts: Counter[str] = Counter()
        """How often a worker could not start, by the name of the error class."""
        self.journals = ""

    async def __aenter__(self) -> Soak:
        try:
            self.journals = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="natsrt-soak-"))
            await self._stack.enter_async_context(self.cluster)
            await self._stack.enter_async_context(self._proxies)  # they end after the processes that use them
            self._crew = await self._stack.enter_async_context(Crew(soak_roles.__name__))
            workers, callers = self._counts
            for _ in range(workers):
                self.workers.append(await self._start("worker", journal=self.journals))
            for _ in range(callers):
                self.callers.append(await self._start("caller"))
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for member in self.members:
            member.hand.resume()
        await self._stack.aclose()

    @property
    def members(self) -> list[Member]:
        """All running processes."""
        return [*self.workers, *self.callers]

    async def _start(self, role: str, **settings: Any) -> Member:
        proxies = [await self._proxies.enter_async_context(Proxy(url)) for url in self.cluster.urls]
        hand = await self._crew.start(role, ",".join(proxy.url for proxy in proxies), **SETTINGS, **settings)
        return Member(hand, proxies)

    async def ask(self, members: Sequence[Member], command: str, **arguments: Any) -> list[Any]:
        """Run the same command in all of these processes at the same time."""
        return list(await asyncio.gather(*(member.hand.ask(command, **arguments) for member in members)))

    async def carry_out(self, faults: Sequence[Fault]) -> None:
        """Let every fault happen at its time. Returns when all are over."""
        began = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                await asyncio.sleep(began + fault.at - asyncio.get_running_loop().time())
                group.create_task(self._happen(fault))

    def _say(self, fault: Fault, of: str) -> None:
        report.say(f"{fault.at:6.1f} s: {fault.kind.value}, {fault.seconds:.1f} s: {of}")

    async def _happen(self, fault: Fault) -> None:
        match fault.kind:
            case Kind.KILL_SERVER | Kind.FREEZE_SERVER:
                await self._hit_server(fault)
            case Kind.KILL_WORKER | Kind.STOP_WORKER:
                await self._replace_worker(fault)
            case Kind.PURGE_REGISTRY:
                await self._tell(self.callers, fault, "purge_registry")
            case Kind.SHIFT_CLOCK:
                await self._tell(self.members, fault, "shift_clock", seconds=fault.seconds)
            case _:
                await self._hit_process(fault)
        self.done[fault.kind.value] += 1

    async def _hit_server(self, fault: Fault) -> None:
        number = fault.target % len(self.cluster.servers)
        self._say(fault, f"server {number}")
        if fault.kind is Kind.KILL_SERVER:
            await self.cluster.kill(number)
            await asyncio.sleep(fault.seconds)
            await self.cluster.start(number)
        else:
            self.cluster.freeze(number)
            await asyncio.sleep(fault.seconds)
            self.cluster.resume(number)

    async def _replace_worker(self, fault: Fault) -> None:
        if len(self.workers) == 1:  # the others are being replaced
            self._not_possible(fault)
            return
        member = self.workers.pop(fault.target % len(self.workers))
        self._say(fault, f"worker {member.hand.pid}")
        async with member.busy:
            if fault.kind is Kind.KILL_WORKER:
                await member.hand.kill()
            else:
                member.hand.terminate()
                await member.hand.gone()
            for proxy in member.proxies:
                proxy.cut()
            await asyncio.sleep(fault.seconds)
        await self._start_another_worker()

    async def _start_another_worker(self) -> None:
        """Start a worker, again and again if it cannot start, as whatever runs workers does."""
        deadline = asyncio.get_running_loop().time() + _STARTED_WITHIN
        while True:
            try:
                self.workers.append(await self._start("worker", journal=self.journals))
                report.say(f"          worker {self.workers[-1].hand.pid} has started")
                return
            except ProcessFailed as error:
                self.failed_starts[_class_in(str(error))] += 1
                if asyncio.get_running_loop().time() > deadline:
                    raise

    async def _hit_process(self, fault: Fault) -> None:
        hits_caller = fault.kind is Kind.FREEZE_CALLER
        among = self.callers if hits_caller else self.workers if fault.kind is Kind.FREEZE_WORKER else self.members
        member = among[fault.target % len(among)]
        self._say(fault, f"process {member.hand.pid}")
        begin, end = self._two_sides(fault.kind, member)
        async with member.busy:
            if member not in self.members:  # it has ended meanwhile
                self._not_possible(fault)
                return
            begin()
            try:
                await asyncio.sleep(fault.seconds)
            finally:
                await end()

    def _two_sides(self, kind: Kind, member: Member) -> tuple[Callable[[], None], Callable[[], Awaitable[None]]]:
        """How a fault of one process begins and ends."""

        async def resume() -> None:
            member.hand.resume()

        async def thaw() -> None:
            member.links(Proxy.thaw)

        async def restore() -> None:
            for proxy in member.proxies:
                await proxy.restore()

        if kind is Kind.STALL_LINK:
            return lambda: member.links(Proxy.freeze), thaw
        if kind is Kind.CUT_LINK:
            return lambda: member.links(Proxy.cut), restore
        return member.hand.freeze, resume

    async def _tell(self, among: Sequence[Member], fault: Fault, command: str, **arguments: Any) -> None:
        """Give a process a command that is a fault. One that cannot carry it out now is left alone."""
        member = among[fault.target % len(among)]
        self._say(fault, f"process {member.hand.pid}")
        async with member.busy:
            try:
                await member.hand.ask(command, **arguments)
            except ProcessFailed:
                self._not_possible(fault)

    def _not_possible(self, fault: Fault) -> None:
        self.done[f"{fault.kind.value}, not possible then"] += 1


def _class_in(failure: str) -> str:
    """The class of the error of which a process tells, as ``chaos worker: WorkerLost: …``."""
    _, _, told = failure.partition(": ")
    return told.partition(":")[0]
