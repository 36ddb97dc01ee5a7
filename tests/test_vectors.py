"""Bodies, keyed agents, the registry, errors and workers: tests/vectors/{envelopes,keyed,registry,errors,worker}.json.

Others have tests of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import nats
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, message_handler
from nats.aio.msg import Msg

import natsrt
from natsrt import DurableTopics, NatsAgentRuntime
from natsrt.durable_types import covers
from natsrt.embedded import EmbeddedServer
from natsrt.errors import CannotDecode
from natsrt.jetstream.attempts import Counted
from natsrt.jetstream.dead_letter_box import DeadLetterBox
from natsrt.jetstream.dead_letters import Unhandled
from natsrt.jetstream.delivery import Delivery
from natsrt.jetstream.later_retries import retry_headers
from natsrt.jetstream.passing import Passing
from natsrt.jetstream.record import RECORD, Stored, checked, decode_record, encode_head, parts_key, record_key
from natsrt.jetstream.registry.entries import SubscriptionEntry, TypeEntry, WorkerEntry, decode_entry, encode_entry
from natsrt.jetstream.registry.origin import ORIGIN, Origin
from natsrt.jetstream.registry.pages import Pages, read_page, read_question
from natsrt.jetstream.registry.view import View
from natsrt.jetstream.stream_reader import StoredMessage
from natsrt.jetstream.streams import events_name, topic_filter
from natsrt.jetstream.task_store import result_headers
from natsrt.reminder_types import REMINDER_TOPICS, reminder_topic
from natsrt.sending.again import redrive_headers
from natsrt.sending.durable import delayed_headers, event_headers
from natsrt.sending.reminders import reminder_headers
from natsrt.sending.tickets import cancel_id
from natsrt.task_types import TaskId, task_of
from natsrt.wire import envelope
from natsrt.wire.exception_parts import qualified_name
from natsrt.wire.failures import (
    FULL,
    SERVICE_ERROR,
    SERVICE_ERROR_CODE,
    ErrorTypes,
    decode_answer,
    describe,
    is_refusal,
)
from natsrt.wire.part_flow import PartsReceived, PartsSent, Progress, Window
from natsrt.wire.part_messages import encode_progress, read_awaited, read_progress, read_window, stream_attributes
from natsrt.wire.recorded import RECORD_HEADER, read_record
from natsrt.wire.references import OfEvent, Reference, event_of, new_blob_id, stream_mark
from natsrt.wire.retry_subjects import attempts_of, redriven, retried, retries_of, retry_of
from natsrt.wire.schedules import of_reminder
from natsrt.wire.stored_events import StoredEvent, stored_event, stream_id
from natsrt.wire.subjects import Subjects, encode_text
from natsrt.wire.task_attributes import task_attributes
from tests.support.processes import eventually


def vectors(name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / f"{name}.json").read_text("utf-8"))
    return read


VECTORS = vectors("envelopes")
KEYED = vectors("keyed")
REGISTRY = vectors("registry")
DURABLE = vectors("durable")
RECORDED = vectors("recorded")
ERRORS = vectors("errors")
STREAMS = vectors("streams")
WORKER = vectors("worker")


def cases(kind: str, of: dict[str, Any] = VECTORS) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", of[kind], ids=lambda case: case.get("name", case.get("bucket_key")))


def bytes_of(case: dict[str, Any], name: str) -> bytes:
    return bytes.fromhex(case[f"{name}_hex"]) if f"{name}_hex" in case else case[name].encode()


@cases("written")
def test_bodies_are_written_as_the_vectors_say(case: dict[str, Any]) -> None:
    attributes = ",".join(envelope.attribute(name, value) for name, value in case["attributes"])
    content_type = case.get("content_type", envelope.JSON_CONTENT)
    assert envelope.encode(case["type"], attributes, bytes_of(case, "payload"), content_type) == bytes_of(case, "body")


@cases("written")
def test_what_was_written_is_read_again(case: dict[str, Any]) -> None:
    read = envelope.decode(bytes_of(case, "body"))
    assert read is not None
    assert read.type == case["type"]
    assert dict(case["attributes"]).items() <= dict(read.attributes).items()
    assert read.payload == bytes_of(case, "payload")
    assert read.text("datacontenttype") == case.get("content_type")


@cases("references")
def test_references_are_written_and_read_as_the_vectors_say(case: dict[str, Any]) -> None:
    attributes = ",".join(envelope.attribute(name, value) for name, value in case["attributes"][:-4])
    reference = Reference(**case["reference"])
    content_type = case.get("content_type", envelope.JSON_CONTENT)
    body = envelope.encode(case["type"], f"{attributes},{reference.attributes}", envelope.NO_DATA, content_type)
    assert body == bytes_of(case, "body")
    read = envelope.decode(body)
    assert read is not None and read.reference == reference and read.payload is envelope.NO_DATA
    assert read.content_type == content_type
    assert envelope.rewrite(read, acceptto=read.text("acceptto")) == body  # forwarding passes it on unchanged


@cases("read")
def test_bodies_are_read_as_the_vectors_say(case: dict[str, Any]) -> None:
    read = envelope.decode(bytes_of(case, "body"))
    assert read is not None
    assert dict(read.attributes) == case["attributes"]
    if "payload_json" in case:
        assert read.json() == case["payload_json"]
    else:
        assert read.payload == bytes_of(case, "payload")


@cases("plain")
def test_plain_bodies_are_left_alone(case: dict[str, Any]) -> None:
    assert envelope.decode(bytes_of(case, "body")) is None


@cases("refused")
def test_broken_bodies_of_ours_are_refused_and_never_plain(case: dict[str, Any]) -> None:
    with pytest.raises(CannotDecode) as raised:
        envelope.decode(bytes_of(case, "body"))
    assert raised.value.payload == bytes_of(case, "body")


@pytest.mark.parametrize(
    "name", ["subjects", "messages", "envelopes", "keyed", "registry", "errors", "worker", "agentchat"]
)
def test_every_file_of_vectors_says_what_it_is_about(name: str) -> None:
    assert vectors(name)["about"]


# ---------------------------------------------------------------------------------------------------------------------
# Keyed agents


def stored_of(case: dict[str, Any]) -> Stored | None:
    return None if case["state"] is None else Stored(**case["state"])


@cases("records", KEYED)
def test_records_of_keyed_agents_are_written_and_read_as_the_vectors_say(case: dict[str, Any]) -> None:
    agent, stored = AgentId(case["type"], case["key"]), stored_of(case)
    assert record_key(agent) == case["bucket_key"]
    superseded = tuple(case.get("superseded", ()))
    handled = case.get("handled", {})
    assert encode_head(agent, case["owner"], case["write"], stored, superseded, handled) == case["record"]
    read = decode_record(case["bucket_key"], {RECORD: case["record"]}, case["body"].encode(), 7)
    told = (read.agent, read.owner, read.write, read.stored, read.revision, read.superseded, read.handled)
    assert told == (agent, case["owner"], case["write"], stored, 7, superseded, handled)
    if stored is not None and not stored.parts:
        assert checked(agent, stored, read.body or b"") == case["body"].encode()


@cases("refused", KEYED)
def test_what_is_no_record_is_refused(case: dict[str, Any]) -> None:
    headers = None if case["record"] is None else {RECORD: case["record"]}
    with pytest.raises(CannotDecode):
        decode_record(case["bucket_key"], headers, b"", 1)


@cases("parts", KEYED)
def test_parts_of_states_are_where_the_vectors_say(case: dict[str, Any]) -> None:
    key = parts_key(AgentId(case["type"], case["key"]), case["write"])
    assert f"{key}.{case['number']}" == case["bucket_key"]


NEWER = ("draining", "keyed", "features", "inbox")
"""Fields of entries that older participants do not write."""


@cases("registry", KEYED)
def test_entries_of_the_registry_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    entry = decode_entry(case["bucket_key"], case["value"].encode())
    assert entry.key == case["bucket_key"]
    assert json.loads(encode_entry(entry)) == json.loads(case["value"])
    older = {name: value for name, value in json.loads(case["value"]).items() if name not in NEWER}
    read = decode_entry(case["bucket_key"], json.dumps(older).encode())
    assert (read.draining if isinstance(read, WorkerEntry) else isinstance(read, TypeEntry) and read.keyed) is False


@dataclass
class Add:
    amount: int


@dataclass
class Total:
    value: int


@natsrt.keyed
class Counter(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("counts")
        self.value = 0

    @message_handler
    async def add(self, message: Add, ctx: MessageContext) -> Total:
        self.value += message.amount
        return Total(self.value)

    async def save_state(self) -> Mapping[str, Any]:
        return {"value": self.value}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]


async def test_a_worker_answers_what_the_vectors_tell_it_and_leaves_as_the_protocol_says(
    server: EmbeddedServer, namespace: str
) -> None:
    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    await natsrt.register(runtime, Counter, "counter", Counter)
    await runtime.add_subscription(TypeSubscription("numbers", "counter"))
    client = await nats.connect(server.url)
    changes: list[Msg] = []

    async def on_change(message: Msg) -> None:
        changes.append(message)

    try:
        async with runtime:
            worker_id = str(runtime.worker_id)

            def filled(text: str) -> str:
                return text.replace("<worker>", worker_id)

            await client.subscribe(f"{namespace}.natsrt.registry.worker.{worker_id}", cb=on_change)
            for case in KEYED["conversation"]:
                subject = f"{namespace}.{filled(case['subject'])}"
                if "answer" not in case:
                    await client.publish(subject, case["body"].encode())
                    continue
                answer = envelope.decode((await client.request(subject, case["body"].encode(), timeout=5)).data)
                assert answer is not None and answer.type == envelope.REPLY, case["name"]
                assert answer.json() == json.loads(filled(json.dumps(case["answer"]))), case["name"]
            jetstream = client.jetstream()
            bucket = f"{namespace}_natsrt_agents"
            stored = await jetstream.get_last_msg(f"KV_{bucket}", f"$KV.{bucket}.a.counter.one")
            record = decode_record("a.counter.one", stored.headers, stored.data, stored.seq or 0)
            assert (record.owner, record.body) == (worker_id, b'{"value":11111}')
        await eventually(lambda: len(changes) == 2)
        draining, left = changes
        assert json.loads(draining.data)["draining"] is True
        assert left.headers is not None
        assert (left.headers["KV-Operation"], left.headers["Natsrt-Left"]) == ("DEL", "in-order")
        stored = await jetstream.get_last_msg(f"KV_{bucket}", f"$KV.{bucket}.a.counter.one")
        assert decode_record("a.counter.one", stored.headers, stored.data, stored.seq or 0).owner is None
    finally:
        await client.close()


@cases("entries", REGISTRY)
def test_entries_of_the_registry_are_read_and_written(case: dict[str, Any]) -> None:
    entry = decode_entry(case["key"], case["value"].encode())
    written = json.loads(encode_entry(entry))
    expected = json.loads(case["value"])
    assert {name: written[name] for name in expected} == expected
    if "declarations" in case:
        assert isinstance(entry, SubscriptionEntry)
        assert entry.declared == case["declarations"]


@cases("patterns", DURABLE)
def test_patterns_of_durable_topics_mean_what_the_vectors_say(case: dict[str, Any]) -> None:
    pattern = case["pattern"]
    assert topic_filter(Subjects(), pattern) == case["subject"]
    assert DurableTopics(pattern).patterns == (pattern,)
    assert all(covers(pattern, topic_type) for topic_type in case["durable"])
    assert not any(covers(pattern, topic_type) for topic_type in case["others"])


@cases("headers", DURABLE)
def test_the_headers_of_durable_events_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    assert event_headers(case["id"], case["subject"], case["stream"]) == case["headers"]


@cases("later", DURABLE)
def test_delayed_events_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    topic, due = case["topic"], datetime.fromisoformat(case["due"])
    subjects = Subjects(topic.partition(".topic.")[0] if not topic.startswith("topic.") else "")
    assert subjects.delayed(case["stream"], case["id"], topic) == case["subject"]
    assert event_headers(case["id"], topic, case["stream"]) | delayed_headers(topic, due) == case["headers"]


@cases("reminders", DURABLE)
def test_reminders_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    subjects, agent, name = Subjects(), AgentId(*case["agent"]), case["reminder"]
    stream, topic = events_name(subjects, REMINDER_TOPICS.name), reminder_topic(agent, name)
    schedule = of_reminder(case.get("every"), case.get("cron"), case.get("timezone"), None)
    assert subjects.reminder(stream, agent.type, agent.key, name) == case["subject"]
    assert reminder_headers(subjects, stream, topic, "Order", schedule, case.get("blob")) == case["headers"]


@cases("tasks", DURABLE)
def test_tasks_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    subjects, task = Subjects(case.get("namespace", "")), TaskId.of(AgentId(*case["agent"]), case["id"])
    result, progress = (subjects.task(kind, *case["agent"], case["id"]) for kind in ("result", "progress"))
    assert (str(task), str(TaskId.parse(case["ticket"]))) == (case["ticket"], case["ticket"])
    assert subjects.topic(task.topic.type, task.topic.source) == case["subject"]
    assert task_of(TopicId(*subjects.parse_topic(case["subject"]))) == task
    assert (result, progress, subjects.told(result)) == (case["result"], case["progress"], case["told"])
    key = encode_text(task.agent.key)
    chosen = case.get("chosen", False)
    attributes = task_attributes(key, cancel_id(task), case["result_ttl"], case.get("attempts"), chosen=chosen)
    assert json.loads(f"{{{attributes.removeprefix(',')}}}") == case["attributes"]
    assert result_headers(task, case["state"], case["result_ttl"], "w-1", case.get("attempt")) == case["headers"]


def subjects_of(case: dict[str, Any]) -> Subjects:
    return Subjects(case.get("namespace", ""))


def delivery_of(case: dict[str, Any]) -> Delivery:
    """The delivery of an event that has failed."""
    time = round(case["stored_at"] * 1e6) * 1000
    reply = f"$JS.ACK.{case['stream']}.c.1.{case['sequence']}.1.{time}.0"
    return Delivery(Msg(None, "s", reply, b"{}", case["event_headers"]))  # type: ignore[arg-type]


def unhandled(case: dict[str, Any]) -> Unhandled:
    return Unhandled(
        delivery=delivery_of(case),
        subject=case["published_on"],
        agent_type=case["agent_type"],
        message_id=case["message_id"],
        reason=case["reason"],
        error=ValueError(case["raised"]),
        attempts=case["attempts"],
        failed_at=case["failed_at"],
    )


@cases("dead_letters", DURABLE)
def test_dead_letters_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    dead = subjects_of(case).dead_letter(case["agent_type"], case["stream"], case["sequence"])
    assert dead == case["subject"]
    letter = unhandled(case)
    assert letter.own_headers | letter.headers(ErrorTypes(), FULL, with_traceback=False) == case["headers"]


@cases("payload_ids", DURABLE)
def test_ids_of_payloads_say_what_the_vectors_say(case: dict[str, Any]) -> None:
    event = event_of(case["id"])
    if case["stream"] is None:
        assert event is None
    else:
        assert event == OfEvent(stream_mark(case["stream"]), case["time"])
        assert event_of(new_blob_id(event)) == event


@cases("redriven", DURABLE)
def test_what_is_redriven_is_stored_as_the_vectors_say(case: dict[str, Any]) -> None:
    of_letter = DURABLE["dead_letters"][case["letter"]]
    subjects, headers = subjects_of(of_letter), of_letter["headers"]
    stored = StoredMessage(
        stream="natsrt_dead",
        sequence=case["number"],
        stored_at=case["kept_at"],
        subject=of_letter["subject"],
        headers=headers,
        data=b"{}",
    )
    letter = DeadLetterBox(subjects, None).decode(stored)  # type: ignore[arg-type]
    assert (letter.agent_type, letter.attempts) == (of_letter["agent_type"], of_letter["attempts"])
    assert redrive_headers(letter) == case["headers"]
    subject = redriven(subjects, letter.stream, letter.agent_type, letter.sequence, letter.kept_at)
    assert subject == case["subject"]


@cases("retries", DURABLE)
def test_what_waits_for_a_later_attempt_is_stored_as_the_vectors_say(case: dict[str, Any]) -> None:
    subjects, own = subjects_of(case), (case["stream"], case["agent_type"], case["sequence"])
    assert retried(subjects, *own, case["attempts"]) == (case["subject"], case["target"])
    assert retries_of(subjects, *own) == case["found_by"]
    assert retry_of(subjects, case["stream"], case["target"]) == (case["sequence"], case["attempts"])
    delivery, due = delivery_of(case), datetime.fromisoformat(case["due"])
    arguments = (case["published_on"], case["message_id"], case["target"], due, case["kept_for"])
    assert retry_headers(delivery, *arguments) == case["headers"]


@cases("attempts", DURABLE)
def test_attempts_are_counted_as_the_vectors_say(case: dict[str, Any]) -> None:
    place = (case["stream"], case["sequence"], case["stored_at"])
    assert attempts_of(subjects_of(case), case["agent_type"], *place) == case["subject"]
    assert Counted.of(int(case["value"])) == Counted(case["attempts"], case["returned"], case["dead"])


@cases("fed", DURABLE)
def test_events_are_fed_with_the_attributes_of_the_vectors(case: dict[str, Any]) -> None:
    stream = stream_id(case["stream"], case["made_at"])
    event = StoredEvent(stream, case["sequence"], case["attempt"], case["stored_at"])
    assert event.attributes == case["attributes"]
    written = ",".join(envelope.attribute(name, value) for name, value in event.attributes.items())
    read = envelope.decode(envelope.encode(envelope.EVENT, f'"id":"m1",{written}', b"{}"))
    assert read is not None
    assert stored_event(read) == event


@cases("view", REGISTRY)
def test_questions_about_the_registry_and_their_answers_are_read(case: dict[str, Any]) -> None:
    question = read_question(json.loads(case["question"]))
    assert {name: value for name, value in question._asdict().items() if value} == json.loads(case["question"])
    page = read_page(json.loads(case["answer"]))
    assert [entry.key for entry in (*page.entries, *page.known)] == case["keys"]
    for entry in page.entries:
        assert decode_entry(entry.key, entry.value or b"").key == entry.key
    pages, view = Pages(), View()
    for entry in page.entries:
        view.put(entry.key, entry.revision, decode_entry(entry.key, entry.value or b""))
    view.saw(page.revision)
    written = read_page(json.loads(pages.entries(view, "")))
    assert (written.revision, [entry[:2] for entry in written.entries]) == (
        page.revision,
        [entry[:2] for entry in page.entries],
    )


@cases("required", REGISTRY)
def test_an_entry_without_a_required_field_is_refused_and_the_field_is_named(case: dict[str, Any]) -> None:
    fields = json.loads(case["value"])
    assert decode_entry(case["key"], case["value"].encode()).key == case["key"]
    for name in (name for name, value in fields.items() if value is not None):
        for lacking in ({other: value for other, value in fields.items() if other != name}, {**fields, name: None}):
            with pytest.raises(CannotDecode, match=f"the field '{name}' is missing"):
                decode_entry(case["key"], json.dumps(lacking).encode())


async def test_changes_of_the_registry_arrive_on_the_subjects_of_the_vectors(
    server: EmbeddedServer, namespace: str
) -> None:
    async with NatsAgentRuntime(server.url, namespace=namespace):
        client = await nats.connect(server.url)
        changes: list[Msg] = []

        async def on_change(message: Msg) -> None:
            changes.append(message)

        try:
            await client.subscribe(f"{namespace}.natsrt.registry.>", cb=on_change)
            for number, case in enumerate(REGISTRY["feed"], 1):
                key = f"$KV.{namespace}_natsrt_registry.{case['key']}"
                ack = await client.jetstream().publish(key, b"{}")
                await eventually(lambda number=number: len(changes) == number)  # type: ignore[misc]
                inside = case["subject"].removeprefix(f"{case['namespace']}." if "namespace" in case else "")
                assert changes[-1].subject == f"{namespace}.{inside}"
                assert (changes[-1].headers or {})["Nats-Sequence"] == str(ack.seq)
        finally:
            await client.close()


@pytest.mark.parametrize("case", REGISTRY["origins"], ids=lambda case: case["header"])
def test_the_origin_of_an_entry(case: dict[str, str]) -> None:
    origin = Origin.of({ORIGIN: case["header"]})
    assert origin == Origin(case["created"], case["domain"]) and str(origin) == case["header"]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("r.worker.w", {"pid": "5"}, "'pid' must be a whole number"),
        ("r.worker.w", {"draining": "no"}, "'draining' must be true or false"),
        ("r.type.t.w", {"handles": "Text"}, "'handles' must be a list of texts"),
        ("r.type.t.w", {"agent_type": 5}, "'agent_type' must be a text"),
    ],
)
def test_a_field_of_another_type_is_refused_in_words_of_json(key: str, value: dict[str, Any], problem: str) -> None:
    whole = {"agent_type": "t", "worker_id": "w", "name": "n", "hostname": "h", "pid": 5, "started": 1, "version": "1"}
    with pytest.raises(CannotDecode, match=problem):
        decode_entry(key, json.dumps({**whole, **value}).encode())


@pytest.mark.parametrize(("value", "kind"), [(5, "a number"), (True, "a boolean"), ([], "an array"), ({}, "an object")])
def test_an_attribute_that_is_no_string_is_named_in_words_of_json(value: object, kind: str) -> None:
    body = {"specversion": "1.0", "type": "natsrt.reply", "id": "1", "source": "/", "messagetype": value, "data": 1}
    with pytest.raises(CannotDecode, match=f"must be a string, not {kind}"):
        envelope.decode(json.dumps(body).encode())


def test_a_reply_without_messagetype_keeps_its_body() -> None:
    body = b'{"specversion":"1.0","type":"natsrt.reply","id":"1","source":"/","data":{"text":"a"}}'
    read = envelope.decode(body)
    assert read is not None
    with pytest.raises(CannotDecode) as raised:
        read.required("messagetype")
    assert raised.value.payload == body


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@cases("known", ERRORS)
def test_errors_are_rebuilt_as_the_vectors_say(case: dict[str, Any]) -> None:
    got = ErrorTypes().rebuild(json.dumps(case["data"]).encode(), agent="shop/default", worker_id="w-1")
    assert qualified_name(type(got)) == case["class"]
    assert case["arguments"] is None or list(got.args) == case["arguments"]
    assert {name: getattr(got, name) for name in case.get("fields", {})} == case.get("fields", {})
    cause = got.__cause__
    assert (None if cause is None else qualified_name(type(cause))) == case.get("cause")
    members = got.exceptions if isinstance(got, BaseExceptionGroup) else ()
    assert [qualified_name(type(member)) for member in members] == case.get("exceptions", [])
    assert got.__notes__[:-1] == case.get("notes", [])  # the last one says where it was raised


@cases("bases", ERRORS)
def test_errors_that_decide_are_known_by_their_bases_as_the_vectors_say(case: dict[str, Any]) -> None:
    types, payload = ErrorTypes(), json.dumps(case["data"]).encode()
    got = types.as_base(types.rebuild(payload, agent="shop/default", worker_id="w-1"))
    assert qualified_name(type(got)) == case["class"]
    assert {name: getattr(got, name) for name in case["fields"]} == case["fields"]
    described = describe(got, with_traceback=False, agent="shop/default")
    assert json.loads(described.payload) == {"code": 500} | case["data"]


@cases("headers", ERRORS)
def test_errors_have_the_headers_of_the_vectors(case: dict[str, Any]) -> None:
    failure = describe(ValueError(case["text"]), with_traceback=False)
    assert failure.headers == {SERVICE_ERROR: case["header"], SERVICE_ERROR_CODE: "500"}
    assert json.loads(failure.payload)["message"] == case["text"]


@cases("busy", ERRORS)
def test_refusals_are_recognised_as_the_vectors_say(case: dict[str, Any]) -> None:
    assert is_refusal(case["headers"], case["body"].encode()) is case["refused"]


@cases("plain", ERRORS)
def test_plain_errors_are_read_as_the_vectors_say(case: dict[str, Any]) -> None:
    assert decode_answer(case["headers"], case["body"].encode()) is None
    got = ErrorTypes().rebuild(case["body"].encode(), agent=None, worker_id=None, text="busy (503)")
    assert qualified_name(type(got)) == case["class"]
    assert str(got) == "busy"


# ---------------------------------------------------------------------------------------------------------------------
# A worker


@dataclass
class Text:
    text: str


class Upper(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("writes in upper case")

    @message_handler
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        return Text(message.text.upper())


def contains(whole: Any, part: Any) -> bool:
    """True if all members of ``part`` are in ``whole`` and equal, at any depth."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(name in whole and contains(whole[name], value) for name, value in part.items())
    return bool(whole == part)


