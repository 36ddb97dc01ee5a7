"""Converts messages to (type name, content type, payload) and back.

``Serialization`` belongs to one runtime and is not safe to use from several threads. The format of JSON payloads is
described in ``natsrt.wire.compiler``. This module selects the serializer of a message.

Dataclasses, Pydantic models, AutoGen's ``Image`` and plain ``str``, ``int``, ``float``, ``bool``, ``list``, ``dict``
and None are sent as ``application/json``. ``bytes`` are sent unchanged. Protobuf messages are sent in a packed
``google.protobuf.Any``, with the same bytes as AutoGen sends. A serializer registered by the user takes precedence over
natsrt's, and receives exactly the bytes that it wrote. AutoGen's standard serializers, which lose nested types, are
replaced by natsrt's.

An empty plain body means None if a handler accepts None. Otherwise it is not JSON, so it is the empty ``str`` or
``bytes``.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

import orjson
from autogen_core import (
    JSON_DATA_CONTENT_TYPE,
    PROTOBUF_DATA_CONTENT_TYPE,
    FunctionCall,
    Image,
    MessageSerializer,
    UnknownPayload,
    try_get_known_serializers_for_type,
)
from google.protobuf import any_pb2, json_format  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from pydantic import BaseModel
from pydantic_core import PydanticSerializationError

from natsrt.errors import CannotDecode, CannotSerialize
from natsrt.wire.codecs import Codec, RawBytesCodec, Refused, Unreadable
from natsrt.wire.compiler import Codecs
from natsrt.wire.known_classes import in_this_process
from natsrt.wire.model_codec import pydantic_refusal

__all__ = ["BYTES", "JSON", "PROTOBUF", "Encoded", "Serialization", "serializer_for", "type_name_of"]

JSON = JSON_DATA_CONTENT_TYPE
PROTOBUF = PROTOBUF_DATA_CONTENT_TYPE
BYTES = "application/octet-stream"

_PLAIN: tuple[type, ...] = (str, int, float, bool, bytes, list, dict, type(None))


class Encoded(NamedTuple):
    """A message ready to be sent."""

    type_name: str
    content_type: str
    payload: bytes


def type_name_of(cls: Any) -> str:
    """Return the name of a message class on the wire.

    As in AutoGen, this is the class's ``__name__``, or the full name of a protobuf message. For NoneType it is
    ``None``, for a generic alias such as ``list[str]`` the name of its class (``list``), and for ``Any`` it is ``Any``.
    """
    cls = typing.get_origin(cls) or cls
    if cls is type(None):
        return "None"
    if _is_protobuf(cls):
        return str(cls.DESCRIPTOR.full_name)
    return str(getattr(cls, "__name__", cls))


def serializer_for(cls: type) -> MessageSerializer[Any]:
    """Return natsrt's serializer of a class; raises ``CannotSerialize`` if there is none."""
    return _own_serializer(cls, Codecs())


class _OwnSerializer:
    """A ``MessageSerializer`` based on a codec. It raises natsrt's public errors."""

    def __init__(self, cls: type, codec: Codec) -> None:
        self.cls = cls
        self.type_name = type_name_of(cls)
        self.data_content_type = BYTES if cls is bytes else JSON
        self._codec = codec

    def serialize(self, message: Any) -> bytes:
        try:
            return self._codec.dumps(message)
        except Refused as fault:
            raise CannotSerialize(self.type_name, str(fault)) from None
        except PydanticSerializationError as error:
            raise CannotSerialize(self.type_name, str(pydantic_refusal(error))) from None
        except RecursionError:
            raise CannotSerialize(self.type_name, "it is nested too deeply, or contains itself") from None
        except orjson.JSONEncodeError as error:
            raise CannotSerialize(self.type_name, str(error)) from None
        except Exception as error:
            raise CannotSerialize(self.type_name, f"{type(error).__name__} was raised while writing it") from error

    def deserialize(self, payload: bytes) -> Any:
        try:
            return self._codec.loads(payload)
        except Unreadable as fault:
            raise self._cannot_decode(str(fault), payload) from fault.__cause__
        except RecursionError:
            raise self._cannot_decode("it is nested too deeply", payload) from None
        except ValueError:
            raise self._cannot_decode("it is not JSON", payload) from None
        except Exception as error:
            raise self._cannot_decode(f"{type(error).__name__} was raised while reading it", payload) from error

    def _cannot_decode(self, problem: str, payload: bytes) -> CannotDecode:
        return CannotDecode(f"a message of type {self.type_name}", problem, payload)


