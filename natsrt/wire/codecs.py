"""Codecs of single types and of containers: values as JSON trees.

A *tree* is what ``json.loads`` returns: None, bool, int, float, str, list, dict. ``Codec.encode`` converts a value to
a tree, and ``Codec.decode`` converts a tree to a value. A value that would not be read back equal and of the same type
is ``Refused``. A tree that does not fit the type is ``Unreadable``. The texts of both errors name fields and types,
never values. The rules are in ``compiler``.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import enum
import ipaddress
import math
import pathlib
import typing
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import orjson
from pydantic import SecretBytes, SecretStr, TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic_core import to_json

from natsrt.wire.exactness import NOT_FINITE, difference, unwritable, value_of_type

TYPE_KEY = "$type"
"""The reserved key that names the class of a polymorphic value."""

CLASS_KEY = "$class"
"""The key after ``TYPE_KEY`` with the full name of the class, where the writer knows several classes of its name."""

VALUE_KEY = "value"
"""The key next to ``TYPE_KEY`` that holds the tree of a value which cannot carry ``TYPE_KEY`` itself."""

NULL = type(None)
ALL_KINDS: frozenset[type] = frozenset({NULL, bool, int, float, str, list, dict})


class Fault(Exception):
    """Base of `Refused` and `Unreadable`.

    ``reason`` says what is wrong. ``path`` is where in the value, such as ``items[].name``; empty for the whole value.
    """

    def __init__(self, reason: str, path: str = "") -> None:
        self.reason = reason
        self.path: str = path
        super().__init__(reason)

    def under(self, step: str) -> Fault:
        """Put ``step`` (a field name, ``[]`` or ``[n]``) before ``path``; returns self."""
        if self.path and not self.path.startswith("["):
            step += "."
        self.path = step + self.path
        return self

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.path else self.reason


class Refused(Fault):
    """A value cannot be written exactly, or values of a type cannot be written at all."""


class Unreadable(Fault):
    """A tree does not fit the expected type."""


class Misdeclared(Refused):
    """A value is not of the declared type, so that another member of a union may be meant."""


def wrong_type(expected: str, value: object) -> Refused:
    return Misdeclared(f"declared {expected}, but holds {value_of_type(type(value))}")


def misfit(expected: str, tree: object) -> Unreadable:
    return Unreadable(f"expected {expected}, found JSON {_JSON_NAMES.get(type(tree), 'value')}")


_JSON_NAMES = {
    NULL: "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


def remedy_of(value: object) -> str | None:
    """What a sender can do about a value that Pydantic does not write as it is; None if there is nothing special."""
    pending, seen = [value], 0
    while pending and seen < _MOST_PARTS:
        item, seen = pending.pop(), seen + 1
        if isinstance(item, SecretStr | SecretBytes):
            return (
                f"Pydantic masks {value_of_type(type(item))} in JSON: declare the field as str, "
                "or give it a serializer that writes get_secret_value()"
            )
        if isinstance(item, bytes | bytearray):
            return (
                "Pydantic writes bytes as UTF-8 text, and these do not come back: set "
                'ser_json_bytes="base64" and val_json_bytes="base64" in the model_config'
            )
        if isinstance(item, dict):
            pending.extend((*item, *item.values()))
        elif isinstance(item, list | tuple | set | frozenset):
            pending.extend(item)
    return None


_MOST_PARTS = 10_000
"""So many parts of a value are searched for the reason why it cannot be written: it may contain itself."""


PlainCheck = Callable[[Any], bool]


class Codec:
    """Writes and reads the values of one declared type.

    ``name`` is the type's name in ``"$type"`` and in errors. ``kinds`` are the Python types of the trees it writes.
    ``cls`` is the exact class of its values, None if there are several. ``base`` is the declared class of which
    ``"$type"`` may name a subclass, None if it may not. ``natural`` codecs stay unmarked in a union.
    ``scalars`` are the exact classes of its values if these are JSON scalars, else empty.
    ``polymorphic`` is True if class names may occur inside, which Pydantic's own JSON cannot express.
    """

    name: str
    kinds: frozenset[type]
    cls: type | None = None
    base: type | None = None
    scalars: tuple[type, ...] = ()
    natural = False
    polymorphic = False

    def members(self) -> Sequence[Codec]:
        """The members of a union; for any other type, this codec."""
        return (self,)

    def encode(self, value: Any) -> Any:
        """Return the tree of ``value``; raises ``Refused``."""
        raise NotImplementedError

    def plain_types(self) -> tuple[type, ...]:
        """The exact classes of the values that Pydantic writes and reads unchanged in a field of this type.

        Empty if the class of a value is not enough to decide.
        """
        return ()

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck | None:
        """A function that returns True if Pydantic writes and reads a value unchanged in a field of this type.

        None if there is no cheap check: the type is polymorphic, or a union, or Pydantic changes its values.
        ``inside`` are the codecs of the models that contain this type. A recursive model finds itself among them.
        """
        types = self.plain_types()
        return (lambda value: type(value) in types) if types else None

    def decode(self, tree: Any) -> Any:
        """Return the value of ``tree``; raises ``Unreadable``."""
        raise NotImplementedError

    def dumps(self, value: Any) -> bytes:
        """Return ``value`` as a whole payload; raises ``Refused``, or the exception of the JSON writer."""
        tree = self.encode(value)
        try:
            return orjson.dumps(tree)
        except orjson.JSONEncodeError:
            if (flaw := unwritable(value, integers=False)) is None:
                raise
            raise Refused(flaw.reason, flaw.path) from None

    def loads(self, payload: bytes) -> Any:
        """Return the value of a whole payload; raises ``Unreadable``, or the exception of the JSON reader."""
        return self.decode(orjson.loads(payload))

    def mark(self, tree: Any) -> dict[str, Any]:
        """Return ``tree`` with this type's name added."""
        return {TYPE_KEY: self.name, VALUE_KEY: tree}

    def decode_marked(self, tree: dict[str, Any]) -> Any:
        """Return the value of a tree made by ``mark``; raises ``Unreadable``."""
        return self.decode(self.unwrap(tree))

    def unwrap(self, tree: dict[str, Any]) -> Any:
        """Return the part under ``VALUE_KEY`` of a tree made by ``mark``; raises ``Unreadable``."""
        if len(tree) - (CLASS_KEY in tree) != 2 or VALUE_KEY not in tree:
            raise Unreadable(f'a marked {self.name} has exactly the keys "{TYPE_KEY}" and "{VALUE_KEY}"')
        return tree[VALUE_KEY]


