"""Message classes: which classes can be messages, and their names on the wire."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

from autogen_core import FunctionCall, Image
from google.protobuf.message import Message  # type: ignore[import-untyped]
from pydantic import BaseModel

__all__ = [
    "BUILTIN_NAMES",
    "PLAIN",
    "builtin_class",
    "full_name",
    "is_message_class",
    "is_plain",
    "is_protobuf",
    "is_structured",
    "neighbours",
    "present_definition",
    "type_name_of",
]

_MODULE: Any = type.__dict__["__module__"]
_MODEL_METACLASS: Any = type(BaseModel)

PLAIN: tuple[type, ...] = (str, int, float, bool, bytes, list, dict, type(None))
"""The classes whose values are messages without fields."""


def type_name_of(cls: Any) -> str:
    """Return the name of a message class on the wire.

    As in AutoGen, this is the class's ``__name__``, or the full name of a protobuf message. For NoneType it is
    ``None``, for a generic alias such as ``list[str]`` the name of its class (``list``), and for ``Any`` it is ``Any``.
    """
    cls = typing.get_origin(cls) or cls
    if cls is type(None):
        return "None"
    if is_protobuf(cls):
        return str(cls.DESCRIPTOR.full_name)
    return str(getattr(cls, "__name__", cls))


def full_name(cls: Any) -> str:
    """Return the module and the qualified name of a class, as ``orders.messages.Request``.

    Two classes with the same full name are two definitions of one class, as by a notebook cell that runs twice. A
    parametrised Pydantic model has the full names of its parameters in its own: ``pages.Page[orders.messages.Item]``.
    """
    cls = typing.get_origin(cls) or cls
    if isinstance(cls, _MODEL_METACLASS):
        generic = cls.__pydantic_generic_metadata__
        if generic["origin"] is not None:
            return f"{full_name(generic['origin'])}[{', '.join(map(_argument, generic['args']))}]"
    return f"{getattr(cls, '__module__', '')}.{getattr(cls, '__qualname__', cls)}"


def _argument(hint: Any) -> str:
    """The name of a type argument, with the full names of the classes in it. It is the same in every process."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _argument(args[0])  # metadata may have no text that is the same everywhere
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, args))}]"
    if origin is typing.Union or origin is types.UnionType:
        return f"Union[{', '.join(map(_argument, args))}]"
    if origin is not None:
        return f"{_argument(origin)}[{', '.join(map(_argument, args))}]"
    if hint is None or hint is type(None):
        return "NoneType"
    if isinstance(hint, list | tuple):  # the parameters of a Callable
        return f"[{', '.join(map(_argument, hint))}]"
    if not isinstance(hint, type | typing.NewType | typing.TypeVar):
        return "..." if hint is Ellipsis else getattr(hint, "__name__", None) or repr(hint)
    if hint is Any or hint.__module__ == "builtins" or isinstance(hint, typing.TypeVar):
        return hint.__name__
    return full_name(hint)


def is_protobuf(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, Message)


def is_plain(cls: Any) -> bool:
    """True for the classes of `PLAIN`, and for generic aliases of them such as ``list[str]``."""
    return (typing.get_origin(cls) or cls) in PLAIN


def is_structured(cls: Any) -> bool:
    """True for dataclasses, Pydantic models and ``Image``, which ``"$type"`` may name."""
    cls = typing.get_origin(cls) or cls
    return isinstance(cls, type) and (is_dataclass(cls) or issubclass(cls, BaseModel | Image) and cls is not BaseModel)


def is_message_class(cls: Any) -> bool:
    return is_structured(cls) or is_protobuf(cls)


_BUILTIN: dict[str, type] = {type_name_of(cls): cls for cls in (*PLAIN, Image, FunctionCall)}
_TOOL_RESULT = "FunctionExecutionResult"
BUILTIN_NAMES = frozenset({*_BUILTIN, _TOOL_RESULT})
"""The type names that can always be received, unless the user has registered a class under one of them."""


def builtin_class(type_name: str) -> type | None:
    """The class of one of `BUILTIN_NAMES`; None for any other name."""
    if type_name == _TOOL_RESULT:
        # Imported on first use, because it also imports AutoGen's models and tools, which would slow every start.
        from autogen_core.models import FunctionExecutionResult

        return FunctionExecutionResult
    return _BUILTIN.get(type_name)


def neighbours(cls: Any, type_name: str) -> list[type]:
    """The message classes named ``type_name`` in the module that defines ``cls``. Nothing is imported."""
    module = sys.modules.get(getattr(cls, "__module__", ""))
    if module is None:
        return []
    found = (one for one in _classes_in(vars(module), module.__name__) if is_message_class(one))
    return list(dict.fromkeys(one for one in found if type_name_of(one) == type_name))


def _classes_in(names: typing.Mapping[str, Any], module: str) -> Iterator[type]:
    """The classes among the values of a namespace, and those inside the classes that ``module`` defines."""
    queue, seen = [names], set()
    for namespace in queue:
        for value in list(namespace.values()):
            if issubclass(type(value), type) and value not in seen:  # isinstance() would wake proxies
                seen.add(value)
                yield value
                if _MODULE.__get__(value) == module:  # a metaclass may have an attribute of this name that raises
                    queue.append(vars(value))


def present_definition(cls: Any) -> Any:
    """Return what the module of ``cls`` has under its qualified name, if that is a class of the same full name.

    It is ``cls`` itself, or a later definition of it. None if the module does not have one.
    """
    if isinstance(cls, _MODEL_METACLASS) and (origin := cls.__pydantic_generic_metadata__["origin"]) is not None:
        return cls if present_definition(origin) is origin else None
    found: Any = sys.modules.get(getattr(cls, "__module__", ""))
    for step in getattr(cls, "__qualname__", "").split("."):
        try:
            found = vars(found)[step]
        except (TypeError, KeyError):
            return None
    return found if is_message_class(found) and full_name(found) == full_name(cls) else None
