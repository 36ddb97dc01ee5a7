"""What the registry stores. Pure values: no I/O.

Keys of the bucket (each part is a token as in `natsrt.wire.subjects`):

======================================================= =============================================================
``r.worker.<worker_id>``                                a live worker; while it is missing, its other entries count
                                                        for nothing
``r.type.<agent type>.<worker_id>``                     the worker hosts the type
``r.instance.<agent type>.<key>.<worker_id>``           the worker hosts this one registered instance
``r.subscription.<agent type>.<pattern>.<declarer>``    a subscription; the declarer is a worker id, or ``-`` for
                                                        runtimes that do not host the type
``r.known.<agent type>``                                what the type handles; outlives workers that are killed. Read
                                                        only when somebody asks for the type
``r.durable.<stream>``                                  the durable topics of a stream, and its policy; no worker has to
                                                        keep it alive
``hb.<worker_id>``                                      the worker's heartbeat: outside the feed, expires by itself
``reserve.<n>``                                         room that is freed where JetStream is full, so that a worker
                                                        can still register, renew its heartbeat, and leave
======================================================= =============================================================
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Final, Literal

import orjson
from autogen_core import Subscription, TypePrefixSubscription, TypeSubscription
from pydantic import Strict, TypeAdapter, ValidationError

from natsrt.durable_types import DurableTopics
from natsrt.errors import CannotDecode, ConfigurationError
from natsrt.wire.envelope import BLOBS_FEATURE
from natsrt.wire.subjects import Subjects, encode_token, plain_prefix

FEED: Final = "r"
HEARTBEAT: Final = "hb"
RESERVE: Final = "reserve"
KNOWN: Final = f"{FEED}.known."
"""Start of the keys of the types that are known."""
PEER: Final = "peer"
"""Feature: the worker answers other workers' questions on ``natsrt.peer.<worker_id>``."""
CANCEL: Final = "cancel"
"""Feature: the worker tells the runtime that made a token, in its inbox, that a copy of it was cancelled."""
CONFIRM: Final = "confirm"
"""Feature: the worker answers an event of a stream that it gets for a keyed agent, and handles it once."""
FEATURES: Final = (PEER, CANCEL, CONFIRM, BLOBS_FEATURE)
"""What this version's workers understand."""
NOBODY: Final = "-"
"""The declarer of a subscription that no worker has to keep alive."""

MOST_DETAILS: Final = 16_384
"""Bytes that the details of an agent type may have as JSON. Every runtime keeps them in memory, for each worker."""

_STREAM_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")

RuleKind = Literal["type", "prefix", "custom"]


@dataclass(frozen=True, slots=True)
class WorkerEntry:
    """A worker process.

    ``started`` is in seconds since the epoch; one that is ``draining`` takes nothing new. ``features`` are what it
    understands beyond the first form of the protocol, see `FEATURES`. ``inbox`` is the start of all its reply
    subjects, without the last dot; empty if it does not say.
    """

    worker_id: str
    name: str
    hostname: str
    pid: Annotated[int, Strict()]
    started: Annotated[float, Strict()]
    version: str
    draining: Annotated[bool, Strict()] = False
    features: tuple[str, ...] = ()
    inbox: str = ""

    @property
    def key(self) -> str:
        return f"{FEED}.worker.{self.worker_id}"


@dataclass(frozen=True, slots=True)
class TypeEntry:
    """An agent type on a worker.

    ``instances``: it exists as registered instances only. ``details``: what its worker says about it for programs that
    know what to make of it, as a JSON object; see `checked_details`.
    """

    agent_type: str
    worker_id: str
    handles: tuple[str, ...] = ()
    produces: tuple[str, ...] = ()
    keyed: Annotated[bool, Strict()] = False
    instances: Annotated[bool, Strict()] = False
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)

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
    """What an agent type handles, so that "known, but nobody alive" can be told from "unknown"."""

    agent_type: str
    handles: tuple[str, ...] = ()
    produces: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{FEED}.known.{encode_token(self.agent_type)}"


@dataclass(frozen=True, slots=True)
class SubscriptionEntry:
    """A subscription of an agent type. ``subscription_id`` is the id under which it can be removed.

    If it has no declarer, runtimes that do not host the type declared it, and share the entry. ``declarations`` are
    their subscription ids, by runtime; the last one is also the ``subscription_id``.
    """

    agent_type: str
    kind: RuleKind
    pattern: str
    declarer: str
    subscription_id: str
    declarations: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def is_shared(self) -> bool:
        """True if no worker has to keep it alive, so that several runtimes may have declared it."""
        return self.declarer == NOBODY

    @property
    def declared(self) -> Mapping[str, str]:
        """`declarations`, also of an entry that a runtime stored which does not know them."""
        return self.declarations or {NOBODY: self.subscription_id}

    def includes(self, other: SubscriptionEntry) -> bool:
        """True if every declaration of ``other``, an entry of the same rule, is among those of this one."""
        return other.declared.items() <= self.declared.items()

    @property
    def rule(self) -> Rule:
        return Rule(self.agent_type, self.kind, self.pattern)

    @property
    def key(self) -> str:
        return f"{FEED}.subscription.{encode_token(self.agent_type)}.{self.rule.digest}.{self.declarer}"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a subscription says, without who declared it: which topics go to the agent type."""

    agent_type: str
    kind: RuleKind
    pattern: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.kind}\0{self.pattern}".encode("utf-8", "surrogatepass")).hexdigest()[:24]

    def matches(self, topic_type: str) -> bool:
        """Whether the rule takes topics of this type. A custom rule is decided by its Subscription object instead."""
        if self.kind == "type":
            return topic_type == self.pattern
        return self.kind == "prefix" and topic_type.startswith(self.pattern)

    def subject(self, subjects: Subjects, key: str | None = None) -> str:
        """The NATS subject to subscribe to, for the whole type or for one instance's ``key``.

        Raises ValueError for a rule that no subject can express: an impossible prefix, or one that is too long.
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


