"""How messages of core NATS are settled: a call by a reply, an event by nothing.

The route of each subscription names one of these settlements. To settle messages in another way, such as by an
acknowledgement, add a settlement here. The other modules of this folder do not depend on how a message is settled.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Awaitable

from natsrt.agents.inbound import Answer, Inbound, Settlement
from natsrt.errors import CannotDecode, NatsrtError, RemoteAgentError
from natsrt.hosting.answers import Answers
from natsrt.hosting.call_log import CallLog
from natsrt.observe.event_errors import EventErrors
from natsrt.observe.metrics import Counters
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.exception_parts import class_name
from natsrt.wire.failures import traceback_of
from natsrt.wire.subjects import Subjects, encode_text

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_ACCEPTABLE = 4096
"""Maximum number of acceptance subjects that are remembered as valid. There is one for each calling runtime."""
_SHOWN = 120
"""Maximum length of a subject in a log line, in characters."""


class Unanswered(Settlement):
    """For a call without a reply subject: nothing is sent. A failure is logged."""

    wants_answer = False

    def handled(self, inbound: Inbound, answer: Answer | None) -> None:
        return None

    async def failed(self, inbound: Inbound, error: BaseException, source: str) -> None:
        logger.error("%s on %s failed: %s", inbound.kind.value, clip(inbound.message.subject), _outline(error))

    async def refused(self, inbound: Inbound, error: Exception) -> None:
        inbound.route.hosted.counters.record_drop()


class EventSettlement(Unanswered):
    """For an event of core NATS: nothing is sent. A failure is logged.

    Unless ``ignore_unhandled_exceptions`` is on, the first failure is also kept, to be raised when the runtime stops.
    """

    def __init__(self, errors: EventErrors, counters: Counters) -> None:
        self._errors = errors
        self._counters = counters

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
    """For a call, a control message or a question: exactly one reply is sent. The call log keeps it for some time."""

    wants_answer = True

    def __init__(
        self,
        *,
        connection: Connection,
        subjects: Subjects,
        call_log: CallLog,
        answers: Answers,
        events: EventSettlement,
        counters: Counters,
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._call_log = call_log
        self._answers = answers
        self._events = events
        self._counters = counters
        self._unanswered = Unanswered()
        self._acceptable: set[str] = set()

    def take(self, inbound: Inbound) -> None:
        reply = inbound.message.reply
        if reply:
            inbound.call = self._call_log.begin(reply, inbound.arrived)
        else:
            inbound.settlement = self._unanswered

    def identified(self, inbound: Inbound) -> None:
        body, call = inbound.body, inbound.call
        if body is None or call is None:
            return
        if "timeout" in body.attributes:
            call.wanted_until = call.arrived + _seconds(body.attributes["timeout"])
        accept_to = body.attributes.get("acceptto")
        if accept_to is None:
            return
        if accept_to not in self._acceptable:
            if not envelope.is_subject(accept_to) or self._subjects.is_reserved(accept_to):
                raise CannotDecode("an envelope", "its acceptto is not an allowed subject")
            if len(self._acceptable) >= _ACCEPTABLE:
                self._acceptable.clear()
            self._acceptable.add(accept_to)
        call.accept_to = accept_to

    def as_event(self, inbound: Inbound) -> Settlement:
        self._forget(inbound)  # its reply subject is only for the server's "no responders" message
        return self._events

    def handled(self, inbound: Inbound, answer: Answer | None) -> Awaitable[None]:
        assert answer is not None
        return self._reply(inbound, answer)

    def failed(self, inbound: Inbound, error: BaseException, source: str) -> Awaitable[None]:
        return self._reply(inbound, self._answers.failure(error, inbound.body, source))

    def refused(self, inbound: Inbound, error: Exception) -> Awaitable[None]:
        self._forget(inbound)
        key = inbound.key
        source = envelope.NO_AGENT if key is None else f"{inbound.agent_type}/{encode_text(key)}"
        return self._reply(inbound, self._answers.failure(error, inbound.body, source, refused=True))

    def _forget(self, inbound: Inbound) -> None:
        if inbound.call is not None:
            self._call_log.forget(inbound.call)
            inbound.call = None

    async def _reply(self, inbound: Inbound, answer: Answer) -> None:
        inbound.settlement = self._unanswered  # so that nothing settles it a second time
        reply = inbound.message.reply
        if self._subjects.is_reserved(reply):
            self._counters.refused_replies += 1
            logger.error("a call has the reply subject %s, which is not allowed; no reply is sent", clip(reply))
            self._forget(inbound)
            return
        if inbound.call is not None:
            self._call_log.end(inbound.call, answer)
        try:
            await self._connection.publish(reply, answer.body, headers=answer.headers)
        except NatsrtError as error:  # it is in the call log; the caller asks for it when both are connected again
            logger.warning("a reply could not be sent yet: %s", error)


def _seconds(timeout: str) -> float:
    """Read the attribute ``timeout``, which is in milliseconds. Raises `CannotDecode`."""
    if not (timeout.isascii() and timeout.isdecimal()):
        raise CannotDecode("an envelope", f"its timeout must be a number of milliseconds, not {clip(timeout)!r}")
    return int(timeout) / 1000


def clip(text: str) -> str:
    """Return ``text`` for a log line or a span, shortened if it is over 120 characters."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _outline(error: BaseException) -> str:
    """An error for the log: its class and traceback. Only the texts of natsrt's errors are logged.

    The text of any other error may quote a payload.
    """
    if isinstance(error, RemoteAgentError):
        return f"another agent's {error.error_type}"
    if isinstance(error, NatsrtError):
        return str(error)
    return f"{class_name(type(error))}\n{''.join(traceback.format_tb(traceback_of(error)))}".rstrip()
