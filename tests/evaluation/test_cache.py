"""Results on disk: found again, apart by identity, and a clear error for a file that is none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.evaluation.cache import ResultCache, key_of


def test_found_again(tmp_path: Path) -> None:
    values = {key_of("score", [i], [1]): [-0.1 * i, 1.0] for i in range(1200)}
    ResultCache(tmp_path / "new", "a").put(values)
    again = ResultCache(tmp_path / "new", "a")
    again.check()
    assert again.get([*values, key_of("else")]) == values
    assert ResultCache(tmp_path / "new", "b").get(values) == {}
    assert again.get([]) == {}


def test_keys_tell_requests_apart() -> None:
    parts = [("score", [1, 2], [3]), ("score", [1], [2, 3]), ("score", [12], [3]), ("generate", [1, 2], [3])]
    assert len({key_of(*part) for part in parts}) == len(parts)
    assert key_of(*parts[0]) == key_of("score", [1, 2], [3])


@pytest.mark.parametrize("content", [b"not a database, but long enough to be read as one" * 100, b"SQLite"])
def test_broken_file(tmp_path: Path, content: bytes) -> None:
    cache = ResultCache(tmp_path, "a")
    cache.path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{cache.path.name} cannot be used.*Delete the file"):
        cache.check()


def test_damaged_file(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path, "a")
    cache.put({key_of(i): [float(i)] * 20 for i in range(2000)})
    del cache
    path = ResultCache(tmp_path, "a").path
    with path.open("rb+") as file:
        file.seek(4096 * 3)
        file.write(b"\xff" * 4096 * 4)
    with pytest.raises(UserError, match="cannot be used"):
        ResultCache(tmp_path, "a").check()


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another directory with --cache"):
        ResultCache(tmp_path / "file", "a").check()


WRITER = """
import sys
from pathlib import Path
from megatron_dyt.evaluation.cache import ResultCache, key_of
cache = ResultCache(Path(sys.argv[1]), "a")
for i in range(10**9):
    cache.put({key_of(i, j): [float(i)] for j in range(50)})
    print(i, flush=True)
"""


def test_survives_sigkill(tmp_path: Path) -> None:
    """Killed while it writes: whole transactions are there, up to the last one that was reported."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) >= 20:
                break
        time.sleep(0.05)
        os.kill(writer.pid, signal.SIGKILL)
        reported = max(20, *(int(line) for line in writer.stdout.read().split()), 20)
    cache = ResultCache(tmp_path, "a")
    cache.check()
    for i in range(reported + 2):
        found = cache.get([key_of(i, j) for j in range(50)])
        assert len(found) == 50 if i <= reported else len(found) in (0, 50)
