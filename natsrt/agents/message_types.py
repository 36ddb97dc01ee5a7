"""The message types of an agent class, as AutoGen's decorators declare them."""

from __future__ import annotations

import traceback
from types import FrameType
from typing import Any, NamedTuple

from autogen_core import RoutedAgent

from natsrt.errors import CannotSerialize
from natsrt.keyed_types import is_out_of_turn
from natsrt.wire.message_classes import type_name_of
from natsrt.wire.serialization import serializer_for


class MessageTypes(NamedTuple):
    """The message types of an agent class, each listed once. ``object`` stands for Any."""

    handled: list[type[Any]]
    """The types that its handlers accept."""
    produced: list[type[Any]]
    """The types that its handlers return."""
    out_of_turn: list[type[Any]]
    """The types whose handlers do not wait for their turn (`natsrt.out_of_turn`)."""


def message_types_of(cls: type[Any]) -> MessageTypes:
    """Return the message types of the handlers of a `RoutedAgent` class. The lists are empty for any other class.

    Raises TypeError if some handlers of one type are out of turn and others are not.
    """
    handled: list[type[Any]] = []
    produced: list[type[Any]] = []
    waits: dict[type[Any], bool] = {}
    if issubclass(cls, RoutedAgent):
        for name in dir(cls):
            handler: Any = getattr(cls, name, None)
            if getattr(handler, "is_message_handler", False):
                for message_type in map(_without_any_type, handler.target_types):
                    handled.append(message_type)
                    if waits.setdefault(message_type, not is_out_of_turn(handler)) is is_out_of_turn(handler):
                        which = f"the handlers of {shown_name(message_type)} in {cls.__name__}"
                        raise TypeError(f"{which} must all be out of turn, or none")
                produced += map(_without_any_type, handler.produces_types)
    out_of_turn = [message_type for message_type, its_turn in waits.items() if not its_turn]
    return MessageTypes(list(dict.fromkeys(handled)), list(dict.fromkeys(produced)), out_of_turn)


def _without_any_type(message_type: Any) -> type[Any]:
    """Return ``object`` for AutoGen's private class that stands for Any; any other type unchanged."""
    is_any = getattr(message_type, "__name__", "") == "AnyType" and message_type.__module__.startswith("autogen_core.")
    return object if is_any else message_type


def shown_name(message_type: type[Any]) -> str:
    """Return the name of a message type in the registry and in errors."""
    return "Any" if message_type is object else type_name_of(message_type)


def explain_refused_types(error: BaseException) -> None:
    """Add a note to the error of an ``Agent.register`` that refuses a message type which natsrt accepts.

    AutoGen's ``register`` looks for its own serializers, which exist for few types. Any other error stays as it is.
    """
    refused = next(
        (frame.f_locals["cls"] for frame, _ in traceback.walk_tb(error.__traceback__) if _looks_for_serializers(frame)),
        None,
    )
    if refused is None or not _all_travel(message_types_of(refused).handled):
        return
    name = refused.__name__
    note = f"AutoGen's {name}.register does not accept this message type; natsrt.register(runtime, {name}, …) does"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def _all_travel(types: list[type[Any]]) -> bool:
    try:
        for message_type in types:
            if message_type is not object:
                serializer_for(message_type)
    except CannotSerialize:
        return False
    return True


def _looks_for_serializers(frame: FrameType) -> bool:
    own = frame.f_code.co_name == "_handles_types" and "cls" in frame.f_locals
    return own and str(frame.f_globals.get("__name__")).startswith("autogen_core.")
