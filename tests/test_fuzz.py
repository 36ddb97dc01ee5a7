"""Fuzzed messages on every subject a worker listens to: it lives, answers an error where it can, and counts it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import nats
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypePrefixSubscription, TypeSubscription
from autogen_core import message_handler as handler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.aio.msg import Msg
from opentelemetry.sdk.trace import TracerProvider

from natsrt import MessageTooLarge, NatsAgentRuntime, NatsrtError, RemoteAgentError
from natsrt.embedded import EmbeddedServer
from natsrt.jetstream.registry.entries import KnownEntry, encode_entry
from tests.support.clients import settled
from tests.support.processes import eventually

SERVICE_ERROR = "Nats-Service-Error"
SERVICE_ERROR_CODE = "Nats-Service-Error-Code"
MEMBER = AgentId("member", "one")


@dataclass
class Text:
    text: str


@dataclass
class Tree:
    children: list[Tree]


class Echo(RoutedAgent):
    """Returns what it is sent."""

    def __init__(self) -> None:
        super().__init__("echo")

    @handler
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        return message

    @handler
    async def on_tree(self, message: Tree, ctx: MessageContext) -> Tree:
        return message


class Everything:
    """A custom subscription to every topic."""

    id = "everything"
    agent_type = "echo"

    def is_match(self, topic_id: TopicId) -> bool:
        return True

    def map_to_agent(self, topic_id: TopicId) -> AgentId:
        return AgentId("echo", "everything")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Everything)


class Target:
    """A worker under fire, and the client that fires."""

    def __init__(self, runtime: NatsAgentRuntime, client: Client, namespace: str) -> None:
        self.runtime = runtime
        self.client = client
        self.namespace = namespace

    def subject(self, rest: str) -> str:
        return rest if rest.startswith("$") else f"{self.namespace}.{rest}"

    @property
    def inbox(self) -> str:
        """The runtime's own inbox for replies."""
        return self.runtime.running.calls.accept_to.rpartition(".")[0]

    async def ask(self, subject: str, bodies: Sequence[bytes], headers: dict[str, str] | None = None) -> list[Msg]:
        """Send every body with a reply subject of its own; return the first answer to each, in the order of bodies."""
        answers: dict[str, Msg] = {}
        inbox = self.client.new_inbox()

        async def on_answer(message: Msg) -> None:
            answers.setdefault(message.subject, message)

        subscription = await self.client.subscribe(f"{inbox}.*", cb=on_answer)
        replies = [f"{inbox}.{number}" for number in range(len(bodies))]
        for reply, body in zip(replies, bodies, strict=True):
            await self.client.publish(subject, body, reply=reply, headers=headers)
        await eventually(lambda: len(answers) == len(bodies), 10, f"every message on {subject} is answered")
        await subscription.unsubscribe()
        return [answers[reply] for reply in replies]

    def token(self, name: str) -> str:
        """The runtime's reply subject of this name. Only a fuzzer in the same process can know it."""
        return self.runtime.running.network.inbox.subject(name)

    async def expects_answers_of(self, worker_id: str) -> None:
        """Have the runtime listen for what ``worker_id`` says about calls."""
        accepted = envelope("natsrt.accepted", data={"worker": worker_id, "calls": []})
        await self.client.publish(self.token("accept"), accepted)

    async def lives(self) -> None:
        """Assert that the worker still works, over the connection that it began with."""
        answer = await self.client.request(self.subject("agent.echo"), b'{"text":"hi"}', timeout=10)
        assert answer.data == b'{"text":"hi"}'
        assert self.runtime.running.connection.reconnects == 0
        assert self.runtime.ready

    async def errors(self) -> int:
        """The errors that the agent types show to ``nats service stats``."""
        answer = await self.client.request(f"$SRV.STATS.fuzzed.{self.runtime.worker_id}", timeout=10)
        return sum(endpoint["num_errors"] for endpoint in json.loads(answer.data)["endpoints"])


