"""Incoming messages: the kind of each one, its agent, and how it is settled.

Rules:

1. The subscription on which a message arrives gives it a `Route`. The route contains the agent type and the expected
   kind of the message. The body can change the kind only as described in `Address`.
2. Every message has a `Settlement`, which comes from its route: a call is settled by a reply, an event by nothing. Code
   that settles a message calls the settlement, and does not depend on the kind of the message.
"""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol

from autogen_core import CancellationToken, Subscription, TopicId
from nats.aio.msg import Msg
from nats.nuid import NUID

from natsrt.agents.chain import Chain, Handler, chain_of
from natsrt.agents.hosted_type import HostedType
from natsrt.errors import UndeliveredCall
from natsrt.wire import envelope
from natsrt.wire.envelope import TYPE_HEADER, Envelope
from natsrt.wire.part_messages import STREAM_HEADER
from natsrt.wire.stored_events import StoredEvent


class InboundKind(Enum):
    """The kind of a message. The values are used in logs."""

    CALL = "call"
    EVENT = "event"
    CONTROL = "control"
    LOCATE = "question about the owner of an agent"


CALL, EVENT, CONTROL, LOCATE = InboundKind
"""The members as module variables: a look-up in the class would take a tenth of a microsecond for every message."""
_ENVELOPES = {CALL: envelope.CALL, EVENT: envelope.EVENT, CONTROL: envelope.CONTROL}


@dataclass(frozen=True, slots=True)
class Route:
    """The purpose of a subscription. It depends only on the subject, never on the body of a message.

    Args:
        kind: The expected kind of the messages.
        hosted: The agent type.
        settlement: How the messages are settled.
        key: The agent's key, for the subjects of one agent; None for the subjects of a whole type.
        custom: AutoGen's ``Subscription`` object that decides on each event; None for ordinary subscriptions.
    """

    kind: InboundKind
    hosted: HostedType
    settlement: Settlement
    key: str | None = None
    custom: Subscription | None = None
    name: str = field(init=False)
    """The agent type, or type/key. Used in errors and as the name of tasks."""
    expects: str = field(init=False)
    """The expected type of the envelopes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "expects", _ENVELOPES[self.kind])
        agent_type = self.hosted.agent_type
        object.__setattr__(self, "name", agent_type if self.key is None else f"{agent_type}/{self.key}")


Address = tuple[InboundKind, str | None, TopicId | None]
"""The kind, the agent's key and the topic of a message, after its envelope was read.

The key is None for an event that is not for an agent on this worker; the topic is None for everything but events. It is
a plain tuple, because there is one for each message, and a tuple with names costs ten times as much.

Events for a keyed agent arrive on the subject of its calls, and questions about the owner of an agent arrive on the
subject of calls to its type. The type of the envelope distinguishes them from calls.
"""


class LoggedCall:
    """A call in the call log that was received and is not answered yet."""

    __slots__ = ("accept_to", "accepted", "also", "arrived", "call_id", "on_abandoned", "supersedes", "wanted_until")

    def __init__(self, call_id: str, arrived: float) -> None:
        self.call_id: str = call_id
        """The call's reply subject."""
        self.arrived: float = arrived
        """When it arrived, in seconds by the event loop's clock."""
        self.accept_to: str | None = None
        """The subject on which to accept it. None until its envelope is read, and for plain calls, which are never
        accepted."""
        self.accepted: bool = False
        """True if its caller was told which worker has it."""
        self.supersedes: tuple[str, ...] = ()
        """The ids of the copies of this call that were sent before, and are not handled."""
        self.also: tuple[str, ...] = ()
        """The ids of the copies that were sent again later, and get the same answer."""
        self.wanted_until: float = math.inf
        """Until when its caller waits for the reply, by the event loop's clock. Infinity if the caller set no deadline,
        minus infinity if it has given the call up."""
        self.on_abandoned: Callable[[], None] | None = None
        """Called when its caller gives it up. None if nothing is to be done then, such as while its handler runs."""

    def abandon(self) -> None:
        """Its caller has given it up."""
        self.wanted_until = -math.inf
        if self.on_abandoned is not None:
            self.on_abandoned()


@dataclass(slots=True)
class Answer:
    """The reply to a message, ready to be sent."""

    body: bytes
    headers: dict[str, str] | None = None


