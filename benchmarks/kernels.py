"""DyT's kernels beside every other way to do the same, on a GPU: python benchmarks/kernels.py

Forward and backward of DyT and of residual add + DyT; the same of RMSNorm. All peers of a shape are
timed in turn, round by round, in one process, with the L2 cache flushed before each; a time is that of
the kernels on the device (CUDA events), the launches hidden behind a kernel that waits. Reported are
medians and quartiles, GB/s of the bytes that the operation must move (activations only), their
fraction of the copy rate measured in the same run, the error of values and gradients against fp64, and
the time of one small call on the host. Peers that are not installed are named and left out.

On a CPU, benchmarks/cpu_norms.py does the like; --rehearse runs this script there, on tiny shapes and without
torch.compile, to see that it would on a GPU.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common_picture import Line, lines_svg
from common_report import add_output, heading, markdown_table, new_report, save, save_figures
from common_timing import Clock, DeviceClock, WallClock, in_turn, summary, synchronize
from peers import PEERS, Inputs, Peer, Result, exact
from torch import Tensor

HIDDEN = (2048, 4096, 5120, 8192, 16384)
TOKENS = (1024, 4096, 8192, 16384, 65536)
QUICK_HIDDEN, QUICK_TOKENS = (4096, 8192), (1024, 16384)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PHASES = ("forward", "backward")
DEVICE = "cuda"
SMALL = (16, 1024)


def make_inputs(tokens: int, hidden: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device=DEVICE).manual_seed(0)

    def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE, dtype=dtype)

    x, residual = (random(tokens, hidden, dtype=dtype) for _ in range(2))
    alpha = torch.tensor([0.7], device=DEVICE)
    weight, bias = 1 + 0.1 * random(hidden), 0.1 * random(hidden)
    tensors = (x, residual, alpha, weight, bias, weight.detach().to(dtype, copy=True))
    return Inputs(*(t.requires_grad_() for t in tensors))


def used_inputs(peer: Peer) -> list[str]:
    """The leaves to differentiate; "weight" is the one that the peer takes."""
    dyt = peer.kind == "dyt"
    return ["x"] + ["residual"] * peer.residual + ["alpha"] * dyt + ["weight"] + ["bias"] * dyt


def gradients(peer: Peer, result: Result, inputs: Inputs, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """In the order of `used_inputs`; None where a peer has a weight of its own, and does not use ours."""
    outputs = result if isinstance(result, tuple) else (result,)
    leaves = [getattr(inputs, peer.weight if name == "weight" else name) for name in used_inputs(peer)]
    return torch.autograd.grad(outputs, leaves, [upstream] * len(outputs), allow_unused=True)


def measure_copy(timer: Clock, rounds: int) -> float:
    """Bytes a second, read and written, of torch's copy of 1 GiB."""
    source = torch.empty(1 << (30 if DEVICE == "cuda" else 20), dtype=torch.int8, device=DEVICE)
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
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    upstream = torch.randn(512, hidden, generator=generator, device=DEVICE, dtype=dtype)
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
    for i in range(130 if DEVICE == "cuda" else 4):
        synchronize()
        start = time.perf_counter()
        gradients(peer, run(inputs), inputs, upstream)
        synchronize()
        if i >= 30 or DEVICE == "cpu":
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
            synchronize()
        except Exception as error:  # a peer's fault must not end the run
            left_out[f"{peer.name}, hidden {hidden}"] = f"{type(error).__name__}: {error}"[:200]
        else:
            found[peer.name] = (peer, run)
    return found


