from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from megatron_dyt.errors import UserError
from megatron_dyt.mcore import safety_net


def test_a_norm_built_past_the_spec_is_refused(make_config: Callable[..., Any]) -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    with pytest.raises(UserError, match="this model builds WrappedTorchNorm directly"):
        WrappedTorchNorm(config=make_config(), hidden_size=8)
    assert isinstance(WrappedTorchNorm(make_config("RMSNorm"), 8), nn.RMSNorm)


def test_fused_layers_are_refused_by_keyword_or_position() -> None:
    class Fused:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.given = (args, kwargs)

    Fused.__init__ = safety_net.wrap_fused_init(Fused.__init__)  # type: ignore[method-assign]
    dyt, rms = SimpleNamespace(normalization="DyT"), SimpleNamespace(normalization="RMSNorm")
    for args, kwargs in [((8,), {"config": dyt}), ((dyt,), {})]:
        with pytest.raises(UserError, match="builds Fused directly"):
            Fused(*args, **kwargs)
    assert Fused(8, config=rms).given == ((8,), {"config": rms})
