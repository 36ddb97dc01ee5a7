"""Messages come back equal and of the same type, or are refused before they are sent."""

from __future__ import annotations

import abc
import dataclasses
import datetime
import decimal
import enum
import gc
import ipaddress
import json
import sys
import traceback
import types
import uuid
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, NotRequired, Protocol, TypedDict, TypeVar

import orjson
import pytest
from autogen_core import Image, UnknownPayload, try_get_known_serializers_for_type
from google.protobuf import any_pb2, duration_pb2, struct_pb2, wrappers_pb2  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    RootModel,
    computed_field,
    create_model,
    field_validator,
    model_serializer,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

from natsrt.errors import CannotDecode, CannotSerialize
from natsrt.wire.known_classes import KnownClasses, NamedClasses, in_this_process
from natsrt.wire.message_classes import full_name, type_name_of
from natsrt.wire.serialization import BYTES, JSON, PROTOBUF, Serialization, serializer_for

VECTORS = json.loads((Path(__file__).parent / "vectors" / "messages.json").read_text())
T = TypeVar("T")


class Role(enum.Enum):
    USER = "user"
    TOOL = "tool"


class Level(enum.IntEnum):
    LOW = 1


class Odd(enum.Enum):
    PAIR = (1, 2)
    OTHER = 3


@dataclasses.dataclass
class Flat:
    text: str
    n: int


@dataclasses.dataclass
class Shape:
    name: str


@dataclasses.dataclass
class Circle(Shape):
    r: float


@dataclasses.dataclass(slots=True, kw_only=True)
class Square(Shape):
    side: int


@dataclasses.dataclass
class Drawing:
    shape: Shape
    more: list[Shape]
    either: Circle | Square | None
    note: Any
    at: datetime.datetime | str
    by_id: dict[int, str]


class Model(BaseModel):
    x: int


class SubModel(Model):
    y: int


class Holder(BaseModel):
    model: Model
    extra: dict[str, Any]


class Names(RootModel[dict[str, int]]):
    pass


class Stamp(BaseModel):
    at: str | datetime.datetime
    by: uuid.UUID | str


class TripOptions(TypedDict):
    depth: int
    pet: NotRequired[Shape]


@dataclasses.dataclass
class Trip:
    options: TripOptions


class Abstract(abc.ABC):
    @abc.abstractmethod
    def area(self) -> float: ...


@dataclasses.dataclass
class Concrete(Abstract):
    size: float

    def area(self) -> float:
        return self.size


class HasArea(Protocol):
    def area(self) -> float: ...


@dataclasses.dataclass
class Box(Generic[T]):
    item: T
    items: list[T] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class FlatBox(Box[Flat]):
    pass


@dataclasses.dataclass(frozen=True, slots=True)
class Tree:
    name: str
    children: tuple[Tree, ...] = ()


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Everything:
    raw: bytes = b"\x00\xff"
    moment: datetime.datetime = datetime.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=datetime.UTC)
    day: datetime.date = datetime.date(2026, 1, 2)
    hour: datetime.time = datetime.time(3, 4)
    span: datetime.timedelta = datetime.timedelta(days=1, microseconds=5)
    id: uuid.UUID = uuid.UUID(int=7)
    price: decimal.Decimal = decimal.Decimal("1.50")
    role: Role = Role.TOOL
    level: Level = Level.LOW
    odd: Odd = Odd.PAIR
    literal: Literal["a", 3, True] = 3
    pair: tuple[int, Shape] = (1, Circle("c", 1.0))
    tags: frozenset[str] = frozenset({"a", "b"})
    point: Point = Point(1, 2)
    address: ipaddress.IPv4Address | None = ipaddress.IPv4Address("10.0.0.1")
    by_day: dict[datetime.date, Shape] = dataclasses.field(
        default_factory=lambda: {datetime.date(2026, 1, 1): Shape("s")}
    )
    words: Sequence[str] = ("a", "b")
    number: int | float = 1.0
    role_or_text: Role | str = Role.USER
    lists: list[int] | list[str] = dataclasses.field(default_factory=lambda: ["a"])
    dict_or_shape: dict[str, Any] | Shape = dataclasses.field(default_factory=lambda: {"$type": "Shape", "name": 1})
    names: Names | dict[str, int] | None = None
    model: Model = dataclasses.field(default_factory=lambda: SubModel(x=1, y=2))
    any_model: BaseModel = dataclasses.field(default_factory=lambda: SubModel(x=1, y=2))
    abstract: Abstract = dataclasses.field(default_factory=lambda: Concrete(2.0))
    boxed: Box[Flat] | None = dataclasses.field(default_factory=lambda: Box(Flat("a", 1), [Flat("b", 2)]))
    flat_box: FlatBox | None = dataclasses.field(default_factory=lambda: FlatBox(Flat("a", 1)))
    tree: Tree = Tree("root", (Tree("leaf"),))
    implicit: str = None  # type: ignore[assignment]
    computed: int = dataclasses.field(init=False, default=3)


def registry(*classes: type) -> Serialization:
    serialization = Serialization()
    for cls in classes:
        serialization.add_class(cls)
    return serialization


def round_trip(message: Any, *classes: type) -> Any:
    """``message`` after a journey between two runtimes; both know its class, the receiver ``classes`` too."""
    encoded = registry().encode(message)
    return registry(*dict.fromkeys((type(message), *classes))).decode(*encoded)


