"""Messages that came in: what each one is, for which agent, and how it is settled.

Rules:

1. The subscription through which a message comes in gives it a `Route`. The route names the agent type and what the
   message is expected to be; the body may correct that only as `Address` says.
2. Every message carries its `Settlement`, which its route chose: a call is settled by a reply, an event by nothing.
   Code that ends a message asks the settlement, and never what kind of message it is.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from autogen_core import CancellationToken, Subscription, TopicId
from nats.aio.msg import Msg

from natsrt.agents.chain import chain_of
from natsrt.agents.hosted_type import HostedType
from natsrt.wire import envelope
from natsrt.wire.envelope import Envelope


class InboundKind(Enum):
    """What a message is. The values are used in logs."""

    CALL = "call"
    EVENT = "event"
    CONTROL = "control"
    LOCATE = "question where an agent lives"


CALL, EVENT, CONTROL, LOCATE = InboundKind
"""The members by short names: a look-up in the class takes a tenth of a microsecond, on every message."""
_ENVELOPES = {CALL: envelope.CALL, EVENT: envelope.EVENT, CONTROL: envelope.CONTROL}


@dataclass(frozen=True, slots=True)
class Route:
    """What a subscription is for. Its subject decides this, never the body of a message.

    Args:
        kind: What the messages are expected to be.
        hosted: The agent type.
        settlement: How the messages are settled.
        key: The agent's key, on the subjects of one agent; None on those of a whole type.
        custom: AutoGen's ``Subscription`` object that decides on each event; None for ordinary subscriptions.
    """

    kind: InboundKind
    hosted: HostedType
    settlement: Settlement
    key: str | None = None
    custom: Subscription | None = None
    name: str = field(init=False)
    """The agent type, or type/key; for errors and as the name of tasks."""
    expects: str = field(init=False)
    """The type of the envelopes that come this way."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "expects", _ENVELOPES[self.kind])
        agent_type = self.hosted.agent_type
        object.__setattr__(self, "name", agent_type if self.key is None else f"{agent_type}/{self.key}")


class Address(NamedTuple):
    """What a message turned out to be, and for which agent.

    On the subject of calls, a keyed agent is also sent events, and its type questions where an agent lives: the
    envelope's type tells them apart.
    """

    kind: InboundKind
    key: str | None
    """The agent's key; None for an event that no agent here gets."""
    topic: TopicId | None
    """The topic of an event; None for everything else."""


class LoggedCall:
    """A call that was received and is not answered yet, as the call log knows it."""

    __slots__ = ("accept_to", "accepted", "arrived", "call_id")

    def __init__(self, call_id: str, arrived: float) -> None:
        self.call_id = call_id
        """The call's reply subject."""
        self.arrived = arrived
        """The event loop's time."""
        self.accept_to: str | None = None
        """The subject on which to accept it. None until its envelope is read, and for plain calls: they never are."""
        self.accepted = False
        """Whether its caller was told which worker has it."""


@dataclass(slots=True)
class Answer:
    """The reply to a message, ready to be sent."""

    body: bytes
    headers: dict[str, str] | None = None


