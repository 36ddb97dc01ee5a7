"""What the users of a natsrt system do: the agent types, and who hosts, calls and publishes what. Pure values, no I/O.

A declaration is written in TOML. Names of agent types and topics are AutoGen's; ``"*"`` stands for all of them, and a
topic that ends in ``*`` for all topics that start with what is before it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from autogen_core import AgentId, TopicId
from pydantic import TypeAdapter, ValidationError

from natsrt.durable_types import DurableTopics, is_prefix
from natsrt.errors import ConfigurationError
from natsrt.jetstream.recorder import record_tree
from natsrt.options.values import Durable
from natsrt.plain import checked_subject
from natsrt.storage import check_limits
from natsrt.task_types import TASK_TOPICS
from natsrt.wire.subjects import Subjects, inbox_problem, service_problem

Role = Literal["worker", "caller", "publisher", "client", "operator", "tool", "recorder", "keeper"]

ROLES: Final[tuple[Role, ...]] = get_args(Role)
RUNTIMES: Final = ("worker", "caller", "publisher", "operator", "tool")
"""The roles that run natsrt, with the registry. A client is any NATS client, which sends plain bodies; a recorder only
listens; a keeper uses memories and caches alone."""
EVERY: Final = "*"
USERS_ACCOUNT: Final = "AGENTS"
"""The account of the users where the buckets have an account of their own."""

_MAY: Mapping[str, frozenset[str]] = {
    "worker": frozenset(
        {"hosts", "calls", "publishes", "controls", "subscribes", "submits", "requests", "offers", "memories", "caches"}
    ),
    "caller": frozenset({"calls", "publishes", "controls", "submits", "requests"}),
    "publisher": frozenset({"publishes"}),
    "client": frozenset({"calls", "publishes", "requests", "offers"}),
    "operator": frozenset(),
    "tool": frozenset({"calls", "publishes", "subscribes"}),
    "recorder": frozenset({"records"}),
    "keeper": frozenset({"memories", "caches"}),
}
"""The lists that the table of a user may have, by role."""
_USUAL: Mapping[str, frozenset[str]] = {
    **_MAY,
    "worker": _MAY["worker"] - {"submits", "requests", "offers", "memories", "caches"},
    "caller": frozenset({"calls", "publishes"}),
    "client": frozenset(),
    "recorder": frozenset(),
    "keeper": frozenset(),
}
"""The lists that a user has who was not declared. What such a client calls is not known: no client calls all. Nor are
the names of memories and caches."""
_LISTS = (
    "hosts",
    "calls",
    "publishes",
    "controls",
    "subscribes",
    "submits",
    "records",
    "requests",
    "offers",
    "memories",
    "caches",
)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_NKEY = re.compile(r"U[A-Z2-7]{55}")

EXAMPLE: Final = """\
# Who does what. `natsrt auth conf FILE` makes the permissions of it.
namespace = ""

[types.public]

[users.worker]
role = "worker"
hosts = ["*"]
calls = ["*"]
publishes = ["*"]
controls = ["*"]

[users.caller]
role = "caller"
calls = ["*"]
publishes = ["*"]

[users.client]
role = "client"
calls = ["public"]

[users.operator]
role = "operator"
"""
"""The four users of ``docs/permissions.md``."""


@dataclass(frozen=True, slots=True)
class AgentType:
    """An agent type.

    ``keyed``: one live instance per id. ``instances``: it exists as registered instances, each with its own subject.
    ``subscribes``: the topics that its agents take, beside the direct one, ``<type>:``, that AutoGen adds to each type.
    """

    name: str
    keyed: bool = False
    instances: bool = False
    subscribes: tuple[str, ...] = ()

    @property
    def topics(self) -> tuple[str, ...]:
        """All topics of its agents."""
        return (f"{self.name}:{EVERY}", *self.subscribes)


@dataclass(frozen=True, slots=True)
class User:
    """A user of the server, and what the programs that connect as this user do.

    ``hosts``, ``calls`` and ``controls`` are agent types: those that it hosts, those that it sends messages to, and
    those whose state it reads and writes on other workers; ``submits`` are those that it submits tasks to, whose
    results it reads, and whose tasks it cancels. ``publishes`` are topics; ``subscribes`` too, for tools that look at
    them and for workers that add subscriptions later. ``records`` are the streams in which a recorder stores what
    passes. ``requests`` and ``offers`` are subjects of plain NATS services, as they are: those that it sends requests
    to, and those on which it offers services. ``memories`` and ``caches`` are the names of those that it uses.
    ``nkey`` is its public key; empty: it has a password.
    """

    name: str
    role: Role
    hosts: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    publishes: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    subscribes: tuple[str, ...] = ()
    submits: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()
    offers: tuple[str, ...] = ()
    memories: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()
    inbox_prefix: str = ""
    nkey: str = ""

    @property
    def inbox(self) -> str:
        """The prefix of its reply subjects; no other user has the same."""
        return self.inbox_prefix or f"_INBOX_{self.name}"

    @property
    def is_runtime(self) -> bool:
        """True if it runs natsrt."""
        return self.role in RUNTIMES

    @property
    def password_variable(self) -> str:
        """The variable of the server's environment that has its password; empty if it has none."""
        return "" if self.nkey else f"{self.name.upper().replace('-', '_')}_PASSWORD"


