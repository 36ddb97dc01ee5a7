"""What a user is told of JetStream's limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from natsrt.jetstream.usage import NEARLY, REACHED

Judgement = tuple[Literal["warning", "problem"], str, str]
"""The level of a finding, its text, and what to do."""

_BYTES = ("max_bytes", "max_file", "max_mem", "max_file_store", "max_memory_store")
"""The limits that are in bytes."""


def judge_usage(usage: Mapping[str, tuple[int, int]]) -> list[Judgement]:
    """A finding for each limit that is nearly reached, or reached. The others have none."""
    found: list[Judgement] = []
    for name, (used, limit) in sorted(usage.items()):
        if used < limit * NEARLY:
            continue
        owner, _, setting = name.partition(": ")
        unit = " bytes" if setting in _BYTES else ""
        text = f"{owner}: {used:,} of {limit:,}{unit} ({used / limit:.0%} of {setting})"
        advice = f"raise {setting}, or delete what is not needed: `natsrt state rm`, or streams of other programs"
        if setting == "max_consumers":
            advice = "raise max_consumers, or delete consumers of other programs: see `nats consumer ls`"
        if setting == "max_streams":
            advice = "raise max_streams, or delete streams of other programs: see `nats stream ls`"
        if used >= limit * REACHED:
            found.append(("problem", f"the limit is reached: {text}", advice))
        else:
            found.append(("warning", f"the limit is nearly reached: {text}", advice))
    return found
