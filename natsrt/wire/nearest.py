"""The message class that was probably meant by a plain body which fits none. Only names of fields are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message  # type: ignore[import-untyped]
from pydantic import BaseModel

from natsrt.errors import near_names

_CLOSE = 0.6
"""How alike two names are, from 0 to 1, if one may be meant by the other."""
_COMPARED = 64
"""Fields that are compared at most, so that a large body does not keep a worker busy."""


def nearest_class(tree: Any, classes: Sequence[Any]) -> Any | None:
    """The one class whose fields are most like those of the JSON value ``tree``.

    None if ``tree`` is not an object, if no field is alike, or if several classes are equally near.
    """
    if not isinstance(tree, dict) or not 0 < len(tree) <= _COMPARED:
        return None
    found = [(likeness, cls) for cls in classes if (likeness := _likeness(tree, _field_names(cls)))]
    best = max((likeness for likeness, _ in found), default=0.0)
    nearest = [cls for likeness, cls in found if likeness == best]
    return nearest[0] if len(nearest) == 1 else None


def misspelt_fields(tree: dict[str, Any], cls: Any) -> str:
    """Which fields of ``tree`` the class does not have, but one with a similar name; empty if there are none."""
    names = _field_names(cls)
    missing = [name for name in names if name not in tree]
    pairs = ((key, near_names(key, missing, _CLOSE)) for key in tree if key not in names)
    return ", ".join(f"{key!r} is not a field of it, did you mean {close[0]!r}?" for key, close in pairs if close)


def _field_names(cls: Any) -> list[str]:
    """The names of a message class's fields in JSON."""
    if issubclass(cls, Message):
        return [field.json_name for field in cls.DESCRIPTOR.fields]
    if issubclass(cls, BaseModel):
        return [info.alias or name for name, info in cls.model_fields.items()]
    return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _likeness(tree: dict[str, Any], names: Sequence[str]) -> float:
    """How alike the fields of a body and of a class are, from 0 to 1. A misspelt field counts a little less."""
    if not names:
        return 0.0
    unknown = tree.keys() - set(names)
    missing = [name for name in names if name not in tree]
    misspelt = sum(bool(near_names(key, missing, _CLOSE)) for key in unknown)
    return 2 * (len(tree) - len(unknown) + 0.9 * misspelt) / (len(names) + len(tree))
