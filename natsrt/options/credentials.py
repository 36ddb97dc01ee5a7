"""Credentials: seeds, credentials files and certificates, checked before the client uses them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natsrt.errors import ConfigurationError

if TYPE_CHECKING:
    import ssl

CREDENTIAL_KINDS = (("user", "password"), ("token",), ("nkey_seed",), ("nkey_seed_file",), ("creds",))
"""The settings that are credentials, by kind. Only those of one kind are used together."""
CREDENTIALS = frozenset(field for kind in CREDENTIAL_KINDS for field in kind)

SEED = re.compile(r"^\s*(S[A-Z2-7]{40,})\s*$", re.MULTILINE)
_FILE_SECTIONS = (b"BEGIN NATS USER JWT", b"BEGIN USER NKEY SEED")


def kinds_in(values: Mapping[str, Any]) -> set[tuple[str, ...]]:
    """The kinds of credentials of which at least one setting is given."""
    return {kind for kind in CREDENTIAL_KINDS if any(values.get(field) is not None for field in kind)}


def check_seed(field: str, seed: str, where: str = "") -> None:
    """Raise a `ConfigurationError` for ``field`` unless ``seed`` is a user's seed. ``where`` ends its text."""
    import nkeys  # type: ignore[import-untyped]

    text = seed.strip().encode()
    try:
        prefix, key = nkeys.decode_seed(text)
        # nkeys does not check the checksum; encoding the key again computes it.
        is_whole = nkeys.encode_seed(key, prefix) == text
    except Exception:  # nkeys raises errors of base64 beside its own
        prefix, is_whole = None, False
    if not is_whole or prefix != nkeys.PREFIX_BYTE_USER:
        raise ConfigurationError(
            field, f"must be the whole seed of a user NKEY, which starts with SU and has 58 letters and digits{where}"
        )


def seed_in(path: Path) -> str:
    """The seed in a file: its first line that looks like a seed. Other lines are ignored, as by the ``nats`` CLI."""
    try:
        found = SEED.search(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise ConfigurationError("nkey_seed_file", f"{path} cannot be read: {error.strerror}") from None
    if found is None:
        raise ConfigurationError("nkey_seed_file", f"there is no NKEY seed in {path}")
    check_seed("nkey_seed_file", found[1], f"; the one in {path} is not")
    return found[1]


def check_credentials_file(path: Path) -> None:
    """Raise a `ConfigurationError` unless the file is a credentials file."""
    # With a file without a JWT, nats-py would read its end for ever, and block the event loop.
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise ConfigurationError("creds", f"{path} cannot be read: {error.strerror}") from None
    for section in _FILE_SECTIONS:
        if section not in contents:
            raise ConfigurationError("creds", f"{path} is not a credentials file: it has no '{section.decode()}'")


def tls_context(ca: Path | None, cert: Path | None, key: Path | None) -> ssl.SSLContext:
    """The TLS context of a client, from the paths of PEM files.

    None means: the system's CA certificates (``ca``), no client certificate (``cert``), the key is in the file of the
    certificate (``key``).
    """
    import ssl

    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError("tls_ca", f"{ca} cannot be used as CA certificates: {_reason(error)}") from None
    if cert is not None:
        try:
            # Without a password function, OpenSSL would ask for a password in the terminal.
            context.load_cert_chain(cert, key, password=_no_password)
        except (OSError, ssl.SSLError, _EncryptedKey) as error:
            if key is None and _has_no_key(cert):
                raise ConfigurationError(
                    "tls_cert", f"{cert} contains no private key: give tls_key (--tlskey)"
                ) from None
            with_key = f" with the key {key}" if key else ""
            raise ConfigurationError("tls_cert", f"{cert} cannot be used{with_key}: {_reason(error)}") from None
    return context


class _EncryptedKey(Exception):
    pass


def _no_password() -> str:
    raise _EncryptedKey("the private key is encrypted; store it without a passphrase")


def _has_no_key(cert: Path) -> bool:
    """Whether a file has a certificate in PEM, and no key."""
    try:
        contents = cert.read_bytes()
    except OSError:
        return False
    return b"BEGIN CERTIFICATE" in contents and b"PRIVATE KEY" not in contents


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
