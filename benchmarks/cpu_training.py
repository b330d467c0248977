"""A training step of `make quickstart`, DyT beside RMSNorm: python benchmarks/cpu_training.py [--output DIR]

With --against CHECKOUT the same runs by another checkout of megatron_dyt too (its C kernels compiled), with
--hugging-face a LLaMA of the same shape by transformers and PyTorch's AdamW, as one would write it.

Two processes train as the quickstart's two runs do, with their flags out of examples/quickstart.sh, on
mock data: Megatron's own training loop, optimizer, logging and the plugin's checks included. They take
turns: one iteration of one, while the other waits, then the other's; so whatever else the machine does
meets both. A process keeps the memory that it got at its start, which is worth a few percent by luck; so
the pair is started anew several times. Reported are the times of whole iterations, by the clock and of the
CPU, their ratio, and the ratio's spread over neighbouring pairs of iterations.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from common_picture import Bar, bars_svg
from common_report import add_output, heading, markdown_table, new_report, save
from common_timing import summary

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart.sh"
FLAGS = [
    # The tokenizer's 4096 pieces, with mock data in place of the corpus.
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "4095", "--num-workers", "0"),
    "--no-create-attention-mask-in-dataloader",
    # Logged every 5 steps, as there; no evaluation or checkpoint among the timed iterations.
    *("--log-interval", "5", "--eval-interval", "1000000", "--eval-iters", "0"),
    *("--save-interval", "1000000"),
]
WARM_UP = 4
HUGGING_FACE = "--hugging-face"  # in front of a child's flags


def quickstart_runs(script: str, steps: int) -> dict[str, list[str]]:
    """Run's name -> its training flags, from the arrays and the `run NAME LR FLAGS` lines of the script."""
    pattern = r"^(?:HIDDEN=[^\n]*|PORTABLE=\([^\n]*\)|(?:MODEL|RECIPE)=\(\n.*?^\))"
    arrays = re.findall(pattern, script, re.M | re.S)
    runs = re.findall(r"^run (\w+) (\S+) (.+)$", script, re.M)
    if len(arrays) != 4 or not runs:
        raise ValueError(f"{QUICKSTART} has no HIDDEN, MODEL, RECIPE, PORTABLE and `run` lines as expected")
    shell = "\n".join(
        [f"STEPS={steps}", *arrays, 'printf "%s\\n" "${MODEL[@]}" "${RECIPE[@]}" "${PORTABLE[@]}"']
    )
    shared = subprocess.run(
        ["bash", "-euc", shell], capture_output=True, text=True, check=True
    ).stdout.split()
    return {name: [*shared, "--lr", rate, *flags.split()] for name, rate, flags in runs}


class Seconds(NamedTuple):
    """Of one iteration: by the clock, and of the process's threads together, without their waiting."""

    wall: float
    cpu: float


# --- in a child: one iteration for each line that it is sent -----------------------------------------


