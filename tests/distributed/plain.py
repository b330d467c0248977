"""Processes started as a cluster's launcher does it (srun): by environment, with nobody who watches them.

torchrun ends all ranks when one fails, which hides a rank that would have waited forever.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
# All ranks must have ended by then; give more on a machine that has other work.
TIMEOUT = float(os.environ.get("MEGATRON_DYT_TEST_TIMEOUT", "600"))


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    code: int
    out: str
    err: str

    @property
    def last_words(self) -> str:
        """The last line of the plugin on stderr."""
        return [line for line in self.err.splitlines() if line.startswith("megatron_dyt")][-1]


def launch(directory: Path, commands: list[list[str]], **environment: str) -> list[Ended]:
    """Run one Python command line a rank, and wait for all.

    Raises TimeoutError, after ending them, when they are not done in TIMEOUT seconds.
    """
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(commands))}
    common = os.environ | world | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    processes = []
    for rank, command in enumerate(commands):
        with (directory / f"{rank}.out").open("w") as out, (directory / f"{rank}.err").open("w") as err:
            settings = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen([sys.executable, *command], env=settings, stdout=out, stderr=err)
            processes.append(process)
    try:
        deadline = time.monotonic() + TIMEOUT
        codes = [process.wait(max(0, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired as late:
        raise TimeoutError(f"not all ranks ended in {TIMEOUT:g} s: {late}") from late
    finally:
        for process in processes:
            process.kill()
    texts = [
        [(directory / f"{rank}.{kind}").read_text() for kind in ("out", "err")] for rank in range(len(codes))
    ]
    return [Ended(code, *text) for code, text in zip(codes, texts, strict=True)]
