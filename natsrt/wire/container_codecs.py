"""Codecs of types with parts: lists, tuples, sets, dictionaries, and ``X | None``."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import orjson

from natsrt.wire.codecs import (
    NULL,
    Codec,
    Fault,
    PlainCheck,
    Refused,
    Unreadable,
    key_step,
    keys_that_are_not_text,
    misfit,
    wrong_type,
)
from natsrt.wire.scalar_codecs import NONE, ExactCodec, TextCodec


class ArrayCodec(Codec):
    """list, set, frozenset and ``tuple[X, ...]``."""

    kinds: frozenset[type] = frozenset({list})

    def __init__(self, cls: type, item: Codec) -> None:
        self.cls: type = cls
        self.name: str = cls.__name__ if item.name == "Any" else f"{cls.__name__}[{item.name}]"
        self.natural: bool = cls is list
        self.polymorphic: bool = item.polymorphic
        self._item = item

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck | None:
        cls, check = self.cls, self._item.plain_check(inside)
        if check is None:
            return None
        return lambda value: type(value) is cls and all(map(check, typing.cast(Iterable[Any], value)))

    def encode(self, value: Any) -> list[Any]:
        if type(value) is not self.cls:
            raise wrong_type(self.name, value)
        encode = self._item.encode
        try:
            return [encode(item) for item in typing.cast(Iterable[Any], value)]
        except Refused as fault:
            raise fault.under("[]") from None

    def decode(self, tree: Any) -> Any:
        if type(tree) is not list:
            raise misfit(self.name, tree)
        decode = self._item.decode
        try:
            items = [decode(item) for item in tree]
        except Unreadable as fault:
            raise fault.under("[]") from fault.__cause__
        if self.cls is list:
            return items
        try:
            return self.cls(items)
        except TypeError:
            raise Unreadable(f"an item of a {self.cls.__name__} is not hashable") from None


class TupleCodec(Codec):
    """``tuple[A, B, C]``."""

    kinds: frozenset[type] = frozenset({list})
    cls: type | None = tuple

    def __init__(self, items: Sequence[Codec]) -> None:
        self.name: str = f"tuple[{','.join(item.name for item in items)}]"
        self.polymorphic: bool = any(item.polymorphic for item in items)
        self._items = items

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck | None:
        checks = [check for item in self._items if (check := item.plain_check(inside)) is not None]
        if len(checks) != len(self._items):
            return None
        return lambda value: (
            type(value) is tuple
            and len(value) == len(checks)
            and all(check(item) for check, item in zip(checks, value, strict=True))
        )

    def encode(self, value: Any) -> list[Any]:
        if type(value) is not tuple or len(value) != len(self._items):
            raise wrong_type(self.name, value)
        return [_step(Refused, at, item.encode, value[at]) for at, item in enumerate(self._items)]

    def decode(self, tree: Any) -> tuple[Any, ...]:
        if type(tree) is not list or len(tree) != len(self._items):
            raise misfit(self.name, tree)
        return tuple(_step(Unreadable, at, item.decode, tree[at]) for at, item in enumerate(self._items))


def _step(fault: type[Fault], at: int, turn: Callable[[Any], Any], value: Any) -> Any:
    try:
        return turn(value)
    except fault as problem:
        raise problem.under(f"[{at}]") from problem.__cause__


class DictCodec(Codec):
    """``dict[K, V]``. Keys that are not str are written as text."""

    kinds: frozenset[type] = frozenset({dict})
    cls: type | None = dict
    natural = True

    def __init__(self, key: Codec, value: Codec) -> None:
        if key.name == "Any":
            key = ExactCodec(str)
        textual = key.kinds == {str}
        if not textual and not key.kinds <= {int, float, bool}:
            raise Refused(f"keys of type {key.name} cannot be written exactly as text")
        self.name: str = "dict" if value.name == "Any" and key.cls is str else f"dict[{key.name},{value.name}]"
        self.polymorphic: bool = value.polymorphic
        self._key = None if isinstance(key, ExactCodec) and textual else key
        self._textual = textual
        self._value = value
        self._named: bool = value.name == "Any"
        """Whether errors name keys: where nothing is declared, the path says more, and keys are mostly names."""

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck | None:
        check = self._value.plain_check(inside)
        if check is None:
            return None
        if self._key is None:
            texts = {str}
            return lambda value: (
                type(value) is dict and texts.issuperset(map(type, value)) and all(map(check, value.values()))
            )
        key_check = self._key.plain_check() if self._key.cls is int or isinstance(self._key, TextCodec) else None
        if key_check is None:
            return None
        return lambda value: type(value) is dict and all(map(key_check, value)) and all(map(check, value.values()))

    def encode(self, value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise wrong_type(self.name, value)
        encode, at = self._value.encode, None
        try:
            if self._key is None:
                if not all(type(key) is str for key in value):
                    raise keys_that_are_not_text(value)
                return {(at := key): encode(item) for key, item in value.items()}
            tree = {self._key_text(key): encode(item) for key, item in value.items()}
        except Refused as fault:
            raise fault.under(key_step(at) if self._named else "[]") from None
        if len(tree) != len(value):
            raise Refused("two keys have the same text")
        return tree

    def _key_text(self, key: Any) -> str:
        assert self._key is not None
        tree = self._key.encode(key)
        try:
            return tree if self._textual else orjson.dumps(tree).decode()
        except orjson.JSONEncodeError:
            raise Refused("a key is an integer of more than 64 bits, which JSON readers do not agree on") from None

    def decode(self, tree: Any) -> dict[Any, Any]:
        if type(tree) is not dict:
            raise misfit(self.name, tree)
        decode = self._value.decode
        try:
            if self._key is None:
                return {key: decode(item) for key, item in tree.items()}
            value = {self._key_value(key): decode(item) for key, item in tree.items()}
        except Unreadable as fault:
            raise fault.under("[]") from fault.__cause__
        if len(value) != len(tree):
            raise Unreadable(f"two keys are texts of one {self._key.name}")
        return value

    def _key_value(self, text: str) -> Any:
        assert self._key is not None
        if text.strip() != text and (not self._textual or isinstance(self._key, TextCodec)):
            raise Unreadable(f"there is white space around the text of a key of type {self._key.name}")
        if self._textual:
            return self._key.decode(text)
        try:
            return self._key.decode(orjson.loads(text))
        except orjson.JSONDecodeError:
            raise Unreadable(f"the text of a key is not a valid {self._key.name}") from None


class OptionalCodec(Codec):
    """``X | None``, the most frequent union."""

    def __init__(self, inner: Codec) -> None:
        self.name: str = f"{inner.name}|None"
        self.kinds: frozenset[type] = inner.kinds | {NULL}
        self.scalars: tuple[type, ...] = (*inner.scalars, NULL) if inner.scalars else ()
        self.polymorphic: bool = inner.polymorphic
        self._inner = inner

    def members(self) -> Sequence[Codec]:
        return (*self._inner.members(), NONE)

    def plain_types(self) -> tuple[type, ...]:
        types = self._inner.plain_types()
        return (*types, NULL) if types else ()

    def plain_check(self, inside: tuple[Codec, ...] = ()) -> PlainCheck | None:
        check = self._inner.plain_check(inside)
        return None if check is None else lambda value: value is None or check(value)

    def encode(self, value: Any) -> Any:
        return None if value is None else self._inner.encode(value)

    def decode(self, tree: Any) -> Any:
        return None if tree is None else self._inner.decode(tree)
