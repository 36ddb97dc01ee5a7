"""Reminders whose messages do not fit into one message of the server: when their payloads are there, and when not."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nats
import nats.js.errors
import pytest
import pytest_asyncio
from autogen_core import AgentId, MessageContext, RoutedAgent, event
from nats.js import JetStreamContext

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import MessageTooLarge
from natsrt.jetstream.payload_sweep import PayloadSweep
from natsrt.reminder_types import reminder_topic
from tests.support.processes import eventually

MAX_PAYLOAD = 16 * 1024
AGENT = AgentId("clerk", "ada")
LARGE = "x" * 3 * MAX_PAYLOAD
OTHER = "y" * 3 * MAX_PAYLOAD
LONG = 3600.0


@dataclass
class Note:
    text: str


@dataclass
class Seen:
    texts: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    fails: bool = False


class Clerk(RoutedAgent):
    def __init__(self, seen: Seen) -> None:
        super().__init__("notes what it is reminded of")
        self._seen = seen

    @event
    async def on_note(self, message: Note, ctx: MessageContext) -> None:
        assert ctx.sender is None and ctx.topic_id == reminder_topic(self.id, "poll")
        if self._seen.fails:
            raise ValueError("not now")
        self._seen.texts.append(message.text)
        self._seen.ids.append(ctx.message_id)


def configuration(folder: Path) -> Path:
    config = folder / "nats.conf"
    config.write_text(f"max_payload: {MAX_PAYLOAD}\njetstream {{ store_dir: '{folder / 'js'}' }}\n")
    return config


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    """A server with a small max_payload."""
    async with EmbeddedServer(config=configuration(tmp_path_factory.mktemp("server")), port=-1) as shared:
        yield shared


class Place:
    """The runtimes of one namespace. What is not needed any more is swept within seconds."""

    def __init__(self, url: str, namespace: str, stack: AsyncExitStack, js: JetStreamContext) -> None:
        self.url, self.namespace, self._stack, self.js = url, namespace, stack, js
        self.seen = Seen()

    def make(self, **settings: Any) -> NatsAgentRuntime:
        settings = {"namespace": self.namespace, "blob_ttl": 1, "publish_timeout": 1, "retry_delay": 0.05} | settings
        return NatsAgentRuntime(self.url, **settings)

    async def runtime(self) -> NatsAgentRuntime:
        return await self._stack.enter_async_context(self.make())

    async def unstarted(self, **settings: Any) -> NatsAgentRuntime:
        runtime = self.make(**settings)
        await natsrt.register(runtime, Clerk, "clerk", lambda: Clerk(self.seen))
        return runtime

    async def worker(self, **settings: Any) -> NatsAgentRuntime:
        return await self._stack.enter_async_context(await self.unstarted(**settings))

    async def payloads(self) -> dict[str, str]:
        """The ids of the payloads that are stored, with their times to live."""
        stream = f"{self.namespace}_natsrt_blobs"
        try:
            info = await self.js.stream_info(stream, subjects_filter=f"{self.namespace}.natsrt.blob.*.0")
        except nats.js.errors.NotFoundError:
            return {}
        found = {}
        for subject in info.state.subjects or {}:
            with contextlib.suppress(nats.js.errors.NotFoundError):  # it was deleted at this moment
                chunk = await self.js.get_last_msg(stream, subject)
                found[subject.split(".")[-2]] = (chunk.headers or {})["Nats-TTL"]
        return found

    async def has(self, payloads: int) -> None:
        async def has() -> bool:
            return len(await self.payloads()) == payloads

        await eventually(has, 30.0)

    async def fired(self, times: int) -> None:
        """Wait until the reminder was published so often."""
        subject = f"{self.namespace}.topic.>"

        async def has() -> bool:
            info = await self.js.stream_info(f"{self.namespace}_natsrt_events_reminders", subjects_filter=subject)
            return sum((info.state.subjects or {}).values()) >= times

        await eventually(has, 30.0)


@pytest.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        client = await nats.connect(server.url)
        stack.push_async_callback(client.close)
        yield Place(server.url, namespace, stack, client.jetstream())


def sweep_of(worker: NatsAgentRuntime) -> PayloadSweep:
    return worker.running.incoming.durable._parts.payloads


def settled_at(blob_id: str) -> int:
    """When the reminder with this payload is stored for certain, in seconds since the epoch."""
    return int(blob_id.rpartition("-")[2], 16)


async def handled(place: Place, times: int) -> None:
    await eventually(lambda: len(place.seen.texts) >= times, 30.0)


@pytest.mark.parametrize("keyed", [(), ("clerk",)], ids=["plain", "keyed"])
@pytest.mark.parametrize("part", [0.9, 0.999, 1, 50])
async def test_a_reminder_of_any_size_comes_each_time_and_leaves_nothing(
    place: Place, part: float, keyed: tuple[str, ...]
) -> None:
    text = "x" * (int(part * MAX_PAYLOAD) - len('{"text":""}'))
    worker = await place.worker(keyed=list(keyed))
    await worker.remind(AGENT, "poll", Note(text), every=1)
    assert len(await place.payloads()) == (part > 0.9)
    await handled(place, 2)
    assert await worker.forget_reminder(AGENT, "poll")
    await place.has(0)
    assert set(place.seen.texts) == {text} and len(set(place.seen.ids)) == len(place.seen.texts)
    assert all(one.startswith(f"{place.namespace}_natsrt_events_reminders-") for one in place.seen.ids)


async def test_a_large_reminder_outlives_restarts_of_everything(tmp_path: Path, namespace: str) -> None:
    config = configuration(tmp_path)
    seen = Seen()
    for times in (1, 2):
        async with EmbeddedServer(config=config, port=-1) as own, AsyncExitStack() as stack:
            client = await nats.connect(own.url)
            stack.push_async_callback(client.close)
            place = Place(own.url, namespace, stack, client.jetstream())
            place.seen = seen
            worker = await place.worker()
            if times == 1:
                await worker.remind(AGENT, "poll", Note(LARGE), every=1)
            before = len(seen.texts)
            await handled(place, before + 1)
            if times == 2:
                assert await worker.forget_reminder(AGENT, "poll")
                await place.has(0)
    assert set(seen.texts) == {LARGE}


async def test_a_reminder_that_is_set_again_has_the_new_payload_only(place: Place) -> None:
    worker = await place.worker()
    await worker.remind(AGENT, "poll", Note(LARGE), every=LONG)
    (first,) = await place.payloads()
    await worker.remind(AGENT, "poll", Note(OTHER), every=1)
    await place.has(1)
    (second,) = await place.payloads()
    assert second != first
    await handled(place, 2)
    await worker.remind(AGENT, "poll", Note("small"), every=LONG)
    await place.has(0)
    assert set(place.seen.texts) == {OTHER}
    await worker.remind(AGENT, "poll", Note(LARGE), every=LONG)
    await place.has(1)


async def test_a_reminder_that_is_sent_twice_does_not_replace_one_that_was_set_meanwhile(place: Place) -> None:
    runtime = await place.runtime()
    stream = f"{place.namespace}_natsrt_events_reminders"
    subject = f"{place.namespace}.natsrt.later.{stream}.reminder.clerk.ada.poll"
    await runtime.remind(AGENT, "poll", Note(LARGE), every=LONG)
    first = await place.js.get_last_msg(stream, subject)
    assert first.data is not None
    await runtime.remind(AGENT, "poll", Note(OTHER), every=LONG)
    assert (await place.js.publish(subject, first.data, headers=first.headers)).duplicate
    (blob_id,) = await place.payloads()
    last = await place.js.get_last_msg(stream, subject)
    assert blob_id.encode() in (last.data or b"")


async def test_the_payload_of_one_reminder_stays_when_another_is_removed(place: Place) -> None:
    runtime = await place.runtime()
    for name in ("one", "two"):
        await runtime.remind(AGENT, name, Note(LARGE), every=LONG)
    assert await runtime.forget_reminder(AGENT, "one")
    await place.has(1)
    assert not await runtime.forget_reminder(AGENT, "one")
    assert await runtime.forget_reminder(AGENT, "two")
    await place.has(0)


async def test_the_sweep_keeps_the_payload_of_a_reminder_as_long_as_it_is_set(place: Place) -> None:
    worker = await place.worker()
    await worker.remind(AGENT, "poll", Note(LARGE), every=1)
    ((blob_id, lives),) = (await place.payloads()).items()
    assert lives == "never"
    await eventually(lambda: time.time() > settled_at(blob_id) + 1, 30.0)
    sweep = sweep_of(worker)
    assert blob_id not in (await sweep._candidates()).get(f"{place.namespace}_natsrt_events_reminders", ())
    sweep._gone_since = {blob_id: 0.0}  # as if it had been gone for long
    assert await sweep.sweep() == 0
    times = len(place.seen.texts)
    await handled(place, times + 2)
    assert list(await place.payloads()) == [blob_id]


async def test_what_was_due_before_a_reminder_was_removed_is_handled_and_then_its_payload_is_swept(
    place: Place,
) -> None:
    async with await place.unstarted():
        setter = await place.runtime()
        await setter.remind(AGENT, "other", "small", every=LONG)
    await setter.remind(AGENT, "poll", Note(LARGE), every=1)
    await place.fired(1)
    assert await setter.forget_reminder(AGENT, "poll")
    (blob_id,) = await place.payloads()
    bystander = place.make()  # it sweeps, and does not handle what waits
    await bystander.register_factory("other", lambda: Clerk(place.seen), expected_class=Clerk)
    async with bystander:
        await bystander.remind(AgentId("other", "a"), "poll", Note("z"), every=LONG)
        await eventually(lambda: time.time() > settled_at(blob_id) + 1, 30.0)
        sweep = sweep_of(bystander)
        sweep._gone_since = {blob_id: 0.0}
        assert await sweep.sweep() == 0
    await place.worker()
    await handled(place, 1)
    assert set(place.seen.texts) == {LARGE}
    await place.has(0)


async def test_a_dead_letter_of_a_removed_reminder_keeps_its_payload(place: Place) -> None:
    place.seen.fails = True
    worker = await place.worker(max_deliver=1)
    await worker.remind(AGENT, "poll", Note(LARGE), every=1)
    await eventually(lambda: worker.health().dead_letters)
    assert await worker.forget_reminder(AGENT, "poll")
    (blob_id,) = await place.payloads()
    await eventually(lambda: time.time() > settled_at(blob_id) + 1, 30.0)
    sweep = sweep_of(worker)
    sweep._gone_since = {blob_id: 0.0}
    assert await sweep.sweep() == 0
    place.seen.fails = False
    letters = [letter async for letter in worker.dead_letters()]
    for letter in letters:
        await worker.redrive(letter)
    await handled(place, len(letters))
    assert set(place.seen.texts) == {LARGE}


async def test_a_single_reminder_has_a_payload_that_expires_and_is_swept_when_it_was_handled(place: Place) -> None:
    worker = await place.worker()
    await worker.remind(AGENT, "poll", Note(LARGE), at=datetime.now(UTC))
    assert set((await place.payloads()).values()) == {f"{30 * 86400 + 1}s"}
    await handled(place, 1)
    await place.has(0)
    assert place.seen.texts == [LARGE]


async def test_a_reminder_over_max_blob_size_is_refused_before_anything_is_stored(place: Place) -> None:
    worker = await place.worker(max_blob_size=2 * MAX_PAYLOAD)
    with pytest.raises(MessageTooLarge, match="max_blob_size"):
        await worker.remind(AGENT, "poll", Note(LARGE), every=1)
    assert await worker.reminders() == [] and not await place.payloads()
