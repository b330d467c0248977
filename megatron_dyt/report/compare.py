"""Compare runs: `python -m megatron_dyt.report.compare --run NAME=DIR [...] --output DIR`.

Writes `results.json`, `report.html` and `curves.svg` (the loss curves alone) into the output
directory. What a run's directory holds is described in `runs.py`; the first run is the one that the
others are compared with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_dyt.atomic import write_atomically
from megatron_dyt.errors import UserError, run_main
from megatron_dyt.report.page import report_html
from megatron_dyt.report.plots import curves_svg
from megatron_dyt.report.runs import RESERVED, load_run, summarize


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report that `argv` asks for. UserError on bad input, with nothing written."""
    args = _parser().parse_args(argv)
    directories = parse_runs(args.run)
    runs = [
        load_run(
            name,
            directory,
            allow_missing_eval=args.allow_missing_eval,
            allow_missing_stats=args.allow_missing_stats,
        )
        for name, directory in directories.items()
    ]
    results = summarize(
        runs, elapsed_seconds=args.elapsed_seconds, allow_missing_eval=args.allow_missing_eval
    )
    files = {
        "results.json": json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False) + "\n",
        "report.html": report_html(runs, results, args.title),
        "curves.svg": curves_svg(runs, args.title),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomically(args.output / name, text.encode())
        print(f"wrote {args.output / name}")
    return 0


def parse_runs(options: Sequence[str]) -> dict[str, Path]:
    """{name: directory} of the `--run NAME=DIR` options, in their order.

    Raises:
        UserError: no `=`, an empty part, a name given twice or used by results.json itself.
    """
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dyt.report.compare",
        description="Compare training runs: results.json, report.html, curves.svg.",
    )
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="a run and the directory with its train.log, eval.json and checkpoint/; repeatable, "
        "the first is the one to compare with",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument("--title", default="Pretraining with Dynamic Tanh", help="the page's heading")
    parser.add_argument(
        "--elapsed-seconds",
        type=float,
        metavar="S",
        help="wall time of everything; default: the sum over training and evaluation",
    )
    parser.add_argument("--allow-missing-eval", action="store_true", help="report runs without eval.json")
    parser.add_argument(
        "--allow-missing-stats",
        action="store_true",
        help="report DyT runs without checkpoint/dyt_stats.jsonl",
    )
    return parser


if __name__ == "__main__":
    run_main(main)
