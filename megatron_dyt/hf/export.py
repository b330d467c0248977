"""Export a Megatron checkpoint as a Hugging Face model.

Reads torch_dist checkpoints of LLaMA models, DyT or RMSNorm, saved at any parallel layout, and writes
safetensors, configuration, tokenizer, model card and, for DyT, the modeling file. No GPU and no model is
needed; two modules' tensors are in memory at a time.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_dyt.checkpoints.saved_args import Checkpoint
from megatron_dyt.checkpoints.torch_dist import TorchDistReader
from megatron_dyt.data.tokenizer_check import check_against_data, check_vocabulary
from megatron_dyt.errors import UserError, some
from megatron_dyt.hf import mapping, modeling_llama_dyt
from megatron_dyt.hf.directory import (
    MAX_SHARD_BYTES,
    check_free,
    check_space,
    whole_directory,
    write_tensors,
)
from megatron_dyt.hf.mapping import EMBEDDING, LAYERS, megatron_sizes
from megatron_dyt.hf.model import MODELING_FILE, Model
from megatron_dyt.hf.model_card import model_card
from megatron_dyt.hf.tokenizer import TokenizerFacts, type_of, write_tokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """What is exported, and how.

    Attributes:
        args: the checkpoint's stored arguments.
        fold_weight: put DyT's weight and bias into the linear layers behind them.
        dtype: of the exported tensors; None for the checkpoint's own.
        tokenizer: whether to export the run's tokenizer.
        tokenizer_model: its place, where it is not the one in `args`.
        bos: what its texts begin with; see `write_tokenizer`.
        max_shard_bytes: size of a safetensors file.
    """

    checkpoint: Checkpoint
    args: Namespace
    output: Path
    fold_weight: bool = False
    dtype: torch.dtype | None = None
    tokenizer: bool = True
    tokenizer_model: str | None = None
    bos: bool | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES


def export(job: Export) -> None:
    """Write the export; its directory is complete or absent.

    Raises:
        UserError: a model without a LLaMA form, a checkpoint that does not hold the tensors its
            arguments describe, no room for the output, or a tokenizer that cannot be exported or is
            another than the run's.
    """
    started = time.monotonic()
    check_free("--output", job.output)
    model = Model.from_megatron(job.args)
    folded = _folded_roles(model) if job.fold_weight else ()
    args = _with_tokenizer(job)
    source = ModelSource(job.checkpoint.directory, model)
    with whole_directory(job.output) as directory:
        tokenizer = None
        has_tokenizer = args.tokenizer_type != "NullTokenizer"
        if job.bos is not None and not has_tokenizer:
            raise UserError("--bos and --no-bos: the run had no tokenizer; give one with --tokenizer-model")
        if job.tokenizer and has_tokenizer:
            tokenizer = write_tokenizer(args, directory, job.bos)
            check_against_data(args, args.tokenizer_model)
            check_vocabulary(tokenizer.vocab_size, job.args, args.tokenizer_model, job.checkpoint.directory)
            model = model.with_vocabulary(tokenizer.vocab_size)
        plan = Plan(model, folded, job.dtype or source.dtype)
        check_space("--output", job.output, plan.bytes)
        _write_texts(directory, plan, tokenizer, job.checkpoint.iteration)
        write_tensors(directory, plan.tensors, partial(plan.make, source.read), job.max_shard_bytes)
    seconds = time.monotonic() - started
    _log.info(
        f"exported {job.checkpoint.directory} to {job.output}: {plan.bytes / 1e9:.2f} GB in {seconds:.0f} s"
    )
    if model.embedding_scale is not None and not model.scale_is_folded(folded):
        # Of the conditions in docs/serving.md the only one that not every export fulfils.
        _log.warning(
            "SGLang cannot serve this export: it puts a plain embedding in the place of one with a scale "
            "(docs/serving.md). For SGLang, export with --fold-weight"
        )


def _with_tokenizer(job: Export) -> Namespace:
    """The stored arguments, with the tokenizer that was given."""
    args = Namespace(**vars(job.args))
    if job.tokenizer_model:
        args.tokenizer_model = job.tokenizer_model
        if args.tokenizer_type == "NullTokenizer":
            args.tokenizer_type = type_of(job.tokenizer_model)
    return args


class Plan:
    """The tensors of an export before there are values.

    Attributes:
        folded: roles whose DyT is folded; see `mapping.exported`.
        tensors: all of them by name, on the meta device.
        bytes, parameters: of all of them together.
    """

    def __init__(self, model: Model, folded: Sequence[str], dtype: torch.dtype) -> None:
        self.model, self.folded, self.dtype = model, folded, dtype
        self._modules = mapping.hf_tensors(model, folded, dtype)
        self.tensors = {name: tensor for made in self._modules.values() for name, tensor in made.items()}
        self.bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self.parameters = sum(tensor.numel() for tensor in self.tensors.values())

    def make(self, read: mapping.Read, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """These tensors, module by module. A module whose tensors lie in two files is made for each."""
        for module, planned in self._modules.items():
            if wanted := planned.keys() & names:
                made = mapping.exported(module, self.model, read, self.folded)
                yield {name: made[name].to(self.dtype) for name in wanted}


def _folded_roles(model: Model) -> tuple[str, ...]:
    """The roles whose weight can go into the linear layer behind them.

    Not the final one where the output layer is the embedding, nor one with a bias: LLaMA's output layer has
    none, so what serves LLaMAs may know of none.
    """
    if model.dyt is None:
        raise UserError(
            "--fold-weight is for DyT models: Hugging Face has no RMSNorm without a weight. Leave it out"
        )
    within = ("attn", "ffn")
    return within if model.hf_shape(within).tie_embeddings or model.dyt.bias else (*within, "final")


def _write_texts(directory: Path, plan: Plan, tokenizer: TokenizerFacts | None, iteration: int) -> None:
    from transformers import GenerationConfig

    config = plan.model.hf_config(plan.dtype, tokenizer, plan.folded)
    config.save_pretrained(str(directory))
    GenerationConfig.from_model_config(config).save_pretrained(str(directory))
    if plan.model.dyt is not None:
        shutil.copyfile(str(modeling_llama_dyt.__file__), directory / MODELING_FILE)
    card = model_card(plan.model, plan.parameters, plan.dtype, iteration, plan.folded, tokenizer is not None)
    (directory / "README.md").write_text(card)


class ModelSource:
    """The tensors of a checkpoint by the names of `mapping.NAMES`.

    Layers may be stored stacked, or one by one as `decoder.layers.N.name`.

    Raises:
        UserError: the checkpoint's tensors are not those of `model`.
    """

    def __init__(self, directory: Path, model: Model) -> None:
        self._reader = TorchDistReader(directory)
        self._stacked = not any(re.match(rf"{LAYERS}\d+\.", key) for key in self._reader.tensors)
        self._check(directory, model)
        self.dtype: torch.dtype = self._reader.tensors[f"{EMBEDDING}weight"][1]

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        """The tensor `name`; where its name has an N, that of layer N."""
        if layer is None or not self._stacked:
            return self._reader.read(name.replace(".N.", f".{layer}."))
        return self._reader.read(name.replace(".N.", "."), layer)

    def _check(self, directory: Path, model: Model) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        layers = model.shape.num_layers
        for row, sizes in megatron_sizes(model).items():
            for name, size in sizes.items():
                key = row + name
                if ".N." not in row:
                    expected[key] = size
                elif self._stacked:
                    expected[key.replace(".N.", ".")] = (layers, *size)
                else:
                    expected |= {key.replace(".N.", f".{layer}."): size for layer in range(layers)}
        found = {key: tuple(size) for key, (size, _) in self._reader.tensors.items()}
        if found != expected:
            raise UserError(
                f"the tensors in {directory} are not those of the model that its stored arguments describe. "
                f"{_difference(expected, found)}. Was the model changed by other code, or the checkpoint "
                "edited?"
            )


def _difference(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str:
    groups = {
        "Missing": sorted(expected.keys() - found.keys()),
        "Unknown": sorted(found.keys() - expected.keys()),
        "Of another shape": [
            f"{key} {found[key]} instead of {expected[key]}"
            for key in sorted(expected.keys() & found.keys())
            if expected[key] != found[key]
        ],
    }
    return ". ".join(f"{what}: {some(keys)}" for what, keys in groups.items() if keys)
