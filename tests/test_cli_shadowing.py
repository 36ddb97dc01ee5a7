"""``natsrt worker`` with modules that have the name of another one: the error names both, and what to do."""

from __future__ import annotations

import calendar
import json
import queue
import statistics
from email import __file__ as email
from pathlib import Path

import nats
import pytest

from tests.support.cli import Ended, natsrt

AGENT = """
from autogen_core import RoutedAgent


class Clerk(RoutedAgent):
    def __init__(self):
        super().__init__("a clerk")


def make():
    return Clerk()
"""
LOADED = 3
"""The exit code of a worker whose module was loaded: it has no server."""


async def worker(directory: Path, target: str, **files: str) -> Ended:
    """Run a worker in ``directory``, with these files: names with ``__`` for ``/``, without ``.py``."""
    for name, text in files.items():
        path = directory / f"{name.replace('__', '/', 1)}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    where = ("--server", "nats://127.0.0.1:1", "--timeout", "200ms", "--log-level", "error")
    ended = await natsrt("worker", target, *where, cwd=directory)
    assert "Traceback" not in ended.stderr
    return ended


@pytest.mark.parametrize(
    ("target", "file", "other"),
    [
        ("calendar:make", "calendar", calendar.__file__),
        ("queue:make", "queue", queue.__file__),
        ("time:make", "time", "built in"),
        ("nats:make", "nats", nats.__file__),
        ("email.clerk:make", "email__clerk", email),
    ],
    ids=lambda value: Path(value).name,
)
async def test_a_module_with_the_name_of_another_that_is_used_already_is_refused(
    tmp_path: Path, target: str, file: str, other: str
) -> None:
    own = f"{tmp_path}/{file.partition('__')[0]}"
    ended = await worker(tmp_path, target, **{file: AGENT})
    assert ended.code == 2
    assert f"{own}.py" in ended.stderr or f"{own} was not" in ended.stderr
    assert f"rename {own}" in ended.stderr
    assert other in ended.stderr


async def test_a_package_with_the_name_of_pythons_own_is_refused(tmp_path: Path) -> None:
    ended = await worker(tmp_path, "email.clerk:make", email__clerk=AGENT, email____init__="")
    assert ended.code == 2
    assert f"{tmp_path}/email/__init__.py was not: rename {tmp_path}/email\n" in ended.stderr


@pytest.mark.parametrize("file", ["test", "agents", "examples", "test__clerk", "pytest"])
async def test_a_module_with_the_name_of_an_installed_one_that_is_not_used_yet_is_loaded(
    tmp_path: Path, file: str
) -> None:
    package = {f"{file.partition('__')[0]}____init__": ""} if "__" in file else {}
    ended = await worker(tmp_path, f"{file.replace('__', '.')}:make", **{file: AGENT}, **package)
    assert ended.code == LOADED, ended.stderr


async def test_a_folder_without_init_gives_way_to_an_installed_package_and_the_error_says_so(tmp_path: Path) -> None:
    ended = await worker(tmp_path, "pytest.clerk:make", pytest__clerk=AGENT)
    assert ended.code == 2
    assert "there is no module 'pytest.clerk'" in ended.stderr
    assert pytest.__file__ in ended.stderr
    assert f"rename {tmp_path}/pytest, or add an __init__.py to it" in ended.stderr


@pytest.mark.parametrize("target", ["queue:make", "queue:Queue", "calendar:Calendar"])
async def test_an_error_about_a_module_from_elsewhere_names_its_file(tmp_path: Path, target: str) -> None:
    ended = await worker(tmp_path, target)
    assert ended.code == 2
    file = {"queue": queue, "calendar": calendar}[target.partition(":")[0]].__file__
    assert f"was loaded from {file}: it is not in {tmp_path}; use --app-dir for another directory" in ended.stderr


HIDES = "has the same name as"


@pytest.mark.parametrize(
    ("uses", "files", "expected"),
    [
        ("import statistics\nstatistics.mean([1])", {"statistics": ""}, (HIDES, statistics.__file__)),
        ("from statistics import mean", {"statistics": ""}, (HIDES, statistics.__file__)),
        ("import statistics.more", {"statistics": ""}, (HIDES, statistics.__file__)),
        ("import pytest\npytest.fixture", {"pytest": "import pytest\npytest.fixture"}, (HIDES, pytest.__file__)),
        (
            "try:\n    from statistics import mean\nexcept ImportError as e:\n    raise RuntimeError('no mean') from e",
            {"statistics": ""},
            (HIDES, statistics.__file__),
        ),
        ("import json\njson.mine", {"json": "mine = 1"}, ("was loaded from", json.__file__)),
        ("from json import mine", {"json": "mine = 1"}, ("was loaded from", json.__file__)),
    ],
)
@pytest.mark.parametrize("place", ["import", "factory"])
async def test_a_module_that_breaks_the_import_of_others_is_named(
    tmp_path: Path, uses: str, files: dict[str, str], expected: tuple[str, str], place: str
) -> None:
    inside = "\n".join(f"    {line}" for line in uses.splitlines())
    text = uses if place == "import" else f"def make():\n{inside}"
    ended = await worker(tmp_path, "clerk:make", clerk=f"{AGENT}\n{text}", **files)
    assert ended.code == (2 if place == "import" else 1)
    (name,) = files
    assert all(part in ended.stderr for part in (*expected, f"{tmp_path}/{name}.py", f"rename {tmp_path}/{name}.py"))


async def test_other_errors_name_no_module(tmp_path: Path) -> None:
    for text in ("import nothing_like_it", "from clerk import nothing", "import json\njson.nothing", "1 / 0"):
        ended = await worker(tmp_path, "clerk:make", clerk=text)
        assert ended.code == 2
        assert "rename" not in ended.stderr


async def test_a_factory_that_needs_a_keyword_is_refused(tmp_path: Path) -> None:
    ended = await worker(tmp_path, "clerk:open", clerk="def open(*, runtime): ...")
    assert ended.code == 2
    assert "clerk:open needs the keyword runtime" in ended.stderr
