"""SIGKILL at random moments of a save: training always goes on from the last complete checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SAVER = Path(__file__).with_name("saver.py")
KILLS = 20
TIMEOUT = float(os.environ.get("MEGATRON_DYT_TEST_TIMEOUT", "240"))

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(
    "flags", [[], ["--async-save", "--use-persistent-ckpt-worker"]], ids=["synchronous", "asynchronous"]
)
def test_every_kill_leaves_a_checkpoint_to_go_on_from(
    tiny_llama: list[str], tmp_path: Path, flags: list[str]
) -> None:
    lives = run(tmp_path, tiny_llama, flags)
    assert len(lives) == KILLS + 1
    losses: dict[int, str] = {}
    before: dict[str, Any] = {"tracker": None}
    inside = 0
    for life in lives:
        log = (tmp_path / "log").read_text()[-3000:]
        assert life["killed"], log
        steps = [event for event in life["events"] if event["event"] == "step"]
        assert steps, log
        # It went on from the checkpoint that the tracker named, and the steps are those of the others.
        assert steps[0]["iteration"] == int(before["tracker"] or 0) + 1
        for step in steps:
            assert losses.setdefault(step["iteration"], step["loss"]) == step["loss"]
        before = life["left"]
        assert before["problem"] is None
        inside += before["newest"] > int(before["tracker"] or 0)
    assert int(before["tracker"]) >= 10  # It got somewhere, too.
    assert inside >= KILLS // 4, "too few kills hit a save"
    assert len(set(losses.values())) > len(losses) // 2


def run(directory: Path, tiny_llama: list[str], flags: list[str]) -> list[dict[str, Any]]:
    checkpoint = str(directory / "checkpoint")
    argv = [*tiny_llama, "--normalization", "DyT", "--dyt-preset", "unit", "--train-iters", "100", *flags]
    argv += ["--save", checkpoint, "--load", checkpoint, "--save-interval", "1"]
    job = {"directory": str(directory), "argv": argv, "kills": KILLS, "seed": 11}
    (directory / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(SAVER), str(directory / "job.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lives: list[dict[str, Any]] = json.loads((directory / "kills.json").read_text())
    return lives
