"""Codecs of classes with fields: dataclasses, Pydantic models and AutoGen's ``Image``.

A dataclass is read by calling it with its fields, as AutoGen does, and then setting those that are no arguments. A
Pydantic model without anything polymorphic inside is written and read by Pydantic alone. In any other model the
polymorphic fields are written and read here, and Pydantic validates the whole: the model's validators, aliases,
strictness and serializers apply in both cases. A field with a validator or serializer function in its annotation, or
with a ``field_serializer``, is Pydantic's own affair, whatever its type.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from autogen_core import Image
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

from natsrt.wire.codecs import (
    ALL_KINDS,
    TYPE_KEY,
    VALUE_KEY,
    Codec,
    CodecCompiler,
    ExactCodec,
    PlainCheck,
    Refused,
    Unreadable,
    misfit,
)

__all__ = ["ClassCodec", "class_codec", "pydantic_refusal"]


def class_codec(hint: Any, cls: type, args: tuple[Any, ...], codecs: CodecCompiler) -> Codec | None:
    """The codec of ``hint``, which is ``cls`` or ``cls[args]``; None if ``cls`` is no class with fields.

    It is entered into ``codecs`` before its fields are compiled, since they may lead back to it. Raises ``Refused``.
    """
    codec: ClassCodec
    if issubclass(cls, BaseModel):
        if cls is BaseModel:
            return None
        codec = ModelCodec(cls, codecs)
    elif dataclasses.is_dataclass(cls):
        codec = DataclassCodec(cls, codecs)
    elif cls is Image:
        return ImageCodec(cls, codecs)
    else:
        return None
    known = codecs.keep(hint, codec)
    try:
        codec.compile(args)
    except Refused:
        codecs.forget_since(known)
        raise
    return codec


class ClassCodec(Codec):
    """What the classes with fields share: subclasses of the declared class carry their name."""

    kinds = frozenset({dict})
    polymorphic = True
    cls: type
    base: type

    def __init__(self, cls: type, codecs: CodecCompiler) -> None:
        self.cls = cls
        self.base = cls
        self.name = cls.__name__
        self._codecs = codecs

    def compile(self, args: tuple[Any, ...]) -> None:
        """Look at the fields. ``args`` are the type arguments of a generic class."""

    def encode(self, value: Any) -> Any:
        if type(value) is not self.cls:
            return self._codecs.encode_marked(value, self.base)
        return self.encode_fields(value)

    def decode(self, tree: Any) -> Any:
        if type(tree) is not dict:
            raise misfit(self.name, tree)
        if TYPE_KEY in tree:
            return self._codecs.decode_marked(tree, self.base)
        return self.decode_fields(tree)

    def mark(self, tree: Any) -> dict[str, Any]:
        if type(tree) is not dict:
            raise Refused(f'the serializer of {self.name} makes no JSON object, so it cannot carry "{TYPE_KEY}"')
        if TYPE_KEY in tree:
            raise Refused(f'a field of {self.name} has the reserved name "{TYPE_KEY}"')
        return {TYPE_KEY: self.name, **tree}

    def decode_marked(self, tree: dict[str, Any]) -> Any:
        return self.decode_fields({key: value for key, value in tree.items() if key != TYPE_KEY})

    def encode_fields(self, value: Any) -> Any:
        """The tree of a value of exactly this class."""
        raise NotImplementedError

    def decode_fields(self, tree: Any) -> Any:
        """The value of a tree without a class name."""
        raise NotImplementedError


class ImageCodec(ClassCodec):
    """AutoGen's ``Image`` as its own Pydantic schema writes it: the PNG in base64."""

    def encode_fields(self, value: Image) -> dict[str, Any]:
        return {"data": value.to_base64()}

    def decode_fields(self, tree: Any) -> Image:
        data = tree.get("data")
        if type(data) is not str or (self._codecs.strict and len(tree) != 1):
            raise Unreadable('an Image is an object with the field "data"')
        try:
            return Image.from_base64(data)
        except Exception as error:
            # Pillow's own exceptions have no common root.
            raise Unreadable("the data is no image") from error


