"""A run on two pipeline stages: the last one, which has the losses, writes metrics and TensorBoard alone."""

import json
import re
from pathlib import Path

import pytest

from megatron_dyt.report import metrics
from tests.distributed.plain import launch
from tests.ranks import Parent

pytestmark = [pytest.mark.distributed, pytest.mark.needs("training_loop")]

FLAGS = "--device cpu --pipeline-model-parallel-size 2 --eval-interval 2 --eval-iters 1"


def test_the_last_stage_writes_what_it_logs(tiny_llama: list[str], tmp_path: Path, ranks: Parent) -> None:
    flags = [*tiny_llama, *FLAGS.split(), "--metrics-dir", str(tmp_path), "--tensorboard-dir", str(tmp_path)]
    flags += ["--normalization", "DyT", "--dyt-stats-interval", "2", "--save", str(tmp_path)]
    flags += ["--save-interval", "100"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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

    # DyT's numbers of both stages, each as its own file has them.
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    layers = set()
    for stage in range(2):
        lines = (tmp_path / f"dyt_stats.stage{stage}.jsonl").read_text().splitlines()
        for site in json.loads(lines[-1])["sites"]:
            tag = f"dyt-std-{site['role']}/{site['name']}"
            logged = {event.step: event.value for event in events.Scalars(tag)}
            assert list(logged) == [1, 2, 4]
            assert logged[4] == pytest.approx(site["input_std"], rel=1e-6)  # TensorBoard has fp32.
            layers.add(site["layer"])
    assert layers == {1, 2, None}
