"""With the plugin registered and another norm, Megatron computes what it computes without it."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import megatron_dyt
from megatron_dyt.mcore.register import unregister


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
        weights = plain.weights()
        assert not megatron_dyt.is_registered()
    plugged = megatron_run(argv)
    assert megatron_dyt.is_registered()
    assert len(plain.losses) == 20
    assert plugged.losses == plain.losses
    torch.testing.assert_close(plugged.weights(), weights, rtol=0, atol=0)
