"""Megatron's refusals of real runs, each as one line that names the flags."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_dyt.errors import UserError

pytestmark = pytest.mark.needs("training_loop")

Run = Callable[[list[str]], SimpleNamespace]


def test_a_refusal_in_the_validation_names_the_flags(megatron_run: Run, tiny_llama: list[str]) -> None:
    words = "Megatron refuses the flags: .*; flags: --max-position-embeddings 32, --seq-length 64"
    with pytest.raises(UserError, match=words):
        megatron_run([*tiny_llama, "--seq-length", "64"])


def test_another_schedule_on_resume_names_the_flags_that_solve_it(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path
) -> None:
    flags = ["--save", str(tmp_path), "--save-interval", "2", "--load", str(tmp_path), "--min-lr", "0"]
    flags = [*tiny_llama, *flags, "--lr-decay-style", "linear"]
    megatron_run([*flags, "--train-iters", "2"])
    both = "--override-opt_param-scheduler .* --use-checkpoint-opt_param-scheduler"
    words = rf"another total number of iterations \(8; now 16\): --train-iters, .*{both}"
    with pytest.raises(UserError, match=words):
        megatron_run(flags)
    with pytest.raises(UserError, match=f"another warmup iterations.*--lr-warmup-iters.*{both}"):
        megatron_run([*flags, "--train-iters", "2", "--lr-warmup-iters", "1"])
    with pytest.raises(UserError, match=r"another (--lr|learning rate)"):
        megatron_run([*flags, "--lr", "1e-3"])
    overridden = megatron_run([*flags, "--override-opt_param-scheduler"])
    assert len(overridden.losses) == 2
