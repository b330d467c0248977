"""Damaged checkpoints: found on all ranks together before anything is loaded, and passed over if allowed.

Megatron's ranks each read their own shards. One that cannot would end alone, and the others wait for it;
one that reads a flipped bit would train on. So all ranks look first, at a part each, and agree.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from megatron_dyt import world
from megatron_dyt.checkpoints import crc, iterations, optimizer_layout
from megatron_dyt.checkpoints.iterations import OTHER_CHECKPOINT, DamagedCheckpoint
from megatron_dyt.checkpoints.metadata import READ_ERRORS
from megatron_dyt.errors import UserError
from megatron_dyt.parsed_args import parsed_args
from megatron_dyt.patching import wrapper

_log = logging.getLogger(__name__)


@wrapper
def wrap_load_checkpoint(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`training.load_checkpoint` that takes an earlier checkpoint for a damaged one, if allowed to.

    Where it fails because of the optimizer's layout, the error says so: Megatron's names another flag.
    """
    flags = parsed_args()
    while True:
        try:
            _check_start(flags, alone=False)
            result = original(*args, **kwargs)
        except DamagedCheckpoint as error:
            _step_back(flags, error)
        except READ_ERRORS:
            if flags is not None and (path := _to_load(flags)):
                optimizer_layout.refuse_other(flags, path)
            raise
        else:
            _set_aside(flags)
            return result


@wrapper
def wrap_load_args(original: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any) -> Any:
    """`checkpointing.load_args_from_checkpoint`, likewise: it comes first with --use-checkpoint-args."""
    while True:
        try:
            _check_start(args, alone=True)
            return original(args, *rest, **kwargs)
        except DamagedCheckpoint as error:
            _step_back(args, error)


@wrapper
def wrap_delete(original: Callable[..., None], save: str, iteration: int, *rest: Any) -> None:
    """`checkpointing._async_delete_checkpoint_impl`, one checkpoint behind when there may be a fallback.

    With --save-retain-interval Megatron deletes the checkpoint before the one just saved. The newest of those
    before it goes in its place, so that the last two are there.
    """
    args = parsed_args()
    if args is not None and getattr(args, "dyt_load_fallback", False) and "://" not in save:
        earlier = iterations.earlier_complete(iterations.iteration_directory(save, str(iteration)))
        numbers = [int(path.name.removeprefix("iter_")) for path in earlier if not path.is_symlink()]
        passing = [number for number in numbers if number % args.save_retain_interval]
        if not passing:
            return
        iteration = passing[0]
    original(save, iteration, *rest)


def verify(
    checkpoint_dir_: Any, wanted: set[str], check_data: bool = True, group: ProcessGroup | None = None
) -> None:
    """Raise `DamagedCheckpoint` on all ranks of `group` when any of them finds damage.

    A plain UserError instead when a newer torch has written the checkpoint.

    Rank 0 looks whether the files are there at full length. With `check_data` each rank compares its part
    of the bytes of the `wanted` keys with the checksums in them.
    """
    path = Path(str(checkpoint_dir_))
    if not path.is_dir():
        return  # In an object store.
    rank = world.rank(group)
    problem = _problem_of_files(path) if rank == 0 else None
    if problem is None and check_data:
        problem = _problem_of_data(path, wanted, rank, world.size(group))
    _agree(problem, group)


def _problem_of_files(path: Path) -> UserError | None:
    try:
        iterations.check_files(path)
    except UserError as error:
        return error
    return None


def _problem_of_data(path: Path, wanted: set[str], rank: int, ranks: int) -> UserError | None:
    try:
        found = crc.find_damage(path, wanted.__contains__, rank, ranks)
    except UserError as error:
        return error
    except Exception as error:  # Whatever a damaged .metadata raises when it is unpickled.
        found = f"{path / '.metadata'}: {type(error).__name__}: {error}"
    if found is None:
        return None
    return DamagedCheckpoint(f"the checkpoint {path} is damaged. {found}. Restore it, or: {OTHER_CHECKPOINT}")


