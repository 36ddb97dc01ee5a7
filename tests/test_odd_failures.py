"""Events and tasks whose handlers raise what is hard to keep: each becomes a dead letter after the usual attempts."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import nats
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypePrefixSubscription, message_handler

import natsrt
from natsrt import DeadLetter, NatsAgentRuntime, Ticket
from natsrt.embedded import EmbeddedServer
from natsrt.errors import CannotDecode, MessageTooLarge, RemoteAgentError
from natsrt.jetstream.dead_letters import DeadLetters, Unhandled
from natsrt.sending.keyed_delivery import KeyedDelivery
from natsrt.task_types import TaskId
from natsrt.transport.headers import MAX_STORED_HEADERS, headers_size
from natsrt.wire.envelope import Envelope
from natsrt.wire.failures import SHORTEST, describe
from natsrt.wire.stored_events import StoredEvent
from tests.support.cli import natsrt as run
from tests.support.processes import eventually

PLAIN, KEYED = "plain", "keyed"
ATTEMPTS = 2
LONG = 30.0


@dataclass
class Seen:
    """What the handlers of a test have been called with, and what they raise."""

    raises: dict[str, Callable[[], BaseException]]
    calls: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By agent type, kind and message."""


class Fails(RoutedAgent):
    def __init__(self, seen: Seen) -> None:
        super().__init__("fails")
        self._seen = seen

    @message_handler
    async def on_text(self, message: str, ctx: MessageContext) -> str:
        self._seen.calls[self.id.type, "task" if ctx.is_rpc else "event", message] += 1
        if message in self._seen.raises:
            raise self._seen.raises[message]()
        return message

    async def save_state(self) -> dict[str, Any]:
        return {}

    async def load_state(self, state: Any) -> None:
        pass


@natsrt.keyed
class KeyedFails(Fails):
    pass


@dataclass
class Place:
    """A namespace with a worker of both types."""

    server: EmbeddedServer
    namespace: str
    stack: AsyncExitStack

    async def worker(self, seen: Seen, **settings: Any) -> NatsAgentRuntime:
        settings = {"retry_delay": 0.1, "retry_delay_max": 0.3, "max_deliver": ATTEMPTS, **settings}
        runtime = NatsAgentRuntime(self.server.url, namespace=self.namespace, durable=["work."], **settings)
        await natsrt.register(runtime, Fails, PLAIN, lambda: Fails(seen))
        await natsrt.register(runtime, KeyedFails, KEYED, lambda: KeyedFails(seen))
        for agent_type in (PLAIN, KEYED):
            await runtime.add_subscription(TypePrefixSubscription("work.", agent_type))
        return await self.stack.enter_async_context(runtime)


@pytest.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(server, namespace, stack)


Letters = dict[tuple[str, str, str], DeadLetter]


async def fail_all(runtime: NatsAgentRuntime, names: list[str]) -> tuple[Letters, dict[tuple[str, str], Ticket]]:
    """Have both types fail with each message as an event and as a task. Returns the dead letters, by agent type, kind
    and message, and the tickets."""
    tickets = {}
    for name in names:
        for agent_type in (PLAIN, KEYED):
            tickets[agent_type, name] = await runtime.submit_message(name, AgentId(agent_type, f"t-{name}"))
        await runtime.publish_message(name, TopicId("work.jobs", f"e-{name}"))
    wanted = {(agent_type, kind, name) for name in names for agent_type in (PLAIN, KEYED) for kind in ("event", "task")}

    async def all_there() -> Letters | None:
        found = {}
        async for letter in runtime.dead_letters():
            assert letter.topic is not None
            kind = "event" if letter.topic.source.startswith("e-") else "task"
            found[letter.agent_type, kind, letter.topic.source[2:]] = letter
        return found if found.keys() == wanted else None

    return await eventually(all_there, LONG) or {}, tickets


def chained(causes: int) -> BaseException:
    error: BaseException = ValueError("the first one")
    for number in range(causes):
        another = ValueError(f"{number} " + "é" * 300)
        another.__cause__ = error
        error = another
    return error


