"""Makes docs/compatibility.md of test results: what was tested with which releases, and how it went.

    scripts/compatibility.py collect build/results build/newest  test runs' results -> docs/compatibility.json
    scripts/compatibility.py render                              docs/compatibility.json -> the page
    scripts/compatibility.py tests [DEPENDENCY ...]              prints what `make test-newest` is to run

`make compatibility` does the first two. The results come from `pytest --record-results`: `make test` and
`make test-versions` fill build/results, `make test-newest` build/newest; where one is missing its part of the
page stays. What another target runs (`make test-te`, `test-slurm`, `test-layouts`) is in folders of
build/results, and stands in the release's column in the place of a skipped test. Rows are what the tests are
called: nothing here knows a family or a layout.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "constraints.txt"
DATA, PAGE = ROOT / "docs/compatibility.json", ROOT / "docs/compatibility.md"

# Tests whose parameter is MODEL-LAYOUT.
PARALLEL = re.compile(
    r"test_(?:equivalence|families)\.py::test_(?:one|two|four)_process(?:es)?\[(?P<case>[^\]]+)\]"
    r"|test_families\.py::test_gradients_and_loss_are_those_of_one_process\[family-(?P<family>[^\]]+)\]"
)
# Further groups of tests, by where they are: a name for the reader, and what their ids begin with or contain.
GROUPS = {
    "checkpoints from one layout to another": ("tests/distributed/test_checkpoint",),
    "marks and special cases taken away are noticed": ("tests/distributed/test_mutations.py",),
    "faults: kills, damage, bad numbers": ("tests/faults/", "tests/distributed/test_guard.py"),
    "ranks that disagree": ("tests/distributed/test_handshake.py",),
    "models of real Transformer Engine layers, built and saved": ("tests/te/",),
    "Transformer Engine's specs (stand-ins for its classes)": ("transformer_engine", "te_spec", "[te"),
    "launch scripts on a real Slurm of two nodes": ("tests/slurm/",),
    "combinations that are refused": ("tests/mcore/test_limits.py",),
    "other unit tests of what touches Megatron": ("tests/mcore/",),
    "training and evaluation entry points": (
        "tests/test_pretrain.py",
        "tests/test_run.py",
        "tests/evaluation/",
    ),
}
# The tests that each dependency of pyproject.toml concerns. Tools (pytest, ruff, Sphinx ...) are left out.
TOUCHED = {
    "torch": (
        "tests/ops/",
        "tests/nn/",
        "tests/mcore/",
        "tests/checkpoints/",
        "tests/hf/",
        "tests/distributed/test_equivalence.py",
    ),
    "triton": ("tests/ops/",),
    "numpy": ("tests/ops/", "tests/data/"),
    "megatron-core": ("tests/mcore/", "tests/test_pretrain.py", "tests/test_run.py"),
    "transformers": ("tests/hf/", "tests/evaluation/"),
    "tokenizers": ("tests/hf/test_tokenizer.py", "tests/data/"),
    "sentencepiece": ("tests/hf/test_tokenizer.py", "tests/data/"),
    "protobuf": ("tests/hf/test_tokenizer.py", "tests/data/"),
    "safetensors": ("tests/hf/",),
    "huggingface-hub": ("tests/hf/", "tests/evaluation/"),
    "lm-eval": ("tests/evaluation/",),
    "datasets": ("tests/data/", "tests/evaluation/"),
    "pyarrow": ("tests/data/",),
    "datatrove": ("tests/data/",),
    "backports-zstd": ("tests/data/",),
    "tensorboard": ("tests/mcore/",),
    "einops": ("tests/mcore/",),
    "click": ("tests/cli/",),
    "pyyaml": ("tests/recipes/",),
    "jinja2": ("tests/report/",),
    "matplotlib": ("tests/report/",),
    "tqdm": ("tests/data/", "tests/evaluation/"),
    "megatron-bridge": ("tests/test_bridge.py",),
}
APART = ("megatron-bridge",)  # Dependencies whose tests run in an environment of their own.
HEAD = """# Compatibility

