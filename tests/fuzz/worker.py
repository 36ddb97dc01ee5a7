"""A running worker as a reader: its own subscriptions get the inputs, as if the server had sent them.

Nothing goes through a socket on the way in, so a hundred times as many inputs are tried in the same time. The answers
go through a real server, and every request must be answered.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import nats
from autogen_core import AgentId, MessageContext, RoutedAgent, TypePrefixSubscription, TypeSubscription, message_handler
from nats.aio.client import Client
from nats.aio.msg import Msg

import natsrt
from natsrt import NatsAgentRuntime, NatsrtError
from natsrt.background import end_tasks
from natsrt.embedded import EmbeddedServer
from natsrt.jetstream.registry.entries import KnownEntry, encode_entry
from natsrt.transport.connection import Interest
from natsrt.wire import envelope
from tests.fuzz.mutations import Mutator
from tests.fuzz.readers import READERS, block, headers_of, vectors
from tests.fuzz.trial import Outcome
from tests.support.clients import settled

NAME: Final = "worker"
_VOLLEY = 100
"""Inputs after which the worker must answer a good call."""
_CALLS = 5
"""Calls that are on their way at a time."""
_ANSWER_WITHIN = 30.0
_SETTLE = 0.002
_REPLIES = "fuzz.reply"
_GOOD = b'{"text":"hi"}'


@dataclass
class Text:
    text: str


class Echo(RoutedAgent):
    """Returns what it is sent."""

    def __init__(self) -> None:
        super().__init__("echo")

    @message_handler
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        return message


@natsrt.keyed
class Kept(Echo):
    """The same, with one instance for each key."""


class _Complaints(logging.Handler):
    """Keeps what the worker logs with a traceback: an exception that was not expected."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.name == "asyncio":
            error = record.exc_info[1] if record.exc_info else None
            self.texts.append(f"{record.name}: {record.getMessage()[:100]}: {type(error).__name__}: {str(error)[:100]}")


@contextmanager
def _listening() -> Iterator[_Complaints]:
    complaints = _Complaints()
    quiet, disabled = logging.lastResort, logging.root.manager.disable
    logging.disable(logging.NOTSET)
    logging.getLogger().addHandler(complaints)
    logging.lastResort = None
    try:
        yield complaints
    finally:
        logging.getLogger().removeHandler(complaints)
        logging.lastResort = quiet
        logging.disable(disabled)


async def run(inputs: int, seed: int) -> Outcome:
    """Give a worker this many inputs. The same seed gives the same inputs in the same order."""
    with _listening() as complaints:
        async with EmbeddedServer() as server, NatsAgentRuntime(server.url, name="fuzzed") as runtime:
            await natsrt.register(runtime, Echo, "echo", Echo)
            await natsrt.register(runtime, Kept, "kept", Kept)
            await runtime.register_agent_instance(Echo(), AgentId("member", "one"))
            for subscription in (TypeSubscription("news", "echo"), TypePrefixSubscription("news.", "kept")):
                await runtime.add_subscription(subscription)
            await runtime.send_message(Text("hi"), AgentId("kept", "one"))  # its own subject is subscribed then
            client = await nats.connect(server.url)
            fuzz = _Fuzz(runtime, client, complaints, seed)
            await fuzz.start()
            for first in range(0, inputs, _VOLLEY):
                await fuzz.volley(min(_VOLLEY, inputs - first))
            await fuzz.stop()
            await client.close()
    return fuzz.outcome


