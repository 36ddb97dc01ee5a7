"""Finds the class that a message names: its own (``messagetype``) or that of a value in it (``"$type"``).

The plain name of a class is sought in steps. The first step that knows a class of this name decides, so that a name
means what the nearest code means by it:

1. the module of the class of the message that the value is in;
2. the ``reply_type`` that the caller has given;
3. the registered classes;
4. AutoGen's own messages;
5. the classes that handlers known here return;
6. the module of the class of the message that a reply answers;
7. the modules of the registered classes, and of those that handlers known here return;
8. all classes that this process knows.

The full name of a class, if the message has it, decides before all of that, at whichever step the class is known.
A full name that no step knows does not count: the sender may have a class of its own for the same messages. Nothing is
imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from natsrt.wire.known_classes import NamedClasses, in_this_process
from natsrt.wire.message_classes import builtin_class, full_name, neighbours, present_definition, type_name_of

__all__ = ["ClassFinder", "Scope"]


@dataclass(frozen=True, slots=True, eq=False)
class Scope:
    """What is known about a message when the classes in it are sought. None: not known."""

    own: Any = None
    """The class of the message."""
    sent: Any = None
    """The class of the message that it answers."""
    wanted: Any = None
    """The class that the caller has asked for."""


class ClassFinder:
    """The classes that one runtime can find by name."""

    def __init__(self) -> None:
        self.registered: NamedClasses = NamedClasses()
        self.produced: NamedClasses = NamedClasses()
        """The classes that handlers known here return."""
        self.scope: Scope = Scope()
        """The scope of the message that is being written or read."""
        self._changes = 0

    @property
    def version(self) -> int:
        """A number that grows whenever a name may be found otherwise than before."""
        return self._changes + in_this_process.version

    def register(self, type_name: str, cls: Any) -> None:
        self.registered.add(type_name, cls)
        self._changes += 1

    def produce(self, type_name: str, cls: Any) -> None:
        self.produced.add(type_name, cls)
        self._changes += 1

    def steps(self, type_name: str, scope: Scope) -> Iterator[list[Any]]:
        """The classes of this type name that each step knows."""
        if scope.own is not None:
            yield neighbours(scope.own, type_name)
        if scope.wanted is not None:
            yield [scope.wanted] if type_name_of(scope.wanted) == type_name else []
        yield self._present(type_name, self.registered)
        builtin = builtin_class(type_name)
        yield [] if builtin is None else [builtin]
        yield self._present(type_name, self.produced)
        if scope.sent is not None:
            yield neighbours(scope.sent, type_name)
        yield self._beside(type_name)
        yield list(map(_present, in_this_process.named(type_name)))

    def _present(self, type_name: str, classes: NamedClasses) -> list[Any]:
        return [_present(in_this_process.find(type_name, full_name(cls)) or cls) for cls in classes.named(type_name)]

    def _beside(self, type_name: str) -> list[type]:
        modules = {getattr(cls, "__module__", ""): cls for cls in (*self.registered, *self.produced)}
        return list(dict.fromkeys(found for cls in modules.values() for found in neighbours(cls, type_name)))


def _present(cls: Any) -> Any:
    return present_definition(cls) or cls
