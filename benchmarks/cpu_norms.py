"""Time of DyT on CPU beside the norms it replaces: python benchmarks/cpu_norms.py [--output DIR]

Forward, backward and their sum of the DyT op, of RMSNorm as Megatron's local spec runs it
(torch.nn.RMSNorm, that is torch.nn.functional.rms_norm), of LayerNorm, and of DyT as one would write it
in PyTorch. All are timed in turn, round by round in one process, with the memory settings of the CPU
runtime, in which Megatron runs them.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common_picture import Bar, bars_svg
from common_report import add_output, heading, markdown_table, new_report, save
from common_timing import WallClock, in_turn, summary
from torch import Tensor

from megatron_dyt import cpu
from megatron_dyt.ops import dyt

# Tokens x hidden. The first is what a norm of `make quickstart` gets; the last shows the cost of a call.
SHAPES = ((4096, 192), (4096, 512), (2048, 1024), (1024, 2048), (1024, 4096), (16, 192))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PHASES = ("forward", "backward", "both")
# Calls of one sample, where one takes less time than it takes to measure it.
CALLS, FEW_ELEMENTS = 100, 1 << 13
# Of the process's threads together, forward and backward: other work on the machine is no part of it.
CPU_TIME = "CPU time"


def make_layers(
    hidden: int, dtype: torch.dtype
) -> dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]]:
    """Name -> (layer, its parameters)."""

    def parameter(size: int, value: float) -> Tensor:
        return torch.full((size,), value, dtype=dtype).requires_grad_()

    weight, bias, alpha = parameter(hidden, 1.0), parameter(hidden, 0.0), parameter(1, 0.5)
    return {
        "dyt": (lambda x: dyt(x, alpha, weight), [alpha, weight]),
        "dyt bias": (lambda x: dyt(x, alpha, weight, bias), [alpha, weight, bias]),
        "rmsnorm": (lambda x: F.rms_norm(x, (hidden,), weight, 1e-5), [weight]),
        "layernorm": (lambda x: F.layer_norm(x, (hidden,), weight, bias, 1e-5), [weight, bias]),
        "dyt eager": (lambda x: weight * torch.tanh(alpha * x), [alpha, weight]),
    }


def measure(tokens: int, hidden: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Layer -> phase -> quartiles of one call, after a tenth of the rounds as warm-up."""
    torch.manual_seed(0)
    calls = range(CALLS if tokens * hidden < FEW_ELEMENTS else 1)
    x = torch.randn(tokens, hidden, dtype=dtype).requires_grad_()
    dy = torch.randn(tokens, hidden, dtype=dtype)
    layers = make_layers(hidden, dtype)
    seconds: dict[str, dict[str, list[float]]] = {
        name: {p: [] for p in (*PHASES, CPU_TIME)} for name in layers
    }
    clock = WallClock()
    for name, (layer, parameters), counts in in_turn(layers, rounds, 1 + rounds // 10):
        sample: list[float] = []
        start = time.process_time()
        ys = clock.call(sample, lambda layer=layer: [layer(x) for _ in calls])
        leaves = (x, *parameters)
        clock.call(sample, lambda ys=ys, leaves=leaves: [torch.autograd.grad(y, leaves, dy) for y in ys])
        cpu_time = time.process_time() - start
        del ys
        if counts:
            for into, value in zip(seconds[name].values(), (*sample, sum(sample), cpu_time), strict=True):
                into.append(value / len(calls))
    return {
        name: {phase: summary(values) for phase, values in taken.items()} for name, taken in seconds.items()
    }


def over_rmsnorm(result: dict[str, Any], phase: str, layer: str = "dyt") -> float:
    """Of medians."""
    layers = result["layers"]
    return layers[layer][phase]["median_us"] / layers["rmsnorm"][phase]["median_us"]


def print_result(result: dict[str, Any]) -> None:
    print(f"\n{result['tokens']} x {result['hidden']}, {result['threads']} threads, microseconds")
    columns = "".join(f"{name:>10}" for name in (*PHASES, "/ rmsnorm", CPU_TIME))
    print(f"{'':12}{columns}   quartiles")
    for name, phases in result["layers"].items():
        medians = "".join(f"{phases[phase]['median_us']:10.0f}" for phase in PHASES)
        ratios = "".join(f"{over_rmsnorm(result, phase, layer=name):10.2f}" for phase in ("both", CPU_TIME))
        both = phases["both"]
        print(f"{name:12}{medians}{ratios}   {both['quartile1_us']:.0f} - {both['quartile3_us']:.0f}")


def table(report: dict[str, Any]) -> str:
    """DyT over RMSNorm by shape and phase, medians; the last column is the ratio of both's CPU time."""
    columns = ("tokens x hidden", "threads", "RMSNorm, us", "DyT, us", *PHASES, CPU_TIME)
    rows = []
    for result in report["results"]:
        medians = [result["layers"][layer]["both"]["median_us"] for layer in ("rmsnorm", "dyt")]
        ratios = [over_rmsnorm(result, phase) for phase in (*PHASES, CPU_TIME)]
        shape = f"{result['tokens']} x {result['hidden']}"
        rows.append(
            [shape, str(result["threads"]), *(f"{m:.0f}" for m in medians), *(f"{r:.2f}" for r in ratios)]
        )
    return markdown_table(columns, rows)


def picture(report: dict[str, Any]) -> str:
    groups = []
    for result in report["results"]:
        rms = result["layers"]["rmsnorm"]
        bars = []
        for i, phase in enumerate(PHASES):
            dyt_times = result["layers"]["dyt"][phase]
            keys = ("median_us", "quartile1_us", "quartile3_us")
            values = [dyt_times[key] / rms[phase]["median_us"] for key in keys]
            bars.append(Bar(phase, *values, i))
        groups.append((f"{result['tokens']} x {result['hidden']}, {result['threads']} threads", bars))
    return bars_svg("DyT on CPU", "time over RMSNorm's median", groups, reference=1.0)


def shape(text: str) -> tuple[int, int]:
    tokens, hidden = map(int, text.split("x"))
    return tokens, hidden


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", help="torch threads (default 1 and all cores)")
    parser.add_argument("--rounds", type=int, default=50, help="timed rounds per shape (default 50)")
    parser.add_argument(
        "--shapes", nargs="+", type=shape, default=SHAPES, metavar="TOKENSxHIDDEN", help="default: six"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    add_output(parser)
    args = parser.parse_args(argv)
    threads = args.threads or sorted({1, os.cpu_count() or 1})
    if min(threads) < 1 or args.rounds < 2:
        parser.error("--threads must be at least 1 and --rounds at least 2")
    report = new_report("cpu_norms", "cpu", {"dtype": args.dtype, "rounds": args.rounds})
    print(f"{heading(report)}, {args.dtype}, {args.rounds} interleaved rounds, medians")
    cpu.enable()
    try:
        for tokens, hidden in args.shapes:
            for count in threads:
                torch.set_num_threads(count)
                layers = measure(tokens, hidden, DTYPES[args.dtype], args.rounds)
                result = {"tokens": tokens, "hidden": hidden, "threads": count, "layers": layers}
                report["results"].append(result)
                print_result(result)
    finally:
        cpu.disable()
    save(report, picture(report), args.output)


if __name__ == "__main__":
    main()
