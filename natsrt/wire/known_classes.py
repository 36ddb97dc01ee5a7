"""The message classes that this process knows by their type names."""

from __future__ import annotations

import threading
import weakref

__all__ = ["KnownClasses", "in_this_process"]


class KnownClasses:
    """Classes by type name, as long as something else uses them. Safe to use from several threads.

    A class that is defined again, as by a notebook cell that runs twice, takes the place of the former one: that is
    the one with the same module and qualified name.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._classes: dict[str, weakref.WeakValueDictionary[tuple[str, str], type]] = {}

    def add(self, type_name: str, cls: type) -> None:
        """Remember ``cls`` under ``type_name``."""
        with self._lock:
            named = self._classes.setdefault(type_name, weakref.WeakValueDictionary())
            named[cls.__module__, cls.__qualname__] = cls

    def only(self, type_name: str) -> type | None:
        """Return the class with this type name; None if there is none, or more than one."""
        with self._lock:
            classes = list(self._classes.get(type_name, {}).values())
        return classes[0] if len(classes) == 1 else None


in_this_process: KnownClasses = KnownClasses()
"""The classes that runtimes of this process have sent, or have registered to receive.

``SingleThreadedAgentRuntime`` hands objects over. So an agent whose handlers do not name a class may still expect its
objects, whichever runtime of this process has seen the class.
"""
