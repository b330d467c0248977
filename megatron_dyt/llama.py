"""The architecture of a LLaMA, in the words of Megatron and in those of Hugging Face.

Megatron's words are its arguments: flags on the command line, and the same names in a checkpoint's saved
args. Hugging Face's are the keys of a LlamaConfig. The norm (RMSNorm or DyT) is no part of the shape.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from megatron_dyt.errors import UserError
from megatron_dyt.parsed_args import on

NORMS = ("DyT", "RMSNorm")

# Rows: Megatron pads the vocabulary to a multiple of this times the tensor parallel size
# (--make-vocab-size-divisible-by's default).
VOCABULARY_MULTIPLE = 128

RopeType = Literal["default", "linear", "llama3"]

# What llama3's rotary scaling has besides its factor: constants of Megatron's RotaryEmbedding._apply_scaling.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# Field of LlamaShape -> key of a LlamaConfig with the same value.
HUGGING_FACE = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "qkv_bias": "attention_bias",
    "linear_bias": "mlp_bias",
    "norm_epsilon": "rms_norm_eps",
}
# What transformers takes where a config.json leaves a key out or holds null; the other keys must be there.
_HF_DEFAULTS = {
    "num_key_value_heads": None,  # as many as attention heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
}

# What makes Megatron's GPT a LLaMA, whatever its shape.
LLAMA_ARGS = {
    "position_embedding_type": "rope",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "swiglu": True,
}

# Megatron's argument -> the switch that gives it a value other than its default.
_SWITCHES = {
    "swiglu": (True, "--swiglu"),
    "add_bias_linear": (False, "--disable-bias-linear"),
    "add_qkv_bias": (True, "--add-qkv-bias"),
    "untie_embeddings_and_output_weights": (True, "--untie-embeddings-and-output-weights"),
    "group_query_attention": (True, "--group-query-attention"),
    "qk_layernorm": (True, "--qk-layernorm"),
    "use_rope_scaling": (True, "--use-rope-scaling"),
}
# No flags of a shape: the first depends on the tokenizer, the second is another name of --norm-epsilon.
_WITHOUT_FLAG = ("padded_vocab_size", "layernorm_epsilon")


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """A LLaMA's architecture.

    Attributes:
        num_query_groups: heads of keys and values; as many as attention heads without grouped queries.
        kv_channels: width of a head; None for hidden_size / num_attention_heads.
        vocab_size: rows of the embedding, or entries of the tokenizer before Megatron pads them.
        seq_length: longest sequence, in tokens.
        tie_embeddings: whether the output layer is the embedding's matrix.
        qkv_bias: whether the linear layers of q, k and v have a bias.
        linear_bias: whether every linear layer of attention and MLP has one.
        qk_layernorm: whether queries and keys are normalized by head; with DyT only.
        norm_epsilon: of RMSNorm.
        rope_base: base of the rotary embedding's angles (theta).
        rope_type: "linear" divides positions by `rope_factor`, "llama3" scales low frequencies alone.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    seq_length: int
    kv_channels: int | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    linear_bias: bool = False
    qk_layernorm: bool = False
    norm_epsilon: float = 1e-5
    rope_base: float = 10000.0
    rope_type: RopeType = "default"
    rope_factor: float = 1.0

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_size(self) -> int:
        """Width of all heads' queries together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_query_groups * self.head_dim

    @property
    def embedding_parameters(self) -> int:
        """Parameters of embedding and output layer; vocabulary as given."""
        return (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size

    @property
    def parameters_without_norms(self) -> int:
        """Parameters in matrices: embedding, output layer, attention and SwiGLU MLPs."""
        attention = self.hidden_size * (2 * self.query_size + 2 * self.key_size)
        mlp = 3 * self.hidden_size * self.ffn_hidden_size
        return self.num_layers * (attention + mlp) + self.embedding_parameters

    def padded_vocab_size(self, tensor_parallel: int = 1) -> int:
        """Rows of the embedding, as Megatron pads them."""
        multiple = VOCABULARY_MULTIPLE * tensor_parallel
        return math.ceil(self.vocab_size / multiple) * multiple

    # --- Megatron ---------------------------------------------------------------------------------

    def megatron_args(self) -> dict[str, Any]:
        """Megatron's arguments for this shape, as a checkpoint stores them."""
        grouped = self.num_query_groups != self.num_attention_heads
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "group_query_attention": grouped,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.head_dim,
            "padded_vocab_size": self.padded_vocab_size(),
            "seq_length": self.seq_length,
            "max_position_embeddings": self.seq_length,
            "rotary_base": int(self.rope_base),
            "rotary_seq_len_interpolation_factor": (
                int(self.rope_factor) if self.rope_type == "linear" else None
            ),
            "use_rope_scaling": self.rope_type == "llama3",
            "rope_scaling_factor": self.rope_factor if self.rope_type == "llama3" else 8.0,
            "untie_embeddings_and_output_weights": not self.tie_embeddings,
            "add_bias_linear": self.linear_bias,
            "add_qkv_bias": self.qkv_bias and not self.linear_bias,
            "qk_layernorm": self.qk_layernorm,
            # Which of the two names a release stores differs.
            "norm_epsilon": self.norm_epsilon,
            "layernorm_epsilon": self.norm_epsilon,
            **LLAMA_ARGS,
        }

    def megatron_flags(self) -> list[str]:
        """Megatron's command line for this shape: those of its arguments that are not Megatron's defaults."""
        usual = {
            "num_query_groups": self.num_attention_heads,  # It reads the number with the switch only.
            "kv_channels": self.hidden_size // self.num_attention_heads,
            "norm_epsilon": 1e-5,
            "rope_scaling_factor": 8.0,
        }
        values: dict[str, Any] = {}
        switches = []
        for name, value in self.megatron_args().items():
            if name in _SWITCHES:
                switches += [_SWITCHES[name][1]] * (value == _SWITCHES[name][0])
            elif name not in _WITHOUT_FLAG and value is not None and value != usual.get(name):
                values[name] = value
        return [*as_flags(values), *switches]

    @classmethod
    def from_megatron(cls, args: Namespace) -> LlamaShape:
        """The shape that a run's saved arguments describe, vocabulary padded.

        Raises:
            UserError: naming everything about the model that a Hugging Face LLaMA cannot hold.
        """
        _refuse_other_models(args)
        epsilon = getattr(args, "layernorm_epsilon", None)
        return LlamaShape(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            ffn_hidden_size=args.ffn_hidden_size,
            num_attention_heads=args.num_attention_heads,
            num_query_groups=query_groups(args),
            kv_channels=args.kv_channels,
            vocab_size=args.padded_vocab_size,
            seq_length=args.max_position_embeddings,
            tie_embeddings=not args.untie_embeddings_and_output_weights,
            qkv_bias=args.add_bias_linear or getattr(args, "add_qkv_bias", False),
            linear_bias=args.add_bias_linear,
            qk_layernorm=bool(getattr(args, "qk_layernorm", False)),
            norm_epsilon=float(args.norm_epsilon if epsilon is None else epsilon),
            rope_base=float(args.rotary_base),
            **_rope_scaling(args),
        )

    # --- Hugging Face -----------------------------------------------------------------------------

    def hf_config(self) -> dict[str, Any]:
        """The settings of a LlamaConfig."""
        rope: dict[str, Any] = {"rope_type": self.rope_type, "rope_theta": float(self.rope_base)}
        if self.rope_type != "default":
            rope["factor"] = self.rope_factor
        if self.rope_type == "llama3":
            rope |= LLAMA3_ROPE
        settings = {key: getattr(self, field) for field, key in HUGGING_FACE.items()}
        return settings | {"rope_parameters": rope}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str) -> LlamaShape:
        """The shape that a LLaMA's config.json describes, vocabulary unpadded.

        Args:
            where: what errors begin with, such as "--load DIR".

        Raises:
            UserError: naming everything about the model that Megatron's LLaMA cannot hold.
        """
        _refuse_other_configs(config, where)
        values = _HF_DEFAULTS | {key: value for key, value in config.items() if value is not None}
        fields = {field: values[key] for field, key in HUGGING_FACE.items()}
        fields["num_query_groups"] = fields["num_query_groups"] or fields["num_attention_heads"]
        fields["kv_channels"] = fields.pop("head_dim")
        rope = _hf_rope(config, where)
        return LlamaShape(**fields, **rope, qk_layernorm=bool(config.get("qk_layernorm")))


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Megatron's flags for arguments with these values: {"num_layers": 2} is --num-layers 2."""
    flags = []
    for name, value in values.items():
        flags += [
            f"--{name.replace('_', '-')}",
            f"{value:.10g}" if isinstance(value, float) else str(value),
        ]
    return flags


