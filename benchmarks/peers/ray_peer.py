"""Ray: an asyncio actor in a separate process on this machine, called through Ray's transport."""

from __future__ import annotations

import os
import tempfile

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray must not send data from this machine

import ray  # type: ignore[import-not-found, unused-ignore]

from benchmarks.roles import Caller, Role, Send
from benchmarks.work import Text, text_of, use_cpu

_AT_ONCE = 512
"""Maximum number of calls that the actor handles at once: the most callers of any scenario."""


class Echo:
    """The actor. Replies with the message it received."""

    def __init__(self, work_ms: float) -> None:
        self._work_ms = work_ms

    async def on_call(self, message: Text) -> Text:
        if self._work_ms:
            use_cpu(self._work_ms)
        return message


class RayCaller(Caller):
    """Starts Ray and the actor, and calls it. Ray's processes end with the process that started them."""

    async def start(self) -> None:
        self._files = tempfile.TemporaryDirectory(prefix="natsrt-ray-", ignore_cleanup_errors=True)
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=self._files.name,
            object_store_memory=100 * 2**20,
        )
        self._actor = ray.remote(Echo).options(max_concurrency=_AT_ONCE).remote(self.setup.work_ms)

    async def stop(self) -> None:
        ray.shutdown()
        self._files.cleanup()

    async def calling(self, size: int) -> Send:
        message, actor = text_of(size), self._actor

        async def call() -> Text:
            reply: Text = await actor.on_call.remote(message)
            return reply

        if await call() != message:
            raise RuntimeError("the actor did not answer with what it was sent")
        return call

    async def publishing(self, size: int) -> list[Send]:
        raise NotImplementedError("Ray has no events")

    async def handled(self, count: int) -> None:
        raise NotImplementedError("Ray has no events")


ROLES: dict[str, type[Role]] = {"caller": RayCaller}
