"""What a factory needs to be called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def required_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a function or class that have no default; ``*args`` and ``**kwargs`` do not count.

    Raises TypeError or ValueError if they cannot be read, as of some that are written in C.
    """
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
