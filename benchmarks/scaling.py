"""What DyT adds over RMSNorm to the communication of a training step, counted for layouts too large to try.

    python benchmarks/scaling.py [--write]

Prints the tables of docs/scaling.md; --write puts them there. Nothing here depends on the sequence's length
or the batch: what is added are parameters, which are reduced once per step, and the guard's flags.
`tests/distributed/test_scaling.py` compares the count with what real runs of two processes hand to their
collectives. Bytes are those handed to a collective, not those on the wire, which depend on its algorithm.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_dyt.recipes import Recipe, load
from megatron_dyt.recipes.layout import Layout
from megatron_dyt.recipes.memory import BF16, FP32, stage_parameters

DOCS = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
# Elements. The distributed optimizer starts every parameter at a multiple of this many elements
# (megatron/core/optimizer/param_layout.py).
ALIGNMENT = 64
# mcore/guard.py: two flags of 4 bytes, reduced over all ranks.
GUARD_BYTES = 8

MAX_RANKS = 4096
# Recipe -> layouts shown: tensor x pipeline x data parallel ranks.
SHOWN = {
    "7b": ((1, 1, 8), (2, 1, 256), (2, 1, 2048)),
    "13b": ((2, 1, 32), (2, 2, 128), (4, 2, 512)),
    "34b": ((4, 2, 16), (8, 2, 64), (8, 4, 128)),
    "70b": ((8, 4, 8), (8, 4, 32), (8, 8, 64), (8, 16, 32)),
}


@dataclass(frozen=True)
class Stage:
    """The part of a model that a pipeline rank has; DyT's settings as in `DyTConfig`."""

    layers: int
    hidden: int
    first: bool = True
    last: bool = True
    bias: bool = False
    embedding_scale: bool = True
    qk_norm: bool = False
    head_dim: int = 0

    def extra(self) -> list[int]:
        """Lengths of the parameters that DyT has and RMSNorm has not: alpha and bias of each site, and
        the embedding scale."""
        in_layers = self._of_sites(2 * self.layers + self.last, self.hidden)
        return in_layers + self.extra_qk() + [1] * (self.first and self.embedding_scale)

    def extra_qk(self) -> list[int]:
        """Those of them on queries and keys, of which each tensor parallel rank has its heads' part of the
        gradient, with or without sequence parallelism."""
        return self._of_sites(2 * self.layers, self.head_dim) if self.qk_norm else []

    def _of_sites(self, sites: int, width: int) -> list[int]:
        return ([1, width] if self.bias else [1]) * sites


@dataclass(frozen=True)
class Added:
    """What one rank hands to its collectives in a step more than with RMSNorm, in bytes.

    Attributes:
        parameters: elements.
        reduction: gradients, over the data parallel ranks.
        gather: parameters, over the data parallel ranks (distributed optimizer only).
        sequence: gradients of replicated parameters, over the tensor parallel ranks.
        guard: over all ranks.
        collectives: calls that RMSNorm does not have.
    """

    parameters: int
    reduction: int
    gather: int
    sequence: int
    guard: int
    collectives: int

    @property
    def total(self) -> int:
        return self.reduction + self.gather + self.sequence + self.guard


def added(
    stage: Stage,
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    distributed_optimizer: bool = True,
    sequence_parallel: bool = True,
    gradient_bytes: int = FP32,
    parameter_bytes: int = BF16,
) -> Added:
    """Count for one rank of `stage`.

    Gradients ride in collectives that RMSNorm has too: the data parallel buffer, which grows, and, under
    sequence parallelism, one flattened all-reduce of all replicated gradients. With the distributed
    optimizer every parameter takes a multiple of `ALIGNMENT` elements of the buffer. Left out is the end
    of a bucket, which Megatron pads to a common multiple of DP and 128 elements with either norm.
    """
    lengths = stage.extra()
    count = sum(lengths)
    partial = count if sequence_parallel else sum(stage.extra_qk())
    buffer = sum(aligned(length) for length in lengths) if distributed_optimizer else count
    return Added(
        parameters=count,
        reduction=buffer * gradient_bytes if dp > 1 else 0,
        gather=buffer * parameter_bytes if dp > 1 and distributed_optimizer else 0,
        sequence=partial * gradient_bytes if tp > 1 else 0,
        guard=GUARD_BYTES if tp * pp * dp > 1 else 0,
        collectives=1 if tp * pp * dp > 1 else 0,
    )


