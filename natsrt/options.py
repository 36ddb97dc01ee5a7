"""The settings of a runtime: their meaning, their defaults and where they come from.

Sources, the highest first: arguments in code or on the command line; the environment; a configuration file; a NATS
context; the defaults. In the environment ``NATSRT_<FIELD>`` stands above the variables of the ``nats`` CLI
(``NATS_URL``, ``NATS_CREDS``, …).

Rules:

- One source decides *how* to authenticate. A credential of another kind in a lower source is left out: a token in code
  beats ``NATS_CREDS``. Parts of one kind complete each other: the user from a file, the password from the environment.
  Within one source two kinds are an error.
- A user in a server URL belongs to that URL: it goes when a higher source names other servers. It is taken out of the
  URL at once, so ``servers`` holds no secret, and it applies to every server of the list.
- Nothing is left out in silence: an unknown name, a missing file or a value that cannot be used is a
  `ConfigurationError` that names the setting as it was written. Its text never holds a secret.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from natsrt.contexts import read_context
from natsrt.errors import ConfigurationError

if TYPE_CHECKING:
    import ssl

__all__ = ["NATS_ENVIRONMENT", "OptionRow", "Options", "describe_options"]

MIB = 1024 * 1024

NATS_ENVIRONMENT: Mapping[str, str] = {
    "NATS_URL": "servers",
    "NATS_USER": "user",
    "NATS_PASSWORD": "password",
    "NATS_TOKEN": "token",
    "NATS_CREDS": "creds",
    "NATS_NKEY": "nkey_seed_file",
    "NATS_CERT": "tls_cert",
    "NATS_KEY": "tls_key",
    "NATS_CA": "tls_ca",
    "NATS_CONTEXT": "context",
    "NATS_TIMEOUT": "connect_timeout",
}
"""What the ``nats`` CLI reads (the flags in its ``nats/main.go``), and the setting that each one means here.

