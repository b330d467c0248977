"""A Hugging Face LLaMA as a Megatron checkpoint: `python -m megatron_dyt.hf.import_model`.

Reads a local directory of a LlamaForCausalLM or a LlamaDyTForCausalLM (what `megatron_dyt.hf.export` writes,
without --fold-weight) and writes a torch_dist checkpoint that every parallel layout loads, to be trained
on with --finetune or evaluated. One tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from megatron_dyt.checkpoints.iterations import TRACKER
from megatron_dyt.checkpoints.torch_dist import LazyTensor, write_torch_dist
from megatron_dyt.config import NORMALIZATION, DyTConfig, Role
from megatron_dyt.errors import UserError, run_main
from megatron_dyt.hf.mapping import (
    EMBEDDING,
    EMBEDDING_SCALE,
    FC1,
    FC2,
    FINAL_NORM,
    LAYERS,
    OUTPUT,
    PROJ,
    QKV,
    hf_shapes,
    join_qkv,
    layer_norms,
    megatron_shapes,
)
from megatron_dyt.hf.output_directory import check_free, check_space, whole_directory
from megatron_dyt.hf.safetensors_io import SafetensorsReader, tensor_bytes
from megatron_dyt.hf.shape import LlamaShape

_log = logging.getLogger(__name__)

# Megatron wants an iteration above 0; --finetune starts counting anew.
ITERATION = 1
VOCABULARY_MULTIPLE = 128


def main(argv: list[str] | None = None) -> None:
    """Import as `argv` (default: the command line) says; `UserError` for what cannot work."""
    parser = argparse.ArgumentParser(prog="python -m megatron_dyt.hf.import_model", description=__doc__)
    parser.add_argument(
        "--load", required=True, type=Path, metavar="DIR", help="directory of the Hugging Face model"
    )
    parser.add_argument(
        "--save", required=True, type=Path, metavar="DIR", help="checkpoint to write; must be new or empty"
    )
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    import_model(options.load, options.save)


def import_model(load: Path, save: Path) -> None:
    """Write the Megatron checkpoint `save` of the Hugging Face model in `load`; complete or absent.

    Raises:
        UserError: no such model, one that Megatron's LLaMA cannot hold, or no room.
    """
    check_free("--save", save)
    config = _read_config(load)
    source = SafetensorsReader(load)
    try:
        shape, real_vocabulary = _shape(config, source, load), int(config["vocab_size"])
        _check_tensors(shape.with_vocabulary(real_vocabulary), source, load)
        tensors = megatron_tensors(shape, source)
        needed = sum(tensor_bytes(tensor.shape, tensor.dtype) for tensor in tensors.values())
        check_space("--save", save, needed)
        args = _arguments(shape, real_vocabulary, load, tensors[EMBEDDING].dtype)
        common = {"args": args, "iteration": ITERATION, "checkpoint_version": 3.0}
        with whole_directory(save) as directory:
            write_torch_dist(directory / f"iter_{ITERATION:07d}", tensors, common, _extra_states(shape))
            (directory / TRACKER).write_text(str(ITERATION))
    finally:
        source.close()
    _log.info(f"imported {load} to {save}: {needed / 1e9:.2f} GB; train on with --load {save} --finetune")


# --- the model's shape ----------------------------------------------------------------------------


def _read_config(load: Path) -> dict[str, Any]:
    path = load / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--load {load}: no readable config.json there ({error}). Give a Hugging Face model's directory"
        ) from error
    kind = config.get("model_type")
    reasons = [
        what
        for what, there in (
            (f"model_type {kind!r} (llama and llama_dyt are known)", kind not in ("llama", "llama_dyt")),
            (
                f"hidden_act {config.get('hidden_act')!r} (not silu)",
                config.get("hidden_act", "silu") != "silu",
            ),
            ("a quantization", bool(config.get("quantization_config"))),
            ("folded DyT (export again without --fold-weight)", bool(config.get("dyt_folded"))),
            ("a bias of the output layer", bool(config.get("lm_head_bias"))),
        )
        if there
    ]
    if reasons:
        raise UserError(f"--load {load}: the model cannot be imported: {'; '.join(reasons)}")
    return config


def _shape(config: dict[str, Any], source: SafetensorsReader, load: Path) -> LlamaShape:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    is_dyt = config["model_type"] == "llama_dyt"
    linear_bias = bool(config.get("attention_bias")) and bool(config.get("mlp_bias"))
    qkv_bias = bool(config.get("attention_bias"))
    if config.get("mlp_bias") and not linear_bias:
        raise UserError(
            f"--load {load}: the MLP has biases and attention has none; Megatron has no such LLaMA"
        )
    if qkv_bias and not linear_bias:
        _refuse_output_bias(config["num_hidden_layers"], source, load)
    return LlamaShape(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        ffn_size=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=-(-config["vocab_size"] // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        max_positions=config["max_position_embeddings"],
        tied=bool(config.get("tie_word_embeddings")),
        qkv_bias=qkv_bias,
        linear_bias=linear_bias,
        qk_layernorm=bool(config.get("qk_layernorm")),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_parameters=_rope(config, load),
        init_std=config.get("initializer_range", 0.02),
        dyt=_dyt(config) if is_dyt else None,
        embedding_scale=config.get("embedding_scale") if is_dyt else None,
    )


def _refuse_output_bias(layers: int, source: SafetensorsReader, load: Path) -> None:
    """Megatron can give q, k, v a bias (--add-qkv-bias) and the output projection none."""
    for layer in range(layers):
        name = f"model.layers.{layer}.self_attn.o_proj.bias"
        if name in source.shapes and source.read(name).any():
            raise UserError(
                f"--load {load}: {name} is not zero, and the MLP has no bias; Megatron has no such LLaMA"
            )


def _rope(config: dict[str, Any], load: Path) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", float(config.get("rope_theta", 10000.0)))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    # The constants of Megatron's RotaryEmbedding._apply_scaling.
    constants = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    fits = {
        "default": True,
        "linear": float(rope.get("factor", 0)).is_integer(),
        "llama3": all(rope.get(name) == value for name, value in constants.items()),
    }
    if not fits.get(rope["rope_type"]):
        raise UserError(
            f"--load {load}: Megatron cannot do the rotary embedding {rope}; it can default, linear with a "
            f"whole factor, and llama3 with {constants}"
        )
    return rope


def _dyt(config: dict[str, Any]) -> DyTConfig:
    scale = config.get("embedding_scale")
    alphas = {f"alpha_{role}": config["dyt_alpha_init"].get(role, 1.0) for role in get_args(Role)}
    return DyTConfig(
        **alphas,
        bias=config["dyt_bias"],
        function=config["dyt_function"],
        embedding_scale="none" if scale is None else scale,
    )


def _check_tensors(shape: LlamaShape, source: SafetensorsReader, load: Path) -> None:
    expected = hf_shapes(shape)
    found = {name: size for name, size in source.shapes.items() if not name.endswith("rotary_emb.inv_freq")}
    if shape.tied:
        found.pop("lm_head.weight", None)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise UserError(
            f"--load {load}: the tensors are not those that config.json describes: "
            + ", ".join(f"{name} {found.get(name)} instead of {expected.get(name)}" for name in wrong[:4])
            + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        )


# --- tensors --------------------------------------------------------------------------------------


def megatron_tensors(shape: LlamaShape, source: SafetensorsReader) -> dict[str, LazyTensor]:
    """Megatron's tensors, each made from Hugging Face's when it is written; rows of padding are 0."""
    dtype = source.read("model.norm.weight").dtype
    tensors = {}
    for key, size in megatron_shapes(shape).items():
        if key.startswith(LAYERS):
            name = key.removeprefix(LAYERS)
            make = [partial(_layer_tensor, name, layer, shape, source) for layer in range(shape.num_layers)]
        else:
            make = [partial(_single_tensor, key, size, source)]
        tensors[key] = LazyTensor(size, dtype, [partial(_converted, function, dtype) for function in make])
    return tensors


def _extra_states(shape: LlamaShape) -> dict[str, None]:
    """The empty state that Megatron's linear layers store, and miss when it is not there."""
    return {
        f"{LAYERS}{linear}_extra_state/shard_{layer}_{shape.num_layers}": None
        for linear in (QKV, PROJ, FC1, FC2)
        for layer in range(shape.num_layers)
    }