def shape(value: Any) -> Any:
    """The types and values at every depth, without the order of sets."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), {field.name: shape(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, BaseModel):
        return type(value), {name: shape(item) for name, item in value}
    if isinstance(value, dict):
        return type(value), [(shape(key), shape(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [shape(item) for item in value]
    if isinstance(value, set | frozenset):
        return type(value), sorted(repr(shape(item)) for item in value)
    return type(value), repr(value)


def assert_same(message: Any, *classes: type) -> None:
    back = round_trip(message, *classes)
    assert back == message
    assert shape(back) == shape(message), "the types differ somewhere"


# Vectors


def vector_values() -> dict[str, Any]:
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    return {
        "plain_string": "hi",
        "none": None,
        "plain_dict_with_the_reserved_key_at_the_top": {"$type": "mine", "n": 1},
        "plain_list_with_a_dict_with_the_reserved_key": [{"$type": "mine", "n": 1}, 2.5, None],
        "plain_list_with_a_dataclass": [Circle("c", 1.0)],
        "declared_classes_need_no_mark": Drawing(Shape("s"), [], None, [1, "two"], "noon", {7: "seven"}),
        "subclasses_unions_and_any_are_marked": Drawing(
            Circle("c", 1.5),
            [Shape("s"), Square(name="q", side=2)],
            Square(name="q", side=3),
            {"inner": Circle("c", 2.0)},
            moment,
            {},
        ),
        "model_subclass_keeps_its_type": Holder(
            model=SubModel(x=1, y=2), extra={"$type": "kept", "deep": {"$type": "kept"}}
        ),
        "a_model_leaves_to_pydantic_what_arrives_as_it_was": Stamp(at="noon", by=uuid.UUID(int=7)),
        "a_model_marks_what_pydantic_would_confuse": Stamp(at=moment, by=str(uuid.UUID(int=7))),
        "typed_dicts_are_objects": Trip({"depth": 1, "pet": Circle("c", 1.0)}),
        "root_model_with_the_reserved_key": Names({"$type": 1}),
        "circle": Circle("c", 1.0),
    }


VECTOR_CLASSES = (Circle, Square, Drawing, Holder, Names, Stamp, Trip)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("vector", VECTORS["written"], ids=lambda vector: vector["name"])
def test_messages_are_written_and_read_as_the_vectors_say(vector: dict[str, Any]) -> None:
    value = vector_values()[vector["name"]]
    serialization = registry(*VECTOR_CLASSES)
    encoded = serialization.encode(value)
    assert (encoded.type_name, encoded.content_type) == (vector["messagetype"], JSON)
    assert json.loads(encoded.payload) == vector["data"]
    back = serialization.decode(vector["messagetype"], JSON, orjson.dumps(vector["data"]))
    assert repr(back) == repr(value)


@pytest.mark.parametrize("vector", VECTORS["unreadable"], ids=lambda vector: vector["why"])
def test_bodies_that_the_vectors_call_unreadable_are_refused(vector: dict[str, Any]) -> None:
    with pytest.raises(CannotDecode):
        registry(*VECTOR_CLASSES).decode(vector["messagetype"], JSON, orjson.dumps(vector["data"]))


@pytest.mark.parametrize("vector", VECTORS["read_leniently"], ids=lambda vector: vector["why"])
def test_bodies_of_newer_senders_are_read_as_the_vectors_say(vector: dict[str, Any]) -> None:
    back = registry(*VECTOR_CLASSES).decode(vector["messagetype"], JSON, orjson.dumps(vector["data"]))
    assert repr(back) == repr(vector_values()[vector["name"]])


def test_the_class_name_comes_first() -> None:
    payload = registry().encode([Circle("c", 1.0)]).payload
    assert payload.startswith(b'[{"$type":"Circle"')


# Dataclasses


def test_every_kind_of_dataclass_field_comes_back_as_its_own_type() -> None:
    assert_same(Everything())
    assert_same(
        Everything(role_or_text="user", lists=[1], number=1, words=["a"], names=Names({"$type": 1}), boxed=None)
    )
    assert_same(Everything(names={"$type": 2}, dict_or_shape=Circle("c", 1.0), address=None, literal=True))


def test_a_generic_message_without_arguments_marks_what_it_holds() -> None:
    assert_same(Box(Flat("a", 1), [Flat("b", 2)]), Flat)


def test_an_init_false_field_keeps_its_value_and_frozen_ones_too() -> None:
    message = Everything()
    message.computed = 99
    assert round_trip(message).computed == 99


def test_a_dataclass_is_built_by_its_constructor() -> None:
    @dataclasses.dataclass
    class Checked:
        n: int
        seen: bool = dataclasses.field(init=False, compare=False)

        def __post_init__(self) -> None:
            if self.n < 0:
                raise ValueError("negative 4711")
            self.seen = True

    serialization = registry(Checked)
    assert serialization.decode("Checked", JSON, b'{"n":1}').seen
    with pytest.raises(CannotDecode, match="ValueError") as caught:
        serialization.decode("Checked", JSON, b'{"n":-1}')
    assert "4711" not in str(caught.value)


def test_a_class_whose_constructor_needs_more_than_its_fields_is_refused() -> None:
    @dataclasses.dataclass
    class NeedsMore:
        n: dataclasses.InitVar[int]

    @dataclasses.dataclass
    class HasDefault:
        n: int
        extra: dataclasses.InitVar[int] = 0

    for cls, name in ((NeedsMore, "n"), (HasDefault, "extra")):
        with pytest.raises(CannotSerialize, match=f"takes {name}, which is not a field"):
            serializer_for(cls)


def test_local_classes_with_postponed_annotations_are_resolved_while_their_function_runs() -> None:
    @dataclasses.dataclass
    class Item:
        v: int

    @dataclasses.dataclass
    class Order:
        items: list[Item]

    assert_same(Order([Item(1)]))


def test_an_annotation_that_means_nothing_is_refused() -> None:
    cls = dataclasses.make_dataclass("Broken", [("x", "Nonsense")])
    with pytest.raises(CannotSerialize, match="Nonsense"):
        registry().encode(cls(1))


def test_a_protocol_takes_known_classes_that_have_no_relation_to_it() -> None:
    @dataclasses.dataclass
    class Uses:
        thing: HasArea

    assert_same(Uses(Concrete(1.0)))
    with pytest.raises(CannotDecode, match="Nowhere"):
        registry(Uses).decode("Uses", JSON, b'{"thing":{"$type":"Nowhere","size":1}}')


def test_pydantic_dataclasses_are_messages_too() -> None:
    @pydantic_dataclass
    class Strict:
        n: int
        when: datetime.datetime

    assert_same(Strict(1, datetime.datetime(2026, 1, 1)))
    with pytest.raises(CannotDecode):
        registry(Strict).decode("Strict", JSON, b'{"n":"x","when":"2026-01-01T00:00:00"}')


def test_missing_fields_are_named() -> None:
    with pytest.raises(CannotDecode, match=r"more\.\[\]\.name|more\[\]\.name"):
        registry(Drawing).decode(
            "Drawing", JSON, b'{"shape":{"name":"a"},"more":[{}],"either":null,"note":0,"at":"","by_id":{}}'
        )


# Pydantic models


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    when: datetime.datetime
    id: uuid.UUID
    price: decimal.Decimal
    pair: tuple[int, str]
    tags: set[int]
    by_number: dict[int, str]
    blob: bytes
    role: Role


class StrictHolder(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    when: datetime.datetime
    base: Model
    shapes: list[Circle | Square]


def strict() -> Strict:
    return Strict(
        when=datetime.datetime(2026, 1, 1),
        id=uuid.UUID(int=1),
        price=decimal.Decimal("1.5"),
        pair=(1, "a"),
        tags={1},
        by_number={1: "a"},
        blob=b"abc",
        role=Role.USER,
    )


def test_strict_models_come_back_from_json() -> None:
    assert_same(strict())
    assert_same(
        StrictHolder(
            when=datetime.datetime(2026, 1, 1),
            base=SubModel(x=1, y=2),
            shapes=[Circle("c", 1.0), Square(name="s", side=1)],
        )
    )


def test_aliases_are_written_as_they_are_read() -> None:
    class Aliased(BaseModel):
        a: int = Field(alias="A")
        b: int = Field(validation_alias=AliasChoices("b1", "b2"))
        c: int = Field(serialization_alias="only-written")
        d: int = Field(alias="e")
        e: int = Field(alias="d")

    class AliasedHolder(BaseModel):
        items: list[Model] = Field(alias="Items")
        n: int = Field(alias="N")

    message = Aliased(A=1, b1=2, c=3, e=4, d=5)
    assert json.loads(registry().encode(message).payload) == {"A": 1, "b1": 2, "c": 3, "e": 4, "d": 5}
    assert_same(message)
    assert_same(AliasedHolder(Items=[SubModel(x=1, y=2)], N=1))


def test_a_field_read_from_a_path_is_refused_instead_of_being_lost() -> None:
    class FromPath(BaseModel):
        a: int = Field(validation_alias=AliasPath("x", "y"))

    with pytest.raises(CannotSerialize, match="a: its alias is a path"):
        registry().encode(FromPath.model_validate({"x": {"y": 1}}))


def test_computed_fields_and_private_attributes_stay_at_home() -> None:
    class Computed(BaseModel):
        model_config = ConfigDict(extra="forbid")
        n: int
        _secret: int = PrivateAttr(default=0)

        @computed_field  # type: ignore[prop-decorator]
        @property
        def double(self) -> int:
            return 2 * self.n

    assert registry().encode(Computed(n=2)).payload == b'{"n":2}'
    assert_same(Computed(n=2))


def test_extra_fields_come_back_and_the_reserved_name_is_refused_among_them() -> None:
    class Open(BaseModel):
        model_config = ConfigDict(extra="allow")
        n: int

    assert_same(Open(n=1, more=[1, {"a": Circle("c", 1.0)}]), Circle)
    with pytest.raises(CannotSerialize, match=r"\$type"):
        registry().encode(Open.model_validate({"n": 1, "$type": "Model"}))
    with pytest.raises(CannotSerialize, match=r"\$type"):
        serializer_for(type("Reserved", (BaseModel,), {"__annotations__": {"a": int}, "a": Field(alias="$type")}))


def test_root_models_and_generic_models_come_back() -> None:
    class Shapes(RootModel[list[Shape]]):
        pass

    class Page(BaseModel, Generic[T]):
        items: list[T]

    assert_same(Names({"a": 1}))
    assert_same(Shapes([Circle("c", 1.0), Shape("s")]))
    page = Page[Model](items=[SubModel(x=1, y=2)])
    assert type_name_of(type(page)) == "Page[Model]"
    assert_same(page)


def test_validators_and_serializers_of_a_model_apply() -> None:
    class Custom(BaseModel):
        words: list[str]
        shape: Shape

        @field_validator("words", mode="before")
        @classmethod
        def split(cls, value: Any) -> Any:
            return value.split() if isinstance(value, str) else value

    class Written(BaseModel):
        n: int

        @model_serializer
        def write(self) -> dict[str, Any]:
            return {"n": self.n + 0}

    serialization = registry(Custom)
    assert serialization.decode(
        "Custom", JSON, b'{"words":"a b","shape":{"$type":"Circle","name":"c","r":1}}'
    ) == Custom(words=["a", "b"], shape=Circle("c", 1.0))
    assert_same(Written(n=1))


def test_integers_of_any_size_travel_in_models_but_nan_does_not() -> None:
    class Numbers(BaseModel):
        n: int
        f: float | None = None
        m: Model | None = None

    class CarriesNan(BaseModel):
        model_config = ConfigDict(ser_json_inf_nan="strings")
        f: float

    assert_same(Numbers(n=2**100))
    assert_same(Numbers(n=2**100, m=SubModel(x=2**90, y=1)))
    for bad in (Numbers(n=1, f=float("inf")), Numbers(n=1, f=float("nan"), m=Model(x=1))):
        with pytest.raises(CannotSerialize, match="f: JSON has no NaN"):
            registry().encode(bad)
    assert round_trip(CarriesNan(f=float("inf"))).f == float("inf")


def test_a_model_that_holds_something_else_than_declared_is_refused() -> None:
    class Scalars(BaseModel):
        n: int
        s: str = "secret-value"

    wrong: dict[str, Any] = {"n": "secret-value", "model": "secret-value", "extra": {}}
    for message in (Scalars.model_construct(**wrong), Holder.model_construct(**wrong)):
        with pytest.raises(CannotSerialize) as caught:
            registry().encode(message)
        assert "secret-value" not in "".join(traceback.format_exception(caught.value))


# Plain values, images, protobuf


@pytest.mark.parametrize(
    "value", ["", "a\x00ü", 0, -(2**63), 2**64 - 1, 1.5, -0.0, True, False, None, [], {}, b"", b"\xff\x00"]
)
def test_plain_values_come_back(value: Any) -> None:
    back = round_trip(value)
    assert back == value and type(back) is type(value)


def test_bytes_travel_as_they_are_and_none_as_null() -> None:
    assert registry().encode(b"\xff") == ("bytes", BYTES, b"\xff", None)
    assert registry().encode(None) == ("None", JSON, b"null", None)


class Text(str):
    pass


@dataclasses.dataclass
class HoldsAny:
    value: Any = None
    flag: int = 0
    ratio: float = 0.0
    text: str = ""


@pytest.mark.parametrize(
    "message",
    [
        float("nan"),
        float("-inf"),
        2**64,
        -(2**63) - 1,
        {1: 2},
        {"a": {None: 1}},
        [(1, 2)],
        {"a": b"x"},
        [{1, 2}],
        "\ud800",
        {"\udfff": 1},
        [datetime.datetime(2026, 1, 1)],
        [Role.USER],
        [Level.LOW],
        [Text("a")],
        Text("a"),
        Level.LOW,
        object(),
        HoldsAny(value=float("nan")),
        HoldsAny(value=(1,)),
        HoldsAny(value=2**70),
        HoldsAny(flag=True),
        HoldsAny(flag=Level.LOW),
        HoldsAny(ratio=float("inf")),
        HoldsAny(ratio=2**60 + 1),
        HoldsAny(ratio=10**400),
        HoldsAny(ratio=True),
        HoldsAny(text=Text("a")),
        HoldsAny(text=1),  # type: ignore[arg-type]
    ],
    ids=lambda value: "a plain object" if type(value) is object else repr(value),
)
def test_what_json_cannot_carry_exactly_is_refused(message: Any) -> None:
    with pytest.raises(CannotSerialize):
        registry().encode(message)


def test_a_list_that_contains_itself_or_is_too_deep_is_refused() -> None:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for message in (cyclic, deep):
        with pytest.raises(CannotSerialize):
            registry().encode(message)
    with pytest.raises(CannotDecode):
        registry().decode("list", JSON, b"[" * 100_000 + b"]" * 100_000)
    with pytest.raises(CannotDecode):
        registry(Tree).decode("Tree", JSON, b'{"name":"a","children":[' * 600 + b"]}" * 600)


def test_an_integer_in_a_float_field_comes_back_as_the_equal_float() -> None:
    back = round_trip(HoldsAny(ratio=3))
    assert back.ratio == 3 and type(back.ratio) is float


def test_images_come_back_alone_and_inside() -> None:
    class Asks(BaseModel):
        content: list[str | Image]

    @dataclasses.dataclass
    class Shows:
        image: Image
        note: Any

    image = Image(PILImage.new("RGB", (2, 2), (1, 2, 3)))
    encoded = registry().encode(image)
    assert encoded.type_name == "Image" and set(json.loads(encoded.payload)) == {"data"}
    shows = round_trip(Shows(image, [image]))
    asks = round_trip(Asks(content=["look", image]))
    for back in (round_trip(image), shows.image, shows.note[0], asks.content[1]):
        assert type(back) is Image and back.to_base64() == image.to_base64()
    with pytest.raises(CannotDecode):
        registry().decode("Image", JSON, b'{"data":"aGFsbG8="}')


def test_protobuf_messages_have_autogens_bytes() -> None:
    message = duration_pb2.Duration(seconds=5)
    encoded = registry().encode(message)
    [autogens] = try_get_known_serializers_for_type(duration_pb2.Duration)
    assert encoded == ("google.protobuf.Duration", PROTOBUF, autogens.serialize(message), None)
    assert round_trip(message) == message
    serialization = registry(duration_pb2.Duration)
    for payload in (b"\xff\xff", any_pb2.Any().SerializeToString(), b"x"):
        with pytest.raises(CannotDecode):
            serialization.decode(*encoded[:2], payload)


# Registering


class Reversed:
    """A serializer of the user's own."""

    data_content_type = JSON
    type_name = "Flat"

    def serialize(self, message: Flat) -> bytes:
        return message.text.encode()[::-1]

    def deserialize(self, payload: bytes) -> Flat:
        return Flat(payload[::-1].decode(), 0)


