from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.mcore.limits import refuse_unsupported


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("fused_residual_rmsnorm", True),
        ("layernorm_zero_centered_gamma", True),
        ("apply_layernorm_1p", True),
        ("memory_efficient_layer_norm", True),
        ("transformer_impl", "inference_optimized"),
        ("inference_fuse_tp_communication", True),
        ("use_transformer_engine_op_fuser", True),
        ("qk_l2_norm", True),
        ("mla_down_proj_fusion", True),
        ("cache_mla_latents", True),
        ("use_mup", True),
        ("heterogeneous_block_specs", True),
        ("heterogeneous_layers_config_path", "x.json"),
        ("use_kitchen", True),
        ("modelopt_enabled", True),
        ("experimental_attention_variant", "one_of_tomorrow"),
    ],
)
def test_each_combination_that_cannot_work_is_named(setting: str, value: object) -> None:
    with pytest.raises(UserError, match="--normalization DyT cannot be combined with") as error:
        refuse_unsupported(SimpleNamespace(**{setting: value}))
    # What was given, why not, and what to do instead.
    assert str(error.value).count(". ") >= 1


def test_all_clashes_are_told_at_once() -> None:
    with pytest.raises(UserError, match=r"fused_residual_rmsnorm.*qk_l2_norm"):
        refuse_unsupported(SimpleNamespace(fused_residual_rmsnorm=True, qk_l2_norm=True))


def test_what_can_work_passes() -> None:
    refuse_unsupported(
        SimpleNamespace(transformer_impl="transformer_engine", mtp_num_layers=1, use_kitchen=False)
    )


def check(settings: dict[str, object], words: str, *fine: dict[str, object]) -> None:
    """`settings` are refused, and pass with any of the changes `fine`."""
    with pytest.raises(UserError, match=words):
        refuse_unsupported(SimpleNamespace(**settings))
    for change in fine:
        refuse_unsupported(SimpleNamespace(**settings | change))


def test_a_query_norm_of_latent_attention_needs_a_query_latent() -> None:
    latent = {"multi_latent_attention": True, "qk_layernorm": True, "q_lora_rank": None}
    fine = ({"q_lora_rank": 512}, {"qk_layernorm": False}, {"multi_latent_attention": False})
    check(latent, r"without q_lora_rank.*Give --q-lora-rank", *fine)


def test_duplicated_down_projections_need_sequence_parallelism() -> None:
    latent = {"multi_latent_attention": True, "transformer_impl": "transformer_engine"}
    check(
        latent | {"tensor_model_parallel_size": 2, "sequence_parallel": False},
        r"drift apart. Add --sequence-parallel",
        *({"sequence_parallel": True}, {"tensor_model_parallel_size": 1}),
        *({"transformer_impl": "local"}, {"multi_latent_attention": False}),
    )


def test_a_mark_that_fsdp_forgets_must_not_be_needed() -> None:
    settings = {"use_megatron_fsdp": True, "multi_latent_attention": True, "qk_layernorm": True}
    check(
        settings | {"q_lora_rank": 16, "tensor_model_parallel_size": 2, "sequence_parallel": False},
        r"Megatron-FSDP.*Add --sequence-parallel",
        *({"sequence_parallel": True}, {"tensor_model_parallel_size": 1}, {"qk_layernorm": False}),
    )


def test_experts_that_fsdp_would_scale_twice_are_refused() -> None:
    """8 ranks, 2 of them tensor parallel: 4 data parallel ranks, each with a quarter of the experts."""
    check(
        {
            "use_megatron_fsdp": True,
            "data_parallel_sharding_strategy": "optim_grads_params",
            "world_size": 8,
            "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 4,
            "global_batch_size": 16,
            "micro_batch_size": 2,
        },
        r"each expert on one rank.*Lower --expert-model",
        *({"use_megatron_fsdp": False}, {"data_parallel_sharding_strategy": "optim"}),
        *({"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 1}),
        *({"micro_batch_size": 4}, {"global_batch_size": None}),
        {"expert_model_parallel_size": 1, "world_size": 2},
    )


def test_decay_of_a_logarithm_of_alpha_is_refused() -> None:
    both = {"dyt_log_alpha": True, "weight_decay_on": "all"}
    fine = ({"dyt_log_alpha": False}, {"weight_decay_on": "matrices"})
    check(both, r"pulls every alpha to 1.*--no-dyt-log-alpha", *fine)
    of_queries = {"dyt_log_alpha": True, "qk_layernorm": True, "apply_wd_to_qk_layernorm": True}
    fine = ({"dyt_log_alpha": False}, {"qk_layernorm": False}, {"apply_wd_to_qk_layernorm": False})
    check(of_queries, r"pulls alpha to 1.*--no-dyt-log-alpha", *fine)
    named = {**of_queries, "apply_wd_to_qk_layernorm": False}
    named["no_weight_decay_cond_type"] = "apply_wd_to_qk_layernorm"
    check(named, r"pulls alpha to 1", {"no_weight_decay_cond_type": None})


def test_a_config_built_without_flags_is_checked_too(make_config: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="memory_efficient_layer_norm"):
        make_config(memory_efficient_layer_norm=True)
    config: Any = make_config("LayerNorm", memory_efficient_layer_norm=True)
    assert config.memory_efficient_layer_norm
