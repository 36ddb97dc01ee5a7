"""The codec of ``TypedDict`` classes, those of ``typing`` and those of ``typing_extensions``."""

from __future__ import annotations

import typing
from typing import Any

from natsrt.wire.codecs import TYPE_KEY, Codec, CodecCompiler, PlainCheck, Refused, Unreadable, misfit, wrong_type
from natsrt.wire.dataclass_codec import resolved_hints


def is_typed_dict(cls: type) -> bool:
    """True for a class made by ``TypedDict``, on which ``issubclass`` and ``isinstance`` raise a TypeError."""
    return dict in cls.__mro__ and hasattr(cls, "__total__") and hasattr(cls, "__required_keys__")


class TypedDictCodec(Codec):
    """A dict with declared keys. Each key has the codec of its annotation; other keys are refused."""

    kinds: frozenset[type] = frozenset({dict})
    cls: type = dict
    polymorphic: bool = True
    """While it is compiled, since it may contain itself."""

    def __init__(self, cls: type, codecs: CodecCompiler) -> None:
        self.name: str = cls.__name__
        self._class = cls
        self._codecs = codecs

    def compile(self, args: tuple[Any, ...]) -> None:
        """Prepare the codecs of the keys. ``args`` are the type arguments of a generic class. Raises ``Refused``."""
        self._keys: dict[str, Codec] = {}
        required: set[str] = set()
        for key, hint in resolved_hints(self._class, args).items():
            if key == TYPE_KEY:
                raise Refused(f'the key "{TYPE_KEY}" is reserved', self.name)
            try:
                self._keys[key] = self._codecs.of(hint)
            except Refused as fault:
                raise fault.under(key) from None
            if _is_required(self._class, key, hint):
                required.add(key)
        self._required = frozenset(required)
        self.polymorphic = any(codec.polymorphic for codec in self._keys.values())

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck | None:
        if self in inside or hasattr(self._class, "__pydantic_config__"):
            return None
        checks = {key: check for key, codec in self._keys.items() if (check := codec.plain_check((*inside, self)))}
        if len(checks) != len(self._keys):
            return None
        required = self._required
        return lambda value: (
            type(value) is dict
            and required <= value.keys() <= checks.keys()
            and all(checks[key](item) for key, item in value.items())
        )

    def encode(self, value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise wrong_type(self.name, value)
        if missing := self._required - value.keys():
            raise Refused(f"{self.name} requires the key {_named(missing)}, and it is missing")
        if unknown := value.keys() - self._keys.keys():
            raise Refused(f"{self.name} has no key {_named(unknown)}")
        tree = {}
        for key, item in value.items():
            try:
                tree[key] = self._keys[key].encode(item)
            except Refused as fault:
                raise fault.under(key) from None
        return tree

    def decode(self, tree: Any) -> dict[str, Any]:
        if type(tree) is not dict:
            raise misfit(self.name, tree)
        if missing := self._required - tree.keys():
            raise Unreadable(f"{self.name} requires the key {_named(missing)}, and it is missing")
        if self._codecs.strict and (unknown := tree.keys() - self._keys.keys()):
            raise Unreadable(f"{self.name} has no key {_named(unknown)}")
        value = {}
        for key, item in tree.items():
            if key not in self._keys:
                continue
            try:
                value[key] = self._keys[key].decode(item)
            except Unreadable as fault:
                raise fault.under(key) from fault.__cause__
        return value

    def mark(self, tree: Any) -> dict[str, Any]:
        return {TYPE_KEY: self.name, **tree}

    def decode_marked(self, tree: dict[str, Any]) -> Any:
        return self.decode({key: item for key, item in tree.items() if key != TYPE_KEY})


def _is_required(cls: Any, key: str, hint: Any) -> bool:
    """``__required_keys__`` is wrong on Python 3.11 if the module postpones its annotations."""
    while (origin := typing.get_origin(hint)) is not None:
        if origin in (typing.Required, typing.NotRequired):
            return bool(origin is typing.Required)
        if origin is not typing.Annotated and getattr(origin, "_name", "") != "ReadOnly":
            break
        hint = typing.get_args(hint)[0]
    return key in cls.__required_keys__


def _named(keys: typing.Iterable[Any]) -> str:
    return ", ".join(sorted(repr(key) if isinstance(key, str) else f"of type {type(key).__name__}" for key in keys))
