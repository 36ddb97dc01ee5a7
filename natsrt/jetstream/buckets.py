"""What the buckets have in common: being made, and being read as a whole in pages."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Final

import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api

MARKER: Final = "Nats-Marker-Reason"
"""Header of what the server puts in the place of an entry that expired."""
OPERATION: Final = "KV-Operation"
"""Header of what a client puts in the place of an entry that it deleted."""
TTL: Final = "Nats-TTL"

MARKER_TTL: Final = 60.0
"""Seconds for which the server's markers stay."""
_PAGE = 500


def is_gone(headers: dict[str, str] | None) -> bool:
    """Whether a message with these headers tells that the entry was deleted or has expired."""
    return headers is not None and (OPERATION in headers or MARKER in headers)


async def ensure_bucket(js: JetStreamContext, config: api.KeyValueConfig) -> api.StreamInfo:
    """Make the bucket if it is missing. Its stream, which may be configured otherwise where it existed."""
    stream = f"KV_{config.bucket}"
    try:
        return await js.stream_info(stream)
    except nats.js.errors.NotFoundError:
        pass
    try:
        await js.create_key_value(config)
    except nats.js.errors.BadRequestError:  # another runtime made it at the same moment
        pass
    return await js.stream_info(stream)


async def last_messages(
    js: JetStreamContext, stream: str, subject: str, *, timeout: float, headers_only: bool = False
) -> AsyncGenerator[list[Msg], None]:
    """The last message of every subject that matches, in the order of their sequences, in pages.

    What changes meanwhile comes again, later. Ends where nothing more is stored. ``timeout``: seconds for one page.
    Raises what nats-py raises, also where a message was lost on its way.
    """
    subscription = await js.pull_subscribe(
        subject,
        stream=stream,
        config=api.ConsumerConfig(
            deliver_policy=api.DeliverPolicy.LAST_PER_SUBJECT,
            ack_policy=api.AckPolicy.NONE,
            headers_only=headers_only,
            inactive_threshold=30.0,
            mem_storage=True,
            num_replicas=1,
        ),
    )
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
        await subscription.unsubscribe()
