"""Messages as (type name, content type, payload) and back.

``Serialization`` belongs to one runtime and is not safe to use from several threads. What a payload looks like is told
in ``natsrt.wire.compiler``; this module decides which serializer a message gets.

Dataclasses, Pydantic models, protobuf messages, AutoGen's ``Image`` and plain ``str``, ``int``, ``float``, ``bool``,
``list``, ``dict`` and None travel as ``application/json``; ``bytes`` as themselves; protobuf in a packed
``google.protobuf.Any``, byte for byte as AutoGen does it. Serializers of the user's own go before natsrt's, and get the
bytes they wrote; AutoGen's standard ones, which lose nested types, are replaced.

An empty plain body means None where a handler takes None; else it is not JSON, so the empty ``str`` or ``bytes``.
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
    """The name of a message class on the wire, by AutoGen's rule: the class's own, or the protobuf full name.

    NoneType is ``None``; a generic alias such as ``list[str]`` has the name of its class, ``list``; ``Any`` is ``Any``.
    """
    cls = typing.get_origin(cls) or cls
    if cls is type(None):
        return "None"
    if _is_protobuf(cls):
        return str(cls.DESCRIPTOR.full_name)
    return str(getattr(cls, "__name__", cls))


def serializer_for(cls: type) -> MessageSerializer[Any]:
    """natsrt's own serializer of a class; raises ``CannotSerialize`` if there is none."""
    return _own_serializer(cls, Codecs())


class _OwnSerializer:
    """A ``MessageSerializer`` on top of a codec, with the errors a user sees."""

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
    """AutoGen's own protobuf serializer, with the errors a user sees."""

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
            raise CannotDecode(what, "it is no google.protobuf.Any that holds one", payload) from None


def _own_serializer(cls: type, codecs: Codecs) -> MessageSerializer[Any]:
    if _is_protobuf(cls):
        return _ProtobufSerializer(cls)
    if cls is bytes:
        return _OwnSerializer(cls, RawBytesCodec())
    if not _is_structured(cls) and (typing.get_origin(cls) or cls) not in _PLAIN:
        raise CannotSerialize(
            type_name_of(cls),
            "only dataclasses, Pydantic models, protobuf messages, Image and plain values are messages",
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
"""The type names that can always be received, unless a class of the user's is registered under them."""


def _builtin_class(type_name: str) -> type | None:
    """The class of one of `_BUILTIN_NAMES`; None for any other name."""
    if type_name == _TOOL_RESULT:
        # Imported when one is met: with it come AutoGen's models and tools, for which every start would have to wait.
        from autogen_core.models import FunctionExecutionResult

        return FunctionExecutionResult
    return _BUILTIN.get(type_name)


class Serialization:
    """The serializers of one runtime.

    Registered classes can be received; any dataclass, Pydantic model, protobuf message, ``Image`` or plain value can be
    sent, and plain values and AutoGen's own messages (``Image``, and a tool agent's call and result) can always be
    received, unless a registered class has their name.
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
        """Register serializers. Raises ValueError where another class has the same type name.

        The class of a serializer of the user's own is its attribute ``cls``; without one it is unknown until the
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
        """Register natsrt's own serializer of ``cls``, beside or, for the same content type, below a user's own.

        Raises ``CannotSerialize`` if there is none, and ValueError where another class has the same type name.
        """
        serializer = self._own_serializer(cls)
        self._claim(serializer.type_name, typing.get_origin(cls) or cls)
        key = (serializer.type_name, serializer.data_content_type)
        if isinstance(self._registered.get(key), _OwnSerializer | _ProtobufSerializer | None):
            self._registered[key] = serializer
        self._sending.clear()
        self._replies.clear()

    def refuse_clashes(self, classes: Iterable[Any]) -> None:
        """Raise the ValueError that registering all of ``classes`` would raise; registers nothing."""
        names = dict(self._classes)
        for cls in classes:
            if (serializer := self._own_or_none(cls)) is not None:
                self._claim(serializer.type_name, typing.get_origin(cls) or cls, names)

    def _claim(self, name: str, cls: type, names: dict[str, type] | None = None) -> None:
        known = (self._classes if names is None else names).setdefault(name, cls)
        if known is not cls:
            raise ValueError(
                f"two classes have the message type name {name!r}: {_qualified(known)} is registered, "
                f"and {_qualified(cls)} cannot be, since a receiver could not tell them apart"
            )

    def encode(self, message: Any) -> Encoded:
        """``message`` ready to be sent; raises ``CannotSerialize`` if it cannot travel exactly."""
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
        return serializer

    def decode(
        self,
        type_name: str,
        content_type: str,
        payload: bytes,
        hint: Callable[[], Iterable[type]] | None = None,
    ) -> Any:
        """The message in ``payload``, an ``UnknownPayload`` if nobody knows its type; raises ``CannotDecode``.

        ``hint``, asked only if the type is not registered, gives further classes the message may be of.
        """
        serializer = self.lookup(type_name, content_type)
        if serializer is None and hint is not None:
            serializer = self._among(hint(), type_name, content_type)
        if serializer is None:
            return UnknownPayload(type_name, content_type, payload)
        return self._read(serializer, payload)

    def _read(self, serializer: MessageSerializer[Any], payload: bytes) -> Any:
        if isinstance(serializer, (_OwnSerializer, _ProtobufSerializer)):  # a tuple: twice as fast as a union
            return serializer.deserialize(payload)
        message = _Guarded(serializer).deserialize(payload)
        self._classes.setdefault(serializer.type_name, type(message))
        return message

    def lookup(self, type_name: str, content_type: str = JSON) -> MessageSerializer[Any] | None:
        """The serializer that reads messages of this type name, None if there is none."""
        serializer = self._registered.get((type_name, content_type))
        if serializer is None and type_name not in self._classes and (cls := _builtin_class(type_name)) is not None:
            builtin = self._own_serializer(cls)
            serializer = builtin if builtin.data_content_type == content_type else None
        return serializer

    def is_known(self, type_name: str) -> bool:
        """Whether messages of this type name can be read, in some content type."""
        return type_name in _BUILTIN_NAMES or any(name == type_name for name, _ in self._registered)

    def content_type_of(self, type_name: str) -> str:
        """The content type of a body of which only the type name is known: JSON, if that can be read."""
        known = [content for name, content in self._registered if name == type_name]
        if type_name in _BUILTIN_NAMES:
            known.append(BYTES if type_name == "bytes" else JSON)
        return known[0] if known and JSON not in known else JSON

    def class_of(self, type_name: str) -> type | None:
        """The class of a type name; None if it is unknown, or known only by a serializer that has not been used."""
        known = self._classes.get(type_name)
        if known is None and type_name not in self._custom:
            known = _builtin_class(type_name)
        return known

    def _message_class(self, type_name: str) -> type | None:
        """The class a ``"$type"`` may name by being registered."""
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
        """The reply in ``payload``, an ``UnknownPayload`` if its type is unknown; raises ``CannotDecode``.

        Its class is registered, or ``wanted``, or one of ``produced()`` (the return types of handlers known here), or a
        message class of that name in the module of ``sent``, the class of the message it answers. Nothing is imported.
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
        """The message in a plain body that does not say its type; raises ``CannotDecode`` naming the candidates.

        It is the one candidate class that reads it and knows all its fields, at any depth. Dataclasses, models and
        protobuf messages (in their JSON form) go first, then plain types, then ``Any``, then ``bytes``. A body that is
        not JSON fits ``str`` and ``bytes`` only. Serializers of the user's own are not asked.
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
    """A serializer of the user's own, with the errors a user of natsrt sees."""

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
