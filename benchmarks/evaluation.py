"""Requests per second of an evaluation: this package's lm-eval model beside lm-eval's `hf` and `megatron_lm`.

    python benchmarks/evaluation.py --scratch DIR [--requests 300] [--rounds 3] [--output DIR]

Makes a small RMSNorm checkpoint (11M parameters in its layers, 32,000 pieces as in the recipes; tokenizer
and texts from the standard library's sources) and its Hugging Face export in DIR, and gives the same requests
to each contestant in turn, round by round, each time in a process of its own: `hf` with the batch size auto,
and with the one that auto finds, without its search; `megatron_lm` at its default batch of one and at 16;
ours flat, shared, and shared in two processes. The requests have the mix of the paper's 15 tasks (MIX).
Prints medians; ends with 1 when scores differ by more than TOLERANCE.

Equal terms: `megatron_lm` puts no BOS in front, so the others do not here; it insists on bf16, which is
taken out, because scores in bf16 agree to a percent only and a CPU is slower in it. `--megatron` is its
MEGATRON_PATH, by default the directory of the installed megatron-core, whose training loop is enough.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common_report import heading, markdown_table, new_report, save_figures
from common_timing import in_turn

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
# Of a continuation's log-probability, in fp32.
TOLERANCE = 1e-4

# Name -> (processes, which function, its options).
CONTESTANTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "hf, batch auto": (1, "hugging_face", {"batch_size": "auto"}),
    "hf, batch 64": (1, "hugging_face", {"batch_size": 64}),
    "hf, batch 8": (1, "hugging_face", {"batch_size": 8}),
    "hf, batch 1": (1, "hugging_face", {"batch_size": 1}),
    "megatron_lm, batch 1": (1, "stock", {"micro_batch_size": 1}),
    "megatron_lm, batch 16": (1, "stock", {"micro_batch_size": 16}),
    "megatron_dyt, flat": (1, "ours", {"mode": "flat"}),
    "megatron_dyt, shared": (1, "ours", {"mode": "shared"}),
    "megatron_dyt, shared, 2 processes": (2, "ours", {"mode": "shared"}),
}

# What the others are compared with.
BASES = ("hf, batch auto", "hf, batch 64", "megatron_lm, batch 1", "megatron_lm, batch 16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True, help="directory for checkpoint and requests")
    parser.add_argument("--requests", type=int, default=300, help="how many, about")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")
    parser.add_argument(
        "--only", nargs="+", choices=CONTESTANTS, default=[*CONTESTANTS], metavar="NAME", help="default: all"
    )
    parser.add_argument("--megatron", type=Path, help="MEGATRON_PATH of megatron_lm")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write figures (JSON) there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options)
        return
    prepare(options.scratch, options.requests)
    report = new_report("evaluation", "cpu", {"requests": options.requests, "rounds": options.rounds})
    report["versions"]["lm_eval"] = metadata.version("lm_eval")
    report["results"] = compare(options)
    print(f"{heading(report)}\n{table(report)}")
    save_figures(report, options.output)
    worst = max(row["max_logprob_difference"] for row in report["results"])
    if worst > TOLERANCE:
        sys.exit(f"scores differ by {worst:.1e}, more than {TOLERANCE:.0e}")


# --- checkpoint and requests ----------------------------------------------------------------------


def prepare(scratch: Path, count: int) -> None:
    """Tokenizer, checkpoint, export and requests in `scratch`; all but the last are kept for later runs."""
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
    if not (scratch / "export").is_dir():
        words = ["--load", str(scratch / "checkpoint"), "--output", str(scratch / "export")]
        run([sys.executable, "-m", "megatron_dyt", "export", *words], "export")
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
    """Measure one contestant once and write its seconds and scores."""
    from megatron_dyt import cpu
    from megatron_dyt.training import dataset_helpers, launch

    cpu.enable()
    launch.prepare_process()
    dataset_helpers.prepare()
    _processes, kind, settings = CONTESTANTS[options.child]
    score = {"stock": stock, "ours": ours, "hugging_face": hugging_face}[kind](options, settings)
    from lm_eval.api.instance import Instance

    pairs = json.loads((options.scratch / "requests.json").read_text())
    requests = [
        Instance("loglikelihood", {}, tuple(pair), i, metadata=("benchmark", i, 1))
        for i, pair in enumerate(pairs)
    ]
    score(requests[:8])  # Allocations and lazy imports.
    start, cpu_start = time.perf_counter(), time.process_time()
    scores = score(requests)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    if os.environ.get("RANK", "0") == "0":
        result = {"seconds": seconds, "cpu_seconds": cpu_seconds, "scores": scores}
        (options.scratch / "result.json").write_text(json.dumps(result))


def hugging_face(options: argparse.Namespace, settings: dict[str, Any]) -> Callable[[Any], Any]:
    """lm-eval's `hf` on the export."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(str(options.scratch / "export"), device="cpu", dtype="float32", add_bos_token=False, **settings)
    return lm.loglikelihood


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


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contestant: medians over the rounds, and how far its scores are from the first's."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    contestants = {name: CONTESTANTS[name] for name in options.only}
    for name, (processes, _kind, _settings), _counts in in_turn(contestants, options.rounds, 0):
        found[name].append(measure(name, processes, options))
        print(f"{name}: {found[name][-1]['seconds']:.1f} s", flush=True)
    reference = found[options.only[0]][0]["scores"]
    return [row_of(name, taken, reference) for name, taken in found.items()]


def row_of(name: str, taken: list[dict[str, Any]], reference: list[list[Any]]) -> dict[str, Any]:
    pairs = [pair for result in taken for pair in zip(result["scores"], reference, strict=True)]
    processes, requests = CONTESTANTS[name][0], len(reference)
    seconds, cpu_seconds = ([result[column] for result in taken] for column in ("seconds", "cpu_seconds"))
    return {
        "name": name,
        "requests_per_second": requests / statistics.median(seconds),
        # Of each process: what other programs on the machine take is not in it.
        "requests_per_cpu_second": requests / (processes * statistics.median(cpu_seconds)),
        "seconds": seconds,
        "max_logprob_difference": max(abs(one[0] - other[0]) for one, other in pairs),
        "greedy_differences": sum(one[1] != other[1] for one, other in pairs),
    }


def measure(name: str, processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """One contestant, with all cores shared among its processes."""
    (options.scratch / "result.json").unlink(missing_ok=True)
    start = [sys.executable, "-W", "ignore"]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command = [*start, __file__, "--scratch", str(options.scratch)]
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


def table(report: dict[str, Any]) -> str:
    """Speeds, those by wall clock and by CPU time over the first contestants', and what scores differ by."""
    columns = (
        "lm-eval's model",
        "requests/s",
        *(f"over {name}" for name in BASES),
        "requests/CPU s",
        "scores differ by",
    )
    rows = {row["name"]: row for row in report["results"]}
    lines = []
    for name, row in rows.items():
        speed = row["requests_per_second"]
        over = [f"{speed / rows[base]['requests_per_second']:.1f}" if base in rows else "-" for base in BASES]
        cpu = f"{row['requests_per_cpu_second']:.1f}"
        lines.append([name, f"{speed:.1f}", *over, cpu, f"{row['max_logprob_difference']:.0e}"])
    return markdown_table(columns, lines)


if __name__ == "__main__":
    main()
