"""What ``natsrt worker`` logs, and that it gives way to what the user's module configures."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from autogen_core import AgentId

from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from tests.support.processes import Process, Processes

MODULE = """
import logging, logging.config, sys
{setup}
from autogen_core import MessageContext, RoutedAgent, rpc

import natsrt

logger = logging.getLogger("office")


class Echo(RoutedAgent):
    def __init__(self):
        super().__init__("Echoes")
        {in_agent}

    @rpc
    async def echo(self, message: str, ctx: MessageContext) -> str:
        for level in ("debug", "info", "warning"):
            getattr(logger, level)("office %s", level)
        return message


def make():
    return Echo()


async def register(runtime):
    {in_factory}
    await natsrt.register(runtime, Echo, "make", Echo)
"""

OWN = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (\w+) ([\w.]+): (.*)$")
CONNECTED = "connected to"


class Office:
    """A worker with one agent that logs, and what it wrote until it stopped."""

    def __init__(self, processes: Processes, server: EmbeddedServer, namespace: str, directory: Path) -> None:
        self._processes = processes
        self._client = NatsAgentRuntime(server.url, namespace=namespace)
        self._where = ("--server", server.url, "--namespace", namespace)
        self.directory = directory

    async def run(
        self, setup: str = "", *arguments: str, target: str = "make", in_factory: str = "pass", in_agent: str = "pass"
    ) -> Process:
        text = MODULE.format(setup=setup, in_factory=in_factory, in_agent=in_agent)
        (self.directory / "office.py").write_text(text)
        worker = self._processes.natsrt("worker", f"office:{target}", *self._where, *arguments, cwd=self.directory)
        await worker.wait_for_line("ready")
        async with self._client:
            assert await self._client.send_message("hi", AgentId("make", "default")) == "hi"
        worker.terminate()
        assert await worker.wait() == 0
        return worker


@pytest.fixture
async def office(processes: Processes, server: EmbeddedServer, namespace: str, tmp_path: Path) -> AsyncIterator[Office]:
    directory = tmp_path / "app"
    directory.mkdir()
    yield Office(processes, server, namespace, directory)


def count(text: str, part: str) -> int:
    return sum(part in line for line in text.splitlines())


async def test_without_a_set_up_natsrt_logs_in_its_own_format_from_info_on(office: Office) -> None:
    worker = await office.run()
    lines = [found.groups() for line in worker.stderr.splitlines() if (found := OWN.match(line))]
    assert ("INFO", "office", "office info") in lines
    assert ("WARNING", "office", "office warning") in lines
    assert any(level == "INFO" and name == "natsrt.connection" and CONNECTED in text for level, name, text in lines)
    assert not any(level == "DEBUG" or name.startswith("autogen_core") for level, name, text in lines)
    assert len(lines) == len(set(lines)) == len(worker.stderr.splitlines())


async def test_without_a_set_up_log_level_counts(office: Office) -> None:
    worker = await office.run("", "--log-level", "warning")
    assert [OWN.match(line)[1] for line in worker.stderr.splitlines()] == ["WARNING"]  # type: ignore[index]


@pytest.mark.parametrize("place", ["module", "factory", "agent"])
async def test_basic_config_counts_wherever_it_is_called(office: Office, place: str) -> None:
    setup = 'logging.basicConfig(level=logging.DEBUG, format="MINE %(levelname)s %(name)s %(message)s")'
    places = {"module": {"setup": setup}, "factory": {"in_factory": setup}, "agent": {"in_agent": setup}}
    worker = await office.run(target="register" if place == "factory" else "make", **places[place])
    for level in ("DEBUG", "INFO", "WARNING"):
        assert count(worker.stderr, f"office {level.lower()}") == 1
        assert f"MINE {level} office office {level.lower()}" in worker.stderr.splitlines()
    assert count(worker.stderr, "MINE INFO natsrt.hosting") == count(worker.stderr, "natsrt.hosting") > 0


@pytest.mark.parametrize("more", ["", ", force=True", ", stream=sys.stdout", ", handlers=[logging.StreamHandler()]"])
async def test_the_level_of_basic_config_counts_with_any_other_argument(office: Office, more: str) -> None:
    worker = await office.run(f"logging.basicConfig(level=logging.WARNING{more})")
    written = worker.stderr + worker.stdout
    assert (count(written, "office warning"), count(written, "office info"), count(written, CONNECTED)) == (1, 0, 0)


async def test_basic_config_without_a_level_keeps_that_of_the_command(office: Office) -> None:
    worker = await office.run("logging.basicConfig()")
    assert "INFO:office:office info" in worker.stderr.splitlines()
    assert (count(worker.stderr, CONNECTED), count(worker.stderr, "office debug")) == (1, 0)


async def test_a_file_takes_the_place_of_standard_error(office: Office) -> None:
    worker = await office.run('logging.basicConfig(level=logging.INFO, filename="office.log")')
    assert worker.stderr == ""
    log = (office.directory / "office.log").read_text()
    assert (count(log, "office info"), count(log, CONNECTED)) == (1, 1)


async def test_a_handler_of_the_root_logger_gets_each_line_once(office: Office) -> None:
    worker = await office.run(
        'h = logging.StreamHandler(); h.setFormatter(logging.Formatter("MINE %(message)s"));'
        "logging.getLogger().addHandler(h)"
    )
    assert [count(worker.stderr, text) for text in ("office info", CONNECTED)] == [1, 1]
    assert all(line.startswith("MINE") for line in worker.stderr.splitlines())


async def test_a_handler_of_the_modules_own_logger_gets_its_lines_once_and_natsrt_logs_as_before(
    office: Office,
) -> None:
    worker = await office.run(
        'h = logging.StreamHandler(); h.setFormatter(logging.Formatter("MINE %(message)s"));'
        'logging.getLogger("office").addHandler(h)'
    )
    assert count(worker.stderr, "office info") == count(worker.stderr, "MINE office info") == 1
    assert any(OWN.match(line) for line in worker.stderr.splitlines() if CONNECTED in line)


async def test_dict_config_counts(office: Office) -> None:
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"mine": {"format": "MINE %(name)s %(message)s"}},
        "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "mine"}},
        "loggers": {"natsrt": {"level": "WARNING"}},
        "root": {"level": "DEBUG", "handlers": ["console"]},
    }
    worker = await office.run(f"logging.config.dictConfig({config!r})")
    assert count(worker.stderr, "office debug") == count(worker.stderr, "MINE office office debug") == 1
    assert count(worker.stderr, CONNECTED) == 0


async def test_a_set_up_that_asks_whether_there_is_one_takes_place(office: Office) -> None:
    worker = await office.run(
        "if not logging.getLogger().hasHandlers(): logging.basicConfig(format='MINE %(message)s')"
    )
    assert count(worker.stderr, "MINE office info") == 1


@pytest.mark.parametrize(
    ("setup", "shown"),
    [
        ("", False),
        ("logging.basicConfig(level=logging.INFO)", True),
        ("logging.basicConfig(level=logging.INFO); logging.getLogger('autogen_core').setLevel('WARNING')", False),
        ("logging.getLogger('autogen_core').setLevel('INFO')", True),
    ],
)
async def test_autogens_line_for_each_message_is_shown_only_if_the_module_asks_for_it(
    office: Office, setup: str, shown: bool
) -> None:
    worker = await office.run(setup)
    assert ("autogen_core" in worker.stderr) is shown
