"""The permissions for what natsrt keeps in JetStream: the registry, keyed agents, large payloads, memories, caches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from natsrt.jetstream.agent_bucket import AGENTS_BUCKET
from natsrt.jetstream.registry.registry import BUCKET
from natsrt.jetstream.streams import BLOBS, cache_name, memory_name

from .declaration import User
from .grant import PUBLISH, SUBSCRIBE, Grant
from .permission_subjects import Names

LARGE: Final = "payloads that are too large for one message"
"""What a permission for payloads by reference is for."""


def registry(names: Names) -> Iterator[Grant]:
    """The registry, where requests to JetStream are allowed."""
    why = "the registry: created by the first worker, read and written"
    yield from bucket(names, BUCKET, why)
    yield Grant(PUBLISH, names.domain.api(f"DIRECT.GET.{names.stream(BUCKET)}"), why)
    yield from reads_bucket(names, BUCKET, why)


def bucket(names: Names, name: str, why: str) -> Iterator[Grant]:
    """A bucket: made, found, written, read by key and purged."""
    stream = names.stream(name)
    yield Grant(PUBLISH, names.domain.publish(f"$KV.{names.subjects.bucket(name)}.>"), why)
    yield Grant(PUBLISH, names.domain.api("INFO"), why)
    for request in ("STREAM.CREATE", "STREAM.INFO", "STREAM.PURGE"):
        yield Grant(PUBLISH, names.domain.api(f"{request}.{stream}"), why)
    if name == AGENTS_BUCKET:  # records are read from the stream's leader
        yield Grant(PUBLISH, names.domain.api(f"STREAM.MSG.GET.{stream}"), why)
    yield Grant(PUBLISH, names.domain.api(f"DIRECT.GET.{stream}.>"), why)


def blobs(names: Names) -> Iterator[Grant]:
    """Payloads by reference, where requests to JetStream are allowed."""
    yield Grant(PUBLISH, names.subjects.blob("*", "*"), LARGE)
    stream = names.subjects.bucket(BLOBS)
    for request in (f"STREAM.CREATE.{stream}", f"STREAM.INFO.{stream}", f"STREAM.PURGE.{stream}"):
        yield Grant(PUBLISH, names.domain.api(request), LARGE)
    yield Grant(PUBLISH, names.domain.api(f"DIRECT.GET.{stream}.>"), LARGE)


def memories_and_caches(names: Names, user: User) -> Iterator[Grant]:
    """Memories and caches."""
    for name in user.memories:
        stream, why = memory_name(names.subjects, name), f"the memory {name}"
        yield Grant(PUBLISH, names.subjects.memory(name), why)
        yield Grant(SUBSCRIBE, names.subjects.remembered(name), why)
        for request in ("STREAM.CREATE", "STREAM.INFO", "STREAM.MSG.GET", "DIRECT.GET"):
            yield Grant(PUBLISH, names.domain.api(f"{request}.{stream}"), why)
    for name in user.caches:
        bucket, why = cache_name(names.subjects, name), f"the cache {name}"
        yield Grant(PUBLISH, names.domain.publish(f"$KV.{bucket}.>"), why)
        for request in ("STREAM.CREATE", "STREAM.INFO", "STREAM.MSG.GET"):
            yield Grant(PUBLISH, names.domain.api(f"{request}.KV_{bucket}"), why)


def reads_bucket(names: Names, name: str, why: str) -> Iterator[Grant]:
    """What reads a bucket as a whole."""
    return reads_stream(names, names.stream(name), why)


def reads_stream(names: Names, stream: str, why: str) -> Iterator[Grant]:
    """Consumers that read a stream once."""
    for request in ("CONSUMER.CREATE", "CONSUMER.INFO", "CONSUMER.MSG.NEXT", "CONSUMER.DELETE"):
        yield Grant(PUBLISH, names.domain.api(f"{request}.{stream}.>"), why)
