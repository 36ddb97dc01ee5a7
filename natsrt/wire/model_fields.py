"""The fields of a Pydantic model that Pydantic writes and reads, and what Pydantic's own code may do to them.

Whether Pydantic carries a field exactly is decided when the class is compiled, as far as the declaration allows. Such a
field has a ``check`` that costs little. The value of any other field is written, read back and compared before the
message is sent.
"""

from __future__ import annotations

import enum
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typing_extensions
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Json,
    PlainSerializer,
    PlainValidator,
    SerializeAsAny,
    Strict,
    TypeAdapter,
    WrapSerializer,
    WrapValidator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticSerializationError, from_json, to_json

from natsrt.wire.codecs import TYPE_KEY, Codec, CodecCompiler, Fault, PlainCheck, Refused, remedy_of
from natsrt.wire.exactness import NOT_FINITE, declared_types, difference, unwritable, value_of_type
from natsrt.wire.model_reader import Inner, functions_of

ABSENT = object()
"""The tree of a field that is not written."""

_FUNCTIONAL = (AfterValidator, BeforeValidator, PlainValidator, WrapValidator, PlainSerializer, WrapSerializer)
_HARMLESS = (Strict, SerializeAsAny)
"""Metadata of Pydantic that may refuse a value, but not change it."""
_CHANGING_SETTINGS = frozenset(
    {
        "json_encoders",
        "ser_json_temporal",
        "ser_json_timedelta",
        "str_strip_whitespace",
        "str_to_lower",
        "str_to_upper",
        "val_temporal_unit",
    }
)
"""The settings of a model with which Pydantic may change text, dates and times."""


def changes_values(cls: type[BaseModel], field: FieldInfo) -> bool:
    """True if the settings of ``cls`` may change the values of ``field``."""
    if cls.model_config.get("use_enum_values") and any(map(_is_enum, _types_in(field.annotation))):
        return True
    return not _CHANGING_SETTINGS.isdisjoint(cls.model_config)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _types_in(hint: Any) -> Iterator[Any]:
    """All types in an annotation, without type aliases and ``Literal``, whose members Pydantic keeps."""
    if typing.get_origin(hint) is typing.Literal:
        return
    if type(hint).__name__ == "TypeAliasType" or isinstance(hint, typing.NewType):
        hint = getattr(hint, "__value__", None) or getattr(hint, "__supertype__", None)
    yield hint
    parts = declared_types(hint).values() if typing_extensions.is_typeddict(hint) else typing.get_args(hint)
    for part in parts:
        yield from _types_in(part)


def may_be_left_out(field: FieldInfo) -> bool:
    """True if a function decides for each value whether it is written: ``exclude_if`` of newer versions of Pydantic."""
    return getattr(field, "exclude_if", None) is not None


def is_functional(hint: Any, metadata: Sequence[Any] = ()) -> bool:
    """True if an annotation contains a validator or serializer function, at any depth.

    ``Json`` counts as one: Pydantic writes the value as text with JSON in it, and reads only text.
    """
    return any(isinstance(item, _FUNCTIONAL) or _is_json(item) for item in _metadata(hint, metadata))


def _is_json(item: Any) -> bool:
    return item is Json or type(item) is Json


def is_harmless(hint: Any, metadata: Sequence[Any] = ()) -> bool:
    """True if no metadata in an annotation, at any depth, lets Pydantic change a value."""
    return all(_keeps_values(item) for item in _metadata(hint, metadata))


def _metadata(hint: Any, metadata: Sequence[Any]) -> Iterator[Any]:
    yield from metadata
    if typing.get_origin(hint) is Annotated:
        for item in hint.__metadata__:
            yield from (item, *item.metadata) if isinstance(item, FieldInfo) else (item,)
    for arg in typing.get_args(hint):
        yield from _metadata(arg, ())


def _keeps_values(item: Any) -> bool:
    if any(getattr(item, setting, None) for setting in ("strip_whitespace", "to_lower", "to_upper")):
        return False
    return isinstance(item, _HARMLESS) or not hasattr(item, "__get_pydantic_core_schema__")


