"""The layout to take: of those that fit into memory, the one with the shortest estimated step.

The estimate ranks layouts; it does not promise a speed. It counts work, idle time in the pipeline and
communication that nothing hides, with the round figures of `Speeds`. Days of training come from the model
FLOPs utilisation (MFU) that the user gives.
"""

import shlex
from dataclasses import asdict, dataclass
from typing import Any

from megatron_dyt.errors import UserError
from megatron_dyt.recipes import Recipe, memory
from megatron_dyt.recipes.layout import MICRO_BATCHES, Cluster, Layout, check, possible

# Fraction of a step. Steps that differ by less count as equal: the figures below are good to a tenth or so,
# and most of that error is common to the layouts compared.
UNSURE = 0.02

# A layer's collectives under sequence parallelism, each an all-gather or a reduce-scatter of the hidden
# states: 4 forward, and 6 backward, where inputs are gathered anew (arXiv 2205.05198). Recomputation repeats
# those of the forward pass: the MLP's 2, or all 4.
TENSOR_PARALLEL_PASSES = {"none": 10, "selective": 12, "full": 14}

# A matrix product reaches half of its speed where a dimension of it is this long: 128 columns on a rank,
# about the tile of one thread block, and 512 tokens. Guesses that keep the ranking from slicing ever thinner.
HALF_SPEED_WIDTH, HALF_SPEED_TOKENS = 128, 512

SECONDS_PER_DAY = 86400

# Other layouts that a report shows.
OTHERS_SHOWN = 4


@dataclass(frozen=True)
class Speeds:
    """Round figures of an H100 cluster, per GPU; only `peak` is the user's to give.

    Attributes:
        peak: dense bf16 FLOP/s.
        kernels: fraction of the peak that a layer's matrix products reach where they are large.
        node_link, network: bytes/s in one direction within a node (NVLink) and between nodes.
        exposed: fraction of data and pipeline parallel communication that computation does not hide.
    """

    peak: float = 989e12  # H100 SXM data sheet
    # Large bf16 products of cuBLAS on an H100 run at 600 to 700 TFLOP/s. Not measured here.
    kernels: float = 0.65
    # Data sheets: 450 GB/s in one direction for NVLink 4, 50 GB/s for an adapter of 400 Gb/s per GPU. That
    # collectives get 80 % of it is a guess.
    node_link: float = 0.8 * 450e9
    network: float = 0.8 * 50e9
    # A guess: Megatron overlaps all but the first and the last bucket, and what the links are too slow for.
    exposed: float = 0.25


@dataclass(frozen=True)
class Plan:
    """A layout with what it costs. Times in seconds per step."""

    recipe: Recipe
    cluster: Cluster
    layout: Layout
    memory: memory.Memory
    compute: float
    tensor_parallel: float
    pipeline: float
    data_parallel: float
    bubble: float

    @property
    def step(self) -> float:
        busy = self.compute + self.tensor_parallel + self.pipeline
        return busy / (1 - self.bubble) + self.data_parallel

    @property
    def fits(self) -> bool:
        return self.memory.total <= memory.USABLE * self.cluster.gpu_memory


def flops_per_token(recipe: Recipe) -> float:
    """Forward and backward FLOPs: 6 per parameter of a matrix product, and causal attention."""
    matrices = recipe.parameters_without_norms
    if not recipe.tie_embeddings:
        matrices -= recipe.vocab_size * recipe.hidden_size  # Looking up an embedding is no product.
    # Scores and weighted values take 12 L s h, of which the causal mask leaves half.
    attention = 6 * recipe.num_layers * recipe.seq_length * recipe.query_size
    return 6.0 * matrices + attention


def days(recipe: Recipe, gpus: int, mfu: float, peak: float) -> float:
    """Days for the whole run at a model FLOPs utilisation; `peak` in FLOP/s per GPU."""
    return recipe.tokens * flops_per_token(recipe) / (gpus * peak * mfu) / SECONDS_PER_DAY


def estimate(recipe: Recipe, cluster: Cluster, layout: Layout, speeds: Speeds) -> Plan:
    """The plan of one layout."""
    tokens = layout.micro_batch * recipe.seq_length
    hidden_states = memory.BF16 * tokens * recipe.hidden_size  # bytes
    micro_batches = layout.micro_batches(recipe)
    # Ring collectives move all but a rank's own part.
    moved = hidden_states * (layout.tp - 1) / layout.tp
    passes = recipe.num_layers / layout.pp * micro_batches * TENSOR_PARALLEL_PASSES[layout.recompute]
    # Each chunk hands activations on and takes gradients in, the hidden states split over TP.
    crossings = 2 * layout.vpp * micro_batches if layout.pp > 1 else 0
    sent = crossings * hidden_states / layout.tp
    parameters = memory.stage_parameters(recipe, layout, 0)
    # Gradients are reduced in fp32, weights gathered in bf16.
    reduced = (memory.FP32 + memory.BF16) * parameters * (layout.dp - 1) / layout.dp
    link = speeds.network if layout.tp * layout.dp > cluster.gpus_per_node else speeds.node_link
    return Plan(
        recipe=recipe,
        cluster=cluster,
        layout=layout,
        memory=memory.fullest(recipe, layout),
        compute=_compute(recipe, cluster, layout, speeds),
        tensor_parallel=passes * moved / speeds.node_link,
        pipeline=speeds.exposed * sent / speeds.network,
        data_parallel=speeds.exposed * reduced / link,
        bubble=layout.bubble(recipe),
    )


