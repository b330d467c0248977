"""Export a Megatron checkpoint as a Hugging Face model: `python -m megatron_dyt.hf.export`.

Reads torch_dist checkpoints of LLaMA models, DyT or RMSNorm, saved at any parallel layout, and writes
safetensors, configuration, tokenizer, model card and, for DyT, the modeling file. One tensor (at most
the fused query-key-value or gate-up weight of a layer, or the embedding) is in memory at a time; no GPU
and no model is needed.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dyt.checkpoints.saved_args import Checkpoint, find_checkpoint, saved_args
from megatron_dyt.checkpoints.torch_dist import TorchDistReader
from megatron_dyt.errors import UserError, run_main
from megatron_dyt.hf import mapping, modeling_llama_dyt
from megatron_dyt.hf.config import MODELING_FILE, hf_config
from megatron_dyt.hf.mapping import EMBEDDING, LAYERS, Part, hf_parts
from megatron_dyt.hf.model_card import model_card
from megatron_dyt.hf.output_directory import check_free, check_space, whole_directory
from megatron_dyt.hf.safetensors_io import DTYPES, Shard, plan_shards, tensor_bytes, write_shards
from megatron_dyt.hf.shape import LlamaShape, llama_shape
from megatron_dyt.hf.tokenizer import TokenizerFacts, write_tokenizer

_log = logging.getLogger(__name__)

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Export:
    """What is exported, and how.

    Attributes:
        fold_weight: put DyT's weight and bias into the linear layers behind them.
        dtype: of the exported tensors; None for the checkpoint's own.
        tokenizer: whether to export the run's tokenizer.
        bos: what its texts begin with; see `write_tokenizer`.
        max_shard_bytes: size of a safetensors file.
    """

    checkpoint: Checkpoint
    args: Namespace
    output: Path
    fold_weight: bool = False
    dtype: torch.dtype | None = None
    tokenizer: bool = True
    bos: bool | None = None
    max_shard_bytes: int = 5 * 10**9


def main(argv: list[str] | None = None) -> None:
    """Export as `argv` (default: the command line) says; `UserError` for what cannot work."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    check_free("--output", options.output)
    checkpoint = find_checkpoint(options.load, options.ckpt_step)
    args = saved_args(checkpoint)
    if options.tokenizer_model:
        args.tokenizer_model = options.tokenizer_model
    export(
        Export(
            checkpoint,
            args,
            options.output,
            fold_weight=options.fold_weight,
            dtype=DTYPE_NAMES[options.dtype] if options.dtype else None,
            tokenizer=not options.no_tokenizer,
            bos=options.bos,
            max_shard_bytes=options.max_shard_size,
        )
    )


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m megatron_dyt.hf.export", description=__doc__)
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="checkpoint: what training had as --save")
    add("--ckpt-step", type=int, metavar="N", help="iteration (default: the latest)")
    add("--output", required=True, type=Path, metavar="DIR", help="directory to write; must be new or empty")
    add("--dtype", choices=DTYPE_NAMES, help="of the tensors (default: the checkpoint's)")
    add(
        "--fold-weight",
        action="store_true",
        help="fold DyT's weight and bias into the linear layers behind them: the same function up to "
        "rounding, with less to compute",
    )
    add("--tokenizer-model", metavar="FILE", help="tokenizer instead of the checkpoint's path")
    add(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="the tokenizer begins a text with BOS, not with an end of document (default: as the training "
        "data do, by their manifest; BOS where that is not in reach)",
    )
    add("--no-tokenizer", action="store_true", help="export the model alone, with its padded vocabulary")
    add(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="of a safetensors file, such as 500MB or 5GB (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    if options.no_tokenizer and options.bos is not None:
        parser.error("--bos and --no-bos are about the tokenizer, which --no-tokenizer leaves out")
    return options


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]B)?", text.strip(), re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} given; give a size such as 500MB or 5GB")
    return int(match[1]) * _UNITS[(match[2] or "").upper()]


# --- the export -----------------------------------------------------------------------------------


def export(job: Export) -> None:
    """Write the export; its directory is complete or absent.

    Raises:
        UserError: a model without a LLaMA form, a checkpoint that does not hold the tensors its
            arguments describe, no room for the output, or a tokenizer that cannot be exported.
    """
    check_free("--output", job.output)
    started = time.monotonic()
    shape = llama_shape(job.args)
    folded = folded_roles(shape) if job.fold_weight else ()
    source = ModelSource(job.checkpoint.directory, shape)
    dtype = job.dtype or source.dtype
    with whole_directory(job.output) as directory:
        tokenizer = _tokenizer(job, directory)
        if tokenizer is not None:
            shape = _trimmed(shape, tokenizer, job)
        parts = list(hf_parts(shape, source, folded))
        size = sum(tensor_bytes(tensor, dtype) for part in parts for tensor in part.shapes.values())
        check_space("--output", job.output, size)
        shards = plan_shards(parts, dtype, job.max_shard_bytes)
        _write_texts(directory, job, shape, shards, dtype, tokenizer, folded)
        write_shards(directory, _reported(parts, shape), shards, dtype)
    seconds = time.monotonic() - started
    _log.info(f"exported {job.checkpoint.directory} to {job.output}: {size / 1e9:.2f} GB in {seconds:.0f} s")


