"""The least permissions of each user, from what a declaration says that the user does. Pure values, no I/O.

This is the one place that knows them. ``natsrt auth``, ``natsrt doctor --as``, ``docs/permissions.md`` and the block in
``nats.conf`` are made from it, and ``tests/test_permission_matrix.py`` shows that each line is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from natsrt.jetstream.agent_bucket import AGENTS_BUCKET
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.recorder import record_tree
from natsrt.jetstream.registry.entries import FEED, HEARTBEAT
from natsrt.jetstream.registry.registry import BUCKET
from natsrt.jetstream.streams import ATTEMPTS, BLOBS, DEAD, RESULTS, cache_name, events_name, memory_name
from natsrt.task_types import TASK_TOPICS, task_prefix
from natsrt.wire.filters import intersects
from natsrt.wire.subjects import Subjects, encode_token

from .declaration import EVERY, AgentType, Declaration, User, is_exact, topic_subject

Operation = Literal["publish", "subscribe"]

PUBLISH: Final = "publish"
SUBSCRIBE: Final = "subscribe"
_REQUESTS: Final = (
    *("CREATE", "UPDATE", "INFO", "PURGE", "DELETE", "SNAPSHOT", "RESTORE", "MSG.GET", "MSG.DELETE"),
    *("NAMES", "LIST"),
)
"""Requests of JetStream about streams."""
_CONSUMER_REQUESTS: Final = ("CREATE", "DURABLE.CREATE", "INFO", "MSG.NEXT", "DELETE", "NAMES", "LIST")
_LARGE: Final = "payloads that are too large for one message"
_DEPTH: Final = 3
"""Tokens up to which a trailing ``>`` is tried."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A permission: to publish or to subscribe to a subject, which may have wildcards, and what for."""

    operation: Operation
    subject: str
    why: str


def grants(declaration: Declaration, user: User) -> list[Grant]:
    """All permissions that a user needs, each subject once for each operation, and none that another one includes."""
    made = _Maker(declaration, user)
    found = {
        "worker": made.worker,
        "caller": made.caller,
        "publisher": made.caller,
        "client": made.client,
        "operator": made.operator,
        "tool": made.tool,
        "recorder": made.recorder,
        "keeper": made.keeper,
    }[user.role]()
    first: dict[tuple[Operation, str], Grant] = {}
    for grant in found:
        first.setdefault((grant.operation, grant.subject), grant)
    return [
        grant
        for grant in first.values()
        if not any(
            other is not grant and other.operation == grant.operation and covers(other.subject, grant.subject)
            for other in first.values()
        )
    ]


def covers(pattern: str, subject: str) -> bool:
    """Whether ``pattern`` matches all that ``subject``, which may have wildcards too, matches."""
    wanted, given = pattern.split("."), subject.split(".")
    for index, token in enumerate(wanted):
        if token == ">":
            return len(given) > index
        if index >= len(given) or given[index] == ">" or (token != "*" and token != given[index]):
            return False
    return len(wanted) == len(given)


def forbidden(declaration: Declaration, user: User) -> list[Grant]:
    """What a user may under no circumstances do, beyond its `grants`: what would make it another role.

    A subject may include some that are granted, as ``natsrt.>`` does: the rest of it is forbidden.
    """
    own = grants(declaration, user)
    return [never for never in _Maker(declaration, user).never() if not _included(own, never.operation, never.subject)]


def forms(
    declaration: Declaration, user: User, never: Grant, nobody: str, names: Iterable[str] = ()
) -> dict[str, bool]:
    """Subjects of a forbidden permission as they are in use, and whether somebody may listen there.

    A user can have a permission for these that is none for others which ``never`` includes. ``nobody`` is a token that
    no name has, ``names`` are agent types beside those that are declared.
    """
    own = grants(declaration, user)
    used = _Maker(declaration, user).used(nobody, dict.fromkeys((*declaration.types, *names)))
    found = dict.fromkeys(_samples(never.subject, nobody), False)
    found |= {subject: heard for subject, heard in used if subject not in found and covers(never.subject, subject)}
    return {subject: heard for subject, heard in found.items() if not _included(own, never.operation, subject)}


def _included(own: Iterable[Grant], operation: Operation, subject: str) -> bool:
    return any(grant.operation == operation and covers(grant.subject, subject) for grant in own)


def sample(pattern: str, nobody: str) -> str:
    """A subject that matches a pattern."""
    return ".".join(nobody if token in ("*", ">") else token for token in pattern.split("."))


