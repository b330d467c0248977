"""Files are whole or absent."""

import hashlib
import os
from pathlib import Path

import pytest

from megatron_dyt.atomic import read_json, sha256, whole_files, write_atomically, write_json


def test_whole_files_appear_together_when_the_block_ends(tmp_path: Path) -> None:
    targets = [tmp_path / "new" / "a.bin", tmp_path / "new" / "a.idx"]
    with whole_files(targets) as partials:
        for partial in partials:
            partial.write_text("content")
        assert not any(target.exists() for target in targets)
    assert sorted(path.name for path in targets[0].parent.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whole_files_leave_the_old_file_on_failure(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a"
    target.write_text("old")

    def fail() -> None:
        with whole_files([target]) as (partial,):
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert target.read_text() == "old"


def test_equal_content_keeps_the_time_stamp(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"one")
    os.utime(path, (1, 1))
    write_atomically(path, b"one")
    assert path.stat().st_mtime == 1
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mtime != 1


def test_json_round_trip_and_what_is_not_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1]})
    (tmp_path / "half.json").write_text('{"a": [1')
    assert read_json(tmp_path / "a.json") == {"a": [1]}
    assert read_json(tmp_path / "half.json") is None
    assert read_json(tmp_path / "none.json") is None


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
