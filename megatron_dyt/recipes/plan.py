"""Plan a run: `python -m megatron_dyt.planning --model 70b --nodes 128 --gpus-per-node 8 --gpu-memory 80`.

Prints the parallel layout to take and why, the memory of its fullest rank, the pipeline's bubble, tokens a
step and days. `--format flags` prints Megatron's flags for it, which the launch scripts use. `--dry-run` then
tries them: Megatron's own validation, and every pipeline stage's model, without a GPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict

from megatron_dyt import recipes
from megatron_dyt.errors import UserError, run_main
from megatron_dyt.recipes import layout, memory
from megatron_dyt.recipes.choose import Plan, Speeds, days, ranked

OTHERS_SHOWN = 4


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="megatron-dyt plan", description=__doc__.splitlines()[0])
    found.add_argument("--model", required=True, help=f"recipe: {', '.join(recipes.names())}")
    found.add_argument("--nodes", type=_positive, default=1)
    found.add_argument("--gpus-per-node", type=_positive, default=8)
    found.add_argument("--gpu-memory", type=float, default=80.0, help="GB (1e9 bytes) a GPU; default 80")
    found.add_argument(
        "--gpu-flops", type=float, default=989.0, help="dense bf16 TFLOP/s; default 989, an H100"
    )
    found.add_argument(
        "--mfu", type=float, default=0.4, help="model FLOPs utilisation for the days; default 0.4"
    )
    own = found.add_argument_group("sizes of your own (others are then chosen)")
    for name in ("tp", "pp", "vpp", "micro-batch-size"):
        own.add_argument(f"--{name}", type=_positive)
    own.add_argument("--recompute", choices=layout.RECOMPUTE)
    found.add_argument("--format", choices=("text", "json", "flags"), default="text")
    found.add_argument("--dry-run", action="store_true", help="try the plan's flags as well (with the text)")
    found.add_argument("--norm", choices=recipes.NORMS, default=recipes.NORMS[0], help="for the dry run")
    return found


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number of at least 1")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run the command; raises UserError for what cannot be planned."""
    args = parser().parse_args(argv)
    if args.gpu_memory <= 0 or args.gpu_flops <= 0 or not 0 < args.mfu <= 1:
        raise UserError(
            f"--gpu-memory {args.gpu_memory:g}, --gpu-flops {args.gpu_flops:g} and --mfu {args.mfu:g} were "
            "given; they must be positive, and the MFU at most 1."
        )
    recipe = recipes.load(args.model)
    cluster = layout.Cluster(args.nodes, args.gpus_per_node, args.gpu_memory * 1e9)
    plans = ranked(recipe, cluster, Speeds(peak=args.gpu_flops * 1e12), _fixed(args))
    duration = days(recipe, cluster.gpus, args.mfu, args.gpu_flops * 1e12)
    if args.format == "flags":
        print(shlex.join(plans[0].layout.flags()))
    elif args.format == "json":
        print(json.dumps(as_json(plans[0], duration, args.mfu), indent=2))
    else:
        print("\n".join(report(plans, duration, args.mfu)))
        if args.dry_run:
            return _dry_run(plans[0], args.norm)
    return 0


def _dry_run(plan: Plan, norm: str) -> int:
    """The recipe's and the layout's flags; a launch script tries those that it adds as well."""
    from megatron_dyt.recipes import dry_run

    recipe, cluster = plan.recipe, plan.cluster
    world = ["--nodes", str(cluster.nodes), "--gpus-per-node", str(cluster.gpus_per_node)]
    tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(recipe.vocab_size - 1)]
    flags = [*recipe.flags(norm), *plan.layout.flags(), "--bf16", *tokenizer]
    count = ["--parameters", str(memory.model_parameters(recipe, plan.layout, norm))]
    return dry_run.main([*world, *count, "--vocab-size", str(recipe.vocab_size), "--", *flags])


