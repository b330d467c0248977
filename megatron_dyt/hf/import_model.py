"""A Hugging Face LLaMA as a Megatron checkpoint.

Reads a local directory of a LlamaForCausalLM or a LlamaDyTForCausalLM (an export, without --fold-weight)
and writes a torch_dist checkpoint that every parallel layout loads, to be trained on with --finetune or
evaluated. Two tensors are in memory at a time, one for each of two threads.
"""

from __future__ import annotations

import contextlib
import logging
import math
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_dyt.checkpoints.iterations import TRACKER
from megatron_dyt.checkpoints.torch_dist import LazyTensor, write_torch_dist
from megatron_dyt.errors import UserError, some
from megatron_dyt.hf import mapping
from megatron_dyt.hf.directory import (
    SafetensorsReader,
    check_free,
    check_space,
    read_config,
    whole_directory,
)
from megatron_dyt.hf.mapping import FC1, FC2, PROJ, QKV, Module
from megatron_dyt.hf.model import Model

_log = logging.getLogger(__name__)

# Megatron wants an iteration above 0; --finetune starts counting anew.
ITERATION = 1


def import_model(load: Path, save: Path) -> None:
    """Write the Megatron checkpoint `save` of the Hugging Face model in `load`; complete or absent.

    Raises:
        UserError: no such model, one that Megatron's LLaMA cannot hold, or no room.
    """
    check_free("--save", save)
    model = Model.from_hf(read_config(load), f"--load {load}")
    vocabulary = model.shape.vocab_size
    with contextlib.closing(SafetensorsReader(load)) as source:
        _check_tensors(model, source, load)
        model = model.with_vocabulary(model.shape.padded_vocab_size())
        dtype = source.read("model.norm.weight").dtype
        tensors = megatron_tensors(model, source, dtype)
        needed = sum(math.prod(tensor.shape) for tensor in tensors.values()) * dtype.itemsize
        check_space("--save", save, needed)
        args = Namespace(**model.megatron_args(vocabulary, dtype), **_tokenizer_args(load))
        common = {"args": args, "iteration": ITERATION, "checkpoint_version": 3.0}
        with whole_directory(save) as directory:
            write_torch_dist(directory / f"iter_{ITERATION:07d}", tensors, common, _extra_states(model))
            (directory / TRACKER).write_text(str(ITERATION))
    _log.info(f"imported {load} to {save}: {needed / 1e9:.2f} GB; train on with --load {save} --finetune")


def _check_tensors(model: Model, source: SafetensorsReader, load: Path) -> None:
    planned = mapping.hf_tensors(model)
    expected = {name: tuple(tensor.shape) for made in planned.values() for name, tensor in made.items()}
    # Older versions of transformers stored the rotary embedding's angles.
    found = {name: size for name, size in source.shapes.items() if not name.endswith("rotary_emb.inv_freq")}
    if model.shape.tie_embeddings:
        found.pop("lm_head.weight", None)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise UserError(
            f"--load {load}: the tensors are not those that config.json describes: "
            + some([f"{name} {found.get(name)} instead of {expected.get(name)}" for name in wrong])
        )
    if model.shape.qkv_bias and not model.shape.linear_bias:
        _refuse_output_bias(model, source, load)


def _refuse_output_bias(model: Model, source: SafetensorsReader, load: Path) -> None:
    """Megatron can give q, k, v a bias (--add-qkv-bias) and the output projection none."""
    for layer in range(model.shape.num_layers):
        (name,) = Module(PROJ, layer).hf_names("bias")
        if source.read(name).any():
            raise UserError(
                f"--load {load}: {name} is not zero, and the MLP has no bias; Megatron has no such LLaMA"
            )


def megatron_tensors(model: Model, source: SafetensorsReader, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """Megatron's tensors, layers stacked, each made from Hugging Face's when it is written."""
    tensors = {}
    for row, sizes in mapping.megatron_sizes(model).items():
        layers = range(model.shape.num_layers) if ".N." in row else [None]
        for name, size in sizes.items():
            whole = (len(layers), *size) if ".N." in row else size
            make = [partial(_made, Module(row, layer), name, model, source, dtype) for layer in layers]
            tensors[row.replace(".N.", ".") + name] = LazyTensor(whole, dtype, make)
    return tensors


def _made(module: Module, name: str, model: Model, source: SafetensorsReader, dtype: torch.dtype) -> Tensor:
    """One module's tensor; a layer's has the layer as its first dimension."""
    tensor = mapping.imported(module, name, model, source.read).to(dtype)
    return tensor if module.layer is None else tensor[None]


def _extra_states(model: Model) -> dict[str, None]:
    """The empty state that Megatron's linear layers store, and miss when it is not there."""
    layers = model.shape.num_layers
    return {
        f"{row.replace('.N.', '.')}_extra_state/shard_{layer}_{layers}": None
        for row in (QKV, PROJ, FC1, FC2)
        for layer in range(layers)
    }


def _tokenizer_args(load: Path) -> dict[str, str | None]:
    if (load / "tokenizer.model").is_file():
        model = str((load / "tokenizer.model").resolve())
        return {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": model}
    if (load / "tokenizer.json").is_file():
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(load.resolve())}
    return {"tokenizer_type": "NullTokenizer", "tokenizer_model": None}
