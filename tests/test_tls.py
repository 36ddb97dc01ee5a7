"""TLS and credentials that are missing or wrong are reported at once as what they are, everywhere."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from autogen_core import AgentId, RoutedAgent
from natsrt_cli.connecting import Connecting

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer, find_server_binary
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.transport.tls import TlsFailure, tls_failure
from tests.support import cli
from tests.support.certificates import Certificates
from tests.support.processes import Processes, eventually
from tests.support.topology import free_ports

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
        self._server = self._processes.start(
            [find_server_binary(), "-c", self.configure(settings), *places], name="server"
        )

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
    "tls://": (None, {"scheme": "tls"}, "begins with tls://, .* but the server offers no TLS"),
    "a setting": (None, {}, "there are settings of TLS, but the server offers no TLS"),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_a_failure_of_tls_is_reported_at_once_as_what_it_is(place: Place, name: str) -> None:
    block, given, text = FAILURES[name]
    address = await place.server("" if block is None else place.certificates.server(*block))
    settings = {**place.ca, **(place.certificates.client(given) if isinstance(given, str) else given)}
    error = await refused(f"{settings.pop('scheme', 'nats')}://{address}", **settings)
    assert type(error) is natsrt.TlsFailed
    assert re.search(text, str(error)), error


class Listening:
    """Passes a connection on to a real server without TLS, and keeps what the client sends."""

    def __init__(self, url: str) -> None:
        self._target = url.partition("://")[2].rpartition(":")
        self.sent = b""
        self.connections = 0

    async def __aenter__(self) -> Listening:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        back, there = await asyncio.open_connection(self._target[0], int(self._target[2]))

        async def keep() -> None:
            with suppress(ConnectionError):
                while data := await reader.read(65_536):
                    self.sent += data
                    there.write(data)
            there.close()

        keeping = asyncio.create_task(keep())
        try:
            with suppress(ConnectionError):
                while data := await back.read(65_536):
                    writer.write(data)
        finally:
            writer.close()
            await asyncio.wait({keeping})


def _as_context(url: str, path: Path, env: dict[str, str]) -> None:
    folder = path / "nats" / "context"
    folder.mkdir(parents=True)
    (folder / "here.json").write_text(json.dumps({"url": url}))
    env |= {"XDG_CONFIG_HOME": str(path), "NATS_CONTEXT": "here"}


def _as_file(url: str, path: Path, env: dict[str, str]) -> None:
    (path / "natsrt.toml").write_text(f'servers = ["{url}"]\n')
    env |= {"NATSRT_CONFIG": str(path / "natsrt.toml")}


def _as_variable(url: str, path: Path, env: dict[str, str]) -> None:
    env |= {"NATS_URL": url}


def _as_variable_of_natsrt(url: str, path: Path, env: dict[str, str]) -> None:
    env |= {"NATSRT_SERVERS": url}


WAYS = {
    "context": _as_context,
    "file": _as_file,
    "NATS_URL": _as_variable,
    "NATSRT_SERVERS": _as_variable_of_natsrt,
}
SECRET = "topsecret"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how nats-py calls aiohttp
@pytest.mark.parametrize("scheme", ["tls", "TLS", "wss"])
@pytest.mark.parametrize("way", [None, *WAYS])
async def test_no_password_is_sent_without_tls_wherever_the_url_is_given(
    own_server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, way: str | None
) -> None:
    if scheme == "wss":
        pytest.importorskip("aiohttp")
    async with Listening(own_server.url) as listening:
        url = f"{scheme}://app:{SECRET}@{listening.address}"
        env: dict[str, str] = {}
        if way is not None:
            WAYS[way](url, tmp_path, env)
            for name, value in env.items():
                monkeypatch.setenv(name, value)
        runtime = NatsAgentRuntime(*([url] if way is None else []), connect_timeout=4.0 if scheme == "wss" else 1.0)
        with pytest.raises(natsrt.ServerUnreachable):
            await runtime.start()
        assert listening.connections > 0
        assert SECRET.encode() not in listening.sent and b"CONNECT" not in listening.sent


@pytest.mark.parametrize("first", ["nats", "tls"])
async def test_one_tls_url_in_a_list_is_for_all_servers(own_server: EmbeddedServer, first: str) -> None:
    async with Listening(own_server.url) as one, Listening(own_server.url) as other:
        schemes = [first, *({"nats", "tls"} - {first})]
        servers = [f"{scheme}://{where.address}" for scheme, where in zip(schemes, (one, other), strict=True)]
        runtime = NatsAgentRuntime(servers, user="app", password=SECRET, connect_timeout=2.0)
        with pytest.raises(natsrt.TlsFailed, match="offers no TLS"):
            await runtime.start()
        assert one.connections and other.connections
        assert b"CONNECT" not in one.sent + other.sent


async def test_no_password_is_sent_to_a_server_without_tls_that_another_one_names(
    own_server: EmbeddedServer, place: Place, tmp_path: Path
) -> None:
    (route,) = free_ports(1)
    cluster = "cluster {{ name: c, listen: '127.0.0.1:{}', routes: [ 'nats://127.0.0.1:{}' ] }}"
    config = place.configure(f"{place.certificates.server()}\n{cluster.format(route, route)}")
    async with Listening(own_server.url) as plain, EmbeddedServer(config=config, port=-1) as server:
        joined = tmp_path / "joined.conf"  # what it tells of itself is where ``plain`` listens
        joined.write_text(f"client_advertise: '{plain.address}'\n{cluster.format(-1, route)}")
        async with EmbeddedServer(config=joined, port=-1):
            url = f"tls://app:{SECRET}@{server.url.partition('://')[2]}"
            connection = Connection(Options(servers=[url], **place.ca), client_name="app")
            await connection.open()
            try:
                await eventually(lambda: connection.client.discovered_servers)
                assert plain.connections == 0
                await server.kill()
                await eventually(lambda: "offers no TLS" in connection.why_refused, 15.0)
                assert plain.connections
            finally:
                await connection.close()
        assert SECRET.encode() not in plain.sent and b"CONNECT" not in plain.sent


def test_ws_and_wss_cannot_be_mixed() -> None:
    with pytest.raises(natsrt.ConfigurationError, match="ws:// cannot be mixed with wss://"):
        NatsAgentRuntime(["wss://a:443", "ws://b:80"])


@pytest.mark.parametrize("give", ["flag", "variable", "context"])
async def test_the_command_line_begins_with_tls(place: Place, tmp_path: Path, give: str) -> None:
    address = await place.server(place.certificates.server("server", FIRST))
    arguments, env = ["--tlsca", str(place.ca["tls_ca"])], {"NATSRT_CONNECT_TIMEOUT": "10"}
    if give == "context":
        _as_context(f"tls://{address}", tmp_path / "config", env)
        file = tmp_path / "config" / "nats" / "context" / "here.json"
        file.write_text(json.dumps({"url": f"tls://{address}", "tls_first": True}))
    else:
        arguments += ["--server", f"tls://{address}"]
    if give == "flag":
        arguments += ["--tlsfirst"]
    elif give == "variable":
        env["NATSRT_TLS_FIRST"] = "true"
    ended = await cli.natsrt("agents", "ls", *arguments, env=env)
    assert ended.code == 0, ended.stderr


def test_a_command_passes_tlsfirst_on_to_its_processes() -> None:
    connecting = Connecting({"tls_first": "true", "user": "app"}, None, {}, "info", "text")
    assert connecting.arguments()[:3] == ["--tlsfirst", "--user", "app"]


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


async def test_tls_fails_only_when_it_fails_with_every_server(
    place: Place, tmp_path: Path, processes: Processes
) -> None:
    address = await place.server(place.certificates.server("strange"))
    (tmp_path / "right").mkdir()
    right = await Place(tmp_path / "right", processes).server(place.certificates.server())
    for _ in range(4):  # a client tries its servers in any order
        async with NatsAgentRuntime([f"nats://{address}", f"nats://{right}"], **place.ca) as runtime:
            assert runtime.health().server == right
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
    assert "not signed by a known authority" in ended.stderr and "set --tlsca (NATS_CA) to" in ended.stderr
    assert "Start one" not in ended.stderr and "Traceback" not in ended.stderr and "eof_received" not in ended.stderr


async def test_the_doctor_says_why_tls_fails(place: Place) -> None:
    address = await place.server(place.certificates.server())
    ended = await cli.natsrt("doctor", "--server", f"nats://{address}")
    assert ended.code == 7, ended
    assert "not signed by a known authority" in " ".join(ended.stdout.split())


HINTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "only it begins": (("server", FIRST), ("--tlsca", "CA"), "use --tlsfirst (NATSRT_TLS_FIRST=true)"),
    "only we begin": (("server",), ("--tlsca", "CA", "--tlsfirst"), "leave --tlsfirst (NATSRT_TLS_FIRST) out"),
    "another host": (("elsewhere",), ("--tlsca", "CA"), "set NATSRT_TLS_HOSTNAME to"),
    "no certificate": (
        ("server", VERIFY),
        ("--tlsca", "CA"),
        "set --tlscert (NATS_CERT) and --tlskey (NATS_KEY)",
    ),
}


@pytest.mark.parametrize("name", HINTS)
@pytest.mark.parametrize("command", [("agents", "ls"), ("doctor",)], ids=" ".join)
async def test_commands_name_options_and_variables(place: Place, name: str, command: tuple[str, ...]) -> None:
    block, options, hint = HINTS[name]
    address = await place.server(place.certificates.server(*block))
    given = [place.ca["tls_ca"] if option == "CA" else option for option in options]
    ended = await cli.natsrt(*command, "--server", f"nats://{address}", *given)
    assert hint in " ".join((ended.stdout + ended.stderr).split()), ended
    assert re.search(r"\btls_", ended.stdout + ended.stderr) is None, ended


async def test_a_file_that_cannot_be_used_is_named_by_its_option_or_variable(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("garbage")
    where = ("agents", "ls", "--server", "nats://127.0.0.1:1")
    for options, env, named in (
        (("--tlsca", str(wrong)), {}, "--tlsca"),
        ((), {"NATS_CA": str(wrong)}, "NATS_CA"),
        ((), {"NATSRT_TLS_CA": str(wrong)}, "NATSRT_TLS_CA"),
        (("--tlscert", str(wrong)), {}, "--tlscert"),
    ):
        ended = await cli.natsrt(*where, *options, env=env)
        assert ended.code == 2
        assert ended.stderr.startswith(f"natsrt: {named}: {wrong} "), ended


async def test_a_command_begins_with_tls_and_its_workers_too(place: Place, processes: Processes) -> None:
    address = await place.server(place.certificates.server("server", FIRST))
    options = ("--server", f"nats://{address}", "--tlsca", place.ca["tls_ca"], "--tlsfirst")
    worker = processes.natsrt(
        *("worker", "tests.test_tls:Idle", "--type", "idle", "--processes", "2", "--max-running", "3"),
        *options,
        cwd=Path(__file__).parents[1],
    )
    await worker.wait_for_line("ready: types idle", 30.0)
    ended = await cli.natsrt("agents", "ls", *options)
    assert (ended.code, "idle" in ended.stdout) == (0, True), ended


@pytest.mark.parametrize("more", [(FIRST,), (FIRST, VERIFY)], ids=["first", "first and verified"])
async def test_a_server_that_begins_with_tls_is_ready_and_found(
    place: Place, processes: Processes, more: tuple[str, ...]
) -> None:
    config = place.configure(place.certificates.server("server", *more))
    async with EmbeddedServer(config=config, port=-1) as embedded:
        assert embedded.tls_first
        assert embedded.name == "tls"
    where = ("--config", str(config), "--port", "-1", "--data-dir", str(config.parent / "data"))
    server = processes.natsrt("server", *where)
    ready = await server.wait_for_line("server ready: ", 30.0)
    assert ready.startswith("server ready: tls://127.0.0.1:") and "(clients need tls_first, data in" in ready
    port = ready.split()[2].rpartition(":")[2]
    ended = await cli.natsrt("server", "--port", port)
    assert ended.code == 1
    told = "a server that begins with TLS and wants a client certificate answers there"
    if VERIFY not in more:
        told = "a NATS server answers there (it begins with TLS)"
        assert "[ERR]" not in server.stderr
    assert ended.stderr == f"natsrt: port {port} is in use, and {told}\n"


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