class Msgpacked(Reversed):
    data_content_type = "application/x-mine"


def test_a_custom_serializer_gets_exactly_its_bytes_whatever_is_registered_beside_it() -> None:
    for custom in (Reversed(), Msgpacked()):
        for later in (False, True):
            serialization = registry() if later else registry(Flat)
            serialization.add(custom)
            if later:
                serialization.add_class(Flat)
                serialization.add(try_get_known_serializers_for_type(Flat))
            content_type = custom.data_content_type
            assert serialization.encode(Flat("abc", 0)) == ("Flat", content_type, b"cba", f"{__name__}.Flat")
            assert serialization.decode("Flat", content_type, b"cba") == Flat("abc", 0)


def test_what_a_custom_serializer_raises_is_ours_and_keeps_the_cause() -> None:
    serialization = Serialization()
    serialization.add(Reversed())
    with pytest.raises(CannotDecode) as decoding:
        serialization.decode("Flat", JSON, b"\xff")
    assert isinstance(decoding.value.__cause__, UnicodeDecodeError) and decoding.value.payload == b"\xff"
    with pytest.raises(CannotSerialize, match="AttributeError"):
        serialization.encode(Flat(None, 1))  # type: ignore[arg-type]


def test_autogens_standard_serializers_are_replaced_for_they_lose_nested_types() -> None:
    serialization = Serialization()
    serialization.add(try_get_known_serializers_for_type(Holder))
    serialization.add(try_get_known_serializers_for_type(Flat))
    message = Holder(model=SubModel(x=1, y=2), extra={})
    assert repr(serialization.decode(*serialization.encode(message))) == repr(message)
    assert serialization.class_of("Holder") is Holder and serialization.class_of("Flat") is Flat


