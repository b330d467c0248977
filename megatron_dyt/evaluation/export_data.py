"""Fetch the data of lm-eval tasks from the Hub into files for machines without network.

    megatron-dyt eval-data --output DIR [--tasks dyt_paper]

DIR is what `megatron-dyt eval --task-data DIR` reads: `TASK.SPLIT.jsonl` for each task.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_dyt.errors import UserError, run_main
from megatron_dyt.evaluation import paper
from megatron_dyt.evaluation.local_data import evaluated_split, write_documents
from megatron_dyt.evaluation.task_loading import load_tasks


def main(argv: list[str] | None = None) -> None:
    """Write the files that `argv` (default: the command line) asks for."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    for name, task in load_tasks(options.tasks, options.include_path)["tasks"].items():
        split = evaluated_split(task.config)
        path = options.output / f"{name}.{split}.jsonl"
        write_documents(path, task.dataset[split])
        print(f"megatron_dyt: {len(task.dataset[split]):,} documents in {path}", flush=True)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-dyt eval-data", description=__doc__)
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="DIR", help="where to write the files")
    add(
        "--tasks",
        type=lambda text: [name for name in (part.strip() for part in text.split(",")) if name],
        default=[paper.GROUP],
        metavar="A,B",
        help="lm-eval tasks or groups (default: the paper's 15)",
    )
    add("--include-path", metavar="DIR", help="directory with more tasks (lm-eval YAML files)")
    options = parser.parse_args(argv)
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"--output {options.output} is a file; give a directory")
    if not options.tasks:
        raise UserError("--tasks names no task; give lm-eval tasks, separated by commas")
    return options


if __name__ == "__main__":
    run_main(main)
