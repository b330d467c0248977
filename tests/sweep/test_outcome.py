"""What a run has come to, from its exit code, numbers and log."""

from pathlib import Path

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.sweep import outcome
from tests.report.made_up_runs import start_line, write_lines
from tests.sweep.made_up import train

SKIPPED = (
    "megatron_dyt: WARNING: step 1: the gradient is not finite (norm nan) and was not applied. "
    "The step is skipped."
)
REPORTED = "megatron_dyt: WARNING: step 1: an update made alpha <= 0 or not finite: layer 1 has alpha -0.1"
STOPPED = (
    "megatron_dyt: stopped: step 3: the gradient is not finite (norm nan) and was not applied. "
    "Go on from the last checkpoint, with a smaller --lr or other data; "
    "with --no-check-for-nan-in-loss-and-grad such steps are skipped."
)


@pytest.mark.parametrize(
    ("exit_code", "log", "status"),
    [
        (0, "", "finished"),
        (1, STOPPED, "diverged"),
        (1, f"{SKIPPED}\nRuntimeError: out of memory", "failed"),
        (1, f"{REPORTED}\nmegatron_dyt: stopped: OSError: No space left on device", "failed"),
        (-9, STOPPED, "failed"),
    ],
)
def test_a_run_has_diverged_where_its_numbers_ended_it(
    tmp_path: Path, exit_code: int, log: str, status: str
) -> None:
    write(tmp_path, log, {"train_iters": 3})
    assert outcome.of(tmp_path, exit_code, 1.0).status == status


@pytest.mark.parametrize(("train_iters", "status"), [(3, "finished"), (4, "finished"), (50, "failed")])
def test_a_run_that_was_told_to_end_early_is_not_finished(
    tmp_path: Path, train_iters: int, status: str
) -> None:
    write(tmp_path, "", {"train_iters": train_iters, "log_interval": 2})
    assert outcome.of(tmp_path, 0, 1.0).status == status


@pytest.mark.parametrize(("nan", "status", "loss"), [(0, "finished", 3.5), (1, "diverged", None)])
def test_a_step_skipped_by_the_loss_scale_is_no_divergence(
    tmp_path: Path, nan: int, status: str, loss: float | None
) -> None:
    # Three lines of two steps in the last tenth: of the first one step was skipped, of the last both.
    ends = [(190, 3.0, 1), (195, 3.75, 0), (200, 1e10, 2)]
    lines = [
        train(step, value) | {"steps": 2, "skipped_steps": skipped, "nan_steps": nan * (skipped == 2)}
        for step, value, skipped in [(10, 9.0, 0), *ends]
    ]
    write_lines(tmp_path / "metrics.jsonl", [start_line(train_iters=200), *lines])
    (tmp_path / outcome.LOG_NAME).touch()
    found = outcome.of(tmp_path, 0, 1.0)
    assert (found.status, found.train_loss) == (status, pytest.approx(loss))


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        ("--lr 2 --wd 1 --bf16", "then --lr 1 --wd 2, now --lr 2 --wd 1"),
        ("--wd 2 --lr 1 --bf16", "their order"),
        ("--lr 1 --wd 2 --bf16 --bf16", "now --bf16"),
    ],
)
def test_other_flags_are_named_with_their_values(tmp_path: Path, now: str, difference: str) -> None:
    outcome.keep_flags(tmp_path, ["--lr", "1", "--wd", "2", "--bf16"])
    with pytest.raises(UserError, match=rf"\(they differ in: {difference}\)"):
        outcome.load(tmp_path, now.split())


def write(directory: Path, log: str, arguments: dict[str, int]) -> None:
    steps = (train(step, 3.0) for step in (1, 2, 3))
    write_lines(directory / "metrics.jsonl", [start_line(**arguments), *steps])
    (directory / outcome.LOG_NAME).write_text(log)