def _samples(pattern: str, nobody: str) -> list[str]:
    """Subjects that match a pattern, of several lengths."""
    more = range(_DEPTH if pattern.endswith(">") else 1)
    return [sample(pattern, nobody) + f".{nobody}" * tokens for tokens in more]


def _jetstream(domain: Domain, bucket: str, nobody: str, keys: Iterable[str]) -> Iterator[str]:
    """Requests to JetStream about a bucket, and the subjects of its entries."""
    stream = f"KV_{bucket}"
    yield from _requests(domain, stream, nobody)
    yield domain.api(f"CONSUMER.CREATE.{stream}.{nobody}.$KV.{bucket}.{nobody}")
    for key in (nobody, *keys):
        yield domain.api(f"DIRECT.GET.{stream}.$KV.{bucket}.{key}")
        yield domain.publish(f"$KV.{bucket}.{key}")


def _requests(domain: Domain, stream: str, nobody: str) -> Iterator[str]:
    """Requests to JetStream about a stream."""
    yield from (domain.api(request) for request in ("INFO", "STREAM.NAMES", "STREAM.LIST"))
    yield from (domain.api(f"STREAM.{request}.{stream}") for request in _REQUESTS)
    for request in _CONSUMER_REQUESTS:
        yield from (domain.api(f"CONSUMER.{request}.{stream}{rest}") for rest in ("", f".{nobody}"))
    yield from (domain.api(f"DIRECT.GET.{stream}{rest}") for rest in ("", f".{nobody}"))


def _token(agent_type: str) -> str:
    """An agent type in a subject; ``"*"``: all of them."""
    return EVERY if agent_type == EVERY else encode_token(agent_type)


