"""OpenTelemetry: spans for calls and events, nested and in one trace over runtimes and processes, as documented."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import nats
import pytest
from autogen_core import (
    AgentId,
    MessageContext,
    RoutedAgent,
    TopicId,
    TypeSubscription,
    message_handler,
)
from nats.aio.msg import Msg
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NoOpTracerProvider, SpanKind, StatusCode

from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.observe import telemetry
from tests.support.clients import settled
from tests.support.processes import REPOSITORY, Processes, eventually

Start = Callable[..., Awaitable[NatsAgentRuntime]]


@dataclass
class Ask:
    text: str


@dataclass
class Told:
    text: str


class Relay(RoutedAgent):
    """Passes a question on, then tells a topic about it."""

    @message_handler
    async def ask(self, message: Ask, ctx: MessageContext) -> str:
        if message.text == "fail":
            raise LookupError("a secret text")
        if message.text == "nested":
            return str(await self.send_message(Ask("inner"), AgentId("answerer", "a b")))
        await self.publish_message(Told(message.text), TopicId("told", "here"))
        return message.text


class Answerer(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("answers")
        self.span: trace.Span | None = None

    @message_handler
    async def ask(self, message: Ask, ctx: MessageContext) -> str:
        with trace.get_tracer("mine", tracer_provider=None).start_as_current_span("ignored"):
            return message.text.upper()


class Listener(RoutedAgent):
    @message_handler
    async def hear(self, message: Told, ctx: MessageContext) -> None:
        if message.text == "fail to hear":
            raise ValueError("no")


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(exporter))
    return made


@pytest.fixture
async def start(server: EmbeddedServer, namespace: str, provider: TracerProvider) -> AsyncIterator[Start]:
    started: list[NatsAgentRuntime] = []

    async def make(tracer_provider: trace.TracerProvider | None = provider) -> NatsAgentRuntime:
        runtime = NatsAgentRuntime(server.url, namespace=namespace, tracer_provider=tracer_provider)
        await runtime.start()
        started.append(runtime)
        return runtime

    yield make
    for runtime in started:
        await runtime.close()


RELAY = AgentId("relay", "k")


def named(spans: Sequence[ReadableSpan], name: str) -> ReadableSpan:
    (found,) = [span for span in spans if span.name == name]
    return found


def attributes_of(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def is_child(child: ReadableSpan, parent: ReadableSpan) -> bool:
    return (
        child.parent is not None
        and child.parent.span_id == parent.context.span_id
        and child.context.trace_id == parent.context.trace_id
    )


async def finished(exporter: InMemorySpanExporter, count: int) -> tuple[ReadableSpan, ...]:
    await eventually(lambda: len(exporter.get_finished_spans()) >= count, message=f"{count} spans")
    spans = exporter.get_finished_spans()
    assert len(spans) == count, [span.name for span in spans]
    return spans


async def test_a_call_is_sent_received_and_processed_in_one_trace(
    server: EmbeddedServer, start: Start, exporter: InMemorySpanExporter, namespace: str
) -> None:
    worker, caller = await start(), await start()
    await Answerer.register(worker, "answerer", Answerer)
    subject = f"{namespace}.agent.answerer"
    (body,) = await bodies_on(
        server, subject, lambda: caller.send_message(Ask("hi"), AgentId("answerer", "a b"), message_id="m-1")
    )
    spans = await finished(exporter, 3)
    send, receive, process = (named(spans, f"{verb} {subject}") for verb in ("send", "receive", "process"))
    assert is_child(receive, send) and is_child(process, receive)
    assert [span.kind for span in (send, receive, process)] == [SpanKind.CLIENT, SpanKind.CONSUMER, SpanKind.CONSUMER]
    common = {
        "messaging.system": "nats",
        "messaging.destination.name": subject,
        "messaging.message.id": "m-1",
    }
    assert attributes_of(send) == common | {
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.message.body.size": len(b'{"text":"hi"}'),
        "natsrt.message.type": "Ask",
        "natsrt.worker.id": caller.worker_id,
    }
    assert attributes_of(receive) == common | {
        "messaging.operation.name": "receive",
        "messaging.operation.type": "receive",
        "messaging.message.body.size": len(body),
        "natsrt.worker.id": worker.worker_id,
    }
    assert attributes_of(process) == common | {
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.message.body.size": len(body),
        "natsrt.agent.type": "answerer",
        "natsrt.agent.key": "a b",
        "natsrt.message.type": "Ask",
        "natsrt.worker.id": worker.worker_id,
    }
    assert receive.start_time is not None and receive.end_time is not None
    assert receive.start_time <= receive.end_time


async def test_an_event_is_published_received_and_processed_in_the_trace_of_its_call(
    start: Start, exporter: InMemorySpanExporter, namespace: str
) -> None:
    worker, caller = await start(), await start()
    await Relay.register(worker, "relay", lambda: Relay("passes on"))
    await Listener.register(caller, "listener", lambda: Listener("listens"))
    await caller.add_subscription(TypeSubscription("told", "listener"))
    await caller.send_message(Ask("hi"), RELAY)
    spans = await finished(exporter, 6)
    subject = f"{namespace}.topic.told.here"
    publish, receive = named(spans, f"publish {subject}"), named(spans, f"receive {subject}")
    process = named(spans, f"process {namespace}.agent.listener")
    assert is_child(publish, named(spans, f"process {namespace}.agent.relay"))
    assert is_child(receive, publish) and is_child(process, receive)
    assert publish.kind == SpanKind.PRODUCER
    assert attributes_of(publish)["messaging.operation.type"] == "send"
    assert attributes_of(process)["natsrt.agent.key"] == "here"


async def test_a_nested_call_is_a_child_of_the_handler_that_makes_it(
    start: Start, exporter: InMemorySpanExporter, namespace: str
) -> None:
    worker, other = await start(), await start()
    await Relay.register(worker, "relay", lambda: Relay("passes on"))
    await Answerer.register(other, "answerer", Answerer)
    assert await other.send_message(Ask("nested"), RELAY) == "INNER"
    spans = await finished(exporter, 6)
    inner = named(spans, f"send {namespace}.agent.answerer")
    assert is_child(inner, named(spans, f"process {namespace}.agent.relay"))
    assert len({span.context.trace_id for span in spans}) == 1


async def test_a_call_continues_the_trace_of_its_caller(
    start: Start, exporter: InMemorySpanExporter, provider: TracerProvider, namespace: str
) -> None:
    runtime = await start()
    await Answerer.register(runtime, "answerer", Answerer)
    with provider.get_tracer("application").start_as_current_span("request"):
        await runtime.send_message(Ask("hi"), AgentId("answerer", "x"))
    spans = await finished(exporter, 4)
    assert is_child(named(spans, f"send {namespace}.agent.answerer"), named(spans, "request"))


async def test_a_failure_marks_the_spans_of_handler_and_caller_without_its_text(
    start: Start, exporter: InMemorySpanExporter, namespace: str
) -> None:
    worker, caller = await start(), await start()
    await Relay.register(worker, "relay", lambda: Relay("passes on"))
    with pytest.raises(LookupError):
        await caller.send_message(Ask("fail"), RELAY)
    spans = await finished(exporter, 3)
    for verb in ("send", "process"):
        span = named(spans, f"{verb} {namespace}.agent.relay")
        assert span.status.status_code == StatusCode.ERROR
        assert attributes_of(span)["error.type"] == "LookupError"
    assert not any("secret" in span.to_json() for span in spans)


async def test_an_event_handlers_failure_marks_its_span_only(
    start: Start, exporter: InMemorySpanExporter, namespace: str
) -> None:
    runtime = await start()
    await Listener.register(runtime, "listener", lambda: Listener("listens"))
    await runtime.add_subscription(TypeSubscription("told", "listener"))
    await runtime.publish_message(Told("fail to hear"), TopicId("told", "x"))
    spans = await finished(exporter, 3)
    failed = [span.name for span in spans if span.status.status_code == StatusCode.ERROR]
    assert failed == [f"process {namespace}.agent.listener"]


async def test_a_failed_call_to_nobody_marks_the_callers_span(
    start: Start, exporter: InMemorySpanExporter, namespace: str
) -> None:
    runtime = await start()
    with pytest.raises(LookupError):
        await runtime.send_message(Ask("hi"), AgentId("nobody", "x"))
    (span,) = await finished(exporter, 1)
    assert attributes_of(span)["error.type"] == "UnknownAgentType"


async def bodies_on(server: EmbeddedServer, subject: str, work: Callable[[], Awaitable[object]]) -> list[bytes]:
    """What passes over ``subject`` during ``work``."""
    seen: list[bytes] = []

    async def see(message: Msg) -> None:
        seen.append(message.data)

    client = await nats.connect(server.url)
    await client.subscribe(subject, cb=see)
    await asyncio.sleep(0)
    await settled(client)
    await work()
    await eventually(lambda: seen)
    await client.close()
    return seen


async def test_without_a_provider_nothing_travels(server: EmbeddedServer, namespace: str, start: Start) -> None:
    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider), "some test set a global provider"
    runtime = await start(None)
    assert (
        runtime.running.incoming.dispatch._invoker._telemetry is None
        and runtime.running.outgoing.calls._telemetry is None
    )
    await Answerer.register(runtime, "answerer", Answerer)
    (body,) = await bodies_on(
        server, f"{namespace}.agent.answerer", lambda: runtime.send_message(Ask("hi"), AgentId("answerer", "x"))
    )
    assert "traceparent" not in json.loads(body)
    assert (await start(NoOpTracerProvider())).running.incoming.dispatch._invoker._telemetry is None


async def test_the_trace_context_travels_as_w3c_says(server: EmbeddedServer, namespace: str, start: Start) -> None:
    runtime = await start()
    await Answerer.register(runtime, "answerer", Answerer)
    (body,) = await bodies_on(
        server, f"{namespace}.agent.answerer", lambda: runtime.send_message(Ask("hi"), AgentId("answerer", "x"))
    )
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-9a-f]", json.loads(body)["traceparent"])


UNSAMPLED = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-00", "tracestate": "vendor=value"}


@pytest.mark.parametrize("travels", [("traceparent",), ("traceparent", "tracestate")])
async def test_below_a_context_that_is_not_sampled_nothing_is_recorded_and_it_is_passed_on(
    server: EmbeddedServer, namespace: str, start: Start, exporter: InMemorySpanExporter, travels: Sequence[str]
) -> None:
    runtime, other = await start(), await start()
    await Relay.register(runtime, "relay", lambda: Relay("passes on"))
    await Answerer.register(other, "answerer", Answerer)
    extensions = {name: UNSAMPLED[name] for name in travels}
    (body,) = await bodies_on(
        server, f"{namespace}.agent.answerer", lambda: call_relay(server, namespace, "nested", extensions)
    )
    passed_on = json.loads(body)
    assert {name: passed_on[name] for name in UNSAMPLED if name in passed_on} == extensions
    assert exporter.get_finished_spans() == ()


async def test_a_sampler_of_its_own_mind_records_below_a_context_that_is_not_sampled(
    server: EmbeddedServer, namespace: str, start: Start, exporter: InMemorySpanExporter
) -> None:
    provider = TracerProvider(sampler=ALWAYS_ON)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    runtime = await start(provider)
    await Relay.register(runtime, "relay", lambda: Relay("passes on"))
    await call_relay(server, namespace, "fail", UNSAMPLED)
    receive, _ = await finished(exporter, 2)
    assert receive.parent is not None and receive.parent.span_id == int("cd" * 8, 16)
    assert receive.context.trace_id == int("ab" * 16, 16)
    assert receive.context.trace_state.to_header() == UNSAMPLED["tracestate"]


async def call_relay(server: EmbeddedServer, namespace: str, text: str, extensions: dict[str, str]) -> None:
    """A call of the relay by a client that is no runtime."""
    envelope = {"specversion": "1.0", "type": "natsrt.call", "id": "1", "source": "/", "messagetype": "Ask"}
    client = await nats.connect(server.url)
    body = json.dumps(envelope | {"subject": "k"} | extensions | {"data": {"text": text}}, separators=(",", ":"))
    await client.request(f"{namespace}.agent.relay", body.encode(), timeout=5)
    await client.close()


@pytest.mark.parametrize(
    "traceparent",
    ["", "00-xyz", f"00-{'0' * 32}-{'cd' * 8}-01", f"00-{'ab' * 16}-{'0' * 16}-01", f"00-{'AB' * 16}-{'cd' * 8}-01"],
)
async def test_a_trace_context_that_cannot_be_read_is_as_none(
    server: EmbeddedServer, namespace: str, start: Start, exporter: InMemorySpanExporter, traceparent: str
) -> None:
    runtime = await start()
    await Relay.register(runtime, "relay", lambda: Relay("passes on"))
    await call_relay(server, namespace, "fail", {"traceparent": traceparent})
    receive, process = await finished(exporter, 2)
    assert receive.parent is None and is_child(process, receive)


async def test_autogens_variable_turns_tracing_off(
    start: Start, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOGEN_DISABLE_RUNTIME_TRACING", "true")
    runtime = await start()
    await Answerer.register(runtime, "answerer", Answerer)
    await runtime.send_message(Ask("hi"), AgentId("answerer", "x"))
    assert exporter.get_finished_spans() == ()


async def test_a_worker_without_a_provider_answers_a_traced_caller(
    start: Start, exporter: InMemorySpanExporter, namespace: str
) -> None:
    worker, caller = await start(None), await start()
    await Answerer.register(worker, "answerer", Answerer)
    assert await caller.send_message(Ask("hi"), AgentId("answerer", "x")) == "HI"
    (span,) = await finished(exporter, 1)
    assert span.name == f"send {namespace}.agent.answerer"


WORKER = """
import asyncio, json, sys
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from natsrt import NatsAgentRuntime
from tests.test_tracing import Answerer

