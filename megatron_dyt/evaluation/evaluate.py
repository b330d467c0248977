"""One evaluation: from a checkpoint to a file of results and tables for people."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch

import megatron_dyt
from megatron_dyt.atomic import write_atomically
from megatron_dyt.checkpoints.saved_args import find_checkpoint
from megatron_dyt.compat import megatron_version
from megatron_dyt.errors import UserError
from megatron_dyt.evaluation import paper
from megatron_dyt.evaluation.checkpoint_model import LoadedModel
from megatron_dyt.evaluation.task_loading import load_tasks, seed

_log = logging.getLogger(__name__)

# What is kept of lm-eval's results.
_KEPT = ("results", "groups", "group_subtasks", "n-shot", "n-samples", "higher_is_better")


def evaluate(
    load: str,
    tasks: list[str],
    output: Path,
    *,
    command: str,
    ckpt_step: int | None = None,
    include_path: str | None = None,
    task_data: Path | None = None,
    limit: int | None = None,
    device: str | None = None,
    **model_args: Any,
) -> str | None:
    """Evaluate a checkpoint on lm-eval's `tasks`, zero-shot, and write the results to `output` as JSON.

    Runs alone or under torchrun. Returns the tables of the results on the process that reports, None on
    the others.

    Args:
        load, ckpt_step, model_args: as in lm-eval's `--model_args`; see `MegatronDyTLM.create_from_arg_obj`.
        command: what was typed, for the results.
        include_path, task_data: directories of tasks and of their documents; see `load_tasks`.
        limit: take the first documents of each task alone.
        device: "auto", "cpu" or "cuda"; None is as `cpu.device.activate` has it.

    Raises:
        UserError: for what cannot work, as far as possible before anything slow.
    """
    start = time.time()
    _check_output(output)
    find_checkpoint(load, ckpt_step)
    from megatron_dyt.evaluation.lm import MegatronDyTLM

    loaded_tasks = load_tasks(tasks, include_path, task_data)
    model_args |= {"load": load, "ckpt_step": ckpt_step}
    lm = MegatronDyTLM.create_from_arg_obj(model_args, {"device": device})
    assert lm.loaded is not None
    _log.info(f"evaluating {lm.loaded}")
    reports = lm.scorer.ranks.reports
    results = _run_lm_eval(lm, loaded_tasks, limit, reports)
    tables = None
    if reports:
        collected = collect(results, lm.loaded, command, limit, time.time() - start)
        _write(output, collected)
        tables = show(collected)
    torch.distributed.destroy_process_group()
    return tables


def _check_output(output: Path) -> None:
    """What would fail with the results in hand, on the process that writes them."""
    if output.is_dir():
        raise UserError(f"--output {output} is a directory; give a file name in it")
    if os.environ.get("RANK", "0") != "0":
        return
    above = next(parent for parent in output.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"--output {output}: {above} is not a directory; choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"--output {output}: nothing can be written in {above}; choose another place")


def _run_lm_eval(lm: Any, tasks: dict[str, Any], limit: int | None, reports: bool) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    # Tasks may shuffle (choices, documents): every rank must build the same requests.
    seed()
    results: dict[str, Any] = evaluate(
        lm,
        tasks,
        limit=limit,
        log_samples=False,
        # Standard errors by bootstrap are slow, and only the reporting rank shows them.
        bootstrap_iters=100_000 if reports else 0,
    )
    return results


# --- results --------------------------------------------------------------------------------------


def collect(
    results: dict[str, Any], loaded: LoadedModel, command: str, limit: int | None, seconds: float
) -> dict[str, Any]:
    """All of a run's results, with the checkpoint, the versions and the command."""
    import lm_eval

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
        "versions": {
            "lm_eval": lm_eval.__version__,
            "torch": torch.__version__,
            "megatron_core": megatron_version(),
            "megatron_dyt": megatron_dyt.__version__,
        },
        "command": command,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "tensor_model_parallel_size": loaded.args.tensor_model_parallel_size,
        "seconds": round(seconds, 1),
    }


def _write(path: Path, results: dict[str, Any]) -> None:
    """As JSON; the file is whole or absent."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(results, indent=2, default=handle_non_serializable) + "\n"
    write_atomically(path, text.encode())
    _log.info(f"results written to {path}")


def show(results: dict[str, Any]) -> str:
    """`collect`'s results as tables: the paper's tasks beside Table 4 where all were evaluated, and all."""
    parts = [_table(results)]
    if paper.GROUP in results:
        norm, harness = results["checkpoint"]["normalization"], results["versions"]["lm_eval"]
        parts.append(paper.format_summary(results[paper.GROUP], norm, harness, results["limit"]))
    return "\n\n".join(parts)


def _table(results: dict[str, Any]) -> str:
    """A row for each metric of each task and group, in Markdown.

    lm-eval's own `make_table` has letters in place of its headings with the current pytablewriter.
    """
    rows = [["task", "n-shot", "metric", "value", "stderr"], ["---"] * 5]
    for task, metrics in {**results["results"], **results.get("groups", {})}.items():
        shots = str(results.get("n-shot", {}).get(task, ""))
        for name, value in sorted(metrics.items()):
            metric, _, filtered = name.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            shown_error = f"{error:.4f}" if isinstance(error, float) else ""
            shown_metric = metric if filtered in ("", "none") else f"{metric} ({filtered})"
            rows.append([task, shots, shown_metric, f"{value:.4f}", shown_error])
    return paper.markdown(rows)
