"""Deletes the payloads of events on durable topics that nobody can need any more.

The id of such a payload says which stream has the event, and when the event was stored at the latest. A payload can be
deleted when all of this is true:

1. The oldest message of the stream is younger than that, or there is none. So the stream does not have the event any
   more: its limits have discarded it, or somebody has purged it.
2. No dead letter has the event, and no copy of it is in the stream for another attempt: a dead letter that was
   redriven, a later attempt, a replay.
3. This was so ``blob_ttl`` ago, too: a handler that was given the event then has loaded the payload by now.

What is found too late is still deleted, by the payload's time to live, unless the stream keeps events for ever.

Payloads of reminders are the exception to the first condition: a reminder stays in its stream, and is published there
again and again. Its payload can be deleted when the reminder is gone, and no event that it has published waits to be
handled. Whoever removes or replaces it deletes its payload then; the sweep deletes what could not be deleted at once.
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
from natsrt.jetstream.payload_uses import PayloadUses
from natsrt.jetstream.registry.registry import Registry
from natsrt.jetstream.stream_reader import StreamReader
from natsrt.jetstream.streams import BLOBS, events_name
from natsrt.options import Options
from natsrt.reminder_types import REMINDER_TOPICS
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
        uses: PayloadUses,
    ) -> None:
        self._subjects = subjects
        self._registry = registry
        self._reader = reader
        self._uses = uses
        self._reminders = events_name(subjects, REMINDER_TOPICS.name)
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
                ripe -= await self._used(stream) if ripe else set()
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
            if settled and stream == self._reminders:
                found[stream] = {blob_id for blob_id, _ in settled} - await self._used(stream)
            elif settled and (oldest := await self._oldest(stream)) is not None:
                found[stream] = {blob_id for blob_id, settled_at in settled if settled_at < oldest}
        return found

    async def _used(self, stream: str) -> set[str]:
        """The payloads that something beside the events on the topics of a stream refers to. For reminders, events that
        wait to be handled count too."""
        waiting = await self._uses.by_reminders(stream) if stream == self._reminders else set()
        return waiting | await self._uses.by_copies(stream)  # an event that has failed meanwhile is found there

    async def _oldest(self, stream: str) -> float | None:
        """When the oldest message was stored, in seconds since the epoch; infinity: there is none. None: unknown."""
        info = await self._reader.info(stream)
        if info is None:
            return None
        if not info.state.messages:
            return math.inf
        message = await self._reader.message(stream, info.state.first_seq)
        return None if message is None else message.stored_at
