"""Tracing as in production, except that the exporter sends nothing."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased


class _Discard(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def discarding_provider(sampled: float) -> TracerProvider:
    """Exports in batches; ``sampled`` is the share of traces that are. Shuts itself down with the process."""
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(sampled)))
    # The queue is long enough that no span is dropped, which would be cheaper than exporting it.
    provider.add_span_processor(BatchSpanProcessor(_Discard(), max_queue_size=100_000))
    return provider
