"""``natsrt auth record``: a declaration of what a running system does.

Rules:

1. Agent types, their subscriptions and the workers that host them are read from the registry, whether they are used
   meanwhile or not. Calls, events and control are what was seen while it listened: nothing else tells of them.
2. A message belongs to the user in whose inbox its reply subject is, or that of an earlier message of the same runtime.
   Each user has an inbox prefix of its own where permissions are in force. Where all have the same one, workers are
   told apart by their names, and all other runtimes count as one user.
3. What it writes can be read as a declaration, whatever was sent: names, topics and inbox prefixes that no declaration
   may have are left out, and users that no permissions could keep apart are one.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import click
import orjson
from autogen_core import TopicId
from nats.aio.msg import Msg

from natsrt.errors import CannotDecode
from natsrt.jetstream.registry.entries import DurableEntry, Rule, WorkerEntry
from natsrt.jetstream.registry.view import View
from natsrt.task_types import TASK_TOPICS, task_of, task_prefix
from natsrt.transport.connection import Refusal
from natsrt.wire import envelope
from natsrt.wire.envelope import Envelope
from natsrt.wire.subjects import Subjects, decode_token, inbox_problem

from .connecting import Connecting, connects
from .declaration import EVERY, AgentType, Role, User, agent_type_problem, are_apart, may_have, topic_problem
from .exits import Exit
from .moments import Duration
from .output import line, note

_SHARED = "_INBOX"
"""NATS's own inbox prefix, which all users have that were given no other one."""
_NOT_A_NAME = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(slots=True)
class _Seen:
    """What one user was seen to do."""

    is_runtime: bool = False
    inbox_prefix: str = _SHARED
    hosts: dict[str, None] = field(default_factory=dict)
    calls: dict[str, None] = field(default_factory=dict)
    publishes: dict[str, None] = field(default_factory=dict)
    controls: dict[str, None] = field(default_factory=dict)
    submits: dict[str, None] = field(default_factory=dict)

    def add(self, other: _Seen) -> None:
        """Add what another one did."""
        self.is_runtime |= other.is_runtime
        for mine, theirs in (
            (self.hosts, other.hosts),
            (self.calls, other.calls),
            (self.publishes, other.publishes),
            (self.controls, other.controls),
            (self.submits, other.submits),
        ):
            mine.update(theirs)

    def user(self, name: str) -> User:
        """The user, with a name."""
        shared = self.inbox_prefix == _SHARED
        return User(name, self.role, inbox_prefix="" if shared else self.inbox_prefix)

    @property
    def role(self) -> Role:
        if self.hosts:
            return "worker"
        if not self.is_runtime:
            return "client"
        return "caller" if self.calls or self.controls or self.submits else "publisher"


