"""The recipe's three flags, seen in a model and optimizer that Megatron's own loop has made."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

Run = Callable[..., SimpleNamespace]
DYT = ["--normalization", "DyT", "--dyt-preset", "unit", "--weight-decay", "0.1"]
STILL = ["--train-iters", "1", "--lr", "0", "--min-lr", "0"]


def decays(run: SimpleNamespace) -> dict[str, float]:
    """Weight decay of each parameter by name, at the last step."""
    optimizer: Any = run.optimizer
    of = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {name: of[id(parameter)] for name, parameter in run.model[0].named_parameters()}


@pytest.mark.parametrize(("flags", "on_vectors"), [([], 0.0), (["--weight-decay-on", "all"], 0.1)])
def test_weight_decay(megatron_run: Run, tiny_llama: list[str], flags: list[str], on_vectors: float) -> None:
    run = megatron_run([*tiny_llama, *DYT, *STILL, *flags])
    shapes = {name: parameter.dim() for name, parameter in run.model[0].named_parameters()}
    found = decays(run)
    assert set(shapes.values()) == {1, 2}
    for name, dim in shapes.items():
        assert found[name] == pytest.approx(on_vectors if dim == 1 else 0.1), name


def test_plain_output_init(megatron_run: Run, tiny_llama: list[str]) -> None:
    def weights(flags: list[str]) -> dict[str, torch.Tensor]:
        return megatron_run([*tiny_llama, *DYT, *STILL, *flags]).weights()

    scaled, plain = weights([]), weights(["--output-init", "plain"])
    outputs = [name for name in plain if "linear_proj" in name or "linear_fc2" in name]
    assert len(outputs) == 4
    for name, weight in plain.items():
        factor = 2.0 if name in outputs else 1.0  # sqrt(2 * 2 layers)
        torch.testing.assert_close(weight, factor * scaled[name])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], [0.0025, 0.005, 0.0075, 0.01]),
        (["--lr-warmup-style", "quadratic"], [0.000625, 0.0025, 0.005625, 0.01]),
    ],
)
def test_warmup(megatron_run: Run, tiny_llama: list[str], flags: list[str], expected: list[float]) -> None:
    argv = [
        *tiny_llama,
        *DYT,
        "--lr-warmup-iters",
        "4",
        "--lr-decay-iters",
        "8",
        "--train-iters",
        "6",
        *flags,
    ]
    rates = [
        float(line.split("learning rate: ")[1].split(" ")[0])
        for line in megatron_run(argv).log.splitlines()
        if "learning rate: " in line
    ]
    # A step is logged with the rate that the scheduler has set after it.
    assert rates[:4] == pytest.approx(expected)
    assert rates[4:] == pytest.approx([0.01, 0.01])
