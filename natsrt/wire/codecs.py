"""Codecs of single types and of containers: values as JSON trees.

A *tree* is what ``json.loads`` returns: None, bool, int, float, str, list, dict. ``Codec.encode`` converts a value to
a tree, and ``Codec.decode`` converts a tree to a value. A value that would not be read back equal and of the same type
is ``Refused``. A tree that does not fit the type is ``Unreadable``. The texts of both errors name fields and types,
never values. The rules are in ``compiler``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import orjson
from autogen_core import AgentId
from pydantic import SecretBytes, SecretStr

from natsrt.wire.exactness import path_under, unwritable, value_of_type

TYPE_KEY = "$type"
"""The reserved key that names the class of a polymorphic value."""

CLASS_KEY = "$class"
"""The key after ``TYPE_KEY`` with the full name of the class, where the writer knows several classes of its name."""

VALUE_KEY = "value"
"""The key next to ``TYPE_KEY`` that holds the tree of a value which cannot carry ``TYPE_KEY`` itself."""

NULL = type(None)
_LONGEST_NAME = 60
"""The longest key of a dictionary that a path names."""
ALL_KINDS: frozenset[type] = frozenset({NULL, bool, int, float, str, list, dict})


class Fault(Exception):
    """Base of `Refused` and `Unreadable`.

    ``reason`` says what is wrong. ``path`` is where in the value, such as ``items[].name``; empty for the whole value.
    """

    def __init__(self, reason: str, path: str = "") -> None:
        self.reason = reason
        self.path: str = path
        super().__init__(reason)

    def under(self, step: str) -> Fault:
        """Put ``step`` (a field name, a key, ``[]`` or ``[n]``) before ``path``; returns self."""
        self.path = path_under(step, self.path)
        return self

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.path else self.reason


class Refused(Fault):
    """A value cannot be written exactly, or values of a type cannot be written at all."""


class Unreadable(Fault):
    """A tree does not fit the expected type."""


class Misdeclared(Refused):
    """A value is not of the declared type, so that another member of a union may be meant."""


def key_step(key: object) -> str:
    """The step of a path for a key of a dictionary that is written: the key if it looks like a name, else ``[]``."""
    return key if type(key) is str and key.isidentifier() and len(key) <= _LONGEST_NAME else "[]"


def wrong_type(expected: str, value: object) -> Refused:
    return Misdeclared(f"declared {expected}, but holds {value_of_type(type(value))}{defined_again(expected, value)}")


def unsendable(cls: type) -> Refused:
    """The refusal of an object of ``cls`` in a field that is declared as this class."""
    reason = f"values of type {cls.__name__} cannot be sent in a field"
    if cls is AgentId:
        return Refused(f"{reason}; declare str, send str(agent_id) and read it with AgentId.from_str")
    if hasattr(cls, "DESCRIPTOR"):
        return Refused(f"{reason}; a protobuf message is sent alone, or as bytes: SerializeToString and FromString")
    return Refused(f"{reason}; make it a dataclass or a Pydantic model, or hold its parts in fields of their own")


def defined_again(expected: str, value: object) -> str:
    """What errors add if a value is of another class than the declared one, but of the same name. Else empty."""
    name = type(value).__name__
    if name not in expected.split("|") or type(value).__module__ == "builtins":
        return ""
    return (
        f" that is another class than the declared one: if {name} was defined again, as by a notebook cell that runs "
        "twice, define the class that declares it again, too"
    )


def keys_that_are_not_text(value: Iterable[object]) -> Refused:
    """The refusal of a dictionary whose keys are declared as str, or not declared, and are not all str."""
    cls = next(type(key) for key in value if type(key) is not str)
    if not issubclass(cls, str):
        return Refused("JSON keys are strings, and the declared type specifies no other key type")
    name = cls.__name__
    return Refused(f"a key is of type {name}, and would arrive as str; declare dict[{name}, ...], or use str(key)")


def misfit(expected: str, tree: object) -> Unreadable:
    return Unreadable(f"expected {expected}, found JSON {_JSON_NAMES.get(type(tree), 'value')}")


_JSON_NAMES = {
    NULL: "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


def remedy_of(value: object) -> str | None:
    """What a sender can do about a value that Pydantic does not write as it is; None if there is nothing special."""
    pending, seen = [value], 0
    while pending and seen < _MOST_PARTS:
        item, seen = pending.pop(), seen + 1
        if isinstance(item, SecretStr | SecretBytes):
            return (
                f"Pydantic masks {value_of_type(type(item))} in JSON: declare the field as str, "
                "or give it a serializer that writes get_secret_value()"
            )
        if isinstance(item, bytes | bytearray):
            return (
                "Pydantic writes bytes as UTF-8 text, and these do not come back: set "
                'ser_json_bytes="base64" and val_json_bytes="base64" in the model_config'
            )
        if isinstance(item, dict):
            pending.extend((*item, *item.values()))
        elif isinstance(item, list | tuple | set | frozenset):
            pending.extend(item)
    return None


_MOST_PARTS = 10_000
"""So many parts of a value are searched for the reason why it cannot be written: it may contain itself."""


PlainCheck = Callable[[Any], bool]


class Codec:
    """Writes and reads the values of one declared type.

    ``name`` is the type's name in ``"$type"`` and in errors. ``kinds`` are the Python types of the trees it writes.
    ``cls`` is the exact class of its values, None if there are several. ``base`` is the declared class of which
    ``"$type"`` may name a subclass, None if it may not. ``natural`` codecs stay unmarked in a union.
    ``scalars`` are the exact classes of its values if these are JSON scalars, else empty.
    ``polymorphic`` is True if class names may occur inside, which Pydantic's own JSON cannot express.
    """

    name: str
    kinds: frozenset[type]
    cls: type | None = None
    base: type | None = None
    scalars: tuple[type, ...] = ()
    natural = False
    polymorphic = False

    def members(self) -> Sequence[Codec]:
        """The members of a union; for any other type, this codec."""
        return (self,)

    def encode(self, value: Any) -> Any:
        """Return the tree of ``value``; raises ``Refused``."""
        raise NotImplementedError

    def plain_types(self) -> tuple[type, ...]:
        """The exact classes of the values that Pydantic writes and reads unchanged in a field of this type.

        Empty if the class of a value is not enough to decide.
        """
        return ()

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck | None:
        """A function that returns True if Pydantic writes and reads a value unchanged in a field of this type.

        None if there is no cheap check: the type is polymorphic, or a union, or Pydantic changes its values.
        ``inside`` are the codecs of the models that contain this type. A recursive model finds itself among them.
        """
        types = self.plain_types()
        return (lambda value: type(value) in types) if types else None

    def decode(self, tree: Any) -> Any:
        """Return the value of ``tree``; raises ``Unreadable``."""
        raise NotImplementedError

    def dumps(self, value: Any) -> bytes:
        """Return ``value`` as a whole payload; raises ``Refused``, or the exception of the JSON writer."""
        tree = self.encode(value)
        try:
            return orjson.dumps(tree)
        except orjson.JSONEncodeError:
            if (flaw := unwritable(value, integers=False)) is None:
                raise
            raise Refused(flaw.reason, flaw.path) from None

    def loads(self, payload: bytes) -> Any:
        """Return the value of a whole payload; raises ``Unreadable``, or the exception of the JSON reader."""
        return self.decode(orjson.loads(payload))

    def mark(self, tree: Any) -> dict[str, Any]:
        """Return ``tree`` with this type's name added."""
        return {TYPE_KEY: self.name, VALUE_KEY: tree}

    def decode_marked(self, tree: dict[str, Any]) -> Any:
        """Return the value of a tree made by ``mark``; raises ``Unreadable``."""
        return self.decode(self.unwrap(tree))

    def unwrap(self, tree: dict[str, Any]) -> Any:
        """Return the part under ``VALUE_KEY`` of a tree made by ``mark``; raises ``Unreadable``."""
        if len(tree) - (CLASS_KEY in tree) != 2 or VALUE_KEY not in tree:
            raise Unreadable(f'a marked {self.name} has exactly the keys "{TYPE_KEY}" and "{VALUE_KEY}"')
        return tree[VALUE_KEY]


