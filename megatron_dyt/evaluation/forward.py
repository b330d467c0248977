"""One forward pass of a Megatron GPT model over a batch of rows, with the head where it is needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from megatron_dyt.errors import UserError
from megatron_dyt.evaluation.attention import gpt_of
from megatron_dyt.evaluation.batches import Row

# The logits of one slice of positions: 2**24 fp32 numbers are 64 MiB.
LOGITS_PER_SLICE = 2**24


class Forward:
    """Runs `model`, in eval mode, without gradients, on `device`.

    `vocab_size` is the tokenizer's: the rows that pad the output layer take no probability. Rows that
    are trees need a model prepared by `attention.share_contexts`.
    """

    def __init__(self, model: torch.nn.Module, *, vocab_size: int, device: torch.device) -> None:
        self.model = model.eval()
        self.vocab_size = vocab_size
        self.device = device
        # Megatron has it from 0.18 on.
        self._calls_head = "output_processor" in inspect.signature(gpt_of(model).forward).parameters

    def __call__(
        self,
        rows: Sequence[Row],
        where: tuple[torch.Tensor, torch.Tensor],
        use: Callable[[torch.Tensor, slice], tuple[torch.Tensor, ...]],
    ) -> tuple[torch.Tensor, ...]:
        """`use(logits, slice)` over slices of the positions `where`, joined, on the CPU.

        `where` are the positions' rows and slots. `logits` are fp32 of shape (positions in the slice,
        vocab_size).
        """
        tokens = self._padded([row.tokens for row in rows])
        positions = self._padded([row.positions for row in rows])
        mask = None if all(row.is_chain for row in rows) else self._mask(rows)
        head = self._head(where, use)
        with torch.no_grad():
            if self._calls_head:
                return self.model(tokens, positions, mask, output_processor=head)
            return head(**self._hidden_states(tokens, positions, mask))

    def _head(
        self,
        where: tuple[torch.Tensor, torch.Tensor],
        use: Callable[[torch.Tensor, slice], tuple[torch.Tensor, ...]],
    ) -> Callable[..., tuple[torch.Tensor, ...]]:
        rows, slots = (index.to(self.device) for index in where)

        def head(**parts: Any) -> tuple[torch.Tensor, ...]:
            hidden = parts["hidden_states"][slots, rows].unsqueeze(1)
            pieces = []
            step = max(1, LOGITS_PER_SLICE // self.vocab_size)
            for start in range(0, len(hidden), step):
                part = slice(start, start + step)
                # Of all tensor-parallel ranks: each holds a part of the vocabulary.
                logits, _ = parts["output_layer"](
                    hidden[part], weight=parts["output_weight"], runtime_gather_output=True
                )
                logits = parts["scale_logits"](logits)[:, 0, : self.vocab_size].float()
                pieces.append([result.cpu() for result in use(logits, part)])
            return tuple(torch.cat(column) for column in zip(*pieces, strict=True))

        return head

    def _hidden_states(self, *inputs: torch.Tensor | None) -> dict[str, Any]:
        """What Megatron hands to an output processor, from a forward pass with next to no head."""
        gpt = gpt_of(self.model)
        seen = []

        def keep(_layer: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append(arguments[0])
            return (arguments[0][:1], *arguments[1:])

        hook = gpt.output_layer.register_forward_pre_hook(keep)
        try:
            self.model(*inputs)
        finally:
            hook.remove()
        tied = gpt.share_embeddings_and_output_weights
        return {
            "hidden_states": seen[0],
            "output_layer": gpt.output_layer,
            "output_weight": gpt.shared_embedding_or_output_weight() if tied else None,
            "scale_logits": lambda logits: logits,
        }

    def _padded(self, rows: list[list[int]]) -> torch.Tensor:
        """int64 [rows, longest], zeros on the right: no token sees what comes after it."""
        longest = max(map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows]).to(self.device)

    def _mask(self, rows: Sequence[Row]) -> torch.Tensor:
        """[rows, 1, longest, longest] in the model's dtype: 0 where a token is seen, else -inf."""
        longest = max(map(len, rows))
        # Padding sees itself: a row of -inf alone would be NaN.
        seen = np.broadcast_to(np.eye(longest, dtype=bool), (len(rows), longest, longest)).copy()
        for one, row in zip(seen, rows, strict=True):
            one[: len(row), : len(row)] = row.visible()
        dtype = next(self.model.parameters()).dtype
        hidden = ~torch.from_numpy(seen).to(self.device)
        return torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, float("-inf"))[
            :, None
        ]


def not_finite() -> UserError:
    """For results of NaN or infinity, which lm-eval would count as an answer like any other."""
    return UserError(
        "the model's results are not finite (NaN or infinity): its weights are not, or it overflows in its "
        "precision. Choose an iteration from before training failed with --ckpt-step"
    )