def query_groups(args: Namespace) -> int:
    """Heads of keys and values of a run: without the switch Megatron does not read the number."""
    grouped = getattr(args, "group_query_attention", False)
    return int(args.num_query_groups if grouped else args.num_attention_heads)


def _rope_scaling(args: Namespace) -> dict[str, Any]:
    if getattr(args, "use_rope_scaling", False):
        return {"rope_type": "llama3", "rope_factor": float(getattr(args, "rope_scaling_factor", 8.0))}
    if factor := getattr(args, "rotary_seq_len_interpolation_factor", None):
        return {"rope_type": "linear", "rope_factor": float(factor)}
    return {}


def _hf_rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.setdefault("rope_theta", config.get("rope_theta", 10000.0)))
    kind = str(rope.setdefault("rope_type", rope.pop("type", "default")))
    factor = float(rope.get("factor", 1.0))
    fits = {
        "default": True,
        "linear": "factor" in rope and factor.is_integer(),
        "llama3": "factor" in rope and all(rope.get(name) == value for name, value in LLAMA3_ROPE.items()),
    }
    if not fits.get(kind) or not theta.is_integer():
        raise UserError(
            f"{where}: Megatron cannot do the rotary embedding {rope}; it can default, linear with a "
            f"whole factor, and llama3 with {LLAMA3_ROPE}, all with a whole rope_theta"
        )
    return {"rope_base": theta, "rope_type": kind, "rope_factor": factor}


