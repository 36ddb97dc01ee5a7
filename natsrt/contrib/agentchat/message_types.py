"""The message classes of AgentChat that one side knows: AutoGen's own, and those that the user names.

pydantic keeps ``StructuredMessage[T]`` only as long as somebody uses it, and natsrt finds the classes of messages among
those that are in use. So both sides hold what they were given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast
from weakref import WeakKeyDictionary

from autogen_agentchat import messages
from autogen_agentchat.messages import BaseAgentEvent, BaseChatMessage
from autogen_core import AgentRuntime, try_get_known_serializers_for_type

Message: TypeAlias = BaseAgentEvent | BaseChatMessage
MessageType: TypeAlias = type[BaseAgentEvent] | type[BaseChatMessage]


_registered: WeakKeyDictionary[AgentRuntime, set[MessageType]] = WeakKeyDictionary()
"""The classes that were registered by runtimes: natsrt decides again how it reads messages after each one."""


def _is_message_type(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, BaseAgentEvent | BaseChatMessage)


_STANDARD: Mapping[str, MessageType] = {
    name: cls
    for name, cls in vars(messages).items()
    if _is_message_type(cls) and not getattr(cls, "__abstractmethods__", None)
}


def _in_use() -> Iterator[MessageType]:
    """All message classes of this program."""
    queue: list[MessageType] = [BaseChatMessage, BaseAgentEvent]
    for cls in queue:
        found: list[Any] = cls.__subclasses__()
        yield from found
        queue += found


class MessageTypes:
    """The message classes that one side knows, by name. Iterate over those that are not AutoGen's own."""

    def __init__(self, given: Iterable[Any]) -> None:
        """``given`` are the classes beside AutoGen's own.

        Raises TypeError for what is no message class, and ValueError for two classes of one name.
        """
        self._given: dict[str, MessageType] = {}
        for cls in given:
            if not _is_message_type(cls):
                raise TypeError(
                    f"message_types must be subclasses of BaseChatMessage or BaseAgentEvent, such as "
                    f"StructuredMessage[Plan], not {cls!r:.80}"
                )
            if (other := self._given.get(cls.__name__, cls)) is not cls:
                raise ValueError(
                    f"message_types has two classes with the name {cls.__name__}, by which they are told apart: "
                    f"{other.__module__}.{other.__qualname__} and {cls.__module__}.{cls.__qualname__}"
                )
            self._hold(cls)

    def _hold(self, cls: MessageType) -> None:
        if _STANDARD.get(cls.__name__) is not cls:
            self._given[cls.__name__] = cls

    def __iter__(self) -> Iterator[MessageType]:
        return iter(self._given.values())

    def find(self, name: str) -> MessageType | None:
        """The class of this name, which may be one that the program uses elsewhere; None if it is not known."""
        found = self._given.get(name) or _STANDARD.get(name)
        if found is None and len(used := {cls for cls in _in_use() if cls.__name__ == name}) == 1:
            (found,) = used
            self._hold(found)
        return found

    def register(self, runtime: AgentRuntime) -> None:
        """Let a runtime receive messages of the classes that are not AutoGen's own."""
        registered = _registered.setdefault(runtime, set())
        for cls in self:
            if cls not in registered:
                registered.add(cls)
                runtime.add_message_serializer(try_get_known_serializers_for_type(cls))

    def dump(self, message: Message) -> dict[str, Any]:
        """A message as JSON values, with the name of its class."""
        return {"type": type(message).__name__, "message": dict(message.dump())}

    def load(self, dumped: Mapping[str, Any]) -> Message:
        """The message of `dump`. Raises ValueError if its class is not known here, or it cannot be read."""
        cls = self.find(dumped["type"])
        if cls is None:
            raise ValueError(f"the message type {dumped['type']} is not known here: name it in message_types")
        return cls.load(dumped["message"])


def produced_types(produced: Sequence[Any]) -> list[type[BaseChatMessage]]:
    """Those of an agent's produced types that are classes: it may name others, such as unions."""
    return [cast(type[BaseChatMessage], cls) for cls in produced if _is_message_type(cls)]
