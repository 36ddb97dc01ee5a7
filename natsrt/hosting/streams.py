"""The streams that the handlers of this worker send. `natsrt.sending.message_stream` reads them.

A question of a handler is a part like others. Its answer comes by itself, and may come several times.

Rules:

1. A part is kept until the caller has it and all before it, also when the handler has ended: `PartsSent`. What cannot
   be sent now is sent when the caller asks for it.
2. A caller tells at least twice a second how far it is, once it has a part. As long as it has said nothing, the first
   part is sent again and again: it may be lost with all that there was room for, and the caller learns from it where to
   ask. A part that waits to be sent again is sent once, however often it is asked for. Nothing is sent to a caller that
   is too far behind; to one that is silent for ``stream_idle_timeout`` seconds, or that says so, nothing is sent any
   more.
3. The handler of a stream that is abandoned is stopped: see `natsrt.hosting.stopping`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterable
from itertools import repeat
from typing import Any, Final, NamedTuple

from autogen_core import MessageContext

from natsrt.agents.chain import chain_attribute, current_chain
from natsrt.agents.inbound import Answer, Inbound, LoggedCall
from natsrt.agents.streaming import NO_ANSWERS, emits_to
from natsrt.background import BackgroundTasks
from natsrt.errors import CannotDecode, NatsrtError, NobodyToAsk, StreamAbandoned
from natsrt.hosting.answers import Answers
from natsrt.hosting.plain_streams import PlainStream
from natsrt.hosting.reply_subjects import ReplySubjects
from natsrt.hosting.stopping import Stopping
from natsrt.options import Options
from natsrt.sending.replies import Replies
from natsrt.transport.bodies import Bodies
from natsrt.transport.cancellation import Cancellations
from natsrt.transport.connection import Connection
from natsrt.transport.probe import Probe
from natsrt.transport.stall_watch import StallWatch
from natsrt.wire.envelope import Envelope
from natsrt.wire.failures import ErrorTypes
from natsrt.wire.part_flow import PartsSent, Progress
from natsrt.wire.part_messages import ONLY_QUESTIONS, Awaited, read_awaited, read_progress, read_window
from natsrt.wire.serialization import Encoded, Serialization
from natsrt.wire.wanted_type import WantedType

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_LOOK_EVERY: Final = 0.5
"""Seconds between two looks for callers that are silent, and for streams that need not be kept."""
_LATE: Final = 0.4
"""Seconds, beside the round trip, after which a part that the caller does not have is taken for lost."""
_STALL: Final = 1.0
"""Seconds for which the event loop must stand still before what callers have said meanwhile is waited for."""
_FRESH: Final = 0.75
"""Seconds for which it counts what callers say about the calls that their answers wait for. A caller says it every
0.5 s, and what it says may be 0.1 s old. Two rounds of `natsrt.keyed.deadlocks` are 1 s apart, so both see what was
true between them, if a message takes no more than 0.15 s."""
_UNHEARD: Final = 1.0
"""Seconds, beside the round trip, after which a caller that has said nothing is sent the first part again."""


class _Question(NamedTuple):
    """A question that is not answered."""

    answer: asyncio.Future[Envelope]
    asking: asyncio.Task[Any] | None
    """The task that waits for the answer."""


class StreamOut:
    """What one handler sends to a caller that streams its call. An `Emitter`."""

    def __init__(self, streams: Streams, inbound: Inbound, body: Envelope, parts_to: str) -> None:
        self.stopping: Stopping = Stopping(inbound)
        self._streams = streams
        self._inbound = inbound
        self._body = body
        self.parts_to: str = parts_to
        self.flow: PartsSent = PartsSent(read_window(body))
        self.wants_items: bool = body.text("questions") != ONLY_QUESTIONS
        self._answers_questions = body.text("questions") is not None
        self._questions: dict[str, _Question] = {}
        """The questions that are not answered, by their numbers."""
        self._awaited: Awaited = {}
        """The calls that the answers wait for, as the caller has said last."""
        self._asked = 0
        self.all_emitted: bool = False
        self.heard_at: float = asyncio.get_running_loop().time()
        """When its caller said something last, by the event loop's clock; before that: when the stream began."""
        self.is_heard: bool = False
        """True if its caller has said something."""
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()
        self._again: dict[int, None] = {}
        """The numbers of the parts that wait to be sent again, in their order."""
        self._is_sending_again = False

    async def put(self, item: Any) -> None:
        """Part of `Emitter`."""
        await self._put(self._streams.serialization.encode(item))

    async def _put(self, encoded: Encoded, more: str = "") -> None:
        async with self._turn:
            while self.stopping.may_send and not self.flow.has_room:
                self._room.clear()
                await self._room.wait()
            self.stopping.require_caller()
            key = self._inbound.key
            assert key is not None
            answers, number = self._streams.answers, self.flow.sent + 1
            part = answers.part(encoded, number, self._body, self._inbound.agent_type, key, more)
            if not isinstance(part, Answer):
                part = await part
                self.stopping.require_caller()  # the handler may have ended, and have said how many parts there are
            body = part.body
            now = asyncio.get_running_loop().time()
            if not self.flow.sent:
                self.heard_at = now  # it cannot have said anything before
            self.flow.add(body, len(encoded.payload), now)
            await self._streams.publish(self.parts_to, body)

    async def ask(self, question: Any, reply_type: type[Any] | None) -> Any:
        """Part of `Emitter`."""
        if not self._answers_questions:
            raise NobodyToAsk(str(self.stopping), NO_ANSWERS)
        self.stopping.require_caller()
        wanted = None if reply_type is None else WantedType(reply_type)
        self._asked += 1
        number = str(self._asked)
        answer: asyncio.Future[Envelope] = asyncio.get_running_loop().create_future()
        self._questions[number] = _Question(answer, asyncio.current_task())
        try:
            encoded = self._streams.serialization.encode(question)
            await self._put(encoded, f',"question":"{number}"{chain_attribute(current_chain.get())}')
            body = await answer
        except asyncio.CancelledError:
            self._streams.spawn(self._withdraw(number))
            raise
        finally:
            del self._questions[number]
        return await self._streams.read_answer(body, str(self.stopping), type(question), wanted)

    async def _withdraw(self, number: str) -> None:
        """Tell the caller that nobody waits for its answer to a question."""
        with contextlib.suppress(StreamAbandoned):
            await self._put(self._streams.serialization.encode(None), f',"withdrawn":"{number}"')

    def answered(self, number: str, body: Envelope) -> bool:
        """Take in the answer to a question. Returns False if nobody waits for it."""
        question = self._questions.get(number)
        if question is None or question.answer.done():
            return False
        question.answer.set_result(body)
        return True

    def _fail_questions(self) -> None:
        for answer, _ in self._questions.values():
            if not answer.done():
                answer.set_exception(StreamAbandoned(str(self.stopping)))
                answer.exception()  # who asks may still wait for room

    def end(self) -> None:
        """Part of `Stream`."""
        self.stopping.end()
        self._room.set()
        self._fail_questions()

    @property
    def attributes(self) -> str:
        """Part of `Stream`."""
        return f',"parts":"{self.flow.sent}"' + (',"ended":"1"' if self.all_emitted else "")

    @property
    def headers(self) -> dict[str, str]:
        """Part of `Stream`. There are none: the attributes say all."""
        return {}

    def reported(self, error: BaseException) -> BaseException:
        """Part of `Stream`."""
        return self.stopping.reported(error)

    def awaited(self) -> Iterable[tuple[str, asyncio.Task[Any]]]:
        """Part of `Stream`."""
        if asyncio.get_running_loop().time() > self.heard_at + _FRESH:
            return
        for number, calls in self._awaited.items():
            question = self._questions.get(number)
            if question is not None and question.asking is not None:
                yield from zip(calls, repeat(question.asking), strict=False)

    def told(self, data: dict[str, Any]) -> None:
        """Take in what the caller says. Called in the read loop. Raises `CannotDecode`."""
        progress, stop = read_progress(data)
        self._awaited = read_awaited(data)
        now = asyncio.get_running_loop().time()
        self.heard_at, self.is_heard = now, True
        self._queue_again(self.flow.told(progress, now, _LATE + self._streams.rtt_allowance))
        if stop:
            self.abandon()
        elif self.flow.has_room:
            self._room.set()

    def send_first_again(self) -> None:
        """Send the first part again, as if the caller had asked for it."""
        now = asyncio.get_running_loop().time()
        self._queue_again(self.flow.told(Progress(missing=(1, 1)), now, 0.0))

    def send_again(self) -> None:
        """Send all parts again that the caller may not have."""
        self._queue_again(self.flow.lost(asyncio.get_running_loop().time()))

    def _queue_again(self, numbers: Iterable[int]) -> None:
        self._again |= dict.fromkeys(numbers)
        if self._again and not self._is_sending_again:
            self._is_sending_again = True
            self._streams.spawn(self._send_again())

    async def _send_again(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._again:
                number = next(iter(self._again))
                del self._again[number]
                body = self.flow.sent_again(number, loop.time())
                if body is not None:
                    await self._streams.publish(self.parts_to, body)
        finally:
            self._is_sending_again = False

    def abandon(self) -> None:
        """Its caller is gone: stop the handler if the caller wanted items. If it did not, the handler goes on, as in
        ordinary calls, but has nobody to ask. Nothing is sent again. Has no other effect if the handler has ended, or
        is being stopped.
        """
        self._again.clear()
        if self.stopping.abandon(stops=self.wants_items):
            self._room.set()
            self._fail_questions()


class Streams:
    """The streams of one worker, by the subjects of their parts."""

    def __init__(
        self,
        connection: Connection,
        serialization: Serialization,
        error_types: ErrorTypes,
        bodies: Bodies,
        answers: Answers,
        cancellations: Cancellations,
        reply_subjects: ReplySubjects,
        probe: Probe,
        options: Options,
    ) -> None:
        self._bodies = bodies
        self._reply_subjects = reply_subjects
        self._probe = probe
        self._plain: set[PlainStream] = set()
        self._replies = Replies(bodies, serialization, error_types)
        self._error_types = error_types
        self._connection = connection
        self._cancellations = cancellations
        self.serialization: Serialization = serialization
        self.answers: Answers = answers
        self._idle_timeout = options.stream_idle_timeout
        self._kept_for = options.keep_replies
        self._streams: dict[str, StreamOut] = {}
        self._tasks = BackgroundTasks(logger, "parts of a stream could not be sent again")
        self._looking: asyncio.TimerHandle | None = None
        self._hears_since = 0.0
        """Since when what callers say is heard at once: then, the connection was made or the event loop was blocked."""
        self._stall_watch = StallWatch(_STALL, self._hears_again)
        connection.add_listener(self)

    @property
    def rtt_allowance(self) -> float:
        """Seconds that a round trip may take, as far as that is known."""
        return self._connection.rtt.allowance

    def connection_lost(self) -> None:
        """Part of `Listener`."""

    def connection_made(self) -> None:
        """Part of `Listener`. What was sent on the former connection may be lost.

        A caller that was taken for gone asks by itself, if it is there.
        """
        self._hears_again()
        for stream in self._streams.values():
            if not stream.stopping.is_abandoned:
                stream.send_again()

    def _hears_again(self) -> None:
        self._hears_since = asyncio.get_running_loop().time()

    def open(self, inbound: Inbound, context: MessageContext) -> StreamOut:
        """Let the present handler, which is about to handle ``inbound``, send parts. It gets a token of its own.

        Raises `CannotDecode`.
        """
        body = inbound.body
        assert body is not None and inbound.call is not None
        stream = StreamOut(self, inbound, body, body.required("partsto"))
        self._streams[stream.parts_to] = stream
        self._begin(stream, inbound.call, context)
        return stream

    def open_plain(self, inbound: Inbound, context: MessageContext) -> PlainStream:
        """Let the present handler, which is about to handle ``inbound``, send several replies to a plain client.

        Raises `CannotDecode`.
        """
        assert inbound.call is not None
        items_to = self._reply_subjects.plain_stream_of(inbound)
        stream = PlainStream(inbound, items_to, self._connection, self._bodies, self.serialization)
        self._plain.add(stream)
        self._begin(stream, inbound.call, context)
        return stream

    def _begin(self, stream: StreamOut | PlainStream, call: LoggedCall, context: MessageContext) -> None:
        stream.stopping.follow(context, self._cancellations)
        call.on_abandoned = stream.abandon
        emits_to.set(stream)
        if self._looking is None:
            self._stall_watch.start()
            self._looking = asyncio.get_running_loop().call_later(_LOOK_EVERY, self._look)

    def told(self, data: dict[str, Any]) -> None:
        """Take in how far a caller is. Raises `CannotDecode`."""
        parts_to = data.get("stream")
        if not isinstance(parts_to, str):
            raise CannotDecode("the progress of a stream", "stream must be a text")
        if (stream := self._streams.get(parts_to)) is not None:
            stream.told(data)

    def answered(self, body: Envelope) -> None:
        """Take in the answer to a question. Raises `CannotDecode`."""
        stream, number = self._streams.get(body.required("partsto")), body.required("question")
        is_late = stream is None or not stream.answered(number, body)
        if is_late and body.reference is not None:
            self._bodies.discard(body.reference)

    async def read_answer(self, body: Envelope, agent: str, asked: type[Any], wanted: WantedType | None) -> Any:
        """Return the answer in ``body`` to a question of ``agent``. Raises as `natsrt.ask` does.

        ``asked`` is the class of the question, and ``wanted`` the type of the answer; None: the answer names its class.
        """
        if body.reference is not None:
            await self._replies.load(body, body.reference)
        caller = f"the caller of {agent}"
        if body.text("failed") is None:
            reply_type = None if wanted is None else wanted.cls
            answer = self._replies.message(body, asked, reply_type, caller)
            if wanted is None:
                return answer
            return wanted.of(answer, body.payload, self.serialization, f"the answer of {caller}")
        error = self._error_types.rebuild(body.payload, agent=caller, worker_id=None)
        if isinstance(error, asyncio.CancelledError):  # the handler is not cancelled
            raise NobodyToAsk(agent, "the answer was cancelled")
        raise error

    async def publish(self, subject: str, body: bytes) -> None:
        """Send a part. If that is not possible now, its caller asks for it later."""
        try:
            await self._connection.publish(subject, body)
        except NatsrtError as error:
            logger.debug("a part of a stream is sent later: %s", error)

    def spawn(self, sending: Coroutine[Any, Any, None]) -> None:
        """Send something in the background."""
        self._tasks.spawn(sending)

    def _look(self) -> None:
        self._stall_watch.look()
        now = asyncio.get_running_loop().time()
        for stream in list(self._streams.values()):
            since = max(stream.heard_at, self._hears_since)
            is_silent = now - since > self._idle_timeout and self._connection.connected and stream.flow.sent > 0
            stopping = stream.stopping
            if stopping.ended_at is not None:
                is_late = now - stopping.ended_at > self._kept_for
                if stream.flow.is_received or stopping.is_abandoned or is_silent or is_late:
                    del self._streams[stream.parts_to]
            elif stopping.is_abandoned:
                continue
            elif is_silent:
                logger.warning("the caller that streams from %s is silent: its handler is stopped", stopping)
                stream.abandon()
            elif not stream.is_heard and stream.flow.sent and now - since > _UNHEARD + self.rtt_allowance:
                stream.send_first_again()
        for plain in list(self._plain):
            if plain.stopping.ended_at is not None:
                self._plain.discard(plain)
            elif plain.is_due(now):
                self._tasks.spawn(plain.look(self._probe))
        if self._streams or self._plain:
            self._looking = asyncio.get_running_loop().call_later(_LOOK_EVERY, self._look)
        else:
            self._looking = None
            self._stall_watch.stop()

    async def stop(self) -> None:
        """Forget all streams. Harmless if stopped."""
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
            self._stall_watch.stop()
        for stream in self._streams.values():
            stream.end()
        for plain in self._plain:
            plain.end()
        self._streams.clear()
        self._plain.clear()
        await self._tasks.cancel()
