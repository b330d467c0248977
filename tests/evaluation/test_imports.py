"""Modules of the evaluation import in one direction, for type checkers too."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import megatron_dyt.evaluation

PACKAGE = "megatron_dyt.evaluation"
HOME = Path(megatron_dyt.evaluation.__path__[0])


def imported(path: Path) -> set[str]:
    """Modules of the package that the one at `path` imports, in functions and for types as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name.removeprefix(f"{PACKAGE}.").split(".")[0] for name in names if PACKAGE in name}
    return found


def test_no_circles() -> None:
    modules = {path.stem: imported(path) for path in HOME.glob("*.py")}
    assert "batches" in modules["scoring"]
    assert "paper" in modules["evaluate"]
    TopologicalSorter(modules).prepare()  # Raises CycleError.
