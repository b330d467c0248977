"""The metadata of a torch_dist checkpoint, and what to say where it, or what it names, cannot be read."""

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_dyt.errors import UserError, describe

# What reading a damaged file may raise is anything; torch's own is no Exception.
READ_ERRORS = (Exception, CheckpointException)


def is_optimizer(key: str) -> bool:
    """Whether a key of the metadata is of the optimizer's state."""
    return key.startswith("optimizer.") or ".optimizer." in key


def read_metadata(directory: Path) -> Metadata:
    """The metadata of a checkpoint directory (`.../iter_0000100`).

    Raises:
        UserError: a newer torch has written them. A sound checkpoint must not pass for a damaged one, which a
            run may set aside.
        Exception: whatever reading a damaged `.metadata` raises.
    """
    try:
        return FileSystemReader(directory).read_metadata()
    except ValueError as error:
        if (newer := of_newer_torch(directory, error)) is None:
            raise
        raise newer from error


def of_newer_torch(directory: Path, error: BaseException) -> UserError | None:
    """What to say of `error` if it comes from a newer torch's checkpoint, else None.

    torch 2.15 pickles a tensor's properties as six values, and those before unpack five
    (`torch/distributed/checkpoint/metadata.py`, `TensorProperties`).
    """
    if "too many values to unpack" not in str(error):  # In 2.14 within an AssertionError's text.
        return None
    return UserError(
        f"the checkpoint {directory} was saved with a newer torch than this {torch.__version__}: what "
        "2.15 and later save, those before cannot read. Load it with the torch of the run that saved it, or "
        "a newer one"
    )


def damaged(directory: Path, error: BaseException) -> UserError:
    """For an `error` among `READ_ERRORS` while the checkpoint `directory` was read."""
    error = cause(error)
    return of_newer_torch(directory, error) or UserError(
        f"{directory} cannot be read ({describe(error)}). It is incomplete or damaged: choose "
        f"another iteration with --ckpt-step, or copy it again"
    )


def cause(error: BaseException) -> BaseException:
    """One rank's failure in place of a CheckpointException, whose own message is a traceback."""
    # Each rank's is an (exception, stack) pair.
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    return next((failure[0] for failure in failures), error)
