"""The cached owners of keyed agents.

Rules:

1. Before the first message to an agent is sent, a worker of the agent's type is asked for the agent's owner. If the
   agent has no owner, that worker claims it. Until the answer arrives, messages for this agent wait in order; messages
   for other agents do not. The question names all handlers that wait for one of these messages, because the current
   owner may be waiting for one of them.
2. An answer is valid for a *lease*: a number of seconds after the last message, set by the owner. It becomes invalid
   earlier if the registry no longer lists the owner or lists it as draining, if the server reports that the agent's
   subject has no subscriber, or if a call to any agent of the same owner found that worker lost.
3. Messages are sent to the agent's own subject, ``agent.<type>.<key>``, to which its owner subscribes. Only the
   existence of an owner is cached; the subject never changes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from autogen_core import AgentId

from natsrt.agents.chain import current_chain
from natsrt.jetstream.registry.registry import Registry
from natsrt.sending.owner_locator import OwnerLocator
from natsrt.wire.peer_messages import Location
from natsrt.wire.subjects import Subjects

_MANY_OWNERS = 10_000
"""Number of cached owners above which unused ones are removed."""

_ASK_AGAIN_AFTER = 0.25
"""Seconds without an answer after which the question is asked again, if more handlers are waiting by then; doubled each
time."""


class LostOwners:
    """The workers that calls found lost, until the registry no longer lists them."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._lost: set[str] = set()

    def is_there(self, worker_id: str) -> bool:
        """True if the registry lists the worker, it is not draining, and no call found it lost."""
        return self._registry.stays(worker_id) and worker_id not in self._lost

    def add(self, worker_id: str) -> None:
        """Add a worker that a call found lost. The registry may list it for some more seconds."""
        self._lost = {lost for lost in self._lost if self._registry.stays(lost)} | {worker_id}

    def discard(self, worker_id: str) -> None:
        """Remove a worker that an answer named as an owner: it is not lost."""
        self._lost.discard(worker_id)