LARGE: dict[str, Callable[[], BaseException]] = {
    "text": lambda: ValueError("x" * 70_000),
    "accents": lambda: ValueError("é" * 30_000),
    "group": lambda: ExceptionGroup("g" * 1000, [ValueError("v" * 900) for _ in range(100)]),
    "causes": lambda: chained(25),
    "reject": lambda: natsrt.Reject("r" * 100_000),
    "class": lambda: type("X" * 70_000, (Exception,), {})("of a class with a long name"),
}


async def test_an_error_larger_than_the_headers_of_a_message_is_cut(place: Place) -> None:
    seen = Seen(LARGE)
    runtime = await place.worker(seen)
    letters, tickets = await fail_all(runtime, list(LARGE))
    for (agent_type, kind, name), letter in letters.items():
        attempts = 1 if name == "reject" else ATTEMPTS
        assert letter.attempts == seen.calls[agent_type, kind, name] == attempts, (agent_type, kind, name)
        assert len(letter.error) > 20
    for agent_type in (PLAIN, KEYED):
        letter = letters[agent_type, "event", "text"]
        assert (letter.error_type, letter.error[:100]) == ("builtins.ValueError", "x" * 100)
        assert (await tickets[agent_type, "text"].status()).state == "failed"
        with pytest.raises(ValueError, match="xxx"):
            await tickets[agent_type, "text"].result(timeout=LONG)


def test_the_shortest_description_of_any_error_fits_into_the_headers_of_a_message() -> None:
    text = "\N{DESERET CAPITAL LETTER LONG I}" * 100_000  # may be in names, too, and takes 12 bytes as JSON in ASCII
    error = type(text, (Exception,), {})(*[text] * 100)
    error.__dict__.update({f"{number}{text}": text for number in range(100)})
    for _ in range(100):
        error.add_note(text)
    error.__cause__ = error
    described = describe(error, with_traceback=True, limits=SHORTEST)
    assert len(json.dumps(json.loads(described.payload))) < 60_000


async def test_a_dead_letter_lacks_the_headers_of_its_event_where_they_do_not_fit(place: Place) -> None:
    runtime = await place.worker(Seen({}))
    client = await place.stack.enter_async_context(await nats.connect(place.server.url))
    headers = {"Own": "x" * (MAX_STORED_HEADERS - headers_size({"Own": ""}))}
    await client.jetstream().publish(f"{place.namespace}.topic.work.jobs.shop", b"5", headers=headers)

    async def both_there() -> list[DeadLetter]:
        found = [letter async for letter in runtime.dead_letters()]
        return found if len(found) == 2 else []

    for letter in await eventually(both_there, LONG):
        assert (letter.data, letter.message_id) == (b"5", "")
        assert "Own" not in letter.headers
        assert letter.topic == TopicId("work.jobs", "shop")


async def test_an_event_with_more_headers_than_a_stream_stores_is_refused_before_it_is_sent(place: Place) -> None:
    runtime = await place.worker(Seen({}))
    with pytest.raises(MessageTooLarge, match="65,535 bytes of headers") as raised:
        await runtime.publish_message("text", TopicId("work.jobs", "shop"), message_id="i" * 100_000)
    assert raised.value.size > 100_000
    assert raised.value.max_payload == MAX_STORED_HEADERS
    await runtime.publish_message("text", TopicId("work.jobs", "shop"), message_id="i" * 60_000)


REASONS: dict[str, tuple[Callable[[], BaseException], str]] = {
    "number": (lambda: natsrt.Reject(404), "404"),
    "float": (lambda: natsrt.Reject(7.0), "7.0"),
    "none": (lambda: natsrt.Reject(None), "None"),
    "exception": (lambda: natsrt.Reject(ValueError("no such customer")), "ValueError: no such customer"),
    "surrogate": (lambda: natsrt.Reject("\ud800"), "\\ud800"),
    "lines": (lambda: natsrt.Reject("a\r\nNats-Msg-Id: b\r\n\r\n"), "a Nats-Msg-Id: b"),
}


