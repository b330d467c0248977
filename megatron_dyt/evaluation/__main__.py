"""Evaluate a checkpoint on lm-eval tasks, zero-shot: `python -m megatron_dyt.evaluation`.

Runs alone or under torchrun. Model, tokenizer and their flags come from the checkpoint, whatever
parallel layout saved it; `--tasks dyt_paper` is the paper's 15 tasks.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_dyt.checkpoints.saved_args import find_checkpoint
from megatron_dyt.cpu import device
from megatron_dyt.errors import UserError, run_main
from megatron_dyt.evaluation.attention import MODES
from megatron_dyt.evaluation.checkpoint_model import load_model
from megatron_dyt.evaluation.scoring import DEFAULT_BATCH_TOKENS


def main(argv: list[str] | None = None) -> None:
    """Evaluate as `argv` (default: the command line) says; `UserError` for what cannot work."""
    start = time.time()
    given = sys.argv[1:] if argv is None else argv
    options = _parse(given)
    find_checkpoint(options.load, options.ckpt_step)  # Before anything slow.
    _need_lm_eval()
    device.activate(["--device", options.device] if options.device else [])

    from megatron_dyt.evaluation import report
    from megatron_dyt.evaluation.lm import MegatronDyTLM
    from megatron_dyt.evaluation.task_loading import load_tasks

    tasks = load_tasks(options.tasks, options.include_path, options.task_data)
    loaded = load_model(
        options.load,
        ckpt_step=options.ckpt_step,
        tokenizer_model=options.tokenizer_model,
        tensor_parallel=options.tensor_model_parallel_size,
        pipeline_parallel=options.pipeline_model_parallel_size,
        bos=options.bos,
    )
    lm = MegatronDyTLM.of(
        loaded,
        mode=options.mode,
        batch_tokens=options.batch_tokens,
        cache=options.cache,
        max_length=options.max_length,
    )
    reports = lm.scorer.ranks.reports
    if reports:
        print(f"megatron_dyt: evaluating {loaded}", flush=True)
    results = _evaluate(lm, tasks, options.limit, reports)
    if reports:
        full = report.make_report(results, loaded, given, options.limit, time.time() - start)
        print(report.show(full))
        report.write(options.output, full)
    torch.distributed.destroy_process_group()


# --- command line ---------------------------------------------------------------------------------


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dyt.evaluation",
        description=__doc__,
    )
    _add_inputs(parser)
    _add_run(parser)
    options = parser.parse_args(argv)
    if not options.tasks:
        raise UserError("--tasks names no task; give lm-eval tasks, separated by commas")
    _check_output(options.output)
    for name in ("include_path", "task_data"):
        directory = getattr(options, name)
        if directory and not Path(directory).is_dir():
            raise UserError(f"--{name.replace('_', '-')} {directory}: no such directory")
    return options


def _check_output(path: Path) -> None:
    """What would fail with the results in hand, on the process that writes them."""
    if path.is_dir():
        raise UserError(f"--output {path} is a directory; give a file name in it")
    if os.environ.get("RANK", "0") != "0":
        return
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"--output {path}: {above} is not a directory; choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: nothing can be written in {above}; choose another place")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="checkpoint: what training had as --save")
    add("--ckpt-step", type=_positive, metavar="N", help="iteration (default: the latest)")
    add("--tokenizer-model", metavar="FILE", help="tokenizer instead of the checkpoint's path")
    add(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin contexts with BOS, not with an end of document (default: as the training data do, by "
        "their manifest; BOS where that is not in reach)",
    )
    add(
        "--tasks",
        required=True,
        type=_names,
        metavar="A,B",
        help="lm-eval tasks or groups; dyt_paper: the paper's 15",
    )
    add("--include-path", metavar="DIR", help="directory with more tasks (lm-eval YAML files)")
    add(
        "--task-data",
        type=Path,
        metavar="DIR",
        help="read the tasks' data from here, not from the Hub: what megatron-dyt eval-data wrote",
    )
    add("--limit", type=_positive, metavar="N", help="only the first N documents of each task")
    add(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="where to write the results, JSON",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--tensor-model-parallel-size",
        "--tp",
        type=_positive,
        metavar="N",
        help="processes that hold a model together (default: the fewest whose memory suffices)",
    )
    add(
        "--pipeline-model-parallel-size",
        "--pp",
        type=_positive,
        default=1,
        metavar="1",
        help="other sizes are refused with the tensor-parallel size to use",
    )
    add(
        "--mode",
        choices=MODES,
        default="auto",
        help="shared: common contexts once; flat: each request alone, with the model's own attention "
        "(flash attention where it has it); auto: shared where the model allows it",
    )
    add(
        "--batch-tokens",
        type=_positive,
        default=DEFAULT_BATCH_TOKENS,
        metavar="N",
        help="tokens in one forward pass, padding included (default: %(default)s)",
    )
    add("--max-length", type=_positive, metavar="N", help="of a sequence (default: the model's)")
    add("--cache", type=Path, metavar="DIR", help="keep results here, and take known ones from here")
    add("--device", metavar="{auto,cpu,cuda}", help="where to run (default: CUDA if there is any)")


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


def _evaluate(lm: Any, tasks: Any, limit: int | None, reports: bool) -> Any:
    import numpy as np
    from lm_eval.evaluator import evaluate

    from megatron_dyt.evaluation.task_loading import SEED

    # Tasks may shuffle (choices, documents): every rank must build the same requests.
    random.seed(SEED)
    np.random.seed(SEED)
    return evaluate(
        lm,
        tasks,
        limit=limit,
        log_samples=False,
        # Standard errors by bootstrap are slow, and only the reporting rank shows them.
        bootstrap_iters=100_000 if reports else 0,
    )


if __name__ == "__main__":
    run_main(main)