class Recording:
    """What was seen so far. No I/O."""

    def __init__(self, subjects: Subjects) -> None:
        self._subjects = subjects
        self._trees = {tree: subjects.agent("x")[:-1].replace("agent", tree) for tree in ("agent", "natsrt.control")}
        self._users: dict[str, _Seen] = {}
        self._types: dict[str, AgentType] = {}
        self._durable: tuple[DurableEntry, ...] = ()
        self._workers: dict[str, str] = {}
        """The user of each worker, by the start of its reply subjects."""
        self._runtimes: dict[str, str] = {}
        """The user of each runtime, by the start of its message ids."""
        self._unnamed: dict[str, _Seen] = {}
        """What runtimes did whose user is not known yet, in the same way."""
        self._senders: dict[str, str] = {}
        """An agent type of which such a runtime sent a message."""
        self.unread = 0
        """Messages that cannot be read."""

    def registered(self, view: View) -> None:
        """Take in what the registry says. May be called again."""
        self._durable = tuple(entry for entry in view.durable.values() if entry.patterns != TASK_TOPICS.patterns)
        for agent_type, hosts in view.hosts.items():
            if agent_type_problem(agent_type, self._subjects):
                continue
            for worker_id, entry in hosts.items():
                worker = view.workers.get(worker_id)
                if worker is not None and self._can_be_inbox(worker.inbox.rpartition(".")[0] or _SHARED):
                    self._user_of(worker).hosts[agent_type] = None
                known = self._types.get(agent_type, AgentType(agent_type))
                declared = (topic for topic in _topics(agent_type, view.declared.get(agent_type, ())))
                heard = (topic for topic in declared if not topic_problem(topic, self._subjects))
                rules = dict.fromkeys((*known.subscribes, *heard))
                self._types[agent_type] = AgentType(
                    agent_type, known.keyed or entry.keyed, known.instances or entry.instances, tuple(rules)
                )

    def _user_of(self, worker: WorkerEntry) -> _Seen:
        prefix = worker.inbox.rpartition(".")[0] or _SHARED
        name = _name(worker.name if prefix == _SHARED else prefix)
        self._workers[worker.inbox] = name
        seen = self._users.setdefault(name, _Seen(inbox_prefix=prefix))
        seen.is_runtime = True
        return seen

    def take(self, message: Msg) -> None:
        """Take in a message on a subject below ``agent``, ``topic`` or ``natsrt.control``."""
        try:
            body = envelope.decode(message.data)
            self._take(message.subject, message.reply, body)
        except (CannotDecode, ValueError):
            self.unread += 1

    def _take(self, subject: str, reply: str, body: Envelope | None) -> None:
        kind = envelope.CALL if body is None else body.type
        if (agent := self._agent_type(subject, "natsrt.control")) is not None:
            self._types.setdefault(agent, AgentType(agent))
            self._sender(reply, body).controls[agent] = None
        elif (agent := self._agent_type(subject, "agent")) is not None:
            self._types.setdefault(agent, AgentType(agent))
            seen = self._sender(reply, body)
            if kind == envelope.CALL:
                seen.calls[agent] = None
        else:
            claims = (None, None) if body is None else (body.text("topictype"), body.text("topicsource"))
            topic, _ = self._subjects.parse_topic(subject, topic_type=claims[0], source=claims[1])
            TopicId(topic, EVERY)  # raises ValueError where it is no topic
            if problem := topic_problem(topic, self._subjects):
                raise ValueError(problem)
            seen, task = self._sender(reply, body), task_of(TopicId(topic, EVERY))
            if task is None:
                seen.publishes[topic] = None
            else:
                self._types.setdefault(task.agent.type, AgentType(task.agent.type))
                seen.submits[task.agent.type] = None

    def _agent_type(self, subject: str, tree: str) -> str | None:
        """The agent type in a subject, None if it is in another tree. Raises ValueError if it cannot be one."""
        start = self._trees[tree]
        if not subject.startswith(start):
            return None
        name = decode_token(subject[len(start) :].partition(".")[0])
        if problem := agent_type_problem(name, self._subjects):
            raise ValueError(problem)
        return name

    def _can_be_inbox(self, prefix: str) -> bool:
        return not inbox_problem(prefix, self._subjects.namespace)

    def _sender(self, reply: str, body: Envelope | None) -> _Seen:
        runtime = "" if body is None else (body.text("id") or "").rpartition("-")[0]
        name = self._runtimes.get(runtime) if runtime else None
        if reply:
            root = reply.rpartition(".")[0]
            prefix = root.rpartition(".")[0] or root or reply
            if not self._can_be_inbox(prefix):
                raise ValueError(f"{prefix} cannot be the prefix of inboxes")
            name = self._workers.get(root) or self._named(prefix, body)
            if runtime:
                self._runtimes.setdefault(runtime, name)
        if name is None and body is not None and runtime:
            self._senders[runtime] = (body.text("source") or "").partition("/")[0]
            return self._unnamed.setdefault(runtime, _Seen(is_runtime=True))
        name = name or self._named(_SHARED, body)
        seen = self._users.setdefault(name, _Seen(inbox_prefix=prefix if reply else _SHARED))
        seen.is_runtime |= body is not None
        return seen

    def _named(self, prefix: str, body: Envelope | None) -> str:
        return _name(("client" if body is None else "caller") if prefix == _SHARED else prefix)

    def _name_runtimes(self) -> None:
        """Give what runtimes did to their users: by a reply subject that was seen since, or by the agent that sent."""
        for runtime, done in self._unnamed.items():
            hosts = (user for user, seen in self._users.items() if self._senders[runtime] in seen.hosts)
            name = self._runtimes.get(runtime) or next(hosts, "publisher")
            self._users.setdefault(name, _Seen(is_runtime=True)).add(done)
        self._unnamed.clear()

    def _apart(self) -> dict[str, _Seen]:
        """The users, each with a name, inboxes and a password's variable that no other one has.

        Those of whose inboxes some are below others' are one user.
        """
        users: dict[str, _Seen] = {}
        variables: set[str] = set()
        for name, seen in sorted(self._users.items(), key=lambda one: (one[1].user(one[0]).inbox, one[0])):
            inbox = seen.user(name).inbox
            if same := next((own for own, kept in users.items() if not are_apart(kept.user(own).inbox, inbox)), None):
                users[same].add(seen)
                continue
            names = (name, *(f"{name}-{number}" for number in range(2, 2 * len(self._users) + 3)))
            free = next(
                one
                for one in names
                if seen.user(one).password_variable not in variables
                and all(are_apart(kept.user(own).inbox, seen.user(one).inbox) for own, kept in users.items())
            )
            users[free] = seen
            variables.add(seen.user(free).password_variable)
        return users

    def _durable_line(self) -> list[str]:
        """The durable topics: their patterns, and the names of their streams."""
        tables = [
            f"{{patterns = {orjson.dumps(entry.patterns).decode()}, name = {_text(entry.name)}}}"
            for entry in self._durable
            if entry.name is not None
        ]
        plain = [_text(pattern) for entry in self._durable if entry.name is None for pattern in entry.patterns]
        return [f"durable = [{', '.join([*plain, *tables])}]"] if self._durable else []

    def toml(self, namespace: str) -> str:
        """The declaration, in TOML."""
        self._name_runtimes()
        lines = [f"namespace = {_text(namespace)}", *self._durable_line()]
        for agent_type in sorted(self._types.values(), key=lambda one: one.name):
            lines += ["", f"[types.{_text(agent_type.name)}]"]
            lines += [f"{flag} = true" for flag in ("keyed", "instances") if getattr(agent_type, flag)]
            lines += _list("subscribes", agent_type.subscribes)
        for name, seen in sorted(self._apart().items()):
            lines += ["", f"[users.{_text(name)}]", f"role = {_text(seen.role)}"]
            if seen.inbox_prefix not in (_SHARED, User(name, seen.role).inbox):
                lines.append(f"inbox_prefix = {_text(seen.inbox_prefix)}")
            lists = {
                "hosts": seen.hosts,
                "calls": seen.calls,
                "publishes": seen.publishes,
                "controls": seen.controls,
                "submits": seen.submits,
            }
            for key, values in lists.items():
                if may_have(seen.role, key):
                    lines += _list(key, values)
                elif values:
                    lines.append(f"# It may not have this, as a {seen.role}: {_list(key, values)[0]}")
        return "\n".join(lines) + "\n"


