"""`Options`: all settings, with their meaning and their defaults."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self, Unpack
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, Field, ValidationError

from natsrt.errors import ConfigurationError
from natsrt.options.arguments import Settings
from natsrt.options.credentials import CREDENTIALS, check_credentials_file, check_seed, kinds_in, seed_in, tls_context
from natsrt.options.layers import Layer, merged, named_by
from natsrt.options.servers import check_websocket_package
from natsrt.options.sources import (
    CONFIG_VARIABLE,
    NATS_ENVIRONMENT,
    context_layer,
    environment_layers,
    file_layer,
    variable_of,
    with_lone_user_as_token,
)
from natsrt.options.values import (
    NO_TYPES,
    TYPE_NAMES,
    Count,
    CountOrNone,
    DomainName,
    Durable,
    File,
    KeyedTypes,
    Retries,
    Seconds,
    SecondsOrNone,
    Secret,
    Text,
    TimeToLive,
    configuration_error,
    kind_of,
)
from natsrt.wire.subjects import inbox_problem

MIB = 1024 * 1024
"""Bytes in a mebibyte."""


class _ContextRead(str):
    """The name of a context whose settings are already merged with the others, so that it is not read again."""


class Options(BaseModel, frozen=True, hide_input_in_errors=True, validate_default=False):
    """All settings of a runtime; immutable. Times are in seconds, sizes in bytes.

    ``Options(…)`` takes settings from its arguments, and from the NATS context that ``context`` names. It reads neither
    the environment nor a configuration file. `load` reads all sources, `from_file` one file. Every setting may be given
    as text, which is converted.

    Raises:
        ConfigurationError: A setting is unknown, has a value that cannot be used, or contradicts another.
    """

    # The server, and this runtime's identity.
    servers: tuple[str, ...] = Field(
        ("nats://127.0.0.1:4222",),
        description="URLs of the servers of one cluster: a list, or one text with commas. The schemes are nats (the "
        "default) and tls, or ws, or wss. If one begins with tls://, TLS is used with all. A URL may contain a user "
        "and password, or a token, percent-encoded; it is used for all servers.",
    )
    name: Text | None = Field(
        None, description="Name of this worker; its worker id starts with it. None: made from the host name."
    )
    namespace: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_-]*$",
        description="Prefix of every subject, bucket and stream name: one token of letters, digits, - and _. Only "
        "runtimes of one namespace see each other. Empty: no prefix.",
    )
    user: Text | None = Field(None, description="User name; needs password. None: no user.")
    password: Secret | None = Field(None, description="Password of the user. None: no password.")
    token: Secret | None = Field(None, description="Authentication token. None: no token.")
    nkey_seed: Secret | None = Field(
        None, description="Seed of a user NKEY, a text that starts with SU. None: no NKEY."
    )
    nkey_seed_file: File | None = Field(None, description="Path of a file with the seed of a user NKEY. None: no NKEY.")
    creds: File | None = Field(
        None, description="Path of a credentials file (JWT and seed), read for each connection. None: no credentials."
    )
    tls_ca: File | None = Field(
        None,
        description="Path of the CA certificates, PEM, to check the server's certificate with. TLS is then always "
        "used. None: the system's.",
    )
    tls_cert: File | None = Field(
        None,
        description="Path of the client certificate, PEM; it may contain the key too. None: no client certificate.",
    )
    tls_key: File | None = Field(
        None, description="Path of the client certificate's private key, PEM, not encrypted. None: it is in tls_cert."
    )
    tls_hostname: Text | None = Field(
        None, description="Name that the server's certificate must be for. None: the host in the URL."
    )
    tls_first: bool = Field(
        False,
        description="Start with the TLS handshake, before the server sends anything. TLS is then always used; the "
        "server needs handshake_first. False: it comes after the server's first line.",
    )
    context: Text | None = Field(
        None,
        description="Name of a context of the nats CLI, or path of its .json file. All other sources override its "
        "settings. None: no context, not even the one that is selected in the CLI.",
    )
    inbox_prefix: str = Field(
        "_INBOX",
        description="Subject prefix of the inboxes for replies, for users that may only use a prefix of their own. It "
        "may not be among natsrt's own subjects, nor above them.",
    )

    jetstream_domain: DomainName | None = Field(
        None,
        description="JetStream domain of the registry and of the states of keyed agents: the hub's, for a program "
        "on a leaf node that has a JetStream of its own. Use the same in all runtimes of the namespace there. "
        "None: the JetStream of the server's account.",
    )

    # Connection.
    connect_timeout: Seconds = Field(
        5.0, description="Seconds within which the first connection must succeed, over all servers together."
    )
    offline_timeout: SecondsOrNone = Field(
        30.0, description="Seconds that a send waits for a lost server before it fails. None: it waits for ever."
    )
    reconnect_wait: Seconds = Field(0.25, description="Seconds between two attempts to reconnect to one server.")
    ping_interval: Seconds = Field(
        10.0,
        description="Seconds between two pings of the NATS client. natsrt itself detects a hung server sooner.",
    )
    max_pings_out: Count = Field(2, description="Unanswered pings after which the connection counts as lost.")

    # Calls and events.
    call_timeout: SecondsOrNone = Field(
        None,
        description="Seconds after which a call fails, even if its handler is still working. None: no deadline. "
        "send_message(timeout=…) sets another limit for one call.",
    )
    plain_timeout: Seconds = Field(
        60.0, description="Seconds that a call waits for a plain NATS responder if no natsrt worker hosts the type."
    )
    check_after: Seconds = Field(
        0.2, description="Seconds after which a caller asks about a call that was neither answered nor accepted."
    )
    accept_after: Seconds = Field(
        0.15,
        description="Seconds after which a worker that has not answered a call yet confirms that it has accepted it.",
    )
    lost_after: Seconds = Field(
        12.0,
        description="Seconds after which a worker that is still connected, but does not answer questions about a "
        "call, counts as lost.",
    )
    busy_retry: Seconds = Field(
        1.0, description="Seconds for which a call that the worker answered with busy is sent again."
    )
    no_responders_retry: Seconds = Field(
        5.0,
        description="Seconds for which a call without responders is sent again while the registry lists a live worker.",
    )
    subscription_timeout: Seconds = Field(
        5.0,
        description="Seconds within which the live workers of a type must confirm a new subscription, beside the round "
        "trip to the server.",
    )
    infer_types: bool = Field(
        True, description="Infer the message type of a plain body without a type from the types that the agent handles."
    )

    # Being a worker.
    drain_timeout: Seconds = Field(
        30.0,
        description="Seconds that running and queued handlers have to finish when the runtime stops, and events to be "
        "sent that wait for the owners of keyed agents.",
    )
    heartbeat_interval: Seconds = Field(1.5, description="Seconds between two heartbeats of a worker.")
    heartbeat_ttl: TimeToLive = Field(
        6.0,
        description="Seconds after its last heartbeat at which the registry entries of a worker expire. Must be more "
        "than twice heartbeat_interval, and from 1, the minimum of JetStream, to 1,000,000,000.",
    )
    max_running: CountOrNone = Field(
        None,
        description="Number of handlers that may run at once in a worker; further messages wait, in order. None: any "
        "number. The argument max_running of register and register_factory limits one agent type.",
    )
    max_pending_bytes: Count = Field(
        64 * MIB,
        description="Bytes of messages that may wait in a runtime. Beyond that, a worker answers calls with busy and "
        "drops events, and publish_message waits for the owners of keyed agents.",
    )
    keep_replies: Seconds = Field(
        30.0,
        description="Seconds for which a worker keeps the replies of accepted calls, to send them again on request.",
    )
    keep_replies_bytes: Count = Field(64 * MIB, description="Bytes of such replies that a worker keeps at most.")
    stream_idle_timeout: Seconds = Field(
        30.0,
        description="Seconds without a sign of life of the caller that streams a call, while both are connected, after "
        "which a worker stops the handler.",
    )
    keyed: KeyedTypes = Field(
        NO_TYPES,
        description="Agent types that are keyed, or not keyed although their class is: a table of types, each true, "
        "false or a table of options (concurrency, save, save_interval, idle_timeout, rebalance); or names of keyed "
        "types with commas.",
    )
    registry_replicas: Annotated[Count, Field(le=5)] = Field(
        1, description="Copies of the registry in a JetStream cluster, 1 to 5. Used when the registry is created."
    )

    # Durable topics.
    durable: Durable = Field(
        (),
        description="Durable topics: a list of topic types, and of prefixes that end in . or :, or one text with "
        "commas. A table in the list, or `natsrt.DurableTopics`, gives its patterns another retention policy (name, "
        "max_age, max_bytes, max_messages, storage, replicas, discard). Runtimes learn the topics of others from the "
        "registry.",
    )
    publish_timeout: Seconds = Field(
        10.0, description="Seconds within which the server must confirm an event on a durable topic."
    )

    # Handling events of durable topics.
    ack_wait: Seconds = Field(
        30.0,
        description="Seconds after which an event that a worker holds goes to another one, if the worker is dead or "
        "frozen. Use the same in all workers of a type.",
    )
    max_deliver: Count = Field(
        5, description="Number of attempts of an event on a durable topic before it becomes a dead letter."
    )
    retry_delay: Seconds = Field(
        1.0,
        description="Seconds between the first failed attempt and the next one. Each further delay is twice as long.",
    )
    retry_delay_max: Seconds = Field(60.0, description="Seconds between two attempts at most.")
    retries: Retries = Field(
        NO_TYPES,
        description="Agent types for which max_deliver, retry_delay or retry_delay_max are others: a table of types, "
        "each a table of these options.",
    )

    # Tasks.
    result_ttl: TimeToLive = Field(
        86400.0,
        description="Seconds for which the result of a task that this runtime submits is kept: 1 to 1,000,000,000.",
    )

    # Payloads.
    blob_threshold: CountOrNone = Field(
        None,
        description="Bytes above which the payload of a call, a reply or an event is sent by reference, stored in "
        "JetStream. None: what does not fit into one message of the server.",
    )
    max_blob_size: Count = Field(
        256 * MIB,
        description="Maximum size of such a payload in bytes. A larger one is refused before anything is sent, and is "
        "not read.",
    )
    blob_ttl: TimeToLive = Field(
        3600.0,
        description="Seconds for which such a payload is stored, if it is not deleted before: when its call was "
        "answered, or when the reply was read. From 1 to 1,000,000,000. Must be longer than an "
        "upload takes, and an event or a call waits.",
    )

    # Errors.
    send_tracebacks: bool = Field(
        True, description="Send the traceback of a handler's exception to the caller, plain NATS clients included."
    )
    ignore_unhandled_exceptions: bool = Field(
        True, description="Log exceptions of event handlers. False: stop and stop_when_idle raise them."
    )

    def __init__(self, **settings: Unpack[Settings]) -> None:
        layers = [Layer(settings, {})]
        context = settings.get("context")
        if isinstance(context, str) and context and not isinstance(context, _ContextRead):
            layers.append(context_layer(context, os.environ))
        values, origins = merged(layers, type(self).model_fields)
        with named_by(origins):
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise configuration_error(error, type(self).model_fields) from None
            _check_together(self)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """The settings of a TOML (``.toml``) or YAML (``.yaml``, ``.yml``) file, and of the context that it names.

        The settings are at the top level, or in a table ``natsrt``; other tables beside that one are ignored. Relative
        paths in the file start at its directory.

        Raises:
            ConfigurationError: The file cannot be read, or a setting in it is wrong. The text names the file, the
                setting, and the line if that is known.
        """
        return cls._from_sources([file_layer(Path(path), cls.model_fields)], os.environ)

    @classmethod
    def load(
        cls,
        *,
        config: str | os.PathLike[str] | None = None,
        environ: Mapping[str, str] | None = None,
        **overrides: Unpack[Settings],
    ) -> Self:
        """The settings of all sources, with the precedence that `natsrt.options` describes.

        Args:
            config: Path of a configuration file. None: the file that ``NATSRT_CONFIG`` names, or no file.
            environ: The environment variables. None: those of this process.
            **overrides: Settings from code or the command line. None means not given; the text ``"none"`` means
                None.

        Raises:
            ConfigurationError: A source cannot be read, or a setting is unknown, wrong or contradicts another.
        """
        environ = os.environ if environ is None else environ
        sources = [Layer({field: value for field, value in overrides.items() if value is not None}, {})]
        sources += environment_layers(environ, cls.model_fields)
        if config is not None:
            sources.append(file_layer(Path(config), cls.model_fields))
        elif named := environ.get(CONFIG_VARIABLE):
            with named_by({"config": CONFIG_VARIABLE}):
                sources.append(file_layer(Path(named), cls.model_fields))
        return cls._from_sources(with_lone_user_as_token(sources), environ)

    @classmethod
    def _from_sources(cls, sources: Sequence[Layer], environ: Mapping[str, str]) -> Self:
        context = next((value for layer in sources if (value := layer.values.get("context"))), None)
        layers = list(sources)
        if isinstance(context, str):
            origin = next(layer.origins for layer in sources if layer.values.get("context"))
            with named_by(origin):
                layers.append(context_layer(context, environ))
        values, origins = merged(layers, cls.model_fields)
        if isinstance(context, str):
            values["context"] = _ContextRead(context)
        with named_by(origins):
            return cls(**values)

    def replace(self, **changes: Unpack[Settings]) -> Self:
        """A copy of these settings with ``changes``. A credential of another kind replaces the present one.

        The context is not read again, so ``context`` itself cannot be changed.

        Raises:
            ConfigurationError: As for the constructor; or ``context`` is among the changes.
        """
        if changes.get("context", self.context) != self.context:
            raise ConfigurationError("context", "cannot be replaced; make new options with Options.load(context=…)")
        current = {field: getattr(self, field) for field in self.model_fields_set}
        values, _ = merged([Layer(changes, {}), Layer(current, {})], type(self).model_fields)
        if self.context is not None:
            values["context"] = _ContextRead(self.context)
        return type(self)(**values)

    @property
    def server_list(self) -> list[str]:
        """The URLs of the servers, as ``nats.connect`` takes them, without credentials."""
        return list(self.servers)

    @property
    def safe_servers(self) -> list[str]:
        """The URLs of the servers for messages and logs, without credentials and queries, which may contain secrets."""
        return [urlunsplit(urlsplit(server)._replace(query="", fragment="")) for server in self.servers]

    def connect_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for ``nats.connect``, except callbacks and the limits of reconnecting.

        Reads the files of certificates and seeds each time, so that the next client uses their present contents.

        Raises:
            ConfigurationError: A file cannot be used, or a WebSocket URL is given without the package aiohttp.
        """
        check_websocket_package(self.servers)
        kwargs: dict[str, Any] = {
            "servers": self.server_list,
            "connect_timeout": self.connect_timeout,
            "reconnect_time_wait": self.reconnect_wait,
            "ping_interval": self.ping_interval,
            "max_outstanding_pings": self.max_pings_out,
            "drain_timeout": self.drain_timeout,
            "inbox_prefix": self.inbox_prefix,
            "tls_handshake_first": self.tls_first,
        }
        if self.name is not None:
            kwargs["name"] = self.name
        if self.tls_hostname is not None:
            kwargs["tls_hostname"] = self.tls_hostname
        if self.tls_ca is not None or self.tls_cert is not None:
            kwargs["tls"] = tls_context(self.tls_ca, self.tls_cert, self.tls_key)
        if self.user is not None and self.password is not None:
            kwargs["user"], kwargs["password"] = self.user, self.password.get_secret_value()
        elif self.token is not None:
            kwargs["token"] = self.token.get_secret_value()
        elif self.nkey_seed is not None:
            kwargs["nkeys_seed_str"] = self.nkey_seed.get_secret_value()
        elif self.nkey_seed_file is not None:
            kwargs["nkeys_seed_str"] = seed_in(self.nkey_seed_file)
        elif self.creds is not None:
            kwargs["user_credentials"] = str(self.creds)
        return kwargs

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """The settings that ``repr`` shows: those that were given, in the order of the fields."""
        for field in type(self).model_fields:
            if field in self.model_fields_set:
                yield field, self.safe_servers if field == "servers" else getattr(self, field)


