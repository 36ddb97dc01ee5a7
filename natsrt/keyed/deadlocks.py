"""Calls of keyed agents that wait for one another for ever: found, and one of them refused.

``a`` handles a message and calls ``b``, whose handler calls ``a``: the chain lets that in. But where ``a`` calls ``b``
while ``b`` calls ``a``, each in a chain of its own, both calls wait behind handlers that wait for them, on whichever
workers and over however many agents. Promise: no call hangs. Rules:

1. A call waits for another one where a handler awaits that one in its own task, and either handles the first, or is
   inside the keyed agent that the first is for. A cycle of these is a deadlock. Each worker knows what its own
   handlers await now, so a call that was given up is in no cycle, wherever its message still waits.
2. While calls wait at their agents for over a second, their worker follows what they wait for, asking all workers one
   step after the other. Each such link begins once and ends once: two rounds one after the other that show the same
   cycle prove that it existed as a whole between them.
3. Of the calls of a cycle that wait at agents the one with the greatest reply subject is refused, by the worker where
   it waits: all workers that look choose the same one. Nobody handled it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from autogen_core import AgentId

from natsrt.agents.inbound import Inbound
from natsrt.errors import Deadlock
from natsrt.jetstream.registry.registry import Registry
from natsrt.keyed.mailbox import Mailbox
from natsrt.transport.calls import Calls
from natsrt.transport.peers import Peers
from natsrt.wire.peer_messages import WaitLink

logger = logging.getLogger("natsrt.hosting")

_SOON = 1.0
"""Seconds after which a call that waits is worth a look, and between two looks at what may be a cycle."""
_SELDOM = 3.0
"""Seconds between two looks at most."""
_AT_ONCE = 500
"""Calls that a worker is asked about in one message."""
_CYCLES = 20
"""Cycles that one look finds at most; the next one finds more."""
_LONGEST = 200
"""Characters of an agent's name that travel."""

Cycle = tuple[WaitLink, ...]


class _WaitingCall(NamedTuple):
    mailbox: Mailbox
    agent: AgentId
    handler_id: str
    since: float


class Deadlocks:
    """Lets the messages of one worker wait, and refuses the calls that would for ever."""

    def __init__(
        self, *, active: Collection[Inbound], calls: Calls, registry: Registry, peers: Peers, worker_id: str
    ) -> None:
        self._active = active
        self._calls = calls
        self._registry = registry
        self._peers = peers
        self._worker_id = worker_id
        self._waiting: dict[str, _WaitingCall] = {}
        """The calls that wait at agents here, the oldest first."""
        self._looking: asyncio.Task[None] | None = None

    async def wait(self, mailbox: Mailbox, agent: AgentId, handler_id: str, inbound: Inbound | None) -> None:
        """Wait until ``handler_id`` may enter. `Mailbox.exit` must follow. ``inbound`` is its message, if it has one.

        Raises `Deadlock`.
        """
        if inbound is None or inbound.call is None:
            await mailbox.wait(handler_id)
            return
        call = inbound.call.call_id
        loop = asyncio.get_running_loop()
        self._waiting[call] = _WaitingCall(mailbox, agent, handler_id, loop.time())
        if self._looking is None:
            self._looking = loop.create_task(self._look(), name="natsrt deadlocks")
        try:
            await mailbox.wait(handler_id)
        finally:
            self._waiting.pop(call, None)  # a plain caller may have used its reply subject twice

    def links(self, calls: Collection[str]) -> list[WaitLink]:
        """What these calls wait for, as far as this worker knows."""
        awaited = {entry: call for call, entry in self._calls.awaited()}
        handled: dict[str, Inbound] = {}
        inside: dict[str, Inbound] = {}
        for entry in list(self._active):
            if entry in awaited:
                handled[entry.message.reply] = entry
                inside[entry.handler_id] = entry
        links: list[WaitLink] = []
        for call in calls:
            if (waiting := self._waiting.get(call)) is not None:
                agent = str(waiting.agent)[:_LONGEST]
                entries = [inside[handler_id] for handler_id in waiting.mailbox.inside if handler_id in inside]
            else:
                agent, entries = "", [handled[call]] if call in handled else []
            links += [WaitLink(call, awaited[entry], entry.handler_id, agent) for entry in entries]
        return links

    async def _look(self) -> None:
        suspected: list[Cycle] = []
        pause = _SOON
        try:
            while self._waiting:
                await asyncio.sleep(pause)
                try:
                    found = find_cycles(await self._follow())
                except Exception:
                    logger.exception("looking for cycles of calls failed")
                    found = []
                for cycle in found:
                    if cycle in suspected:
                        self._refuse(cycle)
                pause = _SOON if found else min(2 * pause, _SELDOM)
                suspected = found
        finally:
            self._looking = None

    async def _follow(self) -> list[WaitLink]:
        """The links that can be reached from the calls that have waited here for some time."""
        since = asyncio.get_running_loop().time() - _SOON
        asked = {call for call, waiting in self._waiting.items() if waiting.since <= since}
        links = self.links(asked)
        new = links
        while ahead := sorted({link.awaited for link in new} - asked):
            asked.update(ahead)
            new = self.links(ahead)
            for start in range(0, len(ahead), _AT_ONCE):
                new += await self._ask_others(ahead[start : start + _AT_ONCE])
            links += new
        return links

    async def _ask_others(self, calls: Sequence[str]) -> list[WaitLink]:
        """Who does not answer knows nothing: if that is wrong, the cycle is found later."""
        asking = (
            self._peers.links(worker_id, calls)
            for worker_id in self._registry.view.workers
            if worker_id != self._worker_id
        )
        links: list[WaitLink] = []
        for answer in await asyncio.gather(*asking, return_exceptions=True):
            if isinstance(answer, BaseException):
                logger.info("a worker does not say what calls wait for there: %s", answer)
            else:
                links += answer
        return links

    def _refuse(self, cycle: Cycle) -> None:
        call = _chosen(cycle)
        if (waiting := self._waiting.get(call)) is not None:
            error = Deadlock(str(waiting.agent), [link.agent for link in cycle if link.agent])
            logger.warning("%s", error)
            waiting.mailbox.refuse(waiting.handler_id, error)

    async def stop(self) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)


def find_cycles(links: Iterable[WaitLink]) -> list[Cycle]:
    """The same for the same ``links`` in any order. Of cycles that share a call one may hide the others."""
    cycles: list[Cycle] = []
    left = sorted(set(links))
    while len(cycles) < _CYCLES and (cycle := _find_cycle(left)):
        cycles.append(cycle)
        chosen = _chosen(cycle)
        left = [link for link in left if link.call != chosen]
    return cycles


def _find_cycle(links: Iterable[WaitLink]) -> Cycle:
    graph: dict[str, list[str]] = {}
    by_ends: dict[tuple[str, str], WaitLink] = {}
    for link in links:
        if (link.call, link.awaited) not in by_ends:
            by_ends[link.call, link.awaited] = link
            graph.setdefault(link.call, []).append(link.awaited)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        calls: list[str] = error.args[1]  # the next one waits for each; the first comes again at the end
        return tuple(by_ends[calls[at], calls[at - 1]] for at in range(len(calls) - 1, 0, -1))
    return ()


def _chosen(cycle: Cycle) -> str:
    """The call that is refused: one that waits at an agent, as at least one of each cycle does."""
    return max((link.call for link in cycle if link.agent), default=cycle[0].call)