@pytest.fixture
async def target(server: EmbeddedServer, namespace: str, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Target]:
    caplog.set_level(logging.WARNING)
    runtime = NatsAgentRuntime(server.url, name="fuzzed", namespace=namespace, tracer_provider=TracerProvider())
    await Echo.register(runtime, "echo", Echo)
    await runtime.register_agent_instance(Echo(), MEMBER)
    for agent_type in ("echo", "member"):
        await runtime.add_subscription(TypeSubscription("news", agent_type))
        await runtime.add_subscription(TypePrefixSubscription("news.", agent_type))
    await runtime.add_subscription(Everything())
    client = await nats.connect(server.url)
    async with runtime:
        yield Target(runtime, client, namespace)
    await client.close()
    broken = [r.getMessage() for r in caplog.records if r.exc_info or r.name == "asyncio" or "taken in" in r.message]
    assert not broken, broken


def envelope(kind: str, *, data: Any = None, without: str = "", **attributes: Any) -> bytes:
    body = {"specversion": "1.0", "type": kind, "id": "1", "source": "/", "messagetype": "Text", **attributes}
    body.pop(without, None)
    return json.dumps({**body, "data": data}, separators=(",", ":")).encode()


GOOD = {"text": "hi"}
ATTRIBUTES = (
    "specversion",
    "type",
    "id",
    "source",
    "subject",
    "messagetype",
    "datacontenttype",
    "acceptto",
    "cancelid",
    "traceparent",
    "tracestate",
    "operation",
    "topictype",
    "topicsource",
)
WRONG_VALUES: tuple[Any, ...] = (None, 5, 1.5, True, [], {}, ["x"], {"x": "y"})

# Texts that are no value of the attribute, in any message; in calls and events; and in calls.
WRONG_ANYWHERE = [("specversion", "2.0"), ("type", "natsrt."), ("type", "natsrt.unheard-of")]
WRONG_IN_MESSAGES = [
    *WRONG_ANYWHERE,
    ("source", "nobody"),
    ("source", "no agent type/key"),
    ("source", "echo/=zz"),
]
WRONG_IN_CALLS = [
    *WRONG_IN_MESSAGES,
    ("subject", "=zz"),
    ("subject", ""),
    ("subject", "a b"),
    ("acceptto", ""),
    ("acceptto", "a b"),
    ("acceptto", "x\r\nPUB agent.admin 0\r\n"),
    ("acceptto", "$JS.API.INFO"),
]


def broken(kind: str, data: Any, wrong_texts: Sequence[tuple[str, str]] = WRONG_ANYWHERE) -> list[bytes]:
    """Bodies of this kind that nobody can read."""
    whole = envelope(kind, data=data)
    return [
        *(whole[:length] for length in range(len('{"specversion":"1.0","type":"natsrt.') + 1, len(whole))),
        *(
            envelope(kind, data=data, **{name: wrong})
            for name in ATTRIBUTES
            for wrong in WRONG_VALUES
            if name not in ("type", "traceparent", "tracestate") and wrong is not None
        ),
        *(envelope(kind, data=data, **{name: text}) for name, text in wrong_texts),
        envelope(kind, data=data, without="specversion"),
        whole.replace(b"/", b"\xff"),
        whole.replace(b'"data":', b'"data_base64":"!!!","data":'),
        whole[: whole.index(b'"data":')] + b'"data_base64":"!!!"}',
        whole[: whole.index(b'"data":')] + b'"data_base64":5}',
        whole[: whole.index(b'"data":')] + b'"data":' + b"[" * 100_000,
        whole[: whole.index(b'"data":')] + b'"data":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        whole[: whole.index(b'"data":')] + b'"data":{"text":}}',
    ]


