"""Whole runs at the quickstart's shape, by this build and another: cpu_sweep.py --against CHECKOUT

A run is start, steps and validation of examples/sweeps/quickstart.yaml, with RMSNorm or DyT: here forked
from one process that has imported everything, as `megatron-dyt sweep` does it; by the other checkout (its C
kernels compiled, where it has any) a process each. Two at a time with one thread each, and one after the
other with two threads. Reported are the CPU time of a run, user and system, which other work on the machine
changes less, and its wall time. What the imports take is reported apart, as a sweep does them once.

The data are made in sweeps/data. With fewer --steps the start weighs more.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common_picture import Bar, bars_svg
from common_report import add_output, heading, markdown_table, new_report, save

from megatron_dyt.report import metrics
from megatron_dyt.sweep import flags, spec, warm
from megatron_dyt.sweep.sweep import prepare

ROOT = Path(__file__).parents[1]
SWEEP = ROOT / "examples" / "sweeps" / "quickstart.yaml"
# What other builds know too, near its best rate.
POINTS = ({"norm": "rmsnorm", "lr": "8e-3"}, {"norm": "unit", "lr": "5.6e-3"})
# -P: not this checkout, where it is the working directory, in the place of the one in PYTHONPATH.
PYTHON = (sys.executable, "-P")
# Runs at a time -> threads of each.
THREADS = {2: 1, 1: 2}

type Process = subprocess.Popen[bytes] | warm.Forked
type Start = Callable[[Sequence[str], Path], Process]


class Run(NamedTuple):
    """Seconds by the clock and of the CPU, and the losses: of each logged step, and of the validation."""

    wall: float
    cpu: float
    losses: list[float]


def cpu_seconds(pid: int, children: bool) -> float:
    """User and system time of a process, or of those that it has waited for: proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = fields[13:15] if children else fields[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def measure(
    start: Start, parent: int, runs: Mapping[str, Sequence[str]], at_a_time: int, directory: Path
) -> dict[str, Run]:
    """Do `runs`, which are children of the process `parent`."""
    found = {}
    waiting, running = list(runs), {}
    before = cpu_seconds(parent, children=True)
    while waiting or running:
        while waiting and len(running) < at_a_time:
            name = waiting.pop(0)
            (directory / name).mkdir()
            places = (
                "--metrics-dir",
                str(directory / name),
                "--data-cache-path",
                str(directory / name / "cache"),
            )
            running[name] = time.monotonic(), start([*runs[name], *places], directory / name / "log.txt")
        time.sleep(0.05)
        for name, (began, process) in list(running.items()):
            if process.poll() is None:
                continue
            wall, now = time.monotonic() - began, cpu_seconds(parent, children=True)
            if process.returncode:
                log = (directory / name / "log.txt").read_text()
                raise RuntimeError(f"{name} ended with exit code {process.returncode}: {log[-1000:]}")
            found[name] = Run(wall, now - before, _losses(directory / name))
            before = now
            del running[name]
    return found


def _losses(directory: Path) -> list[float]:
    run = metrics.read(directory / metrics.FILE_NAME)
    return [*(step.loss for step in run.steps), *(loss for _step, loss in run.validation)]


def measure_forked(
    environment: Mapping[str, str], runs: Mapping[str, Sequence[str]], at_a_time: int, directory: Path
) -> tuple[dict[str, Run], float]:
    """The runs, and the CPU time of the imports."""
    parent = warm.Parent(environment, directory / "imports.txt")
    imports = cpu_seconds(parent.pid, children=False)

    def start(flags: Sequence[str], log: Path) -> Process:
        forked = parent.fork(flags, log)
        if forked is None:
            raise RuntimeError(f"nothing can be forked here: {(directory / 'imports.txt').read_text()}")
        return forked

    try:
        return measure(start, parent.pid, runs, at_a_time, directory), imports
    finally:
        parent.close()


def measure_anew(
    environment: Mapping[str, str], runs: Mapping[str, Sequence[str]], at_a_time: int, directory: Path
) -> dict[str, Run]:
    def start(flags: Sequence[str], log: Path) -> Process:
        command = [*PYTHON, "-m", "megatron_dyt.pretrain", *flags]
        with log.open("wb") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, env=environment)

    return measure(start, os.getpid(), runs, at_a_time, directory)


