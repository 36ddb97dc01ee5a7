"""Decides to which subjects this worker publishes for others: replies, acceptances and answers.

Whoever asks chooses these subjects, but the worker publishes there with its own permissions. So it refuses the subjects
of natsrt and of the server, and those of other workers' inboxes where it is certain that these workers did not ask.
"""

from __future__ import annotations

from natsrt.agents.inbound import Inbound
from natsrt.errors import CannotDecode
from natsrt.jetstream.registry.registry import Registry
from natsrt.transport.inbox import PLAIN_REQUEST
from natsrt.wire import envelope
from natsrt.wire.part_messages import STREAM_HEADER
from natsrt.wire.subjects import Subjects

_ACCEPTABLE = 4096
"""Maximum number of acceptance subjects that are remembered as valid. There is one for each calling runtime."""


class ReplySubjects:
    """The subjects that were named to one worker."""

    def __init__(self, subjects: Subjects, registry: Registry) -> None:
        self._subjects = subjects
        self._registry = registry
        self._acceptable: dict[str, str] = {}
        """Acceptance subjects that are allowed, with the start of all subjects of the same inbox."""

    def may_answer(self, reply: str) -> bool:
        """True if the answer to a question may be published to ``reply``.

        It is a word of the server's protocol, so it contains no white space; the server lets wildcards pass.
        """
        return bool(reply) and "*" not in reply and ">" not in reply and not self._subjects.is_reserved(reply)

    def may_answer_service(self, reply: str) -> bool:
        """True if a service answer may be published to ``reply``. Workers do not ask for these in their inboxes."""
        return self.may_answer(reply) and self._registry.owns_inbox(reply) is None

    def may_answer_plain(self, reply: str) -> bool:
        """True if the answer to a plain message may be published to ``reply``: in the inbox of a worker, only where it
        waits for replies to plain requests."""
        if not self.may_answer(reply):
            return False
        return self._registry.owns_inbox(reply) is None or reply.rpartition(".")[2].startswith(PLAIN_REQUEST)

    def check_accept_to(self, accept_to: str) -> None:
        """Raise `CannotDecode` if a call must not be accepted on ``accept_to``."""
        if accept_to not in self._acceptable:
            if not envelope.is_subject(accept_to) or self._subjects.is_reserved(accept_to):
                raise CannotDecode("an envelope", "its acceptto is not an allowed subject")
            if len(self._acceptable) >= _ACCEPTABLE:
                self._acceptable.clear()
            self._acceptable[accept_to] = f"{accept_to.rpartition('.')[0]}."

    def may_stream(self, parts_to: str, accept_to: str | None, *, forwarded: bool) -> bool:
        """True if the parts of the reply to a call may be published to ``parts_to``.

        ``accept_to`` is as in `stranger_to`. ``forwarded``: a worker may have passed the call on, and named its own
        ``accept_to``. Then it has checked this.
        """
        return (
            envelope.is_subject(parts_to)
            and self.may_answer(parts_to)
            and (forwarded or self.stranger_to(parts_to, accept_to) is None)
        )

    def plain_stream_of(self, inbound: Inbound) -> str:
        """The subject on which the plain client that has made a call gets the items. Raises `CannotDecode`."""
        value = inbound.plain_stream or ""
        if value == "1":
            return inbound.message.reply
        if not self.is_of_other_client(inbound):
            raise CannotDecode("a call", f"its header {STREAM_HEADER} must be 1")
        return value

    def is_of_other_client(self, inbound: Inbound) -> bool:
        """True if a worker has passed on the call of a plain client that gets the items."""
        value = inbound.plain_stream or "1"
        return value != "1" and may_be_forwarded(inbound) and self.may_stream(value, None, forwarded=True)

    def stranger_to(self, reply: str, accept_to: str | None) -> str | None:
        """The worker whose inbox a call names, although it did not send the call; None if none is known.

        All subjects that a worker names in a call are in its own inbox, and a call always has an ``acceptto``, unless
        the worker forwards a plain one. ``accept_to`` None: the call has none. Otherwise it must have been checked.
        """
        if accept_to is None:
            return self._registry.owns_inbox(reply)
        start = self._acceptable[accept_to]
        if reply.startswith(start) and reply.find(".", len(start)) < 0:
            return None
        return self._registry.owns_inbox(reply) or self._registry.owns_inbox(accept_to)


def may_be_forwarded(inbound: Inbound) -> bool:
    """True if a worker may have passed a call on to the owner of its agent, on the subject of that agent."""
    route = inbound.route
    return route.key is not None and route.hosted.keyed is not None
