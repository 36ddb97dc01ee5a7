"""Modules of the user that have the name of another module, and so hide it or are hidden by it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path
from types import ModuleType

_LOOK_AT_MOST = 20
"""Exceptions of one chain that are examined."""


def refused_name(name: str, app_dir: Path) -> str | None:
    """Why the module ``name`` of ``app_dir`` cannot be loaded under its name, and what to do; None if it can.

    A module with the name of one of Python's own is always refused: even if it could be loaded, whatever imports
    Python's module later would get this one.
    """
    top = name.partition(".")[0]
    own = _own(top, app_dir)
    if own is None or own.is_dir():
        return None
    loaded = sys.modules.get(top)
    if top in sys.stdlib_module_names or (loaded is not None and not _is_from(loaded, own)):
        return conflict(name, app_dir)
    return None


def conflict(name: str, app_dir: Path) -> str | None:
    """Which module of ``app_dir`` and which other one have the same name, and what to do; None if there is only one.

    For a name with dots, this is about its first part.
    """
    top = name.partition(".")[0]
    own = _own(top, app_dir)
    if own is None:
        return None
    renamed = f"rename {_shown(own)}"
    loaded = sys.modules.get(top)
    if loaded is not None and not _is_from(loaded, own):
        if own.is_dir() and top not in sys.stdlib_module_names:
            renamed = f"{renamed}, or add an __init__.py to it"
        return f"{top!r} was loaded from {_place(loaded)}, and {own} was not: {renamed}"
    other = _elsewhere(top, app_dir)
    return None if other is None else f"{own} has the same name as {other}, and hides it: {renamed}"


def conflict_behind(error: BaseException, app_dir: Path) -> str | None:
    """The `conflict` that explains why an import, or the use of an imported module, failed; None if there is none."""
    for name in _modules_in(error):
        if (found := conflict(name, app_dir)) is not None:
            return found
    return None


def loaded_from(name: str, app_dir: Path) -> str | None:
    """The file from which ``name`` was loaded, if it is not in ``app_dir``; else None."""
    module = sys.modules.get(name)
    return None if module is None or _is_from(module, app_dir) else _place(module)


def _modules_in(error: BaseException) -> Iterator[str]:
    """The modules that an exception, or one that it followed from, is about."""
    left: list[BaseException | None] = [error]
    for _ in range(_LOOK_AT_MOST):
        if not left:
            return
        present = left.pop(0)
        if isinstance(present, ImportError) and present.name:
            yield present.name
        elif isinstance(present, AttributeError) and isinstance(present.obj, ModuleType):
            yield present.obj.__name__
        if present is not None:
            left += [present.__cause__, present.__context__]


def _own(top: str, app_dir: Path) -> Path | None:
    """The file of a module in ``app_dir``, or its folder if that is a namespace package; None if it has none."""
    places = (app_dir / top / "__init__.py", app_dir / f"{top}.py", app_dir / top)
    return next((place for place in places if place.exists()), None)


def _shown(own: Path) -> Path:
    """What the user would have to rename."""
    return own.parent if own.name == "__init__.py" else own


def _files(module: ModuleType) -> list[Path]:
    """The file of a module; the folders of a namespace package; nothing for one that is built into Python."""
    file = getattr(module, "__file__", None)
    return [Path(place).resolve() for place in ([file] if file else getattr(module, "__path__", ()))]


def _is_from(module: ModuleType, place: Path) -> bool:
    """Whether a module was loaded from a file or a folder."""
    folder = _shown(place).resolve()
    return any(file == folder or file.is_relative_to(folder) for file in _files(module))


def _place(module: ModuleType) -> str:
    return ", ".join(map(str, _files(module))) or "Python itself, where it is built in"


def _elsewhere(top: str, app_dir: Path) -> str | None:
    """Where else a module of this name is; None if nowhere."""
    if BuiltinImporter.find_spec(top) is not None or FrozenImporter.find_spec(top) is not None:
        return f"Python's own module {top!r}"
    path = [entry for entry in sys.path if Path(entry).resolve() != app_dir]
    spec = PathFinder.find_spec(top, path)
    if spec is None or spec.origin is None:  # a folder elsewhere is no module that one could miss
        return None
    return f"Python's own {spec.origin}" if top in sys.stdlib_module_names else spec.origin
