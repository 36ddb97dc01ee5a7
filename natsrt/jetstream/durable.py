"""The streams of durable topics: declared in the registry, made, and compared with what is declared.

The registry decides which topics are durable. A runtime whose setting ``durable`` names topics adds them there, then
makes their stream, or adds their subjects to it. Other runtimes only read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable
from functools import partial

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import api

from natsrt.durable_types import DurableTopics
from natsrt.errors import NatsrtError, StreamUnavailable
from natsrt.jetstream.buckets import last_messages, purge
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.registry.durable import check_agreement
from natsrt.jetstream.registry.entries import DurableEntry
from natsrt.jetstream.registry.registry import Registry
from natsrt.jetstream.requests import OPEN, BucketRequests
from natsrt.jetstream.streams import (
    ensure_stream,
    events_name,
    events_stream,
    require_settings,
    require_version,
    streams_beside,
    streams_over,
    with_topics_of,
)
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire.filters import covers
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.durable")

_RETRY_FOR = 10.0
"""Seconds for which a request is repeated: a cluster elects a leader within that time."""
_LOOK_WITHIN = 3.0
"""Seconds within which it must be known why a stream does not answer."""
_ONE_REQUEST = 5.0
"""Seconds for one request about what a stream publishes later."""
_OVERLAPS = 10065
"""JetStream's error code for subjects that another stream captures."""

_UNHEARD_FOR = 1.0
"""Seconds for which nobody must have listened on a subject until its stream is told to subscribe again: far longer than
a reconnect or the making of a stream."""
_FORGOTTEN_AFTER = 5.0
"""Seconds after which an earlier report of that kind says nothing any more."""