def _fixed(args: argparse.Namespace) -> dict[str, int | str]:
    """The sizes that the user has given."""
    given = {
        "tp": args.tp,
        "pp": args.pp,
        "vpp": args.vpp,
        "micro_batch": args.micro_batch_size,
        "recompute": args.recompute,
    }
    return {name: value for name, value in given.items() if value is not None}


def as_json(plan: Plan, duration: float, mfu: float) -> dict[str, object]:
    """The plan as data; bytes, seconds and days."""
    recipe = plan.recipe
    return {
        "model": recipe.name,
        "layout": asdict(plan.layout),
        "micro_batches": plan.layout.micro_batches(recipe),
        "memory": asdict(plan.memory) | {"total": plan.memory.total},
        "bubble": plan.bubble,
        "checkpoint": memory.checkpoint_bytes(recipe),
        "tokens_per_step": recipe.tokens_per_step,
        "days": duration,
        "gpu_hours": 24 * duration * plan.cluster.gpus,
        "mfu": mfu,
        "flags": plan.layout.flags(),
    }


def report(plans: list[Plan], duration: float, mfu: float) -> list[str]:
    """The plan for a reader."""
    best, recipe, cluster = plans[0], plans[0].recipe, plans[0].cluster
    lines = recipe.describe()
    lines += [
        f"cluster: {cluster.nodes} nodes x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory / 1e9:g} GB",
        f"layout: {best.layout.describe()}",
        *(f"  {reason}" for reason in reasons(plans)),
        f"memory of the fullest rank (pipeline stage {best.memory.stage}), GB:",
        *_memory_lines(best),
        f"step: {recipe.tokens_per_step / 1e6:.2f}M tokens, {best.layout.micro_batches(recipe)} "
        f"micro-batches a pipeline, bubble {best.bubble:.1%}",
        f"run: {recipe.train_iters} steps, {recipe.tokens / 1e9:.0f}B tokens, {duration:.1f} days at "
        f"{mfu:.0%} MFU ({_hours(24 * duration * cluster.gpus)} GPU-hours)",
        f"checkpoint: {memory.checkpoint_bytes(recipe) / 1e9:.0f} GB, weights and optimizer state",
        "others that fit (estimated step relative to this one, memory in GB):",
    ]
    for plan in plans[1 : 1 + OTHERS_SHOWN]:
        ratio, needed = plan.step / best.step, plan.memory.total / 1e9
        lines.append(f"  {plan.layout.describe()}: {ratio:.3f}, {needed:.0f}")
    return [*lines, "flags: " + shlex.join(best.layout.flags())]


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.1f}"


def reasons(plans: list[Plan]) -> list[str]:
    """Why the first plan: what its communication and its memory come to."""
    best = plans[0]
    busy = best.compute
    usable = memory.USABLE * best.cluster.gpu_memory / 1e9
    found = [
        f"why: of {len(plans)} layouts that fit into {usable:.0f} GB ({memory.USABLE:.0%} of a GPU) it has "
        "about the shortest estimated step, and of its equals it needs the least memory"
    ]
    if best.layout.tp > 1:
        found.append(
            f"TP {best.layout.tp}, within a node: its communication is {best.tensor_parallel / busy:.1%} of "
            "the computing"
        )
    if best.layout.pp > 1:
        found.append(
            f"PP {best.layout.pp} x {best.layout.vpp} chunks: bubble {best.bubble:.1%}, exposed sends "
            f"{best.pipeline / busy:.1%} of the computing"
        )
    found.append(
        f"DP {best.layout.dp}: exposed gradient and weight traffic {best.data_parallel / busy:.1%} of the "
        "computing"
    )
    return found


def _memory_lines(plan: Plan) -> list[str]:
    used = plan.memory
    parts = {
        "weights (bf16)": used.weights,
        "gradients (fp32)": used.gradients,
        f"optimizer (fp32, over DP {plan.layout.dp})": used.optimizer,
        "activations": used.activations,
        "logits": used.logits,
        "CUDA, NCCL": memory.RESERVE,
        "total": used.total,
    }
    return [f"  {name:<32}{size / 1e9:8.1f}" for name, size in parts.items()]


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