async def test_a_worker_answers_as_the_vectors_say(server: EmbeddedServer, namespace: str) -> None:
    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    await natsrt.register(runtime, Upper, "upper", Upper)
    client = await nats.connect(server.url)
    answers = await client.subscribe("_INBOX.vectors.*")
    try:
        async with runtime:
            for number, case in enumerate(WORKER["conversation"]):
                filled = {
                    name: json.loads(json.dumps(case[name]).replace("<worker>", str(runtime.worker_id)))
                    for name in ("subject", "body", "answer")
                }
                reply = f"_INBOX.vectors.{number}"
                await client.publish(f"{namespace}.{filled['subject']}", filled["body"].encode(), reply=reply)
                if filled["answer"] is None:
                    continue  # an answer would come before the next one, and be another one than is expected
                message = await answers.next_msg(timeout=5)
                assert message.subject == reply, case["name"]
                assert contains(json.loads(message.data), filled["answer"]), (case["name"], message.data)
    finally:
        await client.close()


def test_records_are_as_the_vectors_say() -> None:
    subjects = Subjects("")
    passing = Passing(subjects, "r1")

    def take(message: Any) -> Any:
        body = message["body"].encode()
        return passing.take(message["subject"], message["reply"], message["headers"], body, 1_700_000_000.0)

    for case in RECORDED["records"]:
        record = take(case["message"])
        assert json.loads(record.header()) == case["header"], case["name"]
        assert passing.subject_of(record, "natsrt.record.audit") == case["stored"], case["name"]
        assert read_record({"natsrt-record": record.header()}, record.data) == record, case["name"]
    for case in RECORDED["ignored"]:
        assert take(case["message"]) is None, case["name"]
    assert passing.copies == 2


