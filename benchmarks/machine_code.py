"""Kernels compiled for a chip on a machine without one, as machine code."""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from megatron_dyt.ops import triton_dyt, triton_launch
from megatron_dyt.ops.triton_launch import Chip

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Processors: A100, H200, B200, MI300X.
CHIPS: dict[str, tuple[GPUTarget, Chip]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), Chip("sm80", 108, 32, ptx=True)),
    "sm_90": (GPUTarget("cuda", 90, 32), Chip("sm90", 132, 32, ptx=True)),
    "sm_100": (GPUTarget("cuda", 100, 32), Chip("sm100", 148, 32, ptx=True)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Chip("gfx9", 304, 64, ptx=False)),
}


class Code(NamedTuple):
    """One compiled launch.

    kernel: its function's name; binary: the same for launches that run the same compiled code.
    grid, options: of the launch, the compile-time arguments among them.
    instructions: mnemonics of the kernel, in order; loop: those of its largest loop.
    registers: of a thread. spills: whether any went to memory. shared: bytes of shared memory of a program.
    """

    kernel: str
    binary: str
    grid: tuple[int, ...]
    options: dict[str, Any]
    instructions: list[str]
    loop: list[str]
    registers: int
    spills: bool
    shared: int

    def count(self, pattern: str, *, in_loop: bool = False) -> int:
        """How many instructions match a regular expression from their start."""
        return sum(bool(re.match(pattern, i)) for i in (self.loop if in_loop else self.instructions))


class _Driver:
    """What the JIT asks a driver when it only compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend} {self.target.arch}"  # a key of the JIT's cache

    def get_current_stream(self, device: object) -> int:
        return 0


# What was read of a binary, by its hash.
_FACTS: dict[str, tuple[list[str], list[str], int, bool, int]] = {}


class CompileInsteadOfLaunch:
    """A kernel whose launches, on meta tensors too, compile it and are put into `launches`."""

    def __init__(self, kernel: Any, launches: list[Code]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_(*args: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            if compiled.hash not in _FACTS:
                read = _read_amd if "amdgcn" in compiled.asm else _read_nvidia
                _FACTS[compiled.hash] = (*read(compiled.asm), compiled.metadata.shared)
            facts = _FACTS[compiled.hash]
            self.launches.append(Code(self.kernel.__name__, compiled.hash, grid, options, *facts))

        return compile_


@contextlib.contextmanager
def compiler_for(name: str) -> Iterator[None]:
    """Triton compiles for a chip of CHIPS, whatever is in this machine."""
    real = triton.runtime.driver._active
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        try:
            triton.runtime.driver.set_active(_Driver(CHIPS[name][0]))
            yield
        finally:
            triton.runtime.driver._active = real


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[list[Code]]:
    """`triton_dyt` on meta tensors compiles for a chip of CHIPS; the launches are put into the list."""
    launches: list[Code] = []
    names = ("forward_kernel", "backward_kernel", "finalize_kernel")
    real, real_chip_of = triton_dyt.kernels, triton_launch.chip_of
    stand_ins = {n: CompileInsteadOfLaunch(getattr(real, n), launches) for n in names}
    with compiler_for(name):
        try:
            triton_dyt.kernels = SimpleNamespace(**stand_ins)
            triton_launch.chip_of = lambda _: CHIPS[name][1]
            yield launches
        finally:
            triton_dyt.kernels = real
            triton_launch.chip_of = real_chip_of


def _tool(name: str, *args: str) -> str:
    command = [str(NVIDIA_TOOLS / name), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_nvidia(asm: dict[str, Any]) -> tuple[list[str], list[str], int, bool]:
    return read_cubin(asm["cubin"])


def read_cubin(cubin: bytes) -> tuple[list[str], list[str], int, bool]:
    """Instructions, those of the largest loop, registers, and whether there are spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    registers, *memory = map(int, found.groups())
    instruction = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")
    jump = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
    instructions, loop = _instructions_and_loop(sass, instruction, re.compile(r"^(\.L_\w+):"), jump)
    spills = any(memory) or any(i.startswith(("LDL", "STL")) for i in instructions)
    return instructions, loop, registers, spills


def _read_amd(asm: dict[str, Any]) -> tuple[list[str], list[str], int, bool]:
    text = asm["amdgcn"]

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, name
        return int(found.group(1))

    instruction = re.compile(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)")
    jump = re.compile(r"^\s+s_c?branch\w*\s+(\.L\w+)")
    instructions, loop = _instructions_and_loop(text, instruction, re.compile(r"^(\.L\w+):"), jump)
    spills = any(metadata(n) for n in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"))
    # .vgpr_count includes the accumulation registers.
    return instructions, loop, metadata("vgpr_count"), spills


def _instructions_and_loop(
    text: str, instruction: re.Pattern[str], label: re.Pattern[str], jump: re.Pattern[str]
) -> tuple[list[str], list[str]]:
    """All mnemonics, and those from the target of the farthest jump back to that jump."""
    found: list[str] = []
    labels: dict[str, int] = {}
    loop: list[str] = []
    for line in text.splitlines():
        if match := label.match(line):
            labels[match.group(1)] = len(found)
        if match := instruction.match(line):
            found.append(match.group(1))
            target = jump.search(line)
            if target and target.group(1) in labels:
                body = found[labels[target.group(1)] :]
                loop = max(loop, body, key=len)
    return found, loop
