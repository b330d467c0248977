"""The benchmark of the quickstart's step: the script's own flags, turns, and what it makes of the times."""

import importlib
import itertools
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("training_loop")


def test_the_flags_are_the_quickstarts() -> None:
    training = importlib.import_module("cpu_training")
    runs = training.quickstart_runs(training.QUICKSTART.read_text(), 70)
    assert list(runs) == ["rmsnorm", "dyt"]
    for flags in runs.values():
        pairs = dict(itertools.pairwise(flags))
        assert pairs["--hidden-size"] == "192"
        assert pairs["--micro-batch-size"] == "16"
        assert pairs["--train-iters"] == "70"
        assert pairs["--lr-warmup-iters"] == "7"
        assert pairs["--transformer-impl"] == "local"
    assert runs["rmsnorm"][-6:] == ["--lr", "8e-3", "--normalization", "RMSNorm", "--embedding-scale", "unit"]
    assert "--dyt-stats-interval" in runs["dyt"]


def test_a_script_of_another_form_is_refused() -> None:
    training = importlib.import_module("cpu_training")
    with pytest.raises(ValueError, match="has no HIDDEN, MODEL, RECIPE"):
        training.quickstart_runs("HIDDEN=192\nrun dyt 1e-3 --normalization DyT\n", 70)


def test_ratios_are_over_the_first_run() -> None:
    training = importlib.import_module("cpu_training")
    wall = {"rmsnorm": [1.0, 2.0, 4.0], "dyt": [2.0, 2.0, 2.0]}
    seconds = {name: [training.Seconds(s, 3 * s + 1) for s in taken] for name, taken in wall.items()}
    first, second = training.results(seconds | {"slow": [training.Seconds(3, 14)] * 3})[::2]
    assert (first["ratio"], first["cpu_ratio"]) == (1, 1)
    assert (second["ratio"], second["cpu_ratio"]) == (1.5, 2)
    assert (second["pair_quartile1"], second["pair_quartile3"]) == (0.75, 3)
    assert second["median_us"] == 3e6
    table = training.table({"results": [first, second]})
    assert table.splitlines()[-1] == "| slow | 3000 | 3000 to 3000 | 1.500 | 0.750 to 3.000 | 14000 | 2.000 |"


def test_runs_take_turns_in_megatrons_own_loop(tiny_llama: list[str], tmp_path: Path) -> None:
    training = importlib.import_module("cpu_training")
    argv = [*tiny_llama, "--train-iters", "20", "--normalization", "DyT", "--dyt-preset", "unit"]
    argv += ["--save-interval", "100"]
    with training.runners({"dyt": argv}) as found:
        seconds = [found["dyt"].iterate() for _ in range(3)]
        assert all(s.cpu > 0 and 0 < s.wall < 60 for s in seconds)
        assert "DyT attn    2 sites" in found["dyt"].log.read_text()


def test_a_run_that_ends_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = importlib.import_module("cpu_training")
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('no such', sys.argv[-1])\nsys.exit(3)\n")
    monkeypatch.setattr(training, "__file__", str(script))
    with pytest.raises(RuntimeError, match="the training process ended, exit code 3:\nno such --flag"):
        training.Runner(["--flag"], tmp_path / "log")