Made by `make compatibility` of the results of `make test`, `make test-versions`, `make test-te`,
`make test-slurm`, `make test-layouts` and `make test-newest`; not typed. Date and commit are those of the
release's longest run. A test that has not run on a release has an empty field: releases other than that of
`constraints.txt` run the core of the table. Nothing on this page ran on a GPU unless its run says so under
device: context parallelism, NCCL, Transformer Engine's kernels, FP8, CUDA graphs and Mamba's kernels need one
and have not run; the cases of `tests/distributed/cases.py` run there as they are, with
MEGATRON_DYT_DEVICE=cuda. What is refused with a clear error is in `megatron_dyt/mcore/limits.py` and
[families.md](families.md).

## Runs, by release of megatron-core
"""
EQUIVALENCE = """## Training is that of one process: family and layout

First-step gradient of every parameter within 1e-5 (an alpha's by the size of the typical alpha's), losses
and parameters after all steps within the tolerance of `tests/distributed/compare.py` (families outside the
GPT training loop: gradient and loss of the first step). Families and layouts are those of
`tests/distributed/cases.py` and
`tests/distributed/family_cases.py`, where their flags stand.
"""
NEWEST = """## The newest release of every dependency

By `make test-newest`: the newest that `pyproject.toml` allows, all in one environment, and the tests that
each concerns; Megatron Bridge in one of its own, with the releases that it pins. Pinned is what
`constraints.txt` says. A checkpoint that torch 2.15 has saved cannot be loaded with a torch before it, and
the message then says so.
"""
MARKS = {"passed": "yes", "failed": "**fails**", "skipped": "skipped"}


def main(argv: list[str]) -> int:
    """Run the command."""
    if argv[:1] == ["tests"]:
        print(*tests(argv[1:]))
        return 0
    if argv[:1] == ["collect"] and len(argv) == 3:
        known = json.loads(DATA.read_text(encoding="utf-8"))
        data = collect(known, Path(argv[1]), Path(argv[2]))
        write(DATA, json.dumps(data, indent=1, sort_keys=True) + "\n")
    elif argv != ["render"]:
        print(__doc__, file=sys.stderr)
        return 2
    write(PAGE, render(json.loads(DATA.read_text(encoding="utf-8"))))
    return 0


def write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def tests(dependencies: Sequence[str]) -> list[str]:
    """Paths of the tests that these dependencies concern; without any those of all but the ones apart."""
    chosen = dependencies or [name for name in TOUCHED if name not in APART]
    return list(dict.fromkeys(path for name in chosen for path in TOUCHED[name]))


def collect(known: dict[str, Any], results: Path, newest: Path) -> dict[str, Any]:
    """What the page shows: `known`, with what the two directories have results of in place of what it had.

    Raises:
        SystemExit: neither has any.
    """
    runs, tried = _merged(_records(results)), _records(newest)
    if not runs and not tried:
        raise SystemExit(
            f"{results} and {newest} have no results; run `make test`, `make test-versions` or "
            "`make test-newest` first."
        )
    runs.sort(key=lambda record: _by_version(record["megatron"]))
    found = known | {"runs": [summary(record) for record in runs]} if runs else known
    return found | {"newest": newest_releases(tried)} if tried else found


def _records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.rglob("*.json"))]


def _merged(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record of each release: the longest, and what others have of tests that it skipped or has not."""
    releases: dict[str, dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: -len(record["outcomes"])):
        whole = releases.setdefault(record["megatron"], record)
        for test, outcome in record["outcomes"].items():
            known = whole["outcomes"].get(test)
            if known is None or (known == "skipped" and outcome != "skipped"):
                whole["outcomes"][test] = outcome
                whole["reasons"].pop(test, None)
        new = {test: why for test, why in record["reasons"].items() if whole["outcomes"][test] == "skipped"}
        whole["reasons"] = new | whole["reasons"]
    return list(releases.values())


