"""What is kept in JetStream beside agents: logs of sessions, and caches. For what is built on natsrt.

A `Storage` has a supervised connection: its own, or that of a runtime, `natsrt.NatsAgentRuntime.storage`. It
reconnects by itself, repeats requests that may succeed later, and raises natsrt's errors.
"""

from __future__ import annotations

import re
import socket
from types import TracebackType
from typing import Final, Self

from natsrt.errors import ConfigurationError
from natsrt.jetstream.acks import Acks
from natsrt.jetstream.cache_bucket import CacheBucket
from natsrt.jetstream.session_log import LogMessage, LogReader, LogState, SessionLog
from natsrt.jetstream.stream_reader import StreamReader
from natsrt.jetstream.streams import cache_name, cache_stream, memory_stream
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.wire.ranges import seconds_problem, whole_problem
from natsrt.wire.subjects import Subjects

__all__ = ["CacheBucket", "LogMessage", "LogReader", "LogState", "SessionLog", "Storage", "check_limits"]

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,100}")


def check_limits(
    name: str, *, max_messages: int | None = None, max_age: float | None = None, max_bytes: int | None = None
) -> None:
    """Check the name of what is kept, and how much of it. None: without a limit.

    Raises:
        ConfigurationError: A stream cannot have this name or this limit.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError("name", f"must be 1 to 100 letters, digits, - and _, not {name!r:.60}")
    for setting, whole in (("max_messages", max_messages), ("max_bytes", max_bytes)):
        if whole is not None and (problem := whole_problem(whole)):
            raise ConfigurationError(setting, problem)
    if max_age is not None and (problem := seconds_problem(max_age, 1)):
        raise ConfigurationError("max_age", problem)


class Storage:
    """JetStream in one namespace, over one connection.

    ``Storage(options)`` has a connection of its own, which `open` makes. `over` shares one.
    """

    def __init__(self, options: Options) -> None:
        name = f"natsrt-storage {options.name or socket.gethostname()}"
        self._begin(Connection(options, client_name=name), options, own=True)

    @classmethod
    def over(cls, connection: Connection, options: Options) -> Self:
        """Share the connection of a runtime. `open` and `close` then leave it as it is."""
        shared = cls.__new__(cls)
        shared._begin(connection, options, own=False)
        return shared

    def _begin(self, connection: Connection, options: Options, *, own: bool) -> None:
        self.options: Options = options
        """The settings of the connection."""
        self._connection = connection
        self._own = own
        self._subjects = Subjects(options.namespace)
        self._reader = StreamReader(connection, options)
        self._acks = Acks(connection, options.inbox_prefix)

    async def open(self) -> None:
        """Connect, if the connection is its own.

        Raises:
            ServerUnreachable: No server accepted the connection within ``connect_timeout`` seconds.
            PermissionDenied: The server refuses the credentials.
            TlsFailed: No secure connection can be made.
        """
        if self._own:
            await self._connection.open()

    async def close(self) -> None:
        """Disconnect, if the connection is its own. Has no effect if closed."""
        if self._own:
            await self._connection.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def connected(self) -> bool:
        """True if the connection is up, as far as is known."""
        return self._connection.connected

    def log(
        self,
        session: str,
        *,
        name: str,
        max_messages: int | None = None,
        max_age: float | None = None,
        max_bytes: int | None = None,
    ) -> SessionLog:
        """The log of a session, in the stream ``natsrt_memory_<name>``. Open it before use, and close it.

        Args:
            session: Any text: all who name the same one share the log.
            name: The end of the stream's name. All logs in a stream have the same limits.
            max_messages: Number of messages of each log that are kept: the last ones. None: without a limit.
            max_age: Seconds for which a message is kept. None: without a limit.
            max_bytes: Size of the stream, of all logs together. None: without a limit.

        Raises:
            ConfigurationError: A stream cannot have this name or this limit.
        """
        check_limits(name, max_messages=max_messages, max_age=max_age, max_bytes=max_bytes)
        config = memory_stream(self._subjects, self.options, name, messages=max_messages, age=max_age, size=max_bytes)
        subject, told = self._subjects.memory(name, session), self._subjects.remembered(name, session)
        return SessionLog(
            self._connection, self.options, self._acks, self._reader, config=config, subject=subject, told=told
        )

    def cache(self, name: str, *, max_bytes: int | None = None) -> CacheBucket:
        """The KV bucket ``natsrt_cache_<name>``. Open it before use.

        Args:
            name: The end of the bucket's name.
            max_bytes: Size of the bucket; the oldest entries go first. None: without a limit.

        Raises:
            ConfigurationError: A bucket cannot have this name or this limit.
        """
        check_limits(name, max_bytes=max_bytes)
        config = cache_stream(self._subjects, self.options, name, size=max_bytes)
        bucket = cache_name(self._subjects, name)
        return CacheBucket(self._connection, self.options, self._acks, bucket=bucket, config=config)
