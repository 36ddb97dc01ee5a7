"""What an owner does at the edges of owning: an answer after the ownership was lost, a release of an agent in use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import nats
import orjson
import pytest

import natsrt
from natsrt import KeyedOptions
from natsrt.embedded import EmbeddedServer
from natsrt.transport.connection import Interest
from tests.support.processes import eventually
from tests.test_keyed import Add, Ask, Counting, Hold, Place, agent
from tests.test_keyed_edges import Gated


@pytest.fixture
async def place(server: EmbeddedServer, namespace: str) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(server.url, namespace, stack)


@pytest.mark.parametrize("save", ["manual", "interval"])
async def test_a_call_whose_agent_was_taken_over_is_not_answered_as_if_nothing_had_happened(
    place: Place, save: Any
) -> None:
    """With these options nothing is stored at the end of a handler, so only a look at the record can tell."""
    owner = await place.worker("w1", KeyedOptions(save=save, save_interval=100))
    caller = await place.caller()
    call = asyncio.ensure_future(caller.send_message(Hold("gate"), agent("k")))
    await asyncio.wait_for(place.life.gate("gate began").wait(), 5)
    present = await caller.running.records.read(agent("k"))
    assert present is not None and present.owner == owner.worker_id
    await caller.running.records.take(present, "another-worker")
    owner.running.ownership.connection_lost()  # a reason to doubt, before anything was looked up again
    place.life.gate("gate").set()
    with pytest.raises(natsrt.StateConflict):
        await call
    assert place.life.closed == [("counting/k", "w1")]


async def test_a_call_whose_agent_was_not_taken_over_is_answered_after_a_doubt(place: Place) -> None:
    owner = await place.worker("w1", KeyedOptions(save="manual"))
    caller = await place.caller()
    call = asyncio.ensure_future(caller.send_message(Hold("gate"), agent("k")))
    await asyncio.wait_for(place.life.gate("gate began").wait(), 5)
    owner.running.ownership.connection_lost()
    place.life.gate("gate").set()
    assert (await call).worker == "w1"
    assert place.life.closed == []


@pytest.mark.parametrize("release", ["unregister", "stop", "idle"])
async def test_an_agent_that_is_used_again_while_it_is_released_is_reached_along_its_own_chain(
    place: Place, release: str
) -> None:
    """A message comes in after the last look and before the end of the subscription. Its handler calls an agent that
    calls back: that call must come in too."""
    options = KeyedOptions(idle_timeout=0.3 if release == "idle" else None)
    owner = await place.worker("w1", options)
    caller = await place.caller()
    relays = await place.caller()
    await relays.register_factory("relay", lambda: Gated(place.life))
    client = await nats.connect(place.url)
    connection = owner.running.connection
    unsubscribe, calls = connection.unsubscribe, list[asyncio.Future[Any]]()
    prepared = asyncio.Event()

    async def unsubscribe_late(interest: Interest) -> None:
        await prepared.wait()
        if interest.subject == f"{place.namespace}.agent.counting.k" and not calls:
            calls.append(asyncio.ensure_future(client.request(interest.subject, b'{"via": "relay/k"}', 8)))
            await eventually(lambda: ("counting/k", "w1", Ask("relay/k")) in place.life.handled)
        await unsubscribe(interest)
        place.life.gate("relay").set()  # the call back comes when nobody listens, unless the owner listens again

    connection.unsubscribe = unsubscribe_late  # type: ignore[method-assign]
    try:
        await caller.send_message(Add(1), agent("k"))
        await place.worker("w2", options)
        prepared.set()
        if release == "unregister":
            await owner.unregister("counting")
        elif release == "stop":
            await owner.stop()
        await eventually(lambda: calls, timeout=10)
        reply = await calls[0]
        assert (reply.headers, orjson.loads(reply.data)) == (None, {"value": 11, "worker": "w1"})
        await eventually(lambda: ("counting/k", "w1") in place.life.closed)
        assert (await caller.send_message(Add(1), agent("k"))).value == 12
    finally:
        await client.close()


def due(worker: natsrt.NatsAgentRuntime, seconds: float) -> list[str]:
    """What the housekeeping of a worker would do with its agents in so many seconds."""
    releasing = worker.running.ownership._releasing
    now = asyncio.get_running_loop().time()
    work = [one for hosted in releasing._catalog for one in releasing._due(hosted, now + seconds)]
    for one in work:
        one.close()
    return [one.__name__ for one in work]


async def test_an_agent_is_released_after_its_idle_timeout_and_not_before(place: Place) -> None:
    owner = await place.worker("w1", KeyedOptions(idle_timeout=100))
    await (await place.caller()).send_message(Add(1), agent("k"))
    assert (due(owner, 90), due(owner, 110)) == ([], ["release"])


async def test_an_agent_in_use_is_not_released_however_long_it_takes(place: Place) -> None:
    owner = await place.worker("w1", KeyedOptions(idle_timeout=100))
    call = asyncio.ensure_future((await place.caller()).send_message(Hold("gate"), agent("k")))
    await asyncio.wait_for(place.life.gate("gate began").wait(), 5)
    assert due(owner, 1000) == []
    place.life.gate("gate").set()
    await call
    assert due(owner, 1000) == ["release"]


async def test_a_changed_state_is_stored_at_the_interval_and_not_before(place: Place) -> None:
    owner = await place.worker("w1", KeyedOptions(save="interval", save_interval=100, idle_timeout=None))
    await (await place.caller()).send_message(Add(1), agent("k"))
    assert (due(owner, 90), due(owner, 110)) == ([], ["_store_in_background"])
    await owner.store_state(agent("k"))
    assert due(owner, 1000) == []


async def test_an_agent_that_is_lost_while_it_is_claimed_leaves_no_subscription_behind(place: Place) -> None:
    """A second subscription of one worker to an agent's subject would let it handle every call twice."""
    owner = await place.worker("w1")
    caller = await place.caller()
    ownership = owner.running.ownership
    claiming = ownership._claiming
    listen, subscribed = claiming._subjects.listen, list[Interest]()

    async def listen_late(hosted: Any, key: str) -> Interest:
        if not subscribed:
            present = await caller.running.records.read(agent("k"))
            assert present is not None
            await caller.running.records.take(present, "a-worker-that-is-gone")
            ownership.doubt()
            await eventually(lambda: ownership.owned("counting") == 0)
        subscribed.append(await listen(hosted, key))
        return subscribed[-1]

    claiming._subjects.listen = listen_late  # type: ignore[method-assign]
    assert (await caller.send_message(Add(1), agent("k"))).value == 1
    assert (await caller.send_message(Add(1), agent("k"))).value == 2
    assert len(subscribed) == 2
    assert [owner.running.connection.holds(interest) for interest in subscribed] == [False, True]


async def test_an_agent_whose_handler_does_not_end_is_closed_when_its_worker_stops(place: Place) -> None:
    owner = await place.worker("w1", drain_timeout=0.2)
    caller = await place.caller()
    call = asyncio.ensure_future(caller.send_message(Hold("never"), agent("k")))
    await asyncio.wait_for(place.life.gate("never began").wait(), 5)
    await owner.stop()
    assert place.life.closed == [("counting/k", "w1")]
    with pytest.raises(natsrt.errors.UndeliveredCall):
        await call


async def test_a_state_that_could_not_be_stored_is_still_to_be_stored(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = await place.worker("w1", KeyedOptions(save="interval", save_interval=100, idle_timeout=None))
    await (await place.caller()).send_message(Add(1), agent("k"))

    async def fails(counting: Counting) -> dict[str, Any]:
        raise ValueError("not now")

    with monkeypatch.context() as patch:
        patch.setattr(Counting, "save_state", fails)
        with pytest.raises(ValueError, match="not now"):
            await owner.store_state(agent("k"))
    assert due(owner, 1000) == ["_store_in_background"]
    await owner.store_state(agent("k"))
    assert due(owner, 1000) == []
