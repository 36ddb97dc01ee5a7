"""How events of durable topics are settled, and how many of them a worker holds.

Rules:

1. An event is *held* from its delivery until it is settled: acknowledged, given back, or terminated. While it is held,
   the server is told so from time to time, and delivers it to no other worker (`DurableSettlement.still_held`). One
   that is delivered again nevertheless, because this worker was frozen, is not handled a second time here.
2. What follows from the end of an attempt is decided in `natsrt.hosting.endings`.
3. An event that was delivered before is looked after when its handler is about to begin (`DurableSettlement.begins`):
   the attempt is counted, so that an event which ends its workers is given up some time, and those that they merely
   held are not (`natsrt.jetstream.attempts`).
4. An event that is to be tried again in more than a minute waits in a schedule of its stream, where it holds no place
   in the consumer (`natsrt.jetstream.later_retries`). If that is not possible, it keeps its place.
5. A dead letter is stored before its event is terminated, and what waits for later is stored before its delivery is
   acknowledged. If the worker ends between the two, the event is delivered again, and no second one is stored.
6. An event whose handler has not ended when the worker stops is given back, and another worker gets it at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from natsrt.agents.current_delivery import handled_delivery
from natsrt.agents.hosted_type import HostedType
from natsrt.agents.inbound import EVENT, Answer, EventDropped, Inbound, Route, SentBack, Settlement
from natsrt.errors import NatsrtError, WorkerStopped
from natsrt.hosting.endings import Acknowledge, Bury, Ending, Fate, GiveBack, TryAgain, before_it_begins, fate
from natsrt.hosting.intake import Intake
from natsrt.hosting.settlements import outline
from natsrt.jetstream.attempts import Attempts, Counted
from natsrt.jetstream.consumers import ConsumerConfig, Start
from natsrt.jetstream.dead_letter_box import DeadLetterBox
from natsrt.jetstream.dead_letters import DeadLetters, Unhandled, published_on
from natsrt.jetstream.delivery import Delivery
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.later_retries import LaterRetries
from natsrt.jetstream.payload_sweep import PayloadSweep
from natsrt.jetstream.pulling import EXPIRES, HEARTBEAT, Pull, Room
from natsrt.jetstream.registry.registry import Registry
from natsrt.observe.event_errors import EventErrors
from natsrt.observe.metrics import Counters
from natsrt.options import Options
from natsrt.reminder_types import reminder_of
from natsrt.retry_types import RetryOptions
from natsrt.transport.connection import Connection
from natsrt.wire.envelope import MESSAGE_ID_HEADER

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
_NO_ROOM: Final = Room(0, 0)


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
    attempts: Attempts
    later: LaterRetries
    payloads: PayloadSweep
    event_errors: EventErrors
    counters: Counters
    settlements: set[Puller] = field(default_factory=set)

    def log_failure(
        self, agent: str, delivery: Delivery, attempts: int, retries: RetryOptions, decided: TryAgain
    ) -> None:
        """Log that one of the ``attempts`` of ``agent`` to handle an event has failed, and that it is tried again."""
        logger.warning(
            "event %d of %s for %s failed in attempt %d of %d, and is tried again in %g s: %s",
            delivery.first_sequence,
            delivery.stream,
            agent,
            attempts,
            retries.max_deliver,
            decided.after,
            outline(decided.error),
        )

    async def bury(self, letter: Unhandled, after: float) -> bool:
        """Store a dead letter. Returns False if that is not possible now: try it again ``after`` so many seconds."""
        delivery = letter.delivery
        try:
            is_new = await self.dead_letters.write(letter)
        except NatsrtError as problem:
            logger.error(
                "event %d of %s for %s cannot be made a dead letter, and is tried again in %g s: %s",
                delivery.first_sequence,
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
                delivery.first_sequence,
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


class Held:
    """An event that is held.

    ``attempts`` is the number of its attempts, with the present one. ``counted``: the present one was counted before
    its handler began. ``fate``: what was decided before that; None: nothing was.
    """

    __slots__ = ("attempts", "counted", "delivery", "fate")

    def __init__(self, delivery: Delivery) -> None:
        self.delivery: Delivery = delivery
        self.attempts: int = delivery.before + 1
        self.counted: bool = False
        self.fate: Fate | None = None


class DurableSettlement(Settlement):
    """Pulls the events of one stream for one agent type, and settles them.

    ``again`` is the start of the subjects of events that are stored once more. ``config`` is how the consumer is
    made, and ``start`` is where it begins then.
    """

    wants_answer = False
    has_own_limit = True
    looks_before_handlers = True

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
        self._held: dict[Inbound, Held] = {}
        self._by_sequence: dict[int, Inbound] = {}
        """The events that are held, by their sequences in the stream."""
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

    @property
    def holds(self) -> int:
        """Number of events that are held."""
        return len(self._held)

    def still_held(self) -> None:
        """Tell the server that the events are held, so that they are not delivered to another worker."""
        self.pull.working(held.delivery for held in self._held.values())

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
        message = delivery.message
        if message.subject.startswith(self._again):
            self._parts.later.recognise(delivery)
            message.subject = published_on(message, self._again)
        if delivery.attempt > 1 or delivery.before:
            self._parts.counters.redelivered += 1
        if delivery.attempt > 1 and (inbound := self._by_sequence.get(delivery.sequence)) is not None:
            held = self._held[inbound]
            if held.delivery.stored_at == delivery.stored_at:
                held.delivery = delivery
                return
        self._arriving = delivery
        self._parts.intake.take(self._route, message)

    def _tell_trouble(self, error: NatsrtError | None) -> None:
        if error is None:
            logger.info("events of %s for %s are pulled again", self.stream, self._hosted.agent_type)
        else:
            logger.warning("events of %s for %s cannot be pulled: %s", self.stream, self._hosted.agent_type, error)

    def retries(self, inbound: Inbound) -> RetryOptions:
        """How an event is tried again."""
        return self._retries

    # -- as a settlement -----------------------------------------------------------------------------------------

    def take(self, inbound: Inbound) -> bool:
        assert self._arriving is not None
        self._held[inbound] = Held(self._arriving)
        self._by_sequence[self._arriving.sequence] = inbound
        self._held_bytes += inbound.size
        return True

    def identified(self, inbound: Inbound) -> None:
        if self._stopping:
            raise self._stopped()
        delivery = self._held[inbound].delivery
        number_reminder(inbound, delivery)
        handled_delivery.set(delivery)

    def waits_for_place(self, inbound: Inbound, refuse: Callable[[Exception], None]) -> None:
        self._waiting[inbound] = refuse

    def plain_id(self, inbound: Inbound) -> str:
        return message_id_of(self._held[inbound].delivery)

    async def begins(self, inbound: Inbound) -> None:
        """Called when the handler is about to begin. Raises `EventDropped` if it must not, and `SentBack`."""
        held = self._held.get(inbound)
        if held is not None and (held.delivery.attempt > 1 or held.delivery.before):
            await self._begin_again(inbound, held, held.delivery)

    async def _begin_again(self, inbound: Inbound, held: Held, delivery: Delivery) -> None:
        """Look after an event that was delivered before."""
        agent_type, later = self._hosted.agent_type, self._parts.later
        deliveries, counted = delivery.attempt, Counted()
        try:
            if deliveries > 1 and await later.has(agent_type, delivery):
                logger.info("%r waits for a later attempt already, and is acknowledged", delivery)
                raise EventDropped
            if delivery.before and await later.is_discarded(delivery):
                logger.warning("%r is not tried again: its stream has discarded the event", delivery)
                raise EventDropped
        except NatsrtError as error:
            logger.warning("%r is given back, since it is not known whether it waits elsewhere: %s", delivery, error)
            raise SentBack(error) from None
        if deliveries > 1:
            counted = await self._count(held)
        before = held.attempts - 1
        held.fate = before_it_begins(
            self.retries(inbound), self.stream, delivery.first_sequence, attempts=before, given_up=counted.given_up
        )
        if held.fate is not None:
            raise EventDropped
        unknown = deliveries - 1 - counted.attempts - counted.returned
        # A worker may have died in the first attempt, which is not counted: a handler that wants to know must be told.
        delivery.attempt = held.attempts + min(1, max(0, unknown))
        handled_delivery.set(delivery)

    async def _count(self, held: Held) -> Counted:
        """Count the present attempt of an event that was delivered before.

        If the server does not count, each delivery is taken for an attempt, so that there is an end to them.
        """
        delivery = held.delivery
        counted = await self._parts.attempts.begin(self._hosted.agent_type, *_place(delivery))
        held.counted = counted is not None
        counted = counted or Counted(delivery.attempt - 1)
        held.attempts = delivery.before + counted.attempts + 1
        return counted

    def handled(self, inbound: Inbound, answer: Answer | None) -> Awaitable[None] | None:
        held = self._held.get(inbound)
        if held is None:
            return None
        decided = self._fate_of_handled(inbound, held)
        if isinstance(decided, Acknowledge):
            self._acknowledge(inbound, held)
            return None
        return self._settle(inbound, held, decided)

    def _fate_of_handled(self, inbound: Inbound, held: Held) -> Fate:
        """What happens to an event whose handler returned, or which has no handler here."""
        unknown = inbound.key is None and not self._parts.registry.synced  # a subscription may have been added
        return held.fate or fate(self.retries(inbound), Ending(attempts=0, unknown=unknown))

    async def failed(self, inbound: Inbound, error: BaseException, source: str) -> None:
        held = self._held.get(inbound)
        if held is None:
            return
        if isinstance(error, WorkerStopped) and error.worker_id == self._parts.worker_id:
            await self.refused(inbound, error)
            return
        if not inbound.begun and held.delivery.attempt > 1 and not held.counted:
            await self._count(held)  # the agent could not be made, for example
        ending = Ending(
            attempts=held.attempts,
            error=error,
            begun=inbound.begun,
            cancelled=inbound.token is not None and inbound.token.is_cancelled(),
            left=self._parts.later.left(held.delivery),
            can_wait=self._parts.later.are_possible(self.stream),
        )
        await self._settle(inbound, held, fate(self.retries(inbound), ending))

    async def refused(self, inbound: Inbound, error: Exception) -> None:
        if (held := self._held.get(inbound)) is not None:
            ending = Ending(attempts=0, refused=True, at_once=isinstance(error, WorkerStopped))
            await self._settle(inbound, held, fate(self.retries(inbound), ending))

    # -- what was decided ----------------------------------------------------------------------------------------

    async def _settle(self, inbound: Inbound, held: Held, decided: Fate) -> None:
        """Do with an event what was decided."""
        match decided:
            case Acknowledge():
                self._acknowledge(inbound, held)
            case GiveBack(after):
                self._give_back(inbound, held, after)
            case TryAgain():
                await self._try_again(inbound, held, decided)
            case Bury():
                await self._bury(inbound, held, decided)

    def _acknowledge(self, inbound: Inbound, held: Held) -> None:
        if held.counted:
            self._parts.attempts.ended(self._hosted.agent_type, *_place(held.delivery))
        self._release(inbound)
        self.pull.ack(held.delivery)

    def _give_back(self, inbound: Inbound, held: Held, after: float) -> None:
        """Have an event delivered again without that this delivery counts as an attempt."""
        agent_type, place = self._hosted.agent_type, _place(held.delivery)
        if held.counted:
            self._parts.attempts.ended(agent_type, *place)
        self._parts.attempts.returned(agent_type, *place)
        self._release(inbound)
        self.pull.retry(held.delivery, after)

    async def _try_again(self, inbound: Inbound, held: Held, decided: TryAgain) -> None:
        """Have an event delivered again whose attempt has failed."""
        delivery = held.delivery
        self._parts.log_failure(self._hosted.agent_type, delivery, held.attempts, self.retries(inbound), decided)
        if not held.counted:
            self._parts.attempts.failed(self._hosted.agent_type, *_place(delivery))
        if decided.elsewhere and await self._waits_elsewhere(inbound, held, decided.after):
            self._release(inbound)
            self.pull.ack(held.delivery)  # it may have been delivered again meanwhile
            return
        self._release(inbound)
        self.pull.retry(held.delivery, decided.after)

    async def _waits_elsewhere(self, inbound: Inbound, held: Held, after: float) -> bool:
        """Store an event for a later attempt. Returns False if that is not possible."""
        delivery = held.delivery
        try:
            await self._parts.later.put(
                self._hosted.agent_type,
                delivery,
                subject=delivery.message.subject,
                message_id=_message_id(inbound, delivery),
                attempts=held.attempts,
                after=after,
            )
        except NatsrtError as error:
            logger.warning("%r keeps its place in the consumer for %g s: %s", delivery, after, error)
            return False
        return True

    async def _bury(self, inbound: Inbound, held: Held, decided: Bury) -> None:
        """Store a dead letter, and terminate its event. If it cannot be stored, its event is given back for later."""
        delivery = held.delivery
        letter = letter_of(self._hosted.agent_type, delivery, inbound, decided)
        if await self._parts.bury(letter, self._retries.retry_delay_max):
            self._parts.attempts.gave_up(self._hosted.agent_type, *_place(delivery))
            await self._buried(inbound, held, decided)
        else:
            self._give_back(inbound, held, self._retries.retry_delay_max)

    async def _buried(self, inbound: Inbound, held: Held, decided: Bury) -> None:
        """Terminate an event that has become a dead letter."""
        self._release(inbound)
        self.pull.terminate(held.delivery, f"dead letter: {decided.reason}")

    def _stopped(self) -> SentBack:
        return SentBack(WorkerStopped(self._hosted.agent_type, self._parts.worker_id))

    def _release(self, inbound: Inbound) -> None:
        """Hold an event no longer. Has no effect if it is not held."""
        self._waiting.pop(inbound, None)
        held = self._held.pop(inbound, None)
        if held is not None:
            self._held_bytes -= inbound.size
            if self._by_sequence.get(held.delivery.sequence) is inbound:
                del self._by_sequence[held.delivery.sequence]


def message_id_of(delivery: Delivery) -> str:
    """The message id of an event with a plain body: the same in all attempts."""
    own = f"{delivery.stream}-{delivery.first_sequence}"
    return (delivery.message.headers or {}).get(MESSAGE_ID_HEADER) or own


def number_reminder(inbound: Inbound, delivery: Delivery) -> None:
    """Give a reminder in an envelope, which has the same message id each time, that of one with a plain body.

    Has no effect for another event.
    """
    topic = inbound.topic
    if inbound.body is not None and topic is not None and reminder_of(topic.type, topic.source) is not None:
        inbound.body.attributes["id"] = message_id_of(delivery)


def letter_of(agent_type: str, delivery: Delivery, inbound: Inbound, decided: Bury) -> Unhandled:
    """The dead letter of an event whose attempt has just ended."""
    return Unhandled(
        delivery=delivery,
        subject=inbound.message.subject,
        agent_type=agent_type,
        message_id=_message_id(inbound, delivery),
        reason=decided.reason,
        error=decided.error,
        attempts=decided.attempts,
        failed_at=time.time(),
        agent=None if inbound.key is None else f"{agent_type}/{inbound.key}",
    )


def _message_id(inbound: Inbound, delivery: Delivery) -> str:
    said = inbound.body.text("id") if inbound.body is not None else None
    return said or message_id_of(delivery)


def _place(delivery: Delivery) -> tuple[str, int, float]:
    """Under which its attempts are counted."""
    return delivery.stream, delivery.sequence, delivery.stored_at
