"""The permissions for durable topics and tasks: their streams, consumers, dead letters, results and status."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from natsrt.jetstream.streams import ATTEMPTS, DEAD, RESULTS, events_name
from natsrt.task_types import task_prefix
from natsrt.wire.subjects import encode_token

from .declaration import EVERY, AgentType
from .grant import PUBLISH, SUBSCRIBE, Grant
from .permission_subjects import Names, type_token
from .storage_permissions import reads_stream


def handles_durable(names: Names, types: Sequence[AgentType], every: bool) -> Iterator[Grant]:
    """What a worker needs whose agents have subscriptions to durable topics."""
    topics = {hosted.name: _stored_topics(names, hosted) for hosted in types}
    keyed = {hosted.name for hosted in types if hosted.keyed}
    if every:
        topics, keyed = {EVERY: (EVERY,)}, {EVERY}
    found = {name: names.declaration.streams_of(own) for name, own in topics.items()}
    streams = dict.fromkeys(events_name(names.subjects, one.name) for of_type in found.values() for one in of_type)
    if not streams:
        return
    why = "durable topics: their streams, created by the first worker"
    yield Grant(PUBLISH, names.domain.api("STREAM.NAMES"), why)
    for stream in streams:
        for request in ("STREAM.INFO", "STREAM.CREATE", "STREAM.UPDATE"):
            if request != "STREAM.UPDATE" or stream != names.tasks_stream:  # that one never gets other topics
                yield Grant(PUBLISH, names.domain.api(f"{request}.{stream}"), why)
    for stream in map(names.subjects.bucket, (DEAD, ATTEMPTS)):
        for request in ("STREAM.INFO", "STREAM.CREATE"):
            yield Grant(PUBLISH, names.domain.api(f"{request}.{stream}"), why)
    for name, of_type in found.items():
        for one in of_type:
            yield from _pulls(names, name, events_name(names.subjects, one.name))
            if name in keyed:
                yield from _feeds(names, name, events_name(names.subjects, one.name))
        if of_type:
            yield from _keeps_count(names, name)


def _stored_topics(names: Names, hosted: AgentType) -> tuple[str, ...]:
    """The topics of a type, with those of its tasks."""
    tasks = (f"{task_prefix(hosted.name)}{EVERY}",) if names.declaration.takes_tasks(hosted.name) else ()
    return (*hosted.topics, *tasks)


def _pulls(names: Names, agent_type: str, stream: str) -> Iterator[Grant]:
    """The consumer of an agent type."""
    why = "durable topics: the events of each agent type"
    token = type_token(agent_type)
    for request in ("CREATE", "INFO", "MSG.NEXT", "RESET", "PAUSE"):
        yield Grant(PUBLISH, names.domain.api(f"CONSUMER.{request}.{stream}.{token}"), why)
    yield Grant(PUBLISH, f"$JS.ACK.{stream}.{token}.>", why)
    why = "durable topics: events that are tried again much later"
    yield Grant(PUBLISH, f"{names.subjects.later(stream)}.retry.{token}.*.*", why)
    yield Grant(PUBLISH, names.domain.api(f"DIRECT.GET.{stream}"), why)


def _feeds(names: Names, agent_type: str, stream: str) -> Iterator[Grant]:
    """What the feeder of a keyed type needs in addition."""
    why = "durable topics: the events of keyed agents, fed to their owners"
    token = type_token(agent_type)
    yield Grant(PUBLISH, names.domain.api(f"CONSUMER.UNPIN.{stream}.{token}"), why)


def _keeps_count(names: Names, agent_type: str) -> Iterator[Grant]:
    """Dead letters, and how often events were tried."""
    own = ">" if agent_type == EVERY else f"{encode_token(agent_type)}.>"
    dead, why = f"{names.subjects.dead}.{own}", "durable topics: dead letters"
    yield Grant(PUBLISH, dead, why)
    yield Grant(PUBLISH, names.domain.api(f"DIRECT.GET.{names.subjects.bucket(DEAD)}.{dead}"), why)
    why = "durable topics: attempts to handle events"
    yield Grant(PUBLISH, f"{names.subjects.attempts}.{own}", why)


def looks_after_durable(names: Names) -> Iterator[Grant]:
    """What an operator does with durable topics."""
    for stream in [events_name(names.subjects, one.name) for one in names.declaration.streams]:
        for request in ("STREAM.INFO", "CONSUMER.LIST"):
            yield Grant(PUBLISH, names.domain.api(f"{request}.{stream}"), "durable topics: how far agent types are")
        if stream != names.tasks_stream:
            yield Grant(PUBLISH, names.domain.api(f"STREAM.UPDATE.{stream}"), "durable topics: removed")
        yield Grant(PUBLISH, names.domain.api(f"DIRECT.GET.{stream}"), "durable topics: events, read and replayed")
        again, why = names.subjects.again(stream), "durable topics: events, given to a type again"
        yield Grant(PUBLISH, f"{again}.*", why)
        yield Grant(PUBLISH, f"{again}.redrive.*.*.*", why)
    if names.declaration.takes_tasks(EVERY):
        yield from knows_tasks(names, EVERY)
        yield from submits(names, EVERY)
        results = names.subjects.bucket(RESULTS)
        for stream in (names.tasks_stream, results):
            yield from reads_stream(names, stream, "tasks: all of them, listed")
        yield Grant(PUBLISH, names.domain.api(f"DIRECT.GET.{results}"), "tasks: all of them, listed")
        yield Grant(PUBLISH, names.domain.api(f"STREAM.PURGE.{results}"), "tasks: tried again after they have failed")
        yield Grant(PUBLISH, names.domain.api(f"STREAM.INFO.{results}"), "tasks: results, looked at")
    if names.declaration.streams:
        dead = names.subjects.bucket(DEAD)
        for request in ("STREAM.INFO", "DIRECT.GET", "STREAM.MSG.DELETE"):
            yield Grant(PUBLISH, names.domain.api(f"{request}.{dead}"), "dead letters: read and removed")


def submits(names: Names, agent_type: str) -> Iterator[Grant]:
    """What every user needs who submits tasks to a type."""
    topics, told = names.task_topics(agent_type), "tasks: their results and progress, told by the server"
    yield Grant(PUBLISH, topics, "tasks, submitted")
    yield Grant(PUBLISH, names.task_schedules(agent_type), "tasks, submitted for later")
    yield Grant(SUBSCRIBE, f"{names.subjects.tasks_told}.*.{type_token(agent_type)}.*.*", told)
    yield Grant(PUBLISH, names.subjects.cancel, "cancellations")


def knows_tasks(names: Names, agent_type: str) -> Iterator[Grant]:
    """Results, progress and status of the tasks of a type, read and written in JetStream."""
    results, tasks = names.subjects.bucket(RESULTS), names.tasks_stream
    own = f"{names.subjects.tasks}.*.{type_token(agent_type)}.*.*"
    yield Grant(PUBLISH, own, "tasks: results and progress")
    yield Grant(PUBLISH, names.domain.api(f"DIRECT.GET.{results}.{own}"), "tasks: results and progress")
    why = "tasks: their status"
    yield Grant(PUBLISH, names.domain.api(f"DIRECT.GET.{tasks}.{names.task_topics(agent_type)}"), why)
    yield Grant(PUBLISH, names.domain.api(f"DIRECT.GET.{tasks}.{names.task_schedules(agent_type)}"), why)
    yield Grant(PUBLISH, names.domain.api(f"STREAM.MSG.DELETE.{tasks}"), "tasks: removed when they have ended")


def handles_tasks(names: Names, agent_type: str) -> Iterator[Grant]:
    """What a worker needs for tasks of a type, beside what it needs for other events of streams."""
    yield from knows_tasks(names, agent_type)
    for request in ("STREAM.INFO", "STREAM.CREATE"):
        yield Grant(PUBLISH, names.domain.api(f"{request}.{names.subjects.bucket(RESULTS)}"), "tasks: results")
    yield Grant(SUBSCRIBE, names.asks_tasks(agent_type), "tasks: questions of callers about results")