def imported_from(checkout: Path) -> Path:
    """Where a process of `measure_anew` for `checkout` has its megatron_dyt from."""
    code = "import megatron_dyt; print(megatron_dyt.__path__[0])"
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    found = subprocess.run([*PYTHON, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return Path(found.stdout.splitlines()[-1]).resolve().parent


def compare(runs: Mapping[str, Sequence[str]], against: Path, at_a_time: int) -> list[dict[str, Any]]:
    """A row a run: the times of both builds, and by how much their losses differ at most."""
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS[at_a_time]), "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        ours, imports = measure_forked(environment | {"PYTHONPATH": str(ROOT)}, runs, at_a_time, Path(first))
        other = environment | {"PYTHONPATH": str(against)}
        theirs = measure_anew(other, runs, at_a_time, Path(second))
    return [
        {
            "run": name,
            "at_a_time": at_a_time,
            "threads": THREADS[at_a_time],
            "imports_cpu": imports,
            **{
                f"{kind}_{which}": getattr(run, kind)
                for kind in ("cpu", "wall")
                for which, run in (("here", ours[name]), ("other", theirs[name]))
            },
            "loss": ours[name].losses[-1],
            "loss_difference": max(
                abs(a - b) for a, b in zip(ours[name].losses, theirs[name].losses, strict=True)
            ),
        }
        for name in runs
    ]


def table(report: dict[str, Any]) -> str:
    columns = (
        *("", "at a time x threads", "CPU time, s", "other build", "ratio", "wall time, s", "other build"),
        *("ratio", "runs an hour", "losses differ by"),
    )
    rows = []
    for row in report["results"]:
        times = []
        for kind in ("cpu", "wall"):
            here, other = row[f"{kind}_here"], row[f"{kind}_other"]
            times += [f"{here:.1f}", f"{other:.1f}", f"{other / here:.2f}"]
        rate = f"{row['at_a_time'] * 3600 / row['wall_here']:.0f}"
        rows.append(
            [
                row["run"],
                f"{row['at_a_time']} x {row['threads']}",
                *times,
                rate,
                f"{row['loss_difference']:.1e}",
            ]
        )
    imports = ", ".join(sorted({f"{row['imports_cpu']:.1f}" for row in report["results"]}))
    return f"{markdown_table(columns, rows)}\n\nThe imports took {imports} s of CPU, once."


def picture(report: dict[str, Any]) -> str:
    groups = []
    for row in report["results"]:
        seconds = (row["cpu_here"], row["cpu_other"])
        bars = [
            Bar(name, s, s, s, i) for i, (name, s) in enumerate(zip(("here", "other"), seconds, strict=True))
        ]
        groups.append((f"{row['run']}, {row['at_a_time']} x {row['threads']}", bars))
    return bars_svg("A run of the quickstart's shape", "seconds of CPU", groups, digits=0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", required=True, help="the other build")
    parser.add_argument("--steps", type=int, default=200, help="of a run (default 200)")
    parser.add_argument(
        "--at-a-time",
        type=int,
        choices=THREADS,
        help="two with a thread each, or one with two (default: both)",
    )
    add_output(parser)
    args = parser.parse_args(argv)
    if not (args.against / "megatron_dyt").is_dir():
        parser.error(f"--against {args.against} is no checkout of megatron_dyt")
    if (found := imported_from(args.against)) != args.against.resolve():
        parser.error(f"--against {args.against}: Python imports the megatron_dyt of {found} in its place")
    # Without statistics: earlier builds write them beside a --save alone.
    sweep = spec.load(SWEEP, ["--train-iters", str(args.steps), "--dyt-stats-interval", "0"])
    seed = sweep.runs[0].seed
    runs = {run.point["norm"]: run.flags for run in sweep.runs if run.point in POINTS and run.seed == seed}
    (data,) = {flags.values(words)["valid_data_path"] for words in runs.values()}
    if not Path(f"{data}.idx").exists():  # The last that is made.
        prepare(sweep.prepare)
    report = new_report(
        "cpu_sweep", "cpu", {"steps": args.steps, "against": args.against.resolve().name, "runs": runs}
    )
    print(heading(report))
    for at_a_time in [args.at_a_time] if args.at_a_time else THREADS:
        report["results"] += compare(runs, args.against.resolve(), at_a_time)
    print(table(report))
    save(report, picture(report), args.output)


if __name__ == "__main__":
    main()
