"""The codec of Pydantic models.

A model without polymorphic fields is written and read by Pydantic alone. So is a value of a model that contains other
models, where the result is exact (docs/decisions/0019-plain-models.md). In any other model this module writes and reads
the polymorphic fields, and Pydantic validates the whole. The model's validators, aliases, strictness and serializers
apply in all cases. A field with a validator or serializer function in its annotation, or with a ``field_serializer``,
is always written and read by Pydantic.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    PlainValidator,
    RootModel,
    TypeAdapter,
    ValidationError,
    WrapSerializer,
    WrapValidator,
)
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation, PydanticUserError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticSerializationError, from_json, to_json

from natsrt.wire.class_codec import ClassCodec, unknown_fields
from natsrt.wire.codecs import (
    ALL_KINDS,
    TYPE_KEY,
    VALUE_KEY,
    Codec,
    Refused,
    Unreadable,
)

_TYPE_KEY_BYTES = TYPE_KEY.encode()
_FUNCTIONAL = (AfterValidator, BeforeValidator, PlainValidator, WrapValidator, PlainSerializer, WrapSerializer)


class ModelCodec(ClassCodec):
    """A Pydantic model."""

    cls: type[BaseModel]

    def compile(self, args: tuple[Any, ...]) -> None:
        cls, config = self.cls, self.cls.model_config
        self._complete()
        self._serializer = cls.__pydantic_serializer__
        self._validator = cls.__pydantic_validator__
        self._root = issubclass(cls, RootModel)
        self.kinds: frozenset[type] = ALL_KINDS if self._root else frozenset({dict})
        self._extra = config.get("extra") == "allow"
        self._carries_nan = config.get("ser_json_inf_nan") in ("constants", "strings")
        self._compile_keys()
        self._compile_fields()
        self._adapters: dict[str, TypeAdapter[Any] | None] = {}
        self._written_by_alias = all(
            (field.serialization_alias or name) == self._keys.get(name) or field.exclude
            for name, field in cls.model_fields.items()
        )
        self._direct = (
            not self._root and not self._special and not self._extra and (self._written_by_alias or not self._renamed)
        )

    def _complete(self) -> None:
        """Have Pydantic resolve the annotations that it could not resolve when the class was defined."""
        try:
            if not self.cls.__pydantic_complete__:
                self.cls.model_rebuild()
        except PydanticUndefinedAnnotation as error:
            raise Refused(f"the annotations of {self.name} cannot be resolved ({error.name})") from None

    def _compile_keys(self) -> None:
        """Determine the keys from which Pydantic reads each field, and the key under which it is written."""
        config = self.cls.model_config
        by_name = bool(config.get("populate_by_name") or config.get("validate_by_name"))
        by_alias = config.get("validate_by_alias", True)
        self._keys: dict[str, str] = {}
        self._read_from: dict[str, tuple[str, ...]] = {}
        for name, field in self.cls.model_fields.items():
            aliases = _aliases(field) if by_alias else []
            self._read_from[name] = (*aliases, name) if by_name or not aliases else tuple(aliases)
            if field.exclude:
                continue
            if by_alias and field.validation_alias is not None and not aliases and not by_name:
                raise Refused("its alias is a path, so Pydantic cannot read back what it writes", name)
            self._keys[name] = self._read_from[name][0]
            if self._keys[name] == TYPE_KEY:
                raise Refused(f'the field name "{TYPE_KEY}" is reserved', name)
        self._readable = frozenset(key for keys in self._read_from.values() for key in keys)
        self._renamed = {name: key for name, key in self._keys.items() if name != key}

    def _compile_fields(self) -> None:
        """Determine which fields this codec writes and reads itself, and which ones hold plain scalars."""
        self._special: dict[str, Codec] = {}
        self._known: dict[str, Codec] = {}
        """The codecs of the fields that have a codec and no serializer or validator functions."""
        scalars: list[tuple[str, tuple[type, ...]]] = []
        own = _fields_with_serializers(self.cls)
        for name, field in self.cls.model_fields.items():
            if field.exclude or name in own or _is_functional(field.annotation, field.metadata):
                continue
            codec = self._codec_or_none(field)
            if codec is not None:
                self._known[name] = codec
                if codec.polymorphic:
                    self._special[name] = codec
                if codec.scalars:
                    scalars.append((name, codec.scalars))
        self._scalars = scalars if len(scalars) + len(self._special) == len(self.cls.model_fields) else None

    def _can_be_plain(self, inside: tuple[Codec, ...]) -> bool:
        return (
            not self._root
            and not self._extra
            and self._written_by_alias
            and len(self._known) == len(self.cls.model_fields)
            and not any(setting.startswith("ser_json_") for setting in self.cls.model_config)
            and all(codec.plain_check(inside) is not None for codec in self._known.values())
        )

    def _codec_or_none(self, field: FieldInfo) -> Codec | None:
        try:
            return self._codecs.of(field.annotation)
        except Refused:
            # Only Pydantic can handle this type, because of the field's metadata or the model's configuration.
            return None

    # Whole payloads use Pydantic's JSON writer and reader, which support integers of any size.

    def dumps(self, value: Any) -> bytes:
        if self._is_plain(value):
            return self._serializer.to_json(value, by_alias=True, round_trip=True, warnings=False)
        if not self._direct or type(value) is not self.cls:
            return to_json(self.encode(value), inf_nan_mode="constants")
        # Pydantic is five times slower if it must refuse values that are not as declared.
        warnings: Literal["error", False] = not self._is_as_declared(value) and "error"
        payload: bytes = self._serializer.to_json(
            value, by_alias=self._written_by_alias, round_trip=True, warnings=warnings
        )
        if b"null" in payload:
            self._check_finite(value)
        return payload

    def _is_as_declared(self, value: BaseModel) -> bool:
        """True if all fields that are not special are plain scalars and hold values as declared."""
        if self._scalars is None:
            return False
        fields = value.__dict__
        try:
            for name, kinds in self._scalars:
                if type(fields[name]) not in kinds:
                    return False
        except KeyError:
            return False
        return True

    def loads(self, payload: bytes) -> Any:
        may_be_direct = self._direct or self._plain_fields is not None
        if not may_be_direct or self._codecs.strict or _TYPE_KEY_BYTES in payload:
            return self.decode(from_json(payload))
        return self._validated(self._validator.validate_json, payload)

    def decode(self, tree: Any) -> Any:
        if self._root and not (type(tree) is dict and TYPE_KEY in tree):
            return self.decode_fields(tree)
        return super().decode(tree)

    def mark(self, tree: Any) -> dict[str, Any]:
        return {TYPE_KEY: self.name, VALUE_KEY: tree} if self._root else super().mark(tree)

    def decode_marked(self, tree: dict[str, Any]) -> Any:
        return self.decode_fields(self.unwrap(tree)) if self._root else super().decode_marked(tree)

    def encode_fields(self, value: Any) -> Any:
        if self._is_plain(value):
            return self._serializer.to_python(value, mode="json", by_alias=True, round_trip=True, warnings=False)
        if self._root:
            return self._encode_root(value)
        tree = self._encode_plain_fields(value)
        if type(tree) is not dict:
            return tree
        name = ""
        try:
            for name, codec in self._special.items():
                tree[self._keys[name]] = codec.encode(getattr(value, name))
            for name, item in (value.model_extra or {}).items():
                tree[name] = self._codecs.any.encode(item)
        except Refused as fault:
            raise fault.under(name) from None
        except AttributeError:
            raise Refused("the field has no value", name) from None
        if TYPE_KEY in tree:
            raise Refused(f'a field of {self.name} has the reserved name "{TYPE_KEY}"')
        return tree

    def _encode_plain_fields(self, value: BaseModel) -> Any:
        """Return the fields that Pydantic writes: an object, unless the model's serializer writes something else."""
        if self._is_as_declared(value):
            self._check_finite(value)
            return {self._keys[name]: getattr(value, name) for name, _ in self._scalars or ()}
        try:
            tree = self._serializer.to_python(
                value, mode="json", by_alias=False, round_trip=True, warnings="error", exclude=set(self._special)
            )
        except PydanticSerializationError as error:
            raise pydantic_refusal(error) from None
        self._check_finite(value)
        if self._renamed and type(tree) is dict:
            return {self._renamed.get(name, name): item for name, item in tree.items()}
        return tree

    def _encode_root(self, value: Any) -> Any:
        if self._special:
            tree = self._special["root"].encode(value.root)
        else:
            try:
                tree = self._serializer.to_python(value, mode="json", round_trip=True, warnings="error")
            except PydanticSerializationError as error:
                raise pydantic_refusal(error) from None
            self._check_finite(value)
        return self.mark(tree) if type(tree) is dict and TYPE_KEY in tree else tree

    def _check_finite(self, value: BaseModel) -> None:
        """Raise ``Refused`` if a field holds NaN or infinity.

        Unless the model is configured otherwise, Pydantic writes these as null and cannot read them back.
        """
        if self._carries_nan:
            return
        for name, item in value.__dict__.items():
            if name not in self._special and any(not math.isfinite(number) for number in _floats(item)):
                raise Refused("JSON has no NaN and no infinity", name)

    def decode_fields(self, tree: Any) -> Any:
        if self._root:
            return self._decode_root(tree)
        if self._codecs.strict and not self._extra and tree.keys() - self._readable:
            raise unknown_fields(self.name, tree.keys() - self._readable)
        if not self._special and not self._extra or self._plain_fields is not None:
            payload = to_json(tree)
            if not self._special or _TYPE_KEY_BYTES not in payload:
                return self._validated(self._validator.validate_json, payload)
        values = dict(tree)
        for name, keys in self._read_from.items():
            for key in keys:
                if key in tree:
                    values[key] = self._decode_field(name, tree[key])
                    break
        if self._extra:
            values.update({key: self._codecs.any.decode(tree[key]) for key in tree.keys() - self._readable})
        return self._validated(self._validator.validate_python, values)

    def _decode_root(self, tree: Any) -> Any:
        if self._special:
            return self._validated(self._validator.validate_python, self._decode_field("root", tree))
        return self._validated(self._validator.validate_json, to_json(tree))

    def _decode_field(self, name: str, tree: Any) -> Any:
        """Return the value of a field. A tree that the codec cannot read is returned for the model's validators."""
        special = self._special.get(name)
        if special is not None:
            try:
                return special.decode(tree)
            except Unreadable as fault:
                if self._codecs.strict or _TYPE_KEY_BYTES in to_json(tree):
                    raise fault.under(name) from fault.__cause__
                return tree
        adapter = self._adapter(name)
        if adapter is None:
            return tree
        try:
            return adapter.validate_json(to_json(tree))
        except ValidationError:
            return tree

    def _adapter(self, name: str) -> TypeAdapter[Any] | None:
        """Return an adapter that reads one field as JSON; None if Pydantic cannot make one.

        It is needed because the other fields are validated as Python values, and a strict model does not accept JSON
        types there.
        """
        if name not in self._adapters:
            field = self.cls.model_fields[name]
            try:
                hint: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
                self._adapters[name] = TypeAdapter(hint, config=ConfigDict(**self.cls.model_config))
            except (PydanticUserError, PydanticSchemaGenerationError):
                self._adapters[name] = None
        return self._adapters[name]

    def _validated(self, validate: Callable[[Any], Any], data: Any) -> Any:
        try:
            return validate(data)
        except ValidationError as error:
            # The text of a ValidationError quotes the input.
            raise Unreadable(_problems(error, self._readable)) from None
        except Exception as error:
            raise Unreadable(f"{self.name} does not accept its fields ({type(error).__name__})") from error