def is_constrained(hint: Any, metadata: Sequence[Any] = ()) -> bool:
    """True if metadata in an annotation, at any depth, may refuse a value."""
    return any(not isinstance(item, SerializeAsAny | FieldInfo) for item in _metadata(hint, metadata))


class ConstrainedCodec(Codec):
    """The codec of a field whose metadata may refuse values, as ``Field(gt=0)`` does, or change them.

    Such values can be assigned to a model that does not validate assignments, but the receiver would refuse or change
    them. ``harmless``: the metadata does not change values. ``is_functional``: it contains functions.
    """

    def __init__(self, inner: Codec, adapter: TypeAdapter[Any], hint: Any, harmless: bool, is_functional: bool) -> None:
        self.name: str = inner.name
        self.kinds: frozenset[type] = inner.kinds
        self.cls: type | None = inner.cls
        self.polymorphic: bool = inner.polymorphic
        self._inner = inner
        self._adapter = adapter
        self._hint = hint
        self._is_functional = is_functional
        self._accepts: PlainCheck = adapter.validator.isinstance_python if harmless else self._keeps

    def _keeps(self, value: Any) -> bool:
        try:
            return difference(value, self._adapter.validate_python(value), self._hint) is None
        except Exception:
            return False

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck | None:
        check, accepts = self._inner.plain_check(inside), self._accepts
        return None if check is None else lambda value: check(value) and accepts(value)

    def encode(self, value: Any) -> Any:
        tree = self._inner.encode(value)
        if not self._accepts(value):
            raise self._refusal(value)
        return tree

    def _refusal(self, value: Any) -> Refused:
        try:
            flaw = difference(value, self._adapter.validate_python(value), self._hint)
        except Exception:
            flaw = None
        if flaw is None:
            what = "is refused by a validator or constraint" if self._is_functional else "does not meet the constraints"
            return Refused(f"the value {what} that {'is' if self._is_functional else 'are'} declared for it")
        what = "a validator" if self._is_functional else "a setting"
        return Refused(
            f"{what} in its annotation changes it: {flaw.reason}; it must keep a value that was sent as it is"
        )

    def decode(self, tree: Any) -> Any:
        return self._inner.decode(tree)


def field_codec(cls: type[BaseModel], field: FieldInfo, codec: Codec) -> Codec:
    """The codec of a field: that of its annotation, and its constraints, if it has any."""
    if not is_constrained(field.annotation, field.metadata):
        return codec
    if any(map(_is_json, _metadata(field.annotation, field.metadata))):
        return codec  # what reads the text of the field does not take its value
    adapter = adapter_of(field, cls)
    if adapter is None:
        return codec
    hint, metadata = field.annotation, field.metadata
    return ConstrainedCodec(codec, adapter, hint, is_harmless(hint, metadata), is_functional(hint, metadata))


def fields_with_serializers(cls: type[BaseModel]) -> set[str]:
    """The names of the fields that are not written as their annotation says, or that a function reads instead."""
    if writes_itself(cls):
        return set(cls.model_fields)
    decorators = cls.__pydantic_decorators__
    names = {name for decorator in decorators.field_serializers.values() for name in decorator.info.fields}
    plain = (d for d in decorators.field_validators.values() if d.info.mode == "plain")
    names.update(name for decorator in plain for name in decorator.info.fields)
    return set(cls.model_fields) if "*" in names else names


def writes_itself(cls: type[BaseModel]) -> bool:
    """True if functions of ``cls``, and not its fields, determine what is written."""
    own_schema = any("__get_pydantic_core_schema__" in vars(c) for c in cls.__mro__ if c not in BaseModel.__mro__)
    return own_schema or bool(cls.__pydantic_decorators__.model_serializers)


def runs_functions(schema: Any) -> bool:
    """True if functions of any class in a core schema run while its values are read, and so may change them."""
    pending, seen = [schema], set()
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            if id(node) in seen:
                continue
            seen.add(id(node))
            if node.get("type") in ("model", "dataclass") and _has_functions(node):
                return True
            pending.extend(item for key, item in node.items() if key not in ("metadata", "default", "serialization"))
        elif isinstance(node, list | tuple):
            pending.extend(node)
    return False


