"""nats-py's client, with changes that natsrt needs.

nats-py has no public interface for these changes, so private methods are overridden. ``tests/test_client.py`` tests
each:

- `_Parser` splits the data from the server into whole frames, and passes a message without headers directly to its
  sink. This takes 1.2 µs instead of 2.1. Every other frame goes to nats-py's own parser.
- `NatsClient.post` queues a message if that needs no waiting. This takes 0.6 µs instead of 1.2.
- ``_flusher`` writes nothing after a stall of the event loop before the server has answered. nats-py would write to a
  connection that the server may have closed meanwhile, and what it writes there is lost.
- `NatsClient.listen` creates a subscription without the queue that a sink never uses. This saves 3 kB for each keyed
  agent.
- ``_build_message`` and ``_process_headers`` tolerate subjects that are not UTF-8 and unreadable headers. The server
  delivers both, and in nats-py either ends the read loop without an error.
- ``_process_connect_init`` ends the round trips on the connection before. In nats-py they wait for their timeouts, and
  a reconnect waited for one that shares its flush. It also keeps what a server says that does not accept the
  connection, and finds out whether a server that says nothing waits for a TLS handshake.
- ``_connect_to_server`` uses `natsrt.transport.tls.Tcp`, which corrects how TLS begins, fails and ends.
- ``_process_info`` makes sure that ``tls://`` means TLS, for all servers of the client. nats-py connects without it if
  the server does not ask for it. Servers that are discovered over a WebSocket are WebSocket servers.
- ``_process_err`` keeps what the server says, and leaves it to the server to close the connection. nats-py closes it
  for good after almost every error, even if the server keeps it open.
- ``_send_subscribe``, ``_send_unsubscribe``, ``_send_ping`` and ``_process_pong`` log which subscriptions the server
  has, so that those are known that it refuses.
- ``_attempt_reconnect`` ends the old connection at once (`NatsClient.cut`). nats-py closes it in order. It waits until
  the attempt before it has ended, and so does `NatsClient.close`. nats-py only cancels that attempt; before Python
  3.12, ``asyncio.wait_for`` may ignore that, and then a closed client connects again, for ever and unseen.
- `NatsClient.ping`, ``_connect_command`` and ``_process_connect_init`` measure round trips.
- ``_flush_pending`` lets publishers wait for room until the client has written once, has lost the connection, or is
  closed. In nats-py they wait in a queue that nobody empties when the client is closed, for ever.
- ``_close`` keeps data that cannot be sent, for `NatsClient.take_unsent`. nats-py writes it even to a closed socket,
  which raises TypeError on Python 3.12 and newer.
- `NatsClient.withdraw` drops messages that are not written yet.
"""

from __future__ import annotations

import asyncio
import logging
import re
import struct
import time
from collections.abc import Callable, Sequence
from socket import SO_LINGER, SOL_SOCKET
from typing import Any, Protocol, cast

import nats.errors
from nats.aio.client import DEFAULT_BUFFER_SIZE, PING_PROTO, Client, Srv
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.protocol.parser import Parser

from natsrt.background import end_tasks
from natsrt.errors import CannotDecode
from natsrt.forks import Inherited, drop_in_children, share_nothing
from natsrt.transport.refusals import ServerError, SubscriptionLog
from natsrt.transport.stall_watch import StallWatch
from natsrt.transport.tls import NO_TLS_OFFERED, TLS_COMES_FIRST, Tcp, TlsFailure, begins_with_tls

logger: logging.Logger = logging.getLogger("natsrt.connection")

_SAID = re.compile(rb"-ERR\s+'([^\r\n]*)'")
"""An error in the data from a server."""
_MESSAGES = (b"PUB ", b"HPUB ")
"""The starts of the protocol's commands that contain a message."""
_SILENT = 0.5
"""Seconds after which it is looked into why a server has not said anything on a new connection."""
_AT_ONCE = struct.pack("ii", 1, 0)
"""The socket option with which closing a connection drops what was not sent."""
_PONG_AT_LAST = 60
"""Maximum time to wait for the answer to a ping, in seconds. A client that does not answer is replaced long before."""

