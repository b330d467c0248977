"""Error of DyT's FP8 output beside Transformer Engine's scaling recipes: python experiments/fp8/error.py

The recipes are emulated from their documentation (`transformer_engine.common.recipe`): TE needs a GPU:

- delayed scaling (its default: margin 0, the maximum of a history of 1024 steps): scale = 448 / the largest
  magnitude of earlier steps, 1 in the first one; the cast saturates.
- current scaling: scale = 448 / the largest magnitude of the tensor itself, in a pass of its own.
- DyT's: scale = 448 / max(|weight| + |bias|).

Activations have channels of very different scale, some tokens far above the others, and a weight that grows.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from fp8 import FP8, FP8_MAX, dyt_fp8
from torch import Tensor

from megatron_dyt.ops import dyt

HISTORY = 1024

Quantizer = Callable[[Tensor], Tensor]


def cast(y: Tensor, scale: Tensor | float) -> Tensor:
    """y through FP8 and back, saturating as TE's cast does."""
    return (y * scale).clamp(-FP8_MAX, FP8_MAX).to(FP8).float() / scale


class Delayed:
    """Delayed scaling of one tensor, step by step."""

    def __init__(self) -> None:
        self.history: list[Tensor] = []

    def __call__(self, y: Tensor) -> Tensor:
        scale = FP8_MAX / torch.stack(self.history[-HISTORY:]).max() if self.history else 1.0
        self.history.append(y.abs().max())
        return cast(y, scale)


def current(y: Tensor) -> Tensor:
    """Current scaling."""
    return cast(y, FP8_MAX / y.abs().max())


class Run:
    """DyT sites of one layer over some steps.

    Args:
        jump: what the weight is multiplied by at once at half time; it grows by 0.1 % a step otherwise.
    """

    def __init__(self, steps: int, tokens: int, hidden: int, jump: float, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.steps, self.tokens, self.hidden, self.jump = steps, tokens, hidden, jump
        self.channels = torch.exp(self._normal(hidden))
        self.weight = torch.exp(0.5 * self._normal(hidden))
        self.bias = 0.1 * self._normal(hidden)
        self.linear = self._normal(hidden, hidden) * hidden**-0.5
        self.alpha = torch.full((1,), 0.5)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator)

    def errors(self) -> list[dict[str, float]]:
        """For each step, by recipe: root mean square error of the linear layer behind, over its output's."""
        delayed, found = Delayed(), []
        for step in range(self.steps):
            weight = self.weight * 1.001**step * (self.jump if step >= self.steps // 2 else 1.0)
            outliers = torch.where(torch.rand(self.tokens, 1, generator=self.generator) < 0.01, 20.0, 1.0)
            x = (self._normal(self.tokens, self.hidden) * self.channels * outliers).bfloat16()
            y8, scale_inv = dyt_fp8(x, self.alpha, weight, self.bias)
            y = dyt(x, self.alpha, weight, self.bias).float()
            exact = dyt(x.double(), self.alpha, weight, self.bias) @ self.linear.double()
            results = {
                "delayed scaling": delayed(y),
                "current scaling": current(y),
                "DyT's bound": y8.float() * scale_inv,
            }
            found.append(
                {
                    name: float((r.double() @ self.linear.double() - exact).norm() / exact.norm())
                    for name, r in results.items()
                }
            )
        return found


def summary(found: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """By recipe: the error in the first step, the worst at the jump, and the last."""
    half = len(found) // 2
    return {
        name: {"first": found[0][name], "at the jump": found[half][name], "last": found[-1][name]}
        for name in found[0]
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument(
        "--jump", type=float, default=2.0, help="factor on the weight at half time (default 2)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the errors of all steps to FILE")
    args = parser.parse_args(argv)
    if args.steps < 2 or min(args.tokens, args.hidden) < 1 or args.jump <= 0:
        parser.error("--steps must be at least 2, --tokens and --hidden at least 1, --jump above 0")
    found = Run(args.steps, args.tokens, args.hidden, args.jump).errors()
    print(f"relative error of y @ W; hidden {args.hidden}, {args.tokens} tokens, weight times {args.jump:g}")
    print("| scale | first step | at the jump | last step |\n|---|---|---|---|")
    for name, values in summary(found).items():
        print(f"| {name} | {' | '.join(f'{value:.4f}' for value in values.values())} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
