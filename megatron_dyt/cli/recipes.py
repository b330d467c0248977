"""`recipe`, `plan` and `dry-run`: what a training will be, before it takes a GPU."""

import json
import math
import shlex
from typing import Any

import click

from megatron_dyt.cli.options import POSITIVE
from megatron_dyt.llama import NORMS
from megatron_dyt.recipes import load, memory, names
from megatron_dyt.recipes.layout import RECOMPUTE, Cluster
from megatron_dyt.recipes.plan import Plan, Speeds, as_json, days, ranked, report


class _Finite(click.FloatRange):
    """A range without NaN, which compares as inside of any."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


ABOVE_0 = _Finite(min=0, min_open=True)
NORM = click.Choice(NORMS)


@click.command()
@click.argument("model", required=False)
@click.option("--norm", type=NORM, default=NORMS[0], show_default=True)
@click.option("--format", "form", type=click.Choice(("text", "flags")), default="text", show_default=True)
def recipe(model: str | None, norm: str, form: str) -> None:
    """Show a training recipe, or Megatron's flags for it; without MODEL, list all."""
    if model is None:
        click.echo("\n".join(load(name).describe()[0] for name in names()))
        return
    found = load(model)
    flags = shlex.join(found.flags(norm))
    click.echo(flags if form == "flags" else "\n".join([*found.describe(), f"flags: {flags}"]))


@click.command()
@click.option("--model", required=True, help="A recipe; `megatron-dyt recipe` lists them.")
@click.option("--nodes", type=POSITIVE, default=1, show_default=True)
@click.option("--gpus-per-node", type=POSITIVE, default=8, show_default=True)
@click.option("--gpu-memory", type=ABOVE_0, default=80.0, show_default=True, help="GB (1e9 bytes) per GPU.")
@click.option(
    "--gpu-flops",
    type=ABOVE_0,
    default=989.0,
    show_default=True,
    help="Dense bf16 TFLOP/s; the default is an H100.",
)
@click.option(
    "--mfu",
    type=_Finite(min=0, min_open=True, max=1),
    default=0.4,
    show_default=True,
    help="Model FLOPs utilisation for the days.",
)
@click.option("--tp", type=POSITIVE, help="Tensor parallel size; what is not given is chosen.")
@click.option("--pp", type=POSITIVE, help="Pipeline parallel size.")
@click.option("--vpp", type=POSITIVE, help="Model chunks per pipeline rank.")
@click.option("--micro-batch-size", "micro_batch", type=POSITIVE, help="Sequences per micro-batch.")
@click.option(
    "--recompute", type=click.Choice(RECOMPUTE), help="Of activations: nothing, MLPs and norms, or layers."
)
@click.option(
    "--format", "form", type=click.Choice(("text", "json", "flags")), default="text", show_default=True
)
@click.option("--dry-run", is_flag=True, help="Try the plan's flags as well (with the text).")
@click.option("--norm", type=NORM, default=NORMS[0], show_default=True, help="For the dry run.")
def plan(
    model: str,
    nodes: int,
    gpus_per_node: int,
    gpu_memory: float,
    gpu_flops: float,
    mfu: float,
    form: str,
    dry_run: bool,
    norm: str,
    **sizes: int | str | None,
) -> None:
    """Parallel layout of a recipe on a cluster, and why; its memory, bubble and days.

    With --format flags Megatron's flags for it, which the launch scripts use. With --dry-run these are tried:
    Megatron's own validation, and every pipeline stage's model, without a GPU.
    """
    found, cluster, peak = load(model), Cluster(nodes, gpus_per_node, gpu_memory * 1e9), gpu_flops * 1e12
    given = {name: value for name, value in sizes.items() if value is not None}
    plans = ranked(found, cluster, Speeds(peak=peak), given)
    duration = days(found, cluster.gpus, mfu, peak)
    if form == "flags":
        click.echo(shlex.join(plans[0].layout.flags()))
    elif form == "json":
        click.echo(json.dumps(as_json(plans[0], duration, mfu), indent=2))
    else:
        click.echo("\n".join(report(plans, duration, mfu)))
        if dry_run:
            _try(plans[0], norm)


def _try(plan: Plan, norm: str) -> None:
    """Try the recipe's and the layout's flags; a launch script tries those that it adds as well."""
    from megatron_dyt.recipes import dry_run
    from megatron_dyt.training import gpu_needs

    recipe = plan.recipe
    tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(recipe.vocab_size - 1)]
    flags = [*recipe.flags(norm), *plan.layout.flags(), "--bf16", *gpu_needs.fusion_flags(), *tokenizer]
    parameters = memory.model_parameters(recipe, plan.layout, norm)
    lines = dry_run.run(flags, plan.cluster.gpus, recipe.vocab_size, parameters=parameters)
    click.echo("\n".join(lines))


@click.command("dry-run")
@click.option("--nodes", type=POSITIVE, default=1, show_default=True)
@click.option("--gpus-per-node", type=POSITIVE, default=8, show_default=True)
@click.option("--vocab-size", type=POSITIVE, help="Entries of the tokenizer.")
@click.option("--tokenizer-model", metavar="FILE", help="SentencePiece file, to count them.")
@click.option("--files", is_flag=True, help="Check tokenizer and data files too, as training does.")
@click.option("--parameters", type=POSITIVE, help="How many the whole model must have.")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="-- MEGATRON FLAGS")
def dry_run(
    nodes: int,
    gpus_per_node: int,
    vocab_size: int | None,
    tokenizer_model: str | None,
    files: bool,
    parameters: int | None,
    flags: tuple[str, ...],
) -> None:
    """Try the flags of a launch under a simulated world of that many GPUs, without any.

    Megatron's own parser and validation see them, and the model of every pipeline stage is built without
    storage. The ranks' parameters must add up to --parameters, where that is given.
    """
    if (vocab_size is None) == (tokenizer_model is None):
        raise click.UsageError("give one of --vocab-size and --tokenizer-model")
    from megatron_dyt.recipes import dry_run

    entries = vocab_size if tokenizer_model is None else dry_run.tokenizer_entries(tokenizer_model)
    assert entries is not None
    lines = dry_run.run(flags, nodes * gpus_per_node, entries, files=files, parameters=parameters)
    click.echo("\n".join(lines))
