"""Reading settings from the environment, a configuration file and a NATS context.

``fields`` are the fields of `Options`, by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from natsrt.contexts import read_context
from natsrt.errors import ConfigurationError
from natsrt.options.layers import Layer, unknown_name
from natsrt.options.values import kind_of, looks_like_contents

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
"""The variables of the ``nats`` CLI (the flags in its ``nats/main.go``), and the setting that each one sets here.

Older versions of the CLI do not read ``NATS_TOKEN``.
"""

ENVIRONMENT_PREFIX = "NATSRT_"
CONFIG_VARIABLE = "NATSRT_CONFIG"
OTHER_VARIABLES = (
    CONFIG_VARIABLE,
    "NATSRT_HEALTH_HOST",
    "NATSRT_HEALTH_PORT",
    "NATSRT_LOG_FORMAT",
    "NATSRT_LOG_LEVEL",
)
"""natsrt's variables that are not settings: those of the command line."""
TESTS_PREFIX = "NATSRT_TEST_"
"""Prefix of the variables of natsrt's own tests."""


def variable_of(field: str) -> str:
    """The environment variable that sets a field."""
    return ENVIRONMENT_PREFIX + field.upper()


def environment_layers(environ: Mapping[str, str], fields: Iterable[str]) -> list[Layer]:
    """natsrt's own variables, and below them those of the ``nats`` CLI. As there, an empty variable is not set."""
    ours = {variable_of(field): field for field in fields}
    for variable in environ:
        is_ours = variable.startswith(ENVIRONMENT_PREFIX) and not variable.startswith(TESTS_PREFIX)
        if is_ours and variable not in ours and variable not in OTHER_VARIABLES:
            raise ConfigurationError(variable, unknown_name(variable, [*ours, *OTHER_VARIABLES]))
    if environ.get("NATS_SOCKS_PROXY"):
        raise ConfigurationError("NATS_SOCKS_PROXY", "natsrt cannot connect through a SOCKS proxy")
    return [_variables_layer(names, environ) for names in (ours, NATS_ENVIRONMENT)]


def _variables_layer(fields: Mapping[str, str], environ: Mapping[str, str]) -> Layer:
    found = {variable: field for variable, field in fields.items() if environ.get(variable)}
    return Layer(
        {field: environ[variable] for variable, field in found.items()},
        {field: variable for variable, field in found.items()},
    )


def with_lone_user_as_token(sources: Sequence[Layer]) -> list[Layer]:
    """If no source has a password, ``NATS_USER`` is a token, as in the ``nats`` CLI."""
    if any(layer.values.get("password") is not None for layer in sources):
        return list(sources)
    return [
        Layer(
            {"token" if field == "user" else field: value for field, value in layer.values.items()},
            {"token" if field == "user" else field: origin for field, origin in layer.origins.items()},
        )
        if layer.origins.get("user") == "NATS_USER" and "token" not in layer.values
        else layer
        for layer in sources
    ]


def context_layer(name: str, environ: Mapping[str, str]) -> Layer:
    """The settings of a NATS context. Raises the `ConfigurationError` of `read_context`."""
    context = read_context(name, environ)
    return Layer(
        context.settings,
        {setting: f"NATS context {context.path}: {field}" for setting, field in context.fields.items()},
    )


def file_layer(path: Path, fields: Mapping[str, FieldInfo]) -> Layer:
    """The settings of a TOML or YAML file. Raises `ConfigurationError` for one that cannot be read."""
    readers: dict[str, Callable[[Path, str, Collection[str]], tuple[dict[str, Any], dict[str, int]]]] = {
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
    values, lines = read(path, text, fields)
    origins = {key: f"{path}, line {lines[key]}: {key}" if key in lines else f"{path}: {key}" for key in values}
    return Layer({key: _beside(path, value, fields.get(key)) for key, value in values.items()}, origins)


def _beside(path: Path, value: Any, info: FieldInfo | None) -> Any:
    """A path in a configuration file, resolved from the directory of that file; other values unchanged."""
    if info is None or kind_of(info)[0] is not Path or not isinstance(value, str):
        return value
    return value if looks_like_contents(value) else str(path.resolve().parent / Path(value).expanduser())


def _read_toml(path: Path, text: str, fields: Collection[str]) -> tuple[dict[str, Any], dict[str, int]]:
    import tomllib

    try:
        table = _own_table(path, tomllib.loads(text), fields)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(str(path), f"is not valid TOML: {error}") from None
    # tomllib has no line numbers. If exactly one line starts with a key, the key is in that line.
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


def _read_yaml(path: Path, text: str, fields: Collection[str]) -> tuple[dict[str, Any], dict[str, int]]:
    import yaml

    try:
        document = yaml.safe_load(text)
        root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        # The text of PyYAML quotes the line, which may contain a password.
        mark = error.problem_mark
        where = f"{path}, line {mark.line + 1}" if mark is not None else str(path)
        raise ConfigurationError(where, "is not valid YAML") from None
    except yaml.YAMLError:
        raise ConfigurationError(str(path), "is not valid YAML") from None
    if document is None:
        return {}, {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise ConfigurationError(str(path), "must contain settings, as lines of `name: value`")
    table = _own_table(path, document, fields)
    if table is not document:
        root = next(value for key, value in root.value if key.value == "natsrt")
    lines: dict[str, int] = {}  # Also finds settings that are given twice: PyYAML takes the last one.
    for key, _ in root.value if table else ():
        if key.value in lines:
            raise ConfigurationError(f"{path}, line {key.start_mark.line + 1}: {key.value}", "is given twice")
        lines[key.value] = key.start_mark.line + 1
    return table, lines


def _own_table(path: Path, document: dict[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """The table ``natsrt`` of a document, or the document itself if it has only settings."""
    if "natsrt" not in document:
        for key, value in document.items():
            if isinstance(value, dict) and key not in fields:
                nested = ", not in [tool.natsrt]" if key == "tool" and "natsrt" in value else ""
                raise ConfigurationError(f"{path}: [{key}]", f"natsrt's settings must be in the table [natsrt]{nested}")
        return document
    for key, value in document.items():
        if not isinstance(value, dict) and not (key == "natsrt" and value is None):
            problem = "must be a table" if key == "natsrt" else "must be in a table; natsrt's settings are in [natsrt]"
            raise ConfigurationError(f"{path}: {key}", problem)
    table: dict[str, Any] = document["natsrt"] or {}
    return table
