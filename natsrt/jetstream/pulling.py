"""One durable consumer of one stream, from which messages are pulled as long as it runs.

Rules:

1. Messages are passed to the receiver in the client's read loop, in the order in which the server delivers them.
2. A pull always waits at the server while the receiver has room: see `natsrt.jetstream.pull_plan`.
3. Silence decides. A server that hangs, and a deleted consumer beside a subscription to ``>``, give no status. So where
   two heartbeats are missing, and after each reconnect, the consumer is looked at, and a new generation of pulls
   begins.
4. Each generation has a reply subject of its own. What an old one still brings is passed on, until its pulls have
   expired: unsubscribing does not end a pull beside a subscription to ``>``, and what it brings then would be delivered
   again only after ``ack_wait``.
5. A consumer that is gone is made again, from the last acknowledgement floor that was seen: what was acknowledged after
   that look is delivered again. If the stream itself was made again, from its beginning.
6. An acknowledgement is published without waiting. One that is lost, or late, has the message delivered again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

import nats.errors
import orjson
from nats.aio.msg import Msg
from nats.nuid import NUID

from natsrt.background import BackgroundTasks, end_tasks
from natsrt.errors import CannotDecode, NatsrtError, PermissionDenied, ServerUnreachable, StreamUnavailable
from natsrt.jetstream.consumers import START_ALL, ConsumerConfig, Consumers, Start
from natsrt.jetstream.delivery import ACK_PREFIX, Delivery
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.pull_plan import PullPlan, Verdict
from natsrt.transport.connection import Connection, Interest, Refusal
from natsrt.wire.times import known_delay

logger: logging.Logger = logging.getLogger("natsrt.jetstream")

BATCH: Final = 256
"""Messages that the open pulls may bring together."""
EXPIRES: Final = 30.0
"""Seconds after which the server ends a pull."""
HEARTBEAT: Final = 5.0
"""Seconds between two heartbeats of the server while a pull is open."""
MAX_BYTES: Final = 4 * 1024 * 1024
"""Bytes that one pull may bring. Two to three are open at a time."""

_SECOND: Final = 1_000_000_000
_START_WITHIN: Final = 10.0
"""Seconds within which the consumer must be made at the start."""
_AGAIN: Final = 1.0
"""Seconds between two attempts to make or to read the consumer."""
_AGAIN_REFUSED: Final = 10.0
"""The same after a refusal that only a change of the server's configuration ends."""
_NEXT_WITHIN: Final = 0.25
"""Seconds within which the next message comes while a pull is open and the consumer has one."""
_END_WITHIN: Final = 2.0
"""Seconds, beside the round trip, for which the end of a subscription waits for what the server sent before."""
_LOOK_EVERY: Final = 30.0
"""Seconds between two looks at the acknowledgement floor while messages come."""
_FINISHES: Final = 0.5
"""Seconds that another client, which is just making the consumer, has for finishing that."""
_WRONG_PIN: Final = "423"
_MOST_OLD: Final = 4
"""Old generations that are kept subscribed."""
_ACK: Final = b"+ACK"
_SETTLED_WITHIN: Final = 2.0
"""Seconds within which the server has taken in acknowledgements, beside the round trip."""
_LONGEST_REASON: Final = 1_000
"""Characters of a reason with which a message is terminated."""


class Room(NamedTuple):
    """What a receiver takes at present: so many ``messages``, which the open pulls may bring together, and so many
    ``bytes`` with the next pull."""

    messages: int
    bytes: int


_NO_LIMIT: Final = Room(1 << 40, 1 << 40)


class Acknowledged(Protocol):
    """A delivery, or as much of one as is kept. ``reply`` is the subject on which it is acknowledged."""

    @property
    def reply(self) -> str: ...


class _Generation:
    """The pulls with one reply subject. ``over``: what comes is passed on, but not counted any more."""

    __slots__ = ("inbox", "interest", "number", "over", "until")

    def __init__(self, number: int, inbox: str, *, over: bool = False) -> None:
        self.number = number
        self.inbox = inbox
        self.interest: Interest | None = None
        self.over = over
        self.until = 0.0
        """When its pulls have expired at the latest, by the event loop's clock."""


