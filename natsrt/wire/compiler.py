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
* **A name is looked up** among the declared class and its subclasses, the union's members, and where
  ``natsrt.wire.class_finder`` finds classes that fit the declared type. Nothing is imported. Any other name is
  unreadable.
* **Several classes of one name.** Where the writer knows another class of the name, ``"$class"`` follows ``"$type"``,
  with the full name of the class: ``{"$type": "Item", "$class": "orders.messages.Item", ...}``. A reader takes the
  class with this full name if it knows it. Otherwise, of several classes of the name, it takes the one that can read
  the object and knows all its fields; if that does not decide, the object is unreadable.
* **A user's dict with a key** ``"$type"`` is wrapped as ``{"$type": "dict", "value": {...}}`` wherever a class would
  also be possible, as in ``Any``. Where a dict is declared (``dict[str, int]``, a message of type ``dict``) it is
  written unchanged. A class with a field named ``"$type"`` cannot be sent, nor can an object that has a field
  ``"$class"`` where its class must be named.
* ``Any`` accepts only JSON values, dataclasses, Pydantic models and images. A tuple, for example, would be read back as
  a list.
* Scalars are written as follows: bytes in base64; ``datetime``, ``date`` and ``time`` in ISO 8601; ``Decimal`` and
  ``UUID`` as text; enums by value if all their values are str or all are int, else by member name. Dict keys declared
  with these types are written as the same text. A time zone is written as its offset. ``fold`` is not
  written, so a local time with ``fold=1`` is refused. The scalars in a Pydantic model are written by Pydantic, except
  where it would read them back as something else
  (``model_fields``).
* A ``TypedDict`` is an object with a member per key. Keys that are not declared are refused.
* Unknown fields are ignored, so that a newer sender may add some, unless the codecs are ``strict``.

The texts of errors name fields and types, never values. Where no type is declared, a path that is written names the
keys of dictionaries, as far as they look like names.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from autogen_core import AgentId, Image
from pydantic import BaseModel
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from natsrt.wire.class_codec import ClassCodec, ImageCodec
from natsrt.wire.class_finder import ClassFinder
from natsrt.wire.codecs import (
    ALL_KINDS,
    CLASS_KEY,
    NULL,
    TYPE_KEY,
    VALUE_KEY,
    Codec,
    CodecCompiler,
    Fault,
    Misdeclared,
    Refused,
    Unreadable,
    defined_again,
    key_step,
    keys_that_are_not_text,
    misfit,
    unsendable,
    wrong_type,
)
from natsrt.wire.container_codecs import ArrayCodec, DictCodec, OptionalCodec, TupleCodec
from natsrt.wire.dataclass_codec import dataclass_codec
from natsrt.wire.exactness import Flaw, difference, value_of_type
from natsrt.wire.families import Family, fits
from natsrt.wire.known_classes import KnownClasses, in_this_process
from natsrt.wire.message_classes import full_name, is_protobuf, type_name_of
from natsrt.wire.model_codec import ModelCodec
from natsrt.wire.pydantic_codec import PydanticCodec
from natsrt.wire.scalar_codecs import NONE, EnumCodec, ExactCodec, FloatCodec, LiteralCodec, text_codecs
from natsrt.wire.typed_dict_codec import TypedDictCodec, is_typed_dict

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
        if cls is dict:
            return self._encode_dict(value)
        if cls is list:
            try:
                return [self.encode(item) for item in value]
            except Refused as fault:
                raise fault.under("[]") from None
        return self._codecs.encode_marked(value, None)

    def _encode_dict(self, value: dict[Any, Any]) -> dict[str, Any]:
        if not all(type(key) is str for key in value):
            raise keys_that_are_not_text(value)
        at = None
        try:
            tree = {(at := key): self.encode(item) for key, item in value.items()}
        except Refused as fault:
            raise fault.under(key_step(at)) from None
        return {TYPE_KEY: "dict", VALUE_KEY: tree} if TYPE_KEY in tree else tree

    def decode(self, tree: Any) -> Any:
        if type(tree) is list:
            return [self.decode(item) for item in tree]
        if type(tree) is not dict:
            return tree
        if TYPE_KEY in tree:
            if tree[TYPE_KEY] != "dict" or len(tree) != 2 or type(tree.get(VALUE_KEY)) is not dict:
                return self._codecs.decode_marked(tree, None)
            tree = tree[VALUE_KEY]
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
        self._by_name: dict[str, list[Codec]] = {}
        for member in members:
            self._by_name.setdefault(member.name, []).append(member)
        for name, namesakes in self._by_name.items():
            if len({full_name(member.base) for member in namesakes if member.base is not None}) != len(namesakes) > 1:
                raise Refused(f"two members of the union {self.name} have the same name, {name}")
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

    def members(self) -> Sequence[Codec]:
        return self._members

    def _is_clear(self, kind: type) -> bool:
        writers = self._by_kind[kind]
        return len(writers) == 1 or writers[0].natural

    def encode(self, value: Any) -> Any:
        member = self._by_class.get(type(value))
        if member is not None:
            return self._marked(member, member.encode(value))
        faults = []
        for member in self._members:
            if member.base is not None and not fits(type(value), member.base):
                continue
            try:
                tree = member.encode(value)
            except Refused as fault:
                faults.append((member, fault))
                continue
            return self._marked(member, tree)
        raise _clearest(faults) or wrong_type(self.name, value)

    def _marked(self, member: Codec, tree: Any) -> Any:
        has_mark = type(tree) is dict and TYPE_KEY in tree
        if has_mark and not member.natural:
            return tree
        if member.name in self._unmarked and not has_mark and not self._codecs.marks_all:
            return tree
        marked = member.mark(tree)
        return marked if len(self._by_name[member.name]) == 1 else _with_class(marked, member.base)

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
        name, class_name = tree[TYPE_KEY], tree.get(CLASS_KEY)
        named = self._by_name.get(name, []) if type(name) is str else []
        if len(named) == 1 and class_name is None:
            return named[0].decode_marked(tree)
        bases = [member.base for member in self._members if member.base is not None]
        found = [cls for base in bases if (cls := self._codecs.find(tree, base)) is not None]
        exact = [cls for cls in found if full_name(cls) == class_name]
        if len(named) == 1 and not exact:
            return named[0].decode_marked(tree)
        if named and not exact:
            found = list(self._codecs.fitting([member.base for member in named if member.base is not None], tree))
        if not found:
            raise self._codecs.no_class(tree, self.name)
        return self._codecs.of((exact or found)[0]).decode_marked(tree)


