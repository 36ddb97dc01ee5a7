"""How a stream must be configured, whoever made it, a bucket's too. Pure values: no I/O."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from nats.js import api

MARKER_TTL: Final = 60.0
"""Seconds for which the server's messages in place of expired entries stay."""


class Wrong(NamedTuple):
    """A setting that natsrt cannot work with: its ``name`` in the stream's configuration, what it ``is``, what it
    ``must`` be, and the ``option`` of ``nats stream edit`` that corrects it; None: it cannot be changed.
    """

    name: str
    is_now: str
    must: str
    option: str | None


def stream_of(bucket: api.KeyValueConfig) -> api.StreamConfig:
    """The settings that the stream of a bucket must have. Limits of its size are the operator's."""
    return api.StreamConfig(
        name=f"KV_{bucket.bucket}",
        subjects=[f"$KV.{bucket.bucket}.>"],
        retention=api.RetentionPolicy.LIMITS,
        max_age=0,
        max_msgs_per_subject=1,
        discard=api.DiscardPolicy.NEW,
        allow_direct=True,
        allow_msg_ttl=True,
        subject_delete_marker_ttl=MARKER_TTL,
        republish=bucket.republish,
    )


def wrong_settings(config: api.StreamConfig, wanted: api.StreamConfig | api.KeyValueConfig) -> list[Wrong]:
    """The settings of a stream without which messages would be lost or not be accepted.

    ``wanted`` is how natsrt makes the stream or the bucket. What it leaves out is the operator's; so are replicas and
    compression. The server can keep more subjects than are wanted.
    """
    return list(_wrong(config, stream_of(wanted) if isinstance(wanted, api.KeyValueConfig) else wanted))


def _wrong(config: api.StreamConfig, wanted: api.StreamConfig) -> Iterator[Wrong]:
    subjects = wanted.subjects or []
    if config.mirror is not None or config.sources:
        yield Wrong("mirror" if config.mirror is not None else "sources", "set", "absent", None)
    elif sorted(config.subjects or ()) != sorted(subjects):
        listed = ", ".join(subjects)
        yield Wrong(
            "subjects", ", ".join(config.subjects or ()) or "none", listed, f"--subjects='{','.join(subjects)}'"
        )
    if config.subject_transform is not None:
        yield Wrong("subject_transform", "set", "absent", None)
    if (config.retention or api.RetentionPolicy.LIMITS) != wanted.retention:
        yield Wrong("retention", _text(config.retention), _text(wanted.retention), None)
    if wanted.storage is not None and config.storage != wanted.storage:
        yield Wrong("storage", _text(config.storage), _text(wanted.storage), None)
    if wanted.max_age is not None and (config.max_age or 0) != wanted.max_age:
        yield Wrong(
            "max_age", _seconds(config.max_age), _seconds(wanted.max_age), f"--max-age={_seconds(wanted.max_age)}"
        )
    for name, option in (("max_bytes", "--max-bytes"), ("max_msgs", "--max-msgs")):
        limit = getattr(wanted, name)
        if limit is not None and (getattr(config, name) or -1) != limit:
            yield Wrong(name, _text(getattr(config, name)), _text(limit), f"{option}={limit}")
    if config.max_msgs_per_subject != wanted.max_msgs_per_subject:
        most = wanted.max_msgs_per_subject
        yield Wrong(
            "max_msgs_per_subject", _text(config.max_msgs_per_subject), _text(most), f"--max-msgs-per-subject={most}"
        )
    if config.discard != wanted.discard:
        yield Wrong("discard", _text(config.discard), _text(wanted.discard), f"--discard={_text(wanted.discard)}")
    if config.discard_new_per_subject:
        yield Wrong("discard_new_per_subject", "true", "false", "--no-discard-per-subject")
    if wanted.duplicate_window and config.duplicate_window != wanted.duplicate_window:
        window = _seconds(wanted.duplicate_window)
        yield Wrong("duplicate_window", _seconds(config.duplicate_window), window, f"--dupe-window={window}")
    for name, allows in _ALLOWED:
        if getattr(wanted, name) and not getattr(config, name):
            yield Wrong(name, "false", "true", allows)
    if wanted.subject_delete_marker_ttl and not config.subject_delete_marker_ttl:
        marker = _seconds(wanted.subject_delete_marker_ttl)
        yield Wrong("subject_delete_marker_ttl", "0", marker, f"--subject-del-markers-ttl={marker}")
    for name in ("no_ack", "sealed", "deny_purge"):
        if getattr(config, name):
            yield Wrong(name, "true", "false", None)
    if wanted.republish is not None and not _republishes(config.republish, wanted.republish):
        there, needed = config.republish, wanted.republish
        option = f"--republish-source='{needed.src}' --republish-destination='{needed.dest}'"
        yield Wrong("republish", "absent" if there is None else _from_to(there), _from_to(needed), option)


_ALLOWED: Final[tuple[tuple[str, str | None], ...]] = (
    ("allow_direct", "--allow-direct"),
    ("allow_msg_ttl", "--allow-msg-ttl"),
    ("allow_msg_schedules", "--allow-schedules"),
    ("allow_rollup_hdrs", "--allow-rollup"),
    ("allow_msg_counter", None),
)
"""What a stream must allow if it is wanted, and the option that allows it; None: that is decided when it is made."""


def _republishes(there: api.RePublish | None, needed: api.RePublish) -> bool:
    return there is not None and (there.src, there.dest) == (needed.src, needed.dest) and not there.headers_only


def _from_to(republish: api.RePublish) -> str:
    return f"{republish.src} to {republish.dest}" + (", headers only" if republish.headers_only else "")


def _seconds(value: float | None) -> str:
    return f"{value:.15g}s" if value else "0"


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


ANOTHER_NAME: Final = (
    "delete the stream once its events are handled, and let natsrt make it; or give these topics another name"
)
"""What to do with a stream of events if a setting of it cannot be changed."""


def described(name: str, wrong: list[Wrong]) -> str:
    """What is wrong with a bucket, or with a stream, in one sentence; empty if nothing is."""
    if not wrong:
        return ""
    settings = "; ".join(f"{one.name} is {one.is_now} and must be {one.must}" for one in wrong)
    return f"the settings of {name} are not natsrt's: {settings}"


def remedy(stream: str, wrong: list[Wrong], otherwise: str = ANOTHER_NAME) -> str:
    """How an operator corrects that. ``stream`` is the name of the stream, of a bucket too. ``otherwise`` is what to do
    with a stream that is no bucket if something of it cannot be changed.
    """
    options = [one.option for one in wrong if one.option is not None]
    if len(options) == len(wrong):
        return f"run `nats stream edit {stream} {' '.join(options)}`"
    if stream.startswith("KV_"):
        return (
            "stop the workers, export the states, delete the bucket, and let natsrt make it (docs/operations.md, "
            "Buckets)"
        )
    return otherwise
