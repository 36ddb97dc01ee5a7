"""The registry and the calls of a participant: see participant.py."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from typing import Any

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import api

TYPE = "shop"
CHECK_AFTER, ASK_EVERY, LOST_AFTER = 0.2, 0.5, 12.0
TTL = "6s"
BUSY_FOR = 1.0
GONE = ("KV-Operation", "Nats-Marker-Reason")


def body_of(kind: str, data: Any, **attributes: str) -> bytes:
    return json.dumps({"specversion": "1.0", "type": kind, **attributes, "data": data}).encode()


def say(word: str, value: Any = "") -> None:
    sys.stdout.write(f"{word} {json.dumps(value)}\n" if value != "" else f"{word}\n")
    sys.stdout.flush()


class Failed(Exception):
    """An error for the caller: `type` and `message` are all that it needs."""

    def __init__(self, kind: str, message: str, code: int = 500, **more: Any) -> None:
        super().__init__(message)
        self.data = {"type": kind, "message": message, "code": code, **more}


class Registry:
    """What this participant knows of the registry, and what it has declared there."""

    def __init__(self, client: Client, namespace: str, worker_id: str) -> None:
        self.client, self.js, self.worker_id = client, client.jetstream(), worker_id
        bucket = f"{namespace}_natsrt_registry"
        self.stream, self.prefix = f"KV_{bucket}", f"$KV.{bucket}."
        self.bucket, self.feed = bucket, f"{namespace}.natsrt.registry."
        self.entries: dict[str, tuple[int, dict[str, Any]]] = {}
        self.seen = 0
        self.declared: dict[str, dict[str, Any]] = {}
        self.changed = asyncio.Event()
        self.evicted = asyncio.Event()
        self.leaving = False

    async def open(self) -> None:
        try:
            await self.js.stream_info(self.stream)
        except nats.js.errors.NotFoundError:
            republish = api.RePublish(src=f"{self.prefix}r.>", dest=f"{self.feed}>")
            await self.js.create_key_value(
                api.KeyValueConfig(
                    bucket=self.bucket, history=1, direct=True, limit_marker_ttl=60.0, republish=republish
                )
            )

    async def on_change(self, message: Msg) -> None:
        """Apply a change. Its subject is that of the feed, and the key without `r.`."""
        headers = message.headers or {}
        key = "r." + message.subject[len(self.feed) :]
        revision, before = int(headers["Nats-Sequence"]), int(headers.get("Nats-Last-Sequence", 0))
        if (known := self.entries.get(key)) and known[0] < before:
            await self.read()  # a change was missed
        self.apply(key, revision, None if any(name in headers for name in GONE) else message.data)

    def apply(self, key: str, revision: int, value: bytes | None) -> None:
        self.seen = max(self.seen, revision)
        if key in self.entries and self.entries[key][0] > revision:
            return
        if value is None:
            self.entries.pop(key, None)
            if key == f"r.worker.{self.worker_id}" and not self.leaving:
                self.evicted.set()
        else:
            self.entries[key] = (revision, json.loads(value))
        self.changed.set()

    async def read(self) -> None:
        """Read the last message of each subject."""
        self.entries.clear()
        info = await self.js.stream_info(self.stream, subjects_filter=f"{self.prefix}r.>")
        for subject in info.state.subjects or {}:
            key = subject[len(self.prefix) :]
            if not key.startswith("r.known."):
                await self.read_one(key)

    async def read_one(self, key: str) -> bool:
        """Read one entry. Returns whether it is there."""
        try:
            last = await self.js.get_last_msg(self.stream, self.prefix + key, direct=True)
        except nats.js.errors.NotFoundError:
            return False
        gone = any(name in (last.headers or {}) for name in GONE)
        if key.startswith("r."):
            self.apply(key, last.seq or 0, None if gone else last.data)
        return not gone

    async def declare(self) -> None:
        await self.beat()
        for key, entry in self.declared.items():
            headers = {"Nats-TTL": "129600"} if key.startswith("r.known.") else None
            await self.js.publish(self.prefix + key, json.dumps(entry).encode(), headers=headers)

    async def beat(self) -> None:
        await self.client.publish(f"{self.prefix}hb.{self.worker_id}", b"", headers={"Nats-TTL": TTL})

    async def delete(self, key: str, **headers: str) -> int:
        headers = {"KV-Operation": "DEL", "Nats-TTL": "900"} | {n.replace("_", "-"): v for n, v in headers.items()}
        return (await self.js.publish(self.prefix + key, b"", headers=headers)).seq

    async def evict(self, worker_id: str) -> None:
        revision = await self.delete(f"r.worker.{worker_id}")
        for pattern in (f"r.*.*.{worker_id}", f"r.*.*.*.{worker_id}", f"hb.{worker_id}"):
            await self.js.purge_stream(self.stream, seq=revision, subject=self.prefix + pattern)

    def workers(self) -> dict[str, dict[str, Any]]:
        found = (entry for key, (_, entry) in self.entries.items() if key.startswith("r.worker."))
        return {entry["worker_id"]: entry for entry in found}

    def hosting(self, agent_type: str) -> list[str]:
        workers = self.workers()
        return [
            entry["worker_id"]
            for key, (_, entry) in self.entries.items()
            if key.startswith("r.type.") and entry["agent_type"] == agent_type and entry["worker_id"] in workers
        ]

    def next_worker(self) -> str | None:
        ids = sorted(self.workers())
        later = [worker_id for worker_id in ids if worker_id > self.worker_id]
        following = later[0] if later else next(iter(ids), None)
        return None if following == self.worker_id else following

    def topics(self) -> set[str]:
        """The topic types of the type's subscriptions: this participant serves those of the kind `type` only."""
        alive = {*self.workers(), "-", self.worker_id}
        return {
            entry["pattern"]
            for key, (_, entry) in self.entries.items()
            if key.startswith(f"r.subscription.{TYPE}.") and entry["declarer"] in alive and entry["kind"] == "type"
        }