def folded_roles(shape: LlamaShape) -> tuple[str, ...]:
    """The roles whose weight can go into the linear layer behind them.

    Not the final one of a model with a shared embedding: its output layer is the embedding.
    """
    if shape.dyt is None:
        raise UserError(
            "--fold-weight is for DyT models: Hugging Face has no RMSNorm without a weight. Leave it out"
        )
    return ("attn", "ffn") if shape.tied else ("attn", "ffn", "final")


def _tokenizer(job: Export, directory: Path) -> TokenizerFacts | None:
    if not job.tokenizer or job.args.tokenizer_type == "NullTokenizer":
        return None
    return write_tokenizer(job.args, directory, job.bos)


def _trimmed(shape: LlamaShape, tokenizer: TokenizerFacts, job: Export) -> LlamaShape:
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(
            f"the tokenizer {job.args.tokenizer_model} has {tokenizer.vocab_size} tokens, but the model in "
            f"{job.checkpoint.directory} knows at most {shape.vocab_size}. Give the tokenizer of its "
            "training data with --tokenizer-model"
        )
    return shape.with_vocabulary(tokenizer.vocab_size)


def _write_texts(
    directory: Path,
    job: Export,
    shape: LlamaShape,
    shards: list[Shard],
    dtype: torch.dtype,
    tokenizer: TokenizerFacts | None,
    folded: tuple[str, ...],
) -> None:
    from transformers import GenerationConfig

    config = hf_config(shape, dtype, tokenizer, folded)
    config.save_pretrained(str(directory))
    GenerationConfig.from_model_config(config).save_pretrained(str(directory))
    if shape.dyt is not None:
        shutil.copyfile(str(modeling_llama_dyt.__file__), directory / MODELING_FILE)
    card = model_card(
        shape,
        parameters=sum(torch.Size(size).numel() for shard in shards for size in shard.shapes.values()),
        dtype=dtype,
        iteration=job.checkpoint.iteration,
        folded=folded,
        has_tokenizer=tokenizer is not None,
    )
    (directory / "README.md").write_text(card)


def _reported(parts: list[Part], shape: LlamaShape) -> Iterator[Part]:
    """`parts`, with a line at each tenth of them."""
    for number, part in enumerate(parts, 1):
        yield part
        if shape.num_layers >= 8 and number * 10 // len(parts) > (number - 1) * 10 // len(parts):
            _log.info(f"{number * 100 // len(parts)} % written")


class ModelSource:
    """The tensors of a checkpoint by the names of `mapping.megatron_shapes`.

    Layers may be stored stacked, or one by one as `decoder.layers.N.name`.

    Raises:
        UserError: the checkpoint's tensors are not those of `shape`.
    """

    def __init__(self, directory: Path, shape: LlamaShape) -> None:
        self._reader = TorchDistReader(directory)
        self._stacked = not any(re.match(rf"{LAYERS}\d+\.", key) for key in self._reader.tensors)
        self._check(directory, shape)
        self.dtype: torch.dtype = self._reader.tensors[EMBEDDING][1]

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        if layer is None or self._stacked:
            return self._reader.read(key, layer)
        return self._reader.read(self._single(key, layer))

    @staticmethod
    def _single(key: str, layer: int) -> str:
        return f"{LAYERS}{layer}.{key.removeprefix(LAYERS)}"

    def _check(self, directory: Path, shape: LlamaShape) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for key, size in mapping.megatron_shapes(shape).items():
            if self._stacked or not key.startswith(LAYERS):
                expected[key] = size
            else:
                expected |= {self._single(key, layer): size[1:] for layer in range(size[0])}
        found = {key: tuple(size) for key, (size, _) in self._reader.tensors.items()}
        if found != expected:
            raise UserError(
                f"the tensors in {directory} are not those of the model that its stored arguments describe. "
                f"{_difference(expected, found)}. Was the model changed by other code, or the checkpoint "
                "edited?"
            )


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    groups = {
        "Missing": sorted(expected.keys() - found.keys()),
        "Unknown": sorted(found.keys() - expected.keys()),
        "Of another shape": [
            f"{key} {found[key]} instead of {expected[key]}"
            for key in sorted(expected.keys() & found.keys())
            if expected[key] != found[key]
        ],
    }
    return ". ".join(
        f"{what}: {', '.join(keys[:4])}" + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        for what, keys in groups.items()
        if keys
    )


if __name__ == "__main__":
    run_main(main)
