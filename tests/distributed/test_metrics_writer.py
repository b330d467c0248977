"""metrics.jsonl of a run on two pipeline stages: the last one, which has the losses, writes it alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_dyt.report import metrics
from tests.distributed.plain import launch
from tests.ranks import Parent

pytestmark = [pytest.mark.distributed, pytest.mark.needs("training_loop")]

FLAGS = "--device cpu --pipeline-model-parallel-size 2 --eval-interval 2 --eval-iters 1"


def test_the_last_stage_writes_what_it_logs(tiny_llama: list[str], tmp_path: Path, ranks: Parent) -> None:
    flags = [*tiny_llama, *FLAGS.split(), "--metrics-dir", str(tmp_path)]
    _first, last = launch(ranks, tmp_path, [["-m", "megatron_dyt.pretrain", *flags]] * 2)
    assert last.code == 0, last.err
    run = metrics.read(tmp_path / "metrics.jsonl")
    logged = re.findall(r"lm loss: (\S+)", last.out)
    assert f"{run.steps[0].loss:.6E}" == logged[0]
    assert [step.iteration for step in run.steps] == [1, 2, 3, 4]
    assert all(step.grad_norm > 0 and step.learning_rate == 1e-2 for step in run.steps)
    validated = re.findall(r"validation loss at iteration 2 \| lm loss value: (\S+)", last.out)
    assert [f"{loss:.6E}" for at, loss in run.validation if at == 2] == validated
    assert len(run.starts) == 1