def _check_together(options: Options) -> None:
    """Check the settings that depend on each other, and the files of credentials."""
    kinds = sorted(kinds_in({field: getattr(options, field) for field in CREDENTIALS}))
    if len(kinds) > 1:
        given = [field for kind in kinds for field in kind if getattr(options, field) is not None]
        raise ConfigurationError(given[0], f"cannot be used together with {', '.join(given[1:])}; use one of them")
    if options.user is not None and options.password is None:
        raise ConfigurationError("user", "is given without password; use token for a token")
    if options.password is not None and options.user is None:
        raise ConfigurationError("password", "is given without user")
    if problem := inbox_problem(options.inbox_prefix, options.namespace):
        raise ConfigurationError("inbox_prefix", problem)
    if options.tls_key is not None and options.tls_cert is None:
        raise ConfigurationError("tls_key", "is given without tls_cert, its certificate")
    if options.heartbeat_ttl <= 2 * options.heartbeat_interval:
        raise ConfigurationError(
            "heartbeat_ttl",
            f"must be more than twice heartbeat_interval, so that one late heartbeat does not end a worker; it is "
            f"{options.heartbeat_ttl:g} s, and heartbeat_interval is {options.heartbeat_interval:g} s",
        )
    if options.nkey_seed is not None:
        check_seed("nkey_seed", options.nkey_seed.get_secret_value())
    # A pipe (`--creds <(…)`) can be read only once, and the client must read it.
    if options.nkey_seed_file is not None and options.nkey_seed_file.is_file():
        seed_in(options.nkey_seed_file)
    if options.creds is not None and options.creds.is_file():
        check_credentials_file(options.creds)


class OptionRow(NamedTuple):
    """One row of the table of settings in the documentation."""

    field: str
    env: str
    """The environment variable that sets it."""
    nats_env: str | None
    """The variable of the ``nats`` CLI that also sets it; None if there is none."""
    type: str
    """In words: ``seconds``, ``text``, ``file path``, …; ends in ``or none`` if None is allowed."""
    default: str
    """The default, as it would be written in the environment."""
    description: str


def describe_options() -> Iterator[OptionRow]:
    """One row for each field of `Options`, in the order of the fields."""
    nats_names = {field: variable for variable, field in NATS_ENVIRONMENT.items()}
    for field, info in Options.model_fields.items():
        default = ",".join(info.default) if isinstance(info.default, tuple | Mapping) else str(info.default)
        kind, optional = kind_of(info)
        yield OptionRow(
            field=field,
            env=variable_of(field),
            nats_env=nats_names.get(field),
            type=TYPE_NAMES[kind] + (" or none" if optional else ""),
            default=default.lower() if info.default is None or isinstance(info.default, bool) else default,
            description=info.description or "",
        )
