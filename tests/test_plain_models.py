"""Pydantic models that hold other models: carried by Pydantic alone where that is exact, else field by field."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import math
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar

import orjson
import pydantic.dataclasses
import pytest
from autogen_agentchat.messages import TextMessage
from autogen_core.models import RequestUsage
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    computed_field,
    create_model,
    field_serializer,
    field_validator,
)

from natsrt.errors import CannotDecode, CannotSerialize
from natsrt.wire.compiler import Codecs
from natsrt.wire.model_codec import ModelCodec
from natsrt.wire.serialization import Serialization, serializer_for

T = TypeVar("T")


class Point(BaseModel):
    x: int
    y: float = 0.0


class Named(Point):
    name: str = "n"


class Tree(BaseModel):
    value: int
    children: list[Tree] = []
    parent: Tree | None = None


class Message(BaseModel):
    id: str
    at: datetime.datetime
    kind: Literal["message"] = "message"
    amount: decimal.Decimal = decimal.Decimal("1.10")
    key: uuid.UUID = uuid.UUID(int=5)
    point: Point | None = None
    points: list[Point] = []
    by_name: dict[str, Point] = {}
    labels: dict[str, str] = {}
    big: int = 0


class Aliased(BaseModel):
    inner: Point = Field(alias="innerPoint")


class HoldsAliased(BaseModel):
    held: Aliased


class OneWayAlias(BaseModel):
    x: int = Field(validation_alias="ex")


class HoldsOneWayAlias(BaseModel):
    held: OneWayAlias


class Box(BaseModel, Generic[T]):
    content: T
    point: Point


class Computed(BaseModel):
    point: Point

    @computed_field  # type: ignore[prop-decorator]
    @property
    def double(self) -> int:
        return self.point.x * 2


class Upper(BaseModel):
    text: str

    @field_serializer("text")
    def _upper(self, text: str) -> str:
        return text.upper()


class HoldsUpper(BaseModel):
    held: Upper


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    point: Point


class HoldsOpen(BaseModel):
    held: Open


class HoldsUnion(BaseModel):
    either: Point | Message
    point: Point


class HoldsHoldsUnion(BaseModel):
    held: HoldsUnion


class HoldsSecret(BaseModel):
    secret: SecretStr
    point: Point


class Older(BaseModel):
    point: Point

    @field_validator("point", mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        return {"x": value["ex"]} if isinstance(value, dict) and "ex" in value else value


class Functional(BaseModel):
    n: Annotated[int, AfterValidator(abs)]


class HoldsFunctional(BaseModel):
    held: Functional


class Configured(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="strings")
    y: float = 0.0


class First(BaseModel):
    second: Second | None = None
    either: Point | Message | None = None


class Second(BaseModel):
    first: First | None = None


@dataclass
class Usage:
    """A dataclass as AutoGen's ``RequestUsage``, which AgentChat's messages hold."""

    tokens: int
    share: float = 1.0
    point: Point | None = None
    parts: list[Usage] = dataclasses.field(default_factory=list)


@dataclass
class MoreUsage(Usage):
    model: str = ""


class HoldsUsage(BaseModel):
    usage: Usage | None = None
    by_name: dict[str, Usage] = {}


@dataclass
class Names:
    first: str


@dataclass(init=False)
class OwnConstructor:
    n: int

    def __init__(self, n: int) -> None:
        self.n = n
        self.twice = n * 2


class Undecorated(Names):
    def __init__(self, first: str) -> None:
        super().__init__(first)
        self.twice = first * 2


@dataclass
class WithAnything:
    anything: Any


@dataclass
class WithInitVar:
    n: int
    more: dataclasses.InitVar[int] = 0


@dataclass
class WithLateField:
    n: int
    late: int = dataclasses.field(default=0, init=False)


@dataclass
class WithMetadata:
    n: Annotated[int, Field(alias="en")] = 0


@dataclass
class WithPydanticDefault:
    n: int = Field(default=0, exclude=True)


@dataclass
class WithNoneForText:
    text: str = None  # type: ignore[assignment]


@dataclass(slots=True)
class WithSlots:
    n: int = 0


@pydantic.dataclasses.dataclass
class OfPydantic:
    n: int = 0

    @pydantic.field_serializer("n")
    def _double(self, n: int) -> int:
        return n * 2


DATACLASSES_READ_OTHERWISE = [
    OwnConstructor(1),
    Undecorated("a"),
    WithAnything(Point(x=1)),
    WithInitVar(1),
    WithLateField(1),
    WithMetadata(1),
    WithPydanticDefault(1),
    WithNoneForText(),
    WithSlots(1),
    OfPydantic(1),
]
"""Dataclasses for which Pydantic's way differs from natsrt's, or might."""


class Lower(BaseModel):
    """Pydantic applies a model's settings to the dataclasses in it."""

    model_config = ConfigDict(str_to_lower=True)
    names: Names