def aligned(length: int) -> int:
    """Elements that a parameter takes in the distributed optimizer's buffer."""
    return math.ceil(length / ALIGNMENT) * ALIGNMENT


def stages(recipe: Recipe, pp: int) -> Iterator[Stage]:
    """The pipeline stages of a recipe's model, equally filled."""
    for index in range(pp):
        yield Stage(
            recipe.num_layers // pp,
            recipe.hidden_size,
            first=index == 0,
            last=index == pp - 1,
            bias=recipe.bias,
        )


def worst(recipe: Recipe, tp: int, pp: int, dp: int) -> tuple[Added, float]:
    """The rank that gets the most, and the share of its parameters that this is."""
    layout = Layout(tp, pp, 1, dp, 1)
    counts = [(added(stage, tp=tp, pp=pp, dp=dp), index) for index, stage in enumerate(stages(recipe, pp))]
    most, index = max(counts, key=lambda each: each[0].total)
    return most, most.parameters / (stage_parameters(recipe, layout, index) - most.parameters)


def layouts(recipe: Recipe) -> Iterator[tuple[int, int, int]]:
    """Every TP x PP x DP of powers of two with at most `MAX_RANKS` ranks that the model can be split into."""
    powers = [2**i for i in range(int(math.log2(MAX_RANKS)) + 1)]
    for tp in (1, 2, 4, 8):
        for pp in (power for power in powers if recipe.num_layers % power == 0):
            yield from ((tp, pp, dp) for dp in powers if tp * pp * dp <= MAX_RANKS)


def report() -> str:
    """The tables, in Markdown."""
    lines = [
        "| Size | TP × PP × DP | Ranks | Parameters added | of the rank's | Gradient reduction (DP) "
        "| Parameter gather (DP) | Norm gradients (TP) | Guard (all) | Collectives |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size, shown in SHOWN.items():
        for tp, pp, dp in shown:
            most, share = worst(load(size), tp, pp, dp)
            lines.append(
                f"| {size.upper()} | {tp} × {pp} × {dp} | {tp * pp * dp} | {most.parameters} | {share:.1e} | "
                f"+{most.reduction:,} B | +{most.gather:,} B | +{most.sequence:,} B | +{most.guard} B | "
                f"+{most.collectives} |"
            )
    return "\n".join([*lines, "", _extremes()])


def _extremes() -> str:
    """The most of everything, over all layouts of all sizes shown."""
    found = [
        (*worst(recipe, *layout), recipe.name, layout)
        for recipe in map(load, SHOWN)
        for layout in layouts(recipe)
    ]
    # Of equals the largest layout.
    most, _, size, (tp, pp, dp) = max(found, key=lambda each: (each[0].total, *each[1:]))
    share = max(share for _, share, _, _ in found)
    calls = max(counted.collectives for counted, _, _, _ in found)
    return (
        f"Over all {len(found)} layouts of powers of two (TP to 8, up to {MAX_RANKS:,} ranks) of these "
        f"sizes, no rank hands more than {most.total:,} B per step more to its collectives ({size.upper()}, "
        f"TP {tp}, PP {pp}, DP {dp}), no rank has more than {share:.1e} of its parameters more, and no step "
        f"has more than {calls} collective more."
    )


def main(argv: list[str] | None = None) -> None:
    from common_report import write_into  # Which the tests that import this file by its folder do not find.

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {DOCS.name}, between its marks")
    args = parser.parse_args(argv)
    print(text := report())
    if args.write:
        write_into(DOCS, "scaling", text)


if __name__ == "__main__":
    main()
