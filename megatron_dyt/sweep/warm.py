"""Runs forked from one process that has imported PyTorch and Megatron, which takes 10 s of CPU.

The parent computes nothing and has one thread, so that it can be forked. Where that is not so, on a machine
with a GPU, and where Megatron cannot be imported, it ends, and runs start by themselves.

    python -m megatron_dyt.sweep.warm    reads requests from stdin, a line of JSON each, and answers by a line
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Seconds between two looks at a run that is waited for.
_LOOK = 0.1
_READY = 0


def end_with(parent: int) -> None:
    """In a child: end when its parent is killed, or runs would go on beside those of the next sweep."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # It was killed before it was asked for.
            os._exit(1)


class Parent:
    """The process that runs are forked from, which have its environment; it prints into `log`."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        with log.open("wb") as file:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "megatron_dyt.sweep.warm"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                # NumPy's BLAS would start threads at its import; a run computes nothing large with it.
                env={"OPENBLAS_NUM_THREADS": "1", **environment},
                start_new_session=True,
                preexec_fn=functools.partial(end_with, os.getpid()),
            )
        self.pid = self._popen.pid
        with contextlib.suppress(EOFError):
            self._answer()

    def fork(self, flags: Sequence[str], log: Path) -> Forked | None:
        """Start `megatron_dyt.pretrain` with `flags`, printing into `log`; None if the parent has ended."""
        try:
            pid = self._ask({"flags": list(flags), "log": str(log)})
        except EOFError:
            return None
        assert pid is not None
        return Forked(self, pid)

    def exit_code(self, pid: int) -> int | None:
        """Of a run: negative for a signal, None while it runs. If the parent has ended, so has the run."""
        try:
            return self._ask({"pid": pid})
        except EOFError:
            return self._popen.wait() or 1

    def close(self) -> None:
        """End it; runs that it still has end too."""
        with contextlib.suppress(BrokenPipeError):
            self._popen.communicate()

    def _ask(self, request: Mapping[str, object]) -> int | None:
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(json.dumps(request) + "\n")
            self._popen.stdin.flush()
            return self._answer()
        except BrokenPipeError:
            raise EOFError from None
        except KeyboardInterrupt:
            self._popen.kill()  # Its answer would be taken for that to another request.
            raise

    def _answer(self) -> int | None:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise EOFError
        answer: int | None = json.loads(line)
        return answer


class Forked:
    """A run of a `Parent`, with what is used of `subprocess.Popen`."""

    def __init__(self, parent: Parent, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._parent = parent

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = self._parent.exit_code(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when it has ended; raises subprocess.TimeoutExpired."""
        began = time.monotonic()
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() - began > timeout:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(_LOOK)
        return code


# --- in the parent ---------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until stdin ends. A forked run leaves by the exception that ends it."""
    # What an import prints must not get among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if not _prepare():
        return
    print(_READY, file=answers, flush=True)
    own = os.getpid()
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            answer = _exit_code(request["pid"])
        elif (answer := os.fork()) == 0:
            answers.close()
            end_with(own)
            _train(**request)
        print(json.dumps(answer), file=answers, flush=True)


def _prepare() -> bool:
    """Import what a run imports; returns whether it may be forked."""
    if sys.platform != "linux":
        return False
    import torch

    from megatron_dyt import cpu

    if torch.cuda.is_available():
        return False
    cpu.enable()
    modules = ("mcore.register", "training.datasets", "training.megatron_loop", "training.preflight")
    for module in (*(f"megatron_dyt.{name}" for name in modules), "megatron.training.training"):
        importlib.import_module(module)
    with contextlib.suppress(ImportError):  # A run imports it with its tokenizer; that of 0.16 is elsewhere.
        importlib.import_module("megatron.core.tokenizers.text")
    gc.collect()
    gc.freeze()  # A collection in a run does not look at what is here, and copies none of its pages.
    sys.stdout.flush()  # Or each run would print it again.
    return len(os.listdir("/proc/self/task")) == 1


def _exit_code(pid: int) -> int | None:
    """Of a run, which is forgotten with it; None while it runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _train(flags: list[str], log: str) -> None:
    """In a forked run: what `python -m megatron_dyt.pretrain` does, which ends by SystemExit."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for file, number in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(file, number)
    sys.argv = ["megatron_dyt.pretrain", *flags]
    runpy.run_module("megatron_dyt.pretrain", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve()
