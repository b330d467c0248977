"""Run directories with known numbers, in the formats that training and evaluation write."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# As a run of 200 steps with --log-interval 10 logs them: the first step alone.
ITERATIONS = [1, *range(10, 201, 10)]


def loss_at(iteration: int, final: float) -> float:
    return final + 6 * math.exp(-iteration / 30)


def start_line(normalization: str = "DyT", **arguments: Any) -> dict[str, Any]:
    return {
        "event": "start",
        "time": "2026-01-02T03:04:05+00:00",
        "megatron_dyt": "0.1.0",
        "megatron_core": "0.19.2",
        "torch": "2.11.0",
        "normalization": normalization,
        "arguments": {"normalization": normalization, "train_iters": 200, **arguments},
    }


def step_line(iteration: int, loss: float | None = 3.0, **fields: Any) -> dict[str, Any]:
    """A logged step of 8 samples of 64 tokens."""
    return {
        "event": "train",
        "iteration": iteration,
        "steps": 10,
        "consumed_samples": 8 * iteration,
        "consumed_tokens": 8 * 64 * iteration,
        "global_batch_size": 8,
        "losses": {"lm loss": loss},
        "skipped_steps": 0,
        "nan_steps": 0,
        "seconds_per_step": 0.5,
        "tokens_per_second": 1024.0,
        "learning_rate": 1e-5 * iteration,
        "grad_norm": 1.0,
        "loss_scale": 1.0,
        **fields,
    }


def validation_line(
    iteration: int, loss: float | None, name: str | None = None, event: str = "validation"
) -> dict[str, Any]:
    return {"event": event, "iteration": iteration, "set": name, "losses": {"lm loss": loss}}


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_run(
    directory: Path, *, final: float, ms: float, normalization: str, bits: float = 1.8, acc: float = 0.35
) -> Path:
    """A run of 200 steps of 8 x 64 tokens whose numbers follow from the arguments."""
    lines = [start_line(normalization, lr=0.002, seq_length=64)]
    for before, i in zip([0, *ITERATIONS], ITERATIONS, strict=False):
        # The first two lines are warm-up; the rest alternates around `ms`.
        step = 50 * ms if i <= 10 else ms + (-1) ** (i // 10)
        lines.append(step_line(i, loss_at(i, final), steps=i - before, seconds_per_step=step / 1000))
        if i % 50 == 0:
            lines.append(validation_line(i, loss_at(i, final)))
    lines.append(validation_line(200, final))
    write_lines(directory / "checkpoint" / "metrics.jsonl", lines)
    evaluation = {
        "results": {
            "dyt_bits_per_byte": {
                "alias": "dyt_bits_per_byte",
                "bits_per_byte,none": bits,
                "bits_per_byte_stderr,none": "N/A",
            },
            "dyt_next_line": {"acc,none": acc, "acc_stderr,none": 0.01},
        },
        "versions": {"lm_eval": "0.4.13", "torch": "9.9.9"},
        "checkpoint": {"path": "x", "iteration": 200},
        "command": f"megatron-dyt eval --load {directory.name}/checkpoint",
        "seconds": 20.5,
    }
    (directory / "eval.json").write_text(json.dumps(evaluation))
    (directory / "run.json").write_text(
        json.dumps({"command": ["torchrun", "pretrain", "a<b&c"], "seconds": 100.0})
    )
    if normalization == "DyT":
        write_lines(directory / "checkpoint" / "dyt_stats.jsonl", map(stats_line, ITERATIONS))
    return directory


def site(role: str, layer: int | None, alpha: float, std: float, leaf: str = "norm") -> dict[str, Any]:
    return {
        "name": f"decoder.layers.{layer - 1}.{leaf}" if layer else f"decoder.{leaf}",
        "role": role,
        "layer": layer,
        "alpha": alpha,
        "input_std": std,
        "alpha_std": alpha * std,
        "saturated": 0.03 * (layer or 3),
    }


def stats_line(iteration: int) -> dict[str, Any]:
    """Three layers and the end."""
    return {
        "iteration": iteration,
        "sites": [
            *(site("attn", n, 0.5 + iteration / 1000, 1 + iteration * n / 400, "input") for n in (1, 2, 3)),
            site("final", None, 0.25, 2.0 + iteration / 100, "final_layernorm"),
        ],
        "embedding_scale": 50 + iteration / 100,
    }
