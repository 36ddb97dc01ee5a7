"""Random schedules of calls: workers die, freeze, forget and join, connections are lost and stall, messages are lost.

After each schedule, every call has ended in its own reply or in an error, and no call was handled twice, nor at all if
its error says that it was not. The calling side is `Calls` and `CallWatch`, and the log of each worker is a `CallLog`;
see `tests.support.call_world`.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import click
from nats.aio.msg import Msg

from natsrt.errors import Deadlock, NoLiveWorker, UndeliveredCall, UnknownAgent, UnknownAgentType, WorkerBusy
from tests.support import virtual_time
from tests.support.call_world import World
from tests.support.exploring import explore, explores

LOST_AFTER = 12.0
CHAOS = 8.0
"""Seconds in which workers die, freeze, and come, the connection is lost, and messages are."""
LONGEST = 10.0
"""Seconds that a handler takes at most."""
LATEST = 1.0
"""Seconds after the last disturbance in which what was held up still arrives."""
NOT_HANDLED = (UnknownAgentType, UnknownAgent, NoLiveWorker, WorkerBusy, Deadlock)
"""The errors that say that no handler was started: see ``docs/errors.md``."""
END = CHAOS + LOST_AFTER + LONGEST + 5.0
"""Seconds by which every call has ended, also one whose worker dies at the end of the chaos."""


async def disturb(world: World, rng: random.Random, stalls: float) -> None:
    """Do something bad for some seconds."""
    workers, network = world.workers, world.network
    what, pause = rng.random(), rng.choice([0.05, 0.3, 1.0, 2.0, 3.0])
    if rng.random() < stalls:
        await stall(world, rng, pause)
        return
    living = [worker for worker in workers.all if worker.alive]
    if what < 0.25 and living:
        worker = rng.choice(living)
        worker.kill()
        await asyncio.sleep(rng.choice([0.0, 0.0, pause]))  # its machine, not only its process
        worker.listens = False
        await asyncio.sleep(rng.uniform(0.0, 5.0))
        workers.leave(worker)
    elif what < 0.45 and living:
        worker = rng.choice(living)
        worker.freeze()
        await asyncio.sleep(pause)
        if rng.random() < 0.3:  # the server and the other workers take it for dead, and it joins again
            worker.listens = False
            await asyncio.sleep(rng.choice([0.0, pause]))
            workers.leave(worker)
            await asyncio.sleep(rng.choice([0.3, 3.0]))
            workers.join_again(worker)
        worker.thaw()
    elif what < 0.55 and living:
        rng.choice(living).forget()
    elif what < 0.65:
        start_another(world, rng)
    elif what < 0.8 and network.up:
        network.lose()
        await asyncio.sleep(pause)
        network.come_back()
    else:
        network.loss = rng.choice([0.2, 0.5, 1.0])
        await asyncio.sleep(pause)
        network.loss = 0.0


async def stall(world: World, rng: random.Random, pause: float) -> None:
    """Let what is sent wait on its way. Mostly the connection is replaced, and what waits arrives some time later."""
    thaw = world.network.stall()
    await asyncio.sleep(pause)
    if rng.random() < 0.8:
        world.network.replace()
        await asyncio.sleep(rng.choice([0.0, 0.3, 1.0, 3.0, 6.0]))
    thaw()


def start_another(world: World, rng: random.Random) -> None:
    listed_after, serves_after = sorted(rng.choices([0.0, 0.02, 0.3, 1.0], k=2))
    world.workers.start(lambda: handler_time(rng), listed_after=listed_after, serves_after=serves_after)


def handler_time(rng: random.Random) -> float:
    return rng.choice([0.0, 0.0, 0.1, 0.2, 1.0, 3.0, LONGEST])


async def any_schedule(seed: int, *, stalls: float = 0.05, old: bool = False) -> None:
    """One schedule. Raises AssertionError.

    ``stalls`` is the part of stalled connections among what happens. ``old``: the workers make no promises.
    """
    rng = random.Random(seed)
    world = World(seed, tapped=rng.random() < 0.5, lost_after=LOST_AFTER)
    async with world.started():
        world.workers.old = old
        for _ in range(rng.randint(1, 3)):
            worker = world.workers.start(lambda: handler_time(rng))
            worker.accepts = rng.random() < 0.8
        begun, calls, bad = _now(), list[asyncio.Task[Msg]](), list[asyncio.Task[None]]()
        while _now() < begun + CHAOS:
            if rng.random() < 0.7:
                calls.append(world.call(str(len(calls)).encode()))
            elif rng.random() < 0.3:
                bad.append(asyncio.ensure_future(disturb(world, rng, stalls)))
            await asyncio.sleep(rng.choice([0.0, 0.0, 0.05, 0.3, 1.0]))
        await asyncio.wait({*calls}, timeout=END - CHAOS)
        hanging = [number for number, call in enumerate(calls) if not call.done()]
        assert not hanging, f"calls that hang: {hanging}"
        assert world.calls.pending == 0
        results = await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.gather(*bad)
        await asyncio.sleep(LATEST)
    for number, result in enumerate(results):
        if isinstance(result, Msg):
            assert result.data == str(number).encode()
        else:
            assert isinstance(result, UndeliveredCall), result
            handled = world.workers.handled[str(number).encode()]
            assert not handled or not isinstance(result, NOT_HANDLED), f"call {number} was handled: {result}"
    twice = [call.decode() for call, times in world.workers.handled.items() if times > 1]
    assert not twice or not world.workers.promises_kept, f"calls that were handled twice: {twice}"


@click.command()
@explores
@click.option("--stalls", default=0.5, show_default=True, help="The part of stalls among what happens.")
@click.option("--old", is_flag=True, help="Workers make no promises, as those of earlier versions.")
def main(stalls: float, old: bool, **exploring: Any) -> None:
    """Try schedules, and print those in which a call hangs, is handled twice, or is handled although its error denies
    it. The exit code is 1 if there are any."""
    explore(
        lambda seed: virtual_time.run(any_schedule(seed, stalls=stalls, old=old)),
        **exploring,
        replay="tests.support.call_schedules",
    )


def _now() -> float:
    return asyncio.get_running_loop().time()


if __name__ == "__main__":
    main()
