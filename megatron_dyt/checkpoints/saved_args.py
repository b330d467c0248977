"""Which iteration of a torch_dist checkpoint is meant, and the arguments that are stored in it."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron_dyt.checkpoints import iterations
from megatron_dyt.checkpoints.metadata import READ_ERRORS, damaged
from megatron_dyt.errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    """One iteration of a Megatron torch_dist checkpoint: `root` is what --save was given."""

    root: Path
    iteration: int
    directory: Path


def find_checkpoint(load: str, step: int | None = None) -> Checkpoint:
    """The iteration `step` (default: the latest) of `load`; `UserError` when there is none."""
    root = Path(load)
    if not root.is_dir():
        raise UserError(
            f"--load {load}: no such directory. Give the directory that training saved to (--save)"
        )
    if step is None:
        named = iterations.last_iteration(root)
        if named is None:
            raise UserError(f"--load {load}: {iterations.missing_tracker(root)}")
        if named == iterations.RELEASE:
            raise UserError(
                f"{root / iterations.TRACKER} names a release, a checkpoint without an iteration. Choose an "
                f"iteration with --ckpt-step; found: {iterations.listed(root)}"
            )
        step = int(named)
    directory = iterations.iteration_directory(root, str(step))
    if not directory.is_dir():
        raise UserError(
            f"--load {load}: iteration {step} is not there; found: {iterations.listed(root)}. "
            f"Choose one of them with --ckpt-step"
        )
    return Checkpoint(root, step, directory)


def saved_args(checkpoint: Checkpoint) -> Namespace:
    """The Megatron arguments that the training run stored in the checkpoint."""
    from megatron.core import dist_checkpointing

    where = checkpoint.directory
    if not dist_checkpointing.check_is_distributed_checkpoint(str(where)):
        raise UserError(
            f"{where} is not a torch_dist checkpoint (Megatron's --ckpt-format torch_dist, with a "
            f"metadata.json): it is incomplete or of another format. Choose another iteration with "
            f"--ckpt-step, or save with --ckpt-format torch_dist"
        )
    try:
        common = dist_checkpointing.load_common_state_dict(str(where))
    except READ_ERRORS as error:
        raise damaged(where, error) from error
    if common.get("args") is None:
        raise UserError(
            f"{where} holds no arguments of the run that saved it, so its model is unknown. Save "
            f"it with Megatron's training loop, which stores them"
        )
    return common["args"]