class Stream(Protocol):
    """The parts of the reply to one call."""

    def end(self) -> None:
        """The handler has ended: no more parts are sent, and it is not stopped any more."""

    @property
    def attributes(self) -> str:
        """The attributes of the reply that say how many parts there were, with a leading comma."""

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a plain error that say how many items there were."""

    def reported(self, error: BaseException) -> BaseException:
        """The error that ends the parts, for one that the handler has raised."""

    def awaited(self) -> Iterable[tuple[str, asyncio.Task[Any]]]:
        """The reply subjects of the calls that answers to the handler wait for, each with the handler's task that waits
        for the answer.
        """


class Inbound:
    """One incoming message."""

    __slots__ = (
        "arrived",
        "begun",
        "body",
        "call",
        "chain",
        "event",
        "handler",
        "key",
        "kind",
        "late",
        "message",
        "route",
        "settlement",
        "size",
        "stream",
        "task",
        "token",
        "topic",
        "waiting",
    )

    def __init__(self, route: Route, message: Msg, size: int, arrived: float) -> None:
        self.route: Route = route
        self.kind: InboundKind = route.kind
        self.settlement: Settlement = route.settlement
        self.message: Msg = message
        self.size: int = size
        """Its size in the intake, in bytes."""
        self.arrived: float = arrived
        """When it arrived, in seconds by the event loop's clock."""
        self.body: Envelope | None = None
        """Its envelope. None before it is read, and for a plain body."""
        self.key: str | None = None
        """The key of its agent. None before it is read, and for an event that is not for an agent on this worker."""
        self.topic: TopicId | None = None
        """The topic of an event. None before it is read, and for other kinds of messages."""
        self.event: StoredEvent | None = None
        """Where the event is stored that it delivers, if its sender wants to know how it was handled. None before it is
        read, and for all other messages."""
        self.chain: Chain = ()
        """The chain in its envelope. Empty before it is read."""
        self.call: LoggedCall | None = None
        """Its entry in the call log; None for a message that is not settled by a reply."""
        self.stream: Stream | None = None
        """What its handler sends to a caller that streams the call; None for all other messages."""
        self.task: asyncio.Task[None] | None = None
        """The task that handles it; None before and after that."""
        self.handler: Handler | None = None
        """Its handler in the mailbox of a keyed agent. None for other agents, and before it asks to enter."""
        self.token: CancellationToken | None = None
        """The cancellation token for its handler; None before it is read."""
        self.begun: bool = False
        """True once its handler was called."""
        self.waiting: bool = True
        """True while its size counts towards the limit of the intake."""
        self.late: bool = False
        """True if it may have waited in the socket while the process did not run."""

    def identify(self, address: Address) -> None:
        """Set the address of the message. If an expected call turned out to be an event, its settlement changes too.

        Raises `CannotDecode` if the settlement refuses something in the envelope, `OtherCopy`, and `SentBack`.
        """
        body = self.body
        if body is not None and "chain" in body.attributes:
            self.chain = chain_of(body)
        kind, self.key, self.topic = address
        if kind is not self.kind:
            self.kind = kind
            if kind is EVENT:
                self.settlement = self.settlement.as_event(self)
        self.settlement.identified(self)

    def cancel(self) -> None:
        """Cancel the task that handles it, if there is one."""
        if self.task is not None:
            self.task.cancel()

    def refuse_unwanted(self) -> None:
        """Raise `SentBack` if nobody waits for the reply: the deadline has passed, or the caller has given the call up.

        Call it before the handler starts. A handler that runs is not stopped.
        """
        call, token = self.call, self.token
        if call is None:
            return
        if call.wanted_until != math.inf and asyncio.get_running_loop().time() >= call.wanted_until:
            raise self.unwanted()
        if token is not None and token.is_cancelled():
            raise self.unwanted()

    def unwanted(self) -> SentBack:
        """Return the exception for a call that is not handled because nobody waits for its reply."""
        agent = f"{self.agent_type}/{self.key}"
        return SentBack(
            UndeliveredCall(agent, f"the call to {agent} was not handled: its caller does not wait any more")
        )

    @property
    def streams_plainly(self) -> bool:
        """True for the call of a plain NATS client that wants every item of the reply."""
        return self.plain_stream is not None

    @property
    def plain_stream(self) -> str | None:
        """The value of the header with which a plain NATS client asks for every item of the reply to its call. None for
        all other messages."""
        headers = self.message.headers
        return (
            headers.get(STREAM_HEADER) if headers is not None and self.body is None and self.call is not None else None
        )

    @property
    def is_out_of_turn(self) -> bool:
        """True for a message that does not wait for its turn with its keyed agent: see `natsrt.out_of_turn`."""
        hosted = self.route.hosted
        if hosted.keyed is None or not hosted.out_of_turn or self.event is not None:
            return False
        if self.body is not None:
            return hosted.is_out_of_turn(self.body.text("messagetype") or "", self.body.text("messageclass"))
        return hosted.is_out_of_turn((self.message.headers or {}).get(TYPE_HEADER, ""), None)

    @property
    def can_be_sent_back(self) -> bool:
        """True if its sender sends it again when it is refused. natsrt's callers do this; other callers do not.

        So do those who deliver events of a stream and wait for the answer."""
        return self.body is not None and (self.kind is CALL or self.event is not None)

    @property
    def agent_type(self) -> str:
        return self.route.hosted.agent_type