def test_a_users_own_class_may_be_named_like_a_builtin_message() -> None:
    cls = dataclasses.make_dataclass("Image", [("url", str)])
    serialization = registry(cls)
    assert serialization.decode(*serialization.encode(cls("x"))) == cls("x")
    assert serialization.class_of("Image") is cls


def test_an_unknown_type_is_an_unknown_payload_unless_its_class_was_sent_or_is_offered() -> None:
    serialization, other = Serialization(), Serialization()
    encoded = serialization.encode(Flat("a", 1))
    assert not serialization.is_known("Flat") and serialization.is_known("str")
    assert (serialization.content_type_of("bytes"), serialization.content_type_of("Flat")) == (BYTES, JSON)
    assert serialization.class_of("Flat") is None
    assert serialization.decode(*encoded) == UnknownPayload("Flat", JSON, encoded.payload)
    unknown = other.decode(*encoded)
    assert serialization.decode_unregistered(unknown) == Flat("a", 1)
    assert other.decode_unregistered(unknown) == Flat("a", 1)  # sent from this process
    foreign = UnknownPayload("Foreign", JSON, b"{}")
    assert other.decode_unregistered(foreign) is foreign
    other.add_produced(dataclasses.make_dataclass("Foreign", []))
    assert other.decode_unregistered(foreign) is not foreign
    with pytest.raises(CannotDecode, match="its content type is 'text/plain', and .* only as 'application/json'"):
        registry(Flat).decode("Flat", "text/plain", b"")
    for content_type in ("application/json; charset=utf-8", "application/JSON", "Application/Json;a=b"):
        assert registry(Flat).decode("Flat", content_type, encoded.payload) == Flat("a", 1)
        assert registry(Flat).reply("Flat", content_type, encoded.payload, None, None) == Flat("a", 1)
    assert isinstance(registry(Flat).decode("Unknown", "text/plain", b""), UnknownPayload)
    with pytest.raises(CannotDecode, match="its content type is 'text/json'"):
        registry(Flat).check_reply_type("Flat", "text/json", encoded.payload, None, None)
    with pytest.raises(CannotSerialize):
        serializer_for(object)