class CodecCompiler(ABC):
    """The interface of the compiler that codecs of classes use. Implemented by `natsrt.wire.compiler.Codecs`."""

    strict: bool
    """True if a tree with an unknown field is unreadable; False if unknown fields are ignored."""
    any: Codec
    """The codec of ``Any``."""
    marks_all = False
    """True while unions name the class of every value, also where their own reader can do without."""

    @abstractmethod
    def of(self, hint: Any) -> Codec:
        """Return the codec of a type annotation; raises ``Refused`` if its values cannot be sent."""

    @abstractmethod
    def keep(self, hint: Any, codec: Codec) -> int:
        """Store ``codec`` before it is complete, so that a recursive type finds it.

        Returns the number of codecs that were stored before.
        """

    @abstractmethod
    def forget_since(self, known: int) -> None:
        """Remove all but the first ``known`` codecs.

        Used when a class could not be compiled, since the codecs stored after it may refer to it.
        """

    @abstractmethod
    def encode_marked(self, value: Any, base: type | None) -> dict[str, Any]:
        """Return the tree of a dataclass, model or image with the name of its class; raises ``Refused``.

        ``base`` is the declared class; None if ``Any`` is declared.
        """

    @abstractmethod
    def decode_marked(self, tree: dict[str, Any], base: type | None) -> Any:
        """Return the value of a tree that names its class; raises ``Unreadable``.

        ``base`` is the declared class; None if ``Any`` is declared.
        """

    @property
    @abstractmethod
    def verifying(self) -> bool:
        """True inside `verification`."""

    @abstractmethod
    def verification(self) -> AbstractContextManager[None]:
        """A context in which a value is written and read back.

        Names of classes that are written in it can be read in it: the receiver knows them, or reports that it does not.
        """


