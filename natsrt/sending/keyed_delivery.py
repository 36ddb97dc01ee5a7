"""Events for keyed agents, and messages that are forwarded to the worker that owns their agent.

An event for a keyed agent is also sent to the agent's own subject, because the topic's subject may reach any worker of
the type. It has no reply, so it counts as delivered unless the server reports that there is no subscriber. In that case
it is sent again.

Events wait in a queue until their agent's owner is known, and their publishers go on. The queue is bounded in messages
and bytes. A publisher whose event does not fit waits until this event is sent, so it waits for the owner of its own
agent only, and never for another agent.

An event of a stream is sent in the same way, but as a call: the owner answers when it has handled the event and stored
the agent's state.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial

from autogen_core import AgentId, TopicId
from nats.aio.msg import Msg

from natsrt.agents.inbound import awaiting
from natsrt.background import BackgroundTasks, end_tasks
from natsrt.errors import (
    NatsrtError,
    NoLiveWorker,
    ServerUnreachable,
    StateConflict,
    StateNotSaved,
    StateUnavailable,
    UndeliveredCall,
    WorkerLost,
    WorkerStopped,
)
from natsrt.jetstream.registry.entries import CONFIRM
from natsrt.observe.metrics import Counters
from natsrt.options import Options
from natsrt.sending.attributes import milliseconds
from natsrt.sending.owner_cache import CachedOwner, OwnerCache
from natsrt.sending.replies import Replies
from natsrt.task_types import is_task
from natsrt.transport.bodies import Bodies
from natsrt.transport.calls import Calls
from natsrt.transport.connection import Connection
from natsrt.transport.inbox import Inbox
from natsrt.wire import envelope
from natsrt.wire.envelope import KEY_HEADER, SUPERSEDES_HEADER, TYPE_HEADER, attribute
from natsrt.wire.exception_parts import class_name
from natsrt.wire.failures import is_refusal
from natsrt.wire.part_messages import STREAM_HEADER
from natsrt.wire.serialization import Encoded
from natsrt.wire.stored_events import StoredEvent
from natsrt.wire.subjects import Subjects, encode_text

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_HEADERS = (SUPERSEDES_HEADER,)
"""The headers of a call that are forwarded with it."""
_PLAIN_HEADERS = (*_HEADERS, KEY_HEADER, TYPE_HEADER, STREAM_HEADER)
"""Those of a plain call."""
_DELIVERIES = 5
"""How often an event is sent to a keyed agent before it is given up, if the agent's subject has no subscriber."""
_MANY_WAITING = 10_000
"""Maximum number of events that wait while their publishers go on. In addition to its data, each takes about 3 kB."""


_NOT_OF_STORED_TASKS: dict[str, str | None] = {"keyed": None, "chain": None, "timeout": None}
"""Attributes that a task does not keep: nobody waits for it."""
_NOT_OF_STORED_EVENTS: dict[str, str | None] = {**_NOT_OF_STORED_TASKS, "cancelid": None}
"""Attributes that an event of a stream does not keep: nobody can cancel it either."""