class _ProtobufSerializer:
    """AutoGen's protobuf serializer. It raises natsrt's public errors."""

    data_content_type = PROTOBUF

    def __init__(self, cls: type[Message]) -> None:
        self.cls = cls
        self.type_name = type_name_of(cls)
        self._serializer: MessageSerializer[Any] = try_get_known_serializers_for_type(cls)[0]

    def serialize(self, message: Any) -> bytes:
        try:
            return self._serializer.serialize(message)
        except Exception as error:
            raise CannotSerialize(self.type_name, f"protobuf raised {type(error).__name__}") from error

    def deserialize(self, payload: bytes) -> Any:
        try:
            return self._serializer.deserialize(payload)
        except (DecodeError, ValueError):
            what = f"a message of type {self.type_name}"
            raise CannotDecode(what, "it is not a google.protobuf.Any that contains one", payload) from None


def _own_serializer(cls: type, codecs: Codecs) -> MessageSerializer[Any]:
    if _is_protobuf(cls):
        return _ProtobufSerializer(cls)
    if cls is bytes:
        return _OwnSerializer(cls, RawBytesCodec())
    if not _is_structured(cls) and (typing.get_origin(cls) or cls) not in _PLAIN:
        raise CannotSerialize(
            type_name_of(cls),
            "only dataclasses, Pydantic models, protobuf messages, Image and plain values can be sent",
        )
    try:
        return _OwnSerializer(cls, codecs.of(cls))
    except Refused as fault:
        raise CannotSerialize(type_name_of(cls), str(fault)) from None
    except RecursionError:
        raise CannotSerialize(type_name_of(cls), "its type is nested too deeply") from None


def _is_protobuf(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, Message)


def _is_structured(cls: Any) -> bool:
    cls = typing.get_origin(cls) or cls
    return isinstance(cls, type) and (is_dataclass(cls) or issubclass(cls, BaseModel | Image) and cls is not BaseModel)


@dataclass
class _SampleDataclass:
    pass


class _SampleModel(BaseModel):
    pass


_AUTOGEN_STANDARD = tuple(
    {
        type(serializer)
        for sample in (_SampleDataclass, _SampleModel, any_pb2.Any)
        for serializer in try_get_known_serializers_for_type(sample)
    }
)


_BUILTIN: dict[str, type] = {type_name_of(cls): cls for cls in (*_PLAIN, Image, FunctionCall)}
_TOOL_RESULT = "FunctionExecutionResult"
_BUILTIN_NAMES = frozenset({*_BUILTIN, _TOOL_RESULT})
"""The type names that can always be received, unless the user has registered a class under one of them."""


def _builtin_class(type_name: str) -> type | None:
    """The class of one of `_BUILTIN_NAMES`; None for any other name."""
    if type_name == _TOOL_RESULT:
        # Imported on first use, because it also imports AutoGen's models and tools, which would slow every start.
        from autogen_core.models import FunctionExecutionResult

        return FunctionExecutionResult
    return _BUILTIN.get(type_name)


