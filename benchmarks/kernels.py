"""DyT's kernels beside every other way to do the same, on a GPU: python benchmarks/kernels.py

Forward and backward of DyT and of residual add + DyT; the same of RMSNorm. All peers of a shape are
timed in turn, round by round, in one process, with the L2 cache flushed before each; a time is that of
the kernels on the device (CUDA events), the launches hidden behind a kernel that waits. Reported are
medians and quartiles, GB/s of the bytes that the operation must move (activations only), their
fraction of the copy rate measured in the same run, the error of values and gradients against fp64, and
the time of one small call on the host. Peers that are not installed are named and left out.

Without a CUDA device it says so and measures the CPU path instead (benchmarks/cpu_norms.py).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import cpu_norms
import torch
from peers import PEERS, Inputs, Peer, Result, exact
from torch import Tensor

HIDDEN = (2048, 4096, 5120, 8192, 16384)
TOKENS = (1024, 4096, 8192, 16384, 65536)
QUICK_HIDDEN, QUICK_TOKENS = (4096, 8192), (1024, 16384)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PACKAGES = ("torch", "triton", "liger-kernel", "quack-kernels", "transformer-engine", "apex")
PHASES = ("forward", "backward")
DEVICE = "cuda"
# Cycles that the device waits before a timed call: some 0.5 ms, longer than the host takes to launch it.
HEAD_START = 1_000_000
SMALL = (16, 1024)


def make_inputs(tokens: int, hidden: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device=DEVICE).manual_seed(0)

    def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE, dtype=dtype)

    x, residual = (random(tokens, hidden, dtype=dtype) for _ in range(2))
    alpha = torch.tensor([0.7], device=DEVICE)
    tensors = (x, residual, alpha, 1 + 0.1 * random(hidden), 0.1 * random(hidden))
    return Inputs(*(t.requires_grad_() for t in tensors))


def used_inputs(peer: Peer) -> list[str]:
    """The leaves to differentiate."""
    dyt = peer.kind == "dyt"
    return ["x"] + ["residual"] * peer.residual + ["alpha"] * dyt + ["weight"] + ["bias"] * dyt


def gradients(peer: Peer, result: Result, inputs: Inputs, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """In the order of `used_inputs`; None where a peer has a weight of its own, and does not use ours."""
    outputs = result if isinstance(result, tuple) else (result,)
    leaves = [getattr(inputs, name) for name in used_inputs(peer)]
    return torch.autograd.grad(outputs, leaves, [upstream] * len(outputs), allow_unused=True)


class Timer:
    """Times single calls on the device, each with a cold L2."""

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(4 * max(l2, 1 << 25), dtype=torch.int8, device="cuda")
        self.pending: list[tuple[list[float], torch.cuda.Event, torch.cuda.Event]] = []

    def call(self, into: list[float], function: Callable[[], Any]) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(HEAD_START)
        start.record()
        result = function()
        end.record()
        self.pending.append((into, start, end))
        return result

    def collect(self) -> None:
        """Wait, and put the times, in seconds, where they belong."""
        torch.cuda.synchronize()
        for into, start, end in self.pending:
            into.append(start.elapsed_time(end) / 1e3)
        self.pending.clear()


def summary(seconds: list[float]) -> dict[str, float]:
    low, median, high = (1e6 * q for q in statistics.quantiles(seconds, n=4))
    return {"median_us": median, "quartile1_us": low, "quartile3_us": high, "min_us": 1e6 * min(seconds)}


def measure_copy(timer: Timer, rounds: int) -> float:
    """Bytes a second, read and written, of torch's copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    seconds: list[float] = []
    for i in range(rounds + 3):
        timer.call(seconds if i >= 3 else [], lambda: target.copy_(source))
        timer.collect()
    return 2 * source.numel() / statistics.median(seconds)


