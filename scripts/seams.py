"""Which attributes of Megatron that we replace exist in which of its releases, read from their sources.

    python scripts/seams.py MEGATRON_LM      a clone of Megatron-LM -> tests/mcore/seams.json

The wheel of 0.16 lacks `megatron.training`, so that only Megatron-LM's own tree shows what `register()` meets
there. The tests compare this record with the tables; they need no clone. A release whose tag the clone lacks
is read from the installed package, if that is the release.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

from megatron_dyt import compat
from megatron_dyt.cpu import replacements
from megatron_dyt.mcore import register

RECORD = Path(__file__).resolve().parents[1] / "tests/mcore/seams.json"

# Path of a file in the tree, such as "megatron/core/utils.py" -> its text, or None.
Tree = Callable[[str], str | None]
Attribute = tuple[str, str]


def needed(release: str) -> set[Attribute]:
    """(module, attribute) of what we replace in `release` with its training loop and Transformer Engine."""
    with ExitStack() as stack:
        for name, value in (
            ("megatron_version", release),
            ("has_training", True),
            ("has_transformer_engine", True),
        ):
            stack.enter_context(mock.patch.object(compat, name, lambda value=value: value))
        rows = [*register.seams(), *replacements.rows()]
    return {(row.module, row.attribute) for row in rows if row.module.startswith("megatron.")}


def everything() -> set[Attribute]:
    """What we replace in any of the tested releases."""
    return set().union(*map(needed, compat.TESTED))


def exists(tree: Tree, module: str, attribute: str) -> bool:
    """Whether the source of `module` defines, assigns or imports `attribute` ("name" or "Class.name")."""
    path = module.replace(".", "/")
    text = tree(f"{path}.py") or tree(f"{path}/__init__.py")
    if text is None:
        return False
    scope = ast.parse(text).body
    *owners, name = attribute.split(".")
    for owner in owners:
        found = [node for node in _statements(scope) if isinstance(node, ast.ClassDef) and node.name == owner]
        if not found:
            return False
        scope = found[-1].body
    return any(name in _bound(node) for node in _statements(scope))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a scope, also those in its `if`, `try` and `with`."""
    for node in body:
        yield node
        for block in ("body", "orelse", "finalbody") if isinstance(node, ast.If | ast.Try | ast.With) else ():
            yield from _statements(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement gives a value."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
    return {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}


def installed(path: str) -> str | None:
    """A file of the installed package."""
    spec = find_spec("megatron.core")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parents[2] / path
    return file.read_text() if file.is_file() else None


def main(clone: str) -> None:
    """Write the record of all tested releases."""
    names = sorted(f"{module}:{name}" for module, name in everything())
    absent = {}
    for release in compat.TESTED:
        tree = _tree(clone, release)
        absent[release] = [each for each in names if not exists(tree, *each.split(":"))]
    record = {"names": names, "absent": absent}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def _tree(clone: str, release: str) -> Tree:
    def committed(path: str) -> str | None:
        command = ["git", "-C", clone, "show", f"core_v{release}:{path}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else None

    if committed("megatron/core/package_info.py") is not None:
        return committed
    if compat.megatron_version() != release:
        sys.exit(f"{clone} has no tag core_v{release} (git fetch --tags), and {release} is not installed")
    return installed


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
