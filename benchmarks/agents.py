"""The agent of all AutoGen runtimes; `benchmarks.peers.bare` does the same without AutoGen."""

from __future__ import annotations

from autogen_core import MessageContext, RoutedAgent, event, rpc

from benchmarks.work import Counter, Handled, Text, use_cpu


class Echo(RoutedAgent):
    """Answers with what it got, and counts events."""

    def __init__(self, work_ms: float = 0) -> None:
        super().__init__("echo")
        self._work_ms = work_ms
        self._events = Counter()

    @rpc
    async def on_call(self, message: Text, ctx: MessageContext) -> Text:
        if self._work_ms:
            use_cpu(self._work_ms)
        return message

    @event
    async def on_event(self, message: Text, ctx: MessageContext) -> None:
        self._events.add()

    @rpc
    async def on_handled(self, message: Handled, ctx: MessageContext) -> Handled:
        await self._events.reach(message.total)
        return message