``NATS_TOKEN`` is read by its newer versions only.
"""

ENVIRONMENT_PREFIX = "NATSRT_"
CONFIG_VARIABLE = "NATSRT_CONFIG"
RESERVED_PREFIX = "NATSRT_TEST_"
"""Variables of the test-suite; they are no settings."""

# What authenticates, by kind. Only the members of one kind are used together.
_CREDENTIAL_KINDS = (("user", "password"), ("token",), ("nkey_seed",), ("nkey_seed_file",), ("creds",))
_CREDENTIALS = frozenset(field for kind in _CREDENTIAL_KINDS for field in kind)

_SCHEMES = ("nats", "tls", "ws", "wss")
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_DURATION_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_SEED = re.compile(r"^\s*(S[A-Z2-7]{40,})\s*$", re.MULTILINE)
_CREDENTIALS_FILE_SECTIONS = (b"BEGIN NATS USER JWT", b"BEGIN USER NKEY SEED")


def _no_bool(value: object) -> object:
    # Python and Pydantic take True for 1; as a number of seconds or bytes it can only be a mistake.
    if isinstance(value, bool):
        raise ValueError
    return value


def _seconds(value: object) -> object:
    """Seconds from text: a plain number, or a duration as the ``nats`` CLI takes it (Go's notation: ``1m30s``)."""
    _no_bool(value)
    if not isinstance(value, str):
        return value
    text = value.strip()
    parts = _DURATION_PART.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return sum(float(number) * _DURATION_UNITS[unit] for number, unit in parts)
    return text


def _none_word(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


def _looks_like_contents(text: str) -> bool:
    return "BEGIN " in text or _SEED.search(text) is not None


def _not_contents(value: object) -> object:
    """Refuse what a path is mixed up with, before any message could show it."""
    if isinstance(value, str) and _looks_like_contents(value):
        raise ValueError("must be the path of a file, not its contents")
    return value


def _readable_file(path: Path) -> Path:
    path = Path(os.path.abspath(path.expanduser()))
    if not path.exists():
        raise ValueError(f"there is no file {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a directory; it must be a file")
    if not os.access(path, os.R_OK):
        raise ValueError(f"the file {path} may not be read by this user")
    return path


def _subject(value: str) -> str:
    if not re.fullmatch(r"[^\s.*>]+(\.[^\s.*>]+)*", value):
        raise ValueError("must be subject tokens joined by dots, without spaces, * and >")
    return value


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)]
SecondsOrNone = Annotated[Seconds | None, BeforeValidator(_none_word)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
Secret = Annotated[SecretStr, Field(min_length=1)]
File = Annotated[Path, BeforeValidator(_not_contents), AfterValidator(_readable_file)]


class Options(BaseModel):
    """All settings of a runtime; immutable. Times are in seconds, sizes in bytes.

    ``Options(…)`` takes settings from code, and from the context that ``context`` names; it looks at no environment
    and no file. `load` looks everywhere, `from_file` at one file. Text is accepted for every setting and converted.

    Raises:
        ConfigurationError: A setting is unknown, has a value that cannot be used, or contradicts another.
    """

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True, validate_default=False)

    # Where the server is and who we are.
    servers: tuple[str, ...] = Field(
        ("nats://127.0.0.1:4222",),
        description="URLs of the servers of one cluster: a list, or one text with commas. Schemes nats (also where "
        "none is given) and tls, or ws and wss, not mixed. A user and password, or a token, may stand in the URL, "
        "percent-encoded; it is used for all of them.",
    )
    name: Text | None = Field(
        None, description="Name of this worker, the start of its worker id. None: made from the host's name."
    )
    namespace: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_-]*$",
        description="Prefix of every subject, bucket and stream name: one token of letters, digits, - and _. Runtimes "
        "see each other only within one namespace. Empty: no prefix.",
    )
    user: Text | None = Field(None, description="User name; needs password. None: no user.")
    password: Secret | None = Field(None, description="Password of user. None: no password.")
    token: Secret | None = Field(None, description="Authentication token. None: no token.")
    nkey_seed: Secret | None = Field(
        None, description="Seed of a user NKEY itself, a text that starts with SU. None: no NKEY."
    )
    nkey_seed_file: File | None = Field(None, description="Path of a file with the seed of a user NKEY. None: no NKEY.")
    creds: File | None = Field(
        None, description="Path of a credentials file (JWT and seed), read at every connecting. None: no credentials."
    )
    tls_ca: File | None = Field(
        None, description="Path of the CA certificates, PEM, that the server's one is checked with. None: the system's."
    )
    tls_cert: File | None = Field(
        None, description="Path of the client certificate, PEM; it may hold the key too. None: no client certificate."
    )
    tls_key: File | None = Field(
        None, description="Path of the client certificate's private key, PEM, not encrypted. None: it is in tls_cert."
    )
    tls_hostname: Text | None = Field(
        None, description="Name that the server's certificate must be for. None: the host in the URL."
    )
    tls_first: bool = Field(
        False,
        description="Start with the TLS handshake, before the server has said anything. Makes TLS certain; the server "
        "needs handshake_first. Without it TLS is used when the server asks for it.",
    )
    context: Text | None = Field(
        None,
        description="Name of a context of the nats CLI, or the path of its .json file, whose settings stand below all "
        "others. None: no context; the one that the CLI has selected is never used by itself.",
    )
    inbox_prefix: Annotated[str, AfterValidator(_subject)] = Field(
        "_INBOX", description="Subject prefix of the inboxes for replies, for users whose permissions name their own."
    )

    # Connection.
    connect_timeout: Seconds = Field(
        5.0, description="Seconds that the first connection may take as a whole, over all servers."
    )
    offline_timeout: SecondsOrNone = Field(
        30.0, description="Seconds that a send waits for a lost server before it fails. None: waits for ever."
    )
    reconnect_wait: Seconds = Field(0.25, description="Seconds between two attempts to reconnect to one server.")
    ping_interval: Seconds = Field(
        10.0,
        description="Seconds between two pings of the NATS client. A hung server is found sooner, by natsrt itself.",
    )
    max_pings_out: Count = Field(2, description="Unanswered pings after which the connection counts as lost.")

    # Calls and events.
    call_timeout: SecondsOrNone = Field(
        None, description="Seconds after which a call fails, however honestly its handler works. None: no deadline."
    )
    plain_timeout: Seconds = Field(
        60.0, description="Seconds that a call waits for a plain NATS responder where no natsrt worker hosts the type."
    )
    check_after: Seconds = Field(
        0.2, description="Seconds after which a caller checks a call that was neither answered nor accepted."
    )
    accept_after: Seconds = Field(
        0.15, description="Seconds after which a worker tells the caller that it has a call it has not answered yet."
    )
    lost_after: Seconds = Field(
        12.0,
        description="Seconds of silence after which a worker that is still connected, and was asked about a call, "
        "counts as lost.",
    )
    busy_retry: Seconds = Field(1.0, description="Seconds for which a call that was answered busy is sent again.")
    no_responders_retry: Seconds = Field(
        5.0,
        description="Seconds for which a call without responders is sent again while the registry lists a live worker.",
    )
    subscription_timeout: Seconds = Field(
        2.0, description="Seconds that the live workers of a type have to confirm a new subscription."
    )
    infer_types: bool = Field(
        True, description="Find out the message type of a plain body from what the agent handles, where none is given."
    )

    # Being a worker.
    drain_timeout: Seconds = Field(
        30.0, description="Seconds that running and queued handlers have to finish while stopping."
    )
    heartbeat_interval: Seconds = Field(1.5, description="Seconds between two heartbeats of a worker.")
    heartbeat_ttl: Annotated[Seconds, Field(ge=1)] = Field(
        6.0,
        description="Seconds after its last heartbeat at which a worker's registry entries go away; more than twice "
        "heartbeat_interval, and at least 1, the shortest that JetStream can do.",
    )
    max_pending_bytes: Count = Field(
        64 * MIB, description="Bytes of messages not yet started that a worker holds; above it calls are answered busy."
    )
    keep_replies: Seconds = Field(
        30.0, description="Seconds for which finished replies of accepted calls are kept, to be sent again."
    )
    keep_replies_bytes: Count = Field(64 * MIB, description="Bytes of finished replies that are kept at most.")
    registry_replicas: Annotated[Count, Field(le=5)] = Field(
        1, description="Copies of the registry in a JetStream cluster, 1 to 5; counts when the registry is made."
    )

    # Errors.
    send_tracebacks: bool = Field(True, description="Send the traceback of a handler's exception to the caller.")
    ignore_unhandled_exceptions: bool = Field(
        True, description="Log what a handler of an event raises. Otherwise it is raised by stop and stop_when_idle."
    )

    if not TYPE_CHECKING:  # Type checkers see the keyword arguments that Pydantic makes from the fields.

        def __init__(self, **settings: Any) -> None:
            layers = [_Layer(settings, {})]
            context = settings.get("context")
            if isinstance(context, str) and context and not isinstance(context, _ContextRead):
                layers.append(_context_layer(context, os.environ))
            values, origins = _merged(layers)
            with _named_by(origins):
                try:
                    super().__init__(**values)
                except ValidationError as error:
                    raise _configuration_error(error) from None
                _check_together(self)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """The settings of a TOML (``.toml``) or YAML (``.yaml``, ``.yml``) file, and of the context that it names.

        The settings stand at the top level, or in a table ``natsrt`` beside tables of others, which are ignored.
        Relative paths in the file are relative to its directory.

        Raises:
            ConfigurationError: The file cannot be read, or a setting in it is wrong; names the file, the line where
                it is known, and the setting.
        """
        return cls._from_sources([_file_layer(Path(path))], os.environ)

    @classmethod
    def load(
        cls,
        *,
        config: str | os.PathLike[str] | None = None,
        environ: Mapping[str, str] | None = None,
        **overrides: Any,
    ) -> Self:
        """The settings of all sources, in the order of precedence at the top of this module.

        Args:
            config: Path of a configuration file. None: the one that ``NATSRT_CONFIG`` names, if it does.
            environ: The environment. None: that of this process.
            **overrides: Settings from code or the command line; one that is None counts as not given, and the text
                ``"none"`` means None.

        Raises:
            ConfigurationError: A source cannot be read, or a setting is unknown, wrong or contradicts another.
        """
        environ = os.environ if environ is None else environ
        sources = [_Layer({field: value for field, value in overrides.items() if value is not None}, {})]
        sources += _environment_layers(environ)
        if config is not None:
            sources.append(_file_layer(Path(config)))
        elif named := environ.get(CONFIG_VARIABLE):
            with _named_by({"config": CONFIG_VARIABLE}):
                sources.append(_file_layer(Path(named)))
        return cls._from_sources(_with_lone_user_as_token(sources), environ)

    @classmethod
    def _from_sources(cls, sources: Sequence[_Layer], environ: Mapping[str, str]) -> Self:
        context = next((value for layer in sources if (value := layer.values.get("context"))), None)
        layers = list(sources)
        if isinstance(context, str):
            origin = next(layer.origins for layer in sources if layer.values.get("context"))
            with _named_by(origin):
                layers.append(_context_layer(context, environ))
        values, origins = _merged(layers)
        if isinstance(context, str):
            values["context"] = _ContextRead(context)
        with _named_by(origins):
            return cls(**values)

    def replace(self, **changes: Any) -> Self:
        """These settings with some changed. A credential of another kind takes the place of the present one.

        The context is not read again, so ``context`` itself cannot be changed.

        Raises:
            ConfigurationError: As the constructor; or ``context`` is among the changes.
        """
        if changes.get("context", self.context) != self.context:
            raise ConfigurationError("context", "cannot be replaced; make new options with Options.load(context=…)")
        current = {field: getattr(self, field) for field in self.model_fields_set}
        values, _ = _merged([_Layer(changes, {}), _Layer(current, {})])
        if self.context is not None:
            values["context"] = _ContextRead(self.context)
        return type(self)(**values)

    @property
    def server_list(self) -> list[str]:
        """The URLs of the servers, as ``nats.connect`` takes them, without credentials."""
        return list(self.servers)

    @property
    def safe_servers(self) -> list[str]:
        """The URLs of the servers for messages and logs: neither credentials nor a query, which may hold a secret."""
        return [urlunsplit(urlsplit(server)._replace(query="", fragment="")) for server in self.servers]

    def connect_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for ``nats.connect``, all but callbacks and the policy of attempts.

        Reads the files anew, so that exchanged certificates and seeds are used by the next client.

        Raises:
            ConfigurationError: A file cannot be used, or a WebSocket URL is given without the package aiohttp.
        """
        _check_websocket_package(self.servers)
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
            kwargs["tls"] = _tls_context(self.tls_ca, self.tls_cert, self.tls_key)
        if self.user is not None and self.password is not None:
            kwargs["user"], kwargs["password"] = self.user, self.password.get_secret_value()
        elif self.token is not None:
            kwargs["token"] = self.token.get_secret_value()
        elif self.nkey_seed is not None:
            kwargs["nkeys_seed_str"] = self.nkey_seed.get_secret_value()
        elif self.nkey_seed_file is not None:
            kwargs["nkeys_seed_str"] = _seed_in(self.nkey_seed_file)
        elif self.creds is not None:
            kwargs["user_credentials"] = str(self.creds)
        return kwargs

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """What ``repr`` shows: the settings that were given, in the order of the fields."""
        for field in type(self).model_fields:
            if field in self.model_fields_set:
                yield field, self.safe_servers if field == "servers" else getattr(self, field)


class OptionRow(NamedTuple):
    """One line of the table of settings in the documentation."""

    field: str
    env: str
    """The variable that sets it."""
    nats_env: str | None
    """The variable of the ``nats`` CLI that sets it too, None if there is none."""
    type: str
    """In words: ``seconds``, ``text``, ``file path``, …; ends in ``or none`` where None is a value."""
    default: str
    """As it is written in the environment."""
    description: str


def describe_options() -> Iterator[OptionRow]:
    """One row for every field of `Options`, in their order."""
    nats_names = {field: variable for variable, field in NATS_ENVIRONMENT.items()}
    for field, info in Options.model_fields.items():
        default = ",".join(info.default) if isinstance(info.default, tuple) else str(info.default)
        kind, optional = _kind(info)
        yield OptionRow(
            field=field,
            env=_variable(field),
            nats_env=nats_names.get(field),
            type=_TYPE_NAMES[kind] + (" or none" if optional else ""),
            default=default.lower() if info.default is None or isinstance(info.default, bool) else default,
            description=info.description or "",
        )


class _ContextRead(str):
    """The name of a context whose settings are already among the others: it is not read a second time."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """The settings of one source. ``origins`` says how each was written there; a field without one is written so."""

    values: Mapping[str, Any]
    origins: Mapping[str, str]


def _merged(layers: Sequence[_Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of all layers, the highest first, and their origins, by the rules at the top of this module."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        with _named_by(layer.origins):
            _check_names(layer.values)
            lower = {field: value for field, value in layer.values.items() if field not in values}
            from_url: Mapping[str, str] = {}
            if "servers" in lower:
                lower["servers"], from_url = _parsed_servers(lower["servers"])
                _check_url_credentials(from_url, layer.values)
        lower |= {field: value for field, value in from_url.items() if field not in values}
        decided = _kinds(values)
        if decided and decided != _kinds(lower):
            lower = {
                field: value
                for field, value in lower.items()
                if field not in _CREDENTIALS or any(field in kind for kind in decided)
            }
        values |= lower
        written = dict(layer.origins) | {field: layer.origins.get("servers", "servers") for field in from_url}
        origins |= {field: written[field] for field in lower if field in written}
    return values, origins


def _kinds(values: Mapping[str, Any]) -> set[tuple[str, ...]]:
    return {kind for kind in _CREDENTIAL_KINDS if any(values.get(field) is not None for field in kind)}


@contextlib.contextmanager
def _named_by(origins: Mapping[str, str]) -> Iterator[None]:
    """Let errors about a field name it as its source does."""
    try:
        yield
    except ConfigurationError as error:
        if error.setting not in origins:
            raise
        raise ConfigurationError(origins[error.setting], error.problem) from None


def _check_names(values: Mapping[str, Any]) -> None:
    for name in values:
        if name not in Options.model_fields:
            raise ConfigurationError(name, _unknown(name, list(Options.model_fields)))


def _unknown(name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if nearest:
        return f"there is no such setting; did you mean {nearest[0]}?"
    return f"there is no such setting; known are {', '.join(known)}"


# --- servers ---------------------------------------------------------------------------------------------------------


def _parsed_servers(given: object) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """URLs without credentials, and the credentials that were in them.

    nats-py sends percent-encoded credentials as they are written, and none to servers it discovers; so they are decoded
    here and given to it as arguments. Messages show no part of a URL: of one that cannot be parsed, nobody can say
    where its password is.
    """
    texts = given.split(",") if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ConfigurationError("servers", f"must be one URL or a list of URLs, not {_type_of(given)}")
    urls = [_parsed_url(number, text.strip()) for number, text in enumerate(texts, 1)]
    if not urls:
        raise ConfigurationError("servers", "must name one server at least")
    if len({url.scheme in ("ws", "wss") for url in urls}) > 1:
        raise ConfigurationError("servers", "ws:// and wss:// cannot be mixed with nats:// and tls://")
    credentials = [found for url in urls if (found := _url_credentials(url))]
    if any(found != credentials[0] for found in credentials):
        raise ConfigurationError("servers", "the URLs hold different credentials; a runtime connects as one user")
    return tuple(map(_bare, urls)), credentials[0] if credentials else {}


def _parsed_url(number: int, text: str) -> SplitResult:
    where = f"URL {number}"
    try:
        url = urlsplit(text if "://" in text else f"nats://{text}")
        port = url.port
    except ValueError:
        raise ConfigurationError(
            "servers",
            f"{where} cannot be read; it must look like nats://host:4222, with a port from 1 to 65535 and special "
            "characters in a password percent-encoded",
        ) from None
    if url.scheme not in _SCHEMES:
        raise ConfigurationError("servers", f"{where} has the scheme {url.scheme!r}; it must be nats, tls, ws or wss")
    if not url.hostname or re.search(r"\s", text) or port == 0:
        raise ConfigurationError("servers", f"{where} names no host or no port; it must look like nats://host:4222")
    if url.scheme in ("nats", "tls") and (url.path.strip("/") or url.query or url.fragment):
        raise ConfigurationError(
            "servers",
            f"{where} has something behind the port; it must look like nats://host:4222, with special characters in a "
            "password percent-encoded",
        )
    if url.username == "" or url.password == "":
        raise ConfigurationError("servers", f"{where} has an empty user or password before the @")
    return url


def _url_credentials(url: SplitResult) -> dict[str, str]:
    if url.username is None:
        return {}
    if url.password is None:
        return {"token": unquote(url.username)}
    return {"user": unquote(url.username), "password": unquote(url.password)}


def _bare(url: SplitResult) -> str:
    host = url.netloc.rpartition("@")[2]
    if url.scheme in ("ws", "wss"):
        return urlunsplit(url._replace(netloc=host))
    return f"{url.scheme}://{host}" if url.port is not None else f"{url.scheme}://{host.rstrip(':')}:4222"


def _check_url_credentials(from_url: Mapping[str, str], values: Mapping[str, Any]) -> None:
    beside = [field for field in values if field in _CREDENTIALS and values[field] is not None]
    if from_url and beside:
        raise ConfigurationError(
            "servers", f"the URL holds credentials, and {beside[0]} is given too; give one of them"
        )


def _check_websocket_package(servers: Sequence[str]) -> None:
    from importlib.util import find_spec

    if servers[0].startswith("ws") and find_spec("aiohttp") is None:
        raise ConfigurationError("servers", "ws:// and wss:// need the package aiohttp: pip install aiohttp")


# --- sources ---------------------------------------------------------------------------------------------------------


def _variable(field: str) -> str:
    return ENVIRONMENT_PREFIX + field.upper()


def _environment_layers(environ: Mapping[str, str]) -> list[_Layer]:
    """Our own variables, and below them those of the ``nats`` CLI. An empty variable counts as not set, as there."""
    fields = {_variable(field): field for field in Options.model_fields}
    for variable in environ:
        ours = variable.startswith(ENVIRONMENT_PREFIX) and not variable.startswith(RESERVED_PREFIX)
        if ours and variable not in fields and variable != CONFIG_VARIABLE:
            raise ConfigurationError(variable, _unknown(variable, [*fields, CONFIG_VARIABLE]))
    if environ.get("NATS_SOCKS_PROXY"):
        raise ConfigurationError("NATS_SOCKS_PROXY", "natsrt cannot connect through a SOCKS proxy")
    return [_variables_layer(names, environ) for names in (fields, NATS_ENVIRONMENT)]


def _variables_layer(fields: Mapping[str, str], environ: Mapping[str, str]) -> _Layer:
    found = {variable: field for variable, field in fields.items() if environ.get(variable)}
    return _Layer(
        {field: environ[variable] for variable, field in found.items()},
        {field: variable for variable, field in found.items()},
    )


def _with_lone_user_as_token(sources: Sequence[_Layer]) -> list[_Layer]:
    """``NATS_USER`` without a password anywhere is a token, as in the ``nats`` CLI."""
    if any(layer.values.get("password") is not None for layer in sources):
        return list(sources)
    return [
        _Layer(
            {"token" if field == "user" else field: value for field, value in layer.values.items()},
            {"token" if field == "user" else field: origin for field, origin in layer.origins.items()},
        )
        if layer.origins.get("user") == "NATS_USER" and "token" not in layer.values
        else layer
        for layer in sources
    ]


def _context_layer(name: str, environ: Mapping[str, str]) -> _Layer:
    context = read_context(name, environ)
    return _Layer(
        context.settings,
        {setting: f"NATS context {context.path}: {field}" for setting, field in context.fields.items()},
    )


def _file_layer(path: Path) -> _Layer:
    readers: dict[str, Callable[[Path, str], tuple[dict[str, Any], dict[str, int]]]] = {
        ".toml": _read_toml,
        ".yaml": _read_yaml,
        ".yml": _read_yaml,
    }
    read = readers.get(path.suffix.lower())
    if read is None:
        raise ConfigurationError("config", f"{path} must end in .toml, .yaml or .yml")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigurationError("config", f"there is no file {path}") from None
    except OSError as error:
        raise ConfigurationError("config", f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError("config", f"{path} is not UTF-8 text") from None
    values, lines = read(path, text)
    origins = {key: f"{path}, line {lines[key]}: {key}" if key in lines else f"{path}: {key}" for key in values}
    return _Layer({key: _beside(path, key, value) for key, value in values.items()}, origins)


def _beside(path: Path, field: str, value: Any) -> Any:
    """A path in a configuration file, relative to that file."""
    info = Options.model_fields.get(field)
    if info is None or _kind(info)[0] is not Path or not isinstance(value, str):
        return value
    return value if _looks_like_contents(value) else str(path.resolve().parent / Path(value).expanduser())


def _read_toml(path: Path, text: str) -> tuple[dict[str, Any], dict[str, int]]:
    import tomllib

    try:
        table = _own_table(path, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(str(path), f"is not valid TOML: {error}") from None
    # tomllib keeps no positions. A key that stands at the start of exactly one line is certain to be that one.
    lines: dict[str, int] = {}
    for key in table:
        found = [
            number
            for number, line in enumerate(text.splitlines(), 1)
            if re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", line)
        ]
        if len(found) == 1:
            lines[key] = found[0]
    return table, lines


def _read_yaml(path: Path, text: str) -> tuple[dict[str, Any], dict[str, int]]:
    import yaml

    try:
        document = yaml.safe_load(text)
        root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        # PyYAML's own text quotes the line, and with it what may be a password.
        mark = error.problem_mark
        where = f"{path}, line {mark.line + 1}" if mark is not None else str(path)
        raise ConfigurationError(where, "is not valid YAML") from None
    except yaml.YAMLError:
        raise ConfigurationError(str(path), "is not valid YAML") from None
    if document is None:
        return {}, {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise ConfigurationError(str(path), "must hold settings, as lines of `name: value`")
    table = _own_table(path, document)
    if table is not document:
        root = next(value for key, value in root.value if key.value == "natsrt")
    lines: dict[str, int] = {}  # Also finds what PyYAML overlooks: of two lines for one setting it takes the last.
    for key, _ in root.value if table else ():
        if key.value in lines:
            raise ConfigurationError(f"{path}, line {key.start_mark.line + 1}: {key.value}", "is given twice")
        lines[key.value] = key.start_mark.line + 1
    return table, lines


def _own_table(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    if "natsrt" not in document:
        return document
    for key, value in document.items():
        if not isinstance(value, dict) and not (key == "natsrt" and value is None):
            problem = "must be a table" if key == "natsrt" else "must stand in a table; natsrt's settings in [natsrt]"
            raise ConfigurationError(f"{path}: {key}", problem)
    table: dict[str, Any] = document["natsrt"] or {}
    return table


# --- values ----------------------------------------------------------------------------------------------------------

_TYPE_NAMES: Mapping[type, str] = {
    tuple: "URLs",
    str: "text",
    SecretStr: "secret text",
    Path: "file path",
    float: "seconds",
    int: "whole number",
    bool: "true or false",
}

_EXPECTED: Mapping[type, str] = {
    tuple: "one URL or a list of URLs",
    str: "text",
    SecretStr: "text that is not empty",
    Path: "the path of a file",
    float: "a number of seconds greater than 0",
    int: "a whole number of at least 1",
    bool: "true or false",
}

_EXPECTED_OF_FIELD: Mapping[str, str] = {
    "namespace": "one token of letters, digits, - and _",
    "name": "text that is not empty",
    "user": "text that is not empty",
    "heartbeat_ttl": "a number of seconds of at least 1",
    "registry_replicas": "a whole number from 1 to 5",
}


def _kind(info: FieldInfo) -> tuple[type, bool]:
    """The plain type of a field, and whether it may be None."""
    annotation: Any = info.annotation
    optional = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    if optional:
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    kind: type = typing.get_origin(annotation) or annotation
    return kind, optional


def _configuration_error(error: ValidationError) -> ConfigurationError:
    """The first of Pydantic's complaints as ours: what is wrong, what would be right, and no secret."""
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0])
    own_text = str(first.get("ctx", {}).get("error", "")) if first["type"] == "value_error" else ""
    if own_text:
        return ConfigurationError(field, own_text)
    kind, optional = _kind(Options.model_fields[field])
    expected = _EXPECTED_OF_FIELD.get(field, _EXPECTED[kind]) + (" or none" if optional and kind is float else "")
    value = first["input"]
    shown = _type_of(value) if kind in (SecretStr, tuple) else f"{value!r:.60}"
    if kind is SecretStr and isinstance(value, str):
        shown = "an empty one"
    return ConfigurationError(field, f"must be {expected}, not {shown}")


