"""`megatron-dyt eval` and `megatron-dyt eval-data`."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from megatron_dyt.cli.options import PATH, POSITIVE
from megatron_dyt.errors import UserError
from megatron_dyt.evaluation.batches import DEFAULT_BATCH_TOKENS, MODES


def _names(_context: click.Context, _option: click.Parameter, text: str) -> list[str]:
    names = [name for name in (part.strip() for part in text.split(",")) if name]
    if not names:
        raise UserError("--tasks names no task; give lm-eval tasks, separated by commas")
    return names


_include_path = click.option(
    "--include-path", metavar="DIR", help="directory with more tasks (lm-eval YAML files)"
)


@click.command("eval")
@click.option("--load", required=True, metavar="DIR", help="checkpoint: what training had as --save")
@click.option("--ckpt-step", type=POSITIVE, metavar="N", help="iteration (default: the latest)")
@click.option("--tokenizer-model", metavar="FILE", help="tokenizer instead of the checkpoint's path")
@click.option(
    "--bos/--no-bos",
    default=None,
    help="begin contexts with BOS, not with an end of document (default: as the training data do, by their "
    "manifest; BOS where that is not in reach)",
)
@click.option(
    "--tasks",
    required=True,
    callback=_names,
    metavar="A,B",
    help="lm-eval tasks or groups; dyt_paper: the paper's 15",
)
@_include_path
@click.option(
    "--task-data",
    type=PATH,
    metavar="DIR",
    help="read the tasks' data from here, not from the Hub: what megatron-dyt eval-data wrote",
)
@click.option("--limit", type=POSITIVE, metavar="N", help="only the first N documents of each task")
@click.option("--output", required=True, type=PATH, metavar="FILE", help="where to write the results, JSON")
@click.option(
    "--tensor-model-parallel-size",
    "--tp",
    "tensor_parallel",
    type=POSITIVE,
    metavar="N",
    help="processes that hold a model together (default: the fewest whose memory suffices)",
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default="auto",
    help="shared: common contexts once; flat: each request alone, with the model's own attention (flash "
    "attention where it has it); auto: shared where the model allows it",
)
@click.option(
    "--batch-tokens",
    type=POSITIVE,
    default=DEFAULT_BATCH_TOKENS,
    show_default=True,
    metavar="N",
    help="tokens in one forward pass, padding included",
)
@click.option("--max-length", type=POSITIVE, metavar="N", help="of a sequence (default: the model's)")
@click.option("--cache", type=PATH, metavar="DIR", help="keep results here, and take known ones from here")
@click.option("--device", metavar="{auto,cpu,cuda}", help="where to run (default: CUDA if there is any)")
def evaluate(**options: Any) -> None:
    """Evaluate a checkpoint on lm-eval tasks, zero-shot.

    Runs alone or under torchrun (torchrun --nproc-per-node N -m megatron_dyt eval ...). Model, tokenizer and
    their flags come from the checkpoint, whatever parallel layout saved it; `--tasks dyt_paper` is the 15
    tasks of the paper.
    """
    from megatron_dyt.evaluation.evaluate import evaluate

    tables = evaluate(**options, command=shlex.join(["megatron-dyt", *sys.argv[1:]]))
    if tables is not None:
        click.echo(tables)


@click.command("eval-data")
@click.option("--output", required=True, type=PATH, metavar="DIR", help="where to write the files")
@click.option(
    "--tasks",
    default="dyt_paper",
    callback=_names,
    metavar="A,B",
    help="lm-eval tasks or groups (default: the paper's 15)",
)
@_include_path
def export_data(output: Path, tasks: list[str], include_path: str | None) -> None:
    """Fetch the data of lm-eval tasks from the Hub into files for machines without network.

    DIR is what `megatron-dyt eval --task-data DIR` reads: TASK.SPLIT.jsonl for each task.
    """
    from megatron_dyt.evaluation.task_loading import export_documents

    export_documents(tasks, output, include_path)
