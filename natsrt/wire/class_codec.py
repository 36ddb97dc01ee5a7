"""The base class of the codecs of classes with fields, and the codec of AutoGen's ``Image``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from autogen_core import Image

from natsrt.wire.codecs import CLASS_KEY, TYPE_KEY, Codec, CodecCompiler, PlainCheck, Refused, Unreadable, misfit


class ClassCodec(Codec):
    """Base of the codecs of classes with fields.

    A value whose class is a subclass of the declared one is written with the name of its class.
    """

    kinds: frozenset[type] = frozenset({dict})
    polymorphic = True
    cls: type
    base: type

    def __init__(self, cls: type, codecs: CodecCompiler) -> None:
        self.cls = cls
        self.base = cls
        self.name: str = cls.__name__
        self._codecs = codecs

    def compile(self, args: tuple[Any, ...]) -> None:
        """Prepare the codecs of the fields. ``args`` are the type arguments of a generic class."""

    def encode(self, value: Any) -> Any:
        if type(value) is not self.cls:
            return self._codecs.encode_marked(value, self.base)
        return self.encode_fields(value)

    def decode(self, tree: Any) -> Any:
        if type(tree) is not dict:
            raise misfit(self.name, tree)
        if TYPE_KEY in tree:
            return self._codecs.decode_marked(tree, self.base)
        return self.decode_fields(tree)

    def mark(self, tree: Any) -> dict[str, Any]:
        if type(tree) is not dict:
            raise Refused(f'the serializer of {self.name} does not write a JSON object, so it cannot have "{TYPE_KEY}"')
        for key in (TYPE_KEY, CLASS_KEY):
            if key in tree:
                raise Refused(f'a field of {self.name} has the reserved name "{key}"')
        return {TYPE_KEY: self.name, **tree}

    def decode_marked(self, tree: dict[str, Any]) -> Any:
        fields = tree.copy()
        del fields[TYPE_KEY]
        fields.pop(CLASS_KEY, None)
        return self.decode_fields(fields)

    def encode_fields(self, value: Any) -> Any:
        """Return the tree of ``value``, whose class is exactly ``cls``; raises ``Refused``."""
        raise NotImplementedError

    def decode_fields(self, tree: Any) -> Any:
        """Return the value of a tree that has no class name; raises ``Unreadable``."""
        raise NotImplementedError

    # Plain values: those that Pydantic's own compiled serializer and validator carry exactly as they are.

    _known: Mapping[str, Codec] = {}
    """The codecs of the fields, as far as they can be plain."""

    def _can_be_plain(self, inside: tuple[Codec, ...]) -> bool:
        """Whether some values of the class are plain. ``inside``: as in `Codec.plain_check`, and this codec."""
        return False

    @functools.cached_property
    def _plain_fields(self) -> tuple[list[tuple[str, tuple[type, ...]]], list[tuple[str, PlainCheck]]] | None:
        """The fields whose value's class decides whether it is plain, and those with a check.

        None if no value is plain. Computed when the first value is written or read, because all classes that this one
        refers to can be compiled by then.
        """
        if not self._can_be_plain((self,)):
            return None
        types = [(name, found) for name, codec in self._known.items() if (found := codec.plain_types())]
        names = {name for name, _ in types}
        checks = [(name, codec.plain_check((self,))) for name, codec in self._known.items() if name not in names]
        return types, [(name, check) for name, check in checks if check is not None]

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck | None:
        return self._is_plain if self in inside or self._can_be_plain((*inside, self)) else None

    def _is_plain(self, value: Any) -> bool:
        """Whether ``value`` is of exactly this class and holds what its fields declare, at every depth."""
        plain_fields = self._plain_fields
        if type(value) is not self.cls or plain_fields is None:
            return False
        fields = value.__dict__
        types, checks = plain_fields
        try:
            for name, kinds in types:
                if type(fields[name]) not in kinds:
                    return False
            for name, check in checks:
                if not check(fields[name]):
                    return False
        except KeyError:
            return False
        return True


class ImageCodec(ClassCodec):
    """AutoGen's ``Image`` in the form that its Pydantic schema defines: the PNG in base64."""

    def encode_fields(self, value: Image) -> dict[str, Any]:
        return {"data": value.to_base64()}

    def decode_fields(self, tree: Any) -> Image:
        data = tree.get("data")
        if type(data) is not str or (self._codecs.strict and len(tree) != 1):
            raise Unreadable('an Image is an object with the field "data"')
        try:
            return Image.from_base64(data)
        except Exception as error:
            # Pillow's exceptions have no common base class.
            raise Unreadable("the data is not an image") from error


def unknown_fields(name: str, fields: set[str]) -> Unreadable:
    return Unreadable(f"{name} has no field {', '.join(sorted(fields))}")
