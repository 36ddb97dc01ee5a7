"""Checks of `natsrt doctor`: durable topics, tasks, the agent types that are behind, and dead letters."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nats.js import api

from natsrt.errors import NatsrtError, PermissionDenied
from natsrt.jetstream.dead_letter_box import DeadLetterBox
from natsrt.jetstream.registry.entries import DurableEntry
from natsrt.jetstream.registry.view import View
from natsrt.jetstream.stream_reader import StreamReader
from natsrt.jetstream.stream_settings import Wrong, described, remedy, wrong_settings
from natsrt.jetstream.streams import events_name, events_stream, topic_filter, with_topics_of
from natsrt.task_types import TASK_TOPICS, is_task, task_prefix

from .patient import LIST_AT_MOST, Patient, allowing
from .topics import lag_of, type_of

_CHECK = "durable topics"
_TASKS = "tasks"
_DEAD = "dead letters"


async def check_durable(patient: Patient, view: View) -> None:
    """Check the streams of durable topics. Has no effect if no topic is durable."""
    if not view.durable:
        return
    reader = StreamReader(patient.connection, patient.options)
    try:
        await _check_streams(patient, view, reader)
        counts = await DeadLetterBox(patient.subjects, reader).count()
    except PermissionDenied:
        text = "refused: this user may not read the streams of durable topics"
        patient.found(_CHECK, "skipped", text, allowing(patient))
    except NatsrtError as error:
        patient.found(_CHECK, "warning", f"a stream cannot be read: {error}")
    else:
        if counts:
            text = f"{sum(counts.values()):,}: {_listed(counts)}"
            advice = "see `natsrt dlq ls`; redrive them when the cause is mended, or remove them"
            patient.found(_DEAD, "warning", text, advice)
        else:
            patient.found(_DEAD, "ok", "none")


async def _check_streams(patient: Patient, view: View, reader: StreamReader) -> None:
    tasks = events_name(patient.subjects, TASK_TOPICS.name)
    waiting_events: dict[str, int] = {}
    waiting_tasks: dict[str, int] = {}
    for stream, entry in sorted(view.durable.items()):
        info = await reader.info(stream)
        if info is None:
            text = f"the stream {stream} is gone: nothing can be published on {', '.join(entry.patterns)}"
            patient.found(_CHECK, "problem", text, "start a runtime whose setting durable names them; it makes it")
            continue
        if wrong := _wrong(patient, info.config, entry):
            patient.found(_CHECK, "problem", described(stream, wrong), remedy(stream, wrong))
        else:
            patient.found(_CHECK, "ok", f"{stream}: {', '.join(entry.patterns)}; events: {info.state.messages:,}")
        lags: dict[str, int] = {}
        for consumer in await reader.consumers(stream):
            lags[type_of(consumer)] = lags.get(type_of(consumer), 0) + lag_of(consumer)
        if stream == tasks:
            lags |= await _never_taken(patient, view, reader, stream, lags)
        waiting = waiting_tasks if stream == tasks else waiting_events
        for name, lag in lags.items():
            if lag and not view.workers_hosting(name):
                waiting[name] = waiting.get(name, 0) + lag
    if waiting_events:
        text = f"events wait for agent types that no live worker hosts: {_listed(waiting_events)}"
        advice = "start a worker of each; of a type that is gone for good, remove the consumer with `nats consumer rm`"
        patient.found(_CHECK, "warning", text, advice)
    if waiting_tasks:
        text = f"tasks wait for agent types that no live worker hosts: {_listed(waiting_tasks)}"
        patient.found(_TASKS, "warning", text, "start a worker of each, or cancel the tasks with `natsrt tasks cancel`")


def _wrong(patient: Patient, present: api.StreamConfig, entry: DurableEntry) -> list[Wrong]:
    """What is wrong with the settings of a stream of events. It may have more topics than are declared."""
    wanted = events_stream(patient.subjects, patient.options, entry.topics)
    if {*(wanted.subjects or ())} <= {*(present.subjects or ())}:
        wanted = with_topics_of(patient.subjects, present, wanted)
    return wrong_settings(present, wanted)


async def _never_taken(
    patient: Patient, view: View, reader: StreamReader, stream: str, known: Collection[str]
) -> dict[str, int]:
    """The number of tasks of each agent type that no worker has ever hosted: it has no consumer, and is not among
    ``known``."""
    found: dict[str, int] = {}
    for name in sorted({one.agent_type for one in view.subscriptions()}.difference(known)):
        if any(is_task(rule.pattern) for rule in view.rules(name)) and not view.workers_hosting(name):
            info = await reader.info(stream, topic_filter(patient.subjects, task_prefix(name)))
            found[name] = 0 if info is None else sum((info.state.subjects or {}).values())
    return found


def _listed(counts: Mapping[str, int]) -> str:
    most = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} ({number:,})" for name, number in most[:LIST_AT_MOST]) + (
        ", …" if len(most) > LIST_AT_MOST else ""
    )