def moved_bytes(peer: Peer, phase: str, elements: int, itemsize: int) -> int:
    """What the operation must read and write: x -> y; x, residual -> y, sum; and the same back.

    Backward reads dy and DyT's or RMSNorm's input, and dsum with a residual, and writes dx.
    """
    tensors = {"forward": 4 if peer.residual else 2, "backward": 4 if peer.residual else 3}
    return tensors[phase] * elements * itemsize


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the error, relative to that of the exact values."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def errors(peer: Peer, run: Callable[[Inputs], Result], hidden: int, dtype: torch.dtype) -> dict[str, float]:
    """Error of values and gradients against fp64, at 512 tokens; of a weight that the peer keeps, none."""
    inputs = make_inputs(512, hidden, dtype)
    upstream = torch.randn(512, hidden, device=DEVICE, dtype=dtype)
    result = run(inputs)
    found = {"y": result[0] if isinstance(result, tuple) else result}
    for name, gradient in zip(used_inputs(peer), gradients(peer, result, inputs, upstream), strict=True):
        if gradient is not None:
            found[f"d{name}"] = gradient
    expected = exact(peer, inputs, upstream)
    return {name: relative_error(tensor, expected[name]) for name, tensor in found.items()}


def host_time(peer: Peer, run: Callable[[Inputs], Result], dtype: torch.dtype) -> dict[str, float]:
    """Host time of forward + backward where the device has next to nothing to do."""
    inputs = make_inputs(*SMALL, dtype)
    upstream = torch.ones(SMALL, device=DEVICE, dtype=dtype)
    seconds = []
    for i in range(130):
        torch.cuda.synchronize()
        start = time.perf_counter()
        gradients(peer, run(inputs), inputs, upstream)
        torch.cuda.synchronize()
        if i >= 30:
            seconds.append(time.perf_counter() - start)
    return summary(seconds)


def working_peers(hidden: int, dtype: torch.dtype, left_out: dict[str, str]) -> dict[str, Any]:
    """Name -> (peer, function) of those that are installed and run; the others' reasons go to left_out."""
    found = {}
    for peer in PEERS:
        try:
            run = peer.make(hidden, dtype)
            inputs = make_inputs(64, hidden, dtype)
            gradients(peer, run(inputs), inputs, torch.ones_like(inputs.x))
            torch.cuda.synchronize()
        except Exception as error:  # a peer's fault must not end the run
            left_out[f"{peer.name}, hidden {hidden}"] = f"{type(error).__name__}: {error}"[:200]
        else:
            found[peer.name] = (peer, run)
    return found


def measure_shape(
    timer: Timer,
    tokens: int,
    hidden: int,
    dtype: torch.dtype,
    rounds: int,
    peers: dict[str, Any],
    copy_rate: float,
) -> dict[str, Any]:
    """Peer -> phase -> times and rates."""
    inputs = make_inputs(tokens, hidden, dtype)
    upstream = torch.randn(tokens, hidden, device=DEVICE, dtype=dtype)
    seconds: dict[str, dict[str, list[float]]] = {name: {p: [] for p in PHASES} for name in peers}
    order = list(peers.items())
    for i in range(rounds + 5):
        for name, (peer, run) in order[i % len(order) :] + order[: i % len(order)]:
            into = seconds[name] if i >= 5 else {p: [] for p in PHASES}
            result = timer.call(into["forward"], lambda run=run: run(inputs))
            timer.call(into["backward"], lambda peer=peer, r=result: gradients(peer, r, inputs, upstream))
            timer.collect()
            del result
    table: dict[str, Any] = {}
    for name, (peer, _) in peers.items():
        table[name] = {}
        for phase in PHASES:
            figures = summary(seconds[name][phase])
            rate = moved_bytes(peer, phase, inputs.x.numel(), dtype.itemsize) / figures["median_us"] * 1e6
            table[name][phase] = figures | {"gb_per_s": rate / 1e9, "of_copy": rate / copy_rate}
    return table


