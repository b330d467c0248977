"""How a training process starts and ends: the address of a lone process, and what a run leaves behind."""

import contextlib
import errno
import logging
import os
import shutil
import signal
from collections.abc import Iterator

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dyt import log
from megatron_dyt.checkpoints import iterations
from megatron_dyt.parsed_args import parsed_args
from megatron_dyt.training import refusals, signals

_log = logging.getLogger(__name__)

# With less free space than this (bytes) a failed write is taken for a full disk: some comes free between
# the failure and the question.
_FULL = 16 * 2**20


def prepare_process() -> None:
    """Let a process that torchrun did not start be a world of one."""
    if "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        # The store then takes a port that is free when it starts, as nobody else has to find it.
        os.environ.setdefault("MASTER_PORT", "0")


@contextlib.contextmanager
def clean_end() -> Iterator[None]:
    """Around training: whatever ends it, the last complete checkpoint stays the one to resume from.

    SIGTERM and Ctrl-C become exceptions, so that an interrupted save is cleared away. SIGTERM then
    ends the process with one line and exit code 143, Ctrl-C is a `KeyboardInterrupt`. A checkpoint
    that cannot be written is an `OSError` that says why, flags that Megatron refuses are a `UserError`.
    """
    with signals.as_exceptions() as received, _writer_errors() as reasons:
        try:
            yield
        except BaseException as error:
            received.ending = True
            save = _save_directory()
            free = shutil.disk_usage(save).free if save else None
            _clear_interrupted_save(save)
            if signal.SIGTERM in received.numbers:
                line = "terminated by SIGTERM; the last complete checkpoint is intact"
                _log.error(line, extra=log.ALL_RANKS)
                raise SystemExit(128 + signal.SIGTERM) from None
            if signal.SIGINT in received.numbers:
                raise KeyboardInterrupt("the last complete checkpoint is intact") from error
            if isinstance(error, CheckpointException):
                raise _save_error(save, free, reasons) from error
            if refusal := refusals.of(error):
                raise refusal from error
            raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _save_error(save: str | None, free: int | None, reasons: list[str]) -> OSError:
    """Why a checkpoint was not written: PyTorch's own error does not say that the disk is full."""
    reason = reasons[0] if reasons else "no reason was given"
    if free is not None and free < _FULL:
        return OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({reason})", save)
    return OSError(errno.EIO, f"the checkpoint could not be written ({reason})", save)


@contextlib.contextmanager
def _writer_errors() -> Iterator[list[str]]:
    """The messages of Megatron's checkpoint writer, which drops the exceptions themselves."""
    messages: list[str] = []
    logger = logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async")

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            messages.append(record.getMessage())
        return True

    logger.addFilter(keep)
    try:
        yield messages
    finally:
        logger.removeFilter(keep)


def _save_directory() -> str | None:
    """The local --save directory of Megatron's run, if it got as far as having one."""
    save = getattr(parsed_args(), "save", None)
    return save if save is not None and os.path.isdir(save) else None


def _clear_interrupted_save(save: str | None) -> None:
    if save is None or int(os.environ.get("RANK", "0")) != 0:
        return
    for line in iterations.tidy(save):
        _log.info(line)
