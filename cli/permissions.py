"""The least permissions of each user, from what a declaration says that the user does. Pure values, no I/O.

This module and those that it imports are the one place that knows them. ``natsrt auth``, ``natsrt doctor --as``,
``docs/permissions.md`` and the block in ``nats.conf`` are made from it, and ``tests/test_permission_matrix.py`` shows
that each line is needed. `natsrt_cli.forbidden` has what no user of a role may have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from natsrt.jetstream.agent_bucket import AGENTS_BUCKET
from natsrt.jetstream.recorder import record_tree
from natsrt.wire.filters import covers, intersects
from natsrt.wire.subjects import encode_token

from .declaration import EVERY, AgentType, Declaration, User, is_exact, topic_subject
from .durable_permissions import handles_durable, handles_tasks, knows_tasks, looks_after_durable, submits
from .grant import PUBLISH, SUBSCRIBE, Grant, Operation
from .permission_subjects import Names
from .storage_permissions import LARGE, blobs, bucket, memories_and_caches, reads_bucket, registry


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


class _Maker:
    """Makes the grants of one user. One method for each thing that a user does."""

    def __init__(self, declaration: Declaration, user: User) -> None:
        self._declaration = declaration
        self._user = user
        self._names = Names(declaration)
        self._subjects = self._names.subjects
        self._domain = self._names.domain
        self._root = self._names.root

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
        yield from registry(self._names)
        yield from blobs(self._names)
        if keyed:
            yield from self._keeps_agents(types, every)
        yield from handles_durable(self._names, types, every)
        for name in [EVERY] if every else [hosted.name for hosted in types]:
            if self._declaration.takes_tasks(name):
                yield from handles_tasks(self._names, name)
        for name in user.submits:
            yield from submits(self._names, name)
            yield from knows_tasks(self._names, name)
        yield from self._services()
        yield from memories_and_caches(self._names, self._user)

    def caller(self) -> Iterator[Grant]:
        yield from self._runtime()
        yield from self._sends()
        yield Grant(PUBLISH, self._subjects.view, "what is in the registry: a worker tells it")
        yield Grant(PUBLISH, self._subjects.blobs, f"{LARGE}: workers store and read them")
        for name in self._user.submits:
            yield from submits(self._names, name)
            yield Grant(PUBLISH, self._names.asks_tasks(name), "tasks: questions to workers about results")
        yield from self._services()

    def client(self) -> Iterator[Grant]:
        for subject in self._names.agents(self._user.calls, locates=False):
            yield Grant(PUBLISH, subject, "calls")
        for topic in self._user.publishes:
            yield Grant(PUBLISH, topic_subject(self._subjects, topic), "events")
        if not self._user.offers or self._user.calls or self._user.requests:
            yield Grant(SUBSCRIBE, f"{self._user.inbox}.>", "replies")
        yield from self._services()

    def tool(self) -> Iterator[Grant]:
        yield from self.caller()
        yield Grant(PUBLISH, self._names.worker_ids("worker"), "questions to each worker")
        yield Grant(PUBLISH, "$SRV.>", "questions to all workers, as a service")
        for topic in self._user.subscribes:
            yield self._hears(topic, "events to look at")

    def operator(self) -> Iterator[Grant]:
        subjects = self._subjects
        yield from self._runtime()
        yield Grant(PUBLISH, f"{self._root}agent.>", "calls and events for keyed agents")
        yield Grant(PUBLISH, subjects.everything, "events")
        yield Grant(PUBLISH, f"{self._root}natsrt.control.>", "metadata and state of agents")
        yield Grant(PUBLISH, self._names.worker_ids("worker"), "questions to each worker")
        yield Grant(PUBLISH, self._names.worker_ids("peer"), "questions to the owners of keyed agents")
        yield Grant(PUBLISH, subjects.cancel, "cancellations")
        yield Grant(PUBLISH, f"{self._user.inbox}.>", "the server's reports on who listens")
        yield Grant(PUBLISH, "$SRV.>", "questions to all workers, as a service")
        yield Grant(PUBLISH, "$SYS.REQ.USER.INFO", "the server's clock and the user's permissions")
        yield Grant(SUBSCRIBE, subjects.everything, "events to look at")
        yield from registry(self._names)
        yield from blobs(self._names)
        yield from bucket(self._names, AGENTS_BUCKET, "keyed agents: where they are, and their states")
        yield from reads_bucket(self._names, AGENTS_BUCKET, "keyed agents: all of them, listed")
        yield from looks_after_durable(self._names)
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
        yield from memories_and_caches(self._names, self._user)

    # -- what they do ------------------------------------------------------------------------------------------------

    def _runtime(self) -> Iterator[Grant]:
        yield Grant(SUBSCRIBE, f"{self._user.inbox}.>", "replies")
        yield Grant(SUBSCRIBE, f"{self._subjects.registry_feed}.>", "changes of the registry")

    def _sends(self) -> Iterator[Grant]:
        """Calls, events and control of agents."""
        user, subjects = self._user, self._subjects
        takers = self._declaration.keyed_takers(user.publishes)
        for subject in self._names.agents(user.calls):
            yield Grant(PUBLISH, subject, "calls")
        for topic in user.publishes:
            yield Grant(PUBLISH, topic_subject(subjects, topic), "events")
        for subject in self._names.agents(taker.name for taker in takers):
            yield Grant(PUBLISH, subject, "events for keyed agents")
        for subject in self._controls():
            yield Grant(PUBLISH, subject, "metadata and state of agents")
        for found in self._declaration.of(user.controls):
            if found.keyed:
                yield Grant(PUBLISH, subjects.agent(found.name), "where keyed agents live")
        if user.calls or user.controls or takers:
            yield Grant(PUBLISH, self._names.worker_ids("worker"), "questions about calls that take long")
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
            for subject in self._names.agents([hosted.name]):
                yield Grant(SUBSCRIBE, subject, "calls to the agents that it hosts")
            yield Grant(SUBSCRIBE, self._names.control_of(hosted), "metadata and state of these agents")
            if hosted.keyed:
                yield Grant(SUBSCRIBE, subjects.control(hosted.name), "metadata and state of these agents")
            for topic in hosted.topics:
                yield self._hears(topic, "events for these agents")
        for topic in self._user.subscribes:
            yield self._hears(topic, "events for these agents")
        yield Grant(SUBSCRIBE, self._names.worker_ids("worker"), "questions of callers")
        yield Grant(SUBSCRIBE, subjects.view, "questions of callers about the registry")
        yield Grant(SUBSCRIBE, subjects.blobs, f"questions of callers about {LARGE}")
        yield Grant(SUBSCRIBE, self._names.worker_ids("peer"), "questions of other workers")
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

    def _asks_peers(self, keyed: bool) -> Iterator[Grant]:
        yield Grant(PUBLISH, self._names.worker_ids("peer"), "questions to other workers")
        if keyed:
            yield Grant(PUBLISH, self._names.worker_ids("worker"), "questions about calls that take long")

    def _keeps_agents(self, types: Iterable[AgentType], every: bool) -> Iterator[Grant]:
        """What the owners of keyed agents do."""
        keyed = [EVERY] if every else [hosted.name for hosted in types if hosted.keyed]
        for subject in self._names.agents(keyed):
            yield Grant(PUBLISH, subject, "messages for keyed agents, forwarded to their owners")
        for name in keyed:
            subject = "natsrt.control.>" if name == EVERY else f"natsrt.control.{encode_token(name)}.at.*"
            yield Grant(PUBLISH, f"{self._root}{subject}", "control of keyed agents, forwarded to their owners")
        yield from bucket(self._names, AGENTS_BUCKET, "keyed agents: their owners and states")

    def _controls(self) -> Iterator[str]:
        if EVERY in self._user.controls:
            yield f"{self._root}natsrt.control.>"
            return
        for controlled in self._declaration.of(self._user.controls):
            yield self._names.control_of(controlled)

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
