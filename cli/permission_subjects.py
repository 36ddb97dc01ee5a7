"""The subjects and streams of a declaration, as its permissions have them. Pure values, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from natsrt.jetstream.domains import Domain
from natsrt.jetstream.streams import events_name
from natsrt.task_types import TASK_TOPICS, task_prefix
from natsrt.wire.subjects import Subjects, encode_token

from .declaration import EVERY, AgentType, Declaration, topic_subject


def type_token(agent_type: str) -> str:
    """An agent type in a subject; ``"*"``: all of them."""
    return EVERY if agent_type == EVERY else encode_token(agent_type)


class Names:
    """The subjects and streams of a declaration."""

    def __init__(self, declaration: Declaration) -> None:
        self.declaration: Declaration = declaration
        self.subjects: Subjects = Subjects(declaration.namespace)
        self.domain: Domain = Domain(declaration.jetstream_domain or None)
        self.root: str = f"{declaration.namespace}." if declaration.namespace else ""
        """The start of all its subjects."""

    def worker_ids(self, kind: str) -> str:
        """The subjects of all workers: for callers (``worker``), or for other workers (``peer``)."""
        return f"{self.root}natsrt.{kind}.*"

    def agents(self, names: Iterable[str], *, locates: bool = True) -> Iterator[str]:
        """The subjects of agent types, and those of their single agents.

        Of keyed agents only if the user ``locates`` their owners, as natsrt does. Workers forward what clients send.
        """
        names = tuple(names)
        if EVERY in names:
            yield f"{self.root}agent.>"
            return
        for found in self.declaration.of(names):
            if not found.instances:
                yield self.subjects.agent(found.name)
            if found.instances or (found.keyed and locates):
                yield f"{self.subjects.agent(found.name)}.*"

    def control_of(self, agent_type: AgentType) -> str:
        """Where single agents of a type are controlled."""
        subject = self.subjects.control(agent_type.name)
        if agent_type.keyed:
            return f"{subject}.at.*"
        return f"{subject}.*" if agent_type.instances else subject

    def stream(self, bucket: str) -> str:
        """The stream of a bucket."""
        return f"KV_{self.subjects.bucket(bucket)}"

    @property
    def tasks_stream(self) -> str:
        """The stream of all tasks."""
        return events_name(self.subjects, TASK_TOPICS.name)

    def asks_tasks(self, agent_type: str) -> str:
        """Where workers answer questions about the results of tasks of a type."""
        return f"{self.root}natsrt.tasks.{type_token(agent_type)}"

    def task_topics(self, agent_type: str) -> str:
        """The subject of all tasks of a type."""
        prefix = TASK_TOPICS.patterns[0] if agent_type == EVERY else task_prefix(agent_type)
        return topic_subject(self.subjects, f"{prefix}{EVERY}")

    def task_schedules(self, agent_type: str) -> str:
        """The subject of all tasks of a type that wait for their time."""
        tasks = self.task_topics(agent_type).removeprefix(f"{self.root}topic.")
        return f"{self.subjects.later(self.tasks_stream)}.event.*.{tasks}"
