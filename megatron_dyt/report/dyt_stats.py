"""Reads `dyt_stats.jsonl`, which `mcore/monitor.py` writes: alpha and the input's scale at every DyT site.

With pipeline parallelism each stage writes a file, `dyt_stats.stageN.jsonl`. Half a line is passed over.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dyt.errors import UserError

FILE_NAME = "dyt_stats.jsonl"
HOW_TO_WRITE = (
    "a DyT run writes it beside its checkpoints: -m megatron_dyt.pretrain --normalization DyT "
    "--dyt-stats-interval N --save DIR/checkpoint ..."
)


@dataclass(frozen=True)
class SiteStats:
    """One norm site at one iteration.

    `layer` counts from 1, `saturated` is the share of inputs that saturate (tanh: |alpha x| > 2).
    """

    name: str
    role: str
    layer: int
    alpha: float
    input_std: float
    alpha_std: float
    saturated: float


@dataclass(frozen=True)
class StatsRecord:
    """All sites at one iteration; `embedding_scale` is None for a model without one."""

    iteration: int
    sites: tuple[SiteStats, ...]
    embedding_scale: float | None


class Work(NamedTuple):
    """How a run's DyTs work at its last record, in words."""

    headline: str
    by_role: list[str]


def work(record: StatsRecord, function: str = "tanh") -> Work:
    """Whether DyT's `function` is a straight line or a squash at the sites of `record`.

    A straight line it is where less than 1 % of its output's variance is not linear in the input, if that
    is normal with the std that was measured, and less than 0.1 % of the inputs are saturated
    (`nn/statistics.py` has the reasons).
    """
    from megatron_dyt.nn.statistics import curved_share, is_straight

    roles: dict[str, list[tuple[SiteStats, float]]] = {}
    for site in record.sites:
        curved = curved_share(function, site.alpha_std) if site.alpha_std > 0 else 0.0
        roles.setdefault(site.role, []).append((site, curved))
    straight = {
        role: sum(is_straight(curved, site.saturated) for site, curved in found)
        for role, found in roles.items()
    }
    lines, sites = sum(straight.values()), len(record.sites)
    kind, count = ("a straight line", lines) if 2 * lines > sites else ("a squash", sites - lines)
    return Work(
        f"At iteration {record.iteration} {function} works as {kind} at {count} of {sites} sites.",
        [
            f"{role}: a straight line at {straight[role]} of {len(found)}; alpha · std "
            f"{_span([site.alpha_std for site, _ in found], '.2g')}, not linear "
            f"{_span([curved for _, curved in found], '.2%')} of the output's variance, saturated "
            f"{_span([site.saturated for site, _ in found], '.2%')} of the inputs"
            for role, found in roles.items()
        ],
    )


def _span(values: Sequence[float], spec: str) -> str:
    low, high = format(min(values), spec), format(max(values), spec)
    return low if low == high else f"{low} to {high}"


def find(directory: Path, stages: int) -> list[Path]:
    """The statistics of a run with `stages` pipeline stages in `directory`, the oldest file first.

    Empty where there are none.

    Raises:
        UserError: those of some stage are missing; without them layers would be missing unnoticed.
    """
    files = sorted(
        [*directory.glob("dyt_stats.stage*.jsonl"), *directory.glob(FILE_NAME)],
        key=lambda file: file.stat().st_mtime,
    )
    wanted = [directory / f"dyt_stats.stage{stage}.jsonl" for stage in range(stages)]
    missing = [file.name for file in wanted if file not in files]
    if files and stages > 1 and missing:
        raise UserError(
            f"{directory} lacks {', '.join(missing)} of a run with {stages} pipeline stages; copy the "
            "files of all stages there (every stage's first rank writes one)"
        )
    return files


def read(files: Sequence[Path]) -> tuple[StatsRecord, ...]:
    """The records of a run's statistics in the order of iterations.

    Args:
        files: those of all pipeline stages, the oldest first. Iterations that one of them lacks are left out.

    Raises:
        UserError: a file is not there, or no iteration is complete.
    """
    merged: dict[int, dict[str, Any]] = {}
    for path in files:
        for iteration, record in _lines(path).items():
            whole = merged.setdefault(iteration, {"iteration": iteration, "sites": {}})
            whole["sites"] |= {site["name"]: site for site in record["sites"]}
            if record.get("embedding_scale") is not None:
                whole["embedding_scale"] = record["embedding_scale"]
    names = {name for record in merged.values() for name in record["sites"]}
    complete = [record for _, record in sorted(merged.items()) if record["sites"].keys() == names]
    if not complete:
        raise UserError(f"{', '.join(map(str, files))}: no complete record of DyT statistics; {HOW_TO_WRITE}")
    return tuple(_merged(record) for record in complete)


def _lines(path: Path) -> dict[int, dict[str, Any]]:
    """The complete lines of one file by iteration."""
    if not path.is_file():
        raise UserError(f"{path} is missing or no file; {HOW_TO_WRITE}")
    records: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            data = json.loads(line)
            iteration = _record(data).iteration
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        records[iteration] = data
    return records


def _merged(record: dict[str, Any]) -> StatsRecord:
    """Sites of all stages in the order of layers; the final norm, which has none, is the last."""
    sites = list(record["sites"].values())
    sites.sort(key=lambda site: math.inf if site["layer"] is None else site["layer"])
    return _record(record | {"sites": sites})


def _record(data: dict[str, Any]) -> StatsRecord:
    # The final norm belongs to no layer (null); it stands after the last one.
    last = max((site["layer"] for site in data["sites"] if site["layer"] is not None), default=0)
    scale = data.get("embedding_scale")
    return StatsRecord(
        iteration=int(data["iteration"]),
        sites=tuple(_site(site, last) for site in data["sites"]),
        embedding_scale=None if scale is None else float(scale),
    )


def _site(site: dict[str, Any], last_layer: int) -> SiteStats:
    return SiteStats(
        name=str(site["name"]),
        role=str(site["role"]),
        layer=int(last_layer if site["layer"] is None else site["layer"]),
        alpha=float(site["alpha"]),
        input_std=float(site["input_std"]),
        alpha_std=float(site["alpha_std"]),
        saturated=float(site["saturated"]),
    )
