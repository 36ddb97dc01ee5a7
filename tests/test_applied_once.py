"""Events of streams for keyed agents: each is applied once to the state, however often and wherever it arrives."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import orjson
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, message_handler

from natsrt import NatsAgentRuntime, NoLiveWorker, StateNotSaved, UndeliveredCall, WorkerLost
from natsrt.embedded import EmbeddedServer
from natsrt.errors import CannotDecode, StateUnavailable
from natsrt.hosting.lines import Again, Lines, Outcome, Settled, Tries
from natsrt.jetstream.agent_records import AgentRecords, Record
from natsrt.jetstream.record import HANDLED_BYTES, Stored, advanced, decode_record, encode_head, record_key
from natsrt.keyed.ownership import NotOwned
from natsrt.keyed.releasing import Releasing
from natsrt.keyed.slots import AgentSlot
from natsrt.keyed.turns import Turns
from natsrt.keyed_types import KeyedOptions
from natsrt.retry_types import RetryOptions
from natsrt.wire import envelope
from natsrt.wire.envelope import KEY_HEADER, TYPE_HEADER
from natsrt.wire.stored_events import StoredEvent, stored_event, stream_id
from tests.support.processes import Processes, eventually

AGENT = AgentId("ledger", "a")
TOPIC = TopicId("orders", "a")
STREAM = stream_id("natsrt_events", 1_767_323_045.5)
MESSAGE = KeyedOptions()
OTHER = stream_id("natsrt_events", 1_767_323_046.5)
"""A stream of the same name, made anew."""


@dataclass
class Booked:
    number: int


@dataclass
class Numbers:
    numbers: list[int]


class Refused(Exception):
    """The handler does not like a number."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"number {number} is refused")


class Books:
    """What the agents of one test handled, and what they wait for."""

    def __init__(self) -> None:
        self.handled: list[int] = []
        self.refused: set[int] = set()
        self.gates: dict[int, asyncio.Event] = {}
        self.odd_state = False


class Ledger(RoutedAgent):
    """Keeps the numbers that it was told, in order."""

    def __init__(self, books: Books) -> None:
        super().__init__("keeps numbers")
        self.books = books
        self.numbers: list[int] = []

    @message_handler
    async def on_booked(self, message: Booked, ctx: MessageContext) -> Numbers:
        self.books.handled.append(message.number)
        if message.number in self.books.gates:
            await self.books.gates[message.number].wait()
        if message.number in self.books.refused:
            raise Refused(message.number)
        if message.number:
            self.numbers.append(message.number)
        return Numbers(self.numbers)

    async def save_state(self) -> Mapping[str, Any]:
        return {"numbers": {1} if self.books.odd_state else self.numbers}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.numbers = list(state["numbers"])


class Stateless(RoutedAgent):
    """Counts in memory only."""

    def __init__(self, books: Books) -> None:
        super().__init__("keeps nothing")
        self.books = books

    @message_handler
    async def on_booked(self, message: Booked, ctx: MessageContext) -> None:
        self.books.handled.append(message.number)


def event_body(number: int, **attributes: str) -> envelope.Envelope:
    """The envelope of an event as it was published on its topic."""
    head = {"id": f"m{number}", "source": "/", "messagetype": "Booked", **attributes}
    text = envelope.encode(envelope.EVENT, orjson.dumps(head)[1:-1].decode(), orjson.dumps({"number": number}))
    body = envelope.decode(text)
    assert body is not None
    return body


async def deliver(
    runtime: NatsAgentRuntime, number: int, *, sequence: int | None = None, stream: str = STREAM, attempt: int = 1
) -> BaseException | None:
    """Deliver the event with this number, whose sequence is the number too unless one is given."""
    event = StoredEvent(stream, sequence or number, attempt, 1_767_323_050.25)
    return await runtime.running.outgoing.delivery.deliver_confirmed(AGENT, TOPIC, event_body(number), event)