async def test_a_rejection_with_any_reason_is_a_dead_letter_at_once(place: Place) -> None:
    seen = Seen({name: raises for name, (raises, _) in REASONS.items()})
    runtime = await place.worker(seen)
    letters, _ = await fail_all(runtime, list(REASONS))
    for (agent_type, kind, name), letter in letters.items():
        assert letter.reason.strip("'") == REASONS[name][1], (agent_type, kind, name)
        assert seen.calls[agent_type, kind, name] == letter.attempts == 1
        assert letter.error_type == "natsrt.errors.Reject"


async def test_what_nobody_expects_in_the_feeder_of_a_keyed_type_is_a_failed_attempt(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver, tried = KeyedDelivery.deliver_confirmed, Counter[str]()

    async def fails(self: KeyedDelivery, agent: AgentId, topic: TopicId, body: Envelope, event: StoredEvent) -> Any:
        if agent.key == "odd":
            tried[topic.type[:4]] += 1
            raise RuntimeError("nobody expects this")
        return await deliver(self, agent, topic, body, event)

    monkeypatch.setattr(KeyedDelivery, "deliver_confirmed", fails)
    seen = Seen({})
    runtime = await place.worker(seen)
    ticket = await runtime.submit_message("text", AgentId(KEYED, "odd"))
    for key in ("odd", "even"):
        await runtime.publish_message("text", TopicId("work.jobs", key))
    with pytest.raises(RuntimeError, match="nobody expects this"):
        await ticket.result(timeout=LONG)

    async def both_there() -> list[DeadLetter]:
        found = [letter async for letter in runtime.dead_letters(KEYED)]
        return found if len(found) == 2 else []

    for letter in await eventually(both_there, LONG):
        assert (letter.error_type, letter.attempts) == ("builtins.RuntimeError", ATTEMPTS)
    assert tried == {"work": ATTEMPTS, "nats": ATTEMPTS}
    await eventually(lambda: seen.calls[KEYED, "event", "text"] == 1)


async def test_a_dead_letter_that_cannot_be_written_is_tried_again_with_delays_that_grow(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []

    async def fails(self: DeadLetters, letter: Unhandled) -> bool:
        tried.append(asyncio.get_running_loop().time())
        raise RuntimeError("nobody expects this")

    monkeypatch.setattr(DeadLetters, "write", fails)
    runtime = await place.worker(Seen({"bad": lambda: natsrt.Reject("no")}), retry_delay=0.2, retry_delay_max=0.8)
    await runtime.submit_message("bad", AgentId(KEYED, "a"))
    await eventually(lambda: len(tried) == 5, LONG)
    pauses = [later - earlier for earlier, later in pairwise(tried)]
    assert [pause > least for pause, least in zip(pauses, (0.2, 0.4, 0.8, 0.8), strict=True)] == [True] * 4


@pytest.mark.parametrize("agent_type", [PLAIN, KEYED])
async def test_a_task_whose_cancellation_has_too_long_an_id_fails(
    place: Place, agent_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen({})
    runtime = await place.worker(seen)
    monkeypatch.setattr(TaskId, "new", lambda agent: TaskId(agent, "m1"))  # as older versions submitted it
    agent = AgentId(agent_type, "k" * 1100)
    ticket = await runtime.submit_message("text", agent)
    with pytest.raises(CannotDecode, match="longer than a subject may be"):
        await ticket.result(timeout=LONG)

    async def there() -> list[DeadLetter]:
        return [letter async for letter in runtime.dead_letters(agent_type)]

    [letter] = await eventually(there, LONG)
    assert (letter.attempts, letter.topic) == (1, TaskId(agent, "m1").topic)
    assert not seen.calls


@pytest.mark.parametrize("key", ["k" * 1010, "é" * 505])
async def test_a_task_whose_id_is_too_long_is_not_submitted(place: Place, key: str) -> None:
    runtime = await place.worker(Seen({}))
    longest = AgentId(KEYED, key)
    ticket = await runtime.submit_message("text", longest, message_id="m1")
    assert await ticket.result(timeout=LONG) == "text"
    assert await runtime.ticket(ticket.id).result(timeout=LONG) == "text"
    with pytest.raises(ValueError, match=r"1,019 bytes, and .* has 1,020: .*Nothing was stored"):
        await runtime.submit_message("text", longest, message_id="m11")
    with pytest.raises(ValueError, match=r"1,019 bytes, and .* has 1,041: .*Nothing was stored"):
        await runtime.submit_message("text", longest)
    told = await run("submit", str(longest), '"text"', "--server", place.server.url, "--namespace", place.namespace)
    assert (told.code, told.stdout) == (2, "")
    assert "Nothing was stored" in told.stderr


# -- classes that the feeder of a keyed type does not know -----------------------------------------------------------


class Mine(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(f"number {number}")
        self.number = number


class MyReject(natsrt.Reject):
    pass


class MyRetry(natsrt.Retry):
    pass


class Gone(natsrt.Reject):
    """Keeps no reason."""

    def __init__(self, *args: object) -> None:
        self.args = args


OWN: dict[str, tuple[Callable[[], BaseException], str, int]] = {
    "mine": (lambda: Mine(5), f"Mine in the last of {ATTEMPTS} attempts", ATTEMPTS),
    "reject": (lambda: MyReject("no such customer"), "no such customer", 1),
    "number": (lambda: MyReject(404), "404", 1),
    "large": (lambda: MyReject("r" * 100_000), "r" * 500, 1),
    "no-reason": (lambda: Gone("text"), "text", 1),
    "nothing": (Gone, "Gone", 1),
    "retry": (lambda: MyRetry(after=0.2), f"MyRetry in the last of {ATTEMPTS} attempts", ATTEMPTS),
}
"""What is raised, the reason of the dead letter, and its attempts."""


async def test_classes_of_handlers_are_known_by_their_names_and_bases(place: Place) -> None:
    seen = Seen({name: raises for name, (raises, *_) in OWN.items()})
    runtime = await place.worker(seen)
    letters, tickets = await fail_all(runtime, list(OWN))
    for (agent_type, kind, name), letter in letters.items():
        raises, reason, attempts = OWN[name]
        error = raises()
        assert letter.reason == reason, (agent_type, kind, name)
        assert seen.calls[agent_type, kind, name] == letter.attempts == attempts
        assert letter.error_type == f"{__name__}.{type(error).__name__}"
        if name != "nothing":
            assert letter.error[:900] == str(error)[:900]
        if name != "large":
            assert "on_text" in (letter.traceback or "")
    for agent_type in (PLAIN, KEYED):
        with pytest.raises(RemoteAgentError, match="no such customer") as raised:
            await tickets[agent_type, "reject"].result(timeout=LONG)
        assert raised.value.error_type == f"{__name__}.MyReject"


async def test_a_keyed_event_is_tried_again_when_a_class_derived_from_retry_says_so(place: Place) -> None:
    seen = Seen({"later": lambda: MyRetry(after=0.1)})
    runtime = await place.worker(seen, retry_delay=3600.0, retry_delay_max=3600.0)
    await fail_all(runtime, ["later"])
    assert set(seen.calls.values()) == {ATTEMPTS}


async def test_a_keyed_dead_letter_has_no_traceback_if_none_is_to_be_sent(place: Place) -> None:
    runtime = await place.worker(Seen({"mine": lambda: Mine(5)}), send_tracebacks=False)
    letters, _ = await fail_all(runtime, ["mine"])
    assert {letter.traceback for letter in letters.values()} == {None}


# -- results that just fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent_type", [PLAIN, KEYED])
async def test_a_result_that_fits_into_a_message_only_without_its_headers_is_stored(
    place: Place, agent_type: str
) -> None:
    longest: list[int] = []

    class Large(Fails):
        @message_handler
        async def on_text(self, message: str, ctx: MessageContext) -> str:
            return "x" * (longest[0] - int(message))

    runtime = await place.worker(Seen({}))
    longest.append(runtime.running.network.connection.max_payload)
    cls = natsrt.keyed(Large) if agent_type == KEYED else Large
    await natsrt.register(runtime, cls, "large", lambda: cls(Seen({})))
    for less in (1000, 500, 400, 300, 200, 100):
        ticket = await runtime.submit_message(str(less), AgentId("large", "k"))
        assert len(await ticket.result(timeout=LONG)) == longest[0] - less
