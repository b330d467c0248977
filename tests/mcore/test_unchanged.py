"""With the plugin registered and another norm, Megatron computes what it computes without it."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import megatron_dyt
from megatron_dyt.mcore.register import unregister


def parameters(run: SimpleNamespace) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model[0].named_parameters()}


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
def test_twenty_steps_are_bit_identical(
    megatron_run: Callable[..., SimpleNamespace],
    tiny_llama: list[str],
    monkeypatch: pytest.MonkeyPatch,
    norm: str,
) -> None:
    argv = [*tiny_llama, "--train-iters", "20", "--normalization", norm]
    with monkeypatch.context() as patch:
        unregister()
        patch.setattr(megatron_dyt, "register", lambda: None)
        plain = megatron_run(argv)
        plain_parameters = parameters(plain)
        assert not megatron_dyt.is_registered()
    plugged = megatron_run(argv)
    assert megatron_dyt.is_registered()
    assert len(plain.losses) == 20
    assert plugged.losses == plain.losses
    plugged_parameters = parameters(plugged)
    assert plugged_parameters.keys() == plain_parameters.keys()
    for name, value in plain_parameters.items():
        assert torch.equal(plugged_parameters[name], value), name