class CodecCompiler(ABC):
    """The interface of the compiler that codecs of classes use. Implemented by `natsrt.wire.compiler.Codecs`."""

    strict: bool
    """True if a tree with an unknown field is unreadable; False if unknown fields are ignored."""
    any: Codec
    """The codec of ``Any``."""
    marks_all = False
    """True while unions name the class of every value, also where their own reader can do without."""

    @abstractmethod
    def of(self, hint: Any) -> Codec:
        """Return the codec of a type annotation; raises ``Refused`` if its values cannot be sent."""

    @abstractmethod
    def keep(self, hint: Any, codec: Codec) -> int:
        """Store ``codec`` before it is complete, so that a recursive type finds it.

        Returns the number of codecs that were stored before.
        """

    @abstractmethod
    def forget_since(self, known: int) -> None:
        """Remove all but the first ``known`` codecs.

        Used when a class could not be compiled, since the codecs stored after it may refer to it.
        """

    @abstractmethod
    def encode_marked(self, value: Any, base: type | None) -> dict[str, Any]:
        """Return the tree of a dataclass, model or image with the name of its class; raises ``Refused``.

        ``base`` is the declared class; None if ``Any`` is declared.
        """

    @abstractmethod
    def decode_marked(self, tree: dict[str, Any], base: type | None) -> Any:
        """Return the value of a tree that names its class; raises ``Unreadable``.

        ``base`` is the declared class; None if ``Any`` is declared.
        """

    @property
    @abstractmethod
    def verifying(self) -> bool:
        """True inside `verification`."""

    @abstractmethod
    def verification(self) -> AbstractContextManager[None]:
        """A context in which a value is written and read back.

        Names of classes that are written in it can be read in it: the receiver knows them, or reports that it does not.
        """
