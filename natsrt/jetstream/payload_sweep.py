"""Deletes the payloads of events on durable topics that nobody can need any more.

The id of such a payload says which stream has the event, and when the event was stored at the latest. A payload can be
deleted when all of this is true:

1. The oldest message of the stream is younger than that, or there is none. So the stream does not have the event any
   more: its limits have discarded it, or somebody has purged it.
2. No dead letter has the event, and no copy of it is in the stream for another attempt: a dead letter that was
   redriven, a later attempt, a replay.
3. This was so ``blob_ttl`` ago, too: a handler that was given the event then has loaded the payload by now.

What is found too late is still deleted, by the payload's time to live, unless the stream keeps events for ever.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import defaultdict
from typing import Final

from natsrt.errors import NatsrtError, PermissionDenied
from natsrt.jetstream.blobs import Blobs
from natsrt.jetstream.registry.registry import Registry
from natsrt.jetstream.stream_reader import StreamReader
from natsrt.jetstream.streams import BLOBS, DEAD, own_filters
from natsrt.options import Options
from natsrt.wire import envelope
from natsrt.wire.references import OfEvent, event_of, stream_mark
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.blobs")

_LONGEST_PAUSE: Final = 600.0
"""Seconds between two sweeps, at most. Each asks for the names of all payloads that are stored."""


class PayloadSweep:
    """The sweeps of one worker. Several workers may sweep at the same time."""

    def __init__(
        self,
        subjects: Subjects,
        options: Options,
        registry: Registry,
        reader: StreamReader,
        blobs: Blobs,
    ) -> None:
        self._subjects = subjects
        self._registry = registry
        self._reader = reader
        self._dead = subjects.bucket(DEAD)
        self._blobs = blobs
        self._grace = options.blob_ttl
        self._pause = min(_LONGEST_PAUSE, options.blob_ttl / 2)
        self._gone_since: dict[str, float] = {}
        """The payloads whose events are gone, and since when that is known, by the event loop's clock."""

    async def run(self) -> None:
        """Sweep now and then, until this is cancelled or the server refuses it."""
        while True:
            await asyncio.sleep(self._pause)
            try:
                await self.sweep()
            except PermissionDenied as denied:
                logger.info(
                    "payloads of events that are gone stay until they expire or another worker looks: %s", denied
                )
                return
            except NatsrtError as error:
                logger.debug("payloads of events that are gone stay for now: %s", error)

    async def sweep(self) -> int:
        """Delete what can be deleted now. Returns the number of payloads. Raises as `StreamReader`."""
        now = asyncio.get_running_loop().time()
        deleted = 0
        found: dict[str, float] = {}
        for stream, blob_ids in (await self._candidates()).items():
            found |= {blob_id: self._gone_since.get(blob_id, now) for blob_id in blob_ids}
            ripe = {blob_id for blob_id in blob_ids if now - found[blob_id] >= self._grace}
            try:
                ripe -= await self._referred_to(stream) if ripe else set()
            except PermissionDenied as denied:
                logger.debug("payloads of %s stay while it has dead letters: %s", stream, denied)
                continue
            for blob_id in ripe:
                await self._blobs.remove(blob_id)
                del found[blob_id]
            if ripe:
                logger.info("deleted the payloads of %d events that %s does not have any more", len(ripe), stream)
            deleted += len(ripe)
        self._gone_since = found
        return deleted

    async def _candidates(self) -> dict[str, set[str]]:
        """The payloads whose events are gone from their streams, by stream. Copies of the events may be there."""
        info = await self._reader.info(self._subjects.bucket(BLOBS), self._subjects.blob("*", "0"))
        stored: defaultdict[str, list[tuple[str, OfEvent]]] = defaultdict(list)
        for subject in (info.state.subjects if info is not None else None) or {}:
            blob_id = subject.split(".")[-2]
            if (event := event_of(blob_id)) is not None:
                stored[event.mark].append((blob_id, event))
        found: dict[str, set[str]] = {}
        for stream in list(self._registry.view.durable) if stored else ():
            of_stream = stored.get(stream_mark(stream), ())
            settled = [(blob_id, event.settled_at) for blob_id, event in of_stream if event.settled_at < time.time()]
            if settled and (oldest := await self._oldest(stream)) is not None:
                found[stream] = {blob_id for blob_id, settled_at in settled if settled_at < oldest}
        return found

    async def _oldest(self, stream: str) -> float | None:
        """When the oldest message was stored, in seconds since the epoch; infinity: there is none. None: unknown."""
        info = await self._reader.info(stream)
        if info is None:
            return None
        if not info.state.messages:
            return math.inf
        message = await self._reader.message(stream, info.state.first_seq)
        return None if message is None else message.stored_at

    async def _referred_to(self, stream: str) -> set[str]:
        """The payloads of all dead letters of a stream, and of the events that wait there for a later attempt.

        Dead letters first: what is redriven meanwhile is stored in the stream before it ceases to be a dead letter.
        """
        found: set[str] = set()
        letters = f"{self._subjects.dead}.*.{stream}.>"
        info = await self._reader.info(self._dead, letters)
        if info is not None and info.state.subjects:  # workers may count them, and not all workers may read them
            found |= await self._references(self._dead, letters)
        for subject in own_filters(self._subjects, stream):
            found |= await self._references(stream, subject)
        return found

    async def _references(self, stream: str, subject: str) -> set[str]:
        """The payloads of the events in a stream, on subjects that match ``subject``."""
        read = [envelope.reference_of(message.data) async for message in self._reader.read(stream, subject)]
        return {reference.blob_id for reference in read if reference is not None}