def print_shape(tokens: int, hidden: int, table: dict[str, Any]) -> None:
    print(f"\n{tokens} x {hidden}")
    rates = f"{'GB/s':>8}{'of copy':>9}"
    print(f"{'':28}{'forward us':>12}{rates}{'backward us':>13}{rates}{'sum us':>10}")
    for name, phases in table.items():
        cells = "".join(
            f"{p['median_us']:{width}.1f}{p['gb_per_s']:8.0f}{p['of_copy']:9.2f}"
            for p, width in ((phases["forward"], 12), (phases["backward"], 13))
        )
        total = sum(phases[p]["median_us"] for p in PHASES)
        print(f"{name:28}{cells}{total:10.1f}")


def print_errors(hidden: int, table: dict[str, Any]) -> None:
    print(f"\nhidden {hidden}, 512 tokens: error against fp64")
    for name, row in table.items():
        print(f"{name:28}" + "  ".join(f"{key} {value:.1e}" for key, value in row["errors"].items()))


def _run(*command: str) -> str | None:
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment() -> dict[str, Any]:
    """Hardware, versions and commit."""
    properties = torch.cuda.get_device_properties(0)
    here = Path(__file__).parent
    return {
        "commit": _run("git", "-C", str(here), "rev-parse", "HEAD"),
        "changed_since": bool(_run("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no")),
        "device": properties.name,
        "processors": properties.multi_processor_count,
        "driver_clock_power": _run(
            "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"
        ),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def write_json(path: Path, report: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(temporary, path)


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    dtype = DTYPES[args.dtype]
    timer = Timer()
    copy_rate = measure_copy(timer, args.rounds)
    report: dict[str, Any] = environment() | {
        "dtype": args.dtype,
        "rounds": args.rounds,
        "copy_gb_per_s": copy_rate / 1e9,
        "left_out": {},
        "shapes": [],
        "accuracy": [],
    }
    print(f"{report['device']}, torch {torch.__version__}, {args.dtype}, copy {copy_rate / 1e9:.0f} GB/s")
    # torch.compile makes code for each shape; past its limit it would run eagerly without a word.
    torch._dynamo.config.recompile_limit = 8 * len(args.tokens)
    for hidden in args.hidden:
        torch.compiler.reset()
        peers = working_peers(hidden, dtype, report["left_out"])
        for tokens in args.tokens:
            table = measure_shape(timer, tokens, hidden, dtype, args.rounds, peers, copy_rate)
            report["shapes"].append({"tokens": tokens, "hidden": hidden, "peers": table})
            print_shape(tokens, hidden, table)
            if args.json:
                write_json(args.json, report)
        accuracy = {n: {"errors": errors(peer, run, hidden, dtype)} for n, (peer, run) in peers.items()}
        report["accuracy"].append({"hidden": hidden, "peers": accuracy})
        print_errors(hidden, accuracy)
    small = working_peers(SMALL[1], dtype, report["left_out"])
    report["host"] = {n: host_time(peer, run, dtype) for n, (peer, run) in small.items()}
    print(f"\nhost, forward + backward of {SMALL[0]} x {SMALL[1]}, us")
    for name, figures in report["host"].items():
        print(f"{name:28}{figures['median_us']:8.0f}")
    for name, reason in report["left_out"].items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", help=f"default {HIDDEN}")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"default {TOKENS}")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds a shape (default 30)")
    parser.add_argument("--quick", action="store_true", help=f"hidden {QUICK_HIDDEN}, tokens {QUICK_TOKENS}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    if not torch.cuda.is_available():
        print("No CUDA device: the GPU kernels cannot be timed here. Timing the CPU path instead.")
        cpu_norms.main(["--rounds", str(args.rounds)] + (["--json", str(args.json)] if args.json else []))
        return
    args.hidden = args.hidden or (QUICK_HIDDEN if args.quick else HIDDEN)
    args.tokens = args.tokens or (QUICK_TOKENS if args.quick else TOKENS)
    report = measure_all(args)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
