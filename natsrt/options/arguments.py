"""The settings as keyword arguments, for type checkers and editors. `natsrt.options.Options` defines the settings.

``python -m tests.support.documents`` writes the classes anew, from the fields of `Options`; a test compares them.

Type checkers accept a number for a number, not a text that is one: texts such as ``"1m30s"`` are for the environment
and for files, although `Options` converts them everywhere. ``"none"`` means no limit, for settings that allow it; None
itself means that the setting is not given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict

from pydantic import SecretStr

from natsrt.durable_types import DurableTopics
from natsrt.keyed_types import KeyedOptions


# <!-- settings: written by `python -m tests.support.documents` -->
class MoreSettings(TypedDict, total=False):
    """The settings that are not parameters of `natsrt.NatsAgentRuntime` by themselves."""

    user: str | None
    password: str | SecretStr | None
    token: str | SecretStr | None
    nkey_seed: str | SecretStr | None
    nkey_seed_file: str | PathLike[str] | None
    creds: str | PathLike[str] | None
    tls_ca: str | PathLike[str] | None
    tls_cert: str | PathLike[str] | None
    tls_key: str | PathLike[str] | None
    tls_hostname: str | None
    tls_first: bool | None
    context: str | None
    inbox_prefix: str | None
    jetstream_domain: str | None
    connect_timeout: float | None
    offline_timeout: float | Literal["none"] | None
    reconnect_wait: float | None
    ping_interval: float | None
    max_pings_out: int | None
    call_timeout: float | Literal["none"] | None
    plain_timeout: float | None
    check_after: float | None
    accept_after: float | None
    lost_after: float | None
    busy_retry: float | None
    no_responders_retry: float | None
    subscription_timeout: float | None
    infer_types: bool | None
    drain_timeout: float | None
    heartbeat_interval: float | None
    heartbeat_ttl: float | None
    max_running: int | None
    max_pending_bytes: int | None
    keep_replies: float | None
    keep_replies_bytes: int | None
    stream_idle_timeout: float | None
    keyed: str | Sequence[str] | Mapping[str, bool | KeyedOptions | Mapping[str, Any]] | None
    registry_replicas: int | None
    durable: str | DurableTopics | Mapping[str, Any] | Sequence[str | DurableTopics | Mapping[str, Any]] | None
    publish_timeout: float | None
    ack_wait: float | None
    max_deliver: int | None
    retry_delay: float | None
    retry_delay_max: float | None
    retries: str | Mapping[str, Mapping[str, Any]] | None
    result_ttl: float | None
    blob_threshold: int | None
    max_blob_size: int | None
    blob_ttl: float | None
    send_tracebacks: bool | None
    ignore_unhandled_exceptions: bool | None


class Settings(MoreSettings, total=False):
    """All settings."""

    servers: str | Sequence[str] | None
    name: str | None
    namespace: str | None


# <!-- end of settings -->
