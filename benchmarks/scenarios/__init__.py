"""One module per capability, found by being here. Each has ``scenarios(short)``, which lists its scenarios."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks.harness import Scenario


def all_scenarios(*, short: bool) -> list[Scenario]:
    """Every scenario of every module, in the order of the modules' names."""
    found: list[Scenario] = []
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        found += importlib.import_module(f"{__name__}.{module}").scenarios(short)
    return found
