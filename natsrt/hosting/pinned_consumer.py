"""A consumer from which one client pulls at a time, because the server pins it. Pure values: no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from natsrt.jetstream.consumers import ConsumerConfig

GROUP: Final = "feeder"
"""The priority group of the consumers of keyed types."""
PINNED_FOR: Final = 5.0
"""Seconds after its last pull for which a client stays pinned."""
PIN: Final = "Nats-Pin-Id"
"""Header of what the server delivers to a pinned client."""
WAITS: Final[dict[str, Any]] = {"group": GROUP}
"""Fields of a pull of a client that waits to be pinned."""
_SECOND: Final = 1_000_000_000
_PULL_EVERY: Final = 1.5
"""Seconds after which a pull of the pinned client expires, so that the next one keeps it pinned."""
_HEARTBEAT: Final = 0.75
"""Seconds between the heartbeats of such a pull."""
_SUSPECTS: Final = "natsrt_suspects"
"""The key in a consumer's metadata with the last sequence that a feeder got which has gone, if somebody else has reset
the consumer since."""


def feeding(config: ConsumerConfig) -> ConsumerConfig:
    """The configuration of a consumer from which one client pulls at a time."""
    group = {
        "priority_groups": [GROUP],
        "priority_policy": "pinned_client",
        "priority_timeout": int(PINNED_FOR * _SECOND),
    }
    return replace(config, more={**config.more, **group})


def pulls_with(pin: str) -> dict[str, Any]:
    """Fields of a pull of the client that was pinned with this id."""
    times = {"expires": int(_PULL_EVERY * _SECOND), "idle_heartbeat": int(_HEARTBEAT * _SECOND)}
    return {**WAITS, "id": pin, **times}


def is_pinned(info: dict[str, Any]) -> bool:
    """Whether a client is pinned. ``info`` is JetStream's description of the consumer."""
    groups: Iterable[dict[str, Any]] = info.get("priority_groups") or ()
    return any(group.get("pinned_client_id") for group in groups)


def suspects(info: dict[str, Any], new: int | None = None) -> int:
    """The last sequence that a former feeder got. ``info`` is JetStream's description of the consumer.

    ``new`` is the sequence of a message that was delivered to another client than the former feeder, as the first
    delivery that JetStream knows of. None: there is no such message. After a reset JetStream knows of no earlier ones.
    """
    delivered, text = int(info["delivered"]["stream_seq"]), (info["config"].get("metadata") or {}).get(_SUSPECTS, "0")
    noted = int(text) if text.isdecimal() else 0
    if new is not None and new >= delivered:
        delivered = new - 1
    return max(delivered, noted)


def noting_suspects(config: ConsumerConfig, info: dict[str, Any]) -> ConsumerConfig:
    """The configuration in which that sequence stays known when the consumer is reset."""
    return replace(config, more={**config.more, "metadata": {_SUSPECTS: str(suspects(info))}})