class Call:
    """A call that this participant has made."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self.accepted_by: str | None = None
        self.heard = time.monotonic()
        self.unknown = 0


class Caller:
    """Makes calls, and asks about those that take long."""

    def __init__(self, client: Client, namespace: str, registry: Registry) -> None:
        self.client, self.namespace, self.registry = client, namespace, registry
        self.inbox = f"_INBOX.{secrets.token_hex(8)}"
        self.calls: dict[str, Call] = {}

    async def start(self) -> None:
        await self.client.subscribe(f"{self.inbox}.>", cb=self.on_message)

    async def on_message(self, message: Msg) -> None:
        call = self.calls.get(message.subject)
        if call is not None:
            if not (message.headers or {}).get("Status") and not call.answer.done():  # "no responders" decides nothing
                call.answer.set_result(message)
            return
        if (message.headers or {}).get("Status"):
            return
        body = json.loads(message.data)
        if body["type"] == "natsrt.accepted":
            for call_id in body["data"]["calls"]:
                if call_id in self.calls:
                    self.calls[call_id].accepted_by = body["data"]["worker"]
        elif body["type"] == "natsrt.reply":  # to natsrt.fate
            for call_id in (*body["data"]["running"], *body["data"]["unknown"]):
                if call_id in self.calls:
                    self.calls[call_id].heard = time.monotonic()
            for call_id in body["data"]["unknown"]:
                if call_id in self.calls:
                    self.calls[call_id].unknown += 1

    async def call(self, agent_type: str, key: str, data: Any, kind: str, **attributes: str) -> Any:
        """Returns the data of the reply; raises `Failed`."""
        until = time.monotonic() + BUSY_FOR
        pause = 0.02
        while True:
            reply = await self.attempt(agent_type, key, data, kind, attributes)
            body = json.loads(reply.data)
            if body["type"] == "natsrt.reply":
                return body["data"]
            error = body["data"]
            codes = (error.get("code"), (reply.headers or {}).get("Nats-Service-Error-Code"))
            if not {429, "429"} & {*codes} or time.monotonic() > until:
                raise Failed(error["type"], error["message"], error.get("code", 500))
            await asyncio.sleep(pause)
            pause = min(0.2, pause * 2)

    async def attempt(self, agent_type: str, key: str, data: Any, kind: str, attributes: dict[str, str]) -> Msg:
        call, call_id = Call(), f"{self.inbox}.{secrets.token_hex(6)}"
        self.calls[call_id] = call
        about = {"id": call_id[-12:], "source": "/", "subject": key, "messagetype": kind} | attributes
        body = body_of("natsrt.call", data, **about, acceptto=f"{self.inbox}.accept")
        try:
            await self.client.publish(f"{self.namespace}.agent.{agent_type}", body, reply=call_id)
            wait = CHECK_AFTER
            while True:
                done, _ = await asyncio.wait({call.answer}, timeout=wait)
                if done:
                    return call.answer.result()
                wait = ASK_EVERY
                await self.ask(agent_type, call_id, call)
        finally:
            del self.calls[call_id]

    async def ask(self, agent_type: str, call_id: str, call: Call) -> None:
        workers = [call.accepted_by] if call.accepted_by else self.registry.hosting(agent_type)
        if not workers:
            raise Failed("natsrt.NoLiveWorker", f"no worker hosts {agent_type}", 503)
        if call.unknown > 1 or time.monotonic() - call.heard > LOST_AFTER:
            raise Failed("natsrt.WorkerLost", f"the call to {agent_type} was lost", 503)
        question = body_of("natsrt.fate", {"calls": [call_id]}, id="fate", source="/")
        for worker_id in workers:
            subject = f"{self.namespace}.natsrt.worker.{worker_id}"
            await self.client.publish(subject, question, reply=f"{self.inbox}.fate")
