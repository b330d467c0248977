"""How the Triton kernels are cut into programs: a table by chip and element size, and the arithmetic on it.

There is no tuning at run time: the same shape gets the same programs on every run, so results are
reproducible, and the first step of a CUDA graph is no different from the others. The table is
`launch_table.json`. Its numbers come from the compiled code (registers) and are held to it by
tests/ops/test_triton_compiled.py; `benchmarks/tune.py` makes rows from timings, which
MEGATRON_DYT_LAUNCH_TABLE=FILE puts in the place of those here.
"""

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_dyt.errors import UserError

# What one access of 16 bytes by each of 4 * 32 threads covers in 2-byte elements, the widest tile of columns.
# Narrow rows are stacked instead, so that a tile always keeps every thread busy.
_MAX_BLOCK_N = 1024
# Columns that a tile may waste: lanes that do nothing cost as much issue time as others.
_MAX_WASTE = 1.05
# Narrowest tile that is tried for wide rows: 256 bytes of 2-byte elements, two cache lines.
_MIN_BLOCK_N = 128
# A row program adds 16 bytes of partial sums per column (written, then read) to the 8 or so of each of its
# rows, mostly in L2. It gets at least this many rows.
_MIN_ROWS_PER_PROGRAM = 16
# Forward tiles become smaller until there are this many programs per processor: with fewer, processors that
# get one program less than others would idle for a quarter of the time or more.
_MIN_PROGRAMS_PER_PROCESSOR = 4

# The finalize kernel's tile: 32 columns are a cache line of fp32, and give 128 programs at hidden 4096, about
# one per processor. 32 rows of partial sums are 8 independent loads for each of the 128 threads of 4 warps.
FINALIZE_BLOCK_P = 32
FINALIZE_BLOCK_N = 32
FINALIZE_WARPS = 4


class Chip(NamedTuple):
    """A device: its row in the table, its SMs or CUs, the threads of a warp, and whether it takes PTX."""

    family: str
    processors: int
    warp_size: int
    ptx: bool


class Plan(NamedTuple):
    """One row of the table.

    warps: of one program.
    forward: 16-byte accesses that a thread makes to each operand in forward.
    tanh, erf: the same in one turn of the backward loop, by function, all in flight together.
    resident: backward programs that fit on a processor, by registers.
    max_registers: what the compiler is held to so that they do, or None where it needs no telling.
    """

    warps: int
    forward: int
    tanh: int
    erf: int
    resident: int
    max_registers: int | None


def read_table(path: Path) -> dict[tuple[str, int], Plan]:
    """(family, bytes of an element) -> plan, from {"sm90": {"2": {"warps": 4, ...}, ...}, ...}.

    Raises:
        UserError: it is not such a file.
    """
    try:
        data = json.loads(path.read_bytes())
        table = {
            (family, int(size)): Plan(**plan)
            for family, plans in data.items()
            for size, plan in plans.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no launch table ({error}); benchmarks/tune.py writes one, "
            f"and {_SHIPPED.name} beside {__name__} has the form"
        ) from error
    return table


# An NVIDIA SM has 65536 registers: 3 * 128 threads may have 168 each, 4 * 128 threads 128. An AMD SIMD has
# 512 per lane, and a program of 4 waves puts one on each SIMD. 4 warps: one for each of an SM's or CU's four
# schedulers. 4 accesses in flight per thread and operand: of 3 programs * 128 threads * 4 accesses * 16 bytes
# * 3 operands, 73 KB, an H200 needs 23 KB per SM to hide its memory's latency (700 ns). Where it says 2, the
# programs that shall be resident leave no registers for 4.
_SHIPPED = Path(__file__).with_name("launch_table.json")
PLANS = read_table(_SHIPPED)
if _measured := os.environ.get("MEGATRON_DYT_LAUNCH_TABLE"):
    PLANS |= read_table(Path(_measured))

INTERPRETER = Chip("sm90", processors=1, warp_size=32, ptx=False)


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The chip behind a torch device; a CPU is Triton's interpreter."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    warp_size = getattr(properties, "warp_size", 64 if torch.version.hip else 32)
    if torch.version.hip:
        return Chip("gfx9", properties.multi_processor_count, warp_size, ptx=False)
    # Chips before Ampere and of later generations get the nearest row that there is.
    families = dict.fromkeys(range(9), "sm80") | {9: "sm90"}
    family = families.get(properties.major, "sm100")
    return Chip(family, properties.multi_processor_count, warp_size, ptx=True)


class Tile(NamedTuple):
    """A program's tile, UNROLL times BLOCK_M rows of BLOCK_N columns, and its warps."""

    unroll: int
    block_m: int
    block_n: int
    warps: int

    @property
    def rows(self) -> int:
        return self.unroll * self.block_m


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _block_n(hidden: int, limit: int) -> int:
    """The widest power of two up to `limit` that wastes few columns, else the one that wastes least."""
    widest = min(limit, next_power_of_2(hidden))
    candidates = [widest >> i for i in range(4) if widest >> i >= min(widest, _MIN_BLOCK_N)]
    padded = {n: ceil_div(hidden, n) * n for n in candidates}
    good = [n for n in candidates if padded[n] <= _MAX_WASTE * hidden]
    return good[0] if good else min(candidates, key=lambda n: padded[n])


def forward_tile(chip: Chip, rows: int, hidden: int, itemsize: int) -> Tile:
    """The forward kernel's tile for rows x hidden elements of `itemsize` bytes."""
    plan = PLANS[chip.family, itemsize]
    elements = plan.warps * chip.warp_size * plan.forward * (16 // itemsize)
    block_n = _block_n(hidden, _MAX_BLOCK_N)
    block_m = elements // block_n
    tiles = ceil_div(hidden, block_n)
    wanted = _MIN_PROGRAMS_PER_PROCESSOR * chip.processors
    while block_m > 1 and ceil_div(rows, block_m) * tiles < wanted:
        block_m //= 2
    return Tile(1, block_m, block_n, plan.warps)


def backward_tile(chip: Chip, hidden: int, itemsize: int, stride_unit: int, function: str) -> Tile:
    """The backward kernel's tile: one access per thread and operand, UNROLL times."""
    plan = PLANS[chip.family, itemsize]
    elements = plan.warps * chip.warp_size * (16 // itemsize)
    block_n = _block_n(hidden, min(_MAX_BLOCK_N, elements))
    # Rows that lie so that 16 bytes take several accesses have as many in flight without unrolling.
    aligned = stride_unit * itemsize >= 16
    unroll = plan.erf if function == "erf" else plan.tanh
    return Tile(unroll if aligned else 1, elements // block_n, block_n, plan.warps)


def backward_options(chip: Chip, itemsize: int) -> dict[str, int]:
    """The compiler's options for the backward kernel."""
    limit = PLANS[chip.family, itemsize].max_registers
    return {} if limit is None else {"maxnreg": limit}


def row_programs(chip: Chip, tile: Tile, rows: int, hidden: int, itemsize: int) -> int:
    """How many backward programs share the rows: one wave on the chip, or fewer for few rows."""
    tiles = ceil_div(hidden, tile.block_n)
    wave = chip.processors * PLANS[chip.family, itemsize].resident // tiles
    return max(1, min(wave, ceil_div(rows, tile.rows), rows // _MIN_ROWS_PER_PROGRAM))
