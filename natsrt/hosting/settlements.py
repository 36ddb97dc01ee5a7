"""How the messages of core NATS end: a call in a reply, an event in nothing.

Each subscription's route names one of these. A message that ends in another way, such as an acknowledgement, gets a
settlement of its own here; nothing else in this folder asks how a message ends.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Awaitable

from natsrt.agents.inbound import Answer, Inbound, Settlement
from natsrt.errors import CannotDecode, NatsrtError, RemoteAgentError
from natsrt.hosting.answers import Answers
from natsrt.hosting.call_log import CallLog
from natsrt.observe.metrics import Counters
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.subjects import Subjects

logger = logging.getLogger("natsrt.hosting")

_ACCEPTABLE = 4096
"""Acceptance subjects that are not checked again. There is one for each runtime that calls."""
_SHOWN = 120
"""Characters of a subject that a log line shows."""


class Unanswered(Settlement):
    """Nobody waits for the end: a call without a reply subject. A failure is logged."""

    wants_answer = False

    async def handled(self, inbound: Inbound, answer: Answer | None) -> None:
        pass

    async def failed(self, inbound: Inbound, error: BaseException, source: str) -> None:
        logger.error("%s on %s failed: %s", inbound.kind.value, clip(inbound.message.subject), _outline(error))

    async def refused(self, inbound: Inbound, error: Exception) -> None:
        inbound.route.hosted.counters.record_drop()


class EventSettlement(Unanswered):
    """An event of core NATS. A failure is logged, and kept for the stop of the runtime where the options say so."""

    def __init__(self, options: Options, counters: Counters) -> None:
        self._ignores_errors = options.ignore_unhandled_exceptions
        self._counters = counters
        self.first_error: BaseException | None = None
        """The first error of an agent; None if there was none, or ``ignore_unhandled_exceptions`` is on."""

    async def failed(self, inbound: Inbound, error: BaseException, source: str) -> None:
        if inbound.key is not None and not self._ignores_errors and self.first_error is None:
            self.first_error = error
        await super().failed(inbound, error, source)

    def refuse_unread(self, inbound: Inbound) -> bool:
        if inbound.route.hosted.keyed is not None:
            return False  # its body says whether it is for an agent here
        self._drop(inbound)
        return True

    async def refused(self, inbound: Inbound, error: Exception) -> None:
        if inbound.key is not None:
            self._drop(inbound)

    def _drop(self, inbound: Inbound) -> None:
        self._counters.dropped_events += 1
        inbound.route.hosted.counters.record_drop()


class ReplySettlement(Settlement):
    """A call, a control message or a question: it ends in exactly one reply, which the call log keeps for a while."""

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
        accept_to = None if body is None or call is None else body.attributes.get("acceptto")
        if accept_to is None or call is None:
            return
        if accept_to not in self._acceptable:
            if not envelope.is_subject(accept_to) or self._subjects.is_reserved(accept_to):
                raise CannotDecode("an envelope", "its acceptto lies where no acceptance may go")
            if len(self._acceptable) >= _ACCEPTABLE:
                self._acceptable.clear()
            self._acceptable.add(accept_to)
        call.accept_to = accept_to

    def as_event(self, inbound: Inbound) -> Settlement:
        self._forget(inbound)  # its publisher gave a reply subject only to hear that nobody listens
        return self._events

    def handled(self, inbound: Inbound, answer: Answer | None) -> Awaitable[None]:
        assert answer is not None
        return self._reply(inbound, answer)

    def failed(self, inbound: Inbound, error: BaseException, source: str) -> Awaitable[None]:
        return self._reply(inbound, self._answers.failure(error, inbound.body, source))

    def refused(self, inbound: Inbound, error: Exception) -> Awaitable[None]:
        self._forget(inbound)
        return self._reply(inbound, self._answers.failure(error, inbound.body, inbound.route.name, refused=True))

    def _forget(self, inbound: Inbound) -> None:
        if inbound.call is not None:
            self._call_log.forget(inbound.call)
            inbound.call = None

    async def _reply(self, inbound: Inbound, answer: Answer) -> None:
        reply = inbound.message.reply
        if self._subjects.is_reserved(reply):
            self._counters.refused_replies += 1
            logger.error("a call asked for its reply on %s, where no reply may go", clip(reply))
            self._forget(inbound)
            return
        if inbound.call is not None:
            self._call_log.end(inbound.call, answer)
        try:
            await self._connection.publish(reply, answer.body, headers=answer.headers)
        except NatsrtError as error:  # the call log has it: the caller asks for it when both are connected again
            logger.warning("a reply could not be sent yet: %s", error)


def clip(text: str) -> str:
    """``text`` for a log line or a span, cut where it is long."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _outline(error: BaseException) -> str:
    """An error for the log: its class and traceback. Its text may quote a payload, so only natsrt's own are shown."""
    if isinstance(error, RemoteAgentError):
        return f"another agent's {error.error_type}"
    if isinstance(error, NatsrtError):
        return str(error)
    return f"{type(error).__qualname__}\n{''.join(traceback.format_tb(error.__traceback__))}".rstrip()
