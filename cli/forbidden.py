"""What a user may under no circumstances do, and the subjects on which that is tried. Pure values, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from natsrt.jetstream.agent_bucket import AGENTS_BUCKET
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.recorder import record_tree
from natsrt.jetstream.registry.entries import FEED, HEARTBEAT
from natsrt.jetstream.registry.registry import BUCKET
from natsrt.jetstream.streams import BLOBS, RESULTS, cache_name, memory_name
from natsrt.wire.filters import covers
from natsrt.wire.subjects import encode_token

from .declaration import EVERY, Declaration, User
from .grant import PUBLISH, SUBSCRIBE, Grant, included
from .permission_subjects import Names
from .permissions import grants

_REQUESTS: Final = (
    *("CREATE", "UPDATE", "INFO", "PURGE", "DELETE", "SNAPSHOT", "RESTORE", "MSG.GET", "MSG.DELETE"),
    *("NAMES", "LIST"),
)
"""Requests of JetStream about streams."""
_CONSUMER_REQUESTS: Final = ("CREATE", "DURABLE.CREATE", "INFO", "MSG.NEXT", "DELETE", "NAMES", "LIST")
_DEPTH: Final = 3
"""Tokens up to which a trailing ``>`` is tried."""


def forbidden(declaration: Declaration, user: User) -> list[Grant]:
    """What a user may under no circumstances do, beyond its `grants`: what would make it another role.

    A subject may include some that are granted, as ``natsrt.>`` does: the rest of it is forbidden.
    """
    own = grants(declaration, user)
    return [never for never in _never(Names(declaration), user) if not included(own, never.operation, never.subject)]


def forms(
    declaration: Declaration, user: User, never: Grant, nobody: str, names: Iterable[str] = ()
) -> dict[str, bool]:
    """Subjects of a forbidden permission as they are in use, and whether somebody may listen there.

    A user can have a permission for these that is none for others which ``never`` includes. ``nobody`` is a token that
    no name has, ``names`` are agent types beside those that are declared.
    """
    own = grants(declaration, user)
    used = _used(Names(declaration), nobody, dict.fromkeys((*declaration.types, *names)))
    found = dict.fromkeys(_samples(never.subject, nobody), False)
    found |= {subject: heard for subject, heard in used if subject not in found and covers(never.subject, subject)}
    return {subject: heard for subject, heard in found.items() if not included(own, never.operation, subject)}


def _never(names: Names, user: User) -> Iterator[Grant]:
    """What only some roles may do, and what gives a user more than it is meant to have."""
    if user.role in ("worker", "operator", "keeper"):
        yield Grant(PUBLISH, names.domain.api("STREAM.DELETE.>"), "it deletes streams")
    else:
        yield Grant(PUBLISH, "$JS.>", "any request to JetStream can write to every stream of the account")
    if user.role not in ("worker", "operator"):
        chunks = f"{names.root}natsrt.blob.>"
        yield Grant(PUBLISH, chunks, "an acknowledgement of JetStream goes to any subject, and so to every stream")
        yield Grant(PUBLISH, "$KV.>", "it writes the registry and the states of agents")
        yield Grant(SUBSCRIBE, "$KV.>", "it reads the states of agents as they are stored")
        yield Grant(PUBLISH, f"{names.root}natsrt.peer.>", "it asks workers as one of them")
        yield Grant(SUBSCRIBE, f"{names.root}natsrt.>", "it answers in place of workers")
    yield Grant(PUBLISH, f"{names.root}natsrt.control.>", "it reads and writes the states of agents")
    yield Grant(SUBSCRIBE, f"{names.root}natsrt.control.>", "it answers in place of agents")
    yield Grant(SUBSCRIBE, f"{names.root}agent.>", "it reads calls, and answers them in place of agents")
    yield Grant(PUBLISH, f"{names.subjects.registry_feed}.>", "it tells others of workers that are not there")
    for stream in names.declaration.record_streams:
        yield Grant(PUBLISH, f"{record_tree(names.subjects, stream)}.>", "it forges records")
    for name in names.declaration.memories:
        yield Grant(PUBLISH, names.subjects.memory(name), "it forges what sessions remember")
        yield Grant(PUBLISH, names.subjects.remembered(name), "it tells of what no session remembers")
        yield Grant(SUBSCRIBE, names.subjects.remembered(name), "it reads what sessions remember")
    for name in names.declaration.caches:
        entries = f"$KV.{cache_name(names.subjects, name)}.>"
        yield Grant(PUBLISH, names.domain.publish(entries), "it forges cached values")
    if names.declaration.takes_tasks(EVERY):
        yield Grant(PUBLISH, f"{names.subjects.tasks}.>", "it forges results of tasks")
        yield Grant(PUBLISH, f"{names.subjects.tasks_told}.>", "it tells of results that are not there")
        yield Grant(SUBSCRIBE, f"{names.subjects.tasks_told}.>", "it reads the results of tasks")
        yield Grant(PUBLISH, f"{names.root}natsrt.tasks.>", "it reads the results of tasks, and cancels tasks")
        yield Grant(SUBSCRIBE, f"{names.root}natsrt.tasks.>", "it answers in place of workers")
    if names.declaration.streams:
        yield Grant(PUBLISH, f"{names.root}natsrt.again.>", "it gives events to single agent types")
        yield Grant(PUBLISH, f"{names.subjects.dead}.>", "it forges dead letters")
        yield Grant(PUBLISH, f"{names.subjects.attempts}.>", "it gives events more attempts")
    for other in names.declaration.users.values():
        if other.name != user.name:
            yield Grant(SUBSCRIBE, f"{other.inbox}.>", f"it reads the replies to {other.name}")
            yield Grant(PUBLISH, f"{other.inbox}.>", f"it forges replies to {other.name}")


def _used(names: Names, nobody: str, types: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Subjects that natsrt and JetStream use, with ``nobody`` for keys and ids, and whether somebody listens."""
    subjects, feed = names.subjects, names.subjects.registry_feed
    yield from ((subjects.view, True), (subjects.blobs, True), (subjects.cancel, True))
    yield from ((subjects.worker(nobody), False), (subjects.peer(nobody), False))
    yield from ((f"{feed}.worker.{nobody}", True), (f"{feed}.known.{nobody}", True))
    keys = {
        BUCKET: [f"{FEED}.worker.{nobody}", f"{FEED}.known.{nobody}", f"{HEARTBEAT}.{nobody}"],
        AGENTS_BUCKET: [],
    }
    for name in types:
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
    for domain in {names.domain.name, None}:
        for bucket, own in keys.items():
            for request in _jetstream(Domain(domain), names.subjects.bucket(bucket), nobody, own):
                yield request, False
        for stream in (subjects.bucket(BLOBS), subjects.bucket(RESULTS), names.tasks_stream):
            for request in _requests(Domain(domain), stream, nobody):
                yield request, False
        for bucket in (cache_name(subjects, name) for name in names.declaration.caches):
            for request in _jetstream(Domain(domain), bucket, nobody, ()):
                yield request, False
        for stream in (memory_name(subjects, name) for name in names.declaration.memories):
            for request in _requests(Domain(domain), stream, nobody):
                yield request, False
    for name in names.declaration.memories:
        yield from ((subjects.memory(name, nobody), False), (subjects.remembered(name, nobody), False))
    yield subjects.blob(nobody, "0"), True


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
