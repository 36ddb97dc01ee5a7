"""OpenTelemetry spans for calls and events, in one trace across all processes.

============================ ========= ============================================== ==============================
span                         kind      covers                                         the HTTP runtime's name
============================ ========= ============================================== ==============================
``send agent.<type>``        CLIENT    a call, from ``send_message`` to its end       ``agent.call``
``publish topic.<type…>``    PRODUCER  encoding and publishing an event               ``agent.publish``
``receive <subject>``        CONSUMER  from the arrival to the start of the handler   –
``process agent.<type>``     CONSUMER  the handler                                    ``agent.call`` on the worker
============================ ========= ============================================== ==============================

Attributes follow OpenTelemetry's messaging conventions (``messaging.system``, ``messaging.operation.name`` and
``.type``, ``messaging.destination.name``, ``messaging.message.id``, ``messaging.message.body.size``, ``error.type``),
and add ``natsrt.agent.type``, ``natsrt.agent.key``, ``natsrt.message.type`` and ``natsrt.worker.id``.

The trace context is sent in the CloudEvents extensions ``traceparent`` and ``tracestate`` (CloudEvents distributed
tracing extension, W3C Trace Context). Without a provider none of this code runs.

If the parent context is not sampled, and the description of the provider's sampler shows that it would drop the span,
no span is created and the context is passed on unchanged. This is the case for OpenTelemetry's default sampler. For any
other sampler all spans are created, and the sampler decides.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from autogen_core import AgentId
from opentelemetry import trace
from opentelemetry.context import Context, attach
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from natsrt.wire.envelope import attribute
from natsrt.wire.exception_parts import class_name

_DISABLE = "AUTOGEN_DISABLE_RUNTIME_TRACING"
_propagator = TraceContextTextMapPropagator()
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
"""A ``traceparent`` of version 00 of Trace Context. Reading it with this pattern takes a third of the time that the
propagator takes."""


class _Covering:
    """A context manager that ends a span when its block ends, and records an error if the block raised.

    ``as`` gives the trace context as envelope attributes.
    """

    __slots__ = ("_carrier", "_span")

    def __init__(self, span: Span, carrier: str = "") -> None:
        self._span = span
        self._carrier = carrier

    def __enter__(self) -> str:
        return self._carrier

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, origin: TracebackType | None
    ) -> None:
        if error is not None:
            _fail(self._span, error)
        self._span.end()


class Telemetry:
    """The tracer of one runtime."""

    def __init__(self, provider: TracerProvider, worker_id: str) -> None:
        self._tracer = provider.get_tracer("natsrt")
        self._worker_id = worker_id
        self._follows = _follows_parents(provider)

    def sending(
        self, operation: str, destination: str, *, kind: SpanKind, message_type: str, message_id: str, size: int
    ) -> _Covering:
        """Return a context manager for a span around a send.

        ``as`` gives the trace context as envelope attributes with a leading comma; ``""`` if there is no context.
        """
        span = trace.get_current_span()
        if not self._is_left_out(span.get_span_context()):
            attributes = self._attributes(operation, "send", destination, message_id, size)
            attributes["natsrt.message.type"] = message_type
            span = self._tracer.start_span(f"{operation} {destination}", kind=kind, attributes=attributes)
            return _Covering(span, _carrier(span.get_span_context()))
        return _Covering(trace.INVALID_SPAN, _carrier(span.get_span_context()))

    def continued(self, envelope: Mapping[str, Any]) -> Context | None:
        """Return the context of a message's sender, for `processing`; None if no span is to be created for the message.

        Call it in the handler's task: if it returns None, it has made the sender's context the current one.
        """
        remote = _remote(envelope)
        if remote is None:
            return Context()
        context = trace.set_span_in_context(NonRecordingSpan(remote), Context())
        if self._is_left_out(remote):
            attach(context)
            return None
        return context

    def processing(
        self,
        context: Context,
        envelope: Mapping[str, Any],
        *,
        subject: str,
        destination: str,
        agent: AgentId,
        message_type: str,
        size: int,
        arrived: float,
    ) -> _Covering:
        """Record a receive span that ends now, and return a context manager for a process span around the handler.

        The process span is current until the end of the task. ``arrived`` is when the message arrived, in seconds by
        the clock of the event loop. ``size`` is in bytes.
        """
        message_id = str(envelope.get("id", ""))
        now, waited = time.time_ns(), asyncio.get_running_loop().time() - arrived
        receive = self._tracer.start_span(
            f"receive {subject}",
            context=context,
            kind=SpanKind.CONSUMER,
            attributes=self._attributes("receive", "receive", subject, message_id, size),
            start_time=now - int(waited * 1e9),
        )
        receive.end(now)
        attributes = self._attributes("process", "process", destination, message_id, size)
        attributes["natsrt.agent.type"] = agent.type
        attributes["natsrt.agent.key"] = agent.key
        attributes["natsrt.message.type"] = message_type
        context = trace.set_span_in_context(receive, context)
        process = self._tracer.start_span(
            f"process {destination}", context=context, kind=SpanKind.CONSUMER, attributes=attributes
        )
        attach(trace.set_span_in_context(process, context))
        return _Covering(process)

    def _is_left_out(self, parent: SpanContext) -> bool:
        """True if a child span of ``parent`` would not be recorded."""
        return self._follows and parent.is_valid and not parent.trace_flags.sampled

    def _attributes(self, name: str, kind: str, destination: str, message_id: str, size: int) -> dict[str, Any]:
        return {
            "messaging.system": "nats",
            "messaging.operation.name": name,
            "messaging.operation.type": kind,
            "messaging.destination.name": destination,
            "messaging.message.id": message_id,
            "messaging.message.body.size": size,
            "natsrt.worker.id": self._worker_id,
        }


def _follows_parents(provider: TracerProvider) -> bool:
    """True if the description of the provider's sampler shows that it drops children of unsampled spans."""
    describe = getattr(getattr(provider, "sampler", None), "get_description", str)
    description = str(describe())
    return (
        description.startswith("ParentBased{")
        and "remoteParentNotSampled:AlwaysOffSampler" in description
        and "localParentNotSampled:AlwaysOffSampler" in description
    )


