"""The codec of types that only Pydantic knows, such as ``Path`` and ``SecretStr``."""

from __future__ import annotations

import datetime
import ipaddress
import pathlib
from typing import Any

from pydantic import SecretBytes, SecretStr, TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic_core import to_json

from natsrt.wire.codecs import (
    ALL_KINDS,
    Codec,
    Refused,
    misfit,
    remedy_of,
    wrong_type,
)
from natsrt.wire.exactness import difference

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
        self._hint = hint
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
        if (flaw := difference(value, back, self._hint)) is not None:
            raise Refused(f"the JSON of this {self.name} is not read back as it was: {flaw.reason}", flaw.path)
        return tree

    def decode(self, tree: Any) -> Any:
        try:
            return self._adapter.validate_json(to_json(tree))
        except Exception:
            raise misfit(self.name, tree) from None
