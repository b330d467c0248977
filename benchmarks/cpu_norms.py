"""Time of DyT on CPU beside the norms it replaces: python benchmarks/cpu_norms.py [--json FILE]

Forward, backward and forward + backward of the DyT op, of RMSNorm as Megatron's local spec runs it
(torch.nn.RMSNorm, that is torch.nn.functional.rms_norm), of LayerNorm, and of DyT in plain torch.
All are timed in turn, round by round in one process, so that a change of the machine's load meets
all of them alike.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dyt.ops import dyt

SHAPES = ((1024, 256), (2048, 256), (4096, 512), (2048, 1024))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PHASES = ("forward", "backward", "both")


def make_layers(hidden: int) -> dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]]:
    """Name -> (layer, its parameters)."""

    def parameter(size: int, value: float) -> Tensor:
        return torch.full((size,), value).requires_grad_()

    weight, bias, alpha = parameter(hidden, 1.0), parameter(hidden, 0.0), parameter(1, 0.5)
    # rms_norm and layer_norm want parameters in x's dtype; DyT takes its in fp32 beside any x.
    return {
        "dyt": (lambda x: dyt(x, alpha, weight, bias), [alpha, weight, bias]),
        "dyt_nobias": (lambda x: dyt(x, alpha, weight), [alpha, weight]),
        "rmsnorm": (
            lambda x: F.rms_norm(x, (hidden,), weight.to(x.dtype), 1e-5),
            [weight],
        ),
        "layernorm": (
            lambda x: F.layer_norm(x, (hidden,), weight.to(x.dtype), bias.to(x.dtype), 1e-5),
            [weight, bias],
        ),
        "dyt_eager": (
            lambda x: weight.to(x.dtype) * torch.tanh(alpha.to(x.dtype) * x) + bias.to(x.dtype),
            [alpha, weight, bias],
        ),
    }


def time_round(
    layer: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor, dy: Tensor
) -> dict[str, float]:
    """Seconds of one forward, one backward, and their sum."""
    start = time.perf_counter()
    y = layer(x)
    middle = time.perf_counter()
    torch.autograd.grad(y, [x, *parameters], dy)
    end = time.perf_counter()
    return {"forward": middle - start, "backward": end - middle, "both": end - start}


def quartiles(seconds: list[float]) -> dict[str, float]:
    """Median, quartiles and minimum in microseconds."""
    low, median, high = (1e6 * q for q in statistics.quantiles(seconds, n=4))
    return {
        "median_us": median,
        "quartile1_us": low,
        "quartile3_us": high,
        "min_us": 1e6 * min(seconds),
    }


def measure(tokens: int, hidden: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Layer -> phase -> quartiles, after a tenth of the rounds as warm-up."""
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden, dtype=dtype).requires_grad_()
    dy = torch.randn(tokens, hidden, dtype=dtype)
    layers = make_layers(hidden)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in layers}
    for i in range(rounds + rounds // 10):
        for name, (layer, parameters) in layers.items():
            sample = time_round(layer, parameters, x, dy)
            if i >= rounds // 10:
                samples[name].append(sample)
    return {
        name: {phase: quartiles([s[phase] for s in taken]) for phase in PHASES}
        for name, taken in samples.items()
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"\n{result['tokens']} x {result['hidden']} {result['dtype']}, microseconds")
    print(
        f"{'':12}{'forward':>10}{'backward':>10}{'both':>10}   {'quartiles':18}{'/ rmsnorm':>10}"
        f"{'minima':>10}"
    )
    rms = result["layers"]["rmsnorm"]["both"]
    for name, phases in result["layers"].items():
        medians = "".join(f"{phases[phase]['median_us']:10.0f}" for phase in PHASES)
        both = phases["both"]
        spread = f"{both['quartile1_us']:.0f} - {both['quartile3_us']:.0f}"
        ratios = "".join(f"{both[key] / rms[key]:10.2f}" for key in ("median_us", "min_us"))
        print(f"{name:12}{medians}   {spread:18}{ratios}")


def write_json(path: Path, report: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--rounds", type=int, default=100, help="timed rounds a shape (default 100)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args(argv)
    if args.threads < 1 or args.rounds < 2:
        parser.error("--threads must be at least 1 and --rounds at least 2")
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": {"processor": platform.machine(), "simd": torch.backends.cpu.get_cpu_capability()},
        "threads": args.threads,
        "rounds": args.rounds,
        "results": [],
    }
    print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} interleaved rounds, medians")
    for tokens, hidden in SHAPES:
        layers = measure(tokens, hidden, DTYPES[args.dtype], args.rounds)
        result = {"tokens": tokens, "hidden": hidden, "dtype": args.dtype, "layers": layers}
        report["results"].append(result)
        print_table(result)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
