"""Megatron settings that cannot work together with DyT, each with what to do instead.

The table is checked against the parsed flags and against every TransformerConfig, because users of
`megatron.core` have no flags. Field names are Megatron's; a field that a version lacks is skipped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_dyt.errors import UserError
from megatron_dyt.parsed_args import on


@dataclass(frozen=True)
class Limit:
    """One combination that is refused: `clashes(config)` says whether it is present."""

    what: str
    why: str
    todo: str
    clashes: Callable[[object], bool]


def _has_unshared_experts(args: object) -> bool:
    """Whether Megatron-FSDP, sharding gradients, has experts of one data parallel rank each.

    Their gradient buffer is then not sharded (`param_and_grad_buffer.py`: "main_buf_dp_group.size() > 1") and
    all the same reduced, which scales it, at each micro-batch.
    """
    experts = getattr(args, "expert_model_parallel_size", 1)
    sharding = getattr(args, "data_parallel_sharding_strategy", None)
    if (
        not on("use_megatron_fsdp")(args)
        or experts == 1
        or sharding not in ("optim_grads", "optim_grads_params")
    ):
        return False
    tensor = getattr(args, "expert_tensor_parallel_size", None) or _size(args, "tensor_model_parallel_size")
    return _size(args, "world_size") == tensor * experts * _size(args, "pipeline_model_parallel_size")


def _micro_batches(args: object) -> int:
    """Micro-batches of a step, 1 where a global batch size is not given."""
    kinds = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    ranks = _size(args, "world_size") // math.prod(_size(args, kind) for kind in kinds)
    return _size(args, "global_batch_size") // (_size(args, "micro_batch_size") * max(1, ranks))


def _size(args: object, name: str) -> int:
    return getattr(args, name, None) or 1


def _decays_qk_norms(args: object) -> bool:
    # Megatron makes the one of the other, after these checks.
    condition = getattr(args, "no_weight_decay_cond_type", None)
    return condition == "apply_wd_to_qk_layernorm" or on("apply_wd_to_qk_layernorm")(args)


LIMITS = (
    Limit(
        "fused_residual_rmsnorm", "it is an RMSNorm kernel", "Remove the flag.", on("fused_residual_rmsnorm")
    ),
    Limit(
        "layernorm_zero_centered_gamma (--apply-layernorm-1p)",
        "DyT's weight is not stored as weight - 1",
        "Remove the flag.",
        on("layernorm_zero_centered_gamma", "apply_layernorm_1p"),
    ),
    Limit(
        "memory_efficient_layer_norm",
        "it saves LayerNorm's output in place of its input",
        "Remove the flag; DyT saves no statistics.",
        on("memory_efficient_layer_norm"),
    ),
    Limit(
        "transformer_impl inference_optimized",
        "its kernels fuse RMSNorm",
        "Use --transformer-impl transformer_engine or local.",
        lambda config: getattr(config, "transformer_impl", None) == "inference_optimized",
    ),
    Limit(
        "inference_fuse_tp_communication",
        "it fuses RMSNorm into the reduce-scatter",
        "Remove the flag.",
        on("inference_fuse_tp_communication"),
    ),
    Limit(
        "use_transformer_engine_op_fuser",
        "TE's fused MLP contains its own norm",
        "Remove the flag.",
        on("use_transformer_engine_op_fuser", "use_te_op_fuser"),
    ),
    Limit(
        "qk_l2_norm",
        "it is a normalization of queries and keys",
        "Use --qk-layernorm, which becomes DyT, or remove the flag.",
        on("qk_l2_norm"),
    ),
    Limit(
        "a heterogeneous layer configuration",
        "it requires RMSNorm",
        "Remove --heterogeneous-layers-config-path.",
        on(
            "heterogeneous_block_specs",
            "heterogeneous_layers_config_path",
            "heterogeneous_layers_config_encoded_json",
        ),
    ),
    Limit(
        "Kitchen quantization (use_kitchen)",
        "its layers fuse the norm",
        "Remove the flag.",
        on("use_kitchen"),
    ),
    Limit(
        "ModelOpt or TensorRT-LLM export (modelopt_enabled, export_*)",
        "their specs know LayerNorm and RMSNorm only",
        "Export through Hugging Face, or train with RMSNorm.",
        on("modelopt_enabled", "export_te_mcore_model", "export_kd_teacher_load"),
    ),
    Limit(
        "qk_layernorm of multi-latent attention without q_lora_rank",
        "there is no query latent, and Megatron then normalizes inside Transformer Engine's fused linear",
        "Give --q-lora-rank, or remove --qk-layernorm.",
        lambda config: (
            bool(getattr(config, "multi_latent_attention", False))
            and bool(getattr(config, "qk_layernorm", False))
            and getattr(config, "q_lora_rank", None) is None
        ),
    ),
    Limit(
        "qk_layernorm of multi-latent attention with Megatron-FSDP and tensor but no sequence parallelism",
        "Megatron-FSDP forgets the mark that keeps the gradients of the query norm from being doubled",
        "Add --sequence-parallel.",
        lambda config: (
            on("use_megatron_fsdp")(config)
            and on("multi_latent_attention")(config)
            and on("qk_layernorm")(config)
            and getattr(config, "tensor_model_parallel_size", 1) > 1
            and not getattr(config, "sequence_parallel", False)
        ),
    ),
    Limit(
        "multi-latent attention of Transformer Engine's layers with tensor but no sequence parallelism",
        "each rank has the gradient of its own heads for the keys' positions, Megatron does not sum them, "
        "and the ranks' copies of the down-projection drift apart",
        "Add --sequence-parallel.",
        lambda config: (
            on("multi_latent_attention")(config)
            and getattr(config, "transformer_impl", None) == "transformer_engine"
            and _size(config, "tensor_model_parallel_size") > 1
            and not on("sequence_parallel")(config)
        ),
    ),
    Limit(
        "Megatron-FSDP with sharded gradients, several micro-batches and each expert on one rank",
        "Megatron-FSDP scales what it has accumulated of an expert's gradient once more at each micro-batch",
        "Lower --expert-model-parallel-size, so that two ranks or more share an expert, or leave out "
        "--use-megatron-fsdp.",
        lambda config: _has_unshared_experts(config) and _micro_batches(config) > 1,
    ),
    Limit(
        "--dyt-log-alpha with --weight-decay-on all",
        "the decay of a logarithm pulls every alpha to 1",
        "Add --no-dyt-log-alpha, or leave out --weight-decay-on all.",
        lambda config: on("dyt_log_alpha")(config) and getattr(config, "weight_decay_on", None) == "all",
    ),
    Limit(
        "--dyt-log-alpha with weight decay of --qk-layernorm's norms (apply_wd_to_qk_layernorm)",
        "it decays all that these norms learn, and the decay of a logarithm pulls alpha to 1",
        "Add --no-dyt-log-alpha, or leave out --no-weight-decay-cond-type and --apply-wd-to-qk-layernorm.",
        lambda config: (
            on("dyt_log_alpha")(config) and on("qk_layernorm")(config) and _decays_qk_norms(config)
        ),
    ),
    Limit(
        "use_mup",
        "MuP divides the linear layers' initial std by the root of the width's multiple, which the start of "
        "DyT has in it already, and nothing behind a DyT restores the scale",
        "Remove --use-mup.",
        on("use_mup"),
    ),
    Limit(
        "mla_down_proj_fusion",
        "it fuses the norm in front of attention into the down-projection",
        "Remove --mla-down-proj-fusion.",
        on("mla_down_proj_fusion"),
    ),
    Limit(
        "cache_mla_latents",
        "it takes the norm on the latents out of Transformer Engine's fused linear",
        "Remove --cache-mla-latents.",
        on("cache_mla_latents"),
    ),
    Limit(
        "an experimental_attention_variant other than gated_delta_net and dsa",
        "its norms are not known to this version",
        "Use one of these two, or leave it out.",
        lambda config: (
            getattr(config, "experimental_attention_variant", None) not in (None, "gated_delta_net", "dsa")
        ),
    ),
)


def refuse_unsupported(config: object) -> None:
    """Raise UserError naming every setting of `config` that clashes with `--normalization DyT`.

    Args:
        config: Megatron's parsed args or a TransformerConfig.
    """
    found = [limit for limit in LIMITS if limit.clashes(config)]
    if found:
        lines = "; ".join(f"{limit.what}: {limit.why}. {limit.todo}" for limit in found)
        raise UserError(f"--normalization DyT cannot be combined with {lines}")
