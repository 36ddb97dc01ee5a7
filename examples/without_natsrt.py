"""A worker and a caller that use natsrt's protocol without natsrt: a NATS client and JSON are enough.

The same can be done in any language with a NATS client. docs/PROTOCOL.md explains each step.

Run it: python examples/without_natsrt.py, which starts a server, the worker and the caller
    or: python examples/without_natsrt.py work URL, and call the agents of type `counter` from natsrt
    or: python examples/without_natsrt.py call URL TYPE KEY MESSAGE_TYPE JSON
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import nats
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import api

REGISTRY = "natsrt_registry"
STREAM = f"KV_{REGISTRY}"
KV = f"$KV.{REGISTRY}"
ACCEPT_AFTER = 0.15
CHECK_AFTER = 0.2
ASK_EVERY = 0.5
LOST_AFTER = 4.0
HEARTBEAT_EVERY, HEARTBEAT_TTL = 1.5, "6s"


def body_of(kind: str, data: Any, **attributes: str) -> bytes:
    """An envelope: a CloudEvent in JSON, with `data` as its last member."""
    return json.dumps({"specversion": "1.0", "type": kind, **attributes, "data": data}).encode()


async def open_registry(client: Client) -> None:
    """Create the registry's bucket if it does not exist yet."""
    try:
        await client.jetstream().stream_info(STREAM)
    except nats.js.errors.NotFoundError:
        await client.jetstream().create_key_value(
            api.KeyValueConfig(
                bucket=REGISTRY,
                history=1,
                direct=True,
                limit_marker_ttl=60.0,
                republish=api.RePublish(src=f"{KV}.r.>", dest="natsrt.registry.>"),
            )
        )