def test_a_reply_is_found_by_registration_then_produced_types_then_the_module_of_the_sent_class() -> None:
    @dataclasses.dataclass
    class LocalReply:
        n: int

    def reply(name: str, payload: bytes, sent: type | None = None) -> Any:
        return serialization.reply(name, JSON, payload, None, sent)

    serialization = registry(Shape)
    assert reply("Shape", b'{"name":"a"}') == Shape("a")
    assert reply("Concrete", b'{"size":1}', Flat) == Concrete(1.0)
    assert reply("str", b'"a"') == "a"
    for name in ("LocalReply", "Path", "Role", "registry", "json"):
        assert isinstance(reply(name, b"{}", Flat), UnknownPayload)
    serialization.add_produced(LocalReply)
    assert reply("LocalReply", b'{"n":1}', Flat) == LocalReply(1)
    assert isinstance(reply("Nowhere", b"{}", dict), UnknownPayload)


# Classes of one name, and classes that are defined again


def item(module: str, *fields: tuple[str, Any], name: str = "Item", **namespace: Any) -> Any:
    """A dataclass that seems to be defined in ``module``."""
    made = dataclasses.make_dataclass(name, fields or [("name", str)], namespace=namespace)
    made.__module__ = module  # an argument of make_dataclass since Python 3.12 only
    return made


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that knows no class of any other test."""
    monkeypatch.setattr(in_this_process, "_classes", {})


def handling(*classes: Any) -> NamedClasses:
    handled = NamedClasses()
    for cls in classes:
        handled.add(cls.__name__, cls)
    return handled


@pytest.mark.usefixtures("alone")
def test_several_classes_of_one_name_are_written_and_read_as_the_vectors_say() -> None:
    vectors = VECTORS["several_classes"]
    classes = {f"{module}.Item": item(module) for module in ("orders", "payments")}
    alone = vectors["alone"]
    assert json.loads(Serialization().encode([classes["orders.Item"]("a")]).payload) == alone["data"]
    for vector in vectors["written"]:
        values = [classes[name]("a") for name in vector["classes"]]
        serialization = registry(*classes.values())
        assert json.loads(serialization.encode(values).payload) == vector["data"]
        assert serialization.decode(vector["messagetype"], JSON, orjson.dumps(vector["data"])) == values
    for vector in vectors["unreadable"]:
        with pytest.raises(CannotDecode, match=r"orders\.Item and payments\.Item.*\$class"):
            registry(*classes.values()).decode(vector["messagetype"], JSON, orjson.dumps(vector["data"]))


def test_the_full_name_decides_between_classes_of_one_name() -> None:
    first, second = item("orders"), item("payments")
    serialization = registry(first, second)
    for cls in (first, second):
        encoded = serialization.encode(cls("a"))
        assert (encoded.type_name, encoded.class_name) == ("Item", f"{cls.__module__}.Item")
        assert type(serialization.decode(*encoded)) is cls
        assert type(serialization.decode(f"{cls.__module__}.Item", JSON, encoded.payload)) is cls
        assert type(serialization.decode(*encoded, handling(first))) is cls
        assert type(serialization.reply(*encoded, None, second)) is cls
        assert serialization.is_known(f"{cls.__module__}.Item")
    assert serialization.content_type_of("orders.Item") == JSON


def test_without_a_full_name_the_agents_handlers_decide_and_then_the_fields() -> None:
    first, second = item("orders"), item("payments")
    serialization = registry(first, second, item("others", ("other", int)))
    for name in (None, "nowhere.Item"):  # a class of the sender's own, by which it means the same
        for cls in (first, second):
            assert type(serialization.decode("Item", JSON, b'{"name":"a"}', name, handling(cls))) is cls
        assert serialization.decode("Item", JSON, b'{"other":1}', name).other == 1
        for handled in (handling(), handling(first, second)):
            with pytest.raises(CannotDecode, match=r"orders\.Item and.*payments\.Item.*messageclass") as raised:
                serialization.decode("Item", JSON, b'{"name":"a"}', name, handled)
            assert raised.value.payload == b'{"name":"a"}'
        assert type(serialization.reply("Item", JSON, b'{"name":"a"}', name, None, second)) is second
    with pytest.raises(CannotDecode, match="fits none of the classes"):
        serialization.decode("Item", JSON, b'{"neither":1}')


def test_a_class_that_this_process_knows_is_not_read_as_another_one_of_its_name() -> None:
    first, second = item("orders"), item("payments")
    encoded = registry().encode(second("a"))
    receiver = registry(first)
    unknown = receiver.decode(*encoded, handling(first))
    assert unknown == UnknownPayload("Item", JSON, encoded.payload)
    assert receiver.decode_unregistered(unknown, "payments.Item") == second("a")


def test_plain_values_and_protobuf_messages_have_no_full_name() -> None:
    for message in ("a", [1], None, duration_pb2.Duration(seconds=1)):
        assert registry().encode(message).class_name is None
    assert registry().encode(Outer.Inner("a")).class_name == f"{__name__}.Outer.Inner"


class Outer:
    @dataclasses.dataclass
    class Inner:
        name: str


class Page(BaseModel, Generic[T]):
    items: list[T] = []


@pytest.mark.usefixtures("alone")
def test_the_full_name_of_a_generic_model_has_those_of_its_parameters() -> None:
    """The types of their fields differ only by module, so their own names do not tell them apart."""
    first, second = item("orders", ("n", int), ("more", int, 0)), item("payments", ("n", int), ("amount", float, 0.0))
    for parameter in VECTORS["generic"]:
        hints = [
            eval(parameter["parameter"], {"Item": cls, "Page": Page, "Literal": Literal, "Any": Any})
            for cls in (first, second)
        ]
        pages = [Page[hint] for hint in hints]
        names = [full_name(page) for page in pages]
        assert names[0] == parameter["full_name"].replace("pages", __name__)
        assert names[1] == names[0].replace("orders", "payments")
    pages = [Page[first], Page[second]]
    values = [pages[0](items=[first(1, 5)]), pages[1](items=[second(1, 2.5)])]
    serialization = registry(*pages)
    handled = handling(*pages)
    either = dataclasses.make_dataclass("Either", [("value", pages[0] | pages[1])])
    for value in values:
        encoded = serialization.encode(value)
        assert serialization.decode(*encoded, handled) == value
        assert serialization.reply(*encoded, type(value)) == value
        assert_same([value], *pages)
        assert_same(either(value))
        assert registry(type(value)).decode("Page[Item]", JSON, encoded.payload, f"{__name__}.Page[Item]") == value


def two_of_one_name(kind: str) -> tuple[Any, Any]:
    if kind == "models":
        return create_model("Twin", x=(int, ...)), create_model("Twin", x=(int, ...), y=(int, 5))
    made = [item(__name__, ("x", int), *more, name="Twin") for more in ((), [("y", int, 5)])]
    return made[0], made[1]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", ["models", "dataclasses"])
@pytest.mark.parametrize("last", [0, 1])
def test_what_would_arrive_as_another_class_of_its_full_name_is_refused(kind: str, last: int) -> None:
    twins = two_of_one_name(kind)
    former, latest = twins[1 - last](x=1), twins[last](x=1)
    serialization = registry(type(former))
    serialization.encode(former)  # it is the only one
    registry(type(latest))  # of another runtime of this process
    holder = dataclasses.make_dataclass("Holder", [("value", Any)])
    declared = dataclasses.make_dataclass("Declared", [("value", type(former))])
    for message in (former, [former], holder(former), holder({"a": [former]}), HoldsAny(value=former)):
        with pytest.raises(CannotSerialize, match=r"two classes have the full name .*Twin"):
            serialization.encode(message)
    for message in (latest, [latest], holder(latest), HoldsAny(value=latest), declared(former)):
        assert_same(message)


@pytest.mark.usefixtures("alone")
def test_what_two_classes_of_one_full_name_read_alike_is_sent_and_a_reply_is_of_the_senders_class() -> None:
    inner = [item(__name__, ("n", int), name="Inner") for _ in "ab"]
    former, latest = (item(__name__, ("inner", cls), name="Twin") for cls in inner)
    serialization = registry(former, latest)
    for sent, cls, part in ((former, former, inner[0]), (latest, latest, inner[1]), (None, latest, inner[1])):
        arrived = serialization.reply(*serialization.encode(former(inner[0](1))), sent)
        assert arrived == cls(part(1))
    assert type(serialization.reply(*serialization.encode(former(inner[0](1))), former, latest)) is latest
    other = item(__name__, ("inner", inner[1]), ("more", int), name="Twin")
    serialization = registry(former, other)
    reply = serialization.encode(other(inner[1](1), 2))
    assert serialization.reply(*reply, former) == other(inner[1](1), 2)


@pytest.mark.usefixtures("alone")
def test_types_count_where_two_classes_of_one_full_name_are_compared() -> None:
    text, moment = item(__name__, ("at", str), name="Twin"), item(__name__, ("at", datetime.datetime), name="Twin")
    serialization = registry(text, moment)
    for message in (text("2026-01-02T03:04:05"), [text("2026-01-02T03:04:05")], text("noon"), [text("noon")]):
        with pytest.raises(CannotSerialize, match="two classes have the full name"):
            serialization.encode(message)


def test_nested_classes_of_one_name_keep_their_class() -> None:
    first, second = item("orders"), item("payments", name="Item")
    either = dataclasses.make_dataclass("Either", [("value", first | second), ("many", list[first | second])])  # type: ignore[valid-type]
    base = dataclasses.make_dataclass("Base", [("name", str)])
    subs = [item(module, ("name", str), name="Sub") for module in ("orders", "payments")]
    family = [dataclasses.make_dataclass("Sub", [("n", int)], bases=(base,)) for _ in "ab"]
    for one, module in zip(family, "ab", strict=True):
        one.__module__ = module
    holder = dataclasses.make_dataclass("HoldsBase", [("value", base)])
    model = type("Roots", (BaseModel,), {"__annotations__": {"value": Any}, "__module__": __name__})
    roots = [type("Root", (RootModel[list[int]],), {"__module__": module}) for module in ("orders", "payments")]
    for cls in (first, second):
        assert_same(either(cls("a"), [first("b"), second("c")]))
        assert_same({"k": [HoldsAny(value=cls("a"))]})
        assert_same(model(value=[cls("a")]))
    for cls in family:
        assert_same(holder(cls("a", 1)))
    for cls in (*subs, *roots):
        assert_same([cls([1]) if cls in roots else cls("a")])


def test_a_name_means_the_class_in_the_module_of_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its sender means it, which knows no other class of this name."""
    modules = {name: types.ModuleType(name) for name in ("shop_a", "shop_b")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        for cls in (item(name), item(name, ("items", list[Any]), name="Batch")):
            setattr(module, cls.__name__, cls)
    serialization = registry(*(vars(module)["Batch"] for module in modules.values()))
    for name, module in modules.items():
        back = serialization.decode("Batch", JSON, b'{"items":[{"$type":"Item","name":"a"}]}', f"{name}.Batch")
        assert type(back.items[0]) is module.Item


def test_a_field_with_a_reserved_name_is_refused_only_where_the_class_must_be_named() -> None:
    class Open(BaseModel):
        model_config = ConfigDict(extra="allow")

    message = Open(**{"$class": "a"})
    assert repr(round_trip(message)) == repr(message)
    with pytest.raises(CannotSerialize, match=r"\$class"):
        registry().encode([message])


def test_the_last_definition_of_a_class_is_written_and_read() -> None:
    for again in range(3):
        serialization = registry() if not again else serialization  # noqa: F821
        cls = item("notebook", ("n", int), *[(f"more{n}", int) for n in range(again)])
        message = cls(*range(again + 1))
        serialization.add_class(cls)
        assert serialization.class_of("Item") is cls
        for back in (serialization.decode(*serialization.encode(message)), round_trip([message])[0]):
            assert type(back) is cls and back == message


def test_former_definitions_are_read_where_an_agent_handles_them() -> None:
    former, later = item("notebook"), item("notebook")
    serialization = registry(former)
    serialization.add_class(later)
    encoded = serialization.encode(later("a"))
    for _ in range(2):
        assert type(serialization.decode(*encoded, handling(former))) is former
        assert type(serialization.decode(*encoded, handling(later))) is later
        assert type(serialization.decode(*encoded)) is later
        assert type(serialization.reply(*encoded, None)) is later


def test_a_former_definition_does_not_come_back() -> None:
    known, former, later = KnownClasses(), item("notebook"), item("notebook")
    assert [known.add("Item", cls) for cls in (former, later, former)] == [False, True, False]
    assert known.named("Item") == [later] and known.find("Item", "notebook.Item") is later


def test_what_a_module_has_under_the_name_is_the_last_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if nobody has sent or registered it yet."""
    module = types.ModuleType("cells")
    monkeypatch.setitem(sys.modules, "cells", module)
    former, module.Item = item("cells"), item("cells")  # type: ignore[attr-defined]
    assert type(registry(former).reply("Item", JSON, b'{"name":"a"}', None, None)) is module.Item


@pytest.mark.parametrize("kind", ["registered", "sent", "nested", "declared", "model", "custom", "received"])
def test_former_definitions_are_forgotten(kind: str) -> None:
    serialization = registry(Flat)
    alive: weakref.WeakSet[type] = weakref.WeakSet()
    for number in range(200):
        cls = item("notebook", ("name", str), name=f"Cell{kind}")
        if kind == "model":
            cls = type("CellModel", (BaseModel,), {"__annotations__": {"name": str}, "__module__": "notebook"})
        message = cls(name=str(number))
        alive.add(cls)
        if kind == "registered":
            serialization.add_class(cls)
        elif kind == "custom":
            serialization.add(Own(cls))
        elif kind == "nested":
            message = HoldsAny(value=[message])
        elif kind == "declared":
            message = item("notebook", ("value", list[cls] | None), name="Holds")([message])  # type: ignore[valid-type]
        encoded = serialization.encode(message)
        if kind == "received":
            assert type(serialization.decode_unregistered(serialization.decode(*encoded), encoded.class_name)) is cls
            assert type(serialization.reply(*encoded, cls, cls)) is cls
        elif kind != "declared":
            assert serialization.reply(*encoded, None) == message
        del cls, message
    gc.collect()
    assert len(alive) <= 20


class Own:
    """A serializer of the user's own for any class with a name."""

    data_content_type = JSON

    def __init__(self, cls: Any) -> None:
        self.cls, self.type_name = cls, cls.__name__

    def serialize(self, message: Any) -> bytes:
        return orjson.dumps(message.name)

    def deserialize(self, payload: bytes) -> Any:
        return self.cls(orjson.loads(payload))


def test_serializers_of_ones_own_are_told_apart_by_their_classes() -> None:
    first, second, third = item("orders"), item("payments"), item("others")
    serialization = registry(third)
    for cls in (first, second):
        serialization.add(Own(cls))
    for cls, payload in ((first, b'"a"'), (second, b'"a"'), (third, b'{"name":"a"}')):
        encoded = serialization.encode(cls("a"))
        assert encoded.payload == payload and type(serialization.decode(*encoded)) is cls
    later = item("orders")
    serialization.add(Own(later))
    assert type(serialization.decode(*serialization.encode(later("a")))) is later


def test_a_serializer_without_a_class_belongs_to_the_class_that_is_used_first() -> None:
    other = item("elsewhere", ("n", int), name="Flat")
    serialization = Serialization()
    serialization.add(Reversed())
    assert serialization.class_of("Flat") is None
    assert serialization.decode("Flat", JSON, b"cba", "sender.Flat") == Flat("abc", 0)
    assert serialization.class_of("Flat") is Flat
    serialization.add_class(other)
    assert serialization.encode(other(1)).payload == b'{"n":1}'
    assert serialization.decode(*serialization.encode(other(1))) == other(1)
    assert serialization.decode(*serialization.encode(Flat("abc", 0))) == Flat("abc", 0)


# Plain bodies


@pytest.mark.parametrize(
    ("body", "candidates", "expected"),
    [
        (b'{"text":"a","n":1}', [Flat, Shape, dict, str], Flat("a", 1)),
        (b'{"name":"a"}', [Flat, Shape, dict], Shape("a")),
        (b'{"other":1}', [Flat, dict], {"other": 1}),
        (b'{"other":1}', [Flat, Any], {"other": 1}),
        (b'{"x":1}', [Model, SubModel], Model(x=1)),
        (b'{"model":{"x":1},"extra":{}}', [Holder], Holder(model=Model(x=1), extra={})),
        (b'"3s"', [duration_pb2.Duration, Flat], duration_pb2.Duration(seconds=3)),
        (b'"hi"', [str, Any], "hi"),
        (b"hi", [str, dict], "hi"),
        (b"5", [int, float], 5),
        (b"5", [str, float], 5.0),
        (b"5", [bytes, Flat], b"5"),
        (b"\xff", [bytes, str], b"\xff"),
        (b"", [str, type(None)], None),
        (b"", [str, Flat], ""),
        (b"null", [type(None), str], None),
    ],
    ids=str,
)
def test_a_plain_body_is_the_one_candidate_that_fits(body: bytes, candidates: list[Any], expected: Any) -> None:
    value = registry().infer(body, candidates)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("body", "candidates", "named"),
    [
        (b'{"text":"a","n":1,"more":1}', [Flat, Shape], "Flat, Shape"),
        (b'{"model":{"x":1,"deep":1},"extra":{}}', [Holder], "Holder"),
        (b'{"shape":{"name":"a","deep":1}}', [Drawing], "Drawing"),
        (b'{"x":1}', [Model, dataclasses.make_dataclass("Twin", [("x", int)]), Flat], "Model, Twin"),
        (b"not json", [Flat, dict], "Flat, dict"),
        (b"\xff", [str], "str"),
        (b"5", [str], "str"),
        (b"{}", [], "none"),
    ],
    ids=str,
)
def test_a_plain_body_that_decides_nothing_names_the_candidates(body: bytes, candidates: list[Any], named: str) -> None:
    with pytest.raises(CannotDecode, match=f"\\({named}\\).*Natsrt-Type"):
        registry().infer(body, candidates)


