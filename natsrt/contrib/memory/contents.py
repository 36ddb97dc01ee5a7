"""What a session remembers, as JSON: `MemoryContent` that is read back is equal to what was written, type for type."""

from __future__ import annotations

import base64
import json
from typing import Any, Final

from autogen_core import Image
from autogen_core.memory import MemoryContent, MemoryMimeType

from natsrt.contrib.exact_json import check_keys, dump, is_scalar, too_deep
from natsrt.errors import CannotDecode, CannotSerialize

CLEAR: Final = b'{"kind":"clear"}'
"""The body that says: forget all that came before."""
_WHAT: Final = "MemoryContent"
_MIME_TYPES: Final = frozenset(member.value for member in MemoryMimeType)


def encode(content: MemoryContent) -> bytes:
    """The body of ``content``.

    Raises:
        CannotSerialize: It would not arrive as it is. The text names the part.
    """
    if type(content) is not MemoryContent:
        raise CannotSerialize(type(content).__name__, f"a memory holds {_WHAT} itself, and no subclass of it")
    mime_type = content.mime_type
    if type(mime_type) not in (str, MemoryMimeType):
        raise CannotSerialize(_WHAT, f"mime_type is a {type(mime_type).__name__}; it must be text or MemoryMimeType")
    body: dict[str, Any] = {
        **_encoded(content.content),
        "mimetype": mime_type.value if isinstance(mime_type, MemoryMimeType) else mime_type,
        "known": isinstance(mime_type, MemoryMimeType),
    }
    if content.metadata is not None:
        if type(content.metadata) is not dict:
            raise CannotSerialize(_WHAT, f"metadata is a {type(content.metadata).__name__}; it must be a dict or None")
        _check("metadata", content.metadata)
        body["metadata"] = content.metadata
    return dump(_WHAT, body)


def _encoded(content: Any) -> dict[str, Any]:
    if type(content) is str:
        return {"kind": "text", "content": content}
    if type(content) is bytes:
        return {"kind": "bytes", "content": base64.b64encode(content).decode()}
    if isinstance(content, Image):
        return {"kind": "image", "content": content.to_base64()}  # PNG, which loses nothing
    if type(content) is dict:
        _check("content", content)
        return {"kind": "json", "content": content}
    raise CannotSerialize(_WHAT, f"content is a {type(content).__name__}; it must be text, bytes, a dict or an Image")


def _check(where: str, value: Any) -> None:
    """Raise `CannotSerialize` unless JSON gives ``value`` back as it is."""
    try:
        _check_each(where, value)
    except RecursionError:
        raise too_deep(_WHAT, where) from None


def _check_each(where: str, value: Any) -> None:
    if type(value) is dict:
        check_keys(_WHAT, where, value)
        for key, item in value.items():
            _check_each(f"{where}.{key:.60}", item)
    elif type(value) is list:
        for index, item in enumerate(value):
            _check_each(f"{where}[{index}]", item)
    elif not is_scalar(_WHAT, where, value):
        kind = type(value).__name__
        raise CannotSerialize(_WHAT, f"{where} is a {kind}, which would not arrive as one: convert it to what JSON has")


def decode(body: bytes) -> MemoryContent | None:
    """What a body says; None: forget all that came before.

    Raises:
        CannotDecode: It is no such body.
    """
    try:
        said = json.loads(body)
        if said["kind"] == "clear":
            return None
        text = said["mimetype"]
        if not isinstance(text, str):
            raise TypeError("mimetype is not text")
        known = said["known"] and text in _MIME_TYPES  # a member that only a newer AutoGen has stays text
        metadata = said.get("metadata")
        if not isinstance(metadata, dict | None):
            raise TypeError("metadata is not an object")
        return MemoryContent.model_construct(  # validation could take a dict for an Image
            content=_decoded(said["kind"], said["content"]),
            mime_type=MemoryMimeType(text) if known else text,
            metadata=metadata,
        )
    except Exception as error:  # Pillow raises many for what is no image
        raise CannotDecode("what a session remembers", f"{type(error).__name__}: {error}"[:200], body) from None


def _decoded(kind: str, content: Any) -> Any:
    if kind == "json" and isinstance(content, dict):
        return content
    if kind in ("text", "bytes", "image") and isinstance(content, str):
        if kind == "text":
            return content
        return base64.b64decode(content, validate=True) if kind == "bytes" else Image.from_base64(content)
    raise ValueError(f"the kind {kind!r:.20} with a {type(content).__name__}")
