"""What a Megatron run's arguments say about the model, as far as a Hugging Face LLaMA can hold it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megatron_dyt.config import NORMALIZATION, DyTConfig, resolve_embedding_scale
from megatron_dyt.errors import UserError


@dataclass(frozen=True)
class LlamaShape:
    """A LLaMA's architecture.

    Attributes:
        vocab_size: rows of the embedding: Megatron's padded vocabulary, or fewer after `with_vocabulary`.
        linear_bias: every linear layer of attention and MLP has a bias; qkv_bias: that of q, k, v has.
        norm_eps: RMSNorm's epsilon.
        rope_parameters: as in a LlamaConfig.
        dyt: DyT's settings, None for RMSNorm.
        embedding_scale: initial value of the learnable scalar on the embedding; None for no scalar.
    """

    num_layers: int
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied: bool
    qkv_bias: bool
    linear_bias: bool
    qk_layernorm: bool
    norm_eps: float
    rope_parameters: dict[str, Any]
    init_std: float
    dyt: DyTConfig | None
    embedding_scale: float | None

    def with_vocabulary(self, size: int) -> LlamaShape:
        """This shape with the first `size` rows of the vocabulary alone."""
        return replace(self, vocab_size=size)


class _Refusal(NamedTuple):
    """A setting that transformers' LLaMA lacks: `there(args)` says whether a run has it."""

    what: str
    there: Callable[[Namespace], bool]


def _on(*names: str) -> Callable[[Namespace], bool]:
    return lambda args: any(getattr(args, name, None) for name in names)


def _not(name: str, usual: object) -> Callable[[Namespace], bool]:
    return lambda args: getattr(args, name, usual) not in (usual, None)


_REFUSALS = (
    _Refusal("mixture of experts (--num-experts)", _on("num_experts")),
    _Refusal("--multi-latent-attention", _on("multi_latent_attention")),
    _Refusal("multi-token prediction (--mtp-num-layers)", _on("mtp_num_layers")),
    _Refusal(
        "a hybrid (Mamba, GDN, DSA) model",
        _on(
            *("hybrid_layer_pattern", "hybrid_override_pattern", "is_hybrid_model"),
            *("experimental_attention_variant", "linear_attention_freq"),
        ),
    ),
    _Refusal(
        "heterogeneous layers",
        _on("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
    ),
    _Refusal("a layer specification of the user's own (--spec)", _on("spec")),
    _Refusal("an MLP without --swiglu", lambda args: not getattr(args, "swiglu", False)),
    _Refusal("--glu-linear-offset", _not("glu_linear_offset", 0.0)),
    _Refusal("--activation-func-clamp-value", _not("activation_func_clamp_value", None)),
    _Refusal("--position-embedding-type other than rope", _not("position_embedding_type", "rope")),
    _Refusal("--rotary-percent other than 1", _not("rotary_percent", 1.0)),
    _Refusal("--rotary-interleaved", _on("rotary_interleaved")),
    _Refusal("layers without rotary embedding (--no-rope-freq)", _on("no_rope_freq")),
    _Refusal(
        "--use-rope-scaling together with --rotary-seq-len-interpolation-factor",
        lambda args: _on("use_rope_scaling")(args) and _on("rotary_seq_len_interpolation_factor")(args),
    ),
    _Refusal("--window-size", _on("window_size", "window_attn_skip_freq")),
    _Refusal("--softmax-type other than vanilla", _not("softmax_type", "vanilla")),
    _Refusal("--softmax-scale", _on("softmax_scale")),
    _Refusal("--attention-output-gate", _on("attention_output_gate")),
    _Refusal("--qk-l2-norm", _on("qk_l2_norm")),
    _Refusal("--apply-layernorm-1p", _on("layernorm_zero_centered_gamma", "apply_layernorm_1p")),
    _Refusal("--apply-residual-connection-post-layernorm", _on("apply_residual_connection_post_layernorm")),
    _Refusal("--use-mup", _on("use_mup")),
    _Refusal(
        "--qk-layernorm with RMSNorm",
        lambda args: _on("qk_layernorm")(args) and args.normalization != NORMALIZATION,
    ),
    _Refusal(
        "a hidden size that is no multiple of the attention heads",
        lambda args: args.hidden_size % args.num_attention_heads != 0,
    ),
)


def refuse_unexportable(args: Namespace) -> None:
    """Raise UserError naming everything about the model that a Hugging Face LLaMA cannot hold."""
    found = [refusal.what for refusal in _REFUSALS if refusal.there(args)]
    if args.normalization not in (NORMALIZATION, "RMSNorm"):
        found.append(f"--normalization {args.normalization}")
    if found:
        raise UserError(
            f"the checkpoint's model has no Hugging Face LLaMA form because of: {'; '.join(found)}. "
            "Exported are LLaMA models: GPT with --swiglu, --position-embedding-type rope and "
            "--normalization DyT or RMSNorm"
        )


def llama_shape(args: Namespace) -> LlamaShape:
    """The architecture that a run's stored arguments describe.

    Raises:
        UserError: it is none of a LLaMA.
    """
    refuse_unexportable(args)
    grouped = getattr(args, "group_query_attention", False)
    is_dyt = args.normalization == NORMALIZATION
    return LlamaShape(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_size=args.ffn_hidden_size,
        heads=args.num_attention_heads,
        kv_heads=args.num_query_groups if grouped else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocab_size=args.padded_vocab_size,
        max_positions=args.max_position_embeddings,
        tied=not args.untie_embeddings_and_output_weights,
        qkv_bias=args.add_bias_linear or getattr(args, "add_qkv_bias", False),
        linear_bias=args.add_bias_linear,
        qk_layernorm=bool(getattr(args, "qk_layernorm", False)),
        norm_eps=_norm_epsilon(args),
        rope_parameters=_rope_parameters(args),
        init_std=args.init_method_std,
        dyt=DyTConfig.from_args(args, of_model=True) if is_dyt else None,
        embedding_scale=_embedding_scale(args),
    )


def _norm_epsilon(args: Namespace) -> float:
    # Older versions store the flag's own name.
    value = getattr(args, "layernorm_epsilon", None)
    return float(args.norm_epsilon if value is None else value)


def _embedding_scale(args: Namespace) -> float | None:
    rule = getattr(args, "embedding_scale", None)
    if rule is None:
        return None
    std = getattr(args, "embedding_init_method_std", None)
    return resolve_embedding_scale(rule, args.hidden_size, args.init_method_std if std is None else std)


def _rope_parameters(args: Namespace) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    if getattr(args, "use_rope_scaling", False):
        # The constants of Megatron's RotaryEmbedding._apply_scaling.
        rope |= {
            "rope_type": "llama3",
            "factor": float(getattr(args, "rope_scaling_factor", 8.0)),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    elif factor := getattr(args, "rotary_seq_len_interpolation_factor", None):
        rope |= {"rope_type": "linear", "factor": float(factor)}
    return rope
