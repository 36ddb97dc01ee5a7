"""natsrt's streams beside its buckets: their names, their configurations, and how they are made.

Streams of events are named ``natsrt_events``, or ``natsrt_events_<name>`` for topics with a policy of their own. Each
captures the subjects of its topics, ``natsrt.again.<stream>.>`` (events that are stored once more for one agent type),
and ``natsrt.later.<stream>.>`` (what the server publishes later).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import nats.js.errors
import orjson
from nats.js import JetStreamContext, api

from natsrt.durable_types import MONTH, DurableTopics, is_prefix
from natsrt.errors import ConfigurationError, NatsrtError, ServerTooOld
from natsrt.jetstream.stream_settings import ANOTHER_NAME, described, remedy, wrong_settings
from natsrt.options import Options
from natsrt.reminder_types import REMINDER_TOPICS
from natsrt.task_types import TASK_TOPICS
from natsrt.wire.subjects import Subjects

EVENTS: Final = "natsrt_events"
DEAD: Final = "natsrt_dead"
ATTEMPTS: Final = "natsrt_attempts"
BLOBS: Final = "natsrt_blobs"
RESULTS: Final = "natsrt_results"
MEMORY: Final = "natsrt_memory"
CACHE: Final = "natsrt_cache"
NEEDED_VERSION: Final = (2, 14)
"""The first version of nats-server that has all that durable topics need."""
DUPLICATE_WINDOW: Final = 120.0
"""Seconds for which a stream remembers the ids of its messages, if it keeps messages for as long."""
WEEK: Final = 7 * 86400.0
"""Seconds in seven days."""
MAX_CONSUMERS: Final = 10_000
"""Consumers of one stream: one for each agent type that handles its events. The server's own limit is 1,000."""
MAKE_BLOBS_AGAIN: Final = (
    "delete the stream once the events with large payloads on durable topics are handled, and let natsrt make it"
)
"""What to do with the stream of payloads if a setting of it cannot be changed."""
_NAME_IN_USE: Final = 10058
"""JetStream's error code for a stream that exists with another configuration."""


def events_name(subjects: Subjects, name: str | None) -> str:
    """The stream of the topics whose `DurableTopics.name` is ``name``."""
    return subjects.bucket(EVENTS if name is None else f"{EVENTS}_{name}")


def topic_filter(subjects: Subjects, pattern: str) -> str:
    """The subject that matches exactly the topics of a pattern of durable topics.

    Raises `ConfigurationError` if it would be too long.
    """
    try:
        return (subjects.prefix_filter if is_prefix(pattern) else subjects.type_filter)(pattern).subject
    except ValueError as error:
        raise ConfigurationError("durable", str(error)) from None


def own_filters(subjects: Subjects, stream: str) -> list[str]:
    """The subjects of a stream of events that are not topics."""
    return [f"{subjects.again(stream)}.>", f"{subjects.later(stream)}.>"]


def events_stream(subjects: Subjects, options: Options, topics: DurableTopics) -> api.StreamConfig:
    """How the stream of durable topics is made. Raises `ConfigurationError` for a pattern that no subject can hold."""
    name = events_name(subjects, topics.name)
    return api.StreamConfig(
        name=name,
        description=_description(topics.name),
        subjects=[*(topic_filter(subjects, pattern) for pattern in topics.patterns), *own_filters(subjects, name)],
        retention=api.RetentionPolicy.LIMITS,
        storage=api.StorageType(topics.storage),
        num_replicas=topics.replicas or options.registry_replicas,
        discard=api.DiscardPolicy(topics.discard),
        max_age=topics.max_age or 0,
        max_bytes=topics.max_bytes or -1,
        max_msgs=topics.max_messages or -1,
        max_consumers=MAX_CONSUMERS,
        duplicate_window=min(DUPLICATE_WINDOW, topics.max_age or DUPLICATE_WINDOW),
        allow_direct=True,
        allow_msg_ttl=True,
        allow_msg_schedules=topics.schedules,
    )