BROKEN_CALLS = [
    *broken("natsrt.call", GOOD, WRONG_IN_CALLS),
    envelope("natsrt.call", data=GOOD, without="id"),
    envelope("natsrt.call", data=GOOD, without="source"),
    envelope("natsrt.call", data=GOOD, without="messagetype"),
    envelope("natsrt.call", data={"text": 5}),
    envelope("natsrt.call", data={}),
    envelope("natsrt.call", data=[]),
    envelope("natsrt.call", data=GOOD, datacontenttype="application/x-protobuf"),
    envelope("natsrt.call", data=GOOD, messagetype="Nothing"),
    envelope("natsrt.event", data=GOOD),
    envelope("natsrt.control", data=GOOD, operation="save_state"),
    b'{"specversion":"1.0","type":"natsrt.call","id":"1","source":"/","messagetype":"Tree","data":'
    + b'{"children":[' * 600
    + b"]}" * 600
    + b"}",
    b"",
    b"\xff\xfe",
    b"[]",
    b"nonsense",
    b'{"text":5}',
    b'{"txt":"hi"}',
    b'{"children":[' * 600 + b"]}" * 600,
    b"[" * 100_000,
]
BROKEN_CONTROLS = [
    *broken("natsrt.control", {}),
    envelope("natsrt.control", data={}, operation="destroy"),
    envelope("natsrt.control", data={}),
    envelope("natsrt.control", data=5, operation="load_state"),
    envelope("natsrt.call", data=GOOD),
    b"",
    b"{}",
    b"\xff",
]
BROKEN_QUESTIONS = [
    *(body for body in broken("natsrt.fate", {"calls": 5})),
    *(envelope("natsrt.fate", data=data) for data in (None, 5, [], {}, {"calls": {}}, {"calls": [5]}, {"calls": [[]]})),
    *(envelope("natsrt.serve", data=data) for data in ({}, {"agent_type": 5, "revision": 1}, {"agent_type": "echo"})),
    envelope("natsrt.serve", data={"agent_type": [], "revision": []}),
    b"",
    b"{}",
    b"\xff",
]


async def is_refused(target: Target, subject: str, bodies: Sequence[bytes]) -> None:
    for body, answer in zip(bodies, await target.ask(target.subject(subject), bodies), strict=True):
        assert answer.headers and SERVICE_ERROR in answer.headers, (body[:300], answer.data[:300])
        content = json.loads(answer.data)
        assert {"type", "message", "code"} <= (content["data"] if "specversion" in content else content).keys()


@pytest.mark.parametrize("subject", ["agent.echo", "agent.member.one"])
async def test_every_broken_call_is_answered_with_an_error_and_counted(target: Target, subject: str) -> None:
    before = await target.errors()
    await is_refused(target, subject, BROKEN_CALLS)
    assert await target.errors() - before == len(BROKEN_CALLS)
    unknown = target.runtime.running.counters.unknown_payloads  # readable, but of a type that nobody here knows
    assert target.runtime.running.undecodable + unknown == len(BROKEN_CALLS)
    await target.lives()


@pytest.mark.parametrize("subject", ["natsrt.control.echo", "natsrt.control.member.one"])
async def test_every_broken_control_message_is_answered_with_an_error_and_counted(target: Target, subject: str) -> None:
    await is_refused(target, subject, BROKEN_CONTROLS)
    assert target.runtime.running.undecodable == len(BROKEN_CONTROLS)
    await target.lives()


async def test_every_broken_question_to_a_worker_is_answered_with_an_error_and_counted(target: Target) -> None:
    await is_refused(target, f"natsrt.worker.{target.runtime.worker_id}", BROKEN_QUESTIONS)
    assert target.runtime.running.undecodable == len(BROKEN_QUESTIONS)
    await target.lives()


BROKEN_EVENTS = [
    *broken("natsrt.event", GOOD, WRONG_IN_MESSAGES),
    envelope("natsrt.event", data=GOOD, without="id"),
    envelope("natsrt.event", data=GOOD, topictype="news.other"),
    envelope("natsrt.event", data=GOOD, topicsource="other"),
    envelope("natsrt.event", data={"text": 5}),
    envelope("natsrt.call", data=GOOD),
    b"",
    b"\xff",
    b"nonsense",
    b'{"text":5}',
]
BROKEN_EVENT_SUBJECTS = [
    "topic.news.=zz",
    "topic.=zz.s",
    "topic.a=2Eb.s",
    "topic.bad=20name.s",
    f"topic.news.=H{'0' * 64}",
]


async def test_every_broken_event_is_counted(target: Target) -> None:
    for body in BROKEN_EVENTS:
        await target.client.publish(target.subject("topic.news.deep.one"), body)
    # Each goes to "echo" for its prefix, to "echo" for its custom subscription, and to the instance.
    copies = 3 * len(BROKEN_EVENTS)
    await eventually(lambda: target.runtime.running.undecodable == copies)
    for subject in BROKEN_EVENT_SUBJECTS:  # the custom subscription at least is asked about these
        await target.client.publish(target.subject(subject), envelope("natsrt.event", data=GOOD))
    await eventually(lambda: target.runtime.running.undecodable >= copies + len(BROKEN_EVENT_SUBJECTS))
    assert await target.errors() == target.runtime.running.undecodable
    await target.lives()


