"""What converting a trained LLaMA to DyT loses, and what a short fine-tune regains.

    python examples/convert_llama.py --output DIR

trains a small Hugging Face LLaMA with RMSNorm on the bytes of Python's standard library, converts copies of
it in several ways, and trains each of them, and the RMSNorm model itself, on for the same steps over the same
batches. Prints a table of validation losses and writes DIR/results.json; DIR/rmsnorm holds the trained model,
and is used again when it is there. docs/convert.md has the figures.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import random
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_dyt import convert_norms
from megatron_dyt.atomic import write_json
from megatron_dyt.errors import UserError, run_main

LENGTH, ROWS = 128, 16
SHAPE = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6, "num_attention_heads": 4}
VALIDATION_BATCHES = 20
CALIBRATION_ROWS = 32

# How a copy becomes a DyT model: (name, arguments of convert_norms, whether to calibrate).
WAYS: list[tuple[str, dict[str, Any] | None, bool]] = [
    ("RMSNorm, as it was", None, False),
    ("DyT, alpha 0.5, RMSNorm's weight", {}, False),
    ("DyT, calibrated each alone", {"sequential": False}, True),
    ("DyT, calibrated in sequence, no bias", {"bias": False, "refine": False}, True),
    ("DyT, calibrated in sequence", {"refine": False}, True),
    ("DyT, then refined", {}, True),
]


def main(argv: list[str] | None = None) -> None:
    """Run the comparison."""
    options = parse(sys.argv[1:] if argv is None else argv)
    train, valid = read_bytes(options.megabytes)
    trained = options.output / "rmsnorm"
    if not trained.exists():
        model = pretrain(train, valid, options.steps)
        model.save_pretrained(str(trained))
    model = LlamaForCausalLM.from_pretrained(str(trained))
    calibration = batch(train, random.Random(2), CALIBRATION_ROWS)
    rows = []
    for name, arguments, calibrated in WAYS:
        made = copy.deepcopy(model)
        if arguments is not None:
            convert_norms(made, calibration if calibrated else None, **arguments)
        losses = {0: validation_loss(made, valid)}
        for lr in options.tune_lr:
            tuned = copy.deepcopy(made)
            found = fine_tune(tuned, train, valid, lr, options.tune_steps)
            losses |= {step: min(loss, losses.get(step, math.inf)) for step, loss in found.items()}
        rows.append({"way": name, "losses": losses})
        print(table_row(name, losses), flush=True)
    write_json(options.output / "results.json", {"settings": settings(options), "results": rows})


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR")
    add("--steps", type=int, default=900, help="of the RMSNorm model's training")
    add("--tune-steps", type=int, nargs="+", default=[20, 100, 300], help="where the loss is taken")
    add("--tune-lr", type=float, nargs="+", default=[3e-4, 1e-3], help="each is tried; the best counts")
    add("--megabytes", type=float, default=12, help="of text")
    return parser.parse_args(argv)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return given | {
        "python": platform.python_version(),
        **versions,
        "model": SHAPE,
        "length": LENGTH,
        "rows": ROWS,
    }


def table_row(name: str, losses: dict[int, float]) -> str:
    return f"| {name} | " + " | ".join(f"{losses[step]:.3f}" for step in sorted(losses)) + " |"


# --- data -----------------------------------------------------------------------------------------


def read_bytes(megabytes: float) -> tuple[Tensor, Tensor]:
    """uint8 training and validation bytes of the standard library's sources; 5 % of the files validate."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    random.Random(0).shuffle(files)
    text = b"".join(path.read_bytes() for path in files)[: int(megabytes * 1e6)]
    if len(text) < 1e5:
        raise UserError(f"{root} has {len(text)} bytes of .py files; 100 KB are the least. Use a full Python")
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = len(tokens) // 20
    return tokens[cut:], tokens[:cut]


def batch(tokens: Tensor, source: random.Random, rows: int = ROWS) -> Tensor:
    """int64 (rows, LENGTH) from places that `source` chooses."""
    starts = [source.randrange(len(tokens) - LENGTH) for _ in range(rows)]
    return torch.stack([tokens[start : start + LENGTH] for start in starts]).long()


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, valid: Tensor) -> float:
    """Nats per byte, over the same batches at every call."""
    source = random.Random(1)
    losses = [model(x, labels=x).loss for x in (batch(valid, source) for _ in range(VALIDATION_BATCHES))]
    return float(torch.stack(losses).mean())


# --- training -------------------------------------------------------------------------------------


def pretrain(train: Tensor, valid: Tensor, steps: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE, vocab_size=256, max_position_embeddings=LENGTH, initializer_range=0.08, use_cache=False
    )
    model = LlamaForCausalLM(config)

    def rate(step: int) -> float:
        return 2e-3 * min(1.0, (step + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * step / steps))

    fit(model, train, steps, rate, seed=3)
    print(f"RMSNorm model: {steps} steps, validation loss {validation_loss(model, valid):.3f}", flush=True)
    return model


def fine_tune(
    model: LlamaForCausalLM, train: Tensor, valid: Tensor, lr: float, points: list[int]
) -> dict[int, float]:
    """Validation losses after `points` steps at a constant rate, with the same batches for every model."""
    losses: dict[int, float] = {}

    def look(step: int) -> None:
        if step in points:
            losses[step] = validation_loss(model, valid)

    fit(model, train, max(points), lambda step: lr * min(1.0, (step + 1) / 10), seed=4, after=look)
    return losses


def fit(
    model: LlamaForCausalLM,
    train: Tensor,
    steps: int,
    rate: Callable[[int], float],
    *,
    seed: int,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Train with AdamW; `rate(step)` is the learning rate, `after(steps done)` is called behind each step."""
    source = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        x = batch(train, source)
        optimizer.zero_grad()
        model(x, labels=x).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after(step + 1)


if __name__ == "__main__":
    run_main(main)
