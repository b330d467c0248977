"""How a training process starts and ends: the address of a lone process, signals, clean-up."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from megatron_dyt.runtime import checkpoint_dir


def prepare_process() -> None:
    """Let a process that torchrun did not start be a world of one."""
    if "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def clean_end() -> Iterator[None]:
    """Around training: whatever ends it, the last complete checkpoint stays the one to resume from.

    SIGTERM and Ctrl-C become exceptions, so that an interrupted save is cleared away. SIGTERM then
    ends the process with one line and exit code 143, Ctrl-C is a `KeyboardInterrupt`.
    """
    received: list[int] = []
    with _signals_as_exceptions(received):
        try:
            yield
        except BaseException as error:
            _clear_interrupted_save()
            if signal.SIGTERM in received:
                line = "megatron_dyt: terminated by SIGTERM; the last complete checkpoint is intact"
                print(line, file=sys.stderr, flush=True)
                raise SystemExit(128 + signal.SIGTERM) from None
            if signal.SIGINT in received:
                raise KeyboardInterrupt from error
            raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _signals_as_exceptions(received: list[int]) -> Iterator[None]:
    """Note SIGTERM and SIGINT in `received` and raise `KeyboardInterrupt` where the process is."""
    owner = os.getpid()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if os.getpid() == owner:  # Data loader workers inherit the handler.
            received.append(number)
        raise KeyboardInterrupt

    handled = (signal.SIGTERM, signal.SIGINT)
    previous: dict[int, Any] = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _clear_interrupted_save() -> None:
    """On rank 0 remove a half-written checkpoint from the --save directory of Megatron's run."""
    arguments = sys.modules.get("megatron.training.global_vars")
    args = getattr(arguments, "_GLOBAL_ARGS", None)
    save = getattr(args, "save", None)
    if save is None or "://" in save or int(os.environ.get("RANK", "0")) != 0:
        return
    for line in checkpoint_dir.tidy(save):
        print(f"megatron_dyt: {line}", file=sys.stderr, flush=True)
