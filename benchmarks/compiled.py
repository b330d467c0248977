"""What the compiled code says of our and others' kernels, without a GPU: python benchmarks/compiled.py

Compiles DyT and residual add + DyT, Liger's DyT, and Liger's fused add + RMSNorm for a chip, in one run, and
counts in the machine code: instructions and bytes that each element takes, registers, programs that fit on an
SM. From these a roofline estimate per shape: the longest of memory traffic at the chip's copy rate, issue
slots, special functions and latency, times what the last wave or block of rows leaves idle.
--write puts the tables into docs/kernels.md.

Counted is every instruction once, those of both sides of a branch too: with data on both sides of 0.55, where
libdevice's tanh branches, a warp issues both. Loads of a weight count for each row that reads it; they come
from the cache, so the estimate counts activations alone. Of Liger's DyT the configuration of its autotuner
with the fewest instructions. What is not installed is named: pip install liger-kernel.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common_report import markdown_table, versions, write_into
from machine_code import CHIPS, Code, CompileInsteadOfLaunch, compiler_for, compiling_for
from torch import Tensor

from megatron_dyt.ops import triton_dyt
from megatron_dyt.ops.parameters import Parameters

DOCS = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
DTYPE = torch.bfloat16
# Of LLaMA 7B, 13B, 34B and 70B. 512 rows: a sequence of 4096 over 8 sequence parallel ranks.
HIDDEN = (4096, 5120, 8192)
TOKENS = (512, 4096, 16384)
LANES = 128  # Instructions per clock and SM: one of each of four schedulers, for 32 threads.
SPECIAL = 16  # exp2, reciprocal, tanh and roots per clock and SM.
# Of an SM of sm_90 and sm_100: CUDA's programming guide, compute capabilities.
REGISTERS, THREADS, PROGRAMS, SHARED = 65536, 2048, 32, 228 * 1024
LATENCY = 700e-9  # Of memory, in seconds.


class Speed(NamedTuple):
    """Clock, and bytes per second that a copy moves: nine tenths of the data sheets' 4.8 and 8 TB/s."""

    clock: float
    copy: float


SPEEDS = {"sm_90": Speed(1.755e9, 4.3e12), "sm_100": Speed(1.85e9, 7.2e12)}


