"""The agents that all AutoGen runtimes host. `benchmarks.peers.bare` does the same work as `Echo` without AutoGen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autogen_core import MessageContext, RoutedAgent, event, rpc

from benchmarks.work import Counter, Handled, Text, use_cpu


class Echo(RoutedAgent):
    """Replies with the message it received, and counts events."""

    def __init__(self, work_ms: float = 0) -> None:
        super().__init__("echo")
        self._work_ms = work_ms
        self._events = Counter()

    @rpc
    async def on_call(self, message: Text, ctx: MessageContext) -> Text:
        if self._work_ms:
            use_cpu(self._work_ms)
        self.keep(message)
        return message

    def keep(self, message: Text) -> None:
        """Change the agent's state for a call. This class has no state."""

    @event
    async def on_event(self, message: Text, ctx: MessageContext) -> None:
        self._events.add()

    @rpc
    async def on_handled(self, message: Handled, ctx: MessageContext) -> Handled:
        await self._events.reach(message.total)
        return message


class Keeper(Echo):
    """Its state is the text of the last call. A call with the same text does not change the state."""

    def __init__(self, work_ms: float = 0) -> None:
        super().__init__(work_ms)
        self._state: dict[str, Any] = {}

    def keep(self, message: Text) -> None:
        self._state["content"] = message.content

    async def save_state(self) -> Mapping[str, Any]:
        return self._state

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self._state = dict(state)


class Tally(Keeper):
    """Its state also contains the number of calls, so every call changes the state."""

    def keep(self, message: Text) -> None:
        super().keep(message)
        self._state["calls"] = self._state.get("calls", 0) + 1


CLASSES: dict[str, type[Echo]] = {cls.__name__: cls for cls in (Echo, Keeper, Tally)}
"""The classes by name, as in ``agent`` of `benchmarks.setup.Setup`."""
