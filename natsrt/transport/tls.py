"""TLS: why a secure connection cannot be made, and nats-py's TCP transport where natsrt needs it different.

OpenSSL names a cause only, in its own words. `tls_failure` says what it means for NATS, and which setting would be
right.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import ParseResult

import nats.errors
from nats.aio.transport import TcpTransport

_SNIFF_WITHIN = 1.0
"""Seconds for the handshake in `begins_with_tls`."""
_OTHER_HOST: Final = (62, 64)
"""OpenSSL's codes for a certificate of another host name, and of another IP address."""
_OUT_OF_DATE: Final = (9, 10)
"""OpenSSL's codes for a certificate that is not valid yet, and for one that has expired."""
_UNKNOWN_AUTHORITY: Final = (2, 18, 19, 20, 21, 27)
"""OpenSSL's codes for a certificate that no known authority has signed."""
_NOT_TLS: Final = (
    "WRONG_VERSION_NUMBER",
    "UNKNOWN_PROTOCOL",
    "HTTP_REQUEST",
    "PACKET_LENGTH_TOO_LONG",
    "RECORD_LAYER_FAILURE",
)
"""OpenSSL's reasons if the server sends something other than TLS."""
_ABOUT_CERTIFICATE: Final = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")
"""Parts of OpenSSL's reasons for alerts with which a server refuses a client certificate, or its absence."""
_NO_AGREEMENT: Final = (
    "PROTOCOL_VERSION",
    "UNSUPPORTED_PROTOCOL",
    "HANDSHAKE_FAILURE",
    "NO_SHARED_CIPHER",
    "INSUFFICIENT_SECURITY",
)
"""Parts of OpenSSL's reasons if client and server have no TLS version or cipher in common."""
_MERELY_CLOSED: Final = ("APPLICATION_DATA_AFTER_CLOSE_NOTIFY", "SHUTDOWN_WHILE_IN_INIT")


class TlsFailure(nats.errors.Error):
    """A secure connection cannot be made. ``text`` says why, and what would be right."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(text)

    @property
    def kind(self) -> str:
        """Equal for errors that are logged as one."""
        return self.text


NO_TLS_OFFERED: Final = (
    "a URL begins with tls://, or there are settings of TLS, but the server offers no TLS: configure tls in the "
    "server, or use nats:// and no such setting for all servers"
)
TLS_COMES_FIRST: Final = "the server begins with the TLS handshake (handshake_first): set tls_first"

TLS_COMES_LATER: Final = (
    "the server does not begin with the TLS handshake: turn tls_first off, or set handshake_first in the server"
)


def tls_failure(error: BaseException, *, tls_first: bool, certificate: bool) -> TlsFailure | None:
    """The failure of TLS that ``error`` reports; None if it is another error, such as a lost connection.

    ``tls_first`` and ``certificate`` say whether the client begins with TLS, and whether it has a certificate.
    """
    if isinstance(error, TlsFailure):
        return error
    # The error that aiohttp makes is an SSLError without a reason; the one below it has the reason.
    errors = (one for one in _chain_of(error) if isinstance(one, ssl.SSLError))
    found = next((one for one in errors if getattr(one, "reason", None) is not None), None)
    if found is None or isinstance(found, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return None
    if isinstance(found, ssl.SSLCertVerificationError):
        return TlsFailure(_unverified(found))
    reason = found.reason or ""
    if reason in _MERELY_CLOSED:
        return None
    return TlsFailure(_refused(reason, tls_first, certificate) or f"the TLS handshake failed: {reason or found}")


def _chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes. aiohttp keeps the error of TLS in an attribute of its own."""
    while error is not None:
        yield error
        error = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error.__cause__


def _unverified(error: ssl.SSLCertVerificationError) -> str:
    code, said = error.verify_code, error.verify_message.rstrip(".")
    if code in _OTHER_HOST:
        return f"the server's certificate is for another host ({said}): set tls_hostname to a name in the certificate"
    if code in _OUT_OF_DATE:
        return f"the server's certificate is out of date ({said}): give the server a new one, or correct the clock"
    if code in _UNKNOWN_AUTHORITY:
        return (
            f"the server's certificate is not signed by a known authority ({said}): set tls_ca to the file with the "
            "authority's certificate"
        )
    return f"the server's certificate cannot be verified: {said}"


def _refused(reason: str, tls_first: bool, certificate: bool) -> str | None:
    said = reason.lower().replace("_", " ")
    if reason in _NOT_TLS:
        if tls_first:
            return TLS_COMES_LATER
        return f"the server answers with something other than TLS ({said})"
    if "ALERT" in reason and any(part in reason for part in _ABOUT_CERTIFICATE):
        if certificate:
            return f"the server does not accept the client certificate in tls_cert ({said})"
        return f"the server requires a client certificate ({said}): set tls_cert and tls_key"
    if any(part in reason for part in _NO_AGREEMENT):
        return f"client and server have no TLS version or cipher in common ({said}): check both TLS configurations"
    return None


async def begins_with_tls(host: str, port: int) -> bool:
    """True if the server at this address answers a TLS handshake that comes before anything else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(_SNIFF_WITHIN):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except (OSError, TimeoutError):
        return False
    writer.transport.abort()
    return True


class _SecureProtocol(asyncio.StreamReaderProtocol):
    """The protocol of a stream over TLS. After the server's end, such a stream cannot stay half open."""

    def eof_received(self) -> bool:
        super().eof_received()
        return False


class Tcp(TcpTransport):
    """nats-py's TCP transport, with two corrections of TLS.

    At the end of a connection, asyncio does not warn of ``eof_received``. After a handshake that failed, `wait_closed`
    returns; in nats-py it never does, and so a client tries no other server.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._failed = False
        """True after a handshake that failed. The stream below it is not told that the connection has ended."""

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        self._failed = False
        await super().connect(uri, buffer_size, connect_timeout)

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: float
    ) -> None:
        assert self._io_writer is not None and self._bare_io_reader is not None
        # What came before the handshake began would not reach it, and both sides would wait for one another.
        if bytes(self._bare_io_reader._buffer).startswith(b"INFO "):  # type: ignore[attr-defined]
            raise TlsFailure(TLS_COMES_LATER)
        loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
        protocol = _SecureProtocol(reader)
        host: Any = uri if isinstance(uri, str) else uri.hostname
        below = self._io_writer.transport
        try:
            async with asyncio.timeout(connect_timeout):
                transport = await loop.start_tls(below, protocol, ssl_context, server_hostname=host)
        except BaseException:
            self._failed = True
            below.abort()
            raise
        assert transport is not None
        self._io_reader = reader
        self._io_writer = asyncio.StreamWriter(transport, protocol, reader, loop)

    async def wait_closed(self) -> None:
        if not self._failed:
            await super().wait_closed()  # type: ignore[no-untyped-call]
