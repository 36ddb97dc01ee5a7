"""What all buckets have in common: how they are made, and how they are read as a whole, in pages."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from typing import Any, Final

import nats.errors
import nats.js.errors
import orjson
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api

from natsrt.jetstream.streams import ensure_stream

MARKER: Final = "Nats-Marker-Reason"
"""Header of the message that the server stores in place of an entry that has expired."""
OPERATION: Final = "KV-Operation"
"""Header of the message that a client stores in place of an entry that it deleted."""
TTL: Final = "Nats-TTL"
"""Header with the time after which a message expires: seconds, or text such as ``6s``."""

_PAGE = 500
"""Messages in one page."""


def is_gone(headers: dict[str, str] | None) -> bool:
    """Whether these are the headers of a message in place of an entry that was deleted or has expired."""
    return headers is not None and (OPERATION in headers or MARKER in headers)


async def ensure_bucket(
    js: JetStreamContext, config: api.KeyValueConfig, *, first_revision: int | None = None
) -> api.StreamInfo:
    """Make the bucket if it is missing. Returns its stream, which may be configured otherwise if it existed already.

    ``first_revision`` is the revision of the first entry of a new bucket; None: 1. Raises what nats-py raises.
    """
    maker = js if first_revision is None else _StartsAt(js, first_revision)
    return await ensure_stream(js, f"KV_{config.bucket}", partial(maker.create_key_value, config))


def created_at(info: api.StreamInfo) -> str:
    """When a bucket was made, to the microsecond: no two buckets are the same there."""
    return info.created.isoformat(timespec="microseconds") if info.created is not None else ""


class _StartsAt(JetStreamContext):
    """Makes streams whose first message has a given sequence. nats-py has no such setting for a bucket."""

    def __init__(self, js: JetStreamContext, first_sequence: int) -> None:
        super().__init__(js._nc, prefix=js._prefix, timeout=js._timeout)
        self._first_sequence = first_sequence

    async def add_stream(self, config: api.StreamConfig | None = None, **params: Any) -> api.StreamInfo:
        assert config is not None
        return await super().add_stream(config.evolve(first_seq=self._first_sequence), **params)


async def last_messages(
    js: JetStreamContext, stream: str, *subjects: str, timeout: float, headers_only: bool = False
) -> AsyncGenerator[list[Msg], None]:
    """The last message of every subject that matches one of ``subjects``, in the order of their sequences, in pages.

    A subject that changes meanwhile comes again, later. Ends after the last message that is stored. ``timeout``:
    seconds for one page. Raises what nats-py raises, also if a message was lost on its way.

    It reads through a consumer, which is deleted at the end, also where the reader stops early or is cancelled. The
    server deletes it 30 s after the last page if that deletion does not arrive.
    """
    config = api.ConsumerConfig(
        filter_subjects=list(subjects) if len(subjects) > 1 else None,
        deliver_policy=api.DeliverPolicy.LAST_PER_SUBJECT,
        ack_policy=api.AckPolicy.NONE,
        headers_only=headers_only,
        inactive_threshold=30.0,
        mem_storage=True,
        num_replicas=1,
    )
    try:
        subscription = await js.pull_subscribe(subjects[0], stream=stream, config=config)
    except BaseException:
        await _delete_consumer(js, stream, config)  # its answer may have been lost
        raise
    try:
        delivered = 0
        remaining = (await subscription.consumer_info()).num_pending or 0
        while remaining:
            try:
                messages = await subscription.fetch(min(remaining, _PAGE), timeout=timeout)
            except TimeoutError:
                if (await subscription.consumer_info()).num_pending:
                    raise
                return  # the rest was deleted meanwhile
            for message in messages:
                delivered += 1
                sequence = message.metadata.sequence
                if sequence.consumer != delivered:
                    raise nats.js.errors.ConsumerSequenceMismatchError(sequence.stream, delivered, sequence.consumer)
            remaining = messages[-1].metadata.num_pending
            yield messages
    finally:
        await _delete_consumer(js, stream, config)
        await subscription.unsubscribe()


async def _delete_consumer(js: JetStreamContext, stream: str, config: api.ConsumerConfig) -> None:
    """Have the server delete the consumer, without waiting for its answer. nats-py has put its name into ``config``."""
    if config.name is not None:
        with suppress(nats.errors.Error, OSError):  # of a connection that was closed
            await js._nc.publish(f"{js._prefix}.CONSUMER.DELETE.{stream}.{config.name}", b"")


async def purge(js: JetStreamContext, stream: str, subject: str, before: int | None = None) -> int:
    """Delete all messages of the subject, which may be a pattern; with ``before`` only those of a lower sequence.

    Needs no room, so it works where JetStream is full. Returns the number of messages that were deleted. Raises what
    nats-py raises.
    """
    question = {"filter": subject} if before is None else {"filter": subject, "seq": before}
    request = f"{js._prefix}.STREAM.PURGE.{stream}"
    message = await js._nc.request(request, orjson.dumps(question), timeout=js._timeout)
    answer = orjson.loads(message.data)
    if "error" in answer:
        raise nats.js.errors.APIError.from_error(answer["error"])
    return int(answer.get("purged", 0))