class Kernel(NamedTuple):
    """One compiled kernel.

    phase: "forward", in which a program has one tile, or "backward", in which its loop has one per turn.
    residual: whether it adds. elements: of a tile. threads: of a program.
    """

    name: str
    phase: str
    residual: bool
    code: Code
    elements: int
    threads: int

    @property
    def instructions(self) -> list[str]:
        """Those that run once per tile."""
        return self.code.loop if self.phase == "backward" else self.code.instructions

    @property
    def per_element(self) -> float:
        return len(self.instructions) * self.threads / self.elements

    def bytes_per_element(self, pattern: str = r"LDG|STG") -> float:
        """Loaded and stored by its instructions, weights and partial sums in the loop included."""
        widths = (_width(i) for i in self.instructions if re.match(pattern, i))
        return sum(widths) * self.threads / self.elements

    @property
    def special(self) -> float:
        """Special functions per element."""
        return sum(i.startswith("MUFU") for i in self.instructions) * self.threads / self.elements

    @property
    def resident(self) -> int:
        """Programs that fit on an SM."""
        allotted = math.ceil(self.code.registers / 8) * 8 * self.threads
        shared = self.code.shared + 1024
        return min(REGISTERS // allotted, THREADS // self.threads, PROGRAMS, SHARED // shared)

    @property
    def programs(self) -> int:
        return math.prod(self.code.grid)


def _width(instruction: str) -> int:
    found = re.search(r"\.(64|128|256)\b", instruction)
    if found:
        return int(found[1]) // 8
    return 2 if ".U16" in instruction else 1 if ".U8" in instruction else 4


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ours(chip: str, tokens: int, hidden: int) -> Iterator[Kernel]:
    x, parameters = meta(tokens, hidden, dtype=DTYPE), Parameters(meta(1), meta(hidden))
    with compiling_for(chip) as launches:
        triton_dyt.forward(x, parameters)
        triton_dyt.residual_forward(x, x, parameters)
        triton_dyt.backward(x, x, parameters, [True, True, True, False, False])
        triton_dyt.backward(x, x, parameters, [True, True, True, False, False], x)
    kernels = [code for code in launches if code.kernel != "finalize_kernel"]
    places = (("dyt", "forward"), ("add dyt", "forward"), ("dyt", "backward"), ("add dyt", "backward"))
    for (name, phase), code in zip(places, kernels, strict=True):
        o = code.options
        rows = o.get("UNROLL", 1) * o["BLOCK_M"]
        yield Kernel(name, phase, "add" in name, code, rows * o["BLOCK_N"], 32 * o["num_warps"])


# (chip, phase) -> the configuration of Liger's autotuner that takes the fewest instructions per element.
_BEST: dict[tuple[str, str], Any] = {}


def liger_dyt(chip: str, tokens: int, hidden: int) -> Iterator[Kernel]:
    """In the best configuration, which is looked for at the first width."""
    from liger_kernel.ops import dyt as liger

    for phase, tuner in (("forward", liger._dyt_fwd_kernel), ("backward", liger._dyt_bwd_kernel)):
        # The number of stages changes no instruction where there is nothing to pipeline.
        configs = [c for c in tuner.configs if c.num_stages == 1]
        if (chip, phase) in _BEST:
            configs = [_BEST[chip, phase]]
        found = [(_liger_dyt(tuner.fn, c, phase, chip, tokens, hidden), c) for c in configs]
        kernel, _BEST[chip, phase] = min(found, key=lambda pair: pair[0].per_element)
        yield kernel


def _liger_dyt(function: Any, config: Any, phase: str, chip: str, tokens: int, hidden: int) -> Kernel:
    x, vector, one = meta(tokens, hidden, dtype=DTYPE), meta(hidden), meta(1)
    processors = CHIPS[chip][1].processors
    partial = meta(processors, hidden)
    tiles = math.ceil(hidden / config.kwargs["BLOCK_N"])
    launches: list[Code] = []
    launch = CompileInsteadOfLaunch(function, launches)[(tiles, tokens if phase == "forward" else processors)]
    options = {
        "num_warps": config.num_warps,
        "num_stages": 1,
        **config.kwargs,
        "HAVE_BETA": False,
        "N": hidden,
    }
    with compiler_for(chip):
        if phase == "forward":
            launch(x, x, one, vector, None, **options)
        else:
            launch(x, x, partial, partial, None, x, one, vector, M=tokens, **options)
    # Columns that the last tile wastes are no elements.
    return Kernel("dyt liger", phase, False, launches[0], hidden // tiles, 32 * config.num_warps)


def liger_add_rmsnorm(chip: str, tokens: int, hidden: int) -> Iterator[Kernel]:
    from liger_kernel.ops import fused_add_rms_norm as liger
    from liger_kernel.ops.utils import calculate_settings

    block, warps = calculate_settings(hidden)
    x, vector = meta(tokens, hidden, dtype=DTYPE), meta(hidden)
    processors = CHIPS[chip][1].processors
    launches: list[Code] = []
    options = {"BLOCK_SIZE": block, "num_warps": warps, "num_stages": 2}
    mode = liger._CASTING_MODE_LLAMA.value
    rows = [each for t in (x, x, x, x) for each in (t, t.stride(0))]
    with compiler_for(chip):
        launch = CompileInsteadOfLaunch(liger._fused_add_rms_norm_forward_kernel, launches)
        statistics = (vector, 1, meta(tokens), 1)
        launch[(tokens,)](*rows, *statistics, hidden, 1e-5, 0.0, mode, **options)
        launch = CompileInsteadOfLaunch(liger._fused_add_rms_norm_backward_kernel, launches)
        partial = meta(processors, hidden)
        launch[(processors,)](
            *rows,
            liger.torch_to_triton_dtype[DTYPE],
            *statistics,
            *(partial, hidden, tokens, hidden, 0.0, math.ceil(tokens / processors), mode),
            has_dS_out=True,
            COMPUTE_DW=True,
            **options,
        )
    for phase, code in zip(("forward", "backward"), launches, strict=True):
        yield Kernel("add rmsnorm liger", phase, True, code, hidden, 32 * warps)


MAKERS: dict[str, Callable[[str, int, int], Iterator[Kernel]]] = {
    "dyt": ours,
    "dyt liger": liger_dyt,
    "add rmsnorm liger": liger_add_rmsnorm,
}


def moved(kernel: Kernel) -> int:
    """Bytes per element that the operation has to read and write: activations."""
    tensors = {"forward": 4 if kernel.residual else 2, "backward": 4 if kernel.residual else 3}
    return tensors[kernel.phase] * DTYPE.itemsize


def estimate(kernel: Kernel, chip: str, tokens: int, hidden: int) -> dict[str, float]:
    """Seconds that each limit asks for, of the whole chip, and the share of the copy rate that is left."""
    elements, processors, speed = tokens * hidden, CHIPS[chip][1].processors, SPEEDS[chip]
    per_clock = processors * speed.clock
    loaded = kernel.bytes_per_element("LDG")
    in_flight = kernel.resident * kernel.elements * loaded
    limits = {
        "memory": moved(kernel) * elements / speed.copy,
        "issue": kernel.per_element * elements / (LANES * per_clock),
        "special": kernel.special * elements / (SPECIAL * per_clock),
        "latency": loaded * elements / (processors * in_flight / LATENCY),
    }
    places = processors * kernel.resident
    waves = kernel.programs / places
    idle = math.ceil(waves) / waves if waves > 1 else 1.0
    if kernel.phase == "backward":
        turns = elements / kernel.elements / kernel.programs
        idle = math.ceil(turns) / turns
    seconds = max(limits.values()) * idle
    return limits | {"waves": waves, "idle": idle, "of_copy": limits["memory"] / seconds}


def compile_all(chip: str, tokens: int, hidden: int, left_out: dict[str, str]) -> list[Kernel]:
    found = []
    for name, make in MAKERS.items():
        try:
            found += list(make(chip, tokens, hidden))
        except ImportError as error:
            left_out[name] = str(error)
    return found


def code_table(rows: Sequence[tuple[str, int, Kernel]]) -> str:
    columns = (
        "chip",
        "hidden",
        "kernel",
        "",
        "instructions",
        "bytes",
        "special",
        "registers",
        "programs per SM",
    )
    cells = []
    for chip, hidden, kernel in rows:
        figures = (kernel.per_element, kernel.bytes_per_element(), kernel.special)
        counts = (kernel.code.registers, f"{kernel.resident} x {kernel.threads}")
        words = (chip, hidden, kernel.name, kernel.phase, *(f"{f:.1f}" for f in figures), *counts)
        cells.append([str(word) for word in words])
    return markdown_table(columns, cells)


def shape_table(chip: str, shapes: dict[tuple[int, int], list[Kernel]]) -> str:
    """The estimated share of the copy rate, and waves, of each kernel by shape."""
    names = list(dict.fromkeys((kernel.name, kernel.phase) for found in shapes.values() for kernel in found))
    columns = (chip, "", *(f"{tokens} x {hidden}" for tokens, hidden in shapes))
    rows = []
    for name in names:
        row = list(name)
        for (tokens, hidden), found in shapes.items():
            kernel = next(k for k in found if (k.name, k.phase) == name)
            e = estimate(kernel, chip, tokens, hidden)
            row.append(f"{e['of_copy']:.2f} ({e['waves']:.1f})")
        rows.append(row)
    return markdown_table(columns, rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", nargs="+", choices=SPEEDS, default=list(SPEEDS))
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--write", action="store_true", help=f"into {DOCS.name}, between its marks")
    args = parser.parse_args(argv)
    left_out: dict[str, str] = {}
    parts = []
    rows: list[tuple[str, int, Kernel]] = []
    for chip in args.chip:
        shapes = {(t, h): compile_all(chip, t, h, left_out) for h in args.hidden for t in args.tokens}
        rows += [(chip, h, k) for h in args.hidden for k in shapes[args.tokens[-1], h]]
        parts.append(shape_table(chip, shapes))
    used = ", ".join(f"{n} {v}" for n, v in versions().items() if n in ("triton", "liger-kernel"))
    text = "\n\n".join([f"{used}.", code_table(rows), *parts])
    print(text)
    for name, why in left_out.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    if args.write:
        write_into(DOCS, "compiled", text)


if __name__ == "__main__":
    main()
