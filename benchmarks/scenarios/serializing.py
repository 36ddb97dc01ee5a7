"""Duration of writing and reading messages of several kinds, with natsrt's serializers and with AutoGen's own."""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from autogen_core import MessageSerializer, try_get_known_serializers_for_type
from pydantic import BaseModel

from benchmarks.harness import LESS, Goal, Measure, Sample, Scenario, Variant
from benchmarks.peers import Peer
from benchmarks.roles import Role
from benchmarks.teams import Team
from benchmarks.work import Text
from natsrt.wire.serialization import serializer_for

OURS, THEIRS = "natsrt", "AutoGen"
_AT_MOST = 2.5
"""The goal for the duration, as a ratio to AutoGen's serializer."""


class Price(BaseModel):
    amount: float
    currency: str
    due: datetime.datetime


class Order(BaseModel):
    """Holds five models in fields of several kinds."""

    id: str
    net: Price
    gross: Price
    discount: Price | None
    parts: list[Price]


@dataclass(frozen=True)
class Kind:
    """A kind of message.

    Args:
        name: Part of the scenario's name on the command line.
        title: Part of the table's title.
        make: Creates a message.
        exact: Whether AutoGen's own serializer can read what it writes. If not, there is no goal, and for AutoGen the
            reading of the messages inside is measured instead.
    """

    name: str
    title: str
    make: Callable[[], Any]
    exact: bool = True


def _price() -> Price:
    return Price(amount=1.5, currency="EUR", due=datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC))


def _order() -> Order:
    return Order(id="1", net=_price(), gross=_price(), discount=_price(), parts=[_price(), _price()])


def _text_message() -> Any:
    from autogen_agentchat.messages import TextMessage
    from autogen_core.models import RequestUsage

    return TextMessage(source="user", content="hello", models_usage=RequestUsage(1, 2), metadata={"a": "b"})


def _group_chat_start() -> Any:
    from autogen_agentchat.teams._group_chat._events import GroupChatStart

    return GroupChatStart(messages=[_text_message() for _ in range(3)])


KINDS = (
    Kind("dataclass", "a dataclass with a text", lambda: Text("hello")),
    Kind("model", "a Pydantic model with three plain fields", _price),
    Kind("nested", "a Pydantic model that holds five others", _order),
    Kind("agentchat", "AgentChat's `TextMessage`", _text_message),
    Kind("group-chat", "AgentChat's `GroupChatStart` with three messages", _group_chat_start, exact=False),
)


class Serializing(Role):
    """Writes and reads messages, and measures the time."""

    async def start(self) -> None:
        """Do nothing."""

    async def stop(self) -> None:
        """Do nothing."""

    async def write(self, kind: str, by: str, count: int) -> float:
        """Write one message ``count`` times. Returns the seconds."""
        message = _kind(kind).make()
        serialize = _serializer(by, type(message)).serialize
        return _timed(lambda: serialize(message), count)

    async def read(self, kind: str, by: str, count: int) -> float:
        """Read one payload ``count`` times. Returns the seconds.

        Raises:
            RuntimeError: The message that was read is not the one that was written.
        """
        described = _kind(kind)
        message = described.make()
        parts = [message] if by == OURS or described.exact else message.messages
        reads = []
        for part in parts:
            serializer = _serializer(by, type(part))
            reads.append((serializer.deserialize, serializer.serialize(part)))
            if serializer.deserialize(reads[-1][1]) != part:
                raise RuntimeError(f"{by} did not read what it wrote")

        def read_all() -> None:
            for deserialize, payload in reads:
                deserialize(payload)

        return _timed(read_all, count)


def _kind(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


def _serializer(by: str, cls: type) -> MessageSerializer[Any]:
    return serializer_for(cls) if by == OURS else try_get_known_serializers_for_type(cls)[0]


def _timed(work: Callable[[], Any], count: int) -> float:
    work()
    gc.collect()
    began = time.perf_counter()
    for _ in range(count):
        work()
    return time.perf_counter() - began


ROLES: dict[str, type[Role]] = {"caller": Serializing}
ONE_PROCESS = Peer(
    name="serializers", title="one process", module=__name__, has_workers=False, requires=("autogen_agentchat",)
)


def scenarios(short: bool) -> Iterator[Scenario]:
    for kind in KINDS:
        for direction, verb in (("write", "Writing"), ("read", "Reading")):
            apart = direction == "read" and not kind.exact
            yield Scenario(
                name=f"{direction}-{kind.name}",
                title=f"{verb} {kind.title}"
                + ("; AutoGen cannot, and reads the messages in it instead" if apart else ""),
                unit="µs",
                better=LESS,
                baseline=THEIRS,
                most=100_000,
                variants=[
                    Variant(name=by, peer=ONE_PROCESS, measure=_measure(direction, kind.name, by))
                    for by in (OURS, THEIRS)
                ],
                goals=[
                    Goal(
                        text=f"{verb.lower()} {kind.title}, against AutoGen's serializer",
                        of=OURS,
                        against=THEIRS,
                        at_most=_AT_MOST,
                    )
                ]
                if kind.exact
                else [],
            )


def _measure(direction: str, kind: str, by: str) -> Measure:
    async def measure(team: Team, count: int) -> Sample:
        seconds = await team.caller.ask(direction, kind=kind, by=by, count=count)
        return Sample(value=seconds / count * 1e6, seconds=seconds)

    return measure
