"""Reading metrics.jsonl: typed numbers, killed runs, files that are no metrics."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.report import metrics
from tests.report.made_up_runs import start_line, step_line, validation_line, write_lines


def read(tmp_path: Path, *lines: dict[str, Any]) -> metrics.RunMetrics:
    return metrics.read(write_lines(tmp_path / "metrics.jsonl", lines))


def test_every_field_of_a_step(tmp_path: Path) -> None:
    losses = {"mtp_1 loss": 9.0, "lm loss": 3.5}
    run = read(tmp_path, start_line(lr=0.1), step_line(10, losses=losses, skipped_steps=2, nan_steps=1))
    (step,) = run.steps
    assert step == metrics.Step(
        iteration=10,
        steps=10,
        consumed_samples=80,
        consumed_tokens=5120,
        losses=losses,
        learning_rate=pytest.approx(1e-4),
        grad_norm=1.0,
        skipped=2,
        nan=1,
        seconds=0.5,
        tokens_per_second=1024.0,
    )
    assert step.loss == 3.5
    assert run.arguments["lr"] == 0.1
    assert run.starts[0].versions["megatron-core"] == "0.19.2"
    assert run.skipped == (2, 1)
    assert run.train_seconds == 5.0


def test_a_model_with_another_loss_is_known_by_its_first(tmp_path: Path) -> None:
    (step,) = read(tmp_path, step_line(1, losses={"loss": 2.0, "z": 7.0})).steps
    assert step.loss == 2.0


def test_what_was_not_finite_or_not_there_is_nan(tmp_path: Path) -> None:
    line = step_line(1, None)
    del line["grad_norm"]
    (step,) = read(tmp_path, line).steps
    assert math.isnan(step.loss)
    assert math.isnan(step.grad_norm)


def test_validation_is_in_order_and_the_test_set_apart(tmp_path: Path) -> None:
    run = read(
        tmp_path,
        step_line(100),
        validation_line(100, 2.5),
        validation_line(200, 2.25),
        validation_line(200, 2.125),  # After training, on the same step.
        validation_line(200, 7.5, event="test"),
    )
    assert run.validation == ((100, 2.5), (200, 2.125))
    assert [e.loss for e in run.evaluations if e.is_test] == [7.5]


def test_several_validation_sets_are_averaged(tmp_path: Path) -> None:
    run = read(tmp_path, validation_line(10, 2.0, "0"), validation_line(10, 3.0, "code"))
    assert run.validation == ((10, 2.5),)


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_file_cut_within_a_line_is_read_up_to_there(tmp_path: Path, cut: int) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", [start_line(), step_line(10), step_line(20)])
    path.write_bytes(path.read_bytes()[:-cut])
    assert [step.iteration for step in metrics.read(path).steps] == [10, 20][: 1 if cut > 1 else 2]


def test_half_a_line_within_the_file_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [step_line(10), step_line(20), step_line(20, 2.0)]
    texts = [json.dumps(line) for line in lines]
    path.write_text("\n".join([texts[0], texts[1][:40], "[1]", '{"event": "train"}', "\x00", texts[2]]))
    assert [(step.iteration, step.loss) for step in metrics.read(path).steps] == [(10, 3.0), (20, 2.0)]


def test_an_unknown_event_is_passed_over(tmp_path: Path) -> None:
    assert len(read(tmp_path, {"event": "later"}, step_line(1)).steps) == 1


def test_a_missing_file_says_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing; .*--save"):
        metrics.read(tmp_path / "metrics.jsonl")


def test_a_file_without_numbers_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", [start_line()])
    with pytest.raises(UserError, match="no complete line of a training step"):
        metrics.read(path)


def test_the_file_is_found_beside_the_checkpoints_or_in_the_directory_itself(tmp_path: Path) -> None:
    assert metrics.find(tmp_path) == tmp_path / "checkpoint" / "metrics.jsonl"
    write_lines(tmp_path / "metrics.jsonl", [])
    assert metrics.find(tmp_path) == tmp_path / "metrics.jsonl"
