"""Lines of a file, and inputs that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dyt.data.jsonl import check_inputs, read_lines
from megatron_dyt.errors import UserError


def test_lines_are_numbered_and_kept_exactly(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "a\\r\\n\\tb"}\n', b"\n", b'{"text": "\xc3\xa9", "other": 1}']
    path.write_bytes(b"".join(lines))
    assert list(read_lines(path)) == list(enumerate(lines, start=1))


def test_inputs_must_be_files_with_content(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "full").write_text("1234")
    assert check_inputs([tmp_path / "full"] * 2) == 8
    for name, problem in (("none", "does not exist"), ("empty", "is empty"), (".", "a directory")):
        with pytest.raises(UserError, match=problem):
            check_inputs([tmp_path / name])
