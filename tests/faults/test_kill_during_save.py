"""SIGKILL at random moments of a save: training always goes on from the last complete checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Parent, Rank

SAVER = Path(__file__).with_name("saver.py")
KILLS = 8

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(
    "flags", [[], ["--async-save", "--use-persistent-ckpt-worker"]], ids=["synchronous", "asynchronous"]
)
def test_every_kill_leaves_a_checkpoint_to_go_on_from(
    tiny_llama: list[str], tmp_path: Path, ranks: Parent, flags: list[str]
) -> None:
    lives = run(ranks, tmp_path, tiny_llama, flags)
    hits = [life["left"]["in_a_save"] for life in lives[:-1]]
    assert sum(hits) == KILLS, f"{sum(hits)} of {len(hits)} kills hit a save"
    losses: dict[int, str] = {}
    last = 0
    for life in lives:
        log = (tmp_path / "log").read_text()[-3000:]
        assert life["killed"], log
        steps = [event for event in life["events"] if event["event"] == "step"]
        assert steps, log
        # It went on from the last complete checkpoint, and the steps are those of the others.
        assert steps[0]["iteration"] == last + 1
        for step in steps:
            assert losses.setdefault(step["iteration"], step["loss"]) == step["loss"]
        assert life["left"]["problem"] is None
        last = life["left"]["last"]
    assert last >= KILLS // 3  # It got somewhere, too.
    assert len(set(losses.values())) > len(losses) // 2


def run(ranks: Parent, directory: Path, tiny_llama: list[str], flags: list[str]) -> list[dict[str, Any]]:
    checkpoint = str(directory / "checkpoint")
    argv = [*tiny_llama, "--normalization", "DyT", "--dyt-preset", "unit", "--train-iters", "100", *flags]
    argv += ["--save", checkpoint, "--load", checkpoint, "--save-interval", "1"]
    job = {"directory": str(directory), "argv": argv, "kills": KILLS, "seed": 11}
    (directory / "job.json").write_text(json.dumps(job))
    log = directory / "saver.log"
    codes = ranks.run([Rank([str(SAVER), str(directory / "job.json")], str(log))], watched=True)
    assert codes == [0], log.read_text()[-3000:]
    lives: list[dict[str, Any]] = json.loads((directory / "kills.json").read_text())
    return lives