def _aliases(field: FieldInfo) -> list[str]:
    """The keys from which Pydantic reads a field with an alias, in order of preference."""
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return [choice for choice in alias.choices if isinstance(choice, str)]
    return [alias] if isinstance(alias, str) else []


def _fields_with_serializers(cls: type[BaseModel]) -> set[str]:
    decorators = cls.__pydantic_decorators__
    names = {name for decorator in decorators.field_serializers.values() for name in decorator.info.fields}
    has_own_schema = any("__get_pydantic_core_schema__" in vars(c) for c in cls.__mro__ if c not in BaseModel.__mro__)
    return set(cls.model_fields) if decorators.model_serializers or "*" in names or has_own_schema else names


def _is_functional(hint: Any, metadata: Sequence[Any] = ()) -> bool:
    if typing.get_origin(hint) is Annotated:
        metadata = hint.__metadata__
    return any(isinstance(item, _FUNCTIONAL) for item in metadata) or any(
        _is_functional(arg) for arg in typing.get_args(hint)
    )


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _floats(key)
            yield from _floats(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _floats(item)


_FIELD_NAME = re.compile(r"field_name='(\w+)'")


def pydantic_refusal(error: PydanticSerializationError) -> Refused:
    """Convert an error of a Pydantic serializer. The result names the fields, but does not quote their values."""
    fields = ", ".join(dict.fromkeys(_FIELD_NAME.findall(str(error))))
    return Refused(f"Pydantic does not write the value of {fields or 'a field'} as declared")


def _problems(error: ValidationError, known: frozenset[str]) -> str:
    """Return the first five problems of a model that did not validate, as text.

    Keys that are not fields of the model may be user data, so they are replaced by ``*``.
    """
    problems = []
    for problem in error.errors(include_url=False, include_context=False, include_input=False)[:5]:
        steps = [str(s) if isinstance(s, int) or s in known else "*" for s in problem["loc"]]
        what = "the field is missing" if problem["type"] == "missing" else problem["type"]
        problems.append(f"{'.'.join(steps)}: {what}" if steps else what)
    return "; ".join(problems)
