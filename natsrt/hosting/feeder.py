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
   owner was lost, it is delivered again in its place after a delay that grows, until it has been tried as often as its
   agent type allows. Then it becomes a dead letter, and its key goes on.
5. The server pins another client only when it has a message to deliver. So a client that waits looks after the
   consumer when a worker has gone: if nobody is pinned, and messages wait for their acknowledgements, it resets the
   consumer.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from autogen_core import AgentId
from nats.aio.msg import Msg

from natsrt.agents.hosted_type import HostedType
from natsrt.agents.inbound import EVENT, EventDropped, Inbound, Route
from natsrt.background import BackgroundTasks, end_tasks
from natsrt.errors import (
    CannotDecode,
    MessageTooLarge,
    NatsrtError,
    NotSettled,
    Reject,
    Retry,
    StreamUnavailable,
    WorkerLost,
)
from natsrt.hosting.durable_settlement import DurableParts, message_id_of, share_of
from natsrt.hosting.lines import Again, Lines, Outcome, Settled, Tries
from natsrt.hosting.reader import Reader
from natsrt.hosting.settlements import EventSettlement, outline
from natsrt.jetstream.consumers import ConsumerConfig, Consumers, Start
from natsrt.jetstream.dead_letters import Unhandled, published_on
from natsrt.jetstream.delivery import Delivery
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.pulling import BATCH, Pull, Room
from natsrt.retry_types import RetryOptions
from natsrt.sending.keyed_delivery import KeyedDelivery
from natsrt.sending.sender import Sender
from natsrt.transport.bodies import Bodies
from natsrt.wire.exception_parts import class_name
from natsrt.wire.stored_events import StoredEvent, stream_id

logger: logging.Logger = logging.getLogger("natsrt.hosting")

GROUP: Final = "feeder"
"""The priority group of the consumers of keyed types."""
PINNED_FOR: Final = 5.0
"""Seconds after its last pull for which a client stays pinned."""
_PIN: Final = "Nats-Pin-Id"
"""Header of what the server delivers to a pinned client."""
_SECOND: Final = 1_000_000_000
_PULL_EVERY: Final = 1.5
"""Seconds after which a pull of the pinned client expires, so that the next one keeps it pinned."""
_HEARTBEAT: Final = 0.75
"""Seconds between the heartbeats of such a pull."""
_SUSPECTS: Final = "natsrt_suspects"
"""The key in a consumer's metadata with the last sequence that a feeder got which has gone, if somebody else has reset
the consumer since."""
_AGAIN: Final = 1.0
"""Seconds between two attempts to start over, and between two looks after the consumer."""
_LOOKS: Final = 8
"""How often a client that waits looks after a consumer on which another client stays pinned."""
_END_WITHIN: Final = 1.0
"""Seconds for which a stop waits for the events that are being delivered."""


def feeding(config: ConsumerConfig) -> ConsumerConfig:
    """The configuration of a consumer from which one client pulls at a time."""
    return replace(
        config,
        more={
            **config.more,
            "priority_groups": [GROUP],
            "priority_policy": "pinned_client",
            "priority_timeout": int(PINNED_FOR * _SECOND),
        },
    )


class _Place(NamedTuple):
    """Where an event is stored. ``reply`` is the subject on which its delivery is acknowledged."""

    sequence: int
    reply: str


@dataclass(frozen=True, slots=True)
class FeederParts:
    """What the feeders of one worker have in common, beside what all consumers have."""

    bodies: Bodies
    reader: Reader
    sender: Sender
    delivery: KeyedDelivery
    events: EventSettlement