# --- what is no LLaMA -----------------------------------------------------------------------------


class _Refusal(NamedTuple):
    """A setting that a LLaMA lacks: `there(args)` says whether a model has it."""

    what: str
    there: Callable[[Any], bool]


def _not(name: str, usual: object) -> Callable[[Namespace], bool]:
    return lambda args: getattr(args, name, usual) not in (usual, None)


# Of Megatron's arguments; transformers' LLaMA has none of these.
_REFUSED_ARGS = (
    _Refusal("mixture of experts (--num-experts)", on("num_experts")),
    _Refusal("--multi-latent-attention", on("multi_latent_attention")),
    _Refusal("multi-token prediction (--mtp-num-layers)", on("mtp_num_layers")),
    _Refusal(
        "a hybrid (Mamba, GDN, DSA) model",
        on(
            *("hybrid_layer_pattern", "hybrid_override_pattern", "is_hybrid_model"),
            *("experimental_attention_variant", "linear_attention_freq"),
        ),
    ),
    _Refusal(
        "heterogeneous layers",
        on("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
    ),
    _Refusal("a layer specification of the user's own (--spec)", on("spec")),
    _Refusal("an MLP without --swiglu", lambda args: not getattr(args, "swiglu", False)),
    _Refusal("--glu-linear-offset", _not("glu_linear_offset", 0.0)),
    _Refusal("--activation-func-clamp-value", _not("activation_func_clamp_value", None)),
    _Refusal("--position-embedding-type other than rope", _not("position_embedding_type", "rope")),
    _Refusal("--rotary-percent other than 1", _not("rotary_percent", 1.0)),
    _Refusal("--rotary-interleaved", on("rotary_interleaved")),
    _Refusal("layers without rotary embedding (--no-rope-freq)", on("no_rope_freq")),
    _Refusal(
        "--use-rope-scaling together with --rotary-seq-len-interpolation-factor",
        lambda args: on("use_rope_scaling")(args) and on("rotary_seq_len_interpolation_factor")(args),
    ),
    _Refusal("--window-size", on("window_size", "window_attn_skip_freq")),
    _Refusal("--softmax-type other than vanilla", _not("softmax_type", "vanilla")),
    _Refusal("--softmax-scale", on("softmax_scale")),
    _Refusal("--attention-output-gate", on("attention_output_gate")),
    _Refusal("--qk-l2-norm", on("qk_l2_norm")),
    _Refusal("--apply-layernorm-1p", on("layernorm_zero_centered_gamma", "apply_layernorm_1p")),
    _Refusal("--apply-residual-connection-post-layernorm", on("apply_residual_connection_post_layernorm")),
    _Refusal("--use-mup", on("use_mup")),
    _Refusal(
        "--qk-layernorm with RMSNorm", lambda args: on("qk_layernorm")(args) and args.normalization != "DyT"
    ),
    _Refusal(
        "a hidden size that is no multiple of the attention heads",
        lambda args: args.hidden_size % args.num_attention_heads != 0,
    ),
)

# Of a config.json; Megatron has none of these, or this package does not import them.
_REFUSED_CONFIGS = (
    _Refusal("a quantization", lambda config: bool(config.get("quantization_config"))),
    _Refusal(
        "folded DyT (export again without --fold-weight)", lambda config: bool(config.get("dyt_folded"))
    ),
    _Refusal("a bias of the output layer", lambda config: bool(config.get("lm_head_bias"))),
    _Refusal(
        "biases in the MLP where attention has none",
        lambda config: config.get("mlp_bias") and not config.get("attention_bias"),
    ),
)


def _refuse_other_models(args: Namespace) -> None:
    found = [refusal.what for refusal in _REFUSED_ARGS if refusal.there(args)]
    if args.normalization not in NORMS:
        found.append(f"--normalization {args.normalization}")
    if found:
        raise UserError(
            f"the checkpoint's model has no Hugging Face LLaMA form because of: {'; '.join(found)}. "
            "Exported are LLaMA models: GPT with --swiglu, --position-embedding-type rope and "
            "--normalization DyT or RMSNorm"
        )


def _refuse_other_configs(config: Mapping[str, Any], where: str) -> None:
    kind, activation = config.get("model_type"), config.get("hidden_act", "silu")
    found = [refusal.what for refusal in _REFUSED_CONFIGS if refusal.there(config)]
    if activation != "silu":
        found.insert(0, f"hidden_act {activation!r} (not silu)")
    if kind not in ("llama", "llama_dyt"):
        found.insert(0, f"model_type {kind!r} (llama and llama_dyt are known)")
    needed = [key for key in HUGGING_FACE.values() if key not in _HF_DEFAULTS]
    found += [f"no {key}" for key in needed if not config.get(key)]
    if found:
        raise UserError(f"{where}: the model cannot be imported: {'; '.join(found)}")
