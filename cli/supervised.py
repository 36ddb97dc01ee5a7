"""The side of a worker process that a supervisor has started.

Rules:

1. The worker's event loop writes a pulse into a pipe every second, from the moment that the worker is ready. If pulses
   stop, the loop is blocked or the process is frozen, and the supervisor replaces the worker.
2. The worker reads from another pipe. Only the supervisor holds its other end, and never writes to it. When the read
   ends, the supervisor has ended, even by ``kill -9``. A thread waits for that, so it also works while the event loop
   is blocked. The worker then stops as at SIGTERM, and is killed if that takes too long.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading

from .output import note

PULSE = 1.0
"""Seconds between two pulses."""
_GRACE = 5.0
"""Seconds that a worker has to stop once its supervisor has ended, as with `natsrt.embedded.ProcessGroupGuard`."""


class Supervised:
    """Reports to the supervisor through the pipe ``report``, and watches the pipe ``lifeline``, both descriptors."""

    def __init__(self, report: int, lifeline: int) -> None:
        self._report = report
        self._lifeline = lifeline
        for descriptor in (report, lifeline):
            os.set_inheritable(descriptor, False)
        os.set_blocking(report, False)
        threading.Thread(target=self._watch, name="natsrt supervisor watch", daemon=True).start()

    def ready(self) -> None:
        """Report that the worker is ready, and from now on that the running event loop runs."""
        try:
            os.write(self._report, b".")
        except BlockingIOError:  # the supervisor stands still, and the pipe is full
            pass
        except OSError:  # it has ended
            return
        asyncio.get_running_loop().call_later(PULSE, self.ready)

    def _watch(self) -> None:
        while os.read(self._lifeline, 1):
            pass
        end = threading.Timer(_GRACE, os.kill, (os.getpid(), signal.SIGKILL))
        end.daemon = True
        end.start()
        os.kill(os.getpid(), signal.SIGTERM)
        note("the supervisor has ended: stopping")