class CachedOwner:
    """The cached owner of one keyed agent, and the messages that wait until the owner is known.

    A message that may not be sent now takes a turn with `join` and awaits it with `wait`. Turns come one at a time, in
    the order of `join`: the next one comes only after `wait` has returned for the previous one and that message has
    been sent. So every turn must be awaited with `wait`, or given up: with `leave`, or by cancelling the `wait`.
    """

    __slots__ = (
        "_known_until",
        "_lease",
        "_locating",
        "_locator",
        "_lost_owners",
        "_turn",
        "_waiting",
        "_worker_id",
        "recipient",
        "subject",
    )

    def __init__(self, recipient: AgentId, subject: str, locator: OwnerLocator, lost_owners: LostOwners) -> None:
        self.recipient: AgentId = recipient
        """The agent."""
        self.subject: str = subject
        """The agent's own subject, to which its owner subscribes."""
        self._locator = locator
        self._lost_owners = lost_owners
        self._worker_id = ""
        """The owner that the last answer named; empty before the first one."""
        self._lease = 0.0
        """Seconds after each message for which that answer is valid."""
        self._known_until = float("-inf")
        """When the lease ends, in seconds by the event loop's clock; minus infinity if no owner is known."""
        self._waiting: OrderedDict[asyncio.Future[None], tuple[str, ...]] = OrderedDict()
        """The turns that have not come yet, each with the chain of its message."""
        self._turn: asyncio.Future[None] | None = None
        """The turn that has come, until `wait` returns for it; None if there is none."""
        self._locating: asyncio.Task[None] | None = None
        """The task that looks up the owner; None if none is running."""

    @property
    def unused(self) -> bool:
        """True if no owner is known and no message is waiting."""
        return not self._waiting and self._turn is None and not self._is_known()

    def _is_known(self) -> bool:
        return asyncio.get_running_loop().time() < self._known_until and self._lost_owners.is_there(self._worker_id)

    def may_send(self) -> bool:
        """True if a message may be sent now. Also extends the lease, as if one had been sent."""
        now = asyncio.get_running_loop().time()
        if (
            now >= self._known_until
            or self._turn is not None
            or self._waiting
            or not self._lost_owners.is_there(self._worker_id)
        ):
            return False
        self._known_until = now + self._lease
        return True

    def join(self) -> asyncio.Future[None]:
        """Take a turn after all earlier ones. Await it with `wait`."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = current_chain.get()
        if self._turn is None:
            self._advance()
        return turn

    async def wait(self, turn: asyncio.Future[None]) -> None:
        """Wait until the turn has come. The message must then be sent without another wait.

        Raises the error if the owner could not be looked up.
        """
        try:
            await turn
        finally:
            self.leave(turn)

    def leave(self, turn: asyncio.Future[None]) -> None:
        """Give up a turn that has not come, and end one that has come. Has no effect on a turn that has ended."""
        self._waiting.pop(turn, None)
        if turn is self._turn:
            self._turn = None
            if self._waiting:
                self._advance()

    def lost(self) -> None:
        """Forget the owner, because the agent's subject has no subscriber."""
        self._known_until = float("-inf")

    def owner_lost(self) -> None:
        """Forget the owner for all agents that it owns, because that worker was lost."""
        self.lost()
        self._lost_owners.add(self._worker_id)

    def _advance(self) -> None:
        """Give the next turn now if the owner is known; otherwise look up the owner first."""
        if self._is_known():
            self._give_turn()
        elif self._locating is None:
            self._locating = asyncio.get_running_loop().create_task(self._locate_owner())

    def _give_turn(self) -> None:
        """Give the turn to the first message whose turn was not cancelled."""
        while self._waiting:
            turn, _ = self._waiting.popitem(last=False)
            if not turn.done():
                self._turn = turn
                turn.set_result(None)
                return

    async def _locate_owner(self) -> None:
        """Look up the owner, then give the next turn. If the look-up fails, all turns fail with the same error."""
        try:
            self._worker_id, self._lease = await self._ask()
            self._lost_owners.discard(self._worker_id)
            self._known_until = asyncio.get_running_loop().time() + self._lease
        except BaseException as error:
            self._fail_turns(error if isinstance(error, Exception) else asyncio.CancelledError())
            if not isinstance(error, Exception):
                raise
        finally:
            self._locating = None
        self._give_turn()

    def _fail_turns(self, error: BaseException) -> None:
        waiting, self._waiting = self._waiting, OrderedDict()
        for turn in waiting:
            if not turn.done():
                turn.set_exception(error)
                turn.exception()  # marks it as retrieved: asyncio logs nothing if this turn is not awaited

    async def _ask(self) -> Location:
        """Ask for the owner. Ask again if, before the answer, another handler joins for which the owner may wait.

        The answer to any of the questions counts: the worker may be far away, and handlers may join all the time. An
        error counts if it is that of the last question, which names all handlers.
        """
        asked: list[asyncio.Future[Location]] = []
        pause = _ASK_AGAIN_AFTER
        try:
            while True:
                handlers = self._awaitings()
                last = asyncio.ensure_future(self._locator.locate(self.recipient, handlers))
                asked.append(last)
                while self._awaitings() <= handlers:
                    done, left = await asyncio.wait(asked, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                    for asking in done:
                        if asking is last or asking.exception() is None:
                            return asking.result()
                    asked = list(left)
                pause *= 2
        finally:
            for asking in asked:
                asking.cancel()

    def _awaitings(self) -> set[str]:
        """The ids of all handlers that wait for one of the waiting messages."""
        return set().union(*self._waiting.values())


class OwnerCache:
    """The cached owners of one runtime."""

    def __init__(self, subjects: Subjects, registry: Registry, locator: OwnerLocator) -> None:
        self._subjects = subjects
        self._registry = registry
        self._locator = locator
        self._lost_owners = LostOwners(registry)
        self._owners: dict[str, dict[str, CachedOwner]] = {}
        """By agent type and key."""
        self._count = 0
        self._clean_up_at = _MANY_OWNERS
        """The number of cached owners at which unused ones are removed."""

    def owner_of(self, recipient: AgentId) -> CachedOwner | None:
        """Return the cached owner of an agent; None if its type is not keyed."""
        if not self._registry.is_keyed(recipient.type):
            return None
        of_type = self._owners.get(recipient.type)
        if of_type is None:
            of_type = self._owners[recipient.type] = {}
        owner = of_type.get(recipient.key)
        if owner is None:
            self._remove_unused()
            subject = self._subjects.instance(recipient.type, recipient.key)
            owner = of_type[recipient.key] = CachedOwner(recipient, subject, self._locator, self._lost_owners)
            self._count += 1
        return owner

    def lacking(self, agent_type: str, feature: str) -> list[str]:
        """The live workers of a type that do not say that they understand ``feature``."""
        view = self._registry.view
        return [one for one in view.workers_hosting(agent_type) if not view.understands(one, feature)]

    def _remove_unused(self) -> None:
        if self._count < self._clean_up_at:
            return
        for of_type in self._owners.values():
            for key in [key for key, owner in of_type.items() if owner.unused]:
                del of_type[key]
        self._count = sum(map(len, self._owners.values()))
        self._clean_up_at = max(_MANY_OWNERS, 2 * self._count)