def test_an_empty_plain_body_is_called_empty() -> None:
    with pytest.raises(CannotDecode, match="it is empty, which fits none of Flat, Shape$"):
        registry().infer(b"", [Shape, Flat])


# Properties

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["$type", "value", "a"]) | st.text(st.characters(exclude_categories=["Cs"])),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
floats = st.floats(allow_nan=False, allow_infinity=False)
shapes = (
    st.builds(Shape, text) | st.builds(Circle, text, floats) | st.builds(Square, name=text, side=st.integers(0, 2**63))
)
anything = st.recursive(
    json_values
    | shapes
    | st.builds(SubModel, x=st.integers(0, 9), y=st.integers(0, 9))
    | st.sampled_from(["dict", "Circle"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["$type", "value", "b"]), inner, max_size=3)
    ),
    max_leaves=6,
)
drawings = st.builds(
    Drawing,
    shapes,
    st.lists(shapes, max_size=3),
    st.none() | st.builds(Circle, text, floats) | st.builds(Square, name=text, side=st.integers(0, 9)),
    anything,
    st.datetimes(timezones=st.none() | st.just(datetime.UTC)).map(lambda moment: moment.replace(fold=0)) | text,
    st.dictionaries(st.integers(-9, 9), text, max_size=3),
)
KNOWN = registry(Circle, Square, Shape, Drawing, SubModel, Holder, Everything, Strict, StrictHolder, Names, Tree, Flat)


