"""One module for each kind of failure. Every module here is loaded; its ``SCENARIO`` has the name of the module."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks.chaos.scenario import Scenario


def all_scenarios() -> dict[str, Scenario]:
    """Return every scenario by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").SCENARIO for name in names}
