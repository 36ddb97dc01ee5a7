"""The values of settings: how they are converted and checked, and the error texts for unusable ones."""

from __future__ import annotations

import json
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from natsrt.arguments import checked_type
from natsrt.durable_types import DURABLE_FIELDS, DurableTopics, merged
from natsrt.errors import ConfigurationError
from natsrt.keyed_types import KeyedOptions
from natsrt.options.credentials import SEED
from natsrt.retry_types import RETRY_FIELDS, RetryOptions
from natsrt.wire.ranges import LARGEST, LONGEST, seconds_text, whole_text
from natsrt.wire.task_attributes import MOST

_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_DURATION_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def _no_bool(value: object) -> object:
    # Python and Pydantic treat True as 1; as a number of seconds or bytes it is a mistake.
    if isinstance(value, bool):
        raise ValueError
    return value


def _seconds(value: object) -> object:
    """Seconds from text: a plain number, or a duration in the notation of Go and of the ``nats`` CLI: ``1m30s``."""
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


def looks_like_contents(text: str) -> bool:
    """True if ``text`` is not a path, but looks like the contents of a credentials file."""
    return "BEGIN " in text or SEED.search(text) is not None


def _not_contents(value: object) -> object:
    """Refuse the contents of a file in place of its path, before an error text could show them."""
    if isinstance(value, str) and looks_like_contents(value):
        raise ValueError("must be the path of a file, not its contents")
    return value


def _readable_file(path: Path) -> Path:
    path = Path(os.path.abspath(path.expanduser()))
    if not path.exists():
        raise ValueError(f"there is no file {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a directory; it must be a file")
    if not os.access(path, os.R_OK):
        raise ValueError(f"this user may not read the file {path}")
    return path


class _Table(dict[str, Any]):
    """A table that is never changed, and so can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def _keyed_types(value: object) -> object:
    """Agent types, from a table, a list, or one text with commas. A name without a value means: keyed."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        value = dict.fromkeys(value, True)
    if not isinstance(value, Mapping):
        raise ValueError(_KEYED)
    return _Table({_agent_type(name): _keyed_options(name, given) for name, given in value.items()})


def _domain(name: str) -> str:
    """The name of a JetStream domain: one token of a subject, as the server wants it."""
    if not name or any(character.isspace() or character in ".*>" for character in name):
        raise ValueError(f"must be the domain in the server's jetstream block, without ., * and >, not {name!r}")
    return name


def _agent_type(name: object) -> str:
    """The name of a table of options. Raises ValueError if no agent type can have it."""
    return checked_type(name, "each name")


def _keyed_options(agent_type: str, given: object) -> KeyedOptions | bool:
    if isinstance(given, KeyedOptions | bool):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"{agent_type}: must be true, false, or a table of options, not {given!r:.60}")
    unknown = given.keys() - {field.name for field in fields(KeyedOptions)}
    if unknown:
        known = ", ".join(field.name for field in fields(KeyedOptions))
        raise ValueError(f"{agent_type}: there is no option {sorted(map(str, unknown))[0]!r}; the options are {known}")
    times = {name: _seconds(_none_word(given[name])) for name in _KEYED_TIMES if isinstance(given.get(name), str)}
    try:
        return KeyedOptions(**{**given, **times})
    except ConfigurationError as error:
        raise ValueError(f"{agent_type}: {error}") from None


def _retries(value: object) -> object:
    """How often the events of agent types are tried again, from a table, or its JSON text. Options may be left out."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"{_RETRIES}, or its JSON text") from None
    if not isinstance(value, Mapping):
        raise ValueError(f"{_RETRIES}, not {value!r:.60}")
    return _Table({_agent_type(agent_type): _retry_options(agent_type, given) for agent_type, given in value.items()})


def _retry_options(agent_type: object, given: object) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{agent_type}: must be a table of options, not {given!r:.60}")
    if unknown := given.keys() - {*RETRY_FIELDS}:
        known = ", ".join(RETRY_FIELDS)
        raise ValueError(f"{agent_type}: there is no option {sorted(map(str, unknown))[0]!r}; the options are {known}")
    options: dict[str, Any] = {
        name: _seconds(value) if name in _RETRY_TIMES else value for name, value in given.items()
    }
    try:
        RetryOptions(**options)
    except ConfigurationError as error:
        raise ValueError(f"{agent_type}: {error}") from None
    return _Table(options)


_RETRY_TIMES = ("retry_delay", "retry_delay_max")
_RETRIES = "must be a table of agent types, each a table of options"


def _durable_topics(value: object) -> object:
    """Durable topics, from a list of patterns and of tables with patterns and a policy, or one text with commas."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, DurableTopics | Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{_DURABLE}, not {value!r:.60}")
    plain = [one for one in value if isinstance(one, str)]
    try:
        others = [_durable(one) for one in value if not isinstance(one, str)]
        return merged([*([DurableTopics(*plain)] if plain else ()), *others])
    except ConfigurationError as error:
        raise ValueError(error.problem) from None