def with_topics_of(subjects: Subjects, present: api.StreamConfig, wanted: api.StreamConfig) -> api.StreamConfig:
    """``wanted``, the configuration of a stream of events, with the topics of the stream as it is, ``present``.

    A stream keeps topics that are not wanted: once declared, they stay. If it lacks subjects that are no topics, or has
    others of these, ``wanted`` is returned unchanged.
    """
    captured, own = {*(present.subjects or ())}, {*own_filters(subjects, wanted.name or "")}
    topics = subjects.everything.removesuffix("*.>")
    if own <= captured and all(subject.startswith(topics) for subject in captured - own):
        return wanted.evolve(subjects=present.subjects)
    return wanted


def _description(name: str | None) -> str:
    """What people are told about the stream of the topics whose `DurableTopics.name` is ``name``."""
    if name == REMINDER_TOPICS.name:
        return "natsrt: reminders of agents"
    if name == TASK_TOPICS.name:
        return "natsrt: tasks, calls that are stored until they are handled"
    return "natsrt: events on durable topics" + ("" if name is None else f" named {name}")


def _beside(name: str, options: Options, **settings: Any) -> api.StreamConfig:
    """A stream beside those of events: what these have in common, and its own ``settings``."""
    return api.StreamConfig(
        name=name,
        retention=api.RetentionPolicy.LIMITS,
        num_replicas=options.registry_replicas,
        allow_direct=True,
        **settings,
    )


def dead_letters_stream(subjects: Subjects, options: Options) -> api.StreamConfig:
    """How the stream of dead letters is made. It keeps each one for thirty days. Its limits are the operator's."""
    return _beside(
        subjects.bucket(DEAD),
        options,
        description="natsrt: dead letters, events that could not be handled",
        subjects=[f"{subjects.dead}.>"],
        discard=api.DiscardPolicy.NEW,
        max_age=MONTH,
        duplicate_window=DUPLICATE_WINDOW,
        allow_msg_ttl=True,
    )


def attempts_stream(subjects: Subjects, options: Options) -> api.StreamConfig:
    """How the stream is made that counts attempts to handle events. It keeps each count for a week."""
    return _beside(
        subjects.bucket(ATTEMPTS),
        options,
        description="natsrt: attempts to handle events that were delivered more than once",
        subjects=[f"{subjects.attempts}.>"],
        discard=api.DiscardPolicy.OLD,
        max_age=WEEK,
        max_msgs_per_subject=1,
        allow_msg_counter=True,
    )


def results_stream(subjects: Subjects, options: Options) -> api.StreamConfig:
    """How the stream of the results of tasks is made, and of their progress. Each message has its own time to live. The
    server tells at once what is stored, so that nobody has to look for it."""
    return _beside(
        subjects.bucket(RESULTS),
        options,
        description="natsrt: results and progress of tasks",
        subjects=[f"{subjects.tasks}.>"],
        discard=api.DiscardPolicy.OLD,
        max_msgs_per_subject=1,
        allow_msg_ttl=True,
        republish=api.RePublish(src=f"{subjects.tasks}.>", dest=f"{subjects.tasks_told}.>"),
    )


def blobs_stream(subjects: Subjects, options: Options) -> api.StreamConfig:
    """How the stream of the payloads is made that are sent by reference. Limits of its size and age are the operator's.

    Each of its messages has its own time to live.
    """
    return _beside(
        subjects.bucket(BLOBS),
        options,
        description="natsrt: payloads that are too large for one message",
        subjects=[subjects.blob("*", "*")],
        discard=api.DiscardPolicy.NEW,
        max_msgs_per_subject=1,
        allow_msg_ttl=True,
    )


def memory_name(subjects: Subjects, name: str) -> str:
    """The stream of the sessions that are kept under ``name``."""
    return subjects.bucket(f"{MEMORY}_{name}")


