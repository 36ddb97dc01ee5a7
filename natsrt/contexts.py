"""Contexts of the ``nats`` CLI: named sets of connection settings, one JSON file each.

The files are ``nats/context/NAME.json`` in ``$XDG_CONFIG_HOME``, or in ``~/.config`` if that is not set. Field names,
the expansion of ``~`` and ``$VARIABLE`` in paths, and the valid names are those of the Go package
``github.com/nats-io/jsm.go/natscontext``; the schemes ``file://`` and ``env://`` are those of its later versions.

A field that natsrt does not support is an error and is never ignored: otherwise natsrt could connect to another server,
or as another user, than ``nats --context NAME``. The context that the CLI has *selected* (``nats/context.txt``) is not
used: a runtime must not depend on a developer's last ``nats context select``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from natsrt.errors import ConfigurationError

__all__ = ["Context", "known_contexts", "read_context"]

_TEXTS = {
    "url": "servers",
    "user": "user",
    "password": "password",
    "token": "token",
    "inbox_prefix": "inbox_prefix",
    "jetstream_domain": "jetstream_domain",
}
_PATHS = {"creds": "creds", "nkey": "nkey_seed_file", "cert": "tls_cert", "key": "tls_key", "ca": "tls_ca"}

_IMPOSSIBLE = {
    "nsc": "natsrt does not run nsc; write a credentials file with `nsc generate creds` and name it in `creds`",
    "socks_proxy": "natsrt cannot connect through a SOCKS proxy",
    "user_jwt": "natsrt takes a JWT from a credentials file only; name one in `creds`",
    "user_seed": "natsrt takes a JWT's seed from a credentials file only; name one in `creds`",
    "windows_cert_store": "natsrt cannot use the Windows certificate store; name files in `cert`, `key` and `ca`",
    "jetstream_api_prefix": "natsrt uses no other API prefix than that of a domain: give `jetstream_domain` instead",
}

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True, slots=True)
class Context:
    """One context: its ``settings`` by field of `Options`, and in ``fields`` the name of each in the context's file."""

    name: str
    path: Path
    settings: Mapping[str, Any]
    fields: Mapping[str, str]


def known_contexts(environ: Mapping[str, str]) -> list[str]:
    """The names of the existing contexts, sorted."""
    try:
        return sorted(path.stem for path in _directory(environ).glob("*.json") if path.stat().st_size > 0)
    except OSError:
        return []


def read_context(name: str, environ: Mapping[str, str]) -> Context:
    """Read a context by its name, or by the path of a file that ends in ``.json``, as the CLI's ``--context`` does.

    Raises:
        ConfigurationError: The context does not exist, its file cannot be read, or it has a field that natsrt does
            not support.
    """
    path = Path(name) if name.endswith(".json") and Path(name).is_file() else _path_of(name, environ)
    found = _read_json(path)
    settings: dict[str, Any] = {}
    fields: dict[str, str] = {}
    for field, value in found.items():
        if not value:
            continue
        where = f"{path}: {field}"
        if field in _IMPOSSIBLE:
            raise ConfigurationError(where, _IMPOSSIBLE[field])
        setting = _TEXTS.get(field) or _PATHS.get(field)
        if field == "tls_first":
            settings["tls_first"], fields["tls_first"] = value, field
        elif setting is not None:
            if not isinstance(value, str):
                raise ConfigurationError(where, "must be text")
            read = _literal if field in _TEXTS else _file_path
            settings[setting], fields[setting] = read(where, value, environ), field
    return Context(name, path, settings, fields)


def _directory(environ: Mapping[str, str]) -> Path:
    configured = environ.get("XDG_CONFIG_HOME")
    return (Path(configured) if configured else _home(environ) / ".config") / "nats" / "context"


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ["HOME"]) if environ.get("HOME") else Path.home()


def _path_of(name: str, environ: Mapping[str, str]) -> Path:
    # The name becomes part of a path, so it must not lead out of the directory.
    is_name = name != "" and ".." not in name and not set(name) & set("/\\\0")
    path = _directory(environ) / f"{name}.json"
    if not is_name or not path.is_file():
        known = ", ".join(known_contexts(environ)) or "none"
        raise ConfigurationError(
            "context", f"there is no NATS context {name!r} in {_directory(environ)}; those that exist: {known}"
        )
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError("context", f"{path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ConfigurationError("context", f"{path}, line {error.lineno}, is not JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise ConfigurationError("context", f"{path} is not UTF-8 text") from None
    if not isinstance(found, dict):
        raise ConfigurationError("context", f"{path} must hold one JSON object")
    return found


def _literal(where: str, value: str, environ: Mapping[str, str]) -> str:
    """The value itself, or for ``env://NAME`` the value of that environment variable."""
    scheme = _scheme(value)
    if scheme in ("op", "nsc", "data", "file"):
        raise ConfigurationError(where, f"natsrt cannot read references with {scheme}: here, only env://NAME")
    if scheme != "env":
        return value
    name = value.removeprefix("env://")
    if not environ.get(name):
        raise ConfigurationError(where, f"refers to the environment variable {name!r}, which is not set or empty")
    return environ[name]


def _file_path(where: str, value: str, environ: Mapping[str, str]) -> str:
    """A path, with ``~``, ``$VARIABLE`` and ``${VARIABLE}`` expanded as the CLI expands them."""
    scheme = _scheme(value)
    if scheme in ("op", "nsc", "data", "env"):
        raise ConfigurationError(where, f"natsrt cannot read references with {scheme}: here, only the path of a file")
    path = _VARIABLE.sub(lambda match: environ.get(match[1] or match[2], ""), value.removeprefix("file://"))
    return str(_home(environ)) + path[1:] if path.startswith("~") else path


def _scheme(value: str) -> str:
    """The URI scheme in lower case; empty if there is none. It has at least two letters: ``C:\\creds`` is a path."""
    found = _SCHEME.match(value)
    return found[1].lower() if found else ""
