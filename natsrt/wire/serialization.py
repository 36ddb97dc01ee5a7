"""Converts messages to (type name, content type, payload) and back.

``Serialization`` belongs to one runtime and is not safe to use from several threads. The format of JSON payloads is
described in ``natsrt.wire.compiler``. This module selects the serializer of a message.

Dataclasses, Pydantic models, AutoGen's ``Image`` and plain ``str``, ``int``, ``float``, ``bool``, ``list``, ``dict``
and None are sent as ``application/json``. ``bytes`` are sent unchanged. Protobuf messages are sent in a packed
``google.protobuf.Any``, with the same bytes as AutoGen sends. A serializer registered by the user takes precedence over
natsrt's, and receives exactly the bytes that it wrote. AutoGen's standard serializers, which lose nested types, are
replaced by natsrt's.

A message names its class twice: by its plain name, and by its full name, which participants in other languages need not
send. `Serialization.decode` and `Serialization.reply` say how both find the class.

An empty plain body means None if a handler accepts None. Otherwise it is not JSON, so it is the empty ``str`` or
``bytes``.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import orjson
from autogen_core import (
    MessageSerializer,
    UnknownPayload,
)
from google.protobuf import json_format  # type: ignore[import-untyped]

from natsrt.errors import CannotDecode, CannotSerialize
from natsrt.wire.class_finder import ClassFinder, Scope
from natsrt.wire.compiler import Codecs
from natsrt.wire.envelope import media_type
from natsrt.wire.exception_parts import cut
from natsrt.wire.known_classes import NO_CLASSES, NamedClasses, in_this_process
from natsrt.wire.message_classes import (
    BUILTIN_NAMES,
    PLAIN,
    builtin_class,
    full_name,
    is_message_class,
    is_plain,
    is_protobuf,
    present_definition,
    type_name_of,
)
from natsrt.wire.nearest import misspelt_fields, nearest_class
from natsrt.wire.serializers import (
    AUTOGEN_STANDARD,
    BYTES,
    JSON,
    PROTOBUF,
    ComparedSerializer,
    Encoded,
    OwnSerializer,
    ProtobufSerializer,
    Serializer,
    UsersSerializer,
    own_serializer,
    serializer_for,
)

__all__ = ["BYTES", "JSON", "NAME_THE_TYPE", "PROTOBUF", "Encoded", "Serialization", "serializer_for", "type_name_of"]


_REMEMBERED = 4096
"""Maximum numbers of cached serializers of messages and of replies, since the names in the keys come from the wire."""

_EXPLAINED = 3
"""Message types of which an error says why a plain body does not fit them, if none is nearest."""
_REASON = 160
"""Characters of each such reason."""


class Serialization:
    """The serializers of one runtime.

    Any dataclass, Pydantic model, protobuf message, ``Image`` or plain value can be sent. To be received, a class must
    be registered. Plain values and AutoGen's messages (``Image``, and the call and result of a tool agent) can always
    be received, unless a registered class has the same name.
    """

    def __init__(self) -> None:
        self._finder = ClassFinder()
        self._codecs = Codecs(self._finder)
        self._redefined = 0
        self._version = 0
        self._custom: list[UsersSerializer] = []
        self._added: set[str] = set()
        """The full names of the classes that natsrt's own serializers may read."""
        self._own: dict[type, OwnSerializer | ProtobufSerializer] = {}
        self._strict: dict[Any, OwnSerializer | ProtobufSerializer] = {}
        self._sending: dict[type, Serializer] = {}
        self._reading: dict[tuple[NamedClasses, str, str, str | None], Serializer] = {}
        self._replies: dict[tuple[str, str, str | None, type | None, type | None], tuple[Serializer, Scope]] = {}
        in_this_process.tell(self)

    # -- registering ---------------------------------------------------------------------------------------------

    def add(self, serializer: MessageSerializer[Any] | Sequence[MessageSerializer[Any]]) -> None:
        """Register serializers.

        The class of a user's serializer is its attribute ``cls``. Without this attribute the class is unknown until the
        first message. Several classes may have one type name. A serializer of a class takes the place of the former one
        for the same content type.
        """
        if isinstance(serializer, Sequence):
            for one in serializer:
                self.add(one)
            return
        cls = getattr(serializer, "cls", None)
        if isinstance(serializer, (*AUTOGEN_STANDARD, OwnSerializer, ProtobufSerializer)) and cls is not None:
            self.add_class(cls)
            return
        custom = UsersSerializer(serializer)
        if isinstance(cls, type):
            self._learn(custom, cls)
        self._custom = [one for one in self._custom if not one.gives_way_to(custom)] + [custom]
        self._clear()

    def add_class(self, cls: type) -> None:
        """Register natsrt's serializer of ``cls``. A user's serializer for the same content type is not replaced.

        A former definition of the class (with the same module and qualified name) is replaced. Raises
        ``CannotSerialize`` if there is no serializer.
        """
        self._finder.register(self._own_serializer(cls).type_name, cls)
        self._added.add(full_name(cls))
        self._clear()

    def add_produced(self, cls: type) -> None:
        """Remember a class that a handler known here returns, so that replies and the values in them are found."""
        if is_message_class(cls):
            self._finder.produce(type_name_of(cls), cls)

    def _learn(self, custom: UsersSerializer, cls: type) -> None:
        custom.cls, custom.class_name = cls, full_name(cls)
        self._finder.register(custom.type_name, cls)
        in_this_process.add(custom.type_name, cls)

    def _clear(self) -> None:
        """Forget what follows from the classes that are known."""
        self._sending.clear()
        self._reading.clear()
        self._replies.clear()

    def forget_senders(self) -> None:
        """Decide again how the classes are sent, since the full name of one means another class now."""
        self._sending.clear()

    def _own_serializer(self, cls: type) -> OwnSerializer | ProtobufSerializer:
        serializer = self._own.get(cls)
        if serializer is None:
            serializer = own_serializer(cls, self._codecs)
            if self._redefined != self._codecs.redefined:
                # Whatever was compiled for the former definition would keep it alive.
                self._redefined = self._codecs.redefined
                self._codecs.forget()
                self._own.clear()
                self._strict.clear()
                self._clear()
            self._own[cls] = serializer
        return serializer

    def _own_or_none(self, cls: type) -> OwnSerializer | ProtobufSerializer | None:
        try:
            return self._own_serializer(cls)
        except CannotSerialize:
            return None

    def _refresh(self) -> None:
        """Forget what follows from the classes that this process knows."""
        self._version = in_this_process.version
        self._reading.clear()
        self._replies.clear()

    # -- sending -------------------------------------------------------------------------------------------------

    def encode(self, message: Any) -> Encoded:
        """Return ``message`` ready to be sent; raises ``CannotSerialize`` if it cannot be written exactly.

        One that is `Encoded` is returned as it is.
        """
        serializer = self._sending.get(type(message))
        if serializer is None:
            if isinstance(message, Encoded):
                return message
            serializer = self._sender(type(message))
        return Encoded(
            serializer.type_name, serializer.data_content_type, serializer.serialize(message), serializer.class_name
        )

    def _sender(self, cls: type) -> Serializer:
        name = type_name_of(cls)
        custom = next((one for one in reversed(self._custom) if one.cls is not None and one.is_of(cls)), None)
        if custom is None:
            custom = next((one for one in reversed(self._custom) if one.cls is None and one.type_name == name), None)
        if custom is None:
            serializer: Serializer = self._own_serializer(cls)
            meant = _meant(cls, name)
            if meant is not cls and isinstance(serializer, OwnSerializer):
                serializer = ComparedSerializer(serializer, self._own_or_none(meant))
        else:
            serializer = custom
            self._learn(custom, cls)
        if not serializer.type_name:  # receivers would find the type out by themselves
            raise CannotSerialize(full_name(cls), "its serializer has no name for the type")
        self._sending[cls] = serializer
        return serializer

    # -- receiving -----------------------------------------------------------------------------------------------

    def decode(
        self,
        type_name: str,
        content_type: str,
        payload: bytes,
        class_name: str | None = None,
        handled: NamedClasses = NO_CLASSES,
    ) -> Any:
        """Return the message in ``payload``, or an ``UnknownPayload`` if no serializer is registered for its class.

        ``handled`` are the classes that its agent handles. The class is, among these and the registered ones, the one
        with the full name ``class_name``. If this is None, or the name of a class that this process does not know, it
        is the one that the agent handles under ``type_name``, or else the one registered under it; of several, the one
        that can read the payload and knows all its fields. ``type_name`` may also be a full name. Raises
        ``CannotDecode``.
        """
        if self._version != in_this_process.version:
            self._refresh()
        key = handled, type_name, content_type, class_name
        serializer = self._reading.get(key)
        if serializer is None:
            serializer = self._reader(payload, *key)
            if serializer is None:
                self._check_content_type(payload, *key)
                return UnknownPayload(type_name, content_type, payload)
        return self._read(serializer, payload)

    def _check_content_type(
        self, payload: bytes, handled: NamedClasses, type_name: str, content_type: str, class_name: str | None
    ) -> None:
        """Raise ``CannotDecode`` if the message could be read in another content type than it has."""
        for other in dict.fromkeys((JSON, PROTOBUF, BYTES, *(one.data_content_type for one in self._custom))):
            if self._reader(payload, handled, type_name, other, class_name) is not None:
                raise _wrong_content_type(type_name, content_type, other, payload)

    def _reader(
        self, payload: bytes, handled: NamedClasses, type_name: str, content_type: str, class_name: str | None
    ) -> Serializer | None:
        readers = self._serializers(type_name, content_type, self._registered(type_name))
        own = self._serializers(type_name, content_type, handled.named(type_name))
        readers.update(own)  # where the agent handles a former definition, that is the one
        if not readers and (cls := self._of_full_name(type_name, handled)) is not None:
            return self._reader(payload, handled, type_name_of(cls), content_type, full_name(cls))
        serializer = readers.get(class_name) or readers.get(None)
        if serializer is None:
            if class_name is not None and in_this_process.find(type_name, class_name) is not None:
                return None  # another class than those
            serializer = self._only(own or readers, payload, "its attribute messageclass, or in the header Natsrt-Type")
            if serializer is None or len(own or readers) > 1:
                return serializer
        _remember(self._reading, (handled, type_name, content_type, class_name), serializer)
        return serializer

    def _registered(self, type_name: str) -> list[Any]:
        """The classes under this type name that can be received: the registered ones, or AutoGen's of this name."""
        classes = self._finder.registered.named(type_name)
        if not classes and (cls := builtin_class(type_name)) is not None:
            classes.append(cls)
        return classes

    def _of_full_name(self, class_name: str, handled: NamedClasses) -> Any:
        """The class with this full name that is handled or registered here; None if there is none."""
        return next((cls for cls in (*handled, *self._finder.registered) if full_name(cls) == class_name), None)

    def _serializers(self, type_name: str, content_type: str, classes: Iterable[Any]) -> dict[str | None, Serializer]:
        """The serializers that read messages of this type name and content type as one of ``classes``, by full name.

        If the user has a serializer whose class is not known yet, it is the only one, under None.
        """
        wanted = media_type(content_type)
        named = (one for one in self._custom if one.type_name == type_name)
        customs = [one for one in named if media_type(one.data_content_type) == wanted]
        found: dict[str | None, Serializer] = {}
        for cls in classes:
            custom = next((one for one in customs if one.is_of(cls)), None)
            serializer = custom or (self._own_or_none(cls) if self._may_be_own(cls) else None)
            if serializer is not None and media_type(serializer.data_content_type) == wanted:
                found[full_name(cls)] = serializer
        unused = next((one for one in customs if one.cls is None), None)
        return found if unused is None else {None: unused}

    def _may_be_own(self, cls: Any) -> bool:
        """False if only serializers of the user may read the class."""
        return full_name(cls) in self._added or not any(one.is_of(cls) for one in self._custom)

    def _only(self, readers: Mapping[str | None, Serializer], payload: bytes, remedy: str) -> Serializer | None:
        """The one of several serializers that can read a payload and knows all its fields; None if there are none.

        Raises ``CannotDecode`` if the payload does not decide. ``remedy`` is where its sender can name the class.
        """
        if len(readers) < 2:
            return next(iter(readers.values()), None)
        fitting = [one for one in readers.values() if self._fits(one, payload)]
        if len(fitting) == 1:
            return fitting[0]
        names = " and ".join(sorted(str(name) for name in readers))
        problem = f"fits {'several' if fitting else 'none'} of the classes with this name here, {names}"
        type_name = next(iter(readers.values())).type_name
        raise CannotDecode(
            f"a message of type {type_name}", f"it {problem}; its sender must give the full name in {remedy}", payload
        )

    def _fits(self, serializer: Serializer, payload: bytes) -> bool:
        try:
            if isinstance(serializer, UsersSerializer):
                serializer.deserialize(payload)
            else:
                self.read_as(payload, serializer.cls)
        except (CannotDecode, CannotSerialize, json_format.ParseError):
            return False
        return True

    def decode_unregistered(self, payload: UnknownPayload, class_name: str | None = None) -> Any:
        """Return the message in ``payload`` if this process knows its class without a serializer; else ``payload``.

        Its class is the one with the full name ``class_name``. If this is None, or not known here, it is the only one
        with this type name that runtimes of this process have sent or registered, or one that a handler known here
        returns. Raises ``CannotDecode``.
        """
        type_name = payload.type_name
        known = in_this_process.named(type_name)
        produced = self._finder.produced.named(type_name)
        exact = [cls for cls in (*known, *produced) if full_name(cls) == class_name]
        for classes in (exact[:1], known, produced):
            readers = self._serializers(type_name, payload.data_content_type, classes)
            if len(readers) == 1:
                return self._read(next(iter(readers.values())), payload.payload)
        return payload

    def _read(self, serializer: Serializer, payload: bytes, scope: Scope | None = None) -> Any:
        if isinstance(serializer, OwnSerializer):
            return serializer.deserialize(payload, scope)
        message = serializer.deserialize(payload)
        if isinstance(serializer, UsersSerializer) and serializer.cls is None:
            self._learn(serializer, type(message))
            self._clear()
        return message

    def is_known(self, type_name: str, class_name: str | None = None, handled: NamedClasses = NO_CLASSES) -> bool:
        """True if messages of this class can be read in at least one content type.

        That is so if the class with the full name ``class_name`` is registered, or if the agent whose classes are
        ``handled`` handles one of this type name. If ``class_name`` is None, any registered class of this type name
        counts. ``type_name`` may also be a full name.
        """
        if type_name in BUILTIN_NAMES or any(one.type_name == type_name and one.cls is None for one in self._custom):
            return True
        for classes, wanted in ((handled, None), (self._finder.registered, class_name)):
            named = classes.named(type_name)
            if any(self._is_readable(cls) and wanted in (None, full_name(cls)) for cls in named):
                return True
        cls = self._of_full_name(type_name, handled)
        return cls is not None and self._is_readable(cls)

    def _is_readable(self, cls: Any) -> bool:
        return any(one.is_of(cls) for one in self._custom) or self._own_or_none(cls) is not None

    def content_type_of(self, type_name: str) -> str:
        """Return the content type to assume for a body of which only the type name is known.

        This is JSON if JSON can be read or the type is unknown, else the first registered content type. ``type_name``
        may also be a full name.
        """
        classes = self._registered(type_name)
        if not classes and (cls := self._of_full_name(type_name, NO_CLASSES)) is not None:
            classes, type_name = [cls], type_name_of(cls)
        known = [one.data_content_type for one in self._custom if one.type_name == type_name]
        own = (self._own_or_none(cls) for cls in classes if self._may_be_own(cls))
        known += [one.data_content_type for one in own if one is not None]
        return known[0] if known and JSON not in known else JSON

    def class_of(self, type_name: str) -> type | None:
        """Return the class of a type name, the last one registered; None if it is unknown.

        It is also None if a serializer without ``cls`` is registered for the name and has not been used yet.
        """
        if any(one.type_name == type_name and one.cls is None for one in self._custom):
            return None
        classes = self._registered(type_name)
        return classes[-1] if classes else None

    def reply(
        self,
        type_name: str,
        content_type: str,
        payload: bytes,
        class_name: str | None,
        sent: type | None,
        wanted: type | None = None,
    ) -> Any:
        """Return the reply in ``payload``, or an ``UnknownPayload`` if its class is unknown; raises ``CannotDecode``.

        ``class_name`` is the full name of its class, None if the reply does not say it. ``sent`` is the class of the
        message that it answers, and ``wanted`` the class that the caller has asked for. `natsrt.wire.class_finder` says
        where the class is sought. Of several that one step knows, it is the one that can read the payload and knows all
        its fields.
        """
        if self._version != in_this_process.version:
            self._refresh()
        key = (type_name, content_type, class_name, sent, wanted)
        found = self._replies.get(key)
        if found is None:
            found = self._reply_reader(payload, *key)
            if found is None:
                return UnknownPayload(type_name, content_type, payload)
        return self._read(found[0], payload, found[1])

    def check_reply_type(
        self,
        type_name: str,
        content_type: str,
        payload: bytes,
        class_name: str | None,
        sent: type | None,
        wanted: type | None = None,
    ) -> None:
        """Raise ``CannotDecode`` if a reply that `reply` cannot read could be read in another content type."""
        for other in (JSON, PROTOBUF, BYTES):
            if self._reply_reader(payload, type_name, other, class_name, sent, wanted) is not None:
                raise _wrong_content_type(type_name, content_type, other, payload)

    def _reply_reader(
        self,
        payload: bytes,
        type_name: str,
        content_type: str,
        class_name: str | None,
        sent: type | None,
        wanted: type | None,
    ) -> tuple[Serializer, Scope] | None:
        if wanted is not None and is_plain(wanted):
            self._own_or_none(wanted)  # what it contains is known then
        steps = [
            self._serializers(type_name, content_type, [cls for cls in classes if cls in PLAIN or not is_plain(cls)])
            for classes in self._finder.steps(type_name, Scope(sent=sent, wanted=wanted))
        ]
        readers = next((found for found in steps if class_name in found), None)
        if readers is not None:
            serializer: Serializer | None = readers[class_name]
        else:
            readers = next((found for found in steps if found), {})
            serializer = self._only(readers, payload, "the attribute messageclass")
        if serializer is None:
            return None
        own = serializer.scope.own if isinstance(serializer, OwnSerializer) else None
        found = serializer, Scope(own, sent, wanted)
        if own not in (None, sent, wanted) and sent is not None and full_name(own) == full_name(sent):
            # Two classes of one full name: the sender of the message has the one of them that it used.
            mine = self._own_or_none(sent)
            fits = isinstance(mine, OwnSerializer) and self._fits(mine, payload)
            return (mine, Scope(sent, sent, wanted)) if mine is not None and fits else found
        if len(readers) == 1 or class_name in readers:
            _remember(self._replies, (type_name, content_type, class_name, sent, wanted), found)
        return found

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
        except orjson.JSONDecodeError as error:
            return self._infer_text(payload, candidates, error)
        for tier in (is_message_class, _is_plain_json, lambda cls: cls is float):
            fitting = self._fitting(payload, [cls for cls in candidates if tier(cls)])
            if len(fitting) > 1:
                raise _undecided("fits several message types", [cls for cls, _ in fitting], payload)
            if fitting:
                return fitting[0][1]
        if Any in candidates or object in candidates:
            return tree
        if bytes in candidates:
            return bytes(payload)
        near = self._nearest(tree, payload, candidates)
        raise _undecided("fits none of the message types handled here", candidates, payload, near)

    def _nearest(self, tree: Any, payload: bytes, candidates: Sequence[Any]) -> str:
        """Why the body does not fit the one class whose fields are most like its own, or else each of a few classes.

        It names fields and no values.
        """
        classes = [cls for cls in candidates if is_message_class(cls)]
        cls = classes[0] if len(classes) == 1 else nearest_class(tree, classes)
        if cls is not None:
            reason = self._misfit(tree, payload, cls)
            return f"; the nearest is {type_name_of(cls)}" + (f": {_shortened(reason)}" if reason else "")
        misfits = [(type_name_of(cls), self._misfit(tree, payload, cls)) for cls in classes[:_EXPLAINED]]
        return "".join(f"; not {name}: {_shortened(reason)}" for name, reason in misfits if reason)

    def _misfit(self, tree: Any, payload: bytes, cls: Any) -> str:
        """Why the body does not fit the class; empty if that is not known."""
        if not isinstance(tree, dict):
            return "expected an object"
        if reason := misspelt_fields(tree, cls):
            return reason
        try:
            self.read_as(payload, cls)
        except (CannotDecode, CannotSerialize) as error:
            return error.reason
        except json_format.ParseError:  # its text quotes the body
            pass
        return ""

    def _infer_text(self, payload: bytes, candidates: Sequence[Any], error: orjson.JSONDecodeError) -> Any:
        if str in candidates:
            try:
                return payload.decode()
            except UnicodeDecodeError:
                pass
        if bytes in candidates:
            return bytes(payload)
        if not payload.strip():
            raise CannotDecode("a plain body", f"it is empty, which fits none of {_listed(candidates)}", payload)
        if payload.lstrip().startswith((b"{", b"[", b'"')):
            reason = f"it begins like JSON, but is not: {error.msg} at character {error.pos + 1}"
            raise CannotDecode("a plain body", reason, payload)
        raise _undecided("is not JSON and fits none of the message types handled here", candidates, payload)

    def _fitting(self, payload: bytes, classes: Sequence[Any]) -> list[tuple[Any, Any]]:
        fitting = []
        for cls in classes:
            try:
                fitting.append((cls, self.read_as(payload, cls)))
            except (CannotDecode, CannotSerialize, json_format.ParseError):
                continue
        return fitting

    def read_as(self, payload: bytes, cls: Any) -> Any:
        """Return JSON as a message of the class ``cls``, which knows all its fields.

        Raises `CannotDecode`, `CannotSerialize` for a class that cannot be sent, and protobuf's ``ParseError``.
        """
        if is_protobuf(cls):
            return json_format.Parse(payload, cls())
        serializer = self._strict.get(cls)
        if serializer is None:
            serializer = self._strict[cls] = own_serializer(cls, self._codecs.strictly)
        return serializer.deserialize(payload)


