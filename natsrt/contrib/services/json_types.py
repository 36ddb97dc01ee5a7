"""Message types as plain JSON: written, read, and described by a JSON schema. ``bytes`` are sent as they are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cached_property
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from pydantic_core import PydanticSerializationError, from_json
from typing_extensions import is_typeddict

from natsrt.errors import CannotDecode, CannotSerialize

_RAW: Final = {"contentMediaType": "application/octet-stream"}
"""The schema of ``bytes``."""
_FIELD: Final = re.compile(r"\[field_name='(\w+)'")
"""In the text of Pydantic: the field whose value does not have its type."""


class JsonType:
    """A type whose values travel as plain JSON.

    Args:
        cls: A dataclass, Pydantic model, ``TypedDict``, plain type, or a union of these; ``bytes`` for payloads that
            are no JSON; None, or ``NoneType``, for empty payloads.
        argument: The name of the argument that has the type, for errors.

    Raises:
        TypeError: There is no JSON for the type.
    """

    def __init__(self, cls: Any, argument: str) -> None:
        self.cls: Any = NoneType if cls is None else cls
        self._argument = argument
        self.name: str = getattr(self.cls, "__name__", None) or str(self.cls)
        try:
            self._adapter: TypeAdapter[Any] = TypeAdapter(self.cls)
            if not self._adapter.pydantic_complete:  # a class refers to others that were not defined with it
                self._adapter.rebuild(raise_errors=True)
        except (PydanticSchemaGenerationError, PydanticUserError, NameError) as error:  # NameError: of a reference
            reason = str(error).splitlines()[0]
            raise TypeError(
                f"{argument} must be a type that Pydantic can write as JSON, such as a dataclass or a Pydantic model, "
                f"or bytes, not {cls!r:.100}: {reason}"
            ) from None

    @property
    def message_classes(self) -> list[type]:
        """The dataclasses and Pydantic models among the members of a union, or the type itself if it is one."""
        return [
            cls
            for cls in _members(self.cls)
            if isinstance(cls, type) and (is_dataclass(cls) or issubclass(cls, BaseModel))
        ]

    def encode(self, value: Any) -> bytes:
        """The value as JSON, without what its declared types do not have, such as the fields of a subclass.

        Raises `CannotSerialize` if the value does not fit the type, or JSON.
        """
        if self.cls is bytes:
            if isinstance(value, bytes):
                return value
            raise CannotSerialize(self.name, f"it is of type {type(value).__name__}")
        if self.cls is NoneType and value is None:
            return b""
        try:
            if not _is_finite(self._adapter.dump_python(value, warnings=False)):  # Pydantic writes them as null
                raise CannotSerialize(self.name, "JSON has no NaN and no infinity")
            payload = self._adapter.dump_json(value, by_alias=True, warnings=False)
            self._require_fit(value, payload)
            self._require_declared(value)
        except ValidationError as error:
            raise CannotSerialize(self.name, _outline(error)) from None
        except CannotSerialize:
            raise
        except RecursionError:
            raise CannotSerialize(self.name, "it is nested too deeply, or contains itself") from None
        except (PydanticSerializationError, ValueError, TypeError, AttributeError) as error:
            raise CannotSerialize(self.name, str(error).splitlines()[0]) from None
        return payload

    def _require_fit(self, value: Any, payload: bytes) -> None:
        """Raise ValidationError or ValueError if the value, written as ``payload``, does not fit the type.

        Pydantic writes None in any place, and leaves out fields that are missing. Reading finds both, but some types
        cannot read what they write.
        """
        try:
            self._adapter.validate_json(payload)
        except ValidationError:
            if not self._is_written_otherwise:
                raise
            from_json(payload)
            self._adapter.validate_python(value)

    @cached_property
    def _is_written_otherwise(self) -> bool:
        """True if the type says that it is written in another form than it is read: by a ``serialization_alias``,
        computed or excluded fields, or a serializer with a return type."""
        try:
            return self._adapter.json_schema(mode="validation") != self._adapter.json_schema(mode="serialization")
        except PydanticUserError:  # it has no schema
            return False

    def _require_declared(self, value: Any) -> None:
        """Raise `CannotSerialize` if a part of the value does not have its declared type.

        Pydantic would write such a part with all its fields, also those that no type declares.
        """
        try:
            self._adapter.dump_json(value, by_alias=True, warnings="error")
        except PydanticSerializationError as error:  # its text has the values: they are payload
            fields = list(dict.fromkeys(_FIELD.findall(str(error))))[:5]
            where = f"the value of {', '.join(fields)}" if fields else "it"
            raise CannotSerialize(self.name, f"{where} does not have the declared type") from None

    def decode(self, payload: bytes, what: str) -> Any:
        """Raises `CannotDecode`, which names ``what``, if the payload is no JSON or does not fit the type."""
        if self.cls is bytes:
            return payload
        try:
            if not payload:  # as services answer that have nothing to say
                return self._adapter.validate_python(None)
            return self._adapter.validate_json(payload)
        except ValidationError as error:
            reason = _outline(error) if payload else f"it is empty, and {self.name} was expected"
            raise CannotDecode(what, reason, payload) from None

    def schema(self, mode: Literal["validation", "serialization"]) -> dict[str, Any]:
        """The JSON schema of what is read (validation) or written (serialization).

        Raises TypeError if there is none.
        """
        if self.cls is bytes:
            return dict(_RAW)
        try:
            return self._adapter.json_schema(mode=mode)
        except PydanticUserError as error:
            reason = str(error).splitlines()[0]
            raise TypeError(
                f"{self._argument} must have a JSON schema, which clients ask for, and {self.cls!r:.100} has none: "
                f"{reason}"
            ) from None


def check_message_type(cls: Any, argument: str) -> None:
    """Raise TypeError if ``cls`` is no message type, because AutoGen finds the handler by the class of a message.

    Values of a ``TypedDict`` and of ``list[int]`` have the classes dict and list. ``argument`` is as for `JsonType`.
    """
    for member in _members(cls):
        is_class = isinstance(member, type) and get_origin(member) is None and member not in (object, Any)
        if member is not None and (not is_class or is_typeddict(member)):
            raise TypeError(
                f"{argument} must be a class or a union of classes: a dataclass, a Pydantic model, or a class such as "
                f"str, int, dict, list or bytes; {member!r:.100} is none: use a dataclass or a model, or dict or list"
            )


def _members(cls: Any) -> tuple[Any, ...]:
    """The members of a union; any other type itself."""
    return get_args(cls) if get_origin(cls) in (Union, UnionType) else (cls,)


def _is_finite(tree: Any) -> bool:
    """True if there is no NaN and no infinity among the values of a tree."""
    if isinstance(tree, float):
        return math.isfinite(tree)
    if isinstance(tree, Mapping):
        return all(map(_is_finite, tree)) and all(map(_is_finite, tree.values()))
    if isinstance(tree, list | tuple | set | frozenset):
        return all(map(_is_finite, tree))
    return True


def _outline(error: ValidationError) -> str:
    """What is wrong where, without the values: they are payload. Keys of the payload may be of any length."""
    found = error.errors(include_input=False, include_url=False, include_context=False)
    problems = [
        f"{'.'.join(map(str, one['loc'])):.200}: {one['msg']:.200}" if one["loc"] else f"{one['msg']:.200}"
        for one in found[:5]
    ]
    more = f", and {len(found) - 5} more" if len(found) > 5 else ""
    return "; ".join(problems) + more
