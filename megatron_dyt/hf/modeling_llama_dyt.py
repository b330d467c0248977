"""LLaMA with Dynamic Tanh (DyT, arXiv 2503.10622) in place of RMSNorm, for transformers.

    DyT(x) = weight * f(alpha * x + shift) + bias

This file needs torch and transformers alone: an exported model directory holds a copy of it, which
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` loads. Attention (eager, SDPA,
flash), rotary embedding, key-value cache and generation are transformers' own: no forward of theirs is
written again here, so names that differ by release, such as the cache's, are theirs on both sides of a call.

So what the rest of megatron_dyt knows too, the functions, roles, settings and their defaults, is written out
here once more; tests/hf/test_modeling_llama_dyt.py compares the two.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel, Qwen3Config
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.utils import TransformersKwargs


def _isru(z: torch.Tensor) -> torch.Tensor:
    # z^2 overflows for large |z| and 1 / z^2 for small: each half uses the form that is safe there.
    small = z / torch.sqrt(1 + z * z)
    large = torch.copysign(1 / torch.sqrt(1 + 1 / (z * z)), z)
    return torch.where(z.abs() <= 1, small, large)


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "erf": torch.erf,
    "hardtanh": nn.functional.hardtanh,
    "sigmoid": torch.sigmoid,
    "isru": _isru,
    "arctan": lambda z: torch.atan(z) * (2 / torch.pi),
    "satursin": lambda z: torch.sin(z.clamp(-torch.pi / 2, torch.pi / 2)),
    "arcsinhclip": lambda z: torch.asinh(z).clamp(-1, 1),
    "identity": lambda z: z,
}
# Where a DyT stands: before attention, before the MLP, after the last layer, on queries and keys.
ROLES = ("attn", "ffn", "final", "qk")


class LlamaDyTConfig(LlamaConfig):
    """LlamaConfig and what DyT adds to it. The defaults are the paper's 7B.

    Attributes:
        dyt_function: f; one of FUNCTIONS. "erf" (Derf, arXiv 2512.10938) has a learnable shift.
        dyt_bias: whether DyT has a bias.
        dyt_alpha_init, dyt_weight_init: initial alpha and weight by role, for a model that is trained
            from scratch; a role left out starts at the default (alpha 0.5, weight 1).
        dyt_folded: roles whose weight and bias are part of the linear layer behind them.
        embedding_scale: initial value of the learnable scalar on the embedding; None for no scalar.
        qk_layernorm: whether queries and keys of each head pass a DyT.
        lm_head_bias: whether the output layer has a bias.
    """

    model_type = "llama_dyt"
    # LLaMA's, and for the norms of queries and keys what this release has for such norms: a rank has its own
    # heads, so their gradients are partial. Other DyTs, and the embedding with its scale, are replicated.
    base_model_tp_plan = Qwen3Config.base_model_tp_plan

    dyt_function: str = "tanh"
    dyt_bias: bool = False
    dyt_alpha_init: dict | None = None
    dyt_weight_init: dict | None = None
    dyt_folded: list | None = None
    embedding_scale: float | None = 64.0
    qk_layernorm: bool = False
    lm_head_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.dyt_function not in FUNCTIONS:
            raise ValueError(f"dyt_function is {self.dyt_function!r}; allowed: {', '.join(FUNCTIONS)}")
        if self.dyt_alpha_init is None:
            self.dyt_alpha_init = {"attn": 0.8, "ffn": 0.2, "final": 0.2, "qk": 1.0}
        self.dyt_weight_init = self.dyt_weight_init or {}
        self.dyt_folded = list(self.dyt_folded or [])
        unknown = {*self.dyt_alpha_init, *self.dyt_weight_init, *self.dyt_folded} - set(ROLES)
        if unknown:
            raise ValueError(f"unknown DyT role {sorted(unknown)}; roles: {', '.join(ROLES)}")
        if "qk" in self.dyt_folded:
            raise ValueError("dyt_folded names qk; there is no linear layer behind queries and keys")
        super().__post_init__(**kwargs)


class LlamaDyT(nn.Module):
    """x (..., size) -> y of the same shape and dtype, computed in fp32 (fp64 for fp64)."""

    def __init__(self, config: LlamaDyTConfig, role: str, size: int) -> None:
        super().__init__()
        self.role = role
        self.function = config.dyt_function
        affine = role not in (config.dyt_folded or ())
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(size)) if affine else None
        self.bias = nn.Parameter(torch.empty(size)) if affine and config.dyt_bias else None
        self.shift = nn.Parameter(torch.empty(1)) if self.function == "erf" else None

    def reset_parameters(self, config: LlamaDyTConfig) -> None:
        init.constant_(self.alpha, (config.dyt_alpha_init or {}).get(self.role, 0.5))
        if self.weight is not None:
            init.constant_(self.weight, (config.dyt_weight_init or {}).get(self.role, 1.0))
        for parameter in (self.bias, self.shift):
            if parameter is not None:
                init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        z = self.alpha.to(dtype) * x.to(dtype)
        if self.shift is not None:
            z = z + self.shift.to(dtype)
        y = FUNCTIONS[self.function](z)
        if self.weight is not None:
            y = y * self.weight.to(dtype)
        if self.bias is not None:
            y = y + self.bias.to(dtype)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"role={self.role}, function={self.function}, weight={self.weight is not None}"


class LlamaDyTEmbedding(nn.Embedding):
    """An embedding whose output is multiplied, in fp32, by a learnable scalar."""

    def __init__(self, config: LlamaDyTConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.scale = nn.Parameter(torch.empty(1)) if config.embedding_scale is not None else None

    @property
    def embed_scale(self) -> torch.Tensor:
        """The scalar, by the name under which PEFT looks for it to scale what an adapter adds.

        Raises:
            AttributeError: there is none, or it has no value yet. SGLang and some releases of vLLM look here
                too, while the model is on the meta device, for a constant that they could keep.
        """
        if self.scale is None or self.scale.is_meta:
            raise AttributeError("embed_scale")
        return self.scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = super().forward(input)
        return x if self.scale is None else (x * self.scale.float()).to(x.dtype)


# What the attention takes, by transformers' own account: its parameters, what it hands on to the attention
# function, and what the decoder layer gives it beside these.
_ATTENTION_TAKES = frozenset(
    {*inspect.signature(Qwen3Attention.forward).parameters, *TransformersKwargs.__annotations__, "use_cache"}
)


class LlamaDyTAttention(Qwen3Attention):
    """LLaMA's attention, with DyT on the queries and keys of each head where the model has it.

    Qwen3's attention is LLaMA's with a norm at these places. Its forward is not overridden: vLLM looks in the
    source of this class's forward for the call of transformers' attention interface, and vLLM and SGLang pass
    keywords of their own through it.

    Raises:
        TypeError: this release's decoder layer hands on what its attention does not know. transformers drops
            such a keyword, and with the cache under another name each new token would see itself alone.
    """

    def __init__(self, config: LlamaDyTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        unknown = inspect.signature(LlamaDecoderLayer.forward).parameters.keys() - _ATTENTION_TAKES
        if unknown:
            raise TypeError(
                f"transformers {transformers.__version__} gives {', '.join(sorted(unknown))} to an attention "
                f"that takes {', '.join(sorted(_ATTENTION_TAKES - {'self', 'kwargs'}))}. Use a release of "
                "transformers that docs/huggingface.md of megatron_dyt names"
            )
        self.q_norm = LlamaDyT(config, "qk", self.head_dim) if config.qk_layernorm else nn.Identity()
        self.k_norm = LlamaDyT(config, "qk", self.head_dim) if config.qk_layernorm else nn.Identity()


class LlamaDyTDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: LlamaDyTConfig, layer_idx: int) -> None:
        # Not LlamaDecoderLayer's: it would build two RMSNorms and a second attention first.
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaDyTAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaDyT(config, "attn", config.hidden_size)
        self.post_attention_layernorm = LlamaDyT(config, "ffn", config.hidden_size)


class LlamaDyTPreTrainedModel(LlamaPreTrainedModel):
    config: LlamaDyTConfig
    config_class = LlamaDyTConfig
    _no_split_modules = ["LlamaDyTDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": LlamaDyTDecoderLayer,
        "attentions": LlamaDyTAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlamaDyT):
            module.reset_parameters(self.config)
        elif isinstance(module, LlamaDyTEmbedding) and module.scale is not None:
            init.constant_(module.scale, self.config.embedding_scale)


class LlamaDyTModel(LlamaDyTPreTrainedModel, LlamaModel):
    """LlamaModel (its forward) with DyT for its norms and a scaled embedding."""

    def __init__(self, config: LlamaDyTConfig) -> None:
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = LlamaDyTEmbedding(config)
        self.layers = nn.ModuleList(
            LlamaDyTDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaDyT(config, "final", config.hidden_size)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class LlamaDyTForCausalLM(LlamaDyTPreTrainedModel, LlamaForCausalLM):
    """LlamaForCausalLM (its forward and generate) on a LlamaDyTModel."""

    def __init__(self, config: LlamaDyTConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlamaDyTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()
