"""`megatron-dyt report` and `megatron-dyt follow`: runs compared on a page; a run watched in the terminal."""

from collections.abc import Sequence
from pathlib import Path

import click

from megatron_dyt.errors import UserError


@click.command()
@click.option(
    "--run",
    "runs",
    multiple=True,
    required=True,
    metavar="NAME=DIR",
    help="A run and the directory with its checkpoint/ (in it metrics.jsonl) and eval.json; repeatable, the "
    "first is the one to compare with.",
)
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where to write."
)
@click.option("--title", default="Pretraining with Dynamic Tanh", help="The page's heading.")
@click.option(
    "--elapsed-seconds",
    type=float,
    metavar="S",
    help="Wall time of everything; default: the sum over training and evaluation.",
)
@click.option("--allow-missing-eval", is_flag=True, help="Report runs without eval.json.")
@click.option("--allow-missing-stats", is_flag=True, help="Report DyT runs without dyt_stats.jsonl.")
def report(
    runs: Sequence[str],
    output: Path,
    title: str,
    elapsed_seconds: float | None,
    allow_missing_eval: bool,
    allow_missing_stats: bool,
) -> None:
    """Compare training runs: writes results.json, report.html and curves.svg."""
    directories = parse_runs(runs)
    from megatron_dyt.report.page import write_report
    from megatron_dyt.report.runs import load_run

    loaded = [
        load_run(
            name,
            directory,
            allow_missing_eval=allow_missing_eval,
            allow_missing_stats=allow_missing_stats,
        )
        for name, directory in directories.items()
    ]
    written = write_report(
        loaded, output, title=title, elapsed_seconds=elapsed_seconds, allow_missing_eval=allow_missing_eval
    )
    for path in written:
        click.echo(f"wrote {path}")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", help="What to call the run. Default: the directory's name.")
def follow(directory: Path, name: str | None) -> None:
    """Show the progress of the run whose metrics.jsonl is, or will be, in DIRECTORY (its --save directory).

    It ends with the run's last step.

    \b
        megatron-dyt follow out/checkpoint
    """
    from megatron_dyt.report.follow import follow_run

    follow_run(directory, name or directory.resolve().name)


def parse_runs(options: Sequence[str]) -> dict[str, Path]:
    """{name: directory} of the `--run NAME=DIR` options, in their order.

    Raises:
        UserError: no `=`, an empty part, a name given twice or used by results.json itself.
    """
    from megatron_dyt.report.runs import RESERVED

    runs: dict[str, Path] = {}
    for option in options:
        name, separator, directory = option.partition("=")
        name = name.strip()
        if not (name and separator and directory):
            raise UserError(f"--run {option!r}: give NAME=DIR, for example --run dyt=quickstart/dyt")
        if name in runs:
            raise UserError(f"--run {option!r}: the name {name!r} is given twice; names must differ")
        if name in RESERVED:
            raise UserError(
                f"--run {option!r}: {name!r} is a key of results.json itself; take none of "
                + ", ".join(RESERVED)
            )
        runs[name] = Path(directory)
    return runs