class DurableStreams:
    """The streams of one namespace, as one runtime makes and uses them."""

    def __init__(self, connection: Connection, subjects: Subjects, options: Options, registry: Registry) -> None:
        self._connection = connection
        self._subjects = subjects
        self._options = options
        self._registry = registry
        self._own: dict[str, DurableTopics] = {events_name(subjects, topics.name): topics for topics in options.durable}
        """What this runtime's setting says, by stream; and what it has added since."""
        self._others = {config.name or "": (config, needs) for config, needs in streams_beside(subjects, options)}
        """The streams beside those of events, and which stream of events needs them; None: all do."""
        self.added: tuple[str, ...] = ()
        """The topics that this runtime made durable when it started; empty if they were so before."""
        self._domain = Domain(options.jetstream_domain)
        self._requests: dict[str, BucketRequests] = {}
        self._unheard: dict[str, float] = {}
        """Since when nobody has listened where a stream says that it does, by the filter of its subjects."""

    async def open(self) -> None:
        """Declare the durable topics of the setting, and make their streams. Has no effect if it names none.

        Raises `DurableConflict` if other runtimes declared something else, `StreamUnavailable` if a stream is not as it
        must be, `ServerTooOld`, and what requests to the registry raise.
        """
        for stream, topics in self._own.items():
            await self._declare(stream, topics)
        if self._own:
            await self._make_others()

    async def add(self, topics: DurableTopics) -> None:
        """Make topics durable that are natsrt's own, if they are not yet. Raises as `open`."""
        stream = events_name(self._subjects, topics.name)
        present = self._registry.view.durable.get(stream)
        if present is None or not present.includes(DurableEntry.of(stream, topics)):
            await self._declare(stream, topics)
            await self._make_others()
        self._own.setdefault(stream, topics)

    async def _declare(self, stream: str, topics: DurableTopics) -> None:
        entry = DurableEntry.of(stream, topics)
        wanted = events_stream(self._subjects, self._options, topics)
        check_agreement(self._registry.view.durable, entry)
        present = self._registry.view.durable.get(stream)
        if present is not None and present.includes(entry) and not self._registry.reads_bucket:
            return  # workers told so, and this user may send no requests to JetStream
        self.require_version("durable topics")
        declared = () if present is None else present.patterns
        self.added += tuple(pattern for pattern in topics.patterns if pattern not in declared)
        await self._run(stream, partial(self._look, wanted))
        await self._registry.declare([entry])
        await self._make(stream)

    async def _make_others(self) -> None:
        for stream, (_, needed_by) in self._others.items():
            if needed_by is None or needed_by in self._registry.view.durable:
                await self._run(stream, partial(self._make_other, stream))

    def require_version(self, feature: str) -> None:
        """Raise `ServerTooOld` if the server lacks what ``feature`` needs."""
        version = self._connection.client.connected_server_version
        require_version((version.major, version.minor), f"{version.major}.{version.minor}.{version.patch}", feature)

    async def purge(self, stream: str, subject: str) -> int:
        """Delete the messages on a subject of a stream. Returns their number.

        Raises `StreamUnavailable`, `PermissionDenied` and `JetStreamRequired`.
        """

        async def request() -> int:
            try:
                return await purge(self._connection.jetstream, stream, subject)
            except nats.js.errors.NotFoundError:  # there is no such stream
                return 0

        needed = self._domain.api(f"STREAM.PURGE.{stream}")
        return await self._requests_to(stream).run(OPEN, request, subject=needed, within=_ONE_REQUEST)

    async def headers(self, stream: str, subject: str) -> list[Msg]:
        """The last message on each subject of a stream that matches ``subject``, in their order, without its data.

        Empty if there is no such stream. Raises as `purge`.
        """

        async def request() -> list[Msg]:
            found: list[Msg] = []
            try:
                pages = last_messages(
                    self._connection.jetstream, stream, subject, timeout=_ONE_REQUEST, headers_only=True
                )
                async with contextlib.aclosing(pages):
                    async for page in pages:
                        found += page
            except nats.js.errors.NotFoundError:
                return []
            return found

        return await self._requests_to(stream).run(OPEN, request, subject=self._domain.api("CONSUMER"))

    def _requests_to(self, stream: str) -> BucketRequests:
        requests = self._requests.get(stream)
        if requests is None:
            requests = self._requests[stream] = BucketRequests(
                self._connection,
                stream,
                partial(_unavailable, stream),
                subscribed=(self._options.inbox_prefix,),
                domain=self._domain,
                retry_for=_RETRY_FOR,
            )
        return requests

    async def release(self, stream: str, subject: str) -> None:
        """Let a stream not capture a subject any more. Has no effect if it does not, or if there is no such stream.

        Raises `StreamUnavailable`, `PermissionDenied` and other errors of requests to JetStream.
        """
        await self._run(stream, partial(self._release, stream, subject))

    async def _release(self, stream: str, subject: str) -> None:
        js = self._connection.jetstream
        try:
            config = (await js.stream_info(stream)).config
        except nats.js.errors.NotFoundError:
            return
        if subject in (config.subjects or ()):
            left = [other for other in config.subjects or () if other != subject]
            await js.update_stream(config.evolve(subjects=left))

    async def mend(self, stream: str, unheard: str | None = None) -> str:
        """Find out why a stream does not answer, and make it again if it is gone and the setting names its topics.

        ``unheard`` is a subject of the stream on which nobody listens, as the server says; None: it says nothing.
        Returns why it cannot store events now; empty if that is not known, or may pass.
        """
        if not self._registry.reads_bucket:
            return ""
        try:
            async with asyncio.timeout(_LOOK_WITHIN + self._connection.rtt.allowance):
                return await self._mend(stream, unheard)
        except NatsrtError as error:
            return str(error) if self._connection.connected else ""
        except (nats.errors.Error, OSError, TimeoutError):
            return ""

    async def mend_other(self, stream: str) -> None:
        """Make a stream again that is not for events, if it is gone. What is wrong with it otherwise is not said."""
        with contextlib.suppress(NatsrtError, nats.errors.Error, OSError, TimeoutError):
            async with asyncio.timeout(_LOOK_WITHIN + self._connection.rtt.allowance):
                await self._make_other(stream)

    async def _mend(self, stream: str, unheard: str | None) -> str:
        declared = self._registry.view.durable.get(stream)
        if declared is None:
            return "its topics are not durable any more"
        wanted = events_stream(self._subjects, self._options, declared.topics)
        try:
            info = await self._connection.jetstream.stream_info(stream)
        except nats.js.errors.NotFoundError:
            if stream not in self._own:
                return "it was deleted. Runtimes whose setting durable names its topics make it again when they start"
            logger.warning("the stream %s was gone with all its events, and is made again", stream)
        else:
            present = info.config.subjects or []
            missing = [subject for subject in wanted.subjects or () if subject not in present]
            if not missing:
                if unheard is not None and (info.cluster is None or info.cluster.leader):
                    await self._listen_again(info.config, unheard)
                return ""
            if stream not in self._own:
                return f"it does not capture {', '.join(missing)}"
        await self._make(stream)
        return ""

    async def _listen_again(self, config: api.StreamConfig, unheard: str) -> None:
        """Have a stream subscribe again where it says that it listens, if nobody has listened there for a moment.

        Where several clients change the subjects of a stream at once, nats-server 2.15 may end the subscription of one
        that its configuration has.
        """
        subjects, now = config.subjects or [], asyncio.get_running_loop().time()
        silent = next((subject for subject in subjects if covers(subject, unheard)), None)
        if silent is None:
            return
        since = self._unheard.get(silent, -math.inf)
        if now - since > _FORGOTTEN_AFTER:
            self._unheard[silent] = now
        elif now - since > _UNHEARD_FOR:
            del self._unheard[silent]
            logger.warning("the stream %s does not listen on %s: it is told to do so again", config.name, silent)
            js = self._connection.jetstream
            await js.update_stream(config.evolve(subjects=[other for other in subjects if other != silent]))
            await js.update_stream(config.evolve(subjects=subjects))

    async def _run(self, stream: str, request: Callable[[], Awaitable[None]]) -> None:
        await self._requests_to(stream).run(OPEN, request)

    async def _look(self, wanted: api.StreamConfig) -> None:
        """Raise `StreamUnavailable` if a stream cannot become as ``wanted``, before anything is declared."""
        stream, js = wanted.name or "", self._connection.jetstream
        try:
            info = await js.stream_info(stream)
        except nats.js.errors.NotFoundError:
            present: list[str] = []
        else:
            present = info.config.subjects or []
            self._require(info, wanted)
        for subject in wanted.subjects or ():
            if subject not in present and (
                others := [name for name in await streams_over(js, subject) if name != stream]
            ):
                raise _overlap(stream, subject, others)

    async def _make(self, stream: str) -> None:
        """Make a stream, or add subjects to it, until it captures all topics that are declared."""
        while True:
            entry = self._registry.view.durable[stream]
            await self._run(stream, partial(self._make_as, events_stream(self._subjects, self._options, entry.topics)))
            # Another runtime may have added topics meanwhile, and have changed the stream before this one did.
            await self._registry.catch_up()
            if self._registry.view.durable.get(stream, entry) == entry:
                return

    async def _make_as(self, wanted: api.StreamConfig) -> None:
        stream, js = wanted.name or "", self._connection.jetstream
        try:
            info = await ensure_stream(js, stream, partial(js.add_stream, wanted))
            self._require(info, wanted)
            present = info.config.subjects or []
            if missing := [subject for subject in wanted.subjects or () if subject not in present]:
                await js.update_stream(info.config.evolve(subjects=[*present, *missing]))
        except nats.js.errors.APIError as error:
            if error.err_code != _OVERLAPS:
                raise
            for subject in wanted.subjects or ():
                if others := [name for name in await streams_over(js, subject) if name != stream]:
                    raise _overlap(stream, subject, others) from None
            raise

    def _require(self, info: api.StreamInfo, wanted: api.StreamConfig) -> None:
        """Raise `StreamUnavailable` if a stream is configured so that natsrt cannot use it, unless it lacks topics."""
        wanted = with_topics_of(self._subjects, info.config, wanted)
        require_settings(info, wanted, partial(_unavailable, wanted.name or ""))

    async def _make_other(self, stream: str) -> None:
        js, (wanted, _) = self._connection.jetstream, self._others[stream]
        info = await ensure_stream(js, stream, partial(js.add_stream, wanted))
        as_it_is = {"max_age": info.config.max_age, "duplicate_window": info.config.duplicate_window}
        require_settings(info, wanted.evolve(**as_it_is), partial(_unavailable, stream))


def _unavailable(stream: str, operation: str, reason: str) -> StreamUnavailable:
    return StreamUnavailable(operation, stream, reason)


def _overlap(stream: str, subject: str, others: list[str]) -> StreamUnavailable:
    return StreamUnavailable(
        OPEN,
        stream,
        f"the stream {', '.join(others)} captures {subject} too, or a part of it, and an event is stored by one stream "
        f"only: remove that subject there (nats stream edit {others[0]} --subjects=…), or declare other topics durable",
    )