class DataclassCodec(ClassCodec):
    """A dataclass, each field by the codec of its annotation."""

    def compile(self, args: tuple[Any, ...]) -> None:
        parameters = _init_parameters(self.cls)
        hints = _dataclass_hints(self.cls, args)
        self._late: list[tuple[str, Codec]] = []
        self._fields: list[tuple[str, type, Codec]] = []
        required: set[str] = set()
        for field in dataclasses.fields(self.cls):
            codec = self._field_codec(field, hints[field.name])
            if not field.init:
                self._late.append((field.name, codec))
                continue
            if parameters is not None and field.name not in parameters:
                raise Refused(f"{self.name}.__init__ does not take the field {field.name}")
            # Values of exactly this class are their own tree, which saves the frequent case a call.
            self._fields.append((field.name, codec.cls if isinstance(codec, ExactCodec) else _NoInstances, codec))
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                required.add(field.name)
        self._required = frozenset(required)
        self._names = frozenset(field.name for field in dataclasses.fields(self.cls))
        for name, parameter in (parameters or {}).items():
            if name not in self._names and parameter.default is parameter.empty:
                raise Refused(f"{self.name}.__init__ needs {name}, which is not a field and so does not travel")

    def _field_codec(self, field: dataclasses.Field[Any], hint: Any) -> Codec:
        if field.name == TYPE_KEY:
            raise Refused(f'the field name "{TYPE_KEY}" is reserved')
        if field.default is None:
            # `x: str = None` is common, and type checkers used to read it so.
            hint = typing.Optional[hint]  # noqa: UP045 (a hint may be a string or a TypeVar, which | does not take)
        try:
            return self._codecs.of(hint)
        except Refused as fault:
            raise fault.under(field.name) from None

    def encode_fields(self, value: Any) -> dict[str, Any]:
        tree = {}
        name = ""
        try:
            for name, plain, codec in self._fields:
                item = getattr(value, name)
                tree[name] = item if type(item) is plain else codec.encode(item)
            for name, codec in self._late:
                if hasattr(value, name):
                    tree[name] = codec.encode(getattr(value, name))
        except Refused as fault:
            raise fault.under(name) from None
        except AttributeError:
            raise Refused("the field has no value", name) from None
        return tree

    def decode_fields(self, tree: Any) -> Any:
        fields = {}
        late = {}
        name = ""
        try:
            for name, plain, codec in self._fields:
                if name in tree:
                    item = tree[name]
                    fields[name] = item if type(item) is plain else codec.decode(item)
                elif name in self._required:
                    raise Unreadable("the field is missing")
            for name, codec in self._late:
                if name in tree:
                    late[name] = codec.decode(tree[name])
        except Unreadable as fault:
            raise fault.under(name) from fault.__cause__
        if self._codecs.strict and len(fields) + len(late) != len(tree):
            raise _unknown_fields(self.name, tree.keys() - self._names)
        try:
            value = self.cls(**fields)
            for name, item in late.items():
                object.__setattr__(value, name, item)
        except Exception as error:
            raise Unreadable(f"{self.name} does not accept its fields ({type(error).__name__})") from error
        return value


class _NoInstances:
    """Sentinel: no value is an instance of it, so the fast path never applies."""


def _unknown_fields(name: str, fields: set[str]) -> Unreadable:
    return Unreadable(f"{name} has no field {', '.join(sorted(fields))}")


def _init_parameters(cls: type) -> dict[str, inspect.Parameter] | None:
    """The parameters of the constructor; None if it takes any keyword or cannot say."""
    try:
        parameters = dict(inspect.signature(cls).parameters)
    except (TypeError, ValueError):
        return None
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return None
    return {name: p for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_POSITIONAL}


