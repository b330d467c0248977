"""The layout to take: of those that fit into memory, the one with the shortest estimated step.

The estimate ranks layouts; it does not promise a speed. It counts work, idle time in the pipeline and
communication that nothing hides, with the round figures of `Speeds`. Days of training come from the model
FLOPs utilisation (MFU) that the user gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_dyt.errors import UserError
from megatron_dyt.recipes import Recipe, memory
from megatron_dyt.recipes.layout import Cluster, Layout, check, possible

# The estimate cannot tell steps apart that differ by less than this fraction.
UNSURE = 0.02


@dataclass(frozen=True)
class Speeds:
    """Round figures of an H100 cluster, per GPU.

    Attributes:
        peak: dense bf16 FLOP/s (H100 SXM data sheet: 989e12).
        kernels: fraction of the peak that the matrix products of a layer reach.
        node_link, network: bytes/s in one direction within a node (NVLink) and between nodes (one 400 Gb/s
            adapter a GPU), at 80 % of the nominal rate.
        exposed: fraction of data and pipeline parallel communication that computation does not hide.
    """

    peak: float = 989e12
    kernels: float = 0.65
    node_link: float = 0.8 * 450e9
    network: float = 0.8 * 50e9
    exposed: float = 0.25


@dataclass(frozen=True)
class Plan:
    """A layout with what it costs. Times in seconds a step."""

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


def flops_a_token(recipe: Recipe) -> float:
    """Forward and backward FLOPs of a token: 6 a parameter of a matrix product, and causal attention."""
    matrices = recipe.parameters_without_norms
    if not recipe.tie_embeddings:
        matrices -= recipe.vocab_size * recipe.hidden_size  # Looking up an embedding is no product.
    attention = 6 * recipe.num_layers * recipe.seq_length * recipe.hidden_size
    return 6.0 * matrices + attention


def days(recipe: Recipe, gpus: int, mfu: float, peak: float) -> float:
    """Days for the whole run at a model FLOPs utilisation."""
    return recipe.tokens * flops_a_token(recipe) / (gpus * peak * mfu) / 86400


def estimate(recipe: Recipe, cluster: Cluster, layout: Layout, speeds: Speeds) -> Plan:
    """The plan of one layout."""
    tokens = layout.micro_batch * recipe.seq_length
    micro_batches = layout.micro_batches(recipe)
    extra = {"none": 1.0, "selective": 7 / 6, "full": 4 / 3}[layout.recompute]
    # Narrow matrix products use less of the GPU; 512 columns cost about as much as the launch of one.
    narrow = recipe.hidden_size / layout.tp
    efficiency = speeds.kernels * narrow / (narrow + 128) * tokens / (tokens + 512)
    share = recipe.tokens_per_step / cluster.gpus
    compute = extra * share * flops_a_token(recipe) / (speeds.peak * efficiency)
    # Sequence parallel all-gathers and reduce-scatters: 4 a layer forward, 6 backward (arXiv 2205.05198).
    gathered = 10 * extra * memory.BF16 * tokens * recipe.hidden_size * (layout.tp - 1) / layout.tp
    tensor_parallel = recipe.num_layers / layout.pp * micro_batches * gathered / speeds.node_link
    # Each chunk hands activations on and takes gradients in, the hidden states split over TP.
    crossings = 2 * layout.vpp * micro_batches if layout.pp > 1 else 0
    sent = crossings * memory.BF16 * tokens * recipe.hidden_size / layout.tp
    parameters = memory.stage_parameters(recipe, layout, 0)
    reduced = (memory.FP32 + memory.BF16) * parameters * (layout.dp - 1) / layout.dp
    link = speeds.network if layout.tp * layout.dp > cluster.gpus_per_node else speeds.node_link
    return Plan(
        recipe=recipe,
        cluster=cluster,
        layout=layout,
        memory=memory.fullest(recipe, layout),
        compute=compute,
        tensor_parallel=tensor_parallel,
        pipeline=speeds.exposed * sent / speeds.network,
        data_parallel=speeds.exposed * reduced / link,
        bubble=layout.bubble(recipe),
    )


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
    plans = [
        estimate(recipe, cluster, layout, speeds)
        for layout in possible(recipe, cluster)
        if all(getattr(layout, name) == value for name, value in wanted.items())
    ]
    if not plans:
        given = "".join(f" and {name} {value}" for name, value in wanted.items())
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