def _carrier(context: SpanContext) -> str:
    if not context.is_valid:
        return ""
    parent = f',"traceparent":"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"'
    state = context.trace_state
    return f"{parent},{attribute('tracestate', state.to_header())}" if state else parent


def _remote(envelope: Mapping[str, Any]) -> SpanContext | None:
    """The sender's span context from a message; None if there is none, or if it cannot be read."""
    parent = envelope.get("traceparent")
    if not isinstance(parent, str):
        return None
    state = envelope.get("tracestate")
    if state is None and (found := _TRACEPARENT.fullmatch(parent)) is not None:
        flags = trace.TraceFlags(int(found[3], 16))
        return SpanContext(int(found[1], 16), int(found[2], 16), is_remote=True, trace_flags=flags)
    carrier = {"traceparent": parent} | ({"tracestate": state} if isinstance(state, str) else {})
    context = trace.get_current_span(_propagator.extract(carrier, Context())).get_span_context()
    return context if context.is_valid else None


def _fail(span: Span, error: BaseException) -> None:
    span.set_attribute("error.type", class_name(type(error)))
    span.set_status(Status(StatusCode.ERROR, class_name(type(error))))


def telemetry_for(provider: TracerProvider | None, worker_id: str) -> Telemetry | None:
    """Return a Telemetry; None if no spans are recorded.

    If ``provider`` is None, OpenTelemetry's global provider is used, if one is set. AutoGen's environment variable
    ``AUTOGEN_DISABLE_RUNTIME_TRACING=true`` turns spans off.
    """
    if os.environ.get(_DISABLE, "").lower() == "true":
        return None
    if provider is None:
        provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    return Telemetry(provider, worker_id)
