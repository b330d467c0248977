"""--dyt-freeze-alpha: training with a constant alpha, against training in which its gradient is zero."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_dyt.errors import UserError
from megatron_dyt.mcore.norm import DyTNorm

Run = Callable[..., SimpleNamespace]
DYT = ["--normalization", "DyT", "--dyt-preset", "unit", "--dyt-bias", "--qk-layernorm"]


def norms(run: SimpleNamespace) -> list[DyTNorm]:
    return [module for module in run.model[0].modules() if isinstance(module, DyTNorm)]


def without_gradient(norm: DyTNorm, build: Callable[..., None], *args: object, **kwargs: object) -> None:
    build(norm, *args, **kwargs)
    norm.alpha.register_hook(torch.zeros_like)


@pytest.mark.parametrize("more", [["--use-distributed-optimizer"], ["--weight-decay-on", "all"]])
def test_it_trains_as_with_a_gradient_of_zero(
    megatron_run: Run, tiny_llama: list[str], monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    argv = [*tiny_llama, *DYT, "--train-iters", "3", "--weight-decay", "0", *more]
    frozen = megatron_run([*argv, "--dyt-freeze-alpha"])
    losses, alphas = frozen.losses, [norm.alpha.detach().clone() for norm in norms(frozen)]
    build = DyTNorm.__init__
    monkeypatch.setattr(
        DyTNorm, "__init__", lambda norm, *args, **kwargs: without_gradient(norm, build, *args, **kwargs)
    )
    reference = megatron_run(argv)
    assert losses == pytest.approx(reference.losses, rel=1e-6)
    assert losses[-1] < losses[0]
    assert len(alphas) == 9
    assert [float(alpha) for alpha in alphas] == [
        pytest.approx({"attn": 0.5, "qk": 1.0}.get(norm.role, 0.25)) for norm in norms(reference)
    ]


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [([], ["--dyt-freeze-alpha"], "Leave out the flag"), (["--dyt-freeze-alpha"], [], "Give the flag")],
)
def test_a_run_goes_on_as_it_was(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path, then: list[str], now: list[str], message: str
) -> None:
    saves = ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "1"]
    argv = [*tiny_llama, *DYT, *saves, "--use-distributed-optimizer"]
    argv += ["--use-checkpoint-opt_param-scheduler"]
    megatron_run([*argv, *then, "--train-iters", "1"])
    with pytest.raises(UserError, match=message):
        megatron_run([*argv, *now, "--train-iters", "2"])
    megatron_run([*argv, *then, "--train-iters", "2"])


def test_a_frozen_alpha_is_in_no_optimizer(megatron_run: Run, tiny_llama: list[str]) -> None:
    run = megatron_run([*tiny_llama, *DYT, "--train-iters", "1", "--dyt-freeze-alpha"])
    held = {id(each) for group in run.optimizer.param_groups for each in group["params"]}
    for norm in norms(run):
        assert id(norm.alpha) not in held
        assert {id(norm.weight), id(norm.bias)} <= held