class Serialization:
    """The serializers of one runtime.

    Any dataclass, Pydantic model, protobuf message, ``Image`` or plain value can be sent. To be received, a class must
    be registered. Plain values and AutoGen's messages (``Image``, and the call and result of a tool agent) can always
    be received, unless a registered class has the same name.
    """

    def __init__(self) -> None:
        self._codecs = Codecs(self._message_class)
        self._strict_codecs = Codecs(self._message_class, strict=True)
        self._own: dict[type, MessageSerializer[Any]] = {}
        self._strict: dict[Any, MessageSerializer[Any]] = {}
        self._registered: dict[tuple[str, str], MessageSerializer[Any]] = {}
        self._custom: dict[str, MessageSerializer[Any]] = {}
        self._classes: dict[str, type] = {}
        self._sending: dict[type, MessageSerializer[Any]] = {}
        self._replies: dict[tuple[str, str, type | None, type | None], MessageSerializer[Any]] = {}

    def add(self, serializer: MessageSerializer[Any] | Sequence[MessageSerializer[Any]]) -> None:
        """Register serializers. Raises ValueError if another class is registered under the same type name.

        The class of a user's serializer is its attribute ``cls``. Without this attribute the class is unknown until the
        first message.
        """
        if isinstance(serializer, Sequence):
            for one in serializer:
                self.add(one)
            return
        cls = getattr(serializer, "cls", None)
        if isinstance(serializer, (*_AUTOGEN_STANDARD, _OwnSerializer, _ProtobufSerializer)) and cls is not None:
            self.add_class(cls)
            return
        name = serializer.type_name
        if isinstance(cls, type):
            self._claim(name, cls)
        self._registered[name, serializer.data_content_type] = serializer
        self._custom[name] = serializer
        self._sending.clear()
        self._replies.clear()

    def add_class(self, cls: type) -> None:
        """Register natsrt's serializer of ``cls``. A user's serializer for the same content type is not replaced.

        Raises ``CannotSerialize`` if there is none, and ValueError if another class is registered under the same type
        name.
        """
        serializer = self._own_serializer(cls)
        named = typing.get_origin(cls) or cls
        self._claim(serializer.type_name, named)
        in_this_process.add(serializer.type_name, named)
        key = (serializer.type_name, serializer.data_content_type)
        if isinstance(self._registered.get(key), _OwnSerializer | _ProtobufSerializer | None):
            self._registered[key] = serializer
        self._sending.clear()
        self._replies.clear()

    def refuse_clashes(self, classes: Iterable[Any]) -> None:
        """Raise the ValueError that registering all of ``classes`` would raise. Registers nothing."""
        names = dict(self._classes)
        for cls in classes:
            if (serializer := self._own_or_none(cls)) is not None:
                self._claim(serializer.type_name, typing.get_origin(cls) or cls, names)

    def _claim(self, name: str, cls: type, names: dict[str, type] | None = None) -> None:
        known = (self._classes if names is None else names).setdefault(name, cls)
        if known is not cls:
            raise ValueError(
                f"two classes have the message type name {name!r}: {_qualified(known)} is registered, "
                f"and {_qualified(cls)} cannot be, because a receiver could not distinguish them"
            )

    def encode(self, message: Any) -> Encoded:
        """Return ``message`` ready to be sent; raises ``CannotSerialize`` if it cannot be written exactly."""
        serializer = self._sending.get(type(message)) or self._sender(type(message))
        return Encoded(serializer.type_name, serializer.data_content_type, serializer.serialize(message))

    def _sender(self, cls: type) -> MessageSerializer[Any]:
        name = type_name_of(cls)
        custom = next((c for c in self._custom.values() if getattr(c, "cls", None) is cls), self._custom.get(name))
        if custom is not None:
            name = custom.type_name
            self._classes.setdefault(name, cls)
        known = self._classes.get(name)
        if known is not None and known is not cls:
            raise CannotSerialize(
                name, f"{_qualified(known)} is registered under this name, and the message is a {_qualified(cls)}"
            )
        serializer = self._own_serializer(cls) if custom is None else _Guarded(custom)
        self._sending[cls] = serializer
        in_this_process.add(name, cls)
        return serializer

    def decode(self, type_name: str, content_type: str, payload: bytes) -> Any:
        """Return the message in ``payload``, or an ``UnknownPayload`` if no serializer is registered for its type.

        Raises ``CannotDecode``.
        """
        serializer = self.lookup(type_name, content_type)
        if serializer is None:
            return UnknownPayload(type_name, content_type, payload)
        return self._read(serializer, payload)

    def decode_unregistered(self, payload: UnknownPayload, classes: Iterable[type]) -> Any:
        """Return the message in ``payload`` if this process knows its class without a serializer; else ``payload``.

        Its class is the only one with this type name that runtimes of this process have sent or registered, or one of
        ``classes``. Raises ``CannotDecode``.
        """
        known = in_this_process.only(payload.type_name)
        candidates = classes if known is None else (known, *classes)
        serializer = self._among(candidates, payload.type_name, payload.data_content_type)
        return payload if serializer is None else self._read(serializer, payload.payload)

    def _read(self, serializer: MessageSerializer[Any], payload: bytes) -> Any:
        if isinstance(serializer, (_OwnSerializer, _ProtobufSerializer)):  # a tuple: twice as fast as a union
            return serializer.deserialize(payload)
        message = _Guarded(serializer).deserialize(payload)
        self._classes.setdefault(serializer.type_name, type(message))
        return message

    def lookup(self, type_name: str, content_type: str = JSON) -> MessageSerializer[Any] | None:
        """Return the serializer that reads messages of this type name, None if there is none."""
        serializer = self._registered.get((type_name, content_type))
        if serializer is None and type_name not in self._classes and (cls := _builtin_class(type_name)) is not None:
            builtin = self._own_serializer(cls)
            serializer = builtin if builtin.data_content_type == content_type else None
        return serializer

    def is_known(self, type_name: str) -> bool:
        """True if messages of this type name can be read in at least one content type."""
        return type_name in _BUILTIN_NAMES or any(name == type_name for name, _ in self._registered)

    def content_type_of(self, type_name: str) -> str:
        """Return the content type to assume for a body of which only the type name is known.

        This is JSON if JSON can be read or the type is unknown, else the first registered content type.
        """
        known = [content for name, content in self._registered if name == type_name]
        if type_name in _BUILTIN_NAMES:
            known.append(BYTES if type_name == "bytes" else JSON)
        return known[0] if known and JSON not in known else JSON

    def class_of(self, type_name: str) -> type | None:
        """Return the class of a type name; None if it is unknown.

        It is also None if a serializer without ``cls`` is registered for the name and has not been used yet.
        """
        known = self._classes.get(type_name)
        if known is None and type_name not in self._custom:
            known = _builtin_class(type_name)
        return known

    def _message_class(self, type_name: str) -> type | None:
        """Return the registered class that ``"$type"`` may name; None if there is none."""
        known = self.class_of(type_name)
        return known if _is_structured(known) else None

    def _own_serializer(self, cls: type) -> MessageSerializer[Any]:
        serializer = self._own.get(cls)
        if serializer is None:
            serializer = self._own[cls] = _own_serializer(cls, self._codecs)
        return serializer

    def _among(self, classes: Iterable[type], type_name: str, content_type: str) -> MessageSerializer[Any] | None:
        for cls in classes:
            serializer = self._own_or_none(cls) if type_name_of(cls) == type_name else None
            if serializer is not None and serializer.data_content_type == content_type:
                return serializer
        return None

    def _own_or_none(self, cls: type) -> MessageSerializer[Any] | None:
        try:
            return self._own_serializer(cls)
        except CannotSerialize:
            return None

    def reply(
        self,
        type_name: str,
        content_type: str,
        payload: bytes,
        produced: Callable[[], Iterable[type]],
        sent: type | None,
        wanted: type | None = None,
    ) -> Any:
        """Return the reply in ``payload``, or an ``UnknownPayload`` if its type is unknown; raises ``CannotDecode``.

        The class of the reply must be registered, or be ``wanted``, or be one of ``produced()`` (the return types of
        the handlers known here), or be a message class of that name in the module of ``sent``, which is the class of
        the message that the reply answers. Nothing is imported.
        """
        key = (type_name, content_type, sent, wanted)
        serializer = self._replies.get(key)
        if serializer is None:
            serializer = self.lookup(type_name, content_type)
            if serializer is None:
                classes = (*(() if wanted is None else (wanted,)), *produced(), *_neighbours(sent, type_name))
                serializer = self._among(classes, type_name, content_type)
            if serializer is None:
                return UnknownPayload(type_name, content_type, payload)
            self._replies[key] = serializer
        return self._read(serializer, payload)

    def infer(self, payload: bytes, candidates: Sequence[Any]) -> Any:
        """Return the message in a plain body without a type; raises ``CannotDecode``, which names the candidates.

        The message gets the one candidate class that can read the body and knows all its fields, at any depth.
        Dataclasses, models and protobuf messages (in their JSON form) are tried first, then plain types except
        ``float``, then ``float``, then ``Any``, then ``bytes``. A body that is not JSON fits only ``str`` and
        ``bytes``. Serializers registered by the user are not tried.
        """
        candidates = list(dict.fromkeys(candidates))
        if not payload and type(None) in candidates:
            return None
        try:
            tree = orjson.loads(payload)
        except orjson.JSONDecodeError:
            return self._infer_text(payload, candidates)
        for tier in (_is_message_class, _is_plain_json, lambda cls: cls is float):
            fitting = self._fitting(payload, [cls for cls in candidates if tier(cls)])
            if len(fitting) > 1:
                raise _undecided("fits several message types", [cls for cls, _ in fitting], payload)
            if fitting:
                return fitting[0][1]
        if Any in candidates or object in candidates:
            return tree
        if bytes in candidates:
            return bytes(payload)
        raise _undecided("fits none of the message types handled here", candidates, payload)

    def _infer_text(self, payload: bytes, candidates: Sequence[Any]) -> Any:
        if str in candidates:
            try:
                return payload.decode()
            except UnicodeDecodeError:
                pass
        if bytes in candidates:
            return bytes(payload)
        raise _undecided("is not JSON and fits none of the message types handled here", candidates, payload)

    def _fitting(self, payload: bytes, classes: Sequence[Any]) -> list[tuple[Any, Any]]:
        fitting = []
        for cls in classes:
            try:
                fitting.append((cls, self._read_strictly(payload, cls)))
            except (CannotDecode, CannotSerialize, json_format.ParseError):
                continue
        return fitting

    def _read_strictly(self, payload: bytes, cls: Any) -> Any:
        if _is_protobuf(cls):
            return json_format.Parse(payload, cls())
        serializer = self._strict.get(cls)
        if serializer is None:
            serializer = self._strict[cls] = _own_serializer(cls, self._strict_codecs)
        return serializer.deserialize(payload)


