"""Ends a process whose test does not end although its time limit has passed.

pytest-timeout raises an exception in whatever code runs when the limit passes. A background task may swallow it, and
after a failure there is no limit for the clean-up. A run would then last for ever and not say where.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

EXIT_CODE = 70


@contextmanager
def ended_if_it_hangs(name: str, seconds: float, output: TextIO) -> Iterator[None]:
    """Run the block. If it takes longer than ``seconds``, write to ``output`` what waits where, and end the process.

    The process ends at once, with `EXIT_CODE`; pytest-xdist reports the test as crashed and goes on.
    """
    timer = threading.Timer(seconds, _end_this_process, (f"{name} did not end within {seconds:g} s", output))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_this_process(reason: str, output: TextIO) -> None:
    try:
        print(f"\n{reason}", file=output, flush=True)
        faulthandler.dump_traceback(output)
        for task in gc.get_objects():
            if isinstance(task, asyncio.Task) and not task.done():
                task.print_stack(file=output)
        output.flush()
    finally:
        os._exit(EXIT_CODE)
