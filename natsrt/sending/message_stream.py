"""The items of streamed calls, at their caller. `natsrt.hosting.streams` sends them.

Rules:

1. Parts are given to the consumer in their order, each once; `PartsReceived` says which are missing. The end of the
   call is given after them: its result if that was not a part, and its error.
2. The worker is told how far this is when half of the window was consumed, when parts are missing, and at least twice a
   second. So it knows that its caller lives, however slowly its parts come and are consumed.
3. A call that ends in another way than by its reply, such as with its worker, ends the stream after the parts that had
   arrived in order. One that is cancelled ends it at once. Whenever a stream ends without a reply, the worker is told
   to stop.
4. What a stream needs while nobody iterates over it does not refer to it. So one that is dropped without being closed
   is closed when it is collected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

from autogen_core import AgentId
from nats.aio.msg import Msg

from natsrt.agents.chain import current_handler
from natsrt.agents.interventions import Interventions
from natsrt.background import BackgroundTasks
from natsrt.errors import CannotDecode, NatsrtError, WorkerLost
from natsrt.jetstream.registry.registry import Registry
from natsrt.options import Options
from natsrt.sending.call_sender import Call, CallSender
from natsrt.sending.questions import OnQuestion, QuestionAnswers, Questions, check_on_question
from natsrt.sending.replies import Replies
from natsrt.transport.bodies import Bodies
from natsrt.transport.call_watch import stopped
from natsrt.transport.connection import Connection
from natsrt.transport.inbox import Inbox
from natsrt.transport.stall_watch import StallWatch
from natsrt.wire import envelope
from natsrt.wire.envelope import Envelope
from natsrt.wire.ids import checked_id
from natsrt.wire.part_flow import PartsReceived, Window
from natsrt.wire.part_messages import encode_progress, number_of_part, stream_attributes, total_of

logger: logging.Logger = logging.getLogger("natsrt.calls")

_TELL_EVERY: Final = 0.5
"""Seconds after which the worker is told again how far this is."""
_STALL: Final = 1.0
"""Seconds for which the event loop must stand still before what has arrived meanwhile is waited for."""
_STOP_AGAIN: Final = (0.5, 2.0)
"""Seconds after which a worker that was told to stop is told so again: the first word may be lost."""
_ASKED: Final = 3
"""How many times ``lost_after`` the worker is asked for parts that are missing when the call has ended. Links that are
cut again and again take their time."""


class IncomingStreams:
    """What all streamed calls of one runtime have in common. A connection `Listener`."""

    def __init__(
        self,
        *,
        connection: Connection,
        inbox: Inbox,
        registry: Registry,
        options: Options,
        calls: CallSender,
        questions: QuestionAnswers,
        replies: Replies,
        bodies: Bodies,
        interventions: Interventions,
    ) -> None:
        self.connection: Connection = connection
        self.inbox: Inbox = inbox
        self.registry: Registry = registry
        self.lost_after: float = options.lost_after
        self.offline_timeout: float | None = options.offline_timeout
        self.calls: CallSender = calls
        self.questions: QuestionAnswers = questions
        self.replies: Replies = replies
        self.bodies: Bodies = bodies
        self.interventions: Interventions = interventions
        self.hears_since: float = 0.0
        """Since when what workers send is heard at once, by the event loop's clock: the connection was made, or the
        event loop was blocked, then."""
        self.stall_watch: StallWatch = StallWatch(_STALL, self._hears_again)
        self.lost_at: float = 0.0
        """When the connection was lost last."""
        self._open: set[Receiving] = set()
        self._tasks = BackgroundTasks(logger, "a message to the worker of a stream could not be sent")
        connection.add_listener(self)

    def connection_lost(self) -> None:
        """Part of `Listener`."""
        self.lost_at = asyncio.get_running_loop().time()

    def connection_made(self) -> None:
        """Part of `Listener`."""
        self._hears_again()
        for receiving in self._open:
            receiving.tell(some_lost=True)

    def _hears_again(self) -> None:
        self.hears_since = asyncio.get_running_loop().time()

    def begin(self, receiving: Receiving) -> None:
        """Let the parts of a stream arrive."""
        self.stall_watch.start()
        self._open.add(receiving)
        self.inbox.receivers[receiving.parts_to] = receiving.arrived

    def end(self, receiving: Receiving) -> None:
        """Let no parts of a stream arrive any more. Has no effect if none do."""
        self._open.discard(receiving)
        if not self._open:
            self.stall_watch.stop()
        self.inbox.receivers.pop(receiving.parts_to, None)

    def send(self, worker_id: str, body: bytes) -> None:
        """Send something to a worker, in the background. What is lost is said again."""
        self._tasks.spawn(self._send(self.registry.worker_subject(worker_id), body))

    async def _send(self, subject: str, body: bytes) -> None:
        try:
            await self.connection.publish(subject, body)
        except NatsrtError as error:
            logger.debug("the worker of a stream is told later how far it is: %s", error)

    async def stop(self) -> None:
        """End all streams, and have their handlers stopped. Harmless if stopped."""
        for receiving in list(self._open):
            receiving.failure = receiving.failure or stopped(receiving.recipient)
            receiving.close()
        await self._tasks.wait(1.0)


class Receiving:
    """One streamed call that was begun. It refers to no `MessageStream`."""

    def __init__(
        self,
        streams: IncomingStreams,
        call: Call,
        window: Window,
        on_question: OnQuestion | None,
        wants_items: bool,
    ) -> None:
        self._streams = streams
        self._loop = asyncio.get_running_loop()
        self.parts_to: str = streams.inbox.new_subject("s")
        self.parts: PartsReceived[Envelope] = PartsReceived(window)
        self.recipient: AgentId = call.recipient
        self.failure: NatsrtError | None = None
        """Why the stream ends although its call could go on; None: it does not."""
        self._worker_id: str | None = None
        self._news: asyncio.Future[None] | None = None
        """Done when there is something for the consumer; None if nobody waits."""
        self._answered = False
        """True if the call has its reply."""
        self.all_emitted: bool = False
        """True if the call's result is the last part."""
        self._heard_at = self._loop.time()
        self._told_at = -1.0
        self._questions = (
            None if on_question is None else Questions(streams.questions, call, on_question, self.parts_to)
        )
        call.more = stream_attributes(self.parts_to, window, answers=on_question is not None, wants_items=wants_items)
        call.on_answer = self._on_answer
        streams.begin(self)
        self.call: asyncio.Task[Any] = asyncio.ensure_future(_make(streams.calls, call))
        self.call.add_done_callback(self._on_end)
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(_TELL_EVERY, self._tick)

    # -- what arrives --------------------------------------------------------------------------------------------

    def arrived(self, message: Msg) -> None:
        """Take in a message on the subject of the parts. Called in the read loop. Raises `CannotDecode`."""
        body = envelope.decode(message.data)
        if body is None or body.type != envelope.PART:
            raise CannotDecode("a part of a stream", f"expected {envelope.PART}", message.data)
        number = number_of_part(body)
        self._worker_id = checked_id(body.required("workerid"), "a part of a stream")
        self._heard_at = self._loop.time()
        size = len(body.payload) if body.reference is None else body.reference.size
        if self.parts.receive(number, body, size):
            self._wake()
        if self.parts.is_news:
            self.tell()

    def _on_answer(self, answer: Envelope | None) -> None:
        self._heard_at = self._loop.time()
        if answer is not None:
            if (worker_id := answer.text("workerid")) is not None:
                self._worker_id = checked_id(worker_id, "a reply")
            self.all_emitted = answer.text("ended") is not None
            self.parts.end(total_of(answer))
        else:
            self.parts.end(0)
        self._answered = True

    def _on_end(self, call: asyncio.Task[Any]) -> None:
        if not call.cancelled():
            call.exception()  # the consumer may never ask for it
        self._close_questions()
        if not self._answered:
            self.tell(stop=True)
            self._end()
        elif self.parts.misses_some:
            self.tell()
        self._wake()

    def _wake(self) -> None:
        if self._news is not None:
            _complete(self._news)

    # -- for the consumer ----------------------------------------------------------------------------------------

    @property
    def has_ended(self) -> bool:
        """True if no more parts will arrive. What has arrived may not be consumed yet."""
        return self.call.done() and (not self._answered or self.parts.is_complete)

    @property
    def is_cancelled(self) -> bool:
        """True if the call was cancelled: then what has arrived is not wanted any more."""
        return self.call.cancelled() and self.failure is None

    async def wait(self) -> None:
        """Wait until there is a part, or the stream has ended.

        Raises `WorkerLost` if parts were lost for good, and `ServerUnreachable` if they cannot be asked for.
        """
        news = self._news = self._loop.create_future()
        # It is seen from this callback that its caller awaits the call (`natsrt.awaiting`).
        completes = partial(_complete, news)
        self.call.add_done_callback(completes)
        timer = self._loop.call_later(_TELL_EVERY, completes)
        try:
            await news
        finally:
            timer.cancel()
            self.call.remove_done_callback(completes)
            self._news = None
        if self.call.done() and not self.has_ended:
            self._require_hope()

    def _require_hope(self) -> None:
        """Raise an error if the parts that are missing will not come any more."""
        streams, now = self._streams, self._loop.time()
        if self._timer is None:  # closed by another task, or with its runtime
            if self.failure is not None:
                raise self.failure
            return
        if not streams.connection.connected:
            limit = streams.offline_timeout
            if limit is not None and now > streams.lost_at + limit:
                raise streams.connection.unreachable(limit, "the connection was lost during a stream")
            return
        streams.stall_watch.look()
        since = max(self._heard_at, streams.hears_since)
        if now > since + _ASKED * streams.lost_after + streams.connection.rtt.allowance:
            raise WorkerLost(str(self.recipient), self._worker_id, "parts of its reply are lost")

    def take(self) -> Envelope | None:
        """The next part; None if it was a question, which is being answered now. Raises IndexError if there is none.

        Raises `CannotDecode`.
        """
        body = self.parts.take()
        if self.parts.is_news:
            self.tell()
        if "question" not in body.attributes and "withdrawn" not in body.attributes:
            return body
        if self._questions is None:
            raise CannotDecode("a part of a stream", "it asks a question, but the call answers none", body.payload)
        if not self.call.done():
            self._questions.take(body)
        return None

    def _close_questions(self) -> None:
        if self._questions is not None:
            self._questions.close()

    # -- what the worker is told ---------------------------------------------------------------------------------

    def tell(self, *, stop: bool = False, some_lost: bool = False) -> None:
        """Tell the worker how far this is, if it is known which worker that is.

        ``stop``: it is to stop. ``some_lost``: parts that were on their way may be lost.
        """
        if self._worker_id is not None:
            self._told_at = self._loop.time()
            progress = self.parts.progress(some_lost=some_lost)
            room = self._streams.connection.max_payload // 2
            awaited = None if self._questions is None else self._questions.awaited(room)
            body = encode_progress(self.parts_to, progress, stop=stop, awaited=awaited)
            self._streams.send(self._worker_id, body)

    def _tick(self) -> None:
        self._timer = self._loop.call_later(_TELL_EVERY, self._tick)
        if not self.has_ended and (self.parts.misses_some or self._loop.time() >= self._told_at + _TELL_EVERY / 2):
            self.tell()

    def close(self) -> None:
        """End the stream: the handler is stopped if it still runs. Has no effect if it is closed."""
        if self._timer is None:
            return
        if self._answered:
            self.tell()  # the worker need not keep what has arrived
        else:
            self.tell(stop=True)
            for pause in _STOP_AGAIN:
                self._loop.call_later(pause, partial(self.tell, stop=True))
            self.call.cancel()
        for body in self.parts.rest():
            if body.reference is not None:
                self._streams.bodies.discard(body.reference)
        self._end()
        self._wake()

    def _end(self) -> None:
        """Take in nothing any more, and say nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._close_questions()
        self._streams.end(self)


class MessageStream:
    """The items of a streamed call, in order: from `NatsAgentRuntime.stream_message`.

    Iterate over it with ``async for``. The call is made when the iteration begins, or by ``async with``. Use it with
    ``async with``, or call `aclose`, if the iteration may end early: the handler is stopped then. Without that, a
    stream that is left by ``break`` is closed when Python collects it, which is at once if nothing else refers to it.

    The iteration ends when the handler has returned, and raises what it raised, after the items that came before it. An
    item that cannot be read ends the stream, as does an intervention handler that raises. Only one task may iterate at
    a time. A consumer that is cancelled while it waits can go on later: no item is lost.
    """

    def __init__(
        self,
        streams: IncomingStreams,
        call: Call,
        window: Window,
        on_question: OnQuestion | None = None,
        *,
        wants_items: bool = True,
    ) -> None:
        """``on_question`` answers the handler's questions; None: nobody does. ``wants_items``: False for a caller that
        only answers them.
        """
        self._streams = streams
        self._call = call
        self._window = window
        self._on_question = on_question
        self._wants_items = wants_items
        self._sent = type(call.message)
        self._receiving: Receiving | None = None
        self._reading: asyncio.Task[Any] | None = None
        """Reads the next item. It goes on if the consumer is cancelled meanwhile, which then gets it next time."""
        self._iterated = False
        self._done = False
        check_on_question(on_question)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if self._iterated:
            raise RuntimeError("another task waits for the next item of this stream: one task at a time may iterate")
        self._iterated = True
        try:
            return await self._next()
        except asyncio.CancelledError:
            raise  # the consumer may go on
        except BaseException:
            self._end()
            raise
        finally:
            self._iterated = False

    async def _next(self) -> Any:
        token = self._call.token
        if self._reading is None:
            if self._done:
                raise StopAsyncIteration
            receiving = self._begin()
            body: Envelope | None = None
            while body is None:
                while not receiving.parts.has_next or receiving.is_cancelled:
                    if receiving.has_ended:
                        return await self._last(receiving)
                    await receiving.wait()
                    if self._done:  # closed by another task
                        raise StopAsyncIteration
                if token is not None and token.is_cancelled():
                    self._end()
                    raise asyncio.CancelledError("the cancellation token was cancelled")
                if (handler := current_handler.get()) is not None:
                    await handler.until_last()  # those that were let in because this one awaited the item
                    if self._done:
                        raise StopAsyncIteration
                body = receiving.take()
            if body.reference is None and not self._streams.interventions.handlers:
                return self._message(body)
            self._reading = asyncio.ensure_future(self._read(body))
        reading = self._reading
        await asyncio.wait({reading})
        if self._done:  # closed by another task
            raise StopAsyncIteration
        self._reading = None
        return reading.result()

    def _begin(self) -> Receiving:
        if self._receiving is None:
            self._receiving = Receiving(self._streams, self._call, self._window, self._on_question, self._wants_items)
        return self._receiving

    async def _last(self, receiving: Receiving) -> Any:
        """The result of the call, if it is an item of its own. Raises the error of the call, or StopAsyncIteration."""
        if receiving.failure is not None:
            raise receiving.failure
        if receiving.call.cancelled():
            self._end()
        result = await receiving.call
        if receiving.all_emitted:
            raise StopAsyncIteration
        item = await self._intervened(result)
        self._end()
        return item

    def _message(self, body: Envelope) -> Any:
        return self._streams.replies.message(body, self._sent, self._call.reply_type, self._call.recipient)

    async def _read(self, body: Envelope) -> Any:
        if body.reference is not None:
            await self._streams.replies.load(body, body.reference)
        return await self._intervened(self._message(body))

    async def _intervened(self, item: Any) -> Any:
        """The item that the intervention handlers of this runtime make of an item."""
        interventions = self._streams.interventions
        if not interventions.handlers:
            return item
        return await interventions.on_response(item, self._call.recipient, self._call.sender)

    def _end(self) -> None:
        self._done = True
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        if self._receiving is not None:
            self._receiving.close()

    async def aclose(self) -> None:
        """End the stream, and stop its handler if that still runs. Has no effect if the stream has ended."""
        self._end()
        if self._receiving is not None and not self._receiving.call.done():
            await asyncio.wait({self._receiving.call})

    async def __aenter__(self) -> Self:
        if not self._done:
            self._begin()
            try:
                await asyncio.sleep(0)  # so that the call is sent before what is sent later
            except BaseException:  # cancelled: no `__aexit__` follows
                self._end()
                raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        receiving = self._receiving
        if receiving is not None and not self._done:
            with contextlib.suppress(RuntimeError):  # its event loop is closed
                receiving._loop.call_soon_threadsafe(receiving.close)


async def last_item(stream: MessageStream) -> Any:
    """Return the last item of a stream, which is what ``send_message`` returns."""
    last = None
    async with stream:
        async for item in stream:
            last = item
    return last


def _complete(news: asyncio.Future[None], _: object = None) -> None:
    if not news.done():
        news.set_result(None)


async def _make(calls: CallSender, call: Call) -> Any:
    return await calls.send(call)
