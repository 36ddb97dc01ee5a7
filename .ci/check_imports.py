"""Check the direction of imports inside natsrt: arrows point down only (see docs/architecture.md).

Usage: python .ci/check_imports.py. Prints each arrow that points up, and exits with 1 if there is one.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LAYERS = (
    ("cli",),
    ("__init__", "__main__", "registration"),
    ("runtime",),
    ("session",),
    ("membership",),
    ("assembly",),
    ("hosting",),
    ("keyed",),
    ("sending",),
    ("agents",),
    ("jetstream", "observe"),
    ("transport",),
    ("embedded", "options"),
    ("contexts", "keyed_types"),
    ("wire",),
    ("background",),
    ("errors", "version"),
)
"""Top to bottom. A module may import its own layer and those below it."""

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "natsrt").rglob("*.py")):
        found[".".join(path.relative_to(ROOT / "natsrt").with_suffix("").parts)] = path
    for path in sorted((ROOT / "cli").rglob("*.py")):
        found[".".join(("cli", *path.relative_to(ROOT / "cli").with_suffix("").parts))] = path
    return found


def imported(path: Path) -> set[str]:
    """The parts of natsrt that a module imports, as names below ``natsrt``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "natsrt" else {node.module}
            )
    return {name.removeprefix("natsrt.") for name in names if name.startswith("natsrt.")}


def main() -> int:
    wrong = []
    for module, path in modules().items():
        layer = module.split(".")[0]
        for name in imported(path):
            target = name.split(".")[0]
            target = target if target in RANK else "__init__"
            if layer not in RANK:
                wrong.append(f"{path.relative_to(ROOT)} is in no layer: add it to .ci/check_imports.py")
            elif RANK[target] < RANK[layer]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}: {target} is above {layer}")
    print("\n".join(sorted(set(wrong))) or f"import directions: {len(modules())} modules, all arrows point down")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
