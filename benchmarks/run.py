"""Run every benchmark that this machine can, and put the results into docs: `make bench`

On a GPU the kernels, the Megatron model and the Hugging Face model; without one their CPU versions and the
quickstart's training step. Each runs in a process of its own. Figures and pictures go to
benchmarks/results/, tables into docs/benchmarks.md, each where its name is marked.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common_report import save, save_figures

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "benchmarks.md"
ON_CPU = ("cpu_norms", "cpu_training", "model", "hf_model")
ON_GPU = ("kernels", "model", "hf_model")
# Of several reports of one benchmark and day, those that are one measurement in parts.
PARTS = ("results", "accuracy")


def run(benchmark: str, directory: Path) -> bool:
    """Whether it ended well; what it says goes to the terminal."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / f"{benchmark}.py")]
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | {"PYTHONPATH": str(ROOT)}
    print(f"\n== {benchmark}", flush=True)
    start = time.monotonic()
    done = subprocess.run([*command, "--output", str(directory)], env=environment)
    print(f"{benchmark}: exit code {done.returncode}, {time.monotonic() - start:.0f} s", flush=True)
    return done.returncode == 0


def take(hour: Path, directory: Path) -> None:
    """Keep what the stages of `gpu_hour.sh` measured; the reports of a benchmark become one."""
    whole: dict[str, dict[str, Any]] = {}
    for path in sorted(hour.glob("*.json"), key=lambda path: path.stat().st_mtime):
        for report in json.loads(path.read_bytes()).get("reports", []):
            if (known := whole.setdefault(report["benchmark"], report)) is not report:
                known["left_out"] |= report["left_out"]
                for part in PARTS:
                    known[part] = known.get(part, []) + report.get(part, [])
    for name, report in whole.items():
        if any(row.get("compiled") for row in report["results"]):
            report["left_out"].pop("compiled", None)  # One stage leaves out what another measures.
        if name == "kernels":
            report["results"].sort(key=lambda result: (result["hidden"], result["tokens"]))
        module = importlib.import_module(name)
        if hasattr(module, "picture"):
            save(report, module.picture(report), directory)
        else:
            save_figures(report, directory)


def newest(directory: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """ "BENCHMARK on KIND" -> the newest result, KIND being cpu or cuda."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(directory.glob("*.json"), key=lambda path: json.loads(path.read_text())["date"]):
        report = json.loads(path.read_text())
        found[f"{report['benchmark']} on {report['hardware']['kind']}"] = (path, report)
    return found


def section(path: Path, report: dict[str, Any], docs: Path) -> str:
    """The Markdown of one result: where and with what it was measured, table, picture."""
    hardware, versions = report["hardware"], report["versions"]
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "not installed")
    load = hardware.get("load_average_before")
    facts = [
        f"{hardware['name']}, {hardware['processors']} processors",
        report["date"],
        f"commit {report['commit'][:12]}" + (" with changes" if report["changed_since"] else ""),
        used,
    ]
    facts += [] if load is None else [f"load average before the start {load}"]
    facts += [f"left out: {name} ({reason})" for name, reason in report["left_out"].items()]
    table = importlib.import_module(report["benchmark"]).table(report)
    picture = os.path.relpath(path.with_suffix(".svg"), docs.parent)
    return f"{'; '.join(facts)}.\n\n{table}\n\n![{report['benchmark']}]({picture})"


def fill(text: str, results: dict[str, tuple[Path, dict[str, Any]]], docs: Path) -> str:
    """`text` with the newest results, each between `<!-- results: NAME -->` and `<!-- end -->`."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in results:
            return match[0]
        return f"<!-- results: {name} -->\n{section(*results[name], docs)}\n<!-- end -->"

    return re.sub(r"<!-- results: (?P<name>[^>]+?) -->\n.*?<!-- end -->", replace, text, flags=re.S)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmarks", nargs="*", help="which (default: all that this machine can run)")
    parser.add_argument("--from", type=Path, dest="hour", metavar="DIR", help="run none: take gpu_hour.sh's")
    args = parser.parse_args(argv)
    if args.hour:
        take(args.hour, RESULTS)
        DOCS.write_text(fill(DOCS.read_text(), newest(RESULTS), DOCS))
        return 0
    names = args.benchmarks or (ON_GPU if torch.cuda.is_available() else ON_CPU)
    unknown = set(names) - {*ON_CPU, *ON_GPU}
    if unknown:
        parser.error(
            f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(ON_CPU + ON_GPU)}"
        )
    failed = [name for name in names if not run(name, RESULTS)]
    DOCS.write_text(fill(DOCS.read_text(), newest(RESULTS), DOCS))
    print(f"\ntables: {DOCS.relative_to(ROOT)}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
