import json
import logging
from pathlib import Path

import pytest

from megatron_dyt.mcore.json_lines import JsonLines


def iterations(path: Path) -> list[int | None]:
    return [json.loads(line).get("iteration") for line in path.read_text().splitlines()]


def test_steps_that_a_resumed_run_does_again_stand_once_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "new" / "stats.jsonl"
    for resumed_at, steps in ((0, (1, 2, 3)), (2, (3, 4, 5)), (3, (4,))):
        file = JsonLines(path, resumed_at)
        file.append({"event": "start"}, {"iteration": steps[0], "of": resumed_at})
        for step in steps[1:]:
            file.append({"iteration": step, "of": resumed_at})
    assert iterations(path) == [None, 1, 2, None, 3, None, 4]
    assert [json.loads(line).get("of") for line in path.read_text().splitlines()][-3:] == [2, None, 3]
    assert iterations(tmp_path / "new" / "stats.jsonl.abandoned") == [3, 4, 5]


def test_half_a_line_of_a_killed_run_is_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    path.write_text('{"iteration": 1}\n{"itera')
    JsonLines(path, 1).append({"iteration": 2})
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 2}\n'


def test_a_full_disk_is_said_once_and_lines_come_again_when_there_is_space(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "stats.jsonl"
    path.symlink_to("/dev/full")
    file = JsonLines(path)
    logger = logging.getLogger("megatron_dyt")
    logger.addHandler(caplog.handler)
    try:
        file.append({"iteration": 1})
        file.append({"iteration": 2})
        path.unlink()
        file.append({"iteration": 3})
    finally:
        logger.removeHandler(caplog.handler)
    assert len(caplog.records) == 1
    assert "cannot be written ([Errno 28] No space left on device)" in caplog.text
    assert iterations(path) == [3]
