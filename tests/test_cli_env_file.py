"""``--env-file``: what a line may be, what its errors say, and which source wins."""

from __future__ import annotations

from pathlib import Path

import pytest
from autogen_core import AgentId
from natsrt_cli.env_file import WrongEnvFile, read_env_file

from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from tests.support.cli import natsrt
from tests.support.processes import Processes, eventually

SECRET = "hunter2-Pa55"


def read(path: Path, text: str) -> dict[str, str]:
    path.write_bytes(text.encode())
    return {name: value for name, (value, _) in read_env_file(path).items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A=1\n\n  # comment\nB = two words  # comment\n", {"A": "1", "B": "two words"}),
        ("export A=1\n\texport  B=2", {"A": "1", "B": "2"}),
        ("A='x # \"y\" $Z \\n' # c", {"A": 'x # "y" $Z \\n'}),
        (r'A="x\n\t\"y\" \$Z $Z \\ \d"', {"A": 'x\n\t"y" $Z $Z \\ \\d'}),
        ("A=\"one\ntwo\"\nB='three\nfour'", {"A": "one\ntwo", "B": "three\nfour"}),
        ('A=a#b\nB=#c\nC=\nD=""', {"A": "a#b", "B": "", "C": "", "D": ""}),
        ("\ufeffA=1\r\nB='2'\r\n", {"A": "1", "B": "2"}),
        ("A=1\nA=2", {"A": "2"}),
        ("A=nats://u:p=w@h:4222?x=y", {"A": "nats://u:p=w@h:4222?x=y"}),
        ("A=it's", {"A": "it's"}),
        ("", {}),
    ],
)
def test_lines_are_read_as_in_dotenv_files(tmp_path: Path, text: str, expected: dict[str, str]) -> None:
    assert read(tmp_path / ".env", text) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"A=1\n{SECRET}\n", "line 2: must be NAME=value"),
        (f"# c\n\n1A={SECRET}", "line 3: must be NAME=value"),
        (f"={SECRET}", "line 1: must be NAME=value"),
        (f"A: {SECRET}", "line 1: must be NAME=value"),
        (f"A='{SECRET}\nB=1", "line 1: the value of A has no closing '"),
        (f'A="multi\nline"\nB="{SECRET}', 'line 3: the value of B has no closing "'),
        (f"A='x' {SECRET}", "line 1: there is text after the closing quote of A"),
        (f"A={SECRET}\0", "line 1: the value of A contains a NUL character"),
    ],
)
def test_any_other_line_is_an_error_that_names_it_and_no_value(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(WrongEnvFile) as caught:
        read(tmp_path / "x.env", text)
    assert str(caught.value).startswith(f"{tmp_path / 'x.env'}, {problem}")
    assert SECRET not in str(caught.value)


async def test_a_file_that_cannot_be_read_is_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "latin.env").write_bytes(b"A=\xff")
    (tmp_path / "wrong.env").write_text("A\n")
    for name, text in (
        ("no.env", "there is no file no.env"),
        (".", ". cannot be read: Is a directory"),
        ("latin.env", "latin.env is not UTF-8 text"),
        ("wrong.env", "wrong.env, line 1: must be NAME=value"),
    ):
        ended = await natsrt("agents", "ls", "--env-file", name, cwd=tmp_path)
        assert (ended.code, ended.stdout) == (2, "")
        assert f"'--env-file': {text}" in ended.stderr


@pytest.mark.parametrize("command", [["agents", "ls"], ["state", "ls"], ["publish", "t", "{}"], ["doctor"]])
async def test_every_command_that_connects_takes_it(
    server: EmbeddedServer, namespace: str, tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / ".env").write_text(f"NATS_URL='{server.url}'\nexport NATSRT_NAMESPACE={namespace}\n")
    ended = await natsrt(*command, "--env-file", ".env", cwd=tmp_path, env={"NATS_URL": server.url})
    assert ended.code == 0, ended.stderr


async def test_the_environment_wins_over_the_file_and_the_file_over_settings_files(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    url = server.url
    (tmp_path / "a.env").write_text("NATSRT_NAMESPACE=wrong.a\nNATSRT_NAME=\n")
    (tmp_path / "b.env").write_text("\nNATSRT_NAMESPACE=wrong.b\n")
    (tmp_path / "natsrt.toml").write_text('namespace = "wrong.toml"\n')

    async def problem(*arguments: str, **env: str) -> str:
        where = ("--server", url, "--config", "natsrt.toml")
        return (await natsrt("agents", "ls", *where, *arguments, cwd=tmp_path, env=env)).stderr

    both = ("--env-file", "a.env", "--env-file", "b.env")
    assert "natsrt.toml, line 1: namespace: must be" in await problem()
    assert "natsrt: a.env, line 1: NATSRT_NAMESPACE: must be" in await problem("--env-file", "a.env")
    assert "natsrt: b.env, line 2: NATSRT_NAMESPACE: must be" in await problem(*both)
    assert "natsrt: NATSRT_NAMESPACE: must be" in await problem(*both, NATSRT_NAMESPACE="wrong.environment")
    assert "natsrt: --namespace: must be" in await problem(*both, "--namespace", "wrong.option")
    assert "natsrt.toml, line 1: namespace: must be" in await problem(*both, NATSRT_NAMESPACE="")


async def test_options_of_the_command_line_itself_are_taken_from_it(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("NATSRT_LOG_FORMAT=json\nNATS_URL=nats://127.0.0.1:1\nNATS_TIMEOUT=300ms\n")
    ended = await natsrt("agents", "ls", "--env-file", ".env", cwd=tmp_path)
    assert ended.code == 3
    assert ended.stderr.startswith('{"time": ')


async def test_supervised_workers_and_their_agents_have_its_variables(
    processes: Processes, server: EmbeddedServer, namespace: str, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(f"NATS_URL={server.url}\nNATSRT_NAMESPACE={namespace}\nPLACE='the office'\n")
    (tmp_path / "office.py").write_text(
        "import os\n"
        "from autogen_core import MessageContext, RoutedAgent, rpc\n"
        "class Echo(RoutedAgent):\n"
        "    def __init__(self):\n"
        "        super().__init__('echoes')\n"
        "    @rpc\n"
        "    async def echo(self, message: str, ctx: MessageContext) -> str:\n"
        "        return os.environ['PLACE']\n"
    )
    supervisor = processes.natsrt(
        "worker", "office:Echo", "--type", "echo", "--processes", "2", "--env-file", ".env", cwd=tmp_path
    )
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        await eventually(lambda: len(runtime.running.registry.view.workers_hosting("echo")) == 2, 20)
        assert await runtime.send_message("where", AgentId("echo", "x")) == "the office"
    supervisor.terminate()
    assert await supervisor.wait(20) == 0


async def test_the_server_takes_the_variables_that_its_configuration_names(
    processes: Processes, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("PASSWORD_OF_A=secret-of-a\n")
    (tmp_path / "nats.conf").write_text(
        "jetstream { store_dir: data }\nauthorization { users: [{ user: a, password: $PASSWORD_OF_A }] }\n"
    )
    server = processes.natsrt("server", "--config", "nats.conf", "--port", "-1", "--env-file", ".env", cwd=tmp_path)
    url = (await server.wait_for_line("server ready: ")).split()[2]
    ended = await natsrt("agents", "ls", "--server", url, "--user", "a", "--password", "secret-of-a")
    assert ended.code == 0, ended.stderr
