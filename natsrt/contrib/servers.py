"""Where the servers of a component are: the settings, and what of them its configuration has.

A configuration names servers, a namespace, and a context of the ``nats`` CLI. It never has credentials: those come from
the context, from the environment or from a configuration file of the process that loads the component.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from natsrt import Options
from natsrt.errors import ConfigurationError, NatsrtError


class ServersConfig(BaseModel, extra="forbid"):
    """The part of a component's configuration that says where the servers are."""

    servers: list[str] | None = None
    """URLs without credentials. None: those of the context, or of the process's other settings."""
    namespace: str | None = None
    """None: that of the process's settings."""
    context: str | None = None
    """The name of a context of the ``nats`` CLI, or the path of its file. None: no context, or that of the settings."""
    jetstream_domain: str | None = None
    """None: that of the process's settings."""


def settings_of(
    options: Options | None,
    servers: str | Sequence[str] | None,
    namespace: str | None,
    context: str | None,
    jetstream_domain: str | None,
) -> Options:
    """``options`` with the other arguments in place of its own; without them, those of `Options.load`.

    Raises:
        ConfigurationError: A setting is wrong, or both ``options`` and ``context`` are given.
    """
    given: dict[str, Any] = {"servers": servers, "namespace": namespace, "jetstream_domain": jetstream_domain}
    given = {setting: value for setting, value in given.items() if value is not None}
    if options is None:
        return Options.load(context=context, **given)
    if context is not None:
        raise ConfigurationError("context", "is given with options: make them with Options.load(context=…)")
    return options.replace(**given)


def settings_in(config: ServersConfig) -> Options:
    """The settings that a configuration names, and those of this process. Raises `ConfigurationError`."""
    return settings_of(None, config.servers, config.namespace, config.context, config.jetstream_domain)


def config_of(options: Options) -> dict[str, Any]:
    """The fields of `ServersConfig`. Servers that the context names are left to it: it may have their credentials."""
    return {
        "servers": None if _are_those_of_context(options) else options.safe_servers,
        "namespace": options.namespace,
        "context": None if options.context is None else str(options.context),
        "jetstream_domain": options.jetstream_domain,
    }


def _are_those_of_context(options: Options) -> bool:
    if options.context is None:
        return False
    try:
        return Options(context=str(options.context)).servers == options.servers
    except NatsrtError:  # it is gone, or was changed
        return False
