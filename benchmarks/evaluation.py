"""Requests per second of an evaluation: this package's lm-eval model beside lm-eval's own `megatron_lm`.

    python benchmarks/evaluation.py --scratch DIR [--requests 300] [--output FILE]

Makes a small RMSNorm checkpoint (11M parameters in its layers, 32,000 pieces as in the recipes; tokenizer
and texts from the standard library's sources) in DIR, and gives the same requests to each contestant, in a
process of its own: `megatron_lm` at its default batch of one and at 16; ours flat, shared, and shared in two
processes. The requests have the mix of the paper's 15 tasks (MIX). Prints a table and JSON; scores must
agree.

Equal terms: `megatron_lm` puts no BOS in front, so ours does not here; it insists on bf16, which is
taken out, because scores in bf16 agree to a percent only and a CPU is slower in it. `--megatron` is its
MEGATRON_PATH, by default the directory of the installed megatron-core, whose training loop is enough.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

SEQUENCE = 512
PIECES = 32000
MODEL = f"""
    --num-layers 6 --hidden-size 384 --ffn-hidden-size 1024 --num-attention-heads 6 --swiglu
    --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights
    --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --seq-length {SEQUENCE}
    --max-position-embeddings {SEQUENCE} --init-method-std 0.05 --mock-data --micro-batch-size 1
    --global-batch-size 1 --train-iters 2 --lr 1e-4 --lr-decay-style constant --num-workers 0
    --eval-iters 0 --eval-interval 100 --log-interval 1 --ckpt-format torch_dist --save-interval 2
    --tokenizer-type SentencePieceTokenizer --transformer-impl local --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion
"""
PORTABLE = "--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion"


class Kind(NamedTuple):
    """Questions of one task: how many it has, and about how long they are, in tokens.

    `prompt` is common to all questions of the task, `begin` to all answers of a question. `own` of 0
    stands for one word (yes, no). With `in_context` the answer is what the contexts differ in.
    """

    documents: int
    prompt: int
    context: int
    choices: int
    begin: int
    own: int
    in_context: bool = False


# Documents and choices are those of the data sets; the lengths are rough.
MIX = {
    "anli": Kind(3200, 0, 110, 3, 0, 0),
    "arc": Kind(3548, 0, 35, 4, 0, 6),
    "boolq": Kind(3270, 0, 160, 2, 0, 0),
    "hellaswag": Kind(10042, 0, 75, 4, 0, 30),
    "openbookqa": Kind(500, 0, 15, 4, 0, 6),
    "piqa": Kind(1838, 0, 20, 2, 0, 27),
    "record": Kind(10000, 0, 330, 11, 15, 20),
    "rte": Kind(277, 0, 90, 2, 0, 0),
    "truthfulqa": Kind(1634, 160, 25, 6, 0, 15),
    "wic": Kind(638, 0, 50, 2, 0, 0),
    "winogrande": Kind(1267, 0, 15, 2, 0, 10, in_context=True),
}
WORDS = (" yes", " no", " maybe")
# Log-probabilities of continuations of up to 40 tokens, in fp32.
TOLERANCE = 1e-3

# Name -> (processes, which function, its options).
CONTESTANTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "megatron_lm, batch 1": (1, "stock", {"micro_batch_size": 1}),
    "megatron_lm, batch 16": (1, "stock", {"micro_batch_size": 16}),
    "megatron_dyt, flat": (1, "ours", {"mode": "flat"}),
    "megatron_dyt, shared": (1, "ours", {"mode": "shared"}),
    "megatron_dyt, shared, 2 processes": (2, "ours", {"mode": "shared"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True, help="directory for checkpoint and requests")
    parser.add_argument("--requests", type=int, default=300, help="how many, about")
    parser.add_argument("--repeats", type=int, default=2, help="measurements of each; the best counts")
    parser.add_argument("--megatron", type=Path, help="MEGATRON_PATH of megatron_lm")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options)
        return
    prepare(options.scratch, options.requests)
    report = compare(options)
    print(table(report))
    text = json.dumps(report, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


# --- checkpoint and requests ----------------------------------------------------------------------


def prepare(scratch: Path, count: int) -> None:
    """Tokenizer, checkpoint and requests in `scratch`; the first two are kept for later runs."""
    from megatron_dyt.data import train_tokenizer

    scratch.mkdir(parents=True, exist_ok=True)
    texts = [path.read_text("utf-8", "ignore") for path in sources()]
    tokenizer = scratch / "tokenizer.model"
    if not tokenizer.is_file():
        corpus = scratch / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tokenizer.write_bytes(train_tokenizer.train([corpus], PIECES, max_bytes=10**7))
    if not (scratch / "checkpoint" / "latest_checkpointed_iteration.txt").is_file():
        flags = [*MODEL.split(), "--tokenizer-model", str(tokenizer), "--save", str(scratch / "checkpoint")]
        command = [sys.executable, "-m", "megatron_dyt.pretrain", "--device", "cpu", *flags]
        run(command, "training")
    (scratch / "requests.json").write_text(json.dumps(make_requests(texts, tokenizer, count)))


def sources() -> list[Path]:
    home = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in home.rglob("*.py") if "site-packages" not in path.parts)


def make_requests(texts: list[str], tokenizer: Path, count: int) -> list[tuple[str, str]]:
    """About `count` pairs (context, continuation) in the tasks' mix, of pieces of text."""
    import sentencepiece

    encoder = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    draw = random.Random(0)
    streams = [ids for ids in map(encoder.encode, draw.sample(texts, 200)) if len(ids) > 2 * SEQUENCE]

    def piece(length: int) -> str:
        """Text of about so many tokens, from 60 % to 140 %."""
        stream = draw.choice(streams)
        tokens = max(1, round(length * draw.uniform(0.6, 1.4)))
        start = draw.randrange(len(stream) - tokens)
        return " ".join(encoder.decode(stream[start : start + tokens]).split()) or "pass"

    total = sum(kind.documents * kind.choices for kind in MIX.values())
    requests = []
    for kind in MIX.values():
        prompt = piece(kind.prompt) + "\n\n" if kind.prompt else ""
        for _ in range(max(1, round(kind.documents * count / total))):
            requests += questions(kind, prompt, piece)
    return requests