Sink = Callable[[Msg], None]
Unreadable = Callable[[CannotDecode], None]
"""Called with an error for each message that cannot be read."""


class ClientReports(Protocol):
    """Receives what a client reports besides nats-py's callbacks. No method may raise or block."""

    def unreadable(self, error: CannotDecode) -> None:
        """Called when a client received a message that it cannot read."""

    def subscriptions_refused(self, client: NatsClient, subjects: dict[int, str]) -> None:
        """Called when the server has refused subscriptions because of its limit: ``subjects`` has them by their ids."""

    def answered(self, seconds: float, *, first: bool) -> None:
        """Called with the time of a round trip. ``first``: it is the first one on a new connection."""


class Ordered:
    """Passed to nats-py as a future, so that it calls `set_result` for every message, in wire order."""

    __slots__ = ("_sink", "_unreadable")

    def __init__(self, sink: Sink, unreadable: Unreadable) -> None:
        self._sink = sink
        self._unreadable = unreadable

    def cancelled(self) -> bool:
        return False

    def set_result(self, message: Msg) -> None:
        try:
            self._sink(message)
        except CannotDecode as error:
            self._unreadable(error)
        except Exception:  # an exception here would end the client's read loop
            logger.exception("a message on %s could not be taken in", message.subject)


def _expects(command: bytes, replies: bytes) -> bool:
    """True if a command sends a message whose reply subject starts with ``replies``."""
    return command.startswith(_MESSAGES) and command.split(b" ", 3)[2].startswith(replies)


class _Parser(Parser):
    """Parses the data from the server frame by frame."""

    nc: NatsClient

    def reset(self) -> None:
        super().reset()
        self._begun = bytearray()
        """The frame that has not arrived completely."""
        self._missing = 0
        """The minimum size of that frame in bytes when it is complete; 0 if it is not known."""
        self._life = object()
        """A new object after every reset. `parse` uses it to detect a reset, because processing a frame may end the
        connection and reset the parser."""

    async def parse(self, data: bytes = b"") -> None:
        if self._begun:
            self._begun += data
            if len(self._begun) < self._missing:
                return
            data, self._begun = bytes(self._begun), bytearray()
        client, life = self.nc, self._life
        at, size = 0, len(data)
        while at < size:
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                self._missing = 0
                break
            end = line_end + 2
            words = data[at:line_end].split()
            if words and words[0] in (b"MSG", b"HMSG"):
                try:
                    sid, payload_size = int(words[2]), int(words[-1])
                except (ValueError, IndexError):
                    raise nats.errors.ProtocolError("nats: malformed MSG") from None
                payload_at, end = end, end + payload_size + 2
                if end > size:
                    self._missing = end - at
                    break
                subscription = client._subs.get(sid) if words[0] == b"MSG" else None
                sink: object = None if subscription is None else subscription._future
                if type(sink) is Ordered:
                    client.stats["in_msgs"] += 1
                    client.stats["in_bytes"] += payload_size
                    reply = words[3] if len(words) == 5 else b""
                    message = client._build_message(sid, words[1], reply, data[payload_at : end - 2], None)
                    if message is not None:
                        sink.set_result(message)
                    at = end
                    continue
            elif words and words[0] == b"-ERR" and (said := _SAID.match(data, at)):  # nats-py's parser lowers its case
                await client._process_err(said.group(1).decode(errors="replace"))
                at = end
                continue
            await super().parse(data[at:end])
            if life is not self._life:
                return
            at = end
        self._begun += data[at:]