def _compute(recipe: Recipe, cluster: Cluster, layout: Layout, speeds: Speeds) -> float:
    """Seconds per step that a rank computes."""
    flops = flops_per_token(recipe)
    if layout.recompute == "full":  # Forward once more, which is a third.
        flops *= 4 / 3
    elif layout.recompute == "selective":  # The MLP's three matrices once more.
        flops += 2 * recipe.num_layers * 3 * recipe.hidden_size * recipe.ffn_hidden_size
    width, tokens = recipe.hidden_size / layout.tp, layout.micro_batch * recipe.seq_length
    efficiency = speeds.kernels * width / (width + HALF_SPEED_WIDTH) * tokens / (tokens + HALF_SPEED_TOKENS)
    return recipe.tokens_per_step / cluster.gpus * flops / (speeds.peak * efficiency)


def ranked(
    recipe: Recipe, cluster: Cluster, speeds: Speeds, fixed: dict[str, int | str] | None = None
) -> list[Plan]:
    """Plans that fit, best first: of those with about the shortest step the one that needs least memory,
    then the others by their step.

    Args:
        fixed: fields of `Layout` that are given, such as {"tp": 4}.

    Raises:
        UserError: no layout is possible on this cluster, or none fits into its memory.
    """
    wanted = fixed or {}
    if wanted.keys() >= {"tp", "pp", "vpp", "micro_batch"}:
        sizes: dict[str, Any] = dict(wanted)
        check(recipe, cluster, Layout(dp=max(1, cluster.gpus // (sizes["tp"] * sizes["pp"])), **sizes))
    micro_batches = (int(wanted["micro_batch"]),) if "micro_batch" in wanted else MICRO_BATCHES
    plans = [
        estimate(recipe, cluster, layout, speeds)
        for layout in possible(recipe, cluster, micro_batches)
        if all(getattr(layout, name) == value for name, value in wanted.items())
    ]
    if not plans:
        given = "".join(
            f" and --{name.replace('micro_batch', 'micro-batch-size')} {value}"
            for name, value in wanted.items()
        )
        raise UserError(
            f"{recipe.name} cannot be laid out on {cluster.nodes} x {cluster.gpus_per_node} GPUs{given}: "
            f"TP x PP x DP must be {cluster.gpus}, TP divide a node's GPUs and the "
            f"{recipe.num_attention_heads} heads, PP x VPP the {recipe.num_layers} layers, and DP x "
            f"micro-batch the {recipe.global_batch_size} sequences of a step. Numbers of nodes that are "
            "powers of two work best."
        )
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        best = min(plans, key=lambda plan: plan.memory.total)
        raise UserError(
            f"{recipe.name} does not fit on {cluster.nodes} x {cluster.gpus_per_node} GPUs of "
            f"{cluster.gpu_memory / 1e9:.0f} GB: the leanest layout ({best.layout.describe()}) needs "
            f"{best.memory.total / memory.USABLE / 1e9:.0f} GB. Take more nodes or larger GPUs."
        )
    fitting.sort(key=lambda plan: (plan.step, plan.layout.vpp))
    equal = [plan for plan in fitting if plan.step <= (1 + UNSURE) * fitting[0].step]
    best = min(equal, key=lambda plan: plan.memory.total)
    return [best, *(plan for plan in fitting if plan is not best)]


# --- for a program and for a reader ---------------------------------------------------------------


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
    """Lines for a reader: the first plan, its reasons, and the next ones; `duration` in days."""
    best, recipe, cluster = plans[0], plans[0].recipe, plans[0].cluster
    hours = 24 * duration * cluster.gpus
    lines = recipe.describe()
    lines += [
        f"cluster: {cluster.nodes} nodes x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory / 1e9:g} GB",
        f"layout: {best.layout.describe()}",
        *(f"  {reason}" for reason in reasons(plans)),
        f"memory of the fullest rank (pipeline stage {best.memory.stage}), GB:",
        *_memory_lines(best),
        f"step: {recipe.tokens_per_step / 1e6:.2f}M tokens, {best.layout.micro_batches(recipe)} "
        f"micro-batches per pipeline, bubble {best.bubble:.1%}",
        f"run: {recipe.train_iters} steps, {recipe.tokens / 1e9:.0f}B tokens, {duration:.1f} days at "
        f"{mfu:.0%} MFU ({f'{hours:,.0f}' if hours >= 100 else f'{hours:.1f}'} GPU-hours)",
        f"checkpoint: {memory.checkpoint_bytes(recipe) / 1e9:.0f} GB, weights and optimizer state",
        "others that fit (estimated step relative to this one, memory in GB):",
    ]
    for plan in plans[1 : 1 + OTHERS_SHOWN]:
        ratio, needed = plan.step / best.step, plan.memory.total / 1e9
        lines.append(f"  {plan.layout.describe()}: {ratio:.3f}, {needed:.0f}")
    return [*lines, "flags: " + shlex.join(best.layout.flags())]


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
