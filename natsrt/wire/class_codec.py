"""What the codecs of classes with fields share, and that of AutoGen's ``Image``."""

from __future__ import annotations

from typing import Any

from autogen_core import Image

from natsrt.wire.codecs import TYPE_KEY, Codec, CodecCompiler, Refused, Unreadable, misfit


class ClassCodec(Codec):
    """What the classes with fields share: subclasses of the declared class carry their name."""

    kinds = frozenset({dict})
    polymorphic = True
    cls: type
    base: type

    def __init__(self, cls: type, codecs: CodecCompiler) -> None:
        self.cls = cls
        self.base = cls
        self.name = cls.__name__
        self._codecs = codecs

    def compile(self, args: tuple[Any, ...]) -> None:
        """Look at the fields. ``args`` are the type arguments of a generic class."""

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
            raise Refused(f'the serializer of {self.name} makes no JSON object, so it cannot carry "{TYPE_KEY}"')
        if TYPE_KEY in tree:
            raise Refused(f'a field of {self.name} has the reserved name "{TYPE_KEY}"')
        return {TYPE_KEY: self.name, **tree}

    def decode_marked(self, tree: dict[str, Any]) -> Any:
        return self.decode_fields({key: value for key, value in tree.items() if key != TYPE_KEY})

    def encode_fields(self, value: Any) -> Any:
        """The tree of a value of exactly this class."""
        raise NotImplementedError

    def decode_fields(self, tree: Any) -> Any:
        """The value of a tree without a class name."""
        raise NotImplementedError


class ImageCodec(ClassCodec):
    """AutoGen's ``Image`` as its own Pydantic schema writes it: the PNG in base64."""

    def encode_fields(self, value: Image) -> dict[str, Any]:
        return {"data": value.to_base64()}

    def decode_fields(self, tree: Any) -> Image:
        data = tree.get("data")
        if type(data) is not str or (self._codecs.strict and len(tree) != 1):
            raise Unreadable('an Image is an object with the field "data"')
        try:
            return Image.from_base64(data)
        except Exception as error:
            # Pillow's own exceptions have no common root.
            raise Unreadable("the data is no image") from error


def unknown_fields(name: str, fields: set[str]) -> Unreadable:
    return Unreadable(f"{name} has no field {', '.join(sorted(fields))}")
