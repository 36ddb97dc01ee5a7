"""Whether a value that was read back is the value that was written: equal, and of the same types at every depth."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import math
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel

from natsrt.wire.message_classes import full_name, is_structured

LONE_SURROGATE = "the text has a lone surrogate, which UTF-8 cannot encode"
NOT_FINITE = "JSON has no NaN and no infinity"
FOLDED = (
    "fold=1 of a local time without a time zone is not sent, so it would mean another moment; "
    "give it a time zone (tzinfo), whose offset is sent"
)


def is_folded(value: Any) -> bool:
    """True for a ``datetime`` or ``time`` whose ``fold`` is all that tells its moment from another one."""
    return isinstance(value, datetime.datetime | datetime.time) and bool(value.fold) and value.utcoffset() is None


class Flaw(NamedTuple):
    """What is wrong with a part of a value.

    ``path`` says where, such as ``items[].name``; empty for the whole value. ``reason`` names types, never values.
    """

    path: str
    reason: str

    def under(self, step: str) -> Flaw:
        """This flaw, seen from outside: ``step`` is a field name or ``[]``."""
        return Flaw(path_under(step, self.path), self.reason)


def path_under(step: str, path: str) -> str:
    """``path`` with ``step``, a field name, a key or ``[]``, before it."""
    return f"{step}.{path}" if path and not path.startswith("[") else step + path


def difference(sent: object, arrived: object, hint: Any = None) -> Flaw | None:
    """Return the first difference between two values; None if they are equal and of the same types at every depth.

    Fields that a model excludes from serialization, private attributes and computed fields are not compared. If
    ``hint``, the declared type, has ``float`` where an int was sent, then the equal float is no difference.
    """
    flaw = _difference(sent, arrived, False)
    return _difference(sent, arrived, True) if flaw is not None and _declares_float(hint, set()) else flaw


def _declares_float(hint: Any, seen: set[int]) -> bool:
    """True if an int may arrive as a float in a value that is declared as ``hint``."""
    if hint is float or isinstance(hint, typing.TypeVar):
        return True
    if id(hint) in seen:
        return False
    seen.add(id(hint))
    args = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and int in args:
        args = tuple(arg for arg in args if arg is not float)
    cls = typing.get_origin(hint) or hint
    alias = getattr(cls, "__supertype__", None) or getattr(cls, "__value__", None)
    has_fields = isinstance(cls, type) and (hasattr(cls, "__total__") or hasattr(cls, "_fields"))
    fields = declared_types(cls) if has_fields else {}
    return any(_declares_float(part, seen) for part in (alias, *args, *fields.values()))


def declared_types(cls: Any) -> dict[str, Any]:
    """The declared types of the fields of a class."""
    if issubclass(cls, BaseModel):
        return {name: field.annotation for name, field in cls.model_fields.items()}
    try:
        return typing.get_type_hints(cls)
    except Exception:
        return {}


def _difference(sent: object, arrived: object, floats: bool) -> Flaw | None:
    cls = type(sent)
    if type(arrived) is not cls and not _are_definitions_of_one(cls, type(arrived)):
        if floats and cls is int and type(arrived) is float and sent == arrived:
            return None
        return Flaw("", f"{value_of_type(cls)} would arrive as {value_of_type(type(arrived))}")
    if isinstance(sent, dict):
        return _pairs_differ(sent, arrived, floats)
    if isinstance(sent, set | frozenset):
        return _members_differ(sent, arrived, floats)
    if isinstance(sent, list | tuple | collections.deque):
        return _items_differ(sent, arrived, floats)
    if isinstance(sent, BaseModel) or (dataclasses.is_dataclass(cls) and not isinstance(sent, type)):
        return _fields_differ(sent, arrived)
    if is_folded(sent) and not is_folded(arrived):
        return Flaw("", FOLDED)
    return None if _equal(sent, arrived) else Flaw("", f"{value_of_type(cls)} would arrive changed")


def value_of_type(cls: type) -> str:
    """``cls`` in an error: the value of a type."""
    return "None" if cls is type(None) else f"a value of type {cls.__name__}"


def _pairs_differ(sent: dict[Any, Any], arrived: Any, floats: bool) -> Flaw | None:
    if len(sent) != len(arrived):
        return Flaw("", "some of its keys would be lost, or be added")
    if getattr(sent, "default_factory", None) is not getattr(arrived, "default_factory", None):
        return Flaw("", f"the default factory of {value_of_type(type(sent))} would be lost")
    keys = {key: key for key in arrived}
    for key, item in sent.items():
        if key not in keys or _difference(key, keys[key], floats) is not None:
            return Flaw("[]", f"a key, {value_of_type(type(key))}, would arrive as a different one")
        if (flaw := _difference(item, arrived[key], floats)) is not None:
            return flaw.under("[]")
    return None


def _members_differ(sent: Any, arrived: Any, floats: bool) -> Flaw | None:
    found = {item: item for item in arrived}
    for item in sent:
        if item not in found or _difference(item, found[item], floats) is not None:
            return Flaw("[]", f"{value_of_type(type(item))} would arrive changed")
    return None if len(sent) == len(found) else Flaw("", "items would be added")


def _items_differ(sent: Any, arrived: Any, floats: bool) -> Flaw | None:
    if len(sent) != len(arrived):
        return Flaw("", "items would be lost, or be added")
    if getattr(sent, "maxlen", None) != getattr(arrived, "maxlen", None):
        return Flaw("", f"the maximum length of {value_of_type(type(sent))} would be lost")
    for one, other in zip(sent, arrived, strict=True):
        if (flaw := _difference(one, other, floats)) is not None:
            return flaw.under("[]")
    return None


def _are_definitions_of_one(cls: type, other: type) -> bool:
    """Whether objects of two classes of one full name can be compared by their fields."""
    same_kind = issubclass(cls, BaseModel) == issubclass(other, BaseModel)
    return same_kind and is_structured(cls) and is_structured(other) and full_name(cls) == full_name(other)


def _fields_differ(sent: Any, arrived: Any) -> Flaw | None:
    missing = object()
    if type(arrived) is not type(sent) and (unshared := set(fields_of(sent)) ^ set(fields_of(arrived))):
        return Flaw(min(unshared), "the field would be lost, or be added")
    for name in fields_of(sent):
        one, other = getattr(sent, name, missing), getattr(arrived, name, missing)
        if one is missing is other:
            continue  # a field with init=False
        if one is missing:
            return Flaw(name, "the field has no value")
        flaw = _difference(one, other, False)
        if flaw is not None and (flaw := difference(one, other, declared_types(type(sent)).get(name))) is not None:
            return flaw.under(name)
    extra, other_extra = getattr(sent, "model_extra", None), getattr(arrived, "model_extra", None)
    return difference(extra, other_extra)


def fields_of(value: Any) -> Iterable[str]:
    """The names of the fields of a model or dataclass that are sent."""
    if isinstance(value, BaseModel):
        return [name for name, field in type(value).model_fields.items() if not field.exclude]
    return [field.name for field in dataclasses.fields(value)]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float):
        same_sign = math.copysign(1, one) == math.copysign(1, other)
        return bool(one == other and same_sign) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, decimal.Decimal):
        return bool(one.as_tuple() == other.as_tuple())
    if isinstance(one, datetime.datetime | datetime.time):
        return bool(one.replace(tzinfo=None) == other.replace(tzinfo=None)) and one.utcoffset() == other.utcoffset()
    if getattr(type(one), "__eq__") is getattr(object, "__eq__"):  # noqa: B009 (mypy takes them for different)
        return one is other or _same_attributes(one, other)
    try:
        result = one == other
        return bool(result.all() if hasattr(result, "all") else result)
    except Exception:
        return False


def _same_attributes(one: Any, other: Any) -> bool:
    """Whether two objects whose class does not define equality have equal attributes, and have some."""
    attributes = getattr(one, "__dict__", None)
    return bool(attributes) and difference(attributes, other.__dict__) is None


def unwritable(value: object, *, integers: bool = True) -> Flaw | None:
    """Return the first part of ``value`` that JSON cannot represent; None if there is none.

    ``integers``: whether integers of more than 64 bits can be written.
    """
    if isinstance(value, float):
        return None if math.isfinite(value) else Flaw("", NOT_FINITE)
    if isinstance(value, str):
        return None if value.isascii() or _encodes(value) else Flaw("", LONE_SURROGATE)
    if isinstance(value, int):
        small = integers or -(2**63) <= value < 2**64
        return None if small else Flaw("", "the integer has more than 64 bits, which JSON readers do not agree on")
    for step, part in _parts(value):
        if (flaw := unwritable(part, integers=integers)) is not None:
            return flaw.under(step)
    return None


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parts(value: Any) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield "[]", key
            yield "[]", item
    elif isinstance(value, list | tuple | set | frozenset | collections.deque):
        for item in value:
            yield "[]", item
    elif isinstance(value, BaseModel) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        for name in fields_of(value):
            yield name, getattr(value, name, None)
        yield from _parts(getattr(value, "model_extra", None) or {})