@dataclass(frozen=True, slots=True)
class Declaration:
    """Agent types and users of one namespace.

    ``jetstream_domain`` is where the buckets are; empty: where one is. ``jetstream_account`` is their account, whose
    JetStream the users' account imports under the name of that domain; empty: they are in the users' account.
    ``durable`` are the durable topics.
    """

    types: Mapping[str, AgentType] = field(default_factory=dict)
    users: Mapping[str, User] = field(default_factory=dict)
    namespace: str = ""
    jetstream_domain: str = ""
    jetstream_account: str = ""
    durable: tuple[DurableTopics, ...] = ()

    @property
    def streams(self) -> tuple[DurableTopics, ...]:
        """All topics that streams store: the durable ones, and those of tasks if a user submits some."""
        return (*self.durable, TASK_TOPICS) if any(user.submits for user in self.users.values()) else self.durable

    def takes_tasks(self, agent_type: str) -> bool:
        """Whether a user submits tasks to an agent type; of ``"*"``, whether to any."""
        submitted = {name for user in self.users.values() for name in user.submits}
        return bool(submitted) if agent_type == EVERY else not submitted.isdisjoint({agent_type, EVERY})

    @property
    def record_streams(self) -> tuple[str, ...]:
        """The streams of records."""
        return tuple(dict.fromkeys(stream for user in self.users.values() for stream in user.records))

    @property
    def memories(self) -> tuple[str, ...]:
        """The names of memories."""
        return tuple(dict.fromkeys(name for user in self.users.values() for name in user.memories))

    @property
    def caches(self) -> tuple[str, ...]:
        """The names of caches."""
        return tuple(dict.fromkeys(name for user in self.users.values() for name in user.caches))

    def streams_of(self, topics: Iterable[str]) -> list[DurableTopics]:
        """The durable topics that are among these topics, or of which some are."""
        topics = tuple(topics)
        return [
            durable
            for durable in self.streams
            if any(overlap(topic, _as_topic(pattern)) for topic in topics for pattern in durable.patterns)
        ]

    def of(self, names: Iterable[str]) -> list[AgentType]:
        """The agent types with these names; all that are declared if ``names`` has ``"*"``."""
        names = tuple(names)
        return list(self.types.values()) if EVERY in names else [self.types[name] for name in names]

    def keyed_takers(self, topics: Iterable[str]) -> list[AgentType]:
        """The keyed types that are subscribed to one of these topics."""
        topics = tuple(topics)
        return [
            taker
            for taker in self.types.values()
            if taker.keyed and any(overlap(topic, own) for topic in topics for own in taker.topics)
        ]


def _as_topic(pattern: str) -> str:
    """A pattern of durable topics, as a declaration has topics."""
    return f"{pattern}{EVERY}" if is_prefix(pattern) else pattern


def overlap(one: str, other: str) -> bool:
    """Whether there is a topic type that both of these mean."""
    exact = [topic for topic in (one, other) if not topic.endswith(EVERY)]
    if len(exact) == 2:
        return one == other
    if exact:
        return exact[0].startswith((other if exact[0] is one else one)[:-1])
    return one.startswith(other[:-1]) or other.startswith(one[:-1])


def of_role(role: Role, namespace: str, inbox_prefix: str) -> Declaration:
    """A declaration with one user of a role, named after it, which does all that such users usually do."""
    everything: dict[str, Any] = {key: (EVERY,) for key in _LISTS if key in _USUAL[role]}
    return Declaration({}, {role: User(role, role, inbox_prefix=inbox_prefix, **everything)}, namespace)


# -- reading -----------------------------------------------------------------------------------------------------------