class _Fuzz:
    """The inputs of one run, and what became of them."""

    def __init__(self, runtime: NatsAgentRuntime, client: Client, complaints: _Complaints, seed: int) -> None:
        self.outcome = Outcome()
        self._runtime = runtime
        self._client = client
        self._complaints = complaints
        self._random = random.Random(f"worker {seed}")
        corpus = [*READERS["envelope"].corpus, *READERS["answer"].corpus, *_questions(), _GOOD]
        self._bodies = Mutator(f"worker {seed}", corpus, ("echo", "kept", "Text", *READERS["envelope"].words))
        self._headers = Mutator(f"headers {seed}", READERS["headers"].corpus)
        self._subjects = Mutator(
            f"subjects {seed}", [b"one", b"news.one", b"known.known", b"worker.w", b"0", b"accept"]
        )
        self._answered: set[str] = set()
        self._number = 0
        self._calls: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Subscribe to the answers, and to calls that nobody answers but the fuzzer."""

        async def on_answer(message: Msg) -> None:
            self._answered.add(message.subject)

        async def leave(_: Msg) -> None:
            pass

        await self._client.subscribe(f"{_REPLIES}.*", cb=on_answer)
        await self._client.subscribe("agent.silent", cb=leave)
        await settled(self._client)

    async def volley(self, count: int) -> None:
        """Give the worker ``count`` inputs, then wait for its answers, and make a good call."""
        awaited: dict[str, bytes] = {}
        before = self._runtime.running.undecodable
        await self._keep_calling()
        for _ in range(count):
            self._one(awaited)
        last = b""
        try:
            async with asyncio.timeout(_ANSWER_WITHIN):
                answer = await self._client.request("agent.echo", _GOOD, timeout=_ANSWER_WITHIN)
                assert answer.data == _GOOD, answer.data
                while not awaited.keys() <= self._answered:
                    await asyncio.sleep(_SETTLE)
        except (TimeoutError, AssertionError, nats.errors.Error) as error:
            missing = sorted(awaited.keys() - self._answered)
            last = awaited[missing[0]] if missing else b""
            self.outcome.keep(f"{len(missing)} of {len(awaited)} not answered: {type(error).__name__} {error}", last)
        for text in self._complaints.texts:
            self.outcome.keep(text, last)
        self._complaints.texts.clear()
        self._answered.clear()
        refused = min(count, self._runtime.running.undecodable - before)
        self.outcome.refused += refused
        self.outcome.read += count - refused

    async def _keep_calling(self) -> None:
        """Have calls on their way whose replies the inputs are."""
        for task in [task for task in self._calls if task.done()]:
            self._calls.discard(task)
            error = task.exception() if not task.cancelled() else None
            if error is not None and not isinstance(error, NatsrtError) and not hasattr(error, "natsrt_remote"):
                self.outcome.keep(f"a call raised {type(error).__name__}: {str(error)[:100]}", b"")
        while len(self._calls) < _CALLS:
            call = self._runtime.send_message(Text("hi"), AgentId("silent", "k"))
            self._calls.add(asyncio.create_task(call))
        await asyncio.sleep(0)

    async def stop(self) -> None:
        """Give up the calls that are on their way."""
        await end_tasks(*self._calls)

    def _one(self, awaited: dict[str, bytes]) -> None:
        interest = self._random.choice(self._interests)
        body = self._bodies.input()
        headers = headers_of(self._headers.input()) if self._random.random() < 0.2 else None
        subject = self._subject_for(interest)
        reply = ""
        if self._random.random() < 0.9:
            self._number += 1
            reply = f"{_REPLIES}.{self._number}"
        if reply and _is_answered(interest, body):
            awaited[reply] = subject.encode() + b"\n" + (block(headers) if headers else b"") + body
        start = time.thread_time()
        interest.future.set_result(Msg(self._client, subject, reply, body, headers))
        self.outcome.slowest = max(self.outcome.slowest, time.thread_time() - start)

    @property
    def _interests(self) -> list[Interest]:
        """The worker's subscriptions, services' among them."""
        return list(self._runtime.running.connection._interests)

    @property
    def _replies(self) -> list[str]:
        """The reply subjects on which this worker expects something now."""
        return list(self._runtime.running.calls._inbox.receivers)

    def _subject_for(self, interest: Interest) -> str:
        """A subject that the interest matches."""
        start, wildcard, _ = interest.subject.partition("*")
        if (replies := [to for to in self._replies if to.startswith(start)]) and self._random.random() < 0.5:
            return self._random.choice(replies)
        rest = self._subjects.input().decode(errors="replace") or "x"
        if wildcard:
            return start + "".join(rest.split())
        return f"{interest.subject[:-1]}{rest}" if interest.subject.endswith(">") else interest.subject


def _is_answered(interest: Interest, body: bytes) -> bool:
    """Whether the worker must answer a request: those for agents, the questions to it, and those to services."""
    if interest.subject.startswith("$SRV."):
        return True  # whatever the body is
    if not interest.subject.startswith(("agent.", "natsrt.control.", "natsrt.worker.")):
        return False
    # A call that is sent again, and a message that says that nobody waits, need no answer; nor has an event one.
    return not any(word in body for word in (b"supersede", b"abandoned", b"natsrt.event", b"\\u"))


def _questions() -> list[bytes]:
    questions: list[tuple[str, dict[str, Any]]] = [
        (envelope.FATE, {"calls": ["_INBOX.a.1"], "withdraw": ["_INBOX.a.1"]}),
        (envelope.OWNER, {"agent_type": "kept", "key": "one", "chain": []}),
        (envelope.WAITS, {"calls": ["_INBOX.a.1"]}),
        (envelope.SERVE, {"agent_type": "echo", "revision": 1}),
        (envelope.ABANDONED, {"calls": ["_INBOX.a.1"]}),
        (envelope.WITHDRAWN, {}),
        (envelope.CANCEL, {"cancelid": "x-1"}),
        (envelope.ACCEPTED, {"worker": "w", "calls": ["_INBOX.a.1"]}),
        (envelope.REPLY, {"running": ["_INBOX.a.1"], "unknown": ["_INBOX.a.2"], "remembers": 1.5, "worker": "w"}),
    ]
    known = [encode_entry(KnownEntry("known")), *(case["value"].encode() for case in vectors("registry")["entries"])]
    return [
        envelope.encode(kind, '"id":"1","source":"/"', json.dumps(data).encode()) for kind, data in questions
    ] + known
