"""Codecs of types without parts: JSON's own, dates, decimals, UUIDs, bytes, enums, literals."""

from __future__ import annotations

import base64
import datetime
import decimal
import enum
import math
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from natsrt.wire.codecs import (
    NULL,
    Codec,
    Misdeclared,
    PlainCheck,
    Refused,
    Unreadable,
    misfit,
    wrong_type,
)
from natsrt.wire.exactness import FOLDED, NOT_FINITE


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


class MomentCodec(TextCodec):
    """``datetime`` and ``time``. ``fold`` is not written, so a value that needs it is refused."""

    def __init__(self, cls: type[datetime.datetime] | type[datetime.time]) -> None:
        super().__init__(cls, cls.isoformat, cls.fromisoformat)

    def encode(self, value: Any) -> str:
        moment: Any = value
        if type(value) is not self.cls:
            raise wrong_type(self.name, value)
        if moment.fold and moment.utcoffset() is None:
            raise Refused(FOLDED)
        return moment.isoformat()  # type: ignore[no-any-return]


_DATETIME, _UTC = datetime.datetime, datetime.UTC


def _is_plain_datetime(value: Any) -> bool:
    if type(value) is not _DATETIME:
        return False
    return not value.fold if (zone := value.tzinfo) is None else zone is _UTC or _has_whole_minutes(value)


def _has_whole_minutes(value: datetime.datetime) -> bool:
    """Pydantic writes the minutes of an offset, but not its seconds, which historical time zones have."""
    offset = value.utcoffset()
    return not value.fold if offset is None else not (offset.seconds % 60 or offset.microseconds)


_PLAIN_CHECKS: dict[type, PlainCheck] = {
    _DATETIME: _is_plain_datetime,
    datetime.time: lambda value: type(value) is datetime.time and value.tzinfo is None and not value.fold,
    decimal.Decimal: lambda value: type(value) is decimal.Decimal and value.is_finite(),
}


def text_codecs() -> list[TextCodec]:
    return [
        TextCodec(
            bytes, lambda value: base64.b64encode(value).decode(), lambda text: base64.b64decode(text, validate=True)
        ),
        MomentCodec(datetime.datetime),
        TextCodec(datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
        MomentCodec(datetime.time),
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


NONE = ExactCodec(NULL)


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