async def test_every_broken_cancellation_is_counted(target: Target) -> None:
    bodies = [
        *broken("natsrt.cancel", {"cancelid": 5}),
        *(envelope("natsrt.cancel", data=data) for data in (None, 5, "x", [], ["cancelid"], {}, {"cancelid": None})),
        envelope("natsrt.call", data={"cancelid": "x"}),
        b"",
        b"\xff",
        b'{"cancelid":"x"}',
    ]
    for body in bodies:
        await target.client.publish(target.subject("natsrt.cancel"), body)
    await eventually(lambda: target.runtime.running.undecodable == len(bodies))
    await target.lives()


async def test_every_broken_change_of_the_registry_is_counted(target: Target) -> None:
    present = target.runtime.running.registry.view.applied  # what is far from it would be of another registry
    at = {"Nats-Sequence": str(present + 1000), "Nats-Last-Sequence": "0"}
    known = encode_entry(KnownEntry("known"))
    changes: list[tuple[str, bytes, dict[str, str] | None]] = [
        ("known.known", known, None),
        ("known.known", known, {"Nats-Sequence": "x"}),
        ("known.known", known, {"Nats-Sequence": "9" * 5000}),
        ("known.known", known, {"Nats-Sequence": "1", "Nats-Last-Sequence": "\u0661x"}),
        ("known.other", known, at),
        ("strange", known, at),
        ("type.echo.w", known, at),
        ("known.known", b"", at),
        ("known.known", b"\xff", at),
        ("known.known", b"[]", at),
        ("known.known", b'{"agent_type":["known"]}', at),
        ("known.known", b'{"agent_type":"known","handles":5}', at),
        ("known.known", b'{"agent_type":"known","handles":[5]}', at),
        ("worker.5", b'{"worker_id":5}', at),
    ]
    for key, value, headers in changes:
        await target.client.publish(target.subject(f"natsrt.registry.{key}"), value, headers=headers)
    await eventually(lambda: target.runtime.running.undecodable == len(changes))
    await target.lives()


async def test_every_broken_answer_about_calls_is_counted(target: Target) -> None:
    running = target.runtime.running
    await target.expects_answers_of("somebody")
    kinds = {"accept": "natsrt.accepted", "w-somebody": "natsrt.reply"}
    sent = 0
    for token, kind in kinds.items():
        wrong: list[Any] = [None, 5, [], {}, {"worker": 5, "calls": []}, {"worker": "w", "calls": 5}]
        wrong += [{"worker": "w", "calls": [5], "running": [5], "unknown": []}]
        wrong += [{"running": 5, "unknown": 5}, {"running": [[]], "unknown": [{}]}]
        for body in [*(envelope(kind, data=data) for data in wrong), envelope("natsrt.call"), b"", b"{}", b"\xff"]:
            await target.client.publish(target.token(token), body)
            sent += 1
    await eventually(lambda: running.undecodable == sent)
    await target.lives()


async def test_a_broken_reply_fails_its_own_call_and_no_other(target: Target) -> None:
    async def answer_badly(message: Msg) -> None:
        await target.client.publish(message.reply, BROKEN_REPLIES[int(json.loads(message.data)["id"])])

    await target.client.subscribe(target.subject("agent.liar"), queue="liar", cb=answer_badly)
    await settled(target.client)
    outcomes = await asyncio.gather(
        *(
            target.runtime.send_message(Text("hi"), AgentId("liar", "k"), message_id=str(number))
            for number in range(len(BROKEN_REPLIES))
        ),
        return_exceptions=True,
    )
    for body, outcome in zip(BROKEN_REPLIES, outcomes, strict=True):
        assert isinstance(outcome, NatsrtError), (body[:300], outcome)
    await target.lives()


