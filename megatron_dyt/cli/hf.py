"""Checkpoints to Hugging Face and back: `megatron-dyt export`, `import`, `convert`."""

import os
from pathlib import Path
from typing import Any

import click

from megatron_dyt.cli.options import PATH, POSITIVE


def _size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    from megatron_dyt.hf.directory import size_in_bytes

    try:
        return size_in_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _use_large_pages() -> None:
    """Read by PyTorch at its first allocation: new memory then costs a copy half as much time."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


_max_shard_size = click.option(
    "--max-shard-size",
    callback=_size,
    default="2GB",
    show_default=True,
    metavar="SIZE",
    help="Of a safetensors file, such as 500MB or 5GB.",
)


@click.command("export")
@click.option("--load", required=True, metavar="DIR", help="Checkpoint: what training had as --save.")
@click.option("--ckpt-step", type=int, metavar="N", help="Iteration (default: the latest).")
@click.option("--output", type=PATH, required=True, metavar="DIR", help="To write; must be new or empty.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the tensors (default: the checkpoint's).",
)
@click.option(
    "--fold-weight",
    is_flag=True,
    help="Fold DyT's weight and bias into the linear layers behind them, and the embedding's scale into the "
    "embedding: the same function up to rounding, with less to compute.",
)
@click.option("--tokenizer-model", metavar="FILE", help="Tokenizer instead of the checkpoint's path.")
@click.option(
    "--bos/--no-bos",
    default=None,
    help="Whether the tokenizer begins a text with BOS (default: as the training data do, by their manifest; "
    "with BOS where that is not in reach).",
)
@click.option("--no-tokenizer", is_flag=True, help="Export the model alone, with its padded vocabulary.")
@_max_shard_size
def export_command(
    load: str,
    ckpt_step: int | None,
    output: Path,
    dtype: str | None,
    fold_weight: bool,
    tokenizer_model: str | None,
    bos: bool | None,
    no_tokenizer: bool,
    max_shard_size: int,
) -> None:
    """Write a torch_dist checkpoint of a LLaMA, DyT or RMSNorm, as a Hugging Face model.

    Any parallel layout may have saved it. No GPU is needed and no model is built.
    """
    if no_tokenizer and (bos is not None or tokenizer_model):
        given = "--tokenizer-model and --bos, --no-bos"
        raise click.UsageError(f"{given} are about the tokenizer, which --no-tokenizer leaves out")
    _use_large_pages()
    import torch

    from megatron_dyt.checkpoints.saved_args import find_checkpoint, saved_args
    from megatron_dyt.hf.directory import check_free
    from megatron_dyt.hf.export import Export, export

    check_free("--output", output)
    checkpoint = find_checkpoint(load, ckpt_step)
    export(
        Export(
            checkpoint,
            saved_args(checkpoint),
            output,
            fold_weight=fold_weight,
            dtype=getattr(torch, dtype) if dtype else None,
            tokenizer=not no_tokenizer,
            tokenizer_model=tokenizer_model,
            bos=bos,
            max_shard_bytes=max_shard_size,
        )
    )


@click.command("import")
@click.option("--load", type=PATH, required=True, metavar="DIR", help="Directory of the Hugging Face model.")
@click.option("--save", type=PATH, required=True, metavar="DIR", help="To write; must be new or empty.")
def import_command(load: Path, save: Path) -> None:
    """Write a Hugging Face LLaMA, or an unfolded export, as a Megatron checkpoint for any parallel layout."""
    _use_large_pages()
    from megatron_dyt.hf.import_model import import_model

    import_model(load, save)


@click.command("convert")
@click.option("--load", type=PATH, required=True, metavar="DIR", help="Directory of a Hugging Face LLaMA.")
@click.option("--output", type=PATH, required=True, metavar="DIR", help="To write; must be new or empty.")
@click.option(
    "--text", type=PATH, required=True, metavar="FILE", help="Text such as the model was trained on."
)
@click.option(
    "--sequences", type=POSITIVE, default=16, show_default=True, metavar="N", help="To calibrate with."
)
@click.option("--length", type=POSITIVE, default=512, show_default=True, metavar="N", help="Tokens of each.")
@click.option("--no-bias", is_flag=True, help="DyT without a bias, as in the paper's LLaMA.")
@_max_shard_size
def convert_command(no_bias: bool, **options: Any) -> None:
    """Write a Hugging Face LLaMA as one with DyT, to be trained on. Experimental.

    Alpha, weight and bias of every DyT are fitted to what the norm in its place does with a text. The whole
    model is in memory, on the CPU.
    """
    from megatron_dyt.hf.convert import Conversion, convert

    convert(Conversion(**options, bias=not no_bias))
