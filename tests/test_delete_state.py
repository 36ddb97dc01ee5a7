"""`NatsAgentRuntime.delete_state`: a keyed agent ends, and nothing of it stays stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import nats
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, message_handler
from nats.js.errors import NoKeysError

import natsrt
from natsrt import KeyedOptions, NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import StateConflict, StateNotSaved, StateUnavailable
from tests.support.processes import eventually

ONE = AgentId("ledger", "one")


@dataclass
class Add:
    text: str


@dataclass
class End:
    """``via``: the agent that is to send another one back. ``wait``: wait for `Ledger.may_end` after asking for the
    end. ``fail``: raise an error after that."""

    via: str = ""
    wait: bool = False
    fail: bool = False


@dataclass
class PassOn:
    to: str


@natsrt.keyed
class Ledger(RoutedAgent):
    closed = 0
    waits = 0
    may_end = asyncio.Event()

    def __init__(self) -> None:
        super().__init__("adds texts")
        self.text = ""

    @message_handler
    async def add(self, message: Add, ctx: MessageContext) -> str:
        self.text += message.text
        return self.text

    @message_handler
    async def end(self, message: End, ctx: MessageContext) -> str:
        if message.via:
            await self.send_message(PassOn(str(self.id)), AgentId.from_str(message.via))
            self.text += " (end of the outer handler)"
            return self.text
        natsrt.runtime_of(self).delete_state(self.id)
        if message.wait:
            Ledger.waits += 1
            await Ledger.may_end.wait()
        if message.fail:
            raise LookupError("after asking for the end")
        return self.text

    async def save_state(self) -> Mapping[str, Any]:
        return {"text": self.text}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.text = state["text"]

    async def close(self) -> None:
        Ledger.closed += 1


class Through(RoutedAgent):
    @message_handler
    async def pass_on(self, message: PassOn, ctx: MessageContext) -> str:
        return await self.send_message(End(), AgentId.from_str(message.to))  # type: ignore[no-any-return]


@pytest.fixture
async def worker(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    Ledger.closed, Ledger.waits, Ledger.may_end = 0, 0, asyncio.Event()
    async with NatsAgentRuntime(server.url, namespace=namespace) as started:
        await natsrt.register(started, Ledger, "ledger", Ledger)
        yield started


@pytest.fixture
async def caller(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    async with NatsAgentRuntime(server.url, namespace=namespace) as started:
        await started.wait_for("ledger", timeout=10)
        yield started


async def stored(server: EmbeddedServer, namespace: str) -> int:
    """How many keys the bucket has: records, and parts of states."""
    nc = await nats.connect(server.url)
    try:
        kv = await nc.jetstream().key_value(f"{namespace}_natsrt_agents")
        return len([key for key in await kv.keys() if key.startswith(("a.", "c."))])
    except NoKeysError:
        return 0
    finally:
        await nc.close()


@pytest.mark.parametrize("size", [3, 300_000], ids=["small", "in parts"])
async def test_nothing_stays_stored_and_the_next_message_begins_anew(
    size: int, server: EmbeddedServer, namespace: str, worker: NatsAgentRuntime, caller: NatsAgentRuntime
) -> None:
    text = "x" * size
    assert await caller.send_message(Add(text), ONE) == text
    assert await stored(server, namespace) >= 1
    assert await caller.send_message(End(), ONE) == text
    assert Ledger.closed == 1
    assert await stored(server, namespace) == 0
    assert await caller.send_message(Add("b"), ONE) == "b"


async def test_an_agent_whose_handler_fails_after_asking_ends_too(
    server: EmbeddedServer, namespace: str, worker: NatsAgentRuntime, caller: NatsAgentRuntime
) -> None:
    await caller.send_message(Add("a"), ONE)
    with pytest.raises(LookupError, match="after asking for the end"):
        await caller.send_message(End(fail=True), ONE)
    assert await stored(server, namespace) == 0
    assert Ledger.closed == 1
    assert await caller.send_message(Add("b"), ONE) == "b"


async def test_messages_that_waited_are_for_the_new_one(worker: NatsAgentRuntime, caller: NatsAgentRuntime) -> None:
    await caller.send_message(Add("a"), ONE)
    ending = asyncio.create_task(caller.send_message(End(wait=True), ONE))
    await eventually(lambda: Ledger.waits == 1)
    waiting = [asyncio.create_task(caller.send_message(Add(text), ONE)) for text in "bcd"]
    await asyncio.wait(waiting, timeout=0.2)
    Ledger.may_end.set()
    async with asyncio.timeout(10):
        assert await ending == "a"
        assert [await one for one in waiting] == ["b", "bc", "bcd"]


async def test_an_outer_handler_ends_first(
    server: EmbeddedServer, namespace: str, worker: NatsAgentRuntime, caller: NatsAgentRuntime
) -> None:
    await natsrt.register(worker, Through, "through", lambda: Through("passes on"))
    await caller.send_message(Add("a"), ONE)
    async with asyncio.timeout(10):
        assert await caller.send_message(End(via="through/x"), ONE) == "a (end of the outer handler)"
    assert await stored(server, namespace) == 0
    assert await caller.send_message(Add("b"), ONE) == "b"


async def test_handlers_that_run_at_the_same_time_end_first(
    server: EmbeddedServer, namespace: str, worker: NatsAgentRuntime, caller: NatsAgentRuntime
) -> None:
    options = KeyedOptions(concurrency="concurrent")
    await natsrt.register(worker, Ledger, "both", Ledger, keyed=options)
    await caller.wait_for("both", timeout=10)
    both = AgentId("both", "one")
    await caller.send_message(Add("a"), both)
    ending = asyncio.create_task(caller.send_message(End(wait=True), both))
    await eventually(lambda: Ledger.waits == 1)
    assert await caller.send_message(Add("b"), both) == "ab"
    Ledger.may_end.set()
    assert await ending == "ab"
    assert await stored(server, namespace) == 0


async def test_a_record_that_cannot_be_deleted_stays(
    server: EmbeddedServer, namespace: str, worker: NatsAgentRuntime, caller: NatsAgentRuntime
) -> None:
    await caller.send_message(Add("a"), ONE)
    nc = await nats.connect(server.url)
    try:
        js = nc.jetstream()
        config = (await js.stream_info(f"KV_{namespace}_natsrt_agents")).config
        await js.update_stream(config.evolve(subjects=[f"{namespace}.elsewhere"]))
        with pytest.raises(StateNotSaved):
            await caller.send_message(End(), ONE)
        await js.update_stream(config)
    finally:
        await nc.close()
    assert await caller.send_message(Add("b"), ONE) == "ab"
    assert await caller.send_message(Add("c"), ONE) == "abc"  # and it has not ended meanwhile


async def test_a_state_that_was_changed_elsewhere_is_not_deleted(
    worker: NatsAgentRuntime, caller: NatsAgentRuntime
) -> None:
    await caller.send_message(Add("a"), ONE)
    ending = asyncio.create_task(caller.send_message(End(wait=True), ONE))
    await eventually(lambda: Ledger.waits == 1)
    records = caller.running.records
    await records.write_state(ONE, b'{"text":"by an operator"}', expected=await records.read(ONE))
    Ledger.may_end.set()
    with pytest.raises(StateConflict):
        await ending
    assert await caller.send_message(Add("!"), ONE) == "by an operator!"


async def test_only_the_agent_itself_can_end(worker: NatsAgentRuntime, caller: NatsAgentRuntime) -> None:
    await caller.send_message(Add("a"), ONE)
    with pytest.raises(RuntimeError, match="only a handler of ledger/one itself"):
        worker.delete_state(ONE)
    with pytest.raises(LookupError, match="ledger/one is not live"):
        caller.delete_state(ONE)
    assert await caller.send_message(Add("b"), ONE) == "ab"


class EndsBeside(Ledger):
    """As `Ledger`, but it ends out of turn."""

    @natsrt.out_of_turn
    @message_handler
    async def end(self, message: End, ctx: MessageContext) -> str:
        natsrt.runtime_of(self).delete_state(self.id)
        return self.text


@pytest.mark.parametrize(
    ("cls", "concurrency"), [(Ledger, "concurrent"), (EndsBeside, "concurrent"), (EndsBeside, "serial")]
)
async def test_what_comes_during_the_deletion_is_for_the_new_one(
    cls: type[Ledger], concurrency: Any, worker: NatsAgentRuntime, caller: NatsAgentRuntime
) -> None:
    await natsrt.register(worker, cls, "both", cls, keyed=KeyedOptions(concurrency=concurrency))
    await caller.wait_for("both", timeout=10)
    for number in range(20):
        one = AgentId("both", str(number))
        await caller.send_message(Add("a"), one)
        ending = asyncio.create_task(caller.send_message(End(), one))
        adding: list[asyncio.Task[Any]] = []
        while not ending.done():
            adding.append(asyncio.create_task(caller.send_message(Add("b"), one)))
            await asyncio.sleep(0.0005)
        await ending
        await asyncio.gather(*adding)  # none raises StateConflict
        assert set(await caller.send_message(Add("b"), one)) == {"b"}


async def test_the_last_handler_ends_the_agent_even_if_it_does_not_run(
    server: EmbeddedServer, namespace: str, worker: NatsAgentRuntime, caller: NatsAgentRuntime
) -> None:
    await natsrt.register(worker, Ledger, "both", Ledger, keyed=KeyedOptions(concurrency="concurrent", save="manual"))
    await caller.wait_for("both", timeout=10)
    both = AgentId("both", "one")
    await caller.send_message(Add("a"), both)
    ending = asyncio.create_task(caller.send_message(End(wait=True), both))
    await eventually(lambda: Ledger.waits == 1)
    slot = worker.running.ownership._slots.find("both", "one")
    assert slot is not None
    epoch = slot.verified_epoch
    async with slot.saving:
        slot.doubted()
        adding = asyncio.create_task(caller.send_message(Add("b"), both))
        await eventually(lambda: len(slot.mailbox.inside) == 1)  # it waits until the record is verified
        slot.verified(epoch)
        Ledger.may_end.set()
        await ending
        (waiting,) = slot.mailbox._inside
        assert waiting.task is not None
        waiting.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await adding
    assert await stored(server, namespace) == 0
    assert await caller.send_message(Add("c"), both) == "c"


class EndsAnother(RoutedAgent):
    @message_handler
    async def pass_on(self, message: PassOn, ctx: MessageContext) -> None:
        natsrt.runtime_of(self).delete_state(AgentId.from_str(message.to))


async def test_an_agent_that_is_called_cannot_end_its_caller(
    worker: NatsAgentRuntime, caller: NatsAgentRuntime
) -> None:
    await natsrt.register(worker, EndsAnother, "another", lambda: EndsAnother("ends another"))
    await caller.send_message(Add("a"), ONE)
    with pytest.raises(RuntimeError, match="only a handler of ledger/one itself"):
        await caller.send_message(End(via="another/x"), ONE)
    assert await caller.send_message(Add("b"), ONE) == "ab"


class Account(Ledger):
    """It ends with the event `End`."""

    events = 0

    @message_handler
    async def end(self, message: End, ctx: MessageContext) -> None:
        Account.events += 1
        self.text += "!"
        natsrt.runtime_of(self).delete_state(self.id)


async def test_an_event_whose_deletion_failed_is_handled_again(server: EmbeddedServer, namespace: str) -> None:
    Account.events = 0
    settings: Any = {"durable": ["work."], "retry_delay": 0.05, "retry_delay_max": 0.2}
    async with NatsAgentRuntime(server.url, namespace=namespace, **settings) as worker:
        await natsrt.register(worker, Account, "account", Account)
        await worker.add_subscription(TypeSubscription("work.accounts", "account"))
        await worker.send_message(Add("a"), AgentId("account", "one"))
        js = worker.running.connection.jetstream
        config = (await js.stream_info(f"KV_{namespace}_natsrt_agents")).config
        await js.update_stream(config.evolve(subjects=[f"{namespace}.elsewhere"]))
        await worker.publish_message(End(), TopicId("work.accounts", "one"))
        await eventually(lambda: Account.events == 1)
        await eventually(lambda: worker.health().messages_failed, 30)  # a write is tried for 10 s
        await js.update_stream(config)
        await eventually(lambda: Account.events == 2, 20)
        async with asyncio.timeout(20):
            while await stored(server, namespace):
                await asyncio.sleep(0.1)


async def test_a_deletion_that_nobody_confirmed_counts(
    worker: NatsAgentRuntime, caller: NatsAgentRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next message is for the new instance, and does not fail."""
    records = worker.running.records
    remove = records.remove

    async def unconfirmed(record: Any) -> None:
        await remove(record)
        raise StateUnavailable("delete", "no answer")

    await caller.send_message(Add("a"), ONE)
    monkeypatch.setattr(records, "remove", unconfirmed)
    with pytest.raises(StateNotSaved):
        await caller.send_message(End(), ONE)
    assert await caller.send_message(Add("b"), ONE) == "b"
