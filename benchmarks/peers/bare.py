"""nats-py alone: ``Client.request()``, ``publish()`` and callback subscriptions, without headers.

The body consists of the same bytes as the payload of the AutoGen runtimes. It is not decoded.
"""

from __future__ import annotations

import asyncio
import time

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from benchmarks.roles import Caller, Role, Send, Worker
from benchmarks.setup import ECHO, TOPIC
from benchmarks.work import Counter, encoded, text_of, use_cpu

_TIMEOUT = 60


async def _settled(client: Client) -> None:
    """Return when the server has processed all subscriptions.

    The sleep is needed because nats-py writes the ping of a flush ahead of commands that are still queued.
    """
    await asyncio.sleep(0)
    await client.flush()


class _Bare(Role):
    client: Client

    def subject(self, name: str) -> str:
        return f"{self.place.namespace}.{name}"

    async def start(self) -> None:
        self.client = await nats.connect(self.place.address)

    async def stop(self) -> None:
        await self.client.close()


class BareWorker(_Bare, Worker):
    async def start(self) -> None:
        await super().start()
        client, work_ms = self.client, self.setup.work_ms

        async def on_call(message: Msg) -> None:
            if work_ms:
                use_cpu(work_ms)
            await client.publish(message.reply, message.data)

        await client.subscribe(self.subject(ECHO), queue="workers", cb=on_call)
        for number in range(self.setup.subscribers):
            await self._count(number)
        await _settled(client)

    async def _count(self, number: int) -> None:
        client, events = self.client, Counter()

        async def on_event(message: Msg) -> None:
            events.add()

        async def on_handled(message: Msg) -> None:
            await events.reach(int(message.data))
            await client.publish(message.reply)

        await client.subscribe(self.subject(TOPIC), cb=on_event)
        await client.subscribe(self.subject(f"handled.{number}"), cb=on_handled)

    async def subscribe(self, count: int) -> float:
        """Add ``count`` subscriptions, each after the server has processed the one before. Returns the seconds."""

        async def on_message(message: Msg) -> None:
            pass

        began = time.perf_counter()
        for number in range(count):
            await self.client.subscribe(self.subject(f"subscribed.{number}"), cb=on_message)
            await _settled(self.client)
        return time.perf_counter() - began


class BareCaller(_Bare, Caller):
    async def start(self) -> None:
        await super().start()
        self._publishers = [self.client]
        while len(self._publishers) < self.setup.publishers:
            self._publishers.append(await nats.connect(self.place.address))

    async def stop(self) -> None:
        for client in self._publishers:
            await client.close()

    async def calling(self, size: int) -> Send:
        subject, payload, request = self.subject(ECHO), encoded(text_of(size)), self.client.request
        if (await request(subject, payload, timeout=_TIMEOUT)).data != payload:
            raise RuntimeError("the worker did not answer with what it was sent")
        return lambda: request(subject, payload, timeout=_TIMEOUT)

    async def publishing(self, size: int) -> list[Send]:
        subject, payload = self.subject(TOPIC), encoded(text_of(size))

        def by(client: Client) -> Send:
            return lambda: client.publish(subject, payload)

        return [by(client) for client in self._publishers]

    async def handled(self, count: int) -> None:
        await asyncio.gather(
            *(
                self.client.request(self.subject(f"handled.{number}"), str(count).encode(), timeout=_TIMEOUT)
                for number in range(self.setup.subscribers)
            )
        )


ROLES = {"worker": BareWorker, "caller": BareCaller}
