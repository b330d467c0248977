"""Evaluate a checkpoint on lm-eval tasks, zero-shot: `python -m megatron_dyt.evaluation`.

Runs alone or under torchrun, where every process holds the model and takes its share of the
requests. The model, its tokenizer and its flags come from the checkpoint.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_dyt.data.files import write_atomically
from megatron_dyt.errors import UserError, run_main
from megatron_dyt.evaluation.checkpoint_model import LoadedModel, find_checkpoint, load_model
from megatron_dyt.evaluation.scoring import DEFAULT_BATCH_TOKENS
from megatron_dyt.runtime import device

_SEED = 1234


def main(argv: list[str] | None = None) -> None:
    """Evaluate as `argv` (default: the command line) says; `UserError` for what cannot work."""
    start = time.time()
    given = sys.argv[1:] if argv is None else argv
    options = _parse(given)
    find_checkpoint(options.load, options.ckpt_step)  # Before anything slow.
    _need_lm_eval()
    device.activate(["--device", options.device] if options.device else [])
    tasks = _load_tasks(options.tasks, options.include_path)
    loaded = load_model(options.load, ckpt_step=options.ckpt_step, tokenizer_model=options.tokenizer_model)
    lm = loaded.language_model(options.batch_tokens)
    reports = lm.scorer.rank == 0
    if reports:
        print(f"megatron_dyt: evaluating {loaded}", flush=True)
    results = _evaluate(lm, tasks, options.limit, reports)
    if reports:
        print(format_table(results))
        _write(options.output, _report(results, loaded, given, time.time() - start))
    torch.distributed.destroy_process_group()


# --- command line ---------------------------------------------------------------------------------


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dyt.evaluation",
        description=__doc__,
    )
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="checkpoint: what training had as --save")
    add("--ckpt-step", type=_positive, metavar="N", help="iteration (default: the latest)")
    add("--tokenizer-model", metavar="FILE", help="tokenizer instead of the checkpoint's path")
    add("--tasks", required=True, type=_names, metavar="A,B", help="lm-eval tasks or groups")
    add("--include-path", metavar="DIR", help="directory with more tasks (lm-eval YAML files)")
    add("--limit", type=_positive, metavar="N", help="only the first N documents of each task")
    add(
        "--batch-tokens",
        type=_positive,
        default=DEFAULT_BATCH_TOKENS,
        metavar="N",
        help="tokens in one forward pass, padding included (default: %(default)s)",
    )
    add(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="where to write the results, JSON",
    )
    add("--device", metavar="{auto,cpu,cuda}", help="where to run (default: CUDA if there is any)")
    options = parser.parse_args(argv)
    if not options.tasks:
        raise UserError("--tasks names no task; give lm-eval tasks, separated by commas")
    if options.output.is_dir():
        raise UserError(f"--output {options.output} is a directory; give a file name in it")
    if options.include_path and not Path(options.include_path).is_dir():
        raise UserError(f"--include-path {options.include_path}: no such directory")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} given, must be 1 or more")
    return number


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def _need_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluation needs lm-eval, which is not installed. "
            "Install it with: pip install 'megatron-dyt[eval]'"
        )


# --- lm-eval --------------------------------------------------------------------------------------


def _load_tasks(names: list[str], include_path: str | None) -> Any:
    """lm-eval's loaded tasks, zero-shot; `UserError` for a name that it does not know."""
    from lm_eval.tasks import TaskManager

    # Indexing lm-eval's 14,000 own tasks takes seconds: only when one of them is wanted.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"--tasks: unknown {', '.join(unknown)}; allowed are lm-eval's tasks and those in "
            f"--include-path ({_of_user(manager, include_path) or 'none there'})"
        )
    loaded = manager.load(names)
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    return loaded


def _of_user(manager: Any, include_path: str | None) -> str:
    if include_path is None:
        return ""
    from lm_eval.tasks import TaskManager

    return ", ".join(TaskManager(include_path=include_path, include_defaults=False).all_tasks)


def _evaluate(lm: Any, tasks: Any, limit: int | None, reports: bool) -> Any:
    import numpy as np
    from lm_eval.evaluator import evaluate

    # Tasks may shuffle (choices, documents): every rank must build the same requests.
    random.seed(_SEED)
    np.random.seed(_SEED)
    return evaluate(
        lm,
        tasks,
        limit=limit,
        log_samples=False,
        # Standard errors by bootstrap are slow, and only the reporting rank shows them.
        bootstrap_iters=100_000 if reports else 0,
    )


# --- results --------------------------------------------------------------------------------------


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
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [" | ".join(map(str.ljust, row, widths)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _report(results: dict[str, Any], loaded: LoadedModel, argv: list[str], seconds: float) -> dict[str, Any]:
    kept = ("results", "groups", "group_subtasks", "n-shot", "n-samples", "higher_is_better")
    return {
        **{name: results[name] for name in kept if name in results},
        "task_versions": results["versions"],
        "checkpoint": {
            "path": str(loaded.checkpoint.root),
            "iteration": loaded.checkpoint.iteration,
            "normalization": loaded.args.normalization,
            "tokenizer_model": loaded.args.tokenizer_model,
            "seq_length": loaded.args.seq_length,
        },
        "versions": _versions(),
        "command": shlex.join(["python", "-m", "megatron_dyt.evaluation", *argv]),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "seconds": round(seconds, 1),
    }


def _versions() -> dict[str, str]:
    import lm_eval

    import megatron_dyt
    from megatron_dyt.mcore.compat import megatron_version

    return {
        "lm_eval": lm_eval.__version__,
        "torch": torch.__version__,
        "megatron_core": megatron_version(),
        "megatron_dyt": megatron_dyt.__version__,
    }


def _write(path: Path, report: dict[str, Any]) -> None:
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(report, indent=2, default=handle_non_serializable) + "\n"
    write_atomically(path, text.encode())
    print(f"megatron_dyt: results written to {path}")


if __name__ == "__main__":
    run_main(main)
