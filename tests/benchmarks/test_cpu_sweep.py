"""Whole runs of two builds: a process's own CPU time, its losses, and a run that fails."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

# A run that is nothing but its last lines: a step, a validation, and half a second of the CPU.
RUN = """
import json, pathlib, sys, time
directory = pathlib.Path(sys.argv[sys.argv.index("--metrics-dir") + 1])
step = {"event": "train", "iteration": 1, "steps": 1, "consumed_samples": 1, "consumed_tokens": 1}
step |= {"losses": {"lm loss": 5.0}, "skipped_steps": 0, "nan_steps": 0, "seconds_per_step": 1.0}
step |= {"tokens_per_second": 1.0, "learning_rate": 0.1, "grad_norm": 1.0, "loss_scale": 1.0}
last = {"event": "validation", "iteration": 1, "set": None, "losses": {"lm loss": float(sys.argv[1])}}
(directory / "metrics.jsonl").write_text(json.dumps(step) + chr(10) + json.dumps(last) + chr(10))
while time.process_time() < 0.5:
    pass
sys.exit(int(sys.argv[2]))
"""


def start(flags: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen([sys.executable, "-c", RUN, *flags], stdout=out, stderr=out)


def test_each_run_gets_its_own_time_and_losses(tmp_path: Path) -> None:
    import cpu_sweep

    runs = {"a": ["4.5", "0"], "b": ["4.25", "0"]}
    found = cpu_sweep.measure(start, os.getpid(), runs, 1, tmp_path)
    assert {name: run.losses for name, run in found.items()} == {"a": [5.0, 4.5], "b": [5.0, 4.25]}
    for run in found.values():
        assert 0.4 < run.cpu < 10.0
        assert run.wall > 0.4


def test_two_runs_at_a_time_are_told_apart(tmp_path: Path) -> None:
    import cpu_sweep

    found = cpu_sweep.measure(start, os.getpid(), {"a": ["4.5", "0"], "b": ["4.25", "0"]}, 2, tmp_path)
    assert {name: run.losses[-1] for name, run in found.items()} == {"a": 4.5, "b": 4.25}
    assert 0.8 < sum(run.cpu for run in found.values()) < 20.0


def test_the_other_build_is_not_that_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cpu_sweep

    (tmp_path / "megatron_dyt").mkdir()
    (tmp_path / "megatron_dyt" / "__init__.py").write_text("")
    monkeypatch.chdir(cpu_sweep.ROOT)
    assert cpu_sweep.imported_from(tmp_path) == tmp_path.resolve()


def test_a_run_that_fails_ends_the_measurement(tmp_path: Path) -> None:
    import cpu_sweep

    with pytest.raises(RuntimeError, match="a ended with exit code 3"):
        cpu_sweep.measure(start, os.getpid(), {"a": ["4.5", "3"]}, 1, tmp_path)


def test_the_table_has_the_other_build_over_this_one() -> None:
    import cpu_sweep

    row = {"run": "dyt", "at_a_time": 2, "threads": 1, "imports_cpu": 9.0, "loss_difference": 1e-6}
    row |= {"cpu_here": 50.0, "cpu_other": 100.0, "wall_here": 60.0, "wall_other": 90.0}
    line = cpu_sweep.table({"results": [row]}).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["dyt", "2 x 1", "50.0", "100.0", "2.00", "60.0", "90.0", "1.50", "120", "1.0e-06"]
