"""A class and the classes below it: what a declared class may stand for."""

from __future__ import annotations

import weakref
from collections.abc import Sequence


def fits(cls: type, base: type) -> bool:
    try:
        return issubclass(cls, base)
    except TypeError:
        # A Protocol that is not runtime_checkable, or that has data members, cannot be checked: every class fits.
        return True


_subclasses = type.__subclasses__  # of the class itself: a metaclass may have another method of this name


class Family:
    """A class and all classes below it, at the time of this object's making."""

    __slots__ = ("_members", "_size", "only")

    def __init__(self, base: type) -> None:
        seen: dict[type, None] = {base: None}
        queue = [base]
        size = 0
        for cls in queue:
            found: list[type] = _subclasses(cls)
            size += len(found)
            for sub in found:
                if sub not in seen:
                    seen[sub] = None
                    queue.append(sub)
        self._members = [weakref.ref(cls) for cls in queue]
        self._size = size
        self.only: dict[str, type] = {}
        """The structured classes whose names no other class of the family has, as far as they were looked for."""

    def is_current(self) -> bool:
        """True if no class has been added to the family, and none has gone."""
        size = 0
        for member in self._members:
            cls = member()
            if cls is None:
                return False
            size += len(_subclasses(cls))
        return size == self._size

    def classes(self) -> Sequence[type]:
        """The classes, in the order of their definition within each class."""
        return [cls for member in self._members if (cls := member()) is not None]