def _type_of(value: object) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"


def _check_together(options: Options) -> None:
    """What no single field can tell."""
    kinds = sorted(_kinds({field: getattr(options, field) for field in _CREDENTIALS}))
    if len(kinds) > 1:
        given = [field for kind in kinds for field in kind if getattr(options, field) is not None]
        raise ConfigurationError(given[0], f"cannot be used together with {', '.join(given[1:])}; give one of them")
    if options.user is not None and options.password is None:
        raise ConfigurationError("user", "is given without password; a token is given as token")
    if options.password is not None and options.user is None:
        raise ConfigurationError("password", "is given without user")
    if options.tls_key is not None and options.tls_cert is None:
        raise ConfigurationError("tls_key", "is given without tls_cert, the certificate that it belongs to")
    if options.heartbeat_ttl <= 2 * options.heartbeat_interval:
        raise ConfigurationError(
            "heartbeat_ttl",
            f"must be more than twice heartbeat_interval, so that one late heartbeat does not end a worker; it is "
            f"{options.heartbeat_ttl:g} s, and heartbeat_interval is {options.heartbeat_interval:g} s",
        )
    if options.nkey_seed is not None:
        _check_seed("nkey_seed", options.nkey_seed.get_secret_value())
    # A pipe (`--creds <(…)`) can be read once only; that once is the client's.
    if options.nkey_seed_file is not None and options.nkey_seed_file.is_file():
        _seed_in(options.nkey_seed_file)
    if options.creds is not None and options.creds.is_file():
        _check_credentials_file(options.creds)