class _Guarded:
    """A serializer registered by the user. It raises natsrt's public errors."""

    def __init__(self, serializer: MessageSerializer[Any]) -> None:
        self.type_name = serializer.type_name
        self.data_content_type = serializer.data_content_type
        self._serializer = serializer

    def serialize(self, message: Any) -> bytes:
        try:
            return self._serializer.serialize(message)
        except CannotSerialize:
            raise
        except Exception as error:
            raise CannotSerialize(self.type_name, f"its serializer raised {type(error).__name__}") from error

    def deserialize(self, payload: bytes) -> Any:
        try:
            return self._serializer.deserialize(payload)
        except CannotDecode:
            raise
        except Exception as error:
            what = f"a message of type {self.type_name}"
            raise CannotDecode(what, f"its serializer raised {type(error).__name__}", payload) from error


def _is_message_class(cls: Any) -> bool:
    return _is_structured(cls) or _is_protobuf(cls)


def _is_plain_json(cls: Any) -> bool:
    cls = typing.get_origin(cls) or cls
    return cls in _PLAIN and cls not in (bytes, float)


def _neighbours(sent: type | None, type_name: str) -> Iterable[type]:
    """The message class named ``type_name`` in the module that defines ``sent``, if it has been imported."""
    module = sys.modules.get(sent.__module__) if sent is not None else None
    found = vars(module).get(type_name.rpartition(".")[2]) if module is not None else None
    return [found] if isinstance(found, type) and _is_message_class(found) else []


def _undecided(problem: str, classes: Iterable[Any], payload: bytes) -> CannotDecode:
    names = ", ".join(sorted(type_name_of(cls) for cls in classes)) or "none"
    return CannotDecode("a plain body", f"it {problem} ({names}); set the header Natsrt-Type", payload)


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
