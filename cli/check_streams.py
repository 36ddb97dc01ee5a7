"""The checks of `natsrt doctor` of streams beside those of events: payloads, results of tasks, and records."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

import nats.errors
import nats.js.errors
from nats.js import api

from natsrt.errors import ConfigurationError, NatsrtError
from natsrt.jetstream.recorder import record_tree, wrong_records
from natsrt.jetstream.registry.view import View
from natsrt.jetstream.stream_settings import Wrong, described, remedy, wrong_settings
from natsrt.jetstream.streams import (
    BLOBS,
    MAKE_BLOBS_AGAIN,
    RESULTS,
    blobs_stream,
    events_name,
    results_stream,
    streams_over,
)
from natsrt.jetstream.usage import of_stream
from natsrt.task_types import TASK_TOPICS

from .check_jetstream import found_usage
from .patient import Level, Patient, allowing

_MAKE_RESULTS_AGAIN = "delete the stream, with all results, and let natsrt make it"
_PAYLOADS, _TASKS, _RECORDS = "large payloads", "tasks", "records"
_NEARLY = 0.95
"""The part of a stream's limit from which it counts as full."""


async def check_blobs(patient: Patient) -> None:
    """Check the stream of payloads if there is one: it is made on first use."""
    stream = patient.subjects.bucket(BLOBS)
    info = await _info(patient, _PAYLOADS, stream)
    if info is None:
        return
    text = f"the stream {stream} has {info.state.bytes:,} bytes in {info.state.messages:,} chunks"
    _compare(patient, _PAYLOADS, info, blobs_stream(patient.subjects, patient.options), MAKE_BLOBS_AGAIN, text)
    found_usage(patient, of_stream(info))


async def check_results(patient: Patient, view: View) -> None:
    """Check the stream of the results of tasks, if tasks were ever submitted."""
    if events_name(patient.subjects, TASK_TOPICS.name) not in view.durable:
        return
    stream = patient.subjects.bucket(RESULTS)
    info = await _info(patient, _TASKS, stream, missing=lambda: f"the stream {stream} is gone, with all results")
    if info is not None:
        text = f"the stream {stream} has {info.state.messages:,} results and reports of progress"
        wanted = results_stream(patient.subjects, patient.options)
        _compare(patient, _TASKS, info, wanted, _MAKE_RESULTS_AGAIN, text)


async def check_records(patient: Patient) -> None:
    """Say whether the streams of `natsrt record` can store records, how full they are, and when they last did.

    Only of those that this user may ask for. Other streams that store the same subjects are not meant.
    """
    subjects = f"{patient.subjects.view.removesuffix('view')}record.>"
    try:
        streams = await patient.ask(streams_over(patient.connection.jetstream, subjects))
    except (NatsrtError, nats.errors.Error, nats.js.errors.Error, TimeoutError):
        return
    for stream in streams:
        try:
            tree = record_tree(patient.subjects, stream)
        except ConfigurationError:
            continue
        answer = await patient.request(f"{patient.connection.jetstream._prefix}.STREAM.INFO.{stream}")
        if answer is None or "error" in answer:
            continue
        config = answer["config"]
        if any(subject.startswith(f"{tree}.") for subject in config.get("subjects") or ()):
            wrong = wrong_records(patient.subjects, stream, api.StreamConfig.from_response(dict(config)))
            patient.found(_RECORDS, *judge_record(stream, config, answer["state"], wrong, time.time()))


def judge_record(
    stream: str, config: Mapping[str, Any], state: Mapping[str, Any], wrong: list[Wrong], now: float
) -> tuple[Level, str, str]:
    """What a stream's configuration and state, as the server tells them, mean for its records.

    ``wrong`` are the settings with which no recorder uses it; ``now`` is the time in seconds since the epoch.
    """
    if wrong:
        text = f"{described(stream, wrong)}: natsrt record refuses it"
        return "problem", text, remedy(stream, wrong, "record into another stream")
    text = f"the stream {stream} has {state['messages']:,} records in {state['bytes']:,} bytes"
    if state["messages"]:
        at = state["last_ts"][:19]  # whole seconds, in UTC
        age = max(0, int(now - datetime.fromisoformat(f"{at}+00:00").timestamp()))
        text += f", the last one of {at}Z, {timedelta(seconds=age)} ago"
    for name, used in (("max_bytes", state["bytes"]), ("max_msgs", state["messages"])):
        limit = config.get(name) or 0
        if limit > 0 and used >= _NEARLY * limit:
            what = "no more records are stored" if config.get("discard") == "new" else "the oldest records are dropped"
            advice = f"raise {name} with `nats stream edit {stream}`, or record into another stream"
            return "warning", f"{text}; {name} is {limit:,}, so {what}", advice
    return "ok", text, ""


async def _info(
    patient: Patient, check: str, stream: str, missing: Callable[[], str] | None = None
) -> api.StreamInfo | None:
    """The stream's configuration and state; None if it cannot be had, which is said. ``missing``: what is said if there
    is no such stream; None: nothing."""
    try:
        return await patient.ask(patient.connection.jetstream.stream_info(stream))
    except nats.js.errors.NotFoundError:
        if missing is not None:
            patient.found(check, "problem", missing(), "a worker makes it again when it stores the next result")
    except (NatsrtError, nats.errors.Error, TimeoutError) as error:
        if patient.denied:
            text = f"refused: this user may not ask for the stream {stream}"
            patient.found(check, "skipped", text, allowing(patient))
        else:
            patient.found(check, "warning", f"the stream {stream} cannot be read: {error}")
    return None


def _compare(
    patient: Patient, check: str, info: api.StreamInfo, wanted: api.StreamConfig, otherwise: str, text: str
) -> None:
    """Say ``text``, or what is wrong with the configuration of a stream. ``otherwise`` is as in `remedy`."""
    if wrong := wrong_settings(info.config, wanted):
        stream = info.config.name or ""
        patient.found(check, "problem", described(stream, wrong), remedy(stream, wrong, otherwise))
    else:
        patient.found(check, "ok", text)
