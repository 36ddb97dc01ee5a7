"""Answers the questions that handlers ask this runtime's calls: `natsrt.ask` at the handler, ``on_question`` here.

Rules:

1. A question is answered by a task of its own, in the context of the consumer that has taken it. So what the function
   sends belongs to the consumer's handler, and to the chain of the handler that asks.
2. The answer, or the function's exception, is sent to the worker until the worker has confirmed it, or the call has
   ended. The worker ignores answers that it has.
3. When nobody waits for an answer any more, the function is cancelled.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Iterator
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin

from natsrt.agents.chain import chain_of, current_chain
from natsrt.agents.inbound import Answering, Waiters, handling, waiters
from natsrt.agents.interventions import Interventions
from natsrt.agents.streaming import ask
from natsrt.awaiting import awaits
from natsrt.background import BackgroundTasks
from natsrt.errors import NatsrtError, NobodyToAsk
from natsrt.jetstream.registry.registry import Registry
from natsrt.options import Options
from natsrt.sending.attributes import MessageAttributes
from natsrt.sending.call_sender import Call
from natsrt.sending.replies import Replies
from natsrt.sending.steps import send_context
from natsrt.transport.bodies import Bodies
from natsrt.transport.calls import Calls
from natsrt.transport.peers import Peers
from natsrt.wire import envelope
from natsrt.wire.envelope import Envelope, attribute
from natsrt.wire.failures import ErrorTypes, Failure, decode_answer, describe_within
from natsrt.wire.ids import checked_id
from natsrt.wire.part_messages import MOST_AWAITED
from natsrt.wire.references import Reference
from natsrt.wire.serialization import Encoded, Serialization, type_name_of

logger: logging.Logger = logging.getLogger("natsrt.calls")

OnQuestion = Callable[[Any], Any]
"""Gets a question, and returns the answer or an awaitable of it."""

_CONFIRMED_WITHIN: Final = 2.0
"""Seconds, beside the round trip, in which a worker confirms an answer. Then the answer is sent again."""
_LIST_EVERY: Final = 0.1
"""Seconds between two looks at all calls of a runtime, for those that are made for answers."""
_AROUND_CALL: Final = 6
"""Bytes of JSON around the reply subject of a call, or around the number of a question, at most."""
_AGAIN_AFTER: Final = 0.5
"""Seconds until an answer is sent again that could not be sent, because there is no connection."""


class QuestionAnswers:
    """What all questions to one runtime have in common."""

    def __init__(
        self,
        *,
        calls: Calls,
        peers: Peers,
        registry: Registry,
        bodies: Bodies,
        serialization: Serialization,
        error_types: ErrorTypes,
        replies: Replies,
        interventions: Interventions,
        attributes: MessageAttributes,
        options: Options,
    ) -> None:
        self._calls = calls
        self._listed: Waiters | None = None
        """The calls of this runtime; None if they were not listed for `_LIST_EVERY` seconds."""
        self._peers = peers
        self._registry = registry
        self._bodies = bodies
        self._serialization = serialization
        self._error_types = error_types
        self._interventions = interventions
        self._attributes = attributes
        self._with_tracebacks = options.send_tracebacks
        self.replies: Replies = replies

    def awaited(self, answering: Answering) -> Iterator[str]:
        """The reply subjects of the calls for which an answer waits, those first that were sent first."""
        if self._listed is None:
            self._listed = waiters(self._calls.awaited())
            asyncio.get_running_loop().call_later(_LIST_EVERY, self._forget)  # it must not keep tasks alive
        found, task = self._listed.get(answering, ()), answering.task
        return iter(()) if task is None else (reply for reply, one in found if awaits(task, one, surely=True))

    def _forget(self) -> None:
        self._listed = None

    async def answer(self, question: Envelope, call: Call, on_question: OnQuestion) -> Any:
        """Return what ``on_question`` answers to a question of ``call``. Raises what it raises, and `CannotDecode`."""
        if question.reference is not None:
            await self.replies.load(question, question.reference)
        if on_question is ask and not self._interventions.handlers:  # whoever only passes it on need not know its class
            asked = self.replies.message(question, Encoded, None, call.recipient)
        else:
            wanted = _expected(on_question, question.text("messagetype"))
            asked = self.replies.message(question, type(call.message), wanted, call.recipient)
        if self._interventions.handlers:
            asked = await self._interventions.on_response(asked, call.recipient, call.sender)
        current_chain.set(chain_of(question))
        answer = on_question(asked)
        if inspect.isawaitable(answer):
            answer = await answer
        if self._interventions.handlers:
            context = send_context(call.sender, None, None, question.attributes["id"])
            answer = await self._interventions.on_send(answer, context, call.recipient)
        return answer

    async def pack(self, answer: Any, call: Call, about: str) -> tuple[bytes, Reference | None]:
        """Return the message with an answer, and where it has stored the answer if that is too large for a message.

        ``about`` are the attributes that say to which question it is. Raises `CannotSerialize`, `MessageTooLarge`, and
        the errors of the store.
        """
        encoded = self._serialization.encode(answer)
        attributes = self._attributes.message("answer", call.sender, encoded, None) + about
        payload, content_type = encoded.payload, encoded.content_type
        if len(payload) <= self._bodies.surely_fits or self._bodies.fits(
            envelope.ANSWER, attributes, payload, content_type
        ):
            return self._bodies.pack(envelope.ANSWER, attributes, payload, content_type), None
        reference = await self._bodies.store(payload)
        return self._bodies.pack_reference(envelope.ANSWER, attributes, reference, content_type), reference

    def pack_failure(self, error: BaseException, about: str) -> bytes:
        """Return the message that reports the error of an ``on_question``."""
        attributes = f'"id":"answer","source":"/","failed":"1"{about}'

        def pack(failure: Failure) -> bytes:
            return self._bodies.pack(envelope.ANSWER, attributes, failure.payload)

        return describe_within(error, pack, with_traceback=self._with_tracebacks, types=self._error_types)

    async def delivered(self, worker_id: str, body: bytes) -> bool:
        """Send an answer to a worker. Returns whether the worker has confirmed it."""
        try:
            reply = await self._peers.ask(self._registry.worker_subject(worker_id), body, _CONFIRMED_WITHIN)
        except NatsrtError as error:
            logger.debug("the answer to a question is sent later: %s", error)
            return False
        if reply is None:
            return False
        if (confirmation := decode_answer(reply.headers, reply.data)) is None or confirmation.type == envelope.ERROR:
            logger.warning("worker %s does not take the answer to a question", worker_id)
        return True

    def discard(self, reference: Reference) -> None:
        """Delete an answer that was stored, and is not needed any more."""
        self._bodies.discard(reference)


class Questions:
    """The questions that one call was asked. It refers to no `MessageStream`."""

    def __init__(self, answers: QuestionAnswers, call: Call, on_question: OnQuestion, parts_to: str) -> None:
        self._answers = answers
        self._call = call
        self._on_question = on_question
        self._parts_to = parts_to
        self._open: dict[str, Answering] = {}
        self._tasks = BackgroundTasks(logger, "a question could not be answered")

    def take(self, part: Envelope) -> None:
        """Begin to answer a question, or stop to, as a part says. Raises `CannotDecode`."""
        if (withdrawn := part.text("withdrawn")) is not None:
            if (answering := self._open.pop(withdrawn, None)) is not None:
                answering.cancel()
            return
        number = part.required("question")
        worker_id = checked_id(part.required("workerid"), "a question")
        about = f",{attribute('partsto', self._parts_to)},{attribute('question', number)}"
        answering = self._open[number] = Answering()
        answering.task = self._tasks.spawn(self._answer(answering, part, number, worker_id, about))

    async def _answer(self, answering: Answering, part: Envelope, number: str, worker_id: str, about: str) -> None:
        reference: Reference | None = None
        handling.set(answering)
        try:
            try:
                answer = await self._answers.answer(part, self._call, self._on_question)
                body, reference = await self._answers.pack(answer, self._call, about)
            except asyncio.CancelledError:
                if number not in self._open:  # nobody waits for the answer
                    raise
                gone = NobodyToAsk(str(self._call.recipient), "its on_question was cancelled")
                body = self._answers.pack_failure(gone, about)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                body = self._answers.pack_failure(error, about)
            while number in self._open:  # the function may have ended although it was cancelled
                if await self._answers.delivered(worker_id, body):
                    reference = None  # the worker deletes it
                    return
                await asyncio.sleep(_AGAIN_AFTER)
        finally:
            if reference is not None:
                self._answers.discard(reference)
            self._open.pop(number, None)

    def awaited(self, room: int) -> dict[str, list[str]]:
        """By the numbers of the questions: the reply subjects of the calls for which the answers wait, if there are
        any; as many as fit into ``room`` bytes of JSON, and `MOST_AWAITED` at most. Those of one question that were
        sent first come first, and those that are answered make room for others.
        """
        found: dict[str, list[str]] = {}
        left = MOST_AWAITED
        for number, answering in self._open.items():
            for call in self._answers.awaited(answering):
                named = found.setdefault(number, [])
                room -= len(call) + _AROUND_CALL + (0 if named else len(number) + _AROUND_CALL)
                if not left or room < 0:
                    return found
                named.append(call)
                left -= 1
        return found

    def close(self) -> None:
        """Nobody waits for answers any more."""
        left, self._open = list(self._open.values()), {}
        for answering in left:
            answering.cancel()


def _expected(on_question: OnQuestion, type_name: str | None) -> Any:
    """The class of questions that the annotation of ``on_question`` says: the one with this name, else the first; None
    if it says none.
    """
    try:
        parameters = inspect.signature(on_question, eval_str=True).parameters.values()
    except (TypeError, ValueError, NameError, AttributeError, SyntaxError):
        return None
    hint = next((parameter.annotation for parameter in parameters), Any)
    classes = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    classes = tuple(cls for cls in classes if cls not in (Any, object, inspect.Parameter.empty, NoneType))
    return next((cls for cls in classes if type_name_of(cls) == type_name), classes[0] if classes else None)


def check_on_question(on_question: Any) -> None:
    """Raise TypeError if ``on_question`` can answer no questions."""
    if on_question is not None and not callable(on_question):
        raise TypeError(f"on_question must be a function of the question, not {on_question!r:.60}")
