"""What the documents say is so: paths and links exist, blocks run or load, generated parts are up to date."""

from __future__ import annotations

import configparser
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click
import orjson
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
from natsrt_cli import natsrt as command_line
from natsrt_cli.exits import Exit

import natsrt
from natsrt import NatsAgentRuntime, Options, errors
from natsrt.embedded import EmbeddedServer
from natsrt.wire import envelope
from tests.support.documents import GENERATED, Block, blocks, documents, with_generated_part
from tests.support.processes import REPOSITORY, Process, Processes
from tests.test_public_api import SAMPLES

README = REPOSITORY / "README.md"
_CONTEXT = click.Context(command_line)
COMMANDS = {name: command_line.get_command(_CONTEXT, name) for name in command_line.list_commands(_CONTEXT)}
LINK = re.compile(r"(?<!!)\[[^\]\[]*\]\(([^)\s]+)\)")
PATH = re.compile(
    r"(?<![\w/.~-])((?:natsrt|cli|docs|tests|examples|benchmarks|\.ci)/[\w./-]*\w(?:\.\w+)?|[\w-]+\.(?:py|md|conf|toml)\b)"
)
"""What looks like a path in this repository."""

EXAMPLE_FILES = {
    *("counter.py", "hello.py", "news.py", "natsrt.toml", "natsrt.yaml"),
    *(block.remark for block in blocks("python", "toml")),
}
"""Files that the documents tell the reader to make."""


APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""SHA-256 of the licence as the Apache Software Foundation publishes it."""


def shown(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def anchors(path: Path) -> set[str]:
    """The anchors that a Markdown page has, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", documents(), ids=shown)
