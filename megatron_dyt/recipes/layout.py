"""A parallel layout of a recipe on a cluster, and all the layouts that Megatron would accept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_dyt.errors import UserError
from megatron_dyt.recipes import Recipe

RECOMPUTE = ("none", "selective", "full")
# Sequences. Larger ones are no faster, as a sequence of a recipe fills a GPU, and need more memory.
MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Cluster:
    """What the run has: nodes, their GPUs, and each GPU's memory in bytes."""

    nodes: int
    gpus_per_node: int
    gpu_memory: float

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Layout:
    """Sizes of a parallel layout.

    Attributes:
        tp, pp, dp: tensor, pipeline and data parallel sizes; sequence parallelism is on when tp > 1.
        vpp: model chunks per pipeline rank; 1 without interleaving.
        micro_batch: sequences per micro-batch.
        recompute: "none", "selective" (each MLP and norm) or "full" (each layer).
    """

    tp: int
    pp: int
    vpp: int
    dp: int
    micro_batch: int
    recompute: str = "none"

    def micro_batches(self, recipe: Recipe) -> int:
        """Micro-batches per step and pipeline."""
        return recipe.global_batch_size // (self.dp * self.micro_batch)

    def layers_per_chunk(self, recipe: Recipe) -> int:
        return recipe.num_layers // (self.pp * self.vpp)

    def bubble(self, recipe: Recipe) -> float:
        """Fraction of a step that a pipeline rank idles: (p - 1) / (v m + p - 1), arXiv 2104.04473."""
        idle = self.pp - 1
        return idle / (self.vpp * self.micro_batches(recipe) + idle)

    def flags(self) -> list[str]:
        """Megatron's flags for this layout."""
        flags = [
            *("--tensor-model-parallel-size", str(self.tp)),
            *("--pipeline-model-parallel-size", str(self.pp)),
            *("--micro-batch-size", str(self.micro_batch)),
            "--use-distributed-optimizer",
            "--overlap-grad-reduce",
            "--overlap-param-gather",
        ]
        if self.tp > 1:
            flags.append("--sequence-parallel")
        if self.vpp > 1:
            flags += ["--num-virtual-stages-per-pipeline-rank", str(self.vpp)]
        if self.recompute == "full":
            flags += ["--recompute-granularity", "full", "--recompute-method", "uniform"]
            flags += ["--recompute-num-layers", "1"]
        elif self.recompute == "selective":
            flags += ["--recompute-granularity", "selective", "--recompute-modules", "layernorm", "mlp"]
        return flags

    def describe(self) -> str:
        virtual = f" x {self.vpp} virtual" if self.vpp > 1 else ""
        return (
            f"TP {self.tp}  PP {self.pp}{virtual}  DP {self.dp}  micro-batch {self.micro_batch}  "
            f"recompute {self.recompute}"
        )


def faults(recipe: Recipe, cluster: Cluster, layout: Layout) -> list[str]:
    """Why Megatron would not take this layout; empty when it would."""
    tp, pp, vpp, dp = layout.tp, layout.pp, layout.vpp, layout.dp
    found = []
    if tp * pp * dp != cluster.gpus:
        found.append(f"TP {tp} x PP {pp} x DP {dp} is {tp * pp * dp} GPUs; the cluster has {cluster.gpus}")
    if tp > cluster.gpus_per_node or cluster.gpus_per_node % tp:
        found.append(f"TP {tp} does not divide the {cluster.gpus_per_node} GPUs of a node")
    if recipe.num_attention_heads % tp:
        found.append(f"TP {tp} does not divide {recipe.num_attention_heads} attention heads")
    if recipe.num_query_groups % tp and tp % recipe.num_query_groups:
        found.append(f"TP {tp} neither divides {recipe.num_query_groups} query groups nor is a multiple")
    if recipe.ffn_hidden_size % tp:
        found.append(f"TP {tp} does not divide the FFN's width {recipe.ffn_hidden_size}")
    if recipe.num_layers % (pp * vpp):
        found.append(f"PP {pp} x {vpp} chunks does not divide {recipe.num_layers} layers")
    if vpp > 1 and pp < 2:
        found.append("virtual stages need PP of at least 2")
    step = dp * layout.micro_batch
    if recipe.global_batch_size % step:
        found.append(
            f"DP {dp} x micro-batch {layout.micro_batch} does not divide the batch of "
            f"{recipe.global_batch_size} sequences"
        )
    elif vpp > 1 and layout.micro_batches(recipe) % pp:
        found.append(
            f"virtual stages need a multiple of PP {pp} micro-batches, there are "
            f"{layout.micro_batches(recipe)}"
        )
    return found


def check(recipe: Recipe, cluster: Cluster, layout: Layout) -> None:
    """Raise UserError with every reason why the layout cannot run."""
    found = faults(recipe, cluster, layout)
    if found:
        raise UserError(
            f"{layout.describe()} cannot train {recipe.name} on {cluster.nodes} x {cluster.gpus_per_node} "
            f"GPUs: {'; '.join(found)}. `megatron-dyt plan` without sizes of your own shows what can."
        )


def possible(
    recipe: Recipe, cluster: Cluster, micro_batches: Sequence[int] = MICRO_BATCHES
) -> Iterator[Layout]:
    """Every layout that Megatron would take, with these micro-batches."""
    for tp in _divisors(cluster.gpus_per_node):
        for pp in _divisors(recipe.num_layers):
            if cluster.gpus % (tp * pp):
                continue
            dp = cluster.gpus // (tp * pp)
            for vpp in _divisors(recipe.num_layers // pp) if pp > 1 else [1]:
                for micro_batch in micro_batches:
                    for recompute in RECOMPUTE:
                        layout = Layout(tp, pp, vpp, dp, micro_batch, recompute)
                        if not faults(recipe, cluster, layout):
                            yield layout


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
