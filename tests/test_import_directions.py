"""The check of import directions sees what it is there to see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY


def check(root: Path) -> tuple[int, str]:
    command = [sys.executable, REPOSITORY / ".ci" / "check_imports.py", root]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return ended.returncode, ended.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for folder in ("natsrt/hosting", "natsrt/wire", "cli"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "natsrt/errors.py").write_text("")
    (tmp_path / "natsrt/wire/names.py").write_text("from natsrt.errors import X\n")
    (tmp_path / "natsrt/hosting/intake.py").write_text("from natsrt.wire import names\n")
    (tmp_path / "cli/__init__.py").write_text("import natsrt.hosting.intake\n")
    return tmp_path


def test_this_repository_is_in_order() -> None:
    code, printed = check(REPOSITORY)
    assert code == 0, printed


def test_arrows_that_point_down_are_in_order(tree: Path) -> None:
    assert check(tree) == (0, "import directions: 4 modules, all arrows point down, no circle\n")


@pytest.mark.parametrize(
    "text",
    [
        "from natsrt.hosting.intake import Intake\n",
        "from natsrt.hosting import intake\n",
        "import natsrt.hosting.intake\n",
        "from ..hosting.intake import Intake\n",
        "def late():\n    from natsrt.hosting import intake\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from natsrt.hosting.intake import Intake\n",
    ],
)
def test_an_arrow_that_points_up_is_found(tree: Path, text: str) -> None:
    (tree / "natsrt/wire/other.py").write_text(text)
    code, printed = check(tree)
    assert code == 1
    assert "natsrt.wire.other imports natsrt.hosting.intake: hosting is above wire" in printed


def test_a_circle_inside_one_folder_is_found(tree: Path) -> None:
    (tree / "natsrt/wire/one.py").write_text("from natsrt.wire.two import Two\n")
    (tree / "natsrt/wire/two.py").write_text("def late():\n    from natsrt.wire import one\n")
    code, printed = check(tree)
    assert code == 1
    assert "circle" in printed and "natsrt.wire.one" in printed and "natsrt.wire.two" in printed


def test_a_module_without_a_layer_is_found(tree: Path) -> None:
    (tree / "natsrt/misplaced.py").write_text("")
    assert check(tree) == (1, "natsrt.misplaced is in no layer: add misplaced to .ci/check_imports.py\n")