BROKEN_REPLIES = [
    *broken("natsrt.reply", GOOD),
    *(envelope("natsrt.error", data=data) for data in (None, 5, [], {}, {"type": 5}, {"type": "x", "message": []})),
    envelope("natsrt.error", data={"type": "builtins.StopIteration", "message": "x", "args": [], "fields": {}}),
    envelope("natsrt.error", data={"type": "natsrt.errors.WorkerBusy", "message": "x", "args": [], "fields": {"a": 1}}),
    envelope("natsrt.reply", data={"text": 5}),
    envelope("natsrt.reply", data=GOOD, messagetype="Nothing"),
    envelope("natsrt.accepted", data={}),
]


@pytest.mark.parametrize(
    "block",
    [
        b"NATS/1.0",
        b"NATS/1.0\r\n",
        b"NATS/1.0 \xff\xff\xff\r\n\r\n",
        b"NATS/1.0 503 \xff\xff\r\n\r\n",
        b"NATS/1.0 503\r\n\r\n",
        b"\xff" * 40,
        b"NATS/1.0\r\nNatsrt-Key\r\n\r\n",
        b"NATS/1.0\r\nNatsrt-Key: \xff\r\n: \r\n\xff: x\r\n\r\n",
        b"NATS/1.0\r\nNatsrt-Type: \xff\r\n\r\n",
    ],
)
async def test_any_header_block_is_survived_and_its_message_answered(
    server: EmbeddedServer, target: Target, block: bytes
) -> None:
    answer = target.client.new_inbox()
    waiting = await target.client.subscribe(answer)
    await settled(target.client)
    body = b'{"text":"hi"}'
    for subject in ("agent.echo", "topic.news.deep.one", "natsrt.cancel", "natsrt.registry.x"):
        command = f"HPUB {target.subject(subject)} {answer} {len(block)} {len(block) + len(body)}\r\n"
        await speak(server, command.encode() + block + body + b"\r\n")
    assert (await waiting.next_msg(timeout=10)).data
    await target.lives()


@pytest.mark.parametrize("subject", [b"agent.echo \xff\xfe", b"agent.echo a..b", b"agent.echo >", b"topic.news.\xff.x"])
async def test_subjects_that_no_client_would_send_are_survived(
    server: EmbeddedServer, target: Target, subject: bytes
) -> None:
    await speak(server, b"PUB " + target.namespace.encode() + b"." + subject + b' 13\r\n{"text":"hi"}\r\n')
    await target.lives()


async def speak(server: EmbeddedServer, commands: bytes) -> None:
    """Send the server what no client library would, and return when it has processed it."""
    address = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n' + commands + b"PING\r\n")
    async with asyncio.timeout(10):
        while not (line := await reader.readline()).startswith(b"PONG"):
            assert line and not line.startswith(b"-ERR"), line
    writer.close()
    await writer.wait_closed()


@dataclass
class Fail:
    text: str


class Failing(RoutedAgent):
    """Raises an exception with the text it is sent, and with whatever the text evaluates to in JSON."""

    def __init__(self) -> None:
        super().__init__("fails")

    @handler
    async def on_fail(self, message: Fail, ctx: MessageContext) -> Text:
        raise RuntimeError(json.loads(message.text))


@pytest.mark.parametrize(
    "text", ['"\\ud800"', '"\\u0000\\r\\nx"', '["\\udfff"]', '{"a":1e999}', "5", f'"{"x" * 900_000}"', '""']
)
async def test_an_error_with_any_text_is_answered(target: Target, text: str) -> None:
    await Failing.register(target.runtime, "failing", Failing)
    body = json.dumps({"text": text}).encode()
    calls = [body, envelope("natsrt.call", data={"text": text}, messagetype="Fail")]
    for answer in await target.ask(target.subject("agent.failing"), calls):
        assert answer.headers and answer.headers[SERVICE_ERROR_CODE] in ("500", "413")
    with pytest.raises((RuntimeError, RemoteAgentError, MessageTooLarge)):
        await target.runtime.send_message(Fail(text), AgentId("failing", "k"))
    await target.lives()


async def test_service_requests_with_any_body_are_answered(target: Target) -> None:
    for verb in ("PING", "INFO", "STATS"):
        for body in (b"", b"\xff", b"{", envelope("natsrt.call", data=GOOD)):
            answer = await target.client.request(f"$SRV.{verb}.fuzzed.{target.runtime.worker_id}", body, timeout=10)
            assert json.loads(answer.data)["type"] == f"io.nats.micro.v1.{verb.lower()}_response"
    await target.lives()


