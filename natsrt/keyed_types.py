"""Keyed agent types: one live instance per ``AgentId`` over all workers, with saved state.

A type is made keyed by the decorator of its class (`keyed`), by ``register_factory(..., keyed=…)``, or by the setting
``keyed``. The argument overrides the setting, and the setting overrides the class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

from natsrt.errors import ConfigurationError
from natsrt.wire.ranges import seconds_problem

C = TypeVar("C", bound=type[Any])
F = TypeVar("F", bound=Callable[..., Any])

_MARK = "__natsrt_keyed__"
"""The attribute of a class in which `keyed` stores the options."""
_OUT_OF_TURN = "__natsrt_out_of_turn__"
"""The attribute of a handler that `out_of_turn` sets."""
_CHOICES = {"concurrency": ("serial", "concurrent"), "save": ("message", "interval", "manual")}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyedOptions:
    """The options of a keyed agent type.

    Raises:
        ConfigurationError: A value cannot be used.
    """

    concurrency: Literal["serial", "concurrent"] = "serial"
    """``serial``: an agent runs one handler at a time, in the order of its messages. A call that comes back to the
    agent along its own chain of calls runs while the handler that waits for it is suspended. ``concurrent``: handlers
    run concurrently, as those of agents that are not keyed."""
    save: Literal["message", "interval", "manual"] = "message"
    """When the state of an agent that implements ``save_state`` is stored.

    ``message``: after every message that changed it, before its reply. ``interval``: every `save_interval` seconds, and
    when the instance is released; if the worker dies, later changes are lost. ``manual``: only by
    ``runtime.store_state``."""
    save_interval: float = 5.0
    """Seconds between two saves with ``save="interval"``."""
    idle_timeout: float | None = 600.0
    """Seconds without a message after which an instance is saved, closed and dropped. The next message makes a new
    one, on any worker. None: never. With less than 1 s, a message may be on its way when the agent is released. It is
    then sent again, but no longer in order, and an event may be lost if a client subscribes to every subject
    (``nats sub '>'``)."""
    rebalance: bool = False
    """True: when another worker of the type joins, the present workers release the instances that they have, each as
    soon as it is idle; the next messages then spread the agents over all workers. False: a new worker gets a share of
    new keys only, and more on request (``natsrt agents rebalance``)."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigurationError(name, f"must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name in ("save_interval", "idle_timeout"):
            if problem := seconds_problem(getattr(self, name), or_none=name == "idle_timeout"):
                raise ConfigurationError(name, problem)
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

    ``@natsrt.keyed`` uses the defaults of `KeyedOptions`; ``@natsrt.keyed(save="interval")`` changes some of them.
    """
    options = KeyedOptions(**settings)

    def mark(decorated: C) -> C:
        setattr(decorated, _MARK, options)
        return decorated

    return mark if cls is None else mark(cls)


def keyed_options_of(cls: type[Any] | None) -> KeyedOptions | None:
    """The options that `keyed` set on ``cls`` or a base class of it; None if there are none."""
    return getattr(cls, _MARK, None)


def out_of_turn(handler: F, /) -> F:
    """Method decorator: this message handler of a keyed agent does not wait for its turn.

    It runs beside the handler that has the turn, on the same instance, and the state is not stored after it. So it can
    pause what the agent does, resume it, or tell how far it is. What it changes in the state is stored with the next
    message that takes its turn. Use it above or below AutoGen's ``message_handler``, ``rpc`` and ``event``, or
    `natsrt.streaming`. Events of durable topics and tasks take their turn nevertheless. The decorator has no effect on
    agents that are not keyed, and none in other runtimes.

    All handlers of one message type must have it, or none.
    """
    setattr(handler, _OUT_OF_TURN, True)
    return handler


def is_out_of_turn(handler: Any) -> bool:
    """True if `out_of_turn` was used on this handler."""
    return getattr(handler, _OUT_OF_TURN, False) is True