def train_in_turn(argv: list[str], turns: Any, done: Any) -> None:
    """Megatron's training loop, in which each iteration waits for a line and answers with its seconds."""
    from megatron_dyt import cpu, pretrain
    from megatron_dyt.patching import Patches, Replacement

    started: list[float] = []

    def wait_for_turn(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            # From one call to the next: logging and what else follows a step belongs to the iteration.
            now = (time.perf_counter(), time.process_time())
            done.write(json.dumps([end - start for end, start in zip(now, started, strict=False)]) + "\n")
            done.flush()
            turns.readline()
            started[:] = (time.perf_counter(), time.process_time())
            return train_step(*args, **kwargs)

        return step

    # Observed from outside of the CPU runtime, which must be on before Megatron is imported.
    cpu.enable()
    observers = Patches()
    observers.apply([Replacement("megatron.training.training", "train_step", wait_for_turn)])
    pretrain.main(["--device", "cpu", *argv])


def train_hugging_face_in_turn(argv: list[str], turns: Any, done: Any) -> None:
    """The same for transformers' LLaMA of the shape that Megatron's flags `argv` give, on random tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def value(flag: str) -> int:
        return int(argv[argv.index(flag) + 1])

    config = LlamaConfig(
        hidden_size=value("--hidden-size"),
        intermediate_size=value("--ffn-hidden-size"),
        num_hidden_layers=value("--num-layers"),
        num_attention_heads=value("--num-attention-heads"),
        num_key_value_heads=value("--num-query-groups"),
        max_position_embeddings=value("--seq-length"),
        vocab_size=value("--vocab-size") + 1,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    assert model.config._attn_implementation == "sdpa"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, value("--train-iters"))
    shape = value("--micro-batch-size"), value("--seq-length")
    started: list[float] = []
    while True:
        now = (time.perf_counter(), time.process_time())
        done.write(json.dumps([end - start for end, start in zip(now, started, strict=False)]) + "\n")
        done.flush()
        turns.readline()
        started[:] = (time.perf_counter(), time.process_time())
        tokens = torch.randint(config.vocab_size, shape)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


# --- the parent --------------------------------------------------------------------------------------


class Runner:
    """A child that trains one iteration at a time, by `checkout`; `log` gets what it prints."""

    def __init__(self, argv: list[str], log: Path, checkout: Path = ROOT) -> None:
        self.log = log
        to_child, self.turns = os.pipe()
        self.done, from_child = os.pipe()
        command = [sys.executable, "-W", "ignore", __file__, "--child", str(to_child), str(from_child), *argv]
        # A lone process uses all cores unless it is told otherwise; waiting must not cost the other's time.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(checkout)}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, pass_fds=(to_child, from_child)
            )
        os.close(to_child)
        os.close(from_child)
        self.answers = os.fdopen(self.done)
        self._answer()  # it stands before its first iteration

    def iterate(self) -> Seconds:
        """Let the child do one iteration."""
        os.write(self.turns, b"\n")
        return Seconds(*self._answer())

    def _answer(self) -> list[float]:
        line = self.answers.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            raise RuntimeError(f"the training process ended, exit code {self.process.wait()}:\n{tail}")
        answer: list[float] = json.loads(line)
        return answer

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.answers.close()
        os.close(self.turns)


def everyone(
    runs: dict[str, list[str]], against: Path | None, hugging_face: bool
) -> tuple[dict[str, list[str]], dict[str, Path]]:
    """All runs by name, and the checkout of those that are not of this one."""
    earlier = {f"{name}, {against.name}": argv for name, argv in runs.items()} if against else {}
    checkouts = {name: against for name in earlier if against}
    others = {"Hugging Face": [HUGGING_FACE, *next(iter(runs.values()))]} if hugging_face else {}
    return runs | earlier | others, checkouts


@contextmanager
def runners(
    runs: dict[str, list[str]], checkouts: Mapping[str, Path] = MappingProxyType({})
) -> Iterator[dict[str, Runner]]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = {}
        for name, argv in runs.items():
            paths = ["--data-cache-path", str(directory / "cache"), "--save", str(directory / name)]
            log = directory / f"{name}.log"
            found[name] = Runner([*argv, *paths], log, checkouts.get(name, ROOT))
            stack.callback(found[name].stop)
        yield found


def measure(
    runs: dict[str, list[str]], rounds: int, starts: int, checkouts: Mapping[str, Path] = MappingProxyType({})
) -> dict[str, list[Seconds]]:
    """Run's name -> each timed iteration, of all starts; the order within a pair alternates."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in runs}
    for _ in range(starts):
        with runners(runs, checkouts) as found:
            order = list(found.items())
            for i in range(WARM_UP + rounds):
                for name, runner in order if i % 2 else order[::-1]:
                    taken = runner.iterate()
                    if i >= WARM_UP:
                        seconds[name].append(taken)
    return seconds


def results(seconds: dict[str, list[Seconds]]) -> list[dict[str, Any]]:
    """A row a run, with its times over the first run's: medians, and the quartiles of the pairs' ratios."""
    first = next(iter(seconds.values()))
    rows = []
    for name, taken in seconds.items():
        pairs = [a.wall / b.wall for a, b in zip(taken, first, strict=True)]
        low, _, high = statistics.quantiles(pairs, n=4)
        wall, cpu = ([getattr(each, kind) for each in taken] for kind in Seconds._fields)
        over_first = {
            "ratio": statistics.median(wall) / statistics.median(s.wall for s in first),
            "cpu_ratio": statistics.median(cpu) / statistics.median(s.cpu for s in first),
            "pair_quartile1": low,
            "pair_quartile3": high,
        }
        rows.append({"run": name, **summary(wall), "cpu_us": 1e6 * statistics.median(cpu), **over_first})
    return rows


def table(report: dict[str, Any]) -> str:
    columns = (
        "",
        "iteration, ms",
        "quartiles",
        "over the first",
        "quartiles of pairs",
        "CPU time, ms",
        "over the first",
    )
    rows = []
    for row in report["results"]:
        keys = ("median_us", "quartile1_us", "quartile3_us", "cpu_us")
        median, low, high, cpu = (f"{row[key] / 1e3:.0f}" for key in keys)
        spread = f"{row['pair_quartile1']:.3f} to {row['pair_quartile3']:.3f}"
        ratios = [f"{row[key]:.3f}" for key in ("ratio", "cpu_ratio")]
        rows.append([row["run"], median, f"{low} to {high}", ratios[0], spread, cpu, ratios[1]])
    return markdown_table(columns, rows)


def picture(report: dict[str, Any]) -> str:
    keys = ("median_us", "quartile1_us", "quartile3_us")
    bars = [Bar(row["run"], *(row[key] / 1e3 for key in keys), i) for i, row in enumerate(report["results"])]
    return bars_svg("An iteration of the quickstart", "milliseconds", [("", bars)], digits=0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=15, help="timed iterations of each process (default 15)"
    )
    parser.add_argument("--starts", type=int, default=4, help="processes of each run (default 4)")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, run in turn too")
    parser.add_argument("--hugging-face", action="store_true", help="transformers' LLaMA of that shape too")
    add_output(parser)
    args = parser.parse_args(argv)
    if args.against and not (args.against / "megatron_dyt").is_dir():
        parser.error(f"--against {args.against} is no checkout of megatron_dyt")
    if args.rounds < 2 or args.starts < 1:
        parser.error("--rounds must be at least 2 and --starts at least 1")
    steps = WARM_UP + args.rounds + 1
    runs = quickstart_runs(QUICKSTART.read_text(), steps)
    runs = {name: [*flags, *FLAGS] for name, flags in runs.items()}
    runs, checkouts = everyone(runs, args.against and args.against.resolve(), args.hugging_face)
    settings = {"rounds": args.rounds, "starts": args.starts, "runs": runs}
    report = new_report("cpu_training", "cpu", settings)
    print(f"{heading(report)}, {args.starts} x {args.rounds} iterations of each, in turn")
    report["results"] = results(measure(runs, args.rounds, args.starts, checkouts))
    print(table(report))
    save(report, picture(report), args.output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child_in, child_out = (int(descriptor) for descriptor in sys.argv[2:4])
        argv = sys.argv[4:]
        train = train_hugging_face_in_turn if argv[0] == HUGGING_FACE else train_in_turn
        train(argv, os.fdopen(child_in), os.fdopen(child_out, "w"))
    else:
        main()
