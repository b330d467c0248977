"""One forward pass of a Megatron GPT model over a batch of rows, with the head where it is needed."""

# Dimension letters, of names such as `hidden_SBH`:
#   B  rows of a batch     S  slots of the longest row     P  positions at which the head runs
#   H  hidden size         V  entries of the tokenizer's vocabulary

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_dyt.errors import UserError
from megatron_dyt.evaluation.batches import Row
from megatron_dyt.mcore.norm_sites import unwrap

# The logits of one slice of positions: 2**24 fp32 numbers are 64 MiB.
LOGITS_PER_SLICE = 2**24


class Positions(NamedTuple):
    """Where the head runs, int64 [P] each: rows of the batch, and slots in them."""

    row_P: Tensor
    slot_P: Tensor


# What is made of the logits, fp32 [P', V], at a slice of P' positions: tensors whose parts are joined.
UseLogits = Callable[[Tensor, slice], tuple[Tensor, ...]]


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
        self._calls_head = "output_processor" in inspect.signature(unwrap(model).forward).parameters

    def __call__(self, rows: Sequence[Row], where: Positions, use: UseLogits) -> tuple[Tensor, ...]:
        """`use(logits_PV, slice)` over slices of the positions `where`, joined, on the CPU."""
        tokens_BS = self._padded([row.tokens for row in rows])
        positions_BS = self._padded([row.positions for row in rows])
        mask_B1SS = None if all(row.is_chain for row in rows) else self._mask(rows)
        head = self._head(where, use)
        with torch.no_grad():
            if self._calls_head:
                return self.model(tokens_BS, positions_BS, mask_B1SS, output_processor=head)
            return head(**self._hidden_states(tokens_BS, positions_BS, mask_B1SS))

    def _head(self, where: Positions, use: UseLogits) -> Callable[..., tuple[Tensor, ...]]:
        """What takes the last hidden states (Megatron's `output_processor`) and returns `use`'s results."""
        row_P, slot_P = (index.to(self.device) for index in where)
        step = max(1, LOGITS_PER_SLICE // self.vocab_size)

        def head(**parts: Any) -> tuple[Tensor, ...]:
            hidden_P1H = parts["hidden_states"][slot_P, row_P].unsqueeze(1)  # From [S, B, H].
            pieces = []
            for start in range(0, len(hidden_P1H), step):
                part = slice(start, start + step)
                # Of all tensor-parallel ranks: each holds a part of the vocabulary.
                logits, _ = parts["output_layer"](
                    hidden_P1H[part], weight=parts["output_weight"], runtime_gather_output=True
                )
                logits_PV = parts["scale_logits"](logits)[:, 0, : self.vocab_size].float()
                pieces.append([result.cpu() for result in use(logits_PV, part)])
            return tuple(torch.cat(column) for column in zip(*pieces, strict=True))

        return head

    def _hidden_states(self, *inputs: Tensor | None) -> dict[str, Any]:
        """What Megatron hands to an output processor, from a forward pass with next to no head."""
        gpt: Any = unwrap(self.model)
        seen = []

        def keep(_layer: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden_SBH = arguments[0]
            seen.append(hidden_SBH)
            return (hidden_SBH[:1], *arguments[1:])

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

    def _padded(self, rows: list[list[int]]) -> Tensor:
        """int64 [B, S], zeros on the right: no token sees what comes after it."""
        longest = max(map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows]).to(self.device)

    def _mask(self, rows: Sequence[Row]) -> Tensor:
        """[B, 1, S, S] in the model's dtype: 0 where a token is seen, else -inf."""
        longest = max(map(len, rows))
        # Padding sees itself: a row of -inf alone would be NaN.
        seen_BSS = np.broadcast_to(np.eye(longest, dtype=bool), (len(rows), longest, longest)).copy()
        for seen_SS, row in zip(seen_BSS, rows, strict=True):
            seen_SS[: len(row), : len(row)] = row.visible()
        hidden_BSS = ~torch.from_numpy(seen_BSS).to(self.device)
        dtype = next(self.model.parameters()).dtype
        mask_BSS = torch.zeros(hidden_BSS.shape, dtype=dtype, device=self.device)
        return mask_BSS.masked_fill_(hidden_BSS, float("-inf"))[:, None]


def not_finite() -> UserError:
    """For results of NaN or infinity, which lm-eval would count as an answer like any other."""
    return UserError(
        "the model's results are not finite (NaN or infinity): its weights are not, or it overflows in its "
        "precision. Choose an iteration from before training failed with --ckpt-step"
    )
