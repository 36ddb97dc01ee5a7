"""Streams while either end is cut off, frozen and killed, and the judgement of such runs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from autogen_core import AgentId

from benchmarks.chaos.journal import Book, Written
from benchmarks.chaos.proxy import Proxy
from benchmarks.chaos.scenario import broken
from benchmarks.chaos.scenarios import streams
from benchmarks.chaos.scenarios.streams import Result
from benchmarks.chaos.stream_plan import End, Fault, Kind, Run, Streamed, plan
from benchmarks.chaos.streams import BEGAN, COMPLETE, ENDED, HUNG, LEFT, STOPPED
from natsrt import MessageStream, NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from tests.programs.stream_worker import Count, Item, Streams, Sum
from tests.support.processes import eventually

RUNS = 8
SEED = 3


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_streams_are_complete_and_in_order_or_end_with_a_typed_error() -> None:
    figures = await streams.measure(RUNS, SEED, lanes=4)
    assert broken(figures) == [], {figure.name: figure.value for figure in figures}


# -- the plan --------------------------------------------------------------------------------------------------------


def test_the_same_seed_plans_the_same_runs_and_another_one_others() -> None:
    planned = [plan(1, number) for number in range(300)]
    assert planned == [plan(1, number) for number in range(300)] != [plan(2, number) for number in range(300)]
    faults = {(fault.kind, fault.end) for run in planned for fault in run.faults}
    assert faults == {(kind, end) for kind in Kind for end in End}
    assert 100 < sum(run.gentle for run in planned) < 200
    assert all(run.faults for run in planned)
    assert {stream.keyed for run in planned for stream in run.streams} == {True, False}


def test_gentle_runs_kill_nobody_and_have_short_faults() -> None:
    for run in (plan(1, number) for number in range(300)):
        if run.gentle:
            assert all(fault.kind is not Kind.KILL for fault in run.faults)
            assert sum(fault.seconds for fault in run.faults) < 2.0


# -- the judgement ---------------------------------------------------------------------------------------------------

STREAM = Streamed(count=10, size=1, pause=0.0, read_pause=0.0, window=10, keyed=False, take=None)
CUT = Fault(0.0, End.CALLER, Kind.CUT, 0.1)
KILL = Fault(0.0, End.WORKER, Kind.KILL, 0.0)


def result(gentle: bool = False, **changes: Any) -> Result:
    stream = {"name": "1/0/0", "outcome": COMPLETE, "why": "", "wrong": "", "received": 10, "ended": 2.0}
    return Result(Run((STREAM,), (CUT,), gentle), "1/0", [stream | changes], quiet=1.0)


def killed(seconds: float) -> Result:
    """The worker is killed, and the stream ends some seconds later."""
    lost = result(outcome="WorkerLost", ended=1.0 + seconds)
    lost.killed[End.WORKER] = 1.0
    lost.run = replace(lost.run, faults=(KILL,))
    return lost


def book(*words: str) -> Book:
    return {word: {"1/0/0": [Written(1, 1.0)]} for word in (BEGAN, *words)}


@pytest.mark.parametrize(
    ("judged", "written", "found"),
    [
        (result(), book(ENDED), []),
        (result(outcome=LEFT, received=3), book(STOPPED), []),
        (result(outcome="WorkerLost", received=3), book(STOPPED), []),
        (killed(4.0), book(), []),
        (result(wrong="item 2 in place of 1"), book(ENDED), ["lost, doubled or not in order"]),
        (result(received=9), book(ENDED), ["without all items, and without an error"]),
        (result(outcome=HUNG), book(STOPPED), ["hung"]),
        (result(outcome="KeyError"), book(STOPPED), ["untyped"]),
        (result(outcome="WorkerLost", gentle=True), book(STOPPED), ["all faults were short"]),
        (result(), {ENDED: book(ENDED)[ENDED], BEGAN: {"1/0/0": [Written(1, 1.0)] * 2}}, ["started twice"]),
        (result(), book(STOPPED), ["complete streams whose handler did not end"]),
        (result(outcome="WorkerLost"), book(), ["handlers that did not end"]),
        (killed(6.0), book(), ["killed, and nothing else happened"]),
        (result(outcome="WorkerLost", ended=30.0), book(STOPPED), ["after the last fault was over"]),
    ],
)
def test_the_judgement_finds_what_went_wrong(judged: Result, written: Book, found: list[str]) -> None:
    lines = broken(streams.judged([judged], written))
    assert len(lines) == len(found)
    assert all(text in line for text, line in zip(found, lines, strict=True))


def test_the_judgement_finds_what_was_not_given_back() -> None:
    restless = result()
    restless.restless.append(End.WORKER)
    assert len(broken(streams.judged([restless], book(ENDED)))) == 1


# -- what the runs have found ----------------------------------------------------------------------------------------


async def test_a_stream_goes_on_whose_first_parts_were_lost(server: EmbeddedServer, namespace: str) -> None:
    agents: list[Streams] = []

    def agent() -> Streams:
        agents.append(Streams())
        return agents[-1]

    async with (
        Proxy(server.url) as near,
        NatsAgentRuntime(server.url, namespace=namespace) as worker,
        NatsAgentRuntime(near.url, namespace=namespace, reconnect_wait=0.05) as caller,
    ):
        await worker.register_factory("streams", agent, expected_class=Streams)
        await caller.send_message(Count(0), AgentId("streams", "k"))
        near.mute()
        stream = caller.stream_message(Count(5), AgentId("streams", "k"), window=2)
        reading = asyncio.ensure_future(anext(stream))
        await eventually(lambda: agents[0].sent == 3)  # two are on their way, and the third has no room
        near.cut()
        await near.restore()
        async with asyncio.timeout(10):
            assert [await reading, *[item async for item in stream]] == [*map(Item, range(1, 6)), Sum(2)]


@pytest.mark.parametrize("insistent", [False, True], ids=["natsrt", "asks again and again"])
async def test_a_gap_is_sent_again_once(
    server: EmbeddedServer, namespace: str, monkeypatch: pytest.MonkeyPatch, insistent: bool
) -> None:
    """``insistent``: the caller asks for the rest of the gap whenever a part arrives, while the worker cannot send."""
    async with (
        NatsAgentRuntime(server.url, namespace=namespace) as worker,
        NatsAgentRuntime(server.url, namespace=namespace) as caller,
    ):
        await worker.register_factory("streams", Streams, expected_class=Streams)
        await caller.send_message(Count(0), AgentId("streams", "k"))
        outgoing, published, may_send = worker.running.incoming.streams, 0, asyncio.Event()
        real = outgoing.publish

        async def lossy(subject: str, body: bytes) -> None:
            nonlocal published
            published += 1
            if published > 2000:
                await may_send.wait()
            if not 1 < published <= 1000:
                await real(subject, body)

        monkeypatch.setattr(outgoing, "publish", lossy)
        reading = asyncio.ensure_future(
            _items(caller.stream_message(Count(3000), AgentId("streams", "k"), window=2000))
        )
        await eventually(lambda: published > 2000)
        if insistent:
            (stream,) = outgoing._streams.values()
            for have in range(1, 500):
                stream.told({"stream": stream.parts_to, "consumed": 0, "have": 1, "missing": [have + 1, 1000]})
            await asyncio.sleep(0)
        assert len(outgoing._tasks) == 1
        may_send.set()
        async with asyncio.timeout(20):
            assert await reading == [*map(Item, range(1, 3001)), Sum(2)]
        assert published < 3000 + 2 * 1000  # it was half a million


async def _items(stream: MessageStream) -> list[Any]:
    return [item async for item in stream]
