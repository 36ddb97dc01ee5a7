"""Serializers of single classes: natsrt's own, protobuf's, and those that the user has registered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
from autogen_core import (
    JSON_DATA_CONTENT_TYPE,
    PROTOBUF_DATA_CONTENT_TYPE,
    MessageSerializer,
    try_get_known_serializers_for_type,
)
from google.protobuf import any_pb2  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from pydantic import BaseModel
from pydantic_core import PydanticSerializationError

from natsrt.errors import CannotDecode, CannotSerialize
from natsrt.wire.class_finder import ClassFinder, Scope
from natsrt.wire.codecs import Codec, Refused, Unreadable
from natsrt.wire.compiler import Codecs, two_classes
from natsrt.wire.exactness import Flaw, difference
from natsrt.wire.known_classes import in_this_process
from natsrt.wire.message_classes import (
    full_name,
    is_plain,
    is_protobuf,
    is_structured,
    type_name_of,
)
from natsrt.wire.model_fields import pydantic_refusal
from natsrt.wire.scalar_codecs import RawBytesCodec

JSON = JSON_DATA_CONTENT_TYPE
PROTOBUF = PROTOBUF_DATA_CONTENT_TYPE
BYTES = "application/octet-stream"
_TOO_DEEP = "it is nested too deeply, or contains itself"


class Encoded(NamedTuple):
    """A message ready to be sent."""

    type_name: str
    content_type: str
    payload: bytes
    class_name: str | None
    """The full name of its class; None for plain values and protobuf messages, whose type name says it all."""


def serializer_for(cls: type) -> MessageSerializer[Any]:
    """Return natsrt's serializer of a class; raises ``CannotSerialize`` if there is none."""
    return own_serializer(cls, Codecs())


class OwnSerializer:
    """A ``MessageSerializer`` based on a codec. It raises natsrt's public errors."""

    def __init__(self, cls: type, codec: Codec, finder: ClassFinder) -> None:
        self.cls = cls
        self.type_name: str = type_name_of(cls)
        self.class_name: str | None = None if is_plain(cls) else full_name(cls)
        self.data_content_type = BYTES if cls is bytes else JSON
        self.scope: Scope = Scope(cls if is_structured(cls) else None)
        self._codec = codec
        self._finder = finder

    def serialize(self, message: Any) -> bytes:
        self._finder.scope = self.scope
        try:
            return self._codec.dumps(message)
        except Refused as fault:
            raise CannotSerialize(self.type_name, str(fault)) from None
        except PydanticSerializationError as error:
            raise CannotSerialize(self.type_name, str(pydantic_refusal(error))) from None
        except RecursionError:
            raise CannotSerialize(self.type_name, _TOO_DEEP) from None
        except orjson.JSONEncodeError as error:
            reason = _TOO_DEEP if "Recursion" in str(error) else str(error)
            raise CannotSerialize(self.type_name, reason) from None
        except Exception as error:
            raise CannotSerialize(self.type_name, f"{type(error).__name__} was raised while writing it") from error

    def deserialize(self, payload: bytes, scope: Scope | None = None) -> Any:
        """Return the message. ``scope`` tells more about it than its class."""
        self._finder.scope = scope or self.scope
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


class ComparedSerializer(OwnSerializer):
    """Writes a class whose full name means another class: a former definition, or one of two with this name.

    A message is refused unless the other class reads it as it is.
    """

    def __init__(self, own: OwnSerializer, meant: OwnSerializer | ProtobufSerializer | None) -> None:
        super().__init__(own.cls, own._codec, own._finder)
        self._meant = meant

    def serialize(self, message: Any) -> bytes:
        payload = super().serialize(message)
        try:
            arrived = None if self._meant is None else self._meant.deserialize(payload)
            flaw = difference(message, arrived)
        except CannotDecode as error:
            flaw = Flaw("", error.reason)
        if flaw is not None:
            raise CannotSerialize(self.type_name, str(two_classes(self.cls, flaw)))
        return payload


class ProtobufSerializer:
    """AutoGen's protobuf serializer. It raises natsrt's public errors."""

    data_content_type = PROTOBUF
    class_name = None

    def __init__(self, cls: type[Message]) -> None:
        self.cls = cls
        self.type_name: str = type_name_of(cls)
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


def own_serializer(cls: type, codecs: Codecs) -> OwnSerializer | ProtobufSerializer:
    if is_protobuf(cls):
        in_this_process.add(type_name_of(cls), cls)
        return ProtobufSerializer(cls)
    if cls is bytes:
        return OwnSerializer(cls, RawBytesCodec(), codecs.finder)
    if not is_structured(cls) and not is_plain(cls):
        raise CannotSerialize(
            type_name_of(cls),
            "only dataclasses, Pydantic models, protobuf messages, Image and plain values can be sent",
        )
    try:
        return OwnSerializer(cls, codecs.of(cls), codecs.finder)
    except Refused as fault:
        raise CannotSerialize(type_name_of(cls), str(fault)) from None
    except RecursionError:
        raise CannotSerialize(type_name_of(cls), "its type is nested too deeply") from None


@dataclass
class _SampleDataclass:
    pass


class _SampleModel(BaseModel):
    pass


AUTOGEN_STANDARD = tuple(
    {
        type(serializer)
        for sample in (_SampleDataclass, _SampleModel, any_pb2.Any)
        for serializer in try_get_known_serializers_for_type(sample)
    }
)


class UsersSerializer:
    """A serializer registered by the user. It raises natsrt's public errors."""

    cls: type | None = None
    """Its class; None if that is not known yet."""
    class_name: str | None = None
    """The full name of its class."""

    def __init__(self, serializer: MessageSerializer[Any]) -> None:
        self.type_name: str = serializer.type_name
        self.data_content_type: str = serializer.data_content_type
        self._serializer = serializer

    def is_of(self, cls: Any) -> bool:
        return self.class_name is not None and self.class_name == full_name(cls)

    def gives_way_to(self, other: UsersSerializer) -> bool:
        """True if ``other`` is for the same messages."""
        same_form = (self.type_name, self.data_content_type) == (other.type_name, other.data_content_type)
        return same_form and (None in (self.cls, other.cls) or self.class_name == other.class_name)

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


Serializer = OwnSerializer | ProtobufSerializer | UsersSerializer
