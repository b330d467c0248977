"""`megatron-dyt probe`: what the norms of a model do."""

from typing import Any

import click

from megatron_dyt.cli.options import PATH, POSITIVE


@click.command()
@click.option(
    "--load",
    type=PATH,
    required=True,
    metavar="DIR",
    help="Checkpoint: what training had as --save; or a Hugging Face model's directory.",
)
@click.option("--ckpt-step", type=POSITIVE, metavar="N", help="Iteration (default: the latest).")
@click.option("--output", type=PATH, required=True, metavar="DIR", help="Where to write.")
@click.option(
    "--data-path",
    metavar="PREFIX",
    help="Indexed data set to take tokens from (default: the run's validation or training data).",
)
@click.option("--text", type=PATH, metavar="FILE", help="UTF-8 text to take tokens from.")
@click.option(
    "--sequences", type=POSITIVE, default=8, show_default=True, metavar="N", help="Sequences to look at."
)
@click.option(
    "--length",
    type=POSITIVE,
    metavar="N",
    help="Tokens of each (default: the model's positions, up to 1024).",
)
@click.option(
    "--iterations",
    type=POSITIVE,
    default=8,
    show_default=True,
    metavar="N",
    help="Checkpoints of the run to look at for alpha over training, where it wrote no dyt_stats.jsonl.",
)
@click.option("--tokenizer-model", metavar="FILE", help="Tokenizer instead of the checkpoint's path.")
@click.option("--device", metavar="{auto,cpu,cuda}", help="Where to run (default: CUDA if there is any).")
def probe(**options: Any) -> None:
    """Show what each norm of a model, LayerNorm, RMSNorm or DyT, does to its input.

    Output against input by token and by channel with the nearest tanh, alpha against 1/std, saturation,
    kurtosis and gradients by layer: figures as PNG and SVG, numbers as CSV.
    """
    from megatron_dyt.probe.run import probe

    click.echo(probe(**options))
