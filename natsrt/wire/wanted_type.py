"""The type that somebody wants an answer to be of: JSON values are read as it, anything else is checked."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin

from google.protobuf import json_format  # type: ignore[import-untyped]

from natsrt.errors import CannotDecode, CannotSerialize
from natsrt.wire.serialization import Serialization
from natsrt.wire.serializers import serializer_for

_JSON_VALUES: Final = frozenset((dict, list, str, int, float, bool, NoneType))
"""The classes of answers that may be meant as another class: who answers may not have that."""


class WantedType:
    """A class of messages, or a union of such.

    Raises:
        CannotSerialize: Messages of that type cannot be sent.
    """

    def __init__(self, wanted: Any) -> None:
        self.cls: Any = wanted
        self._members = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
        self._takes_all = any(member in (Any, object) for member in self._members)
        for member in () if self._takes_all else self._members:
            serializer_for(member)

    def __str__(self) -> str:
        return " or ".join(getattr(member, "__name__", str(member)) for member in self._members)

    def of(self, answer: Any, payload: bytes, serialization: Serialization, what: str) -> Any:
        """Return ``answer``, which was in ``payload``, as this type.

        ``what`` names it in errors. Raises `CannotDecode`.
        """
        if self._takes_all:
            return answer
        if type(answer) in _JSON_VALUES:
            return self._read(answer, payload, serialization, what)
        if any(isinstance(answer, get_origin(member) or member) for member in self._members):
            return answer
        raise CannotDecode(what, f"it is a {type(answer).__name__}, and {self} was asked for", payload)

    def _read(self, answer: Any, payload: bytes, serialization: Serialization, what: str) -> Any:
        if type(answer) in self._members:
            return answer
        reasons, found = [], []
        for member in self._members:
            if member is bytes:
                continue
            try:
                found.append(serialization.read_as(payload, member))
            except (CannotDecode, CannotSerialize) as error:
                reasons.append(error.reason)
            except json_format.ParseError:  # its text quotes the answer
                pass
        if len(found) == 1:
            return found[0]
        why = "several of these types can be read from it" if found else "; ".join(reasons) or "it is something else"
        raise CannotDecode(what, f"it cannot be read as the {self} that was asked for: {why}", payload)