def _agree(problem: UserError | None, group: ProcessGroup | None = None) -> None:
    """Raise the first problem of any rank on all of them."""
    first = next(filter(None, world.gather(problem, group)), None)
    if first is not None:
        raise first


def _check_start(args: Any, *, alone: bool) -> None:
    """Check what Megatron reads before it loads: that the checkpoint is whole, its arguments undamaged.

    With `alone` each rank decides by itself: the process groups are not there yet.
    """
    path, problem = None, None
    try:
        path = _to_load(args)
    except UserError as error:
        problem = error
    if path is not None and (alone or world.rank() == 0):
        problem = _problem_of_start(path, args)
    if not alone:
        # Whatever this rank has found: the others wait for it.
        _agree(problem)
        _agree_on(path)
    elif problem is not None:
        raise problem


def _agree_on(path: Path | None) -> None:
    """Raise UserError on all ranks unless all are to load `path`."""
    paths = world.gather(path)
    if others := [rank for rank, each in enumerate(paths) if each != paths[0]]:
        raise UserError(
            f"rank 0 finds {paths[0] or 'no checkpoint'} to load, but rank {others[0]} "
            f"{paths[others[0]] or 'none'} ({len(others)} of {len(paths)} ranks differ): "
            "is the directory of --load mounted on all nodes?"
        )


def _problem_of_start(path: Path, args: Any) -> UserError | None:
    if not path.is_dir():
        return DamagedCheckpoint(
            f"the checkpoint {path}, which is to be loaded, does not exist. {OTHER_CHECKPOINT}"
        )
    problem = _problem_of_files(path)
    if problem is None and checks_data(args) and (path / "metadata.json").is_file():
        problem = _problem_of_data(path, set(), rank=0, ranks=1)
    return problem


def checks_data(args: Any) -> bool:
    """Whether data are compared with their checksums: unless `--no-dyt-verify-load` was given."""
    return bool(getattr(args, "dyt_verify_load", True))


def _to_load(args: Any) -> Path | None:
    """The local checkpoint that --load and --ckpt-step name; None when Megatron decides otherwise."""
    directory = getattr(args, "load", None)
    if directory is None or "://" in directory or getattr(args, "non_persistent_ckpt_type", None):
        return None
    iteration = iterations.iteration_to_load(directory, getattr(args, "ckpt_step", None))
    return None if iteration is None else iterations.iteration_directory(directory, iteration)


# Damaged checkpoints that this process has passed over.
_passed_over: list[Path] = []


def _step_back(args: Any, error: DamagedCheckpoint) -> None:
    """Make the run load the complete checkpoint before the damaged one; raise `error` if it must not."""
    damaged = _to_load(args)
    if not getattr(args, "dyt_load_fallback", False) or damaged is None:
        raise error
    earlier = iterations.earlier_complete(damaged)
    if not earlier:
        _passed_over.clear()
        raise DamagedCheckpoint(f"{error} No complete checkpoint is before it.") from error
    _log.warning("%s", error)
    _log.warning(f"--dyt-load-fallback: going back to {earlier[0]}")
    args.ckpt_step = int(earlier[0].name.removeprefix("iter_"))
    _passed_over.append(damaged)


def _set_aside(args: Any) -> None:
    """Once another one is loaded: rename what was passed over, where this run saves.

    It would write into those directories again, and a save that is interrupted there would leave a mixture.
    """
    passed, loaded = list(_passed_over), _to_load(args)
    _passed_over.clear()
    if not passed or loaded is None or args.save is None:
        return
    if Path(args.save).resolve() != loaded.parent.resolve() or world.rank() != 0:
        return
    for path in filter(Path.is_dir, passed):
        _log.info(f"renamed {path} to {iterations.set_aside(path, loaded).name}")
