"""One module for each kind of trouble, found by being here. Each has a ``SCENARIO``, and its own name."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks.chaos.scenario import Scenario


def all_scenarios() -> dict[str, Scenario]:
    """Every scenario by its name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").SCENARIO for name in names}