class HoldsNames(BaseModel):
    names: Names
    lower: Lower


def message(**fields: Any) -> Message:
    return Message(id="m", at=datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC), **fields)


PLAIN = [
    message(),
    message(point=Point(x=1), points=[Point(x=2, y=2.5)], by_name={"a": Point(x=3)}, labels={"b": "c"}, big=2**70),
    message(labels={"$type": "Point", "x": "$type"}),
    Tree(value=1, children=[Tree(value=2, parent=Tree(value=3))]),
    Aliased(innerPoint=Point(x=1)),
    HoldsAliased(held=Aliased(innerPoint=Point(x=1))),
    Box[str](content="c", point=Point(x=1)),
    Computed(point=Point(x=4)),
    Older(point=Point(x=1)),
    HoldsUsage(),
    HoldsUsage(usage=Usage(1, 2.5, Point(x=1), [Usage(2)]), by_name={"a": Usage(3)}),
]
"""Values that Pydantic carries as they are."""

NOT_PLAIN = [
    Box[Any](content=Named(x=1), point=Point(x=1)),
    HoldsOneWayAlias(held=OneWayAlias(ex=1)),
    HoldsOpen(held=Open(point=Point(x=1), more=Point(x=2))),
    HoldsUnion(either=Point(x=1), point=Point(x=2)),
    HoldsHoldsUnion(held=HoldsUnion(either=message(), point=Point(x=2))),
    First(second=Second(first=First(either=Point(x=1)))),
    Second(first=First(either=message())),
    Box[Point](content=Named(x=1, name="a subclass"), point=Named(x=2)),
    Tree.model_construct(value=1, children=[Named(x=1)], parent=None),
    HoldsUsage(usage=MoreUsage(1, model="a subclass")),
    HoldsUsage(usage=Usage(1, point=Named(x=1, name="a subclass"))),
    HoldsUsage(by_name={"a": Usage(1, parts=[MoreUsage(2, model="a subclass")])}),
    Lower(names=Names("As It Was")),
    HoldsNames(names=Names("As It Was"), lower=Lower(names=Names("As It Was"))),
]
"""Values that need natsrt's own way: a class's name, or another look at each field."""


def serialization(*values: BaseModel) -> Serialization:
    made = Serialization()
    for cls in (Point, Named, Message, Usage, MoreUsage, *{type(value) for value in values}):
        made.add_class(cls)
    return made


def sent(value: BaseModel) -> tuple[bytes, Any]:
    """What travels, and what arrives."""
    one = serialization(value)
    encoded = one.encode(value)
    return encoded.payload, one.decode(*encoded)


