"""Where keyed agents live, as a sender knows it.

Rules:

1. Before the first message to an agent leaves, a worker of its type says who owns it; one that nobody owns is claimed
   by the worker that is asked. Meanwhile later messages for that agent wait, in order; messages for others do not.
2. The knowledge ends some seconds after the last message, as the owner said, when the owner stops or vanishes from the
   registry, and when the server says that nobody listens there.
3. Messages go to the agent's own subject, ``agent.<type>.<key>``, on which its owner listens: the knowledge is only
   that there is one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from autogen_core import AgentId

from natsrt.hosting.owning import Location
from natsrt.wire.subjects import Subjects

_MANY = 10_000
"""Places, above which those are forgotten that are not in use."""

Ask = Callable[[AgentId], Awaitable[Location]]


class Place:
    """One agent's place, and the messages that wait until it is known."""

    __slots__ = ("_ask", "_asking", "_called", "_lease", "_line", "_owner", "_stays", "_until", "recipient", "subject")

    def __init__(self, recipient: AgentId, subject: str, ask: Ask, stays: Callable[[str], bool]) -> None:
        self.recipient = recipient
        self.subject = subject
        self._ask = ask
        self._stays = stays
        self._owner = ""
        self._lease = 0.0
        self._until = float("-inf")
        self._line: deque[asyncio.Future[None]] = deque()
        self._called = False
        """Whether a message may go, and has not gone on yet: they go one after the other."""
        self._asking: asyncio.Task[None] | None = None

    @property
    def unused(self) -> bool:
        """Whether nothing is known, and nobody waits."""
        return not self._line and not self._called and not self._is_known()

    def _is_known(self) -> bool:
        return asyncio.get_running_loop().time() < self._until and self._stays(self._owner)

    def is_open(self) -> bool:
        """Whether a message may go at once. Saying so counts as one."""
        now = asyncio.get_running_loop().time()
        if now >= self._until or self._called or self._line or not self._stays(self._owner):
            return False
        self._until = now + self._lease
        return True

    def join(self) -> asyncio.Future[None]:
        """Stand in the line, from this moment on. Then `wait` for the turn."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        if not self._called:
            self._go_on()
        return turn

    async def wait(self, turn: asyncio.Future[None]) -> None:
        """Return when the message of ``turn`` may go. Raises what finding out about the agent raised."""
        try:
            await turn
        finally:
            if turn in self._line:  # it gave up
                self._line.remove(turn)
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                self._called = False
                if self._line:
                    self._go_on()

    def lost(self) -> None:
        """Nobody listens there any more."""
        self._until = float("-inf")

    def _go_on(self) -> None:
        if self._is_known():
            self._call_next()
        elif self._asking is None:
            self._asking = asyncio.get_running_loop().create_task(self._find())

    async def _find(self) -> None:
        try:
            self._owner, self._lease = await self._ask(self.recipient)
            self._until = asyncio.get_running_loop().time() + self._lease
        except BaseException as error:
            line, self._line = self._line, deque()
            for turn in line:
                if not turn.done():
                    turn.set_exception(error if isinstance(error, Exception) else asyncio.CancelledError())
                    turn.exception()  # whoever waits gets it; nobody has to
            if not isinstance(error, Exception):
                raise
        finally:
            self._asking = None
        self._call_next()

    def _call_next(self) -> None:
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                self._called = True
                turn.set_result(None)
                return


class Locating:
    """The places that one runtime knows.

    ``is_keyed(agent_type)`` and ``stays(worker_id)``, whether a worker is there to stay, are the registry's;
    ``ask(agent)`` asks a worker of the agent's type.
    """

    def __init__(
        self, subjects: Subjects, *, is_keyed: Callable[[str], bool], stays: Callable[[str], bool], ask: Ask
    ) -> None:
        self._subjects = subjects
        self._is_keyed = is_keyed
        self._stays = stays
        self._ask = ask
        self._places: dict[str, dict[str, Place]] = {}
        self._count = 0
        self._many = _MANY

    def place_of(self, recipient: AgentId) -> Place | None:
        """The place of an agent; None where its type is not keyed."""
        if not self._is_keyed(recipient.type):
            return None
        of_type = self._places.get(recipient.type)
        if of_type is None:
            of_type = self._places[recipient.type] = {}
        place = of_type.get(recipient.key)
        if place is None:
            self._forget_unused()
            subject = self._subjects.instance(recipient.type, recipient.key)
            place = of_type[recipient.key] = Place(recipient, subject, self._ask, self._stays)
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
