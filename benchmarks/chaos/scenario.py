"""Scenarios and their figures."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Value = float | str | Sequence[str] | Mapping[str, int] | None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure, with the bounds that natsrt promises.

    Args:
        name: Description, unique within the scenario.
        value: The figure. None: it did not happen, or not in time.
        unit: Unit of the value; empty for counts.
        at_least: Lower bound that natsrt promises. If both bounds are None, the figure is shown without a promise.
        at_most: Upper bound that natsrt promises.
    """

    name: str
    value: Value
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def promised(self) -> bool:
        """Whether there is a bound."""
        return self.at_least is not None or self.at_most is not None

    @property
    def kept(self) -> bool:
        """Whether the promise was kept; true if nothing is promised."""
        if not self.promised:
            return True
        return (
            isinstance(self.value, int | float)
            and (self.at_least is None or self.value >= self.at_least)
            and (self.at_most is None or self.value <= self.at_most)
        )

    @property
    def bound(self) -> str:
        """The promise as text; empty if there is none."""
        if self.at_least is not None and self.at_least == self.at_most:
            return f"= {self.at_least:g}"
        lower = "" if self.at_least is None else f"≥ {self.at_least:g}"
        upper = "" if self.at_most is None else f"≤ {self.at_most:g}"
        return " ".join(filter(None, (lower, upper)))

    def to_json(self) -> dict[str, Any]:
        """Return the figure as plain values."""
        return {
            "name": self.name,
            "value": dict(self.value) if isinstance(self.value, Mapping) else self.value,
            "unit": self.unit,
            "at_least": self.at_least,
            "at_most": self.at_most,
            "kept": self.kept,
        }


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One kind of failure.

    Args:
        title: Description for readers.
        measure: Causes the failure and returns the figures. If its argument is true, it uses less load and fewer
            processes, with the same failures.
    """

    title: str
    measure: Callable[[bool], Coroutine[Any, Any, Sequence[Figure]]]


@dataclass(frozen=True, kw_only=True)
class Timed(Scenario):
    """A scenario that goes on for as long as asked, with failures that a seed decides.

    Args:
        measure_for: Causes failures for a number of seconds, with a seed, and returns the figures.
    """

    measure_for: Callable[[float, int], Coroutine[Any, Any, Sequence[Figure]]]


@dataclass(frozen=True, kw_only=True)
class Repeated(Scenario):
    """A scenario that consists of runs, each with failures that a seed decides.

    Args:
        measure_runs: Carries out a number of runs, with a seed, and returns the figures.
    """

    measure_runs: Callable[[int, int], Coroutine[Any, Any, Sequence[Figure]]]


def broken(figures: Sequence[Figure]) -> list[str]:
    """Return the promises that were not kept, one line each."""
    return [f"{figure.name}: {figure.value} {figure.unit}, not {figure.bound}" for figure in figures if not figure.kept]


def under(heading: str, figures: Sequence[Figure]) -> list[Figure]:
    """Return the figures with a heading before their names."""
    return [replace(figure, name=f"{heading}: {figure.name}") for figure in figures]


def slowest(moments: Sequence[float | None], since: float) -> float | None:
    """Return the seconds from ``since`` to the last of the moments; None if there are none or any of them is None."""
    came = [moment for moment in moments if moment is not None]
    return max(came) - since if came and len(came) == len(moments) else None
