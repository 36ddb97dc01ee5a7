"""``natsrt record``: stores what passes in a stream.

``natsrt auth record`` (`natsrt_cli.recording`) is another thing: it writes down who does what, and keeps no message.
"""

from __future__ import annotations

import asyncio
import functools
import re
import signal
from collections.abc import Callable

import click

from natsrt.jetstream.recorder import GIGABYTE, WAITING_BYTES, Recorded, Recorder
from natsrt.jetstream.streams import WEEK
from natsrt.wire.subjects import inbox_problem

from .connecting import Connecting, connects
from .exits import CommandFailed, Exit
from .moments import Duration
from .naming import AGENT_TYPE, TOPIC_PREFIX
from .output import note

_SIZE = re.compile(r"(\d+)([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


class Size(click.ParamType[int]):
    """A number of bytes: ``500000``, ``64M``, ``2G``."""

    name = "BYTES"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = _SIZE.fullmatch(str(value))
        size = 0 if found is None else int(found[1]) * _UNITS[found[2].upper()]
        if not 0 < size < 2**63:
            self.fail(f"{value!r} is not a size such as 500000, 64M or 2G", param, ctx)
        return size


@click.command()
@click.option("--to", "stream", required=True, metavar="STREAM", help="The stream; it is made if it is missing.")
@click.option("--agents", multiple=True, type=AGENT_TYPE, help="Only calls of this agent type. May be repeated.")
@click.option("--topics", multiple=True, type=TOPIC_PREFIX, help="Only events of topics that begin so; also repeated.")
@click.option(
    "--inbox", "inboxes", multiple=True, metavar="PREFIX", help="Listen to the replies below this prefix too."
)
@click.option("--for", "duration", type=Duration(), help="How long to record: 60, 5m. Until Ctrl-C if not given.")
@click.option("--max-age", type=Duration(1), default=WEEK, help="Age of the oldest record in a new stream: 7d.")
@click.option("--max-bytes", type=Size(), default=str(GIGABYTE), help="Size of a new stream, at most: 1G.")
@click.option("--max-waiting", type=Size(), default=str(WAITING_BYTES), help="What may wait to be stored: 64M.")
@connects()
def record(
    connecting: Connecting,
    stream: str,
    agents: tuple[str, ...],
    topics: tuple[str, ...],
    inboxes: tuple[str, ...],
    duration: float | None,
    max_age: float,
    max_bytes: int,
    max_waiting: int,
) -> int:
    """Record calls, replies and events in a stream as they pass.

    It answers nothing, and takes no message from anybody. Only what passes while it runs is recorded. At the end it
    says how much that was, and what it missed; the exit code is 1 if it knows of a message that it has missed.

    With --agents or --topics, only these are recorded.
    """
    options = connecting.options()
    for inbox in inboxes:
        if problem := inbox_problem(inbox, options.namespace):
            raise CommandFailed(f"--inbox {inbox!r} {problem}", Exit.USAGE)
    make = functools.partial(
        Recorder,
        options,
        stream,
        tell=lambda text: note(f"natsrt: {text}", "warning"),
        agents=agents,
        topics=topics,
        inboxes=inboxes,
        max_age=max_age,
        max_bytes=max_bytes,
        waiting_bytes=max_waiting,
    )
    return asyncio.run(_record(make, stream, duration))


async def _record(make: Callable[[], Recorder], stream: str, duration: float | None) -> int:
    recorder = make()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    try:
        server = await recorder.open()
        note(f"recording to {stream} at {server}")
        if duration is not None:
            loop.call_later(duration, ended.set)
        done = await recorder.run(ended)
    finally:
        await recorder.close()
    note(summary(done, stream))
    return Exit.FAILED if done.missed or done.unstored or done.gaps else Exit.OK


def summary(done: Recorded, stream: str) -> str:
    """What was recorded, and what was missed, in one line."""
    names = {"call": "calls", "reply": "replies", "event": "events", "delivery": "deliveries", "chunk": "chunks"}
    kinds = ", ".join(f"{done.stored[kind]:,} {name}" for kind, name in names.items() if done.stored[kind]) or "nothing"
    missed = []
    if done.missed:
        missed.append(f"{done.missed:,} left out")
    if done.unstored:
        missed.append(f"{done.unstored:,} not stored at the end")
    if done.gaps:
        missed.append(f"what passed in {done.gaps:,} gaps of {done.gap_seconds:.1f} s")
    return f"recorded to {stream}: {kinds}; missed: {', '.join(missed) or 'nothing known'}"
