"""Runtimes without sockets that call and host keyed agents, each in a process of its own, in virtual time.

A `Member` is a whole `NatsAgentRuntime`. Only two of its parts are simulated: its connection is a
`tests.support.network.Link`, with `tests.support.jetstream` behind it, and the registry's bucket is a `Bucket`.
Ownership, records, turns, hand-over, and everything that sends and receives are the runtime's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar, cast

from autogen_core import AgentId, DefaultTopicId, MessageContext, RoutedAgent, TypeSubscription, message_handler

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.assembly import Network
from natsrt.errors import RegistryUnavailable, ServerUnreachable
from natsrt.jetstream.buckets import OPERATION
from natsrt.jetstream.record import record_key
from natsrt.jetstream.registry.declare import Declared
from natsrt.jetstream.registry.entries import FEED, HEARTBEAT, KnownEntry, RegistryEntry, encode_entry
from natsrt.jetstream.registry.follow import Follower
from natsrt.jetstream.registry.liveness import Liveness
from natsrt.jetstream.registry.pages import Stored
from natsrt.jetstream.registry.registry import Registry
from natsrt.jetstream.registry.store import IN_ORDER, LEFT
from natsrt.keyed.ownership import Ownership
from natsrt.keyed_types import KeyedOptions
from natsrt.options import Options
from natsrt.wire import envelope
from natsrt.wire.stored_events import StoredEvent
from natsrt.wire.subjects import Subjects
from tests.support.jetstream import JetStream
from tests.support.network import Link, Message, Server
from tests.support.virtual_time import Processes, result_of

T = TypeVar("T")

COUNTER = "counter"
TOPIC = "counts"
STREAM = "natsrt_events@1"
_NAMESPACE = "t"
_FIRST = 1_000_000
"""The first revision of the records' bucket."""


class Bucket:
    """The registry's bucket, and its feed."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.feed = Subjects(_NAMESPACE).registry_feed
        self.revision = 0
        self.stored: dict[str, Stored] = {}
        self.heard: dict[str, float] = {}
        """When each worker's heartbeat was stored."""
        server.spared = (f"{self.feed}.",)

    def commit(self, key: str, value: bytes | None, headers: dict[str, str] | None = None) -> int:
        """Store or delete (None) an entry, and announce that. Returns the revision."""
        before = self.stored.get(key)
        self.revision += 1
        self.stored[key] = Stored(key, self.revision, value)
        told = {"Nats-Sequence": str(self.revision), "Nats-Last-Sequence": str(before.revision if before else 0)}
        if value is None:
            told[OPERATION] = "DEL"
        subject = f"{self.feed}.{key[len(FEED) + 1 :]}"
        self.server.take(Message(subject, value or b"", "", {**told, **(headers or {})}))
        return self.revision

    def remove_worker(self, worker_id: str, in_order: bool) -> int:
        revision = self.commit(f"{FEED}.worker.{worker_id}", None, {LEFT: IN_ORDER} if in_order else None)
        for key in [
            key for key in self.stored if key.endswith(f".{worker_id}") and key != f"{FEED}.worker.{worker_id}"
        ]:
            del self.stored[key]
        self.heard.pop(worker_id, None)
        return revision


