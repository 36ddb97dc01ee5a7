"""What type checkers say about programs of users, which are in tests/typing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from natsrt import Options
from natsrt.options.arguments import MoreSettings, Settings
from tests.support.documents import OWN_PARAMETERS
from tests.support.processes import REPOSITORY

PROGRAMS = REPOSITORY / "tests" / "typing"
GOOD, WRONG = "good_program.py", "wrong_program.py"

pytestmark = pytest.mark.timeout(300)  # a type checker without a cache reads natsrt and all that it imports


def run(*command: str, cwd: Path) -> str:
    """What a type checker prints. Without it the test is skipped, but fails where CI is set."""
    if importlib.util.find_spec(command[0]) is None:
        reason = f"{command[0]} is missing: pip install -e '.[dev,ci]'"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    # pyright finds the Python to look at in PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def errors_of(checker: str, folder: Path) -> Mapping[str, Mapping[int, str]]:
    """The errors that a type checker reports for the programs in a folder: by file, by line."""
    found: dict[str, dict[int, str]] = {GOOD: {}, WRONG: {}}
    if checker == "mypy":
        printed = run("mypy", "--strict", "--config-file", os.devnull, GOOD, WRONG, cwd=folder)
        for name, line, text in re.findall(r"^(\w+\.py):(\d+): error: (.*)$", printed, re.MULTILINE):
            found[name][int(line)] = text
        return found
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    for report in json.loads(run("pyright", "--outputjson", cwd=folder))["generalDiagnostics"]:
        if report["severity"] == "error":
            found[Path(report["file"]).name][report["range"]["start"]["line"] + 1] = report["message"]
    return found


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_programs_of_users_are_checked(checker: str, tmp_path: Path) -> None:
    # In a folder of their own, as at a user's: natsrt is then found as it is installed, not as a folder beside them.
    for program in (GOOD, WRONG):
        shutil.copy(PROGRAMS / program, tmp_path)
    errors = errors_of(checker, tmp_path)
    assert errors[GOOD] == {}, "if natsrt is not found: pip install -e '.[dev]' again"
    lines = (PROGRAMS / WRONG).read_text("utf-8").splitlines()
    expected = {number for number, line in enumerate(lines, 1) if line.endswith("# error")}
    assert expected, "the wrong program says which lines are wrong"
    assert errors[WRONG].keys() == expected, errors[WRONG]


def test_every_public_name_of_natsrt_has_a_complete_type(tmp_path: Path) -> None:
    report = json.loads(run("pyright", "--verifytypes", "natsrt", "--ignoreexternal", "--outputjson", cwd=tmp_path))
    incomplete = {
        symbol["name"]: [diagnostic["message"] for diagnostic in symbol["diagnostics"]]
        for symbol in report["typeCompleteness"]["symbols"]
        if symbol["isExported"] and not symbol["isTypeKnown"]
    }
    assert incomplete == {}
    assert report["typeCompleteness"]["completenessScore"] == 1


def test_every_setting_is_an_argument_for_type_checkers() -> None:
    assert Settings.__annotations__.keys() == Options.model_fields.keys()
    assert Settings.__annotations__.keys() - MoreSettings.__annotations__.keys() == set(OWN_PARAMETERS)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("servers", ["nats://a", ["nats://a"], ("nats://a",)]),
        ("password", ["p"]),
        ("tls_ca", [__file__, Path(__file__)]),
        ("call_timeout", [5, 2.5, "none"]),
        ("connect_timeout", [5, 2.5]),
        ("max_pings_out", [5]),
        ("tls_first", [True]),
        ("keyed", ["a,b", ["a"], {"a": True}, {"a": {"save": "manual"}}]),
    ],
)
def test_what_type_checkers_accept_is_accepted(name: str, values: Sequence[object]) -> None:
    user = {"user": "u"} if name == "password" else {}
    for value in values:
        assert name in Options.load(environ={}, **user, **{name: value}).model_fields_set
