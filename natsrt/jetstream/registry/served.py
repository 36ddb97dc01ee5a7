"""The registry as workers tell it: for runtimes that may not read the bucket.

Whoever may send any request to JetStream's API can have its answer delivered to any subject, and so write to every
stream of the account. So callers get no such permission. They ask on ``natsrt.view``, and any worker that is in step
answers from its view. `natsrt.hosting.view_answers` is the other side.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import nats.errors
import orjson

from natsrt.errors import CannotDecode, RegistryUnavailable
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.registry.entries import FEED, HEARTBEAT, KnownEntry
from natsrt.jetstream.registry.origin import Origin
from natsrt.jetstream.registry.pages import ENTRIES, KNOWN, REVISION, Page, Question, Stored, read_page
from natsrt.jetstream.requests import READ, BucketRequests
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire import envelope
from natsrt.wire.failures import decode_answer
from natsrt.wire.subjects import Subjects

_ANSWER_WITHIN = 2.0
"""Seconds for one answer. The worker reads the last revision from the bucket first."""
_RETRY_FOR = 5.0
"""Seconds for which a question is repeated. Workers that have reconnected are in step again within that time."""
_NOBODY_FOR = 1.0
"""Seconds for which it is repeated if nobody listens. Workers that are reconnecting listen again soon."""
_WORKERS = f"{FEED}.worker."


class _Unanswered(nats.errors.Error):
    """One attempt had no answer, for the reason in its text."""


class ServedRegistry:
    """Reads the registry from workers.

    Every method raises `RegistryUnavailable` if no worker lives, or if none is in step for some seconds, and
    `PermissionDenied` if this user may not ask.
    """

    def __init__(self, connection: Connection, subjects: Subjects, options: Options) -> None:
        self._connection = connection
        self._subject = subjects.view
        self.nobody: str = (
            f"no worker has started yet, or none is alive: nobody answers on {self._subject}, so there is nobody to "
            "call. Start a worker first. This user may not read the registry's bucket itself (docs/permissions.md)"
        )
        """The ``reason`` of the `RegistryUnavailable` that says that no worker lives."""
        self.origin: Origin | None = None
        """The registry of the last snapshot; None before, and if the worker did not tell it."""
        self._requests = BucketRequests(
            connection,
            self._subject,
            RegistryUnavailable,
            subscribed=(subjects.registry_feed, options.inbox_prefix),
            domain=Domain(None),
            retry_for=_RETRY_FOR,
        )

    async def read(self, load: Callable[[int, AsyncGenerator[list[Stored], None]], Awaitable[None]]) -> None:
        """Do what `RegistryStore.read` does. All workers count as having heartbeats: workers look after one another."""
        first = await self._ask(Question(ENTRIES))
        self.origin = first.origin
        await load(first.revision, self._pages(first))

    async def _pages(self, page: Page) -> AsyncGenerator[list[Stored], None]:
        """The pages from the first one on. Each may come from another worker, but none from an older view than it."""
        revision = page.revision
        while True:
            beats = [
                Stored(f"{HEARTBEAT}.{one.key[len(_WORKERS) :]}", 0, b"")
                for one in page.entries
                if one.key.startswith(_WORKERS)
            ]
            yield [*page.entries, *beats]
            if not page.more or not page.entries:
                return
            page = await self._ask(Question(ENTRIES, page.entries[-1].key, revision))

    async def is_same(self) -> bool:
        """Whether workers still tell the registry of which the last snapshot was."""
        return (await self._ask(Question(REVISION))).origin == self.origin

    async def last_change(self) -> int:
        """The revision of the last change that the feed announces; 0 for none."""
        return (await self._ask(Question(REVISION))).revision

    async def is_known(self, agent_type: str) -> bool:
        """True if a worker hosted the type lately."""
        return bool(await self.known(agent_type))

    async def known(self, agent_type: str | None = None) -> dict[str, KnownEntry]:
        """What is known of types with or without workers, by type. ``agent_type`` None: of all, which may be many."""
        found: dict[str, KnownEntry] = {}
        after, more = "", True
        while more:
            page = await self._ask(Question(KNOWN, after, agent_type=agent_type))
            found.update((entry.agent_type, entry) for entry in page.known)
            more = page.more and bool(page.known)
            after = page.known[-1].agent_type if more else ""
        return found

    async def some_known(self, limit: int) -> list[str]:
        """Names of types that are known, ``limit`` at most."""
        return [entry.agent_type for entry in (await self._ask(Question(KNOWN))).known[:limit]]

    async def _ask(self, question: Question) -> Page:
        body = envelope.encode(envelope.VIEW, '"id":"question","source":"/"', orjson.dumps(question._asdict()))
        since = asyncio.get_running_loop().time()

        async def attempt() -> Page:
            try:
                message = await self._connection.client.request(
                    self._subject, body, timeout=_ANSWER_WITHIN + self._connection.rtt.allowance
                )
            except nats.errors.NoRespondersError:
                if asyncio.get_running_loop().time() - since > _NOBODY_FOR:
                    raise RegistryUnavailable(READ, self.nobody) from None
                raise _Unanswered("no worker listens") from None
            answer = decode_answer(message.headers, message.data)
            if answer is None or answer.type != envelope.REPLY:
                raise _Unanswered(_reason(answer))
            return read_page(answer.json())

        try:
            return await self._requests.run(READ, attempt, subject=self._subject)
        except CannotDecode as error:
            raise RegistryUnavailable(READ, str(error)) from None
        except RegistryUnavailable as error:
            if error.reason == BucketRequests.SILENT:
                raise RegistryUnavailable(READ, self.nobody) from None
            raise


def _reason(answer: envelope.Envelope | None) -> str:
    """Why a worker did not tell what it sees, in its words."""
    data: Any = None if answer is None else answer.json()
    message = data.get("message") if isinstance(data, dict) else None
    return f"the worker that was asked says: {message}" if isinstance(message, str) else "the answer is no envelope"
