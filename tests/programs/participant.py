"""A worker and a caller written from docs/PROTOCOL.md alone: a NATS client and JSON, and nothing of natsrt.

Run it: python participant.py URL NAMESPACE NAME [--service] [--no-subject | --mute] [--no-acceptance]

The last three leave a duty out: its own subject, the answers there, and accepting calls.

It hosts the agent type `shop`, which takes Order {do, …}. Requests on `NAMESPACE.commands.NAME` have it call an agent,
{"call": TYPE, "key": KEY, "type": MESSAGE_TYPE, "data": …, "attributes": {}}, or leave, {"leave": true}.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import sys
import time
from collections import OrderedDict
from typing import Any

import nats
import nats.errors
import nats.js.errors
import nats.micro
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from participant_parts import TYPE, Caller, Failed, Registry, body_of, say

ACCEPT_AFTER, KEEP_REPLIES = 0.15, 30.0
BEAT_EVERY = 1.5
RESERVED = ("agent.", "topic.", "natsrt.", "$")


class Worker:
    """Hosts the agent type `shop`."""

    def __init__(self, client: Client, namespace: str, name: str, worker_id: str) -> None:
        self.client, self.namespace, self.name, self.id = client, namespace, name, worker_id
        self.registry = Registry(client, namespace, worker_id)
        self.caller = Caller(client, namespace, self.registry)
        self.running: dict[str, asyncio.Task[None]] = {}
        self.finished: OrderedDict[str, tuple[float, bytes, dict[str, str] | None]] = OrderedDict()
        self.tokens: dict[str, asyncio.Event] = {}
        self.abandoned: set[str] = set()
        self.served: dict[str, Subscription] = {}
        self.refusals = 0
        self.tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    # -- start and duties ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        n = self.namespace
        await self.client.subscribe(f"{n}.natsrt.registry.>", cb=self.registry.on_change)
        if "--no-subject" not in sys.argv:
            await self.client.subscribe(f"{n}.natsrt.worker.{self.id}", cb=self.on_question)
        await self.client.subscribe(f"{n}.natsrt.cancel", cb=self.on_cancel)
        await self.client.subscribe(f"{n}.agent.{TYPE}", queue=TYPE, cb=self.on_call)
        await self.caller.start()
        await self.registry.open()
        await self.registry.read()
        worker = {"worker_id": self.id, "name": self.name, "hostname": "somewhere", "pid": os.getpid()}
        about = {"agent_type": TYPE, "handles": ["Order"], "produces": ["Receipt"]}
        digest = hashlib.sha256(b"type\0orders").hexdigest()[:24]
        subscription = {"agent_type": TYPE, "kind": "type", "pattern": "orders", "declarer": self.id}
        self.registry.declared = {
            f"r.worker.{self.id}": worker | {"started": time.time(), "version": "page"},
            f"r.type.{TYPE}.{self.id}": about | {"worker_id": self.id},
            f"r.known.{TYPE}": about,
            f"r.subscription.{TYPE}.{digest}.{self.id}": subscription | {"subscription_id": f"{self.id}-orders"},
        }
        await self.serve("orders")
        await self.serve_union()
        await self.flush()
        await self.registry.declare()
        for duty in (self.keep_beating, self.keep_serving, self.return_if_evicted, self.look_after_next):
            self.spawn(duty())

    async def flush(self) -> None:
        await asyncio.sleep(0)  # nats-py would write the PING before the subscriptions otherwise
        await self.client.flush()

    async def reconnected(self) -> None:
        say("reconnected")
        self.spawn(self.restore())

    async def restore(self) -> None:
        while True:
            try:
                await self.registry.open()
                await self.registry.read()
                break
            except (nats.errors.Error, nats.js.errors.Error):
                await asyncio.sleep(0.2)
        missing = self.registry.declared.keys() - {f"r.known.{TYPE}"} - self.registry.entries.keys()
        if missing:
            await self.registry.declare()

    async def keep_beating(self) -> None:
        while True:
            await asyncio.sleep(BEAT_EVERY)
            await self.registry.beat()

    async def return_if_evicted(self) -> None:
        while True:
            await self.registry.evicted.wait()
            self.registry.evicted.clear()
            say("evicted")
            await self.registry.declare()

    async def look_after_next(self) -> None:
        while True:
            await asyncio.sleep(BEAT_EVERY)
            following = self.registry.next_worker()
            try:
                if following is None or await self.registry.read_one(f"hb.{following}"):
                    continue
                if not await self.answers(following):
                    await self.registry.evict(following)
                    say("removed", following)
            except (nats.errors.Error, nats.js.errors.Error):
                continue

    async def answers(self, worker_id: str) -> bool:
        question = body_of("natsrt.fate", {"calls": []}, id="alive", source="/")
        try:
            await self.client.request(f"{self.namespace}.natsrt.worker.{worker_id}", question, timeout=1.0)
        except (nats.errors.TimeoutError, nats.errors.NoRespondersError):
            return False
        return True

    # -- subscriptions ------------------------------------------------------------------------------------------

    async def keep_serving(self) -> None:
        while True:
            await self.registry.changed.wait()
            self.registry.changed.clear()
            await self.serve_union()

    async def serve_union(self) -> None:
        wanted = self.registry.topics() | {"orders"}
        for topic in wanted - self.served.keys():
            await self.serve(topic)
        for topic in self.served.keys() - wanted:
            await self.served.pop(topic).unsubscribe()

    async def serve(self, topic: str) -> None:
        self.served[topic] = await self.client.subscribe(
            f"{self.namespace}.topic.{topic}.*", queue=TYPE, cb=self.on_event
        )

    async def on_event(self, message: Msg) -> None:
        body = json.loads(message.data)
        key = message.subject.rpartition(".")[2]
        if body["source"] != f"{TYPE}/{key}" and TYPE not in body.get("keyed", "").split():
            say("event", {"topic": message.subject.partition(".topic.")[2], "data": body["data"]})

    # -- questions ----------------------------------------------------------------------------------------------

    async def on_question(self, message: Msg) -> None:
        if "--mute" in sys.argv:
            return
        body = json.loads(message.data)
        data = body["data"]
        if body["type"] == "natsrt.abandoned":
            self.abandoned.update(data["calls"])
            return
        if body["type"] == "natsrt.fate":
            answer: dict[str, Any] = await self.fate(data["calls"])
        elif body["type"] == "natsrt.serve":
            self.spawn(self.confirm(message.reply, data["revision"]))
            return
        elif body["type"] == "natsrt.waits":
            answer = {"waits": []}
        else:
            error = {"type": "shop.UnknownQuestion", "message": f"{body['type']} is unknown", "code": 400}
            await self.client.publish(message.reply, body_of("natsrt.error", error, id="answer", source="/"))
            return
        await self.client.publish(message.reply, body_of("natsrt.reply", answer, id="answer", source="/"))

    async def fate(self, calls: list[str]) -> dict[str, Any]:
        running = [call for call in calls if call in self.running]
        finished = [call for call in calls if call in self.finished]
        for call in finished:
            await self.client.publish(call, self.finished[call][1], headers=self.finished[call][2])
        known = {*running, *finished}
        unknown = [call for call in calls if call not in known]
        return {"worker": self.id, "running": running, "finished": finished, "unknown": unknown}

    async def confirm(self, reply: str, revision: int) -> None:
        while self.registry.seen < revision:
            await asyncio.sleep(0.02)
        await self.serve_union()
        await self.flush()
        await self.client.publish(reply, body_of("natsrt.reply", {"serves": True}, id="answer", source="/"))

    async def on_cancel(self, message: Msg) -> None:
        self.token(json.loads(message.data)["data"]["cancelid"]).set()

    def token(self, cancel_id: str | None) -> asyncio.Event:
        return asyncio.Event() if cancel_id is None else self.tokens.setdefault(cancel_id, asyncio.Event())

    # -- calls --------------------------------------------------------------------------------------------------

    async def on_call(self, message: Msg) -> None:
        if not message.reply or message.reply.removeprefix(f"{self.namespace}.").startswith(RESERVED):
            return
        body = json.loads(message.data)
        self.running[message.reply] = self.spawn(self.answer(message.reply, body))
        if "acceptto" in body and "--no-acceptance" not in sys.argv:
            self.spawn(self.accept_if_slow(message.reply, body["acceptto"]))

    async def accept_if_slow(self, call: str, accept_to: str) -> None:
        await asyncio.sleep(ACCEPT_AFTER)
        if call in self.running:
            data = {"worker": self.id, "calls": [call]}
            await self.client.publish(accept_to, body_of("natsrt.accepted", data, id="accepted", source="/"))

    async def answer(self, call: str, body: dict[str, Any]) -> None:
        about = {"id": f"{body['id']}-r", "source": f"{TYPE}/{body.get('subject', 'default')}", "workerid": self.id}
        headers = None
        try:
            result = await self.handle(body)
            reply = body_of("natsrt.reply", result, **about, messagetype="Receipt")
        except Failed as error:
            reply = body_of("natsrt.error", error.data, **about)
        self.running.pop(call)
        self.finished[call] = (time.monotonic(), reply, headers)
        while time.monotonic() - next(iter(self.finished.values()))[0] > KEEP_REPLIES:
            self.finished.popitem(last=False)
        await self.client.publish(call, reply, headers=headers)

    async def handle(self, body: dict[str, Any]) -> dict[str, Any]:
        """The handler of `shop`."""
        if body["messagetype"] != "Order":
            raise Failed("natsrt.UnhandledMessage", f"a shop takes Order, not {body['messagetype']}", 422)
        order, token = body["data"], self.token(body.get("cancelid"))
        what = order["do"]
        if what == "wait":
            try:
                await asyncio.wait_for(token.wait(), order["seconds"])
            except TimeoutError:
                return {"text": "waited"}
            say("cancelled")
            raise Failed("shop.Cancelled", "the order was cancelled", 499)
        if what == "fail":
            raise Failed(order["error"], "no lamps", **order.get("more", {}))
        if what == "refuse":
            if self.refusals < order["times"]:
                self.refusals += 1
                raise Failed("shop.Busy", "too many customers", 429)
            return {"text": f"refused {self.refusals} times"}
        if what == "relay":  # a call on behalf of this one: the chain and the token go with it
            passed = {name: body[name] for name in ("chain", "cancelid") if name in body}
            reply = await self.caller.call(order["to"], order["key"], order["data"], order["type"], **passed)
            return {"text": json.dumps(reply)}
        return {"text": what.upper()}


async def main(url: str, namespace: str, name: str, service: bool) -> None:
    worker: Worker | None = None

    async def on_reconnect() -> None:
        if worker is not None:
            await worker.reconnected()

    client = await nats.connect(
        url, reconnected_cb=on_reconnect, max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=on_error
    )
    worker_id = f"{name}-{secrets.token_hex(4)}"
    if service:  # its id is the worker's id
        worker_id = (await nats.micro.add_service(client, name=name, version="1.0.0", description="a shop")).id
    worker = Worker(client, namespace, name, worker_id)
    await worker.start()
    left = asyncio.Event()

    async def obey(message: Msg) -> None:
        command = json.loads(message.data)
        if command.get("leave"):
            worker.registry.leaving = True
            await worker.registry.delete(f"r.worker.{worker_id}", Natsrt_Left="in-order")
            left.set()
            return
        try:
            call = (command["call"], command["key"], command["data"], command["type"])
            result = {"result": await worker.caller.call(*call, **command.get("attributes", {}))}
        except Failed as error:
            result = {"failed": error.data}
        await message.respond(json.dumps(result).encode())

    async def on_command(message: Msg) -> None:
        worker.spawn(obey(message))

    await client.subscribe(f"{namespace}.commands.{name}", cb=on_command)
    await worker.flush()
    say("ready", worker_id)
    await left.wait()
    await client.drain()


async def on_error(error: Exception) -> None:
    sys.stderr.write(f"connection: {error}\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], "--service" in sys.argv))
