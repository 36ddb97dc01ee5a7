"""Where keyed agents live, as a sender knows it.

Rules:

1. Before the first message to an agent leaves, a worker of its type says who owns it; one that nobody owns is claimed
   by the worker that is asked. Meanwhile later messages for that agent wait, in order; messages for others do not.
   The question names all visits that wait for a message in the line: the owner may be waiting for one of them.
2. The knowledge ends some seconds after the last message, as the owner said, when the owner stops or vanishes from the
   registry, when the server says that nobody listens there, and when a call to any agent of the owner found it lost.
3. Messages go to the agent's own subject, ``agent.<type>.<key>``, on which its owner listens: the knowledge is only
   that there is one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection
from typing import Protocol

from autogen_core import AgentId

from natsrt.agents.chain import chain
from natsrt.jetstream.registry.registry import Registry
from natsrt.wire.peer_messages import Location
from natsrt.wire.subjects import Subjects

_MANY = 10_000
"""Places, above which those are forgotten that are not in use."""

_LONG = 0.25
"""Seconds without an answer after which a question is asked anew, if more visits wait for the line by then."""


class Locator(Protocol):
    """Asks workers where agents live."""

    async def locate(self, agent: AgentId, along: Collection[str] | None = None) -> Location:
        """Ask a worker of the agent's type who owns it, for messages of the chains ``along``."""


class LostOwners:
    """The workers that agents live on."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._lost: set[str] = set()

    def stays(self, worker_id: str) -> bool:
        """Whether a worker can be expected to be there."""
        return self._registry.stays(worker_id) and worker_id not in self._lost

    def lose(self, worker_id: str) -> None:
        """A call found it lost, which the registry may learn some seconds later."""
        self._lost = {lost for lost in self._lost if self._registry.stays(lost)} | {worker_id}

    def found(self, worker_id: str) -> None:
        """A worker says that an agent lives there."""
        self._lost.discard(worker_id)


class Place:
    """One agent's place, and the messages that wait until it is known."""

    __slots__ = (
        "_asking",
        "_called",
        "_lease",
        "_line",
        "_locator",
        "_owner",
        "_owners",
        "_until",
        "recipient",
        "subject",
    )

    def __init__(self, recipient: AgentId, subject: str, locator: Locator, owners: LostOwners) -> None:
        self.recipient = recipient
        self.subject = subject
        self._locator = locator
        self._owners = owners
        self._owner = ""
        self._lease = 0.0
        self._until = float("-inf")
        self._line: OrderedDict[asyncio.Future[None], tuple[str, ...]] = OrderedDict()
        """The turns of those who wait, each with the chain of its message."""
        self._called = False
        """Whether a message may go, and has not gone on yet: they go one after the other."""
        self._asking: asyncio.Task[None] | None = None

    @property
    def unused(self) -> bool:
        """Whether nothing is known, and nobody waits."""
        return not self._line and not self._called and not self._is_known()

    def _is_known(self) -> bool:
        return asyncio.get_running_loop().time() < self._until and self._owners.stays(self._owner)

    def is_open(self) -> bool:
        """Whether a message may go at once. Saying so counts as one."""
        now = asyncio.get_running_loop().time()
        if now >= self._until or self._called or self._line or not self._owners.stays(self._owner):
            return False
        self._until = now + self._lease
        return True

    def join(self) -> asyncio.Future[None]:
        """Stand in the line, from this moment on. Then `wait` for the turn."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line[turn] = chain.get()
        if not self._called:
            self._go_on()
        return turn

    async def wait(self, turn: asyncio.Future[None]) -> None:
        """Return when the message of ``turn`` may go. Raises what finding out about the agent raised."""
        try:
            await turn
        finally:
            if turn in self._line:  # it gave up
                del self._line[turn]
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                self._called = False
                if self._line:
                    self._go_on()

    def lost(self) -> None:
        """Nobody listens there any more."""
        self._until = float("-inf")

    def owner_lost(self) -> None:
        """The worker that the agent lives on was lost, and all that lives there with it."""
        self.lost()
        self._owners.lose(self._owner)

    def _go_on(self) -> None:
        if self._is_known():
            self._call_next()
        elif self._asking is None:
            self._asking = asyncio.get_running_loop().create_task(self._find())

    async def _find(self) -> None:
        try:
            self._owner, self._lease = await self._locate()
            self._owners.found(self._owner)
            self._until = asyncio.get_running_loop().time() + self._lease
        except BaseException as error:
            line, self._line = self._line, OrderedDict()
            for turn in line:
                if not turn.done():
                    turn.set_exception(error if isinstance(error, Exception) else asyncio.CancelledError())
                    turn.exception()  # whoever waits gets it; nobody has to
            if not isinstance(error, Exception):
                raise
        finally:
            self._asking = None
        self._call_next()

    async def _locate(self) -> Location:
        """Ask, and anew where a message has come to the line meanwhile that the owner may be waiting for."""
        while True:
            visits = self._visits()
            asking = asyncio.ensure_future(self._locator.locate(self.recipient, visits))
            try:
                while not asking.done() and self._visits() <= visits:
                    await asyncio.wait({asking}, timeout=_LONG)
                if asking.done():
                    return asking.result()
            finally:
                asking.cancel()

    def _visits(self) -> set[str]:
        return set().union(*self._line.values())

    def _call_next(self) -> None:
        while self._line:
            turn, _ = self._line.popitem(last=False)
            if not turn.done():
                self._called = True
                turn.set_result(None)
                return


class OwnerCache:
    """The places that one runtime knows.

    ``locator`` asks workers where agents live.
    """

    def __init__(self, subjects: Subjects, registry: Registry, locator: Locator) -> None:
        self._subjects = subjects
        self._registry = registry
        self._owners = LostOwners(registry)
        self._locator = locator
        self._places: dict[str, dict[str, Place]] = {}
        self._count = 0
        self._many = _MANY

    def place_of(self, recipient: AgentId) -> Place | None:
        """The place of an agent; None where its type is not keyed."""
        if not self._registry.is_keyed(recipient.type):
            return None
        of_type = self._places.get(recipient.type)
        if of_type is None:
            of_type = self._places[recipient.type] = {}
        place = of_type.get(recipient.key)
        if place is None:
            self._forget_unused()
            subject = self._subjects.instance(recipient.type, recipient.key)
            place = of_type[recipient.key] = Place(recipient, subject, self._locator, self._owners)
            self._count += 1
        return place

    def _forget_unused(self) -> None:
        if self._count < self._many:
            return
        for of_type in self._places.values():
            for key in [key for key, place in of_type.items() if place.unused]:
                del of_type[key]
        self._count = sum(map(len, self._places.values()))
        self._many = max(_MANY, 2 * self._count)
