"""The check of import directions sees what it is there to see."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
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
    assert check(tree) == (0, "import directions: 4 modules, all arrows point down, no cycle\n")


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


@pytest.mark.parametrize("text", ["from natsrt.observe.events import Event\n", "from ..observe import events\n"])
def test_an_arrow_to_a_folder_beside_is_found(tree: Path, text: str) -> None:
    for folder in ("jetstream", "observe"):
        (tree / "natsrt" / folder).mkdir()
    (tree / "natsrt/observe/events.py").write_text("")
    (tree / "natsrt/jetstream/acks.py").write_text(text)
    found = "natsrt.jetstream.acks imports natsrt.observe.events: observe is beside jetstream\n"
    assert check(tree) == (1, found)


def test_each_cycle_is_found_beside_an_arrow_that_points_up(tree: Path) -> None:
    (tree / "natsrt/wire/one.py").write_text("from natsrt.wire.two import Two\n")
    (tree / "natsrt/wire/two.py").write_text("def late():\n    from natsrt.wire import three\n")
    (tree / "natsrt/wire/three.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .one import One\n"
    )
    (tree / "natsrt/hosting/intake.py").write_text("from natsrt.hosting.reader import Reader\n")
    (tree / "natsrt/hosting/reader.py").write_text("from natsrt.hosting.intake import Intake\n")
    (tree / "natsrt/errors.py").write_text("from natsrt.wire import names\n")
    code, printed = check(tree)
    assert code == 1
    arrow, *found = printed.splitlines()
    assert arrow == "natsrt.errors imports natsrt.wire.names: wire is above errors"
    intro = "these modules import one another in a cycle: "
    assert all(line.startswith(intro) for line in found)
    cycles = [line.removeprefix(intro).split(" -> ") for line in found]
    imports = {
        "natsrt.wire.one": "natsrt.wire.two",
        "natsrt.wire.two": "natsrt.wire.three",
        "natsrt.wire.three": "natsrt.wire.one",
        "natsrt.hosting.intake": "natsrt.hosting.reader",
        "natsrt.hosting.reader": "natsrt.hosting.intake",
        "natsrt.errors": "natsrt.wire.names",
        "natsrt.wire.names": "natsrt.errors",
    }
    assert all(imports[module] == target for cycle in cycles for module, target in pairwise(cycle))
    assert sorted(sorted({*cycle}) for cycle in cycles) == [
        ["natsrt.errors", "natsrt.wire.names"],
        ["natsrt.hosting.intake", "natsrt.hosting.reader"],
        ["natsrt.wire.one", "natsrt.wire.three", "natsrt.wire.two"],
    ]


def test_a_module_without_a_layer_is_found(tree: Path) -> None:
    (tree / "natsrt/misplaced.py").write_text("")
    assert check(tree) == (1, "natsrt.misplaced is in no layer: add misplaced to .ci/check_imports.py\n")
