"""Keyed agent types: one live instance per ``AgentId`` over all workers, with saved state.

A type is keyed by its class (`keyed`), by ``register_factory(..., keyed=…)``, or by the setting ``keyed``. The argument
takes precedence over the setting, and the setting over the class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

from natsrt.errors import ConfigurationError

C = TypeVar("C", bound=type[Any])

_MARK = "__natsrt_keyed__"
"""The attribute of a class in which `keyed` stores the options."""
_CHOICES = {"concurrency": ("serial", "concurrent"), "save": ("message", "interval", "manual")}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyedOptions:
    """How a keyed agent type behaves. Use the same options on every worker; workers do not synchronise them.

    Raises ConfigurationError for a value that cannot be used.
    """

    concurrency: Literal["serial", "concurrent"] = "serial"
    """``serial``: an agent runs one handler at a time, in the order of its messages. If something that its handler
    called calls the agent back, that call is handled at once, while the handler waits. ``concurrent``: the handlers of
    an agent may run at the same time, as those of agents that are not keyed do."""
    save: Literal["message", "interval", "manual"] = "message"
    """When the state of an agent that implements ``save_state`` is stored.

    ``message``: after every message that changed it, before the reply is sent. ``interval``: every `save_interval`
    seconds, and when the instance is released; if the worker dies, changes since the last save are lost. ``manual``: by
    ``runtime.store_state`` only."""
    save_interval: float = 5.0
    """Seconds between two saves with ``save="interval"``."""
    idle_timeout: float | None = 600.0
    """Seconds without a message after which an instance is saved, closed and forgotten; None: an instance is never
    released for being idle. The next message makes the instance again, on any worker. With less than 1 s, a message may
    be under way while the agent is released. It is then sent again, but possibly out of order; and an event may be lost
    while another program listens to all subjects (``nats sub '>'``)."""
    rebalance: bool = False
    """Whether workers release the instances that they have when another worker of the type joins, each as soon as it is
    idle. The next message of such an agent then goes to any of the workers. If False, a worker that joins gets its
    share of new keys, and of existing ones on request (``natsrt agents rebalance``)."""

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
    """Class decorator: makes the agent types of this class keyed, wherever the class is registered.

    ``@natsrt.keyed`` uses the defaults of `KeyedOptions`. ``@natsrt.keyed(save="interval")`` changes some of them.

    Args:
        cls: The class, if the decorator is used without arguments.
        settings: Fields of `KeyedOptions`.

    Raises ConfigurationError for a value that cannot be used, and TypeError for a field that does not exist.
    """
    options = KeyedOptions(**settings)

    def mark(decorated: C) -> C:
        setattr(decorated, _MARK, options)
        return decorated

    return mark if cls is None else mark(cls)


def keyed_options_of(cls: type[Any] | None) -> KeyedOptions | None:
    """The options that the decorator `keyed` gave to ``cls`` or a base of it; None if it was not used."""
    return getattr(cls, _MARK, None)