def measure_shape(
    timer: Clock,
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
    for name, (peer, run), counts in in_turn(peers, rounds, 5):
        into = seconds[name] if counts else {p: [] for p in PHASES}
        result = timer.call(into["forward"], lambda run=run: run(inputs))
        timer.call(into["backward"], lambda peer=peer, r=result: gradients(peer, r, inputs, upstream))
        timer.collect()
        del result
    found: dict[str, Any] = {}
    for name, (peer, _) in peers.items():
        found[name] = {}
        for phase in PHASES:
            figures = summary(seconds[name][phase])
            rate = moved_bytes(peer, phase, inputs.x.numel(), dtype.itemsize) / figures["median_us"] * 1e6
            found[name][phase] = figures | {"gb_per_s": rate / 1e9, "of_copy": rate / copy_rate}
    return found


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


def table(report: dict[str, Any]) -> str:
    """Every peer at the largest number of tokens up to 16384: time, fraction of the copy rate, error.

    A run that was cut off has no errors for its last width.
    """
    tokens = max((r["tokens"] for r in report["results"] if r["tokens"] <= 16384), default=0)
    errors_dx = {
        (entry["hidden"], name): f"{peer['errors']['dx']:.1e}"
        for entry in report["accuracy"]
        for name, peer in entry["peers"].items()
    }
    columns = ("tokens x hidden", "", "forward, us", "of copy", "backward, us", "of copy", "error of dx")
    rows = []
    for result in report["results"]:
        if result["tokens"] != tokens:
            continue
        for name, phases in result["peers"].items():
            cells = [f(phases[p]) for p in PHASES for f in (_microseconds, _of_copy)]
            error = errors_dx.get((result["hidden"], name), "")
            rows.append([f"{tokens} x {result['hidden']}", name, *cells, error])
    return markdown_table(columns, rows)


def _microseconds(figures: dict[str, float]) -> str:
    return f"{figures['median_us']:.1f}"


def _of_copy(figures: dict[str, float]) -> str:
    return f"{figures['of_copy']:.2f}"


def picture(report: dict[str, Any]) -> str:
    """Rates against the width at the most tokens: the peers that add a residual, forward and backward."""
    tokens = max(result["tokens"] for result in report["results"])
    results = [result for result in report["results"] if result["tokens"] == tokens]
    names = [name for name in results[0]["peers"] if name.startswith("add ") and not name.endswith("eager")]
    charts = []
    for phase in PHASES:
        lines = [
            Line(
                name.removeprefix("add "),
                [(r["hidden"], r["peers"][name][phase]["gb_per_s"]) for r in results if name in r["peers"]],
            )
            for name in names
        ]
        charts.append((f"add + norm, {phase}, {tokens} tokens", lines))
    copy_rate = report["copy_gb_per_s"]
    return lines_svg(
        f"Kernels on {report['hardware']['name']}",
        ("hidden", "GB/s"),
        charts,
        reference=(f"copy: {copy_rate:.0f} GB/s", copy_rate),
    )


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    dtype = DTYPES[args.dtype]
    timer = DeviceClock() if DEVICE == "cuda" else WallClock()
    copy_rate = measure_copy(timer, args.rounds)
    report = new_report("kernels", DEVICE, {"dtype": args.dtype, "rounds": args.rounds})
    report |= {"copy_gb_per_s": copy_rate / 1e9, "accuracy": [], "host": {}}
    print(f"{heading(report)}, {args.dtype}, copy {copy_rate / 1e9:.0f} GB/s")
    # torch.compile makes code for each shape; past its limit it would run eagerly without a word.
    torch._dynamo.config.recompile_limit = 8 * len(args.tokens)
    for hidden in args.hidden:
        torch.compiler.reset()
        peers = working_peers(hidden, dtype, report["left_out"])
        for tokens in args.tokens:
            try:
                figures = measure_shape(timer, tokens, hidden, dtype, args.rounds, peers, copy_rate)
            except torch.OutOfMemoryError as error:
                report["left_out"][f"{tokens} x {hidden}"] = str(error)[:200]
                continue
            report["results"].append({"tokens": tokens, "hidden": hidden, "peers": figures})
            print_shape(tokens, hidden, figures)
            save_figures(report, args.output)  # What is measured stays when the time is over.
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


def rehearse() -> None:
    """Everything on the CPU, but what would generate code, which takes longer than all the rest."""
    global DEVICE, PEERS, SMALL
    DEVICE, SMALL = "cpu", (4, 64)
    PEERS = tuple(peer for peer in PEERS if "compile" not in peer.name)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", help=f"default {HIDDEN}")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"default {TOKENS}")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds per shape (default 30)")
    parser.add_argument("--quick", action="store_true", help=f"hidden {QUICK_HIDDEN}, tokens {QUICK_TOKENS}")
    parser.add_argument("--rehearse", action="store_true", help="a CPU in the GPU's place")
    add_output(parser)
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    if args.rehearse:
        rehearse()
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device; benchmarks/cpu_norms.py times the CPU path")
    args.hidden = args.hidden or (QUICK_HIDDEN if args.quick else HIDDEN)
    args.tokens = args.tokens or (QUICK_TOKENS if args.quick else TOKENS)
    report = measure_all(args)
    save(report, picture(report), args.output)


if __name__ == "__main__":
    main()
