"""Results of an evaluation: as a table for people, and as JSON with all that is needed to repeat it."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import torch

from megatron_dyt.atomic import write_atomically
from megatron_dyt.evaluation import paper
from megatron_dyt.evaluation.checkpoint_model import LoadedModel

_KEPT = ("results", "groups", "group_subtasks", "n-shot", "n-samples", "higher_is_better")


def format_table(results: dict[str, Any]) -> str:
    """lm-eval's results as a Markdown table: a row for each metric of each task and group."""
    rows = [["task", "n-shot", "metric", "value", "stderr"], ["---"] * 5]
    for task, metrics in {**results["results"], **results.get("groups", {})}.items():
        for name, value in sorted(metrics.items()):
            metric, _, filtered = name.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            shots = str(results.get("n-shot", {}).get(task, ""))
            shown_error = f"{error:.4f}" if isinstance(error, float) else ""
            shown_metric = metric if filtered in ("", "none") else f"{metric} ({filtered})"
            rows.append([task, shots, shown_metric, f"{value:.4f}", shown_error])
    return paper.markdown(rows)


def make_report(
    results: dict[str, Any], loaded: LoadedModel, argv: list[str], limit: int | None, seconds: float
) -> dict[str, Any]:
    """All of a run's results, with the checkpoint, the versions and the command."""
    summary = paper.summary(results["results"], loaded.args)
    return {
        **{name: results[name] for name in _KEPT if name in results},
        **({paper.GROUP: summary} if summary else {}),
        "task_versions": results["versions"],
        "limit": limit,
        "checkpoint": {
            "path": str(loaded.checkpoint.root),
            "iteration": loaded.checkpoint.iteration,
            "normalization": loaded.args.normalization,
            "tokenizer_model": loaded.args.tokenizer_model,
            "seq_length": loaded.args.seq_length,
        },
        "prefix_token": loaded.prefix_token,
        "versions": _versions(),
        "command": shlex.join(["python", "-m", "megatron_dyt.evaluation", *argv]),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "tensor_model_parallel_size": loaded.args.tensor_model_parallel_size,
        "seconds": round(seconds, 1),
    }


def show(report: dict[str, Any]) -> str:
    """The report's tables: the paper's tasks beside Table 4 where all were evaluated, and all figures."""
    parts = [format_table(report)]
    if paper.GROUP in report:
        norm, harness = report["checkpoint"]["normalization"], report["versions"]["lm_eval"]
        parts.append(paper.format_summary(report[paper.GROUP], norm, harness, report["limit"]))
    return "\n\n".join(parts)


def _versions() -> dict[str, str]:
    import lm_eval

    import megatron_dyt
    from megatron_dyt.compat import megatron_version

    return {
        "lm_eval": lm_eval.__version__,
        "torch": torch.__version__,
        "megatron_core": megatron_version(),
        "megatron_dyt": megatron_dyt.__version__,
    }


def write(path: Path, report: dict[str, Any]) -> None:
    """Write the report as JSON; the file is whole or absent."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(report, indent=2, default=handle_non_serializable) + "\n"
    write_atomically(path, text.encode())
    print(f"megatron_dyt: results written to {path}")
