"""Calls that take long, without a server: the rules of the judgement, and the watch over random schedules."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any
from unittest.mock import Mock

import orjson
import pytest
from nats.aio.msg import Msg

from natsrt.errors import (
    CallTimeout,
    NatsrtError,
    NoLiveWorker,
    PermissionDenied,
    ServerUnreachable,
    WorkerLost,
)
from natsrt.options import Options
from natsrt.transport.call_judgement import AskedWorker, Judge, PendingCall, Verdict
from natsrt.transport.calls import Attempts
from natsrt.transport.round_trip_time import RoundTripTime
from natsrt.wire import envelope
from tests.support import virtual_time
from tests.support.call_schedules import LOST_AFTER, any_schedule
from tests.support.call_world import AGENT, CALLS, World

ALWAYS = 1e9


# -- the judgement, with made-up times -------------------------------------------------------------------------------


def pending(sent_at: float = 100.0) -> PendingCall:
    return PendingCall("inbox.1", CALLS, AGENT, asyncio.get_running_loop().create_future(), sent_at)


def judge(*silent: str, since: float = 100.0) -> Judge:
    """A judge; the ``silent`` workers were asked at the time ``since``."""
    made = Judge(LOST_AFTER, RoundTripTime())
    for worker_id in silent:
        made.worker(worker_id).asked(since)
    return made


def verdict(
    made: Judge,
    call: PendingCall,
    *workers: str,
    now: float,
    all_stayed: bool | None = True,
    up_since: float = 0.0,
    settled: bool = True,
) -> Verdict:
    return made.verdict(call, workers, now, all_stayed=all_stayed, up_since=up_since, settled=settled)


async def test_an_accepted_call_is_asked_for_at_its_worker_whatever_others_say() -> None:
    call = pending()
    call.accepted_by = "w1"
    for _ in range(2):
        assert not call.unknown("w2", ALWAYS, 101.0)
    assert verdict(judge(), call, "w2", now=1e6) is Verdict.ASK
    assert verdict(judge(), call, now=1e6) is Verdict.ASK  # although the directory lists nobody


async def test_an_accepted_call_is_lost_when_its_worker_does_not_know_it() -> None:
    call = pending()
    assert not call.unknown("w1", ALWAYS, 101.0)
    call.accepted_by = "w1"
    assert call.unknown("w1", 0.0, 102.0)


async def test_an_accepted_call_is_lost_with_its_worker() -> None:
    call = pending()
    call.accepted_by = "w1"
    assert verdict(judge("w1"), call, "w1", now=112.0) is Verdict.ASK
    assert verdict(judge("w1"), call, "w1", now=112.1) is Verdict.LOST
    assert verdict(judge("w2"), call, "w1", now=112.1) is Verdict.ASK


async def test_a_call_without_workers_is_checked_at_once() -> None:
    assert verdict(judge(), pending(), now=100.0) is Verdict.CHECK


async def test_workers_are_asked_about_a_call_that_is_half_a_second_old() -> None:
    call = pending()
    assert verdict(judge(), call, "w1", now=100.45) is Verdict.WAIT
    assert verdict(judge(), call, "w1", now=100.5) is Verdict.ASK


async def test_a_call_is_asked_for_at_once_after_a_reconnect() -> None:
    call = pending()
    call.reconnected(100.1)
    assert verdict(judge(), call, "w1", now=100.1) is Verdict.ASK
    call.reconnected(200.0)
    assert call.watched_from == pytest.approx(99.6)  # it never gets younger


@pytest.mark.parametrize(
    ("answers", "all_stayed", "expected"),
    [
        ({"w1": 2, "w2": 2}, True, Verdict.NEVER_RECEIVED),
        ({"w1": 2, "w2": 1}, True, Verdict.WITHDRAW),
        ({"w1": 2}, True, Verdict.ASK),
        ({"w1": 2, "w2": 2}, False, Verdict.ASK),
    ],
)
async def test_a_call_was_lost_on_its_way_if_all_say_so_twice_and_nobody_left(
    answers: dict[str, int], all_stayed: bool, expected: Verdict
) -> None:
    call = pending()
    for worker_id, times in answers.items():
        for _ in range(times):
            call.unknown(worker_id, ALWAYS, 100.6)
    assert verdict(judge(), call, "w1", "w2", now=100.9, all_stayed=all_stayed) is expected


async def test_a_call_is_not_sent_again_before_every_worker_has_promised_not_to_handle_it() -> None:
    call = pending()
    for worker_id in ("w1", "w2"):
        for _ in range(2):
            call.unknown(worker_id, ALWAYS, 100.6, promised=False)
    made = judge()
    assert verdict(made, call, "w1", "w2", now=102.0) is Verdict.WITHDRAW
    call.unknown("w1", ALWAYS, 102.0, promised=True)
    assert verdict(made, call, "w1", "w2", now=102.0) is Verdict.WITHDRAW
    call.unknown("w2", ALWAYS, 102.0, promised=True)
    assert verdict(made, call, "w1", "w2", now=102.0) is Verdict.NEVER_RECEIVED
    assert verdict(made, call, "w1", "w2", "w3", now=102.0) is not Verdict.NEVER_RECEIVED


async def test_a_worker_whose_log_became_incomplete_may_have_handled_the_call_before_its_promise() -> None:
    call = pending()
    call.unknown("w1", ALWAYS, 100.6, promised=False)
    call.unknown("w1", 0.2, 101.1, promised=True)
    assert verdict(judge(), call, "w1", now=101.1) is Verdict.LOST


async def test_it_is_waited_for_the_directory_that_is_read_again() -> None:
    call, made = pending(), judge()
    for _ in range(2):
        call.unknown("w1", ALWAYS, 101.0, promised=True)
    assert verdict(made, call, "w1", now=101.0, all_stayed=None) is Verdict.WITHDRAW
    assert verdict(made, call, "w1", now=112.0, all_stayed=None) is Verdict.WITHDRAW
    assert verdict(made, call, "w1", now=112.0) is Verdict.NEVER_RECEIVED
    assert verdict(made, call, "w1", now=112.1, all_stayed=None) is Verdict.LOST
    assert verdict(made, call, "w1", now=112.1, all_stayed=None, up_since=105.0) is Verdict.WITHDRAW


async def test_a_worker_that_dies_before_its_promise_may_have_handled_the_call() -> None:
    call, made = pending(), judge("w2")
    for worker_id in ("w1", "w2"):
        for _ in range(2):
            call.unknown(worker_id, ALWAYS, 100.6, promised=worker_id == "w1")
    assert verdict(made, call, "w1", "w2", now=112.0) is Verdict.WITHDRAW
    assert verdict(made, call, "w1", "w2", now=112.1) is Verdict.LOST


@pytest.mark.parametrize(("remembers", "expected"), [(6.1, Verdict.NEVER_RECEIVED), (6.0, Verdict.LOST)])
async def test_a_log_must_reach_back_a_second_further_than_the_call(remembers: float, expected: Verdict) -> None:
    call = pending()
    for _ in range(2):
        call.unknown("w1", remembers, 105.0)
    assert verdict(judge(), call, "w1", now=105.0) is expected


async def test_a_call_is_lost_if_every_worker_does_not_know_it_or_is_lost() -> None:
    call = pending()
    for _ in range(2):
        call.unknown("w1", 0.0, 101.0)
    made = judge("w2")
    assert verdict(made, call, "w1", "w2", now=112.0) is Verdict.ASK
    assert verdict(made, call, "w1", "w2", now=112.1) is Verdict.LOST
    made.worker("w2").heard()
    assert verdict(made, call, "w1", "w2", now=112.1) is Verdict.ASK


async def test_one_answer_is_not_enough_to_call_it_lost() -> None:
    call = pending()
    call.unknown("w1", 0.0, 101.0)
    assert verdict(judge(), call, "w1", now=102.0) is Verdict.ASK


async def test_a_call_is_not_lost_before_all_workers_are_listed_that_could_have_it() -> None:
    call = pending()
    for _ in range(2):
        call.unknown("w1", 0.0, 100.9)
    assert verdict(judge(), call, "w1", now=100.9) is Verdict.ASK
    assert verdict(judge(), call, "w1", now=101.5, up_since=100.6) is Verdict.ASK  # reconnected a moment ago
    assert verdict(judge(), call, "w1", now=101.6, up_since=100.6) is Verdict.LOST


async def test_a_worker_that_came_later_cannot_have_the_call() -> None:
    call = pending()
    for _ in range(2):
        call.unknown("w1", 0.0, 100.9)
    verdict(judge(), call, "w1", "w2", now=101.0)
    assert verdict(judge(), call, "w1", "late", now=101.5) is Verdict.LOST
    assert verdict(judge(), call, "w1", "w2", now=101.5) is Verdict.ASK
    call.reconnected(102.0)
    assert verdict(judge(), call, "w1", "late", now=102.5, up_since=102.0) is Verdict.ASK  # it may have been sent anew


def test_a_worker_is_lost_after_lost_after_of_silence_counted_from_the_first_question() -> None:
    worker = AskedWorker()
    assert not worker.is_lost(1e6, LOST_AFTER, True)
    worker.asked(100.0)
    worker.asked(111.0)
    assert not worker.is_lost(112.0, LOST_AFTER, False)
    assert worker.is_lost(112.1, LOST_AFTER, False)
    worker.heard()
    assert not worker.is_lost(112.1, LOST_AFTER, False)


def test_a_worker_that_does_not_listen_is_lost_sooner_once_the_connection_has_settled() -> None:
    worker = AskedWorker()
    worker.asked(100.0)
    worker.gone(100.5)
    worker.gone(101.0)
    assert not worker.is_lost(102.0, LOST_AFTER, True)
    assert worker.is_lost(102.1, LOST_AFTER, True)
    assert not worker.is_lost(102.1, LOST_AFTER, False)
    worker.listens()
    assert not worker.is_lost(102.1, LOST_AFTER, True)


def test_silence_counts_anew_after_a_reconnect() -> None:
    worker = AskedWorker()
    worker.asked(100.0)
    worker.gone(100.0)
    worker.reconnected(130.0)
    assert worker.asked_at < 130.0 - 1e6  # the next question is due
    assert not worker.is_lost(142.0, LOST_AFTER, True)
    assert worker.is_lost(142.1, LOST_AFTER, True)


# -- attempts ----------------------------------------------------------------------------------------------------------


def attempts() -> Attempts:
    return Attempts(Options(namespace="t", no_responders_retry=5.0, busy_retry=1.0))


def test_a_call_that_gets_lost_is_sent_again_three_times() -> None:
    made = attempts()
    assert [made.lost() for _ in range(4)] == [True, True, True, False]


def test_where_nobody_listens_the_pauses_grow_to_a_quarter_of_a_second() -> None:
    made = attempts()
    assert [made.nobody(100.0) for _ in range(6)] == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.25, 0.25])
    assert made.nobody(104.7) == pytest.approx(0.25)
    assert made.nobody(104.8) is None


def test_where_workers_are_busy_the_pauses_stay_short() -> None:
    made = attempts()
    assert [made.busy(100.0) for _ in range(4)] == pytest.approx([0.02, 0.04, 0.05, 0.05])
    assert made.busy(101.0) == pytest.approx(0.05)
    assert made.busy(101.1) is None


def test_the_time_of_refusals_counts_anew_after_a_call_was_lost() -> None:
    made = attempts()
    made.busy(100.0)
    assert made.lost()
    assert made.busy(101.1) is not None
    assert made.busy(102.2) is None


# -- the watch, in virtual time ----------------------------------------------------------------------------------------


def in_world(test: Callable[[World], Coroutine[Any, Any, None]], **arguments: Any) -> None:
    async def run() -> None:
        async with World(**arguments).started() as world:
            await test(world)

    virtual_time.run(run())


def now() -> float:
    return asyncio.get_running_loop().time()


async def took(call: asyncio.Task[Msg]) -> float:
    """Seconds until the call has ended."""
    begun = now()
    await asyncio.wait({call}, timeout=600)
    assert call.done(), "the call hangs"
    return now() - begun


@pytest.mark.slow
@pytest.mark.parametrize("tapped", [False, True])
def test_a_handler_that_works_for_an_hour_is_not_cut_off(tapped: bool) -> None:
    async def test(world: World) -> None:
        world.workers.start(lambda: 3600.0)
        assert (await world.call(b"x")).data == b"x"
        assert world.calls.pending == 0
        assert not world.workers.suspected

    in_world(test, tapped=tapped)


@pytest.mark.parametrize("accepts", [False, True])
@pytest.mark.parametrize("tapped", [False, True])
def test_callers_of_a_killed_worker_get_their_error_within_five_seconds(tapped: bool, accepts: bool) -> None:
    async def test(world: World) -> None:
        worker = world.workers.start(lambda: 60.0)
        worker.accepts = accepts
        call = world.call()
        await asyncio.sleep(1.0)
        worker.kill()
        worker.listens = False
        assert await took(call) < 5.0
        with pytest.raises(WorkerLost, match="no longer answers"):
            await call
        assert world.workers.suspected[worker.worker_id] > 0

    in_world(test, tapped=tapped)


def test_a_frozen_worker_is_lost_after_lost_after() -> None:
    async def test(world: World) -> None:
        worker = world.workers.start(lambda: 60.0)
        call = world.call()
        await asyncio.sleep(1.0)
        worker.freeze()
        assert LOST_AFTER <= await took(call) < LOST_AFTER + 1.0
        assert isinstance(call.exception(), WorkerLost)

    in_world(test, lost_after=LOST_AFTER)


def test_a_blocked_event_loop_is_not_silence_of_a_worker_and_the_watch_goes_on() -> None:
    async def test(world: World) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, virtual_time.VirtualTimeLoop)
        worker = world.workers.start(lambda: 60.0)
        call = world.call()
        await asyncio.sleep(2.0)
        worker.freeze()
        questions = len(world.network.published)
        while len(world.network.published) == questions:
            await asyncio.sleep(0.001)
        loop.block(3 * LOST_AFTER)
        await asyncio.sleep(0.3)  # until what has arrived meanwhile is read
        worker.thaw()
        await asyncio.sleep(1.0)
        assert not call.done()
        worker.freeze()
        assert LOST_AFTER <= await took(call) < LOST_AFTER + 1.0
        assert isinstance(call.exception(), WorkerLost)

    in_world(test, lost_after=LOST_AFTER)


def test_a_call_that_a_frozen_worker_never_took_is_lost_when_all_others_are_ruled_out() -> None:
    async def test(world: World) -> None:
        worker, other = world.workers.start(), world.workers.start()
        worker.freeze()
        other.listens = False
        call = world.call()
        await asyncio.sleep(0.1)
        other.listens = True
        await asyncio.sleep(0.7)  # the other one says once that it does not know the call
        other.freeze()
        assert LOST_AFTER <= await took(call) < LOST_AFTER + 1.0
        with pytest.raises(WorkerLost, match="no worker of its type knows the call"):
            await call
        assert world.workers.suspected[worker.worker_id] > 0  # it was lost half a second before the other

    in_world(test, lost_after=LOST_AFTER)


def test_a_worker_that_subscribes_again_in_time_has_lost_after() -> None:
    async def test(world: World) -> None:
        worker = world.workers.start(lambda: 60.0)
        call = world.call()
        await asyncio.sleep(1.0)
        worker.freeze()
        worker.listens = False
        await asyncio.sleep(1.2)
        worker.listens = True
        await asyncio.sleep(8.0)
        worker.thaw()
        assert (await call).data == b"1"
        assert not world.workers.suspected

    in_world(test, lost_after=LOST_AFTER)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_froze_before_they_took_a_call_are_suspected(workers: int) -> None:
    async def test(world: World) -> None:
        frozen = [world.workers.start() for _ in range(workers)]
        for worker in frozen:
            worker.freeze()
        call = world.call()
        assert LOST_AFTER <= await took(call) < LOST_AFTER + 1.0
        with pytest.raises(WorkerLost, match="no worker of its type knows the call"):
            await call
        assert world.workers.suspected.keys() == {worker.worker_id for worker in frozen}

    in_world(test, lost_after=LOST_AFTER)


def test_an_accepted_call_is_watched_however_long_check_after_is() -> None:
    async def test(world: World) -> None:
        worker = world.workers.start(lambda: 60.0)
        call = world.call()
        await asyncio.sleep(1.0)
        worker.kill()
        worker.listens = False
        assert await took(call) < 5.0

    in_world(test, check_after=3600.0)


def test_nothing_is_kept_of_calls_that_ended_and_workers_that_left() -> None:
    async def test(world: World) -> None:
        for _ in range(3):
            worker = world.workers.start(lambda: 2.0)
            await world.call()
            assert world.watch._watched == {} and world.watch.pending == {}
            assert set(world.inbox.receivers) == {world.calls.accept_to, world.inbox.subject(f"w-{worker.worker_id}")}
            worker.kill()
            worker.listens = False
            world.workers.leave(worker)

    in_world(test)


def test_a_call_that_its_worker_forgot_is_lost() -> None:
    async def test(world: World) -> None:
        worker = world.workers.start(lambda: 60.0)
        call = world.call()
        await asyncio.sleep(1.0)
        worker.forget()
        assert await took(call) < 1.0
        with pytest.raises(WorkerLost, match="no longer knows the call"):
            await call

    in_world(test)


def test_a_call_that_was_lost_on_its_way_is_sent_again_and_handled_once() -> None:
    async def test(world: World) -> None:
        world.workers.start()
        world.workers.start()
        world.network.loss = 1.0
        call = world.call()
        await asyncio.sleep(0.1)
        world.network.loss = 0.0
        assert await took(call) < 2.0
        assert call.result().data == b"1"
        assert world.workers.handled[b"1"] == 1

    in_world(test)


def test_a_call_that_is_lost_again_and_again_ends() -> None:
    async def test(world: World) -> None:
        worker = world.workers.start()
        take = worker.post

        def post(subject: str, *arguments: Any) -> None:
            if subject != CALLS:
                take(subject, *arguments)

        worker.post = post  # type: ignore[method-assign, assignment]
        call = world.call()
        assert await took(call) < 6.0
        with pytest.raises(WorkerLost, match="on its way"):
            await call
        assert len([subject for subject, _ in world.network.published if subject == CALLS]) == 4

    in_world(test)


def test_a_lost_reply_is_sent_again() -> None:
    async def test(world: World) -> None:
        worker = world.workers.start(lambda: 0.1)
        call = world.call()
        await asyncio.sleep(0.05)
        world.network.loss = 1.0
        await asyncio.sleep(0.1)
        world.network.loss = 0.0
        assert await took(call) < 1.0
        assert call.result().data == b"1" and worker.handled[b"1"] == 1

    in_world(test)


@pytest.mark.parametrize("check_after", [0.5, 60.0])
def test_a_reply_that_was_lost_with_the_connection_is_asked_for_when_it_is_back(check_after: float) -> None:
    async def test(world: World) -> None:
        worker = world.workers.start(lambda: 2.0)
        worker.accepts = check_after < 2.0
        call = world.call()
        await asyncio.sleep(1.9)
        world.network.lose()
        await asyncio.sleep(5.0)
        world.network.come_back()
        assert await took(call) < 0.2
        assert call.result().data == b"1" and worker.handled[b"1"] == 1

    in_world(test, check_after=check_after)


@pytest.mark.parametrize("error", [RuntimeError("a fault"), ServerUnreachable(["nats://virtual"], 1.0)])
def test_a_round_of_the_watch_that_fails_is_not_the_last_one(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        worker = world.workers.start(lambda: 60.0)
        call, read = world.call(), world.workers.workers_of
        await asyncio.sleep(1.0)
        monkeypatch.setattr(world.workers, "workers_of", Mock(side_effect=error))
        await asyncio.sleep(1.0)
        monkeypatch.setattr(world.workers, "workers_of", read)
        worker.kill()
        worker.listens = False
        assert await took(call) < 5.0
        assert isinstance(call.exception(), WorkerLost)

    in_world(test)


def test_silence_while_the_connection_is_down_does_not_count() -> None:
    async def test(world: World) -> None:
        worker = world.workers.start(lambda: 60.0)
        call = world.call()
        await asyncio.sleep(1.0)
        worker.freeze()
        await asyncio.sleep(10.0)
        world.network.lose()
        await asyncio.sleep(10.0)
        world.network.come_back()
        await asyncio.sleep(2.0)
        worker.thaw()
        await took(call)
        assert call.result().data == b"1"

    in_world(test, lost_after=LOST_AFTER)


def test_a_lost_connection_ends_calls_after_offline_timeout() -> None:
    async def test(world: World) -> None:
        world.workers.start(lambda: 60.0)
        call = world.call()
        await asyncio.sleep(1.0)
        world.network.lose()
        assert 5.0 <= await took(call) < 5.2
        assert isinstance(call.exception(), ServerUnreachable)

    in_world(test, offline_timeout=5.0)


def test_without_a_limit_a_call_survives_a_lost_connection_of_any_length() -> None:
    async def test(world: World) -> None:
        world.workers.start(lambda: 60.0)
        call = world.call()
        await asyncio.sleep(1.0)
        world.network.lose()
        await asyncio.sleep(7200.0)
        assert not call.done()
        world.network.come_back()
        assert (await call).data == b"1"

    in_world(test, offline_timeout=None)


def test_an_agent_that_nobody_hosts_is_an_error_at_once_and_beside_a_tap_after_check_after() -> None:
    async def test(world: World) -> None:
        call = world.call()
        assert await took(call) < (0.5 if world.network.tapped else 0.1)
        assert isinstance(call.exception(), NoLiveWorker)

    in_world(test)
    in_world(test, tapped=True)


def test_a_plain_responder_has_plain_timeout() -> None:
    async def test(world: World) -> None:
        silent: list[str] = []
        world.network.plain = silent.append
        late, never = world.call(b"late"), world.call(b"never")
        await asyncio.sleep(5.0)
        world.network.to_runtime(silent[0], b"plain")
        assert (await late).data == b"plain"
        assert await took(never) == pytest.approx(5.0, abs=0.3)
        assert isinstance(never.exception(), CallTimeout)

    in_world(test, plain_timeout=10.0)


def test_a_check_that_cannot_read_the_directory_ends_the_call_unless_the_connection_was_lost() -> None:
    async def test(world: World) -> None:
        world.workers.unreachable = ServerUnreachable("nats://there", 1.0, None)
        call = world.call()
        assert await took(call) < 0.5
        assert call.exception() is world.workers.unreachable
        world.workers.read_takes = 1.0
        retried = world.call()
        await asyncio.sleep(0.5)  # a check has begun
        world.network.lose()
        world.network.come_back()
        await asyncio.sleep(0.8)  # it has failed
        assert not retried.done()
        world.workers.unreachable = None
        await took(retried)  # what was sent on the former connection may still arrive
        assert isinstance(retried.exception(), WorkerLost)

    in_world(test, tapped=True)


@pytest.mark.parametrize("tapped", [False, True])
@pytest.mark.parametrize("lost", [False, True])
def test_a_call_that_a_worker_may_have_received_does_not_end_as_one_that_was_not_handled(
    tapped: bool, lost: bool
) -> None:
    async def test(world: World) -> None:
        worker = world.workers.start(lambda: 12.0)
        worker.accepts = False
        call = world.call()
        await asyncio.sleep(0.1)
        assert worker.handled[b"1"] == (not lost)
        worker.freeze()  # a handler blocks its event loop: the server and the registry give it up
        worker.listens = False
        world.workers.leave(worker)
        world.network.loss = 0.0
        await took(call)
        with pytest.raises(WorkerLost, match="no worker of its type is left"):
            await call
        later = world.call(b"2")
        assert await took(later) < 0.5
        assert isinstance(later.exception(), NoLiveWorker)  # sent when nobody was left

    async def begin(world: World) -> None:
        world.network.loss = float(lost)
        await test(world)

    in_world(begin, tapped=tapped)


def test_a_call_that_a_worker_did_not_answer_before_it_left_in_order_was_not_handled() -> None:
    async def test(world: World) -> None:
        worker = world.workers.start()
        worker.serves = False  # it has ended its subscriptions
        call = world.call()
        await asyncio.sleep(0.1)
        worker.listens = False
        world.workers.leave(worker, in_order=True)
        assert await took(call) < 0.5
        assert isinstance(call.exception(), NoLiveWorker)

    in_world(test, tapped=True)


@pytest.mark.parametrize(("later", "expected"), [(True, NoLiveWorker), (False, WorkerLost), (None, WorkerLost)])
def test_whether_a_worker_has_left_is_waited_for_before_a_call_fails(
    later: bool | None, expected: type[NatsrtError], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        monkeypatch.setattr(world.workers, "all_stayed", lambda since: None)
        call = world.call()
        await asyncio.sleep(LOST_AFTER - 1.0)
        assert not call.done()
        if later is not None:
            monkeypatch.setattr(world.workers, "all_stayed", lambda since: later)
        assert await took(call) < (2.5 if later is None else 1.0)
        assert isinstance(call.exception(), expected)

    in_world(test, tapped=True, lost_after=LOST_AFTER)


def test_a_call_that_the_server_does_not_allow_ends_at_once() -> None:
    async def test(world: World) -> None:
        world.workers.start(lambda: 60.0)
        call = world.call()
        await asyncio.sleep(0.01)
        world.network.deny("agent.other")
        await asyncio.sleep(0.01)
        assert not call.done()
        world.network.deny(CALLS.upper())  # the server may write it in any case
        assert await took(call) == 0.0
        assert isinstance(call.exception(), PermissionDenied)

    in_world(test)


def test_pending_calls_end_when_their_runtime_stops_and_later_ones_do_not_begin() -> None:
    async def test(world: World) -> None:
        world.workers.start(lambda: 60.0)
        call = world.call()
        await asyncio.sleep(1.0)
        await world.calls.stop()
        for stopped in (call, world.call()):
            with pytest.raises(WorkerLost, match="this runtime was stopped"):
                await stopped
        assert world.workers.handled[b"1"] == 1

    in_world(test)


def test_a_worker_gets_one_question_each_half_second_however_many_calls_it_has() -> None:
    async def test(world: World) -> None:
        worker = world.workers.start(lambda: 10.0)
        calls = [world.call(str(number).encode()) for number in range(1200)]
        await asyncio.gather(*calls)
        questions = [
            orjson.loads(body)["data"]["calls"]
            for subject, body in world.network.published
            if subject == worker.subject
        ]
        assert len(questions) <= 3 * 20
        assert max(map(len, questions)) == 500
        assert {len(asked) for asked in questions} == {500, 200}

    in_world(test)


def test_a_worker_about_which_nothing_is_asked_any_more_starts_afresh() -> None:
    async def test(world: World) -> None:
        worker = world.workers.start(lambda: 5.0)
        await world.call()
        asked = worker.asked
        await asyncio.sleep(20.0)
        assert worker.asked == asked  # silence since the last question is not the worker's
        await world.call()

    in_world(test, lost_after=LOST_AFTER)


def test_a_question_that_was_open_when_its_call_ended_is_not_the_silence_of_a_later_call() -> None:
    async def test(world: World) -> None:
        worker = world.workers.start(lambda: 2.0)
        worker.accepts = False
        call = world.call()
        await asyncio.sleep(1.2)
        world.network.loss = 1.0
        await asyncio.sleep(0.7)
        world.network.loss = 0.0
        assert (await call).data == b"1"
        await asyncio.sleep(100.0)
        later = world.call()
        worker.freeze()
        await asyncio.sleep(3.0)
        worker.thaw()
        assert (await later).data == b"1"

    in_world(test, lost_after=LOST_AFTER, check_after=1.0)


def test_an_answer_that_cannot_be_read_is_refused_and_changes_nothing() -> None:
    async def test(world: World) -> None:
        world.workers.start(lambda: 2.0)
        call = world.call()
        await asyncio.sleep(1.0)
        sink = world.inbox._on_message
        for kind, data in [
            (envelope.ACCEPTED, {"calls": []}),
            (envelope.ACCEPTED, {"worker": 1, "calls": []}),
            (envelope.ACCEPTED, []),
            (envelope.REPLY, {"worker": "w0", "calls": []}),
        ]:
            body = envelope.encode(kind, '"id":"x","source":"/"', orjson.dumps(data))
            with pytest.raises(NatsrtError):
                sink(Msg(None, world.calls.accept_to, "", body))  # type: ignore[arg-type]
        body = envelope.encode(
            envelope.REPLY, '"id":"x","source":"/"', b'{"running":[],"unknown":[],"remembers":"long"}'
        )
        with pytest.raises(NatsrtError, match="remembers"):
            sink(Msg(None, world.inbox.subject("w-w0"), "", body))  # type: ignore[arg-type]
        assert (await call).data == b"1"

    in_world(test)


def test_a_busy_worker_is_tried_again_for_busy_retry() -> None:
    async def test(world: World) -> None:
        worker = world.workers.start()
        worker.busy = True
        refused = world.call()
        assert 1.0 <= await took(refused) < 1.2
        assert refused.result().headers is not None  # the refusal is what the caller gets
        call = world.call()
        await asyncio.sleep(0.5)
        worker.busy = False
        assert await took(call) < 0.1
        assert call.result().data == b"1"

    in_world(test, busy_retry=1.0)


def test_where_nobody_listens_a_call_is_sent_again_while_the_directory_lists_a_worker() -> None:
    async def test(world: World) -> None:
        worker = world.workers.start()
        worker.listens = False
        lost = world.call()
        assert 4.5 <= await took(lost) <= 5.0
        with pytest.raises(WorkerLost, match="it does not listen"):
            await lost
        assert world.workers.suspected[worker.worker_id] > 0
        call = world.call()
        await asyncio.sleep(2.0)
        worker.listens = True
        assert await took(call) < 0.3
        assert call.result().data == b"1"

    in_world(test, no_responders_retry=5.0)


class Place:
    """The destination of a keyed agent, which notes what it is told."""

    def __init__(self) -> None:
        self.subject = CALLS
        self.noted: list[str] = []
        self.known = True

    def may_send(self) -> bool:
        return self.known

    def join(self) -> asyncio.Future[None]:
        self.noted.append("join")
        return asyncio.get_running_loop().create_future()

    async def wait(self, turn: asyncio.Future[None]) -> None:
        self.noted.append("wait")
        self.known = True

    def lost(self) -> None:
        self.noted.append("lost")

    def owner_lost(self) -> None:
        self.noted.append("owner_lost")


def test_a_call_tells_its_destination_why_it_did_not_arrive() -> None:
    async def test(world: World) -> None:
        worker, place = world.workers.start(), Place()
        place.known = False
        sent: list[int] = []
        await world.call(destination=place, sent=lambda: sent.append(len(place.noted)))
        assert place.noted == ["join", "wait"]
        assert sent == [1, 2]  # once in the queue, and once on its way
        place.noted.clear()

        worker.busy = True  # it no longer owns the agent, or has no room
        call = world.call(destination=place)
        await asyncio.sleep(0.03)
        assert place.noted == ["lost", "lost"]
        worker.busy = False
        await call
        place.noted.clear()

        worker.listens = False
        call = world.call(destination=place)
        await asyncio.sleep(0.01)
        assert place.noted == ["lost"]
        worker.listens = True
        await call
        place.noted.clear()

        world.network.loss = 1.0
        call = world.call(destination=place)
        await asyncio.sleep(0.1)
        world.network.loss = 0.0
        await call
        assert place.noted == ["lost"]
        place.noted.clear()

        worker._takes = lambda: 60.0
        call = world.call(destination=place)
        await asyncio.sleep(1.0)
        worker.kill()
        worker.listens = False
        await took(call)
        assert place.noted == ["owner_lost"]

    in_world(test)


# -- random schedules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", range(10))
def test_in_every_schedule_each_call_ends_and_none_is_handled_twice(group: int) -> None:
    """Whatever happens to workers, connection and messages: a call ends in its reply or in an error, and is sent again
    only where nobody has handled it."""
    for seed in range(group * 30, group * 30 + 30):
        virtual_time.run(any_schedule(seed))


@pytest.mark.parametrize("group", range(5))
def test_in_every_schedule_with_stalled_connections_none_is_handled_twice(group: int) -> None:
    for seed in range(10_000 + group * 30, 10_000 + group * 30 + 30):
        virtual_time.run(any_schedule(seed, stalls=0.9))


def test_where_workers_make_no_promises_the_schedules_find_calls_that_are_handled_twice() -> None:
    with pytest.raises(AssertionError, match="handled twice"):
        for seed in range(1000):
            virtual_time.run(any_schedule(seed, stalls=0.9, old=True))
