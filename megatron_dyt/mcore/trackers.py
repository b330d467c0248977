"""TensorBoard and Weights & Biases, to which Megatron logs from its last rank: what it leaves to do there.

Megatron logs to W&B only where it logs to TensorBoard, and starts a new W&B run with every start.
"""

import contextlib
import importlib.util
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_dyt import log
from megatron_dyt.atomic import write_atomically
from megatron_dyt.checkpoints import iterations
from megatron_dyt.errors import UserError
from megatron_dyt.patching import wrapper

_log = logging.getLogger(__name__)

# In the --save directory: the W&B run that a resumed training goes on with.
RUN_ID_FILE = "wandb_run_id.txt"
_INSTALL = "pip install 'megatron-dyt[train]'"


def check(args: Namespace) -> None:
    """Raise UserError where flags ask for TensorBoard or W&B and nothing would arrive there."""
    directory, project = getattr(args, "tensorboard_dir", None), getattr(args, "wandb_project", "")
    if project and not directory:
        raise UserError(
            f"--wandb-project {project} was given without --tensorboard-dir: Megatron logs to Weights & "
            "Biases only where it logs to TensorBoard, so that next to nothing would arrive. Give "
            "--tensorboard-dir DIR too"
        )
    if directory and not _is_there("tensorboard"):
        raise UserError(
            f"--tensorboard-dir {directory} needs the package tensorboard, without which Megatron logs "
            f"nothing, to Weights & Biases neither: {_INSTALL}, or leave the flag out"
        )
    if not project:
        if os.environ.get("WANDB_PROJECT"):
            _log.warning(
                "WANDB_PROJECT is set, but Megatron logs to Weights & Biases by flags alone, and nothing "
                "will arrive there: --wandb-project NAME --wandb-exp-name NAME --tensorboard-dir DIR"
            )
        return
    if not _is_there("wandb"):
        raise UserError(f"--wandb-project {project} needs the package wandb: {_INSTALL}")
    if not args.wandb_exp_name:
        raise UserError(f"--wandb-project {project} needs --wandb-exp-name NAME, the name of the run")
    if not (args.wandb_save_dir or args.save):
        raise UserError(f"--wandb-project {project} needs --wandb-save-dir DIR, or --save DIR")


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@wrapper
def wrap_wandb_writer(original: Callable[[Namespace], None], args: Namespace) -> None:
    """`global_vars._set_wandb_writer`, which starts the W&B run: one for all starts of a training.

    Its id is kept in the --save directory, and taken up where this start resumes from there.
    """
    if not getattr(args, "wandb_project", "") or args.rank != args.world_size - 1:
        original(args)
        return
    file = None if not args.save or "://" in args.save else Path(args.save) / RUN_ID_FILE
    try:
        with _run_to_go_on_with(file, args):
            original(args)
    except Exception as error:
        raise UserError(
            f"Weights & Biases did not start a run ({type(error).__name__}: {error}). wandb login, or "
            "WANDB_API_KEY, lets it log; WANDB_MODE=offline keeps the run in files for `wandb sync`; or "
            "leave --wandb-project out"
        ) from error
    _keep(file)


@contextlib.contextmanager
def _run_to_go_on_with(file: Path | None, args: Namespace) -> Iterator[None]:
    """Within, `wandb.init` goes on with the run in `file`, if this start resumes it and names no other."""
    resumes = args.load and iterations.last_iteration(args.load) is not None and not args.finetune
    if file is None or not resumes or not file.is_file() or "WANDB_RUN_ID" in os.environ:
        yield
        return
    given = {"WANDB_RUN_ID": file.read_text(encoding="utf-8").strip(), "WANDB_RESUME": "allow"}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _keep(file: Path | None) -> None:
    import wandb

    run = wandb.run
    if run is None:  # WANDB_MODE=disabled, in some releases.
        return
    # Megatron sets it once more, and W&B does not let a resumed run have another value.
    run.config.update({"slurm_job_name": os.getenv("SLURM_JOB_NAME", "N/A")}, allow_val_change=True)
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, f"{run.id}\n".encode())
    except OSError as error:
        what = "%s cannot be written (%s): after a restart W&B will have a new run"
        _log.warning(what, file, error, extra=log.ALL_RANKS)


@wrapper
def wrap_tensorboard_writer(original: Callable[[Namespace], None], args: Namespace) -> None:
    """`global_vars._set_tensorboard_writer`, whose writer does not end the run where it cannot write."""
    from megatron.training.global_vars import get_tensorboard_writer

    try:
        original(args)
    except OSError as error:
        _warn_of_tensorboard(args.tensorboard_dir, error)
    if (writer := get_tensorboard_writer()) is not None:
        # PyTorch's SummaryWriter hands all that it writes to this one.
        _forgive(writer.file_writer.event_writer, args.tensorboard_dir)


def _forgive(events: Any, directory: str) -> None:
    """TensorBoard's EventFileWriter raises from a thread's failure on: make it one warning, then nothing."""
    failed = False

    def forgiving(write: Callable[..., None]) -> Callable[..., None]:
        def try_to(*args: Any) -> None:
            nonlocal failed
            if failed:
                return
            try:
                write(*args)
            except OSError as error:
                failed = True
                _warn_of_tensorboard(directory, error)

        return try_to

    for name in ("add_event", "flush", "close"):
        setattr(events, name, forgiving(getattr(events, name)))


def _warn_of_tensorboard(directory: str, error: OSError) -> None:
    what = "TensorBoard's files in %s cannot be written (%s); training goes on without"
    _log.warning(what, directory, error, extra=log.ALL_RANKS)


def log_sites(sites: Iterable[Mapping[str, Any]], scale: float | None, iteration: int) -> None:
    """DyT's numbers to what this rank's Megatron logs to: each site's, and the mean of each role's.

    Args:
        sites: lines of all pipeline stages' statistics (`monitor.SiteRecord`).
        scale: of the embedding, if there is one.
    """
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    values: dict[str, float] = {} if scale is None else {"dyt-embedding-scale": scale}
    roles: dict[str, list[float]] = {}
    for site in sites:
        for field, title in (("alpha", "alpha"), ("input_std", "std"), ("saturated", "saturated")):
            values[f"dyt-{title}-{site['role']}/{site['name']}"] = site[field]
            roles.setdefault(f"dyt-{title}/{site['role']}", []).append(site[field])
    values |= {tag: sum(each) / len(each) for tag, each in roles.items()}
    if (writer := get_tensorboard_writer()) is not None:
        for tag, value in values.items():
            writer.add_scalar(tag, value, iteration)
    if (wandb := get_wandb_writer()) is not None:
        wandb.log(values, iteration)
