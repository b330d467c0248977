"""A model that exists on both sides: a LLaMA's shape, its norm, and the scale of its embedding.

`megatron_dyt.llama` knows the shape in the words of Megatron and of Hugging Face; DyT is added here.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, get_args

import torch

from megatron_dyt.config import NORMALIZATION, DyTConfig, Role, resolve_embedding_scale
from megatron_dyt.hf.tokenizer import TokenizerFacts
from megatron_dyt.llama import VOCABULARY_MULTIPLE, LlamaShape

MODELING_FILE = "modeling_llama_dyt.py"
_MODULE = MODELING_FILE.removesuffix(".py")
# What transformers' Auto classes take from a directory with that file.
AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.LlamaDyTConfig",
    "AutoModel": f"{_MODULE}.LlamaDyTModel",
    "AutoModelForCausalLM": f"{_MODULE}.LlamaDyTForCausalLM",
}


@dataclass(frozen=True)
class Model:
    """A LLaMA with RMSNorm or DyT.

    Attributes:
        shape: `vocab_size` are the rows of the embedding: Megatron's padded vocabulary, or fewer.
        init_std: of the matrices' initial values.
        dyt: DyT's settings, None for RMSNorm.
        embedding_scale: initial value of the learnable scalar on the embedding; None for no scalar.
    """

    shape: LlamaShape
    init_std: float
    dyt: DyTConfig | None = None
    embedding_scale: float | None = None

    def with_vocabulary(self, size: int) -> Self:
        """This model with `size` rows of the vocabulary."""
        return replace(self, shape=replace(self.shape, vocab_size=size))

    @property
    def has_dyt_bias(self) -> bool:
        """Whether the norms are DyTs with a bias."""
        return self.dyt is not None and self.dyt.bias

    # --- Megatron ---------------------------------------------------------------------------------

    @classmethod
    def from_megatron(cls, args: Namespace) -> Self:
        """The model that a run's saved arguments describe.

        Raises:
            UserError: it is no LLaMA.
        """
        shape = LlamaShape.from_megatron(args)
        # From what the model depends on alone: how a run computed it may be unknown to this version.
        is_dyt = args.normalization == NORMALIZATION
        dyt = DyTConfig.from_args(args, of_model=True) if is_dyt else None
        rule, std = (getattr(args, name, None) for name in ("embedding_scale", "embedding_init_method_std"))
        std = args.init_method_std if std is None else std
        scale = None if rule is None else resolve_embedding_scale(rule, args.hidden_size, std)
        return cls(shape, args.init_method_std, dyt, scale)

    def megatron_args(self, vocab_size: int, dtype: torch.dtype) -> dict[str, Any]:
        """What Megatron stores of a run of this model, but for the tokenizer.

        Args:
            vocab_size: entries of the tokenizer; `shape.vocab_size` is the padded vocabulary.
        """
        args = self.shape.megatron_args() | {
            "vocab_size": vocab_size,
            "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
            "add_position_embedding": True,
            "use_rotary_position_embeddings": False,
            "rotary_percent": 1.0,
            "rotary_interleaved": False,
            "normalization": NORMALIZATION if self.dyt else "RMSNorm",
            "init_method_std": self.init_std,
            "bf16": dtype == torch.bfloat16,
            "fp16": dtype == torch.float16,
            "params_dtype": dtype,
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
        }
        if self.dyt is not None:
            args |= self.dyt.to_args()
        return args

    # --- Hugging Face -----------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str) -> Self:
        """The model that a config.json describes.

        Args:
            where: what errors begin with, such as "--load DIR".

        Raises:
            UserError: Megatron has no such model.
        """
        shape, std = LlamaShape.from_hf(config, where), config.get("initializer_range", 0.02)
        if config["model_type"] != "llama_dyt":
            return cls(shape, std)
        scale = config.get("embedding_scale")
        dyt = DyTConfig(
            **{f"alpha_{role}": config["dyt_alpha_init"].get(role, 1.0) for role in get_args(Role)},
            bias=config["dyt_bias"],
            function=config["dyt_function"],
            embedding_scale="none" if scale is None else scale,
        )
        return cls(shape, std, dyt, scale)

    def hf_shape(self, folded: Collection[str] = ()) -> LlamaShape:
        """The export's shape. transformers has one switch for attention's biases and one for the MLP's.

        Its output layer is the embedding's matrix as in Megatron, unless that is multiplied with
        its scale.

        Args:
            folded: roles whose DyT is folded; see `mapping.exported`.
        """
        beta = self.has_dyt_bias
        return replace(
            self.shape,
            qkv_bias=self.shape.qkv_bias or (beta and "attn" in folded),
            linear_bias=self.shape.linear_bias or (beta and "ffn" in folded),
            tie_embeddings=self.shape.tie_embeddings and not self.scale_is_folded(folded),
        )

    def scale_is_folded(self, folded: Collection[str]) -> bool:
        """Whether the export's embedding is multiplied with its scale: LLaMA has no place for one."""
        return self.embedding_scale is not None and (self.dyt is None or bool(folded))

    def hf_config(
        self, dtype: torch.dtype, tokenizer: TokenizerFacts | None, folded: Collection[str] = ()
    ) -> Any:
        """A LlamaDyTConfig, or for RMSNorm a LlamaConfig."""
        from transformers import LlamaConfig

        from megatron_dyt.hf.modeling_llama_dyt import LlamaDyTConfig

        settings = self.hf_shape(folded).hf_config() | {
            "initializer_range": self.init_std,
            "dtype": str(dtype).removeprefix("torch."),
            **{f"{name}_token_id": getattr(tokenizer, name, None) for name in ("bos", "eos", "pad")},
        }
        if self.dyt is None:
            return LlamaConfig(**settings, architectures=["LlamaForCausalLM"])
        roles = [role for role in get_args(Role) if role != "qk" or self.shape.qk_layernorm]
        config = LlamaDyTConfig(
            **settings,
            architectures=["LlamaDyTForCausalLM"],
            dyt_function=self.dyt.function,
            dyt_bias=self.dyt.bias,
            dyt_alpha_init={role: self.dyt.alpha(role) for role in roles},
            dyt_weight_init={role: self.dyt.initial_weight(role) for role in roles},
            dyt_folded=list(folded),
            embedding_scale=None if self.scale_is_folded(folded) else self.embedding_scale,
            qk_layernorm=self.shape.qk_layernorm,
        )
        config.auto_map = dict(AUTO_MAP)
        return config
