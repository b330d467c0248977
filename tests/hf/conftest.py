"""Megatron models with values everywhere, saved as torch_dist checkpoints with the arguments of their run."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dyt import cli
from megatron_dyt.checkpoints.saved_args import Checkpoint
from megatron_dyt.hf.export import Export, export
from megatron_dyt.hf.tokenizer import write_tokenizer
from tests.license_tokenizer import write_tokenizer_model
from tests.mcore.conftest import build_gpt, make_config, make_spec, world  # noqa: F401

PADDED = 64
POSITIONS = 16
TOKENS = torch.arange(2 * POSITIONS).reshape(2, POSITIONS) * 7 % PADDED
# Of a small Hugging Face model, `hf_directory`.
HF_SMALL: dict[str, Any] = {
    "vocab_size": 350,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,
}
HF_TOKENS = torch.arange(2 * 16).reshape(2, 16) * 37 % 350


@dataclass(frozen=True)
class Saved:
    """A model, the arguments of its run, and its checkpoint."""

    model: torch.nn.Module
    args: Namespace
    checkpoint: Checkpoint

    def export(self, output: Path, **options: Any) -> Path:
        """`output`, with the export in it."""
        export(Export(self.checkpoint, self.args, output, **options))
        return output

    def logits(self) -> torch.Tensor:
        """fp32 (2, POSITIONS, PADDED) of Megatron on TOKENS."""
        positions = torch.arange(POSITIONS).expand(2, POSITIONS)
        mask = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).triu(1)[None, None]
        with torch.no_grad():
            logits: torch.Tensor = self.model.eval()(TOKENS, positions, mask)
        return logits


def command(*words: str | Path) -> None:
    """`megatron-dyt WORDS`, in this process; its errors are raised."""
    cli.main.main([str(word) for word in words], standalone_mode=False)


@pytest.fixture(scope="module")
def saved_models() -> dict[str, Saved]:
    """What `save_gpt` has saved in this module, by its arguments."""
    return {}


@pytest.fixture
def save_gpt(
    make_config: Callable[..., Any],  # noqa: F811
    build_gpt: Callable[..., Any],  # noqa: F811
    saved_models: dict[str, Saved],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Saved]:
    """`save_gpt("DyT", dyt=..., model={...}, args={...}, **config)`: a model with random values, saved.

    `model` are options of the GPTModel, `args` more of the run's arguments. The same model is saved once in a
    module; the arguments that are returned may be changed, its files may not.
    """

    def save(normalization: str = "DyT", **options: Any) -> Saved:
        key = repr((normalization, options))
        if key not in saved_models:
            saved_models[key] = build_and_save(normalization, **options)
        saved = saved_models[key]
        return dataclasses.replace(saved, args=copy.copy(saved.args))

    def build_and_save(
        normalization: str,
        *,
        dyt: Any = None,
        scale: str | None = None,
        model: dict[str, Any] | None = None,
        args: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> Saved:
        from megatron.core import dist_checkpointing

        config = make_config(normalization, **overrides)
        if dyt is not None:
            config.dyt = dyt
        if scale is not None:
            config.embedding_scale = scale
        built = build_gpt(config, **(model or {}))
        randomize(built)
        stored = run_arguments(config, model or {}, args or {})
        root = tmp_path_factory.mktemp("checkpoint")
        directory = root / "iter_0000007"
        directory.mkdir(parents=True)
        (root / "latest_checkpointed_iteration.txt").write_text("7")
        dist_checkpointing.save({"model": built.sharded_state_dict(), "args": stored}, str(directory))
        return Saved(built, stored, Checkpoint(root, 7, directory))

    return save


def randomize(model: torch.nn.Module) -> None:
    """Values that no two parameters share, so that a swapped or dropped tensor shows."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around_zero = parameter.dim() > 1 or name.endswith(("bias", "shift", "log_alpha"))
            parameter.copy_(noise * 0.2 if around_zero else 1 + 0.3 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(("input_rms", "alpha_floor")):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def run_arguments(config: Any, model: dict[str, Any], more: dict[str, Any]) -> Namespace:
    """What Megatron's training loop stores for a model of this config."""
    simple = (int, float, bool, str, type(None))
    args = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if isinstance(getattr(config, field.name), simple)
    }
    args |= {
        "swiglu": True,
        "group_query_attention": True,
        "padded_vocab_size": PADDED,
        "max_position_embeddings": POSITIONS,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_base": model.get("rotary_base", 10000),
        "use_rope_scaling": model.get("rope_scaling", False),
        "rope_scaling_factor": 8.0,
        "rotary_seq_len_interpolation_factor": model.get("seq_len_interpolation_factor"),
        "untie_embeddings_and_output_weights": not model.get("tied", False),
        "embedding_scale": getattr(config, "embedding_scale", None),
        "tokenizer_type": "NullTokenizer",
        "tokenizer_model": None,
    }
    dyt = getattr(config, "dyt", None)
    if dyt is not None:
        args |= dyt.to_args() | {"embedding_scale": dyt.embedding_scale}
    return Namespace(**(args | more))


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer_model(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 350)


@contextlib.contextmanager
def without_cpu_runtime() -> Iterator[None]:
    """Under it `torch.device("meta")`, with which transformers loads a model, has no effect."""
    from megatron_dyt import cpu

    cpu.disable()
    yield
    cpu.enable()


def hf_model(directory: Path, **options: Any) -> Any:
    """An exported directory loaded through AutoModelForCausalLM, in eval mode."""
    from transformers import AutoModelForCausalLM

    from megatron_dyt.hf import register_auto_classes

    register_auto_classes()
    with without_cpu_runtime():
        return AutoModelForCausalLM.from_pretrained(str(directory), **options).eval()


def hf_logits(directory: Path, **options: Any) -> torch.Tensor:
    """Logits of an exported directory on TOKENS."""
    with torch.no_grad():
        logits: torch.Tensor = hf_model(directory, **options)(TOKENS).logits
    return logits


def hf_directory(path: Path, dyt: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A small model with random values saved in `path`; LLaMA, or with `dyt` LLaMA with DyT."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_dyt.hf.modeling_llama_dyt import LlamaDyTConfig, LlamaDyTForCausalLM

    torch.manual_seed(5)
    if dyt is None:
        model: Any = LlamaForCausalLM(LlamaConfig(**(HF_SMALL | settings)))
    else:
        model = LlamaDyTForCausalLM(LlamaDyTConfig(**(HF_SMALL | settings | dyt)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                bias = name.endswith(("bias", "shift"))
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (0 if bias else 1))
            if "o_proj.bias" in name and not model.config.mlp_bias:
                parameter.zero_()
    model.save_pretrained(str(path))
    return model.eval()


def add_tokenizer(directory: Path, model: Path) -> None:
    """Put the SentencePiece `model` beside a model that `hf_directory` made."""
    args = Namespace(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model), max_position_embeddings=24
    )
    write_tokenizer(args, directory)
