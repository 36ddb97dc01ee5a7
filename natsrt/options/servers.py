"""The URLs of servers, and the credentials in them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from natsrt.errors import ConfigurationError
from natsrt.options.credentials import CREDENTIALS
from natsrt.options.values import type_of

_SCHEMES = ("nats", "tls", "ws", "wss")


def parsed_servers(given: object) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """URLs without credentials, and the credentials that were in them.

    nats-py does not decode percent-encoded credentials in a URL, and does not send them to servers that it discovers.
    So they are decoded here and passed to it as arguments. Error texts show no part of a URL: in a URL that cannot be
    parsed, the position of the password is unknown.
    """
    texts = given.split(",") if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ConfigurationError("servers", f"must be one URL or a list of URLs, not {type_of(given)}")
    urls = [_parsed_url(number, text.strip()) for number, text in enumerate(texts, 1)]
    if not urls:
        raise ConfigurationError("servers", "must name at least one server")
    if len({url.scheme in ("ws", "wss") for url in urls}) > 1:
        raise ConfigurationError("servers", "ws:// and wss:// cannot be mixed with nats:// and tls://")
    if {url.scheme for url in urls} == {"ws", "wss"}:
        raise ConfigurationError(
            "servers", "ws:// cannot be mixed with wss://: it would send credentials in plain text"
        )
    credentials = [found for url in urls if (found := _url_credentials(url))]
    if any(found != credentials[0] for found in credentials):
        raise ConfigurationError("servers", "the URLs contain different credentials; a runtime connects as one user")
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
            f"{where} has something after the port; it must look like nats://host:4222, with special characters in a "
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


def check_url_credentials(from_url: Mapping[str, str], values: Mapping[str, Any]) -> None:
    """Raise a `ConfigurationError` if a source has credentials in the URL and also as settings."""
    beside = [field for field in values if field in CREDENTIALS and values[field] is not None]
    if from_url and beside:
        raise ConfigurationError(
            "servers", f"the URL contains credentials, and {beside[0]} is given too; use one of them"
        )


def check_websocket_package(servers: Sequence[str]) -> None:
    """Raise a `ConfigurationError` if a WebSocket URL is given and the package for it is not installed."""
    from importlib.util import find_spec

    if servers[0].startswith("ws") and find_spec("aiohttp") is None:
        raise ConfigurationError("servers", "ws:// and wss:// need the package aiohttp: pip install aiohttp")
