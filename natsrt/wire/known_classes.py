"""Classes by the names under which messages name them.

A class that is defined again, as by a notebook cell that runs twice, takes the place of the former one: that is the one
with the same full name (module and qualified name).
"""

from __future__ import annotations

import threading
import typing
import weakref
from collections.abc import Iterator
from typing import Any

from natsrt.wire.message_classes import full_name

__all__ = ["NO_CLASSES", "KnownClasses", "NamedClasses", "in_this_process"]


class NamedClasses:
    """Message classes by type name. Several classes may have one type name; each has a full name of its own."""

    def __init__(self) -> None:
        self._classes: dict[str, dict[str, Any]] = {}

    def __contains__(self, type_name: str) -> bool:
        return type_name in self._classes

    def __bool__(self) -> bool:
        return bool(self._classes)

    def __iter__(self) -> Iterator[Any]:
        """All classes."""
        return (cls for named in list(self._classes.values()) for cls in list(named.values()))

    def add(self, type_name: str, cls: Any) -> None:
        """Add ``cls`` under ``type_name``. It takes the place of a former definition."""
        self._classes.setdefault(type_name, {})[full_name(cls)] = cls

    def named(self, type_name: str) -> list[Any]:
        """The classes with this type name, in the order in which they were added."""
        return list(self._classes.get(type_name, {}).values())

    @property
    def names(self) -> tuple[str, ...]:
        """The type names, each once, sorted."""
        return tuple(sorted(self._classes))


NO_CLASSES = NamedClasses()
"""The message classes of an agent of which none are known. Nothing is added to it."""


class KnownClasses:
    """Classes by type name, as long as something else uses them. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._classes: dict[str, weakref.WeakValueDictionary[str, type]] = {}
        self._former: weakref.WeakSet[type] = weakref.WeakSet()
        """Definitions whose place others have taken. They stay in use, but do not come back."""
        self.version: int = 0
        """Increased by each class that is added."""
        self._told: weakref.WeakSet[Any] = weakref.WeakSet()

    def add(self, type_name: str, cls: type) -> bool:
        """Remember ``cls`` under ``type_name``. Return True if it takes the place of a former definition."""
        cls = typing.get_origin(cls) or cls
        with self._lock:
            named = self._classes.setdefault(type_name, weakref.WeakValueDictionary())
            former = named.get(full_name(cls))
            if former is cls or cls in self._former:
                return False
            named[full_name(cls)] = cls
            self.version += 1
            if former is None:
                return False
            self._former.add(former)
            told = list(self._told)
        for one in told:
            one.forget_senders()
        return True

    def tell(self, serialization: Any) -> None:
        """Call ``forget_senders`` of ``serialization`` whenever a class takes the place of another one."""
        with self._lock:
            self._told.add(serialization)

    def named(self, type_name: str) -> list[type]:
        """The classes with this type name."""
        with self._lock:
            return list(self._classes.get(type_name, {}).values())

    def find(self, type_name: str, class_name: str) -> type | None:
        """Return the class with this type name and this full name; None if there is none."""
        with self._lock:
            named = self._classes.get(type_name)
            return None if named is None else named.get(class_name)


in_this_process: KnownClasses = KnownClasses()
"""The classes that runtimes of this process have sent, have registered to receive, or have found in such classes.

``SingleThreadedAgentRuntime`` hands objects over. So an agent whose handlers do not name a class may still expect its
objects, whichever runtime of this process has seen the class.
"""
