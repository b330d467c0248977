"""Bad JSON lines are named by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dyt.data.jsonl import check_inputs, parse_text, read_lines
from megatron_dyt.errors import UserError


def test_lines_are_numbered_and_texts_kept_exactly(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\\r\\n\\tb"}\n\n{"text": "\xc3\xa9", "other": 1}')
    parsed = [(number, parse_text(line, path, number)) for number, line in read_lines(path)]
    assert parsed == [(1, "a\r\n\tb"), (2, ""), (3, "é")]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'["text"]', "not a JSON object"),
        (b'{"body": "x"}', 'no "text"'),
        (b'{"text": 5}', '"text" is not a string'),
        (b'{"text": "\\ud800"}', "not valid Unicode"),
    ],
)
def test_malformed_line_is_named(line: bytes, problem: str) -> None:
    with pytest.raises(UserError, match=f"some.jsonl, line 17: .*{problem}"):
        parse_text(line, Path("some.jsonl"), 17)


def test_inputs_must_be_files_with_content(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "full").write_text("1234")
    assert check_inputs([tmp_path / "full"] * 2) == 8
    for name, problem in (("none", "does not exist"), ("empty", "is empty"), (".", "a directory")):
        with pytest.raises(UserError, match=problem):
            check_inputs([tmp_path / name])
