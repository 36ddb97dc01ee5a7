"""One layer of settings per source, and merging the layers by the rules of `natsrt.options`."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from natsrt.errors import ConfigurationError
from natsrt.options.credentials import CREDENTIALS, kinds_in
from natsrt.options.servers import check_url_credentials, parsed_servers


@dataclass(frozen=True, slots=True)
class Layer:
    """The settings of one source. ``origins``: the name of each field there, if it differs from that of the field."""

    values: Mapping[str, Any]
    origins: Mapping[str, str]


def merged(layers: Sequence[Layer], known: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Merge layers, the highest first. Returns the values and their origins.

    ``known`` are the names of all settings; any other name raises a `ConfigurationError`.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        with named_by(layer.origins):
            _check_names(layer.values, known)
            lower = {field: value for field, value in layer.values.items() if field not in values}
            from_url: Mapping[str, str] = {}
            if "servers" in lower:
                lower["servers"], from_url = parsed_servers(lower["servers"])
                check_url_credentials(from_url, layer.values)
        lower |= {field: value for field, value in from_url.items() if field not in values}
        decided = kinds_in(values)
        if decided and decided != kinds_in(lower):
            lower = {
                field: value
                for field, value in lower.items()
                if field not in CREDENTIALS or any(field in kind for kind in decided)
            }
        values |= lower
        written = dict(layer.origins) | {field: layer.origins.get("servers", "servers") for field in from_url}
        origins |= {field: written[field] for field in lower if field in written}
    return values, origins


@contextlib.contextmanager
def named_by(origins: Mapping[str, str]) -> Iterator[None]:
    """In a `ConfigurationError` about a field, replace its name by the name that its source uses."""
    try:
        yield
    except ConfigurationError as error:
        if error.setting not in origins:
            raise
        raise ConfigurationError(origins[error.setting], error.problem) from None


def _check_names(values: Mapping[str, Any], known: Collection[str]) -> None:
    for name in values:
        if name not in known:
            raise ConfigurationError(name, unknown_name(name, known))


_ELSEWHERE = {
    **dict.fromkeys(("host_address", "host", "address", "url", "uri", "base_url"), "servers"),
    **dict.fromkeys(("bootstrap_servers", "kafka_config"), "servers"),
    "timeout": "call_timeout",
    "credentials": "creds",
}
"""Arguments of AutoGen's other runtimes and of NATS clients, and what natsrt calls them."""
_NOT_NEEDED = {
    "extra_grpc_config": "natsrt does not use gRPC; its limits for messages are those of the NATS server (max_payload)",
    "payload_serialization_format": "natsrt sends all messages as JSON, and protobuf messages as protobuf",
}
"""Arguments of AutoGen's other runtimes that natsrt has no setting for, and why."""


def unknown_name(name: str, known: Collection[str]) -> str:
    """The problem text for a ``name`` that is not among the ``known`` names."""
    import difflib

    if (ours := _ELSEWHERE.get(name)) in known:
        return f"natsrt calls this setting {ours}"
    if name in _NOT_NEEDED:
        return f"there is no such setting: {_NOT_NEEDED[name]}"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if nearest:
        return f"there is no such setting; did you mean {nearest[0]}?"
    return f"there is no such setting; the settings are {', '.join(known)}"
