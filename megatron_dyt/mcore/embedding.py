"""The learnable embedding scale: a scalar on the output of `LanguageModelEmbedding`.

The paper's LLaMA has it right after the embedding, initial value sqrt(hidden); without it "training
struggles to progress" (arXiv 2503.10622, section 6 and appendix).

Multi-token prediction layers embed their own input. On another pipeline stage than the first they have a
copy of the embedding, so of the scale too, and Megatron keeps copies of the word embedding alone: here
the scale's copies get the same marks, and their gradients are summed over the same group.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megatron_dyt.mcore.model_config import initial_embedding_scale
from megatron_dyt.mcore.norm import mark_sequence_parallel
from megatron_dyt.patching import wrapper

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.distributed import ProcessGroup


class EmbeddingScale(nn.Module):
    """x -> scale * x with a learnable scale of shape (1,), computed in fp32, returned in x's dtype.

    Attributes:
        is_copy: whether another pipeline stage has the parameter of which this one is a copy.
        tp_group: the embedding's tensor parallel group, over which the parameter is replicated.
    """

    def __init__(self, initial: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.initial = initial
        self.is_copy = False
        self.tp_group: ProcessGroup | None = None
        self.scale = nn.Parameter(torch.empty(1, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale to its initial value (also after a meta-device construction)."""
        nn.init.constant_(self.scale, self.initial)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (sequence, batch, hidden); returns the same shape and dtype."""
        return (x * self.scale.float()).to(x.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, object] | None = None,
    ) -> ShardedStateDict:
        """What Megatron saves: the parameter, whole on every rank; a copy says that it is one."""
        from megatron.core.transformer.utils import (
            ensure_metadata_has_dp_cp_group,
            make_sharded_tensors_for_checkpoint,
        )
        from megatron.core.utils import get_tensor_model_parallel_group_if_none

        # Given one group alone, Megatron takes every rank for the first of the other.
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=get_tensor_model_parallel_group_if_none(self.tp_group),
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        for tensor in state.values():
            tensor.replica_id = (int(self.is_copy), *tensor.replica_id[1:])
        return state

    def extra_repr(self) -> str:
        return f"initial={self.initial:g}"


@wrapper
def wrap_init(
    original: Callable[..., None],
    self: LanguageModelEmbedding,
    config: TransformerConfig,
    *args: object,
    **kwargs: object,
) -> None:
    """`LanguageModelEmbedding.__init__` that adds the scale when the config asks for one."""
    original(self, config, *args, **kwargs)
    initial = initial_embedding_scale(config)
    if initial is None:
        return
    self.embedding_scale = EmbeddingScale(initial, dtype=config.params_dtype)
    self.embedding_scale.tp_group = self.tp_group
    # The scale acts after the scatter, on this rank's part of the sequence only.
    sharded = config.sequence_parallel and self.scatter_to_sequence_parallel
    mark_sequence_parallel(self.embedding_scale, sharded)


@wrapper
def wrap_forward(
    original: Callable[..., torch.Tensor], self: LanguageModelEmbedding, *args: object, **kwargs: object
) -> torch.Tensor:
    """`LanguageModelEmbedding.forward` whose output is scaled when there is a scale."""
    output = original(self, *args, **kwargs)
    scale = getattr(self, "embedding_scale", None)
    return output if scale is None else scale(output)


@wrapper
def wrap_setup(original: Callable[[LanguageModule], None], self: LanguageModule) -> None:
    """`LanguageModule.setup_embeddings_and_output_layer` that marks the copies of the scale."""
    original(self)
    scale = _scale_of(self)
    if scale is not None and _has_copies(self.config):
        mark_shared(scale, is_copy=not self.pre_process)


def mark_shared(scale: EmbeddingScale, is_copy: bool) -> None:
    """Tell Megatron that two pipeline stages have this parameter, as it marks the word embedding."""
    scale.is_copy = is_copy
    # The distributed optimizer then gives it a bucket of its own, so that ranks of one data parallel
    # index hold the same part of it in both stages.
    scale.scale.shared_embedding = True  # type: ignore[attr-defined]
    if is_copy:
        # Counted once in the norm of the gradients.
        scale.scale.shared = True  # type: ignore[attr-defined]


@wrapper
def wrap_allreduce(
    original: Callable[..., None],
    model: list[nn.Module],
    config: TransformerConfig,
    embd_group: ProcessGroup | None = None,
    pp_group: ProcessGroup | None = None,
) -> None:
    """`_allreduce_word_embedding_grads` that sums the gradients of the scale's copies too."""
    original(model, config, embd_group, pp_group)
    if _has_copies(config) and initial_embedding_scale(config) is not None:
        sum_copies(model, config, embd_group, pp_group)


def sum_copies(
    model: list[nn.Module],
    config: TransformerConfig,
    embd_group: ProcessGroup | None,
    pp_group: ProcessGroup | None,
) -> None:
    """Sum the gradients of the embedding scale over the stages that have an embedding."""
    module: Any = import_module("megatron.core.distributed.finalize_model_grads")
    module._allreduce_embedding_grad(model, embd_group, pp_group, _scale_or_zero, config=config)


def _scale_or_zero(model: LanguageModule) -> nn.Parameter | SimpleNamespace:
    """The scale's parameter; a gradient of zero where it is frozen, and on a stage with tied output layer and
    no embedding.

    That stage is in the group, for the word embedding, so it must take part, and cannot know what is frozen
    elsewhere.
    """
    scale = _scale_of(model)
    if scale is not None and scale.scale.requires_grad:
        return scale.scale
    weight = model.shared_embedding_or_output_weight()
    if hasattr(weight, "main_grad"):
        return SimpleNamespace(main_grad=weight.main_grad.new_zeros(1))
    return SimpleNamespace(main_grad=weight.new_zeros(1, dtype=torch.float32))  # It is frozen too.


def _scale_of(model: LanguageModule) -> EmbeddingScale | None:
    return getattr(getattr(model, "embedding", None), "embedding_scale", None)


def _has_copies(config: TransformerConfig) -> bool:
    return bool(config.mtp_num_layers) and config.pipeline_model_parallel_size > 1