@given(st.one_of(drawings, anything, st.lists(anything), st.dictionaries(text, anything)))
@settings(max_examples=300, deadline=None)
def test_whatever_can_be_sent_comes_back_equal_and_of_the_same_types(message: Any) -> None:
    back = KNOWN.decode(*KNOWN.encode(message))
    assert repr(back) == repr(message)


@given(
    st.builds(
        Holder,
        model=st.builds(Model, x=st.integers()) | st.builds(SubModel, x=st.integers(), y=st.integers()),
        extra=st.dictionaries(text | st.just("$type"), anything, max_size=3),
    )
)
@settings(max_examples=150, deadline=None)
def test_models_come_back_equal_and_of_the_same_types(message: Holder) -> None:
    assert repr(KNOWN.decode(*KNOWN.encode(message))) == repr(message)


TYPES = ["Circle", "Drawing", "Holder", "Everything", "Strict", "StrictHolder", "Names", "Tree", "Image", "str", "dict"]
mutilated = st.dictionaries(
    st.sampled_from(
        [
            "$type",
            "value",
            "name",
            "r",
            "shape",
            "more",
            "either",
            "note",
            "at",
            "by_id",
            "model",
            "extra",
            "base",
            "data",
        ]
        + [field.name for field in dataclasses.fields(Everything)]
    ),
    st.sampled_from(["Circle", "SubModel", "Holder", "Names", "dict", "Nobody", "datetime", "tuple[str]", 1e400])
    | json_values,
    max_size=6,
)


