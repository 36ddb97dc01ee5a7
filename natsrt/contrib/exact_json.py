"""JSON that gives back what was written, type for type. What it would change is refused when it is written.

``what`` is what is written, and ``where`` a part of it: both are for the text of `CannotSerialize`.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from natsrt.errors import CannotSerialize


def is_scalar(what: str, where: str, value: Any) -> bool:
    """True if JSON has a value that is not a list or a dict. Raises `CannotSerialize` for NaN and infinity."""
    if type(value) is float and not math.isfinite(value):
        raise CannotSerialize(what, f"{where} is {value}, which JSON does not have")
    return value is None or type(value) in (str, int, float, bool)


def check_keys(what: str, where: str, value: dict[Any, Any]) -> None:
    """Raise `CannotSerialize` if a key is no text."""
    for key in value:
        if type(key) is not str:
            raise CannotSerialize(what, f"{where} has the key {key!r:.60}; JSON has text keys only")


def too_deep(what: str, where: str) -> CannotSerialize:
    """The error for a RecursionError."""
    return CannotSerialize(what, f"{where} is nested too deeply, or contains itself")


def dump(what: str, tree: Any) -> bytes:
    """Write what was checked. Raises `CannotSerialize`."""
    try:
        return json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # a lone surrogate, which is no UTF-8, but has an escape
        return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:  # Python writes no int of so many digits
        raise CannotSerialize(what, f"it has an int of more than {sys.get_int_max_str_digits():,} digits") from None