def test_links_lead_to_files_and_headings_that_exist(document: Path) -> None:
    for link in LINK.findall(document.read_text("utf-8")):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{shown(document)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{shown(document)} links to {link}"


@pytest.mark.parametrize("document", documents(), ids=shown)
def test_every_path_that_a_document_names_exists(document: Path) -> None:
    for name in PATH.findall(document.read_text("utf-8")):
        if name in EXAMPLE_FILES:
            continue
        places = [REPOSITORY / name, document.parent / name, REPOSITORY / "natsrt" / name]
        assert any(place.exists() for place in places), f"{shown(document)} names {name}"


@pytest.mark.parametrize("name", GENERATED)
def test_generated_parts_are_up_to_date(name: str) -> None:
    up_to_date = (REPOSITORY / name).read_text("utf-8") == with_generated_part(name)
    assert up_to_date, f"{name}: python -m tests.support.documents writes it anew"


def test_the_first_commands_of_the_readme_are_those_that_ci_runs() -> None:
    demo, activation, tests = [block.text.strip() for block in blocks("sh") if block.path == README]
    assert demo == "python3.11 -m venv .venv && .venv/bin/pip install -q '.[server]' && .venv/bin/natsrt demo"
    assert activation == ". .venv/bin/activate"
    assert tests == "python3.11 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/pytest -n 4"
    ci = (REPOSITORY / ".ci" / "run").read_text("utf-8")
    assert "pip install -q '.[server]'" in ci and "/bin/natsrt demo" in ci
    assert "pip install -q -e '.[dev" in ci and ".venv/bin/pytest -n 4" in ci


def test_the_license_is_the_standard_text() -> None:
    text = (REPOSITORY / "LICENSE").read_text("utf-8")
    assert hashlib.sha256(text.encode()).hexdigest() == APACHE_2


# ---------------------------------------------------------------------------------------------------------------------
# Blocks that are loaded


def named(block: Block) -> str:
    return str(block)


@pytest.mark.parametrize("block", blocks("json"), ids=named)
def test_json_in_documents_is_json_and_envelopes_are_envelopes(block: Block) -> None:
    tree = orjson.loads(block.text)
    if "specversion" in tree:
        body = envelope.decode(block.text.strip().encode())
        assert body is not None and body.type == tree["type"]
        assert body.reference is not None if "dataref" in tree else orjson.loads(body.payload) == tree["data"]


@pytest.mark.parametrize("block", [block for block in blocks("toml", "yaml") if not block.remark], ids=named)
def test_settings_files_in_documents_load(block: Block, tmp_path: Path) -> None:
    path = tmp_path / f"natsrt.{block.language}"
    path.write_text(block.text, "utf-8")
    options = Options.from_file(path)
    assert options.name == "billing"
    assert options.servers == ("nats://10.0.0.1:4222", "nats://10.0.0.2:4222")


def test_every_fenced_block_has_a_language_that_is_checked_here() -> None:
    checked = {"python", "json", "toml", "yaml", "console", "ini"}
    for document in documents():
        for language in re.findall(r"^ *```(\w+)", document.read_text("utf-8"), re.MULTILINE):
            assert language in checked | {"sh", "diff", "text", "conf"}, shown(document)


@pytest.mark.parametrize("block", blocks("ini"), ids=named)
def test_units_in_documents_are_units_of_systemd(block: Block, tmp_path: Path) -> None:
    """They start natsrt with options that exist, and leave a worker the time that it needs."""
    unit = configparser.RawConfigParser(strict=False)
    unit.read_string(block.text)
    service = unit["Service"]
    for setting in ("ExecStart", "ExecStartPost"):
        program, command, *arguments = shlex.split(service[setting])
        tool = COMMANDS[command]
        if isinstance(tool, click.Group):
            tool = tool.commands[arguments.pop(0)]
        tool.make_context(command, arguments)  # raises if it does not understand them
        assert program == service["WorkingDirectory"] + "/.venv/bin/natsrt"
    assert int(service["TimeoutStopSec"]) > Options().drain_timeout + 10  # for states, and threads that go on
    assert int(service["RestartPreventExitStatus"]) == Exit.USAGE
    if (verify := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not installed, so the unit itself is not verified")
    program = tmp_path / ".venv" / "bin" / "natsrt"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    path = tmp_path / block.remark
    path.write_text(block.text.replace(service["WorkingDirectory"], str(tmp_path)), "utf-8")
    ended = subprocess.run([verify, "verify", path], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


# ---------------------------------------------------------------------------------------------------------------------
# Blocks that run


@pytest.fixture
def user_environment(own_server: EmbeddedServer, nats_cli: Path) -> dict[str, str]:
    """What a reader has: the commands in PATH, and a server where natsrt looks for it."""
    scripts = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent), str(nats_cli.parent)]
    return {"NATS_URL": own_server.url, "PATH": os.pathsep.join([*scripts, os.environ["PATH"]]), "COLUMNS": "120"}


def write_named_blocks(document: Path, folder: Path) -> None:
    """The files that a document tells the reader to make: its blocks that have the name of a file."""
    for block in blocks("python", "toml"):
        if block.path == document and block.remark:
            (folder / block.remark).write_text(block.text, "utf-8")


@pytest.mark.parametrize("block", blocks("python"), ids=named)
async def test_python_in_documents_runs(
    block: Block, processes: Processes, tmp_path: Path, user_environment: Mapping[str, str]
) -> None:
    write_named_blocks(block.path, tmp_path)
    program = tmp_path / (block.remark or "block.py")
    program.write_text(block.text, "utf-8")
    process = processes.python(program, env=user_environment, cwd=tmp_path)
    assert await process.wait(30) == 0, process.describe()
    assert process.stderr == ""


@dataclass
class Command:
    """One command of a console block, with the output that the document shows; "…" stands for anything."""

    text: str
    expected: list[str] = field(default_factory=list)

    @property
    def in_background(self) -> bool:
        return self.text.endswith("&")

    @property
    def pattern(self) -> re.Pattern[str]:
        lines = [
            r"(?:.*\n)*" if line == "…" else re.escape(line).replace("…", ".*") + r" *\n" for line in self.expected
        ]
        return re.compile("".join(lines))


def commands_of(block: Block) -> Iterator[Command]:
    command: Command | None = None
    for line in block.text.splitlines():
        if line.startswith("$ "):
            if command is not None:
                yield command
            command = Command(line.removeprefix("$ "))
        else:
            assert command is not None, f"{block} does not begin with a command"
            command.expected.append(line.rstrip())
    if command is not None:
        yield command


CONSOLE = [document for document in documents() if any(block.path == document for block in blocks("console"))]


@pytest.mark.slow
@pytest.mark.timeout(180)  # docs/cli.md has thirty commands, each a process that takes a second of processor time
@pytest.mark.parametrize("document", CONSOLE, ids=shown)
async def test_commands_in_documents_print_what_is_shown(
    document: Path, processes: Processes, tmp_path: Path, user_environment: Mapping[str, str]
) -> None:
    write_named_blocks(document, tmp_path)
    for block in blocks("console"):
        if block.path != document:
            continue
        for command in commands_of(block):
            if command.text.startswith("natsrt server"):
                continue  # the one of this test is there
            text = command.text.removesuffix("&")
            process = processes.start(["bash", "-c", text], env=user_environment, cwd=tmp_path)
            if command.in_background:
                await background(process, command)
            else:
                assert await process.wait(30) == 0, f"{block}: {command.text}: {process.describe()}"
                said = (process.stdout + process.stderr).rstrip("\n")
                output = f"{said}\n" if said else ""
                assert command.pattern.fullmatch(output), f"{block}: {command.text} printed\n{output}"


async def background(process: Process, command: Command) -> None:
    for line in command.expected:
        await process.wait_for_line(re.compile(re.escape(line).replace("…", ".*")))


# ---------------------------------------------------------------------------------------------------------------------
# What tables claim


def test_the_table_of_errors_is_the_tree_of_classes() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \|([^|]*)\| [^|]+ \| ([^|]+) \|$", (REPOSITORY / "docs" / "errors.md").read_text("utf-8"), re.M
    )
    assert {name for name, *_ in rows} == set(errors.__all__) - {"NatsrtError"}
    for name, bases, fields in rows:
        cls = getattr(natsrt, name)
        ancestors = {ancestor.__name__ for ancestor in cls.__mro__}
        assert set(re.findall(r"`(\w+)`", bases)) <= ancestors, name
        samples = [sample for sample in SAMPLES if type(sample) is cls]
        assert all(hasattr(sample, name) for sample in samples for name in re.findall(r"`(\w+)`", fields)), name


