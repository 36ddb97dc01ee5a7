"""FastStream's request-reply over NATS: a service framework without agents. Pydantic validates the messages."""

from __future__ import annotations

from faststream.nats import NatsBroker  # type: ignore[import-not-found, unused-ignore]

from benchmarks.roles import Caller, Role, Send, Worker
from benchmarks.setup import ECHO
from benchmarks.work import Text, text_of, use_cpu

_TIMEOUT = 60
"""Timeout of one call in seconds: long enough for a slow machine."""
_AT_ONCE = 512
"""Maximum number of messages that the worker handles at once: the most callers of any scenario. The default is 1."""


class _FastStream(Role):
    async def start(self) -> None:
        self.broker = NatsBroker(self.place.address)
        self.subject = f"{self.place.namespace}.{ECHO}"

    async def stop(self) -> None:
        await self.broker.stop()


class FastStreamWorker(_FastStream, Worker):
    async def start(self) -> None:
        await super().start()
        work_ms = self.setup.work_ms

        async def on_call(message: Text) -> Text:
            if work_ms:
                use_cpu(work_ms)
            return message

        self.broker.subscriber(self.subject, queue="workers", max_workers=_AT_ONCE)(on_call)
        await self.broker.start()


class FastStreamCaller(_FastStream, Caller):
    async def start(self) -> None:
        await super().start()
        await self.broker.start()

    async def calling(self, size: int) -> Send:
        message, broker, subject = text_of(size), self.broker, self.subject

        async def call() -> Text:
            reply = await broker.request(message, subject, timeout=_TIMEOUT)
            return Text(**await reply.decode())

        if await call() != message:
            raise RuntimeError("the worker did not answer with what it was sent")
        return call

    async def publishing(self, size: int) -> list[Send]:
        raise NotImplementedError("events of FastStream are not measured")

    async def handled(self, count: int) -> None:
        raise NotImplementedError("events of FastStream are not measured")


ROLES: dict[str, type[Role]] = {"worker": FastStreamWorker, "caller": FastStreamCaller}