class Settlement(ABC):
    """How messages are settled. One object serves all messages of a kind; their individual state is in the `Inbound`.

    Each message is settled by exactly one of `handled`, `failed`, `refused` and `refuse_unread`. For example, the
    settlement of events of durable topics acknowledges in `handled` and asks for redelivery in the others. That of a
    stream would send its last part in `handled`.
    """

    wants_answer: bool
    """True if `handled` needs an answer. The result of a handler is encoded only then."""
    has_own_limit: bool = False
    """True if this settlement itself limits the messages that wait, so that the intake takes all of them in."""

    looks_before_handlers: bool = False
    """True if `begins` is to be awaited before handlers."""

    def kept_for(self, inbound: Inbound) -> float | None:
        """For how many seconds the answer is kept; None: until its caller has read it."""
        return None

    def take(self, inbound: Inbound) -> bool:
        """Called when the message is taken in. This is in the read loop, so it must be cheap and must not block.

        Returns False if the message is not to be handled. It counts as settled then.
        """
        return True

    def identified(self, inbound: Inbound) -> None:  # noqa: B027
        """Called when the message was read, in the task that handles it.

        Raises `CannotDecode` if something in its envelope is refused, `OtherCopy`, and `SentBack`.
        """

    def as_event(self, inbound: Inbound) -> Settlement:
        """Return the settlement for a message that turned out to be an event. Raises `CannotDecode`."""
        return self

    async def begins(self, inbound: Inbound) -> None:  # noqa: B027
        """Called when the handler of the message is about to begin. Raises `EventDropped` if it must not, and
        `SentBack`."""

    def waits_for_place(self, inbound: Inbound, refuse: Callable[[Exception], None]) -> None:  # noqa: B027
        """Called when the message may have to wait until its handler may start.

        ``refuse`` ends that wait with an error, and has no effect after it.
        """

    def plain_id(self, inbound: Inbound) -> str:
        """Return the message id of a plain body, which has none itself."""
        return NUID().next().decode()

    def refuse_unread(self, inbound: Inbound) -> bool:
        """Refuse a message for which there is no room, if its body need not be read for that.

        Returns True if the message was refused.
        """
        return False

    @abstractmethod
    def handled(self, inbound: Inbound, answer: Answer | None) -> Awaitable[None] | None:
        """Settle a message whose handler returned. ``answer`` is None if `wants_answer` is False.

        Returns what is to be awaited; None if nothing is.
        """

    @abstractmethod
    def failed(self, inbound: Inbound, error: BaseException, source: str) -> Awaitable[None]:
        """Settle a message that could not be read, or whose handler raised.

        ``source`` names the agent as in an envelope's ``source``.
        """

    @abstractmethod
    def refused(self, inbound: Inbound, error: Exception) -> Awaitable[None]:
        """Settle a message that was not handled, and that may be sent again, here or to another worker."""


class OtherCopy(Exception):
    """Another copy of a call is or was handled here, and this one gets its answer. It is not settled itself."""


class EventDropped(Exception):
    """An intervention handler of this worker dropped an event of a plain NATS client. This is not a failure."""


class SentBack(Exception):
    """A call was not handled here, and its caller is to send it again. ``error`` is reported to the caller."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        super().__init__(str(error))


class Answering:
    """The answer to a question of a handler."""

    __slots__ = ("task",)

    def __init__(self) -> None:
        self.task: asyncio.Task[Any] | None = None
        """The task that makes it; None until there is one."""

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        if self.task is not None:
            self.task.cancel()


handling: ContextVar[Inbound | Answering | None] = ContextVar("natsrt_handling", default=None)
"""The message that the current code handles, if it may be part of a deadlock: it is for a keyed agent, or has a chain.
Or the question that it answers. None otherwise."""


class Awaiting(NamedTuple):
    """A task that makes a call for the handler of a message, or for an answer. These may await this task, or be it."""

    inbound: Inbound | Answering
    task: asyncio.Task[Any] | None


Waiters = dict[Inbound | Answering, list[tuple[str, asyncio.Task[Any]]]]


def waiters(awaited: Iterable[tuple[str, object]]) -> Waiters:
    """By what makes them, the calls in ``awaited``: the reply subject and the task of each.

    ``awaited`` has the reply subjects of calls, each with what `awaiting` returned when the call was made.
    """
    found: Waiters = {}
    for reply, one in awaited:
        if isinstance(one, Awaiting) and one.task is not None:
            found.setdefault(one.inbound, []).append((reply, one.task))
    return found


def awaiting() -> Awaiting | None:
    """What the current code makes calls for; None if that cannot be part of a deadlock."""
    inbound = handling.get()
    return None if inbound is None else Awaiting(inbound, asyncio.current_task())
