"""Leaves out what a caller has got already, when a turn that was lost in the middle is tried again."""

from __future__ import annotations

from typing import Any, Final

from autogen_agentchat.messages import BaseAgentEvent, BaseChatMessage, ModelClientStreamingChunkEvent

_OWN: Final = frozenset({"id", "created_at", "full_message_id"})
"""The fields that differ if an agent says the same thing again."""


class Repeats:
    """What the attempts of one turn have said, in order: messages and events, and beside them the chunks of a model.

    An attempt may say the same as the one before it, since nothing of that is in the state. What it repeats from the
    beginning is left out. From the first difference on, everything is new.
    """

    def __init__(self) -> None:
        self._said = _Sequence()
        self._chunks = _Sequence()

    def is_new(self, message: BaseAgentEvent | BaseChatMessage) -> bool:
        """Whether the caller is to get this. It counts as said then."""
        sequence = self._chunks if isinstance(message, ModelClientStreamingChunkEvent) else self._said
        return sequence.is_new((type(message), message.model_dump(exclude=set(_OWN))))

    def again(self) -> None:
        """Another attempt begins."""
        self._said.again()
        self._chunks.again()


class _Sequence:
    def __init__(self) -> None:
        self._items: list[Any] = []
        self._next: int | None = None
        """Which item is repeated next; None if everything is new."""

    def is_new(self, item: Any) -> bool:
        if self._next is not None and self._next < len(self._items) and self._items[self._next] == item:
            self._next += 1
            return False
        self._next = None
        self._items.append(item)
        return True

    def again(self) -> None:
        self._next = 0