def memory_stream(
    subjects: Subjects, options: Options, name: str, *, messages: int | None, age: float | None, size: int | None
) -> api.StreamConfig:
    """How the stream of sessions is made. Each session is a subject, of which the stream keeps the last ``messages``.

    ``age`` is in seconds, ``size`` is that of all sessions in bytes; None: without a limit. The server tells at once
    what is stored. The first sequence is the time in microseconds, so a stream that is made again continues above what
    anybody has read of the former one.
    """
    return _beside(
        memory_name(subjects, name),
        options,
        description=f"natsrt: what sessions remember, of those named {name}",
        subjects=[subjects.memory(name)],
        discard=api.DiscardPolicy.OLD,
        max_msgs_per_subject=messages or -1,
        max_age=age or 0,
        max_bytes=size or -1,
        duplicate_window=min(DUPLICATE_WINDOW, age or DUPLICATE_WINDOW),
        allow_rollup_hdrs=True,
        republish=api.RePublish(src=subjects.memory(name), dest=subjects.remembered(name)),
        first_seq=time.time_ns() // 1000,
    )


def cache_name(subjects: Subjects, name: str) -> str:
    """The bucket of the values that are cached under ``name``."""
    return subjects.bucket(f"{CACHE}_{name}")


def cache_stream(subjects: Subjects, options: Options, name: str, *, size: int | None) -> api.StreamConfig:
    """How the bucket of a cache is made. Each entry has its own time to live, and leaves no marker when it expires.

    ``size`` is that of the bucket in bytes; None: without a limit. At the limit, the oldest entries go, which is why
    this is no bucket as nats-py makes it.
    """
    bucket = cache_name(subjects, name)
    return _beside(
        f"KV_{bucket}",
        options,
        description=f"natsrt: cached values, of those named {name}",
        subjects=[f"$KV.{bucket}.>"],
        discard=api.DiscardPolicy.OLD,
        max_msgs_per_subject=1,
        max_bytes=size or -1,
        allow_msg_ttl=True,
        allow_rollup_hdrs=True,
    )


def streams_beside(subjects: Subjects, options: Options) -> Iterator[tuple[api.StreamConfig, str | None]]:
    """The streams that are made with those of events, each with the stream of events that needs it; None: all do."""
    yield dead_letters_stream(subjects, options), None
    yield attempts_stream(subjects, options), None
    yield results_stream(subjects, options), events_name(subjects, TASK_TOPICS.name)


async def ensure_stream(js: JetStreamContext, stream: str, make: Callable[[], Awaitable[object]]) -> api.StreamInfo:
    """Make a stream with ``make`` if it is missing. One that existed may be configured otherwise.

    Raises what nats-py raises.
    """
    try:
        return await js.stream_info(stream)
    except nats.js.errors.NotFoundError:
        pass
    try:
        await make()
    except nats.js.errors.BadRequestError as error:
        if error.err_code != _NAME_IN_USE:  # of a stream that another runtime made at the same moment
            raise
    return await js.stream_info(stream)


def require_settings(
    info: api.StreamInfo,
    wanted: api.StreamConfig | api.KeyValueConfig,
    unavailable: Callable[[str, str], NatsrtError],
    otherwise: str = ANOTHER_NAME,
) -> None:
    """Raise what ``unavailable(operation, reason)`` makes if a stream is configured so that natsrt cannot use it.

    ``otherwise`` is as in `remedy`.
    """
    if wrong := wrong_settings(info.config, wanted):
        stream = info.config.name or ""
        reason = f"{described(stream.removeprefix('KV_'), wrong)}: {remedy(stream, wrong, otherwise)}"
        raise unavailable("open", reason)


def require_version(
    version: tuple[int, int], text: str, feature: str = "durable topics", needed: tuple[int, int] | None = None
) -> None:
    """Raise `ServerTooOld` if a server of this version, ``text`` in full, cannot have ``feature``.

    ``needed`` is the version that it needs; None: `NEEDED_VERSION`.
    """
    if version < (least := needed or NEEDED_VERSION):
        raise ServerTooOld(feature, text, ".".join(map(str, least)))


async def streams_over(js: JetStreamContext, subject: str) -> list[str]:
    """The names of the streams that capture some of ``subject``, in alphabetical order. Raises what nats-py raises."""
    message = await js._nc.request(
        f"{js._prefix}.STREAM.NAMES", orjson.dumps({"subject": subject}), timeout=js._timeout
    )
    answer = orjson.loads(message.data)
    if "error" in answer:
        raise nats.js.errors.APIError.from_error(answer["error"])
    return sorted(answer.get("streams") or ())
