"""Tracing: one OpenTelemetry trace over two runtimes, from a call in one to the event that it causes in the other.

The spans are kept in memory and printed as a tree. An application would use an exporter of its tracing system instead.

Run it: python examples/tracing.py
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from autogen_core import (
    AgentId,
    DefaultTopicId,
    MessageContext,
    RoutedAgent,
    TypeSubscription,
    message_handler,
)
from local_server import local_server
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from natsrt import NatsAgentRuntime


@dataclass
class Order:
    item: str


@dataclass
class Shipped:
    item: str


class Shop(RoutedAgent):
    @message_handler
    async def order(self, message: Order, ctx: MessageContext) -> str:
        await self.publish_message(Shipped(message.item), DefaultTopicId("shipped"))
        return f"{message.item} is on its way"


class Ledger(RoutedAgent):
    def __init__(self, noted: asyncio.Event) -> None:
        super().__init__("notes what was shipped")
        self._noted = noted

    @message_handler
    async def note(self, message: Shipped, ctx: MessageContext) -> None:
        self._noted.set()


def tree(spans: list[ReadableSpan], parent: int | None = None, depth: int = 0) -> list[str]:
    """The names of the spans, each indented below its parent."""
    lines = []
    for span in sorted(spans, key=lambda span: span.start_time or 0):
        if (span.parent.span_id if span.parent else None) == parent:
            context = span.get_span_context()
            assert context is not None
            lines += ["  " * depth + span.name, *tree(spans, context.span_id, depth + 1)]
    return lines


async def main() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    noted = asyncio.Event()

    async with (
        local_server() as url,
        NatsAgentRuntime(url, tracer_provider=provider) as worker,
        NatsAgentRuntime(url, tracer_provider=provider) as caller,
    ):
        await Shop.register(worker, "shop", lambda: Shop("takes orders"))
        await Ledger.register(caller, "ledger", lambda: Ledger(noted))
        await caller.add_subscription(TypeSubscription("shipped", "ledger"))
        print(await caller.send_message(Order("lamp"), AgentId("shop", "default")))
        await noted.wait()

    spans = list(exporter.get_finished_spans())
    print("\n".join(tree(spans)))
    assert len({span.context.trace_id for span in spans if span.context}) == 1
    assert [span.name.split()[0] for span in spans].count("process") == 2


if __name__ == "__main__":
    asyncio.run(main())
