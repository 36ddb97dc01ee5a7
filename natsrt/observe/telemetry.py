"""OpenTelemetry spans for calls and events, in one trace over all processes.

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

The trace context travels in the CloudEvents extensions ``traceparent`` and ``tracestate`` (CloudEvents distributed
tracing extension, W3C Trace Context). Without a provider none of this code runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from autogen_core import AgentId
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from natsrt.wire.envelope import attribute

_DISABLE = "AUTOGEN_DISABLE_RUNTIME_TRACING"
_propagator = TraceContextTextMapPropagator()


class Telemetry:
    """The tracer of one runtime."""

    def __init__(self, provider: TracerProvider, worker_id: str) -> None:
        self._tracer = provider.get_tracer("natsrt")
        self._worker_id = worker_id

    @contextmanager
    def sending(
        self, operation: str, destination: str, *, kind: SpanKind, message_type: str, message_id: str, size: int
    ) -> Iterator[str]:
        """A span around a send. Yields the trace context as envelope attributes, with a leading comma, or ``""``."""
        with self._tracer.start_as_current_span(
            f"{operation} {destination}",
            kind=kind,
            attributes={
                **self._attributes(operation, "send", destination, message_id, size),
                "natsrt.message.type": message_type,
            },
            set_status_on_exception=False,
            record_exception=False,
        ) as span:
            carrier: dict[str, str] = {}
            _propagator.inject(carrier)
            try:
                yield "".join(f",{attribute(name, value)}" for name, value in carrier.items())
            except BaseException as error:
                _fail(span, error)
                raise

    @contextmanager
    def processing(
        self,
        envelope: Mapping[str, Any],
        *,
        subject: str,
        destination: str,
        agent: AgentId,
        message_type: str,
        size: int,
        waited: float,
    ) -> Iterator[None]:
        """A receive span that ends now, and a process span around the handler. ``waited`` in seconds."""
        carrier = {k: v for k in ("traceparent", "tracestate") if isinstance(v := envelope.get(k), str)}
        context = _propagator.extract(carrier)
        message_id = str(envelope.get("id", ""))
        now = time.time_ns()
        receive = self._tracer.start_span(
            f"receive {subject}",
            context=context,
            kind=SpanKind.CONSUMER,
            attributes=self._attributes("receive", "receive", subject, message_id, size),
            start_time=now - int(waited * 1e9),
        )
        receive.end(now)
        with self._tracer.start_as_current_span(
            f"process {destination}",
            context=trace.set_span_in_context(receive, context),
            kind=SpanKind.CONSUMER,
            attributes={
                **self._attributes("process", "process", destination, message_id, size),
                "natsrt.agent.type": agent.type,
                "natsrt.agent.key": agent.key,
                "natsrt.message.type": message_type,
            },
            set_status_on_exception=False,
            record_exception=False,
        ) as span:
            try:
                yield
            except BaseException as error:
                _fail(span, error)
                raise

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


def _fail(span: Span, error: BaseException) -> None:
    span.set_attribute("error.type", type(error).__qualname__)
    span.set_status(Status(StatusCode.ERROR, type(error).__qualname__))


def telemetry_for(provider: TracerProvider | None, worker_id: str) -> Telemetry | None:
    """A Telemetry, or None where nobody records.

    ``provider`` None means OpenTelemetry's global provider, if one is set. AutoGen's environment variable
    ``AUTOGEN_DISABLE_RUNTIME_TRACING=true`` turns spans off.
    """
    if os.environ.get(_DISABLE, "").lower() == "true":
        return None
    if provider is None:
        provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    return Telemetry(provider, worker_id)
