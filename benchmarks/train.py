"""LLaMA 125M with both norms, for the time there is: python benchmarks/train.py --seconds 480 --output DIR

The recipe of that size with shorter sequences and smaller batches; the same steps, data and seed for both
norms. The data are the sources of Python's standard library, prepared as `make quickstart` does. A short run
tells how many steps fit. What is in DIR already, data and runs that have ended, is not made again. Local
layers: no Transformer Engine or apex.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common_picture import Line, lines_svg
from common_report import heading, markdown_table, new_report, save

from megatron_dyt.atomic import read_json, write_json
from megatron_dyt.recipes import load
from megatron_dyt.report import metrics

ROOT = Path(__file__).resolve().parents[1]
NORMS = ("RMSNorm", "DyT")
TRIAL = 20
# Of the seconds left: evaluation, saving, and steps slower than in the trial.
SHARE = 0.8
LOCAL = """
    --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion --no-rope-fusion --no-create-attention-mask-in-dataloader --num-workers 2
    --seed 1234
"""
# 65,536 tokens per step. Local attention writes its scores out: 16 * 12 * 1024^2 of them a layer.
SIZE = "--seq-length 1024 --max-position-embeddings 1024 --micro-batch-size 16 --global-batch-size 64 --bf16"
REHEARSAL = """
    --num-layers 1 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 2 --seq-length 64
    --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 2
"""


def call(*command: object) -> None:
    """Run the interpreter on a script or module of this checkout; what it prints goes to the log."""
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)


def make_data(directory: Path, vocab_size: int) -> None:
    corpus, tokenizer = directory / "corpus", directory / "tokenizer.model"
    call("examples/quickstart/corpus.py", "--output", corpus)
    text = f"--input {corpus / 'train.jsonl'} --vocab-size {vocab_size}"
    call(*f"-m megatron_dyt train-tokenizer {text} --output {tokenizer}".split())
    for split in ("train", "valid"):
        places = f"--input {corpus / split}.jsonl --output-prefix {directory / split}"
        call(*f"-m megatron_dyt prepare-data {places} --tokenizer-model {tokenizer}".split())


def log_interval(steps: int) -> int:
    return max(1, steps // 50)


def train(norm: str, steps: int, data: Path, output: Path, rehearse: bool) -> metrics.RunMetrics:
    """Train for that many steps; a run that has them already is only read."""
    file = metrics.find(output)
    if file.is_file() and metrics.read(file).steps[-1].iteration == steps:
        return metrics.read(file)
    file.unlink(missing_ok=True)
    call(
        *(
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            1,
            "-m",
            "megatron_dyt.pretrain",
        ),
        *load("125m").flags(norm),
        *(REHEARSAL if rehearse else SIZE).split(),
        *LOCAL.split(),
        *f"--train-iters {steps} --lr-warmup-iters {steps // 10} --save-interval {steps}".split(),
        *f"--eval-interval {steps} --eval-iters 8 --log-interval {log_interval(steps)}".split(),
        *f"--save {output / 'checkpoint'}".split(),
        *f"--train-data-path {data / 'train'} --valid-data-path {data / 'valid'}".split(),
        *f"--data-cache-path {data / 'cache'} --tokenizer-type SentencePieceTokenizer".split(),
        *f"--tokenizer-model {data / 'tokenizer.model'}".split(),
    )
    return metrics.read(file)


def step_seconds(run: metrics.RunMetrics) -> float:
    """The median over logged steps but the first, in which everything is set up."""
    return statistics.median(step.seconds for step in run.steps[1:] or run.steps)


def count_steps(args: argparse.Namespace, began: float) -> int:
    """How many steps of both norms fit; what was decided in an earlier call stays."""
    file = args.output / "steps"
    if (known := read_json(file)) is not None:
        return int(known)
    at = time.monotonic()
    trial = train("RMSNorm", TRIAL, args.output / "data", args.output / "trial", args.rehearse)
    start_up = time.monotonic() - at - TRIAL * step_seconds(trial)
    left = args.seconds - (time.monotonic() - began)
    steps = int((SHARE * left / len(NORMS) - start_up) / step_seconds(trial))
    if steps < TRIAL:
        sys.exit(
            f"train: {left:.0f} s are left, not enough for {TRIAL} steps of each norm; give more --seconds"
        )
    steps = min(steps, TRIAL) if args.rehearse else steps
    steps -= steps % log_interval(steps)  # So that the last step is logged.
    write_json(file, steps)
    return steps


def row(norm: str, run: metrics.RunMetrics) -> dict[str, Any]:
    return {
        "norm": norm,
        "steps": run.steps[-1].iteration,
        "tokens": run.steps[-1].consumed_tokens,
        "train_loss": run.steps[-1].loss,
        "valid_loss": run.validation[-1][1] if run.validation else None,
        "step_ms": 1e3 * step_seconds(run),
        "tokens_per_s": statistics.median(step.tokens_per_second for step in run.steps),
        "losses": [(step.iteration, step.loss) for step in run.steps],
    }


def table(report: dict[str, Any]) -> str:
    columns = ("", "steps", "tokens", "train loss", "validation loss", "step, ms", "tokens/s")
    rows = [
        [
            *(r["norm"], str(r["steps"]), f"{r['tokens']:,}", f"{r['train_loss']:.3f}"),
            *(f"{r['valid_loss']:.3f}", f"{r['step_ms']:.1f}", f"{r['tokens_per_s']:.0f}"),
        ]
        for r in report["results"]
    ]
    return markdown_table(columns, rows)


def picture(report: dict[str, Any]) -> str:
    lines = [Line(r["norm"], r["losses"]) for r in report["results"]]
    last = report["results"][0]["valid_loss"]
    title = f"LLaMA 125M on {report['hardware']['name']}"
    reference = (f"validation loss of {NORMS[0]}: {last:.3f}", last)
    return lines_svg(title, ("step", "loss, nats per token"), [("training loss", lines)], reference=reference)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, required=True, help="for everything")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rehearse", action="store_true", help=f"a tiny model, {TRIAL} steps, on a CPU too")
    args = parser.parse_args(argv)
    began = time.monotonic()
    args.output = args.output.resolve()
    data = args.output / "data"
    if not (data / "valid.manifest.json").is_file():
        make_data(data, 512 if args.rehearse else 8192)
    steps = count_steps(args, began)
    runs = {norm: train(norm, steps, data, args.output / norm.lower(), args.rehearse) for norm in NORMS}
    device = "cpu" if args.rehearse else "cuda"
    report = new_report("train", device, {"steps": steps, "seconds": args.seconds})
    report["results"] = [row(norm, run) for norm, run in runs.items()]
    print(f"{heading(report)}, {steps} steps\n{table(report)}")
    save(report, picture(report), args.output)


if __name__ == "__main__":
    main()
