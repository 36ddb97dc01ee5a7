"""Check the directions of imports in natsrt: arrows point down only, and no modules import one another in a cycle.

Usage: python .ci/check_imports.py [ROOT]. Prints each arrow in a wrong direction and each cycle, and exits with 1 if
there is one. Of cycles that share an arrow only one may be printed. Imports inside functions and under TYPE_CHECKING
count too. docs/architecture.md says what each layer is for.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

LAYERS = (
    ("__main__",),
    ("cli",),
    ("agentchat",),
    ("contrib",),
    ("__init__",),
    ("plain", "registration"),
    ("runtime",),
    ("lifecycle",),
    ("session",),
    ("membership",),
    ("assembly",),
    ("hosting",),
    ("keyed",),
    ("sending",),
    ("agents", "storage"),
    ("jetstream", "observe"),
    ("transport",),
    ("embedded", "options"),
    (
        "reminder_types",
        "task_types",
    ),
    ("arguments", "contexts", "durable_types", "keyed_types", "retry_types"),
    ("wire",),
    ("listening", "signals"),
    ("awaiting", "background", "forks"),
    ("errors", "version"),
)
"""Folders and modules of natsrt, and the command line, from the top to the bottom.

A module may import from its own folder and from lower lines, but not from another folder on the same line. A name
that does not exist in the tree does no harm.
"""

PACKAGES = {"natsrt": "natsrt", "cli": "natsrt_cli"}
"""Each package's folder, and the name under which it is installed."""


def modules(root: Path) -> dict[str, Path]:
    """Every module below ``root`` by its full name; a package by the name of its folder."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imported(module: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules among ``known`` that a module imports."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, (*package.split(".")[: len(package.split(".")) - node.level + 1], base)))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                if name in known or base in known:
                    yield name if name in known else base


def layer_of(module: str) -> str:
    """The folder or module of `LAYERS` to which a module belongs."""
    package, _, rest = module.partition(".")
    if package != "natsrt":
        return "cli"
    return rest.partition(".")[0] or "__init__"


def problems(root: Path) -> list[str]:
    """One sentence for each wrong arrow, each cycle and each module without a layer below ``root``."""
    known = modules(root)
    arrows = {module: set(imported(module, path, known)) - {module} for module, path in known.items()}
    return [*wrong_arrows(arrows), *cycles(arrows)]


def wrong_arrows(arrows: dict[str, set[str]]) -> Iterator[str]:
    rank = {name: number for number, names in enumerate(LAYERS) for name in names}
    for module, targets in sorted(arrows.items()):
        layer = layer_of(module)
        if layer not in rank:
            yield f"{module} is in no layer: add {layer} to .ci/check_imports.py"
            continue
        for target in sorted(targets):
            other = layer_of(target)
            if other != layer and other in rank and rank[other] <= rank[layer]:
                place = "above" if rank[other] < rank[layer] else "beside"
                yield f"{module} imports {target}: {other} is {place} {layer}"


def cycles(arrows: dict[str, set[str]]) -> Iterator[str]:
    left = {module: set(targets) for module, targets in sorted(arrows.items())}
    while True:
        try:
            TopologicalSorter(left).prepare()
            return
        except CycleError as error:
            cycle: list[str] = error.args[1][::-1]  # each one imports the next; the first is also the last
            yield f"these modules import one another in a cycle: {' -> '.join(cycle)}"
            left[cycle[0]].remove(cycle[1])


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    found = problems(root)
    print("\n".join(found) or f"import directions: {len(modules(root))} modules, all arrows point down, no cycle")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
