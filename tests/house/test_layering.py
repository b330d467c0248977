"""Imports go one way, ops and nn know nothing of Megatron, one file reads Megatron's version."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_dyt"

# A folder or top-level module imports from itself and from what stands before it, so folders form no circle.
# A new top-level module gets its place here.
ORDER = (
    # The ground, which all may use.
    *("version", "log", "errors", "patching", "atomic", "parsed_args", "compat"),
    *("world", "rendezvous", "llama"),
    # What stands alone: the math; Megatron without a GPU; checkpoint directories; data sets.
    *("ops", "config", "nn", "cpu", "checkpoints", "data"),
    # DyT inside Megatron, and what is built on it.
    *("mcore", "training", "recipes", "hf", "report", "sweep", "evaluation", "probe"),
    *("bridge", "pretrain", "run", "cli", "__main__"),
)
PLACE_OF = {name: place for place, name in enumerate(ORDER)}
# `from megatron_dyt import register`: the public API stands for mcore, the last that it gathers from.
PUBLIC_API_PLACE = PLACE_OF["mcore"]

MEGATRON_FREE = ("ops", "nn")
MEGATRON = ("megatron", "transformer_engine")
VERSION_READER = "compat.py"


def package_files() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def top_module(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def imported_names(source: str, file: str) -> set[str]:
    """Dotted names that the file imports, anywhere in it; `from a import b` gives a.b."""
    package = ["megatron_dyt", *file.split("/")[:-1]]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{prefix}.{alias.name}" for alias in node.names)
    return names


def layering_faults(source: str, file: str) -> list[str]:
    importer = top_module(file)
    if importer == "__init__":  # the public API, which may gather from every layer
        return []
    if importer not in PLACE_OF:
        return [f"megatron_dyt/{file} has no place: give {importer!r} one in ORDER"]
    faults = []
    for name in sorted(imported_names(source, file)):
        parts = name.split(".")
        if importer in MEGATRON_FREE and parts[0] in MEGATRON:
            faults.append(f"megatron_dyt/{file} imports {name}")
        if parts[0] == "megatron_dyt":
            module = parts[1] if len(parts) > 1 else ""
            if PLACE_OF.get(module, PUBLIC_API_PLACE) > PLACE_OF[importer]:
                faults.append(f"megatron_dyt/{file} imports {name}, which comes later in ORDER")
    return faults


def dotted(node: ast.expr) -> str:
    """`a.b.c` for a chain of names, '' for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (prefix := dotted(node.value)):
        return f"{prefix}.{node.attr}"
    return ""


def megatron_aliases(tree: ast.AST) -> set[str]:
    """Names bound in the file to something of Megatron's."""
    bound = {"megatron"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            bound.update(
                alias.asname or alias.name.split(".")[0]
                for alias in node.names
                if (module or alias.name).split(".")[0] == "megatron"
            )
    return bound


def version_reads(source: str, file: str) -> list[str]:
    """Where the file reads Megatron's version: by attribute, package_info or metadata."""
    tree = ast.parse(source)
    aliases = megatron_aliases(tree)
    reads = [
        name
        for name in imported_names(source, file)
        if name.startswith("megatron.") and ("__version__" in name or "package_info" in name)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("__version__", "package_info"):
            name = dotted(node)
            if name.split(".")[0] in aliases:
                reads.append(name)
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in (
            "version",
            "distribution",
        ):
            reads += [
                f"{dotted(node.func)}({argument.value!r})"
                for argument in node.args
                if isinstance(argument, ast.Constant)
                and str(argument.value).replace("_", "-").lower() == "megatron-core"
            ]
    return reads


@pytest.mark.parametrize("file", package_files())
def test_imports_go_one_way(file: str) -> None:
    assert layering_faults((PACKAGE / file).read_text(), file) == []


@pytest.mark.parametrize("file", [name for name in package_files() if name != VERSION_READER])
def test_only_compat_reads_the_megatron_version(file: str) -> None:
    assert version_reads((PACKAGE / file).read_text(), file) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("nn/convert.py", "def f():\n    from megatron.core import parallel_state"),
        ("ops/dyt.py", "from ..nn import dynamic_tanh"),
        ("nn/dynamic_tanh.py", "from megatron_dyt import register"),
        ("ops/dyt.py", "import megatron.core"),
        ("nn/convert.py", "import transformer_engine.pytorch as te"),
        ("hf/export.py", "import megatron_dyt.cli"),
        ("surprise.py", ""),
    ],
)
def test_wrong_import_is_noticed(file: str, source: str) -> None:
    assert len(layering_faults(source, file)) == 1


def test_right_import_is_let_through() -> None:
    source = "import megatron.core\nfrom .register import x\nfrom megatron_dyt.nn import dynamic_tanh"
    assert layering_faults(source, "mcore/norm.py") == []


@pytest.mark.parametrize(
    "source",
    [
        "from megatron import core as mcore\nmcore.__version__",
        "from megatron.core.package_info import MAJOR",
        "from importlib.metadata import version\nversion('megatron_core')",
        "from megatron.core import __version__",
    ],
)
def test_version_read_is_noticed(source: str) -> None:
    assert version_reads(source, "pretrain.py")


def test_other_version_read_is_let_through() -> None:
    assert version_reads("import torch\ntorch.__version__", "pretrain.py") == []
