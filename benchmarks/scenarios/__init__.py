"""One module per capability. Every module here is loaded and has ``scenarios(short)``, which yields its scenarios."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks.harness import Scenario


def all_scenarios(*, short: bool) -> list[Scenario]:
    """Return every scenario of every module, in the order of the modules' names.

    Args:
        short: Whether to use smaller sizes, to check correctness only.
    """
    found: list[Scenario] = []
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        found += importlib.import_module(f"{__name__}.{module}").scenarios(short)
    return found