def _has_functions(node: dict[str, Any]) -> bool:
    if node.get("custom_init"):
        return True
    decorators = getattr(node["cls"], "__pydantic_decorators__", None)
    if decorators is not None and any(
        getattr(decorators, kind) for kind in ("validators", "field_validators", "root_validators", "model_validators")
    ):
        return True
    if node["type"] == "dataclass":
        return bool(node.get("post_init"))
    if decorators is not None and (decorators.field_serializers or decorators.model_serializers):
        return writes_itself(node["cls"])
    name = getattr(node["cls"].model_post_init, "__name__", "")
    return name != "init_private_attributes" and node["cls"].model_post_init is not BaseModel.model_post_init


class PydanticField:
    """A field that Pydantic writes and reads.

    Args:
        cls: The model.
        name: The name of the field.
        codec: The codec of its annotation; None if there is none. A value that Pydantic would change is written by it
            instead, if that names the value's class.
        check: Returns True if Pydantic carries a value exactly; None if each value must be compared.
        codecs: The compiler that made the codec.
    """

    def __init__(
        self, cls: type[BaseModel], name: str, codec: Codec | None, check: PlainCheck | None, codecs: CodecCompiler
    ) -> None:
        self.name = name
        self._codecs = codecs
        self.check = check
        self._cls = cls
        self._info = cls.model_fields[name]
        self._codec = codec
        self._adapter = None if functions_of(cls, name) else adapter_of(cls.model_fields[name], cls)
        self.may_have_mark: bool = codec is not None and check is None
        """Whether the codec may write it: if the declaration allows several classes, and Pydantic confuses them."""
        self.is_comparable: bool = self._adapter is not None
        """Whether the field can be read apart from its model. If not, its validators need the whole model."""

    def tree(self, value: BaseModel) -> Any:
        """Return the tree of the field, which is read back as it is now. Raises ``Refused``.

        `ABSENT` if the field is not written.
        """
        self.check_writable(value)
        item = self.value_in(value)
        written = None
        try:
            written = self._written(value)
            if difference(item, self._read_back(written), self._info.annotation) is None:
                return written
        except Exception:
            # Pydantic's text quotes the value, which must not reach a log. Validators may raise anything.
            pass
        if written is ABSENT:  # because the class says so, and a codec is not to send it nevertheless
            raise self.refusal(item)
        return self._tree_by_codec(item)

    def check_writable(self, value: BaseModel) -> None:
        """Raise ``Refused`` if JSON has no form for a part of the field, which Pydantic would write as another one."""
        flaw = unwritable(self.value_in(value))
        if flaw is not None and not (flaw.reason == NOT_FINITE and self._carries_nan):
            advice = '; set ser_json_inf_nan="strings" in the model_config' if flaw.reason == NOT_FINITE else ""
            raise Refused(flaw.reason + advice, flaw.path).under(self.name)

    def value_in(self, value: BaseModel) -> Any:
        try:
            return value.__dict__[self.name]
        except KeyError:
            raise Refused("the field has no value", self.name) from None

    @property
    def _carries_nan(self) -> bool:
        return self._cls.model_config.get("ser_json_inf_nan") == "strings"

    def _written(self, value: BaseModel) -> Any:
        tree = self._cls.__pydantic_serializer__.to_python(
            value, mode="json", include={self.name}, by_alias=False, round_trip=True, warnings="error"
        )
        item = tree.get(self.name, ABSENT)
        if item is ABSENT or unwritable(item) is None:
            return item
        if not self._carries_nan:
            raise Refused(NOT_FINITE)
        return from_json(to_json(item, inf_nan_mode="strings"))

    def _tree_by_codec(self, item: Any) -> Any:
        """Return the tree that the codec writes if it names the value's class, so that a reader can tell.

        It need not name one where only an int arrives as the equal float.
        """
        if self._codec is None:
            raise self.refusal(item)
        for marks_all in (False, True):
            self._codecs.marks_all = marks_all
            try:
                tree = self._codec.encode(item)
                back = self._read_back(tree)
                may_be_sent = has_mark(tree) or difference(item, back) is not None
                if may_be_sent and difference(item, back, self._info.annotation) is None:
                    return tree
            except Exception:
                # As in `tree`.
                continue
            finally:
                self._codecs.marks_all = False
        raise self.refusal(item)

    def refusal(self, item: Any) -> Fault:
        """What is wrong with the value of the field, which does not arrive as it is."""
        if (remedy := remedy_of(item)) is not None:
            return Refused(remedy).under(self.name)
        try:
            if self._codec is not None:
                self._codec.encode(item)
            written = self._written(self._cls.model_construct(**{self.name: item}))
            if written is ABSENT:
                return Refused("Pydantic leaves the value out, and its default is not this value", self.name)
            found = difference(item, self._read_back(written), self._info.annotation)
            if found is not None and self._cls.model_config.get("use_enum_values") and not self._validates_default:
                reason = f"{found.reason}, because of use_enum_values; set validate_default=True in the model_config"
                return Refused(reason, found.path).under(self.name)
            reason = f"Pydantic changes it: {found.reason if found else 'the result depends on the other fields'}"
        except Refused as fault:
            return fault.under(self.name)
        except Exception:
            reason = f"Pydantic cannot write {value_of_type(type(item))} as declared and read it back"
        advice = "declare a type that determines the value, or give the field a serializer and a validator that keep it"
        return Refused(f"{reason}; {advice}", self.name)

    def read(self, tree: Any, inner: Inner) -> Any:
        """Return the value of a tree that `tree` made; ``inner`` reads the field as Pydantic does.

        Raises ``Unreadable`` or ``ValidationError``.
        """
        if self._codec is not None and has_mark(tree):
            return inner.validate_python(self._codec.decode(tree))
        return inner.validate_json(to_json(tree))

    def _read_back(self, tree: Any) -> Any:
        """The value that a receiver has: the default if the field was not written."""
        assert self._adapter is not None
        if tree is not ABSENT:
            return self.read(tree, self._adapter)
        default = self._info.get_default(call_default_factory=True)
        return self._adapter.validate_python(default) if self._validates_default else default

    @property
    def _validates_default(self) -> bool:
        own = self._info.validate_default
        return bool(self._cls.model_config.get("validate_default") if own is None else own)


