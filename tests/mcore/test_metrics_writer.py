"""metrics.jsonl of real small runs: the training's own numbers, through kills and resumes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dyt.mcore.metrics_writer import FILE_NAME, MetricsWriter, Sums
from megatron_dyt.report import metrics

Run = Callable[[list[str]], SimpleNamespace]
RARELY = ["--save-interval", "100"]
FP16 = ["--fp16", "--initial-loss-scale", "1e30", "--no-check-for-nan-in-loss-and-grad"]
SCHEDULE = ["--train-iters", "7", "--log-interval", "1", "--lr-decay-style", "linear", "--min-lr", "0"]


def lines(directory: Path, event: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (directory / FILE_NAME).read_text().splitlines()]
    return [line for line in found if line["event"] == event]


@pytest.mark.parametrize("norm", ["RMSNorm", "DyT"])
def test_losses_are_those_of_the_training_step(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path, norm: str
) -> None:
    run = megatron_run([*tiny_llama, *SCHEDULE, "--normalization", norm, "--save", str(tmp_path), *RARELY])
    found = metrics.read(tmp_path / FILE_NAME)
    assert [step.loss for step in found.steps] == run.losses
    assert [step.iteration for step in found.steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [step.steps for step in found.steps] == [1] * 7
    assert [step.consumed_samples for step in found.steps] == [4 * i for i in range(1, 8)]
    assert [step.consumed_tokens for step in found.steps] == [4 * 32 * i for i in range(1, 8)]
    # Megatron logs it after the scheduler's step.
    rates = [1e-2 * (7 - i) / 7 for i in range(1, 8)]
    assert [step.learning_rate for step in found.steps] == pytest.approx(rates)
    assert all(math.isfinite(step.grad_norm) and step.seconds > 0 for step in found.steps)
    assert found.steps[3].tokens_per_second == pytest.approx(4 * 32 / found.steps[3].seconds)
    (start,) = found.starts
    assert start.normalization == norm
    assert start.arguments["train_iters"] == 7
    assert start.arguments["lr"] == 1e-2
    assert start.versions.keys() == {"megatron-dyt", "megatron-core", "torch"}


def test_a_longer_interval_has_means_that_count_each_step_once(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path
) -> None:
    """Megatron's own second line counts the first step again."""
    logging_ = ["--log-interval", "3", "--metrics-dir", str(tmp_path)]
    run = megatron_run([*tiny_llama, *SCHEDULE, *logging_])
    steps = metrics.read(tmp_path / FILE_NAME).steps
    assert [(step.iteration, step.steps) for step in steps] == [(1, 1), (3, 2), (6, 3)]
    means = [run.losses[0], sum(run.losses[1:3]) / 2, sum(run.losses[3:6]) / 3]
    assert [step.loss for step in steps] == pytest.approx(means, rel=1e-6)


def test_evaluations_are_written(megatron_run: Run, tiny_llama: list[str], tmp_path: Path) -> None:
    run = megatron_run(
        [*tiny_llama, "--eval-interval", "2", "--eval-iters", "1", "--metrics-dir", str(tmp_path)]
    )
    found = metrics.read(tmp_path / FILE_NAME)
    assert [(e.iteration, e.is_test) for e in found.evaluations] == [(2, False), (4, False), (4, True)]
    (validated,) = (line["losses"]["lm loss"] for line in lines(tmp_path, "validation")[:1])
    assert f"validation loss at iteration 2 | lm loss value: {validated:.6E}" in run.log


def test_multi_token_prediction_has_a_loss_of_its_own(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path
) -> None:
    megatron_run([*tiny_llama, "--mtp-num-layers", "1", "--metrics-dir", str(tmp_path)])
    assert all(set(line["losses"]) == {"lm loss", "mtp_1 loss"} for line in lines(tmp_path))


def test_a_resumed_run_has_each_step_once(megatron_run: Run, tiny_llama: list[str], tmp_path: Path) -> None:
    saving = ["--save", str(tmp_path), "--save-interval", "2", "--log-interval", "1"]
    saving += ["--normalization", "DyT", "--dyt-stats-interval", "1"]
    whole = megatron_run([*tiny_llama, *saving, "--train-iters", "4"]).losses
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"event": "train", "itera')  # A process that was killed while it wrote.
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = megatron_run([*tiny_llama, *saving, "--train-iters", "4", "--load", str(tmp_path)]).losses
    assert resumed == whole[2:]
    found = metrics.read(tmp_path / FILE_NAME)
    assert [step.iteration for step in found.steps] == [1, 2, 3, 4]
    assert [step.loss for step in found.steps] == whole
    assert len(found.starts) == 2
    assert [line["iteration"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    statistics = (tmp_path / "dyt_stats.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in statistics] == [1, 2, 3, 4]


def test_an_evaluation_of_an_earlier_checkpoint_takes_no_line_away(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path
) -> None:
    saving = ["--save", str(tmp_path), "--save-interval", "2", "--log-interval", "1", "--train-iters", "4"]
    megatron_run([*tiny_llama, *saving])
    before = (tmp_path / FILE_NAME).read_text()
    looking = ["--load", str(tmp_path), "--ckpt-step", "2", "--skip-train", "--eval-iters", "1"]
    megatron_run([*tiny_llama, *saving, *looking])
    assert (tmp_path / FILE_NAME).read_text().startswith(before)


def test_a_full_disk_does_not_end_training(megatron_run: Run, tiny_llama: list[str], tmp_path: Path) -> None:
    for name in (FILE_NAME, "dyt_stats.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    flags = ["--normalization", "DyT", "--dyt-stats-interval", "1", "--save", str(tmp_path), *RARELY]
    run = megatron_run([*tiny_llama, *flags])
    assert len(run.losses) == 4
    assert run.log.count("cannot be written") == 2


def test_skipped_steps_have_no_loss(megatron_run: Run, tiny_llama: list[str], tmp_path: Path) -> None:
    """fp16's scale starts far too high: the first steps overflow."""
    megatron_run([*tiny_llama, *FP16, "--metrics-dir", str(tmp_path)])
    written = lines(tmp_path)
    assert written[0]["losses"] == {}
    assert written[0]["skipped_steps"] == 1
    assert metrics.read(tmp_path / FILE_NAME).skipped[0] == sum(line["skipped_steps"] for line in written)


def test_nothing_is_written_without_a_place(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    megatron_run([*tiny_llama, "--train-iters", "1"])
    assert not list(tmp_path.rglob(FILE_NAME))


def writer(path: Path) -> MetricsWriter:
    return MetricsWriter(path, SimpleNamespace(iteration=0, normalization="DyT", dtype=object(), names=["a"]))  # type: ignore[arg-type]


def test_arguments_that_json_cannot_say_are_left_out(tmp_path: Path) -> None:
    writer(tmp_path / FILE_NAME).write({"event": "other"})
    (start,) = lines(tmp_path, "start")
    assert start["arguments"] == {"iteration": 0, "normalization": "DyT", "names": ["a"]}


def test_sums_without_earlier_ones() -> None:
    earlier, later = Sums(3.0, 1, 0, 0, {"lm loss": 5.0}), Sums(5.0, 3, 1, 1, {"lm loss": 11.0, "z": 1.0})
    assert later.without(earlier) == Sums(2.0, 2, 1, 1, {"lm loss": 6.0, "z": 1.0})
