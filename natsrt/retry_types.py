"""How often, and after which delays, events of durable topics are tried again."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from natsrt.errors import ConfigurationError
from natsrt.wire.ranges import seconds_problem, whole_problem


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryOptions:
    """How the events of durable topics are tried again, for one agent type. Times are in seconds.

    Raises:
        ConfigurationError: A value cannot be used.
    """

    retry_delay: float = 1.0
    """Seconds between the first attempt that failed and the next one. Each further delay is twice as long."""
    retry_delay_max: float = 60.0
    """The longest delay between two attempts, in seconds."""
    max_deliver: int = 5
    """Number of attempts. After the last one that failed, the event becomes a dead letter."""

    def __post_init__(self) -> None:
        for name in ("retry_delay", "retry_delay_max"):
            if problem := seconds_problem(getattr(self, name)):
                raise ConfigurationError(name, problem)
        if problem := whole_problem(self.max_deliver):
            raise ConfigurationError("max_deliver", problem)

    def delay(self, attempt: int) -> float:
        """Return the seconds between ``attempt``, counted from 1, and the next one."""
        doublings = min(attempt - 1, 64)  # more would be too large for a float
        return min(self.retry_delay * 2.0**doublings, self.retry_delay_max)


RETRY_FIELDS: Final = tuple(field.name for field in fields(RetryOptions))
"""The options of `RetryOptions`."""