class CounterWorker:
    """Hosts the agent type `counter`, which counts words: Text {text, pause?} -> Count {words}."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._id = f"python-{os.getpid()}"
        self._running: dict[str, asyncio.Task[None]] = {}
        self._finished: dict[str, bytes] = {}  # a complete worker would delete them after 30 s
        self._cancelled: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        await open_registry(self._client)
        await self._client.subscribe(f"natsrt.worker.{self._id}", cb=self._asked)
        await self._client.subscribe("natsrt.cancel", cb=self._cancel)
        await self._client.subscribe("agent.counter", queue="counter", cb=self._call)
        await self._client.subscribe("topic.text.*", queue="counter", cb=self._event)
        await asyncio.sleep(0)  # otherwise nats-py would write the PING of the flush before the subscriptions
        await self._client.flush()
        await self._beat()
        worker = {
            "worker_id": self._id,
            "name": "python",
            "hostname": "localhost",
            "pid": os.getpid(),
            "started": time.time(),
            "version": "example",
        }
        handles = {"handles": ["Text"], "produces": ["Count"]}
        # In the subscription's key: the first 24 hex digits of the SHA-256 of "type\0text", its kind and pattern.
        digest = "ae52efdb4337e2a76dfab56e"
        await self._declare(f"worker.{self._id}", worker)
        await self._declare(f"type.counter.{self._id}", {"agent_type": "counter", "worker_id": self._id, **handles})
        await self._declare("known.counter", {"agent_type": "counter", **handles})
        await self._declare(
            f"subscription.counter.{digest}.{self._id}",
            {
                "agent_type": "counter",
                "kind": "type",
                "pattern": "text",
                "declarer": self._id,
                "subscription_id": f"{self._id}-text",
            },
        )
        self._spawn(self._keep_beating())

    async def stop(self) -> None:
        """Leave the registry. (If a worker stops without this, others remove it when its heartbeat has expired.)"""
        for task in list(self._tasks):
            task.cancel()
        await self._client.jetstream().publish(f"{KV}.r.worker.{self._id}", b"", headers={"KV-Operation": "DEL"})

    async def _declare(self, key: str, entry: dict[str, Any]) -> None:
        await self._client.jetstream().publish(f"{KV}.r.{key}", json.dumps(entry).encode())

    async def _keep_beating(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_EVERY)
            await self._beat()

    async def _beat(self) -> None:
        await self._client.publish(f"{KV}.hb.{self._id}", b"", headers={"Nats-TTL": HEARTBEAT_TTL})

    async def _call(self, message: Msg) -> None:
        body = json.loads(message.data)
        if not (isinstance(body, dict) and str(body.get("type", "")).startswith("natsrt.")):
            await message.respond(json.dumps(self._count(body)).encode())  # plain in, plain out
            return
        self._running[message.reply] = self._spawn(self._answer(message.reply, body))
        self._spawn(self._accept_if_slow(message.reply, body.get("acceptto")))

    async def _accept_if_slow(self, call: str, accept_to: str | None) -> None:
        await asyncio.sleep(ACCEPT_AFTER)
        if call in self._running and accept_to:
            data = {"worker": self._id, "calls": [call]}
            await self._client.publish(accept_to, body_of("natsrt.accepted", data, id="accepted", source="/"))

    async def _answer(self, call: str, body: dict[str, Any]) -> None:
        source = f"counter/{body.get('subject', 'default')}"
        about = {"id": f"{body['id']}-r", "source": source, "workerid": self._id}
        headers = None
        try:
            if body["messagetype"] != "Text":
                raise ValueError(f"a counter takes Text, not {body['messagetype']}")
            cancelled = self._cancelled.setdefault(body.get("cancelid", ""), asyncio.Event())
            try:
                await asyncio.wait_for(cancelled.wait(), body["data"].get("pause", 0))
            except TimeoutError:
                pass
            reply = body_of("natsrt.reply", self._count(body["data"]), **about, messagetype="Count")
        except (ValueError, KeyError, TypeError) as error:
            data = {"type": f"builtins.{type(error).__name__}", "message": str(error), "code": 422}
            data |= {"args": [str(error)], "fields": {}}
            reply = body_of("natsrt.error", data, **about)
            headers = {"Nats-Service-Error": str(error), "Nats-Service-Error-Code": "422"}
        self._finished[call] = reply
        del self._running[call]
        await self._client.publish(call, reply, headers=headers)

    @staticmethod
    def _count(text: dict[str, Any]) -> dict[str, Any]:
        return {"words": len(text["text"].split())}

    async def _event(self, message: Msg) -> None:
        body = json.loads(message.data)
        text = body["data"] if str(body.get("type", "")).startswith("natsrt.") else body
        print(f"event on {message.subject}: {self._count(text)['words']} words", flush=True)

    async def _cancel(self, message: Msg) -> None:
        self._cancelled.setdefault(json.loads(message.data)["data"]["cancelid"], asyncio.Event()).set()

    async def _asked(self, message: Msg) -> None:
        """Answer a question: the state of these calls, or whether all subscriptions up to a revision are served."""
        body = json.loads(message.data)
        data: dict[str, Any] = {"serves": True}
        if body["type"] == "natsrt.fate":
            calls = body["data"]["calls"]
            finished = [call for call in calls if call in self._finished]
            running = [call for call in calls if call in self._running]
            unknown = [call for call in calls if call not in finished and call not in running]
            data = {"worker": self._id, "running": running, "finished": finished, "unknown": unknown}
            for call in finished:
                await self._client.publish(call, self._finished[call])
        await self._client.publish(message.reply, body_of("natsrt.reply", data, id=f"{body['id']}-r", source="/"))

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class Lost(Exception):
    """No worker will answer the call."""


async def call(client: Client, agent_type: str, key: str, message_type: str, data: Any) -> dict[str, Any]:
    """Call an agent. Returns the body of the reply, which may be an error.

    Names are used as they are: names of letters and digits need no encoding.
    """
    inbox = client.new_inbox()
    received: asyncio.Queue[Msg] = asyncio.Queue()
    subscription = await client.subscribe(f"{inbox}.*", cb=received.put)
    reply_to = f"{inbox}.1"
    body = body_of(
        "natsrt.call", data, id="1", source="/", subject=key, messagetype=message_type, acceptto=f"{inbox}.accept"
    )
    await client.publish(f"agent.{agent_type}", body, reply=reply_to)
    worker: str | None = None
    asked_at = heard_at = 0.0
    try:
        while True:
            try:
                message = await asyncio.wait_for(received.get(), ASK_EVERY if worker else CHECK_AFTER)
            except TimeoutError:
                if worker is None and not await hosts(client, agent_type):
                    raise Lost(f"no worker hosts {agent_type}") from None
                if worker is not None:
                    if asked_at - heard_at > LOST_AFTER:
                        raise Lost(f"worker {worker} does not answer") from None
                    asked_at = time.monotonic()
                    question = body_of("natsrt.fate", {"calls": [reply_to]}, id="fate", source="/")
                    await client.publish(f"natsrt.worker.{worker}", question, reply=f"{inbox}.fate")
                continue
            if message.headers and message.headers.get("Status") == "503":
                continue  # no responders: not conclusive, the next check of the registry decides
            answer: dict[str, Any] = json.loads(message.data)
            if message.subject == reply_to:
                return answer
            heard_at = asked_at = time.monotonic()
            if answer["type"] == "natsrt.accepted":
                worker = answer["data"]["worker"]
                print(f"accepted by {worker}", flush=True)
            elif reply_to in answer["data"]["unknown"]:
                raise Lost(f"worker {worker} no longer knows the call")
    finally:
        await subscription.unsubscribe()


async def hosts(client: Client, agent_type: str) -> list[str]:
    """Returns the ids of the live workers of an agent type."""
    js = client.jetstream()
    subjects = (await js.stream_info(STREAM, subjects_filter=f"{KV}.r.type.{agent_type}.*")).state.subjects or {}
    workers = []
    for subject in subjects:
        worker = subject.rpartition(".")[2]
        try:
            for key in (subject, f"{KV}.r.worker.{worker}"):
                entry = await js.get_last_msg(STREAM, key, direct=True)
                if entry.headers and ("KV-Operation" in entry.headers or "Nats-Marker-Reason" in entry.headers):
                    break
            else:
                workers.append(worker)
        except nats.js.errors.NotFoundError:
            continue
    return workers


async def work(url: str) -> None:
    client = await nats.connect(url)
    await CounterWorker(client).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


async def call_once(url: str, agent_type: str, key: str, message_type: str, data: str) -> None:
    client = await nats.connect(url)
    try:
        print(json.dumps(await call(client, agent_type, key, message_type, json.loads(data))))
    except Lost as error:
        print(f"lost: {error}")
    await client.close()


async def both() -> None:
    from local_server import local_server

    async with local_server() as url:
        serving, calling = await nats.connect(url), await nats.connect(url)
        worker = CounterWorker(serving)
        await worker.start()
        for data in ({"text": "to be or not"}, {"text": "it takes its time", "pause": 0.8}):
            reply = await call(calling, "counter", "default", "Text", data)
            print(f"{data['text']!r}: {reply['data']['words']} words")
            assert reply["type"] == "natsrt.reply" and reply["data"] == {"words": 4}
        error = await call(calling, "counter", "default", "Number", 7)
        print(f"refused: {error['data']['message']}")
        try:
            await call(calling, "nobody", "default", "Text", {"text": ""})
        except Lost as lost:
            print(lost)
        await calling.publish("topic.text.somewhere", b'{"text": "an event too"}')
        await calling.flush()
        await worker.stop()
        await calling.close()
        await serving.close()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["work", url]:
            asyncio.run(work(url))
        case ["call", url, agent_type, key, message_type, data]:
            asyncio.run(call_once(url, agent_type, key, message_type, data))
        case _:
            asyncio.run(both())
