"""Checks of `natsrt doctor`: durable topics, the agent types that are behind, and dead letters."""

from __future__ import annotations

from collections.abc import Mapping

from natsrt.errors import NatsrtError, PermissionDenied
from natsrt.jetstream.dead_letter_box import DeadLetterBox
from natsrt.jetstream.registry.view import View
from natsrt.jetstream.stream_reader import StreamReader

from .patient import LIST_AT_MOST, Patient, allowing
from .topics import lag_of, type_of

_CHECK = "durable topics"
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
    behind: dict[str, int] = {}
    for stream, entry in sorted(view.durable.items()):
        info = await reader.info(stream)
        if info is None:
            text = f"the stream {stream} is gone: nothing can be published on {', '.join(entry.patterns)}"
            patient.found(_CHECK, "problem", text, "start a runtime whose setting durable names them; it makes it")
            continue
        patient.found(_CHECK, "ok", f"{stream}: {', '.join(entry.patterns)}; events: {info.state.messages:,}")
        for consumer in await reader.consumers(stream):
            name = type_of(consumer)
            if (lag := lag_of(consumer)) and not view.workers_hosting(name):
                behind[name] = behind.get(name, 0) + lag
    if behind:
        text = f"events wait for agent types that no live worker hosts: {_listed(behind)}"
        advice = "start a worker of each; of a type that is gone for good, remove the consumer with `nats consumer rm`"
        patient.found(_CHECK, "warning", text, advice)


def _listed(counts: Mapping[str, int]) -> str:
    most = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} ({number:,})" for name, number in most[:LIST_AT_MOST]) + (
        ", …" if len(most) > LIST_AT_MOST else ""
    )
