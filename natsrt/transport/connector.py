"""Connects new clients to NATS, and closes those that are no longer used.

`natsrt.transport.connection` decides when a new client is needed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

import nats.errors
from nats.aio.client import Client

from natsrt.background import BackgroundTasks, end_tasks
from natsrt.errors import PermissionDenied, ServerRefused, ServerUnreachable, TlsFailed
from natsrt.options import Options
from natsrt.options.credentials import CREDENTIALS, kinds_in
from natsrt.transport.client import ClientReports, NatsClient
from natsrt.transport.refusals import ServerError
from natsrt.transport.stall_watch import StallWatch
from natsrt.transport.tls import TlsFailure, tls_failure

logger: logging.Logger = logging.getLogger("natsrt.connection")

_ONE_ATTEMPT = 2.0
"""Maximum time for one server to accept a connection, in seconds."""
_ONE_CLOSE = 2.0
"""Maximum time to wait for a client to close, in seconds."""


_CUT_OFF = (nats.errors.UnexpectedEOF, ConnectionResetError, BrokenPipeError)
"""Errors of a connection that the server closes. They say less than what the server said before."""


class ClientOwner(ClientReports, Protocol):
    """Receives the reports of the clients that it has connected, including clients that it has replaced."""

    async def client_error(self, error: Exception) -> None:
        """Called when a client reports an error, possibly before it is connected."""

    def client_disconnected(self, client: NatsClient) -> None:
        """Called when the client has lost its connection. It reconnects automatically."""

    def client_reconnected(self, client: NatsClient) -> None:
        """Called when the client is connected again."""

    def client_closed(self, client: NatsClient) -> None:
        """Called when the client has closed and will not reconnect."""


class Connector:
    """Connects the clients of one connection, one after the other."""

    def __init__(self, options: Options, client_name: str, stall_watch: StallWatch) -> None:
        self._options = options
        self._name = client_name
        self._stall_watch = stall_watch
        self.last_error: str | None = None
        """The text of the last error, for the errors of waits that time out; None if there was none."""
        self.refusal: ServerError | TlsFailure | None = None
        """Why the server ended the connection or does not accept it, or why TLS fails; None if it has not said so since
        it was last reached."""
        self._discovered: dict[str, None] = {}
        """Servers of the cluster that former clients discovered. A new client may have to connect to one of them."""
        self._refused: asyncio.Future[None] | None = None
        """Fails when the server refuses the credentials, or when TLS fails; None while no client is being connected."""
        self._connecting: NatsClient | None = None
        """The client that is being connected; None while none is."""
        self._tls_failures = 0
        """Number of attempts in a row that ended with a failure of TLS."""

    def reset(self) -> None:
        """Forget the last error and the discovered servers."""
        self.last_error = self.refusal = None
        self._discovered.clear()

    def discover(self, client: NatsClient) -> None:
        """Keep the servers that ``client`` has discovered for later clients."""
        if not any(url.startswith("ws") for url in self._options.servers):  # nats-py would use them as TCP servers
            self._discovered |= dict.fromkeys(url.geturl() for url in client.discovered_servers)

    def note_error(self, error: Exception) -> Exception:
        """Keep an error of a client. Returns it, as a `TlsFailure` if TLS is its cause."""
        options = self._options
        failure = tls_failure(error, tls_first=options.tls_first, certificate=options.tls_cert is not None)
        error = failure or error
        self.last_error = str(error) or type(error).__name__
        self._tls_failures = 0 if failure is None else self._tls_failures + 1
        if isinstance(error, TlsFailure):
            self.refusal = error
            # A client tries its servers in turn, so as many failures in a row are of all servers.
            if self._connecting is not None and self._tls_failures >= len(self._connecting.servers):
                self._give_up()
        elif isinstance(error, ServerError):
            if error.ends_connection:
                self.refusal = error
            if error.refuses_credentials:
                self._give_up()
        elif not isinstance(error, _CUT_OFF) and not self._another_fails():
            self.refusal = None  # the server cannot be reached any more
        return error

    def _another_fails(self) -> bool:
        """True if a client is being connected to several servers, and TLS fails with one that can be reached."""
        return (
            isinstance(self.refusal, TlsFailure) and self._connecting is not None and len(self._connecting.servers) > 1
        )

    def _give_up(self) -> None:
        """Let the client that is being connected make no more attempts."""
        if self._refused is not None and not self._refused.done():
            self._refused.set_exception(self.unreachable(0.0))

    def unreachable(self, seconds: float, reason: str | None = None) -> ServerUnreachable | PermissionDenied:
        """See `Connection.unreachable`."""
        refusal, servers = self.refusal, self._options.safe_servers
        if refusal is None:
            return ServerUnreachable(servers, seconds, reason or self.last_error)
        if isinstance(refusal, TlsFailure):
            return TlsFailed(servers, seconds, refusal.text)
        if refusal.refuses_credentials:
            return PermissionDenied("connect", self._with_credentials(), refusal.text)
        return ServerRefused(servers, seconds, refusal.text)

    def _with_credentials(self) -> str:
        given = kinds_in({name: getattr(self._options, name) for name in CREDENTIALS})
        if given:
            return "with these credentials"
        return "without credentials" if self._options.tls_cert is None else "with the client certificate in tls_cert"

    async def connect(self, owner: ClientOwner, timeout: float) -> NatsClient:
        """Return a new, connected client that reports to ``owner``.

        Raises `ServerUnreachable` after ``timeout`` seconds. Raises `PermissionDenied` at once if the credentials are
        refused, and `TlsFailed` if TLS fails with all servers.
        """
        client = self._connecting = NatsClient(owner, self._stall_watch)
        self._tls_failures = 0
        settings = self._options.connect_kwargs()
        settings |= {"name": self._name, "connect_timeout": min(_ONE_ATTEMPT, timeout)}
        settings["servers"] += self._discovered
        refused = self._refused = asyncio.get_running_loop().create_future()
        connecting = asyncio.ensure_future(
            client.connect(
                **settings,
                allow_reconnect=True,
                max_reconnect_attempts=-1,
                error_cb=owner.client_error,
                disconnected_cb=_bound(client, owner.client_disconnected),
                reconnected_cb=_bound(client, owner.client_reconnected),
                closed_cb=_bound(client, owner.client_closed),
                skip_subject_validation=True,  # natsrt's subjects are encoded names, which are valid by construction
            )
        )
        try:
            await asyncio.wait({connecting, refused}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if refused.done():
                refused.result()
            if not connecting.done():
                raise self.unreachable(timeout)
            try:
                connecting.result()
            except (nats.errors.Error, OSError) as error:
                self.note_error(error)
                raise self.unreachable(timeout) from error
            self.refusal = None
            return client
        except BaseException:
            await end_tasks(connecting)
            await close_quietly(client)
            raise
        finally:
            self._refused = self._connecting = None
            refused.cancel()


def _bound(client: NatsClient, report: Callable[[NatsClient], None]) -> Callable[[], Awaitable[None]]:
    """Return a callback without arguments, as nats-py needs it, that calls ``report`` with ``client``."""

    async def call() -> None:
        report(client)

    return call


async def close_quietly(client: Client) -> None:
    """Close a client. Errors and a client that does not close in time are logged at DEBUG."""
    try:
        async with asyncio.timeout(_ONE_CLOSE):
            await client.close()
    except (nats.errors.Error, OSError, TimeoutError, asyncio.InvalidStateError) as error:
        logger.debug("closing a client: %s", error)


def abandon(client: NatsClient) -> None:
    """Close a client that may hang, without waiting for it. What the server has not taken from it yet is dropped."""
    client.cut()
    _abandoned.spawn(close_quietly(client))


_abandoned = BackgroundTasks(logger, "a client could not be closed")