def _topics(agent_type: str, rules: Iterable[Rule]) -> Iterable[str]:
    """The topics of an agent type's subscriptions, as a declaration has them."""
    patterns = {"type": "{}", "prefix": "{}" + EVERY, "custom": EVERY}
    written = (patterns[rule.kind].format(rule.pattern) for rule in rules)
    own = (*AgentType(agent_type).topics, f"{task_prefix(agent_type)}{EVERY}")
    return [topic for topic in written if topic not in own]


def _name(text: str) -> str:
    """The name of a user: what follows ``_INBOX_`` in its inbox prefix, or the name of its worker."""
    name = _NOT_A_NAME.sub("-", text.removeprefix(f"{_SHARED}_")).strip("-_")
    return name if name[:1].isalpha() else f"user-{name}".rstrip("-")


def _text(value: str) -> str:
    return orjson.dumps(value).decode()  # JSON's texts are TOML's, too


def _list(key: str, values: Iterable[str]) -> list[str]:
    values = sorted(values)
    return [f"{key} = {orjson.dumps(values).decode()}"] if values else []


@click.command()
@click.option("--for", "duration", type=Duration(), help="How long to listen: 60, 5m. Until Ctrl-C if not given.")
@connects()
def record(connecting: Connecting, duration: float | None) -> int:
    """Print a declaration of what the users of a running system do.

    Listens to calls, events and control messages, and reads the registry. Let it listen until everything has happened
    once: what it does not see is not declared, except agent types, their hosts and their subscriptions. Read what it
    prints before you use it.

    Its user must be allowed to subscribe to agent.>, topic.> and natsrt.control.>, as workers are.
    """
    return asyncio.run(_record(connecting, duration))


async def _record(connecting: Connecting, duration: float | None) -> int:
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with connecting.runtime() as runtime:
        subjects, session = Subjects(runtime.options.namespace), runtime.running
        recording = Recording(subjects)
        refused: list[Refusal] = []
        root = f"{subjects.namespace}." if subjects.namespace else ""
        session.connection.on_denied(refused.append)
        for subject in (f"{root}agent.>", f"{root}topic.>", f"{root}natsrt.control.>"):
            await session.connection.subscribe(subject, recording.take, optional=True)
        await session.connection.barrier()
        if denied := next((one for one in refused if one.operation == "subscribe to"), None):
            raise denied
        note("recording until Ctrl-C" if duration is None else f"recording for {duration:g} s; Ctrl-C ends it sooner")
        recording.registered(session.registry.view)
        with suppress(TimeoutError):
            async with asyncio.timeout(duration):
                while not ended.is_set():
                    recording.registered(session.registry.view)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(ended.wait(), 1.0)
        recording.registered(session.registry.view)
    if recording.unread:
        note(f"natsrt: {recording.unread} messages could not be read, and are not part of it", "warning")
    line(recording.toml(runtime.options.namespace).rstrip())
    return Exit.OK