class Feeder:
    """Pulls the events of one stream for one keyed type, and feeds them to its agents while it is pinned.

    ``config`` is how the consumer is made: see `feeding`. ``start`` is where it begins then. ``again`` is the subject
    of events that are stored once more for this agent type.
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
        self._sender = feeding_parts.sender
        self._delivery = feeding_parts.delivery
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
        self._begun: set[int] = set()
        """The sequences of suspects whose delivery is written down as begun."""
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
        self.pull.extra = {"group": GROUP}

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
        self.pull.extra = {"group": GROUP}
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
                if not _pinned(info):
                    await self._have_one_pinned(consumers, info)
                    return
            except NatsrtError as error:
                logger.debug("%s", error)
            await asyncio.sleep(_AGAIN)

    async def _have_one_pinned(self, consumers: Consumers, info: dict[str, Any]) -> None:
        """Reset the consumer, so that it has a message to deliver, and pins a client."""
        floor, delivered = info["ack_floor"]["stream_seq"], _suspects(info)
        suspects = {_SUSPECTS: str(delivered)}
        config = replace(self.config, more={**self.config.more, "metadata": suspects})
        await consumers.update(config, info)
        await consumers.reset(self.config.name, floor + 1)

    # -- taking in -----------------------------------------------------------------------------------------------

    def _take_in(self, delivery: Delivery) -> None:
        """Take in a delivery. Called in the client's read loop."""
        headers = delivery.message.headers
        pin = None if headers is None else headers.get(_PIN)
        if pin is not None and pin != self._pin:
            self._pin = pin
            self.pull.extra = {
                "group": GROUP,
                "id": pin,
                "expires": int(_PULL_EVERY * _SECOND),
                "idle_heartbeat": int(_HEARTBEAT * _SECOND),
            }
            self._start_over(delivery.sequence)
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
        place = _Place(delivery.sequence, message.reply)
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

        ``first`` is the sequence of the message with which this client was pinned anew; None if it still is.
        """
        self.pull.pause()
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
            info = await consumers.info(self.config.name)
            if info is None:
                raise StreamUnavailable("read", self.stream, f"its consumer {self.config.name} is gone", passing=True)
            identity = stream_id(self.stream, _seconds(str((await consumers.state())[0])))
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
        suspects = _suspects(info)
        if first is not None and first >= suspects:
            suspects = first - 1  # it is new: no former feeder got it
        self._begun.clear()
        self._lines = Lines(
            self, max_bytes=share_of(self._parts), most=self.config.max_ack_pending, suspects_to=suspects
        )
        logger.info("%s is the feeder of %s", self._parts.worker_id, self._name)

    # -- as the deliverer of its lines ---------------------------------------------------------------------------

    async def deliver(self, place: _Place, message: Inbound, tries: Tries) -> Outcome:
        """Deliver an event once to the owner of its agent."""
        stored = Delivery(message.message)
        attempt = tries.failures + 1
        if tries != (0, 0):
            self._parts.counters.redelivered += 1
        if tries.failures >= self._retries.max_deliver:
            error: BaseException = NotSettled(self.stream, place.sequence, tries.failures)
            return await self._give_up(stored, message, error, str(error), tries.failures)
        try:
            if message.body is None or message.key is None:
                message.body = self._bodies.unpack(message.message.data)
                message.kind, message.key, message.topic = self._reader.address(message)
            if message.key is None or message.topic is None:
                return Settled.HANDLED if self._parts.registry.synced else Again(_AGAIN, failed=False)
            agent = AgentId(self._hosted.agent_type, message.key)
            body = message.body
            if body is None:
                message_id = message_id_of(stored)
                read = await self._reader.plain_delivery(message, agent, self._hosted.handles, message_id)
                body = self._sender.enveloped(read.message, message_id)
        except EventDropped:
            return Settled.HANDLED
        except CannotDecode as unreadable:
            self._parts.counters.undecodable += 1
            return await self._give_up(stored, message, unreadable, str(unreadable), attempt)
        event = StoredEvent(self._stream_id, place.sequence, attempt, stored.stored_at)
        try:
            failure = await self._delivery.deliver_confirmed(agent, message.topic, body, event)
        except MessageTooLarge as too_large:
            return await self._give_up(stored, message, too_large, str(too_large), attempt)
        except WorkerLost as lost:  # perhaps because of the event
            failure = lost
        except NatsrtError as error:
            return self._not_delivered(place, agent, error)
        return Settled.HANDLED if failure is None else await self._failed(stored, message, failure, attempt)

    def _not_delivered(self, place: _Place, agent: AgentId, error: NatsrtError) -> Again:
        logger.info("event %d of %s could not be delivered to %s yet: %s", place.sequence, self.stream, agent, error)
        return Again(self._retries.retry_delay, failed=False)

    async def _failed(self, stored: Delivery, message: Inbound, error: BaseException, attempt: int) -> Outcome:
        if isinstance(error, Reject):
            return await self._give_up(stored, message, error, error.reason, attempt)
        if isinstance(error, CannotDecode):
            return await self._give_up(stored, message, error, str(error), attempt)
        if attempt >= self._retries.max_deliver:
            reason = f"{class_name(type(error))} in the last of {attempt} attempts"
            return await self._give_up(stored, message, error, reason, attempt)
        delay = self._retries.delay(attempt)
        if isinstance(error, Retry) and error.after is not None:
            delay = error.after
        logger.warning(
            "event %d of %s for %s/%s failed in attempt %d of %d, and is tried again in %g s: %s",
            stored.sequence,
            self.stream,
            self._hosted.agent_type,
            message.key,
            attempt,
            self._retries.max_deliver,
            delay,
            outline(error),
        )
        return Again(delay)

    async def _give_up(
        self, stored: Delivery, message: Inbound, error: BaseException, reason: str, attempts: int
    ) -> Outcome:
        said = message.body.text("id") if message.body is not None else None
        letter = Unhandled(
            delivery=stored,
            subject=message.message.subject,
            agent_type=self._hosted.agent_type,
            message_id=said or message_id_of(stored),
            reason=reason,
            error=error,
            attempts=attempts,
            failed_at=time.time(),
        )
        later = self._retries.retry_delay_max
        return Settled.GIVEN_UP if await self._parts.bury(letter, later) else Again(later, failed=False)

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
        begun = await self._parts.returned.begin(self._hosted.agent_type, self.stream, place.sequence)
        self._begun.add(place.sequence)
        return begun

    def settled(self, place: _Place, outcome: Settled) -> None:
        """Acknowledge an event."""
        if place.sequence in self._begun:
            self._begun.remove(place.sequence)
            self._parts.returned.ended(self._hosted.agent_type, self.stream, place.sequence)
        if outcome is Settled.GIVEN_UP:
            self.pull.terminate(place, "dead letter")
        else:
            self.pull.ack(place)


async def _end(lines: Lines[_Place, Inbound]) -> None:
    await lines.stop()


def _pinned(info: dict[str, Any]) -> bool:
    """Whether a client is pinned. ``info`` is JetStream's description of the consumer."""
    groups: Iterable[dict[str, Any]] = info.get("priority_groups") or ()
    return any(group.get("pinned_client_id") for group in groups)


def _suspects(info: dict[str, Any]) -> int:
    """The last sequence that a former feeder got. ``info`` is JetStream's description of the consumer."""
    noted = (info["config"].get("metadata") or {}).get(_SUSPECTS, "0")
    return max(int(info["delivered"]["stream_seq"]), int(noted) if noted.isdecimal() else 0)


def _seconds(made: str) -> float:
    """A time of JetStream in seconds since the epoch."""
    return datetime.datetime.fromisoformat(made).timestamp()
