"""Converts Python values to JSON trees and back. A value that cannot be converted exactly is refused.

The rules
---------
A *tree* is what ``json.loads`` returns: None, bool, int, float, str, list, dict. A codec is compiled once per type
annotation. ``encode`` converts a value to a tree, and ``decode`` converts a tree to a value. A value that would not be
read back equal and of the same type is refused before it is sent.

* **Declared types need no marks.** A field declared ``list[Item]`` is a plain JSON array of plain JSON objects.
* **One key is reserved**: ``"$type"`` names the class of a value where the declaration does not determine it. There are
  three cases: the value's class is a subclass of the declared one; the declared type is a union with more than one
  member of that JSON kind; or it is ``Any``, ``object``, an abstract class or a Protocol. The key comes first in the
  object. Dataclasses, Pydantic models and ``autogen_core.Image`` carry it next to their fields,
  ``{"$type": "Circle", "r": 1.0}``. A value that is not written as an object with fields (a Pydantic root model, or
  ``datetime`` in ``datetime | str``) is wrapped: ``{"$type": "datetime", "value": ...}``. In a union the JSON types
  themselves (``str``, ``int``, ``float``, ``bool``, ``list``, ``dict``) stay unmarked, and the other members of that
  JSON kind are marked.
* **A name is looked up** among the declared class and its subclasses, the union's members, and the registered classes
  that fit the declared type. Nothing is imported. Any other name is unreadable, except where ``Any`` is declared: there
  an object with an unknown ``"$type"`` is read as a dict, unchanged.
* **A user's dict with a key** ``"$type"`` is wrapped as ``{"$type": "dict", "value": {...}}`` wherever a class would
  also be possible, as in ``Any``. Where a dict is declared (``dict[str, int]``, a message of type ``dict``) it is
  written unchanged. A class with a field named ``"$type"`` cannot be sent.
* ``Any`` accepts only JSON values, dataclasses, Pydantic models and images. A tuple, for example, would be read back as
  a list.
* Scalars are written as follows: bytes in base64; ``datetime``, ``date`` and ``time`` in ISO 8601; ``Decimal`` and
  ``UUID`` as text; enums by value if all their values are str or all are int, else by member name. Dict keys declared
  with these types are written as the same text. A time zone is written as its offset, and ``fold`` is not written. The
  scalars in a Pydantic model are written by Pydantic.
* Unknown fields are ignored, so that a newer sender may add some, unless the codecs are ``strict``.

The texts of errors name fields and types, never values.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import math
import types
import typing
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from autogen_core import Image
from pydantic import BaseModel
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from natsrt.wire.class_codec import ClassCodec, ImageCodec
from natsrt.wire.codecs import (
    ALL_KINDS,
    NULL,
    TYPE_KEY,
    VALUE_KEY,
    ArrayCodec,
    Codec,
    CodecCompiler,
    DictCodec,
    EnumCodec,
    ExactCodec,
    FloatCodec,
    LiteralCodec,
    OptionalCodec,
    PydanticCodec,
    Refused,
    TupleCodec,
    Unreadable,
    misfit,
    text_codecs,
    value_of_type,
    wrong_type,
)
from natsrt.wire.dataclass_codec import DataclassCodec
from natsrt.wire.model_codec import ModelCodec

__all__ = ["AnyCodec", "Codecs"]


class AnyCodec(Codec):
    """``Any`` and ``object``: JSON values are written unchanged, other values with the name of their class."""

    name = "Any"
    kinds = ALL_KINDS
    polymorphic = True

    def __init__(self, codecs: Codecs) -> None:
        self._codecs = codecs

    def encode(self, value: Any) -> Any:
        cls = type(value)
        if cls is str or cls is int or cls is bool or value is None:
            return value
        if cls is float:
            if not math.isfinite(value):
                raise Refused("JSON has no NaN and no infinity")
            return value
        try:
            if cls is list:
                return [self.encode(item) for item in value]
            if cls is dict:
                return self._encode_dict(value)
        except Refused as fault:
            raise fault.under("[]") from None
        return self._codecs.encode_marked(value, None)

    def _encode_dict(self, value: dict[Any, Any]) -> dict[str, Any]:
        if not all(type(key) is str for key in value):
            raise Refused("JSON keys are strings, and the declared type specifies no other key type")
        tree = {key: self.encode(item) for key, item in value.items()}
        return {TYPE_KEY: "dict", VALUE_KEY: tree} if TYPE_KEY in tree else tree

    def decode(self, tree: Any) -> Any:
        if type(tree) is list:
            return [self.decode(item) for item in tree]
        if type(tree) is not dict:
            return tree
        if TYPE_KEY in tree:
            name = tree[TYPE_KEY]
            if name == "dict" and len(tree) == 2 and type(tree.get(VALUE_KEY)) is dict:
                tree = tree[VALUE_KEY]
            elif type(name) is str and (cls := self._codecs.lookup(name)) is not None:
                return self._codecs.of(cls).decode_marked(tree)
        return {key: self.decode(item) for key, item in tree.items()}


class AbstractCodec(Codec):
    """A declared class that is not a message class (abstract, a Protocol, a mix-in). Every value is marked."""

    kinds: frozenset[type] = frozenset({dict})
    polymorphic = True

    base: type

    def __init__(self, base: type, codecs: Codecs) -> None:
        self.base = base
        self.name: str = base.__name__
        self._codecs = codecs

    def encode(self, value: Any) -> Any:
        return self._codecs.encode_marked(value, self.base)

    def decode(self, tree: Any) -> Any:
        if type(tree) is not dict or TYPE_KEY not in tree:
            raise Unreadable(f'{self.name} is abstract, so "{TYPE_KEY}" must name the class of the value')
        return self._codecs.decode_marked(tree, self.base)


class UnionCodec(Codec):
    """A union. A member stays unmarked if it is natural, or if no other member has the same JSON kind."""

    def __init__(self, members: Sequence[Codec], codecs: Codecs) -> None:
        self.name: str = "|".join(member.name for member in members)
        self.kinds: frozenset[type] = frozenset().union(*(member.kinds for member in members))
        self.polymorphic: bool = any(member.polymorphic for member in members)
        self._codecs = codecs
        self._members = members
        classes = [member.cls for member in members]
        self._by_class = {member.cls: member for member in members if classes.count(member.cls) == 1}
        self._by_name = {member.name: member for member in members}
        if len(self._by_name) != len(members):
            raise Refused(f"two members of the union {self.name} have the same name")
        self._unmarked: set[str] = set()
        self._by_kind: dict[type, list[Codec]] = {}
        for kind in ALL_KINDS:
            writers = [member for member in members if kind in member.kinds]
            self._by_kind[kind] = sorted(writers, key=lambda member: not member.natural)
        if not self._by_kind[int]:
            self._by_kind[int] = [member for member in members if member.cls is float]
        for member in members:
            if all(self._by_kind[kind][0] is member and self._is_clear(kind) for kind in member.kinds):
                self._unmarked.add(member.name)

    def _is_clear(self, kind: type) -> bool:
        writers = self._by_kind[kind]
        return len(writers) == 1 or writers[0].natural

    def encode(self, value: Any) -> Any:
        member = self._by_class.get(type(value))
        if member is not None:
            return self._marked(member, member.encode(value))
        for member in self._members:
            if member.base is not None and not _fits(type(value), member.base):
                continue
            try:
                tree = member.encode(value)
            except Refused:
                continue
            return self._marked(member, tree)
        raise wrong_type(self.name, value)

    def _marked(self, member: Codec, tree: Any) -> Any:
        has_mark = type(tree) is dict and TYPE_KEY in tree
        if has_mark and not member.natural:
            return tree
        return tree if member.name in self._unmarked and not has_mark else member.mark(tree)

    def decode(self, tree: Any) -> Any:
        if type(tree) is dict and TYPE_KEY in tree:
            return self._decode_marked(tree)
        candidates = self._by_kind[type(tree)]
        if candidates and candidates[0].natural or len(candidates) == 1:
            try:
                return candidates[0].decode(tree)
            except Unreadable:
                if len(candidates) == 1:
                    raise
                candidates = candidates[1:]
        values = []
        for member in candidates:
            try:
                values.append(member.decode(tree))
            except Unreadable:
                continue
        if len(values) > 1:
            raise Unreadable(f'fits several members of {self.name}; "{TYPE_KEY}" must name one')
        if not values:
            raise misfit(self.name, tree)
        return values[0]

    def _decode_marked(self, tree: dict[str, Any]) -> Any:
        name = tree[TYPE_KEY]
        if type(name) is str:
            if name in self._by_name:
                return self._by_name[name].decode_marked(tree)
            for member in self._members:
                if member.base is not None and (cls := self._codecs.find(name, member.base)) is not None:
                    return self._codecs.of(cls).decode_marked(tree)
        raise Unreadable(f'"{TYPE_KEY}" does not name a class that fits {self.name}')


_ABSTRACT: dict[Any, tuple[type, ...]] = {
    collections.abc.Sequence: (list, tuple),
    collections.abc.MutableSequence: (list,),
    collections.abc.Iterable: (list, tuple, set, frozenset),
    collections.abc.Collection: (list, tuple, set, frozenset),
    collections.abc.Set: (set, frozenset),
    collections.abc.MutableSet: (set,),
}
"""The concrete classes that a value declared with an abstract collection may have."""


class Codecs(CodecCompiler):
    """The codecs of one registry of classes. Each is compiled when it is first used.

    ``lookup`` returns the registered class of a type name, None if there is none. With ``strict``, a tree with an
    unknown field, at any depth, is unreadable.
    """

    def __init__(self, lookup: Callable[[str], type | None] = lambda name: None, *, strict: bool = False) -> None:
        self.lookup = lookup
        self.strict = strict
        self._compiled: dict[Any, Codec] = {float: FloatCodec()}
        self._compiled.update({cls: ExactCodec(cls) for cls in (str, int, bool, NULL)})
        self._compiled.update({codec.cls: codec for codec in text_codecs()})
        self.any: Codec = AnyCodec(self)
        self._compiled[Any] = self._compiled[object] = self.any
        self._families: dict[type, _Family] = {}

    def of(self, hint: Any) -> Codec:
        """Return the codec of a type annotation; raises ``Refused`` if its values cannot be sent."""
        try:
            codec = self._compiled.get(hint) or self._compiled.get(hint := _bare(hint))
        except TypeError:
            return self._compile(_bare(hint))
        if codec is None:
            codec = self._compile(hint)
            self._compiled.setdefault(hint, codec)
        return codec

    def keep(self, hint: Any, codec: Codec) -> int:
        """Store ``codec`` before it is complete, so that a recursive type finds it.

        Returns the number of codecs that were stored before.
        """
        known = len(self._compiled)
        self._compiled[hint] = codec
        return known

    def forget_since(self, known: int) -> None:
        """Remove all but the first ``known`` codecs.

        Used when a class could not be compiled, since the codecs stored after it may refer to it.
        """
        while len(self._compiled) > known:
            self._compiled.popitem()

    def _compile(self, hint: Any) -> Codec:
        origin = typing.get_origin(hint)
        args = typing.get_args(hint)
        if origin is typing.Union or origin is types.UnionType:
            return self._union([self.of(arg) for arg in args])
        if origin is typing.Literal:
            return LiteralCodec(args, self.of)
        if isinstance(hint, typing.TypeVar):
            return self._type_variable(hint)
        cls = origin or hint
        if cls is tuple:
            return self._tuple(args)
        if cls in (list, set, frozenset):
            return ArrayCodec(cls, self.of(args[0]) if args else self.any)
        if cls in (dict, collections.abc.Mapping, collections.abc.MutableMapping):
            key, value = args or (str, Any)
            return DictCodec(self.of(key), self.of(value))
        if cls in _ABSTRACT:
            item = self.of(args[0]) if args else self.any
            return self._union([ArrayCodec(concrete, item) for concrete in _ABSTRACT[cls]])
        if isinstance(cls, type):
            return self._class(hint, cls, args)
        return self._other(hint)

    def _class(self, hint: Any, cls: type, args: tuple[Any, ...]) -> Codec:
        if issubclass(cls, enum.Enum):
            return EnumCodec(cls)
        if cls is BaseModel:
            return AbstractCodec(cls, self)
        return _class_codec(hint, cls, args, self) or self._other(hint)

    def _other(self, hint: Any) -> Codec:
        try:
            return PydanticCodec(hint)
        except (PydanticSchemaGenerationError, PydanticUserError):
            if isinstance(hint, type):
                return AbstractCodec(hint, self)
            raise Refused(f"values of type {hint} cannot be sent") from None

    def _type_variable(self, variable: typing.TypeVar) -> Codec:
        if variable.__constraints__:
            return self._union([self.of(hint) for hint in variable.__constraints__])
        return self.of(Any if variable.__bound__ is None else variable.__bound__)

    def _tuple(self, args: tuple[Any, ...]) -> Codec:
        if not args or (len(args) == 2 and args[1] is Ellipsis):
            return ArrayCodec(tuple, self.of(args[0]) if args else self.any)
        return TupleCodec([self.of(arg) for arg in args if arg != ()])

    def _union(self, members: Sequence[Codec]) -> Codec:
        members = list(dict.fromkeys(members))
        if self.any in members:
            return self.any
        rest = [member for member in members if member.cls is not NULL]
        if len(members) == 1:
            return members[0]
        if len(rest) == 1 and NULL not in rest[0].kinds:
            return OptionalCodec(rest[0])
        return UnionCodec(members, self)

    def find(self, name: str, base: type) -> type | None:
        """Return the class that ``"$type": name`` means where ``base`` is declared, None if there is none.

        If one class is defined several times (the same module and qualified name), the last definition is used. If
        different classes have the name, the registered one is used.
        """
        family = self._families.get(base)
        if family is None or not family.is_current():
            family = self._families[base] = _Family(base)
        only = family.only.get(name)
        if only is not None:
            return only
        namesakes = [cls for cls in family.classes() if cls.__name__ == name]
        named = {(cls.__module__, cls.__qualname__): cls for cls in namesakes if self.is_structured(cls)}
        if len(namesakes) == len(named) == 1:
            family.only[name] = namesakes[0]
        if len(named) == 1:
            return next(iter(named.values()))
        registered = self.lookup(name)
        return registered if registered is not None and _fits(registered, base) else None

    def class_codec(self, cls: type) -> ClassCodec | None:
        """Return the codec of a dataclass, a Pydantic model or ``Image``, None for other classes.

        Raises ``Refused`` if values of the class cannot be sent.
        """
        codec = self._compiled.get(cls) or _class_codec(cls, cls, (), self)
        return codec if isinstance(codec, ClassCodec) else None

    def is_structured(self, cls: type) -> bool:
        """True if values of ``cls`` can be sent with the name of their class: dataclasses, models and ``Image``."""
        try:
            return self.class_codec(cls) is not None
        except Refused:
            return False

    def encode_marked(self, value: Any, base: type | None) -> dict[str, Any]:
        """Return the tree of a dataclass, model or image with the name of its class; raises ``Refused``.

        ``base`` is the declared class; None if ``Any`` is declared.
        """
        cls = type(value)
        fits = base is None or _fits(cls, base)
        codec = self.class_codec(cls) if fits else None
        if codec is None:
            wanted = "declared Any" if base is None else f"declared {base.__name__}"
            raise Refused(f"{wanted}, but {value_of_type(cls)} would not be read back unchanged")
        if base is not None and self.find(codec.name, base) not in (cls, None):
            raise Refused(f"several subclasses of {base.__name__} are named {codec.name}")
        return codec.mark(codec.encode(value))

    def decode_marked(self, tree: dict[str, Any], base: type) -> Any:
        """Return the value of a tree that names its class; ``base`` is the declared class. Raises ``Unreadable``."""
        name = tree[TYPE_KEY]
        cls = self.find(name, base) if type(name) is str else None
        if cls is None:
            raise Unreadable(f'"{TYPE_KEY}" does not name a class that fits {base.__name__}')
        return self.of(cls).decode_marked(tree)


def _class_codec(hint: Any, cls: type, args: tuple[Any, ...], codecs: CodecCompiler) -> Codec | None:
    """Return the codec of ``hint``, which is ``cls`` or ``cls[args]``; None if ``cls`` is not a class with fields.

    The codec is stored in ``codecs`` before its fields are compiled, since they may refer to it. Raises ``Refused``.
    """
    codec: ClassCodec
    if issubclass(cls, BaseModel):
        if cls is BaseModel:
            return None
        codec = ModelCodec(cls, codecs)
    elif dataclasses.is_dataclass(cls):
        codec = DataclassCodec(cls, codecs)
    elif cls is Image:
        return ImageCodec(cls, codecs)
    else:
        return None
    known = codecs.keep(hint, codec)
    try:
        codec.compile(args)
    except Refused:
        codecs.forget_since(known)
        raise
    return codec


def _fits(cls: type, base: type) -> bool:
    try:
        return issubclass(cls, base)
    except TypeError:
        # A Protocol that is not runtime_checkable, or that has data members, cannot be checked: every class fits.
        return True


_subclasses = type.__subclasses__  # of the class itself: a metaclass may have another method of this name


class _Family:
    """A class and all classes below it, at the time of this object's making."""

    __slots__ = ("_members", "_size", "only")

    def __init__(self, base: type) -> None:
        seen: dict[type, None] = {base: None}
        queue = [base]
        size = 0
        for cls in queue:
            found: list[type] = _subclasses(cls)
            size += len(found)
            for sub in found:
                if sub not in seen:
                    seen[sub] = None
                    queue.append(sub)
        self._members = [weakref.ref(cls) for cls in queue]
        self._size = size
        self.only: dict[str, type] = {}
        """The structured classes whose names no other class of the family has, as far as they were looked for."""

    def is_current(self) -> bool:
        """True if no class has been added to the family, and none has gone."""
        size = 0
        for member in self._members:
            cls = member()
            if cls is None:
                return False
            size += len(_subclasses(cls))
        return size == self._size

    def classes(self) -> Sequence[type]:
        """The classes, in the order of their definition within each class."""
        return [cls for member in self._members if (cls := member()) is not None]


def _bare(hint: Any) -> Any:
    """``hint`` without the wrappers that do not change the type: Annotated, Final, NewType, type aliases."""
    while True:
        if typing.get_origin(hint) in (typing.Annotated, typing.Final, typing.Required, typing.NotRequired):
            hint = typing.get_args(hint)[0]
        elif isinstance(hint, typing.NewType):
            hint = hint.__supertype__
        elif type(hint).__name__ == "TypeAliasType":
            hint = hint.__value__
        elif hint is typing.LiteralString:
            return str
        else:
            return NULL if hint is None else hint
