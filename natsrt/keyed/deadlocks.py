"""Finds calls of keyed agents that wait for one another in a cycle, and refuses one call of each cycle.

If ``a`` handles a message and calls ``b``, whose handler calls ``a``, the chain of that call lets it in. But if ``a``
calls ``b`` while ``b`` calls ``a``, each in a chain of its own, both calls wait behind handlers that wait for them.
Such a cycle may lead over any number of agents and workers. No call may hang, so it must be found. Rules:

1. A call waits for a second call if a handler awaits the second call, and this handler either handles the first call,
   or must end before the first call enters the mailbox in which it waits. A cycle of such links is a deadlock. A
   handler awaits what its own task awaits, and what it awaits in other tasks, as far as `natsrt.awaiting` can tell that
   it does not go on earlier. A handler that asks its caller awaits the calls that the answer waits for: the caller says
   which, with how far it is in the stream. Each worker reports only what its own handlers await now, so a call that was
   given up is in no cycle, even if its message still waits somewhere.
2. While calls have waited in mailboxes for over a second, their worker follows the links that start at them, and asks
   all other workers at each step. A link begins once and ends once. So if two rounds in a row find the same cycle, all
   its links existed at the same time between the rounds.
3. Of the calls of a cycle that wait in mailboxes, the one with the greatest reply subject is refused, by the worker
   where it waits. All workers that find the cycle choose the same call. A refused call was not handled.

`find_cycles` is the search: it gets links as values, and does no I/O.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from autogen_core import AgentId

from natsrt.agents.chain import Chain, Handler
from natsrt.agents.inbound import Inbound, waiters
from natsrt.awaiting import awaits
from natsrt.background import end_tasks
from natsrt.errors import Deadlock
from natsrt.jetstream.registry.registry import Registry
from natsrt.keyed.mailbox import Mailbox
from natsrt.transport.calls import Calls
from natsrt.transport.peers import Peers
from natsrt.wire.peer_messages import WaitLink

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_SOON = 1.0
"""Seconds that a call waits before its links are followed; also those between two rounds while a cycle is suspected."""
_SELDOM = 3.0
"""Seconds between two rounds at most, while none finds a cycle."""
_AT_ONCE = 500
"""Number of calls that a worker is asked about in one message at most."""
_CYCLES = 20
"""Number of cycles that one round finds at most. The next round finds more."""
_NAME_LENGTH = 200
"""Characters of an agent's name in a link at most. docs/PROTOCOL.md fixes this length."""

Cycle = tuple[WaitLink, ...]


class _WaitingCall(NamedTuple):
    """A call that waits in a mailbox since ``since``, in the event loop's time."""

    mailbox: Mailbox
    agent: AgentId
    handler_id: str
    since: float


