"""How events of durable topics are settled, and how many of them a worker holds.

Rules:

1. An event is *held* from its delivery until it is settled: acknowledged, given back, or terminated. While it is held,
   the server is told so from time to time, and delivers it to no other worker (`DurableSettlement.still_held`). One
   that is delivered again nevertheless, because this worker was frozen, is not handled a second time here.
2. An event whose handler returned is acknowledged, and so is one that no agent of the type is to get.
3. An event whose handler raised is delivered again after a delay that grows, until it has been tried as often as its
   agent type allows. Then it becomes a dead letter. So do at once one that cannot be read or that a handler rejects,
   and one whose attempts were used up without any coming to its end.
4. A dead letter is stored before its event is terminated. If the worker ends between the two, the event is delivered
   again, and the stream of dead letters takes no second one.
5. An event whose handler has not ended when the worker stops is given back, and another worker gets it at once.
   `Returned` counts that, so that it is no attempt.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from natsrt.agents.current_delivery import handled_delivery
from natsrt.agents.hosted_type import HostedType
from natsrt.agents.inbound import EVENT, Answer, Inbound, Route, SentBack, Settlement
from natsrt.background import BackgroundTasks
from natsrt.errors import BlobDamaged, BlobLost, CannotDecode, NatsrtError, NotSettled, Reject, Retry, WorkerStopped
from natsrt.hosting.intake import Intake
from natsrt.hosting.settlements import outline
from natsrt.jetstream.consumers import ConsumerConfig, Start
from natsrt.jetstream.dead_letter_box import DeadLetterBox
from natsrt.jetstream.dead_letters import DeadLetters, Unhandled, published_on
from natsrt.jetstream.delivery import Delivery
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.pulling import EXPIRES, HEARTBEAT, Pull, Room
from natsrt.jetstream.registry.registry import Registry
from natsrt.jetstream.returned import Returned
from natsrt.observe.event_errors import EventErrors
from natsrt.observe.metrics import Counters
from natsrt.options import Options
from natsrt.retry_types import RetryOptions
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import MESSAGE_ID_HEADER
from natsrt.wire.exception_parts import class_name

logger: logging.Logger = logging.getLogger("natsrt.hosting")

WINDOW: Final = 256
"""Events of one agent type and stream that a worker holds at most. It holds fewer of a type with ``max_running``: what
waits here could run on another worker."""
_PER_PLACE: Final = 2
"""Events that are held for each handler that may run at once, so that the next one is there when a handler ends."""
_LEAST_BYTES: Final = 64 * 1024
"""Bytes of events that each agent type and stream may always hold here."""
_LEAST_EXPIRES: Final = 1.0
"""Seconds for which a pull is open at least, if nothing comes."""
_HEARTBEATS: Final = 3
"""Heartbeats while a pull is open, at least."""
_SOON: Final = 0.05
"""Seconds after which an event that was given back is delivered again."""
_NO_ROOM: Final = Room(0, 0)
_UNREADABLE: Final = (CannotDecode, BlobLost, BlobDamaged)
"""What is raised, before its handler starts, for an event that no attempt will ever read."""


@dataclass(frozen=True, slots=True)
class DurableParts:
    """What the settlements of one worker have in common.

    ``settlements`` are those that pull. They share the bytes of the worker's intake.
    """

    worker_id: str
    connection: Connection
    options: Options
    registry: Registry
    intake: Intake
    dead_letters: DeadLetters
    box: DeadLetterBox
    returned: Returned
    event_errors: EventErrors
    counters: Counters
    settlements: set[Puller] = field(default_factory=set)

    async def bury(self, letter: Unhandled, after: float) -> bool:
        """Store a dead letter. Returns False if that is not possible now: try it again ``after`` so many seconds."""
        delivery = letter.delivery
        try:
            is_new = await self.dead_letters.write(letter)
        except NatsrtError as problem:
            logger.error(
                "event %d of %s for %s cannot be made a dead letter, and is tried again in %g s: %s",
                delivery.sequence,
                delivery.stream,
                letter.agent_type,
                after,
                problem,
            )
            return False
        if is_new:
            self.counters.dead_letters += 1
            self.event_errors.record(letter.error)
            logger.error(
                "event %d of %s for %s has become a dead letter after %d attempts: %s",
                delivery.sequence,
                delivery.stream,
                letter.agent_type,
                letter.attempts,
                outline(letter.error),
            )
        return True


def share_of(parts: DurableParts) -> int:
    """The bytes of events that one agent type may hold of one stream."""
    return max(_LEAST_BYTES, parts.options.max_pending_bytes // (4 * max(1, len(parts.settlements))))


class Puller(Protocol):
    """What pulls the events of one stream for one agent type: a `DurableSettlement`, or the feeder of a keyed type."""

    stream: str
    config: ConsumerConfig

    @property
    def holds(self) -> int:
        """Number of events that are held."""

    async def start(self) -> None:
        """Make the consumer if it is missing, and begin to pull."""

    async def configure(self, config: ConsumerConfig) -> None:
        """Change the consumer."""

    async def stop(self) -> None:
        """Pull no more."""

    def still_held(self) -> None:
        """Tell the server that the events are held."""


class DurableSettlement(Settlement):
    """Pulls the events of one stream for one agent type, and settles them.

    ``again`` is the subject of events that are stored once more for this agent type. ``config`` is how the consumer is
    made, and ``start`` is where it begins then.
    """

    wants_answer = False
    has_own_limit = True

    def __init__(
        self,
        parts: DurableParts,
        hosted: HostedType,
        stream: str,
        config: ConsumerConfig,
        retries: RetryOptions,
        *,
        start: Start,
        again: str,
    ) -> None:
        self._parts = parts
        self._hosted = hosted
        self.stream: str = stream
        self.config: ConsumerConfig = config
        self._retries = retries
        self._again = again
        self._route = Route(EVENT, hosted, self)
        self._held: dict[Inbound, Delivery] = {}
        self._by_sequence: dict[int, Inbound] = {}
        """The events that are held, by their sequences in the stream."""
        self._looked_at: set[Delivery] = set()
        """Deliveries that are not the first ones of their events, while their attempts are counted."""
        self._tasks = BackgroundTasks(logger, f"an event of {stream} could not be taken in")
        self._held_bytes = 0
        self._waiting: dict[Inbound, Callable[[Exception], None]] = {}
        """The events that may wait for a place, and what ends that wait."""
        self._arriving: Delivery | None = None
        self._stopping = False
        options = parts.options
        limits = [limit for limit in (options.max_running, hosted.max_running) if limit is not None]
        self._window = min(WINDOW, *(_PER_PLACE * limit for limit in limits)) if limits else WINDOW
        # The open pulls of a frozen worker still take events, and each time costs an attempt.
        expires = min(EXPIRES, max(options.ack_wait, _LEAST_EXPIRES))
        self.pull: Pull = Pull(
            parts.connection,
            Domain(options.jetstream_domain),
            stream,
            config,
            self._take_in,
            inbox_prefix=options.inbox_prefix,
            start=start,
            room=self._room,
            on_trouble=self._tell_trouble,
            expires=expires,
            heartbeat=min(HEARTBEAT, expires / _HEARTBEATS),
        )

    # -- pulling -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Make the consumer if it is missing, and begin to pull. Raises as `Pull.start`."""
        await self.pull.start()

    async def configure(self, config: ConsumerConfig) -> None:
        """Change the consumer. Raises as `Pull.configure`."""
        await self.pull.configure(config)
        self.config = config

    async def stop(self) -> None:
        """Pull no more, and give the events back whose handlers have not started. The others are still settled."""
        await self.pull.stop()
        self._stopping = True  # what waits in the intake is given back when its turn comes
        for refuse in list(self._waiting.values()):
            refuse(self._stopped())
        await self._tasks.wait()

    @property
    def holds(self) -> int:
        """Number of events that are held."""
        return len(self._held) + len(self._looked_at)

    def still_held(self) -> None:
        """Tell the server that the events are held, so that they are not delivered to another worker."""
        self.pull.working((*self._held.values(), *self._looked_at))

    def _room(self) -> Room:
        """How much more may be pulled. One event may always be, so that no other agent type can hold this one up."""
        parts, held = self._parts, self.holds
        share = share_of(parts)
        if parts.intake.is_half_full:
            return Room(0 if held else 1, share)
        if held >= self._window or self._held_bytes >= share:
            return _NO_ROOM
        return Room(self._window - held, share - self._held_bytes)

    def _take_in(self, delivery: Delivery) -> None:
        """Take in a delivery. Called in the client's read loop."""
        if delivery.attempt == 1:
            self._put(delivery)
            return
        self._parts.counters.redelivered += 1
        inbound = self._by_sequence.get(delivery.sequence)
        if inbound is not None and self._held[inbound].stored_at == delivery.stored_at:
            self._held[inbound] = delivery
            return
        self._looked_at.add(delivery)
        self._tasks.spawn(self._take_in_again(delivery))

    async def _take_in_again(self, delivery: Delivery) -> None:
        """Take in a delivery that is not the first one of its event, if there is an attempt left."""
        try:
            delivery.attempt -= await self._parts.returned.count(self._hosted.agent_type, delivery)
            if self._stopping:
                self._give_back(delivery, _SOON)
            elif delivery.attempt <= self._retries.max_deliver:
                self._put(delivery)
            else:
                await self._end_unsettled(delivery)
        finally:
            self._looked_at.discard(delivery)

    def _put(self, delivery: Delivery) -> None:
        """Put a delivery into the intake."""
        delivery.message.subject = published_on(delivery.message, self._again)
        self._arriving = delivery
        self._parts.intake.take(self._route, delivery.message)

    def _tell_trouble(self, error: NatsrtError | None) -> None:
        if error is None:
            logger.info("events of %s for %s are pulled again", self.stream, self._hosted.agent_type)
        else:
            logger.warning("events of %s for %s cannot be pulled: %s", self.stream, self._hosted.agent_type, error)

    # -- as a settlement -----------------------------------------------------------------------------------------

    def take(self, inbound: Inbound) -> bool:
        assert self._arriving is not None
        self._held[inbound] = self._arriving
        self._by_sequence[self._arriving.sequence] = inbound
        self._held_bytes += inbound.size
        return True

    def identified(self, inbound: Inbound) -> None:
        if self._stopping:
            raise self._stopped()
        handled_delivery.set(self._held[inbound])

    def waits_for_place(self, inbound: Inbound, refuse: Callable[[Exception], None]) -> None:
        self._waiting[inbound] = refuse

    def plain_id(self, inbound: Inbound) -> str:
        return message_id_of(self._held[inbound])

    def handled(self, inbound: Inbound, answer: Answer | None) -> None:
        delivery = self._release(inbound)
        if delivery is None:
            return
        if inbound.key is None and not self._parts.registry.synced:
            self._give_back(delivery, self._retries.retry_delay)  # a subscription may have been added meanwhile
        else:
            self.pull.ack(delivery)

    async def failed(self, inbound: Inbound, error: BaseException, source: str) -> None:
        delivery = self._held.get(inbound)
        if delivery is None:
            return
        if isinstance(error, WorkerStopped) and error.worker_id == self._parts.worker_id:
            await self.refused(inbound, error)
        elif isinstance(error, asyncio.CancelledError) and inbound.token is not None and inbound.token.is_cancelled():
            self.handled(inbound, None)  # its publisher has cancelled it
        elif isinstance(error, Reject):
            await self._bury(inbound, delivery, error, error.reason)
        elif isinstance(error, _UNREADABLE) and not inbound.begun:
            await self._bury(inbound, delivery, error, str(error))
        elif delivery.attempt >= self._retries.max_deliver:
            name = class_name(type(error))
            await self._bury(inbound, delivery, error, f"{name} in the last of {delivery.attempt} attempts")
        else:
            self._retry(inbound, delivery, error)

    async def refused(self, inbound: Inbound, error: Exception) -> None:
        if (delivery := self._release(inbound)) is not None:
            self._give_back(delivery, _SOON)

    def _retry(self, inbound: Inbound, delivery: Delivery, error: BaseException) -> None:
        """Have an event delivered again whose handler raised."""
        delay = self._retries.delay(delivery.attempt)
        if isinstance(error, Retry) and error.after is not None:
            delay = error.after
        logger.warning(
            "event %d of %s for %s failed in attempt %d of %d, and is tried again in %g s: %s",
            delivery.sequence,
            self.stream,
            self._hosted.agent_type,
            delivery.attempt,
            self._retries.max_deliver,
            delay,
            outline(error),
        )
        self._release(inbound)
        self.pull.retry(delivery, delay)

    def _give_back(self, delivery: Delivery, delay: float) -> None:
        """Have an event delivered again without that this one counts as an attempt."""
        self._parts.returned.add(self._hosted.agent_type, delivery)
        self.pull.retry(delivery, delay)

    def _stopped(self) -> SentBack:
        return SentBack(WorkerStopped(self._hosted.agent_type, self._parts.worker_id))

    def _release(self, inbound: Inbound) -> Delivery | None:
        """Hold an event no longer. Returns None if it was not held."""
        self._waiting.pop(inbound, None)
        delivery = self._held.pop(inbound, None)
        if delivery is not None:
            self._held_bytes -= inbound.size
            if self._by_sequence.get(delivery.sequence) is inbound:
                del self._by_sequence[delivery.sequence]
        return delivery

    # -- dead letters --------------------------------------------------------------------------------------------

    async def _bury(self, inbound: Inbound, delivery: Delivery, error: BaseException, reason: str) -> None:
        """Make an event that is held a dead letter."""
        said = inbound.body.text("id") if inbound.body is not None else None
        await self._end_as_dead_letter(delivery, said or message_id_of(delivery), error, reason, delivery.attempt)
        self._release(inbound)

    async def _end_unsettled(self, delivery: Delivery) -> None:
        """Make an event a dead letter whose attempts were used up without any coming to its end."""
        attempts = delivery.attempt - 1
        try:
            body = envelope.decode(delivery.message.data)
        except CannotDecode:
            body = None
        said = body.text("id") if body is not None else None
        error = NotSettled(delivery.stream, delivery.sequence, attempts)
        await self._end_as_dead_letter(delivery, said or message_id_of(delivery), error, str(error), attempts)

    async def _end_as_dead_letter(
        self, delivery: Delivery, message_id: str, error: BaseException, reason: str, attempts: int
    ) -> None:
        """Store a dead letter, and terminate its event. If it cannot be stored, its event is given back for later."""
        letter = Unhandled(
            delivery=delivery,
            subject=published_on(delivery.message, self._again),
            agent_type=self._hosted.agent_type,
            message_id=message_id,
            reason=reason,
            error=error,
            attempts=attempts,
            failed_at=time.time(),
        )
        if not await self._parts.bury(letter, self._retries.retry_delay_max):
            self._give_back(delivery, self._retries.retry_delay_max)
            return
        self.pull.terminate(delivery, f"dead letter: {reason}")


def message_id_of(delivery: Delivery) -> str:
    """The message id of an event with a plain body: the same in all attempts."""
    return (delivery.message.headers or {}).get(MESSAGE_ID_HEADER) or f"{delivery.stream}-{delivery.sequence}"