# --- credentials and certificates ------------------------------------------------------------------------------------


def _check_seed(field: str, seed: str, where: str = "") -> None:
    import nkeys  # type: ignore[import-untyped]

    text = seed.strip().encode()
    try:
        prefix, key = nkeys.decode_seed(text)
        # nkeys overlooks the checksum; encoding the key again computes it.
        is_whole = nkeys.encode_seed(key, prefix) == text
    except Exception:  # nkeys lets base64's errors through, beside its own
        prefix, is_whole = None, False
    if not is_whole or prefix != nkeys.PREFIX_BYTE_USER:
        raise ConfigurationError(
            field, f"must be the whole seed of a user NKEY, which starts with SU and has 58 letters and digits{where}"
        )


def _seed_in(path: Path) -> str:
    """The seed in a file: the one line that looks like one, as the ``nats`` CLI reads it, comments and all."""
    try:
        found = _SEED.search(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise ConfigurationError("nkey_seed_file", f"{path} cannot be read: {error.strerror}") from None
    if found is None:
        raise ConfigurationError("nkey_seed_file", f"there is no seed of an NKEY in {path}")
    _check_seed("nkey_seed_file", found[1], f"; the one in {path} is not")
    return found[1]


def _check_credentials_file(path: Path) -> None:
    # nats-py reads on for ever at the end of a file without a JWT, inside the event loop.
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise ConfigurationError("creds", f"{path} cannot be read: {error.strerror}") from None
    for section in _CREDENTIALS_FILE_SECTIONS:
        if section not in contents:
            raise ConfigurationError("creds", f"{path} is no credentials file: it has no '{section.decode()}'")


def _tls_context(ca: Path | None, cert: Path | None, key: Path | None) -> ssl.SSLContext:
    import ssl

    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError("tls_ca", f"{ca} cannot be used as CA certificates: {_reason(error)}") from None
    if cert is not None:
        try:
            # Without a password OpenSSL would ask for one at the terminal.
            context.load_cert_chain(cert, key, password=_no_password)
        except (OSError, ssl.SSLError, _EncryptedKey) as error:
            with_key = f" with the key {key}" if key else ""
            raise ConfigurationError("tls_cert", f"{cert} cannot be used{with_key}: {_reason(error)}") from None
    return context


class _EncryptedKey(Exception):
    pass


def _no_password() -> str:
    raise _EncryptedKey("the private key is encrypted; store it without a passphrase")


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