class _Store:
    """The registry's bucket as one runtime reads and writes it: in place of `RegistryStore` and `RegistrySource`."""

    origin = None
    is_bucket = True

    def __init__(self, bucket: Bucket, link: Link, options: Options) -> None:
        self._bucket = bucket
        self._link = link
        self._heartbeat_ttl = options.heartbeat_ttl
        self.now = self.reserve = self
        self.usage: dict[str, Any] = {}

    async def _at_server(self, work: Callable[[], T]) -> T:
        for _ in range(20):
            with contextlib.suppress(ServerUnreachable):
                return await self._link.ask(work, 2.0)
            await asyncio.sleep(0.2)
        raise RegistryUnavailable("reach", "JetStream does not answer")

    async def is_same(self) -> bool:
        return await self._at_server(lambda: True)

    async def keep(self) -> None:
        pass

    async def open(self, above: int = 0) -> None:
        pass

    def close(self) -> None:
        pass

    def full(self, now: float) -> None:
        return None

    async def write(self, entries: Sequence[RegistryEntry], headers: dict[str, str] | None = None) -> int:
        values = {entry.key: encode_entry(entry) for entry in entries}
        return await self._at_server(
            lambda: max((self._bucket.commit(key, value) for key, value in values.items()), default=0)
        )

    async def delete(self, keys: Sequence[str], headers: dict[str, str] | None = None) -> int:
        return await self._at_server(lambda: max((self._bucket.commit(key, None) for key in keys), default=0))

    async def retire(self, known: Sequence[KnownEntry]) -> None:
        await self.delete([entry.key for entry in known])

    async def remove_worker(self, worker_id: str, *, in_order: bool = False) -> int:
        return await self._at_server(lambda: self._bucket.remove_worker(worker_id, in_order))

    async def beat(self, worker_id: str) -> None:
        await self._at_server(lambda: self._bucket.heard.update({worker_id: self._link.loop.time()}))

    async def end_heartbeat(self, runtime_id: str) -> None:
        await self._at_server(lambda: self._bucket.heard.pop(runtime_id, None))

    def _is_heard(self, worker_id: str) -> bool:
        return self._link.loop.time() - self._bucket.heard.get(worker_id, -1e9) < self._heartbeat_ttl

    async def has_heartbeat(self, worker_id: str) -> bool:
        return await self._at_server(lambda: self._is_heard(worker_id))

    async def read(self, load: Callable[[int, AsyncGenerator[list[Stored], None]], Awaitable[None]]) -> None:
        def snapshot() -> tuple[int, list[Stored]]:
            beats = [Stored(f"{HEARTBEAT}.{one}", 0, b"") for one in self._bucket.heard if self._is_heard(one)]
            entries = sorted(self._bucket.stored.values(), key=lambda one: one.revision)
            return self._bucket.revision, [*entries, *beats]

        revision, found = await self._at_server(snapshot)

        async def pages() -> AsyncGenerator[list[Stored], None]:
            yield [one for one in found if not one.key.startswith(f"{FEED}.known.")]

        await load(revision, pages())

    async def last_change(self) -> int:
        return await self._at_server(lambda: self._bucket.revision)

    async def is_known(self, agent_type: str) -> bool:
        return agent_type == COUNTER

    async def known(self, agent_type: str | None = None) -> dict[str, KnownEntry]:
        return {}

    async def some_known(self, limit: int) -> list[str]:
        return [COUNTER]

    def says_nobody_lives(self, error: RegistryUnavailable) -> bool:
        return False


class _Integrity:
    """In place of `Integrity`: there is one registry, and it is never replaced."""

    problem = conflict = ""
    foreign = None

    def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def meet_others(self) -> None:
        pass

    def elsewhere(self, origin: Any, *, is_answer: bool) -> None:
        raise AssertionError("there is one registry")


class _Registry(Registry):
    """The registry of one runtime, which keeps its view and declares its entries as the real one does."""

    def __init__(self, bucket: Bucket, network: Network, options: Options) -> None:
        self._connection = network.connection
        self._subjects = network.subjects
        self._may_ask_peers = True
        self._listeners = []
        self._durable = {}
        self._ttl = options.heartbeat_ttl
        self._rejoined = None
        self.away = False
        network.connection.add_listener(self)
        store = cast(Any, _Store(bucket, cast(Link, network.connection), options))
        self._store = self._source = store
        self._follower = Follower(network.connection, network.subjects, options, store, self)
        self._declared = Declared(store, self._follower)
        self._integrity = cast(Any, _Integrity())
        self._liveness = Liveness(
            network.connection, options, store, store, self._follower, self._declared, network.peers
        )


@natsrt.keyed
class Counter(RoutedAgent):
    """Remembers the number of each increment. Its state has them in the order in which they were counted."""

    def __init__(self, member: Member) -> None:
        super().__init__("counts")
        self._member = member
        self._counted: list[str] = []

    @message_handler
    async def count(self, message: str, ctx: MessageContext) -> str:
        """Count an increment. An empty one counts nothing, and tells which were counted."""
        if message:
            takes = self._member.takes()
            if takes:
                await asyncio.sleep(takes)
            self._counted.append(message)
        return " ".join(self._counted)

    async def save_state(self) -> dict[str, Any]:
        return {"counted": self._counted}

    async def load_state(self, state: Any) -> None:
        self._counted = list(state["counted"])