@pytest.mark.parametrize("case", RECORDED["refused"], ids=lambda case: case["reason"])
def test_a_header_that_is_no_record_of_what_passes_is_refused(case: Any) -> None:
    headers = {} if case["header"] is None else {RECORD_HEADER: case["header"]}
    with pytest.raises(CannotDecode, match=re.escape(case["reason"])):
        read_record(headers, b"")


@cases("calls", STREAMS)
def test_windows_of_streams_are_read_as_the_vectors_say(case: dict[str, Any]) -> None:
    body = envelope.Envelope({"type": envelope.CALL} | case["attributes"], b"", b"")
    if "error" in case:
        with pytest.raises(CannotDecode):
            read_window(body)
        return
    assert list(read_window(body)) == case["read"]
    if "window" in case:
        attributes = stream_attributes(
            case["parts_to"],
            Window(*case["window"]),
            answers=case.get("answers", False),
            wants_items=case.get("items", True),
        )
        assert json.loads(f"{{{attributes.removeprefix(',')}}}") == case["attributes"]


@cases("progress", STREAMS)
def test_progress_of_streams_is_written_as_the_vectors_say(case: dict[str, Any]) -> None:
    progress = said(case)
    awaited = case.get("awaited", {})
    assert encode_progress("_INBOX.x.s1", progress, stop=case["stop"], awaited=awaited).decode() == case["body"]
    body = envelope.decode(case["body"].encode())
    assert body is not None and body.type == envelope.MORE
    assert read_progress(body.json()) == (progress, case["stop"])
    assert read_awaited(body.json()) == awaited