class Pull:
    """Pulls the messages of one consumer. A connection `Listener` from `start` to `stop`.

    ``on_message(delivery)`` receives each delivery in the client's read loop: it must be cheap, must not block, and may
    raise only `CannotDecode`. No other function that is given here may raise. ``room()`` says how much the receiver
    takes at present; it is asked before every pull, after every acknowledgement while the receiver is full, and after a
    heartbeat at the latest. None: no limit. A message that is larger than that many bytes, or than ``max_bytes``, is
    pulled alone. ``start`` is where the consumer begins if it does not exist. ``inbox_prefix``: below it are the reply
    subjects of the pulls. ``extra``: further fields of each pull's request, such as a priority group; may be changed at
    any time. Its ``id``, of a pinned client, is dropped when the server says that another client is pinned.

    ``on_trouble(error)`` is told when messages cannot be pulled, and why, and with None when they can again.
    """

    def __init__(
        self,
        connection: Connection,
        domain: Domain,
        stream: str,
        config: ConsumerConfig,
        on_message: Callable[[Delivery], None],
        *,
        inbox_prefix: str,
        start: Start = START_ALL,
        room: Callable[[], Room] | None = None,
        on_trouble: Callable[[NatsrtError | None], None] | None = None,
        batch: int = BATCH,
        max_bytes: int = MAX_BYTES,
        expires: float = EXPIRES,
        heartbeat: float = HEARTBEAT,
    ) -> None:
        self._connection = connection
        self._domain = domain
        self._stream = stream
        self._config = config
        self._on_message = on_message
        self._start = start
        self._room = room
        self._on_trouble = on_trouble
        self._expires = expires
        self._heartbeat = heartbeat
        self._request = {"expires": int(expires * _SECOND), "idle_heartbeat": int(heartbeat * _SECOND)}
        self.extra: dict[str, Any] = {}
        self._inbox = f"{inbox_prefix}.{NUID().next().decode()}"
        self._next = domain.api(f"CONSUMER.MSG.NEXT.{stream}.{config.name}")
        requests = (f"{domain.api(kind)}.{stream}." for kind in ("CONSUMER.CREATE", "CONSUMER.INFO", "CONSUMER.RESET"))
        self._needed = (
            *(f"{start}{config.name}".lower() for start in requests),
            domain.api(f"CONSUMER.PAUSE.{stream}.{config.name}").lower(),
            domain.api(f"STREAM.INFO.{stream}").lower(),
            domain.api(f"STREAM.MSG.GET.{stream}").lower(),
            self._next.lower(),
            self._inbox.lower(),
        )
        self._acked = f".{stream}.{config.name}.".lower()
        self._consumers = Consumers(connection, domain, stream)
        self._plan = PullPlan(batch, max_bytes)
        self._listening: asyncio.TimerHandle | None = None
        """The next look for a pull that ended without a status; None if there is no reason for one."""
        self._generation = _Generation(0, "", over=True)
        self._closed = 0
        """The number of the last generation whose messages are dropped."""
        self._tasks = BackgroundTasks(logger, f"ending a pull from the stream {stream} failed")
        self._task: asyncio.Task[None] | None = None
        self._paused = False
        self._last_settled = ""
        """The subject of the last acknowledgement that was sent; empty: none was, or the server has taken it in."""
        self._late: deque[Delivery] = deque()
        """What came while paused."""
        self._last: Delivery | None = None
        self._fence: int | None = None
        """The last number that the consumer gave to a delivery before it was reset; None if that is over."""
        self._fenced = 0
        """The last generation whose pulls were open at that moment."""
        self._old: deque[_Generation] = deque()
        """Generations whose pulls may still be open."""
        self._changing = asyncio.Lock()
        self._wake = asyncio.Event()
        self._verdict = Verdict.GO_ON
        self._said = ""
        """The last status that refused a pull, as the server has it."""
        self._refusal: Refusal | None = None
        self._made: tuple[str, str] | None = None
        """When the stream and the consumer were made that were last seen, as the server has it."""
        self._floor = 0
        self._looked_at = 0.0
        self._received_then = 0
        self.trouble: NatsrtError | None = None
        """Why messages cannot be pulled at present; None if they can."""

    # -- the life of a pull ----------------------------------------------------------------------------------------

    async def start(self, within: float = _START_WITHIN) -> None:
        """Make the consumer if it does not exist, and begin to pull.

        Raises `StreamUnavailable` if that is not possible within ``within`` seconds, at once if the cause does not pass
        by itself. Raises `PermissionDenied`, `JetStreamRequired` and `ServerUnreachable` at once.
        """
        self._connection.add_listener(self)
        self._connection.on_denied(self._on_denied)
        try:
            until = asyncio.get_running_loop().time() + within
            while True:
                try:
                    await self._ensure()
                    break
                except StreamUnavailable as error:
                    if not error.passing or asyncio.get_running_loop().time() + _AGAIN > until:
                        raise
                await asyncio.sleep(_AGAIN)
        except BaseException:
            self._leave()
            raise
        self._task = asyncio.create_task(self._run(), name=f"natsrt pull {self._stream} {self._config.name}")

    async def stop(self) -> None:
        """Pull no more. After it has returned, no message comes any more. Has no effect if stopped.

        Messages that the server sent before are passed on, unless it does not answer; if paused, they are given back.
        Acknowledgements can still be sent afterwards.
        """
        if self._task is None:
            return
        task, self._task = self._task, None
        if self._listening is not None:
            self._listening.cancel()
        await end_tasks(task)
        await self._end_all()
        while self._late:
            self.retry(self._late.popleft(), 0.0)
        await self._tasks.cancel()
        self._leave()

    def _leave(self) -> None:
        self._connection.remove_listener(self)
        self._connection.off_denied(self._on_denied)

    def pause(self) -> None:
        """Pull no more, and pass nothing on, until `go_on`. What open pulls still bring is kept."""
        self._paused = True

    def go_on(self) -> None:
        """Pass on what was kept, and pull again. Has no effect if not paused."""
        self._paused = False
        while self._late and not self._paused:
            try:
                self._on_message(self._late.popleft())
            except CannotDecode as error:
                self._connection.unreadable(error)
        if self._plan.hungry:
            self._ask()

    async def reset(self, start: Start) -> None:
        """Have everything from ``start`` on delivered again, with attempts counted from 1, and nothing before it.

        Nothing that was delivered before the reset is passed on after it was called. Stays paused if paused. Raises as
        `start`.
        """
        was_paused = self._paused
        self.pause()
        try:
            async with self._changing:
                first = await self._consumers.first_sequence(start)
                fence = None if self._last is None else self._last.consumer_sequence
                before, self._late = self._late, deque()
                try:
                    await self._consumers.reset(self._config.name, first)
                except BaseException:
                    self._late.extendleft(reversed(before))
                    raise
                self._fence, self._fenced = fence, self._generation.number
                self._late = deque(delivery for delivery in self._late if self._is_after_reset(delivery))
                self._end(Verdict.RENEW)
            await self._ensure()
        finally:
            if not was_paused:
                self.go_on()

    def _is_after_reset(self, delivery: Delivery) -> bool:
        """False for what was delivered before the last reset, after which the consumer counts from 1 again."""
        if self._fence is None:
            return True
        if delivery.consumer_sequence > self._fence:
            self._fence = delivery.consumer_sequence
            return False
        self._fence = None
        return True

    async def configure(self, config: ConsumerConfig) -> None:
        """Change the consumer, whose name stays.

        A filter that is added does not bring what the stream stored before the last message that the consumer has
        delivered: `reset` does. Raises as `start`.
        """
        self._config = config
        await self._ensure()

    async def _run(self) -> None:
        while True:
            try:
                await self._generate()
            except NatsrtError as error:
                self._verdict = Verdict.CHECK
                self._tell(error)
                await self._rest(_AGAIN_REFUSED if isinstance(error, PermissionDenied) else _AGAIN)
            except Exception:
                logger.exception("pulling from the stream %s failed", self._stream)
                self._verdict = Verdict.CHECK
                await self._rest(_AGAIN)

    async def _generate(self) -> None:
        """Pull for one generation, after what has to be done before it."""
        self._retire()
        if not self._connection.connected:
            await self._rest(self._heartbeat)
            return
        if self._verdict is Verdict.CHECK:
            await self._ensure()
        self._verdict = Verdict.GO_ON
        if delay := self._plan.begin():
            if self._said and self._plan.in_vain > 1:
                reason = f"the server says {self._said!r}"
                self._tell(StreamUnavailable("pull from", self._stream, reason, passing=True))
            await self._rest(delay)
            if not self._connection.connected:
                return
        number = self._generation.number + 1
        self._generation = generation = _Generation(number, f"{self._inbox}.{number:x}")
        self._refusal = None
        generation.interest = await self._connection.subscribe(generation.inbox, partial(self._take, generation))
        self._ask()
        while not generation.over:
            if await self._rest(self._heartbeat):
                await self._tick()
        if self._refusal is not None:
            refusal, self._refusal = self._refusal, None
            raise refusal

    async def _tick(self) -> None:
        """What is looked after once in the time between two heartbeats."""
        if self._plan.tick():
            logger.debug("two heartbeats of a pull from the stream %s are missing", self._stream)
            self._end(Verdict.CHECK)
            return
        while self._old and self._old[0].until < asyncio.get_running_loop().time():
            self._unsubscribe(self._old.popleft())
        if self._plan.brought:
            self._said = ""
            if self.trouble is not None:
                self._tell(None)
        self._ask()
        looked = asyncio.get_running_loop().time() - self._looked_at
        if looked > _LOOK_EVERY and self._plan.received != self._received_then:
            try:
                info = await self._consumers.info(self._config.name)
            except NatsrtError as error:
                logger.debug("%s", error)
                return
            if info is None:
                self._end(Verdict.CHECK)
            else:
                self._note(info)

    async def _rest(self, seconds: float | None) -> bool:
        """Wait until something changes, at most so long; None: without a limit. Returns True if nothing has changed."""
        self._wake.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return True
        return False

    def _retire(self) -> None:
        """The present generation is old from now on."""
        generation = self._generation
        generation.over = True
        if generation.interest is not None and generation not in self._old:
            generation.until = asyncio.get_running_loop().time() + self._expires + self._connection.rtt.allowance
            self._old.append(generation)
        while len(self._old) > _MOST_OLD:
            self._unsubscribe(self._old.popleft())

    def _unsubscribe(self, generation: _Generation) -> None:
        if generation.interest is not None:
            self._tasks.spawn(self._connection.unsubscribe(generation.interest))

    async def _end_all(self) -> None:
        """End all generations, and drop what comes afterwards."""
        self._retire()
        while self._old:
            self._unsubscribe(self._old.popleft())
        await self._tasks.wait(_END_WITHIN + self._connection.rtt.allowance)
        self._closed = self._generation.number

    def _tell(self, trouble: NatsrtError | None) -> None:
        """Report why messages cannot be pulled, once for each reason."""
        before, self.trouble = self.trouble, trouble
        if trouble is None:
            logger.info("messages are pulled from the stream %s again", self._stream)
        elif str(before) != str(trouble):
            logger.warning("%s; it is tried again", trouble)
        else:
            return
        if self._on_trouble is not None:
            self._on_trouble(trouble)

    # -- the consumer ----------------------------------------------------------------------------------------------

    async def _ensure(self) -> None:
        """Make the consumer if it is missing, and change it if it is configured otherwise."""
        async with self._changing:
            await self._ensure_it()

    async def _ensure_it(self) -> None:
        consumers, config = self._consumers, self._config
        answer = await consumers.info(config.name)
        if answer is not None and consumers.is_under_way(answer):
            await asyncio.sleep(_FINISHES)
            answer = await consumers.info(config.name)
        if answer is None:
            answer = await self._make()
        else:
            answer = await consumers.finish(answer)
        if config.differs(answer):
            logger.info("the consumer %s of the stream %s is configured anew", config.name, self._stream)
            answer = await consumers.update(config, answer)
        created = str(answer["created"])
        if self._made is None or self._made[1] != created:
            self._made = (await consumers.state())[0], created
        self._note(answer)

    async def _make(self) -> dict[str, Any]:
        """Make the consumer: where it begins for the first time, or where the one before it was."""
        consumers, name = self._consumers, self._config.name
        if self._made is None:
            return await consumers.make(self._config, await consumers.first_sequence(self._start))
        created, last = await consumers.state()
        first = 1 if created != self._made[0] else min(self._floor, last) + 1
        logger.warning(
            "the consumer %s of the stream %s was deleted%s: it is made again from sequence %d",
            name,
            self._stream,
            "" if created == self._made[0] else " with the stream",
            first,
        )
        return await consumers.make(self._config, first)

    def _note(self, answer: dict[str, Any]) -> None:
        """Keep up to where the consumer's messages are acknowledged. ``answer`` is its description."""
        self._floor = int(answer["ack_floor"]["stream_seq"])
        self._looked_at = asyncio.get_running_loop().time()
        self._received_then = self._plan.received

    # -- connection listener ---------------------------------------------------------------------------------------

    def connection_lost(self) -> None:
        pass

    def connection_made(self) -> None:
        self._end(Verdict.CHECK)

    # -- settling --------------------------------------------------------------------------------------------------

    def ack(self, delivery: Acknowledged) -> None:
        """The message is handled: it is not delivered again."""
        self._settle(delivery, _ACK)

    def retry(self, delivery: Acknowledged, delay: float) -> None:
        """Have the message delivered again after ``delay`` seconds, at `times.LAST` at the latest. Until then it counts
        as not acknowledged."""
        self._settle(delivery, b'-NAK {"delay": %d}' % max(1, int(known_delay(delay) * _SECOND)))

    def terminate(self, delivery: Acknowledged, reason: str) -> None:
        """Never deliver the message again. ``reason`` is in the advisory that the server publishes."""
        self._settle(delivery, b"+TERM " + " ".join(reason.split())[:_LONGEST_REASON].encode())

    def working(self, deliveries: Iterable[Acknowledged]) -> None:
        """The messages are still being handled: each has another ``ack_wait`` from now on."""
        for delivery in deliveries:
            self._post(delivery.reply, b"+WPI")

    async def settlements_arrived(self) -> None:
        """Wait until the server has taken in all acknowledgements that were sent, for some seconds at most.

        It answers an acknowledgement when it has taken in those before it. To acknowledge a message twice does no harm.
        """
        reply, self._last_settled = self._last_settled, ""
        if not reply:
            return
        try:
            timeout = _SETTLED_WITHIN + self._connection.rtt.allowance
            await self._connection.client.request(reply, _ACK, timeout=timeout)
        except (nats.errors.Error, NatsrtError, OSError, TimeoutError) as error:
            logger.debug("acknowledgements of %s may still be on their way: %s", self._config.name, error)

    def _settle(self, delivery: Acknowledged, payload: bytes) -> None:
        if payload == _ACK:
            self._last_settled = delivery.reply
        self._post(delivery.reply, payload)
        if self._plan.hungry:  # the receiver was full, and may have room now
            self._ask()

    def _post(self, subject: str, payload: bytes, reply: str = "") -> None:
        try:
            if self._connection.client.post(subject, payload, reply):
                return
        except ServerUnreachable:  # a new client is being connected
            pass
        self._tasks.spawn(self._publish(subject, payload, reply))

    async def _publish(self, subject: str, payload: bytes, reply: str) -> None:
        try:
            await self._connection.publish(subject, payload, reply=reply)
        except NatsrtError as error:  # the message is delivered again, or another pull is sent
            logger.debug("%r was not sent on %s: %s", payload[:4], subject, error)

    # -- in the client's read loop ---------------------------------------------------------------------------------

    def _take(self, generation: _Generation, message: Msg) -> None:
        if message.reply:
            if generation.number <= self._closed:
                return
            delivery = Delivery(message)
            if not generation.over:
                self._plan.message(len(message.data) + len(message.subject) + len(message.reply))
                if self._plan.tight and delivery.pending and self._listening is None:
                    self._listen()
            if generation.number <= self._fenced and not self._is_after_reset(delivery):
                return
            self._last = delivery
            try:
                if self._paused:
                    self._late.append(delivery)
                else:
                    self._on_message(delivery)
            finally:
                if self._plan.hungry:
                    self._ask()
        elif not generation.over:
            self._take_status(message.headers or {})

    def _listen(self) -> None:
        """Look in a moment whether the server has ended the last pull without a status."""
        received, loop = self._plan.received, asyncio.get_running_loop()
        self._listening = loop.call_later(_NEXT_WITHIN, self._look_for_end, received)

    def _look_for_end(self, received: int) -> None:
        self._listening = None
        if self._plan.received != received:
            if self._plan.tight:
                self._listen()
        elif self._plan.missed_end():
            self._ask()

    def _take_status(self, headers: dict[str, str]) -> None:
        code, pending = headers.get("Status", ""), headers.get("Nats-Pending-Messages", "")
        text = headers.get("Description", "").strip()
        verdict = self._plan.status(code, text, int(pending) if pending.isdecimal() else None)
        if code == _WRONG_PIN:
            self.extra.pop("id", None)
        if verdict is not Verdict.GO_ON:
            if verdict is Verdict.CHECK:
                self._said = text if code == "409" else f"{code} {text}".splitlines()[0].strip()
            self._end(verdict)
        elif self._plan.hungry:
            self._ask()

    def _end(self, verdict: Verdict) -> None:
        """The present generation is over, because of ``verdict``."""
        self._generation.over = True
        if self._verdict is not Verdict.CHECK:
            self._verdict = verdict
        self._wake.set()

    def _ask(self) -> None:
        """Send the pull that is due, if the receiver has room."""
        generation = self._generation
        if generation.over or self._paused:
            return
        room = _NO_LIMIT if self._room is None else self._room()
        ask = self._plan.ask(room.messages, room.bytes)
        if ask is None:
            return
        request = {"batch": ask.batch, **self._request, **self.extra}
        if ask.max_bytes is not None:
            request["max_bytes"] = ask.max_bytes
        payload = orjson.dumps(request)
        self._post(self._next, payload, generation.inbox)

    def _on_denied(self, denied: Refusal) -> bool:
        subject = denied.subject.lower()
        acknowledges = subject.startswith(ACK_PREFIX.lower()) and self._acked in subject
        if not acknowledges and not subject.startswith(self._needed):
            return False
        self._consumers.deny(denied)
        self._refusal = denied
        self._end(Verdict.CHECK)
        return True