class Member:
    """A runtime in a process of its own."""

    def __init__(self, world: World, name: str, *, hosts: bool) -> None:
        self.name = name
        self.hosts = hosts
        self.process = world.processes.start()
        self.takes: Callable[[], float] = lambda: 0.0
        """How many seconds the next handler takes."""
        self.left = False
        """Whether it has begun to leave in order."""
        self._world = world
        self._runtime: NatsAgentRuntime
        self._ownership: Ownership
        self.link: Link

    def has(self, key: str, revision: int) -> bool:
        """Whether it has a live counter whose record is at this revision."""
        slot = self._ownership._slots.find(COUNTER, key)
        if slot is None or slot.agent is None or slot.record is None or slot.is_moving:
            return False
        return slot.record.revision == revision

    @property
    def is_there(self) -> bool:
        """Whether it is neither dead nor about to leave."""
        return not (self.process.killed or self.left)

    async def start(self) -> None:
        await self.do(self._start)

    async def _start(self) -> None:
        member, world = self, self._world

        class _Network(Network):
            def _new_connection(self, options: Options, client_name: str) -> Any:
                member.link = Link(world.server, member.name, up=False)
                return member.link

            def _new_registry(self, options: Options) -> Registry:
                return _Registry(world.bucket, self, options)

        class _Runtime(NatsAgentRuntime):
            _network = _Network

        options = Options(
            namespace=_NAMESPACE, name=self.name, keyed={COUNTER: KeyedOptions(idle_timeout=world.idle_timeout)}
        )
        self._runtime = runtime = _Runtime(options=options)
        if self.hosts:
            await natsrt.register(runtime, Counter, COUNTER, lambda: Counter(self))
            await runtime.add_subscription(TypeSubscription(TOPIC, COUNTER))
        await runtime.start()
        self._ownership = runtime.running.ownership

    async def do(self, work: Callable[[], Any]) -> Any:
        """The result of ``work()``, awaited in the process of this member."""
        return await result_of(self.process.begin(work()))

    def count(self, key: str, increment: str) -> asyncio.Future[str]:
        """Begin a call that counts an increment; an empty one asks for what was counted."""

        async def call() -> str:
            return cast(str, await self._runtime.send_message(increment, AgentId(COUNTER, key)))

        return asyncio.ensure_future(self.do(call))

    def publish(self, key: str, increment: str) -> asyncio.Future[None]:
        """Begin to publish an event that counts an increment."""

        async def publish() -> None:
            await self._runtime.publish_message(increment, DefaultTopicId(TOPIC, key))

        return asyncio.ensure_future(self.do(publish))

    def deliver(self, key: str, sequence: int) -> asyncio.Future[None]:
        """Begin to deliver an event of a stream, which counts the increment ``s<sequence>``."""

        async def deliver() -> None:
            running, increment = self._runtime.running, f"s{sequence}"
            encoded = running.outgoing.calls._serialization.encode(increment)
            attributes = running.outgoing.calls._attributes.message(increment, None, encoded, None)
            body = envelope.decode(envelope.encode(envelope.EVENT, attributes, encoded.payload, encoded.content_type))
            assert body is not None
            failure = await running.outgoing.delivery.deliver_confirmed(
                AgentId(COUNTER, key), DefaultTopicId(TOPIC, key), body, StoredEvent(STREAM, sequence)
            )
            assert failure is None, f"a counter refuses nothing: {failure!r}"

        return asyncio.ensure_future(self.do(deliver))

    async def leave(self) -> None:
        """Stop the runtime in order."""
        self.left = True
        await self.do(self._runtime.stop)

    def kill(self) -> None:
        self.process.kill()
        self.link.kill()


class World:
    """A server with JetStream, and the members."""

    def __init__(
        self, processes: Processes, rng: random.Random, *, tapped: bool = False, idle_timeout: float | None = 3600.0
    ) -> None:
        """``idle_timeout``: that of the counters, in seconds; None: they stay."""
        self.processes = processes
        self.idle_timeout = idle_timeout
        self.server = Server(rng, tapped=tapped)
        self.jetstream = JetStream(self.server, rng)
        self.bucket = Bucket(self.server)
        self.records = self.jetstream.add_bucket(Subjects(_NAMESPACE).bucket("natsrt_agents"), _FIRST)
        self.members: list[Member] = []

    async def start(self, name: str, *, hosts: bool) -> Member:
        """Start a runtime, which hosts counters or not."""
        member = Member(self, name, hosts=hosts)
        await member.start()
        self.members.append(member)
        return member

    def purge(self, key: str) -> bool:
        """Let the record of a counter vanish, as by an operator's hand. Only while a worker that is there has the
        counter, and does not give it up: otherwise its state is gone."""
        subject = f"$KV.{self.records.name[3:]}.{record_key(AgentId(COUNTER, key))}"
        stored = self.records.last.get(subject)
        if stored is None or not any(member.has(key, stored.sequence) for member in self.there(hosts=True)):
            return False
        del self.records.last[subject]
        return True

    def there(self, *, hosts: bool) -> list[Member]:
        """The members that are neither dead nor about to leave."""
        return [member for member in self.members if member.hosts is hosts and member.is_there]