@given(st.sampled_from(TYPES), st.one_of(st.binary(), json_values.map(json.dumps), mutilated.map(json.dumps)))
@settings(max_examples=600, deadline=None)
def test_no_payload_raises_anything_but_cannot_decode(type_name: str, payload: bytes | str) -> None:
    body = payload if isinstance(payload, bytes) else payload.encode()
    attempts: list[Callable[[], Any]] = [
        lambda: KNOWN.decode(type_name, JSON, body),
        lambda: KNOWN.infer(body, [cls for cls in (KNOWN.class_of(type_name), Flat, struct_pb2.Value) if cls]),
        lambda: KNOWN.infer(body, [duration_pb2.Duration, wrappers_pb2.StringValue]),
    ]
    for attempt in attempts:
        try:
            attempt()
        except CannotDecode as error:
            assert error.payload == body


@given(st.text(st.characters(categories=["L"]), min_size=12, max_size=20))
@settings(max_examples=50, deadline=None)
def test_the_texts_of_errors_do_not_quote_payloads(secret: str) -> None:
    secret = f"\N{GREEK CAPITAL LETTER OMEGA}{secret}"
    bodies: list[tuple[str, Any]] = [
        ("Circle", {"name": 1, "r": secret}),
        ("Circle", {"r": 1, secret: 1}),
        ("Drawing", {"shape": {"$type": secret}}),
        ("Strict", {"when": secret, "role": secret, "by_number": {secret: secret}, secret: secret}),
        ("Holder", {"model": {"x": secret}, "extra": {}}),
        ("StrictHolder", {"shapes": [{"$type": secret}], "base": secret}),
        ("Names", {secret: secret}),
        ("Everything", {"role": secret, "id": secret, "by_day": {secret: 1}, "moment": secret}),
    ]
    for type_name, body in bodies:
        with pytest.raises(CannotDecode) as caught:
            KNOWN.decode(type_name, JSON, orjson.dumps(body))
        assert secret not in "".join(traceback.format_exception(caught.value))


def test_nothing_is_imported_by_a_name_from_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *args: Any, **kwargs: Any) -> types.ModuleType:
        raise AssertionError(f"{name} was imported")

    serialization = registry(Flat)
    monkeypatch.setattr("builtins.__import__", refuse)
    try:
        reply = serialization.reply("antigravity", JSON, b"{}", "antigravity.geohash", Flat)
        message = serialization.decode("antigravity", JSON, b"{}", "antigravity.geohash")
        with pytest.raises(CannotDecode):
            serialization.decode("list", JSON, b'[{"$type":"system","$class":"os.system","value":1}]')
    finally:
        monkeypatch.undo()
    assert isinstance(reply, UnknownPayload) and isinstance(message, UnknownPayload)


@dataclasses.dataclass
class Ab:
    a: int
    b: int


@dataclasses.dataclass
class Cd:
    c: int
    d: int


def test_a_plain_body_that_is_like_two_types_is_told_why_it_fits_neither() -> None:
    with pytest.raises(CannotDecode) as raised:
        Serialization().infer(b'{"a": 1, "c": 2}', [Ab, Cd])
    assert "; not Ab: " in str(raised.value) and "; not Cd: " in str(raised.value)
    with pytest.raises(CannotDecode) as raised:
        Serialization().infer(b'{"a": 1, "b": 1, "c": 2, "d": 2, "' + b"x" * 5000 + b'": 3}', [Ab, Cd])
    assert len(str(raised.value)) < 600
    with pytest.raises(CannotDecode, match="; the nearest is Ab: expected an object; "):
        Serialization().infer(b'"hello"', [Ab])
    with pytest.raises(CannotDecode, match="; the nearest is Ab: a: the field is missing; "):
        Serialization().infer(b"{}", [Ab])