@dataclass(frozen=True, slots=True)
class DurableEntry:
    """The durable topics of one ``stream``, and its policy: the arguments of `natsrt.DurableTopics` under their names.

    Runtimes share it, and it stays until an operator removes it.
    """

    stream: str
    patterns: tuple[str, ...]
    name: str | None = None
    max_age: Annotated[float, Strict()] | None = None
    max_bytes: Annotated[int, Strict()] | None = None
    max_messages: Annotated[int, Strict()] | None = None
    storage: Literal["file", "memory"] = "file"
    replicas: Annotated[int, Strict()] | None = None
    discard: Literal["old", "new"] = "old"

    @classmethod
    def of(cls, stream: str, topics: DurableTopics) -> DurableEntry:
        return cls(stream, topics.patterns, topics.name, **topics.policy)

    @property
    def topics(self) -> DurableTopics:
        """Raises `ConfigurationError` for values that `natsrt.DurableTopics` refuses."""
        return DurableTopics(
            *self.patterns,
            name=self.name,
            max_age=self.max_age,
            max_bytes=self.max_bytes,
            max_messages=self.max_messages,
            storage=self.storage,
            replicas=self.replicas,
            discard=self.discard,
        )

    def includes(self, other: DurableEntry) -> bool:
        """True if this entry has every pattern of ``other``, an entry of the same stream, and the same policy."""
        return {*other.patterns} <= {*self.patterns} and replace(other, patterns=self.patterns) == self

    @property
    def key(self) -> str:
        return f"{FEED}.durable.{self.stream}"


RegistryEntry = WorkerEntry | TypeEntry | InstanceEntry | KnownEntry | SubscriptionEntry | DurableEntry

_READERS: dict[str, TypeAdapter[Any]] = {
    "worker": TypeAdapter(WorkerEntry),
    "type": TypeAdapter(TypeEntry),
    "instance": TypeAdapter(InstanceEntry),
    "known": TypeAdapter(KnownEntry),
    "subscription": TypeAdapter(SubscriptionEntry),
    "durable": TypeAdapter(DurableEntry),
}


def encode_entry(entry: RegistryEntry) -> bytes:
    if isinstance(entry, TypeEntry) and not entry.details:  # as participants have written it that know no details
        return orjson.dumps({one.name: getattr(entry, one.name) for one in fields(entry) if one.name != "details"})
    return orjson.dumps(entry)


def checked_details(details: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """``details`` of an agent type, if the registry can keep them; None: there are none. Raises ValueError."""
    if details is None:
        return {}
    try:
        body = orjson.dumps(details)
        exact = isinstance(details, dict) and orjson.loads(body) == details
    except TypeError as error:
        raise ValueError(f"details must be a dict of JSON values: {error}") from None
    if not exact:
        raise ValueError("details must be a dict of JSON values: text, numbers, booleans, None, lists and dicts")
    if len(body) > MOST_DETAILS:
        raise ValueError(f"details have {len(body):,} bytes as JSON, and may have {MOST_DETAILS:,}")
    return details


def decode_entry(key: str, value: bytes) -> RegistryEntry:
    """The entry under ``key``; raises `CannotDecode`.

    Unknown fields are ignored, so that a newer runtime can add some. A field that is null is missing: some languages
    write an empty list so.
    """
    kind = key.split(".", 2)[1] if "." in key else ""
    reader = _READERS.get(kind)
    if reader is None:
        raise CannotDecode("a registry entry", f"unknown kind of key {key!r}")
    try:
        tree = orjson.loads(value)
        if isinstance(tree, dict):
            tree = {name: item for name, item in tree.items() if item is not None}
        entry: RegistryEntry = reader.validate_python(tree)
        if entry.key != key:
            raise ValueError(f"its fields belong under {entry.key!r}")
        if isinstance(entry, DurableEntry):
            _ = entry.topics
            if not _STREAM_NAME.fullmatch(entry.stream):
                raise ValueError("its stream has no valid name")
    except ConfigurationError as error:
        raise CannotDecode(f"the registry entry {key!r}", error.problem, value) from None
    except ValidationError as error:
        problems = (_problem(one["type"], one["loc"], one["msg"]) for one in error.errors(include_input=False))
        raise CannotDecode(f"the registry entry {key!r}", "; ".join(problems), value) from None
    except ValueError as error:
        raise CannotDecode(f"the registry entry {key!r}", str(error), value) from None
    return entry


_MUST_BE: Final = {
    "string_type": "must be a text",
    "tuple_type": "must be a list of texts",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "mapping_type": "must be an object",
}
"""What a field must be, in the words of JSON, by the kind of the error."""


def _problem(kind: str, place: tuple[int | str, ...], text: str) -> str:
    """What is wrong with one field of an entry, or with the whole entry if ``place`` is empty."""
    if not place:
        return text
    name = repr(".".join(map(str, place)))
    if kind == "missing":
        return f"the field {name} is missing"
    return f"the field {name}{f' {_MUST_BE[kind]}' if kind in _MUST_BE else f': {text}'}"