class Deadlocks:
    """Lets the messages of one worker wait for their turns, and refuses calls whose turns would never come.

    ``active`` has the messages that are being handled on this worker.
    """

    def __init__(
        self, *, active: Collection[Inbound], calls: Calls, registry: Registry, peers: Peers, worker_id: str
    ) -> None:
        self._active = active
        self._calls = calls
        self._registry = registry
        self._peers = peers
        self._worker_id = worker_id
        self._waiting: dict[str, _WaitingCall] = {}
        """By reply subject: the calls that wait in mailboxes here, the oldest first."""
        self._searching: asyncio.Task[None] | None = None
        """The task that searches; None while no call waits."""

    async def wait(
        self, mailbox: Mailbox, agent: AgentId, handler: Handler, chain: Chain, inbound: Inbound | None
    ) -> None:
        """Wait until the handler has entered the mailbox of ``agent``; then `Mailbox.exit` must follow.

        ``inbound`` is the message that it is for, with this chain; None if there is none. Raises `Deadlock` if it would
        wait for ever.
        """
        if inbound is None or inbound.call is None:
            await mailbox.wait(handler, chain)
            return
        logged = inbound.call
        logged.on_abandoned = lambda: mailbox.refuse(handler.handler_id, inbound.unwanted())
        call = logged.call_id
        loop = asyncio.get_running_loop()
        self._waiting[call] = _WaitingCall(mailbox, agent, handler.handler_id, loop.time())
        if self._searching is None:
            self._searching = loop.create_task(self._search(), name="natsrt deadlocks")
        try:
            await mailbox.wait(handler, chain)
        finally:
            logged.on_abandoned = None
            self._waiting.pop(call, None)  # a plain caller may have used its reply subject twice

    def links(self, calls: Collection[str]) -> list[WaitLink]:
        """The links that start at these calls and lead over handlers of this worker."""
        by_call = {inbound.message.reply: inbound for inbound in self._active}
        by_handler = {inbound.handler: inbound for inbound in self._active}
        awaited = waiters(self._calls.awaited())
        links: list[WaitLink] = []
        for call in calls:
            if (waiting := self._waiting.get(call)) is not None:
                agent = str(waiting.agent)[:_NAME_LENGTH]
                handlers = waiting.mailbox.keep_out(waiting.handler_id)
                inbounds = [by_handler[handler] for handler in handlers if handler in by_handler]
            else:
                agent, inbounds = "", [by_call[call]] if call in by_call else []
                inbounds += [
                    by_handler[above] for one in inbounds for above in _resumes_after(one) if above in by_handler
                ]
            links += [
                WaitLink(call, reply, inbound.handler.handler_id if inbound.handler else "", agent)
                for inbound in inbounds
                for reply, task in (
                    *awaited.get(inbound, ()),
                    *(() if inbound.stream is None else inbound.stream.awaited()),
                )
                if inbound.task is not None and awaits(inbound.task, task, surely=True)
            ]
        return links

    async def _search(self) -> None:
        suspected: list[Cycle] = []
        pause = _SOON
        try:
            while self._waiting:
                await asyncio.sleep(pause)
                try:
                    found = find_cycles(await self._follow())
                except Exception:
                    logger.exception("searching for cycles of calls failed")
                    found = []
                for cycle in found:
                    if cycle in suspected:
                        self._refuse(cycle)
                pause = _SOON if found else min(2 * pause, _SELDOM)
                suspected = found
        finally:
            self._searching = None

    async def _follow(self) -> list[WaitLink]:
        """All links that are reached from the calls that have waited here for `_SOON` seconds."""
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
        """The links that start at these calls on all other workers.

        A worker that does not answer is taken to have none. If it has one, a later round finds it.
        """
        asking = (
            self._peers.links(self._registry.peer_subject(worker_id), calls)
            for worker_id in self._registry.view.workers
            if worker_id != self._worker_id
        )
        links: list[WaitLink] = []
        for answer in await asyncio.gather(*asking, return_exceptions=True):
            if isinstance(answer, BaseException):
                logger.info("a worker did not report what its calls wait for: %s", answer)
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
        """End the search. Harmless when there is none."""
        if self._searching is not None:
            await end_tasks(self._searching)


def _resumes_after(inbound: Inbound) -> Sequence[Handler]:
    """The handlers for which the handler of a message waits, although its own call has ended."""
    handler = inbound.handler
    return handler.place.above(handler) if handler is not None and handler.resuming else ()


def find_cycles(links: Iterable[WaitLink]) -> list[Cycle]:
    """The cycles in ``links``, `_CYCLES` of them at most. The result does not depend on the order of ``links``.

    Of cycles that share a call, only one may be found. The others are found once a call of that one is refused.
    """
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
        calls: list[str] = error.args[1]  # each is awaited by the next one; the first is repeated at the end
        cycle = tuple(by_ends[calls[at], calls[at - 1]] for at in range(len(calls) - 1, 0, -1))
        first = cycle.index(min(cycle))  # so that two rounds compare equal, whatever else waits
        return cycle[first:] + cycle[:first]
    return ()


def _chosen(cycle: Cycle) -> str:
    """The call that is refused. It waits in a mailbox, as at least one call of each cycle does."""
    return max((link.call for link in cycle if link.agent), default=cycle[0].call)
