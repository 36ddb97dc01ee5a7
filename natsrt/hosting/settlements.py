"""How messages of core NATS are settled: a call by a reply, an event by nothing.

The route of each subscription names one of these settlements. Events of durable topics have another one, in
`natsrt.hosting.durable_settlement`. The other modules of this folder do not depend on how a message is settled.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Awaitable, Sequence

from natsrt.agents.current_delivery import handled_delivery
from natsrt.agents.inbound import Answer, EventDropped, Inbound, LoggedCall, OtherCopy, Settlement
from natsrt.errors import CannotDecode, NatsrtError, RemoteAgentError
from natsrt.hosting.answers import Answers
from natsrt.hosting.call_log import CallLog
from natsrt.hosting.core_copies import CoreCopies
from natsrt.hosting.reply_subjects import ReplySubjects, may_be_forwarded
from natsrt.observe.event_errors import EventErrors
from natsrt.observe.metrics import Counters
from natsrt.task_types import task_of
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.envelope import SUPERSEDES_HEADER, Envelope
from natsrt.wire.exception_parts import carried, class_name
from natsrt.wire.failures import SERVICE_ERROR, traceback_of
from natsrt.wire.ids import former_copies
from natsrt.wire.part_messages import PARTS_HEADER
from natsrt.wire.stored_events import stored_event
from natsrt.wire.subjects import encode_text

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_SHOWN = 120
"""Maximum length of a subject in a log line, in characters."""


class Unanswered(Settlement):
    """For a call without a reply subject: nothing is sent. A failure is logged."""

    wants_answer = False

    def handled(self, inbound: Inbound, answer: Answer | None) -> None:
        return None

    async def failed(self, inbound: Inbound, error: BaseException, source: str) -> None:
        logger.error("%s on %s failed: %s", inbound.kind.value, clip(inbound.message.subject), outline(error))

    async def refused(self, inbound: Inbound, error: Exception) -> None:
        inbound.route.hosted.counters.record_drop()


class EventSettlement(Unanswered):
    """For an event of core NATS: nothing is sent. A failure is logged.

    Unless ``ignore_unhandled_exceptions`` is on, the first failure is also kept, to be raised when the runtime stops.
    """

    def __init__(self, errors: EventErrors, counters: Counters) -> None:
        self._errors = errors
        self._counters = counters
        self.copies: CoreCopies | None = None
        """Recognises the copies of events on durable topics; None while no topic is durable."""

    def take(self, inbound: Inbound) -> bool:
        return self.copies is None or not self.copies.is_one(inbound.message.subject)

    def refuse_copy(self, inbound: Inbound) -> None:
        """Raise `EventDropped` for an event on a durable topic that its publisher sent to a keyed agent itself.

        It does so while it does not know yet that the topic is durable. The agent gets the event from the stream.
        """
        if self.copies is not None and inbound.topic is not None and self.copies.is_durable(inbound.topic.type):
            raise EventDropped

    async def failed(self, inbound: Inbound, error: BaseException, source: str) -> None:
        if inbound.key is not None:
            self._errors.record(error)
        await super().failed(inbound, error, source)

    def refuse_unread(self, inbound: Inbound) -> bool:
        if inbound.route.hosted.keyed is not None:
            return False  # only its body shows whether it is for an agent on this worker
        self._drop(inbound)
        return True

    async def refused(self, inbound: Inbound, error: Exception) -> None:
        if inbound.key is not None:
            self._drop(inbound)

    def _drop(self, inbound: Inbound) -> None:
        self._counters.dropped_events += 1
        inbound.route.hosted.counters.record_drop()


class ReplySettlement(Settlement):
    """For a call, a control message or a question: exactly one reply is sent. The call log keeps it for some time.

    Also for an event of a stream that is delivered to a keyed agent with a reply subject.
    """

    wants_answer = True

    def __init__(
        self,
        *,
        connection: Connection,
        reply_subjects: ReplySubjects,
        call_log: CallLog,
        answers: Answers,
        events: EventSettlement,
        counters: Counters,
    ) -> None:
        self._connection = connection
        self._reply_subjects = reply_subjects
        self._call_log = call_log
        self._answers = answers
        self._events = events
        self._counters = counters
        self._unanswered = Unanswered()
        self._confirmed = ConfirmedSettlement(self, answers)
        self.tasks: Settlement = self._confirmed
        """For the tasks of keyed agents."""

    def take(self, inbound: Inbound) -> bool:
        message = inbound.message
        if not message.reply:
            inbound.settlement = self._unanswered
            return True
        inbound.call = self._call_log.begin(message.reply, inbound.arrived)
        return inbound.call is not None

    def identified(self, inbound: Inbound) -> None:
        call = inbound.call
        if call is None:
            return
        if inbound.body is not None:
            self._read_envelope(inbound, inbound.body, call)
        elif not may_be_forwarded(inbound):
            self._check_sender(inbound, None)
        headers = inbound.message.headers
        if headers is None:
            return
        if inbound.streams_plainly:
            self._check_plain_stream(inbound)
        if SUPERSEDES_HEADER in headers:
            self._read_former(inbound, headers[SUPERSEDES_HEADER], call)

    def _read_envelope(self, inbound: Inbound, body: Envelope, call: LoggedCall) -> None:
        if "timeout" in body.attributes:
            call.wanted_until = call.arrived + _seconds(body.attributes["timeout"])
        accept_to = body.attributes.get("acceptto")
        if accept_to is not None:
            self._reply_subjects.check_accept_to(accept_to)
        self._check_sender(inbound, accept_to)
        call.accept_to = accept_to
        parts_to = body.attributes.get("partsto")
        if parts_to is not None and not self._reply_subjects.may_stream(
            parts_to, accept_to, forwarded=may_be_forwarded(inbound)
        ):
            raise CannotDecode("a call", "its partsto is not an allowed subject")

    def _check_sender(self, inbound: Inbound, accept_to: str | None) -> None:
        worker_id = self._reply_subjects.stranger_to(inbound.message.reply, accept_to)
        if worker_id is not None:
            self._refuse_reply(inbound)
            raise CannotDecode("a call", f"it names a subject in the inbox of {worker_id}, which did not send it")

    def _check_plain_stream(self, inbound: Inbound) -> None:
        items_to = self._reply_subjects.plain_stream_of(inbound)
        if not self._reply_subjects.may_answer(items_to):
            self._refuse_reply(inbound)
            raise CannotDecode("a call", "the subject for its items is not allowed")

    def _read_former(self, inbound: Inbound, header: str, call: LoggedCall) -> None:
        if not self._reply_subjects.may_answer(call.call_id):  # the answer of a former copy would be sent there
            self._refuse_reply(inbound)
            raise CannotDecode("a call", "its reply subject is not allowed")
        call.supersedes = former_copies(header, call.call_id, forwarded=may_be_forwarded(inbound))
        if call.supersedes and self._call_log.join(call):
            inbound.settlement, inbound.call = self._unanswered, None
            raise OtherCopy

    def as_event(self, inbound: Inbound) -> Settlement:
        if inbound.call is not None and inbound.body is not None:
            inbound.event = stored_event(inbound.body)
            if inbound.event is not None:
                return self._confirmed if task_of(inbound.topic) is None else self.tasks
        self._forget(inbound)  # its reply subject is only for the server's "no responders" message
        inbound.settlement = self._events
        self._events.refuse_copy(inbound)
        return self._events

    def handled(self, inbound: Inbound, answer: Answer | None) -> Awaitable[None]:
        assert answer is not None
        return self.reply(inbound, answer)

    def failed(self, inbound: Inbound, error: BaseException, source: str) -> Awaitable[None]:
        stream = inbound.stream
        if stream is None:
            return self.reply(inbound, self._answers.failure(error, inbound.body, source))
        answer = self._answers.failure(stream.reported(error), inbound.body, source, more=stream.attributes)
        return self.reply(inbound, Answer(answer.body, {**(answer.headers or {}), **stream.headers} or None))

    def refused(self, inbound: Inbound, error: Exception) -> Awaitable[None]:
        copies = () if inbound.call is None else inbound.call.also
        self._forget(inbound)
        key = inbound.key
        source = envelope.NO_AGENT if key is None else f"{inbound.agent_type}/{encode_text(key)}"
        return self.reply(inbound, self._answers.failure(error, inbound.body, source, refused=True), copies)

    def _forget(self, inbound: Inbound) -> None:
        if inbound.call is not None:
            self._call_log.forget(inbound.call)
            inbound.call = None

    def _refuse_reply(self, inbound: Inbound) -> None:
        """Nothing is published on the subjects that a call names."""
        inbound.settlement = self._unanswered
        self._counters.refused_replies += 1
        reply = inbound.message.reply
        logger.error("a call has the reply subject %s, which is not allowed; no reply is sent", clip(reply))
        self._forget(inbound)

    async def reply(self, inbound: Inbound, answer: Answer, copies: Sequence[str] = ()) -> None:
        """Send the answer to a call, and to those of its ``copies`` that were sent again."""
        inbound.settlement = self._unanswered  # so that nothing settles it a second time
        reply = inbound.message.reply
        if not self._reply_subjects.may_answer(reply):
            self._refuse_reply(inbound)
            return
        if inbound.call is not None:
            self._call_log.end(inbound.call, answer)
            copies = inbound.call.also
        try:
            await self._connection.publish(reply, answer.body, headers=answer.headers)
            for copy in copies:
                await self._connection.publish(copy, answer.body, headers=answer.headers)
            if answer.headers and SERVICE_ERROR in answer.headers and inbound.streams_plainly:
                await self._end_items(inbound, answer.headers)
        except NatsrtError as error:  # it is in the call log; the caller asks for it when both are connected again
            logger.warning("a reply could not be sent yet: %s", error)

    async def _end_items(self, inbound: Inbound, headers: dict[str, str]) -> None:
        """Send the empty message that follows an error, if this worker got the call from the plain client itself."""
        if not self._reply_subjects.is_of_other_client(inbound):
            number = {name: text for name, text in headers.items() if name == PARTS_HEADER}
            await self._connection.publish(inbound.message.reply, b"", headers=number or None)


class ConfirmedSettlement(Settlement):
    """For an event of a stream that was delivered to a keyed agent: the reply says that it was handled, or why not.

    What the handler returned is not sent. A failure is not logged here: who delivers the event decides what follows.
    """

    wants_answer = False

    def __init__(self, replies: ReplySettlement, answers: Answers) -> None:
        self._replies = replies
        self._answers = answers

    def identified(self, inbound: Inbound) -> None:
        self._replies.identified(inbound)
        handled_delivery.set(inbound.event)

    def handled(self, inbound: Inbound, answer: Answer | None) -> Awaitable[None]:
        assert inbound.body is not None and inbound.key is not None
        confirmation = self._answers.control_reply(None, inbound.body, inbound.agent_type, inbound.key)
        return self._replies.reply(inbound, confirmation)

    def failed(self, inbound: Inbound, error: BaseException, source: str) -> Awaitable[None]:
        return self._replies.failed(inbound, error, source)

    def refused(self, inbound: Inbound, error: Exception) -> Awaitable[None]:
        return self._replies.refused(inbound, error)


def _seconds(timeout: str) -> float:
    """Read the attribute ``timeout``, which is in milliseconds. Raises `CannotDecode`."""
    if not (timeout.isascii() and timeout.isdecimal()):
        raise CannotDecode("an envelope", f"its timeout must be a number of milliseconds, not {clip(timeout)!r}")
    return int(timeout) / 1000


def clip(text: str) -> str:
    """Return ``text`` for a log line or a span, shortened if it is over 120 characters."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def outline(error: BaseException) -> str:
    """An error for the log: its class and traceback. Only the texts of natsrt's errors are logged.

    The text of any other error may quote a payload.
    """
    if isinstance(error, RemoteAgentError):
        return f"another agent's {error.error_type}"
    if isinstance(error, NatsrtError):
        return carried(str(error))
    return f"{class_name(type(error))}\n{''.join(traceback.format_tb(traceback_of(error)))}".rstrip()
