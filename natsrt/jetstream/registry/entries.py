"""The registry entries: what is stored in the registry's bucket. Pure values: no I/O.

Keys of the bucket (each part is a token as in `natsrt.wire.subjects`):

======================================================= =============================================================
``r.worker.<worker_id>``                                a live worker; while this entry is missing, the worker's other
                                                        entries are ignored
``r.type.<agent type>.<worker_id>``                     the worker hosts the type
``r.instance.<agent type>.<key>.<worker_id>``           the worker hosts this one registered instance
``r.subscription.<agent type>.<pattern>.<declarer>``    a subscription; the declarer is a worker id, or ``-`` for a
                                                        runtime that does not host the type
``r.known.<agent type>``                                what the type handles; stays when its workers are gone
``hb.<worker_id>``                                      the worker's heartbeat: not republished to the feed; expires
======================================================= =============================================================
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final, Literal

import orjson
from autogen_core import Subscription, TypePrefixSubscription, TypeSubscription
from pydantic import TypeAdapter, ValidationError

from natsrt.errors import CannotDecode
from natsrt.wire.subjects import Subjects, encode_token, plain_prefix

FEED: Final = "r"
"""First token of the keys that are republished to the feed."""
HEARTBEAT: Final = "hb"
"""First token of the keys of heartbeats."""
NOBODY: Final = "-"
"""The declarer of a subscription that stays in force without a live worker."""

RuleKind = Literal["type", "prefix", "custom"]


@dataclass(frozen=True, slots=True)
class WorkerEntry:
    """A worker process. ``started`` is in seconds since the epoch. A ``draining`` worker takes no new messages."""

    worker_id: str
    name: str
    hostname: str
    pid: int
    started: float
    version: str
    draining: bool = False

    @property
    def key(self) -> str:
        return f"{FEED}.worker.{self.worker_id}"


@dataclass(frozen=True, slots=True)
class TypeEntry:
    """An agent type on a worker. ``instances``: the type has registered instances only, no factory."""

    agent_type: str
    worker_id: str
    handles: tuple[str, ...] = ()
    produces: tuple[str, ...] = ()
    keyed: bool = False
    instances: bool = False

    @property
    def key(self) -> str:
        return f"{FEED}.type.{encode_token(self.agent_type)}.{self.worker_id}"


@dataclass(frozen=True, slots=True)
class InstanceEntry:
    """A registered agent instance on a worker."""

    agent_type: str
    agent_key: str
    worker_id: str

    @property
    def key(self) -> str:
        return f"{FEED}.instance.{encode_token(self.agent_type)}.{encode_token(self.agent_key)}.{self.worker_id}"


@dataclass(frozen=True, slots=True)
class KnownEntry:
    """What an agent type handles. Tells a type without a live worker from an unknown type."""

    agent_type: str
    handles: tuple[str, ...] = ()
    produces: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{FEED}.known.{encode_token(self.agent_type)}"


@dataclass(frozen=True, slots=True)
class SubscriptionEntry:
    """A subscription of an agent type. ``subscription_id`` is the id under which it can be removed."""

    agent_type: str
    kind: RuleKind
    pattern: str
    declarer: str
    subscription_id: str

    @property
    def rule(self) -> Rule:
        return Rule(self.agent_type, self.kind, self.pattern)

    @property
    def key(self) -> str:
        return f"{FEED}.subscription.{encode_token(self.agent_type)}.{self.rule.digest}.{self.declarer}"


@dataclass(frozen=True, slots=True)
class Rule:
    """The content of a subscription without its declarer: which topics go to the agent type."""

    agent_type: str
    kind: RuleKind
    pattern: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.kind}\0{self.pattern}".encode("utf-8", "surrogatepass")).hexdigest()[:24]

    def matches(self, topic_type: str) -> bool:
        """Whether the rule takes topics of this type. False for a custom rule: its Subscription object decides."""
        if self.kind == "type":
            return topic_type == self.pattern
        return self.kind == "prefix" and topic_type.startswith(self.pattern)

    def subject(self, subjects: Subjects, key: str | None = None) -> str:
        """The NATS subject to subscribe to, for the whole type or for one instance's ``key``.

        Raises ValueError for a rule that no subject can express: an impossible prefix, or a rule that is too long.
        """
        if self.kind == "custom":
            return subjects.everything
        if self.kind == "prefix":
            return subjects.prefix_filter(self.pattern).subject
        if key is None:
            return subjects.type_filter(self.pattern).subject
        return subjects.instance_type_filter(self.pattern, key).subject

    @classmethod
    def of(cls, subscription: Subscription) -> Rule:
        """The rule of any Subscription.

        Raises ValueError for a prefix that no topic can have, and for a custom class without an ``agent_type``.
        """
        agent_type = getattr(subscription, "agent_type", None)
        if not isinstance(agent_type, str):
            raise ValueError(
                f"{type(subscription).__qualname__} needs an attribute agent_type: the type whose workers serve it"
            )
        if isinstance(subscription, TypeSubscription) and _standard(subscription, TypeSubscription):
            return cls(agent_type, "type", subscription.topic_type)
        if isinstance(subscription, TypePrefixSubscription) and _standard(subscription, TypePrefixSubscription):
            return cls(agent_type, "prefix", plain_prefix(subscription.topic_type_prefix))
        own = type(subscription)
        return cls(agent_type, "custom", f"{own.__module__}.{own.__qualname__}:{subscription.id}")


def _standard(subscription: Subscription, cls: type[Any]) -> bool:
    own = type(subscription)
    return own.is_match is cls.is_match and own.map_to_agent is cls.map_to_agent


RegistryEntry = WorkerEntry | TypeEntry | InstanceEntry | KnownEntry | SubscriptionEntry

_READERS: dict[str, TypeAdapter[Any]] = {
    "worker": TypeAdapter(WorkerEntry),
    "type": TypeAdapter(TypeEntry),
    "instance": TypeAdapter(InstanceEntry),
    "known": TypeAdapter(KnownEntry),
    "subscription": TypeAdapter(SubscriptionEntry),
}


def encode_entry(entry: RegistryEntry) -> bytes:
    """The stored value of a registry entry."""
    return orjson.dumps(entry)


def decode_entry(key: str, value: bytes) -> RegistryEntry:
    """The registry entry under ``key``. Unknown fields are ignored, so that newer runtimes can add some.

    Raises `CannotDecode`.
    """
    kind = key.split(".", 2)[1] if "." in key else ""
    reader = _READERS.get(kind)
    if reader is None:
        raise CannotDecode("a registry entry", f"unknown kind of key {key!r}")
    try:
        entry: RegistryEntry = reader.validate_json(value)
        if entry.key != key:
            raise ValueError(f"its fields belong under {entry.key!r}")
    except ValidationError as error:
        raise CannotDecode(f"the registry entry {key!r}", error.errors()[0]["msg"], value) from None
    except ValueError as error:
        raise CannotDecode(f"the registry entry {key!r}", str(error), value) from None
    return entry
