"""Real layers on a tensor parallel rank of two: what is cut how, and what communication they overlap."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_dyt import compat
from megatron_dyt.mcore.norm_sites import dyt_sites

from .test_stubs import INPUT, OUTPUT, pair, world

__all__ = ["pair", "world"]  # fixtures

TWO = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def pieces(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the whole tensors, by key."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    return {each.key: each.global_shape for each in nested_values(state) if "_extra_state" not in each.key}


@pytest.mark.parametrize("given", [{"qk_layernorm": True}, {"num_moe_experts": 2}], ids=str)
def test_whole_tensors_are_those_of_local_layers(make_config: Any, build_gpt: Any, given: Any) -> None:
    te, local = (build_gpt(make_config(**TWO, **given), te=te) for te in (True, False))
    assert pieces(te) == pieces(local)


def test_latent_down_projections_are_whole_on_each_rank(make_latent_config: Any, build_gpt: Any) -> None:
    config = make_latent_config(**TWO, transformer_impl="transformer_engine")
    model = build_gpt(config, te=True)
    attention = model.decoder.layers[0].self_attention
    assert attention.linear_q_down_proj.weight.shape == (16, 32)
    assert attention.linear_kv_down_proj.weight.shape == (24 + 4, 32)
    assert attention.linear_q_down_proj.weight.sequence_parallel
    assert attention.linear_q_up_proj.weight.shape == (4 * (8 + 4) // 2, 16)
    assert attention.linear_q_up_proj.weight.tensor_model_parallel
    # Each rank has seen its part of the tokens: Megatron sums, and must not average.
    for _, site in dyt_sites(model):
        assert site.alpha_parameter.sequence_parallel
        assert not getattr(site.alpha_parameter, "average_gradients_across_tp_domain", False)
    if compat.has("latent_attention_without_te"):
        local = build_gpt(make_latent_config(**TWO), te=False)
        assert local.decoder.layers[0].self_attention.linear_q_down_proj.weight.shape == (8, 32)
        assert pieces(model) == pieces(local)


@pytest.mark.parametrize(
    ("name", "backward"), [("TELayerNormColumnParallelLinear", True), ("TEColumnParallelLinear", False)]
)
def test_overlaps_of_the_backward_pass_are_the_fused_layers_alone(
    pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, backward: bool
) -> None:
    """What DyT's line about --tp-comm-overlap says: Megatron's requests, as TE's layer hears them."""
    real, _, options = pair(name)
    options["config"].tp_comm_overlap = options["config"].tp_comm_overlap_rs_dgrad = True
    asked: dict[str, Any] = {}

    class HeardError(Exception):
        """Without a GPU no buffer can be made, so the layer cannot be built."""

    def hear(_self: Any, **kwargs: Any) -> None:
        asked.update(kwargs)
        raise HeardError

    library = next(base for base in real.__mro__ if base.__module__.startswith("transformer_engine."))
    monkeypatch.setattr(library, "__init__", hear)
    with pytest.raises(HeardError):
        real(INPUT, OUTPUT, **options)
    assert asked["ub_overlap_ag"]
    for overlap in ("ub_bulk_dgrad", "ub_bulk_wgrad", "ub_overlap_rs_dgrad"):
        assert asked.get(overlap, False) == backward, overlap
