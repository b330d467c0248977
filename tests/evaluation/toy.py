"""A model and a tokenizer small enough to check by hand, with Megatron's interfaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BOS, EOD = 1, 2
FIRST_LETTER = 3
LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"
VOCABULARY = FIRST_LETTER + len(LETTERS)
PADDED = 40


class ToyModel(torch.nn.Module):
    """Each position sees the running mean of the embeddings so far: causal, and order matters."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Parameter(torch.randn(PADDED, 8, generator=generator))
        self.head = torch.nn.Parameter(torch.randn(PADDED, 8, generator=generator))
        self.shapes: list[tuple[int, ...]] = []

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention_mask: None,
        output_processor: Callable[..., Any],
    ) -> Any:
        assert attention_mask is None
        self.shapes.append(tuple(tokens.shape))
        seen = (self.embedding[tokens] * (positions[..., None] + 1)).cumsum(1)
        hidden = seen / (positions[..., None] + 1) ** 2
        return output_processor(
            hidden_states=hidden.transpose(0, 1),
            output_layer=lambda states, weight: (states @ weight.T, None),
            output_weight=self.head,
            scale_logits=lambda logits: logits,
        )

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """fp64 [vocabulary] after `tokens`, by a forward pass over them alone."""
        ids = torch.tensor([tokens])
        logits = self(ids, torch.arange(len(tokens))[None], None, _all_logits)
        return logits[0, -1, :VOCABULARY].double()


def _all_logits(**parts: Any) -> torch.Tensor:
    logits, _ = parts["output_layer"](parts["hidden_states"], weight=parts["output_weight"])
    return logits.transpose(0, 1)


class ToyTokenizer:
    """One token a letter."""

    vocab_size = VOCABULARY
    bos: int | None = BOS
    eod = EOD

    def tokenize(self, text: str) -> list[int]:
        return [FIRST_LETTER + LETTERS.index(letter) for letter in text]

    def detokenize(self, ids: list[int]) -> str:
        return "".join(LETTERS[i - FIRST_LETTER] if i >= FIRST_LETTER else "?" for i in ids)


def naive_score(logits: Callable[[list[int]], torch.Tensor], inputs: list[int], targets: list[int]):
    """(log-probability of each target, greedy) by one full forward pass a target."""
    start = len(inputs) - len(targets) + 1
    each, greedy = [], True
    for i, target in enumerate(targets):
        row = logits(inputs[: start + i])
        each.append(float(row.log_softmax(0)[target]))
        greedy &= int(row.argmax()) == target
    return each, greedy
