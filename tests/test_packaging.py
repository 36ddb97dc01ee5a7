"""What distributions contain, what an index page shows of the README, and how a checkout is installed."""

from __future__ import annotations

import email
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY, Processes

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
RELATIVE = re.compile(r"\[[^\]]*\]\((?!https://|#)[^)]*\)")


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a distribution of ``source`` in ``target``, as installers do."""
    target.mkdir(exist_ok=True)
    before = set(target.iterdir())
    command = [sys.executable, "-c", BUILD, f"build_{kind}", target]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stderr
    (made,) = set(target.iterdir()) - before
    return made


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unpacked source distribution."""
    folder = tmp_path_factory.mktemp("distributions")
    # A copy without what earlier builds left: setuptools adds every file that it had added before.
    source = folder / "source"
    shutil.copytree(REPOSITORY, source, ignore=shutil.ignore_patterns(".[!c]*", "*.egg-info", "build", "dist"))
    with tarfile.open(build("sdist", source, folder)) as archive:
        archive.extractall(folder, filter="data")
    (made,) = folder.glob("natsrt-*/")
    return made


@pytest.fixture(scope="module")
def wheel(unpacked: Path) -> Path:
    """The wheel that is built from the source distribution."""
    return build("wheel", unpacked, unpacked.parent / "wheels")


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not {"__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache"} & set(path.parts)
    }


@pytest.mark.parametrize("folder", ["natsrt", "cli", "tests", "docs", "examples", "benchmarks", ".ci"])
def test_the_source_distribution_has_all_that_the_tests_need(folder: str, unpacked: Path) -> None:
    assert files_below(REPOSITORY / folder) - files_below(unpacked / folder) == set()


def test_the_source_distribution_has_the_files_at_the_top(unpacked: Path) -> None:
    needed = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "nats.conf", "pyproject.toml", "setup.py"}
    assert needed <= {path.name for path in unpacked.iterdir()}


def test_the_wheel_has_both_packages_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    code = {f"natsrt/{name}" for name in files_below(REPOSITORY / "natsrt")}
    code |= {f"natsrt_cli/{name}" for name in files_below(REPOSITORY / "cli")}
    assert {name for name in names if ".dist-info/" not in name} == code
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_index_page_has_no_link_that_leads_nowhere(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    page = str(metadata.get_payload())
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert page.startswith("# natsrt") and "docs/keyed.md" in page
    assert RELATIVE.findall(page) == []
    assert ".png" not in page


@pytest.fixture(scope="module")
def index_page() -> Callable[[str, str | None, str], str]:
    spec = importlib.util.spec_from_file_location("natsrt_setup", REPOSITORY / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[str, str | None, str], str] = module.index_page
    return found


LINKS = "[a](docs/a.md#b) [docs/c.md](docs/c.md) [NATS](https://nats.io) [here](#here)"


def test_relative_links_lead_to_the_repository_where_the_project_names_one(
    index_page: Callable[[str, str | None, str], str],
) -> None:
    at = "https://example.org/natsrt/blob/v1.2.0"
    expected = f"[a]({at}/docs/a.md#b) [docs/c.md]({at}/docs/c.md) [NATS](https://nats.io) [here](#here)"
    assert index_page(LINKS, "https://example.org/natsrt/", "1.2.0") == expected


def test_relative_links_become_text_where_the_project_names_no_repository(
    index_page: Callable[[str, str | None, str], str],
) -> None:
    assert index_page(LINKS, None, "1.2.0") == "a (docs/a.md) docs/c.md [NATS](https://nats.io) [here](#here)"


@pytest.mark.parametrize(
    ("repository", "expected"),
    [("https://example.org/natsrt", "![A chat](https://example.org/natsrt/raw/v1.2.0/docs/chat.png)\n\n"), (None, "")],
)
def test_relative_pictures_are_those_of_the_repository_or_left_out(
    repository: str | None, expected: str, index_page: Callable[[str, str | None, str], str]
) -> None:
    page = "before\n\n{}![logo](https://nats.io/logo.png)\n"
    assert index_page(page.format("![A chat](docs/chat.png)\n\n"), repository, "1.2.0") == page.format(expected)


def test_an_editable_install_has_a_path_that_type_checkers_follow(unpacked: Path) -> None:
    with zipfile.ZipFile(build("editable", unpacked, unpacked.parent / "editable")) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        paths = [archive.read(name).decode().strip() for name in names if name.endswith(".pth")]
        (record,) = [name for name in names if name.endswith("/RECORD")]
        recorded = [line.split(",")[0] for line in archive.read(record).decode().splitlines()]
    assert str(unpacked) in paths
    assert sorted(recorded) == sorted(names)


@pytest.mark.parametrize("arguments", [["--version"], ["worker", "--help"]], ids=" ".join)
async def test_python_m_natsrt_is_the_command_line(arguments: list[str], processes: Processes, tmp_path: Path) -> None:
    for folder in (tmp_path, REPOSITORY):
        command = processes.start([sys.executable, "-m", "natsrt", *arguments], cwd=folder)
        script = processes.natsrt(*arguments, cwd=folder)
        assert (await command.wait(), await script.wait()) == (0, 0)
        assert command.stdout == script.stdout != ""


async def test_python_m_natsrt_exits_with_the_code_of_the_command(processes: Processes, tmp_path: Path) -> None:
    command = processes.start([sys.executable, "-m", "natsrt", "worker"], cwd=tmp_path)
    assert await command.wait() == 2
    assert "MODULE:FACTORY" in command.stderr


async def test_python_m_natsrt_without_the_command_line_says_what_to_install(
    processes: Processes, tmp_path: Path
) -> None:
    hide = "import sys; sys.modules['natsrt_cli'] = None; import runpy; runpy.run_module('natsrt', run_name='__main__')"
    command = processes.python(hide.replace("; ", "\n"), cwd=tmp_path)
    assert await command.wait() == 1
    assert "pip install" in command.stderr and "Traceback" not in command.stderr
