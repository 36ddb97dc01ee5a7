"""Feeds the events of one stream to the agents of a keyed type, in the order in which they are stored.

Rules:

1. One worker of the type feeds: the one whose pulls the server has *pinned*. The others wait with a pull for a single
   message, which comes when the server pins them.
2. The consumer numbers its deliveries. A feeder takes them without a gap in their numbers, and nothing else. A gap
   means that a delivery was lost, or went to somebody else. Then, and when it was pinned anew, it *starts over*: it has
   everything after the acknowledgement floor delivered again. This is necessary because an owner skips an event that
   comes after a later one of its agent.
3. Each event waits in the line of its key (`natsrt.hosting.lines`), and is delivered to the owner of its agent, who
   confirms it when it is handled and the agent's state is stored.
4. An event is acknowledged when it is confirmed, or when it is for no agent of the type. If its handler raised, or its
   owner was lost, it is delivered again in its place after a delay that grows, and its key waits, however long that is.
   When it has been tried as often as its agent type allows, it becomes a dead letter, and its key goes on. What follows
   from the end of an attempt is decided in `natsrt.hosting.endings`, and failed attempts are counted where the next
   feeder finds them (`natsrt.jetstream.attempts`).
5. The server pins another client only when it has a message to deliver. So a client that waits looks after the
   consumer when a worker has gone: if nobody is pinned, and messages wait for their acknowledgements, it resets the
   consumer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from autogen_core import AgentId, CancellationToken
from nats.aio.msg import Msg

from natsrt.agents.hosted_type import HostedType
from natsrt.agents.inbound import EVENT, EventDropped, Inbound, Route
from natsrt.background import BackgroundTasks, end_tasks
from natsrt.errors import CannotDecode, MessageTooLarge, NatsrtError, StreamUnavailable, WorkerLost
from natsrt.hosting.durable_settlement import DurableParts, letter_of, message_id_of, number_reminder, share_of
from natsrt.hosting.endings import Acknowledge, Bury, Ending, Fate, GiveBack, TryAgain, before_it_begins, fate
from natsrt.hosting.lines import Again, Lines, Outcome, Settled, Tries
from natsrt.hosting.pinned_consumer import GROUP, PIN, WAITS, is_pinned, noting_suspects, pulls_with, suspects
from natsrt.hosting.reader import Reader
from natsrt.hosting.settlements import EventSettlement
from natsrt.hosting.task_answers import TaskAnswers
from natsrt.hosting.tasks import Tasks, retries_of
from natsrt.jetstream.agent_records import AgentRecords
from natsrt.jetstream.attempts import Counted
from natsrt.jetstream.consumers import ConsumerConfig, Consumers, Start
from natsrt.jetstream.dead_letters import published_on
from natsrt.jetstream.delivery import Delivery
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.pulling import BATCH, Pull, Room
from natsrt.retry_types import RetryOptions
from natsrt.sending.event_sender import EventSender
from natsrt.sending.keyed_delivery import KeyedDelivery
from natsrt.task_types import TaskId, task_of
from natsrt.transport.bodies import Bodies
from natsrt.wire.failures import sent_name
from natsrt.wire.stored_events import StoredEvent, stream_id
from natsrt.wire.times import seconds_of

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_AGAIN: Final = 1.0
"""Seconds between two attempts to start over, and between two looks after the consumer."""
_LOOKS: Final = 8
"""How often a client that waits looks after a consumer on which another client stays pinned."""
_END_WITHIN: Final = 1.0
"""Seconds for which a stop waits for the events that are being delivered."""


class _Place(NamedTuple):
    """Where an event is stored, and when, in seconds since the epoch. ``reply`` is the subject on which its delivery is
    acknowledged, and ``epoch`` the number of the start over since which that holds."""

    sequence: int
    reply: str
    stored_at: float
    epoch: int


@dataclass(frozen=True, slots=True)
class FeederParts:
    """What the feeders of one worker have in common, beside what all consumers have."""

    bodies: Bodies
    reader: Reader
    records: AgentRecords
    sender: EventSender
    delivery: KeyedDelivery
    events: EventSettlement
    tasks: Tasks
    task_answers: TaskAnswers


class Feeder:
    """Pulls the events of one stream for one keyed type, and feeds them to its agents while it is pinned.

    ``config`` is how the consumer is made: see `feeding`. ``start`` is where it begins then. ``again`` is the start of
    the subjects of events that are stored once more.
    """

    def __init__(
        self,
        parts: DurableParts,
        feeding_parts: FeederParts,
        hosted: HostedType,
        stream: str,
        config: ConsumerConfig,
        retries: RetryOptions,
        *,
        start: Start,
        again: str,
    ) -> None:
        self._parts = parts
        self._bodies = feeding_parts.bodies
        self._reader = feeding_parts.reader
        self._records = feeding_parts.records
        self._sender = feeding_parts.sender
        self._delivery = feeding_parts.delivery
        self._tasks_of = feeding_parts.tasks
        self._hosted = hosted
        self.stream: str = stream
        self.config: ConsumerConfig = config
        self._retries = retries
        self._again = again
        self._route = Route(EVENT, hosted, feeding_parts.events)
        self._domain = Domain(parts.options.jetstream_domain)
        self._tasks = BackgroundTasks(logger, f"feeding events of {stream} failed")
        self._lines: Lines[_Place, Inbound] | None = None
        """The lines of the events; None while another client is pinned."""
        self._stream_id = ""
        self._pin = ""
        """The last id with which the server pinned this client."""
        self._expected = 1
        """The number of the next delivery."""
        self._epoch = 0
        """How often this feeder has started over."""
        self._suspects: dict[int, Counted] = {}
        """What was counted of suspects, by sequence: they are counted before each attempt."""
        self._counted: set[int] = set()
        """The sequences of suspects whose present attempt is counted."""
        self._given_up: dict[int, str] = {}
        """Why events are dead letters, by sequence, until they are terminated."""
        self._starting: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._stopping = False
        self.pull: Pull = Pull(
            parts.connection,
            self._domain,
            stream,
            config,
            self._take_in,
            inbox_prefix=parts.options.inbox_prefix,
            start=start,
            room=self._room,
            on_trouble=self._tell_trouble,
        )
        self.pull.extra = dict(WAITS)

    # -- the life of a feeder ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Make the consumer if it is missing, and wait to be pinned. Raises as `Pull.start`."""
        await self.pull.start()
        self.look_after()

    async def configure(self, config: ConsumerConfig) -> None:
        """Change the consumer. Raises as `Pull.configure`."""
        await self.pull.configure(config)
        self.config = config

    async def stop(self) -> None:
        """Pull no more, and let another worker feed. Events that are being delivered are broken off after a second:
        their owners may handle them nevertheless, and skip them when they come again."""
        self._stopping = True
        await end_tasks(*filter(None, (self._starting, self._looking)))
        await self.pull.stop()
        lines, self._lines = self._lines, None
        if lines is not None:
            await lines.stop(_END_WITHIN)
            try:
                await Consumers(self._parts.connection, self._domain, self.stream).unpin(self.config.name, GROUP)
            except NatsrtError as error:  # the server ends it some seconds after the last pull
                logger.debug("%s", error)
        await self._tasks.cancel()

    @property
    def feeds(self) -> bool:
        """True while this worker feeds."""
        return self._lines is not None

    @property
    def holds(self) -> int:
        """Number of events that are held; at least 1 while it is not known what is to be delivered again."""
        held = 0 if self._lines is None else sum(1 for _ in self._lines.held())
        return held or int(self._starting is not None)

    def still_held(self) -> None:
        """Tell the server that the events are held, so that it does not deliver them again."""
        if self._lines is not None:
            self.pull.working(self._lines.held())

    def _tell_trouble(self, error: NatsrtError | None) -> None:
        if error is None:
            logger.info("events of %s for %s are pulled again", self.stream, self._hosted.agent_type)
        else:
            logger.warning("events of %s for %s cannot be pulled: %s", self.stream, self._hosted.agent_type, error)

    # -- who feeds -----------------------------------------------------------------------------------------------

    def _room(self) -> Room:
        """How much may be pulled. The lines bound the bytes in memory, and the consumer the number of events, so the
        pinned client always pulls: it would not stay pinned otherwise."""
        if "id" in self.pull.extra:
            return Room(BATCH, share_of(self._parts))
        if self._lines is not None:
            self._end_feeding()
        return Room(1, share_of(self._parts))

    def _end_feeding(self) -> None:
        """The server has ended the pin. What is not settled is delivered again, to whom it pins next."""
        lines, self._lines = self._lines, None
        self._given_up.clear()
        self.pull.extra = dict(WAITS)
        if lines is not None:
            logger.info("%s is not the feeder of %s any more", self._parts.worker_id, self._name)
            self._tasks.spawn(_end(lines))
            self.look_after()

    @property
    def _name(self) -> str:
        return f"{self._hosted.agent_type} from {self.stream}"

    def look_after(self) -> None:
        """See to it that there is a feeder if events wait for one. Call it when the last one may be gone."""
        if self._lines is None and not self._stopping and (self._looking is None or self._looking.done()):
            self._looking = self._tasks.spawn(self._look())

    async def _look(self) -> None:
        consumers = Consumers(self._parts.connection, self._domain, self.stream)
        for _ in range(_LOOKS):
            if self._lines is not None or self._starting is not None:
                return
            try:
                info = await consumers.info(self.config.name)
                if info is None or not info.get("num_ack_pending"):
                    return  # the next message that is stored has the server pin a client
                if not is_pinned(info):
                    await self._have_one_pinned(consumers, info)
                    return
            except NatsrtError as error:
                logger.debug("%s", error)
            await asyncio.sleep(_AGAIN)

    async def _have_one_pinned(self, consumers: Consumers, info: dict[str, Any]) -> None:
        """Reset the consumer, so that it has a message to deliver, and pins a client."""
        await consumers.update(noting_suspects(self.config, info), info)
        await consumers.reset(self.config.name, info["ack_floor"]["stream_seq"] + 1)

    # -- taking in -----------------------------------------------------------------------------------------------

    def _take_in(self, delivery: Delivery) -> None:
        """Take in a delivery. Called in the client's read loop."""
        headers = delivery.message.headers
        pin = None if headers is None else headers.get(PIN)
        if pin is not None and pin != self._pin:
            self._pin = pin
            self.pull.extra = pulls_with(pin)
            self._start_over(delivery.sequence if delivery.attempt == 1 else 0)
        elif self._stopping or "id" not in self.pull.extra:
            return  # it was sent before the pin ended, and comes again
        elif self._lines is None or delivery.consumer_sequence != self._expected:
            self._start_over(None)
        else:
            self._expected += 1
            self._put(self._lines, delivery)

    def _put(self, lines: Lines[_Place, Inbound], delivery: Delivery) -> None:
        message = delivery.message
        inbound = self._inbound(message)
        place = _Place(delivery.sequence, message.reply, delivery.stored_at, self._epoch)
        lines.take(self._key(inbound), place, inbound, inbound.size)

    def _inbound(self, message: Msg) -> Inbound:
        message.subject = published_on(message, self._again)
        size = len(message.data) + len(message.subject)
        return Inbound(self._route, message, size, asyncio.get_running_loop().time())

    def _key(self, inbound: Inbound) -> str:
        """The key of the line of an event: the source of its topic, whether the type takes the topic or not."""
        try:
            inbound.body = self._bodies.unpack(inbound.message.data)
            inbound.kind, inbound.key, inbound.topic = self._reader.address(inbound)
        except CannotDecode:
            return ""
        return "" if inbound.topic is None else inbound.topic.source

    def _start_over(self, first: int | None) -> None:
        """Take what is not acknowledged from the beginning.

        ``first`` is the sequence of the message with which this client was pinned anew, 0 if that was delivered before;
        None if this client still is pinned.
        """
        self.pull.pause()
        self._epoch += 1
        if first is not None and self._starting is not None:
            self._starting.cancel()
        elif self._starting is not None:
            return
        self._starting = self._tasks.spawn(self._start_it(first))

    async def _start_it(self, first: int | None) -> None:
        own = asyncio.current_task()
        try:
            while True:
                if await self._started(first):
                    return
                await asyncio.sleep(_AGAIN)
        finally:
            if self._starting is own:
                self._starting = None
                if not self._stopping:
                    self.pull.go_on()

    async def _started(self, first: int | None) -> bool:
        consumers = Consumers(self._parts.connection, self._domain, self.stream)
        try:
            await self.pull.settlements_arrived()
            info = await consumers.info(self.config.name)
            if info is None:
                raise StreamUnavailable("read", self.stream, f"its consumer {self.config.name} is gone", passing=True)
            identity = stream_id(self.stream, seconds_of(str((await consumers.state())[0])))
            if first is not None or self._lines is None or identity != self._stream_id:
                await self._make_lines(info, first)
                self._stream_id = identity
            self._expected = 1
            await self.pull.reset(int(info["ack_floor"]["stream_seq"]) + 1)
        except NatsrtError as error:
            logger.warning("feeding %s cannot start yet: %s", self._name, error)
            return False
        return True

    async def _make_lines(self, info: dict[str, Any], first: int | None) -> None:
        if self._lines is not None:
            await self._lines.stop()
        last = suspects(info, first or None)
        self._suspects.clear()
        self._counted.clear()
        self._lines = Lines(
            self,
            max_bytes=share_of(self._parts),
            most=self.config.max_ack_pending,
            retries=self._retries,
            suspects_to=last,
        )
        logger.info("%s is the feeder of %s", self._parts.worker_id, self._name)

    # -- as the deliverer of its lines ---------------------------------------------------------------------------

    async def deliver(self, place: _Place, message: Inbound, tries: Tries) -> Outcome:
        """Deliver an event once to the owner of its agent. An error that nobody expects is a failed attempt, too."""
        stored = Delivery(message.message)
        if tries != (0, 0):
            self._parts.counters.redelivered += 1
        task = task_of(message.topic)
        retries = self._retries if task is None else retries_of(self._retries, message.body)
        try:
            decided, attempts = await self._decide(place, message, stored, tries.failures, retries)
        except Exception as error:
            logger.exception("event %d of %s could not be delivered", place.sequence, self.stream)
            attempts = tries.failures + 1
            decided = fate(retries, Ending(attempts=attempts, error=error, begun=None))
        if task is not None:
            decided = await self._settle_task(task, message, attempts, decided)
        return await self._carry_out(place, message, stored, attempts, decided, retries)

    async def _decide(
        self, place: _Place, message: Inbound, stored: Delivery, attempts: int, retries: RetryOptions
    ) -> tuple[Fate, int]:
        """Deliver an event that had so many ``attempts``, if it must be. Returns what follows, and how many it has had
        then."""
        given_up = place.sequence in self._suspects and self._suspects[place.sequence].given_up
        task = task_of(message.topic)
        decided: Fate | None = before_it_begins(
            retries, self.stream, place.sequence, attempts=attempts, given_up=given_up
        )
        if isinstance(decided, Bury):
            decided = await self._unless_applied(decided, place, message)
        if task is not None and not isinstance(decided, Acknowledge):
            decided = await self._ended_before(task, message, attempts) or decided
        if decided is None:
            if place.sequence in self._suspects and place.sequence not in self._counted:
                await self._count(place)
            attempts += 1
            decided = fate(retries, await self._attempt(place, message, stored, attempts))
        return decided, attempts

    async def _unless_applied(self, decided: Fate, place: _Place, message: Inbound) -> Fate | None:
        """What happens to an event that has used up its attempts; None if its agent has handled it.

        Then only its end was lost, and in another attempt the agent says what became of it.
        """
        if message.key is None:
            return decided
        try:
            record = await self._records.read(AgentId(self._hosted.agent_type, message.key), damaged=True)
        except NatsrtError as error:
            logger.warning("it is not known yet whether event %d was handled: %s", place.sequence, error)
            return GiveBack(self._retries.retry_delay)
        is_applied = record is not None and place.sequence <= record.handled.get(self._stream_id, 0)
        return None if is_applied else decided

    async def _ended_before(self, task: TaskId, message: Inbound, attempts: int) -> Fate | None:
        """What happens to a task that must not be handled; None if it must, as far as that is known."""
        if not self._tasks_of.may_have_ended(message, attempts + 1):
            return None
        try:
            return Acknowledge() if await self._tasks_of.has_ended(task) else None
        except NatsrtError as error:
            logger.warning("it is not known yet whether %s has a result: %s", task, error)
            return GiveBack(self._retries.retry_delay)

    async def _settle_task(self, task: TaskId, message: Inbound, attempts: int, decided: Fate) -> Fate:
        """Store the result of a task that has failed, and remove one that has ended."""
        if isinstance(decided, Bury):
            try:
                await self._tasks_of.failed(task, decided.error, message.body, decided.attempts)
            except NatsrtError as error:
                logger.error("the failure of %s cannot be stored, and it is tried again: %s", task, error)
                return GiveBack(self._retries.retry_delay_max)
            await self._tasks_of.tell_end(task)
        elif isinstance(decided, Acknowledge):
            if not await self._tasks_of.remove(message.message.subject, message.body):
                return GiveBack(self._retries.retry_delay_max)
        elif isinstance(decided, TryAgain):
            await self._tasks_of.told(task, attempts).wait(time.time() + decided.after)
        return decided

    async def _attempt(self, place: _Place, message: Inbound, stored: Delivery, attempts: int) -> Ending:
        """Deliver an event to the owner of its agent, and find out how that ended."""
        try:
            if message.body is None or message.key is None:
                message.body = self._bodies.unpack(message.message.data)
                message.kind, message.key, message.topic = self._reader.address(message)
            if message.key is None or message.topic is None:
                return Ending(attempts=attempts, unknown=not self._parts.registry.synced)
            agent = AgentId(self._hosted.agent_type, message.key)
            token = self._token_of_task(message)
            number_reminder(message, stored)
            body = message.body
            if body is None:
                message_id = message_id_of(stored)
                read = await self._reader.plain_delivery(message, agent, self._hosted.handles, message_id)
                body = self._sender.enveloped(read.message, message_id)
        except EventDropped:
            return Ending(attempts=attempts)
        except CannotDecode as unreadable:
            self._parts.counters.undecodable += 1
            return Ending(attempts=attempts, error=unreadable, begun=False)
        event = StoredEvent(self._stream_id, place.sequence, attempts, stored.stored_at)
        left = self._parts.later.left(stored)
        try:
            failure = await self._delivery.deliver_confirmed(agent, message.topic, body, event)
        except MessageTooLarge as too_large:
            return Ending(attempts=attempts, error=too_large, begun=False)
        except WorkerLost as lost:  # perhaps because of the event
            failure = lost
        except NatsrtError as error:
            logger.info(
                "event %d of %s could not be delivered to %s yet: %s", place.sequence, self.stream, agent, error
            )
            return Ending(attempts=attempts, refused=True)
        cancelled = token is not None and token.is_cancelled()
        name = None if failure is None else sent_name(failure, str(agent))
        return Ending(attempts=attempts, error=failure, name=name, begun=None, left=left, cancelled=cancelled)

    async def _carry_out(
        self,
        place: _Place,
        message: Inbound,
        stored: Delivery,
        attempts: int,
        decided: Fate,
        retries: RetryOptions,
    ) -> Outcome:
        """Do with an event what was decided."""
        match decided:
            case Acknowledge():
                return Settled.HANDLED
            case GiveBack(after):
                return self._without_attempt(place, after)
            case TryAgain():
                self._parts.log_failure(f"{self._hosted.agent_type}/{message.key}", stored, attempts, retries, decided)
                if place.sequence in self._counted:
                    self._counted.remove(place.sequence)
                else:
                    self._parts.attempts.failed(*self._countable(place))
                return Again(decided.after, token=self._token_of_task(message))
            case Bury():
                letter = letter_of(self._hosted.agent_type, stored, message, decided)
                if await self._parts.bury(letter, self._retries.retry_delay_max):
                    self._parts.attempts.gave_up(*self._countable(place))
                    self._given_up[place.sequence] = decided.reason
                    if task_of(message.topic) is not None:
                        await self._tasks_of.remove(message.message.subject, None)
                    return Settled.GIVEN_UP
                return self._without_attempt(place, self._retries.retry_delay_max)

    def _token_of_task(self, message: Inbound) -> CancellationToken | None:
        """The token of a task: when it is cancelled, its agent's later tasks do not wait for it. None: it is none."""
        if message.body is None or task_of(message.topic) is None:
            return None
        return self._reader.token(message.body)

    def _without_attempt(self, place: _Place, after: float) -> Again:
        self._take_back(place)
        return Again(after, failed=False)

    async def read(self, place: _Place) -> Inbound | None:
        """Read an event again that was set aside."""
        consumers = Consumers(self._parts.connection, self._domain, self.stream)
        message = await consumers.message(place.sequence)
        if message is None:
            return None
        message.reply = place.reply
        inbound = self._inbound(message)
        self._key(inbound)
        return inbound

    async def begin(self, place: _Place) -> int:
        """Write down that a suspect is about to be delivered."""
        counted = self._suspects[place.sequence] = await self._count(place)
        return counted.attempts

    async def _count(self, place: _Place) -> Counted:
        """Count the attempt of a suspect that is about to begin."""
        counted = await self._parts.attempts.begin(*self._countable(place))
        if counted is None:
            return Counted()
        self._counted.add(place.sequence)
        return counted

    def _take_back(self, place: _Place) -> None:
        """The attempt that was counted, if it was, is none any more."""
        if place.sequence in self._counted:
            self._counted.remove(place.sequence)
            self._parts.attempts.ended(*self._countable(place))

    def _countable(self, place: _Place) -> tuple[str, str, int, float]:
        return self._hosted.agent_type, self.stream, place.sequence, place.stored_at

    def settled(self, place: _Place, outcome: Settled) -> None:
        """Acknowledge an event, unless the consumer was reset since its delivery: it comes again then, if it is stored.

        A reset numbers the deliveries anew. The server takes an acknowledgement with a former number, of an event that
        is gone, for one of the event that has this number now, and with it for all events before the one that is gone.
        """
        if place.epoch != self._epoch:
            return
        self._suspects.pop(place.sequence, None)
        if outcome is Settled.GIVEN_UP:
            self._counted.discard(place.sequence)
            self.pull.terminate(place, f"dead letter: {self._given_up.pop(place.sequence, '')}")
        else:
            self._take_back(place)
            self.pull.ack(place)


async def _end(lines: Lines[_Place, Inbound]) -> None:
    await lines.stop()