def parse(text: str, where: str, namespace: str | None = None) -> Declaration:
    """Read a declaration. ``where`` names its file in errors, ``namespace`` replaces the declared one.

    Raises ConfigurationError, which names what is wrong and what may be there.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(where, f"it is not TOML: {error}") from None
    _only(where, data, ("namespace", "jetstream_domain", "jetstream_account", "durable", "types", "users"))
    namespace = _text(where, data, "namespace") if namespace is None else namespace
    subjects = Subjects(namespace)  # raises where it cannot be one
    types = {
        name: _agent_type(f"{where}: types.{name}", name, table, subjects)
        for name, table in _tables(where, data, "types")
    }
    users = {
        name: _user(f"{where}: users.{name}", name, table, subjects) for name, table in _tables(where, data, "users")
    }
    if not users:
        raise ConfigurationError(where, "it declares no user: add a table such as [users.worker] with a role")
    _check_names(where, types, users)
    inboxes = [user.inbox for user in users.values()]
    for name, user in users.items():
        _check_services(f"{where}: users.{name}", user, namespace, inboxes)
    domain, account = _jetstream(where, data)
    durable = _durable(f"{where}: durable", data.get("durable", []))
    declared = Declaration(types, users, namespace, domain, account, durable)
    if declared.streams and account:
        problem = f"streams store what is published in their own account only, and jetstream_account is {account}"
        raise ConfigurationError(f"{where}: {'durable' if durable else 'submits'}", problem)
    if account and (declared.memories or declared.caches):
        problem = f"they are in the account of their users, and jetstream_account is {account}"
        raise ConfigurationError(f"{where}: {'memories' if declared.memories else 'caches'}", problem)
    return declared


def _durable(where: str, value: object) -> tuple[DurableTopics, ...]:
    """The durable topics, as the setting ``durable`` has them."""
    try:
        return tuple(TypeAdapter[Any](Durable).validate_python(value))
    except ValidationError as error:
        raise ConfigurationError(where, error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def _jetstream(where: str, data: Mapping[str, Any]) -> tuple[str, str]:
    """The domain of the buckets, and their account."""
    domain, account = _text(where, data, "jetstream_domain"), _text(where, data, "jetstream_account")
    if account and not domain:
        problem = f"it needs jetstream_domain, the name under which the users' account knows the JetStream of {account}"
        raise ConfigurationError(f"{where}: jetstream_account", problem)
    if account and (account == USERS_ACCOUNT or not _NAME.fullmatch(account)):
        problem = f"{account!r} is not letters, digits, _ and -, beginning with a letter, or is the users' account"
        raise ConfigurationError(f"{where}: jetstream_account", problem)
    return domain, account


def _agent_type(where: str, name: str, table: Mapping[str, Any], subjects: Subjects) -> AgentType:
    if problem := agent_type_problem(name, subjects):
        raise ConfigurationError(where, problem)
    _only(where, table, ("keyed", "instances", "subscribes"))
    flags = {flag: table.get(flag, False) for flag in ("keyed", "instances")}
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigurationError(f"{where}.{flag}", f"{value!r} is neither true nor false")
    topics = _texts(where, table, "subscribes")
    _check_topics(f"{where}.subscribes", topics, subjects)
    return AgentType(name, subscribes=topics, **flags)


def _user(where: str, name: str, table: Mapping[str, Any], subjects: Subjects) -> User:
    if not _NAME.fullmatch(name):
        raise ConfigurationError(where, "a user's name is letters, digits, _ and -, and begins with a letter")
    role = table.get("role")
    if role not in ROLES:
        raise ConfigurationError(f"{where}.role", f"{role!r} is none of {', '.join(ROLES)}")
    _only(where, table, ("role", "inbox_prefix", "nkey", *(key for key in _LISTS if key in _MAY[role])))
    lists = {key: _texts(where, table, key) for key in _LISTS}
    for key in ("publishes", "subscribes"):
        _check_topics(f"{where}.{key}", lists[key], subjects)
    for stream in lists["records"]:
        try:
            record_tree(subjects, stream)
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}.records", error.problem) from None
    for key in ("memories", "caches"):
        for kept in lists[key]:
            try:
                check_limits(kept)
            except ConfigurationError as error:
                raise ConfigurationError(f"{where}.{key}", error.problem) from None
    for topic in lists["publishes"]:
        if not is_exact(topic):
            raise ConfigurationError(f"{where}.publishes", _inexact(topic))
    inbox, nkey = _text(where, table, "inbox_prefix"), _text(where, table, "nkey")
    if nkey and not _NKEY.fullmatch(nkey):
        raise ConfigurationError(f"{where}.nkey", "the public NKEY of a user is U and 55 letters and digits")
    user = User(name, role, inbox_prefix=inbox, nkey=nkey, **lists)
    if problem := inbox_problem(user.inbox, subjects.namespace):
        raise ConfigurationError(f"{where}.inbox_prefix", problem)
    return user


def _tables(where: str, data: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    tables = data.get(key, {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigurationError(f"{where}: {key}", f"it must hold tables, such as [{key}.name]")
    return list(tables.items())


def _only(where: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
    known = tuple(known)
    if unknown := [key for key in table if key not in known]:
        raise ConfigurationError(f"{where}: {unknown[0]}", f"there may be {', '.join(known)}")


def _text(where: str, table: Mapping[str, Any], key: str) -> str:
    value = table.get(key, "")
    if not isinstance(value, str):
        raise ConfigurationError(f"{where}: {key}", f"{value!r} is not text")
    return value


def _texts(where: str, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ConfigurationError(f"{where}.{key}", f"{value!r} is not a list of names")
    return tuple(dict.fromkeys(value))


def _check_topics(where: str, topics: Iterable[str], subjects: Subjects) -> None:
    for topic in topics:
        if problem := topic_problem(topic, subjects):
            raise ConfigurationError(where, problem)


def agent_type_problem(name: str, subjects: Subjects) -> str:
    """Why there can be no agent type of this name; empty if there can be one."""
    try:
        AgentId(name, EVERY)
    except ValueError:
        return f"{name!r} cannot be an agent type: AutoGen's are letters, digits and _ - ."
    return topic_problem(f"{name}:{EVERY}", subjects)


def _check_services(where: str, user: User, namespace: str, inboxes: Sequence[str]) -> None:
    """Check the subjects of plain NATS services. ``inboxes`` are the prefixes of all users' reply subjects.

    A subject may have wildcards, since it is a permission for all services that its user asks or offers, but it may
    include none that no service has. A user offers what `natsrt.contrib.services.offer_service` takes. It may also ask
    agents of other namespaces, which are plain services to it.
    """
    for key, namespaces in (("requests", (namespace,)), ("offers", ("", namespace))):
        for subject in getattr(user, key):
            try:
                problem = service_problem(checked_subject(subject, wildcards=True), namespaces, inboxes)
            except ValueError as error:
                raise ConfigurationError(f"{where}.{key}", str(error)) from None
            if problem:
                right = "services have subjects of their own, such as 'weather.get' or 'weather.>'"
                raise ConfigurationError(f"{where}.{key}", f"{subject!r} {problem}; {right}")


def topic_problem(topic: str, subjects: Subjects) -> str:
    """Why a declaration cannot have this topic; empty if it can."""
    try:
        topic_subject(subjects, topic)
    except ValueError as error:
        return str(error)
    return ""


def is_exact(topic: str) -> bool:
    """Whether a subject means just the topics that ``topic`` means.

    NATS compares whole tokens: it has no subject for all topics that start with ``news``, as ``newsletter`` does.
    """
    return not topic.endswith(EVERY) or topic == EVERY or Subjects().prefix_filter(topic[:-1]).exact


def _inexact(topic: str) -> str:
    start = topic[:-1]
    wider = start[: max(start.rfind("."), start.rfind(":")) + 1] + EVERY
    return (
        f"no permission of NATS means just {topic!r}, which would have to be {wider!r}: write {start!r} for that "
        f"topic, {start + '.*'!r} for those below it, or {wider!r} if all of these are meant"
    )


def topic_subject(subjects: Subjects, topic: str) -> str:
    """The subject of all events on the topics that ``topic`` means, with any source. Raises ValueError as there."""
    if topic == EVERY:
        return subjects.everything
    if topic.endswith(EVERY):
        return subjects.prefix_filter(topic[:-1]).subject
    return subjects.type_filter(TopicId(topic, EVERY).type).subject


def _check_names(where: str, types: Mapping[str, AgentType], users: Mapping[str, User]) -> None:
    for user in users.values():
        for key in ("hosts", "calls", "controls", "submits"):
            for name in getattr(user, key):
                if name != EVERY and name not in types:
                    raise ConfigurationError(
                        f"{where}: users.{user.name}.{key}", f"the type {name!r} is not declared: add [types.{name}]"
                    )
    inboxes: dict[str, str] = {}
    variables: dict[str, str] = {}
    for user in users.values():
        variable = user.password_variable
        if variable and (other := variables.setdefault(variable, user.name)) != user.name:
            problem = f"its password would be in ${variable}, as that of {other} is: rename one of them"
            raise ConfigurationError(f"{where}: users.{user.name}", problem)
        for inbox, owner in inboxes.items():
            if not are_apart(user.inbox, inbox):
                raise ConfigurationError(
                    f"{where}: users.{user.name}.inbox_prefix",
                    f"{user.inbox} and {inbox}, that of {owner}, are not apart: each could read the other's replies",
                )
        inboxes[user.inbox] = user.name


def are_apart(one: str, other: str) -> bool:
    """Whether neither of two inbox prefixes has the other's inboxes below it."""
    return not f"{one}.".startswith(f"{other}.") and not f"{other}.".startswith(f"{one}.")


def may_have(role: Role, key: str) -> bool:
    """Whether the table of a user with this role may have a list."""
    return key in _MAY[role]