def _durable(given: object) -> DurableTopics:
    if isinstance(given, DurableTopics):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"{_DURABLE}, not {given!r:.60}")
    settings: dict[str, Any] = {name: _none_word(value) for name, value in given.items()}
    patterns = settings.pop("patterns", ())
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list | tuple):
        raise ValueError(f"patterns must be a list of topic types and prefixes, not {patterns!r:.60}")
    if unknown := settings.keys() - set(DURABLE_FIELDS):
        known = ", ".join(("patterns", *DURABLE_FIELDS))
        raise ValueError(f"there is no option {sorted(map(str, unknown))[0]!r}; the options are {known}")
    if isinstance(settings.get("max_age"), str):
        settings["max_age"] = _seconds(settings["max_age"])
    return DurableTopics(*patterns, **settings)


_DURABLE = (
    "must be a list of topic types and prefixes, and of tables with patterns and a policy; or topic types and prefixes "
    "with commas"
)
_KEYED_TIMES = ("save_interval", "idle_timeout")
_KEYED = "must be a table of agent types, each true, false or a table of options; or names of agent types with commas"

Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=LONGEST, allow_inf_nan=False)]
TimeToLive = Annotated[Seconds, Field(ge=1, le=MOST)]
"""Seconds for which a server keeps one message: at least its shortest time to live. It adds them to the time."""
SecondsOrNone = Annotated[Seconds | None, BeforeValidator(_none_word)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=LARGEST)]
CountOrNone = Annotated[Count | None, BeforeValidator(_none_word)]
Text = Annotated[str, Field(min_length=1)]
Secret = Annotated[SecretStr, Field(min_length=1)]
File = Annotated[Path, BeforeValidator(_not_contents), AfterValidator(_readable_file)]
DomainName = Annotated[str, AfterValidator(_domain)]
KeyedTypes = Annotated[Mapping[str, Any], PlainValidator(_keyed_types)]
Retries = Annotated[dict[str, Any], PlainValidator(_retries)]
NO_TYPES: dict[str, Any] = _Table()
Durable = Annotated[Sequence[DurableTopics], PlainValidator(_durable_topics)]

TYPE_NAMES: Mapping[type, str] = {
    tuple: "URLs",
    Mapping: "agent types",
    dict: "agent types",
    Sequence: "topics",
    str: "text",
    SecretStr: "secret text",
    Path: "file path",
    float: "seconds",
    int: "whole number",
    bool: "true or false",
}

_EXPECTED: Mapping[type, str] = {
    tuple: "one URL or a list of URLs",
    Mapping: _KEYED,
    dict: _RETRIES.removeprefix("must be "),
    Sequence: _DURABLE.removeprefix("must be "),
    str: "text",
    SecretStr: "text that is not empty",
    Path: "the path of a file",
    bool: "true or false",
}

_EXPECTED_OF_FIELD: Mapping[str, str] = {
    "namespace": "one token of letters, digits, - and _",
    "name": "text that is not empty",
    "user": "text that is not empty",
}


def kind_of(info: FieldInfo) -> tuple[type, bool]:
    """The type of a field without its annotations, and whether it may be None."""
    annotation: Any = info.annotation
    optional = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    if optional:
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    kind: type = typing.get_origin(annotation) or annotation
    return kind, optional


def _expected(info: FieldInfo, kind: type, optional: bool) -> str:
    """What a field can be, in words."""
    if kind not in (float, int):
        return _EXPECTED[kind]
    least, most = _range(info)
    return (seconds_text if kind is float else whole_text)(least, most) + (" or none" if optional else "")


def _range(info: FieldInfo) -> tuple[Any, Any]:
    """The least number that a field can be, and the greatest one."""
    limits = [*info.metadata, *_limits(info.annotation)]
    least = max((limit.ge for limit in limits if getattr(limit, "ge", None) is not None), default=0)
    return least, min(limit.le for limit in limits if getattr(limit, "le", None) is not None)


def _limits(annotation: Any) -> Iterator[Any]:
    """The limits in an annotation, and in those within it."""
    for part in typing.get_args(annotation):
        yield from part.metadata if isinstance(part, FieldInfo) else ()
        yield from _limits(part)


def configuration_error(error: ValidationError, known: Mapping[str, FieldInfo]) -> ConfigurationError:
    """The first error of Pydantic as a `ConfigurationError`: what is wrong, what is allowed, and no secret.

    ``known`` are the fields of the settings, by name.
    """
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0])
    own_text = str(first.get("ctx", {}).get("error", "")) if first["type"] == "value_error" else ""
    if own_text:
        return ConfigurationError(field, own_text)
    kind, optional = kind_of(known[field])
    expected = _EXPECTED_OF_FIELD.get(field) or _expected(known[field], kind, optional)
    value = first["input"]
    shown = type_of(value) if kind in (SecretStr, tuple) else f"{value!r:.60}"
    if kind is SecretStr and isinstance(value, str):
        shown = "an empty one"
    return ConfigurationError(field, f"must be {expected}, not {shown}")


def type_of(value: object) -> str:
    """The type of a value in words, which do not show the value."""
    return "nothing" if value is None else f"a value of type {type(value).__name__}"
