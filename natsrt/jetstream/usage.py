"""How much of JetStream's limits is used. Pure values: no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

from nats.js import api

Usage: TypeAlias = dict[str, tuple[int, int]]
"""What is used of each limit, and the limit. The name is that of an account or a bucket, and of NATS's setting."""

NEARLY: Final = 0.8
"""The share of a limit from which on it is nearly reached."""
REACHED: Final = 0.95
"""The share of a limit from which on it counts as reached: what is larger than the rest finds no room."""


def of_account(account: api.AccountInfo) -> Usage:
    """The usage of an account's limits; of each tier where they are given by the number of replicas."""
    usage = _limited("account", _of_totals(account))
    for name, tier in (account.tiers or {}).items():
        usage |= _limited(f"account {name}", _of_totals(tier))
    return usage


def _of_totals(totals: api.AccountInfo | api.Tier) -> Iterator[tuple[str, int | None, int | None]]:
    limits = totals.limits
    yield "max_file", totals.storage, limits.max_storage
    yield "max_mem", totals.memory, limits.max_memory
    yield "max_streams", totals.streams, limits.max_streams
    yield "max_consumers", totals.consumers, limits.max_consumers


def of_stream(info: api.StreamInfo) -> Usage:
    """The usage of a bucket's limits."""
    state, config = info.state, info.config
    bucket = (config.name or "").removeprefix("KV_")
    return _limited(
        bucket,
        (
            ("max_bytes", state.bytes, config.max_bytes),
            ("max_msgs", state.messages, config.max_msgs),
            ("max_consumers", state.consumer_count, config.max_consumers),
        ),
    )


def _limited(owner: str, uses: Iterable[tuple[str, int | None, int | None]]) -> Usage:
    """Those of the ``uses``, each a name with what is used and the limit, that have a limit: one above 0."""
    return {f"{owner}: {name}": (used or 0, limit) for name, used, limit in uses if limit is not None and limit > 0}