class ExactCodec(Codec):
    """str, int, bool and None, which JSON has too. Subclasses are refused, and so is a bool in an int field."""

    natural = True

    def __init__(self, cls: type) -> None:
        self.cls: type = cls
        self.name: str = "None" if cls is NULL else cls.__name__
        self.kinds: frozenset[type] = frozenset({cls})
        self.scalars: tuple[type, ...] = (cls,)

    def plain_types(self) -> tuple[type, ...]:
        return self.scalars

    def encode(self, value: Any) -> Any:
        if type(value) is not self.cls:
            raise wrong_type(self.name, value)
        return value

    def decode(self, tree: Any) -> Any:
        if type(tree) is not self.cls:
            raise misfit(self.name, tree)
        return tree


class FloatCodec(Codec):
    """Finite floats. An int in a float field is written as the equal float; it is refused if there is none."""

    name = "float"
    kinds: frozenset[type] = frozenset({float})
    cls: type | None = float
    scalars: tuple[type, ...] = (float,)
    natural = True

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck:
        finite = math.isfinite
        return lambda value: type(value) is float and finite(value)

    def encode(self, value: Any) -> float:
        if type(value) is float:
            if not math.isfinite(value):
                raise Refused(NOT_FINITE)
            return value
        if type(value) is not int:
            raise wrong_type("float", value)
        try:
            number = float(value)
        except OverflowError:
            raise Refused("the integer has no equal float") from None
        if number != value:
            raise Refused("the integer has no equal float")
        return number

    def decode(self, tree: Any) -> float:
        if type(tree) is float:
            return tree
        if type(tree) is not int:
            raise misfit("float", tree)
        return float(tree)


class TextCodec(Codec):
    """A class whose values have an exact text form.

    With ``numbers``, a JSON number is read as well: it is converted to text first.
    """

    kinds: frozenset[type] = frozenset({str})

    def __init__(
        self, cls: type, write: Callable[[Any], str], read: Callable[[str], Any], *, numbers: bool = False
    ) -> None:
        self.cls: type = cls
        self.name: str = cls.__name__
        self._write = write
        self._read = read
        self._numbers = (int, float) if numbers else ()

    def plain_types(self) -> tuple[type, ...]:
        return () if self.cls is bytes or self.cls in _PLAIN_CHECKS else (self.cls,)

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck | None:
        return _PLAIN_CHECKS.get(self.cls) or super().plain_check(inside)

    def encode(self, value: Any) -> str:
        if type(value) is not self.cls:
            raise wrong_type(self.name, value)
        return self._write(value)

    def decode(self, tree: Any) -> Any:
        if type(tree) in self._numbers:
            tree = str(tree)
        if type(tree) is not str:
            raise misfit(self.name, tree)
        try:
            return self._read(tree)
        except (ValueError, ArithmeticError):
            raise Unreadable(f"the text is not a valid {self.name}") from None


_DATETIME, _UTC = datetime.datetime, datetime.UTC


def _is_plain_datetime(value: Any) -> bool:
    return type(value) is _DATETIME and ((zone := value.tzinfo) is None or zone is _UTC or _has_whole_minutes(value))


def _has_whole_minutes(value: datetime.datetime) -> bool:
    """Pydantic writes the minutes of an offset, but not its seconds, which historical time zones have."""
    offset = value.utcoffset()
    return offset is None or not (offset.seconds % 60 or offset.microseconds)


_PLAIN_CHECKS: dict[type, PlainCheck] = {
    _DATETIME: _is_plain_datetime,
    datetime.time: lambda value: type(value) is datetime.time and value.tzinfo is None,
    decimal.Decimal: lambda value: type(value) is decimal.Decimal and value.is_finite(),
}


