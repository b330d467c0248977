"""What a benchmark writes: figures with hardware, versions and commit, a picture, a Markdown table."""

import argparse
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_dyt.atomic import write_atomically, write_json

PACKAGES = (
    *("torch", "triton", "megatron-core", "transformers", "liger-kernel", "quack-kernels"),
    *("transformer-engine", "apex"),
)
_HERE = Path(__file__).parent


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write figures (JSON) and a picture (SVG) there"
    )


def new_report(benchmark: str, device: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A report without results: what was run, on what, with what. `device` is "cpu" or "cuda"."""
    return {
        "benchmark": benchmark,
        "commit": _run("git", "-C", str(_HERE), "rev-parse", "HEAD"),
        "changed_since": bool(_run("git", "-C", str(_HERE), "status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "hardware": _gpu() if device == "cuda" else _cpu(),
        "versions": versions(),
        "settings": settings,
        "left_out": {},
        "results": [],
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    query = "--query-gpu=driver_version,clocks.max.sm,power.limit"
    return {
        "kind": "cuda",
        "name": properties.name,
        "processors": properties.multi_processor_count,
        "driver_clock_power": _run("nvidia-smi", query, "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def _cpu() -> dict[str, Any]:
    """The load average is that of the minute before: near 0 on a quiet machine."""
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return {
        "kind": "cpu",
        "name": names[0] if names else platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "load_average_before": round(os.getloadavg()[0], 1),
    }


def _run(*command: str) -> str:
    """A command's output, empty where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def heading(report: dict[str, Any]) -> str:
    """One line: the hardware and the versions that matter most."""
    hardware = report["hardware"]
    return f"{hardware['name']} ({hardware['processors']} processors), torch {report['versions']['torch']}"


def result_path(report: dict[str, Any], directory: Path) -> Path:
    """DIRECTORY/BENCHMARK-DEVICE-DATE.json."""
    device = re.sub(r"[^a-z0-9]+", "-", report["hardware"]["name"].lower()).strip("-")
    return directory / f"{report['benchmark']}-{device}-{report['date'][:10]}.json"


def save(report: dict[str, Any], picture: str, directory: Path | None) -> None:
    """Write figures and picture, and name the files; without a directory nothing."""
    if directory is None:
        return
    write_atomically(result_path(report, directory).with_suffix(".svg"), picture.encode())
    save_figures(report, directory)


def save_figures(report: dict[str, Any], directory: Path | None) -> None:
    if directory is None:
        return
    path = result_path(report, directory)
    write_json(path, report)
    print(f"written: {path}")


def write_into(page: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- NAME -->` and `<!-- end -->` of a page."""
    marked = re.compile(f"(<!-- {name} -->\\n).*?(<!-- end -->)", re.DOTALL)
    whole, found = marked.subn(lambda m: f"{m[1]}{text}\n{m[2]}", page.read_text())
    if not found:
        raise SystemExit(f"error: {page} has no <!-- {name} --> with an <!-- end --> behind it")
    write_atomically(page, whole.encode())


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