def _dataclass_hints(cls: type, args: tuple[Any, ...]) -> dict[str, Any]:
    """The fields' annotations with names resolved and type arguments filled in."""
    try:
        hints = typing.get_type_hints(cls, localns=_enclosing_names(cls), include_extras=True)
    except Exception as error:
        missing = error.name if isinstance(error, NameError) else str(error)
        raise Refused(
            f"the annotations of {cls.__name__} cannot be resolved ({missing}); define it at the top of a module"
        ) from None
    arguments: dict[Any, Any] = {}
    _collect_arguments(cls, args, arguments)
    arguments[typing.Self] = cls
    return {name: _fill_in(hint, arguments) for name, hint in hints.items()}


def _enclosing_names(cls: type) -> dict[str, Any]:
    """What a class defined inside a function can name: that function's variables, while it still runs."""
    names = {cls.__name__: cls}
    outer, inside, _ = cls.__qualname__.rpartition(".<locals>.")
    frame = inspect.currentframe() if inside else None
    while frame is not None:
        if frame.f_code.co_qualname == outer and frame.f_globals.get("__name__") == cls.__module__:
            return {**frame.f_locals, **names}
        frame = frame.f_back
    return names


def _collect_arguments(cls: type, args: tuple[Any, ...], arguments: dict[Any, Any]) -> None:
    arguments.update(zip(getattr(cls, "__parameters__", ()), args, strict=False))
    for base in getattr(cls, "__orig_bases__", ()):
        origin = typing.get_origin(base)
        if isinstance(origin, type) and origin is not typing.Generic:
            given = tuple(_fill_in(arg, arguments) for arg in typing.get_args(base))
            _collect_arguments(origin, given, arguments)