@contextmanager
def field_by_field(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without Pydantic's own way for models that hold others."""
    with monkeypatch.context() as patch:
        patch.setattr(ModelCodec, "_plain_fields", None)
        yield


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types at every depth."""
    if type(one) is not type(other):
        return False
    if isinstance(one, BaseModel):
        return same(one.__dict__, other.__dict__) and same(one.model_extra, other.model_extra)
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def name_of(value: BaseModel) -> str:
    return type(value).__name__


@pytest.mark.parametrize("value", PLAIN, ids=name_of)
def test_a_plain_value_arrives_as_it_was_and_travels_as_it_does_field_by_field(
    value: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload, arrived = sent(value)
    assert same(arrived, value)
    assert payload == value.__pydantic_serializer__.to_json(value, by_alias=True, round_trip=True)
    with field_by_field(monkeypatch):
        other_payload, other_arrived = sent(value)
        assert same(other_arrived, value)
        assert same(serialization(value).decode(type(value).__name__, "application/json", payload), value)
    assert orjson.loads(other_payload) == orjson.loads(payload) or b'"big":1180591620717411303424' in payload
    assert same(serialization(value).decode(type(value).__name__, "application/json", other_payload), value)


@pytest.mark.parametrize("value", NOT_PLAIN, ids=name_of)
def test_a_value_that_is_not_plain_travels_as_it_does_field_by_field(
    value: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        payload, arrived = sent(value)
    except CannotSerialize:
        payload, arrived = b"refused", None
    else:
        assert same(arrived, value)
    with field_by_field(monkeypatch):
        if arrived is None:
            with pytest.raises(CannotSerialize):
                sent(value)
        else:
            assert same(sent(value)[1], value)
            assert orjson.loads(sent(value)[0]) == orjson.loads(payload)


@pytest.mark.parametrize(
    "value",
    [
        message(points=[Named(x=1, name="kept")]),
        message(point=Named(x=1, name="kept")),
        message(by_name={"a": Named(x=1, name="kept")}),
        Tree(value=1, children=[Tree(value=2, children=[Tree(value=3)])]),
    ],
    ids=["list", "optional", "dict", "tree"],
)
def test_a_subclass_at_any_depth_keeps_its_class_and_fields(value: BaseModel) -> None:
    payload, arrived = sent(value)
    assert same(arrived, value)
    assert (b'"$type":"Named"' in payload) == (name_of(value) == "Message")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_is_refused_at_every_depth(number: float) -> None:
    with pytest.raises(CannotSerialize):
        sent(message(points=[Point(x=1), Point.model_construct(x=1, y=number)]))


@pytest.mark.parametrize(
    "wrong",
    [
        message(points=[Point.model_construct(x="text", y=1.0)]),
        message().model_copy(update={"labels": {"a": 1}}),
        message().model_copy(update={"labels": {1: "a"}}),
        message().model_copy(update={"points": (Point(x=1),)}),
        message().model_copy(update={"kind": "other"}),
        message().model_copy(update={"id": 5}),
        Tree.model_construct(value=1),
        HoldsFunctional(held=Functional.model_construct(n="5")),
        HoldsUsage(usage=Usage("1")),  # type: ignore[arg-type]
        HoldsUsage(usage=Usage(True)),
        HoldsUsage(usage=Usage(2**70, math.nan)),
        HoldsUsage(usage=Usage(1, parts=(Usage(2),))),  # type: ignore[arg-type]
        HoldsUsage.model_construct(usage={"tokens": 1}, by_name={}),
    ],
    ids=[
        *("text for int", "int for text", "int key", "tuple for list", "literal", "int", "missing", "functional"),
        *("text in a dataclass", "bool in a dataclass", "NaN in a dataclass", "tuple in a dataclass", "no dataclass"),
    ],
)
def test_a_value_that_is_not_as_declared_does_not_arrive_as_something_else(wrong: BaseModel) -> None:
    try:
        arrived = sent(wrong)[1]
    except (CannotSerialize, CannotDecode):
        return
    assert same(arrived, wrong)


@pytest.mark.parametrize(
    "cls", [HoldsOneWayAlias, HoldsUpper, HoldsOpen, HoldsHoldsUnion, HoldsSecret, HoldsFunctional, Configured, First]
)
def test_what_pydantic_might_change_is_never_left_to_it(cls: type[BaseModel]) -> None:
    assert Codecs().of(cls).plain_check() is None


@pytest.mark.parametrize("cls", [Point, Message, Tree, HoldsAliased, Computed, Older, Box[str]])
def test_what_pydantic_carries_exactly_is_left_to_it(cls: type[BaseModel]) -> None:
    assert Codecs().of(cls).plain_check() is not None


def holding(cls: type) -> type[BaseModel]:
    """A model with a field of the class."""
    return create_model(f"Holds{cls.__name__}", held=(cls, ...))


@pytest.mark.parametrize("value", DATACLASSES_READ_OTHERWISE, ids=lambda value: type(value).__name__)
def test_a_dataclass_that_pydantic_would_read_otherwise_is_never_left_to_it(value: Any) -> None:
    cls = holding(type(value))
    assert Codecs().of(cls).plain_check() is None
    holder = cls(held=value)
    arrived = sent(holder)[1]
    assert same(arrived, holder)
    assert getattr(arrived.held, "twice", None) == getattr(value, "twice", None), "its constructor was not called"


@pytest.mark.parametrize("cls", [Usage, MoreUsage, Names])
def test_a_dataclass_that_pydantic_carries_exactly_is_left_to_it(cls: type) -> None:
    assert Codecs().of(holding(cls)).plain_check() is not None


def test_an_agentchat_message_is_left_to_pydantic() -> None:
    value = TextMessage(content="c", source="s", models_usage=RequestUsage(1, 2), metadata={"$type": "x"})
    payload, arrived = sent(value)
    assert same(arrived, value)
    assert payload == value.__pydantic_serializer__.to_json(value)
    assert Codecs().of(TextMessage).plain_check() is not None


def test_a_model_with_a_serializer_of_its_own_is_left_to_pydantic_as_long_as_it_keeps_the_value() -> None:
    kept = HoldsUpper(held=Upper(text="A"))
    assert same(sent(kept)[1], kept)
    with pytest.raises(CannotSerialize, match="held.text: .* would arrive changed"):
        sent(HoldsUpper(held=Upper(text="a")))


def test_a_validator_that_runs_before_gets_what_the_sender_wrote() -> None:
    serializer = serializer_for(Older)
    assert serializer.deserialize(b'{"point": {"ex": 5}}') == Older(point=Point(x=5))


def test_extra_fields_of_a_newer_sender_are_ignored_at_every_depth() -> None:
    serializer = serializer_for(HoldsAliased)
    assert serializer.deserialize(b'{"new": 1, "held": {"innerPoint": {"x": 1, "new": 2}}}') == HoldsAliased(
        held=Aliased(innerPoint=Point(x=1))
    )


usages = st.builds(Usage, st.integers(), st.floats(allow_nan=False, allow_infinity=False))
usages = st.one_of(
    st.builds(Usage, st.integers(), parts=st.lists(usages, max_size=2)),
    st.builds(MoreUsage, model=st.text(), tokens=st.just(1)),
)
points = st.builds(Point, x=st.integers(), y=st.floats(allow_nan=False, allow_infinity=False))
named = st.builds(Named, x=st.integers(), name=st.text())
either = st.one_of(points, named)
messages = st.builds(
    Message,
    id=st.text(),
    at=st.datetimes(timezones=st.just(datetime.UTC)),
    amount=st.decimals(allow_nan=False, allow_infinity=False, places=3),
    key=st.uuids(),
    point=st.none() | either,
    points=st.lists(either, max_size=3),
    by_name=st.dictionaries(st.text(), either, max_size=3),
    labels=st.dictionaries(st.text() | st.just("$type"), st.text(), max_size=3),
    big=st.integers(),
)


@given(messages)
def test_any_message_arrives_as_it_was_sent(value: Message) -> None:
    assert same(sent(value)[1], value)


@given(st.builds(HoldsUsage, usage=st.none() | usages, by_name=st.dictionaries(st.text(), usages, max_size=2)))
def test_any_dataclass_in_a_model_arrives_as_it_was_sent(value: HoldsUsage) -> None:
    assert same(sent(value)[1], value)
