"""Follow a training run: keep Megatron's whole log in a file, show progress with the time left.

    torchrun ... -m megatron_dyt.pretrain ... 2>&1 | python -m megatron_dyt.report.follow train.log

The log is appended to, so that a resumed run keeps its history. Besides progress it shows what a person
must see: warnings and errors of the plugin, validation losses, saved checkpoints, tracebacks.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_dyt.data.progress import duration
from megatron_dyt.errors import UserError, run_main

_STEP = re.compile(r"iteration\s+(\d+)/\s*(\d+) \|.*?per iteration \(ms\): ([\d.]+)")
_LOSS = re.compile(r"lm loss: (\S+)")
_VALIDATION = re.compile(r"validation loss at iteration (\d+)(.*?) \| lm loss value: (\S+)")
_SHOWN = re.compile(r"^(megatron_dyt|DyT |WARNING: DyT)|successfully (saved|loaded) checkpoint|Error\b")
# Of the steps so far; the first ones are slower and their weight fades.
_SMOOTHING = 0.7


def progress(lines: Iterable[str], name: str) -> Iterator[str]:
    """Lines to show for a run called `name`, from the lines of Megatron's log."""
    pace: float | None = None
    in_traceback = False
    for line in lines:
        line = line.rstrip("\n")
        in_traceback = line.startswith("Traceback") or (in_traceback and line[:1].isspace())
        if step := _STEP.search(line):
            done, total, milliseconds = int(step[1]), int(step[2]), float(step[3])
            seconds = milliseconds / 1000
            pace = seconds if pace is None else _SMOOTHING * pace + (1 - _SMOOTHING) * seconds
            loss = _LOSS.search(line)
            shown = f", loss {float(loss[1]):.3f}" if loss else ""
            left = duration((total - done) * pace)
            yield f"{name}: step {done}/{total}{shown}, {seconds:.2f} s a step, {left} left"
        elif validation := _VALIDATION.search(line):
            where = validation[2].strip() or "during training"
            yield f"{name}: validation loss {float(validation[3]):.4f} ({where}, step {validation[1]})"
        elif in_traceback or _SHOWN.search(line):
            yield line.strip() if not in_traceback else line


def keep(lines: Iterable[str], log: Path) -> Iterator[str]:
    """Pass lines on while appending each to `log` at once."""
    with open(log, "a", encoding="utf-8") as file:
        for line in lines:
            file.write(line)
            file.flush()
            yield line


def main(argv: list[str] | None = None) -> None:
    """Command line: `follow LOG [--name NAME]`, reading standard input."""
    parser = argparse.ArgumentParser(prog="python -m megatron_dyt.report.follow", description=__doc__)
    parser.add_argument("log", type=Path, help="file to append the whole log to")
    parser.add_argument("--name", help="what to call the run (default: the log's directory)")
    args = parser.parse_args(argv)
    if not args.log.parent.is_dir():
        raise UserError(
            f"the directory of {args.log} does not exist; make it first: mkdir -p {args.log.parent}"
        )
    started = time.monotonic()
    name = args.name or args.log.resolve().parent.name
    for line in progress(keep(sys.stdin, args.log), name):
        print(line, flush=True)
    print(f"{name}: log ended after {duration(time.monotonic() - started)}, kept in {os.fspath(args.log)}")


if __name__ == "__main__":
    run_main(main)
