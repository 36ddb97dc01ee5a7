"""The codec of dataclasses.

To read a dataclass, the class is called with the fields as arguments, as AutoGen does. Fields with ``init=False`` are
set afterwards.

If the class has code of its own that runs while it is built, such as ``__post_init__``, each value is read back and
compared before it is sent (docs/decisions/0029-what-arrives.md). The class decides that, so others cost nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from typing import Annotated, Any

from pydantic import BaseModel

from natsrt.wire.class_codec import ClassCodec, unknown_fields
from natsrt.wire.codecs import TYPE_KEY, Codec, CodecCompiler, Refused, Unreadable
from natsrt.wire.exactness import Flaw, difference
from natsrt.wire.scalar_codecs import ExactCodec

_HARMLESS_SETTINGS = frozenset(
    {
        "arbitrary_types_allowed",
        "extra",
        "frozen",
        "populate_by_name",
        "title",
        "validate_assignment",
        "validate_default",
    }
)
"""The settings of a Pydantic model that do not change how a dataclass in it is written and read.

Pydantic applies a model's settings to the dataclasses in it, but not to the models in it.
"""


class DataclassCodec(ClassCodec):
    """A dataclass. Each field has the codec of its annotation."""

    def compile(self, args: tuple[Any, ...]) -> None:
        if (builtin := _builtin_base(self.cls)) is not None:
            raise Refused(
                f"{self.name} is a {builtin.__name__}, too, and only the fields of a dataclass are sent; "
                f"hold the {builtin.__name__} in a field"
            )
        parameters = _init_parameters(self.cls)
        hints = resolved_hints(self.cls, args)
        self._is_plain_class = not args and _is_read_alike(self.cls, hints, parameters)
        known: dict[str, Codec] = {}
        self._known = known
        self._late: list[tuple[str, Codec]] = []
        self._fields: list[tuple[str, type, Codec]] = []
        required: set[str] = set()
        for field in dataclasses.fields(self.cls):
            codec = known[field.name] = self._field_codec(field, hints[field.name])
            if not field.init:
                self._late.append((field.name, codec))
                continue
            if parameters is not None and field.name not in parameters:
                raise Refused(f"{self.name}.__init__ does not take the field {field.name}")
            # A value of exactly this class is equal to its tree, so the frequent case needs no call.
            self._fields.append((field.name, codec.cls if isinstance(codec, ExactCodec) else _NoInstances, codec))
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                required.add(field.name)
        self._required = frozenset(required)
        self._names = frozenset(field.name for field in dataclasses.fields(self.cls))
        declared: Any = self.cls
        for name, parameter in (parameters or {}).items():
            # The value of an InitVar is not kept, so a receiver would build the object with the default.
            is_lost = name in declared.__dataclass_fields__ or parameter.default is parameter.empty
            if name not in self._names and is_lost:
                raise Refused(f"{self.name}.__init__ takes {name}, which is not a field, so its value would be lost")

    def _field_codec(self, field: dataclasses.Field[Any], hint: Any) -> Codec:
        if field.name == TYPE_KEY:
            raise Refused(f'the field name "{TYPE_KEY}" is reserved')
        if field.default is None:
            # `x: str = None` is common; type checkers used to read it as `x: str | None`.
            hint = typing.Optional[hint]  # noqa: UP045 (a hint may be a string or a TypeVar, which | does not take)
        try:
            return self._codecs.of(hint)
        except Refused as fault:
            raise fault.under(field.name) from None

    def _can_be_plain(self, inside: tuple[Codec, ...]) -> bool:
        if not self._is_plain_class or any(codec.plain_check(inside) is None for codec in self._known.values()):
            return False
        model = next((found.cls for found in reversed(inside) if found.cls and issubclass(found.cls, BaseModel)), None)
        return model is None or _HARMLESS_SETTINGS.issuperset(model.model_config)

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
            raise unknown_fields(self.name, tree.keys() - self._names)
        try:
            value = self.cls(**fields)
            for name, item in late.items():
                object.__setattr__(value, name, item)
        except Exception as error:
            raise Unreadable(f"{self.name} does not accept its fields ({type(error).__name__})") from error
        return value


class VerifiedDataclassCodec(DataclassCodec):
    """A dataclass with code of its own that may change a value when it is read.

    Each value is read back before it is sent. One inside another value that is read back is not read on its own.
    """

    def encode_fields(self, value: Any) -> dict[str, Any]:
        if self._codecs.verifying:
            return super().encode_fields(value)
        with self._codecs.verification():
            tree = super().encode_fields(value)
            flaw = self._flaw(value, tree)
        if flaw is None:
            return tree
        super().encode_fields(value)  # raises, with the name of the class, if one inside changes its own values
        raise Refused(
            f"{flaw.reason}; the constructor and __post_init__ of {self.name} run again where it arrives, "
            "and must keep a value that was sent as it is",
            flaw.path,
        )

    def _flaw(self, value: Any, tree: dict[str, Any]) -> Flaw | None:
        try:
            arrived = self.decode(tree)
        except Unreadable as fault:
            return Flaw("", f"{self.name} does not read what it holds ({fault})")
        return difference(value, arrived)


def dataclass_codec(cls: type, codecs: CodecCompiler) -> DataclassCodec:
    """The codec of a dataclass, not yet compiled."""
    changes = hasattr(cls, "__post_init__") or _has_own_code(cls)
    return VerifiedDataclassCodec(cls, codecs) if changes else DataclassCodec(cls, codecs)


def _has_own_code(cls: Any) -> bool:
    """Whether code that ``dataclass`` did not generate builds values of ``cls`` and sets or gets their fields."""
    hooks = (type(cls).__call__, cls.__new__, cls.__init__, cls.__setattr__, cls.__getattribute__)
    attributes = (inspect.getattr_static(cls, field.name, None) for field in dataclasses.fields(cls))
    return not all(map(_is_generated, hooks)) or any(
        hasattr(type(item), "__set__") and not isinstance(item, types.MemberDescriptorType) for item in attributes
    )


def _is_generated(function: Any) -> bool:
    if isinstance(function, types.WrapperDescriptorType | types.BuiltinFunctionType):
        return True
    return "__create_fn__" in getattr(getattr(function, "__code__", None), "co_qualname", "")


def _builtin_base(cls: type) -> type | None:
    """The built-in class, such as dict or str, from which a dataclass inherits contents that are not fields."""
    for base in cls.__mro__:
        is_builtin = isinstance(vars(base).get("__new__"), types.BuiltinFunctionType)
        if is_builtin and base not in (object, typing.Generic) and not issubclass(base, BaseException):
            return base
    return None


class _NoInstances:
    """Sentinel: no value is an instance of it, so the fast path never applies."""


def _is_read_alike(cls: type, hints: dict[str, Any], parameters: dict[str, inspect.Parameter] | None) -> bool:
    """Whether Pydantic writes and reads a dataclass as this codec does, as far as its fields are plain.

    Pydantic does not call the constructor, so this must be the generated one, with exactly the fields as parameters.
    Pydantic also follows metadata of fields, which this codec does not know.
    """
    fields = dataclasses.fields(cls)
    return (
        vars(cls).get("__dataclass_params__") is not None
        and cls.__dataclass_params__.init  # type: ignore[attr-defined]
        and cls.__dictoffset__ != 0
        and not _has_own_code(cls)
        and not hasattr(cls, "__pydantic_core_schema__")
        and not hasattr(cls, "__pydantic_config__")
        and not hasattr(cls, "__get_pydantic_core_schema__")
        and parameters is not None
        and parameters.keys() == {field.name for field in fields}
        and not any(_has_metadata(hint) for hint in hints.values())
        and not any(type(field.default).__module__.startswith("pydantic") for field in fields)
        and not any(field.default is None and not _accepts_none(hints[field.name]) for field in fields)
    )


def _has_metadata(hint: Any) -> bool:
    return typing.get_origin(hint) is Annotated or any(_has_metadata(arg) for arg in typing.get_args(hint))


def _accepts_none(hint: Any) -> bool:
    return hint is None or hint is Any or type(None) in typing.get_args(hint)


def _init_parameters(cls: type) -> dict[str, inspect.Parameter] | None:
    """The parameters of the constructor; None if it takes any keyword argument or has no readable signature."""
    try:
        parameters = dict(inspect.signature(cls).parameters)
    except (TypeError, ValueError):
        return None
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return None
    return {name: p for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_POSITIONAL}


def resolved_hints(cls: type, args: tuple[Any, ...]) -> dict[str, Any]:
    """The annotations of the fields, with names resolved and type arguments filled in. Raises ``Refused``."""
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
    """The names that annotations of a class defined inside a function can use.

    These are the class itself and the variables of the function, if it is still running.
    """
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
