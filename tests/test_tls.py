"""TLS and credentials that are missing or wrong are reported at once as what they are, everywhere."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from pathlib import Path
from typing import Any

import pytest
from autogen_core import AgentId, RoutedAgent

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer, find_server_binary
from natsrt.transport.tls import TlsFailure, tls_failure
from tests.support import cli
from tests.support.certificates import Certificates
from tests.support.processes import Processes, eventually

AT_ONCE = 4.0
"""Seconds within which a failure is known. A server that does not answer is waited for 60 s here."""
USERS = 'authorization { users: [ { user: "app", password: "secret" } ] }\n'
FIRST = "handshake_first: true"
VERIFY = "verify: true"


class Place:
    """A directory with certificates, and a server with a configuration that may change."""

    def __init__(self, path: Path, processes: Processes) -> None:
        self._path = path
        self._processes = processes
        self.certificates = Certificates(path)
        self.ca = {"tls_ca": self.certificates.path("ca.pem")}

    def configure(self, settings: str) -> Path:
        config = self._path / "nats.conf"
        config.write_text(f"server_name: tls\njetstream {{}}\n{settings}\n")
        return config

    async def server(self, settings: str) -> str:
        """Start a server, and return its address. It may begin with TLS, as an `EmbeddedServer` may not."""
        ports = self._path / "ports"
        ports.mkdir()
        places = ("-p", "-1", "-a", "127.0.0.1", "-sd", str(self._path / "data"), "--ports_file_dir", str(ports))
        self._processes.start([find_server_binary(), "-c", self.configure(settings), *places], name="server")

        def listed() -> str | None:
            for file in ports.glob("*.ports"):
                try:
                    return str(json.loads(file.read_text())["nats"][0])
                except ValueError:  # it is being written
                    return None
            return None

        return (await eventually(listed, 20.0)).partition("://")[2]


@pytest.fixture
def place(tmp_path: Path, processes: Processes) -> Place:
    return Place(tmp_path, processes)


async def refused(url: str, **settings: Any) -> Exception:
    """The error of a start, which must come at once; the health says the same."""
    runtime = NatsAgentRuntime(url, connect_timeout=60.0, **settings)
    with pytest.raises(natsrt.NatsrtError) as raised:
        async with asyncio.timeout(AT_ONCE):
            await runtime.start()
    assert str(raised.value) in runtime.health().reasons[0]
    assert "natsrt server" not in str(raised.value)
    return raised.value


FAILURES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown authority": (("server",), {"tls_ca": None}, "not signed by a known authority .*: set tls_ca"),
    "another authority": (("strange",), {}, "not signed by a known authority .*: set tls_ca"),
    "another host": (("elsewhere",), {}, "for another host .*127.0.0.1.*: set tls_hostname"),
    "another name": (
        ("server",),
        {"tls_hostname": "foo.example"},
        "for another host .*foo.example.*: set tls_hostname",
    ),
    "expired": (("old",), {}, r"out of date \(certificate has expired\)"),
    "no client certificate": (("server", VERIFY), {}, "requires a client certificate .*: set tls_cert and tls_key"),
    "a stranger's": (
        ("server", VERIFY),
        "strange-client",
        "does not accept the client certificate in tls_cert .*unknown ca",
    ),
    "an expired one": (
        ("server", VERIFY),
        "old-client",
        "does not accept the client certificate in tls_cert .*expired",
    ),
    "only we begin": (("server",), {"tls_first": True}, "does not begin with the TLS handshake: turn tls_first off"),
    "we begin without": (None, {"tls_first": True}, "does not begin with the TLS handshake: turn tls_first off"),
    "only it begins": (("server", FIRST), {}, "begins with the TLS handshake .*: set tls_first"),
    "tls://": (None, {"scheme": "tls"}, "begins with tls://, but the server offers no TLS"),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_a_failure_of_tls_is_reported_at_once_as_what_it_is(place: Place, name: str) -> None:
    block, given, text = FAILURES[name]
    address = await place.server("" if block is None else place.certificates.server(*block))
    settings = {**place.ca, **(place.certificates.client(given) if isinstance(given, str) else given)}
    error = await refused(f"{settings.pop('scheme', 'nats')}://{address}", **settings)
    assert type(error) is natsrt.TlsFailed
    assert re.search(text, str(error)), error


@pytest.mark.parametrize("way", ["asked for", "verified", "first", "by name", "wanted", "with a user"])
async def test_what_is_right_connects_and_asyncio_warns_of_nothing(
    place: Place, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = place.certificates
    block, more, scheme = files.server(), dict[str, Any](place.ca), "nats"
    if way == "verified":
        block, more = files.server("server", VERIFY), more | files.client()
    elif way == "first":
        block, more = files.server("server", FIRST), more | {"tls_first": True}
    elif way == "by name":
        block, more = files.server("elsewhere"), more | {"tls_hostname": "elsewhere.example"}
    elif way == "wanted":  # the server leaves it to the client
        block, scheme = block + "allow_non_tls: true\n", "tls"
    elif way == "with a user":
        block, more = block + USERS, more | {"user": "app", "password": "secret"}
    address = await place.server(block)
    async with NatsAgentRuntime(f"{scheme}://{address}", **more) as runtime:
        assert runtime.ready
        assert isinstance(
            runtime.running.connection.client._transport._io_writer.get_extra_info("sslcontext"), ssl.SSLContext
        )
    assert caplog.messages == []


async def test_tls_fails_only_when_it_fails_with_every_server(place: Place, own_server: EmbeddedServer) -> None:
    address = await place.server(place.certificates.server("strange"))
    for _ in range(4):  # a client tries its servers in any order
        async with NatsAgentRuntime([f"nats://{address}", own_server.url], **place.ca) as runtime:
            assert runtime.health().server == own_server.url.partition("://")[2]
    runtime = NatsAgentRuntime([f"nats://{address}", "nats://127.0.0.1:1"], connect_timeout=1.0, **place.ca)
    with pytest.raises(natsrt.TlsFailed, match="set tls_ca"):  # the only one that answers
        await runtime.start()


async def test_a_server_that_says_nothing_and_speaks_no_tls_does_not_answer() -> None:
    held: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda reader, writer: held.append(writer), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(natsrt.ServerUnreachable) as raised:
            await NatsAgentRuntime(f"nats://127.0.0.1:{port}", connect_timeout=1.5).start()
        for writer in held:  # a server of Python 3.12 and newer waits for them
            writer.close()
    assert type(raised.value) is natsrt.ServerUnreachable


async def test_tls_that_fails_later_shows_in_the_health_and_in_what_is_sent(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """A server comes back with another certificate, then with its own again."""
    files = place.certificates
    config = place.configure(files.server())
    server = EmbeddedServer(config=config, port=-1)
    async with server:
        runtime = NatsAgentRuntime(server.url, offline_timeout=1.0, **place.ca)
        async with runtime:
            await runtime.register_factory("none", lambda: RoutedAgent("none"))
            place.configure(files.server("strange"))
            await server.restart()
            await eventually(
                lambda: "TLS fails: the server's certificate is not signed" in runtime.health().reasons[-1], 10.0
            )
            with pytest.raises(natsrt.TlsFailed, match="set tls_ca"):
                await runtime.send_message("x", AgentId("none", "x"))
            assert len([line for line in caplog.messages if "set tls_ca" in line]) == 1
            place.configure(files.server())
            await server.restart()
            await eventually(lambda: runtime.ready, 15.0)
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["tls_ca", "tls_cert", "tls_key"])
@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\x00\xff\xfe", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
async def test_a_file_that_holds_something_else_is_named(
    place: Place, tmp_path: Path, setting: str, content: bytes
) -> None:
    (tmp_path / "wrong.pem").write_bytes(content)
    settings = {**place.ca, **place.certificates.client(), setting: str(tmp_path / "wrong.pem")}
    with pytest.raises(natsrt.ConfigurationError, match="wrong.pem"):
        await NatsAgentRuntime("nats://127.0.0.1:1", **settings).start()


async def test_a_key_of_another_certificate_is_named(place: Place) -> None:
    mixed = {"tls_cert": place.certificates.path("client.pem"), "tls_key": place.certificates.path("server.key")}
    with pytest.raises(natsrt.ConfigurationError, match="server.key"):
        await NatsAgentRuntime("nats://127.0.0.1:1", **mixed).start()


# -- credentials -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True])
async def test_missing_credentials_are_told_from_wrong_ones(place: Place, secure: bool) -> None:
    address = await place.server(USERS + (place.certificates.server() if secure else ""))
    for settings, text in (
        ({}, "connect without credentials: it says 'Authorization Violation'"),
        ({"user": "app", "password": "wrong"}, "connect with these credentials: it says 'Authorization Violation'"),
        ({"token": "wrong"}, "connect with these credentials"),
    ):
        error = await refused(f"nats://{address}", **(place.ca if secure else {}), **settings)
        assert type(error) is natsrt.PermissionDenied
        assert text in str(error)


async def test_a_client_certificate_that_names_no_user_is_named(place: Place) -> None:
    address = await place.server(USERS + place.certificates.server("server", "verify_and_map: true"))
    own = {"tls_cert": place.certificates.path("client.pem"), "tls_key": place.certificates.path("client.key")}
    error = await refused(f"nats://{address}", **place.ca, **own)
    assert type(error) is natsrt.PermissionDenied
    assert "connect with the client certificate in tls_cert: " in str(error)


# -- the command line ------------------------------------------------------------------------------------------------

COMMANDS = [
    ("agents", "ls"),
    ("agents", "ping"),
    ("agents", "wait", "x"),
    ("send", "x", "hi"),
    ("publish", "x", "hi"),
    ("tail",),
    ("worker", "tests.test_tls:Idle", "--type", "idle"),
    ("worker", "tests.test_tls:Idle", "--type", "idle", "--processes", "2"),
    ("state", "ls"),
]


class Idle(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("does nothing")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
async def test_every_command_says_why_tls_fails(place: Place, command: tuple[str, ...]) -> None:
    address = await place.server(place.certificates.server())
    ended = await cli.natsrt(*command, "--server", f"nats://{address}", cwd=Path(__file__).parents[1])
    assert ended.code == 3, ended
    assert "not signed by a known authority" in ended.stderr and "set tls_ca" in ended.stderr
    assert "Start one" not in ended.stderr and "Traceback" not in ended.stderr and "eof_received" not in ended.stderr


async def test_the_doctor_says_why_tls_fails(place: Place) -> None:
    address = await place.server(place.certificates.server())
    ended = await cli.natsrt("doctor", "--server", f"nats://{address}")
    assert ended.code == 7, ended
    assert "not signed by a known authority" in " ".join(ended.stdout.split())


async def test_a_command_over_tls_prints_nothing_of_asyncio(place: Place) -> None:
    address = await place.server(place.certificates.server())
    ended = await cli.natsrt("agents", "ls", "--server", f"tls://{address}", "--tlsca", place.ca["tls_ca"])
    assert (ended.code, "asyncio" in ended.stderr, "eof_received" in ended.stderr) == (0, False, False), ended


# -- what OpenSSL says -----------------------------------------------------------------------------------------------


def _error(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, f"[SSL: {reason}] text")
    error.reason = reason
    return error


@pytest.mark.parametrize(
    "reason",
    ["TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "SSLV3_ALERT_HANDSHAKE_FAILURE", "NO_SHARED_CIPHER"],
)
def test_versions_and_ciphers_without_a_common_one_are_named(reason: str) -> None:
    found = tls_failure(_error(reason), tls_first=False, certificate=False)
    assert found is not None and "no TLS version or cipher in common" in found.text


@pytest.mark.parametrize(
    "error",
    [
        ssl.SSLEOFError(8, "EOF occurred in violation of protocol"),
        ssl.SSLZeroReturnError(6, "TLS/SSL connection has been closed"),
        _error("APPLICATION_DATA_AFTER_CLOSE_NOTIFY"),
        ConnectionResetError(104, "Connection reset by peer"),
        TimeoutError(),
    ],
    ids=repr,
)
def test_a_connection_that_is_merely_lost_is_no_failure_of_tls(error: Exception) -> None:
    assert tls_failure(error, tls_first=True, certificate=True) is None


class _OfAiohttp(OSError):
    """Has the error of TLS in an attribute, as aiohttp's errors for WebSockets have."""

    def __init__(self, error: ssl.SSLError) -> None:
        self.os_error = error
        super().__init__("Cannot connect to host")


def test_an_error_of_tls_is_found_below_that_of_a_websocket() -> None:
    below = _OfAiohttp(_error("TLSV13_ALERT_CERTIFICATE_REQUIRED"))
    found = tls_failure(below, tls_first=False, certificate=False)
    assert isinstance(found, TlsFailure) and "requires a client certificate" in found.text
