"""Plain JSON lines, one object a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_dyt.errors import UserError


def check_inputs(paths: Sequence[Path]) -> int:
    """Return the total size of `paths` in bytes.

    Raises:
        UserError: a path is missing, is not a file, or is empty.
    """
    for path in paths:
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            raise UserError(f"input {path} {what}; give a JSON-lines file")
        if path.stat().st_size == 0:
            raise UserError(f"input {path} is empty; every line must hold a JSON object with text")
    return sum(path.stat().st_size for path in paths)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, raw line with its newline) of `path`."""
    with path.open("rb") as file:
        yield from enumerate(file, start=1)
