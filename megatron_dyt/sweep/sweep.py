"""A sweep from its file to its table: `run_sweep`."""

import functools
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_dyt.atomic import locked
from megatron_dyt.errors import UserError
from megatron_dyt.sweep import runner, table
from megatron_dyt.sweep.runner import Options
from megatron_dyt.sweep.spec import Sweep

_log = logging.getLogger(__name__)

# More runs than this are asked for by a second word: a grid grows faster than one thinks.
LIMIT = 100


def check_size(sweep: Sweep) -> None:
    """Raises UserError when there are more than `LIMIT` runs."""
    if len(sweep.runs) > LIMIT:
        seeds = len({run.seed for run in sweep.runs})
        points = len(sweep.runs) // seeds
        raise UserError(
            f"the grid has {len(sweep.runs)} runs ({points} points with {seeds} seeds), more than {LIMIT}; "
            "take values away, or say --yes"
        )


def run_sweep(sweep: Sweep, output: Path, options: Options) -> list[Path]:
    """Do what is left of `sweep`, with its table in `output` up to date after each run.

    Returns:
        The files of the table, and the figures.

    Raises:
        UserError: another sweep works in `output`, what is there is of other runs, a command of `prepare`
            failed, or all runs fail.
    """
    refusal = f"another sweep works in {output}; wait for it, or give another --output"
    with locked(output / "lock", refusal):
        # Before anything is prepared: it refuses a directory that holds other runs.
        if len(runner.finished(output, sweep.runs, options.retry)) < len(sweep.runs):
            prepare(sweep.prepare)
        results = runner.run_all(output, sweep.runs, options, functools.partial(table.write, output, sweep))
        for line in table.lines(sweep, results):
            _log.info("%s", line)
        paths = table.write(output, sweep, results)
        if sweep.plots:
            # Here and not above: matplotlib takes a second to import.
            from megatron_dyt.sweep import plots

            paths += plots.write(output, sweep, results)
        return paths


def prepare(commands: Sequence[str]) -> None:
    """Run shell commands, which find this Python as $PY.

    Raises:
        UserError: one of them failed.
    """
    for command in commands:
        _log.info("prepare: %s", command)
        code = subprocess.run(
            command, shell=True, env=os.environ | {"PY": sys.executable}, check=False
        ).returncode
        if code:
            raise UserError(f"prepare: the command `{command}` ended with exit code {code}; see above")