class Scene:
    """Workers of one namespace, and a runtime that delivers events to their agents."""

    def __init__(self, url: str, namespace: str, stack: AsyncExitStack) -> None:
        self.url, self.namespace, self._stack = url, namespace, stack
        self.books = Books()

    async def runtime(self, **settings: Any) -> NatsAgentRuntime:
        runtime = NatsAgentRuntime(self.url, namespace=self.namespace, **settings)
        runtime.add_error_type(Refused)
        await self._stack.enter_async_context(runtime)
        return runtime

    async def worker(self, options: KeyedOptions = MESSAGE, cls: Any = Ledger, **settings: Any) -> Any:
        worker = await self.runtime(**settings)
        await worker.register_factory(AGENT.type, lambda: cls(self.books), expected_class=cls, keyed=options)
        return worker


@pytest.fixture
async def scene(server: EmbeddedServer, namespace: str) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        yield Scene(server.url, namespace, stack)


async def stored(runtime: NatsAgentRuntime) -> Record:
    record = await runtime.running.records.read(AGENT)
    assert record is not None
    return record


async def numbers(runtime: NatsAgentRuntime) -> list[int]:
    """The numbers in the stored state."""
    state = await runtime.running.records.state(await stored(runtime))
    return [] if state is None else orjson.loads(state)["numbers"]


# ---------------------------------------------------------------------------------------------------------------------
# Once


async def test_an_event_is_handled_once_however_often_it_is_delivered(scene: Scene) -> None:
    await scene.worker()
    feeder = await scene.runtime()
    assert [await deliver(feeder, number) for number in (1, 2, 1, 2, 2, 3)] == [None] * 6
    assert scene.books.handled == [1, 2, 3]
    assert await numbers(feeder) == [1, 2, 3]
    assert (await stored(feeder)).handled == {STREAM: 3}


async def test_each_stream_has_its_own_sequence_also_one_of_the_same_name_made_anew(scene: Scene) -> None:
    await scene.worker()
    feeder = await scene.runtime()
    for number, stream in ((7, STREAM), (3, OTHER), (4, OTHER), (4, OTHER), (7, STREAM)):
        assert await deliver(feeder, number, stream=stream) is None
    assert await numbers(feeder) == [7, 3, 4]
    assert (await stored(feeder)).handled == {STREAM: 7, OTHER: 4}


async def test_the_state_and_the_sequence_are_stored_in_one_write_before_the_answer(scene: Scene) -> None:
    await scene.worker()
    feeder = await scene.runtime()
    await deliver(feeder, 1)
    before = await stored(feeder)
    await deliver(feeder, 2)
    after = await stored(feeder)
    assert (after.handled, after.revision) == ({STREAM: 2}, before.revision + 1)
    assert await numbers(feeder) == [1, 2]


async def test_the_sequence_is_stored_although_the_state_did_not_change(scene: Scene) -> None:
    await scene.worker()
    feeder = await scene.runtime()
    await deliver(feeder, 1)
    await deliver(feeder, 0, sequence=2)
    assert (await stored(feeder)).handled == {STREAM: 2}
    before = (await stored(feeder)).revision
    await deliver(feeder, 0, sequence=2)
    assert (await stored(feeder)).revision == before, "a copy writes nothing"


async def test_a_handler_that_raises_does_not_advance_the_sequence_and_its_error_keeps_its_type(scene: Scene) -> None:
    await scene.worker()
    feeder = await scene.runtime()
    scene.books.refused = {2}
    assert await deliver(feeder, 1) is None
    failure = await deliver(feeder, 2)
    assert isinstance(failure, Refused) and failure.number == 2
    assert (await stored(feeder)).handled == {STREAM: 1}
    scene.books.refused = set()
    assert await deliver(feeder, 2, attempt=2) is None
    assert scene.books.handled == [1, 2, 2]
    assert await numbers(feeder) == [1, 2]


async def test_a_later_event_is_handled_when_an_earlier_one_was_given_up(scene: Scene) -> None:
    await scene.worker()
    feeder = await scene.runtime()
    scene.books.refused = {1}
    assert await deliver(feeder, 1) is not None
    assert await deliver(feeder, 2) is None
    scene.books.refused = set()
    assert await deliver(feeder, 1) is None, "it counts as handled: it was given up"
    assert await numbers(feeder) == [2]