def questions(kind: Kind, prompt: str, piece: Callable[[int], str]) -> list[tuple[str, str]]:
    """The requests of one document."""
    context = prompt + piece(kind.context)
    if kind.in_context:
        rest = " " + piece(kind.own)
        return [(f"{context} {piece(2)}", rest) for _ in range(kind.choices)]
    if not kind.own:
        return [(context, word) for word in WORDS[: kind.choices]]
    begin = " " + piece(kind.begin) if kind.begin else ""
    return [(context, f"{begin} {piece(kind.own)}") for _ in range(kind.choices)]


# --- contestants, each in its own process ---------------------------------------------------------


def run_child(options: argparse.Namespace) -> None:
    """Measure one contestant and write its seconds and scores."""
    from megatron_dyt import cpu
    from megatron_dyt.training import dataset_helpers, launch

    cpu.enable()
    launch.prepare_process()
    dataset_helpers.prepare()
    _processes, kind, settings = CONTESTANTS[options.child]
    score = {"stock": stock, "ours": ours}[kind](options, settings)
    from lm_eval.api.instance import Instance

    pairs = json.loads((options.scratch / "requests.json").read_text())
    requests = [
        Instance("loglikelihood", {}, tuple(pair), i, metadata=("benchmark", i, 1))
        for i, pair in enumerate(pairs)
    ]
    score(requests[:8])  # Allocations and lazy imports.
    seconds, cpu_seconds, scores = [], [], None
    for _ in range(options.repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        scores = score(requests)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    if os.environ.get("RANK", "0") == "0":
        result = {"seconds": seconds, "cpu_seconds": cpu_seconds, "scores": scores}
        (options.scratch / "result.json").write_text(json.dumps(result))


def stock(options: argparse.Namespace, settings: dict[str, Any]) -> Callable[[Any], Any]:
    """lm-eval's own model, on the CPU and without its --bf16."""
    import megatron.core
    import megatron.training
    from megatron.training import arguments, initialize

    # A name that the CPU runtime does not replace: scripts take it from `initialize`.
    megatron.training.initialize_megatron = initialize.initialize_megatron

    os.environ["MEGATRON_PATH"] = str(options.megatron or Path(megatron.core.__file__).parents[2])
    parse = arguments.parse_and_validate_args

    def in_fp32(*given: Any, **more: Any) -> Any:
        sys.argv = [word for word in sys.argv if word != "--bf16"]
        return parse(*given, **more)

    arguments.parse_and_validate_args = in_fp32
    from lm_eval.models import megatron_lm

    megatron_lm.torch = TorchOnCpu()
    lm = megatron_lm.MegatronLMEval(
        load=str(options.scratch / "checkpoint"),
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=str(options.scratch / "tokenizer.model"),
        seq_length=SEQUENCE,
        extra_args=f"{PORTABLE} --no-rope-fusion",
        **settings,
    )
    return lm.loglikelihood


class TorchOnCpu:
    """PyTorch, whose devices are all the CPU: `megatron_lm` asks for cuda:N by name."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, _name: str) -> torch.device:
        return torch.device("cpu")


def ours(options: argparse.Namespace, settings: dict[str, Any]) -> Callable[[Any], Any]:
    from megatron_dyt.evaluation.checkpoint_model import load_model
    from megatron_dyt.evaluation.lm import MegatronDyTLM

    class WithoutBos(MegatronDyTLM):
        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
            return super().tok_encode(string, add_special_tokens=False)

    lm = WithoutBos.of(load_model(str(options.scratch / "checkpoint")), **settings)
    return lm.loglikelihood


# --- comparison -----------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    reference: list[list[Any]] = []
    for name, (processes, _kind, _settings) in CONTESTANTS.items():
        result = measure(name, processes, options)
        reference = reference or result["scores"]
        pairs = list(zip(result["scores"], reference, strict=True))
        rows[name] = {
            "requests_per_second": round(len(pairs) / min(result["seconds"]), 2),
            # Of each process: what other programs on the machine take is not in it.
            "requests_per_cpu_second": round(len(pairs) / (processes * min(result["cpu_seconds"])), 2),
            "seconds": [round(seconds, 3) for seconds in result["seconds"]],
            "max_logprob_difference": max(abs(one[0] - other[0]) for one, other in pairs),
            "greedy_differences": sum(one[1] != other[1] for one, other in pairs),
        }
    for row in rows.values():
        for size in (1, 16):
            stock = rows[f"megatron_lm, batch {size}"]
            row[f"times_batch_{size}"] = round(row["requests_per_second"] / stock["requests_per_second"], 2)
    worst = max(row["max_logprob_difference"] for row in rows.values())
    return {
        "requests": len(reference),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": versions(),
        "contestants": rows,
        "scores_agree": worst <= TOLERANCE,
    }


def measure(name: str, processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """One contestant, with all cores shared among its processes."""
    (options.scratch / "result.json").unlink(missing_ok=True)
    start = [sys.executable, "-W", "ignore"]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command = [*start, __file__, "--scratch", str(options.scratch), "--repeats", str(options.repeats)]
    command += ["--child", name] + (["--megatron", str(options.megatron)] if options.megatron else [])
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    run(command, name, environment)
    result: dict[str, Any] = json.loads((options.scratch / "result.json").read_text())
    return result


def run(command: list[str], name: str, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def versions() -> dict[str, str]:
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in ("lm_eval", "megatron-core", "torch")}


def table(report: dict[str, Any]) -> str:
    heads = ("model", "requests/s", "× batch 1", "× batch 16", "requests/CPU s", "max Δ log-probability")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    columns = ("requests_per_second", "times_batch_1", "times_batch_16", "requests_per_cpu_second")
    for name, row in report["contestants"].items():
        figures = [row[column] for column in columns]
        lines.append(f"| {name} | {' | '.join(map(str, figures))} | {row['max_logprob_difference']:.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