@pytest.mark.parametrize(
    "awaited",
    [[], {"1": "x"}, {"1": [1]}, {"1": ["x"] * 1_001}, {str(n): [] for n in range(1_001)}, {"1": ["x" * 100_000]}],
    ids=["a list", "a text", "a number", "many calls", "many questions", "a long id"],
)
def test_what_callers_say_about_their_answers_is_checked(awaited: Any) -> None:
    with pytest.raises(CannotDecode, match="progress of a stream"):
        read_awaited({"awaited": awaited})


def said(case: dict[str, Any]) -> Progress:
    missing = case["missing"]
    return Progress(case["consumed"], case["have"], None if missing is None else (missing[0], missing[1]))


def test_lost_parts_come_again_as_in_the_conversation() -> None:
    conversation = STREAMS["conversation"]
    window = Window(*conversation["window"])
    worker, caller = PartsSent(window), PartsReceived[int](window)
    for step in conversation["steps"]:
        for number in step.get("worker_sends", ()):
            assert worker.has_room and worker.add(str(number).encode(), 1, 0.0) == number
        if "caller_says" in step:
            assert caller.progress() == said(step["caller_says"])
            again = [int(body) for body in worker.told(said(step["caller_says"]), 0.1, 0.4)]
            assert again == step["worker_sends_again"]
        for number in step.get("arrive", ()):
            assert caller.receive(number, number, 1)
        assert [caller.take() for _ in step.get("consumed", ())] == step.get("consumed", [])
        if "parts" in step:
            caller.end(step["parts"])
    assert caller.is_complete and worker.is_received
