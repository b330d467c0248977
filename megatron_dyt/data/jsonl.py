"""Reading text from JSON lines: one object a line, the text under the key "text"."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_dyt.errors import UserError

TEXT_KEY = "text"


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


def parse_text(line: bytes, path: Path, number: int) -> str:
    """The text of one raw line; "" for a blank line.

    Raises:
        UserError: the line is not JSON, not an object, or has no usable text. Names file and line.
    """
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise _bad(path, number, f"is not valid JSON ({error}); the file may be cut off") from error
    if not isinstance(record, dict) or not isinstance(record.get(TEXT_KEY), str):
        raise _bad(path, number, f'must be a JSON object with a string under "{TEXT_KEY}"')
    text: str = record[TEXT_KEY]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _bad(path, number, f"holds text that is not valid Unicode ({error.reason})") from error
    return text


def _bad(path: Path, number: int, problem: str) -> UserError:
    return UserError(f"{path}, line {number}: {problem}; repair or remove the line")
