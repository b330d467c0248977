"""The launch table of this GPU by timing: python benchmarks/tune.py [--output DIR]

Tries other rows of `megatron_dyt/ops/launch_table.json` for this chip: forward with residual by accesses per
thread, backward with residual by accesses and resident programs, which set the register limit. All candidates
of a shape take turns; one is taken over the shipped row when it is at least 2 % faster over all shapes and
computes the same. Writes DIR/launch_table.json, which MEGATRON_DYT_LAUNCH_TABLE puts into use. No training
run tunes anything.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common_report import add_output, heading, markdown_table, new_report, save_figures
from common_timing import Clock, DeviceClock, WallClock, in_turn, summary
from torch import Tensor

from megatron_dyt.atomic import write_json
from megatron_dyt.ops import triton_dyt, triton_launch
from megatron_dyt.ops.parameters import Parameters
from megatron_dyt.ops.triton_launch import Plan

SHAPES = ((16384, 4096), (16384, 8192))
FORWARD = (2, 4, 8)
# (accesses in flight, resident programs): more of one leaves registers for fewer of the other.
BACKWARD = ((2, 3), (2, 4), (2, 6), (4, 2), (4, 3), (4, 4), (8, 2))
# Below, two runs of the same code differ.
GAIN = 0.98
REGISTERS = 65536


def candidates(plan: Plan, part: str) -> dict[str, Plan]:
    """Name -> plan: the shipped one, and those that differ in `part`, which is forward, tanh or erf."""
    found = {"shipped": plan}
    if part == "forward":
        found |= {f"{n} accesses": plan._replace(forward=n) for n in FORWARD if n != plan.forward}
        return found
    for accesses, resident in BACKWARD:
        # Granted in eights; no thread can have more than 255.
        limit = min(248, REGISTERS // (resident * plan.warps * 32) // 8 * 8)
        fields = {part: accesses, "resident": resident, "max_registers": limit}
        found[f"{accesses} accesses, {resident} programs"] = plan._replace(**fields)
    return {name: p for name, p in found.items() if name == "shipped" or p != plan}


@contextmanager
def in_use(key: tuple[str, int], plan: Plan) -> Iterator[None]:
    before = triton_launch.PLANS[key]
    triton_launch.PLANS[key] = plan
    try:
        yield
    finally:
        triton_launch.PLANS[key] = before


def make_call(
    part: str, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> Callable[[], list[Tensor]]:
    """Forward or backward, with a residual and the gradients of all parameters, on data of its own."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    x, residual, dy = (random(*shape, dtype=dtype) for _ in range(3))
    function = "erf" if part == "erf" else "tanh"
    shift = random(1) if part == "erf" else None
    alpha = torch.full((1,), 0.7, device=device)
    parameters = Parameters(alpha, 1 + 0.1 * random(shape[1]), 0.1 * random(shape[1]), shift, function)
    if part == "forward":
        return lambda: list(triton_dyt.residual_forward(x, residual, parameters))
    needs = [True] * 4 + [shift is not None]
    return lambda: triton_dyt.backward(dy, x, parameters, needs, residual)


def differs(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Sums have another order in another plan; what is one value per element has not."""
    return not all(
        torch.equal(a, b)
        if a.dim() > 1
        else torch.allclose(a, b, rtol=1e-4, atol=1e-3 * b.abs().max().item())
        for a, b in zip(found, expected, strict=True)
    )


def compare(
    key: tuple[str, int], plans: dict[str, Plan], call: Callable[[], list[Tensor]], clock: Clock, rounds: int
) -> dict[str, dict[str, float]]:
    """Candidate -> times, of those that work and compute what the shipped plan does."""
    with in_use(key, plans["shipped"]):
        expected = call()
    working = {}
    for name, plan in plans.items():
        with in_use(key, plan):
            try:
                if not differs(call(), expected):
                    working[name] = plan
            except Exception as error:  # a plan that does not compile is none
                print(f"  {name}: {type(error).__name__}: {str(error)[:100]}")
    seconds: dict[str, list[float]] = {name: [] for name in working}
    for name, plan, counts in in_turn(working, rounds, 3):
        with in_use(key, plan):
            clock.call(seconds[name] if counts else [], call)
        clock.collect()
    return {name: summary(taken) for name, taken in seconds.items()}


def best(rows: list[dict[str, Any]]) -> str:
    """The candidate of the smallest geometric mean of times over the shipped one's; that, if none gains."""
    names = set.intersection(*(set(row["times"]) for row in rows))

    def relative(name: str) -> float:
        ratios = [row["times"][name]["median_us"] / row["times"]["shipped"]["median_us"] for row in rows]
        return math.prod(ratios) ** (1 / len(ratios))

    fastest = min(names, key=relative)
    return fastest if relative(fastest) < GAIN else "shipped"


def tune(args: argparse.Namespace, report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the table for this chip; what was timed goes into the report."""
    family = triton_launch.chip_of(torch.device(args.device)).family
    clock = WallClock() if args.device == "cpu" else DeviceClock()
    table: dict[str, Any] = {family: {}}
    for dtype in (torch.bfloat16, torch.float32):
        key = (family, dtype.itemsize)
        plan = triton_launch.PLANS[key]
        # erf after tanh: with the programs that tanh has chosen.
        for part in ("forward", "tanh", "erf"):
            plans = candidates(plan, part)
            if part == "erf":
                plans = {n: p for n, p in plans.items() if p.resident == plan.resident}
            rows = []
            for shape in args.shapes:
                times = compare(key, plans, make_call(part, shape, dtype, args.device), clock, args.rounds)
                name = str(dtype).removeprefix("torch.")
                rows.append({"dtype": name, "part": part, "shape": shape, "times": times})
            report["results"] += rows
            chosen = best(rows)
            rows[0]["chosen"] = chosen
            plan = plans[chosen]
        table[family][str(dtype.itemsize)] = plan._asdict()
    return table


def table(report: dict[str, Any]) -> str:
    columns = ("dtype", "part", "tokens x hidden", "candidate", "us", "over shipped")
    rows = []
    for row in report["results"]:
        shipped = row["times"]["shipped"]["median_us"]
        for name, times in row["times"].items():
            where = (row["dtype"], row["part"], " x ".join(map(str, row["shape"])))
            rows.append([*where, name, f"{times['median_us']:.1f}", f"{times['median_us'] / shipped:.3f}"])
    return markdown_table(columns, rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="timed calls per candidate (default 30)")
    parser.add_argument(
        "--rehearse", action="store_true", help="Triton's interpreter on a CPU, one tiny shape"
    )
    add_output(parser)
    args = parser.parse_args(argv)
    args.device = "cpu" if args.rehearse else "cuda"
    args.shapes = ((8, 64),) if args.rehearse else SHAPES
    report = new_report("tune", args.device, {"rounds": args.rounds})
    print(heading(report))
    made = tune(args, report)
    report["table"] = made
    print(table(report))
    print(made)
    if args.output:
        write_json(args.output / "launch_table.json", made)
    save_figures(report, args.output)


if __name__ == "__main__":
    main()
