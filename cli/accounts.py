"""The buckets in an account of their own: what it exports, and what the users' account imports. Pure values, no I/O.

The users' account imports JetStream's requests as those of a JetStream domain, so the setting ``jetstream_domain`` is
all that natsrt needs. Each subject that is exported has one export, since the server sends a message on once for each
import that it matches.

Every import that can change something is a pattern. The server takes the answer to a request for a new message under
its reply subject, and that subject may be one of an import. Then it makes the imported subject from the answer's own
subject, which has none of the tokens that the wildcards stand for, so the answer reaches nothing. An import without
wildcards would be reached. ``tests/test_accounts.py`` shows both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from natsrt.jetstream.agent_bucket import AGENTS_BUCKET
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.registry.registry import BUCKET
from natsrt.wire.subjects import Subjects

from .declaration import USERS_ACCOUNT, Declaration

_REQUESTS: Final = (
    "INFO",
    "STREAM.>",
    "CONSUMER.CREATE.>",
    "CONSUMER.INFO.>",
    "CONSUMER.DELETE.>",
    "DIRECT.GET.*.>",
)
"""Requests to JetStream with one answer."""
_WITH_MANY_ANSWERS: Final = ("CONSUMER.MSG.NEXT.>", "DIRECT.GET.*")
"""A page of a consumer's messages, and a batch of entries."""


@dataclass(frozen=True, slots=True)
class _Service:
    """A subject of the account of the buckets, and the one under which users know it."""

    subject: str
    known_as: str
    many_answers: bool = False


def _services(declaration: Declaration) -> Iterator[_Service]:
    there, here = Domain(None), Domain(declaration.jetstream_domain)
    for request in _REQUESTS:
        yield _Service(there.api(request), here.api(request))
    for request in _WITH_MANY_ANSWERS:
        yield _Service(there.api(request), here.api(request), many_answers=True)
    for bucket in (BUCKET, AGENTS_BUCKET):
        entries = f"$KV.{Subjects(declaration.namespace).bucket(bucket)}.>"
        yield _Service(there.publish(entries), here.publish(entries))
    chunks = Subjects(declaration.namespace).blob("*", "*")
    yield _Service(chunks, chunks)


def _feed(declaration: Declaration) -> str:
    return f"{Subjects(declaration.namespace).registry_feed}.>"


def exports(declaration: Declaration) -> Iterator[str]:
    """What the account of the buckets exports, as nats-server's configuration has it."""
    for service in _services(declaration):
        kind = ", response_type: stream" if service.many_answers else ""
        yield f'{{ service: "{service.subject}"{kind}, accounts: [ {USERS_ACCOUNT} ] }}'
    yield f'{{ stream: "{_feed(declaration)}", accounts: [ {USERS_ACCOUNT} ] }}'


def imports(declaration: Declaration) -> Iterator[str]:
    """What the users' account imports."""
    account = declaration.jetstream_account
    for service in _services(declaration):
        yield f'{{ service: {{ account: {account}, subject: "{service.subject}" }}, to: "{service.known_as}" }}'
    yield f'{{ stream: {{ account: {account}, subject: "{_feed(declaration)}" }} }}'