def _clearest(faults: Sequence[tuple[Codec, Refused]]) -> Refused | None:
    """The reason why no member of a union takes a value, if the value's class means one member.

    Its class is that of one member or below it; or only one member refuses it for another reason than its class. None
    if several members may be meant.
    """
    meant = [fault for member, fault in faults if member.base is not None]
    meant = meant or [fault for _, fault in faults if not isinstance(fault, Misdeclared)]
    return meant[0] if meant and len({str(fault) for fault in meant}) == 1 else None


_ABSTRACT: dict[Any, tuple[type, ...]] = {
    collections.abc.Sequence: (list, tuple),
    collections.abc.MutableSequence: (list,),
    collections.abc.Iterable: (list, tuple, set, frozenset),
    collections.abc.Collection: (list, tuple, set, frozenset),
    collections.abc.Set: (set, frozenset),
    collections.abc.MutableSet: (set,),
}
"""The concrete classes that a value declared with an abstract collection may have."""


def _array_of(cls: Any, args: tuple[Any, ...]) -> Any:
    if not args:
        return cls
    return cls[(args[0], ...)] if cls is tuple else cls[args[0]]


class Codecs(CodecCompiler):
    """The codecs of one runtime. Each is compiled when it is first used.

    ``finder`` finds the classes that trees name; None: among those that the process knows. With ``strict``, a tree with
    an unknown field, at any depth, is unreadable.
    """

    def __init__(self, finder: ClassFinder | None = None, *, strict: bool = False) -> None:
        self.finder: ClassFinder = finder or ClassFinder()
        self.strict = strict
        self.redefined: int = 0
        """How many classes have taken the place of former definitions of themselves."""
        self._met = KnownClasses()
        self.forget()

    def forget(self) -> None:
        """Forget all that was compiled, and the classes that it refers to."""
        self._strictly: Codecs | None = None
        self._named: dict[Any, Any] = {}
        self._named_version = -1
        self._compiled: dict[Any, Codec] = {float: FloatCodec()}
        self._compiled.update({cls: ExactCodec(cls) for cls in (str, int, bool)})
        self._compiled[NULL] = NONE
        self._compiled.update({codec.cls: codec for codec in text_codecs()})
        self.any: Codec = AnyCodec(self)
        self._compiled[Any] = self._compiled[object] = self.any
        self._families: dict[type, Family] = {}
        self._written: dict[tuple[str, str | None], type | None] | None = None
        """The classes that were written by name while a value is verified; None for a name that means several."""

    @property
    def verifying(self) -> bool:
        return self._written is not None

    @contextmanager
    def verification(self) -> Iterator[None]:
        self._written = {}
        try:
            yield
        finally:
            self._written = None

    @property
    def strictly(self) -> Codecs:
        """The codecs of the same runtime to which a tree with an unknown field is unreadable."""
        if self._strictly is None:
            self._strictly = self if self.strict else Codecs(self.finder, strict=True)
        return self._strictly

    def met(self, cls: type) -> None:
        """Note that values of ``cls`` can be sent."""
        name = type_name_of(cls)
        in_this_process.add(name, cls)
        self.redefined += self._met.add(name, cls)

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
            return self._union([self.of(_array_of(concrete, args)) for concrete in _ABSTRACT[cls]])
        if isinstance(cls, type):
            return self._class(hint, cls, args)
        return self._other(hint)

    def _class(self, hint: Any, cls: type, args: tuple[Any, ...]) -> Codec:
        if issubclass(cls, enum.Enum):
            return EnumCodec(cls)
        if cls is BaseModel:
            return AbstractCodec(cls, self)
        if cls is AgentId or is_protobuf(cls):
            raise unsendable(cls)
        return _class_codec(hint, cls, args, self) or self._other(hint)

    def _other(self, hint: Any) -> Codec:
        try:
            return PydanticCodec(hint)
        except (PydanticSchemaGenerationError, PydanticUserError):
            if isinstance(hint, type):
                return AbstractCodec(hint, self)
            raise Refused(f"values of type {hint} cannot be sent") from None
        except Exception as error:
            # Pydantic has exceptions with other bases, and classes with a schema of their own may raise anything.
            raise Refused(f"values of type {hint} cannot be sent ({type(error).__name__})") from None

    def _type_variable(self, variable: typing.TypeVar) -> Codec:
        if variable.__constraints__:
            return self._union([self.of(hint) for hint in variable.__constraints__])
        return self.of(Any if variable.__bound__ is None else variable.__bound__)

    def _tuple(self, args: tuple[Any, ...]) -> Codec:
        if not args or (len(args) == 2 and args[1] is Ellipsis):
            return ArrayCodec(tuple, self.of(args[0]) if args else self.any)
        return TupleCodec([self.of(arg) for arg in args if arg != ()])

    def _union(self, members: Sequence[Codec]) -> Codec:
        members = list(dict.fromkeys(inner for member in members for inner in member.members()))
        if self.any in members:
            return self.any
        rest = [member for member in members if member.cls is not NULL]
        if len(members) == 1:
            return members[0]
        if len(rest) == 1 and NULL not in rest[0].kinds:
            return OptionalCodec(rest[0])
        return UnionCodec(members, self)

    # -- names of classes ----------------------------------------------------------------------------------------

    def find(self, tree: dict[str, Any], base: type | None) -> type | None:
        """Return the class that a tree names where ``base`` is declared (None: ``Any``); None if there is none.

        Raises ``Unreadable`` if several classes have the name, and the tree does not decide.
        """
        name, class_name = tree[TYPE_KEY], tree.get(CLASS_KEY)
        if type(name) is not str:
            return None
        written = self._written.get((name, class_name)) if self._written is not None else None
        if written is not None and self._may_be(written, base):
            return written
        found = self._classes_named(name, class_name if type(class_name) is str else None, base)
        if len(found) > 1:
            found = self.fitting(found, tree)
        return found[0] if found else None

    def fitting(self, classes: Sequence[type], tree: dict[str, Any]) -> Sequence[type]:
        """Return the one of several classes that can read a tree and knows all its fields. Raises ``Unreadable``."""
        fitting = [cls for cls in classes if self._fits_strictly(cls, tree)]
        if len(fitting) != 1:
            names = " and ".join(sorted(map(full_name, classes)))
            raise Unreadable(f'"{TYPE_KEY}" is the name of {names}; "{CLASS_KEY}" must name one')
        return fitting

    def _fits_strictly(self, cls: type, tree: dict[str, Any]) -> bool:
        try:
            self.strictly.of(cls).decode_marked(tree)
        except (Refused, Unreadable):
            return False
        return True

    def _classes_named(self, name: str, class_name: str | None, base: type | None) -> Sequence[type]:
        """The classes that a name, and perhaps a full name, may mean where ``base`` is declared."""
        if base is not None:
            family = self._family(base)
            only = family.only.get(name)
            if only is not None and class_name is None:
                return (only,)
            related = self._namesakes(family, name)
            if class_name is None and len(related) == 1:
                return tuple(related.values())
            return self._seek(name, class_name, base, related)
        key = (name, class_name, self.finder.scope)
        known: Sequence[type] | None = self._cache().get(key)
        if known is None:
            known = self._named[key] = self._seek(name, class_name, None, {})
        return known

    def _seek(self, name: str, class_name: str | None, base: type | None, related: dict[str, type]) -> Sequence[type]:
        steps = [
            {full_name(cls): cls for cls in step if self._may_be(cls, base)}
            for step in self.finder.steps(name, self.finder.scope)
        ]
        for step in (related, *steps):
            if class_name in step:
                return (step[class_name],)
        if related:
            steps = [*({one: related[one] for one in step if one in related} for step in steps), related]
        return tuple(next((step for step in steps if step), {}).values())

    def _may_be(self, cls: Any, base: type | None) -> bool:
        return isinstance(cls, type) and (base is None or fits(cls, base)) and self.is_structured(cls)

    def _family(self, base: type) -> Family:
        family = self._families.get(base)
        if family is None or not family.is_current():
            family = self._families[base] = Family(base)
        return family

    def _namesakes(self, family: Family, name: str) -> dict[str, type]:
        """The structured classes of a family with this name, by full name. The last definition of each counts."""
        namesakes = [cls for cls in family.classes() if cls.__name__ == name]
        named = {full_name(cls): cls for cls in namesakes if self.is_structured(cls)}
        if len(namesakes) == len(named) == 1:
            family.only[name] = namesakes[0]
        return named

    def _cache(self) -> dict[Any, Any]:
        """What was found by name, as far as it still holds."""
        if self._named_version != self.finder.version or len(self._named) > _NAMES_CACHED:
            self._named = {}
            self._named_version = self.finder.version
        return self._named

    def _namesakes_of(self, cls: type, name: str, base: type | None) -> tuple[bool, type | None]:
        """What a reader that knows what is known here makes of the names of ``cls``.

        True if it needs more than the plain name to find ``cls``; and the other class that it takes for the one with
        the full name, or None.
        """
        if base is not None:
            family = self._family(base)
            if family.only.get(name) is cls:
                return _UNIQUE
            related = self._namesakes(family, name)
            meant = related.get(full_name(cls))
            if meant is not None:
                return len(related) > 1, None if meant is cls else meant
        key = (cls, self.finder.scope)
        known: tuple[bool, type | None] | None = self._cache().get(key)
        if known is None:
            own = full_name(cls)
            others = [other for step in self.finder.steps(name, self.finder.scope) for other in step]
            rivals = any(other is not cls and full_name(other) == own for other in others)
            found = self._seek(name, own, base, {}) if rivals else ()
            meant = next((one for one in found if one is not cls and full_name(one) == own), None)
            known = self._cache()[key] = any(full_name(other) != own for other in others), meant
        return known

    def _compare_with(self, meant: type, value: Any, tree: dict[str, Any]) -> None:
        """Raise ``Refused`` unless the class ``meant``, which has the full name of the value's class, reads the value.

        A reader takes the value for an object of that class.
        """
        try:
            flaw = difference(value, self.of(meant).decode_marked(tree))
        except Fault as fault:
            flaw = Flaw(fault.path, fault.reason)
        if flaw is not None:
            raise two_classes(type(value), flaw)

    def no_class(self, tree: dict[str, Any], declared: str) -> Unreadable:
        """The error of a tree that names no class which fits the declared type."""
        name = tree[TYPE_KEY]
        if type(name) is not str or not _CLASS_NAME.fullmatch(name):
            return Unreadable(f'"{TYPE_KEY}" does not name a class that fits {declared}')
        if name in _ONLY_DECLARED:
            return Unreadable(
                f'"{TYPE_KEY}" may name {name} only where the declared type does, as str | {name}; this is {declared}, '
                f"where only classes with fields can be named"
            )
        return Unreadable(
            f'"{TYPE_KEY}" names {name}, but no class of this name that fits {declared} is known here; add its '
            f"serializer with runtime.add_message_serializer, or pass the class as reply_type (a dictionary with a key "
            f'"{TYPE_KEY}" is written {{"{TYPE_KEY}": "dict", "{VALUE_KEY}": ...}})'
        )

    # -- classes -------------------------------------------------------------------------------------------------

    def class_codec(self, cls: type) -> ClassCodec | None:
        """Return the codec of a dataclass, a Pydantic model or ``Image``, None for other classes.

        Raises ``Refused`` if values of the class cannot be sent.
        """
        codec = self._compiled.get(cls)
        if codec is None:
            redefined = self.redefined
            codec = _class_codec(cls, cls, (), self)
            if self.redefined != redefined:  # whatever refers to the former definition would keep it alive
                self.forget()
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
        codec = self.class_codec(cls) if base is None or fits(cls, base) else None
        if codec is None:
            if cls is base:
                raise unsendable(cls)
            wanted = "declared Any" if base is None else f"declared {base.__name__}"
            if base is not None and (note := defined_again(base.__name__, value)):
                raise Misdeclared(f"{wanted}, but holds {value_of_type(cls)}{note}")
            raise Misdeclared(f"{wanted}, but {value_of_type(cls)} would not be read back unchanged")
        tree = codec.mark(codec.encode_fields(value))
        namesakes, meant = self._namesakes_of(cls, codec.name, base)
        if namesakes:
            tree = _with_class(tree, cls)
        if meant is not None:
            self._compare_with(meant, value, tree)
        if self._written is not None:
            key = codec.name, tree.get(CLASS_KEY)
            self._written[key] = cls if self._written.get(key, cls) is cls else None
        return tree

    def decode_marked(self, tree: dict[str, Any], base: type | None) -> Any:
        """Return the value of a tree that names its class; raises ``Unreadable``.

        ``base`` is the declared class; None if ``Any`` is declared.
        """
        cls = self.find(tree, base)
        if cls is None:
            raise self.no_class(tree, "Any" if base is None else base.__name__)
        return self.of(cls).decode_marked(tree)