def _meant(cls: Any, type_name: str) -> Any:
    """The class that the full name of ``cls`` means in this process: its last definition."""
    return present_definition(cls) or in_this_process.find(type_name, full_name(cls)) or cls


def _wrong_content_type(type_name: str, content_type: str, readable: str, payload: bytes) -> CannotDecode:
    what = f"its content type is {cut(content_type, 100)!r}, and it can be read only as {readable!r}"
    return CannotDecode(f"a message of type {type_name}", what, payload)


def _shortened(reason: str) -> str:
    return reason if len(reason) <= _REASON else reason[: _REASON - 1] + "…"


def _is_plain_json(cls: Any) -> bool:
    return is_plain(cls) and (typing.get_origin(cls) or cls) not in (bytes, float)


NAME_THE_TYPE = "set the header Natsrt-Type"
"""What errors advise if the type of a plain body cannot be found out."""


def _undecided(problem: str, classes: Iterable[Any], payload: bytes, near: str = "") -> CannotDecode:
    return CannotDecode("a plain body", f"it {problem} ({_listed(classes)}){near}; {NAME_THE_TYPE}", payload)


def _listed(classes: Iterable[Any]) -> str:
    """The names of message classes, as text; full names where several have the same one."""
    classes = list(classes)
    plain = [type_name_of(cls) for cls in classes]
    names = [name if plain.count(name) == 1 else full_name(cls) for name, cls in zip(plain, classes, strict=True)]
    return ", ".join(sorted(names)) or "none"


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def _remember(known: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    if len(known) >= _REMEMBERED:
        known.clear()
    known[key] = value