async def test_names_in_a_call_that_leave_no_room_in_its_answer_do_not_cost_the_answer(target: Target) -> None:
    def filled(**attributes: Any) -> bytes:
        name = next(name for name, value in attributes.items() if value == "")
        room = target.client.max_payload - len(envelope("natsrt.call", **attributes))
        return envelope("natsrt.call", **{**attributes, name: "x" * room})

    bodies = [
        filled(data=GOOD, id=""),
        filled(data=5, id=""),
        filled(data=GOOD, messagetype=""),
        filled(data=GOOD, subject="", messagetype="Nothing"),
        json.dumps({"text": 5, "unknown": "x" * 900_000}).encode(),
        json.dumps({"text": 5, "x" * (target.client.max_payload - 100): 5}).encode(),
    ]
    codes = [
        (answer.headers or {}).get(SERVICE_ERROR_CODE)
        for answer in await target.ask(target.subject("agent.echo"), bodies)
    ]
    assert codes[:2] == ["413", "413"]
    assert set(codes[2:]) <= {"400", "413", "422"}
    await target.lives()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
kinds = st.sampled_from(
    ["natsrt." + kind for kind in ("call", "reply", "error", "accepted", "event", "control", "fate", "serve", "cancel")]
)
contents = json_values | st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("text", "agent_type", "worker", "cancelid"), st.text(max_size=9) | json_values),
        **dict.fromkeys(("calls", "running", "unknown"), st.lists(st.text(max_size=9), max_size=2) | json_values),
        "revision": st.integers(),
    },
)
objects = st.fixed_dictionaries(
    {"specversion": st.just("1.0"), "type": kinds | st.text()},
    optional={
        **{name: st.text(max_size=12) | json_values for name in ATTRIBUTES if name not in ("specversion", "type")},
        "messagetype": st.sampled_from(["Text", "Tree", "dict", "None"]),
        "source": st.just("/"),
        "id": st.just("1"),
        "data": contents,
        "data_base64": st.text(max_size=8),
    },
)
whole_bodies = st.binary(max_size=60) | (objects | contents).map(
    lambda tree: json.dumps(tree, separators=(",", ":")).encode()
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Any bytes, and envelopes that are cut or have a part exchanged."""
    body = draw(whole_bodies)
    start = draw(st.integers(0, len(body)))
    match draw(st.sampled_from(["whole", "cut", "exchanged"])):
        case "cut":
            return body[:start]
        case "exchanged":
            return body[:start] + draw(st.binary(max_size=4)) + body[start + draw(st.integers(0, 6)) :]
    return body


fuzzing = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
volleys = st.lists(bodies(), min_size=1, max_size=12)
some_headers = st.none() | st.dictionaries(
    st.sampled_from(["Natsrt-Key", "Natsrt-Type", "Nats-Service-Error", "Status", "Nats-Sequence", "KV-Operation"]),
    st.text(st.characters(min_codepoint=33, codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=8),
    max_size=3,
)


@fuzzing
@given(volleys, some_headers)
async def test_fuzzed_requests_are_all_answered(target: Target, volley: list[bytes], headers: dict[str, str]) -> None:
    worker = f"natsrt.worker.{target.runtime.worker_id}"
    for subject in ("agent.echo", "agent.member.one", "natsrt.control.echo", "natsrt.control.member.one", worker):
        before = await target.errors()
        answers = await target.ask(target.subject(subject), volley, headers or None)
        if subject.startswith("agent."):
            answered = sum(bool(answer.headers and SERVICE_ERROR in answer.headers) for answer in answers)
            assert await target.errors() - before == answered
    await target.lives()


@fuzzing
@given(volleys, some_headers)
async def test_fuzzed_messages_without_an_answer_are_survived(
    target: Target, volley: list[bytes], headers: dict[str, str]
) -> None:
    await target.expects_answers_of("somebody")
    subjects = ["topic.news.one", "topic.news.deep.one", "topic.=zz.s", "natsrt.cancel", "natsrt.registry.known.x"]
    tokens = ["accept", "w-somebody", "0", "zz"]
    for subject in [*map(target.subject, subjects), *(target.token(token) for token in tokens)]:
        for body in volley:
            await target.client.publish(subject, body, headers=headers or None)
    await target.lives()