class _Maker:
    """Makes the grants of one user. One method for each thing that a user does."""

    def __init__(self, declaration: Declaration, user: User) -> None:
        self._declaration = declaration
        self._user = user
        self._subjects = Subjects(declaration.namespace)
        self._domain = Domain(declaration.jetstream_domain or None)
        self._root = f"{declaration.namespace}." if declaration.namespace else ""

    # -- the roles ---------------------------------------------------------------------------------------------------

    def worker(self) -> Iterator[Grant]:
        user, types = self._user, self._declaration.of(self._user.hosts)
        every = EVERY in user.hosts
        keyed = every or any(hosted.keyed for hosted in types)
        yield from self._runtime()
        yield from self._sends()
        yield from self._hosts(types, every)
        yield from self._inboxes()
        yield from self._asks_peers(keyed)
        yield from self._registry()
        yield from self._blobs()
        if keyed:
            yield from self._keeps_agents(types, every)
        yield from self._handles_durable(types, every)
        for name in [EVERY] if every else [hosted.name for hosted in types]:
            if self._declaration.takes_tasks(name):
                yield from self._handles_tasks(name)
        for name in user.submits:
            yield from self._submits(name)
            yield from self._knows_tasks(name)
        yield from self._services()
        yield from self._keeps()

    def caller(self) -> Iterator[Grant]:
        yield from self._runtime()
        yield from self._sends()
        yield Grant(PUBLISH, self._subjects.view, "what is in the registry: a worker tells it")
        yield Grant(PUBLISH, self._subjects.blobs, f"{_LARGE}: workers store and read them")
        for name in self._user.submits:
            yield from self._submits(name)
            yield Grant(PUBLISH, self._asks_tasks(name), "tasks: questions to workers about results")
        yield from self._services()

    def client(self) -> Iterator[Grant]:
        for subject in self._agents(self._user.calls, locates=False):
            yield Grant(PUBLISH, subject, "calls")
        for topic in self._user.publishes:
            yield Grant(PUBLISH, topic_subject(self._subjects, topic), "events")
        if not self._user.offers or self._user.calls or self._user.requests:
            yield Grant(SUBSCRIBE, f"{self._user.inbox}.>", "replies")
        yield from self._services()

    def tool(self) -> Iterator[Grant]:
        yield from self.caller()
        yield Grant(PUBLISH, self._worker_ids("worker"), "questions to each worker")
        yield Grant(PUBLISH, "$SRV.>", "questions to all workers, as a service")
        for topic in self._user.subscribes:
            yield self._hears(topic, "events to look at")

    def operator(self) -> Iterator[Grant]:
        subjects = self._subjects
        yield from self._runtime()
        yield Grant(PUBLISH, f"{self._root}agent.>", "calls and events for keyed agents")
        yield Grant(PUBLISH, subjects.everything, "events")
        yield Grant(PUBLISH, f"{self._root}natsrt.control.>", "metadata and state of agents")
        yield Grant(PUBLISH, self._worker_ids("worker"), "questions to each worker")
        yield Grant(PUBLISH, self._worker_ids("peer"), "questions to the owners of keyed agents")
        yield Grant(PUBLISH, subjects.cancel, "cancellations")
        yield Grant(PUBLISH, f"{self._user.inbox}.>", "the server's reports on who listens")
        yield Grant(PUBLISH, "$SRV.>", "questions to all workers, as a service")
        yield Grant(PUBLISH, "$SYS.REQ.USER.INFO", "the server's clock and the user's permissions")
        yield Grant(SUBSCRIBE, subjects.everything, "events to look at")
        yield from self._registry()
        yield from self._blobs()
        yield from self._bucket(AGENTS_BUCKET, "keyed agents: where they are, and their states")
        yield from self._consumers(AGENTS_BUCKET, "keyed agents: all of them, listed")
        yield from self._looks_after_durable()
        if self._declaration.record_streams:
            yield Grant(PUBLISH, self._domain.api("STREAM.NAMES"), "records: their streams, found")
        for stream in self._declaration.record_streams:
            for request in ("STREAM.INFO", "DIRECT.GET"):
                yield Grant(PUBLISH, self._domain.api(f"{request}.{stream}"), "records: read and replayed")

    def recorder(self) -> Iterator[Grant]:
        for subject in ("agent.>", "topic.>", "natsrt.blob.>"):
            yield Grant(SUBSCRIBE, f"{self._root}{subject}", "all that passes, to be recorded")
        yield Grant(SUBSCRIBE, "_INBOX.>", "replies, where a user has no inboxes of its own")
        for user in self._declaration.users.values():
            yield Grant(SUBSCRIBE, f"{user.inbox}.>", "replies, to be recorded")
        for stream in self._user.records:
            yield Grant(PUBLISH, f"{record_tree(self._subjects, stream)}.>", "records, stored")
            for request in ("STREAM.INFO", "STREAM.CREATE"):
                yield Grant(PUBLISH, self._domain.api(f"{request}.{stream}"), "the stream of records")

    def keeper(self) -> Iterator[Grant]:
        yield Grant(SUBSCRIBE, f"{self._user.inbox}.>", "replies")
        yield from self._keeps()

    def never(self) -> Iterator[Grant]:
        """What only some roles may do, and what gives a user more than it is meant to have."""
        user = self._user
        if user.role in ("worker", "operator", "keeper"):
            yield Grant(PUBLISH, self._domain.api("STREAM.DELETE.>"), "it deletes streams")
        else:
            yield Grant(PUBLISH, "$JS.>", "any request to JetStream can write to every stream of the account")
        if user.role not in ("worker", "operator"):
            chunks = f"{self._root}natsrt.blob.>"
            yield Grant(PUBLISH, chunks, "an acknowledgement of JetStream goes to any subject, and so to every stream")
            yield Grant(PUBLISH, "$KV.>", "it writes the registry and the states of agents")
            yield Grant(SUBSCRIBE, "$KV.>", "it reads the states of agents as they are stored")
            yield Grant(PUBLISH, f"{self._root}natsrt.peer.>", "it asks workers as one of them")
            yield Grant(SUBSCRIBE, f"{self._root}natsrt.>", "it answers in place of workers")
        yield Grant(PUBLISH, f"{self._root}natsrt.control.>", "it reads and writes the states of agents")
        yield Grant(SUBSCRIBE, f"{self._root}natsrt.control.>", "it answers in place of agents")
        yield Grant(SUBSCRIBE, f"{self._root}agent.>", "it reads calls, and answers them in place of agents")
        yield Grant(PUBLISH, f"{self._subjects.registry_feed}.>", "it tells others of workers that are not there")
        for stream in self._declaration.record_streams:
            yield Grant(PUBLISH, f"{record_tree(self._subjects, stream)}.>", "it forges records")
        for name in self._declaration.memories:
            yield Grant(PUBLISH, self._subjects.memory(name), "it forges what sessions remember")
            yield Grant(PUBLISH, self._subjects.remembered(name), "it tells of what no session remembers")
            yield Grant(SUBSCRIBE, self._subjects.remembered(name), "it reads what sessions remember")
        for name in self._declaration.caches:
            entries = f"$KV.{cache_name(self._subjects, name)}.>"
            yield Grant(PUBLISH, self._domain.publish(entries), "it forges cached values")
        if self._declaration.takes_tasks(EVERY):
            yield Grant(PUBLISH, f"{self._subjects.tasks}.>", "it forges results of tasks")
            yield Grant(PUBLISH, f"{self._subjects.tasks_told}.>", "it tells of results that are not there")
            yield Grant(SUBSCRIBE, f"{self._subjects.tasks_told}.>", "it reads the results of tasks")
            yield Grant(PUBLISH, f"{self._root}natsrt.tasks.>", "it reads the results of tasks, and cancels tasks")
            yield Grant(SUBSCRIBE, f"{self._root}natsrt.tasks.>", "it answers in place of workers")
        if self._declaration.streams:
            yield Grant(PUBLISH, f"{self._root}natsrt.again.>", "it gives events to single agent types")
            yield Grant(PUBLISH, f"{self._subjects.dead}.>", "it forges dead letters")
            yield Grant(PUBLISH, f"{self._subjects.attempts}.>", "it gives events more attempts")
        for other in self._declaration.users.values():
            if other.name != user.name:
                yield Grant(SUBSCRIBE, f"{other.inbox}.>", f"it reads the replies to {other.name}")
                yield Grant(PUBLISH, f"{other.inbox}.>", f"it forges replies to {other.name}")

    def used(self, nobody: str, names: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """Subjects that natsrt and JetStream use, with ``nobody`` for keys and ids, and whether somebody listens."""
        subjects, feed = self._subjects, self._subjects.registry_feed
        yield from ((subjects.view, True), (subjects.blobs, True), (subjects.cancel, True))
        yield from ((subjects.worker(nobody), False), (subjects.peer(nobody), False))
        yield from ((f"{feed}.worker.{nobody}", True), (f"{feed}.known.{nobody}", True))
        keys = {
            BUCKET: [f"{FEED}.worker.{nobody}", f"{FEED}.known.{nobody}", f"{HEARTBEAT}.{nobody}"],
            AGENTS_BUCKET: [],
        }
        for name in names:
            yield from ((subjects.agent(name), True), (subjects.instance(name, nobody), False))
            yield from ((subjects.control(name), True), (subjects.control(name, nobody), False))
            yield (subjects.control_at(name, nobody), False)
            token = encode_token(name)
            yield (f"{feed}.type.{token}.{nobody}", True)
            keys[BUCKET] += [f"{FEED}.type.{token}.{nobody}", f"{FEED}.known.{token}"]
            keys[AGENTS_BUCKET] += [f"a.{token}.{nobody}", f"c.{token}.{nobody}.{nobody}"]
            for tree, heard in ((subjects.tasks, False), (subjects.tasks_told, True)):
                yield from ((f"{tree}.{kind}.{token}.{nobody}.{nobody}", heard) for kind in ("result", "progress"))
            yield subjects.asks_tasks(name), True
        for domain in {self._domain.name, None}:
            for bucket, own in keys.items():
                for request in _jetstream(Domain(domain), self._subjects.bucket(bucket), nobody, own):
                    yield request, False
            for stream in (subjects.bucket(BLOBS), subjects.bucket(RESULTS), self._tasks_stream):
                for request in _requests(Domain(domain), stream, nobody):
                    yield request, False
            for bucket in (cache_name(subjects, name) for name in self._declaration.caches):
                for request in _jetstream(Domain(domain), bucket, nobody, ()):
                    yield request, False
            for stream in (memory_name(subjects, name) for name in self._declaration.memories):
                for request in _requests(Domain(domain), stream, nobody):
                    yield request, False
        for name in self._declaration.memories:
            yield from ((subjects.memory(name, nobody), False), (subjects.remembered(name, nobody), False))
        yield subjects.blob(nobody, "0"), True

    # -- what they do ------------------------------------------------------------------------------------------------

    def _runtime(self) -> Iterator[Grant]:
        yield Grant(SUBSCRIBE, f"{self._user.inbox}.>", "replies")
        yield Grant(SUBSCRIBE, f"{self._subjects.registry_feed}.>", "changes of the registry")

    def _sends(self) -> Iterator[Grant]:
        """Calls, events and control of agents."""
        user, subjects = self._user, self._subjects
        takers = self._declaration.keyed_takers(user.publishes)
        for subject in self._agents(user.calls):
            yield Grant(PUBLISH, subject, "calls")
        for topic in user.publishes:
            yield Grant(PUBLISH, topic_subject(subjects, topic), "events")
        for subject in self._agents(taker.name for taker in takers):
            yield Grant(PUBLISH, subject, "events for keyed agents")
        for subject in self._controls():
            yield Grant(PUBLISH, subject, "metadata and state of agents")
        for found in self._declaration.of(user.controls):
            if found.keyed:
                yield Grant(PUBLISH, subjects.agent(found.name), "where keyed agents live")
        if user.calls or user.controls or takers:
            yield Grant(PUBLISH, self._worker_ids("worker"), "questions about calls that take long")
        if (user.calls or user.publishes) and user.role != "tool":
            yield Grant(PUBLISH, subjects.cancel, "cancellations")

    def _hosts(self, types: Iterable[AgentType], every: bool) -> Iterator[Grant]:
        """What a worker listens to."""
        subjects, root = self._subjects, self._root
        if every:
            yield Grant(SUBSCRIBE, f"{root}agent.>", "calls to the agents that it hosts")
            yield Grant(SUBSCRIBE, f"{root}natsrt.control.>", "metadata and state of these agents")
            yield Grant(SUBSCRIBE, subjects.everything, "events for these agents")
        for hosted in types:
            for subject in self._agents([hosted.name]):
                yield Grant(SUBSCRIBE, subject, "calls to the agents that it hosts")
            yield Grant(SUBSCRIBE, self._control_of(hosted), "metadata and state of these agents")
            if hosted.keyed:
                yield Grant(SUBSCRIBE, subjects.control(hosted.name), "metadata and state of these agents")
            for topic in hosted.topics:
                yield self._hears(topic, "events for these agents")
        for topic in self._user.subscribes:
            yield self._hears(topic, "events for these agents")
        yield Grant(SUBSCRIBE, self._worker_ids("worker"), "questions of callers")
        yield Grant(SUBSCRIBE, subjects.view, "questions of callers about the registry")
        yield Grant(SUBSCRIBE, subjects.blobs, f"questions of callers about {_LARGE}")
        yield Grant(SUBSCRIBE, self._worker_ids("peer"), "questions of other workers")
        yield Grant(SUBSCRIBE, subjects.cancel, "cancellations")
        yield Grant(SUBSCRIBE, "$SRV.>", "monitoring, as a service")

    def _hears(self, topic: str, why: str) -> Grant:
        """Events on a topic; where NATS can express a wider one only, the permission says so."""
        wider = "" if is_exact(topic) else f"; NATS cannot tell {topic} from the other topics here"
        return Grant(SUBSCRIBE, topic_subject(self._subjects, topic), why + wider)

    def _inboxes(self) -> Iterator[Grant]:
        """Where a worker sends replies: to all who may ask it something, each in its own inboxes."""
        for other in self._declaration.users.values():
            if other.is_runtime or self._reaches(other):
                yield Grant(PUBLISH, f"{other.inbox}.>", "replies, to each user in its own inboxes")

    def _reaches(self, client: User) -> bool:
        """Whether a client calls an agent type that this worker hosts."""
        hosted, called = self._user.hosts, client.calls
        return bool(called) and (EVERY in hosted or EVERY in called or not set(hosted).isdisjoint(called))

    # -- plain NATS services -----------------------------------------------------------------------------------------

    def _services(self) -> Iterator[Grant]:
        """Requests to services, and services that this user offers."""
        offers = self._user.offers
        for subject in self._user.requests:
            yield Grant(PUBLISH, subject, "requests to services")
        for subject in offers:
            yield Grant(SUBSCRIBE, subject, "requests to the services that it offers")
        if not offers:
            return
        yield Grant(SUBSCRIBE, "$SRV.>", "monitoring, as a service")
        for other in self._declaration.users.values():
            asks = any(intersects(offered, asked) for offered in offers for asked in other.requests)
            if asks or other.role in ("operator", "tool"):
                yield Grant(PUBLISH, f"{other.inbox}.>", "replies, to each user in its own inboxes")

    def _asks_peers(self, keyed: bool) -> Iterator[Grant]:
        yield Grant(PUBLISH, self._worker_ids("peer"), "questions to other workers")
        if keyed:
            yield Grant(PUBLISH, self._worker_ids("worker"), "questions about calls that take long")

    def _keeps_agents(self, types: Iterable[AgentType], every: bool) -> Iterator[Grant]:
        """What the owners of keyed agents do."""
        keyed = [EVERY] if every else [hosted.name for hosted in types if hosted.keyed]
        for subject in self._agents(keyed):
            yield Grant(PUBLISH, subject, "messages for keyed agents, forwarded to their owners")
        for name in keyed:
            subject = "natsrt.control.>" if name == EVERY else f"natsrt.control.{encode_token(name)}.at.*"
            yield Grant(PUBLISH, f"{self._root}{subject}", "control of keyed agents, forwarded to their owners")
        yield from self._bucket(AGENTS_BUCKET, "keyed agents: their owners and states")

    # -- JetStream ---------------------------------------------------------------------------------------------------

    def _registry(self) -> Iterator[Grant]:
        why = "the registry: created by the first worker, read and written"
        yield from self._bucket(BUCKET, why)
        yield Grant(PUBLISH, self._domain.api(f"DIRECT.GET.{self._stream(BUCKET)}"), why)
        yield from self._consumers(BUCKET, why)

    def _bucket(self, name: str, why: str) -> Iterator[Grant]:
        """A bucket: made, found, written, read by key and purged."""
        stream = self._stream(name)
        yield Grant(PUBLISH, self._domain.publish(f"$KV.{self._subjects.bucket(name)}.>"), why)
        yield Grant(PUBLISH, self._domain.api("INFO"), why)
        for request in ("STREAM.CREATE", "STREAM.INFO", "STREAM.PURGE"):
            yield Grant(PUBLISH, self._domain.api(f"{request}.{stream}"), why)
        if name == AGENTS_BUCKET:  # records are read from the stream's leader
            yield Grant(PUBLISH, self._domain.api(f"STREAM.MSG.GET.{stream}"), why)
        yield Grant(PUBLISH, self._domain.api(f"DIRECT.GET.{stream}.>"), why)

    def _blobs(self) -> Iterator[Grant]:
        """Payloads by reference, where requests to JetStream are allowed."""
        yield Grant(PUBLISH, self._subjects.blob("*", "*"), _LARGE)
        stream = self._subjects.bucket(BLOBS)
        for request in (f"STREAM.CREATE.{stream}", f"STREAM.INFO.{stream}", f"STREAM.PURGE.{stream}"):
            yield Grant(PUBLISH, self._domain.api(request), _LARGE)
        yield Grant(PUBLISH, self._domain.api(f"DIRECT.GET.{stream}.>"), _LARGE)

    def _keeps(self) -> Iterator[Grant]:
        """Memories and caches."""
        for name in self._user.memories:
            stream, why = memory_name(self._subjects, name), f"the memory {name}"
            yield Grant(PUBLISH, self._subjects.memory(name), why)
            yield Grant(SUBSCRIBE, self._subjects.remembered(name), why)
            for request in ("STREAM.CREATE", "STREAM.INFO", "STREAM.MSG.GET", "DIRECT.GET"):
                yield Grant(PUBLISH, self._domain.api(f"{request}.{stream}"), why)
        for name in self._user.caches:
            bucket, why = cache_name(self._subjects, name), f"the cache {name}"
            yield Grant(PUBLISH, self._domain.publish(f"$KV.{bucket}.>"), why)
            for request in ("STREAM.CREATE", "STREAM.INFO", "STREAM.MSG.GET"):
                yield Grant(PUBLISH, self._domain.api(f"{request}.KV_{bucket}"), why)

    def _consumers(self, name: str, why: str) -> Iterator[Grant]:
        """What reads a bucket as a whole."""
        return self._reads_all(self._stream(name), why)

    def _reads_all(self, stream: str, why: str) -> Iterator[Grant]:
        """Consumers that read a stream once."""
        for request in ("CONSUMER.CREATE", "CONSUMER.INFO", "CONSUMER.MSG.NEXT", "CONSUMER.DELETE"):
            yield Grant(PUBLISH, self._domain.api(f"{request}.{stream}.>"), why)

    # -- durable topics ----------------------------------------------------------------------------------------------

    def _handles_durable(self, types: Sequence[AgentType], every: bool) -> Iterator[Grant]:
        """What a worker needs whose agents have subscriptions to durable topics."""
        topics = {hosted.name: self._stored_topics(hosted) for hosted in types}
        keyed = {hosted.name for hosted in types if hosted.keyed}
        if every:
            topics, keyed = {EVERY: (EVERY,)}, {EVERY}
        found = {name: self._declaration.streams_of(own) for name, own in topics.items()}
        streams = dict.fromkeys(events_name(self._subjects, one.name) for of_type in found.values() for one in of_type)
        if not streams:
            return
        why = "durable topics: their streams, created by the first worker"
        yield Grant(PUBLISH, self._domain.api("STREAM.NAMES"), why)
        for stream in streams:
            for request in ("STREAM.INFO", "STREAM.CREATE", "STREAM.UPDATE"):
                if request != "STREAM.UPDATE" or stream != self._tasks_stream:  # that one never gets other topics
                    yield Grant(PUBLISH, self._domain.api(f"{request}.{stream}"), why)
        for stream in map(self._subjects.bucket, (DEAD, ATTEMPTS)):
            for request in ("STREAM.INFO", "STREAM.CREATE"):
                yield Grant(PUBLISH, self._domain.api(f"{request}.{stream}"), why)
        for name, of_type in found.items():
            for one in of_type:
                yield from self._pulls(name, events_name(self._subjects, one.name))
                if name in keyed:
                    yield from self._feeds(name, events_name(self._subjects, one.name))
            if of_type:
                yield from self._keeps_count(name)

    def _stored_topics(self, hosted: AgentType) -> tuple[str, ...]:
        """The topics of a type, with those of its tasks."""
        tasks = (f"{task_prefix(hosted.name)}{EVERY}",) if self._declaration.takes_tasks(hosted.name) else ()
        return (*hosted.topics, *tasks)

    def _pulls(self, agent_type: str, stream: str) -> Iterator[Grant]:
        """The consumer of an agent type."""
        why = "durable topics: the events of each agent type"
        token = _token(agent_type)
        for request in ("CREATE", "INFO", "MSG.NEXT", "RESET", "PAUSE"):
            yield Grant(PUBLISH, self._domain.api(f"CONSUMER.{request}.{stream}.{token}"), why)
        yield Grant(PUBLISH, f"$JS.ACK.{stream}.{token}.>", why)
        why = "durable topics: events that are tried again much later"
        yield Grant(PUBLISH, f"{self._subjects.later(stream)}.retry.{token}.*.*", why)
        yield Grant(PUBLISH, self._domain.api(f"DIRECT.GET.{stream}"), why)

    def _feeds(self, agent_type: str, stream: str) -> Iterator[Grant]:
        """What the feeder of a keyed type needs in addition."""
        why = "durable topics: the events of keyed agents, fed to their owners"
        token = _token(agent_type)
        yield Grant(PUBLISH, self._domain.api(f"CONSUMER.UNPIN.{stream}.{token}"), why)

    def _keeps_count(self, agent_type: str) -> Iterator[Grant]:
        """Dead letters, and how often events were tried."""
        own = ">" if agent_type == EVERY else f"{encode_token(agent_type)}.>"
        dead, why = f"{self._subjects.dead}.{own}", "durable topics: dead letters"
        yield Grant(PUBLISH, dead, why)
        yield Grant(PUBLISH, self._domain.api(f"DIRECT.GET.{self._subjects.bucket(DEAD)}.{dead}"), why)
        why = "durable topics: attempts to handle events"
        yield Grant(PUBLISH, f"{self._subjects.attempts}.{own}", why)

    def _looks_after_durable(self) -> Iterator[Grant]:
        """What an operator does with durable topics."""
        for stream in [events_name(self._subjects, one.name) for one in self._declaration.streams]:
            for request in ("STREAM.INFO", "CONSUMER.LIST"):
                yield Grant(PUBLISH, self._domain.api(f"{request}.{stream}"), "durable topics: how far agent types are")
            if stream != self._tasks_stream:
                yield Grant(PUBLISH, self._domain.api(f"STREAM.UPDATE.{stream}"), "durable topics: removed")
            yield Grant(PUBLISH, self._domain.api(f"DIRECT.GET.{stream}"), "durable topics: events, read and replayed")
            again, why = self._subjects.again(stream), "durable topics: events, given to a type again"
            yield Grant(PUBLISH, f"{again}.*", why)
            yield Grant(PUBLISH, f"{again}.redrive.*.*.*", why)
        if self._declaration.takes_tasks(EVERY):
            yield from self._knows_tasks(EVERY)
            yield from self._submits(EVERY)
            results = self._subjects.bucket(RESULTS)
            for stream in (self._tasks_stream, results):
                yield from self._reads_all(stream, "tasks: all of them, listed")
            yield Grant(PUBLISH, self._domain.api(f"DIRECT.GET.{results}"), "tasks: all of them, listed")
            yield Grant(
                PUBLISH, self._domain.api(f"STREAM.PURGE.{results}"), "tasks: tried again after they have failed"
            )
            yield Grant(PUBLISH, self._domain.api(f"STREAM.INFO.{results}"), "tasks: results, looked at")
        if self._declaration.streams:
            dead = self._subjects.bucket(DEAD)
            for request in ("STREAM.INFO", "DIRECT.GET", "STREAM.MSG.DELETE"):
                yield Grant(PUBLISH, self._domain.api(f"{request}.{dead}"), "dead letters: read and removed")

    # -- tasks -------------------------------------------------------------------------------------------------------

    def _submits(self, agent_type: str) -> Iterator[Grant]:
        """What every user needs who submits tasks to a type."""
        topics, told = self._task_topics(agent_type), "tasks: their results and progress, told by the server"
        yield Grant(PUBLISH, topics, "tasks, submitted")
        yield Grant(PUBLISH, self._task_schedules(agent_type), "tasks, submitted for later")
        yield Grant(SUBSCRIBE, f"{self._subjects.tasks_told}.*.{_token(agent_type)}.*.*", told)
        yield Grant(PUBLISH, self._subjects.cancel, "cancellations")

    def _knows_tasks(self, agent_type: str) -> Iterator[Grant]:
        """Results, progress and status of the tasks of a type, read and written in JetStream."""
        results, tasks = self._subjects.bucket(RESULTS), self._tasks_stream
        own = f"{self._subjects.tasks}.*.{_token(agent_type)}.*.*"
        yield Grant(PUBLISH, own, "tasks: results and progress")
        yield Grant(PUBLISH, self._domain.api(f"DIRECT.GET.{results}.{own}"), "tasks: results and progress")
        why = "tasks: their status"
        yield Grant(PUBLISH, self._domain.api(f"DIRECT.GET.{tasks}.{self._task_topics(agent_type)}"), why)
        yield Grant(PUBLISH, self._domain.api(f"DIRECT.GET.{tasks}.{self._task_schedules(agent_type)}"), why)
        yield Grant(PUBLISH, self._domain.api(f"STREAM.MSG.DELETE.{tasks}"), "tasks: removed when they have ended")

    def _handles_tasks(self, agent_type: str) -> Iterator[Grant]:
        """What a worker needs for tasks of a type, beside what it needs for other events of streams."""
        yield from self._knows_tasks(agent_type)
        for request in ("STREAM.INFO", "STREAM.CREATE"):
            yield Grant(PUBLISH, self._domain.api(f"{request}.{self._subjects.bucket(RESULTS)}"), "tasks: results")
        yield Grant(SUBSCRIBE, self._asks_tasks(agent_type), "tasks: questions of callers about results")

    @property
    def _tasks_stream(self) -> str:
        return events_name(self._subjects, TASK_TOPICS.name)

    def _asks_tasks(self, agent_type: str) -> str:
        return f"{self._root}natsrt.tasks.{_token(agent_type)}"

    def _task_topics(self, agent_type: str) -> str:
        """The subject of all tasks of a type."""
        prefix = TASK_TOPICS.patterns[0] if agent_type == EVERY else task_prefix(agent_type)
        return topic_subject(self._subjects, f"{prefix}{EVERY}")

    def _task_schedules(self, agent_type: str) -> str:
        """The subject of all tasks of a type that wait for their time."""
        tasks = self._task_topics(agent_type).removeprefix(f"{self._root}topic.")
        return f"{self._subjects.later(self._tasks_stream)}.event.*.{tasks}"

    def _stream(self, bucket: str) -> str:
        return f"KV_{self._subjects.bucket(bucket)}"

    # -- subjects ----------------------------------------------------------------------------------------------------

    def _worker_ids(self, kind: str) -> str:
        return f"{self._root}natsrt.{kind}.*"

    def _agents(self, names: Iterable[str], *, locates: bool = True) -> Iterator[str]:
        """The subjects of agent types, and those of their single agents.

        Of keyed agents only if the user ``locates`` their owners, as natsrt does. Workers forward what clients send.
        """
        names = tuple(names)
        if EVERY in names:
            yield f"{self._root}agent.>"
            return
        for found in self._declaration.of(names):
            if not found.instances:
                yield self._subjects.agent(found.name)
            if found.instances or (found.keyed and locates):
                yield f"{self._subjects.agent(found.name)}.*"

    def _controls(self) -> Iterator[str]:
        if EVERY in self._user.controls:
            yield f"{self._root}natsrt.control.>"
            return
        for controlled in self._declaration.of(self._user.controls):
            yield self._control_of(controlled)

    def _control_of(self, agent_type: AgentType) -> str:
        """Where single agents of a type are controlled."""
        subject = self._subjects.control(agent_type.name)
        if agent_type.keyed:
            return f"{subject}.at.*"
        return f"{subject}.*" if agent_type.instances else subject