async def test_an_event_whose_state_could_not_be_stored_is_stored_and_not_handled_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.worker()
    feeder = await scene.runtime()
    await deliver(feeder, 1)
    save = AgentRecords.save

    async def refuse(*args: Any) -> Record:
        raise StateUnavailable("store", "the test refuses it")

    monkeypatch.setattr(AgentRecords, "save", refuse)
    with pytest.raises(StateNotSaved):
        await deliver(feeder, 2)
    with pytest.raises(StateNotSaved):
        await deliver(feeder, 2)
    assert (await stored(feeder)).handled == {STREAM: 1}
    monkeypatch.setattr(AgentRecords, "save", save)
    assert await deliver(feeder, 2) is None
    assert scene.books.handled == [1, 2]
    assert await numbers(feeder) == [1, 2]
    assert (await stored(feeder)).handled == {STREAM: 2}


async def test_a_sequence_is_not_stored_with_a_state_that_was_taken_before_its_event(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await scene.worker(KeyedOptions(save="manual", concurrency="concurrent"))
    feeder = await scene.runtime()
    await deliver(feeder, 1)
    taken, goes_on = asyncio.Event(), asyncio.Event()

    async def save_state(ledger: Ledger) -> Mapping[str, Any]:
        state = {"numbers": list(ledger.numbers)}
        taken.set()
        await goes_on.wait()
        return state

    monkeypatch.setattr(Ledger, "save_state", save_state)
    slot = worker.running.incoming.turns._slots.find(AGENT.type, AGENT.key)
    storing = asyncio.ensure_future(worker.running.incoming.turns._instances.store(slot))
    await taken.wait()
    await deliver(feeder, 2)
    goes_on.set()
    await storing
    assert await numbers(feeder) == [1]
    assert (await stored(feeder)).handled == {STREAM: 1}
    await worker.store_state(AGENT)
    assert (await stored(feeder)).handled == {STREAM: 2}


@pytest.mark.parametrize("concurrency", ["serial", "concurrent"])
async def test_two_copies_at_the_same_time_are_handled_once(scene: Scene, concurrency: Any) -> None:
    await scene.worker(KeyedOptions(concurrency=concurrency))
    feeder, other = await scene.runtime(), await scene.runtime()
    scene.books.gates[1] = asyncio.Event()
    copies = [asyncio.ensure_future(deliver(one, 1)) for one in (feeder, other)]
    await eventually(lambda: scene.books.handled == [1])
    for runtime in (feeder, other):
        await runtime.running.connection.barrier()
    await asyncio.sleep(0)
    scene.books.gates[1].set()
    assert await asyncio.gather(*copies) == [None, None]
    assert scene.books.handled == [1]


async def test_calls_and_events_without_a_place_are_handled_as_before(scene: Scene) -> None:
    await scene.worker()
    feeder = await scene.runtime()
    await deliver(feeder, 5)
    assert await feeder.send_message(Booked(6), AGENT) == Numbers([5, 6])
    assert (await stored(feeder)).handled == {STREAM: 5}


# ---------------------------------------------------------------------------------------------------------------------
# Where the state is stored at other times


async def test_with_interval_events_are_answered_at_once_and_stored_with_the_state(scene: Scene) -> None:
    worker = await scene.worker(KeyedOptions(save="interval", save_interval=1000.0))
    feeder = await scene.runtime()
    assert [await deliver(feeder, number) for number in (1, 2, 1, 2)] == [None] * 4
    assert scene.books.handled == [1, 2]
    assert (await stored(feeder)).handled == {}
    await worker.stop()
    assert (await stored(feeder)).handled == {STREAM: 2}
    assert await numbers(feeder) == [1, 2]


async def test_with_interval_what_was_not_stored_is_applied_again_to_the_older_state(scene: Scene) -> None:
    worker = await scene.worker(KeyedOptions(save="interval", save_interval=1000.0))
    feeder = await scene.runtime()
    await deliver(feeder, 1)
    await worker.store_state(AGENT)
    await deliver(feeder, 2)
    slot = worker.running.incoming.turns._slots.find(AGENT.type, AGENT.key)
    await worker.running.incoming.turns._instances.drop(slot)  # as if it were killed
    assert await deliver(feeder, 1) is None
    assert await deliver(feeder, 2) is None
    assert scene.books.handled == [1, 2, 2]
    await worker.store_state(AGENT)
    assert await numbers(feeder) == [1, 2]


async def test_with_interval_no_half_applied_event_is_stored(scene: Scene) -> None:
    worker = await scene.worker(KeyedOptions(save="interval", save_interval=0.05, idle_timeout=None))
    feeder = await scene.runtime()
    await deliver(feeder, 1)
    slot = worker.running.incoming.turns._slots.find(AGENT.type, AGENT.key)
    scene.books.gates[2] = asyncio.Event()
    handling = asyncio.ensure_future(deliver(feeder, 2))
    await eventually(lambda: scene.books.handled == [1, 2])
    slot.changed, slot.saved_at = True, 0.0
    releasing = worker.running.incoming.ownership._releasing
    assert list(releasing._due(slot.hosted, worker.running.loop.time())) == []
    scene.books.gates[2].set()
    await handling
    await eventually(lambda: slot.record is not None and slot.record.handled == {STREAM: 2})


async def test_with_interval_an_agent_that_is_always_busy_is_stored_between_two_events(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Releasing, "_due", lambda self, hosted, now: ())
    worker = await scene.worker(KeyedOptions(save="interval", save_interval=100.0))
    feeder = await scene.runtime()
    await deliver(feeder, 1)
    assert (await stored(feeder)).handled == {}
    slot = worker.running.incoming.turns._slots.find(AGENT.type, AGENT.key)
    slot.saved_at -= 100.0
    await deliver(feeder, 2)
    assert (await stored(feeder)).handled == {STREAM: 2}


async def test_an_agent_without_a_state_stores_nothing_and_handles_each_event_once_while_it_lives(scene: Scene) -> None:
    await scene.worker(cls=Stateless)
    feeder = await scene.runtime()
    assert [await deliver(feeder, number) for number in (1, 2, 1, 2)] == [None] * 4
    assert scene.books.handled == [1, 2]
    assert (await stored(feeder)).handled == {}


# ---------------------------------------------------------------------------------------------------------------------
# Over owners


async def test_the_sequence_survives_a_release_and_another_owner_knows_it(scene: Scene) -> None:
    first = await scene.worker()
    feeder = await scene.runtime()
    await deliver(feeder, 1)
    second = await scene.worker()
    await first.stop()
    assert await deliver(feeder, 1) is None
    assert await deliver(feeder, 2) is None
    assert scene.books.handled == [1, 2]
    assert (await stored(feeder)).owner == second.running.worker_id
    assert (await stored(feeder)).handled == {STREAM: 2}


async def test_a_worker_that_owns_the_agent_no_more_refuses_and_the_event_goes_to_who_owns_it(scene: Scene) -> None:
    first = await scene.worker()
    feeder = await scene.runtime()
    await deliver(feeder, 1)
    second = await scene.worker()
    record = await stored(feeder)
    await feeder.running.records.take(record, second.running.worker_id)  # as after a partition
    first.running.ownership.doubt()
    assert await deliver(feeder, 2) is None
    assert await deliver(feeder, 1) is None
    assert await numbers(feeder) == [1, 2]
    assert scene.books.handled == [1, 2]


async def test_a_worker_that_owns_the_agent_no_more_does_not_claim_it_for_an_event(scene: Scene) -> None:
    worker = await scene.worker()
    feeder = await scene.runtime()
    await deliver(feeder, 1)
    await feeder.running.records.take(await stored(feeder), "gone-1")
    worker.running.ownership._doubts.epoch += 1  # it stalled, and does not know yet
    subject = worker.running.network.subjects.instance(AGENT.type, AGENT.key)
    attributes = {"topictype": "orders", "topicsource": "a", **StoredEvent(STREAM, 2).attributes}
    body = envelope.rewrite(event_body(2), subject="a", **attributes)
    reply = await feeder.running.connection.client.request(subject, body, timeout=20)
    assert reply.headers and reply.headers["Nats-Service-Error-Code"] == "429"
    assert scene.books.handled == [1]
    assert await deliver(feeder, 2) is None
    assert await numbers(feeder) == [1, 2]


async def test_the_effect_of_a_handler_that_lost_its_agent_meanwhile_does_not_count(scene: Scene) -> None:
    first = await scene.worker()
    feeder = await scene.runtime()
    await deliver(feeder, 1)
    scene.books.gates[2] = asyncio.Event()
    handling = asyncio.ensure_future(deliver(feeder, 2))
    await eventually(lambda: scene.books.handled == [1, 2])
    record = await stored(feeder)
    await feeder.running.records.write_state(AGENT, b'{"numbers":[1]}', expected=record)
    first.running.ownership.doubt()
    slot = first.running.incoming.turns._slots.find(AGENT.type, AGENT.key)
    await eventually(lambda: slot.agent is None)
    call = first.running.network.subjects.agent(AGENT.type)
    headers = {KEY_HEADER: AGENT.key, TYPE_HEADER: "Booked"}
    request = feeder.running.connection.client.request(call, b'{"number":9}', timeout=20, headers=headers)
    waiting = asyncio.ensure_future(request)  # it makes the next instance, in the same slot
    await eventually(lambda: slot.users == 2)
    scene.books.gates[2].set()
    with pytest.raises(UndeliveredCall):
        await handling
    await waiting
    assert await deliver(feeder, 2) is None
    assert scene.books.handled == [1, 2, 9, 2]
    assert await numbers(feeder) == [1, 9, 2]


async def test_a_record_that_is_gone_is_stored_again_with_the_sequences_of_its_state(scene: Scene) -> None:
    worker = await scene.worker()
    feeder = await scene.runtime()
    for number in (1, 2):
        await deliver(feeder, number)
    js = feeder.running.connection.jetstream
    await js.delete_stream(f"KV_{scene.namespace}_natsrt_agents")
    worker.running.ownership.doubt()
    assert await deliver(feeder, 1) is None
    assert await deliver(feeder, 3) is None
    assert await numbers(feeder) == [1, 2, 3]
    assert (await stored(feeder)).handled == {STREAM: 3}


async def test_a_record_whose_loss_is_noticed_by_a_save_gets_the_new_sequence_with_the_new_state(scene: Scene) -> None:
    await scene.worker()
    feeder = await scene.runtime()
    await deliver(feeder, 1)
    bucket = f"{scene.namespace}_natsrt_agents"
    await feeder.running.connection.jetstream.purge_stream(f"KV_{bucket}", subject=f"$KV.{bucket}.{record_key(AGENT)}")
    assert await deliver(feeder, 2) is None
    assert (await stored(feeder)).handled == {STREAM: 2}
    assert await deliver(feeder, 2) is None
    assert await numbers(feeder) == [1, 2]


async def test_a_large_state_that_is_gone_is_stored_again_with_its_sequences(scene: Scene) -> None:
    worker = await scene.worker()
    feeder = await scene.runtime()
    many = list(range(1, 2000))
    await worker.agent_load_state(AGENT, {"numbers": many})
    await deliver(feeder, 2000)
    await deliver(feeder, 2, stream=OTHER)
    js = feeder.running.connection.jetstream
    await js.delete_stream(f"KV_{scene.namespace}_natsrt_agents")
    worker.running.ownership.doubt()
    assert await deliver(feeder, 2000) is None
    assert await deliver(feeder, 2001) is None
    assert await numbers(feeder) == [*many, 2000, 2, 2001]
    assert (await stored(feeder)).handled == {OTHER: 2, STREAM: 2001}


WORKER = """
import asyncio, sys
import natsrt
from autogen_core import MessageContext, RoutedAgent, message_handler
from natsrt import NatsAgentRuntime
from tests.test_applied_once import Booked

@natsrt.keyed
class Slow(RoutedAgent):
    def __init__(self):
        super().__init__("slow")
        self.numbers = []

    @message_handler
    async def on_booked(self, message: Booked, ctx: MessageContext) -> None:
        print("began", message.number, flush=True)
        await asyncio.sleep(0.02)
        self.numbers.append(message.number)

    async def save_state(self):
        return {"numbers": self.numbers}

    async def load_state(self, state):
        self.numbers = list(state["numbers"])

async def main():
    runtime = NatsAgentRuntime(sys.argv[1], namespace=sys.argv[2], name=sys.argv[3])
    await runtime.start()
    await natsrt.register(runtime, Slow, "ledger", Slow)
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def deliver_surely(runtime: NatsAgentRuntime, number: int) -> int:
    """Deliver an event as a feeder does: again until it is handled. Returns how often."""
    for attempt in range(1, 100):
        try:
            failure = await deliver(runtime, number, attempt=attempt)
        except (UndeliveredCall, StateUnavailable):
            await asyncio.sleep(0.05)
            continue
        assert failure is None
        return attempt
    raise AssertionError(f"{number} is never handled")


@pytest.mark.slow  # some seconds until a worker that died is known to be dead
@pytest.mark.parametrize("end", ["kill", "pause"])
async def test_events_are_applied_once_while_their_owner_dies_or_stands_still(
    scene: Scene, processes: Processes, end: str
) -> None:
    workers = {}
    for name in ("one", "two"):
        workers[name] = processes.python(WORKER, scene.url, scene.namespace, name, name=name)
        await workers[name].wait_for_line("ready")
    feeder = await scene.runtime()
    attempts: Counter[int] = Counter()
    ends = {5: None, 15: None}
    owner = ""
    for number in range(1, 26):
        delivering = asyncio.ensure_future(deliver_surely(feeder, number))
        if number in ends and len(workers) > 0:
            record = await eventually(lambda: feeder.running.records.read(AGENT))
            owner = record.owner.rpartition("-")[0]
            if owner in workers:
                began = f"began {number}"
                await eventually(lambda n=owner, b=began: b in workers[n].stdout, 15)  # type: ignore[misc]
                getattr(workers[owner], end)()
                if end == "kill":
                    workers[owner] = processes.python(
                        WORKER, scene.url, scene.namespace, owner, name=f"{owner}-{number}"
                    )
        attempts[number] = await delivering
        if end == "pause" and owner in workers and number not in ends:
            workers[owner].resume()
        for earlier in (number, max(1, number - 3)):  # acknowledgements were lost
            await deliver_surely(feeder, earlier)
    assert max(attempts.values()) > 1, "nobody died in the middle of an event"
    assert await numbers(feeder) == list(range(1, 26))


# ---------------------------------------------------------------------------------------------------------------------
# In lines


class Place(NamedTuple):
    sequence: int
    key: str


class Feeder:
    """Delivers the events of lines to their agents, and gives an event up that has failed twice."""

    def __init__(self, runtime: NatsAgentRuntime) -> None:
        self.runtime = runtime
        self.ended: dict[int, Settled] = {}

    async def deliver(self, place: Place, message: int, tries: Tries) -> Outcome:
        agent, topic = AgentId(AGENT.type, place.key), TopicId("orders", place.key)
        event = StoredEvent(STREAM, place.sequence, tries.failures + tries.losses + 1)
        delivery = self.runtime.running.outgoing.delivery
        try:
            failure = await delivery.deliver_confirmed(agent, topic, event_body(message), event)
        except (UndeliveredCall, StateUnavailable):
            return Again(0.05, failed=False)
        if failure is None:
            return Settled.HANDLED
        return Settled.GIVEN_UP if tries.failures else Again(0.01)

    async def read(self, place: Place) -> int | None:
        return place.sequence

    async def begin(self, place: Place) -> int:
        return 0

    def settled(self, place: Place, outcome: Settled) -> None:
        self.ended[place.sequence] = outcome


async def test_lines_keep_the_order_of_each_key_and_a_refused_event_is_given_up(scene: Scene) -> None:
    first = await scene.worker()
    await scene.worker()
    feeder = Feeder(await scene.runtime())
    scene.books.refused = {5, 6, 17}
    lines = Lines[Place, int](feeder, max_bytes=200, most=100, retries=RetryOptions())
    for sequence in range(1, 31):
        key = "abc"[sequence % 3]
        assert lines.take(key, Place(sequence, key), sequence, 10)
    await eventually(lambda: len(feeder.ended) >= 9, 20)
    await first.stop()
    await eventually(lambda: len(feeder.ended) == 30, 20)
    assert {one for one, outcome in feeder.ended.items() if outcome is Settled.GIVEN_UP} == {5, 6, 17}
    assert await lines.stop() == []
    for number, key in enumerate("abc"):
        expected = [one for one in range(1, 31) if one % 3 == number and one not in scene.books.refused]
        answer = await feeder.runtime.send_message(Booked(0), AgentId(AGENT.type, key))
        assert answer == Numbers(expected)


# ---------------------------------------------------------------------------------------------------------------------
# The wire


async def test_an_event_without_a_place_is_not_answered(scene: Scene) -> None:
    worker = await scene.worker()
    feeder = await scene.runtime()
    await deliver(feeder, 1)
    subject = worker.running.network.subjects.instance(AGENT.type, AGENT.key)
    answers: list[bytes] = []
    inbox = feeder.running.network.inbox
    reply = inbox.new_subject()
    inbox.receivers[reply] = lambda message: answers.append(message.data)
    body = envelope.rewrite(event_body(2), subject="a", topictype="orders", topicsource="a")
    await feeder.running.connection.publish(subject, body, reply=reply)
    await eventually(lambda: scene.books.handled == [1, 2])
    await eventually(lambda: worker.running.idle)
    await worker.running.connection.barrier()
    await feeder.running.connection.barrier()
    assert answers == []


@pytest.mark.parametrize(
    "attributes",
    [
        {"natsstream": "s@1"},
        {"natsstream": "", "natssequence": "1"},
        {"natsstream": "s" * 301, "natssequence": "1"},
        {"natsstream": "s@1", "natssequence": "0"},
        {"natsstream": "s@1", "natssequence": "-1"},
        {"natsstream": "s@1", "natssequence": "1.5"},
        {"natsstream": "s@1", "natssequence": "9223372036854775808"},
        {"natsstream": "s@1", "natssequence": "1", "natsattempt": "x"},
        {"natsstream": "s@1", "natssequence": "1", "natsstored": "²"},
    ],
)
async def test_a_place_that_cannot_be_read_is_refused(attributes: dict[str, str]) -> None:
    with pytest.raises(CannotDecode):
        stored_event(event_body(1, **attributes))


def test_a_place_is_written_and_read() -> None:
    event = StoredEvent(STREAM, 2**63 - 1, 3, 1_767_323_050.25)
    assert stored_event(event_body(1, **event.attributes)) == event
    assert event.stream_name == "natsrt_events"
    assert stored_event(event_body(1, natsstream="s@1", natssequence="7")) == StoredEvent("s@1", 7, 1, None)
    assert stored_event(event_body(1)) is None
    assert stored_event(event_body(1, natssequence="7")) is None


async def test_an_event_of_a_stream_cannot_be_cancelled_and_has_no_deadline(scene: Scene) -> None:
    worker = await scene.worker()
    feeder = await scene.runtime()
    body = event_body(1, cancelid="_INBOX.x.1", timeout="0", chain="a b", keyed="ledger", acceptto="orders.x")
    event = StoredEvent(STREAM, 1)
    delivery = feeder.running.outgoing.delivery
    seen: list[dict[str, Any]] = []
    unpack: Callable[[bytes], Any] = worker.running.network.bodies.unpack

    def watch(data: bytes) -> Any:
        body = unpack(data)
        if body is not None and body.type == envelope.EVENT:
            seen.append(body.attributes)
        return body

    worker.running.dispatch._bodies.unpack = watch
    assert await delivery.deliver_confirmed(AGENT, TOPIC, body, event) is None
    assert scene.books.handled == [1]
    assert not seen[0].keys() & {"cancelid", "timeout", "chain", "keyed"}
    assert seen[0]["acceptto"] == feeder.running.calls.accept_to


async def test_workers_that_do_not_confirm_get_no_event(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    feeder = await scene.runtime()
    with pytest.raises(NoLiveWorker):
        await deliver(feeder, 1)
    monkeypatch.setattr("natsrt.membership.FEATURES", ("peer", "cancel"))
    await scene.worker(name="old")
    await eventually(lambda: feeder.running.registry.view.workers_hosting(AGENT.type))
    with pytest.raises(UndeliveredCall, match="do not confirm stored events: update old-"):
        await deliver(feeder, 1)
    assert scene.books.handled == []


async def test_an_event_that_every_worker_refuses_is_not_reported_as_the_handlers_failure(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.worker()
    feeder = await scene.runtime(busy_retry=0.05)
    await deliver(feeder, 1)

    async def refuse(*args: Any, **how: Any) -> None:
        raise NotOwned

    monkeypatch.setattr(Turns, "run", refuse)
    with pytest.raises(UndeliveredCall, match="it no longer owns the agent") as refused:
        await deliver(feeder, 2)
    assert not isinstance(refused.value, WorkerLost)


async def test_an_owner_that_cannot_read_its_records_is_not_reported_as_the_handlers_failure(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.worker()
    feeder = await scene.runtime()
    await deliver(feeder, 1)

    async def fail(*args: Any, **how: Any) -> None:
        raise StateUnavailable("read", "the test refuses it")

    monkeypatch.setattr(Turns, "run", fail)
    with pytest.raises(StateUnavailable):
        await deliver(feeder, 2)


async def test_an_owner_that_is_lost_is_reported_as_such(scene: Scene) -> None:
    worker = await scene.worker()
    feeder = await scene.runtime()
    scene.books.gates[1] = asyncio.Event()
    handling = asyncio.ensure_future(deliver(feeder, 1))
    await eventually(lambda: scene.books.handled == [1])
    await feeder.running.calls.stop()
    with pytest.raises(WorkerLost):
        await handling
    scene.books.gates[1].set()
    await eventually(lambda: worker.running.idle)


# ---------------------------------------------------------------------------------------------------------------------
# The record


def test_sequences_never_go_back_and_the_one_that_advanced_last_is_the_last() -> None:
    assert advanced({"a": 5, "b": 2}, {"a": 6}) == {"a": 6, "b": 2}
    assert list(advanced({"a": 5, "b": 2}, {"a": 6})) == ["b", "a"]
    assert advanced({"a": 5}, {"a": 4}) == {"a": 5}


def test_the_sequences_in_a_record_are_bounded_and_the_oldest_streams_are_left_out() -> None:
    handled: Mapping[str, int] = {}
    for number in range(1, 500):
        handled = advanced(handled, {stream_id(f"str\u00f6m{number}", 1e9): number})
    assert 50 < len(handled) < 150
    assert list(handled.values()) == list(range(500 - len(handled), 500))
    state = Stored(2, "0" * 64, 1.0, 0, "w-1")
    longest = AgentId("t" * 100, "k" * (31 * 1024))
    head = encode_head(longest, "w", "w-1", state, (), handled)
    assert len(head) < 32 * 1024 + HANDLED_BYTES
    assert decode_record(record_key(longest), {"Natsrt-Record": head}, b"{}", 1).handled == handled


def test_a_record_without_a_state_has_no_sequences() -> None:
    head = encode_head(AGENT, None, "w-1", None, (), {STREAM: 4})
    assert decode_record(record_key(AGENT), {"Natsrt-Record": head}, b"", 1).handled == {}


async def test_an_operator_who_sets_a_state_keeps_the_sequences_and_one_who_restores_it_gives_them(
    scene: Scene,
) -> None:
    records = (await scene.runtime()).running.records
    first = await records.write_state(AGENT, b'{"numbers":[1]}', expected=None, handled={STREAM: 1})
    second = await records.write_state(AGENT, b'{"numbers":[5]}', expected=first)
    assert second.handled == {STREAM: 1}
    third = await records.write_state(AGENT, b'{"numbers":[0]}', expected=second, handled={OTHER: 7})
    assert third.handled == {OTHER: 7}
    assert (await records.write_state(AGENT, None, expected=third)).handled == {}


async def test_a_slot_forgets_what_its_instance_handled_when_the_instance_goes() -> None:
    slot = AgentSlot(SimpleNamespace(keyed=KeyedOptions(), agent_type="counter", live={}), "k")  # type: ignore[arg-type]
    slot.apply(StoredEvent(STREAM, 4))
    assert slot.has_applied(StoredEvent(STREAM, 4)) and not slot.has_applied(StoredEvent(STREAM, 5))
    slot.remove_instance()
    assert not slot.has_applied(StoredEvent(STREAM, 4))
