"""Keyed agent types: one live instance per ``AgentId`` over all workers, with saved state.

A type is keyed by its class (`keyed`), by ``register_factory(..., keyed=…)``, or by the setting ``keyed``; what comes
first in the list *argument, setting, class* decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

from natsrt.errors import ConfigurationError

C = TypeVar("C", bound=type[Any])

_MARK = "__natsrt_keyed__"
_CHOICES = {"concurrency": ("serial", "concurrent"), "save": ("message", "interval", "manual")}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyedOptions:
    """How a keyed agent type behaves.

    Raises ConfigurationError for a value that cannot be used.
    """

    concurrency: Literal["serial", "concurrent"] = "serial"
    """``serial``: one handler of an agent at a time, in the order of the messages; a call that comes back along the
    agent's own call chain runs inside the handler that waits for it. ``concurrent``: as other agents do."""
    save: Literal["message", "interval", "manual"] = "message"
    """When the state of an agent that implements ``save_state`` is stored.

    ``message``: after every message that changed it, before its reply. ``interval``: every `save_interval` seconds, and
    when the instance is released; what changed since is lost with a worker. ``manual``: by ``runtime.store_state``
    only."""
    save_interval: float = 5.0
    """Seconds between two saves with ``save="interval"``."""
    idle_timeout: float | None = 600.0
    """Seconds without a message after which an instance is saved, closed and forgotten. The next message makes it
    again, on any worker. None: never. Below 1 s a message may be on its way when the agent is released; it is then sent
    again, but no longer in order, and an event beside a tap (``nats sub '>'``) may be lost."""
    rebalance: bool = False
    """Whether workers release the instances that they had when another worker of the type joined, as soon as these are
    idle; their next messages then spread over all. Otherwise a new worker gets its share of new keys, and more on
    request (``natsrt agents rebalance``)."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigurationError(name, f"must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name in ("save_interval", "idle_timeout"):
            value = getattr(self, name)
            if value is None and name == "idle_timeout":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ConfigurationError(name, f"must be a number of seconds above 0, not {value!r}")
        if not isinstance(self.rebalance, bool):
            raise ConfigurationError("rebalance", f"must be true or false, not {self.rebalance!r}")


@overload
def keyed(cls: C, /) -> C: ...
@overload
def keyed(
    *,
    concurrency: Literal["serial", "concurrent"] = ...,
    save: Literal["message", "interval", "manual"] = ...,
    save_interval: float = ...,
    idle_timeout: float | None = ...,
    rebalance: bool = ...,
) -> Callable[[C], C]: ...
def keyed(cls: Any = None, /, **settings: Any) -> Any:
    """Class decorator: agents of this class are keyed wherever the class is registered.

    ``@natsrt.keyed`` takes the defaults of `KeyedOptions`, ``@natsrt.keyed(save="interval")`` changes some.
    """
    options = KeyedOptions(**settings)

    def mark(decorated: C) -> C:
        setattr(decorated, _MARK, options)
        return decorated

    return mark if cls is None else mark(cls)


def keyed_options_of(cls: type[Any] | None) -> KeyedOptions | None:
    """What `keyed` said of ``cls`` or a base of it; None where it said nothing."""
    return getattr(cls, _MARK, None)
