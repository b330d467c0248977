"""A model and a tokenizer small enough to check by hand, with Megatron's interfaces."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dyt.evaluation.ranks import Ranks

BOS, EOD = 1, 2
FIRST_LETTER = 3
LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"
VOCABULARY = FIRST_LETTER + len(LETTERS)
PADDED = 40


class ToyModel(torch.nn.Module):
    """Each position sees the mean of the embeddings before it, by mask and position: order matters."""

    config = SimpleNamespace(hidden_size=8)

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
        attention_mask: torch.Tensor | None,
        output_processor: Callable[..., Any],
    ) -> Any:
        self.shapes.append(tuple(tokens.shape))
        if attention_mask is None:
            seen = torch.ones(tokens.shape[1], tokens.shape[1]).tril()
        else:
            assert set(attention_mask.unique().tolist()) <= {0.0, float("-inf")}
            seen = (attention_mask[:, 0] == 0).float()
        seen = seen @ (self.embedding[tokens] * (positions[..., None] + 1))
        hidden = seen / (positions[..., None] + 1) ** 2
        return output_processor(
            hidden_states=hidden.transpose(0, 1),
            output_layer=lambda states, weight, runtime_gather_output=None: (states @ weight.T, None),
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
    """One token per letter."""

    vocab_size = VOCABULARY
    bos: int | None = BOS
    eod = EOD

    def tokenize(self, text: str) -> list[int]:
        return [FIRST_LETTER + LETTERS.index(letter) for letter in text]

    def detokenize(self, ids: list[int]) -> str:
        return "".join(LETTERS[i - FIRST_LETTER] if i >= FIRST_LETTER else "?" for i in ids)


def naive_score(logits: Callable[[list[int]], torch.Tensor], inputs: list[int], targets: list[int]):
    """(log-probability of each target, greedy) by one full forward pass per target."""
    start = len(inputs) - len(targets) + 1
    each, greedy = [], True
    for i, target in enumerate(targets):
        row = logits(inputs[: start + i])
        each.append(float(row.log_softmax(0)[target]))
        greedy &= int(row.argmax()) == target
    return each, greedy


def ranks_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
    *,
    sum: Callable[[torch.Tensor], Any] | None = None,
    merge: Callable[[dict[Any, Any]], Any] | None = None,
) -> Iterator[Ranks]:
    """Two ranks without processes: `sum` and `merge` see each one's part, which is all that it gets back."""

    def seen(observer: Callable[[Any], Any] | None) -> Callable[..., Any]:
        def exchange(_ranks: Ranks, part: Any, *_device: Any) -> Any:
            assert observer is not None
            observer(part)
            return part

        return exchange

    monkeypatch.setattr(Ranks, "count", property(lambda _: 2))
    monkeypatch.setattr(Ranks, "sum", seen(sum))
    monkeypatch.setattr(Ranks, "merge", seen(merge))
    monkeypatch.setattr(Ranks, "check_same", lambda *_: None)
    for index in (0, 1):
        monkeypatch.setattr(Ranks, "index", property(lambda _, index=index: index))
        monkeypatch.setattr(Ranks, "reports", property(lambda _, index=index: index == 0))
        yield Ranks()
