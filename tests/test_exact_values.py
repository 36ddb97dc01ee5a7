"""What arrives equals what was sent, type for type and at every depth, or the sender is told which field is refused.

Each kind of value is tried in each place where a value can be: the field of a model or of a dataclass, an item, a value
of a dictionary, an optional, a nested model, a member of a union.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import inspect
import ipaddress
import pathlib
import re
import time
import typing
import uuid
import zoneinfo
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import pydantic.dataclasses
import pydantic_core
import pytest
import typing_extensions
from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import (
    AfterValidator,
    AnyUrl,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    HttpUrl,
    Json,
    PlainSerializer,
    PositiveInt,
    RootModel,
    SecretBytes,
    SecretStr,
    SerializeAsAny,
    StringConstraints,
    TypeAdapter,
    WrapValidator,
    create_model,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.errors import PydanticSchemaGenerationError

from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import CannotDecode, CannotSerialize
from natsrt.wire.exactness import difference
from natsrt.wire.serialization import JSON, Serialization

T = TypeVar("T")
NAN = float("nan")
MOMENT = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901)
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")


class Color(enum.StrEnum):
    RED = "red"
    CRIMSON = "red"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Odd(enum.Enum):
    PAIR = (1, 2)
    NONE = None


class Mixed(enum.Enum):
    ONE = 1
    TEXT = "1"


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class IntAccess(enum.IntFlag):
    READ = 1
    WRITE = 2


class Text(str):
    pass


class Point(NamedTuple):
    x: int
    y: float = 0.0


class Options(typing.TypedDict):
    depth: int


class MoreOptions(typing_extensions.TypedDict, total=False):
    depth: typing_extensions.Required[int]
    when: datetime.datetime
    raw: bytes


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    name: str = "rex"


class Puppy(Dog):
    months: int = 1


class Box(BaseModel, Generic[T]):
    content: T


class Names(RootModel[list[str]]):
    pass


@dataclasses.dataclass
class Spot:
    x: int


@dataclasses.dataclass
class Spot3(Spot):
    z: int = 0


class Upper(BaseModel):
    text: str

    @field_serializer("text")
    def _upper(self, text: str) -> str:
        return text.upper()


KINDS: dict[str, tuple[Any, list[Any]]] = {
    "secret text": (SecretStr, [SecretStr("hunter2"), SecretStr("")]),
    "secret bytes": (SecretBytes, [SecretBytes(b"hunter2")]),
    "UUID or text": (uuid.UUID | str, [uuid.UUID(int=5), str(uuid.UUID(int=5)), "a"]),
    "text or UUID": (str | uuid.UUID, [uuid.UUID(int=5), str(uuid.UUID(int=5))]),
    "moment or text": (datetime.datetime | str, [MOMENT, "2024-01-01T00:00:00", "1700000000", "a"]),
    "text or moment": (str | datetime.datetime, [MOMENT, "2024-01-01T00:00:00"]),
    "day or text": (datetime.date | str, [datetime.date(2024, 1, 1), "2024-01-01"]),
    "moment or day": (datetime.datetime | datetime.date, [datetime.datetime(2024, 1, 1), datetime.date(2024, 1, 1)]),
    "day or moment": (datetime.date | datetime.datetime, [datetime.datetime(2024, 1, 1), datetime.date(2024, 1, 1)]),
    "time of day or text": (datetime.time | str, [datetime.time(1, 2), "01:02:00"]),
    "span or text": (datetime.timedelta | str, [datetime.timedelta(1), "P1D"]),
    "span or number": (datetime.timedelta | float, [datetime.timedelta(seconds=1), 1.0]),
    "path or text": (pathlib.Path | str, [pathlib.Path("a/b"), "a/b"]),
    "text or path": (str | pathlib.Path, [pathlib.Path("a/b"), "a/b"]),
    "decimal or text": (decimal.Decimal | str, [decimal.Decimal("1.50"), "1.50"]),
    "decimal or number": (decimal.Decimal | float, [decimal.Decimal("1.5"), 1.5]),
    "text enum or text": (Color | str, [Color.RED, "red", "blue"]),
    "text or text enum": (str | Color, [Color.RED, "red"]),
    "number enum or number": (Level | int, [Level.LOW, 1, 7]),
    "number or number enum": (int | Level, [Level.LOW, 1]),
    "text or bytes": (str | bytes, ["a", b"a", b"\xff\x00"]),
    "bytes or text": (bytes | str, ["a", b"a", b"\xff\x00"]),
    "int or text": (int | str, [1, "1", True]),
    "text or int": (str | int, [1, "1"]),
    "int or float": (int | float, [1, 1.0, -0.0, True]),
    "float or int": (float | int, [1, 1.0, 2**70]),
    "bool or int": (bool | int, [True, 1, False, 0]),
    "int or bool": (int | bool, [True, 1]),
    "int": (int, [1, True, 2**70, Level.LOW, 1.0]),
    "float": (float, [1.5, -0.0, 1, True, NAN, float("inf"), 5e-324]),
    "text": (str, ["a", "", "\ud800", Text("a"), Color.RED, 1]),
    "bytes": (bytes, [b"a", b"\xff\x00", "a"]),
    "sequence": (Sequence[int], [[1, 2], (1, 2), (), []]),
    "collection": (collections.abc.Collection[int], [[1], (1,), {1}, frozenset({1})]),
    "iterable": (Iterable[int], [[1], (1,), {1}]),
    "mapping": (Mapping[str, int], [{"a": 1}, collections.OrderedDict(a=1)]),
    "list or set": (list[int] | set[int], [[1], {1}]),
    "set or list": (set[int] | list[int], [[1], {1}]),
    "tuple or list": (tuple[int, ...] | list[int], [[1], (1,)]),
    "set": (set[int], [{1, 2}, {True}, frozenset({1})]),
    "frozen set": (frozenset[int], [frozenset({1, 2}), frozenset(), {1}]),
    "abstract set": (collections.abc.Set[int], [{1}, frozenset({1})]),
    "pair": (tuple[int, str], [(1, "a"), (True, "a"), [1, "a"], (1,)]),
    "tuple": (tuple[int, ...], [(1, 2), (), [1]]),
    "bare tuple": (tuple, [(1, "a"), ((1,), [2])]),
    "bare list": (list, [[1, "a"], [(1,)], [{1}]]),
    "named tuple": (Point, [Point(1, 2.0), Point(1, 2), (1, 2.0)]),
    "deque": (collections.deque[int], [collections.deque([1, 2]), collections.deque([1], maxlen=3)]),
    "ordered": (collections.OrderedDict[str, int], [collections.OrderedDict(b=1, a=2), {"a": 1}]),
    "default": (collections.defaultdict[str, list[int]], [collections.defaultdict(list, a=[1])]),
    "default of another": (collections.defaultdict[str, int], [collections.defaultdict(lambda: 5, a=1)]),
    "counter": (collections.Counter[str], [collections.Counter("aab")]),
    "keys of two kinds": (dict[int | str, int], [{1: 1}, {"1": 1}, {"a": 1}]),
    "optional keys": (dict[str | None, int], [{"a": 1}, {None: 1}, {"None": 1}]),
    "int keys": (dict[int, str], [{1: "a", -2: "b"}, {True: "a"}, {"1": "a"}, {2**70: "a"}]),
    "bool keys": (dict[bool, int], [{True: 1, False: 0}, {1: 1}]),
    "float keys": (dict[float, int], [{1.5: 1}, {1: 1}, {NAN: 1}]),
    "tuple keys": (dict[tuple[int, int], int], [{(1, 2): 3}]),
    "enum keys": (dict[Color, int], [{Color.RED: 1}, {"red": 1}]),
    "number enum keys": (dict[Level, int], [{Level.LOW: 1}, {1: 1}]),
    "day keys": (dict[datetime.date, int], [{datetime.date(2026, 1, 1): 1}, {MOMENT: 1}]),
    "bytes keys": (dict[bytes, int], [{b"a": 1}, {b"\xff": 1}]),
    "any": (Any, [1, 1.0, True, [1], {"a": [None]}, (1,), {1}, b"a", MOMENT, Color.RED, NAN, {1: 2}, {"$type": "x"}]),
    "moment": (
        datetime.datetime,
        [
            MOMENT,
            MOMENT.replace(tzinfo=datetime.UTC),
            MOMENT.replace(tzinfo=BERLIN),
            datetime.datetime(1800, 1, 1, tzinfo=BERLIN),
            MOMENT.replace(tzinfo=datetime.timezone(datetime.timedelta(hours=-23, minutes=-59))),
            datetime.datetime.min,
            datetime.datetime.max,
            datetime.date(2026, 1, 1),
        ],
    ),
    "day": (datetime.date, [datetime.date(2026, 1, 1), MOMENT, datetime.date.min]),
    "time of day": (datetime.time, [datetime.time(1, 2, 3, 4), datetime.time(1, tzinfo=datetime.UTC)]),
    "span": (datetime.timedelta, [datetime.timedelta(1, 2, 3), -datetime.timedelta(microseconds=1), 1.5]),
    "decimal": (
        decimal.Decimal,
        [decimal.Decimal(text) for text in ("1.50", "-0", "NaN", "Infinity", "1E+5", "sNaN")] + [1, 1.5],
    ),
    "IPv4": (ipaddress.IPv4Address, [ipaddress.IPv4Address("10.0.0.1")]),
    "any address": (
        ipaddress.IPv4Address | ipaddress.IPv6Address | str,
        [ipaddress.IPv6Address("::1"), "::1", ipaddress.IPv4Address("10.0.0.1")],
    ),
    "network": (ipaddress.IPv4Network, [ipaddress.IPv4Network("10.0.0.0/8")]),
    "URL": (AnyUrl, [AnyUrl("https://example.com/a?b=c")]),
    "HTTP URL or text": (HttpUrl | str, [HttpUrl("https://example.com"), "https://example.com/"]),
    "pattern": (re.Pattern[str], [re.compile("a+"), re.compile("a+", re.IGNORECASE)]),
    "byte size": (ByteSize, [ByteSize(1024), 1024]),
    "constrained": (Annotated[int, Field(gt=0)], [1, -1]),
    "positive": (PositiveInt, [1, -1, True]),
    "stripped": (Annotated[str, StringConstraints(strip_whitespace=True, to_lower=True)], ["a", " A "]),
    "enum": (Odd, [Odd.PAIR, Odd.NONE]),
    "mixed enum": (Mixed, [Mixed.ONE, Mixed.TEXT]),
    "text enum": (Color, [Color.RED, Color.CRIMSON, "red"]),
    "flag": (Access, [Access.READ, Access.READ | Access.WRITE, Access(0)]),
    "int flag": (IntAccess, [IntAccess.READ, IntAccess.READ | IntAccess.WRITE, 1]),
    "literal members": (Literal[Color.RED], [Color.RED, "red"]),
    "literal of members and text": (Literal[Level.LOW, "low"], [Level.LOW, "low", 1]),
    "literal": (Literal["a", 1, True], ["a", 1, True, 1.0]),
    "typed dict": (typing_extensions.TypedDict("Size", {"w": int, "h": float}), [{"w": 1, "h": 1.0}, {"w": 1}]),
    "partial typed dict": (MoreOptions, [{"depth": 1}, {"depth": 1, "when": MOMENT}, {"depth": 1, "raw": b"\xff"}, {}]),
    "typed dict with more": (MoreOptions, [{"depth": 1, "more": 2}, {"depth": True}, collections.OrderedDict(depth=1)]),
    "models": (Cat | Dog, [Cat(), Dog(), Puppy(months=3)]),
    "discriminated": (Annotated[Cat | Dog, Field(discriminator="kind")], [Cat(), Dog(name="a")]),
    "model": (Dog, [Dog(), Puppy(), Dog.model_construct(name=1), Dog.model_construct()]),
    "serialized as any": (SerializeAsAny[Dog], [Dog(), Puppy()]),
    "model or dict": (Dog | dict[str, str], [Dog(), {"name": "a"}, {"kind": "dog", "name": "rex"}]),
    "model or text": (Cat | uuid.UUID | str, [Cat(), uuid.UUID(int=5), str(uuid.UUID(int=5))]),
    "generic": (Box[uuid.UUID | str], [Box[uuid.UUID | str](content=str(uuid.UUID(int=5)))]),
    "root model": (Names, [Names(["a"]), Names.model_construct(("a",))]),
    "root of a union": (
        RootModel[str | datetime.datetime],
        [RootModel[str | datetime.datetime](MOMENT), RootModel[str | datetime.datetime]("a")],
    ),
    "dataclass": (Spot, [Spot(1), Spot3(1, 2), Spot(True), Spot("1")]),  # type: ignore[arg-type]
    "dataclass or model": (Spot | Cat, [Spot(1), Cat()]),
    "set or list of models": (tuple[Cat, ...] | list[Cat], [(Cat(),), [Cat()]]),
    "sequence of models": (Sequence[Dog], [[Dog(), Puppy()], (Dog(),)]),
    "lossy serializer": (Upper, [Upper(text="A"), Upper(text="a")]),
    "serialized by a function": (
        Annotated[SecretStr, PlainSerializer(lambda secret: secret.get_secret_value())],
        [SecretStr("hunter2")],
    ),
    "rounded by a function": (Annotated[float, PlainSerializer(lambda number: round(number))], [1.0, 1.5]),
    "changed after": (Annotated[int, AfterValidator(lambda number: number + 1)], [1]),
    "made before": (Annotated[list[int], BeforeValidator(lambda value: value or [1])], [[2], []]),
    "wrapped": (Annotated[int, WrapValidator(lambda value, handler: abs(handler(value)))], [1, -1]),
}


def is_an_integer_for_a_float(kind: Any, value: Any) -> bool:
    return kind in (float, dict[float, int]) and value in (1, {1: 1})


PLACES: dict[str, Any] = {
    "field": (lambda kind: kind, lambda value: value),
    "list": (lambda kind: list[kind], lambda value: [value]),
    "dict": (lambda kind: dict[str, kind], lambda value: {"a": value}),
    "optional": (lambda kind: kind | None if kind is not Any else Any, lambda value: value),
    "tuple": (lambda kind: tuple[kind, int], lambda value: (value, 1)),
    "union": (lambda kind: kind | Cat | int if kind is not Any else Any, lambda value: value),
    "deep": (
        lambda kind: list[dict[str, kind | None] | None] if kind is not Any else Any,
        lambda value: [{"a": value}],
    ),
}


CASES = [pytest.param(*KINDS[name], place, id=f"{name}-{place}") for name in KINDS for place in PLACES]


def arrives(message: Any, *classes: type) -> Any:
    """What arrives; raises the error of the sender or of the receiver."""
    encoded = Serialization().encode(message)
    receiver = Serialization()
    for cls in (type(message), *classes):
        receiver.add_class(cls)
    return receiver.decode(*encoded)


def check(message: Any, field: str, *, may_be_refused: bool = True) -> None:
    before = repr(message)
    try:
        arrived = arrives(message, Cat, Dog, Puppy, Spot)
    except CannotSerialize as error:
        assert may_be_refused and field in error.reason, error
        for quoted in ("hunter2",):
            assert quoted not in str(error)
    else:
        assert difference(message, arrived) is None
        assert type(arrived) is type(message)
    assert repr(message) == before or "ValidatorIterator" in before  # Pydantic's iterators can be read once


@pytest.mark.parametrize(("kind", "values", "place"), CASES)
def test_a_field_of_a_model_arrives_as_it_was_or_is_refused_by_name(kind: Any, values: list[Any], place: str) -> None:
    wrap, put = PLACES[place]
    try:
        cls = create_model("Holder", value=(wrap(kind), ...), other=(int, 1))
        outer = create_model("Outer", held=(cls, ...), more=(list[cls], []))  # type: ignore[valid-type]
    except (TypeError, PydanticSchemaGenerationError):
        pytest.skip("Python, or Pydantic, has no such type")
    for value in values:
        if place == "union" and is_an_integer_for_a_float(kind, value):
            continue
        message = cls.model_construct(value=put(value), other=1)
        check(message, "value")
        check(outer.model_construct(held=message, more=[message]), "value")


@pytest.mark.parametrize(("kind", "values", "place"), CASES)
def test_a_field_of_a_dataclass_arrives_as_it_was_or_is_refused_by_name(
    kind: Any, values: list[Any], place: str
) -> None:
    wrap, put = PLACES[place]
    try:
        cls = dataclasses.make_dataclass("Holder", [("value", wrap(kind)), ("other", int)])
    except TypeError:
        pytest.skip("Python has no such type")
    for value in values:
        if not is_an_integer_for_a_float(kind, value):
            check(cls(put(value), 1), "value")


CARRIED: list[tuple[Any, Any]] = [
    (uuid.UUID | str, str(uuid.UUID(int=5))),
    (str | datetime.datetime, MOMENT),
    (Color | str, Color.RED),
    (Color | str, "red"),
    (str | bytes, b"\xff"),
    (set[int] | list[int], {1}),
    (Sequence[int], (1, 2)),
    (Sequence[int] | Cat | int, (1, 2)),
    (list[Sequence[int] | None], [(1, 2), None, [3]]),
    (Annotated[Cat | Dog, Field(discriminator="kind")] | None, Puppy(months=2)),
    (Annotated[SecretStr, PlainSerializer(lambda secret: secret.get_secret_value())], SecretStr("a")),
    (MoreOptions, {"depth": 1, "when": MOMENT}),
    (dict[int, tuple[Color, ...]], {1: (Color.RED,)}),
    (collections.deque[int], collections.deque([1])),
    (dict[str, list[uuid.UUID | str | None]], {"a": [str(uuid.UUID(int=5)), uuid.UUID(int=5), None, "b"]}),
    (decimal.Decimal | float, 1.5),
    (dict[str, pathlib.Path | str], {"a": pathlib.Path("a"), "b": "c"}),
]


@pytest.mark.parametrize(("kind", "value"), CARRIED)
def test_values_whose_declaration_tells_them_apart_arrive(kind: Any, value: Any) -> None:
    check(create_model("Holder", value=(kind, ...)).model_construct(value=value), "", may_be_refused=False)


FOLDED = datetime.datetime(2026, 10, 25, 2, 30, fold=1)


class MoreTimes(typing_extensions.TypedDict):
    at: datetime.datetime


class Word(enum.StrEnum):
    A = "a"


def doubled(value: int) -> int:
    return value * 2


def refused(value: int) -> int:
    raise ValueError("no")


REFUSED: list[tuple[Any, Any, str]] = [
    (SecretStr, SecretStr("hunter2"), "value: Pydantic masks a value of type SecretStr .* get_secret_value"),
    (list[SecretStr | None], [SecretStr("hunter2")], "value: Pydantic masks"),
    (Cat | SecretStr, SecretStr("hunter2"), "value: Pydantic masks"),
    (bytes, b"\xff", 'value: .*ser_json_bytes="base64" and val_json_bytes="base64"'),
    (list[bytes], [b"\xff"], 'value: .*ser_json_bytes="base64"'),
    (float, NAN, r"value: JSON has no NaN"),
    (list[float], [1.0, NAN], r"value\[\]: JSON has no NaN"),
    (decimal.Decimal, decimal.Decimal("NaN"), "value: Pydantic cannot write a value of type Decimal"),
    (int, True, "value: declared int, but holds a value of type bool"),
    (Odd, Odd.PAIR, "value: Pydantic cannot write a value of type Odd"),
    (Literal[Odd.PAIR], Odd.PAIR, "value: Pydantic"),
    (dict[str | None, int], {None: 1}, "value: .* a different one"),
    (str, "\ud800", "value: the text has a lone surrogate"),
    (Annotated[int, Field(gt=0)], -1, "value: the value does not meet the constraints"),
    (Annotated[list[Dog], Field(max_length=1)], [Dog(), Dog()], "value: the value does not meet the constraints"),
    (datetime.datetime, FOLDED, "value: fold=1 of a local time .* give it a time zone"),
    (datetime.time, FOLDED.time(), "value: fold=1 of a local time"),
    (list[datetime.datetime | None], [FOLDED], r"value(\[\])?: .*fold=1 of a local time"),
    (str | datetime.datetime, FOLDED, "value: fold=1 of a local time"),
    (dict[datetime.datetime, int], {FOLDED: 1}, r"value\[\]: fold=1 of a local time"),
    (MoreTimes, {"at": FOLDED}, "value.at: fold=1 of a local time"),
    (dict[str, int], {Word.A: 1}, r"value.*: a key is of type Word, .* declare dict\[Word, ...\]"),
    (
        Annotated[int, AfterValidator(doubled)],
        3,
        "value: a validator in its annotation changes it: a value of type int",
    ),
    (Annotated[int, AfterValidator(refused)], 3, "value: the value is refused by a validator or constraint"),
    (int, ..., "value: the field has no value"),
    (MoreOptions, {"depth": 1, "more": 1}, "value: MoreOptions has no key 'more'"),
    (MoreOptions, {}, "value: MoreOptions requires the key 'depth'"),
]


@pytest.mark.parametrize(("kind", "value", "text"), REFUSED)
def test_a_refusal_names_the_field_and_what_is_wrong_with_it(kind: Any, value: Any, text: str) -> None:
    cls = create_model("Holder", other=(int, 1), value=(kind, ...))
    fields = {"other": 1} if value is ... else {"other": 1, "value": value}
    message = cls.model_construct(**fields)
    with pytest.raises(CannotSerialize, match=text) as raised:
        arrives(message)
    assert "hunter2" not in str(raised.value)
    outer = create_model("Outer", held=(cls | None, None))
    with pytest.raises(CannotSerialize, match=f"held.{text}"):
        arrives(outer.model_construct(held=message))


def test_bytes_travel_with_the_settings_that_the_refusal_names() -> None:
    class Raw(BaseModel):
        model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
        value: bytes

    check(Raw(value=b"\xff\x00"), "", may_be_refused=False)


# ---------------------------------------------------------------------------------------------------------------------
# Functions of a model


class Upgraded(BaseModel):
    """An older sender wrote ``town``, and ``name`` in two parts."""

    address: Box[str]
    pets: list[Dog] = []
    name: str = ""
    seen: typing.ClassVar[list[Any]] = []

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, data: Any) -> Any:
        cls.seen.append(data)
        if isinstance(data, dict) and "town" in data["address"]:
            data["address"]["content"] = data["address"].pop("town")
        if isinstance(data, dict) and "names" in data:
            data["name"] = " ".join(data.pop("names"))
        return data

    @field_validator("pets", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        cls.seen.append(value)
        return [{"name": pet} if isinstance(pet, str) else pet for pet in value]

    @field_validator("pets", mode="wrap")
    @classmethod
    def _wrapped(cls, value: Any, handler: Any) -> Any:
        cls.seen.append(value)
        return handler(value)


def is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(is_json, value.values()))
    return all(map(is_json, value)) if isinstance(value, list) else isinstance(value, str | int | float | None)


def read(cls: type, payload: bytes) -> Any:
    receiver = Serialization()
    receiver.add_class(cls)
    return receiver.decode(cls.__name__, JSON, payload)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b'{"address":{"town":"x"},"names":["a","b"]}', Upgraded(address=Box[str](content="x"), name="a b")),
        (
            b'{"address":{"town":"x"},"pets":["rex",{"$type":"Puppy","name":"p","months":3}]}',
            Upgraded(address=Box[str](content="x"), pets=[Dog(), Puppy(name="p", months=3)]),
        ),
    ],
)
def test_validators_that_run_before_get_json_and_keep_what_an_older_sender_wrote(payload: bytes, expected: Any) -> None:
    Upgraded.seen.clear()
    assert difference(expected, read(Upgraded, payload)) is None
    assert Upgraded.seen and all(map(is_json, Upgraded.seen))
    holder = create_model("Holder", held=(Upgraded, ...), other=(Cat | Dog, ...))
    payload = b'{"held":%b,"other":{"$type":"Dog"}}' % payload
    assert difference(expected, read(holder, payload).held) is None
    assert all(map(is_json, Upgraded.seen))


def test_a_model_with_validators_that_run_before_arrives_in_all_forms() -> None:
    for message in (
        Upgraded(address=Box[str](content="x")),
        Upgraded(address=Box[str](content="x"), pets=[Puppy(), Dog()]),
    ):
        check(message, "", may_be_refused=False)


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    when: datetime.datetime
    pets: tuple[Dog, ...] = Field(alias="Pets")
    either: str | datetime.date

    @field_validator("pets", mode="before")
    @classmethod
    def _same(cls, value: Any) -> Any:
        return value


def test_strict_models_with_aliases_and_extra_fields_arrive() -> None:
    message = Strict(when=MOMENT, Pets=(Dog(), Puppy()), either=datetime.date(2026, 1, 1), more=Spot(1))
    arrived = arrives(message, Spot)
    assert difference(message, arrived) is None and type(arrived.more) is Spot


class Counted(BaseModel):
    n: int

    @model_validator(mode="after")
    def _count(self) -> Counted:
        self.n += 1
        return self


class Stamped(BaseModel):
    n: int

    def model_post_init(self, context: Any) -> None:
        self.n += 1


class Constructed(BaseModel):
    n: int
    pets: list[Dog] = []

    def __init__(self, **fields: Any) -> None:
        super().__init__(**{**fields, "n": abs(fields["n"])})


class Masked(BaseModel):
    password: str

    @field_serializer("password")
    def _mask(self, password: str) -> str:
        return "***"


class Whole(BaseModel):
    n: int

    @model_serializer
    def _write(self) -> dict[str, Any]:
        return {"n": self.n // 2 * 2}


@pytest.mark.parametrize(
    "message",
    [Counted(n=1), Stamped(n=1), Constructed.model_construct(n=-1, pets=[]), Masked(password="hunter2"), Whole(n=1)],
    ids=lambda message: type(message).__name__,
)
def test_a_model_whose_functions_change_what_was_sent_is_refused_at_every_depth(message: BaseModel) -> None:
    holder = create_model("Holder", held=(list[type(message)], ...))  # type: ignore[misc]
    in_any = create_model("InAny", held=(Any, ...))
    for sent in (message, holder(held=[message]), in_any(held={"a": message})):
        with pytest.raises(CannotSerialize, match="n: .*changed|password: .*changed"):
            arrives(sent, type(message))


def test_functions_that_keep_what_was_sent_carry_it() -> None:
    for message in (Constructed(n=-1, pets=[Puppy()]), Masked(password="***"), Whole(n=2)):
        check(message, "", may_be_refused=False)


@dataclasses.dataclass
class Hashed:
    name: str
    password: str = "pw"

    def __post_init__(self) -> None:
        self.password = f"hash({self.password})"


@dataclasses.dataclass(frozen=True, slots=True)
class Summed:
    items: list[str]
    total: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.total + len(self.items))


@dataclasses.dataclass
class Grown:
    items: Any

    def __post_init__(self) -> None:
        self.items.append(0)


@dataclasses.dataclass
class Arrival:
    due: float = 0
    at: int = 0

    def __post_init__(self) -> None:
        self.at = time.perf_counter_ns()


@dataclasses.dataclass
class Widened:
    n: Any = 1
    price: float = 1

    def __post_init__(self) -> None:
        if self.price == 0:
            self.n = float(self.n)


@dataclasses.dataclass
class Twice:
    n: int

    def __init__(self, n: int) -> None:
        self.n = n * 2


@dataclasses.dataclass
class Assigned:
    n: int

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value + 1)


@dataclasses.dataclass
class Descended(Hashed):
    pass


class Counter:
    def __get__(self, instance: Any, owner: Any) -> Any:
        return 0 if instance is None else instance._n

    def __set__(self, instance: Any, value: int) -> None:
        instance._n = value + 1


@dataclasses.dataclass
class Described:
    n: int = Counter()  # type: ignore[assignment]


@dataclasses.dataclass(init=False)
class Made:
    n: int = 0

    def __new__(cls, n: int = 0) -> Made:
        made = super().__new__(cls)
        made.n = n + 1
        return made


@pydantic.dataclasses.dataclass
class Validated:
    n: int

    @field_validator("n")
    @classmethod
    def _count(cls, n: int) -> int:
        return n + 1


def widened() -> Widened:
    message = Widened()
    message.price = 0
    return message


CHANGING = [
    Hashed("ada"),
    Descended("ada"),
    Summed(["a"]),
    Grown([]),
    Arrival(),
    widened(),
    Twice(1),
    Assigned(1),
    Described(1),
    Made(1),
    Validated(1),
]


@dataclasses.dataclass
class Wrapped(Generic[T]):
    """A dataclass that changes nothing."""

    held: T


@dataclasses.dataclass
class Checked(Generic[T]):
    """A dataclass whose own code changes nothing."""

    held: T

    def __post_init__(self) -> None:
        if self.held is None:
            raise ValueError


def places_of(message: Any) -> list[Any]:
    """``message`` on its own and inside others."""
    cls: Any = type(message)
    model, in_any = create_model("Model", held=(list[cls], ...)), create_model("InAny", held=(Any, ...))
    either = dataclasses.make_dataclass("Either", [("held", dict[str, cls | Cat | None])])
    base = dataclasses.make_dataclass("Base", [("held", object)])
    return [
        message,
        Wrapped(Wrapped([message])),
        Checked(Wrapped(Checked(message))),
        model(held=[message]),
        in_any(held={"a": [message]}),
        Checked(in_any(held=message)),
        either({"a": message}),
        base(message),
    ]


@pytest.mark.parametrize("message", CHANGING, ids=lambda message: type(message).__name__)
def test_a_dataclass_whose_own_code_changes_what_was_sent_is_refused_at_every_depth(message: Any) -> None:
    for sent in places_of(message):
        before = repr(sent)
        try:
            arrived = arrives(sent, type(message), Wrapped, Checked)
        except CannotSerialize as error:
            assert "changed" in str(error) or "would" in str(error), error
            if isinstance(sent, Wrapped | Checked):
                assert f"__post_init__ of {type(message).__name__} " in str(error), error
            assert repr(sent) == before
        else:  # Pydantic builds a dataclass that a model declares without its constructor
            assert type(sent).__name__ == "Model" and difference(sent, arrived) is None


@dataclasses.dataclass
class Tidy:
    name: str
    price: float = 0
    ratios: set[float] = dataclasses.field(default_factory=set)
    when: datetime.datetime | None = None
    parts: list[Tidy] = dataclasses.field(default_factory=list)
    length: int = dataclasses.field(init=False)
    unset: int = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.name = self.name.strip()
        self.length = len(self.name)
        self._cache: dict[str, int] = {}
        if not self.name:
            raise ValueError


@pydantic.dataclasses.dataclass
class Stripped:
    name: Annotated[str, StringConstraints(strip_whitespace=True)]
    parts: list[Spot] = dataclasses.field(default_factory=list)


@pytest.mark.parametrize(
    "message",
    [
        Tidy(" a ", 3.5, {1.5}, datetime.datetime(2026, 1, 2, tzinfo=BERLIN), [Tidy("b", 1.0)]),
        Stripped(" a ", [Spot(1)]),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_dataclass_whose_own_code_keeps_what_was_sent_arrives(message: Any) -> None:
    for sent in places_of(message):
        assert difference(sent, arrives(sent, type(message), Wrapped, Checked)) is None


def test_an_int_in_a_float_field_of_a_dataclass_that_checks_its_fields_arrives_as_the_equal_float() -> None:
    message = Tidy("a", 3, {1, 2}, parts=[Tidy("b", 1)])
    for sent in (message, Wrapped([message]), Checked(message)):
        assert difference(sent, arrives(sent, Tidy, Wrapped)) is None


def test_a_dataclass_that_would_not_accept_its_own_fields_is_refused_before_it_is_sent() -> None:
    message = Tidy("a")
    message.name = ""
    with pytest.raises(CannotSerialize, match=r"Tidy does not accept its fields \(ValueError\)"):
        arrives(Wrapped([message]), Tidy)


@dataclasses.dataclass
class Attributes(dict[str, int]):
    source: str = ""


@dataclasses.dataclass
class Lines(list[str]):
    source: str = ""


@dataclasses.dataclass
class Tagged(str):
    tag: str = ""


class Ordered(collections.OrderedDict[str, int]):
    pass


@dataclasses.dataclass
class Indexed(Ordered):
    source: str = ""


@pytest.mark.parametrize(
    "message", [Attributes("a"), Lines("a"), Tagged("a"), Indexed("a")], ids=lambda m: type(m).__name__
)
def test_a_dataclass_with_contents_that_are_not_fields_is_refused(message: Any) -> None:
    for sent in (message, Wrapped(message), Wrapped[Any]([message])):
        with pytest.raises(CannotSerialize, match="only the fields of a dataclass are sent"):
            arrives(sent, type(message))


class Home(BaseModel):
    kept: int = 1
    excluded: int = Field(default=0, exclude=True)
    _private: int = 0


def test_what_a_class_keeps_at_home_stays_there() -> None:
    message = Home(kept=2, excluded=5)
    message._private = 3
    arrived = arrives(message)
    assert (arrived.kept, arrived.excluded, arrived._private) == (2, 0, 0)


def test_a_required_field_that_is_excluded_is_refused_before_sending() -> None:
    class Excluded(BaseModel):
        lost: int = Field(exclude=True)

    for message in (Excluded(lost=1), Box[Excluded](content=Excluded(lost=1))):
        with pytest.raises(CannotSerialize, match="lost: the field is missing"):
            arrives(message)


def test_an_object_of_a_class_that_only_the_receiver_has_registered_is_no_reason_to_refuse() -> None:
    class HasValidator(BaseModel):
        held: Any

        @field_validator("held")
        @classmethod
        def _same(cls, value: Any) -> Any:
            return value

    message = HasValidator(held=[Spot(1)])
    assert difference(message, arrives(message, Spot)) is None


# ---------------------------------------------------------------------------------------------------------------------
# TypedDict, unions


class Nested(typing.TypedDict, total=False):
    options: typing.Required[Options]
    others: list[Nested]
    pet: Dog
    when: datetime.datetime


class Page(typing.TypedDict, Generic[T]):
    items: list[T]


@dataclasses.dataclass
class Ask:
    nested: Nested
    page: Page[datetime.date] | None = None
    either: Options | Nested | str = ""


def test_typed_dicts_of_typing_arrive() -> None:
    nested: Nested = {"options": {"depth": 1}, "others": [{"options": {"depth": 2}}], "pet": Puppy(), "when": MOMENT}
    for message in (
        Ask(nested),
        Ask({"options": {"depth": 1}}, {"items": [datetime.date(2026, 1, 1)]}),
        Ask(nested, either={"depth": 1}),
        Ask(nested, either={"options": {"depth": 1}}),
    ):
        check(message, "", may_be_refused=False)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (Ask({"options": {"depth": "1"}}), "nested.options.depth: declared int, but holds a value of type str"),
        (Ask({"options": {}}), "nested.options: Options requires the key 'depth', and it is missing"),
        (Ask({"options": {"depth": 1, "deep": 2}}), "nested.options: Options has no key 'deep'"),
        (Ask({"options": collections.OrderedDict(depth=1)}), "declared Options, but holds a value of type OrderedDict"),
    ],
)
def test_keys_of_a_typed_dict_are_checked_by_name(message: Ask, text: str) -> None:
    with pytest.raises(CannotSerialize, match=text):
        arrives(message)


def test_a_missing_key_of_a_typed_dict_is_named_and_an_unknown_one_ignored() -> None:
    with pytest.raises(CannotDecode, match="nested.options: Options requires the key 'depth'"):
        read(Ask, b'{"nested":{"options":{}}}')
    assert read(Ask, b'{"nested":{"options":{"depth":1,"newer":2}}}') == Ask({"options": {"depth": 1}})


class Score(Dog):
    value: float


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (Cat | Dog, Score(value=NAN), "value.value: JSON has no NaN"),
        (Cat | Dog | None, Score(value=NAN), "value.value: JSON has no NaN"),
        (list[Score] | list[Cat], [Score(value=NAN)], r"value\[\].value: JSON has no NaN"),
        (dict[str, Score] | list[Score] | str, {"a": Score(value=NAN)}, r"value\[\].value: JSON has no NaN"),
        (Score | Spot, Spot("1"), "value.x: declared int, but holds a value of type str"),  # type: ignore[arg-type]
        (Cat | Spot, Spot3("1"), "value.x: declared int, but holds a value of type str"),  # type: ignore[arg-type]
        (Cat | Dog, Spot(1), r"value: declared Cat\|Dog, but holds a value of type Spot"),
    ],
)
def test_a_refusal_below_a_union_keeps_its_reason(kind: Any, value: Any, text: str) -> None:
    for message in (
        create_model("Holder", value=(kind, ...)).model_construct(value=value),
        dataclasses.make_dataclass("Holder", [("value", kind)])(value),
    ):
        with pytest.raises(CannotSerialize, match=text):
            arrives(message)


@pytest.mark.parametrize("kind", [datetime.datetime, list[datetime.datetime], str | datetime.datetime, dict[str, Any]])
def test_fold_of_a_local_time_is_refused_in_a_dataclass(kind: Any) -> None:
    value: Any = FOLDED
    value = [value] if kind == list[datetime.datetime] else value
    with pytest.raises(CannotSerialize, match="value.*: (fold=1 of a local time|declared dict)"):
        arrives(dataclasses.make_dataclass("Holder", [("value", kind)])(value))
    with pytest.raises(CannotSerialize, match="value: fold=1 of a local time"):
        arrives(dataclasses.make_dataclass("Holder", [("value", datetime.time)])(FOLDED.timetz()))


def test_fold_of_a_moment_with_a_time_zone_is_its_offset() -> None:
    moment = FOLDED.replace(tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))
    for holder in (
        create_model("Holder", value=(datetime.datetime, ...))(value=moment),
        dataclasses.make_dataclass("Holder", [("value", datetime.datetime)])(moment),
    ):
        assert arrives(holder).value.utcoffset() == datetime.timedelta(hours=1)


class Constants(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="constants")
    value: float | None = None


class HoldsConstants(BaseModel):
    held: Constants | Cat


class WritesInfinity(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="constants")
    value: str = "a"

    @model_serializer
    def _write(self) -> dict[str, Any]:
        return {"value": float("inf")}

    @field_validator("value", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return "a" if isinstance(value, float) else value


@pytest.mark.parametrize(
    "message",
    [
        Constants(value=float("inf")),
        Constants(value=NAN),
        HoldsConstants(held=Constants(value=NAN)),
        dataclasses.make_dataclass("Holder", [("held", Constants)])(Constants(value=NAN)),
        WritesInfinity(),
        dataclasses.make_dataclass("Holder", [("held", WritesInfinity)])(WritesInfinity()),
    ],
    ids=repr,
)
def test_no_setting_of_a_model_lets_something_else_than_json_be_sent(message: Any) -> None:
    with pytest.raises(CannotSerialize, match="JSON has no NaN and no infinity"):
        arrives(message)


def test_infinity_as_text_is_json_at_every_depth() -> None:
    text = create_model("Text", __config__=ConfigDict(ser_json_inf_nan="strings"), value=(float, ...), more=(Any, None))
    outer = dataclasses.make_dataclass("Outer", [("held", text)])
    for message in (text(value=float("inf")), outer(text(value=float("inf")))):
        assert b'"Infinity"' in Serialization().encode(message).payload
        assert arrives(message) == message


class Ordinary:
    pass


def test_an_object_that_no_field_can_hold_is_refused_for_what_it_is() -> None:
    holder: Any
    for value, reason in (
        (Ordinary(), "values of type Ordinary cannot be sent in a field; make it a dataclass"),
        (AgentId("a", "b"), "values of type AgentId cannot be sent in a field; declare str"),
        (Timestamp(seconds=1), "values of type Timestamp cannot be sent in a field; a protobuf message is sent alone"),
    ):
        config = ConfigDict(arbitrary_types_allowed=True)
        for kind in (type(value), type(value) | None):
            holder = dataclasses.make_dataclass("Holder", [("value", kind)])
            with pytest.raises(CannotSerialize, match=f"value: {reason}"):
                arrives(holder(value))
        if type(value) is Ordinary:
            holder = create_model("Holder", __config__=config, value=(Ordinary, ...))
            with pytest.raises(CannotSerialize, match=f"value: {reason}"):
                arrives(holder(value=value))
        else:
            with pytest.raises(CannotSerialize, match=f"value: {reason}"):
                Serialization().add_class(holder)


@pytest.mark.parametrize(
    ("kind", "keys", "text"),
    [
        (int, '"1":"a"," 1":"b"', "white space around the text of a key"),
        (int, '"1\\n":"b"', "white space around the text of a key"),
        (decimal.Decimal, '" 1":"b"', "white space around the text of a key"),
        (float, '"1":"a","1.0":"b"', "two keys are texts of one float"),
        (uuid.UUID, f'"{uuid.UUID(int=1)}":"a","{uuid.UUID(int=1).hex}":"b"', "two keys are texts of one UUID"),
    ],
)
def test_keys_that_become_one_are_refused(kind: Any, keys: str, text: str) -> None:
    holder = dataclasses.make_dataclass("Holder", [("value", dict[kind, str])])
    with pytest.raises(CannotDecode, match=f"value.*: .*{text}"):
        read(holder, f'{{"value":{{{keys}}}}}'.encode())


@dataclasses.dataclass
class Chain:
    inner: Chain | None = None


def test_a_chain_of_dataclasses_that_is_too_long_is_called_so() -> None:
    chain = Chain()
    for _ in range(300):
        chain = Chain(chain)
    with pytest.raises(CannotSerialize, match="it is nested too deeply, or contains itself"):
        arrives(chain)


@pytest.mark.parametrize("name", ["datetime", "UUID", "tuple"])
def test_a_scalar_named_where_only_classes_can_be_named_says_where_it_can(name: str) -> None:
    holder = dataclasses.make_dataclass("Holder", [("value", Any)])
    with pytest.raises(
        CannotDecode, match=f"may name {name} only where the declared type does, .* this is Any"
    ) as error:
        read(holder, f'{{"value":{{"$type":"{name}","value":"x"}}}}'.encode())
    assert "add_message_serializer" not in str(error.value)


def test_integers_and_texts_that_orjson_refuses_are_named() -> None:
    for value in ({2**70: "a"}, {1: "\ud800"}):
        with pytest.raises(CannotSerialize, match=r"value\[\]: "):
            arrives(dataclasses.make_dataclass("Holder", [("value", dict[int, str])])(value))
    with pytest.raises(CannotSerialize, match=r"value\[\]: the integer has more than 64 bits"):
        arrives(dataclasses.make_dataclass("Holder", [("value", list[int])])([2**70]))


# ---------------------------------------------------------------------------------------------------------------------
# Random values


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary()
    | st.dates()
    | st.datetimes(timezones=st.none() | st.timezones())
    | st.uuids()
    | st.decimals()
    | st.timedeltas()
    | st.sampled_from([*Color, *Level, *Odd, *Access, SecretStr("hunter2"), pathlib.Path("a"), Cat(), Puppy(), Spot(1)])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.none(), inner, max_size=3)
    ),
    max_leaves=5,
)
HOLDERS = [
    create_model("Holder", value=(kind, ...))
    for kind in (
        Any,
        *(kind for kind, _ in KINDS.values() if kind != collections.abc.Collection[int]),
        str | int | float | bool | None,
        list[str | uuid.UUID | datetime.date] | dict[str, bytes | Level | int] | tuple[int | float, ...],
        dict[str | int, decimal.Decimal | Color | str] | Sequence[Cat | Dog | str],
    )
]


@settings(deadline=None)  # the first value of a kind compiles its class
@given(st.sampled_from(HOLDERS), VALUES)
def test_any_value_in_any_field_arrives_as_it_was_or_is_refused(holder: type[BaseModel], value: Any) -> None:
    check(holder.model_construct(value=value), "value")


FOR_FLOATS = ("float", "float keys", "span or number", "decimal or number")
"""Kinds in which a dataclass takes an int for the equal float."""


@settings(deadline=None)  # the first value of a kind compiles its class
@given(st.sampled_from([kind for name, (kind, _) in KINDS.items() if name not in FOR_FLOATS]), VALUES)
def test_any_value_in_any_field_of_a_dataclass_arrives_as_it_was_or_is_refused(kind: Any, value: Any) -> None:
    check(dataclasses.make_dataclass("Holder", [("value", kind)])(value), "value")


@settings(deadline=None)  # the first value of a kind compiles its class
@given(st.sampled_from(HOLDERS), st.recursive(st.none() | st.integers() | st.text(), st.lists))
def test_whatever_a_model_is_built_from_it_arrives_as_it_was_or_is_refused(holder: type[BaseModel], value: Any) -> None:
    try:
        message = TypeAdapter(holder).validate_python({"value": value})
    except ValueError:
        return
    check(message, "value")


# ---------------------------------------------------------------------------------------------------------------------
# Over a server


class Letter(BaseModel):
    to: uuid.UUID | str
    at: str | datetime.datetime
    pages: Sequence[Cat | Dog | str] = ()


@dataclasses.dataclass
class Order:
    options: Options
    upgraded: Upgraded
    letter: Letter


class Keeper(RoutedAgent):
    def __init__(self, kept: list[Any]) -> None:
        super().__init__("keeps what it gets")
        self._kept = kept

    @message_handler
    async def keep(self, message: Letter | Order | Box[SecretStr], ctx: MessageContext) -> Letter | None:
        self._kept.append(message)
        return message.letter if isinstance(message, Order) else None


async def test_messages_and_replies_arrive_over_a_server_as_they_were(server: EmbeddedServer, namespace: str) -> None:
    letter = Letter(to=str(uuid.UUID(int=5)), at=MOMENT, pages=(Puppy(), "a"))
    order = Order({"depth": 1}, Upgraded(address=Box[str](content="x"), pets=[Puppy()]), letter)
    kept: list[Any] = []
    async with (
        NatsAgentRuntime(server.url, namespace=namespace) as worker,
        NatsAgentRuntime(server.url, namespace=namespace) as caller,
    ):
        await Keeper.register(worker, "keeper", lambda: Keeper(kept))
        assert difference(letter, await caller.send_message(order, AgentId("keeper", "k"))) is None
        assert difference(order, kept.pop()) is None
        with pytest.raises(CannotSerialize, match="content: Pydantic masks"):
            await caller.send_message(Box[SecretStr](content=SecretStr("hunter2")), AgentId("keeper", "k"))
        assert not kept


class Prices(BaseModel):
    price: float = 0
    optional: float | None = 0
    items: list[float] = [0, 0]
    named: float | str = 0
    keyed: dict[float, tuple[int, float]] = {1: (1, 2)}
    several: collections.deque[float] = collections.deque([1])
    positive: Annotated[float, Field(ge=0)] = 0


class CheckedPrices(Prices):
    @model_validator(mode="after")
    def same(self) -> CheckedPrices:
        return self


@dataclasses.dataclass
class Weight:
    kilos: float = 0


class Basket(BaseModel):
    prices: Prices = Prices()
    several: dict[str, list[CheckedPrices]] = {"a": [CheckedPrices()]}
    whatever: Any = CheckedPrices()
    weight: Weight = Weight()
    root: RootModel[float] = RootModel[float].model_construct(0)

    @model_validator(mode="after")
    def same(self) -> Basket:
        return self


@pytest.mark.parametrize("message", [Prices(), CheckedPrices(), Basket(), Basket.model_construct()])
def test_an_integer_default_of_a_float_arrives_as_the_equal_float_at_every_depth(message: BaseModel) -> None:
    arrived = arrives(message, CheckedPrices)
    assert arrived == message
    prices = arrived.prices if isinstance(message, Basket) else arrived
    assert [type(item) for item in (prices.price, prices.optional, *prices.items, prices.named)] == [float] * 5
    assert [(type(key), *map(type, pair)) for key, pair in prices.keyed.items()] == [(float, int, float)]


def test_the_equal_float_is_written_without_the_name_of_a_class() -> None:
    assert b"$type" not in Serialization().encode(Prices()).payload


class LeftToRight(BaseModel):
    number: Annotated[float | int, Field(union_mode="left_to_right")] = 0


class TooLarge(BaseModel):
    number: float = 2**53 + 1


class Truth(BaseModel):
    number: float = True


@pytest.mark.parametrize("message", [LeftToRight(), TooLarge(), Truth()])
def test_an_integer_that_is_not_meant_as_a_float_or_has_no_equal_one_is_refused(message: BaseModel) -> None:
    with pytest.raises(CannotSerialize, match="number: "):
        Serialization().encode(message)


class Chosen(typing_extensions.TypedDict):
    color: Color


class ByValue(BaseModel):
    model_config = ConfigDict(use_enum_values=True)
    color: Color = Color.RED


class ListByValue(ByValue):
    color: list[Color | None] = [Color.RED]  # type: ignore[assignment]


class KeyByValue(ByValue):
    color: dict[Color, int] = {Color.RED: 1}  # type: ignore[assignment]


class TypedDictByValue(ByValue):
    color: Chosen = {"color": Color.RED}  # type: ignore[assignment]


class ValidatedByValue(ByValue):
    model_config = ConfigDict(validate_default=True)


@pytest.mark.parametrize("message", [ByValue(), ListByValue(), KeyByValue(), TypedDictByValue()])
def test_a_member_that_the_receiver_would_replace_by_its_value_is_refused(message: BaseModel) -> None:
    with pytest.raises(CannotSerialize, match="color"):
        Serialization().encode(message)


def test_the_refusal_of_a_default_that_is_not_validated_names_the_setting() -> None:
    with pytest.raises(CannotSerialize, match="color: .* set validate_default=True"):
        Serialization().encode(ByValue())


@pytest.mark.parametrize("message", [ByValue(color=Color.RED), ListByValue(color=["red"]), ValidatedByValue()])
def test_values_of_members_arrive(message: BaseModel) -> None:
    assert difference(message, arrives(message)) is None


def left_out(kind: Any, default: Any, absent: Any) -> BaseModel:
    """A model with a field that is not written if its value is ``absent``, as it is here."""
    if "exclude_if" not in inspect.signature(Field).parameters:
        pytest.skip("this version of Pydantic has no exclude_if")
    field = Field(default, exclude_if=lambda value: value == absent)
    made: BaseModel = create_model("LeftOut", count=(kind, field), other=(int, 1))(count=absent)
    return made


@pytest.mark.parametrize(("kind", "default", "absent"), [(int, 5, 0), (list[Dog], [Dog()], []), (int, ..., 0)])
def test_a_value_that_is_left_out_is_refused_where_the_default_is_another(kind: Any, default: Any, absent: Any) -> None:
    message = left_out(kind, default, absent)
    for sent in (message, create_model("Outer", held=(list[type(message)], ...))(held=[message])):  # type: ignore[misc]
        with pytest.raises(CannotSerialize, match="count: Pydantic leaves the value out"):
            Serialization().encode(sent)


def test_a_value_that_is_left_out_arrives_where_it_is_the_default() -> None:
    for message in (left_out(int, 0, 0), left_out(list[Dog], [], [])):
        assert b"count" not in Serialization().encode(message).payload
        assert difference(message, arrives(message)) is None


class AnyRoot(RootModel[Any]):
    pass


class DictRoot(RootModel[dict[str, Any]]):
    pass


class NumbersRoot(RootModel[dict[str, int]]):
    pass


class DogRoot(RootModel[Dog]):
    pass


class UnionRoot(RootModel[Cat | Dog]):
    pass


class RootRoot(RootModel[DogRoot | UnionRoot | AnyRoot]):
    pass


class RootList(RootModel[list[UnionRoot | DictRoot | int]]):
    pass


ROOTS = [
    AnyRoot(Dog()),
    AnyRoot(AnyRoot(Puppy(months=1))),
    AnyRoot({"$type": "Dog", "value": 1}),
    DictRoot({"$type": "Dog", "n": DictRoot({"$type": 1})}),
    NumbersRoot({"$type": 1, "value": 2}),
    DogRoot(Dog()),
    DogRoot(Puppy(months=1)),
    UnionRoot(Cat()),
    UnionRoot(Puppy(months=1)),
    RootRoot(DogRoot(Puppy(months=1))),
    RootRoot(UnionRoot(Cat())),
    RootRoot(AnyRoot({"$type": 1})),
    RootList([UnionRoot(Dog()), DictRoot({"$type": "x"}), 1]),
]


@pytest.mark.parametrize("root", ROOTS, ids=repr)
def test_a_root_model_whose_root_carries_the_name_of_a_class_arrives(root: Any) -> None:
    declared = create_model("Declared", value=(type(root), ...))
    union = create_model("Union", value=(type(root) | Cat | None, ...))
    anything = create_model("Anything", value=(Any, ...))
    data = dataclasses.make_dataclass("Data", [("value", Any), ("declared", type(root))])
    for message in (root, declared(value=root), union(value=root), anything(value=root), data(root, root)):
        assert difference(message, arrives(message, *map(type, ROOTS), Cat, Dog, Puppy)) is None


class Texts(BaseModel):
    dogs: Json[list[Dog]]
    dog: Json[Dog] | None = None
    several: list[Json[Dog]] = []
    some: Annotated[Json[list[Dog]], Field(min_length=1)]


def test_json_of_models_arrives() -> None:
    one = Dog().model_dump_json()
    message = Texts(dogs=f"[{one}]", dog=one, several=[one], some=f"[{one}]")
    assert difference(message, arrives(message)) is None
    message.dogs = [Puppy(months=1)]
    with pytest.raises(CannotSerialize, match="dogs: Pydantic changes it: a value of type Puppy"):
        Serialization().encode(message)


def test_a_field_that_may_be_missing_arrives_in_a_model_and_is_named_in_a_dataclass() -> None:
    sentinel: Any = getattr(pydantic_core, "MISSING", None)
    if sentinel is None:
        pytest.skip("this version of Pydantic has no MISSING")
    cls = create_model(
        "Sparse", count=(int | sentinel, sentinel), dog=(Dog | sentinel, sentinel), last=(int | sentinel, 5)
    )
    for message in (cls(), cls(count=1, dog=Dog(), last=2)):
        assert difference(message, arrives(message)) is None
    with pytest.raises(CannotSerialize, match="last: Pydantic leaves the value out"):
        Serialization().encode(cls(last=sentinel))
    data = dataclasses.make_dataclass("SparseData", [("count", int | sentinel)])
    with pytest.raises(CannotSerialize, match="count: values of type MISSING cannot be sent"):
        Serialization().encode(data(1))


class Unfit:
    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        raise ValueError("no schema")


def test_a_class_whose_schema_raises_is_refused_by_the_name_of_the_field() -> None:
    cls = dataclasses.make_dataclass("WithUnfit", [("thing", Unfit)])
    with pytest.raises(CannotSerialize, match=r"thing: values of type .*Unfit.* cannot be sent \(ValueError\)"):
        Serialization().encode(cls(Unfit()))