def text_codecs() -> list[TextCodec]:
    return [
        TextCodec(
            bytes, lambda value: base64.b64encode(value).decode(), lambda text: base64.b64decode(text, validate=True)
        ),
        TextCodec(datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
        TextCodec(datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
        TextCodec(datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
        TextCodec(uuid.UUID, str, uuid.UUID),
        TextCodec(decimal.Decimal, str, decimal.Decimal, numbers=True),
    ]


class EnumCodec(Codec):
    """Enums, written by value if all values are str or all are int, else by member name."""

    def __init__(self, cls: type[enum.Enum]) -> None:
        self.cls: type[enum.Enum] = cls
        self.name: str = cls.__name__
        values = {type(member.value) for member in cls}
        self._by_value = values in ({str}, {int})
        self._is_flag = issubclass(cls, enum.Flag)
        self.kinds: frozenset[type] = frozenset(values if self._by_value else {str})

    def plain_types(self) -> tuple[type, ...]:
        own_schema = hasattr(self.cls, "__get_pydantic_core_schema__")
        return (self.cls,) if self._by_value and not self._is_flag and not own_schema else ()

    def encode(self, value: Any) -> Any:
        if type(value) is not self.cls:
            raise wrong_type(self.name, value)
        if self._by_value:
            return value.value
        if value.name not in self.cls.__members__:
            raise Refused(f"it combines members of {self.name}, and a combination has no name")
        return value.name

    def decode(self, tree: Any) -> Any:
        try:
            if type(tree) in self.kinds:
                return self.cls(tree) if self._by_value else self.cls[tree]
        except (ValueError, KeyError):
            pass
        raise Unreadable(f"not a member of {self.name}")


class LiteralCodec(Codec):
    """``Literal[...]``. Members are distinguished by value and type."""

    def __init__(self, members: Sequence[Any], codec_of: Callable[[type], Codec]) -> None:
        self.name = "Literal"
        self._trees = {(type(member), member): codec_of(type(member)).encode(member) for member in members}
        self._members = {(type(tree), tree): key[1] for key, tree in self._trees.items()}
        self.kinds: frozenset[type] = frozenset(type(tree) for tree in self._trees.values())
        if len(self._members) != len(self._trees):
            raise Refused("two members of a Literal have the same JSON")

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck | None:
        members = frozenset(member for cls, member in self._trees if cls is str)
        return (lambda value: type(value) is str and value in members) if self.kinds == {str} else None

    def encode(self, value: Any) -> Any:
        try:
            return self._trees[type(value), value]
        except (KeyError, TypeError):
            raise Misdeclared("not one of the declared literals") from None

    def decode(self, tree: Any) -> Any:
        try:
            return self._members[type(tree), tree]
        except (KeyError, TypeError):
            raise Unreadable("not one of the declared literals") from None


class ArrayCodec(Codec):
    """list, set, frozenset and ``tuple[X, ...]``."""

    kinds: frozenset[type] = frozenset({list})

    def __init__(self, cls: type, item: Codec) -> None:
        self.cls: type = cls
        self.name: str = cls.__name__ if item.name == "Any" else f"{cls.__name__}[{item.name}]"
        self.natural: bool = cls is list
        self.polymorphic: bool = item.polymorphic
        self._item = item

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck | None:
        cls, check = self.cls, self._item.plain_check(inside)
        if check is None:
            return None
        return lambda value: type(value) is cls and all(map(check, typing.cast(Iterable[Any], value)))

    def encode(self, value: Any) -> list[Any]:
        if type(value) is not self.cls:
            raise wrong_type(self.name, value)
        encode = self._item.encode
        try:
            return [encode(item) for item in typing.cast(Iterable[Any], value)]
        except Refused as fault:
            raise fault.under("[]") from None

    def decode(self, tree: Any) -> Any:
        if type(tree) is not list:
            raise misfit(self.name, tree)
        decode = self._item.decode
        try:
            items = [decode(item) for item in tree]
        except Unreadable as fault:
            raise fault.under("[]") from fault.__cause__
        if self.cls is list:
            return items
        try:
            return self.cls(items)
        except TypeError:
            raise Unreadable(f"an item of a {self.cls.__name__} is not hashable") from None


class TupleCodec(Codec):
    """``tuple[A, B, C]``."""

    kinds: frozenset[type] = frozenset({list})
    cls: type | None = tuple

    def __init__(self, items: Sequence[Codec]) -> None:
        self.name: str = f"tuple[{','.join(item.name for item in items)}]"
        self.polymorphic: bool = any(item.polymorphic for item in items)
        self._items = items

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck | None:
        checks = [check for item in self._items if (check := item.plain_check(inside)) is not None]
        if len(checks) != len(self._items):
            return None
        return lambda value: (
            type(value) is tuple
            and len(value) == len(checks)
            and all(check(item) for check, item in zip(checks, value, strict=True))
        )

    def encode(self, value: Any) -> list[Any]:
        if type(value) is not tuple or len(value) != len(self._items):
            raise wrong_type(self.name, value)
        return [_step(Refused, at, item.encode, value[at]) for at, item in enumerate(self._items)]

    def decode(self, tree: Any) -> tuple[Any, ...]:
        if type(tree) is not list or len(tree) != len(self._items):
            raise misfit(self.name, tree)
        return tuple(_step(Unreadable, at, item.decode, tree[at]) for at, item in enumerate(self._items))


def _step(fault: type[Fault], at: int, turn: Callable[[Any], Any], value: Any) -> Any:
    try:
        return turn(value)
    except fault as problem:
        raise problem.under(f"[{at}]") from problem.__cause__


class DictCodec(Codec):
    """``dict[K, V]``. Keys that are not str are written as text."""

    kinds: frozenset[type] = frozenset({dict})
    cls: type | None = dict
    natural = True

    def __init__(self, key: Codec, value: Codec) -> None:
        if key.name == "Any":
            key = ExactCodec(str)
        textual = key.kinds == {str}
        if not textual and not key.kinds <= {int, float, bool}:
            raise Refused(f"keys of type {key.name} cannot be written exactly as text")
        self.name: str = "dict" if value.name == "Any" and key.cls is str else f"dict[{key.name},{value.name}]"
        self.polymorphic: bool = value.polymorphic
        self._key = None if isinstance(key, ExactCodec) and textual else key
        self._textual = textual
        self._value = value

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck | None:
        check = self._value.plain_check(inside)
        if check is None:
            return None
        if self._key is None:
            texts = {str}
            return lambda value: (
                type(value) is dict and texts.issuperset(map(type, value)) and all(map(check, value.values()))
            )
        key_check = self._key.plain_check() if self._key.cls is int or isinstance(self._key, TextCodec) else None
        if key_check is None:
            return None
        return lambda value: type(value) is dict and all(map(key_check, value)) and all(map(check, value.values()))

    def encode(self, value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise wrong_type(self.name, value)
        encode = self._value.encode
        try:
            if self._key is None:
                if not all(type(key) is str for key in value):
                    raise Refused("JSON keys are strings, and the declared type specifies no other key type")
                return {key: encode(item) for key, item in value.items()}
            tree = {self._key_text(key): encode(item) for key, item in value.items()}
        except Refused as fault:
            raise fault.under("[]") from None
        if len(tree) != len(value):
            raise Refused("two keys have the same text")
        return tree

    def _key_text(self, key: Any) -> str:
        assert self._key is not None
        tree = self._key.encode(key)
        try:
            return tree if self._textual else orjson.dumps(tree).decode()
        except orjson.JSONEncodeError:
            raise Refused("a key is an integer of more than 64 bits, which JSON readers do not agree on") from None

    def decode(self, tree: Any) -> dict[Any, Any]:
        if type(tree) is not dict:
            raise misfit(self.name, tree)
        decode = self._value.decode
        try:
            if self._key is None:
                return {key: decode(item) for key, item in tree.items()}
            return {self._key_value(key): decode(item) for key, item in tree.items()}
        except Unreadable as fault:
            raise fault.under("[]") from fault.__cause__

    def _key_value(self, text: str) -> Any:
        assert self._key is not None
        if self._textual:
            return self._key.decode(text)
        try:
            return self._key.decode(orjson.loads(text))
        except orjson.JSONDecodeError:
            raise Unreadable(f"the text of a key is not a valid {self._key.name}") from None


NONE = ExactCodec(NULL)


class OptionalCodec(Codec):
    """``X | None``, the most frequent union."""

    def __init__(self, inner: Codec) -> None:
        self.name: str = f"{inner.name}|None"
        self.kinds: frozenset[type] = inner.kinds | {NULL}
        self.scalars: tuple[type, ...] = (*inner.scalars, NULL) if inner.scalars else ()
        self.polymorphic: bool = inner.polymorphic
        self._inner = inner

    def members(self) -> Sequence[Codec]:
        return (*self._inner.members(), NONE)

    def plain_types(self) -> tuple[type, ...]:
        types = self._inner.plain_types()
        return (*types, NULL) if types else ()

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck | None:
        check = self._inner.plain_check(inside)
        return None if check is None else lambda value: value is None or check(value)

    def encode(self, value: Any) -> Any:
        return None if value is None else self._inner.encode(value)

    def decode(self, tree: Any) -> Any:
        return None if tree is None else self._inner.decode(tree)


_JSON_SCHEMA_TYPES: dict[Any, type] = {"string": str, "integer": int, "boolean": bool, "array": list, "object": dict}


_EXACT_IN_PYDANTIC: dict[type | None, tuple[type, ...]] = {
    cls: (cls,) for cls in (datetime.timedelta, ipaddress.IPv4Address, ipaddress.IPv6Address)
} | {pathlib.Path: (type(pathlib.Path()),)}


class PydanticCodec(Codec):
    """Any other type that Pydantic can write as JSON.

    After a value is written, it is read back at once, and refused if the result is not equal.
    """

    def __init__(self, hint: Any) -> None:
        self._adapter: TypeAdapter[Any] = TypeAdapter(hint)
        self.name: str = getattr(hint, "__name__", None) or str(hint)
        self.cls: type | None = hint if isinstance(hint, type) else None
        try:
            kind = _JSON_SCHEMA_TYPES.get(self._adapter.json_schema(mode="serialization").get("type"))
        except PydanticUserError:
            kind = None
        self.kinds: frozenset[type] = frozenset({kind}) if kind else ALL_KINDS

    def plain_types(self) -> tuple[type, ...]:
        return _EXACT_IN_PYDANTIC.get(self.cls, ())

    def encode(self, value: Any) -> Any:
        if self.cls is not None and not isinstance(value, self.cls):
            raise wrong_type(self.name, value)
        if isinstance(value, SecretStr | SecretBytes):
            raise Refused(remedy_of(value) or "")
        try:
            tree = self._adapter.dump_python(value, mode="json", by_alias=True, round_trip=True, warnings="error")
            back = self._adapter.validate_json(to_json(tree))
        except Exception:
            # Pydantic's text quotes the value, which must not reach a log.
            raise Refused(f"Pydantic cannot write this {self.name} as JSON and read it back") from None
        if (flaw := difference(value, back)) is not None:
            raise Refused(f"the JSON of this {self.name} is not read back as it was: {flaw.reason}", flaw.path)
        return tree

    def decode(self, tree: Any) -> Any:
        try:
            return self._adapter.validate_json(to_json(tree))
        except Exception:
            raise misfit(self.name, tree) from None


class RawBytesCodec(Codec):
    """``bytes`` as a whole message: the payload is the value, unchanged."""

    name = "bytes"
    cls: type | None = bytes

    def dumps(self, value: Any) -> bytes:
        if type(value) is not bytes:
            raise wrong_type("bytes", value)
        return value

    def loads(self, payload: bytes) -> bytes:
        return bytes(payload)
