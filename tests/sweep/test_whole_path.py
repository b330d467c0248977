"""`megatron-dyt sweep` from the file to the table, with Megatron's own training."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
from click.testing import CliRunner

from megatron_dyt.cli.sweep import sweep
from megatron_dyt.report import dyt_stats, metrics
from megatron_dyt.sweep import runner
from tests.conftest import TINY_LLAMA
from tests.ranks import Parent, Rank

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


def test_two_runs_become_two_rows(tmp_path: Path, ranks: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forked:
        """A process like those that the runner starts, forked from one that has imported Megatron."""

        pid = 0

        def __init__(
            self, command: Sequence[str], stdout: IO[bytes], env: dict[str, str], **_options: object
        ) -> None:
            assert command[0] == sys.executable
            rank = Rank([*command[1:]], stdout.name, environment={"OMP_NUM_THREADS": env["OMP_NUM_THREADS"]})
            (self.returncode,) = ranks.run([rank], watched=True)

        def poll(self) -> int:
            return self.returncode

    constants = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT")}
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=Forked, **constants))
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

    last = dyt_stats.read([output / rows[1]["directory"] / "dyt_stats.jsonl"])[-1]
    assert (last.iteration, rows[0]["alpha_std_attn"]) == (2, "")
    for role in ("attn", "ffn", "final"):
        sites = [site for site in last.sites if site.role == role]
        mean = sum(site.alpha_std for site in sites) / len(sites)
        assert float(rows[1][f"alpha_std_{role}"]) == pytest.approx(mean)
        assert 0 <= float(rows[1][f"saturated_{role}"]) <= 1
