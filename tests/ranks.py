"""Ranks of a run, forked from one process that has imported PyTorch and Megatron once.

Those imports take a process 8 s of CPU, which is more than most cases do afterwards. The parent computes
nothing and has no thread of PyTorch's, so that it can be forked. For tests whose subject is torchrun, or the
start of a process, this is not the way.

    python -m tests.ranks    reads jobs from stdin, a line of JSON each, and answers with the exit codes
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
# All ranks must have ended by then; give more on a machine that has other work.
TIMEOUT = float(os.environ.get("MEGATRON_DYT_TEST_TIMEOUT", "600"))
# How long torchrun lets the other ranks of a failed one end by themselves, here.
_GRACE = 10.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class Rank:
    """One process: `["-m", MODULE, ARGS...]` or `[SCRIPT, ARGS...]`, its environment and where it prints."""

    command: list[str]
    out: str
    err: str = ""  # Empty: where `out` is.
    environment: dict[str, str] = field(default_factory=dict)


class Parent:
    """The process that has imported everything, started with the first job."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, ranks: Sequence[Rank], watched: bool, timeout: float = TIMEOUT) -> list[int]:
        """The exit codes of all ranks, negative for a signal; at least one has a WORLD_SIZE and an address.

        Args:
            watched: when one fails, the others are ended, as torchrun does it; without, as under srun, they
                have to end by themselves.

        Raises:
            TimeoutError: they have not ended in `timeout` seconds (and have been killed).
        """
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(ranks))}
        places = [world | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(len(ranks))]
        todo = [asdict(rank) for rank in ranks]
        for each, place in zip(todo, places, strict=True):
            each["environment"] = place | each["environment"]
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        job = {"ranks": todo, "watched": watched, "timeout": timeout}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"the parent of the ranks has ended with {process.wait()}; its errors are above"
            )
        codes: list[int] = json.loads(answer)
        if any(code == _LATE for code in codes):
            raise TimeoutError(f"not all ranks ended in {timeout:g} s: {codes}")
        return codes

    def close(self) -> None:
        """End it; without a job there never was one."""
        if self._process is not None:
            self._process.communicate()  # Closes its stdin, which ends it.

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            # A run inside the test process may have left its own address here.
            inherited = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
            path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
            settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.ranks"],
                env=inherited | settings,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._process


# --- in the parent ---------------------------------------------------------------------------------

# In place of the exit code of a rank that had to be killed because the time was up.
_LATE = -1000


def serve() -> None:
    """Answer jobs until stdin ends. A forked rank returns from here too, when its command has ended."""
    warnings.filterwarnings("ignore")
    # What a rank or a library prints must not get among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare()
    for line in sys.stdin:
        job = json.loads(line)
        codes = run(job)
        answers.write(json.dumps(codes) + "\n")
        answers.flush()


def prepare() -> None:
    """Import and cache here what each rank would otherwise do again."""
    from megatron_dyt import compat, cpu
    from tests import help_texts

    # Megatron imports it where it is installed, and it then looks at all that is printed.
    sys.modules["wandb"] = None  # type: ignore[assignment]
    if os.environ.get("MEGATRON_DYT_DEVICE", "cpu") == "cpu":
        cpu.enable()
    importlib.import_module("megatron_dyt.mcore.register")
    importlib.import_module("megatron_dyt.pretrain")
    if compat.has_training():
        from megatron.training import arguments

        for module in ("megatron.training.training", "megatron.core.tokenizers.text"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        help_texts.remember()
        arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    gc.collect()
    gc.freeze()  # A collection in a rank does not look at what is here, and copies none of its pages.


def run(job: dict[str, Any]) -> list[int]:
    """Fork the ranks of a job and wait for them."""
    running = {start(rank): number for number, rank in enumerate(job["ranks"])}
    codes = [_LATE] * len(running)
    deadline = time.monotonic() + job["timeout"]
    while running and time.monotonic() < deadline:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process in running:
            codes[running.pop(process)] = os.waitstatus_to_exitcode(status)
            if status and job["watched"]:
                deadline = min(deadline, time.monotonic() + _GRACE)
        else:
            time.sleep(0.01)
    for process in running:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    # Ranks that were ended because another one had failed have not hung.
    ended = job["watched"] and any(code not in (0, _LATE) for code in codes)
    return [-signal.SIGKILL if code == _LATE and ended else code for code in codes]


def start(rank: dict[str, Any]) -> int:
    """Fork a rank; returns its process here. The rank itself exits when its command has ended."""
    process = os.fork()
    if process:
        return process
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    out = os.open(rank["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    err = os.open(rank["err"] or rank["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(rank["environment"])
    first, *rest = rank["command"]
    try:
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            runpy.run_path(first, run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    serve()