class NatsClient(Client, Inherited):
    """nats-py's client, with two corrections.

    `flush` sends its PING after all data that was queued before. The read loop continues after a message that cannot be
    read, and ``unreadable`` is called for that message; in nats-py, such a message ends the read loop.
    """

    def __init__(self, reports: ClientReports, stall_watch: StallWatch) -> None:
        super().__init__()
        self._ps = _Parser(self)
        self._reports = reports
        self._unreadable = reports.unreadable
        self._log = SubscriptionLog()
        self.largest: int = 0
        """Bytes of the largest message that was sent, with its headers."""
        self._stall_watch = stall_watch
        self._doubts = 0
        """Number of times that there was a reason to doubt the connection."""
        self._proven = 0
        """Value of ``_doubts`` when the server last proved that it is connected; another value means: ask again."""
        self._kept_back = False
        """True after messages had to wait because of a doubt, until they are written."""
        self._unsent: list[bytes] = []
        """The commands that could not be sent when the client closed."""
        self._pings: set[asyncio.Task[float]] = set()
        self._reconnecting: set[asyncio.Task[Any]] = set()
        self._flushing: asyncio.Task[None] | None = None
        self._next_flush: asyncio.Task[None] | None = None
        self._write: asyncio.Future[None] | None = None
        """Done when the flusher has written once more, or writes nothing more on this connection; None if nobody waits
        for that."""
        self._nothing_waits: asyncio.Queue[Msg] = asyncio.Queue()
        self._greeted = False
        """True if the server has sent its INFO on the present connection."""
        self._connect_sent_at = 0.0
        """When CONNECT, and the first PING after it, were last sent, by the event loop's clock."""
        drop_in_children(self)

    def drop_in_child(self) -> None:
        """Leave the connection to the parent. The server closes it when the parent ends, even if the child lives on."""
        if (socket := self._socket) is not None:
            share_nothing(socket.fileno())

    @property
    def _socket(self) -> Any:
        """The socket of the connection; None if it is closed."""
        transport: Any = self._transport
        stream = (getattr(transport, "_io_writer", None) or getattr(transport, "_ws", None)) if transport else None
        socket = None if stream is None else stream.get_extra_info("socket")
        return socket if socket is not None and socket.fileno() >= 0 else None

    def cut(self) -> None:
        """End the connection at once, and drop what the server has not taken from it yet.

        A connection that is closed in order still delivers that, minutes later if it stalls. By then, natsrt has sent
        calls again.
        """
        socket, writer = self._socket, getattr(self._transport, "_io_writer", None)  # None for a WebSocket
        if socket is None:
            return
        socket.setsockopt(SOL_SOCKET, SO_LINGER, _AT_ONCE)
        if writer is not None:
            server = self._current_server
            if (unsent := writer.transport.get_write_buffer_size()) and server is not None:
                address = f"{server.uri.hostname}:{server.uri.port}"
                logger.warning("the server %s did not take the last %d bytes that were sent to it", address, unsent)
            writer.transport.abort()

    async def _attempt_reconnect(self) -> None:
        self._end_write()
        await self._end_reconnecting()
        current = asyncio.current_task()
        assert current is not None
        self._reconnecting.add(current)
        current.add_done_callback(self._reconnecting.discard)
        self.cut()
        await super()._attempt_reconnect()

    async def _end_reconnecting(self) -> None:
        """Wait until no other task reconnects, however often such a task ignores that it is cancelled."""
        await end_tasks(*(self._reconnecting - {asyncio.current_task()}))

    def limit_payload(self, limit: int | None) -> int:
        """Send no messages of ``limit`` bytes or more; None: as large as the server says. Returns the maximum size."""
        if limit is not None:
            self._max_payload = min(self._max_payload, max(0, limit - 1))
        return self._max_payload

    async def listen(self, subject: str, queue: str, sink: Ordered) -> Subscription:
        """Pass every message on ``subject`` to ``sink``. ``queue`` is the queue group; empty for none.

        The subscription has no separate queue for waiting messages, which would take 3 kB.
        """
        subscription = await self.subscribe(subject, queue=queue, future=cast(Any, sink))
        subscription._pending_queue = self._nothing_waits
        return subscription

    def post(self, subject: str, payload: bytes, reply: str, head: bytes = b"") -> bool:
        """Queue a message if that needs no waiting. Returns False if it was not queued: then use `publish`.

        ``head`` is what `header_block` returns for its headers; empty for none.
        """
        flushes = self._flush_queue
        if head:
            size = len(head) + len(payload)
            start = b"HPUB %b %b %d %d\r\n%b" % (subject.encode(), reply.encode(), len(head), size, head)
        else:
            size = len(payload)
            start = f"PUB {subject} {reply} {size}\r\n".encode()
        if (
            self._status != Client.CONNECTED
            or size > self._max_payload
            or self._pending_data_size > self._max_pending_size
            or flushes is None
        ):
            return False
        if flushes.empty():
            if self._flusher_task is None or self._flusher_task.done():
                return False
            flushes.put_nowait(asyncio.get_running_loop().create_future())
        if size > self.largest:
            self.largest = size
        command = b"".join((start, payload, b"\r\n"))
        self._pending.append(command)
        self._pending_data_size += len(command)
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += len(payload)
        return True

    # -- what cannot be sent at once -------------------------------------------------------------------------------

    def doubt(self) -> None:
        """Write nothing more until the server has answered a ping, or until the client is connected again.

        Call it after a stall of the event loop: the server may have closed the connection, and what is written to a
        connection that is closed is lost.
        """
        self._doubts += 1

    @property
    def _in_doubt(self) -> bool:
        """True if the server may have closed the connection. Looks for a stall first."""
        self._stall_watch.look()
        return self._doubts != self._proven

    @property
    def has_jetstream(self) -> bool:
        """True if the server to which it is connected says that it runs JetStream itself."""
        return bool(self._server_info.get("jetstream"))

    @property
    def jetstream_domain(self) -> str:
        """The JetStream domain of the server to which it is connected; empty if it has none."""
        return str(self._server_info.get("domain") or "")

    @property
    def keeps_back(self) -> bool:
        """True if something waits to be written because of a `doubt`."""
        return bool(self._pending) and (self._in_doubt or self._kept_back)

    def take_unsent(self) -> list[bytes]:
        """Return the messages that were never written to a connection, oldest first, and do not send them here.

        They are complete commands of the protocol, for `send_again` of another client.
        """
        commands = self._unsent + self._pending
        self._unsent, self._pending, self._pending_data_size = [], [], 0
        return [command for command in commands if command.startswith(_MESSAGES)]

    def withdraw(self, replies: str) -> None:
        """Do not send the messages that are not written yet and whose reply subjects start with ``replies``."""
        start = replies.encode()
        self._unsent = [command for command in self._unsent if not _expects(command, start)]
        self._pending = [command for command in self._pending if not _expects(command, start)]
        self._pending_data_size = sum(map(len, self._pending))

    async def send_again(self, messages: Sequence[bytes]) -> None:
        """Queue messages that `take_unsent` of another client has returned."""
        self._pending.extend(messages)
        self._pending_data_size += sum(map(len, messages))
        await self._flush_pending()

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        """Have the flusher write what is queued. One that has a reason to write needs no second one.

        nats-py gives it one for each command, and waits while the flusher has 1,024 of them. So a worker that begins or
        ends more subscriptions than that would wait there while the server does not answer, and ignore that it is
        cancelled. ``force_flush``: wait for the flusher, because there is no room for more. nats-py goes on
        waiting when the connection is lost or the client is closed, and so would the task that fails calls.
        """
        queue, flusher = self._flush_queue, self._flusher_task
        if not self.is_connected or queue is None or flusher is None or flusher.done():
            return await super()._flush_pending(force_flush)
        if force_flush:
            await self._next_write(queue)
        elif queue.empty():
            await super()._flush_pending()
        return None

    async def _next_write(self, queue: asyncio.Queue[asyncio.Future[Any]], timeout: float | None = None) -> None:
        """Wait until the flusher has written once more, or nothing is written on this connection any more.

        At most ``timeout`` seconds; None: without a limit.
        """
        loop = asyncio.get_running_loop()
        if self._write is None:
            self._write = loop.create_future()
        if queue.empty():
            queue.put_nowait(loop.create_future())
        await asyncio.wait({self._write}, timeout=timeout)

    def _end_write(self) -> None:
        """Let those go on who wait for the next write."""
        write, self._write = self._write, None
        if write is not None:
            write.set_result(None)

    async def _flusher(self) -> None:
        """Write what is queued, whenever nats-py asks for it. As nats-py's, but see `doubt`."""
        queue, transport = self._flush_queue, self._transport
        assert queue is not None and transport is not None
        self._proven = self._doubts  # of a connection that is new
        while self.is_connected:
            flushed = await queue.get()
            try:
                if self._pending_data_size > 0:
                    while self._in_doubt:
                        await self._prove()
                    transport.writelines(self._pending)
                    self._log.written()
                    self._pending, self._pending_data_size, self._kept_back = [], 0, False
                    await transport.drain()  # type: ignore[no-untyped-call]
                self._end_write()
            except OSError as error:
                await self._error_cb(error)
                await self._process_op_err(error)
                break
            except (asyncio.CancelledError, RuntimeError, AttributeError):  # the connection was lost or closed
                break
            finally:
                if not flushed.done():
                    flushed.set_result(None)
        self._end_write()  # those who wait for it would wait for ever

    async def _prove(self) -> None:
        """Wait until the server has answered a ping. nats-py cancels this when the connection is lost."""
        assert self._transport is not None
        doubts, self._kept_back = self._doubts, True
        pong = asyncio.get_running_loop().create_future()
        self._pongs.append(pong)
        self._log.ping()
        self._transport.write(PING_PROTO)
        await self._transport.drain()  # type: ignore[no-untyped-call]
        await asyncio.wait({pong})
        self._proven = doubts

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Msg | None:
        """Return the message; None if it cannot be read."""
        try:
            # By position: a dataclass with nine fields takes four times as long by name.
            return Msg(self, subject.decode(), reply.decode(), data, headers, None, False, sid)
        except UnicodeDecodeError as error:
            self._unreadable(CannotDecode("a message", f"its subject or reply subject is not UTF-8: {error}", data))
            return None

    async def _process_headers(self, headers: bytes | None) -> dict[str, str] | None:
        """Return the headers; None if there are none, or if they cannot be read."""
        if not headers:
            return None
        try:
            return await super()._process_headers(headers)
        except (UnicodeDecodeError, IndexError) as error:
            self._unreadable(CannotDecode("a header block", str(error), headers))
            return None

    # -- what the server says ------------------------------------------------------------------------------------

    async def _process_err(self, err_msg: str) -> None:
        """Report an error of the server. If it closes the connection now, nats-py reconnects."""
        error = ServerError(err_msg.strip("'"))
        if error.too_many_subscriptions:
            self._log.refused()
        if error.text.lower() == "stale connection":
            await super()._process_err(error.text.lower())
            return
        self._err = error
        await self._error_cb(error)

    async def _connect_to_server(self, s: Srv) -> None:
        if s.uri.scheme in ("ws", "wss"):
            await super()._connect_to_server(s)
            return
        s.last_attempt = time.monotonic()
        if not self._transport:
            self._transport = Tcp()
        await self._transport.connect(
            s.uri, buffer_size=DEFAULT_BUFFER_SIZE, connect_timeout=self.options["connect_timeout"]
        )

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Use the server's INFO, as nats-py does. Raises `TlsFailure` if TLS is wanted and the server has none."""
        self._greeted = True
        server = self._current_server
        assert server is not None
        over_tcp = server.uri.scheme not in ("ws", "wss")
        if initial_connection and over_tcp and self._wants_tls and not info.get("tls_required"):
            if not info.get("tls_available") and not self.options["tls_handshake_first"]:
                raise TlsFailure(NO_TLS_OFFERED)
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)
        if not over_tcp:  # nats-py would use the servers that it discovers over TCP, and without TLS
            for found in self._server_pool:
                if found.discovered and found.uri.scheme not in ("ws", "wss"):
                    found.uri = found.uri._replace(scheme=server.uri.scheme, path=server.uri.path)

    @property
    def _wants_tls(self) -> bool:
        """True if a URL begins with tls://, or there are settings of TLS. As in the nats CLI, that is for all servers:
        one that was discovered, or that the list names without tls://, would get the credentials in plain text.
        """
        if "tls" in self.options or "tls_hostname" in self.options:
            return True
        server = self._current_server
        servers = self._server_pool if server is None else (*self._server_pool, server)
        return any(one.uri.scheme == "tls" for one in servers)

    async def _look_for_tls(self) -> bool:
        """If the server says nothing: True, and the connection is closed, if it waits for a TLS handshake."""
        await asyncio.sleep(_SILENT)
        server, transport = self._current_server, self._transport
        if self._greeted or server is None or transport is None or not isinstance(transport, Tcp):
            return False
        host, port = server.uri.hostname, server.uri.port
        if host is None or port is None or not await begins_with_tls(host, port) or self._greeted:
            return False
        transport.close()  # type: ignore[no-untyped-call]
        return True

    async def _process_connect_init(self) -> None:
        """Begin a connection, as nats-py does. Round trips on the one before end, because no answers will come.

        Raises `ServerError` if the server does not accept the connection and says why, and `TlsFailure` if it waits for
        a TLS handshake, or has no TLS although it is to be used.
        """
        pongs = self._pongs
        self._greeted = self.options["tls_handshake_first"]
        looking = asyncio.create_task(self._look_for_tls())
        try:
            await super()._process_connect_init()
        except (nats.errors.Error, OSError) as error:
            if looking.done() and not looking.cancelled() and looking.exception() is None and looking.result():
                raise TlsFailure(TLS_COMES_FIRST) from error
            said = _SAID.search(f"-ERR {str(error).removeprefix('nats: ')}".encode()) or self._said_at_last()
            if self._transport is not None:
                self._transport.close()  # type: ignore[no-untyped-call]
            if said is None:
                raise
            raise ServerError(said.group(1).decode(errors="replace")) from error
        finally:
            looking.cancel()
        self._reports.answered(asyncio.get_running_loop().time() - self._connect_sent_at, first=True)
        for pong in pongs:
            pong.cancel()
        self._log.restart(self._subs)  # nats-py sends them first, and then what is queued
        for command in self._pending:
            if command.startswith(b"SUB "):
                self._log.begun(int(command.split()[-1]))
            elif command.startswith(b"UNSUB ") and len(words := command.split()) == 2:
                self._log.ended(int(words[1]))

    def _connect_command(self) -> bytes:
        self._connect_sent_at = asyncio.get_running_loop().time()
        return super()._connect_command()

    def _said_at_last(self) -> re.Match[bytes] | None:
        """What a server said before it closed the connection, without a chance to read it."""
        transport: Any = self._transport
        reader = getattr(transport, "_io_reader", None)  # None for a WebSocket
        return None if reader is None else _SAID.search(bytes(reader._buffer))

    async def _send_subscribe(self, sub: Subscription) -> None:
        self._log.begun(sub._id)
        await super()._send_subscribe(sub)

    async def _send_unsubscribe(self, sid: int, limit: int = 0) -> None:
        if limit == 0:
            self._log.ended(sid)
        await super()._send_unsubscribe(sid, limit)

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        self._log.ping()
        await super()._send_ping(future)

    async def _process_pong(self) -> None:
        await super()._process_pong()
        refused = self._log.pong()
        if refused:
            self._reports.subscriptions_refused(
                self, {sid: self._subs[sid]._subject for sid in refused if sid in self._subs}
            )

    async def flush(self, timeout: float = 10) -> None:
        """Wait until the server has processed everything that was sent before. Calls during a flush share the next one.

        Raises nats-py's ``FlushTimeoutError`` after ``timeout`` seconds, and ``ConnectionClosedError`` if the client is
        closed.
        """
        flush = self._next_flush
        if flush is None:
            flush = self._next_flush = asyncio.create_task(self._flush_after(self._flushing, timeout))
            flush.add_done_callback(retrieve)
        await asyncio.wait({flush}, timeout=timeout)
        if not flush.done():
            raise nats.errors.FlushTimeoutError
        flush.result()

    async def _flush_after(self, other: asyncio.Task[None] | None, timeout: float) -> None:
        """Flush after the ``other`` flush has ended; None: at once. Until its PING is sent, further calls share it."""
        if other is not None:
            await asyncio.wait({other})
        deadline = asyncio.get_running_loop().time() + timeout
        try:
            await asyncio.sleep(0)
            while self.pending_data_size > 0 and self.is_connected:
                if asyncio.get_running_loop().time() > deadline:
                    raise nats.errors.FlushTimeoutError
                await self._written(deadline)
        finally:
            self._flushing, self._next_flush = self._next_flush, None
        ping = self.ping()
        await asyncio.wait({ping}, timeout=deadline - asyncio.get_running_loop().time())
        if not ping.done():
            raise nats.errors.FlushTimeoutError
        if ping.cancelled():  # by `close`, or because the connection was lost
            raise nats.errors.ConnectionClosedError
        ping.result()

    async def _written(self, deadline: float) -> None:
        """Wait until what is queued now is written, at most until ``deadline`` by the event loop's clock."""
        queue = self._flush_queue
        if queue is None or self._flusher_task is None or self._flusher_task.done():
            await self._flush_pending()
        else:
            await self._next_write(queue, deadline - asyncio.get_running_loop().time())

    def ping(self) -> asyncio.Task[float]:
        """Start a round trip to the server. Wait for it with ``asyncio.wait``, and never cancel it.

        The PONG for a cancelled ping ends nats-py's read loop. nats-py itself cancels a ping after its timeout.
        """
        ping = asyncio.create_task(self.rtt(_PONG_AT_LAST))
        self._pings.add(ping)
        ping.add_done_callback(self._ping_ended)
        return ping

    def _ping_ended(self, ping: asyncio.Task[float]) -> None:
        self._pings.discard(ping)
        if not ping.cancelled() and ping.exception() is None:
            self._reports.answered(ping.result(), first=False)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        self._end_write()
        writer = getattr(self._transport, "_io_writer", None)  # None for a WebSocket, which does not have this problem
        closing = writer is not None and writer.is_closing()
        if not self.is_closed and (closing or not self.is_connected or self._in_doubt):
            self._unsent, self._pending, self._pending_data_size = self._pending, [], 0
        await super()._close(status, do_cbs)

    async def close(self) -> None:
        """Close, and end every wait for this client, including those that nats-py does not end."""
        self._end_write()
        try:
            await self._end_reconnecting()
            await super().close()
        finally:
            self._end_write()
            for ping in self._pings:
                ping.cancel()
            if self._transport is not None:  # still open if a hung server accepted no data and nats-py gave up sending
                self._transport.close()  # type: ignore[no-untyped-call]


def retrieve(task: asyncio.Future[Any]) -> None:
    """Retrieve a task's exception, so that asyncio does not report it if the task is no longer awaited."""
    if not task.cancelled():
        task.exception()