async def main():
    provider = TracerProvider()
    exporter = ConsoleSpanExporter(formatter=lambda span: json.dumps(json.loads(span.to_json())) + "\\n")
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with NatsAgentRuntime(sys.argv[1], namespace=sys.argv[2], tracer_provider=provider) as runtime:
        await Answerer.register(runtime, "answerer", Answerer)
        print("ready", flush=True)
        await runtime.stop_when_signal()

asyncio.run(main())
"""


async def test_one_trace_spans_two_processes(
    start: Start, server: EmbeddedServer, exporter: InMemorySpanExporter, namespace: str, processes: Processes
) -> None:
    worker = processes.python(WORKER, server.url, namespace, name="worker")
    await worker.wait_for_line("ready")
    caller = await start()
    assert await caller.send_message(Ask("hi"), AgentId("answerer", "x")) == "HI"
    (send,) = await finished(exporter, 1)
    await worker.wait_for_line("process ")
    spans = [json.loads(line) for line in worker.stdout.splitlines() if line.startswith("{")]
    receive, process = sorted(spans, key=lambda span: span["name"], reverse=True)
    assert receive["context"]["trace_id"] == process["context"]["trace_id"] == f"0x{send.context.trace_id:032x}"
    assert receive["parent_id"] == f"0x{send.context.span_id:016x}"
    assert process["parent_id"] == receive["context"]["span_id"]


async def test_the_documented_table_of_spans_is_the_modules_own_and_names_every_attribute(
    start: Start, exporter: InMemorySpanExporter
) -> None:
    documented = (REPOSITORY / "docs" / "tracing.md").read_text()
    rows = re.findall(r"^\| `(\w+) ([^`]+)` \| (\w+) \| [^|]+ \| ([^|]+) \|$", documented, re.MULTILINE)
    drawn = re.findall(r"^``(\w+) ([^`]+)``\s+(\w+)\s+.+?\s{2,}(.+)$", telemetry.__doc__ or "", re.MULTILINE)
    assert [(verb, kind) for verb, _, kind, _ in rows] == [(verb, kind) for verb, _, kind, _ in drawn]
    assert [re.sub(r"`", "", old).strip() for *_, old in rows] == [old.replace("`", "").strip() for *_, old in drawn]

    runtime = await start()
    await Relay.register(runtime, "relay", lambda: Relay("passes on"))
    with pytest.raises(LookupError):
        await runtime.send_message(Ask("fail"), RELAY)
    used = {name for span in exporter.get_finished_spans() for name in attributes_of(span)}
    assert used == set(re.findall(r"^\| `([\w.]+)` \|", documented, re.MULTILINE))