def adapter_of(field: FieldInfo, cls: type[BaseModel]) -> TypeAdapter[Any] | None:
    """What reads one field apart from its model; None if Pydantic cannot make it."""
    hint: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    own = ConfigDict(**cls.model_config)
    for config in (own,) if own.get("use_enum_values") else (own, None):
        try:
            return TypeAdapter(hint, config=config)
        except Exception:
            # Types with settings of their own do not take those of the model; others have a schema only in a model.
            continue
    return None


def has_mark(tree: Any) -> bool:
    """True if ``TYPE_KEY`` occurs in a tree, at any depth."""
    if type(tree) is dict:
        return TYPE_KEY in tree or any(map(has_mark, tree.values()))
    return type(tree) is list and any(map(has_mark, tree))


def culprit(cls: type[BaseModel], value: BaseModel, error: PydanticSerializationError) -> Fault:
    """Convert an error of a model's serializer. The result names the field, but does not quote its value."""
    if (flaw := unwritable(value)) is not None:
        return Refused(flaw.reason, flaw.path)
    for name in cls.model_fields:
        try:
            cls.__pydantic_serializer__.to_json(value, include={name}, round_trip=True, warnings="error")
        except PydanticSerializationError:
            item = value.__dict__.get(name)
            reason = remedy_of(item) or f"Pydantic cannot write {value_of_type(type(item))} as declared"
            return Refused(reason, name)
    return pydantic_refusal(error)


def pydantic_refusal(error: PydanticSerializationError) -> Refused:
    """The refusal where no field can be named."""
    return Refused("Pydantic cannot write a value in it as declared")