class KeyedDelivery:
    """Sends the events of one runtime to keyed agents, and forwards messages that did not reach the owner."""

    def __init__(
        self,
        *,
        connection: Connection,
        owners: OwnerCache,
        bodies: Bodies,
        subjects: Subjects,
        options: Options,
        calls: Calls,
        inbox: Inbox,
        replies: Replies,
        counters: Counters,
    ) -> None:
        self._connection = connection
        self._owners = owners
        self._bodies = bodies
        self._subjects = subjects
        self._max_bytes = options.max_pending_bytes
        self._calls = calls
        self._inbox = inbox
        self._replies = replies
        self._counters = counters
        self._waiting = BackgroundTasks(logger, "delivering an event failed")
        """One task for each event that waits for its turn."""
        self._waiting_bytes = 0
        """Bytes of these events."""
        self._lost: Counter[tuple[AgentId, str]] = Counter()
        """Events that were lost in this turn of the event loop, by their agent and the reason."""

    @property
    def under_way(self) -> int:
        """Number of events that wait until their agent's owner is known."""
        return len(self._waiting)

    # -- forwarding ----------------------------------------------------------------------------------------------

    async def forward_call(
        self, agent: AgentId, message: Msg, body: envelope.Envelope | None, timeout: float | None
    ) -> Msg:
        """Send a call to the agent's owner, and return the reply.

        ``body`` is None for a plain call. ``timeout`` is for how many more seconds the caller waits; None if it set no
        deadline.
        """
        owner = self._owners.owner_of(agent)
        if body is not None:
            changes = {"acceptto": self._calls.accept_to}
            if timeout is not None:
                changes["timeout"] = milliseconds(timeout)
            data = self._bodies.repack(body, **changes)
        else:
            data = message.data
        passed_on = _HEADERS if body is not None else _PLAIN_HEADERS
        headers = {name: value for name, value in (message.headers or {}).items() if name in passed_on}
        if headers.get(STREAM_HEADER) == "1":
            headers[STREAM_HEADER] = message.reply
        return await self._calls.call(agent, data, destination=owner, headers=headers or None, awaited_by=awaiting())

    async def forward_control(self, agent: AgentId, worker_id: str, body: envelope.Envelope) -> Msg:
        """Send a control message to ``worker_id``, the agent's owner, and return the reply."""
        subject = self._subjects.control_at(agent.type, worker_id)
        data = self._bodies.repack(body, acceptto=self._calls.accept_to)
        return await self._calls.call(agent, data, subject=subject, awaited_by=awaiting())

    async def forward_event(self, agent: AgentId, topic: TopicId, body: envelope.Envelope) -> None:
        """Send an event of another publisher to the agent's owner. Waits if too many events wait for their owners."""
        late = await self._deliver(agent, self._bodies.repack(body, keyed=None, **_addressed(agent, topic)))
        if late is not None:
            await self.wait((late,))

    # -- events of streams ---------------------------------------------------------------------------------------

    async def deliver_confirmed(
        self, agent: AgentId, topic: TopicId, body: envelope.Envelope, event: StoredEvent
    ) -> BaseException | None:
        """Deliver an event of a stream to its agent. Returns when its owner has handled it and stored the state.

        The owner does not handle an event that the agent's state contains already. So the same event may be delivered
        again at any time, and must be after an error. The next event of the same stream for this agent must be
        delivered only after this one, in the order of the sequences.

        Args:
            agent: An agent of a keyed type. It must not be the event's own sender.
            topic: The topic on which the event was published.
            body: The event's envelope, as it was published.
            event: Where the event is stored.

        Returns:
            None if the event was handled, now or earlier; else what the handler raised. It was not handled then.

        Raises:
            WorkerLost: The owner was lost meanwhile, perhaps because of the event.
            UndeliveredCall: The owner stopped, could not store the state, or refused the event: then it was not
                handled. `NoLiveWorker` if nobody hosts the type as a keyed one.
            StateUnavailable: The owner cannot read or store the records of its agents.
            ServerUnreachable, PermissionDenied, MessageTooLarge, CannotDecode: The event could not be sent, or its
                answer could not be read.
        """
        owner = self._owners.owner_of(agent)
        if owner is None:
            raise NoLiveWorker(str(agent), agent.type)
        if lacking := self._owners.lacking(agent.type, CONFIRM):
            workers = ", ".join(lacking)
            raise UndeliveredCall(str(agent), f"workers of {agent.type} do not confirm stored events: update {workers}")
        data = self._bodies.repack(
            body,
            acceptto=self._calls.accept_to,
            **_addressed(agent, topic),
            **event.attributes,
            **(_NOT_OF_STORED_TASKS if is_task(topic.type) else _NOT_OF_STORED_EVENTS),
        )
        reply = await self._calls.call(agent, data, destination=owner)
        failure = self._replies.failure(reply, agent)
        if failure is not None and is_refusal(reply.headers, reply.data):
            raise UndeliveredCall(str(agent), f"the event was not handled by {agent}: {failure}") from failure
        if failure is not None and _is_of_owner(failure, agent):
            raise failure
        return failure

    # -- events --------------------------------------------------------------------------------------------------

    async def deliver_all(
        self, agent_types: Sequence[str], topic: TopicId, sender: AgentId | None, attributes: str, encoded: Encoded
    ) -> tuple[str, list[asyncio.Task[None]]]:
        """Send an event to its agent in each of these keyed types, except to ``sender``.

        Returns the envelope attribute that lists the types, with a leading comma. The event on the topic's subject
        must contain it, so that workers do not deliver the event to these types again. Also returns the deliveries for
        which the publisher must `wait`, or which it must `give_up`, because the queue is full.
        """
        late: list[asyncio.Task[None]] = []
        try:
            for agent_type in agent_types:
                agent = AgentId(agent_type, topic.source)
                if agent != sender and (task := await self._deliver_new(agent, topic, attributes, encoded)) is not None:
                    late.append(task)
        except BaseException:
            self.give_up(late)
            raise
        return _listed(agent_types), late

    def more_bytes(self, agent_types: Sequence[str], topic: TopicId) -> int:
        """The bytes that an event's attributes have in addition, at most, if it is sent to these keyed types."""
        if not agent_types:
            return 0
        return max(
            len(_listed(agent_types).encode()), len(_written(AgentId(agent_types[0], topic.source), topic).encode())
        )

    async def deliver(self, agent: AgentId, topic: TopicId, attributes: str, encoded: Encoded) -> None:
        """Send an event with these envelope attributes to the agent's owner.

        Waits if too many events wait for their owners.
        """
        late = await self._deliver_new(agent, topic, attributes, encoded)
        if late is not None:
            await self.wait((late,))

    async def wait(self, late: Collection[asyncio.Task[None]]) -> None:
        """Wait until these events are sent or lost. If the wait is cancelled, those that still wait are not sent."""
        try:
            await asyncio.wait(late)
        finally:
            self.give_up(late)

    def give_up(self, late: Collection[asyncio.Task[None]]) -> None:
        """Do not send those of these events that still wait. They are not counted, because their publisher knows."""
        for task in late:
            task.cancel()

    async def _deliver_new(
        self, agent: AgentId, topic: TopicId, attributes: str, encoded: Encoded
    ) -> asyncio.Task[None] | None:
        attributes += _written(agent, topic)
        return await self._deliver(
            agent, self._bodies.pack(envelope.EVENT, attributes, encoded.payload, encoded.content_type)
        )

    async def _deliver(self, agent: AgentId, body: bytes) -> asyncio.Task[None] | None:
        """Send an event to the agent's owner now, or queue it until the owner is known.

        Returns the task that delivers it if its publisher must wait for it; None if the publisher may go on.
        """
        owner = self._owners.owner_of(agent)
        if owner is None:
            raise NoLiveWorker(str(agent), agent.type)
        if owner.may_send():
            await self._post(owner, body, _DELIVERIES)
            return None
        full = len(self._waiting) >= _MANY_WAITING or self._waiting_bytes + len(body) > self._max_bytes
        task = self._deliver_later(owner, body, _DELIVERIES)
        return task if full else None

    async def _post(self, owner: CachedOwner, body: bytes, tries: int) -> None:
        """Send an event now. If there is no subscriber, try again, up to ``tries`` times in total."""

        def lost() -> None:
            owner.lost()
            self._deliver_later(owner, body, tries - 1)

        await self._inbox.post(owner.subject, body, lost)

    def _deliver_later(self, owner: CachedOwner, body: bytes, tries: int) -> asyncio.Task[None]:
        """Take a place in the queue now, and send the event from a separate task when its turn comes."""
        turn = owner.join()
        task = self._waiting.spawn(self._deliver_in_turn(owner, turn, body, tries))
        self._waiting_bytes += len(body)
        task.add_done_callback(partial(self._delivered, owner, turn, len(body)))
        return task

    def _delivered(self, owner: CachedOwner, turn: asyncio.Future[None], size: int, task: asyncio.Task[None]) -> None:
        self._waiting_bytes -= size
        owner.leave(turn)  # if the task was cancelled before it began

    async def _deliver_in_turn(self, owner: CachedOwner, turn: asyncio.Future[None], body: bytes, tries: int) -> None:
        """Wait for the turn, then send the event. Counts and logs the event if that fails."""
        try:
            await owner.wait(turn)
            if not tries:
                raise WorkerLost(str(owner.recipient), None, "its owner repeatedly had no subscription")
            await self._post(owner, body, tries)
        except Exception as error:
            self._count_lost(owner, str(error) if isinstance(error, NatsrtError) else class_name(type(error)))

    def _count_lost(self, owner: CachedOwner, reason: str) -> None:
        self._counters.undelivered_events += 1
        if not self._lost:  # all that wait for one owner fail in the same turn of the event loop
            asyncio.get_running_loop().call_soon(self._report_lost)
        self._lost[owner.recipient, reason] += 1

    def _report_lost(self) -> None:
        for (agent, reason), count in self._lost.items():
            logger.warning("%s for %s could not be delivered: %s", _events(count), agent, reason)
        self._lost.clear()

    # -- stopping ------------------------------------------------------------------------------------------------

    async def finish(self, within: float, abort: asyncio.Event) -> None:
        """Wait until all events have been sent and none is reported back, at most ``within`` seconds.

        Returns at once when ``abort`` is set.
        """
        if not len(self._waiting) and not self._inbox.posted:
            return
        finishing, aborted = asyncio.ensure_future(self._finish(within)), asyncio.ensure_future(abort.wait())
        try:
            await asyncio.wait({finishing, aborted}, timeout=within, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end_tasks(finishing, aborted)

    async def _finish(self, within: float) -> None:
        while len(self._waiting) or self._inbox.posted:
            await self._waiting.wait()
            try:  # afterwards, the server has reported which of the posted events had no subscriber
                await self._connection.barrier(within)
            except ServerUnreachable:
                return
            self._inbox.forget_posted()

    async def stop(self) -> None:
        """Give up the events that are still waiting. They are counted as undelivered, and one line says how many."""
        given_up = len(self._waiting)
        await self._waiting.cancel()
        if given_up:
            self._counters.undelivered_events += given_up
            logger.warning("%s for keyed agents could not be sent before this runtime stopped", _events(given_up))


def _is_of_owner(failure: BaseException, agent: AgentId) -> bool:
    """True if an error is that of the agent's owner, and not of the agent's handler: the event is delivered again."""
    if isinstance(failure, StateConflict | StateNotSaved | WorkerStopped):
        return failure.recipient == str(agent)
    return isinstance(failure, StateUnavailable)


def _events(count: int) -> str:
    return "an event" if count == 1 else f"{count} events"


def _addressed(agent: AgentId, topic: TopicId) -> dict[str, str]:
    """The additional attributes of an event for one keyed agent, whose subject does not contain the topic."""
    return {"subject": encode_text(agent.key), "topictype": topic.type, "topicsource": topic.source}


def _written(agent: AgentId, topic: TopicId) -> str:
    """These attributes as JSON text, with a leading comma."""
    return "".join(f",{attribute(name, value)}" for name, value in _addressed(agent, topic).items())


def _listed(agent_types: Sequence[str]) -> str:
    """The attribute that lists the keyed types to which an event is sent, with a leading comma."""
    return f",{attribute('keyed', ' '.join(agent_types))}"