def newest_releases(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each dependency of TOUCHED: the releases pinned and tried, the commit, how its tests went."""
    pins = dict(re.findall(r"^([^=#\s]+)==(\S+)", PINS.read_text(encoding="utf-8"), re.MULTILINE))
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        is_apart = any(name in record["versions"] for name in APART)
        for name, paths in TOUCHED.items():
            if name not in record["versions"] or (name in APART) != is_apart:
                continue
            row = rows.setdefault(
                name,
                {
                    "pinned": pins.get(name, ""),
                    "tried": record["versions"][name],
                    "commit": record["commit"],
                    "tests": [],
                    "outcomes": Counter(),
                },
            )
            for test, how in record["outcomes"].items():
                if path := next((path for path in paths if test.startswith(path)), None):
                    row["outcomes"][how] += 1
                    row["tests"] += [path] if path not in row["tests"] else []
    # Two processes run them in another order each time.
    return {
        name: row | {"tests": sorted(row["tests"], key=TOUCHED[name].index)}
        for name, row in rows.items()
        if row["tests"]
    }


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """One run: its head, the outcome of each family and layout, counts of the groups, reasons of skips."""
    parallel: dict[str, str] = {}
    groups: dict[str, Counter[str]] = {name: Counter() for name in GROUPS}
    for test, outcome in record["outcomes"].items():
        if test.endswith("[NOTSET]"):  # pytest's name for a parameter without values
            continue
        found = PARALLEL.search(test)
        if found:
            parallel[found["case"] or found["family"]] = outcome
            continue
        for name, marks in GROUPS.items():
            if any(mark in test for mark in marks):
                groups[name][outcome] += 1
                break
    heads = {key: record[key] for key in ("megatron", "torch", "python", "device", "date", "commit")}
    return heads | {
        "parallel": parallel,
        "groups": {name: dict(counts) for name, counts in groups.items()},
        "skipped": dict(Counter(record["reasons"].values())),
    }


def render(data: dict[str, Any]) -> str:
    """The page."""
    runs = data["runs"]
    versions = [run["megatron"] for run in runs]
    head = ["", *versions]
    about = [
        [key, *(str(run[key]) for run in runs)] for key in ("date", "commit", "device", "torch", "python")
    ]
    cases = sorted({case for run in runs for case in run["parallel"]}, key=_family)
    rows = [
        [*_family(case), *(MARKS.get(run["parallel"].get(case, ""), "") for run in runs)] for case in cases
    ]
    groups = [[name, *(_counts(run["groups"].get(name, {})) for run in runs)] for name in GROUPS]
    newest = [
        [
            *(name, row["pinned"], row["tried"], row["commit"]),
            *(", ".join(row["tests"]), _result(row["outcomes"])),
        ]
        for name, row in data.get("newest", {}).items()
    ]
    skips = sorted({(run["megatron"], why, n) for run in runs for why, n in run["skipped"].items()})
    return "\n".join(
        [
            HEAD,
            *_table(head, about),
            "",
            EQUIVALENCE,
            *_table(["family", "layout", *versions], rows),
            "",
            "## Groups of tests: passed, of how many",
            "",
            *_table(head, groups),
            "",
            NEWEST,
            *_table(["dependency", "pinned", "newest, tried", "commit", "tests", "result"], newest),
            "",
            "## Not run, and why",
            "",
            *_table(["release", "reason", "tests"], [[release, why, str(n)] for release, why, n in skips]),
            "",
        ]
    )


def _family(case: str) -> tuple[str, str]:
    family, _, layout = case.partition("-")
    return family, layout


def _by_version(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text)]


def _counts(outcomes: dict[str, int]) -> str:
    total = sum(outcomes.values())
    return f"{outcomes.get('passed', 0)} of {total}" if total else ""


def _result(outcomes: dict[str, int]) -> str:
    return ", ".join(f"{outcomes[how]} {how}" for how in ("passed", "failed", "skipped") if how in outcomes)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