class Inbound:
    """One message on its way to its handler."""

    __slots__ = (
        "arrived",
        "body",
        "call",
        "chain",
        "handler_id",
        "key",
        "kind",
        "late",
        "message",
        "route",
        "settlement",
        "size",
        "task",
        "token",
        "topic",
        "waiting",
    )

    def __init__(self, route: Route, message: Msg, size: int, arrived: float) -> None:
        self.route = route
        self.kind = route.kind
        self.settlement = route.settlement
        self.message = message
        self.size = size
        """Bytes that it takes in the intake."""
        self.arrived = arrived
        """The event loop's time."""
        self.body: Envelope | None = None
        """Its envelope. None before it is read, and for a plain body."""
        self.key: str | None = None
        """The key of its agent. None before it is read, and for an event that no agent here gets."""
        self.topic: TopicId | None = None
        """The topic of an event. None before it is read, and for everything else."""
        self.chain: tuple[str, ...] = ()
        """The chain that its envelope names. Empty before it is read."""
        self.call: LoggedCall | None = None
        """Its entry in the call log; None for what is not settled by a reply."""
        self.task: asyncio.Task[None] | None = None
        """The task that handles it; None before and after that."""
        self.handler_id = ""
        """Id of its handler in the mailbox of a keyed agent. Empty for other agents, and before it asks to enter."""
        self.token: CancellationToken | None = None
        """The token that its handler was given; None before that."""
        self.waiting = True
        """Whether its size still counts towards the bound of the intake."""
        self.late = False
        """Whether it may have waited in the socket while the process stood still."""

    def identify(self, address: Address) -> None:
        """Note what the message turned out to be. Its settlement changes where a call turned out to be an event.

        Raises `CannotDecode` where the settlement finds that the envelope asks for something impossible.
        """
        body = self.body
        if body is not None and "chain" in body.attributes:
            self.chain = chain_of(body)
        if address.kind is not self.kind:
            self.kind = address.kind
            if address.kind is EVENT:
                self.settlement = self.settlement.as_event(self)
        self.key, self.topic = address.key, address.topic
        self.settlement.identified(self)

    @property
    def is_for_handler(self) -> bool:
        """Whether it is a message for an agent's handler, and not one for natsrt itself."""
        return self.kind is CALL or self.kind is EVENT

    @property
    def can_be_sent_back(self) -> bool:
        """Whether its sender sends it again if it is refused: natsrt's callers do, all others do not."""
        return self.kind is CALL and self.body is not None

    @property
    def agent_type(self) -> str:
        return self.route.hosted.agent_type


class Settlement(ABC):
    """How messages end. One object serves all messages of a kind; what differs between them is in the `Inbound`.

    Exactly one of `handled`, `failed`, `refused` and `refuse_unread` ends each message. A durable consumer's settlement
    acknowledges in `handled` and asks for redelivery in the others; a stream's sends its last part in `handled`.
    """

    wants_answer: bool
    """Whether `handled` needs an answer: a handler's result is encoded only then."""

    def take(self, inbound: Inbound) -> None:  # noqa: B027 (most have nothing to do)
        """The message was taken in. Called in the read loop: cheap, never waits."""

    def identified(self, inbound: Inbound) -> None:  # noqa: B027
        """The message was read. Raises `CannotDecode` where its envelope asks for something impossible."""

    def as_event(self, inbound: Inbound) -> Settlement:
        """The settlement of a message that turned out to be an event."""
        return self

    def refuse_unread(self, inbound: Inbound) -> bool:
        """Refuse a message for which there is no room, if that needs no look at its body. Returns whether it did."""
        return False

    @abstractmethod
    def handled(self, inbound: Inbound, answer: Answer | None) -> Awaitable[None]:
        """Its handler returned; ``answer`` is None where `wants_answer` is not set."""

    @abstractmethod
    def failed(self, inbound: Inbound, error: BaseException, source: str) -> Awaitable[None]:
        """It could not be read, or its handler raised. ``source`` names the agent as in an envelope's ``source``."""

    @abstractmethod
    def refused(self, inbound: Inbound, error: Exception) -> Awaitable[None]:
        """It was not handled, and may be sent again, here or elsewhere."""


class EventDropped(Exception):
    """An intervention handler dropped a plain event, whose publisher has none of its own. That is no failure."""


class SentBack(Exception):
    """A call was not handled here, and its caller is to send it again. ``error`` is what to tell it."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        super().__init__(str(error))


handling: ContextVar[Inbound | None] = ContextVar("natsrt_handling", default=None)
"""The message that the present code handles, if it may be part of a deadlock: it is for a keyed agent, or has a chain.
None otherwise."""


def waiting_handler() -> Inbound | None:
    """`handling`, if the present task is the handler's own: what this task awaits, the handler waits for."""
    inbound = handling.get()
    return inbound if inbound is not None and inbound.task is asyncio.current_task() else None
