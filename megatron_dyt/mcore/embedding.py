"""The learnable embedding scale: a scalar on the output of `LanguageModelEmbedding`.

The paper's LLaMA has it right after the embedding, initial value sqrt(hidden); without it "training
struggles to progress" (arXiv 2503.10622, section 6 and appendix).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megatron_dyt.mcore.args import initial_embedding_scale
from megatron_dyt.mcore.norm import mark_sequence_parallel


class EmbeddingScale(nn.Module):
    """x -> scale * x with a learnable scale of shape (1,), computed in fp32, returned in x's dtype."""

    def __init__(self, initial: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.initial = initial
        self.scale = nn.Parameter(torch.empty(1, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale to its initial value (also after a meta-device construction)."""
        nn.init.constant_(self.scale, self.initial)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (sequence, batch, hidden); returns the same shape and dtype."""
        return (x * self.scale.float()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"initial={self.initial:g}"


def wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    """`LanguageModelEmbedding.__init__` that adds the scale when the config asks for one."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, config, *args, **kwargs)
        initial = initial_embedding_scale(config)
        if initial is None:
            return
        self.embedding_scale = EmbeddingScale(initial, dtype=config.params_dtype)
        # The scale acts after the scatter, on this rank's part of the sequence only.
        sharded = config.sequence_parallel and self.scatter_to_sequence_parallel
        mark_sequence_parallel(self.embedding_scale, sharded)

    return __init__


def wrap_forward(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`LanguageModelEmbedding.forward` whose output is scaled when there is a scale."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = original(self, *args, **kwargs)
        scale = getattr(self, "embedding_scale", None)
        return output if scale is None else scale(output)

    return forward