def test_every_command_of_the_command_line_is_in_the_readme_and_in_its_page() -> None:
    for text in (README.read_text("utf-8"), (REPOSITORY / "docs" / "cli.md").read_text("utf-8")):
        for command in set(COMMANDS) - {"demo"}:
            assert f"natsrt {command}" in text, command


def test_every_option_that_the_documents_name_exists() -> None:
    known = {"--raw", "--help", "--server", "--creds"}
    for command in COMMANDS.values():
        for sub in getattr(command, "commands", {"": command}).values():
            known |= {option for parameter in sub.params for option in parameter.opts}
    for document in (README, REPOSITORY / "docs" / "cli.md", REPOSITORY / "docs" / "operations.md"):
        for option in re.findall(r"`[^`\n]*?(--[a-z][a-z-]+)", document.read_text("utf-8")):
            assert option in known, f"{shown(document)} names {option}"


class Upper(RoutedAgent):
    @message_handler
    async def upper(self, message: dict, ctx: MessageContext) -> dict:  # type: ignore[type-arg]
        return {key: value.upper() for key, value in message.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "printed"),
    [
        ('nats request --raw agent.upper \'{"text":"hi"}\'', '{"text":"HI"}'),
        ("nats kv ls natsrt_registry", "r.known.upper"),
        ("nats service ls", "tables"),
        ("nats service stats tables", "upper"),
        ("nats service ping tables", "tables"),
        ("natsrt agents ls", "upper"),
        ("natsrt agents ping", "tables"),
    ],
)
async def test_commands_of_the_readmes_tables_work(
    command: str, printed: str, own_server: EmbeddedServer, processes: Processes, user_environment: Mapping[str, str]
) -> None:
    async with NatsAgentRuntime(own_server.url, name="tables") as runtime:
        await natsrt.register(runtime, Upper, "upper", lambda: Upper("shouts"))
        await runtime.send_message({"a": "b"}, AgentId("upper", "default"))
        process = processes.start(["bash", "-c", command], env=user_environment)
        await process.wait(30)
        assert printed in process.stdout + process.stderr, process.describe()
