"""The metadata of a torch_dist checkpoint, and whether this torch is the one to read them."""

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron_dyt.errors import UserError


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