def _converted(make: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    return make().to(dtype)


def _single_tensor(key: str, size: tuple[int, ...], source: SafetensorsReader) -> Tensor:
    if key.startswith(FINAL_NORM):
        return source.read(f"model.norm.{key.removeprefix(FINAL_NORM)}")
    names = {EMBEDDING: "embed_tokens.weight", EMBEDDING_SCALE: "embed_tokens.scale"}
    tensor = source.read("lm_head.weight" if key == OUTPUT else f"model.{names[key]}")
    if key == EMBEDDING_SCALE:
        return tensor
    return torch.nn.functional.pad(tensor, (0, 0, 0, size[0] - tensor.shape[0]))


def _layer_tensor(name: str, layer: int, shape: LlamaShape, source: SafetensorsReader) -> Tensor:
    """Megatron's tensor `name` of a layer, with the layer as its first dimension."""
    read = partial(_read, source, f"model.layers.{layer}.")
    for _, theirs, ours in layer_norms(shape):
        if name.startswith(theirs):
            return read(ours + name.removeprefix(theirs))[None]
    linear, kind = name.rsplit(".", 1)
    if f"{linear}." == QKV:
        q, k, v = (read(f"self_attn.{part}_proj.{kind}") for part in "qkv")
        return join_qkv(q, k, v, shape)[None]
    if f"{linear}." == FC1:
        return torch.cat([read(f"mlp.{part}_proj.{kind}") for part in ("gate", "up")])[None]
    return read({PROJ: "self_attn.o_proj.", FC2: "mlp.down_proj."}[f"{linear}."] + kind)[None]


def _read(source: SafetensorsReader, prefix: str, name: str) -> Tensor:
    return source.read(prefix + name)


# --- what Megatron stores of a run ----------------------------------------------------------------


def _arguments(shape: LlamaShape, vocabulary: int, load: Path, dtype: torch.dtype) -> Namespace:
    rope = shape.rope_parameters
    args: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_size,
        "num_attention_heads": shape.heads,
        "group_query_attention": shape.kv_heads != shape.heads,
        "num_query_groups": shape.kv_heads,
        "kv_channels": shape.head_dim,
        "vocab_size": vocabulary,
        "padded_vocab_size": shape.vocab_size,
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
        "seq_length": shape.max_positions,
        "max_position_embeddings": shape.max_positions,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_base": int(rope["rope_theta"]),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": int(rope["factor"]) if rope["rope_type"] == "linear" else None,
        "use_rope_scaling": rope["rope_type"] == "llama3",
        "rope_scaling_factor": rope["factor"] if rope["rope_type"] == "llama3" else 8.0,
        "untie_embeddings_and_output_weights": not shape.tied,
        "add_bias_linear": shape.linear_bias,
        "add_qkv_bias": shape.qkv_bias and not shape.linear_bias,
        "swiglu": True,
        "qk_layernorm": shape.qk_layernorm,
        "normalization": NORMALIZATION if shape.dyt else "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "norm_epsilon": shape.norm_eps,
        "init_method_std": shape.init_std,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": dtype,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        **_tokenizer_arguments(load),
    }
    if shape.dyt is not None:
        args |= shape.dyt.to_args()
    return Namespace(**args)


def _tokenizer_arguments(load: Path) -> dict[str, str | None]:
    if (load / "tokenizer.model").is_file():
        model = str((load / "tokenizer.model").resolve())
        return {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": model}
    if (load / "tokenizer.json").is_file():
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(load.resolve())}
    return {"tokenizer_type": "NullTokenizer", "tokenizer_model": None}


if __name__ == "__main__":
    run_main(main)