_NAMES_CACHED = 4096
"""Maximum number of names of classes in trees for which the class is cached, since the names come from the wire."""
_ONLY_DECLARED: frozenset[str] = frozenset(codec.name for codec in text_codecs()) | {"tuple", "set", "frozenset"}
"""The names of types that ``"$type"`` may name in unions, and nowhere else."""
_CLASS_NAME = re.compile(r"[A-Za-z_][\w.\[\], |]{0,99}")


_UNIQUE = (False, None)


def two_classes(cls: type, flaw: Flaw) -> Refused:
    """Why an object is refused that arrives as one of another class with the full name of its own, and changed."""
    return Refused(
        f"two classes have the full name {full_name(cls)}, and it would arrive as the other one ({flaw.reason}): give "
        "them different names or, if one was defined again, make the object of the last definition",
        flaw.path,
    )


def _with_class(tree: dict[str, Any], cls: Any) -> dict[str, Any]:
    """Return the tree of a value that names its class, with the full name of the class."""
    return {TYPE_KEY: tree[TYPE_KEY], CLASS_KEY: full_name(cls), **tree}


def _class_codec(hint: Any, cls: type, args: tuple[Any, ...], codecs: Codecs) -> Codec | None:
    """Return the codec of ``hint``, which is ``cls`` or ``cls[args]``; None if ``cls`` is not a class with fields.

    The codec is stored in ``codecs`` before its fields are compiled, since they may refer to it. Raises ``Refused``.
    """
    codec: ClassCodec | TypedDictCodec
    if is_typed_dict(cls):
        codec = TypedDictCodec(cls, codecs)
    elif issubclass(cls, BaseModel):
        if cls is BaseModel:
            return None
        codec = ModelCodec(cls, codecs)
    elif dataclasses.is_dataclass(cls):
        codec = dataclass_codec(cls, codecs)
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
    codecs.met(cls)
    return codec


def _bare(hint: Any) -> Any:
    """``hint`` without the wrappers that do not change the type: Annotated, Final, NewType, type aliases."""
    while True:
        origin = typing.get_origin(hint)
        is_wrapper = origin in (typing.Annotated, typing.Final, typing.Required, typing.NotRequired)
        if is_wrapper or getattr(origin, "_name", None) == "ReadOnly":
            hint = typing.get_args(hint)[0]
        elif isinstance(hint, typing.NewType):
            hint = hint.__supertype__
        elif type(hint).__name__ == "TypeAliasType":
            hint = hint.__value__
        elif hint is typing.LiteralString:
            return str
        else:
            return NULL if hint is None else hint
