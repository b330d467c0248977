"""What a run has come to, from its exit code, numbers and log."""

from pathlib import Path

import pytest

from megatron_dyt.sweep import outcome
from tests.report.made_up_runs import start_line, write_lines
from tests.sweep.made_up import train

SKIPPED = "WARNING: step 1: the gradient is not finite (norm nan) and was not applied. The step is skipped."
STOPPED = "megatron_dyt: stopped: step 3: the gradient is not finite (norm nan) and was not applied."


@pytest.mark.parametrize(
    ("exit_code", "log", "status"),
    [
        (0, "", "finished"),
        (1, STOPPED, "diverged"),
        (1, f"{SKIPPED}\nRuntimeError: out of memory", "failed"),
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


def write(directory: Path, log: str, arguments: dict[str, int]) -> None:
    steps = (train(step, 3.0) for step in (1, 2, 3))
    write_lines(directory / "metrics.jsonl", [start_line(**arguments), *steps])
    (directory / outcome.LOG_NAME).write_text(log)
