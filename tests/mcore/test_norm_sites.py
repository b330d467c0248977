"""Norms outside layer specs: those that stay, and that no other one is left in a DyT model."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_dyt.errors import UserError
from megatron_dyt.mcore import norm_sites
from megatron_dyt.mcore.norm_sites import find_sites

Make = Callable[..., Any]


class MambaMixer(nn.Module):
    """Has the name of Megatron's, which needs CUDA packages."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(2)


class OwnMixer(MambaMixer):
    pass


def test_what_stays_is_known_by_its_owner_and_slot() -> None:
    stays = norm_sites.kept_in_module(OwnMixer(), "norm")
    assert stays is not None
    assert stays.owner == "MambaMixer"
    assert norm_sites.kept_in_module(OwnMixer(), "other_norm") is None
    assert norm_sites.kept_in_module(nn.Linear(1, 1), "norm") is None
    assert norm_sites.kept_in_slot("GatedDeltaNetSubmodules", "out_norm") is not None
    assert norm_sites.kept_in_slot("GatedDeltaNetSubmodules", "in_proj") is None
    assert norm_sites.kept_in_slot("SelfAttentionSubmodules", "k_norm") is None


@pytest.mark.usefixtures("nothing_logged")
def test_what_stays_is_logged_with_the_reason_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        norm_sites.check_built(nn.ModuleList([OwnMixer()]), "decoder")
    out = capsys.readouterr().out
    assert out.startswith(
        "megatron_dyt: DyT: the gated RMSNorm inside Mamba mixers (MambaMixer.norm) stays as it is: it is "
    )
    assert out.count("\n") == 1


def test_a_norm_built_past_the_spec_is_refused(make_config: Make) -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    with pytest.raises(UserError, match=r"WrappedTorchNorm was asked for .* put a DyTNorm there yourself"):
        WrappedTorchNorm(config=make_config(), hidden_size=8)
    assert isinstance(WrappedTorchNorm(make_config("RMSNorm"), 8), nn.RMSNorm)


def test_fused_layers_are_refused_by_keyword_or_position() -> None:
    class FusedLinear:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.given = (args, kwargs)

    FusedLinear.__init__ = norm_sites.wrap_norm_init(FusedLinear.__init__)  # type: ignore[method-assign]
    dyt, rms = SimpleNamespace(normalization="DyT"), SimpleNamespace(normalization="RMSNorm")
    for args, kwargs in [((8,), {"config": dyt}), ((dyt,), {})]:
        with pytest.raises(UserError, match=r"FusedLinear was asked for .* put a DyTNorm and TEColumnPar"):
            FusedLinear(*args, **kwargs)
    assert FusedLinear(8, config=rms).given == ((8,), {"config": rms})


class OwnCore(nn.Module):
    """A core attention that builds its own norm, which no spec shows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.hidden = nn.RMSNorm(8)


def test_a_norm_that_no_spec_shows_is_found_in_the_built_block(
    make_config: Make, build_gpt: Make, make_spec: Make
) -> None:
    config = make_config()
    spec = make_spec(config)
    spec.submodules.self_attention.submodules.core_attention = OwnCore
    with pytest.raises(
        UserError, match=r"TransformerLayer\.self_attention\.core_attention\.hidden .* RMSNorm"
    ):
        build_gpt(config, spec=spec)
    build_gpt(make_config("RMSNorm"), spec=spec)


def test_a_class_with_its_own_norm_in_the_spec_is_refused(
    make_config: Make, build_gpt: Make, make_spec: Make
) -> None:
    class InternViTRMSNorm(nn.Module):
        """A norm of a user's own, with a name of its own."""

    config = make_config()
    spec = make_spec(config)
    spec.submodules.input_layernorm = InternViTRMSNorm
    with pytest.raises(UserError, match=r"cannot replace InternViTRMSNorm at TransformerLayer\.input_layern"):
        build_gpt(config, spec=spec)


def test_layers_are_numbered_over_the_whole_model(make_config: Make, build_gpt: Make) -> None:
    model = build_gpt(make_config())
    # As on a second pipeline stage of two layers each.
    for layer in model.decoder.layers:
        layer.layer_number += 2
    assert [(site.name, site.layer) for site in find_sites([model])[:3]] == [
        ("decoder.layers.2.input_layernorm", 3),
        ("decoder.layers.2.pre_mlp_layernorm", 3),
        ("decoder.layers.3.input_layernorm", 4),
    ]


def test_sites_are_found_under_any_number_of_wrappers(make_config: Make, build_gpt: Make) -> None:
    model = build_gpt(make_config())
    plain = [site.name for site in find_sites([model])]
    for _ in range(3):
        wrapper = torch.nn.Module()
        wrapper.module = model
        model = wrapper
    assert [site.name for site in find_sites([model])] == plain
