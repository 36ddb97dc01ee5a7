"""Tracing as in production, but with an exporter that discards the spans."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased


class _Discard(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def discarding_provider(sampled: float) -> TracerProvider:
    """Return a provider that exports spans in batches and discards them. It shuts down with the process.

    Args:
        sampled: Share of traces that are sampled, from 0 to 1.
    """
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(sampled)))
    # The queue is long enough that no span is dropped: dropping would be cheaper than exporting.
    provider.add_span_processor(BatchSpanProcessor(_Discard(), max_queue_size=100_000))
    return provider
