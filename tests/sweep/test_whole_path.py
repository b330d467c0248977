"""`megatron-dyt sweep` from the file to the table, with Megatron's own training."""

import csv
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron_dyt.cli.sweep import sweep
from megatron_dyt.report import dyt_stats, metrics
from megatron_dyt.sweep import runner, warm
from megatron_dyt.sweep.spec import Run, Seed
from tests.conftest import TINY_LLAMA

pytestmark = pytest.mark.needs("training_loop")

FILE = f"""
base: "{" ".join(TINY_LLAMA.split())} --device cpu --eval-iters 1"
grid:
  norm:
    rmsnorm: --normalization RMSNorm
    dyt: --normalization DyT --dyt-preset unit --dyt-stats-interval 1
seeds:
  - {{weights: 3, data: 4}}
compare: {{axis: norm, baseline: rmsnorm}}
"""


@pytest.fixture(scope="module")
def parent(training_loop: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[warm.Parent]:
    """One for all tests here: it takes its time to start."""
    log = tmp_path_factory.mktemp("parent") / "imports.txt"
    environment = runner._environment(0, runner.Options()) | {"CUDA_VISIBLE_DEVICES": ""}
    found = warm.Parent(environment, log)
    yield found
    found.close()


class Kept:
    """Gives the queue that parent; `after` is done to each run that has been forked."""

    def __init__(self, parent: warm.Parent, after: Callable[[warm.Forked], None] = lambda run: None) -> None:
        self.parent, self.after = parent, after

    def fork(self, flags: Sequence[str], log: Path) -> warm.Forked | None:
        run = self.parent.fork(flags, log)
        assert run is not None
        self.after(run)
        return run

    def close(self) -> None: ...


def test_two_runs_become_two_rows(
    tmp_path: Path, parent: warm.Parent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "Parent", lambda *_given: Kept(parent))
    file, output = tmp_path / "tiny.yaml", tmp_path / "out"
    file.write_text(FILE)
    done = CliRunner().invoke(sweep, [str(file), "--output", str(output), "--", "--train-iters", "2"])
    assert done.exit_code == 0, (done.output, [path.read_text() for path in output.rglob("log.txt")])
    rows = list(csv.DictReader((output / "table.csv").read_text().splitlines()))
    assert [(row["norm"], row["seed_weights"], row["seed_data"], row["status"]) for row in rows] == [
        ("rmsnorm", "3", "4", "finished"),
        ("dyt", "3", "4", "finished"),
    ]
    for row in rows:
        validation = metrics.read(output / row["directory"] / "metrics.jsonl").validation
        assert float(row["valid_loss"]) == validation[-1][1]
    assert [(row["step"], row["tokens"]) for row in rows] == [("2", "256")] * 2
    assert not list(output.rglob("iter_*"))
    assert "1 threads per process" in (output / rows[0]["directory"] / "log.txt").read_text()

    last = dyt_stats.read([output / rows[1]["directory"] / "dyt_stats.jsonl"])[-1]
    assert (last.iteration, rows[0]["alpha_std_attn"]) == (2, "")
    for role in ("attn", "ffn", "final"):
        sites = [site for site in last.sites if site.role == role]
        mean = sum(site.alpha_std for site in sites) / len(sites)
        assert float(rows[1][f"alpha_std_{role}"]) == pytest.approx(mean)
        assert 0 <= float(rows[1][f"saturated_{role}"]) <= 1


def test_a_run_that_is_killed_is_recorded(
    tmp_path: Path, parent: warm.Parent, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = Kept(parent, lambda run: os.kill(run.pid, signal.SIGKILL))
    monkeypatch.setattr(warm, "Parent", lambda *_given: killed)
    run = Run({"norm": "rmsnorm"}, Seed(1, 1), tuple(TINY_LLAMA.split()))
    (result,) = runner.run_all(tmp_path, [run], runner.Options(), lambda done: None).values()
    assert (result.status, result.log_tail[-1]) == ("failed", "ended by signal 9")


def test_a_parent_that_is_killed_takes_its_runs_along(tmp_path: Path, parent: warm.Parent) -> None:
    run = parent.fork(TINY_LLAMA.split(), tmp_path / "log.txt")
    assert run is not None
    os.kill(parent.pid, signal.SIGKILL)
    assert run.wait(60) == -signal.SIGKILL
    assert parent.fork([], tmp_path / "none.txt") is None
    until = time.monotonic() + 60
    while Path(f"/proc/{run.pid}/exe").exists():
        assert time.monotonic() < until, "it goes on"
        time.sleep(0.05)
