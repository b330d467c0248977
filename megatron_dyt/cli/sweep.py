"""`megatron-dyt sweep`: many training runs from one file, and a table of them."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from megatron_dyt.cli.options import POSITIVE
from megatron_dyt.errors import UserError

if TYPE_CHECKING:
    from megatron_dyt.sweep.spec import Sweep

_log = logging.getLogger(__name__)

# A run of the quickstart's shape has 1.5 GB.
_RUN_MEMORY = 2 * 2**30


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("flags", nargs=-1)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where runs and table are written. Default: sweeps/NAME of the file.",
)
@click.option(
    "--parallel",
    type=POSITIVE,
    help="Runs at a time. Default: cores / threads, of 2 GiB of memory each; on GPUs 1.",
)
@click.option("--threads", type=POSITIVE, default=1, show_default=True, help="Of each process.")
@click.option(
    "--nproc",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="GPUS",
    help="GPUs of each run, which torchrun starts; parallel runs take the next ones. 0: no torchrun.",
)
@click.option(
    "--save-interval",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="STEPS",
    help="Checkpoints from which a run goes on if the sweep is killed. 0: it starts anew.",
)
@click.option("--retry-failed", is_flag=True, help="Do failed runs once more (not diverged ones).")
@click.option("--yes", is_flag=True, help="Do more than 100 runs.")
@click.option("--list", "only_list", is_flag=True, help="Print each run's name and flags, and do nothing.")
def sweep(
    file: Path,
    flags: Sequence[str],
    output: Path | None,
    parallel: int | None,
    threads: int,
    nproc: int,
    save_interval: int,
    retry_failed: bool,
    yes: bool,
    only_list: bool,
) -> None:
    """Train the runs of a grid, several at a time, and write a table of their losses.

    FLAGS behind -- are appended to those of each run. Stopped or killed, the same command goes on: a run that
    is done stays done.

    \b
        megatron-dyt sweep examples/sweeps/quickstart.yaml
        megatron-dyt sweep examples/sweeps/quickstart.yaml --output short -- --train-iters 40
    """
    from megatron_dyt.sweep import runner, spec
    from megatron_dyt.sweep.sweep import check_size, run_sweep

    found = spec.load(file, flags)
    if only_list:
        for run in found.runs:
            click.echo(f"{run.name}: {' '.join(run.flags)}")
        return
    if not yes:
        check_size(found)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if parallel is None:
        parallel = 1 if nproc or _on_gpu(found) else _parallel_on_cpu(cores, threads)
    if parallel * threads > cores and not nproc:
        raise UserError(
            f"--parallel {parallel} times --threads {threads} is more than the {cores} cores here; take fewer"
        )
    options = runner.Options(
        parallel=parallel,
        threads=threads,
        gpus=nproc,
        retry=retry_failed,
        save_interval=save_interval,
        program=runner.torchrun(nproc) if nproc else runner.TRAIN,
    )
    for path in run_sweep(found, output or Path("sweeps") / file.stem, options):
        click.echo(f"wrote {path}")


def _parallel_on_cpu(cores: int, threads: int) -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores // threads, memory // _RUN_MEMORY))


def _on_gpu(found: "Sweep") -> bool:
    """Whether runs take the first GPU, each the same one; a line says how to use more."""
    import torch

    from megatron_dyt.cpu import device

    if not torch.cuda.is_available() or all(device.split(run.flags)[0] == "cpu" for run in found.runs):
        return False
    _log.info("one run at a time on the first GPU; --nproc 1 --parallel N has N at a time, on N GPUs")
    return True
