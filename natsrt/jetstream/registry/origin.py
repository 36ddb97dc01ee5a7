"""Which registry a change comes from. Pure values: no I/O.

The feed of one JetStream domain crosses to the others, over leaf nodes, although their buckets have nothing in common.
So every entry is stored with its registry's `Origin` in a header, and the feed tells it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

ORIGIN: Final = "Natsrt-Registry"
"""Header of an entry, and of a deletion: the registry in which it was stored."""
ANSWER: Final = "Natsrt-Registry-Answer"
"""Header of a worker's entry that is stored again because another registry was heard of, by a worker that has looked
whether its own bucket is still the one that it knows."""


@dataclass(frozen=True, slots=True)
class Origin:
    """One registry.

    ``created`` is when its bucket was made, in ISO 8601, UTC, with microseconds: so it is the registry's id, and of two
    the greater one is newer. ``domain`` is its JetStream domain, for people; empty if it has none or is not known.
    """

    created: str
    domain: str = ""

    def __str__(self) -> str:
        return f"{self.created} {self.domain}".rstrip()

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Origin | None:
        """The origin in the headers of a change; None if its writer told none, as older participants do."""
        return cls.read(headers.get(ORIGIN, ""))

    @classmethod
    def read(cls, text: str) -> Origin | None:
        """The origin from its text; None for the empty text."""
        created, _, domain = text.partition(" ")
        return cls(created, domain) if created else None

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return f"in JetStream domain {self.domain!r}" if self.domain else "in a JetStream without a domain"


def conflict(own: Origin, other: Origin, bucket: str) -> str:
    """What is wrong if both registries are in reach of one another, and what to do."""
    hub, leaf = (own, other) if own.created < other.created else (other, own)
    named = repr(hub.domain) if hub.domain else "the older one's domain, which has to get a name"
    where = f", those in {leaf.domain!r}" if leaf.domain else ""
    return (
        f"There are two registries {bucket}: this runtime's is {own.place}, and another one, made at {other.created}, "
        f"is {other.place}. Keyed agents could live in both at once. To have one registry, set jetstream_domain to "
        f"{named} for the programs that use the newer one{where}. To have two, give each side a namespace."
    )