def _fill_in(hint: Any, arguments: dict[Any, Any]) -> Any:
    if isinstance(hint, typing.TypeVar) or hint is typing.Self:
        return arguments.get(hint, hint)
    parameters = getattr(hint, "__parameters__", ())
    if not parameters or isinstance(hint, type):
        return hint
    return hint[tuple(arguments.get(parameter, parameter) for parameter in parameters)]


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
        self.kinds = ALL_KINDS if self._root else frozenset({dict})
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
        """Let Pydantic resolve the annotations that it could not resolve when the class was defined."""
        try:
            if not self.cls.__pydantic_complete__:
                self.cls.model_rebuild()
        except PydanticUndefinedAnnotation as error:
            raise Refused(f"the annotations of {self.name} cannot be resolved ({error.name})") from None

    def _compile_keys(self) -> None:
        """Under which keys Pydantic looks for each field, and under which one it is written."""
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
        """Which fields are written and read here, and which ones hold plain scalars."""
        self._special: dict[str, Codec] = {}
        self._known: dict[str, Codec] = {}
        """The codecs of the fields that have one, and no serializer or validator functions of their own."""
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

    # Plain values: those that Pydantic's own compiled serializer and validator carry exactly as they are.

    @functools.cached_property
    def _plain_fields(self) -> tuple[list[tuple[str, tuple[type, ...]]], list[tuple[str, PlainCheck]]] | None:
        """The fields whose classes tell that they are plain, and those that have a check; None: no value is plain.

        Asked for when the first value is written or read: then all classes that this one leads to can be compiled.
        """
        if not self._can_be_plain((self,)):
            return None
        types = [(name, found) for name, codec in self._known.items() if (found := codec.plain_types())]
        names = {name for name, _ in types}
        checks = [(name, codec.plain_check((self,))) for name, codec in self._known.items() if name not in names]
        return types, [(name, check) for name, check in checks if check is not None]

    def _can_be_plain(self, inside: tuple[Codec, ...]) -> bool:
        return (
            not self._root
            and not self._extra
            and self._written_by_alias
            and len(self._known) == len(self.cls.model_fields)
            and not any(setting.startswith("ser_json_") for setting in self.cls.model_config)
            and all(codec.plain_check(inside) is not None for codec in self._known.values())
        )

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck | None:
        return self._is_plain if self in inside or self._can_be_plain((*inside, self)) else None

    def _is_plain(self, value: Any) -> bool:
        """Whether ``value`` is of exactly this class and holds what its fields declare, at every depth."""
        if type(value) is not self.cls or self._plain_fields is None:
            return False
        fields = value.__dict__
        types, checks = self._plain_fields
        try:
            for name, kinds in types:
                if type(fields[name]) not in kinds:
                    return False
            for name, check in checks:
                if not check(fields[name]):
                    return False
        except KeyError:
            return False
        return True

    def _codec_or_none(self, field: FieldInfo) -> Codec | None:
        try:
            return self._codecs.of(field.annotation)
        except Refused:
            # A type that only Pydantic knows, by the field's metadata or the model's configuration.
            return None

    # Whole payloads: Pydantic's own writer and reader, which carry integers of any size.

    def dumps(self, value: Any) -> bytes:
        if self._is_plain(value):
            return self._serializer.to_json(value, by_alias=True, round_trip=True, warnings=False)
        if not self._direct or type(value) is not self.cls:
            return to_json(self.encode(value), inf_nan_mode="constants")
        # Pydantic is five times slower when it shall refuse what is not as declared.
        warnings: Literal["error", False] = not self._is_as_declared(value) and "error"
        payload: bytes = self._serializer.to_json(
            value, by_alias=self._written_by_alias, round_trip=True, warnings=warnings
        )
        if b"null" in payload:
            self._check_finite(value)
        return payload

    def _is_as_declared(self, value: BaseModel) -> bool:
        """Whether all fields that are not special are plain scalars, and hold what they declare."""
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
        """What Pydantic writes by itself: an object, unless the model's own serializer makes something else."""
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
        """Pydantic writes NaN as null, unless the model says otherwise, and then cannot read it back."""
        if self._carries_nan:
            return
        for name, item in value.__dict__.items():
            if name not in self._special and any(not math.isfinite(number) for number in _floats(item)):
                raise Refused("JSON has no NaN and no infinity", name)

    def decode_fields(self, tree: Any) -> Any:
        if self._root:
            return self._decode_root(tree)
        if self._codecs.strict and not self._extra and tree.keys() - self._readable:
            raise _unknown_fields(self.name, tree.keys() - self._readable)
        if not self._special and not self._extra:
            return self._validated(self._validator.validate_json, to_json(tree))
        values = dict(tree)
        for name, keys in self._read_from.items():
            key = next((key for key in keys if key in tree), None)
            if key is not None:
                values[key] = self._decode_field(name, tree[key])
        if self._extra:
            values.update({key: self._codecs.any.decode(tree[key]) for key in tree.keys() - self._readable})
        return self._validated(self._validator.validate_python, values)

    def _decode_root(self, tree: Any) -> Any:
        if self._special:
            return self._validated(self._validator.validate_python, self._decode_field("root", tree))
        return self._validated(self._validator.validate_json, to_json(tree))

    def _decode_field(self, name: str, tree: Any) -> Any:
        """The value of a field; what the codec does not understand is left for the model's validators to judge."""
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
        """Reads one field as JSON, which a strict model takes for the rest in Python's types only."""
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
            # Its own text quotes the input.
            raise Unreadable(_problems(error, self._readable)) from None
        except Exception as error:
            raise Unreadable(f"{self.name} does not accept its fields ({type(error).__name__})") from error


def _aliases(field: FieldInfo) -> list[str]:
    """The keys, in order of preference, under which Pydantic looks for a field with an alias."""
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
    """Which fields a Pydantic serializer refused; its own text quotes their values."""
    fields = ", ".join(dict.fromkeys(_FIELD_NAME.findall(str(error))))
    return Refused(f"Pydantic does not write the value of {fields or 'a field'} as declared")


def _problems(error: ValidationError, known: frozenset[str]) -> str:
    """Where and how a model did not validate; keys that are no fields of it may be a user's data, and become ``*``."""
    problems = []
    for problem in error.errors(include_url=False, include_context=False, include_input=False)[:5]:
        steps = [str(s) if isinstance(s, int) or s in known else "*" for s in problem["loc"]]
        what = "the field is missing" if problem["type"] == "missing" else problem["type"]
        problems.append(f"{'.'.join(steps)}: {what}" if steps else what)
    return "; ".join(problems)
